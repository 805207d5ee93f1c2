"""The paper's choices compared in the demo's world: margins, opponents, rewards, rubrics, algorithms, kinds of judge.

Each variant trains for equally many steps and judgements, from the SFT judge of its seed, and is measured on the
held-out pairs of that seed. The world is harder than the demo's: the teacher is wrong more often, some preferences are
the wrong way round, and the run is shorter, so that variants do not all end at the ceiling. Everything is kept, run by
run: the same command goes on where it was stopped.

    python -m patarm_jax.demo.ablations --out runs/ablations [--part margins] [--seeds 3]
"""

import argparse
import contextlib
import json
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from patarm_jax.config.load import override
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.training import RunConfig
from patarm_jax.data.preferences import CHOICES, JUDGEMENTS
from patarm_jax.demo.rubric_world import KNOWN_BY_RUBRIC
from patarm_jax.demo.settings import DemoSizes, System, compare_config, demo_configs, judge_config
from patarm_jax.demo.story import right_choices
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import DOMAINS, make_world, teacher_choice, teacher_judgement, write_pairs
from patarm_jax.evaluate.figures import draw_bars
from patarm_jax.evaluate.proportions import limits
from patarm_jax.files import write_text
from patarm_jax.judge.forms import FORMS
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.recipes import evaluate, grpo, judge_file, sft
from patarm_jax.run.devices import keep_compiled_programs, prepare_devices
from patarm_jax.types import CHOSEN, REJECTED, Domain, LearntNothing, Preference, RubricMode, UserError

Config = TypeVar("Config", bound=RunConfig)

SIZES = DemoSizes(train_pairs=4000, heldout_pairs=500, teacher_accuracy=0.6, sft_steps=500, grpo_steps=40)
WRONG_WAY_ROUND = 0.15  # of the training preferences


@dataclass(frozen=True)
class Start:
    """An SFT judge that variants begin with."""

    system: System = "pointwise"
    rubrics: RubricMode = "adaptive"
    template: bool = False  # learnt from judgements of the template, not the teacher's
    given: bool = False  # by the rubrics that stand beside its pairs, in place of the primary ones
    domains: Sequence[Domain] = DOMAINS  # of its world


STARTS = {
    "sft": Start(),
    "primary": Start(rubrics="primary"),
    "generated": Start(rubrics="generated"),
    "template": Start(template=True),
    "pairwise": Start(system="pairwise"),
    # In the world of Rubric-ARM, see `given_rubrics`.
    "own": Start(rubrics="generated", domains=KNOWN_BY_RUBRIC),
    "given": Start(rubrics="primary", given=True, domains=KNOWN_BY_RUBRIC),
    "own-and-given": Start(given=True, domains=KNOWN_BY_RUBRIC),
}


@dataclass(frozen=True)
class Variant:
    """What is another than in the base."""

    settings: Mapping[str, object] = field(default_factory=dict)  # dotted name → value
    start: str = "sft"

    @property
    def name(self) -> str:
        """Names its runs; variants of several parts that are the same share them."""
        words = [self.start, *(f"{key.rpartition('.')[2]}-{value}" for key, value in self.settings.items())]
        return re.sub(r"[^\w.-]", "_", "_".join(words))

    def folder(self, out: Path, seed: int) -> Path:
        """Where its run of a seed lies."""
        return out / "runs" / f"{self.name}-{seed}"


def _set(name: str, *values: object, base: object = None) -> dict[str, Variant]:
    """A variant for each value of a setting, the base for that which it has in any case."""
    return {str(value): Variant({} if value == base else {name: value}) for value in values}


