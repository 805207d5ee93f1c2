"""RMB, its pairs (arXiv 2410.09893; Best-of-N is not judged here).

Each of Helpfulness and Harmlessness pools its pairs (eval/scripts/my_run_rm.py, model_acc); overall = mean of both, as
the paper averages its columns.
"""

from collections.abc import Iterator, Mapping

import msgspec

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark
from patarm_jax.evaluate.items import Item, Turn, make_item, wrong
from patarm_jax.evaluate.official import write_outputs
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import Domain

# The first two parts of category_path; a Helpfulness scenario that is not named is chat.
DOMAINS: Mapping[str, Domain] = {
    "Harmlessness": "safety",
    "Helpfulness/Code": "code",
    "Helpfulness/Reasoning": "math",
}


class _Response(msgspec.Struct):
    answer: str


class _Row(msgspec.Struct):
    pair_uid: int | str
    conversation_input: list[Turn]
    chosen: _Response
    reject: _Response
    category_path: str


def _read(row: Row, given: _Row) -> Iterator[Item]:
    parts = [part for part in given.category_path.split("/") if not part.lower().endswith("_set")]
    if not parts or parts[0] not in ("Helpfulness", "Harmlessness"):
        raise wrong(row, "category_path", repr(given.category_path), "Pairwise_set/Helpfulness/… or …/Harmlessness/…")
    subset = "/".join(parts[:2])
    table: dict[str, Domain] = {subset: DOMAINS.get(subset) or DOMAINS.get(parts[0], "chat")}
    chosen, rejected = given.chosen.answer, given.reject.answer
    name = f"{'/'.join(parts)}/{given.pair_uid}"
    yield make_item(row, name, subset, table, given.conversation_input, [chosen], [rejected])


BENCHMARK = Benchmark(
    name="rmb",
    layout=Layout(
        sections={"Helpfulness": ("Helpfulness",), "Harmlessness": ("Harmlessness",)},
        overall="mean of sections",
        official="strict",
        paper="arXiv 2410.09893",
    ),
    shapes=(_Row,),
    read=_read,
    hub="Zhou-Zoey/RMB-Reward-Model-Benchmark",
    repository="github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark, RMB_dataset/Pairwise_set",
    unwanted="/BoN_set/",
    official=(write_outputs,),
)
