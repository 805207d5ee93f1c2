"""`patarm report RUN` of what trains: its curves, and its rollouts to read, each step's in a bundle."""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from patarm_jax.config.load import load_run, read_yaml, refuse_rounds
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.config.training import ReinforcedConfig, TrainConfig
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.prompts import read_prompts
from patarm_jax.judge.forms import FORMS
from patarm_jax.report.page import Bundle, Content, beginning, make_page, packed, within
from patarm_jax.run.health import Health, after, parted, verdict
from patarm_jax.run.rubrics import RUBRICS
from patarm_jax.run.watch import told_of
from patarm_jax.types import UserError

PHASE = "phase"  # what a line of metrics says in words: whose steps these are


@dataclass(frozen=True)
class Panel:
    """One chart: what it is called, and the metrics it draws, by label."""

    title: str
    series: Mapping[str, str]  # label → name in metrics.jsonl
    log: bool = False  # whether the values are drawn by their orders of magnitude
    exact: bool = False  # it was set, not measured: never smoothed


# Those of PaTaRM's Figure 3 first. A metric `eval/…` is one of held-out pairs, measured at some steps only.
PANELS = (
    Panel(
        "Score gap, chosen − rejected",
        {"rollouts": "judge/score_gap", "training": "margin", "held out": "eval/score_gap"},
    ),
    Panel(
        "Choices of the first response",
        {"rollouts": "judge/chose_first", "held out": "eval/chose_first"},
    ),
    Panel(
        "Accuracy by order",
        {
            "chosen first": "judge/accuracy_chosen_first",
            "rejected first": "judge/accuracy_rejected_first",
            "held out, chosen first": "eval/accuracy_chosen_first",
            "held out, rejected first": "eval/accuracy_rejected_first",
        },
    ),
    Panel("Entropy (nats per token)", {"": "entropy"}),
    Panel("Valid judgements", {"rollouts": "judge/valid", "held out": "eval/valid"}),
    Panel("Valid rubrics", {"rollouts": "rubrics/valid", "held out": "eval/rubrics/valid"}),
    Panel("Criteria of a rubric", {"rollouts": "rubrics/criteria", "held out": "eval/rubrics/criteria"}),
    Panel("Characters of a rubric", {"rollouts": "rubrics/characters", "held out": "eval/rubrics/characters"}),
    Panel(
        "Accuracy",
        {
            "tie = wrong": "judge/accuracy_strict",
            "tie = ½": "judge/accuracy_half",
            "training": "accuracy",
            "held out": "eval/accuracy_strict",
        },
    ),
    Panel("Loss", {"": "loss"}),
    Panel(
        "Reward",
        {
            "all": "reward",
            "chosen": "rewards/chosen/mean",
            "rejected": "rewards/rejected/mean",
            "held out": "eval/reward",
        },
    ),
    Panel("Responses without a reward", {"rollouts": "rewards/failed", "held out": "eval/rewards/failed"}),
    Panel(
        "Correlation of reward and length",
        {"rollouts": "rewards/length_correlation", "held out": "eval/length_correlation"},
    ),
    Panel("Probability on no whole score", {"training": "outside", "held out": "eval/outside"}),
    Panel("Groups of equal rewards", {"": "frac_reward_zero_std"}),
    Panel("Rounds of a step", {"": "dapo/rounds"}),
    Panel("Batch filled", {"": "dapo/filled"}),
    Panel(
        "Tokens of a sample",
        {"mean": "completions/mean_length", "longest": "completions/max_length", "held out": "eval/mean_length"},
    ),
    Panel("Cut-off samples", {"rollouts": "completions/clipped_ratio", "held out": "eval/clipped_ratio"}),
    Panel("Pairs without PAR", {"": "judge/pairs_without_par"}),
    Panel("KL to the reference", {"": "kl"}),
    Panel("Clipped tokens", {"": "clip_ratio/region_mean"}),
    Panel("Gradient norm", {"": "grad_norm"}),
    Panel("Updates skipped so far", {"": "skipped_updates"}),
    Panel("Tokens predicted right", {"": "mean_token_accuracy"}),
    Panel("Learning rate", {"": "learning_rate"}, exact=True),
    Panel(
        "Seconds of a step",
        {name: f"time/{name}" for name in ("sample", "judge", "parse", "reward", "logprobs", "update", "data", "eval")},
        log=True,  # the first step compiles, and parsing takes a thousandth of sampling
    ),
)


