"""A judge as a reward function of TRL's GRPOTrainer and RLOOTrainer.

    from patarm_jax.adapters.trl import make_reward
    trainer = GRPOTrainer(model=…, reward_funcs=make_reward("http://host:8000/v1", votes=4), …)

or on the command line, where the environment names the judge:

    PATARM_JUDGE=http://host:8000/v1 trl grpo --reward_funcs patarm_jax.adapters.trl.reward …

A response that could not be judged has the reward None, which TRL leaves out of its group's baseline.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from patarm_jax.adapters.judge import Judge, judge_of, maker_of


def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """The rewards of completions, by the judge that PATARM_JUDGE names.

    Args:
        prompts: text or messages, one for each completion.
        completions: text or messages.
        columns: of the dataset, of which the domain's is read, and what else TRL hands over; `log_metric` is told the
            share without a reward, `log_extra` the judgements, empty where they were there before.
    """
    return _rewards(judge_of(None, {}), prompts, completions, columns)


def _rewards(
    judge: Judge, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> list[float | None]:
    opinions = judge.of_batch(prompts, completions, columns)
    if opinions and (log_metric := columns.get("log_metric")):
        log_metric("judge/without_reward", sum(one.score is None for one in opinions) / len(opinions))
    if log_extra := columns.get("log_extra"):
        log_extra("judgement", ["\n\n".join(one.judgements) for one in opinions])
        log_extra("without_reward", [one.reason for one in opinions])
    return [judge.config.missing if one.score is None else one.score for one in opinions]


make_reward = maker_of(_rewards)
