"""The road of a scalar reward model from (prompt, response) to a score: one pass over both, nothing written."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.config.sections import ModelSection
from patarm_jax.model import transformer
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.kernels import kernel_for
from patarm_jax.model.sharding import OnMesh, batch_shards, fetch, place_batch, process_in
from patarm_jax.padding import bucket
from patarm_jax.rollout.engine import PREFILL_TOKENS

Scorer = Callable[[Params, jax.Array, jax.Array], jax.Array]  # (params, tokens [R, T], lengths [R]) → scores [R]


def make_scorer(arch: Architecture, mesh: Mesh, section: ModelSection) -> Scorer:
    """The jitted scorer: the head on the last token's state."""
    kernel = kernel_for(section, arch, mesh, "causal")

    def score(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden, _ = transformer.prefill(params, arch, tokens, lengths, dtype=section.dtype, kernel=kernel)
        return transformer.scalar_scores(params, hidden, section.dtype)

    return OnMesh(mesh, score)


def scores(
    scorer: Scorer, params: Params, mesh: Mesh, conversations: Sequence[np.ndarray], batch_invariant: bool = False
) -> Iterator[tuple[int, float]]:
    """(index, score) of each conversation, the longest first; short ones do not pay for long ones.

    Processes that share the mesh are given the same conversations; each computes its part, and all get every score.

    Args:
        scorer: from `make_scorer`.
        params: its weights, layers unstacked.
        mesh: where they lie.
        conversations: [T] int32 each.
        batch_invariant: whether each is read in the bucket of its own length, so that no other changes its score.
    """
    waiting = sorted(range(len(conversations)), key=lambda index: -len(conversations[index]))
    shards, (mine, processes) = batch_shards(mesh), process_in(mesh)
    while waiting:
        width = bucket(len(conversations[waiting[0]]))
        rows = shards * max(1, PREFILL_TOKENS // width)
        now = waiting[:rows]
        if batch_invariant:
            now = [index for index in now if bucket(len(conversations[index])) == width]
        waiting = waiting[len(now) :]
        tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, index in enumerate(now):
            lengths[row] = len(conversations[index])
            tokens[row, : lengths[row]] = conversations[index]
        share = slice(mine * rows // processes, (mine + 1) * rows // processes)
        found = fetch(scorer(params, *place_batch(mesh, (tokens[share], lengths[share]))))
        yield from ((index, float(found[row])) for row, index in enumerate(now))
