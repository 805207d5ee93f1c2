"""Draws completions on a fixed number of rows, which finished completions leave and waiting ones take.

Pure functions over arrays: knows tokens and logits, no text, no network and no schedule. Prompts lie in places, each
shared by the G rows that may sit with it, which are drawn as the prompt's request says; rows are written token by token
in one compiled loop; between two runs of the loop the caller moves prompts and rows in and out. Randomness belongs to
the row: the key of a token is `fold_in(fold_in(key, id), position)`, where the id is that of its completion, so neither
the rows beside it nor the devices it runs on change it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Array, Beginnings, Params, Prompts, Seats, Tree
from patarm_jax.rollout.draw import RowSampling, draw, needs_of

Cache = TypeVar("Cache")
Place = TypeVar("Place", int, jax.Array)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the places of a run."""

    prompts: int  # r, on each device
    prompt_width: int  # Tp
    rows: int  # b, on each device
    width: int  # Tc, the largest limit
    parts: tuple[int, ...]  # pages of the rows' own keys on each device, by the parts of their pool
    stops: int  # S, the longest list of stop ids
    named: int  # N, the longest list of named tokens


@dataclass(frozen=True)
class Network(Generic[Cache]):
    """What the sampler asks of a network; W devices share the batch, and indices count within each."""

    init: Callable[[int, Sizes], Cache]  # W
    prefill: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Tree]]  # tokens, lengths → [R, V], prompts
    place: Callable[[Cache, Tree, jax.Array], Cache]  # the prompts of `prefill` into places [W, n]
    decode: Callable[[Params, jax.Array, Cache, Seats], tuple[jax.Array, Cache]]  # tokens [B] → logits [B, V]
    resize: Callable[[Cache, jax.Array, jax.Array, int], Cache]  # rows [W, b], prompts [W, r], prompt width
    # Of a network that can: as `prefill`, of whole prompts whose beginnings lie in the cache; the tokens are the rest.
    prefill_behind: Callable[[Params, jax.Array, jax.Array, Cache, Beginnings], tuple[jax.Array, Tree]] | None = None
    # Of a network whose cache may be full: whether another token of rows of these ages [W, b] has room in it.
    room: Callable[[Cache, jax.Array], jax.Array] = lambda cache, age: jnp.bool_(True)
    pools_in_parts: bool = False  # whether more pages come as another part, and not by widening the whole
    batch_invariant: bool = False  # whether numbers of a row may depend on nothing but it: see `Engine`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots(Generic[Cache]):
    """The places of r prompts and b rows on each of W devices."""

    cache: Cache
    steps: jax.Array  # [] int32, tokens that every row could have drawn since the beginning
    first_token: jax.Array  # [W, r·G] int32, drawn for every seat when its prompt came in
    first_logprob: jax.Array  # [W, r·G] float32
    first_named: jax.Array  # [W, r·G, N] float32
    sampling: RowSampling  # [W, r], how the rows that sit with a prompt are drawn
    seat: jax.Array  # [W, b] int32, prompt·G + rollout
    ids: jax.Array  # [W, b] int32, `completion_id`, which keys are folded from
    token: jax.Array  # [W, b] int32, drawn last
    drawn: jax.Array  # [W, b] int32, tokens drawn so far
    done: jax.Array  # [W, b] bool, ended, cut off, or never begun
    stopped: jax.Array  # [W, b] bool, ended by a stop token
    tokens: jax.Array  # [W, b, Tc] int32, 0 past the end
    logprobs: jax.Array  # [W, b, Tc] float32, 0 past the end
    named: jax.Array  # [W, b, Tc, N] float32, the log-probs of the tokens that the request names; 0 past the end


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """Which rows begin a completion, and of what."""

    begins: jax.Array  # [W, b] bool
    seat: jax.Array  # [W, b] int32
    ids: jax.Array  # [W, b] int32


