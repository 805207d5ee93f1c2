"""A run as it goes: what its steps add up to, what is said of it meanwhile, and what at its end.

What it has done before it was stopped is read from its own metrics.jsonl, so that a resumed run counts on.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import multihost_utils

from patarm_jax.config.training import TrainConfig
from patarm_jax.run.health import Health, Told, after, reason_to_stop, untouched, verdict, warnings
from patarm_jax.run.metrics import read_metrics
from patarm_jax.run.peers import arrive
from patarm_jax.run.process import say
from patarm_jax.run.timing import Timer


@dataclass
class Watch:
    """What is known of a run after its last step; all processes agree on it but for `tokens`."""

    told: Told
    per_epoch: int  # batches
    health: Health
    tokens: int  # read and written in training since the run began; counted by process 0, which writes them down
    new_tokens: int = 0  # those among them since it was started the last time
    stop: str = ""  # why the run must not go on; empty where it may

    def line(
        self, step: int, metrics: Mapping[str, float], batches: int, tokens: int, timer: Timer
    ) -> dict[str, float]:
        """The metrics of a step with those that count on, and its time; warns where something goes wrong.

        Args:
            step: that was done.
            metrics: of it, and of its evaluation where it had one.
            batches: of pairs drawn since the run began.
            tokens: of all its sequences, the prompts of all rollouts included, as TRL counts them.
            timer: of the step.
        """
        before, self.health = self.health, after(self.health, metrics, self.told.updates_per_step)
        self.tokens, self.new_tokens = self.tokens + tokens, self.new_tokens + tokens
        self.stop = reason_to_stop(before, self.health, self.told)
        if not self.stop:  # else it is said at the end
            for warning in warnings(before, self.health, self.told):
                say(f"step {step}: {warning}")
        seconds = timer.total - timer.seconds.get("time/eval", 0.0)
        counted = {
            "epoch": batches / self.per_epoch,
            "num_tokens": self.tokens,
            "step_time": seconds,
            "time/tokens_per_second": tokens / seconds,
        }
        return {**metrics, **counted, **timer.seconds}

    def counts_on(self, before: "Watch") -> None:
        """Goes on with the tokens of the watch of the step before, which may be another model's."""
        self.tokens, self.new_tokens = before.tokens, before.new_tokens

    @property
    def verdict(self) -> str:
        """Why nothing was learnt in the whole run; empty where something may have been."""
        return verdict(self.health, self.told)

    @property
    def untouched(self) -> bool:
        """Whether the weights are those that the run began with."""
        return untouched(self.health)


def told_of(config: TrainConfig, folder: Path) -> Told:
    """The settings of a run that sentences about it name."""
    sampling = config.rollout_sampling
    return Told(
        folder=str(folder),
        learning_rate=config.optimizer.learning_rate,
        dtype=config.model.dtype,
        max_new_tokens=sampling.max_new_tokens if sampling else 0,
        heldout_new_tokens=config.heldout.sampling.max_new_tokens or 0,
        updates_per_step=config.updates_per_step,
        on_nonfinite=config.run.on_nonfinite,
        max_skipped=config.run.max_skipped,
        taught=config.taught_in_words,
        settings=config.settings_in,
    )


def open_watch(
    config: TrainConfig,
    folder: Path,
    done: int,
    per_epoch: int,
    before_it: int = 0,
    labels: Mapping[str, object] = MappingProxyType({}),
    counts_on: Mapping[str, object] | None = None,
) -> Watch:
    """The watch of a run that has done `done` steps; its metrics.jsonl must be open, and so end with that step.

    Args:
        config: of the run.
        folder: of the run.
        done: steps.
        per_epoch: batches.
        before_it: steps that the folder had before this run, of other phases: their tokens count, and nothing else.
        labels: said in the lines of the steps that it watches.
        counts_on: said in the lines of the steps before it whose skipped updates its own lines count on from; None:
            they begin at 0.
    """
    told, before, health, tokens = told_of(config, folder), Health(), Health(), 0
    if done and jax.process_index() == 0:
        lines = read_metrics(folder / "metrics.jsonl")
        for line in lines:
            if line["step"] <= before_it and counts_on is not None and counts_on.items() <= line.items():
                before = health = Health(counter=int(line.get("skipped_updates") or 0))
            if line["step"] > before_it and labels.items() <= line.items():
                before, health = health, after(health, line, told.updates_per_step)
        tokens = int((lines[-1] if lines else {}).get("num_tokens") or 0)
        if not tokens:
            say(f"{folder / 'metrics.jsonl'} counts no tokens up to step {done}: num_tokens counts from there on")
    if jax.process_count() > 1:
        arrive("reading what the run has done")
        numbers = np.array([dataclasses.astuple(before), dataclasses.astuple(health)], np.int32)
        before, health = (Health(*map(int, row)) for row in multihost_utils.broadcast_one_to_all(numbers))
    # A run that was stopped at its last step has nothing left to do, and it ends in the same way.
    return Watch(
        told=told,
        per_epoch=per_epoch,
        health=health,
        tokens=tokens,
        stop=reason_to_stop(before, health, told) if done > before_it else "",
    )
