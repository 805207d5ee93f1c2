"""The compiled programs of a sampler on a mesh, and the sizes of the places they work on."""

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from patarm_jax.arrays import Array, Beginnings, Params, Prompts, Seats, Tree, abstract
from patarm_jax.config.sections import ModelSection
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.attention import KEY_BLOCK, Pool
from patarm_jax.model.cache import (
    CacheSizes,
    KVCache,
    PromptCache,
    another_part,
    init_cache,
    place_prompts,
    prompts_at,
    resize_cache,
    widen,
)
from patarm_jax.model.kernels import PORTABLE, Kernel, kernel_for, key_block, takes_parts
from patarm_jax.model.pages import Pages, first_pages, has_room, more, most_pages
from patarm_jax.model.sharding import BATCH_AXES, OnMesh, Program, batch_sharding, batch_shards, constrain
from patarm_jax.model.transformer import decode, logits, prefill, prefill_behind
from patarm_jax.padding import bucket
from patarm_jax.rollout import sampler
from patarm_jax.rollout.draw import RowSampling, SamplingParams, row_sampling
from patarm_jax.rollout.sampler import Admission, Network, Sizes, Slots

# Tokens of prompts that a device reads at a time: enough to be bound by arithmetic, and few enough that filling them up
# is no loss. So all that a run begins with is read by one program for each width.
PREFILL_TOKENS = 2048
# As many, one in so many, are read where completions are being written, whose places come free a few at a time; where
# only what stands behind others is read, which is short; and where what is read together must not depend on how much
# there is.
FEW = 4
# Tokens of the places that prompts which begin like others are put together in at a time, which bounds their memory.
PLACED_TOKENS = 16384
# Into how many parts a pool is cut at first; what is added later into two. A part that holds nothing is not read.
FIRST_PARTS = 4
# How often rows are halved when nothing waits any more, unless told otherwise.
HALVINGS = 3

AnySlots: TypeAlias = Slots[Tree]  # with whatever cache the network has


@dataclass(frozen=True)
class Engine:
    """The compiled programs of a sampler on a mesh."""

    mesh: Mesh
    group: int  # G
    sampling: SamplingParams  # how requests are drawn that do not say it; the limit is also the largest of all
    vote_stride: int  # see `sampler.completion_id`
    rows: int  # completions that are written at a time, over all devices; 0: all of them
    halvings: int  # how often rows may be halved when nothing waits any more; each time is another compiled program
    longest: int  # tokens of the longest prompt that there will be, so that places are never far narrower; 0: not known
    # Whether each completion is computed in the same shapes, whatever else there is to complete: rows never get fewer,
    # each prompt is read in the bucket of its own length, and whole. Its numbers are then the same to the bit.
    batch_invariant: bool
    # As in `sampler`: slots that are given to a program are donated, and sizes and widths are static.
    start: OnMesh[[Sizes], AnySlots]
    bring_in: OnMesh[[Params, AnySlots, Prompts, RowSampling, jax.Array, jax.Array, Beginnings | None], AnySlots]
    advance: OnMesh[[Params, AnySlots, Admission, jax.Array, Array], AnySlots]
    resize: OnMesh[[AnySlots, jax.Array, jax.Array, jax.Array, int], AnySlots]
    # Of a network whose pools have parts, another one of so many pages; of others, the whole with so many.
    pools_in_parts: bool
    shares: bool  # whether prompts that begin alike are read once as far as they do
    another_part: OnMesh[[jax.Array, int], jax.Array]
    widen: OnMesh[[jax.Array, int], jax.Array]
    more: OnMesh[[Pages, int], Pages]


def make_engine(
    network: Network[Tree],
    mesh: Mesh,
    group: int,
    sampling: SamplingParams,
    rows: int = 0,
    halvings: int = HALVINGS,
    vote_stride: int = 0,
    longest: int = 0,
    shares: bool = True,
) -> Engine:
    """Jits the sampler for a network; programs are compiled once per size of places. Arguments as of `Engine`."""
    shards = batch_shards(mesh)

    def start(sizes: Sizes) -> AnySlots:
        return _pinned(sampler.empty_slots(network, shards, group, sizes))

    def bring_in(
        weights: Params,
        slots: AnySlots,
        prompts: Prompts,
        sampling: RowSampling,
        place: jax.Array,
        key: jax.Array,
        beginnings: Beginnings | None,
    ) -> AnySlots:
        given = prompts, sampling, place, key, beginnings
        return _pinned(sampler.bring_in(network, weights, slots, *given, group, vote_stride))

    def advance(weights: Params, slots: AnySlots, begins: Admission, key: jax.Array, enough: Array) -> AnySlots:
        return _pinned(sampler.advance(network, weights, slots, begins, key, enough, group))

    def resize(slots: AnySlots, rows: jax.Array, prompts: jax.Array, seat: jax.Array, width: int) -> AnySlots:
        return _pinned(sampler.resize(network, slots, rows, prompts, seat, width, group))

    def wider(pages: jax.Array, count: int) -> jax.Array:
        return widen(pages, shards, count)

    def another(like: jax.Array, count: int) -> jax.Array:
        return another_part(like, shards, count)

    return Engine(
        mesh=mesh,
        group=group,
        sampling=sampling,
        vote_stride=vote_stride,
        rows=rows,
        halvings=0 if network.batch_invariant else halvings,
        longest=longest,
        batch_invariant=network.batch_invariant,
        start=OnMesh(mesh, start, static_argnums=0),
        bring_in=OnMesh(mesh, bring_in, donate_argnums=1),
        advance=OnMesh(mesh, advance, donate_argnums=1),
        resize=OnMesh(mesh, resize, static_argnums=4),
        pools_in_parts=network.pools_in_parts,
        shares=shares and not network.batch_invariant and network.prefill_behind is not None,
        another_part=OnMesh(mesh, another, static_argnums=1),
        widen=OnMesh(mesh, wider, static_argnums=1),
        more=OnMesh(mesh, more, static_argnums=1),
    )