# Those of a policy, for each of which there are as many series as it has sources.
BY_SOURCE = {
    "Gold, held out": "gold/{}/mean",
    "Rewards by source": "rewards/{}/mean",
    "Held-out rewards by source": "eval/rewards/{}/mean",
}


def main(run: Path, out: Path | None = None, megabytes: int = 25) -> tuple[Path, str]:
    """Writes the page of a run, finished or not; see `make_page`."""
    return make_page(run, out, megabytes, lambda limit: _content(run, _config(run), limit))


def _content(run: Path, config: TrainConfig, limit: int) -> Content:
    metrics = _metrics(run / "metrics.jsonl")
    steps = sorted(p for p in (run / "rollouts").glob("step_*") if re.fullmatch(r"step_\d+\.parquet", p.name))
    read = functools.cache(functools.partial(_step, _rubrics(run)))
    taken = within(steps, lambda path: len(read(path)[0].data), limit)
    preferences, missing = _preferences(config, {pair for path in taken for pair in read(path)[1]})
    rest = f"The page holds {len(taken)} of {len(steps)} steps, evenly spaced; the others are in rollouts/."
    payload = {
        "facts": [*_facts(config, metrics), *_troubles(config, metrics, run)],
        "panels": [panel for panel in map(_drawn(metrics), _panels(config, metrics)) if panel["series"]],
        "steps": [line["step"] for line in metrics],
        "rows": "Rollouts",
        "bundle": "step",
        "extent": rest if len(taken) < len(steps) else "",
        "preferences": preferences,
        "missing": missing,
        "pairwise": FORMS[config.judge].responses == 2,
        "policy": FORMS[config.judge].converses,
    }
    part = f", rollouts of {len(taken)} of {len(steps)} steps" if steps else ", no rollouts"
    return Content(payload, [read(path)[0] for path in taken], f"{len(metrics)} steps{part}")


# ---- What a run folder holds ----------------------------------------------------------------------------------------


def _config(run: Path) -> TrainConfig:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} is no run folder: it holds no config.yaml. Give a folder that `patarm grpo` or sft wrote."
        )
    if "benchmark" in read_yaml(path):
        raise UserError(f"{run} is an evaluation and has no steps. Read {run / 'summary.md'}, or give a run's folder.")
    config = load_run(run)
    if isinstance(config, RubricArmConfig):  # of its two models the judge, which both are rewarded by
        return config.turn_of("judge")
    assert isinstance(config, TrainConfig)
    refuse_rounds(run, config)
    return config


def _metrics(path: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, those of one step as one; one that is still being written is left out."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the run has done no step yet. Give it some time.")
    *lines, _ = path.read_bytes().split(b"\n")
    found: dict[int, dict[str, object]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = int(values["step"])
            found.setdefault(step, {}).update(
                {name: value if name == PHASE else _finite(value) for name, value in values.items()} | {"step": step}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not metrics of a step. Remove the line.") from error
    if not found:
        raise UserError(f"{path} is empty: the run has done no step yet. Give it some time.")
    return [found[step] for step in sorted(found)]


def _rubrics(run: Path) -> dict[str, str]:
    """The rubrics that pairs were judged by, by their SHA-256; none of a run without."""
    found: dict[str, str] = {}
    for path in sorted((run / RUBRICS).glob("*.jsonl")):
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            found |= {row["sha256"]: row["text"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} holds no rubrics: {error}. Remove the file; the page is made without it."
            ) from error
    return found


def _step(rubrics: Mapping[str, str], path: Path) -> tuple[Bundle, tuple[str, ...]]:
    """The pairs of a step, with judgements of either response, or with either of them first; and their ids.

    Of pairs that were judged by a rubric, with it; of rubrics that were rewarded, with what was judged by each.
    """
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        pairs: dict[str, Any] = {}
        for row in rows:
            pair = pairs.setdefault(row["pair_id"], {"id": row["pair_id"], "chosen": [], "rejected": []})
            told = {name: row.get(name) for name in ("status", "text", "choice", "judgement")}
            if not told["judgement"] and row.get("rubric_sha256") in rubrics:
                pair["rubric"] = rubrics[row["rubric_sha256"]]
            side = row["side"].removesuffix(" first")  # of a pairwise judge, which response stood first
            side = "chosen" if side == "response" else side  # of a policy, whose prompts have no sides
            pair[side].append(told | {name: _finite(row[name]) for name in ("score", "reward", "advantage")})
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} holds no rollouts: {error}. Remove the file; the report is made without it."
        ) from error
    number = int(path.stem.removeprefix("step_"))
    return Bundle(str(number), packed({"pairs": list(pairs.values())})), tuple(pairs)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _preferences(config: TrainConfig, ids: Iterable[str]) -> tuple[dict[str, Any], str]:
    """What was judged, by id, as far as the data can still be read; and why not."""
    wanted = set(ids)
    if not wanted:
        return {}, ""
    try:
        read = read_prompts if FORMS[config.judge].converses else read_preferences
        preferences, _ = read(config.data)
    except UserError as error:
        return {}, f"The prompts and responses are not shown: {error}"
    found = {
        one.id: {
            "domain": one.domain,
            "prompt": [[turn["role"], beginning(turn["content"])] for turn in one.prompt],
            "chosen": beginning(one.chosen),
            "rejected": beginning(one.rejected),
        }
        for one in preferences
        if one.id in wanted
    }
    return found, ""


