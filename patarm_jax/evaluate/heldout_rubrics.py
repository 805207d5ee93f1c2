"""Held-out pairs that a judge compares by the rubrics of a generator, now and then while one of the two is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from patarm_jax.arrays import Params, Tree
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.evaluate.heldout import NowAndThen, heldout_metrics, judge_pairs, share_of
from patarm_jax.judge.criteria import criteria_of
from patarm_jax.rollout.judging import Judge
from patarm_jax.rollout.rounds import Written
from patarm_jax.rollout.rubrics import write_rubrics
from patarm_jax.types import Status


@dataclass(frozen=True)
class HeldoutPairs:
    """What is judged, and by which programs."""

    generator: Judge  # greedy, with groups of one
    judge: Judge
    records: Sequence[EncodedPair]  # as the generator reads them
    ruled: Callable[[EncodedPair, str], EncodedPair]  # a pair as the judge reads it by a rubric, in both questions
    key: jax.Array  # the same at every step, so that a difference is the weights'

    def write(self, weights: Params) -> list[Written]:
        """A generator's rubrics of all pairs."""
        share = share_of(self.judge.engine.mesh, self.records)
        return write_rubrics(self.generator, weights, share, self.key, len(self.records))

    def metrics(self, rubrics: Sequence[Written], weights: Params) -> dict[str, float]:
        """What a judge makes of the pairs by these rubrics, as metrics `eval/…`."""
        ruled = [self.ruled(record, one.shown) for record, one in zip(self.records, rubrics, strict=True)]
        share = share_of(self.judge.engine.mesh, ruled)
        found = heldout_metrics(*judge_pairs(self.judge, weights, share, len(ruled), self.key))
        return found | rubric_metrics(rubrics, "eval/rubrics")


@dataclass(frozen=True)
class JudgeOnHeldout(NowAndThen):
    """The judge that is trained, by the rubrics of the generator beside it."""

    pairs: HeldoutPairs
    rubrics: Callable[[], Sequence[Written]]
    to_rollout: Callable[[Params, Tree], Params]  # to the copy for sampling

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """What the weights are worth, as metrics `eval/…`."""
        return self.pairs.metrics(self.rubrics(), self.to_rollout(params, frozen))


@dataclass(frozen=True)
class GeneratorOnHeldout(NowAndThen):
    """The generator that is trained, by the judge beside it."""

    pairs: HeldoutPairs
    judge: Callable[[], Params]  # its copy for sampling
    to_rollout: Callable[[Params, Tree], Params]  # to that of the generator

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """What the weights are worth, as metrics `eval/…`."""
        return self.pairs.metrics(self.pairs.write(self.to_rollout(params, frozen)), self.judge())


def rubric_metrics(rubrics: Sequence[Written], prefix: str) -> dict[str, float]:
    """What rubrics look like: the share in form, the mean number of criteria of those, the characters of all."""
    numbers = [len(criteria) for one in rubrics if (criteria := criteria_of(one.shown))]
    return {
        f"{prefix}/valid": float(np.mean([one.status is Status.OK for one in rubrics])),
        f"{prefix}/criteria": float(np.mean(numbers)) if numbers else float("nan"),
        f"{prefix}/characters": float(np.mean([len(one.shown) for one in rubrics])),
        f"{prefix}/blank": float(np.mean([not one.shown for one in rubrics])),
    }
