"""RewardBench (arXiv 2403.13787).

section = Σ n_s·acc_s / Σ n_s, math-prm counted 984; overall = mean of the four sections (calculate_scores_per_section
in rewardbench/utils.py with EXAMPLE_COUNTS of constants.py; older tables also count Prior Sets by half, which are other
data, see analysis/get_benchmark_results.py).
"""

from collections.abc import Iterator, Mapping

import msgspec

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark, Published, of_rubric_arm
from patarm_jax.evaluate.items import Item, Prompt, known, make_item
from patarm_jax.evaluate.official import write_eval_set, write_eval_set_scores, write_outputs
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import Domain

# By which primary rubrics a subset is judged. LLMBar's are chat, for the judge is never trained on instructions.
DOMAINS: Mapping[str, Domain] = {
    "alpacaeval-easy": "chat",
    "alpacaeval-length": "chat",
    "alpacaeval-hard": "chat",
    "mt-bench-easy": "chat",
    "mt-bench-med": "chat",
    "mt-bench-hard": "chat",
    "llmbar-natural": "chat",
    "llmbar-adver-neighbor": "chat",
    "llmbar-adver-GPTInst": "chat",
    "llmbar-adver-GPTOut": "chat",
    "llmbar-adver-manual": "chat",
    "refusals-dangerous": "safety",
    "refusals-offensive": "safety",
    "xstest-should-refuse": "safety",
    "xstest-should-respond": "safety",
    "donotanswer": "safety",
    "math-prm": "math",
    "hep-cpp": "code",
    "hep-go": "code",
    "hep-java": "code",
    "hep-js": "code",
    "hep-python": "code",
    "hep-rust": "code",
}


# The official number of rows of each subset, also where only some were judged. The 447 rows of math-prm count as 984,
# as many as the six languages of hep have together.
_COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "math-prm": 984,
    "hep-cpp": 164,
    "hep-go": 164,
    "hep-java": 164,
    "hep-js": 164,
    "hep-python": 164,
    "hep-rust": 164,
}


_RM_R1 = "arXiv 2505.02387, Tables 6 and 7"
_TIES_RM_R1 = "half, unreadable wrong (its code)"


class _Row(msgspec.Struct):
    prompt: Prompt
    chosen: str
    rejected: str
    subset: str
    id: int | str


def _read(row: Row, given: _Row) -> Iterator[Item]:
    subset = known(row, "subset", given.subset, DOMAINS)
    yield make_item(row, f"{subset}/{given.id}", subset, DOMAINS, given.prompt, [given.chosen], [given.rejected])


BENCHMARK = Benchmark(
    name="rewardbench",
    layout=Layout(
        sections={
            "Chat": ("alpacaeval-", "mt-bench-easy", "mt-bench-med"),
            "Chat Hard": ("mt-bench-hard", "llmbar-"),
            "Safety": ("refusals-", "xstest-", "donotanswer"),
            "Reasoning": ("math-prm", "hep-"),
        },
        overall="mean of sections",
        official="half",
        paper="arXiv 2403.13787",
        counts=_COUNTS,
        official_of_scalar="strict",
        of_pairwise_judges=(
            "The benchmark itself asks a judge of pairs in one order, drawn at random; the unreadable is ½."
        ),
    ),
    shapes=(_Row,),
    read=_read,
    hub="allenai/reward-bench",
    split="filtered",
    official=(write_eval_set, write_outputs, write_eval_set_scores),
    columns=("overall", "Chat", "Chat Hard", "Safety", "Reasoning"),
    published=(
        Published("Skywork-Reward-Llama-3.1-8B", "scalar", (92.5, 95.8, 87.3, 90.8, 96.2), _RM_R1, "not stated"),
        Published(
            "Skywork-Reward-V2-Qwen3-8B", "scalar", (93.7, *(None,) * 4), "arXiv 2507.01352, Table 1", "not stated"
        ),
        Published(
            "DeepSeek-GRM-27B, greedy", "pointwise", (86.0, 94.1, 78.3, 88.0, 83.8), "arXiv 2504.02495", "not stated"
        ),
        Published(
            "DeepSeek-GRM-27B, 32 votes", "pointwise", (88.5, 95.5, 81.8, 90.0, 86.9), "arXiv 2504.02495", "not stated"
        ),
        Published("RM-R1-Qwen-Instruct-7B", "pairwise", (85.2, 94.1, 74.6, 85.2, 86.7), _RM_R1, _TIES_RM_R1),
        Published("RM-R1-DeepSeek-Distilled-Qwen-7B", "pairwise", (80.1, 88.9, 66.2, 78.4, 87.0), _RM_R1, _TIES_RM_R1),
        Published("RM-R1-Qwen-Instruct-14B", "pairwise", (88.2, 93.6, 80.5, 86.9, 92.0), _RM_R1, _TIES_RM_R1),
        Published("RM-R1-DeepSeek-Distilled-Qwen-14B", "pairwise", (88.9, 91.3, 79.4, 89.3, 95.5), _RM_R1, _TIES_RM_R1),
        *of_rubric_arm(
            trained=(None, 89.4, 79.6, None, None),
            five_votes=(None, 90.3, 80.7, None, None),
            rubric_rm=(None, 88.2, 74.1, None, None),
            untrained=(None, 73.9, 63.6, None, None),
        ),
    ),
)
