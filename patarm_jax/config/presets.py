"""Which settings each algorithm and each margin uses, and its own values for those that are left unset.

Where a value is from stands beside each. A setting that is not listed is not used, and refused.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from patarm_jax.config.sections import Section
from patarm_jax.types import UsageError

Config = TypeVar("Config", bound=Section)

_CLIP = {"update.clip_low": 0.2, "update.clip_high": 0.2}
_DUAL = {"update.dual_clip": None}  # None: without it
_GROUP = {"reward.group_by": "response"}
_SPREAD = {"reward.normalise_std": True}
_TOKENS = {"update.aggregation": "token_mean"}
_CAP = {"update.importance_cap": None}
_BY_RATIO = {"update.kl.by_ratio": False}  # for algorithms with a ratio for each token


def _kl(coef: float, kind: str = "k3", place: str = "loss") -> dict[str, object]:
    return {"update.kl.coef": coef, "update.kl.kind": kind, "update.kl.place": place}


PRESETS: Mapping[str, Mapping[str, object]] = {
    # The KL is RM-R1's and Rubric-ARM's, as PaTaRM publishes none; the rest are verl's values and TRL's.
    "grpo": {**_CLIP, **_DUAL, **_CAP, **_TOKENS, **_GROUP, **_SPREAD, **_kl(0.001), **_BY_RATIO},
    # Its paper's, which has no KL.
    "dr_grpo": {
        **_CLIP,
        **_DUAL,
        **_CAP,
        "update.aggregation": "constant_length",
        **_GROUP,
        **_kl(0.0),
        **_BY_RATIO,
    },
    # Its paper's, which has no KL; at most ten rounds, as in verl.
    "dapo": {
        **_CLIP,
        "update.clip_high": 0.28,
        **_DUAL,
        **_CAP,
        **_TOKENS,
        **_GROUP,
        **_SPREAD,
        **_kl(0.0),
        **_BY_RATIO,
        "dapo.max_rounds": 10,
        "dapo.overlong_buffer": None,  # a fifth of the limit
        "dapo.overlong_factor": 1.0,
    },
    "rloo": {**_CLIP, **_GROUP, **_kl(0.05, "k1", "reward")},  # TRL's
    "reinforce_pp": {**_CLIP, **_DUAL, **_CAP, **_TOKENS, **_kl(0.001, "k1", "reward"), **_BY_RATIO},  # verl's
    # Its KL stands in the loss as its paper has it; the weight is GRPO's here.
    "reinforce_pp_baseline": {**_CLIP, **_DUAL, **_CAP, **_TOKENS, **_GROUP, **_kl(0.001), **_BY_RATIO},
    # Its paper's.
    "gspo": {"update.clip_low": 3e-4, "update.clip_high": 4e-4, **_CAP, **_GROUP, **_SPREAD, **_kl(0.0)},
    # ScaleRL's, by TRL: no floor, and a cap of 5.
    "cispo": {
        "update.clip_low": None,
        "update.clip_high": 4.0,
        **_CAP,
        **_TOKENS,
        **_GROUP,
        **_SPREAD,
        **_kl(0.0),
        **_BY_RATIO,
    },
}
IN_WORDS = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "reinforce_pp_baseline": "REINFORCE++-baseline",
    "gspo": "GSPO",
    "cispo": "CISPO",
}
# Those that compare whole sequences weigh each of them alike.
WEIGHS_SEQUENCES = ("rloo", "gspo")
# The first two are PaTaRM's; of the others none is published, and these give about what those give.
MARGINS: Mapping[str, Mapping[str, object]] = {
    "graded": {"reward.margin.low": 1.2, "reward.margin.high": 1.4, "reward.margin.threshold": 2.0},
    "constant": {"reward.margin.value": 1.3},
    "linear": {"reward.margin.offset": 1.0, "reward.margin.scale": 0.1},
    "tanh": {"reward.margin.offset": 1.0, "reward.margin.scale": 0.5, "reward.margin.width": 2.0},
    "power": {"reward.margin.scale": 1.0, "reward.margin.exponent": 0.5},
}
CHOSEN_BY_ALGORITHM = tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset))
CHOSEN_BY_MARGIN = tuple(dict.fromkeys(name for margin in MARGINS.values() for name in margin))


def value_at(config: Section, name: str) -> Any:
    """The value of a setting by its dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def with_values(config: Config, values: Mapping[str, object]) -> Config:
    """The config with settings by their dotted names."""
    for name, value in values.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(section: Config, path: Sequence[str], value: object) -> Config:
    first, *rest = path
    return dataclasses.replace(section, **{first: _replaced(getattr(section, first), rest, value) if rest else value})


def completed(setting: str, choice: str, own_values: Mapping[str, object], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a choice uses, by dotted name: what is given, and its own value for what is None.

    Args:
        setting: by which the choice is made.
        choice: such as an algorithm.
        own_values: of the settings that it uses.
        given: what was set of those that any choice uses; None where nothing was.

    Raises:
        UsageError: when a setting is given that the choice does not use.
    """
    for name, value in given.items():
        if value is not None and name not in own_values:
            uses = ", ".join(own_values) or "none of them"
            raise UsageError(
                f"{name} is {value}, and {setting} {choice} does not use it; it uses {uses}. Leave it out, or choose "
                f"another {setting.split('.')[1]}."
            )
    return {name: own if given.get(name) is None else given[name] for name, own in own_values.items()}
