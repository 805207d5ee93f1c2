"""The one road from (prompt, response) to a Judgement. Training, scoring and every benchmark take it.

Text goes in through `encode_request`, comes out through the parser, and in between is arrays. Nothing here updates a
weight or writes a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patarm_jax.config import SamplingSection
from patarm_jax.data.pipeline import EncodedPair, bucket
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
    generate: Any  # jitted, (params, Prompts, key) → Completions


@dataclass(frozen=True)
class Request:
    """One response to be judged."""

    tokens: Sequence[int] | np.ndarray  # the encoded prompt of the judge
    row: int  # names the response: sampling keys are folded from it, so it must not depend on the batch


def requests_of(records: Sequence[EncodedPair]) -> list[Request]:
    """Rows chosen 0, rejected 0, chosen 1, …; a row id names a response of the data set, whatever batch it is in."""
    return [
        Request(tokens, 2 * record.index + side)
        for record in records
        for side, tokens in enumerate(record.prompt_tokens)
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """G completions of each of R judge prompts, on the devices."""

    prompts: Prompts
    completions: Completions


def make_judge(
    config: Qwen3Config, tokenizer: Tokenizer, mesh: Mesh, sampling: SamplingSection, group: int, dtype: str
) -> Judge:
    """A judge for a network of this shape; compiled once per prompt width and batch size."""
    settings = Settings(
        tokenizer.stop_ids, sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p
    )
    generate = jax.jit(lambda params, prompts, key: _generate(params, prompts, key, config, group, settings, dtype))
    return Judge(tokenizer, mesh, group, generate)


def _generate(
    params: Params, prompts: Prompts, key: jax.Array, config: Qwen3Config, group: int, settings: Settings, dtype: str
) -> Completions:
    rows, width = prompts.tokens.shape

    def prefill(tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        # The last token drawn is never read, hence one position less; an empty axis would not compile.
        cache = init_cache(config, rows, width, group, max(settings.max_new_tokens - 1, 1), dtype)
        out: Any = forward(params, config, tokens, lengths, cache=cache, dtype=dtype)
        last = jnp.take_along_axis(out.prompt, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return _logits(last, out.head), out.cache

    def decode_step(tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        out: Any = forward(params, config, completion=tokens[:, :, None], cache=cache, dtype=dtype)
        return _logits(out.completion[:, :, 0], out.head), out.cache

    return sample(prefill, decode_step, prompts, key, group, settings)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[..., D] → [..., V] float32."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def judge(
    judge: Judge, params: Params, requests: Sequence[Request], key: jax.Array, *, width: int = 0, rows: int = 0
) -> list[list[Judgement]]:
    """G judgements of each response, [R][G]: sampled, then read. Arguments as of `sample_judgements`."""
    sampled = sample_judgements(judge, params, requests, key, width=width, rows=rows)
    return read_judgements(judge, sampled)[: len(requests)]


def sample_judgements(
    judge: Judge, params: Params, requests: Sequence[Request], key: jax.Array, *, width: int = 0, rows: int = 0
) -> Sampled:
    """Samples G judgements of each response.

    Args:
        judge: from `make_judge`.
        params: its weights.
        requests: this process's responses.
        key: of this step; the same key, row and weights give the same judgements, in whatever batch.
        width: tokens the prompts are padded to; 0: the bucket of the longest. Processes must agree.
        rows: rows this process's batch is filled up to; 0: as many as the mesh needs.

    Returns:
        The completions of all processes' responses, in the order of the processes.
    """
    longest = max(len(request.tokens) for request in requests)
    width = width or bucket(longest, WIDTH_MULTIPLE)
    share = max(1, batch_ways(judge.mesh) // jax.process_count())
    rows = max(rows, -(-len(requests) // share) * share)
    prompts = place_batch(judge.mesh, _padded(requests, width, rows, judge.tokenizer.pad_id))
    with jax.set_mesh(judge.mesh):
        return Sampled(prompts, judge.generate(params, prompts, key))


def read_judgements(judge: Judge, sampled: Sampled) -> list[list[Judgement]]:
    """What the completions say, [R][G], on every process; a filler row says nothing, in bad form."""
    completions = sampled.completions
    tokens, lengths, truncated = fetch((completions.tokens, completions.lengths, completions.truncated))
    return [
        [parse_pointwise(_text(judge.tokenizer, *one)) for one in zip(*group, strict=True)]
        for group in zip(tokens, lengths, truncated, strict=True)
    ]


def score_arrays(judgements: Sequence[Sequence[Judgement]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 (NaN where not valid) and statuses int32, both [R, G]: where text becomes numbers again."""
    scores = [[math.nan if one.score is None else one.score for one in group] for group in judgements]
    statuses = [[int(one.status) for one in group] for group in judgements]
    return np.asarray(scores, np.float32), np.asarray(statuses, np.int32)


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
    return decode(tokenizer, tokens[: length if truncated else max(length - 1, 0)].tolist())
