"""Weights that no judge can be made of: not finite, or larger than any engine in half precision can hold."""

import jax

from patarm_jax.arrays import Params
from patarm_jax.model.sharding import fetch
from patarm_jax.train.steps import LARGEST_WEIGHT, are_sound
from patarm_jax.types import UserError


def refuse_ruined(params: Params, where: str, remedy: str) -> None:
    """Refuses parameters of which one is not finite or beyond `LARGEST_WEIGHT`; all processes must call it.

    Args:
        params: sharded in any way.
        where: what they are, as the sentence begins.
        remedy: what to do, without a full stop.
    """
    sound = fetch(jax.jit(lambda tree: jax.tree.map(lambda leaf: are_sound([leaf]), tree))(params))
    ruined = [path for path, fine in jax.tree_util.tree_leaves_with_path(sound) if not fine]
    if ruined:
        names = jax.tree_util.keystr(ruined[0], simple=True, separator=".")
        more = f" and {len(ruined) - 1} more" if len(ruined) > 1 else ""
        raise UserError(
            f"{where}: the weights {names}{more} hold numbers that are not finite or beyond {LARGEST_WEIGHT:,.0f}, of "
            f"which no judge can be made. {remedy}."
        )
