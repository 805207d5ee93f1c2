"""A judge as OpenRLHF's remote reward, in one of two ways.

    --reward.remote_url /path/to/patarm_jax/adapters/openrlhf.py         # PATARM_JUDGE names the judge

    python -m patarm_jax.adapters.openrlhf --judge http://host:8000/v1 --port 5000
    --reward.remote_url http://this-host:5000/get_reward                  # --remote_rm_url in older versions

OpenRLHF hands over prompt and response as one text, with the chat template's marks. Rewards are the judge's, from 0 to
10; `scores`, by which it filters groups, are a tenth of them. A response that could not be judged has the reward None.
"""

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_jax.adapters.judge import NAMED_BY, Judge, Opinion, judge_of
from patarm_jax.adapters.texts import Shown, shown
from patarm_jax.config.adapters import AdapterConfig
from patarm_jax.config.flags import settings_of
from patarm_jax.run.process import say
from patarm_jax.types import UserError

_BEST = 10.0


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object], **_: Any) -> dict[str, Any]:
    """Rewards of responses as tensors [N], by the judge that PATARM_JUDGE names; None where none could be judged.

    Args:
        queries: each a prompt and the response to it, as one text.
        prompts: each alone.
        labels: not needed.
    """
    import torch  # it is there where OpenRLHF is

    judge = judge_of(None, {}, served=True)
    opinions = judge.opinions(_shown(judge, queries, prompts), [None] * len(queries))
    given = _answer(judge, opinions)
    if all(value is None for value in given["rewards"]):
        return {"rewards": None, "scores": None, "extra_logs": {}}

    def tensor(values: Sequence[float | None]) -> torch.Tensor:
        return torch.tensor([float("nan") if value is None else value for value in values])

    logs = {name: tensor(values) for name, values in given["extra_logs"].items()}
    return {"rewards": tensor(given["rewards"]), "scores": tensor(given["scores"]), "extra_logs": logs}


def _shown(judge: Judge, queries: Sequence[str], prompts: Sequence[str]) -> list[Shown]:
    """What the judge is shown. Where OpenRLHF has cut a prompt, the query does not begin with it, and is not judged."""
    seen = judge.config.sees_thinking
    return [
        shown(prompt, query[len(prompt) :], seen)
        if query.startswith(prompt)
        else Shown(reason="the query does not begin with its prompt, as where that was too long and was cut")
        for query, prompt in zip(queries, prompts, strict=True)
    ]


def _answer(judge: Judge, opinions: Sequence[Opinion]) -> dict[str, Any]:
    for one in opinions:
        if one.score is None:
            say(f"a response without a reward: {one.reason}")
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
        judge = judge_of(options.judge, settings_of(AdapterConfig, rest), served=True)
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
