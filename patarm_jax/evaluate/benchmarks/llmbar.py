"""LLMBar (arXiv 2310.07641).

Adversarial = mean of its four subsets, overall = mean of all five, whatever their sizes. The code scores one subset at
a time (LLMEvaluator/evaluate.py); the tables of the paper average: of the published statistics of GPT-4 with
Metrics+Reference, 85.4, 89.7, 72.3 and 83.7, the mean is the printed 82.8, and 84.5 if pooled.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark
from patarm_jax.evaluate.items import Item, known, make_item, wrong
from patarm_jax.evaluate.official import write_outputs
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import Domain

DOMAINS: Mapping[str, Domain] = {
    "Natural": "chat",
    "Neighbor": "chat",
    "GPTInst": "chat",
    "GPTOut": "chat",
    "Manual": "chat",
}


class _Row(msgspec.Struct):
    input: str
    output_1: str
    output_2: str
    label: int


def _read(row: Row, given: _Row) -> Iterator[Item]:
    # The subset stands in the name of the file, or of its folder.
    file = Path(row.origin)
    words = [set(re.split(r"[^a-z]+", part.lower())) for part in (file.stem, file.parent.name)]
    subset = next((name for part in words for name in DOMAINS if name.lower() in part), "")
    subset = known(row, "the file's name", subset or row.origin, DOMAINS)
    if given.label not in (1, 2):
        raise wrong(row, "label", repr(given.label), "1 or 2")
    outputs = [given.output_1, given.output_2]
    chosen, rejected = outputs[given.label - 1], outputs[2 - given.label]
    number = row.name.rpartition(":")[2]
    yield make_item(row, f"{subset}/{number}", subset, DOMAINS, given.input, [chosen], [rejected])


BENCHMARK = Benchmark(
    name="llmbar",
    layout=Layout(
        sections={"Natural": ("Natural",), "Adversarial": ("Neighbor", "GPTInst", "GPTOut", "Manual")},
        overall="mean of subsets",
        official="half",
        paper="arXiv 2310.07641",
        within="mean of subsets",
        of_pairwise_judges=(
            "The benchmark itself takes the mean over both orders, the unreadable being wrong: `right per answer`."
        ),
    ),
    shapes=(_Row,),
    read=_read,
    hub="princeton-nlp/LLMBar",
    # On the Hub it is a script, which nothing runs any more.
    repository="github.com/princeton-nlp/LLMBar, Dataset/LLMBar",
    unwanted="/CaseStudy/|/evaluators/",
    official=(write_outputs,),
)
