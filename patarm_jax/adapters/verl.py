"""A judge as verl's custom reward function.

    reward.custom_reward_function.path=pkg://patarm_jax.adapters.verl
    reward.custom_reward_function.name=compute_score_async
    +reward.custom_reward_function.reward_kwargs.judge=http://host:8000/v1

Older versions have the keys `custom_reward_function.path`, `.name` (`compute_score`) and `.reward_kwargs`. verl does
not tell a reward function the prompt: put it into the dataset's `extra_info` as `question`, text or messages. Where
verl itself serves the judge (`reward.reward_model.enable=True` and its `model_path`), `judge` may be left out.

A response that could not be judged has the score None, at which verl stops; `reward_kwargs.missing` is a number in its
place.
"""

import os
from collections.abc import Mapping
from typing import Any

from patarm_jax.adapters.judge import NAMED_BY, Judge, Opinion, judge_of
from patarm_jax.adapters.texts import Shown, shown
from patarm_jax.run.process import say
from patarm_jax.types import UserError

_QUESTION = ("question", "prompt")  # in extra_info


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    judge: str | Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The score of one response, with what else verl is to log.

    Args:
        data_source: of the row.
        solution_str: the response.
        ground_truth: not needed.
        extra_info: of the row; `question` or `prompt` holds the prompt.
        reward_router_address: of the judge that verl serves.
        reward_model_tokenizer: not needed.
        judge: as `patarm_jax.adapters.judge` has it.
        settings: likewise.
    """
    asked, one = _asked(judge, settings, reward_router_address, solution_str, extra_info)
    (opinion,) = asked.opinions([one], [_domain(asked, extra_info)])
    return _score(asked, opinion)


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    judge: str | Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`compute_score` for verl's reward loop, in which thousands of responses may wait at a time."""
    asked, one = _asked(judge, settings, reward_router_address, solution_str, extra_info)
    return _score(asked, await asked.opinion(one, _domain(asked, extra_info)))


def _asked(
    judge: str | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    served: str | None,
    response: str,
    extra_info: Mapping[str, Any] | None,
) -> tuple[Judge, Shown]:
    if judge is None and served and not os.environ.get(NAMED_BY):
        judge = f"http://{served}/v1"
    asked = judge_of(judge, settings, served=True)
    prompt = next((found for name in _QUESTION if (found := (extra_info or {}).get(name)) is not None), None)
    if prompt is None:
        raise UserError(
            f"extra_info holds {', '.join(extra_info or {}) or 'nothing'}, and no question: a judge must see the "
            "prompt, which verl does not hand over. Put it into the dataset's extra_info as question, text or messages."
        )
    return asked, shown(prompt, response, asked.config.sees_thinking)


def _domain(judge: Judge, extra_info: Mapping[str, Any] | None) -> object:
    return (extra_info or {}).get(judge.config.domain_column)


def _score(judge: Judge, opinion: Opinion) -> dict[str, Any]:
    score = judge.config.missing if opinion.score is None else opinion.score
    if opinion.score is None:
        say(f"a response without a reward: {opinion.reason}")
    # verl puts each of these into an array over all samples: they must be there for each, of one type.
    return {"score": score, "judged": float(opinion.score is not None), "without_reward": opinion.reason}
