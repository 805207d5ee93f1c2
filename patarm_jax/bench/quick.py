"""Ratios of what we do to the plain way of doing it, so that a regression shows without anyone else's program."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patarm_jax.bench.attention import causal_attention, decode_step
from patarm_jax.bench.case import Bench, open_bench
from patarm_jax.bench.measure import interleaved
from patarm_jax.bench.tasks import policy_update, sampled_weights, sampling, sft_update
from patarm_jax.config.recipes import BenchConfig
from patarm_jax.model.sharding import batch_shards
from patarm_jax.padding import pack
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import make_engine, network_for
from patarm_jax.rollout.schedule import Request, complete
from patarm_jax.train.losses import sum_over_tokens


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than the plain way."""

    name: str
    plain: float  # median seconds
    ours: float
    floor: float  # below this something has become slower; set with room from a run on two CPU cores

    @property
    def value(self) -> float:
        """Plain over ours."""
        return self.plain / self.ours


# What `patarm bench --quick` starts from.
QUICK = BenchConfig(responses=2, prompt=512, new=64, repeats=3)


def ratios(config: BenchConfig) -> list[Ratio]:
    """Every comparison, each in turns with its plain counterpart."""
    bench = open_bench(config)
    return [
        _ratio(name, floor, case(bench), config.repeats)
        for name, floor, case in (
            ("a group's prompt once, in sampling", 2.5, _shared_sampling),
            ("a group's prompt once, in the update", 3.0, _shared_update),
            ("what prompts begin with once, in judging", 1.8, _beginnings),
            ("rows that are refilled", 1.6, _refill),
            ("no more keys than are written", 2.0, _written),
            ("short sequences share a row", 2.5, _packing),
            ("attention in blocks", 1.3, attention_case),
            ("the head in chunks", 1.5, head_case),
        )
    ]


def _ratio(name: str, floor: float, calls: tuple[Callable[[], object], Callable[[], object]], repeats: int) -> Ratio:
    timed = interleaved({"plain": calls[0], "ours": calls[1]}, repeats)
    return Ratio(name=name, plain=timed["plain"].median, ours=timed["ours"].median, floor=floor)


def _with(bench: Bench, **changes: Any) -> Bench:
    return replace(bench, config=replace(bench.config, **changes))


def _shared_sampling(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """G completions of each prompt, against G times the prompts with one each."""
    c = bench.config
    return sampling(_with(bench, responses=c.responses * c.group, group=1)), sampling(bench)


def _shared_update(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    c = bench.config
    return policy_update(_with(bench, responses=c.responses * c.group, group=1)), policy_update(bench)


def _beginnings(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """A judgement's first token of each response: a group's questions begin with the same prompt."""
    c = bench.config
    beginnings, ends = bench.tokens(c.responses, 2 * c.prompt), bench.tokens(c.group, c.prompt // 2)
    each = [np.concatenate([beginning, end]) for beginning in beginnings for end in ends]
    requests = [Request(tokens, row) for row, tokens in enumerate(each)]
    weights, network = sampled_weights(bench, c.seed), network_for(bench.section, bench.arch, bench.mesh)

    def judging(shares: bool) -> Callable[[], object]:
        engine = make_engine(network, bench.mesh, 1, SamplingParams((-1,), 1), shares=shares)
        return lambda: complete(engine, weights, requests, jax.random.key(0))

    return judging(shares=False), judging(shares=True)


def _written(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """A layer's attention to rows that have written all that they may, and to rows that have written a quarter."""
    new = 128 * bench.config.new  # a pool that is too large to be read at once
    step = decode_step(_with(bench, new=new), times=20)
    return lambda: step(new), lambda: step(new // 4)


def _refill(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """Batches of 16 that wait for their longest, against 16 rows that are refilled."""
    new = 2 * bench.config.new
    uneven = _with(bench, responses=64, prompt=bench.config.prompt // 8, group=1, new=new, mean_new=new / 4)
    batch = _with(uneven, responses=16, halvings=0)
    waits = [sampling(_with(batch, seed=seed)) for seed in range(4)]
    return lambda: [wait() for wait in waits], sampling(_with(uneven, decode_rows=16))


def _packing(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """Four sequences a row, of log-normal lengths about a quarter of one, against as few rows as hold them."""
    rows, width = 4 * bench.config.rows, bench.config.length
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(width / 4), 0.6, rows), 1, width).astype(int)
    shards = batch_shards(bench.mesh)
    packed = -(-len(pack(list(lengths), width)) // shards) * shards
    return sft_update(_with(bench, rows=rows)), sft_update(_with(bench, rows=packed, packing=True))


def attention_case(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """The gradient of attention by JAX's own function, and by ours."""
    arrays, ours, _ = causal_attention(bench)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    def gradient(function: Any) -> Callable[[], object]:
        compiled = jax.jit(jax.grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2)))
        return lambda: compiled(*arrays)

    return gradient(plain), gradient(ours)


def head_case(bench: Bench) -> tuple[Callable[[], object], Callable[[], object]]:
    """The gradient of log-probs and entropies over all logits at once, and in chunks."""
    c, n = bench.config, bench.arch
    hidden = jax.random.normal(jax.random.key(0), (c.rows, c.length, n.hidden_size))
    head = 0.05 * jax.random.normal(jax.random.key(1), (n.vocab_size, n.hidden_size))
    targets = jnp.asarray(bench.tokens(c.rows, c.length))

    def negative(
        logprobs: jax.Array, entropy: jax.Array, _hit: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return -(logprobs * mask).sum(), (entropy * mask).sum()

    def ours(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sum_over_tokens(negative, 1.0, 1, hidden, head, targets, jnp.ones(targets.shape))

    def plain(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_softmax = jax.nn.log_softmax(hidden @ head.T)
        taken = jnp.take_along_axis(log_softmax, targets[..., None], axis=-1)
        return -taken.sum(), jax.lax.stop_gradient(-(jnp.exp(log_softmax) * log_softmax).sum())

    def gradient(function: Any) -> Callable[[], object]:
        compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
        return lambda: compiled(hidden, head)

    return gradient(plain), gradient(ours)
