"""RM-Bench (arXiv 2410.16184).

M[i][j] = share of chosen i above rejected j; hard = upper triangle (the chosen response is the plainer one), normal =
diagonal, easy = lower; domain = mean of M; overall, and each of hard, normal and easy, = mean of four domains; Safety
pools the rows of its two files (scripts/utils.py, compute_accuracy of total_dataset.json).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark, Published, of_rubric_arm
from patarm_jax.evaluate.findings import Evaluation
from patarm_jax.evaluate.items import Item, Prompt, known, make_item, wrong
from patarm_jax.evaluate.official import file_name, write_json
from patarm_jax.evaluate.outcomes import Choices, Scores, mean_scores
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.evaluate.statistics import Name
from patarm_jax.types import Domain

DOMAINS: Mapping[str, Domain] = {
    "chat": "chat",
    "math": "math",
    "code": "code",
    "safety-refuse": "safety",
    "safety-response": "safety",
}


# How many comparisons of an item each column is the mean of; a cell is one comparison.
_TRIALS = {"accuracy": 9.0, "hard": 3.0, "normal": 3.0, "easy": 3.0}
_CELLS = tuple(f"cell_{i}{j}" for i in range(3) for j in range(3))
_RM_R1 = "arXiv 2505.02387, Tables 6 and 7"
_TIES_RM_R1 = "half, unreadable wrong (its code)"


class _Row(msgspec.Struct):
    id: int | str
    prompt: Prompt
    chosen: list[str]
    rejected: list[str]
    domain: str = ""


def _read(row: Row, given: _Row) -> Iterator[Item]:
    said = given.domain or Path(row.origin).stem.removesuffix("_filtered")
    domain = known(row, "domain (or the file's name)", said, DOMAINS)
    for field, responses in (("chosen", given.chosen), ("rejected", given.rejected)):
        if len(responses) != 3:
            raise wrong(row, field, f"{len(responses)} responses", "three: concise, detailed, detailed in markdown")
    number = str(given.id).removeprefix(f"{domain}/")
    yield make_item(row, f"{domain}/{number}", domain, DOMAINS, given.prompt, given.chosen, given.rejected)


def _measure(
    _units: Sequence[Sequence[int]], _items: Sequence[Item], _judged: Scores | Choices, won: np.ndarray
) -> np.ndarray:
    """[I, 3, 3] → [I, 26]: accuracy, hard, normal, easy and the nine cells, under each tie rule."""
    (i, j), (k, m), same = np.triu_indices(3, 1), np.tril_indices(3, -1), np.arange(3)
    both = []
    for cells in ((won == 1.0).astype(float), won):
        parts = [
            cells.mean(axis=(1, 2)),
            cells[:, i, j].mean(axis=1),
            cells[:, same, same].mean(axis=1),
            cells[:, k, m].mean(axis=1),
        ]
        both.append(np.concatenate([np.stack(parts, axis=-1), cells.reshape(len(won), 9)], axis=-1))
    return np.concatenate(both, axis=-1)


def _write_official(folder: Path, result: Evaluation, said: Scores | Choices) -> None:
    """RM-Bench's rows with scores, as its own scripts read them, and its final result."""
    if isinstance(said, Scores):
        chosen, rejected = mean_scores(said.chosen), mean_scores(said.rejected)
        rows = [
            {
                **item.row,
                "domain": item.subset,
                "score_chosen": chosen[index].tolist(),
                "score_rejected": rejected[index].tolist(),
            }
            for index, item in enumerate(result.items)
        ]
        # With NaN, which RM-Bench's scripts read, and count as wrong.
        write_json(folder / f"total_dataset_{file_name(result)}.json", rows, allow_nan=True)
    names = {domain.lower(): Name("strict", domain) for domain in ("Chat", "Math", "Code", "Safety")}
    if not result.missing_sections:  # a mean of some domains is another number
        names |= {f"{column}_acc": Name("strict", "overall", column) for column in ("hard", "normal", "easy")}
        names["total_avg_acc"] = Name("strict", "overall")
    found = {key: result.value(name) for key, name in names.items()}
    write_json(folder / "final_result.json", {key: value[0] for key, value in found.items() if value})


BENCHMARK = Benchmark(
    name="rm-bench",
    layout=Layout(
        sections={"Chat": ("chat",), "Math": ("math",), "Code": ("code",), "Safety": ("safety-",)},
        overall="mean of sections",
        official="strict",
        paper="arXiv 2410.16184",
        columns=("accuracy", "hard", "normal", "easy", *_CELLS),
        trials=_TRIALS,
        measure=_measure,
    ),
    shapes=(_Row,),
    read=_read,
    hub="THU-KEG/RM-Bench",
    split="train",
    unwanted=r"/total_dataset\.json$",
    official=(_write_official,),
    columns=("overall", "Chat", "Math", "Code", "Safety", "hard", "normal", "easy"),
    published=(
        Published(
            "Skywork-Reward-Llama-3.1-8B",
            "scalar",
            (70.1, 69.5, 60.6, 54.5, 95.7, 46.6, 74.7, 89.0),
            _RM_R1,
            "wrong (RM-Bench's code)",
        ),
        Published(
            "Skywork-Reward-V2-Qwen3-8B",
            "scalar",
            (82.6, None, None, None, None, 70.1, 85.7, 91.9),
            "arXiv 2507.01352, Tables 1 and 4",
            "not stated",
        ),
        Published(
            "RM-R1-Qwen-Instruct-7B", "pairwise", (70.2, 66.6, 67.0, 54.6, 92.6, 59.7, 71.7, 79.2), _RM_R1, _TIES_RM_R1
        ),
        Published(
            "RM-R1-DeepSeek-Distilled-Qwen-7B",
            "pairwise",
            (72.4, 64.0, 83.9, 56.2, 85.3, 68.1, 73.1, 75.9),
            _RM_R1,
            _TIES_RM_R1,
        ),
        Published(
            "RM-R1-Qwen-Instruct-14B", "pairwise", (76.1, 75.6, 75.4, 60.6, 93.6, 68.8, 77.5, 82.6), _RM_R1, _TIES_RM_R1
        ),
        Published(
            "RM-R1-DeepSeek-Distilled-Qwen-14B",
            "pairwise",
            (81.5, 71.8, 90.5, 69.5, 94.1, 74.4, 83.6, 86.2),
            _RM_R1,
            _TIES_RM_R1,
        ),
        *of_rubric_arm(*((None, chat, *(None,) * 6) for chat in (69.2, 69.1, 65.7, 64.2))),
    ),
)
