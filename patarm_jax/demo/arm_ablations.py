"""Who of two models is trained, and in which order: Rubric-ARM's choices compared in the demo's world.

Every variant begins with the generator and the judge that one warm-up of its seed has made, and takes equally many
steps of reinforcement learning on equally many pairs in equally many rounds; where one model alone is trained, all of
them are its own. Warm-up and rounds are shorter than the demo's, so that variants do not all end at the ceiling.
Everything is kept, run by run: the same command goes on where it was stopped.

    python -m patarm_jax.demo.arm_ablations --out runs/ablations [--seeds 3]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from patarm_jax.config.load import override
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.demo.ablations import (
    Measured,
    arguments,
    keep_row,
    of_training,
    quietly,
    row_of,
    run_program,
    say,
    show,
    to_its_end,
)
from patarm_jax.demo.rubric_story import make_data, swap_rubrics
from patarm_jax.demo.settings import ArmSizes, by_rubrics_config, rubric_arm_config
from patarm_jax.demo.story import right_choices
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.evaluate.accuracy import accuracy_of_choices
from patarm_jax.evaluate.figures import draw_bars
from patarm_jax.evaluate.outcomes import Choices, outcomes
from patarm_jax.files import write_text
from patarm_jax.judge.forms import RUBRIC, RUBRIC_JUDGE
from patarm_jax.recipes import evaluate, rubric_arm
from patarm_jax.recipes.evaluate import RUBRICS
from patarm_jax.types import UserError

PART = "rubric-arm"
SIZES = ArmSizes(train_pairs=6000, heldout_pairs=480, warmup_steps=500, turn_steps=10, rounds=2)
BIAS = ("chose the first", "same in both orders")


@dataclass(frozen=True)
class Variant:
    """Two models, and by whose rubrics the one judges."""

    settings: Mapping[str, object] | None = None  # of the rounds; None: there are none
    start: str = "warm-up"  # what they begin with, or untrained
    swapped: bool = False  # by the rubrics of other prompts

    def folder(self, out: Path, seed: int) -> Path:
        """Where its run of a seed lies."""
        words = "-".join(f"{name.rpartition('.')[2]}-{value}" for name, value in (self.settings or {}).items())
        return out / PART / f"{words or self.start.replace('-', '')}-{seed}"


def _in_order(order: str, **settings: object) -> Variant:
    return Variant({"order": order, **{name.replace("__", "."): value for name, value in settings.items()}})


VARIANTS: dict[str, Variant] = {
    "untrained": Variant(start="untrained"),
    "SFT of both": Variant(),
    "judge alone": _in_order("judge_only"),
    "generator alone": _in_order("generator_only"),
    "joint": _in_order("joint"),
    "judge first": _in_order("judge_first"),
    "generator first": _in_order("generator_first"),
    "judge first, no reward for form": _in_order("judge_first", judge__format_reward=0.0),
    "judge first, other prompts' rubrics": replace(_in_order("judge_first"), swapped=True),
}


@dataclass(frozen=True)
class Found(Measured):
    """What one pair of models came to."""

    bias: Mapping[str, float | None] = field(default_factory=dict)  # `BIAS`; None where nothing could be read


def main(
    out: Path, seeds: int, sizes: ArmSizes = SIZES, variants: Sequence[str] = tuple(VARIANTS)
) -> list[dict[str, Any]]:
    """Runs what is not done yet; adds the rows to table.json, draws them, and prints the table."""
    rows: list[dict[str, Any]] = []
    for name in variants:
        variant = VARIANTS[name]
        found = [measured(out, variant, seed, sizes) for seed in range(seeds)]
        bias = {which: _mean([one.bias[which] for one in found]) for which in BIAS}
        rows.append(row_of(PART, name, dict(variant.settings or {}), variant.start, found) | {"position": bias})
        keep_row(out, rows[-1])
    bars = {str(row["variant"]): (row["mean"], row["low"], row["high"]) for row in rows}
    draw_bars(out / PART, f"{PART}: held-out accuracy (%), {seeds} seeds, a tie as ½, with 95 % interval", bars)
    show(rows)
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def measured(out: Path, variant: Variant, seed: int, sizes: ArmSizes) -> Found:
    """Trains and measures a variant, or reads what came of it before."""
    folder = variant.folder(out, seed)
    result = folder / ("swapped.json" if variant.swapped else "result.json")
    if not result.is_file():
        begun = _started(out, seed, sizes)
        judge, generator = _trained(begun, variant, folder, seed, sizes)
        say(f"{result.stem} of {folder.name}")
        choices = folder / ("swapped" if variant.swapped else "choices")
        heldout = begun / "data" / "heldout.jsonl"
        if variant.swapped:
            swap_rubrics(folder / "choices" / RUBRICS, choices / RUBRICS, heldout, seed)
        with quietly(folder / "log.txt"):
            if evaluate.main(by_rubrics_config(judge, generator, heldout, choices, seed)) is None:
                raise UserError(f"stopped. Start it again to go on in {out}.")
        seconds, tokens = of_training(folder / "run") if variant.settings else (0.0, 0)
        write_text(result, json.dumps(_found(choices) | {"seconds": seconds, "tokens": tokens}) + "\n")
        jax.clear_caches()
    return Found(**json.loads(result.read_text(encoding="utf-8")))


def generator_of(out: Path, name: str, seed: int, sizes: ArmSizes = SIZES) -> Path:
    """The generator of a variant, trained if it is not there."""
    variant = VARIANTS[name]
    _, generator = _trained(_started(out, seed, sizes), variant, variant.folder(out, seed), seed, sizes)
    return generator


def _found(choices: Path) -> dict[str, object]:
    """What an evaluation says, as `Found` has it."""
    right, valid = right_choices(choices)
    accuracy = accuracy_of_choices(right, valid)
    said = np.full((len(right), 1, 1, 2, 1), np.nan)
    said[:, 0, 0] = np.where(valid, 2 * right - 1, np.nan)
    each = outcomes(Choices(said, np.ones((len(right), 1, 1), bool)))[:, 0, 0]
    bias = {which: float(accuracy.position[which]) for which in BIAS}
    return {
        "outcomes": each.tolist(),
        "valid": accuracy.valid,
        "bias": {which: value if value == value else None for which, value in bias.items()},
    }


def _started(out: Path, seed: int, sizes: ArmSizes) -> Path:
    """The world of a seed with its untrained model, made where it is not there."""
    folder = out / "starts" / f"{PART}-{seed}"
    if not (folder / "data" / "heldout.jsonl").is_file():
        make_data(folder, seed, sizes)
    write_untrained_model(folder / "model", folder / "data" / "train.jsonl", seed, (RUBRIC, RUBRIC_JUDGE))
    return folder


def _trained(begun: Path, variant: Variant, folder: Path, seed: int, sizes: ArmSizes) -> tuple[Path, Path]:
    """The judge and the generator of a variant."""
    if variant.start == "untrained":
        return begun / "model", begun / "model"
    warm = begun / "warm-up"
    config = rubric_arm_config(begun, seed, sizes)
    if not (warm / "judge" / "export").is_dir():  # one step of the rounds ends a run, and is of no use here
        say(f"warm-up of seed {seed}")
        short = ["--rounds", "1", "--generator.steps", "1", "--judge.steps", "1", "--generator.pairs_per_step", "16"]
        _run(override(_in(config, warm), short), begun / "log.txt")
    if variant.settings is None:
        return warm / "judge" / "warmup", warm / "generator" / "warmup"
    alone = str(variant.settings["order"]).endswith("_only")  # the steps of both are its own
    flags = ["--warmup.epochs", "0", "--warmup.steps", "0", "--generator.pairs_per_step", "16"]  # as the judge's
    for role in ("judge", "generator"):
        flags += [f"--{role}.path", str(warm / role / "warmup")]
        flags += [f"--{role}.steps", str(sizes.turn_steps * (2 if alone else 1))]
    flags += [word for name, value in variant.settings.items() for word in (f"--{name}", str(value))]
    say(f"rounds of {folder.name}")
    config = replace(config, model=replace(config.model, path=""))
    run = folder / "run"
    _run(override(_in(config, run), flags), folder / "log.txt")
    made = {role: run / role / "export" for role in ("judge", "generator")}
    judge, generator = (path if path.is_dir() else warm / role / "warmup" for role, path in made.items())
    return judge, generator


def _in(config: RubricArmConfig, folder: Path) -> RubricArmConfig:
    return replace(config, run=replace(config.run, folder=str(folder)))


def _run(config: RubricArmConfig, log: Path) -> None:
    with quietly(log):
        to_its_end(rubric_arm.main, config)


if __name__ == "__main__":
    given = arguments("Compares who of two models is trained, and in which order.").parse_args()
    run_program(lambda: main(given.out, given.seeds))