def with_more_pages(engine: Engine, slots: Slots[KVCache]) -> Slots[KVCache]:
    """The slots with twice the pages, but no more than their rows can take; those that are given are gone."""
    cache, taken = slots.cache, slots.cache.pages
    assert taken is not None, "a cache whose rows have a page each is never full"
    have, rows_could_take = taken.owner.shape[1], taken.table.shape[1] * taken.table.shape[2]
    count = min(2 * have, rows_could_take)

    def with_more(pool: Pool) -> Pool:
        if engine.pools_in_parts:
            return *pool, *(engine.another_part(pool[0], part) for part in parts_of(count - have, 2))
        (whole,) = pool
        wide = engine.widen(whole, count)
        whole.delete()  # now, so that no more than one array is there twice
        return (wide,)

    keys, values = (tuple(map(with_more, pools)) for pools in (cache.keys, cache.values))
    return replace(slots, cache=replace(cache, keys=keys, values=values, pages=engine.more(taken, count)))


def network_for(
    section: ModelSection, arch: Architecture, mesh: Mesh, batch_invariant: bool = False
) -> Network[KVCache]:
    """The network of a config, with the kernels that suit its devices; for batch_invariant see `Engine`."""
    of_prompts, of_rows = (kernel_for(section, arch, mesh, form) for form in ("causal", "written"))
    return network_of(arch, section.dtype, of_prompts, of_rows, batch_invariant)


def network_of(
    arch: Architecture,
    dtype: str,
    of_prompts: Kernel = PORTABLE,
    of_rows: Kernel = PORTABLE,
    batch_invariant: bool = False,
) -> Network[KVCache]:
    """Qwen3 as the sampler sees it: tokens to logits; with a kernel for causal rows and one for written rows."""
    of_rows = replace(of_rows, blockwise=batch_invariant)

    def init(shards: int, sizes: Sizes) -> KVCache:
        # The last token drawn is never read, but one place less would not be the round number that hardware reads fast.
        of_cache = CacheSizes(shards, sizes.prompts, sizes.prompt_width, sizes.rows, sizes.width, sizes.parts)
        return init_cache(arch, of_cache, key_block(of_rows), dtype)

    def read(params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, PromptCache]:
        hidden, kept = prefill(params, arch, tokens, lengths, dtype=dtype, kernel=of_prompts)
        return logits(params, arch, hidden, dtype), kept

    def read_behind(
        params: Params, tokens: jax.Array, lengths: jax.Array, cache: KVCache, beginnings: Beginnings
    ) -> tuple[jax.Array, PromptCache]:
        before = prompts_at(cache.prompt, beginnings.place, beginnings.lengths)
        most = cache.prompt.keys[0].shape[-1]
        hidden, kept = prefill_behind(params, arch, tokens, lengths, before, most, dtype=dtype)
        return logits(params, arch, hidden, dtype), kept

    def place(cache: KVCache, prompts: PromptCache, where: jax.Array) -> KVCache:
        return replace(cache, prompt=place_prompts(cache.prompt, prompts, where))

    def decode_step(params: Params, tokens: jax.Array, cache: KVCache, seats: Seats) -> tuple[jax.Array, KVCache]:
        hidden, cache = decode(params, arch, tokens, cache, seats, dtype=dtype, kernel=of_rows)
        return logits(params, arch, hidden, dtype), cache

    return Network(
        init=init,
        prefill=read,
        prefill_behind=read_behind,
        place=place,
        decode=decode_step,
        resize=resize_cache,
        pools_in_parts=takes_parts(of_rows),
        batch_invariant=batch_invariant,
        room=lambda cache, age: has_room(cache.pages, age, cache.page_size),
    )


