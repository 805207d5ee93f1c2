"""Whether it helps to select what a judge learns from, as `patarm data build` does.

For SFT: all of a teacher's judgements, against those of pairs whose scores lie more than 2 apart on the right side. For
GRPO: all pairs, against those that the SFT judge gets right neither always nor hardly ever, and against the others. All
take as many steps as another of their kind, in the world of `ablations` and from its SFT judges; what was not selected
is read less often, or not at all. Judging the pairs is a cost of its own, and is told.

    python -m patarm_jax.demo.data_ablations --out runs/ablations [--seeds 3]
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from patarm_jax.config.building import BuildConfig, CorpusSection, StageSection
from patarm_jax.config.recipes import SFTConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.corpus.folders import folder_of
from patarm_jax.data.preferences import JUDGEMENTS
from patarm_jax.demo.ablations import (
    SIZES,
    STARTS,
    Measured,
    arguments,
    compared,
    measured,
    of_training,
    quietly,
    run_program,
    say,
    started,
    to_its_end,
)
from patarm_jax.demo.settings import DemoSizes, judge_config, model_section
from patarm_jax.files import write_text
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.recipes import data, grpo, sft
from patarm_jax.types import UserError

PART = "data"
START = "sft"
JUDGED = 2000  # pairs that the SFT judge is asked about, three times as many as a run reads
ALL, GAP = "SFT, all judgements", "SFT, gap above 2"
# The pairs that GRPO reads, by variant.
PAIRS = {
    "GRPO, all pairs": "all",
    "GRPO, selected pairs": "rl_train",
    "GRPO, the others": "sft_train",
}
VARIANTS = (ALL, GAP, *PAIRS)


def main(
    out: Path, seeds: int, sizes: DemoSizes = SIZES, variants: Sequence[str] = VARIANTS, pairs: int = JUDGED
) -> list[dict[str, Any]]:
    """Runs what is not done yet; adds the rows to table.json, draws them, and prints the table."""
    starts = dict.fromkeys(variants, START)
    return compared(out, PART, starts, seeds, lambda name, seed: _measured(out, name, seed, sizes, pairs))


def _measured(out: Path, name: str, seed: int, sizes: DemoSizes, pairs: int) -> Measured:
    """Trains and measures a judge, or reads what came of it before."""
    folder = out / PART / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    result = folder / "result.json"
    if not result.is_file():
        begun, config, sft_config = started(out, START, seed, sizes)
        run = begun / "sft" if name == ALL else folder / ("sft" if name == GAP else "grpo")
        parts = _built(out / PART / f"built-{seed}", begun, sft_config, pairs) if name in PAIRS else {}
        say(f"{name}, seed {seed}")
        with quietly(folder / "log.txt"):
            if name == GAP:
                path = folder / "train.jsonl"
                write_text(path, _far_apart(begun / "data" / "train.jsonl"))
                to_its_end(sft.main, _on(sft_config, path, run))
            elif name in PAIRS:
                to_its_end(grpo.main, _on(config, parts[PAIRS[name]], run))
            outcomes, valid = measured(STARTS[START], begun, folder, config, sft_config, run)
        seconds, tokens = of_training(run)
        numbers = {"outcomes": outcomes, "valid": valid, "seconds": seconds, "tokens": tokens}
        write_text(result, json.dumps(numbers) + "\n")
        jax.clear_caches()
    return Measured(**json.loads(result.read_text(encoding="utf-8")))


def _on(config: Any, pairs: Path, run: Path) -> Any:
    """A run of other pairs, in another folder."""
    return replace(config, data=replace(config.data, path=str(pairs)), run=replace(config.run, folder=str(run)))


def _far_apart(path: Path) -> str:
    """The lines of a file whose judgements are kept by the stage `teach`: scores far apart on the right side."""
    gap, kept = StageSection("teach").min_gap, []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        chosen, rejected = (parse_pointwise(json.loads(line)[column]).score for column in JUDGEMENTS)
        if chosen is not None and rejected is not None and chosen - rejected > gap:
            kept.append(line)
    return "".join(kept)


def _built(built: Path, begun: Path, config: SFTConfig, pairs: int) -> dict[str, Path]:
    """The first of a seed's pairs, judged by its SFT judge eight times and selected by the paper's band; by part."""
    path, seed = built / "pairs.jsonl", config.run.seed
    if not path.is_file():
        lines = (begun / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(lines[:pairs]))
    sampling = judge_config(begun / "sft", path, built, seed, config).sampling
    stages = (
        StageSection("read"),
        StageSection("judge", model=model_section(begun / "sft"), sampling=sampling, seed=seed, votes=8),
        StageSection("select"),
        StageSection("write", heldout=0.0),
    )
    source = CorpusSection("demo", DataSection(path=str(path)), "apache-2.0")
    say(f"pairs of seed {seed}, judged and selected")
    with quietly(built / "log.txt"):
        if data.main(BuildConfig(folder=str(built / "set"), sources=(source,), stages=stages)) is None:
            raise UserError(f"stopped. Start it again to go on in {built}.")
    written = folder_of(built / "set", len(stages) - 1, stages[-1])
    return {"all": path} | {part: written / f"{part}.jsonl" for part in ("rl_train", "sft_train")}


if __name__ == "__main__":
    given = arguments("Compares what a judge learns from: everything, or what was selected.").parse_args()
    run_program(lambda: main(given.out, given.seeds))
