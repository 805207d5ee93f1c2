"""Benchmarks of attention alone: of a layer over whole rows, and of a new token of every row."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Seats
from patarm_jax.bench.case import Bench, Result
from patarm_jax.bench.measure import time_calls
from patarm_jax.bench.shapes import cache_bytes
from patarm_jax.model import kernels
from patarm_jax.model.attention import Streams
from patarm_jax.model.kernels import kernel_for
from patarm_jax.model.pages import Held, most_pages, page_size
from patarm_jax.model.seated import seated_attention


def causal_attention(bench: Bench) -> tuple[tuple[jax.Array, ...], Callable[..., jax.Array], str]:
    """Queries, keys and values of one layer, the attention that a run would use on them, and its name."""
    c, n = bench.config, bench.arch
    heads = n.num_attention_heads, n.num_key_value_heads, n.num_key_value_heads
    shapes = [(c.rows, c.length, number, n.head_dim) for number in heads]
    arrays = tuple(jax.random.normal(jax.random.key(i), shape, c.dtype) for i, shape in enumerate(shapes))
    kernel = kernel_for(bench.section, n, bench.mesh, "causal")
    streams = Streams(lengths=jnp.full(c.rows, c.length), starts=None, width=c.length, group=0)
    return arrays, lambda q, k, v: kernels.attend(q, k, v, streams, kernel), kernel.name


def attend(bench: Bench) -> Result:
    """Causal attention of one layer, forward and backward, on `rows` sequences of `length` tokens."""
    c, n = bench.config, bench.arch
    arrays, attention, name = causal_attention(bench)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    timing = time_calls(lambda: gradient(*arrays), c.repeats)
    reads = c.rows * c.length * (c.length + 1) // 2
    flops = 3 * 4 * n.num_attention_heads * n.head_dim * reads
    return Result(
        task="attention", shape=f"{c.rows} × {c.length}, {name}", timing=timing, tokens=c.rows * c.length, flops=flops
    )


def decode(bench: Bench) -> Result:
    """A layer's attention of a token of every row, a hundred in turn, for rows that have written a quarter of `new`.

    Beside it, for rows that have written a twentieth, and all.
    """
    c, arch, times = bench.config, bench.arch, 100
    step, rows = decode_step(bench, times), c.responses * c.group
    timings = {percent: time_calls(partial(step, percent * c.new // 100), c.repeats) for percent in (25, 5, 100)}
    keys = c.responses * c.prompt + rows * c.new // 4
    read = times * keys * cache_bytes(arch, jnp.dtype(c.dtype).itemsize) / arch.num_hidden_layers
    kernel = kernel_for(bench.section, arch, bench.mesh, "written")
    shape = f"{times} times {c.responses} × {c.prompt}, G {c.group}, a quarter of {c.new}, {kernel.name}"
    phases = {f"{percent} % written": timings[percent].median for percent in (5, 100)}
    return Result("decode", shape, timings[25], tokens=times * rows, read=read, phases=phases)


def decode_step(bench: Bench, times: int) -> Callable[[int], jax.Array]:
    """A function of how many tokens every row has written, which runs a layer's attention so many times in a row."""
    c, n = bench.config, bench.arch
    kernel = kernel_for(bench.section, n, bench.mesh, "written")
    rows, kv_heads, width = c.responses * c.group, n.num_key_value_heads, n.head_dim
    shapes: list[tuple[int, ...]] = [(rows, n.num_attention_heads, width)]
    each, block = most_pages(c.new), kernels.key_block(kernel)
    pages = jnp.arange(rows * each, dtype=jnp.int32)
    for count, size in ((c.responses, c.prompt + -c.prompt % block), (len(pages), page_size(c.new, block))):
        shapes += [(count, kv_heads, width, size), (count, kv_heads, size, width)]
    arrays = tuple(jax.random.normal(jax.random.key(i), shape, c.dtype) for i, shape in enumerate(shapes))

    @jax.jit
    def steps(arrays: tuple[jax.Array, ...], age: jax.Array) -> jax.Array:
        q, prompt, own = arrays[0], (arrays[1], arrays[2]), ((arrays[3],), (arrays[4],))
        lengths, seat = jnp.full(c.responses, c.prompt), jnp.arange(rows, dtype=jnp.int32)[None]
        seats = Seats(seat, seat, jnp.broadcast_to(age, (1, rows)))
        # As rows take them that are equally long: the first page of every row, then the second of every row.
        own_pages = Held(jnp.full(rows, age + 1), pages.reshape(each, rows).T, pages % rows, pages // rows)

        def step(_: jax.Array, q: jax.Array) -> jax.Array:
            return seated_attention(q, prompt, lengths, own, own_pages, seats, kernel).astype(q.dtype)

        return jax.lax.fori_loop(0, times, step, q)

    return lambda written: steps(arrays, jnp.int32(max(written, 1) - 1))
