"""What rewards a policy best in the demo's world: judges, a reward model, the pairs themselves; and who is fooled.

All policies of a seed begin with the same SFT on responses that are often wrong, and those that sample take the same
steps of GRPO; they differ in what rewards them. The judges and the reward model have read the same pairs. Gold is what
the world knows. Everything is kept, run by run: the same command goes on where it was stopped.

    python -m patarm_jax.demo.policy_ablations --out runs/ablations [--seeds 3]
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from patarm_jax.config.policy import PolicyConfig, SourceSection
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.config.sections import DataSection, OptimizerSection, RunSection
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
from patarm_jax.demo.policy_story import opened_heldout
from patarm_jax.demo.policy_world import write_responses
from patarm_jax.demo.settings import (
    PolicySizes,
    demo_configs,
    dpo_config,
    model_section,
    own_pairs_config,
    policy_config,
    policy_sft_config,
)
from patarm_jax.demo.story import make_data
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import make_world
from patarm_jax.evaluate.best_of_n import curve_of
from patarm_jax.evaluate.figures import draw_bars, draw_lines
from patarm_jax.files import write_text
from patarm_jax.judge.forms import POLICY_UNTHINKING
from patarm_jax.recipes import dpo, grpo, policy, reward_model, sft

PART = "policy"
SIZES = PolicySizes()
# From the folder of a seed to what rewards the policy; the other arms are trained by no such thing.
REWARDED: dict[str, Callable[[Path], SourceSection]] = {
    "reward model": lambda begun: SourceSection(kind="scalar", model=str(begun / "scalar")),
    "SFT judge": lambda begun: SourceSection(model=str(begun / "sft")),
    "PaTaRM judge": lambda begun: SourceSection(model=str(begun / "grpo")),
}
OWN_PAIRS = "DPO and SFT, own pairs"
ARMS = ("untrained", "SFT", "DPO", "DPO and SFT", OWN_PAIRS, *REWARDED)
BEST_OF = (1, 2, 4, 8, 16)


def main(out: Path, seeds: int, sizes: PolicySizes = SIZES, arms: Sequence[str] = ARMS) -> list[dict[str, Any]]:
    """Runs what is not done yet; adds the rows to table.json, draws them, and prints the table."""
    rows: list[dict[str, Any]] = []
    for name in arms:
        found = [_measured(out, name, seed, sizes) for seed in range(seeds)]
        rows.append(row_of(PART, name, {}, "policy", found))
        keep_row(out, rows[-1])
    bars = {str(row["variant"]): (row["mean"], row["low"], row["high"]) for row in rows}
    draw_bars(out / PART, f"{PART}: right responses to held-out prompts (%), {seeds} seeds, with 95 % interval", bars)
    for metric, words in {"gold/right/mean": "right responses", "eval/reward": "mean reward"}.items():
        lines = {name: _over_steps(out, name, seeds, metric) for name in arms if name in REWARDED}
        if lines:
            path = out / f"{PART}-{words.replace(' ', '-')}"
            draw_lines(path, f"{words}, held-out prompts, mean of {seeds} seeds", lines, "step")
    show(rows)
    return rows


def _measured(out: Path, name: str, seed: int, sizes: PolicySizes) -> Measured:
    """Trains and measures a policy, or reads what came of it before."""
    folder = _folder(out, name, seed)
    result = folder / "result.json"
    if not result.is_file():
        begun = _started(out, seed, sizes)
        config = _config(begun, folder, name, seed, sizes)
        say(f"policy by {name}, seed {seed}")
        with quietly(folder / "log.txt"):
            trained = _trained(begun, folder, config, name, seed, sizes)
            every = replace(config, heldout=replace(config.heldout, limit=0))
            heldout, weights = opened_heldout(every, trained)
            said = heldout.asked(weights, None)
        right = said.worth["right"][: len(heldout.records)].reshape(-1)
        seconds, tokens = _cost(folder, name)
        numbers = {"outcomes": np.nan_to_num(right).tolist(), "valid": float(1 - np.isnan(right).mean())}
        write_text(result, json.dumps(numbers | {"seconds": seconds, "tokens": tokens}) + "\n")
        jax.clear_caches()
    return Measured(**json.loads(result.read_text(encoding="utf-8")))


def _cost(folder: Path, name: str) -> tuple[float, int]:
    """Seconds of steps without compiling the first, and tokens; where pairs are made, of making them too."""
    run = folder / "run"
    if name == OWN_PAIRS:
        rounds = [of_training(round) for round in sorted(run.glob("round-*"))]
        made = [_cost_of_making(responses) for responses in sorted(run.glob("responses/round-*"))]
        return sum(seconds for seconds, _ in rounds + made), sum(tokens for _, tokens in rounds + made)
    return of_training(run) if run.is_dir() else (0.0, 0)


def _cost_of_making(responses: Path) -> tuple[float, int]:
    """Seconds between the files of a round's batches, which leave its first batch out, and the tokens of all."""
    paths = sorted(responses.iterdir())
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line]
    tokens = sum(one["tokens"] for row in rows for one in row["responses"])
    return paths[-1].stat().st_mtime - paths[0].stat().st_mtime, tokens


