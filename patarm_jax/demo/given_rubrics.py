"""By whose rubrics a judge of single responses judges: by its own, by a generator's, or by both.

In the world of Rubric-ARM, where what matters must be read off the prompt, made harder as `ablations` has it. The
generator is the one that the rounds of `arm_ablations` have made of the same seed, judge first; it writes one rubric
for each prompt. Each variant has an SFT judge of its own, and takes the steps of `ablations` from there.

    python -m patarm_jax.demo.given_rubrics --out runs/ablations [--seeds 3]
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from patarm_jax.config.recipes import RubricsConfig
from patarm_jax.config.sections import DataSection, GeneratorSection
from patarm_jax.demo import ablations, arm_ablations
from patarm_jax.demo.ablations import (
    STARTS,
    Measured,
    Variant,
    arguments,
    compared,
    make_data,
    quietly,
    run_program,
    trained,
)
from patarm_jax.demo.arm_ablations import generator_of
from patarm_jax.demo.settings import ArmSizes, DemoSizes, model_section
from patarm_jax.recipes import rubrics
from patarm_jax.types import UserError

PART = "given-rubrics"
GENERATOR = "judge first"  # whose it is, of `arm_ablations`
VARIANTS = {"its own": "own", "the generator's": "given", "both": "own-and-given"}
SIZES = replace(ablations.SIZES, train_pairs=4002, heldout_pairs=498)  # which its three domains can share


def main(
    out: Path, seeds: int, sizes: DemoSizes = SIZES, arm_sizes: ArmSizes = arm_ablations.SIZES
) -> list[dict[str, Any]]:
    """Runs what is not done yet; adds the rows to table.json, draws them, and prints the table."""
    return compared(
        out, PART, VARIANTS, seeds, lambda name, seed: _measured(out, VARIANTS[name], seed, sizes, arm_sizes)
    )


def _measured(out: Path, start: str, seed: int, sizes: DemoSizes, arm_sizes: ArmSizes) -> Measured:
    if STARTS[start].given:
        _give_rubrics(
            out / "starts" / f"{start}-{seed}", generator_of(out, GENERATOR, seed, arm_sizes), start, seed, sizes
        )
    return trained(out, Variant(start=start), seed, sizes)


def _give_rubrics(folder: Path, generator: Path, start: str, seed: int, sizes: DemoSizes) -> None:
    """The pairs of a start with the generator's rubrics beside them, where they are not there yet."""
    plain = folder / "plain"
    if not (plain / "data" / "heldout.jsonl").is_file():
        make_data(plain, STARTS[start], seed, sizes)
    for name in ("train", "heldout"):  # in this order: with the second, the data are taken to be there
        config = RubricsConfig(
            generator=GeneratorSection(model=model_section(generator), max_new_tokens=24),
            data=DataSection(path=str(plain / "data" / f"{name}.jsonl")),
            output=str(folder / "data" / f"{name}.jsonl"),
        )
        (folder / "data").mkdir(exist_ok=True)
        with quietly(folder / "log.txt"):
            if not rubrics.main(config):
                raise UserError(f"stopped. Start it again to go on in {folder}.")


if __name__ == "__main__":
    given = arguments("Compares by whose rubrics a judge judges.").parse_args()
    run_program(lambda: main(given.out, given.seeds))
