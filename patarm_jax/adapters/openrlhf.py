"""A judge as OpenRLHF's remote reward, in one of two ways.

    --reward.remote_url /path/to/patarm_jax/adapters/openrlhf.py         # PATARM_JUDGE names the judge

    python -m patarm_jax.adapters.openrlhf --judge http://host:8000/v1 --port 5000 --missing 5
    --reward.remote_url http://this-host:5000/get_reward                  # --remote_rm_url in older versions

OpenRLHF hands over prompt and response as one text, with the chat template's marks. Rewards are the judge's, from 0 to
10; `scores`, by which it filters groups, are a tenth of them. A response that could not be judged, such as one that is
cut off in its thinking, has the reward None, at which OpenRLHF stops; `missing` is a number in its place, such as the
middle of the scale.
"""

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_jax.adapters.judge import NAMED_BY, Judge, Opinion, judge_of
from patarm_jax.adapters.texts import Shown, split_query
from patarm_jax.config.adapters import AdapterConfig
from patarm_jax.config.flags import settings_of
from patarm_jax.run.process import say
from patarm_jax.types import UserError

_BEST = 10.0
_STOPS = ". OpenRLHF stops at it: missing is a number in its place"
# OpenRLHF gives up after 180 s, and sends the same again.
_PATIENCE = {"time_limit": 150.0, "endpoint": {"timeout": 45.0}}


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object], **_: Any) -> dict[str, Any]:
    """Rewards of responses as tensors [N], by the judge that PATARM_JUDGE names; None where none could be judged.

    Args:
        queries: each a prompt and the response to it, as one text.
        prompts: each alone.
        labels: not needed.
    """
    import torch  # it is there where OpenRLHF is

    judge = judge_of(None, {}, _PATIENCE)
    opinions = judge.opinions(_shown(judge, queries, prompts), [None] * len(queries))
    given = _answer(judge, opinions)
    if None in given["rewards"]:
        if len(queries) > 1:
            raise UserError(
                "some of several responses have no reward, which no tensor can say. Set missing to a number that they "
                "get."
            )
        return {"rewards": None, "scores": None, "extra_logs": {}}
    logs = {name: torch.tensor(values) for name, values in given["extra_logs"].items()}
    return {"rewards": torch.tensor(given["rewards"]), "scores": torch.tensor(given["scores"]), "extra_logs": logs}


def _shown(judge: Judge, queries: Sequence[str], prompts: Sequence[str]) -> list[Shown]:
    """What the judge is shown; a query that does not begin with its prompt, as where that was cut, is not judged."""
    responses = [split_query(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    every = judge.shown([(prompt, response or "") for prompt, response in zip(prompts, responses, strict=True)])
    return [
        one if response is not None else Shown(reason="the query does not begin with its prompt, which may be cut")
        for one, response in zip(every, responses, strict=True)
    ]


def _answer(judge: Judge, opinions: Sequence[Opinion]) -> dict[str, Any]:
    for one in opinions:
        if one.score is None:
            say(f"a response without a reward: {one.reason}{'' if judge.config.missing is not None else _STOPS}")
    rewards = [judge.config.missing if one.score is None else one.score for one in opinions]
    scores = [None if value is None else min(max(value / _BEST, 0.0), 1.0) for value in rewards]
    judged = [float(one.score is not None) for one in opinions]
    return {"rewards": rewards, "scores": scores, "extra_logs": {"judged": judged}}


async def answer_request(judge: Judge, request: Mapping[str, Any]) -> dict[str, Any]:
    """The response to a request of OpenRLHF: `query`, `prompts`, `labels` → `rewards`, `scores`, `extra_logs`."""
    every = _shown(judge, request["query"], request["prompts"])
    return _answer(judge, await asyncio.gather(*(judge.opinion(one, None) for one in every)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves a judge as OpenRLHF's reward until it is stopped."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    parser = argparse.ArgumentParser(prog="python -m patarm_jax.adapters.openrlhf", allow_abbrev=False)
    parser.add_argument("--judge", help=f"a URL, or a YAML file of settings; without it, what {NAMED_BY} names")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    options, rest = parser.parse_known_args(arguments)
    try:
        judge = judge_of(options.judge, settings_of(AdapterConfig, rest), _PATIENCE)
    except UserError as error:
        parser.exit(error.exit_code, f"{error}\n")

    async def get_reward(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await answer_request(judge, await request.json()))
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": f"not a request of OpenRLHF: {error!r}"}, status_code=400)
        except UserError as error:
            say(str(error))
            return JSONResponse({"error": str(error)}, status_code=502)

    app = Starlette(routes=[Route("/get_reward", get_reward, methods=["POST"])])
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
