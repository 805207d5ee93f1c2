"""What was sampled, as a batch to learn from."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Rollouts
from patarm_jax.model.sharding import place_batch
from patarm_jax.padding import bucket
from patarm_jax.rollout.schedule import Finished, Request


def rollouts_of(
    mesh: Mesh, requests: Sequence[Request], finished: Finished, prompt_width: int, completion_width: int
) -> Rollouts:
    """What was sampled, on the devices; its advantages are 0 until they are known.

    Args:
        mesh: whose devices share the prompts.
        requests: this process's, as many as every other's.
        finished: their completions, in the same order.
        prompt_width: tokens that prompts are padded to; all processes must agree.
        completion_width: tokens that completions are cut to; no fewer than the longest has.
    """
    tokens = np.zeros((len(requests), prompt_width), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    rollouts = Rollouts(
        prompt_tokens=tokens,
        prompt_lengths=np.array([len(request.tokens) for request in requests], np.int32),
        completion_tokens=finished.tokens[:, :, :completion_width],
        completion_lengths=finished.lengths,
        old_logprobs=finished.logprobs[:, :, :completion_width],
        ref_logprobs=None,
        advantages=np.zeros(finished.lengths.shape, np.float32),
    )
    return place_batch(mesh, rollouts)


def completion_width(longest: int, most: int) -> int:
    """Completions are cut to an eighth, a quarter, … of the limit before they are learnt from: few compiled shapes."""
    return min(bucket(max(longest, 1), -(-most // 8)), most)
