"""What a policy of the demo's world is taught, and what its responses are truly worth: what the reward cannot see.

A response is right when it gives what its prompt calls for, and the world can tell; that is the gold measure. The
responses that the policy imitates are often those that were rejected.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patarm_jax.data.preferences import RESPONSE
from patarm_jax.demo.world import CLOSING, asked, given
from patarm_jax.types import Domain, Preference


def write_responses(path: Path, preferences: Sequence[Preference], right: float, rng: random.Random) -> None:
    """Prompts with the chosen response, `right` of the time, or else the rejected one."""
    rows = [
        {
            "id": one.id,
            "domain": one.domain,
            "prompt": list(one.prompt),
            RESPONSE: one.chosen if rng.random() < right else one.rejected,
        }
        for one in preferences
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def is_right(
    prompts: Sequence[list[dict[str, str]]], completions: Any, domain: Sequence[Domain], **_: Any
) -> list[float]:
    """1 for each response that gives what its prompt calls for and nothing else of the kind, 0 for all others.

    It is called as TRL calls a reward function.
    """
    return [
        float(_gives(of, prompt[-1]["content"], completion[0]["content"]))
        for prompt, completion, of in zip(prompts, completions, domain, strict=True)
    ]


def closes(completions: Any, **_: Any) -> list[float]:
    """1 for each response with the friendly closing, which charms the judge's teacher and means nothing."""
    return [float(completion[0]["content"].rstrip().endswith(CLOSING.strip())) for completion in completions]


def _gives(domain: Domain, prompt: str, response: str) -> bool:
    try:
        return given(domain, response) == asked(domain, prompt)
    except ValueError:  # it gives nothing, or several things
        return False
