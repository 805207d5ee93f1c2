"""Draws completions on a fixed number of rows, which finished completions leave and waiting ones take.

Pure functions over arrays: knows tokens and logits, no text, no network and no schedule. Prompts lie in places, each
shared by the G rows that may sit with it; rows are written token by token in one compiled loop; between two runs of the
loop the caller moves prompts and rows in and out. Randomness belongs to the row: the key of a token is
`fold_in(fold_in(key, id), position)`, where the id is that of its completion, so neither the rows beside it nor the
devices it runs on change it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Prompts, Seats

Cache = TypeVar("Cache")
Params = Any

# Weights whose sum is looked at before they are looked at one by one.
PICK_BLOCK = 128


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen; static under jit."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    # The ids of a prompt's G completions: 0, sample_id·G + g; else sample_id + g·vote_stride, the same for any G.
    vote_stride: int = 0


@dataclass(frozen=True)
class Network(Generic[Cache]):
    """What the sampler asks of a network; W devices share the batch, and indices count within each."""

    init: Callable[[int, int, int, int], Cache]  # prompts R, prompt width, rows B, completion width
    prefill: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Any]]  # tokens, lengths → logits [R,V], prompts
    place: Callable[[Cache, Any, jax.Array], Cache]  # the prompts of `prefill` into places [W, n]
    decode: Callable[[Params, jax.Array, Cache, Seats], tuple[jax.Array, Cache]]  # tokens [B] → logits [B, V]
    resize: Callable[[Cache, jax.Array, jax.Array, int], Cache]  # rows [W, b], prompts [W, r], prompt width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots(Generic[Cache]):
    """The places of r prompts and b rows on each of W devices."""

    cache: Cache
    steps: jax.Array  # [] int32, tokens that every row could have drawn since the beginning
    first_token: jax.Array  # [W, r·G] int32, drawn for every seat when its prompt came in
    first_logprob: jax.Array  # [W, r·G] float32
    seat: jax.Array  # [W, b] int32, prompt·G + rollout
    ids: jax.Array  # [W, b] int32, `completion_id`, which keys are folded from
    token: jax.Array  # [W, b] int32, drawn last
    drawn: jax.Array  # [W, b] int32, tokens drawn so far
    done: jax.Array  # [W, b] bool, ended, cut off, or never begun
    stopped: jax.Array  # [W, b] bool, ended by a stop token
    tokens: jax.Array  # [W, b, Tc] int32, 0 past the end
    logprobs: jax.Array  # [W, b, Tc] float32, 0 past the end


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """Which rows begin a completion, and of what."""

    begins: jax.Array  # [W, b] bool
    seat: jax.Array  # [W, b] int32
    ids: jax.Array  # [W, b] int32


def empty_slots(
    network: Network[Cache], shards: int, prompts: int, prompt_width: int, rows: int, group: int, settings: Settings
) -> Slots[Cache]:
    """Places for so many prompts and rows per device, all free."""
    # The last token drawn is never read, but one place less would not be the round number that hardware reads fast.
    width = settings.max_new_tokens
    cache = network.init(shards * prompts, prompt_width, shards * rows, width)
    zero = jnp.zeros((shards, rows), jnp.int32)
    return Slots(
        cache,
        steps=jnp.int32(0),
        first_token=jnp.zeros((shards, prompts * group), jnp.int32),
        first_logprob=jnp.zeros((shards, prompts * group), jnp.float32),
        seat=zero,
        ids=zero,
        token=zero,
        drawn=zero,
        done=zero == 0,
        stopped=zero > 0,
        tokens=jnp.zeros((shards, rows, width), jnp.int32),
        logprobs=jnp.zeros((shards, rows, width), jnp.float32),
    )


def completion_id(sample_id: Any, rollout: Any, group: int, settings: Settings) -> Any:
    """What the keys of a completion are folded from, of ints or arrays; see `Settings.vote_stride`."""
    if settings.vote_stride:
        return sample_id + rollout * settings.vote_stride
    return sample_id * group + rollout


def bring_in(
    network: Network[Cache],
    params: Params,
    slots: Slots[Cache],
    prompts: Prompts,
    place: jax.Array,
    key: jax.Array,
    group: int,
    settings: Settings,
) -> Slots[Cache]:
    """Reads prompts, once for their whole group, and draws the first token of each of their G completions.

    Args:
        network: see `Network`.
        params: its weights.
        slots: whose places are filled.
        prompts: n per device.
        place: [W, n] where each is to lie; r for a filler that is to lie nowhere.
        key: of this run.
        group: G.
        settings: see `Settings`.
    """
    logits, fresh = network.prefill(params, prompts.tokens, prompts.lengths)
    ids = completion_id(prompts.sample_ids[:, None], jnp.arange(group), group, settings)
    logits = jnp.broadcast_to(logits[:, None], (*ids.shape, logits.shape[-1]))
    token, logprob = draw(logits, _keys(key, ids, jnp.zeros_like(ids)), settings)

    def put(into: jax.Array, seat: jax.Array, new: jax.Array) -> jax.Array:
        return into.at[seat].set(new, mode="drop")

    seats = (place[..., None] * group + jnp.arange(group)).reshape(place.shape[0], -1)
    return replace(
        slots,
        cache=network.place(slots.cache, fresh, place),
        first_token=jax.vmap(put)(slots.first_token, seats, token.reshape(seats.shape)),
        first_logprob=jax.vmap(put)(slots.first_logprob, seats, logprob.reshape(seats.shape)),
    )


def advance(
    network: Network[Cache],
    params: Params,
    slots: Slots[Cache],
    admission: Admission,
    key: jax.Array,
    enough: jax.Array,
    settings: Settings,
) -> Slots[Cache]:
    """Lets rows begin, then draws until `enough` rows of all devices are done, or all.

    Log-probs are of the softmax at `temperature` (at 1 when it is 0) before top-k and top-p, which is what training
    compares them with.
    """
    slots = _admit(slots, admission, settings)
    shards, rows = slots.seat.shape
    seats = slots.first_token.shape[1]
    # Who is done has left its seat, and another may sit there.
    sitting = jnp.where(slots.done, seats, slots.seat)
    everyone = jnp.broadcast_to(jnp.arange(rows), (shards, rows))
    row = jax.vmap(lambda seat, who: jnp.full(seats, rows).at[seat].set(who, mode="drop"))(sitting, everyone)

    def step(slots: Slots[Cache]) -> Slots[Cache]:
        where = Seats(slots.seat, row, jnp.maximum(slots.drawn - 1, 0))
        logits, cache = network.decode(params, slots.token.reshape(-1), slots.cache, where)
        token, logprob = draw(logits.reshape(shards, rows, -1), _keys(key, slots.ids, slots.drawn), settings)
        return _record(replace(slots, cache=cache, steps=slots.steps + 1), ~slots.done, token, logprob, settings)

    end = jnp.minimum(enough, slots.done.size)
    return jax.lax.while_loop(lambda slots: slots.done.sum() < end, step, slots)


def resize(
    network: Network[Cache],
    slots: Slots[Cache],
    rows: jax.Array,
    prompts: jax.Array,
    seat: jax.Array,
    width: int,
    group: int,
) -> Slots[Cache]:
    """Fewer, or narrower, places.

    Args:
        network: see `Network`.
        slots: as they are.
        rows: [W, b] the rows that are kept; the old number of rows for one that is to be free.
        prompts: [W, r] the prompts that are kept.
        seat: [W, b] where the rows that are kept sit then.
        width: of the prompts then; no narrower than those that are kept.
        group: G.
    """
    free = rows >= slots.seat.shape[1]

    def take(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="clip"))(x, rows)

    seats = (prompts[..., None] * group + jnp.arange(group)).reshape(prompts.shape[0], -1)
    return Slots(
        network.resize(slots.cache, rows, prompts, width),
        steps=slots.steps,
        first_token=jnp.take_along_axis(slots.first_token, seats, axis=1),
        first_logprob=jnp.take_along_axis(slots.first_logprob, seats, axis=1),
        seat=seat,
        ids=take(slots.ids),
        token=take(slots.token),
        drawn=take(slots.drawn),
        done=take(slots.done) | free,
        stopped=take(slots.stopped),
        tokens=take(slots.tokens),
        logprobs=take(slots.logprobs),
    )


def _admit(slots: Slots[Cache], admission: Admission, settings: Settings) -> Slots[Cache]:
    """Forgets what the rows that begin wrote before, and gives them the first token of their seat."""
    begins = admission.begins
    seat, ids = (jnp.where(begins, new, old) for new, old in ((admission.seat, slots.seat), (admission.ids, slots.ids)))
    token, logprob = (jnp.take_along_axis(x, seat, axis=1) for x in (slots.first_token, slots.first_logprob))
    fresh = replace(
        slots,
        seat=seat,
        ids=ids,
        drawn=jnp.where(begins, 0, slots.drawn),
        done=slots.done & ~begins,
        stopped=slots.stopped & ~begins,
        tokens=jnp.where(begins[..., None], 0, slots.tokens),
        logprobs=jnp.where(begins[..., None], 0.0, slots.logprobs),
    )
    return _record(fresh, begins, token, logprob, settings)


def _record(
    slots: Slots[Cache], who: jax.Array, token: jax.Array, logprob: jax.Array, settings: Settings
) -> Slots[Cache]:
    """Writes down what was drawn for some rows [W, b]."""
    here = who[..., None] & (jnp.arange(settings.max_new_tokens) == slots.drawn[..., None])
    stopped = who & jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32))
    drawn = slots.drawn + who
    return replace(
        slots,
        token=jnp.where(who, token, slots.token),
        drawn=drawn,
        done=slots.done | stopped | (who & (drawn >= settings.max_new_tokens)),
        stopped=slots.stopped | stopped,
        tokens=jnp.where(here, token[..., None], slots.tokens),
        logprobs=jnp.where(here, logprob[..., None], slots.logprobs),
    )


def _keys(key: jax.Array, ids: jax.Array, position: jax.Array) -> jax.Array:
    """fold_in(fold_in(key, id), position) for every row."""
    rows = jax.vmap(lambda id, position: jax.random.fold_in(jax.random.fold_in(key, id), position))
    return rows(ids.reshape(-1), position.reshape(-1)).reshape(ids.shape)


def draw(logits: jax.Array, keys: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """One token per row and its log-prob.

    A token is where a uniform number falls on the line of all probabilities laid end to end: one number per row, where
    adding noise to every logit would cost one per token of the vocabulary.

    Args:
        logits: [..., V].
        keys: [...] PRNG keys.
        settings: temperature, top-k, top-p.

    Returns:
        token [...] int32 and its log-prob [...] float32 before top-k and top-p.
    """
    logits = logits.astype(jnp.float32)
    if settings.temperature > 0:
        logits = logits / settings.temperature
    above = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(above)
    if settings.temperature > 0:
        kept = keep_top_p(keep_top_k(logits, settings.top_k), settings.top_p)
        uniform = jax.vmap(jax.random.uniform)(keys.reshape(-1)).reshape(keys.shape)
        token = pick(weights if kept is logits else jnp.where(kept > -jnp.inf, weights, 0.0), uniform)
    else:
        token = logits.argmax(axis=-1)
    logprob = jnp.take_along_axis(above, token[..., None], axis=-1)[..., 0] - jnp.log(weights.sum(axis=-1))
    return token.astype(jnp.int32), logprob


def pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index whose cumulative weight exceeds `uniform` [...] in [0, 1) of the total: weights [..., V] ≥ 0.

    Found in two steps, a block of weights and then an index in it, since a cumulative sum over V is slow.
    """
    blocks = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % PICK_BLOCK)])
    blocks = blocks.reshape(*weights.shape[:-1], -1, PICK_BLOCK)
    masses = blocks.sum(axis=-1)
    cumulative = jnp.cumsum(masses, axis=-1)
    goal = uniform[..., None] * cumulative[..., -1:]
    block = _first_above(masses, cumulative, goal)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0), axis=-1), 0.0)
    inside = jnp.take_along_axis(blocks, block[..., None], axis=-2)[..., 0, :]
    return (block * PICK_BLOCK + _first_above(inside, before + jnp.cumsum(inside, axis=-1), goal))[..., 0]


def _first_above(masses: jax.Array, cumulative: jax.Array, goal: jax.Array) -> jax.Array:
    """[..., n] → [..., 1]: the first index past the goal, or the last, of those with a mass, whatever is rounded."""
    real = masses > 0
    past = real & (cumulative > goal)
    last = masses.shape[-1] - 1 - jnp.flip(real, axis=-1).argmax(axis=-1, keepdims=True)
    return jnp.where(past.any(axis=-1, keepdims=True), past.argmax(axis=-1, keepdims=True), last)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """−∞ for all but the k largest logits [..., V]; tokens equal to the k-th stay. k = 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """−∞ for all but the smallest set of likeliest tokens [..., V] whose probabilities reach p; p = 1 keeps all."""
    if p >= 1.0:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the likeliest token always stays: 0 < p
    least = jnp.where(before < p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
