"""The one road from (prompt, response) to a Judgement. Training, scoring and every benchmark take it.

Text goes in through the tokenizer, comes out through the parser, and in between is arrays. Nothing here updates a
weight or writes a file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Completions, Prompts, Seats
from patarm_jax.config import ModelSection, SamplingSection
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.data.tokenizer import Tokenizer, written
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.model import transformer
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.cache import KVCache, PromptCache, init_cache, place_prompts, resize_cache
from patarm_jax.model.kernels import PORTABLE, Kernel, kernel_for
from patarm_jax.model.sharding import fetch, place_batch
from patarm_jax.model.transformer import Params
from patarm_jax.rollout.engine import Arrays, Engine, make_engine
from patarm_jax.rollout.sampler import Network, Settings
from patarm_jax.rollout.schedule import Request, complete, completed_groups
from patarm_jax.types import Judgement

Parse = Callable[[str], Judgement]


@dataclass(frozen=True)
class Judge:
    """A judge without its weights, which change at every step of reinforcement learning."""

    tokenizer: Tokenizer
    mesh: Mesh
    engine: Engine


def requests_of(records: Sequence[EncodedPair]) -> list[Request]:
    """Chosen 0, rejected 0, chosen 1, …; a sample id names a response of the data set, whatever batch it is in."""
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
    arch: Architecture,
    tokenizer: Tokenizer,
    mesh: Mesh,
    section: ModelSection,
    sampling: SamplingSection,
    group: int,
    vote_stride: int = 0,
) -> Judge:
    """A judge for a network of this shape that gives G = `group` judgements; see `Settings` for vote_stride."""
    settings = Settings(
        tokenizer.stop_ids, sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, vote_stride
    )
    network = network_of(arch, section.dtype, kernel_for(section, arch, mesh, "causal"))
    return Judge(tokenizer, mesh, make_engine(network, mesh, group, settings, sampling.rows))


def network_of(arch: Architecture, dtype: str, kernel: Kernel = PORTABLE) -> Network[KVCache]:
    """Qwen3 as the sampler sees it: tokens to logits. The kernel is that of prompts."""

    def read(params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, PromptCache]:
        hidden, kept = transformer.prefill(params, arch, tokens, lengths, dtype=dtype, kernel=kernel)
        return transformer.logits(params, arch, hidden, dtype), kept

    def place(cache: KVCache, prompts: PromptCache, where: jax.Array) -> KVCache:
        return replace(cache, prompt=place_prompts(cache.prompt, prompts, where))

    def decode_step(params: Params, tokens: jax.Array, cache: KVCache, seats: Seats) -> tuple[jax.Array, KVCache]:
        hidden, cache = transformer.decode(params, arch, tokens, cache, seats, dtype=dtype)
        return transformer.logits(params, arch, hidden, dtype), cache

    return Network(
        init=lambda prompts, width, rows, most: init_cache(arch, prompts, width, rows, most, dtype),
        prefill=read,
        place=place,
        decode=decode_step,
        resize=resize_cache,
    )


@dataclass(frozen=True)
class Written:
    """A judgement, and how much was written for it."""

    judgement: Judgement
    tokens: int  # the end token included
    truncated: bool  # whether it was cut off at the limit


def judge(
    judging: Judge, params: Params, requests: Sequence[Request], key: jax.Array, parse: Parse = parse_pointwise
) -> Iterator[tuple[int, list[Written]]]:
    """(index of the request, its G judgements), each as soon as they are written, the longest prompts first.

    Args:
        judging: from `make_judge`.
        params: its weights.
        requests: what is asked.
        key: the same key, row and weights give the same judgements, in whatever company.
        parse: how an answer is read; the prompt says which form it is to have.
    """
    for group in completed_groups(judging.engine, params, requests, key):
        yield (
            group.index,
            [
                Written(parse(_text(judging.tokenizer, tokens, length, truncated)), int(length), bool(truncated))
                for tokens, length, truncated in zip(group.tokens, group.lengths, group.truncated, strict=True)
            ],
        )


def sample_judgements(judge: Judge, params: Params, requests: Sequence[Request], key: jax.Array, width: int) -> Sampled:
    """G completions of each response, on the devices beside their prompts, in the order of the processes.

    Args:
        judge: from `make_judge`.
        params: its weights.
        requests: this process's responses, as many as every other's; the mesh must be able to share them.
        key: of this step; the same key, row and weights give the same judgements, in whatever batch.
        width: tokens the prompts are padded to; processes must agree.
    """
    finished = complete(judge.engine, params, requests, key)
    tokens = np.full((len(requests), width), judge.tokenizer.pad_id, np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    lengths = np.array([len(request.tokens) for request in requests], np.int32)
    prompts = tokens, lengths, np.array([request.sample_id for request in requests], np.int32)
    completions = finished.tokens, finished.lengths, finished.logprobs, finished.truncated
    return place_batch(judge.mesh, Sampled(Prompts(*cast(Arrays, prompts)), Completions(*cast(Arrays, completions))))


def read_judgements(judge: Judge, sampled: Sampled) -> list[list[Judgement]]:
    """What the completions say, [R][G], on every process."""
    completions = sampled.completions
    return _read(judge.tokenizer, *fetch((completions.tokens, completions.lengths, completions.truncated)))


def _read(
    tokenizer: Tokenizer, tokens: np.ndarray, lengths: np.ndarray, truncated: np.ndarray
) -> list[list[Judgement]]:
    return [
        [parse_pointwise(_text(tokenizer, *one)) for one in zip(*group, strict=True)]
        for group in zip(tokens, lengths, truncated, strict=True)
    ]


def score_arrays(judgements: Sequence[Sequence[Judgement]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 (NaN where not valid) and statuses int32, both [R, G]: where text becomes numbers again."""
    scores = [[math.nan if one.score is None else one.score for one in group] for group in judgements]
    statuses = [[int(one.status) for one in group] for group in judgements]
    return np.asarray(scores, np.float32), np.asarray(statuses, np.int32)


def _text(tokenizer: Tokenizer, tokens: np.ndarray, length: int, truncated: bool) -> str:
    """The judge's turn, without the end token of a judgement that has one."""
    return written(tokenizer, tokens[: length if truncated else max(length - 1, 0)].tolist())
