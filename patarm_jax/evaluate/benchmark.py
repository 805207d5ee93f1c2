"""What a benchmark is: where it comes from, how its rows are read, how it scores, and which files it has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_jax.data.rows import Row
from patarm_jax.evaluate.findings import Evaluation
from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.outcomes import Choices, Scores
from patarm_jax.evaluate.scoring import Layout
from patarm_jax.types import BenchmarkName

WriteOfficial = Callable[[Path, Evaluation, Scores | Choices], None]


@dataclass(frozen=True)
class Published:
    """What others report of a system, in per cent, as it stands in their papers; None where they do not say.

    Nothing was measured here, and sources differ in prompts, ties and sampling.
    """

    system: str
    kind: str  # a `types.JudgeKind`
    values: tuple[float | None, ...]  # in the order of the benchmark's columns
    source: str
    ties: str  # how the source counts equal scores: wrong, half, or not stated


def of_rubric_arm(
    trained: tuple[float | None, ...],
    five_votes: tuple[float | None, ...],
    rubric_rm: tuple[float | None, ...],
    untrained: tuple[float | None, ...],
) -> tuple[Published, ...]:
    """The rows of a generator and a judge that Rubric-ARM's paper reports."""
    systems = {
        "Rubric-ARM": trained,
        "Rubric-ARM, 5 votes": five_votes,
        "Rubric-RM": rubric_rm,
        "Qwen3-8B as generator and judge, untrained": untrained,
    }
    where, ties = "arXiv 2602.01511, Table 1", "not stated"
    return tuple(Published(name, "rubric_judge", values, where, ties) for name, values in systems.items())


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: BenchmarkName
    layout: Layout
    shapes: tuple[Any, ...]  # msgspec.Structs: the fields of a row and their types; none of a file of pairs
    read: Callable[[Row, Any], Iterator[Item]]
    hub: str = ""
    split: str = ""  # the split of the Hub dataset
    repository: str = ""  # where its files lie when the Hub does not hold it
    # A regular expression for the paths of its repository's other files; SPLIT stands for the split.
    unwanted: str = ""
    further: tuple[str, str] = ("", "")  # how the Hub ids of its further parts end, and their split
    official: tuple[WriteOfficial, ...] = ()  # what writes the files that its own scripts and leaderboards read
    columns: tuple[str, ...] = ()  # names of the columns of published rows
    published: tuple[Published, ...] = ()
    no_scores_of_pairs: tuple[str, ...] = ()  # subsets that a judge of pairs cannot be asked about

    def split_of(self, path: str) -> str:
        """The split of a Hub id."""
        ending, split = self.further
        return split if ending and path.endswith(ending) else self.split
