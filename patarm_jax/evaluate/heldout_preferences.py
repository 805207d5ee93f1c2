"""Held-out pairs of a policy that learns from preferences: which response it has made likelier, without sampling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.policy import DPOConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import EncodedPair, digest_of, encode_pairs
from patarm_jax.data.prompts import DOMAIN, both_responses
from patarm_jax.evaluate.accuracy import pairwise_accuracy
from patarm_jax.evaluate.heldout import NowAndThen, accuracy_metrics, read_heldout
from patarm_jax.judge.forms import FORMS
from patarm_jax.run.open_model import Model
from patarm_jax.run.peers import agree
from patarm_jax.run.process import say
from patarm_jax.types import Preference

Sums: TypeAlias = Mapping[
    int, Sequence[float]
]  # by a record's index, log-probs of the chosen and the rejected response
SumsOf: TypeAlias = Callable[[Sequence[EncodedPair], Params, Tree], Sums]


@dataclass(frozen=True)
class HeldoutPreferences(NowAndThen):
    """What is compared with what the reference says of the same pairs."""

    beta: float
    records: Sequence[EncodedPair]
    sums: SumsOf
    reference: dict[int, Sequence[float]] = field(default_factory=dict)  # filled in before training begins

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """The loss of all held-out pairs without its SFT term, and which response has the higher reward."""
        found = self.sums(self.records, params, frozen)
        own, theirs = (np.array([of[record.index] for record in self.records]) for of in (found, self.reference))
        rewards = self.beta * (own - theirs)  # [N, 2]
        accuracy = pairwise_accuracy(rewards[..., None], np.isfinite(rewards[..., None]))
        chosen, rejected = rewards.mean(axis=0)
        return accuracy_metrics(accuracy) | {
            "eval/loss": float(np.logaddexp(0.0, rewards[:, 1] - rewards[:, 0]).mean()),
            "eval/rewards/chosen/mean": float(chosen),
            "eval/rewards/rejected/mean": float(rejected),
            "eval/logps/chosen": float(own[:, 0].mean()),
            "eval/logps/rejected": float(own[:, 1].mean()),
        }


def open_heldout_preferences(
    sums_of: Callable[[DPOConfig, Model, Mesh], SumsOf],
    config: DPOConfig,
    model: Model,
    mesh: Mesh,
    training: Sequence[Preference],
    data: DataSection | None = None,
) -> HeldoutPreferences | None:
    """Reads the held-out pairs, `data` as of `read_heldout`; None when there are none.

    Those that are trained on are refused.
    """
    section = config.heldout
    if not section.path:
        return None
    data = data or config.data
    preferences, read = read_heldout(config, training, replace(data, domain=data.domain or DOMAIN))
    room, form = Room(model.arch.max_position_embeddings), FORMS[config.judge]
    responses = list(map(both_responses, preferences))
    records, encoded = encode_pairs(model.tokenizer, responses, config.rubrics, config.data, room, form)
    say(f"held out, {section.path}: {read}. Encoded: {encoded}.")
    agree("the held-out pairs they read", {"number of pairs": len(records), "pairs": digest_of(records)})
    return HeldoutPreferences(section, config.beta, records, sums_of(config, model, mesh))
