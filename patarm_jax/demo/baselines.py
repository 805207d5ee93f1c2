"""What a judge that reasons is compared with, in the world of the ablations: one table of systems and ways to ask.

Every system has the same preference pairs of its seed. All begin with the SFT judge of that seed, a pairwise one with
its own, so that a reward model has read as much text before as a judge. Each is asked about the held-out pairs in the
ways that it knows: for one judgement, for eight, for its expected score. Everything is kept, run by run: the same
command goes on where it was stopped.

    python -m patarm_jax.demo.baselines --out runs/ablations [--seeds 3]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from patarm_jax.config.load import override
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.config.sections import DataSection, OptimizerSection, RunSection
from patarm_jax.demo.ablations import (
    SIZES,
    STARTS,
    Measured,
    Variant,
    arguments,
    keep_row,
    of_training,
    quietly,
    row_of,
    run_program,
    say,
    show,
    started,
    trained,
)
from patarm_jax.demo.settings import DemoSizes, compare_config, model_section
from patarm_jax.evaluate.figures import draw_bars
from patarm_jax.evaluate.statistics import Name
from patarm_jax.files import write_text
from patarm_jax.recipes import evaluate, reward_model
from patarm_jax.types import JudgeKind, UserError

PART = "baselines"
ONE = {"1 vote": ["--votes", "1"]}
VOTES = {**ONE, "8 votes": ["--votes", "8"]}
EVERY = {**VOTES, "expected score": ["--expected_score", "true"]}


@dataclass(frozen=True)
class System:
    """What is trained, beyond the judge that it starts from, and how it is asked."""

    judge: JudgeKind
    ways: Mapping[str, Sequence[str]]  # name → flags of `patarm eval`
    trains: Variant | Literal["scalar", "ordinal"] | None = None  # GRPO, a reward model of a head, or nothing
    start: str = "sft"


SYSTEMS = {
    "general model's prompt": System("baseline", VOTES),
    "Bradley-Terry": System("scalar", ONE, "scalar"),
    "ordinal": System("ordinal", ONE, "ordinal"),
    "SFT judge": System("pointwise", EVERY),
    "pairwise judge": System("pairwise", VOTES, Variant(start="pairwise"), start="pairwise"),
    "PaTaRM": System("pointwise", EVERY, Variant()),
    "PaTaRM, LoRA": System("pointwise", EVERY, Variant({"lora.rank": 16, "optimizer.learning_rate": 3e-3})),
}


def main(out: Path, systems: Sequence[str], seeds: int, sizes: DemoSizes = SIZES) -> list[dict[str, Any]]:
    """Runs what is not done yet; adds the rows to table.json, draws them, and prints the table."""
    rows: list[dict[str, Any]] = []
    for name in systems:
        system = SYSTEMS[name]
        found = [_run(out, name, system, seed, sizes) for seed in range(seeds)]
        for way in system.ways:
            called = f"{name}, {way}" if len(system.ways) > 1 else name
            settings = dict(system.trains.settings) if isinstance(system.trains, Variant) else {}
            rows.append(row_of(PART, called, settings, system.start, [each[way] for each in found]))
            keep_row(out, rows[-1])
    bars = {str(row["variant"]): (row["mean"], row["low"], row["high"]) for row in rows}
    draw_bars(out / PART, f"{PART}: held-out accuracy (%), {seeds} seeds, a tie as ½, with 95 % interval", bars)
    show(rows)
    return rows


def _run(out: Path, name: str, system: System, seed: int, sizes: DemoSizes) -> dict[str, Measured]:
    """Trains a system and asks it in each way, or reads what came of it before."""
    begun, _, sft_config = started(out, system.start, seed, sizes)
    folder = out / "baselines" / f"{''.join(letter for letter in name if letter.isalnum())}-{seed}"
    model = begun / "sft"
    if isinstance(system.trains, Variant):
        trained(out, system.trains, seed, sizes)
        model = system.trains.folder(out, seed) / "grpo"
    elif system.trains is not None:
        model = folder / "model"
        _train_reward_model(begun, model, seed, system.trains)
    found = {}
    for way, flags in system.ways.items():
        result = folder / f"{way.replace(' ', '_')}.json"
        if not result.is_file():
            say(f"{name}, {way}, seed {seed}")
            asked = compare_config(model, begun / "data" / "heldout.jsonl", folder / way, seed, sft_config)
            asked = override(replace(asked, judge=system.judge, rubrics=_rubrics(system)), flags)
            outcomes, valid = _measured(asked, folder)
            seconds, tokens = of_training(model)
            numbers = {"outcomes": outcomes, "valid": valid, "seconds": seconds, "tokens": tokens}
            write_text(result, json.dumps(numbers) + "\n")
        found[way] = Measured(**json.loads(result.read_text(encoding="utf-8")))
    return found


def _rubrics(system: System) -> Literal["adaptive", "primary", "generated"]:
    return STARTS[system.start].rubrics


def _train_reward_model(begun: Path, folder: Path, seed: int, head: Literal["scalar", "ordinal"]) -> None:
    """One pass over the pairs, from the SFT judge."""
    config = RewardModelConfig(
        model=model_section(begun / "sft"),
        data=DataSection(path=str(begun / "data" / "train.jsonl")),
        optimizer=OptimizerSection(learning_rate=1e-3, warmup_steps=10, decay="cosine", final_fraction=0.1, beta2=0.99),
        run=RunSection(folder=str(folder), seed=seed, checkpoint_every=1000),
        head=head,
        pairs_per_step=16,
    )
    if (folder / "export").is_dir():
        return
    say(f"a reward model with the head {head}, seed {seed}")
    with quietly(folder.parent / "log.txt"):
        if not reward_model.main(config):
            raise UserError(f"stopped. Start it again to go on in {folder}.")


def _measured(asked: evaluate.EvalConfig, folder: Path) -> tuple[list[float], float]:
    """The outcome of each held-out pair, and the share of answers that could be read."""
    with quietly(folder / "log.txt"):
        result = evaluate.main(asked)
    if result is None:
        raise UserError(f"stopped. Start it again to go on in {folder}.")
    column = result.strata.formulas.numbers[Name("half", "overall")].measure
    return result.measured.values[:, column].tolist(), result.findings.valid


if __name__ == "__main__":
    parser = arguments("Compares judges with what they are an alternative to.")
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="may be given again; default: all")
    given = parser.parse_args()
    run_program(lambda: main(given.out, given.system or list(SYSTEMS), given.seeds))
