"""The one road from (prompt, response) to a Judgement. Training, scoring and every benchmark take it.

Text goes in through `encode_request`, comes out through the parser, and in between is arrays. Nothing here updates a
weight or writes a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patarm_jax.config import SamplingSection
from patarm_jax.data.pipeline import bucket
from patarm_jax.data.tokenizer import Tokenizer, decode
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.model.config import Qwen3Config
from patarm_jax.model.qwen3 import KVCache, Params, forward, init_cache
from patarm_jax.model.sharding import batch_ways, fetch, place_batch
from patarm_jax.rollout.sampler import Settings, sample
from patarm_jax.types import Completions, Judgement, Prompts

# Prompt widths are compiled for; they are multiples of this many tokens.
WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class Judge:
    """A judge without its weights, which change at every step of reinforcement learning."""

    tokenizer: Tokenizer
    mesh: Mesh
    group: int  # G, judgements per response
    generate: Callable[[Params, Prompts, jax.Array], Completions]  # jitted


@dataclass(frozen=True)
class Request:
    """One response to be judged."""

    tokens: Sequence[int] | np.ndarray  # the encoded prompt of the judge
    row: int  # names the response: sampling keys are folded from it, so it must not depend on the batch


@dataclass(frozen=True)
class Judged:
    """G judgements of each of R responses, as arrays and as what they say."""

    prompts: Prompts  # on the devices
    completions: Completions  # on the devices
    judgements: list[list[Judgement]]  # [R][G]; filler rows have none
    lengths: np.ndarray  # [R, G] tokens
    truncated: np.ndarray  # [R, G] bool


def make_judge(
    config: Qwen3Config, tokenizer: Tokenizer, mesh: Mesh, sampling: SamplingSection, group: int, dtype: str
) -> Judge:
    """A judge for a network of this shape; compiled once per prompt width and batch size."""
    settings = Settings(
        tokenizer.stop_ids, sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p
    )
    run = jax.jit(lambda params, prompts, key: _generate(params, prompts, key, config, group, settings, dtype))

    def generate(params: Params, prompts: Prompts, key: jax.Array) -> Completions:
        with jax.set_mesh(mesh):
            return run(params, prompts, key)

    return Judge(tokenizer, mesh, group, generate)


def _generate(
    params: Params, prompts: Prompts, key: jax.Array, config: Qwen3Config, group: int, settings: Settings, dtype: str
) -> Completions:
    rows, width = prompts.tokens.shape

    def prefill(tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        # The last token drawn is never read, hence one position less; an empty axis would not compile.
        cache = init_cache(config, rows, width, group, max(settings.max_new_tokens - 1, 1), dtype)
        out = forward(params, config, tokens, lengths, cache=cache, dtype=dtype)
        last = jnp.take_along_axis(out.prompt, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return _logits(last, out.head), out.cache

    def decode_step(tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        out = forward(params, config, completion=tokens[:, :, None], cache=cache, dtype=dtype)
        return _logits(out.completion[:, :, 0], out.head), out.cache

    return sample(prefill, decode_step, prompts, key, group, settings)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[..., D] → [..., V] float32."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def judge(
    judge: Judge, params: Params, requests: Sequence[Request], key: jax.Array, *, width: int = 0, rows: int = 0
) -> Judged:
    """Samples G judgements of each response and reads them.

    Args:
        judge: from `make_judge`.
        params: its weights.
        requests: this process's responses.
        key: of this step; the same key, row and weights give the same judgements, in whatever batch.
        width: tokens the prompts are padded to; 0: the bucket of the longest. Processes must agree.
        rows: rows this process's batch is filled up to; 0: as many as the mesh needs.

    Returns:
        Judged, of all processes' responses in the order of the processes.
    """
    longest = max(len(request.tokens) for request in requests)
    width = width or bucket(longest, WIDTH_MULTIPLE)
    share = batch_ways(judge.mesh) // jax.process_count()
    rows = rows or -(-len(requests) // share) * share
    prompts = place_batch(judge.mesh, _padded(requests, width, rows, judge.tokenizer.pad_id))
    completions = judge.generate(params, prompts, key)
    tokens, lengths, truncated = fetch((completions.tokens, completions.lengths, completions.truncated))
    judgements = [
        [parse_pointwise(_text(judge.tokenizer, *one)) for one in zip(*group, strict=True) if one[1]]
        for group in zip(tokens, lengths, truncated, strict=True)
    ]
    return Judged(prompts, completions, judgements, lengths, truncated)


def _padded(requests: Sequence[Request], width: int, rows: int, pad_id: int) -> Prompts:
    """Right-padded host arrays; filler rows have row id −1 and are never sampled."""
    tokens = np.full((rows, width), pad_id, np.int32)
    lengths, ids = np.ones(rows, np.int32), np.full(rows, -1, np.int32)
    for i, request in enumerate(requests):
        tokens[i, : len(request.tokens)] = request.tokens
        lengths[i], ids[i] = len(request.tokens), request.row
    return Prompts(tokens, lengths, ids)  # type: ignore[arg-type]  # host arrays, on their way to the devices


def _text(tokenizer: Tokenizer, tokens: np.ndarray, length: int, truncated: bool) -> str:
    """What was written, without the end token of a judgement that has one."""
    return decode(tokenizer, tokens[: length if truncated else length - 1].tolist())
