"""Any file of preference pairs, read as training reads it: all rows alike, with a number for each source."""

from collections.abc import Iterator

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.benchmark import Benchmark
from patarm_jax.evaluate.items import Item, name_of
from patarm_jax.evaluate.official import write_outputs
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import Preference


def item_of(one: Preference) -> Item:
    """A preference as an item; its source is the subset."""
    return Item(
        one.id,
        subset=one.source or "all",
        domain=one.domain,
        prompt=one.prompt,
        chosen=(one.chosen,),
        rejected=(one.rejected,),
        group=name_of(one.prompt),
        row={"id": one.id, "source": one.source, "prompt": list(one.prompt)},
    )


def _read(row: Row, _given: object) -> Iterator[Item]:
    raise TypeError(f"{row.where}: pairs have no official form; they are read as training reads them")


BENCHMARK = Benchmark(
    name="pairs",
    layout=Layout(
        sections={},
        overall="pooled",
        official="strict",
        paper="no benchmark: a file of pairs",
        rare_as_other=True,
    ),
    shapes=(),
    read=_read,
    official=(write_outputs,),
)
