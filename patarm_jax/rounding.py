"""Rounding that keeps the mean: what is less than half of bfloat16's last place is not lost when it is added."""

import jax
import jax.numpy as jnp


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 as one of its two neighbours in bfloat16, so that the mean over keys is x; what is exact stays so.

    The draws do not depend on how many devices share x. They come from a hash of each place, which compiles in no time
    where JAX's generator, once for every weight of a network, takes minutes.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    below = _hash_of_places(x.shape, jax.random.bits(key, (), jnp.uint32)) >> 16
    half = ((bits + below) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(half, jnp.bfloat16)


def _hash_of_places(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """A number of 32 bits for every place of an array; one round of mixing for each axis, and one for the seed.

    The mixing is MurmurHash3's finaliser.
    """
    mixed = jnp.broadcast_to(_mixed(seed), shape)
    for axis in range(len(shape)):
        mixed = _mixed(mixed ^ (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + jnp.uint32(0x9E3779B9)))
    return mixed


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
