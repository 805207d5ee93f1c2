"""One token per row out of logits: how each row wants it drawn, and the draw.

Pure functions over arrays. What a row wants is data, not part of the compiled program: rows of one program may differ
in temperature, top-k, top-p, stop ids and limit, and may name tokens whose log-probs they want at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from patarm_jax.arrays import Array

# Weights whose sum is looked at before they are looked at one by one.
PICK_BLOCK = 128
# Tokens that a request may name.
MOST_NAMED = 32
# The name of conditions whose dearer branch is taken only where a request asks for it; who counts work goes by it.
RARE = "rare_branch"
# Fills lists of token ids up to their width; no token has it.
NO_TOKEN = -1


@dataclass(frozen=True)
class SamplingParams:
    """How the completions of a request are drawn."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    named_ids: tuple[int, ...] = ()  # tokens whose log-probs are returned at every step

    def __post_init__(self) -> None:
        """Raises ValueError for what no row can do."""
        if len(self.named_ids) > MOST_NAMED:
            raise ValueError(f"{len(self.named_ids)} tokens are named; allowed is {MOST_NAMED} at most")
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: allowed are max_new_tokens ≥ 1, temperature ≥ 0, top_k ≥ 0 and 0 < top_p ≤ 1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """`SamplingParams` of many rows or prompts, as arrays of one shape […]."""

    scale: Array  # […] float32, 1 / temperature, by which logits are multiplied; 1 where temperature is 0
    greedy: Array  # […] bool, temperature 0
    top_k: Array  # […] int32, 0: all
    top_p: Array  # […] float32
    limit: Array  # […] int32, max_new_tokens
    stop_ids: Array  # […, S] int32, filled up with NO_TOKEN
    named_ids: Array  # […, N] int32, filled up with NO_TOKEN


