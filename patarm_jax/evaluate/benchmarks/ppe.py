"""PPE (arXiv 2410.14872): votes of people, and pairs of a right and a wrong response.

One accuracy for each set of the paper; their mean as overall is ours, as the paper reports human preference and
correctness apart, and its scorer was not at hand.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark, of_rubric_arm
from patarm_jax.evaluate.items import Item, known, make_item, wrong
from patarm_jax.evaluate.official import write_outputs
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import Domain

DOMAINS: Mapping[str, Domain] = {
    "human": "chat",
    "human-code": "code",
    "mmlu_pro": "chat",
    "math": "math",
    "gpqa": "math",
    "ifeval": "instruction_following",
    "mbpp_plus": "code",
}


class _Human(msgspec.Struct):
    question_id: int | str
    prompt: str
    response_1: str
    response_2: str
    winner: str
    is_code: bool = False


class _Correctness(msgspec.Struct):
    question_id: int | str
    prompt: str
    scores: list[bool]
    sampled_conflict_pairs: list[tuple[int, int]]


def _read(row: Row, given: _Human | _Correctness) -> Iterator[Item]:
    if isinstance(given, _Human):
        yield from _read_human(row, given)
    else:
        yield from _read_correctness(row, given)


def _read_human(row: Row, given: _Human) -> Iterator[Item]:
    """A vote; one that prefers neither says nothing about a judge."""
    if given.winner not in ("model_a", "model_b"):
        return
    responses = [given.response_1, given.response_2]
    first = given.winner == "model_a"
    chosen, rejected = responses if first else responses[::-1]
    subset = "human-code" if given.is_code else "human"
    yield make_item(row, f"human/{given.question_id}", subset, DOMAINS, given.prompt, [chosen], [rejected])


def _read_correctness(row: Row, given: _Correctness) -> Iterator[Item]:
    """Pairs of a right and a wrong response to one question."""
    # The subset stands in the name of the file, or of a folder above it: …/PPE-MATH-Best-of-K/data/train-0.parquet.
    parts = ["-".join(re.findall("[a-z]+", part.lower())) for part in reversed(Path(row.origin).parts[-3:])]
    names = [name for name in DOMAINS if not name.startswith("human")]
    found = (name for part in parts for name in names if re.search(rf"\b{name.replace('_', '-')}\b", part))
    subset = next(found, row.origin)
    subset = known(row, "the name of the file or its folder", subset, DOMAINS)
    for number, (i, j) in enumerate(given.sampled_conflict_pairs):
        if not (0 <= min(i, j) and max(i, j) < len(given.scores)) or given.scores[i] == given.scores[j]:
            raise wrong(row, "sampled_conflict_pairs", f"[{i}, {j}]", "the numbers of a right and a wrong response")
        best, worst = (i, j) if given.scores[i] else (j, i)
        texts = [row.values.get(f"response_{k + 1}") for k in (best, worst)]
        for k, text in zip((best, worst), texts, strict=True):
            if not isinstance(text, str):
                raise wrong(row, f"response_{k + 1}", "nothing" if text is None else type(text).__name__, "text")
        chosen, rejected = ([str(text)] for text in texts)
        name = f"{subset}/{given.question_id}/{number}"
        yield make_item(row, name, subset, DOMAINS, given.prompt, chosen, rejected)


BENCHMARK = Benchmark(
    name="ppe",
    layout=Layout(
        sections={
            "Human preference": ("human",),
            "MMLU-Pro": ("mmlu_pro",),
            "MATH": ("math",),
            "GPQA": ("gpqa",),
            "IFEval": ("ifeval",),
            "MBPP-Plus": ("mbpp_plus",),
        },
        overall="mean of sections",
        official="half",
        paper="arXiv 2410.14872; ties and overall by our own rule",
    ),
    shapes=(_Human, _Correctness),
    read=_read,
    hub="lmarena-ai/PPE-Human-Preference-V1",
    split="test",
    further=("-Best-of-K", "train"),
    official=(write_outputs,),
    columns=("overall", "IFEval"),
    published=of_rubric_arm(*((None, ifeval) for ifeval in (70.8, 72.0, 67.0, 53.8))),
)
