"""JudgeBench (arXiv 2410.12784).

Sources and overall pool their pairs (utils/metrics.py, compute_final_metrics; run_judge.py).
"""

from collections.abc import Iterator, Mapping

import msgspec

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark
from patarm_jax.evaluate.items import Item, known, make_item, wrong
from patarm_jax.evaluate.official import write_outputs
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import Domain

# A subset that asks for a right answer is judged as math, even where it is physics or a puzzle.
DOMAINS: Mapping[str, Domain] = {
    "mmlu-pro-biology": "chat",
    "mmlu-pro-business": "math",
    "mmlu-pro-chemistry": "math",
    "mmlu-pro-computer science": "math",
    "mmlu-pro-economics": "math",
    "mmlu-pro-engineering": "math",
    "mmlu-pro-health": "chat",
    "mmlu-pro-history": "chat",
    "mmlu-pro-law": "chat",
    "mmlu-pro-math": "math",
    "mmlu-pro-other": "chat",
    "mmlu-pro-philosophy": "chat",
    "mmlu-pro-physics": "math",
    "mmlu-pro-psychology": "chat",
    "livebench-reasoning": "math",
    "livebench-math": "math",
    "livecodebench": "code",
}


class _Row(msgspec.Struct):
    pair_id: str
    source: str
    question: str
    response_A: str
    response_B: str
    label: str


def _read(row: Row, given: _Row) -> Iterator[Item]:
    source = known(row, "source", given.source, DOMAINS)
    a, b = given.response_A, given.response_B
    if given.label not in ("A>B", "B>A"):
        raise wrong(row, "label", repr(given.label), "A>B or B>A")
    chosen, rejected = (a, b) if given.label == "A>B" else (b, a)
    yield make_item(row, given.pair_id, source, DOMAINS, given.question, [chosen], [rejected])


BENCHMARK = Benchmark(
    name="judgebench",
    layout=Layout(
        sections={
            "Knowledge": ("mmlu-pro-",),
            "Reasoning": ("livebench-reasoning",),
            "Math": ("livebench-math",),
            "Coding": ("livecodebench",),
        },
        overall="pooled",
        official="strict",
        paper="arXiv 2410.12784",
    ),
    shapes=(_Row,),
    read=_read,
    hub="ScalerLab/JudgeBench",
    split="gpt",
    unwanted="/outputs/|response_model=(?!SPLIT)",
    official=(write_outputs,),
)