def best_of_n(out: Path, seeds: int, sizes: PolicySizes = SIZES) -> dict[str, list[tuple[float, float]]]:
    """How often the best of n responses of the SFT policy is right, as each reward picks it; a figure and the numbers.

    Beside it stand a pick at random and the best that any picker could do.
    """
    found: list[dict[str, list[tuple[float, float]]]] = []
    for seed in range(seeds):
        result = out / PART / f"best-of-n-{seed}" / "result.json"
        if not result.is_file():
            say(f"best of n, seed {seed}")
            with quietly(result.parent / "log.txt"):
                worth = _judged_often(out, seed, sizes)
            right = np.nan_to_num(worth.pop("right"))
            worth |= {"at random": np.zeros_like(right), "by knowledge": right}
            curves = {name: curve_of(scores, right, BEST_OF) for name, scores in worth.items()}
            write_text(result, json.dumps(curves) + "\n")
            jax.clear_caches()
        found.append(json.loads(result.read_text(encoding="utf-8")))
    means = {
        name: [(float(n), float(np.mean([one[name][place][1] for one in found]))) for place, n in enumerate(BEST_OF)]
        for name in found[0]
    }
    draw_lines(out / f"{PART}-best-of-n", f"right responses (%), best of n, mean of {seeds} seeds", means, "n")
    for name, curve in means.items():
        print(f"{name:16}" + "  ".join(f"{n}: {value:.1f} %" for n, value in curve))
    return means


def _judged_often(out: Path, seed: int, sizes: PolicySizes) -> dict[str, np.ndarray]:
    """Values [N, V] of V responses of the SFT policy to each held-out prompt, by every reward, and which are right."""
    begun = _started(out, seed, sizes)
    config = policy_config(begun, seed, sizes, begun / "grpo")
    (base,) = config.reward.sources
    made = [replace(make(begun), name=name.replace(" ", "-")) for name, make in REWARDED.items()]
    sources = tuple(replace(one, sampling=base.sampling) if one.is_judge else one for one in made)
    reward = replace(config.reward, sources=sources)
    config = replace(config, reward=reward, heldout=replace(config.heldout, limit=0, votes=max(BEST_OF)))
    heldout, weights = opened_heldout(config, begun / "policy-sft")
    said = heldout.asked(weights, None)
    names = {source.called: name for source, name in zip(sources, REWARDED, strict=True)} | {"right": "right"}
    return {name: said.worth[called][: len(heldout.records)] for called, name in names.items()}


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / PART / f"{name.replace(' ', '-')}-{seed}"


