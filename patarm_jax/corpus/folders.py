"""Where the stages of a set stand, and what is in them.

RUN/01-read/rows.parquet, report.json, dropped.jsonl    what a stage passes on, what became of its rows, what it dropped
RUN/NN-write/train.jsonl, heldout.jsonl, README.md …    the set, and its card
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patarm_jax.config.building import BuildConfig, StageSection
from patarm_jax.files import read_json_object

ROWS, REPORT, DROPPED = "rows.parquet", "report.json", "dropped.jsonl"


def folder_of(folder: Path, number: int, stage: StageSection) -> Path:
    """Where a stage stands; the first is 0."""
    return folder / f"{number + 1:02}-{stage.kind}"


def reports_of(config: BuildConfig, folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The reports of the stages that are there, in order, each with the name of its folder."""
    every = [folder_of(folder, number, stage) for number, stage in enumerate(config.stages)]
    found = [(one.name, read_json_object(one / REPORT)) for one in every]
    return [(name, report) for name, report in found if report is not None]
