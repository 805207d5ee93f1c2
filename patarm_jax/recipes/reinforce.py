"""A step of reinforcement learning, whatever is sampled and whatever earns it its reward."""

from dataclasses import replace
from typing import Protocol

import jax
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.training import PolicyConfig
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.evaluate.rollouts import advantages_by_rollout
from patarm_jax.model.sharding import batch_sharding, fetch
from patarm_jax.padding import bucket
from patarm_jax.recipes.programs import RolloutPrograms
from patarm_jax.rollout.batches import completion_width, rollouts_of
from patarm_jax.rollout.rounds import Phase, Reinforced, Round, chosen_of, key_of, tokens_of, wants_another
from patarm_jax.run.folder import Step


class Sample(Protocol):
    """Samples a model and says what that earns."""

    def __call__(self, weights: Params, pairs: PairBatch, key: jax.Array, phase: Phase) -> Round:
        """One round of samples for a batch of pairs.

        Args:
            weights: the copy for sampling.
            pairs: this process's part of the batch.
            key: of this round.
            phase: times a part of the step by its name.
        """


def reinforce(
    config: PolicyConfig,
    mesh: Mesh,
    rollout: RolloutPrograms,
    reference: tuple[Params, Tree] | None,
    step: Step[int],
    sample: Sample,
) -> Reinforced:
    """Samples, rewards and updates once; the step gets its tokens.

    Args:
        config: of the run.
        mesh: where everything lies.
        rollout: the programs beside the update.
        reference: what the KL is measured from, as (weights, what stands beside them); None where there is no KL.
        step: of a run that trains what is sampled.
        sample: one round of it.
    """
    trained = step.run.trained
    with step.phase("sample"):
        weights = rollout.to_rollout(trained.state.params, trained.frozen)
    rounds = [sample(weights, step.pairs, key_of(config.run.seed, step.number), step.phase)]
    while wants_another(config, rounds):
        key = key_of(config.run.seed, step.number, len(rounds))
        rounds.append(sample(weights, step.draw(), key, step.phase))
    del weights  # whose memory the update needs
    with step.phase("reward"):
        chosen = chosen_of(config, mesh, rounds)
        longest = max(each.longest_prompt for each in rounds)
        widest = completion_width(int(chosen.lengths.max()), config.sampling.max_new_tokens)
        rollouts = rollouts_of(mesh, chosen.requests, chosen.finished, bucket(longest), widest)
    with step.phase("logprobs"):
        sampled = rollouts
        if reference is not None:
            rollouts = replace(rollouts, ref_logprobs=rollout.logprobs(*reference, sampled))
        if config.update.old_logprobs == "trainer":
            anew = rollout.logprobs(trained.state.params, trained.frozen, sampled)
            rollouts = replace(rollouts, old_logprobs=anew, sampler_logprobs=sampled.old_logprobs)
        rewarded, valid = jax.device_put((chosen.rewards, chosen.valid), batch_sharding(mesh))
        rollouts = replace(rollouts, advantages=rollout.advantages(rewarded, valid, rollouts))
        jax.block_until_ready(rollouts)
    step.update(rollouts, config.update.updates_per_rollout)
    step.tokens = sum(tokens_of(each) for each in rounds)
    return Reinforced(rounds, chosen, advantages_by_rollout(fetch(rollouts.advantages), chosen.lengths))