def row_sampling(params: Sequence[SamplingParams], stops: int, named: int) -> RowSampling:
    """Arrays [n] of the params of n prompts; `stops` and `named` are the widths of the lists of ids."""

    def ids(lists: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
        filled = np.full((len(lists), width), NO_TOKEN, np.int32)
        for row, given in zip(filled, lists, strict=True):
            row[: len(given)] = given
        return filled

    def of(kind: type, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, kind).reshape(len(params))

    # Computed as the compiler would for a temperature that it knows: 1 / T in float32, then a multiplication.
    temperature = of(np.float32, [one.temperature or 1.0 for one in params])
    return RowSampling(
        scale=np.float32(1) / temperature,
        greedy=of(np.bool_, [one.temperature == 0 for one in params]),
        top_k=of(np.int32, [one.top_k for one in params]),
        top_p=of(np.float32, [one.top_p for one in params]),
        limit=of(np.int32, [one.max_new_tokens for one in params]),
        stop_ids=ids([one.stop_ids for one in params], stops),
        named_ids=ids([one.named_ids for one in params], named),
    )


class Needs(NamedTuple):
    """What any row at all wants; scalars."""

    cut: jax.Array  # [] bool, top-k or top-p
    greedy: jax.Array  # [] bool


def needs_of(sampling: RowSampling) -> Needs:
    """What is not needed by any row is not computed."""
    return Needs(jnp.any((sampling.top_k > 0) | (sampling.top_p < 1)), jnp.any(sampling.greedy))


def draw(
    logits: jax.Array, keys: jax.Array, sampling: RowSampling, needs: Needs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token per row, its log-prob, and those of the tokens that the row names.

    A token is where a uniform number falls on the line of all probabilities laid end to end: one number per row, where
    adding noise to every logit would cost one per token of the vocabulary. Sorting, and the search for the likeliest
    token, are left out when no row wants them. Devices that share the vocabulary keep their parts of the logits, and
    tell each other a few numbers of each row.

    Args:
        logits: [R, …, V].
        keys: [R, …] PRNG keys.
        sampling: [R, …], or of a shape that spreads to it.
        needs: from `needs_of`.

    Returns:
        token [R, …] int32, its log-prob [R, …] and those of the named tokens [R, …, N], float32: of the softmax at the
        row's temperature (at 1 when it is 0), before top-k and top-p, which is what training compares them with.
    """
    uniform = jax.vmap(jax.random.uniform)(keys.reshape(-1)).reshape(keys.shape)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1 or logits.shape[-1] % mesh.shape["tensor"]:
        return _draw(logits, uniform, sampling, needs)
    batch = tuple(axis for axis in mesh.axis_names if axis != "tensor")
    rows, whole = PartitionSpec(batch), PartitionSpec()
    parts = PartitionSpec(batch, *[None] * (logits.ndim - 2), "tensor")
    drawn = jax.shard_map(
        partial(_draw, axis="tensor"),
        in_specs=(parts, rows, jax.tree.map(lambda _: rows, sampling), jax.tree.map(lambda _: whole, needs)),
        out_specs=rows,
        check_vma=False,
    )
    found: tuple[jax.Array, jax.Array, jax.Array] = drawn(logits, uniform, sampling, needs)
    return found


def _draw(
    logits: jax.Array, uniform: jax.Array, sampling: RowSampling, needs: Needs, axis: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `draw`, of the whole logits or of a device's part of them, whose mesh axis is named."""
    scaled = logits.astype(jnp.float32) * sampling.scale[..., None]
    peak = scaled.max(axis=-1, keepdims=True)
    above = scaled - (peak if axis is None else jax.lax.pmax(peak, axis))
    weights = jnp.exp(above)
    first = 0 if axis is None else jax.lax.axis_index(axis) * logits.shape[-1]  # the token of the first logit here

    def added_up(x: jax.Array) -> jax.Array:
        return x if axis is None else jax.lax.psum(x, axis)

    def cut() -> jax.Array:
        every = scaled if axis is None else jax.lax.all_gather(scaled, axis, axis=scaled.ndim - 1, tiled=True)
        stays = kept(every, sampling.top_k, sampling.top_p)
        if axis is not None:
            stays = jax.lax.dynamic_slice_in_dim(stays, first, logits.shape[-1], axis=scaled.ndim - 1)
        return pick(jnp.where(stays, weights, 0.0), uniform, axis)

    def likeliest() -> jax.Array:
        here = first + scaled.argmax(axis=-1)
        if axis is not None:  # of equal ones the first, as of a whole row
            here = jax.lax.pmin(jnp.where(above.max(axis=-1) == 0, here, jnp.iinfo(here.dtype).max), axis)
        return jnp.where(sampling.greedy, here, token)

    def at(ids: jax.Array) -> jax.Array:
        """The values of tokens [..., n], each of which one device has."""
        place = ids - first
        is_here = (place >= 0) & (place < above.shape[-1])
        taken = jnp.take_along_axis(above, jnp.clip(place, 0, above.shape[-1] - 1), axis=-1)
        return added_up(jnp.where(is_here, taken, 0.0))

    with jax.named_scope(RARE):
        token = jax.lax.cond(needs.cut, cut, lambda: pick(weights, uniform, axis))
        token = jax.lax.cond(needs.greedy, likeliest, lambda: token)
    total = jnp.log(added_up(weights.sum(axis=-1, keepdims=True)))
    named = jnp.broadcast_to(jnp.maximum(sampling.named_ids, 0), (*token.shape, sampling.named_ids.shape[-1]))
    of_token, of_named = (at(ids) - total for ids in (token[..., None], named))
    return token.astype(jnp.int32), of_token[..., 0], of_named


def pick(weights: jax.Array, uniform: jax.Array, axis: str | None = None) -> jax.Array:
    """The first index whose cumulative weight exceeds `uniform` [...] in [0, 1) of the total: weights [..., V] ≥ 0.

    Found in steps, a block of weights and then an index in it, since a cumulative sum over V is slow; and of devices
    that have a part of the weights each, along a mesh axis, first the one that has it.
    """
    size = weights.shape[-1]
    blocks = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -size % PICK_BLOCK)])
    blocks = blocks.reshape(*weights.shape[:-1], -1, PICK_BLOCK)
    masses = blocks.sum(axis=-1)
    cumulative = jnp.cumsum(masses, axis=-1)
    goal = uniform[..., None] * cumulative[..., -1:]
    if axis is not None:
        of_devices = jax.lax.all_gather(cumulative[..., -1], axis, axis=uniform.ndim)
        up_to = jnp.cumsum(of_devices, axis=-1)
        goal = uniform[..., None] * up_to[..., -1:]
        owner, me = _first_above(of_devices, up_to, goal), jax.lax.axis_index(axis)
        goal = goal - (up_to[..., me] - of_devices[..., me])[..., None]
    block = _first_above(masses, cumulative, goal)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0), axis=-1), 0.0)
    inside = jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :]
    index = (block * PICK_BLOCK + _first_above(inside, before + jnp.cumsum(inside, axis=-1), goal))[..., 0]
    if axis is None:
        return index
    return jax.lax.psum(jnp.where(owner[..., 0] == me, me * size + index, 0), axis)


def _first_above(masses: jax.Array, cumulative: jax.Array, goal: jax.Array) -> jax.Array:
    """[..., n] → [..., 1]: the first index past the goal, or the last, of those with a mass, whatever is rounded."""
    real = masses > 0
    past = real & (cumulative > goal)
    last = masses.shape[-1] - 1 - jnp.flip(real, axis=-1).argmax(axis=-1, keepdims=True)
    return jnp.where(past.any(axis=-1, keepdims=True), past.argmax(axis=-1, keepdims=True), last)


def kept(logits: jax.Array, top_k: Array, top_p: Array) -> jax.Array:
    """Which logits [..., V] are among the k largest and in the smallest set of these whose probabilities reach p.

    Tokens equal to the last that is kept stay too. top_k [...]: 0 keeps all; top_p [...]: 1 keeps all.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1]) - 1
    least_of_k = jnp.take_along_axis(ordered, jnp.broadcast_to(last, logits.shape[:-1])[..., None], axis=-1)
    ordered = jnp.where(ordered >= least_of_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the likeliest token always stays: 0 < p
    is_reached = (before >= top_p[..., None]) & (top_p[..., None] < 1)
    least_of_p = jnp.where(is_reached, jnp.inf, ordered).min(axis=-1, keepdims=True)
    return (logits >= least_of_k) & (logits >= least_of_p)
