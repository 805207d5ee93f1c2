"""A row of each benchmark in its official form, for tests that read benchmarks."""

import json

from patarm_jax.config.sections import DataSection
from tests.chat_server import BAD, GOOD

# One row of each official format, in which the good response is the right one.

ROWS = {
    "rewardbench": {
        "prompt": "Hi", "chosen": GOOD, "chosen_model": "a", "rejected": BAD, "rejected_model": "b",
        "subset": "donotanswer", "id": 7,
    },
    "rewardbench2": {
        "id": "3", "prompt": "Hi", "chosen": [GOOD], "rejected": [BAD] * 3, "num_correct": 1, "num_incorrect": 3,
        "total_completions": 4, "models": ["m"] * 4, "subset": "Precise IF", "additional_metadata": None,
    },
    "rm-bench": {"id": "code/4", "prompt": "Hi", "chosen": [GOOD] * 3, "rejected": [BAD] * 3, "domain": "code"},
    "judgebench": {
        "pair_id": "u1", "original_id": None, "source": "livebench-math", "question": "Hi", "response_model": "m",
        "response_A": BAD, "response_B": GOOD, "label": "B>A",
    },
    "llmbar": {"input": "Hi", "output_1": BAD, "output_2": GOOD, "label": 2},
    "rmb": {
        "pair_uid": "9", "conversation_input": [{"role": "user", "content": "Hi", "language": "English"}],
        "chosen": {"llm_name": "a", "answer": GOOD}, "reject": {"llm_name": "b", "answer": BAD},
        "category_path": "Pairwise_set/Helpfulness/Code/Documentation",
    },
    "ppe": {
        "question_id": "q", "model_a": "a", "model_b": "b", "winner": "model_b", "prompt": "Hi", "response_1": BAD,
        "response_2": GOOD, "language": "English", "is_code": True,
    },
    "pairs": {"prompt": "Hi", "chosen": GOOD, "rejected": BAD, "domain": "math", "source": "mine"},
}  # fmt: skip
SUBSETS = {
    "rewardbench": ("donotanswer", "safety"),
    "rewardbench2": ("Precise IF", "instruction_following"),
    "rm-bench": ("code", "code"),
    "judgebench": ("livebench-math", "math"),
    "llmbar": ("Natural", "chat"),
    "rmb": ("Helpfulness/Code", "code"),
    "ppe": ("human-code", "code"),
    "pairs": ("mine", "math"),
}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(path=str(path), split="")
