"""Rounding that keeps the mean: what is less than half of bfloat16's last place is not lost when it is added."""

import jax
import jax.numpy as jnp


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 as one of its two neighbours in bfloat16, so that the mean over keys is x; what is exact stays so.

    The draws do not depend on how many devices share x.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    below = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    half = ((bits + below) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(half, jnp.bfloat16)
