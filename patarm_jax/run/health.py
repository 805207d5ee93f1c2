"""Whether a run learns anything, judged from the metrics of its steps alone: lines in, words out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from patarm_jax.train.steps import LARGEST_WEIGHT

# What can be wrong with a step, the cause before what follows from it.
Symptom = Literal[
    "skipped",
    "cut_off",
    "unreadable",
    "no_pair",
    "no_worth",
    "no_reward",
    "no_advantage",
    "eval_cut_off",
    "eval_mute",
]


@dataclass(frozen=True)
class Health:
    """What the steps of a run add up to; whole numbers, on which processes can agree."""

    updates: int = 0  # how many were tried
    skipped: int = 0
    counter: int = 0  # `skipped_updates` of the last line, which may count from before the first one
    in_a_row: int = 0  # skipped, up to the last one
    steps: int = 0
    no_rate: int = 0  # steps whose learning rate was 0
    rollouts: int = 0  # steps that sampled judgements, each of which counts at most once below
    cut_off: int = 0
    unreadable: int = 0
    no_pair: int = 0
    no_worth: int = 0
    no_reward: int = 0
    no_advantage: int = 0
    evaluations: int = 0  # on held-out pairs, each of which counts at most once below
    eval_cut_off: int = 0
    eval_mute: int = 0


@dataclass(frozen=True)
class Told:
    """The settings that a sentence names."""

    folder: str
    learning_rate: float
    dtype: str
    max_new_tokens: int = 0
    heldout_new_tokens: int = 0
    updates_per_step: int = 1
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped: int = 10
    taught: str = "with `patarm sft`"  # how the form of what is sampled is taught
    settings: str = ""  # what the names of those of the model begin with


def symptoms(line: Mapping[str, float | None], skipped: int) -> list[Symptom]:
    """What is wrong with a step; of what follows from one another, the cause.

    Args:
        line: its metrics, those of SFT or of GRPO.
        skipped: updates of it that were left out.

    >>> symptoms({"judge/valid": 0.0, "completions/clipped_ratio": 1.0}, skipped=0)
    ['cut_off']
    """
    found: list[Symptom] = ["skipped"] if skipped else []
    if "judge/valid" in line:
        causes: tuple[tuple[Symptom, str, float], ...] = (
            ("cut_off", "completions/clipped_ratio", 1),
            ("unreadable", "judge/valid", 0),
            ("no_pair", "judge/pairs_without_par", 1),
            ("no_reward", "rewards/par/mean", 0),
            ("no_advantage", "advantages/abs_mean", 0),
        )
        seen = [name for name, metric, value in causes if line.get(metric) == value]
        if "cut_off" in seen and line["judge/valid"]:  # a rubric without its end may be judged by
            seen.remove("cut_off")
        if "no_reward" in seen and line.get("rewards/par/std"):  # what was won and lost adds up to nothing
            seen.remove("no_reward")
        found += seen[:1]
    elif "rewards/failed" in line:  # of a policy's responses
        found += ["no_worth"] if line["rewards/failed"] == 1 else []
        found += ["no_advantage"] if not found and line.get("advantages/abs_mean") == 0 else []
    if "eval/valid" in line and line["eval/valid"] == 0:
        found.append("eval_cut_off" if line.get("eval/clipped_ratio") == 1 else "eval_mute")
    return found


def after(health: Health, line: Mapping[str, float | None], updates: int) -> Health:
    """The health of a run after one more step.

    Args:
        health: before it.
        line: the metrics of the step; `skipped_updates` counts from the beginning of the run.
        updates: that the step tries.
    """
    total = int(line.get("skipped_updates") or 0)
    skipped = max(total - health.counter, 0)
    counts = {name: getattr(health, name) + 1 for name in symptoms(line, skipped) if name != "skipped"}
    return replace(
        health,
        updates=health.updates + updates,
        skipped=health.skipped + skipped,
        counter=total,
        in_a_row=health.in_a_row + skipped if skipped == updates else 0,
        steps=health.steps + 1,
        no_rate=health.no_rate + (line.get("learning_rate") == 0),
        rollouts=health.rollouts + ("judge/valid" in line or "rewards/failed" in line),
        evaluations=health.evaluations + ("eval/valid" in line),
        **counts,
    )


def warnings(before: Health, now: Health, told: Told) -> list[str]:
    """What to say after a step: of each symptom the first time, and whenever its count has doubled."""
    return [
        f"{_what(name, now)}. {_advice(name, told)}"
        for name in _WHAT
        if getattr(now, name).bit_length() > getattr(before, name).bit_length()
    ]


def reason_to_stop(before: Health, now: Health, told: Told) -> str:
    """Why a run must not go on after a step; empty where it may."""
    if told.on_nonfinite == "stop" and now.skipped > before.skipped:
        return f"run.on_nonfinite is stop, and {_what('skipped', now)}. {_advice('skipped', told)}"
    if now.in_a_row >= told.max_skipped:
        return (
            f"{now.in_a_row:,} updates in a row were skipped, and run.max_skipped is {told.max_skipped:,}: "
            f"{_what('skipped', now)}. {_advice('skipped', told)}"
        )
    return ""


def verdict(health: Health, told: Told) -> str:
    """Why nothing was learnt in a whole run; empty where something may have been.

    Accuracy plays no part in it: a judge at chance has still been taught.
    """
    if 0 < health.updates == health.skipped:
        return f"nothing was learnt: {_what('skipped', health)}. {_advice('skipped', told)}"
    if untouched(health):
        return (
            f"nothing was learnt: the learning rate was 0 in each of the {health.steps:,} steps. Raise "
            f"{told.settings}optimizer.learning_rate, or have fewer {told.settings}optimizer.warmup_steps than steps."
        )
    of_rollouts: tuple[Symptom, ...] = ("cut_off", "unreadable", "no_pair", "no_worth", "no_reward", "no_advantage")
    counts = {name: getattr(health, name) for name in of_rollouts}
    if not health.rollouts or sum(counts.values()) < health.rollouts:
        return ""
    found = sorted((name for name in of_rollouts if counts[name]), key=lambda name: -counts[name])
    most, what = found[0], "; ".join(_what(name, health) for name in found)
    nothing = "nothing" if most in ("no_advantage", "no_worth") else "nothing but the format penalty"
    return f"{nothing} was learnt: {what}. {_advice(most, told)}"


def parted(lines: Sequence[Mapping[str, float | None]]) -> str:
    """Where a policy's held-out reward has gone on rising while a gold measure fell; empty where it has not.

    Since the evaluation at which the measure was highest it has fallen by more than twice the standard error of the
    difference, and the reward has risen.

    Args:
        lines: the metrics of the steps, in order.
    """
    found = []
    measured = [line for line in lines if line.get("eval/reward") is not None]
    for metric in dict.fromkeys(name for line in measured for name in line if name.startswith("gold/")):
        if not metric.endswith("/mean"):
            continue
        name = metric.removesuffix("/mean")
        known = [line for line in measured if line.get(metric) is not None]
        if not known:  # it says nothing of anything
            continue
        best, last = max(known, key=lambda line: line[metric] or 0.0), known[-1]
        fell = (best[metric] or 0.0) - (last[metric] or 0.0)
        rose = (last["eval/reward"] or 0.0) - (best["eval/reward"] or 0.0)
        error = math.hypot(best.get(f"{name}/error") or 0.0, last.get(f"{name}/error") or 0.0)
        if fell > 2 * error and fell > 0 and rose > 0:
            found.append(
                f"from step {best['step']:.0f} to {last['step']:.0f} the reward on the held-out prompts rose by "
                f"{rose:.3g} while {name} fell by {fell:.3g} (standard error {error:.2g})"
            )
    if not found:
        return ""
    return f"{'; '.join(found)}: the reward may be being fooled. Read responses of either step, and see their lengths."


def untouched(health: Health) -> bool:
    """Whether the weights are those that the run began with."""
    skipped = 0 < health.updates == health.skipped
    return skipped or 0 < health.steps == health.no_rate


_WHAT: dict[Symptom, str] = {
    "skipped": (
        "{count:,} of {health.updates:,} updates were skipped, because the gradient was not finite or a weight would "
        f"have grown beyond {LARGEST_WEIGHT:,.0f}"
    ),
    "cut_off": "in {count:,} of {health.rollouts:,} steps all that was written was cut off at the limit",
    "unreadable": "in {count:,} of {health.rollouts:,} steps no judgement could be read",
    "no_pair": (
        "in {count:,} of {health.rollouts:,} steps no pair had a readable judgement of both responses, so that none "
        "had a PAR reward"
    ),
    "no_worth": "in {count:,} of {health.rollouts:,} steps no response had a reward",
    "no_reward": (
        "in {count:,} of {health.rollouts:,} steps no judgement earned a PAR reward, though both sides could be read"
    ),
    "no_advantage": (
        "in {count:,} of {health.rollouts:,} steps all that is compared with each other earned the same, so that "
        "every advantage was 0"
    ),
    "eval_cut_off": (
        "in {count:,} of {health.evaluations:,} evaluations every judgement of the held-out pairs was cut off at the "
        "limit"
    ),
    "eval_mute": "in {count:,} of {health.evaluations:,} evaluations no judgement of the held-out pairs could be read",
}


def _what(name: Symptom, health: Health) -> str:
    return _WHAT[name].format(count=getattr(health, name), health=health)


def _advice(name: Symptom, told: Told) -> str:
    look, its = f"Read some of them: run `patarm report {told.folder}`.", told.settings
    match name:
        case "skipped":
            lower = f"Likely {its}optimizer.learning_rate, {told.learning_rate:g}, is too high: lower it"
            return f"{lower}." if told.dtype == "float32" else f"{lower}, or set model.dtype to float32."
        case "cut_off":
            return f"All cut off: raise {its}sampling.max_new_tokens, which is {told.max_new_tokens:,}. {look}"
        case "eval_cut_off":
            return f"All cut off: raise heldout.sampling.max_new_tokens, which is {told.heldout_new_tokens:,}."
        case "unreadable":
            return (
                f"Teach the form {told.taught} first. If that is done, {its or 'model.'}path, its chat template and "
                f"rubrics must be those of that run. {look}"
            )
        case "no_pair":
            return f"Teach the form {told.taught} for longer, or raise {its}group_size. {look}"
        case "no_worth":
            return f"See what the sources of the reward say of them. {look}"
        case "no_reward":
            return (
                f"Either all scores are the same (raise {its}sampling.temperature), or the rejected responses score "
                f"higher: see whether data.columns exchanges the two. {look}"
            )
        case "no_advantage":
            return f"Raise {its}sampling.temperature or {its}group_size, or give pairs that are harder to tell apart."
        case "eval_mute":
            return "Early in SFT this is to be expected; later, see that the judgements it learns from are in form."