_TWICE = {"update.updates_per_rollout": 2}  # at one update for each batch the clips would never matter
_ALGORITHMS = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo", "cispo")
PARTS: dict[str, dict[str, Variant]] = {
    "margins": _set("reward.margin.name", "graded", "constant", "linear", "tanh", "power", base="graded"),
    "opponents": _set("reward.opponent", "mean", "every", "one", base="mean"),
    "loser": _set("reward.loser", "zero", "minus", base="zero"),
    "reward": _set("reward.kind", "par", "threshold", "labels", base="par"),
    "rubrics": {"adaptive": Variant(), "primary": Variant(start="primary"), "generated": Variant(start="generated")},
    "start": {"sft": Variant(), "template": Variant(start="template")},
    # As many judgements of a step: fewer pairs where a group is larger.
    "group": {
        str(size): Variant({} if size == 8 else {"group_size": size, "pairs_per_step": 128 // size})
        for size in (2, 4, 8, 16)
    },
    "algorithms": {name: Variant({"update.algorithm": name, "update.kl.coef": 0.02, **_TWICE}) for name in _ALGORITHMS},
    "judge": {"pointwise": Variant(), "pairwise": Variant(start="pairwise")},
}


@dataclass(frozen=True)
class Measured:
    """What one run came to."""

    outcomes: Sequence[float]  # of each held-out pair: 1 right, 0 wrong, ½ neither
    valid: float
    seconds: float  # of training, without compiling the first step
    tokens: int  # of training

    @property
    def accuracy(self) -> float:
        """A tie as ½."""
        return float(np.mean(self.outcomes))


def main(out: Path, parts: Sequence[str], seeds: int, sizes: DemoSizes = SIZES) -> list[dict[str, Any]]:
    """Runs what is not done yet; writes table.json and a figure for each part, and prints the table."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        for name, variant in PARTS[part].items():
            found = [trained(out, variant, seed, sizes) for seed in range(seeds)]
            rows.append(row_of(part, name, dict(variant.settings), variant.start, found))
            keep_row(out, rows[-1])
        of_part = [row for row in rows if row["part"] == part]
        bars = {str(row["variant"]): (row["mean"], row["low"], row["high"]) for row in of_part}
        draw_bars(out / part, f"{part}: held-out accuracy (%), {seeds} seeds, a tie as ½, with 95 % interval", bars)
    show(rows)
    return rows


def compared(
    out: Path, part: str, starts: Mapping[str, str], seeds: int, measure: Callable[[str, int], Measured]
) -> list[dict[str, Any]]:
    """Measures variants that are no settings; adds their rows to table.json, draws them, and prints them.

    Args:
        out: the folder of all parts.
        part: theirs.
        starts: variant → the start that it is from.
        seeds: how many.
        measure: of a variant and a seed; what was done before it only reads.
    """
    rows: list[dict[str, Any]] = []
    for name, start in starts.items():
        rows.append(row_of(part, name, {}, start, [measure(name, seed) for seed in range(seeds)]))
        keep_row(out, rows[-1])
    bars = {str(row["variant"]): (row["mean"], row["low"], row["high"]) for row in rows}
    draw_bars(out / part, f"{part}: held-out accuracy (%), {seeds} seeds, a tie as ½, with 95 % interval", bars)
    show(rows)
    return rows


def keep_row(out: Path, row: Mapping[str, Any]) -> None:
    """Puts a row into table.json, in the place of an earlier one of its part and variant."""
    path = out / "table.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    others = [one for one in rows if (one["part"], one["variant"]) != (row["part"], row["variant"])]
    write_text(path, json.dumps([*others, row], indent=1) + "\n")


def row_of(
    part: str, name: str, settings: Mapping[str, object], start: str, found: Sequence[Measured]
) -> dict[str, Any]:
    """A variant's row of the table, from what its seeds came to."""
    pooled = np.concatenate([np.asarray(each.outcomes) for each in found])
    low, high = (float(end) for end in limits(pooled, np.ones(len(pooled))).interval)
    return {
        "part": part,
        "variant": name,
        "settings": settings,
        "start": start,
        "accuracies": [each.accuracy for each in found],
        "mean": float(pooled.mean()),
        "low": low,
        "high": high,
        "valid": float(np.mean([each.valid for each in found])),
        "seconds": float(np.mean([each.seconds for each in found])),
        "tokens": float(np.mean([each.tokens for each in found])),
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of the table."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="held-out accuracy in %, a tie as ½", title_justify="left")
    for heading in ("part", "variant", "seeds", "mean", "95 % interval", "readable", "seconds", "tokens"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("part", "variant") else "right")
    for row in rows:
        seeds = " ".join(f"{100 * one:.1f}" for one in row["accuracies"])
        interval = f"{100 * row['low']:.1f} … {100 * row['high']:.1f}"
        numbers = [f"{100 * row['valid']:.1f}", f"{row['seconds']:.0f}", f"{row['tokens']:,.0f}"]
        table.add_row(row["part"], row["variant"], seeds, f"{100 * row['mean']:.1f}", interval, *numbers)
    rich.console.Console(width=120).print(table)


# ---------------------------------------------------------------------------------------------------------------- runs


def trained(out: Path, variant: Variant, seed: int, sizes: DemoSizes) -> Measured:
    """Trains and measures a variant, or reads what came of it before."""
    folder = variant.folder(out, seed)
    result = folder / "result.json"
    if result.is_file():
        return Measured(**json.loads(result.read_text(encoding="utf-8")))
    start = STARTS[variant.start]
    begun, config, sft_config = started(out, variant.start, seed, sizes)
    flags = [f"--{name}={value}" for name, value in variant.settings.items()]
    config = override(replace(config, run=replace(config.run, folder=str(folder / "grpo"))), flags)
    say(f"{variant.name}, seed {seed}")
    with quietly(folder / "log.txt"):
        to_its_end(grpo.main, config)
        outcomes, valid = measured(start, begun, folder, config, sft_config)
    seconds, tokens = of_training(folder / "grpo")
    write_text(result, json.dumps({"outcomes": outcomes, "valid": valid, "seconds": seconds, "tokens": tokens}) + "\n")
    jax.clear_caches()  # no later run has these programs
    return trained(out, variant, seed, sizes)


def to_its_end(train: Callable[[Config], bool], config: Config) -> None:
    """Trains; that nothing is learnt is said and is a result like others, that it was stopped ends everything."""
    try:
        if not train(config):
            raise UserError(f"stopped. Start it again to go on in {config.run.folder}.")
    except LearntNothing as nothing:
        say(str(nothing))


def of_training(run: Path) -> tuple[float, int]:
    """Seconds of a run, without compiling its first step, and the tokens it read and wrote."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(line["step_time"] for line in lines[1:]), lines[-1]["num_tokens"]


def started(out: Path, name: str, seed: int, sizes: DemoSizes) -> tuple[Path, GRPOConfig, SFTConfig]:
    """The SFT judge of a start and seed with its data, made where it is not there; and the configs of its runs."""
    start, folder = STARTS[name], out / "starts" / f"{name}-{seed}"
    sft_config, grpo_config = demo_configs(folder, seed, sizes, start.system)
    # The template's judgement is four times as long as the teacher's.
    sampling = replace(grpo_config.sampling, max_new_tokens=192 if start.template else 48)
    data = replace(sft_config.data, given_rubrics=start.given)
    learnt = replace(data, missing_judgements="template") if start.template else data
    sft_config = replace(sft_config, rubrics=start.rubrics, data=learnt)
    grpo_config = replace(grpo_config, rubrics=start.rubrics, sampling=sampling, data=data)
    if not (folder / "data" / "heldout.jsonl").is_file():
        make_data(folder, start, seed, sizes)
    forms, pairs = [FORMS[start.system]], folder / "data" / "train.jsonl"
    write_untrained_model(folder / "model", pairs, seed, forms, start.rubrics, start.given)
    if not (folder / "sft" / "export").is_dir():
        say(f"SFT of {name}, seed {seed}")
        with quietly(folder / "log.txt"):
            to_its_end(sft.main, sft_config)
    return folder, grpo_config, sft_config


def make_data(folder: Path, start: Start, seed: int, sizes: DemoSizes) -> None:
    """The demo's world, with some of its training preferences the wrong way round, and noisy labels of scores."""
    world = make_world(seed, sizes.train_pairs, sizes.heldout_pairs, start.domains)
    teacher, noise = random.Random(seed + 1), random.Random(seed + 2)
    train = [_turned(pair) if noise.random() < WRONG_WAY_ROUND else pair for pair in world.train]
    accuracy = sizes.teacher_accuracy
    columns = CHOICES if start.system == "pairwise" else JUDGEMENTS
    judgements: list[tuple[str, str]] | None = None
    if start.system == "pairwise":
        judgements = [teacher_choice(pair, accuracy, teacher) for pair in train]
    elif not start.template:
        judgements = [
            (_taught(pair, CHOSEN, start, accuracy, teacher), _taught(pair, REJECTED, start, accuracy, teacher))
            for pair in train
        ]
    labels = [(_label(pair, CHOSEN, accuracy, noise), _label(pair, REJECTED, accuracy, noise)) for pair in train]
    write_pairs(folder / "data" / "train.jsonl", train, judgements, columns, labels)
    write_pairs(folder / "data" / "heldout.jsonl", world.heldout)


def _turned(pair: Preference) -> Preference:
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def _taught(pair: Preference, side: int, start: Start, accuracy: float, rng: random.Random) -> str:
    """The teacher's judgement; without rubrics of its own where the judge is to write none."""
    judgement = teacher_judgement(pair, side, accuracy, rng)
    if start.rubrics != "primary":
        return judgement
    return re.sub(r"(<generate_rubrics>).*(</generate_rubrics>)", r"\1none\2", judgement)


def _label(pair: Preference, side: int, accuracy: float, rng: random.Random) -> float:
    """A score as noisy as the teacher's."""
    return float(parse_pointwise(teacher_judgement(pair, side, accuracy, rng)).score or 0.0)


def measured(
    start: Start, begun: Path, folder: Path, config: GRPOConfig, sft_config: SFTConfig, model: Path | None = None
) -> tuple[list[float], float]:
    """The outcome of each held-out pair, and the share of judgements that could be read.

    Args:
        start: that the judge began with.
        begun: its folder, with the pairs.
        folder: that what is written goes to.
        config: the run, which says how judgements are drawn.
        sft_config: of the start.
        model: the judge; None: that of the run in `folder`.
    """
    heldout, model, seed = begun / "data" / "heldout.jsonl", model or folder / "grpo", config.run.seed
    if start.system == "pairwise":
        choices = folder / "choices"
        evaluate.main(compare_config(model, heldout, choices, seed, sft_config))
        right, valid = right_choices(choices)
        lead = np.where(valid, 2 * right - 1, 0).sum(axis=(1, 2))
        return ((np.sign(lead) + 1) / 2).tolist(), float(valid.mean())
    scores = folder / "scores.jsonl"
    asked = judge_config(model, heldout, scores, seed, sft_config)
    sampling = replace(asked.sampling, max_new_tokens=config.sampling.max_new_tokens)
    asked = replace(asked, sampling=sampling, data=replace(asked.data, given_rubrics=start.given))
    found = judge_file.main(asked)
    rows = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
    outcome = {"chosen": 1.0, "rejected": 0.0}
    return [outcome.get(row["prefers"], 0.5) for row in rows], found.valid if found else 0.0


@contextlib.contextmanager
def quietly(log: Path) -> Any:
    """What a run says goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def say(message: str) -> None:
    """Tells the user, whatever is kept from the screen."""
    print(message, file=sys.__stderr__, flush=True)


def run_program(program: Callable[[], object]) -> None:
    """Runs a program as the command line runs a verb: devices prepared, and a user's mistake told in a sentence."""
    prepare_devices()
    keep_compiled_programs()  # each run of a part compiles what the one before has compiled
    try:
        program()
    except UserError as error:
        sys.exit(f"ablations: {error}")


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that every program of ablations takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    return parser


if __name__ == "__main__":
    parser = arguments("Compares the paper's choices in the demo's world.")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given again; default: all")
    given = parser.parse_args()
    run_program(lambda: main(given.out, given.part or list(PARTS), given.seeds))
