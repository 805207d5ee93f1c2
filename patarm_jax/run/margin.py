"""The margin function that a run's settings name: one of ours, or any Python function of the user's."""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from patarm_jax.config.recipes import GRPOConfig
from patarm_jax.files import one_line
from patarm_jax.reward import MARGINS, MarginFn
from patarm_jax.types import UsageError

# Where a function of the user's is tried, and what it is known by: scores have at most that far from each other.
_TRIED = np.arange(1, 101, dtype=np.float32) / 10


def margin_of(config: GRPOConfig) -> MarginFn:
    """The margin function of PAR, with the parameters of the config.

    Raises:
        UsageError: when a function of the user's cannot be imported, or gives no finite number for some margin.
    """
    name = config.reward.margin.name
    if name in MARGINS:
        parameters = {key.rpartition(".")[2]: value for key, value in config.margin_settings.items()}
        return partial(MARGINS[name], **parameters)
    function = imported(name, "reward.margin.name")
    for margin in (function, _elementwise(function)):  # of an array; else of one number at a time
        try:
            values = np.asarray(jax.jit(margin)(_TRIED))
        except Exception as error:  # whatever the user's function raises
            failed = error
            continue
        if values.shape == _TRIED.shape:
            _refuse_infinite(name, values)
            return margin
        failed = ValueError(f"it gives shape {values.shape} of shape {_TRIED.shape}")
    raise UsageError(
        f"reward.margin.name {name} gives no number for a margin from 0.1 to 10: {one_line(failed)[-300:]}. Write a "
        "function of one positive number, or of an array of them."
    )


def values_of(config: GRPOConfig, margin: MarginFn) -> dict[str, object]:
    """What a run with a function of the user's is known by, besides its settings: the function's values."""
    if config.reward.margin.name in MARGINS:
        return {}
    return {"margin of 0.1 to 10": [round(float(value), 6) for value in np.asarray(jax.jit(margin)(_TRIED))]}


def imported(name: str, setting: str) -> Callable[..., Any]:
    """The Python function that a setting names as module:name."""
    module, _, function = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a command has the folder of its script there, and not the one it is started in
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise UsageError(
            f"{setting} {name} cannot be imported from {here} or Python's path: {one_line(error)[-300:]}. "
            "Give module:name of a function, of a file module.py there or of an installed package."
        ) from error
    if not callable(found):
        raise UsageError(f"{setting} {name} is {type(found).__name__}; allowed is a function. Name one.")
    return found


def _elementwise(function: Callable[..., Any]) -> MarginFn:
    """A Python function of one number as one of arrays, called on the host."""

    def of_host(delta: np.ndarray) -> np.ndarray:
        return np.asarray([float(function(float(one))) for one in np.ravel(delta)], np.float32).reshape(np.shape(delta))

    def margin(delta: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(delta.shape, np.float32)
        found: jax.Array = jax.pure_callback(of_host, shape, delta, vmap_method="expand_dims")
        return found

    return margin


def _refuse_infinite(name: str, values: np.ndarray) -> None:
    for delta, value in zip(_TRIED, values, strict=True):
        if not np.isfinite(value):
            raise UsageError(
                f"reward.margin.name {name} gives {value} for the margin {delta:g}; allowed are finite numbers. "
                "Correct the function."
            )