def _over_steps(out: Path, name: str, seeds: int, metric: str) -> list[tuple[float, float]]:
    """A metric of held-out prompts by step, in the mean over seeds."""
    values: dict[int, list[float]] = {}
    for seed in range(seeds):
        path = _folder(out, name, seed) / "run" / "metrics.jsonl"
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line.get(metric) is not None:
                values.setdefault(line["step"], []).append(line[metric])
    return [(step, float(np.mean(found))) for step, found in sorted(values.items())]


def _config(begun: Path, folder: Path, name: str, seed: int, sizes: PolicySizes) -> PolicyConfig:
    """The config of a policy's run, by which it is measured too; what is not rewarded is measured by the judge."""
    config = policy_config(begun, seed, sizes, begun / "grpo")
    (base,) = config.reward.sources
    made = REWARDED.get(name, REWARDED["PaTaRM judge"])(begun)
    if made.is_judge:
        made = replace(made, sampling=base.sampling)
    reward = replace(config.reward, sources=(made,))
    return replace(config, reward=reward, run=replace(config.run, folder=str(folder / "run")))


def _trained(begun: Path, folder: Path, config: PolicyConfig, name: str, seed: int, sizes: PolicySizes) -> Path:
    """The folder of a policy."""
    if name == "untrained":
        return begun / "policy"
    if name == "SFT":
        return begun / "policy-sft"
    if name == OWN_PAIRS:
        to_its_end(dpo.main, own_pairs_config(begun, folder / "run", seed, sizes))
    elif name not in REWARDED:
        sft_coef = 0.2 if name == "DPO and SFT" else 0.0
        to_its_end(dpo.main, dpo_config(begun, folder / "run", seed, sizes, sft_coef))
    else:
        to_its_end(policy.main, config)
    return folder / "run"


def _started(out: Path, seed: int, sizes: PolicySizes) -> Path:
    """The data, judges, reward model and SFT policy of a seed, made where they are not there."""
    folder = out / "starts" / f"{PART}-{seed}"
    judge_sft, judge_grpo = demo_configs(folder, seed, sizes.judge)
    if not (folder / "data" / "responses.jsonl").is_file():
        make_data(folder, seed, sizes.judge)
        world = make_world(seed, sizes.judge.train_pairs, sizes.judge.heldout_pairs)
        write_responses(folder / "data" / "responses.jsonl", world.train, sizes.right, random.Random(seed + 3))
    if not (folder / "data" / "prompts.jsonl").is_file():
        # Of which four responses each are as many as those of the policies that take steps of GRPO.
        lines = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(folder / "data" / "prompts.jsonl", "".join(lines[: sizes.policy_steps * 16 * 8 // 4]))
    write_untrained_model(folder / "model", folder / "data" / "train.jsonl", seed)
    write_untrained_model(folder / "policy", folder / "data" / "train.jsonl", seed + 1, [POLICY_UNTHINKING])
    scalar = RewardModelConfig(
        model=model_section(folder / "sft"),
        data=DataSection(path=str(folder / "data" / "train.jsonl")),
        optimizer=OptimizerSection(learning_rate=1e-3, warmup_steps=10, decay="cosine", final_fraction=0.1, beta2=0.99),
        run=RunSection(folder=str(folder / "scalar"), seed=seed, checkpoint_every=1000),
        pairs_per_step=16,
    )
    runs: list[tuple[Path, Callable[[Any], bool], Any]] = [
        (folder / "sft", sft.main, judge_sft),
        (folder / "grpo", grpo.main, judge_grpo),
        (folder / "scalar", reward_model.main, scalar),
        (folder / "policy-sft", sft.main, policy_sft_config(folder, seed, sizes)),
    ]
    for made, train, config in runs:
        if not (made / "export").is_dir():
            say(f"{made.name} of seed {seed}")
            with quietly(folder / "log.txt"):
                to_its_end(train, config)
    return folder


if __name__ == "__main__":
    given = arguments("Compares what a policy is rewarded by.").parse_args()
    run_program(lambda: (main(given.out, given.seeds), best_of_n(given.out, given.seeds)))