def abstract_programs(
    engine: Engine, params: Params, requests: int, width: int, full: bool = True
) -> dict[str, Program]:
    """The programs of a run over so many requests, with abstract arguments, for compiling ahead of time.

    Args:
        engine: from `make_engine`.
        params: abstract weights.
        requests: of all processes.
        width: of the prompts.
        full: whether rows have all the pages that they may take, or those that they begin with.
    """
    shards, new = batch_shards(engine.mesh), partial(abstract, sharding=batch_sharding(engine.mesh))
    prompts, rows = places_for(engine, -(-requests // shards))
    place = place_width(engine, width)
    sizes = sizes_for(engine, prompts, place, rows)
    if full:
        sizes = replace(sizes, parts=_parts(engine, rows, most_pages(sizes.width)))
    started = engine.start.lower(sizes)
    slots = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like),
        started.out_info,
        started.compile().output_shardings,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))

    def reading(number: int, behind: bool) -> Program:
        size = shards * number
        each, where = new((size,), jnp.int32), new((shards, number), jnp.int32)
        read = Prompts(new((size, width), jnp.int32), each, each)
        like = row_sampling([engine.sampling] * size, sizes.stops, sizes.named)
        sampling = jax.tree.map(lambda x: new(x.shape, x.dtype), like)
        begin = Beginnings(where, each) if behind else None
        return engine.bring_in, (params, slots, read, sampling, where, key, begin)

    row = new((shards, rows), jnp.int32)
    begins, enough = Admission(new((shards, rows), jnp.bool), row, row), jax.ShapeDtypeStruct((), jnp.int32)
    half_rows = max(rows // 2, 1)
    half_prompts = min(prompts, half_rows)
    kept = tuple(new((shards, size), jnp.int32) for size in (half_rows, half_prompts, half_rows))
    whole, behind = prompts_at_a_time(width, prompts), prompts_at_a_time(width, prompts, place)
    return {
        "prefill": reading(max(1, whole // FEW) if engine.batch_invariant else whole, behind=False),
        **({"prefill behind": reading(max(1, behind // FEW), behind=True)} if engine.shares else {}),
        "decode": (engine.advance, (params, slots, begins, key, enough)),
        "resize": (engine.resize, (slots, *kept, place)),
    }


def places_for(engine: Engine, requests: int) -> tuple[int, int]:
    """How many prompts and rows a device has, for so many requests."""
    wanted = -(-engine.rows // batch_shards(engine.mesh)) if engine.rows else requests * engine.group
    if engine.batch_invariant:
        requests = wanted  # as where there are more than enough
    rows = min(wanted, requests * engine.group)
    # Groups end unevenly: with twice the prompts that the rows need, no row waits for one.
    return min(requests, -(-rows // engine.group) * (1 if engine.group == 1 else 2)), rows


def sizes_for(engine: Engine, prompts: int, width: int, rows: int, stops: int = 0, named: int = 0) -> Sizes:
    """The sizes of so many places; lists of ids hold the engine's own at least, or so many."""
    own = engine.sampling
    return Sizes(
        prompts=prompts,
        prompt_width=width,
        rows=rows,
        width=own.max_new_tokens,
        parts=_parts(engine, rows, first_pages(own.max_new_tokens)),
        stops=max(stops, len(own.stop_ids)),
        named=max(named, len(own.named_ids)),
    )


def _parts(engine: Engine, rows: int, each: int) -> tuple[int, ...]:
    """The parts of a pool that has so many pages for each row."""
    return parts_of(rows * each, FIRST_PARTS if engine.pools_in_parts and each > 1 else 1)


def parts_of(pages: int, number: int) -> tuple[int, ...]:
    """So many pages in parts of alike sizes, none of them empty.

    >>> parts_of(10, 4), parts_of(2, 4)
    ((3, 3, 2, 2), (1, 1))
    """
    number = min(pages, number)
    return tuple(pages // number + (part < pages % number) for part in range(number))


def prompts_at_a_time(width: int, places: int, place_width: int = 0) -> int:
    """How many prompts are read together: a power of two, no more than fill all places.

    Args:
        width: what is read of each.
        places: there are so many.
        place_width: of those that are put together with what is there already, how wide their places are.
    """
    most = PREFILL_TOKENS // width
    if place_width:
        most = min(most, PLACED_TOKENS // place_width)
    return min(1 << max(most, 1).bit_length() - 1, 1 << (places - 1).bit_length())


def place_width(engine: Engine, longest: int) -> int:
    """The width of places for prompts of so many tokens.

    Of a run that samples again and again no less than half of what its longest prompt needs, so that there are two
    widths of places in all.
    """
    if engine.batch_invariant:
        return bucket(longest, KEY_BLOCK)
    if not engine.longest:
        return bucket(longest)
    widest = bucket(max(longest, engine.longest))
    half = bucket(widest // 2)
    return widest if longest > half else half


def _pinned(slots: AnySlots) -> AnySlots:
    """The arrays of rows and seats, [W, …], each part on its device; the cache's are the network's to place."""
    own = {name: value for name, value in vars(slots).items() if name not in ("cache", "steps")}
    return replace(slots, **jax.tree.map(lambda x: constrain(x, BATCH_AXES), own))