def empty_slots(network: Network[Cache], shards: int, group: int, sizes: Sizes) -> Slots[Cache]:
    """Places of these sizes on so many devices, all free."""
    prompts, rows = sizes.prompts, sizes.rows
    cache = network.init(shards, sizes)
    zero, unset = jnp.zeros((shards, rows), jnp.int32), jnp.zeros((shards, prompts), jnp.int32)
    seats = shards, prompts * group
    return Slots(
        cache,
        steps=jnp.int32(0),
        first_token=jnp.zeros(seats, jnp.int32),
        first_logprob=jnp.zeros(seats, jnp.float32),
        first_named=jnp.zeros((*seats, sizes.named), jnp.float32),
        sampling=RowSampling(
            scale=1.0 + unset,
            greedy=unset > 0,
            top_k=unset,
            top_p=1.0 + unset,
            limit=unset,
            stop_ids=jnp.zeros((*unset.shape, sizes.stops), jnp.int32),
            named_ids=jnp.zeros((*unset.shape, sizes.named), jnp.int32),
        ),
        seat=zero,
        ids=zero,
        token=zero,
        drawn=zero,
        done=zero == 0,
        stopped=zero > 0,
        tokens=jnp.zeros((shards, rows, sizes.width), jnp.int32),
        logprobs=jnp.zeros((shards, rows, sizes.width), jnp.float32),
        named=jnp.zeros((shards, rows, sizes.width, sizes.named), jnp.float32),
    )


def completion_id(sample_id: Place, rollout: Place, group: int, vote_stride: int) -> Place:
    """What the keys of a prompt's G completions are folded from, of ints or arrays.

    sample_id·G + g; with a vote_stride, sample_id + g·vote_stride, which is the same for any G.
    """
    return sample_id + rollout * vote_stride if vote_stride else sample_id * group + rollout


def bring_in(
    network: Network[Cache],
    params: Params,
    slots: Slots[Cache],
    prompts: Prompts,
    sampling: RowSampling,
    place: jax.Array,
    key: jax.Array,
    beginnings: Beginnings | None,
    group: int,
    vote_stride: int,
) -> Slots[Cache]:
    """Reads prompts, once for their whole group, and draws the first token of each of their G completions.

    Args:
        network: see `Network`.
        params: its weights.
        slots: whose places are filled.
        prompts: n per device.
        sampling: [W·n], how their completions are drawn.
        place: [W, n] where each is to lie; r for a filler that is to lie nowhere.
        key: of this run.
        beginnings: which of the places, as they are before, the prompts begin like; the prompts are then what stands
            behind. None: they are whole.
        group: G.
        vote_stride: see `completion_id`.
    """
    if beginnings is None:
        logits, fresh = network.prefill(params, prompts.tokens, prompts.lengths)
    else:
        assert network.prefill_behind is not None, "a network that says how can share beginnings"
        logits, fresh = network.prefill_behind(params, prompts.tokens, prompts.lengths, slots.cache, beginnings)
    ids = completion_id(prompts.sample_ids[:, None], jnp.arange(group), group, vote_stride)
    logits = jnp.broadcast_to(logits[:, None], (*ids.shape, logits.shape[-1]))
    of_group = jax.tree.map(lambda x: x[:, None], sampling)
    token, logprob, named = draw(logits, _keys(key, ids, jnp.zeros_like(ids)), of_group, needs_of(sampling))

    def put(into: jax.Array, where: jax.Array, new: jax.Array) -> jax.Array:
        new = new.reshape(*where.shape, *into.shape[2:])
        return jax.vmap(lambda into, where, new: into.at[where].set(new, mode="drop"))(into, where, new)

    seats = (place[..., None] * group + jnp.arange(group)).reshape(place.shape[0], -1)
    return replace(
        slots,
        cache=network.place(slots.cache, fresh, place),
        first_token=put(slots.first_token, seats, token),
        first_logprob=put(slots.first_logprob, seats, logprob),
        first_named=put(slots.first_named, seats, named),
        sampling=jax.tree.map(lambda into, new: put(into, place, new), slots.sampling, sampling),
    )


def advance(
    network: Network[Cache],
    params: Params,
    slots: Slots[Cache],
    admission: Admission,
    key: jax.Array,
    enough: Array,
    group: int,
) -> Slots[Cache]:
    """Lets rows begin, then draws until `enough` rows of all devices are done, or all, or the cache is full."""
    slots, sampling = _admit(slots, admission, group)
    needs = needs_of(sampling)  # here, not in the loop, where devices would tell each other at every step
    shards, rows = slots.seat.shape
    seats = slots.first_token.shape[1]
    # Who is done has left its seat, and another may sit there.
    sitting = jnp.where(slots.done, seats, slots.seat)
    everyone = jnp.broadcast_to(jnp.arange(rows), (shards, rows))
    row = jax.vmap(lambda seat, who: jnp.full(seats, rows).at[seat].set(who, mode="drop"))(sitting, everyone)

    def step(slots: Slots[Cache]) -> Slots[Cache]:
        where = Seats(slots.seat, row, _ages(slots))
        logits, cache = network.decode(params, slots.token.reshape(-1), slots.cache, where)
        drawn = draw(logits.reshape(shards, rows, -1), _keys(key, slots.ids, slots.drawn), sampling, needs)
        return _record(replace(slots, cache=cache, steps=slots.steps + 1), ~slots.done, sampling, *drawn)

    end = jnp.minimum(enough, slots.done.size)

    def goes_on(slots: Slots[Cache]) -> jax.Array:
        return (slots.done.sum() < end) & network.room(slots.cache, _ages(slots))

    return jax.lax.while_loop(goes_on, step, slots)


