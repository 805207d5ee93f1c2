"""A judge as a reward function of Tunix's learners, and of MaxText's.

    from patarm_jax.adapters.tunix import make_reward
    learner = GRPOLearner(…, reward_fns=make_reward("http://host:8000/v1", votes=4))

or in its YAML, with PATARM_JUDGE in the environment: `reward_functions: [patarm_jax.adapters.tunix]`; MaxText:
`reward_functions_path=…/patarm_jax/adapters/tunix.py reward_functions=reward`.

Tunix takes None for 0. So a response that could not be judged gets the mean of its prompt's others, with which it
learns nothing from it; where no response to a prompt could be judged, they all get the mean of the batch, or the middle
of the scale; or `missing`, where that is set.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from patarm_jax.adapters.judge import Judge, judge_of, maker_of
from patarm_jax.run.process import say

_MIDDLE = 5.0


def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The rewards of completions, by the judge that PATARM_JUDGE names."""
    return _rewards(judge_of(None, {}), prompts, completions, columns)


def _rewards(
    judge: Judge, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> list[float]:
    opinions = judge.of_batch(prompts, completions, columns)
    if without := [one for one in opinions if one.score is None]:
        say(f"{len(without)} of {len(opinions)} responses without a reward, the first one: {without[0].reason}")
    return _filled(list(map(str, prompts)), [one.score for one in opinions], judge.config.missing)


make_reward = maker_of(_rewards)


def _filled(prompts: Sequence[str], scores: Sequence[float | None], missing: float | None = None) -> list[float]:
    """Scores, with a number where there is none: `missing` or, where that is None, what teaches nothing.

    >>> _filled("aabb", [9.0, None, None, None]), _filled("aa", [None, None])
    ([9.0, 9.0, 9.0, 9.0], [5.0, 5.0])
    >>> _filled("aaab", [9.0, 2.0, None, 4.0])
    [9.0, 2.0, 5.5, 4.0]
    """
    known: dict[str, list[float]] = defaultdict(list)
    for prompt, score in zip(prompts, scores, strict=True):
        if score is not None:
            known[prompt].append(score)
    every = [score for scores in known.values() for score in scores] or [_MIDDLE]
    means = {prompt: fmean(known[prompt] or every) for prompt in prompts}
    return [
        score if score is not None else means[prompt] if missing is None else missing
        for prompt, score in zip(prompts, scores, strict=True)
    ]