# ---- What is shown of it --------------------------------------------------------------------------------------------


def _facts(config: TrainConfig, metrics: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    last = metrics[-1]
    facts = [
        ("recipe", config.recipe),
        ("model", config.model.path),
        ("data", config.data.path),
        ("steps", str(last["step"])),
        (f"{'prompts' if FORMS[config.judge].converses else 'pairs'} per step", str(config.pairs_per_step)),
    ]
    if isinstance(config, ReinforcedConfig):
        facts.append(("group", str(config.group_size)))
    if last.get(PHASE):
        facts.append((PHASE, f"{last[PHASE]}, round {last['round']}" if last["round"] else f"{last[PHASE]}"))
    for label, name in (
        ("reward", "reward"),
        ("valid", "judge/valid"),
        ("cut off", "completions/clipped_ratio"),
        ("pairs without PAR", "judge/pairs_without_par"),
        ("accuracy", "judge/accuracy_strict"),
        ("accuracy", "accuracy"),
    ):
        if isinstance(last.get(name), float):
            facts.append((label, f"{last[name]:.3f}"))
    by = config.best_metric
    judged = [line for line in metrics if line.get(by) is not None]
    if judged:
        top = max(judged, key=lambda line: (line[by], line["step"]))  # of equal ones the last one's checkpoint is kept
        facts.append((f"best held out, {by.removeprefix('eval/')}", f"{top[by]:.3f} at step {top['step']}"))
    return facts


def _troubles(config: TrainConfig, metrics: Sequence[Mapping[str, Any]], run: Path) -> list[tuple[str, str]]:
    """What went wrong, as far as the metrics tell."""
    told, health = told_of(config, run), Health()
    for line in metrics:
        health = after(health, line, told.updates_per_step)
    found = [("updates skipped", f"{health.skipped:,} of {health.updates:,}")]
    if said := verdict(health, told):
        found.append(("what went wrong", said))
    if said := parted(metrics):
        found.append(("reward and gold", said))
    return found


def _panels(config: TrainConfig, metrics: Sequence[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """All charts; of a policy first those that tell whether its reward is being fooled."""
    if not isinstance(config, PolicyConfig):
        return PANELS
    names = [source.called for source in config.every_source]
    by_source = (Panel(title, {name: metric.format(name) for name in names}) for title, metric in BY_SOURCE.items())
    of_reward = [panel for panel in PANELS if panel.title in ("Reward", "Correlation of reward and length")]
    return (*of_reward, *by_source, *(panel for panel in PANELS if panel not in of_reward))


def _drawn(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """A function from a panel to its data: for each series a value for every step, or null.

    Where a metric is one of several models in turn, each has a series of its own.
    """
    phases = [line.get(PHASE) for line in metrics]
    in_turns = sum(one != other for one, other in itertools.pairwise(phases)) > len(metrics) / 2

    def each_in(name: str) -> Iterable[tuple[str, list[Any]]]:
        values = [line.get(name) for line in metrics]
        known = dict.fromkeys(phase for phase, value in zip(phases, values, strict=True) if value is not None)
        for phase in known:
            of_it = [value if one == phase else None for one, value in zip(phases, values, strict=True)]
            yield (f"{phase}" if len(known) > 1 else ""), of_it

    def panel(given: Panel) -> dict[str, object]:
        series = [
            {
                "label": ", ".join(filter(None, (phase, label))),
                "name": name,
                "dots": name.startswith(("eval/", "gold/")),
                "joined": in_turns,
                "values": values,
            }
            for label, name in given.series.items()
            for phase, values in each_in(name)
        ]
        return {"title": given.title, "series": series, "log": given.log, "exact": given.exact}

    return panel
