"""A step of reinforcement learning, whatever is sampled and whatever earns it its reward."""

from dataclasses import replace
from typing import Protocol, TypeVar

import jax
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.training import ReinforcedConfig
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.evaluate.rollouts import advantages_by_rollout
from patarm_jax.model.sharding import TRAIN_RULES, batch_sharding, fetch
from patarm_jax.padding import bucket
from patarm_jax.recipes.programs import RolloutPrograms
from patarm_jax.recipes.ready import Ready
from patarm_jax.rollout.batches import completion_width, rollouts_of
from patarm_jax.rollout.rounds import Phase, Reinforced, Round, chosen_of, key_of, tokens_of, wants_another
from patarm_jax.run.folder import Step
from patarm_jax.run.open_model import Model, load_params, open_model, weights_digest
from patarm_jax.types import UserError

Config = TypeVar("Config", bound=ReinforcedConfig)


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
    config: ReinforcedConfig,
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


def open_reference(config: ReinforcedConfig, model: Model) -> Model:
    """The model that the KL is measured from: the one training starts from, unless another is named."""
    if not config.update.reference:
        return model
    reference = open_model(config.reference_model, called="update.reference")
    if config.lora.rank and weights_digest(reference) == weights_digest(model):
        return model
    # Which token ends a turn is nothing of the network's, and an export says it where the model it began with may not.
    arch = replace(reference.arch, eos_token_id=model.arch.eos_token_id)
    if arch != model.arch or reference.tokenizer.control_tokens != model.tokenizer.control_tokens:
        raise UserError(
            f"update.reference {config.update.reference} is another network than model.path {model.folder}, or has "
            "other tokens. Give the model that training starts from, or leave update.reference empty."
        )
    return reference


def load_reference(ready: Ready[Config], frozen: Tree) -> tuple[Params, Tree] | None:
    """What the KL is measured from, as (weights, what stands beside them); None where there is no KL.

    It is loaded, never taken from the state: a resumed run would have lost it, and the update donates those buffers.
    Under adapters it is the weights that they stand beside, which are there already.
    """
    config = ready.config
    if ready.reference is None:
        return None
    if frozen is not None and ready.reference is ready.model:
        return {}, frozen
    seed, dtype = config.run.seed, config.model.dtype
    return load_params(config.reference_model, ready.reference, ready.mesh, seed, TRAIN_RULES, dtype), None


def loaded_once(ready: Ready[Config]) -> Ready[Config]:
    """What a run begins with; a reference that is the model itself is not named beside it."""
    if ready.reference is ready.model and ready.config.update.reference:
        unnamed = replace(ready.config.update, reference="")
        return replace(ready, config=replace(ready.config, update=unnamed))
    return ready
