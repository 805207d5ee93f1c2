"""A judge as verl's custom reward function.

    reward.custom_reward_function.path=pkg://patarm_jax.adapters.verl
    reward.custom_reward_function.name=compute_score_async
    +reward.custom_reward_function.reward_kwargs.judge=http://host:8000/v1
    +reward.custom_reward_function.reward_kwargs.missing=5

Older versions have the keys `custom_reward_function.path`, `.name` (`compute_score`) and `.reward_kwargs`. verl does
not tell a reward function the prompt: put it into the dataset's `extra_info` as `question`, text or messages. Where
verl itself serves the judge (`reward.reward_model.enable=True` and its `model_path`), `judge` may be left out.

A response that could not be judged, such as one that is cut off in its thinking, has the score None, at which verl
stops; `missing` is a number in its place, such as the middle of the scale.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from patarm_jax.adapters.judge import NAMED_BY, Judge, Named, Opinion, judge_of
from patarm_jax.adapters.texts import Shown
from patarm_jax.run.process import say
from patarm_jax.types import UserError

_STOPS = ". verl stops at it: reward_kwargs.missing is a number in its place"
_QUESTION = ("question", "prompt")  # in extra_info


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    judge: Named = None,
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
    asked = _judge(judge, settings, reward_router_address)
    (opinion,) = asked.opinions([_shown(asked, solution_str, extra_info)], [_domain(asked, extra_info)])
    return _score(asked, opinion)


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    judge: Named = None,
    **settings: Any,
) -> dict[str, Any]:
    """`compute_score` for verl's reward loop, in which thousands of responses may wait at a time."""
    # Opening it asks the server for its model, which must not keep others waiting.
    asked = await asyncio.to_thread(_judge, judge, settings, reward_router_address)
    opinion = await asked.opinion(_shown(asked, solution_str, extra_info), _domain(asked, extra_info))
    return _score(asked, opinion)


def _judge(judge: Named, settings: Mapping[str, Any], served: str | None) -> Judge:
    if judge is None and served and not os.environ.get(NAMED_BY):
        judge = f"http://{served}/v1"
    return judge_of(judge, settings, of_many={})


def _shown(judge: Judge, response: str, extra_info: Mapping[str, Any] | None) -> Shown:
    prompt = next((found for name in _QUESTION if (found := (extra_info or {}).get(name)) is not None), None)
    if prompt is None:
        raise UserError(
            f"extra_info holds {', '.join(extra_info or {}) or 'nothing'}, and no question: a judge must see the "
            "prompt, which verl does not hand over. Put it into the dataset's extra_info as question, text or messages."
        )
    (found,) = judge.shown([(prompt, response)])
    return found


def _domain(judge: Judge, extra_info: Mapping[str, Any] | None) -> object:
    return (extra_info or {}).get(judge.config.domain_column)


def _score(judge: Judge, opinion: Opinion) -> dict[str, Any]:
    score = judge.config.missing if opinion.score is None else opinion.score
    if opinion.score is None:
        say(f"a response without a reward: {opinion.reason}{'' if score is not None else _STOPS}")
    # verl puts each of these into an array over all samples: they must be there for each, of one type.
    return {"score": score, "judged": float(opinion.score is not None), "without_reward": opinion.reason}