def _ages(slots: Slots[Cache]) -> jax.Array:
    """[W, b], keys that each row holds: the token drawn last has none yet. −1: it writes nothing any more."""
    return jnp.where(slots.done, -1, slots.drawn - 1)


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
    take = partial(_taken, index=rows)
    seats = (prompts[..., None] * group + jnp.arange(group)).reshape(prompts.shape[0], -1)
    return Slots(
        network.resize(slots.cache, rows, prompts, width),
        steps=slots.steps,
        first_token=_taken(slots.first_token, seats),
        first_logprob=_taken(slots.first_logprob, seats),
        first_named=_taken(slots.first_named, seats),
        sampling=jax.tree.map(lambda x: _taken(x, prompts), slots.sampling),
        seat=seat,
        ids=take(slots.ids),
        token=take(slots.token),
        drawn=take(slots.drawn),
        done=take(slots.done) | free,
        stopped=take(slots.stopped),
        tokens=take(slots.tokens),
        logprobs=take(slots.logprobs),
        named=take(slots.named),
    )


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """[W, n, …] at [W, m], of each device its own; past the end, the last."""
    return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="clip"))(x, index)


def _admit(slots: Slots[Cache], admission: Admission, group: int) -> tuple[Slots[Cache], RowSampling]:
    """Forgets what the rows that begin wrote before, and gives them the first token of their seat.

    Also how each row is drawn: like its prompt.
    """
    begins = admission.begins
    seat, ids = (jnp.where(begins, new, old) for new, old in ((admission.seat, slots.seat), (admission.ids, slots.ids)))
    drawn = (_taken(x, seat) for x in (slots.first_token, slots.first_logprob, slots.first_named))
    sampling = jax.tree.map(lambda x: _taken(x, seat // group), slots.sampling)
    fresh = replace(
        slots,
        seat=seat,
        ids=ids,
        drawn=jnp.where(begins, 0, slots.drawn),
        done=slots.done & ~begins,
        stopped=slots.stopped & ~begins,
        tokens=jnp.where(begins[..., None], 0, slots.tokens),
        logprobs=jnp.where(begins[..., None], 0.0, slots.logprobs),
        named=jnp.where(begins[..., None, None], 0.0, slots.named),
    )
    return _record(fresh, begins, sampling, *drawn), sampling


def _record(
    slots: Slots[Cache], who: jax.Array, sampling: RowSampling, token: jax.Array, logprob: jax.Array, named: jax.Array
) -> Slots[Cache]:
    """Writes down what was drawn for some rows [W, b]."""
    at = jnp.where(who, slots.drawn, slots.tokens.shape[-1])

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        """[W, b, Tc, …] with a value of every row at the token that it has drawn; written in place, whatever Tc is."""
        row = jnp.arange(into.shape[1])
        return jax.vmap(lambda into, at, new: into.at[row, at].set(new, mode="drop"))(into, at, new)

    stopped = who & (token[..., None] == sampling.stop_ids).any(axis=-1)
    drawn = slots.drawn + who
    return replace(
        slots,
        token=jnp.where(who, token, slots.token),
        drawn=drawn,
        done=slots.done | stopped | (who & (drawn >= sampling.limit)),
        stopped=slots.stopped | stopped,
        tokens=put(slots.tokens, token),
        logprobs=put(slots.logprobs, logprob),
        named=put(slots.named, named),
    )


def _keys(key: jax.Array, ids: jax.Array, position: jax.Array) -> jax.Array:
    """fold_in(fold_in(key, id), position) for every row."""
    rows = jax.vmap(lambda id, position: jax.random.fold_in(jax.random.fold_in(key, id), position))
    return rows(ids.reshape(-1), position.reshape(-1)).reshape(ids.shape)
