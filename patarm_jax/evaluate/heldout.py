"""Held-out pairs, judged now and then by the weights that are being trained, through the road of the rollouts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.sections import DataSection, HeldoutSection
from patarm_jax.config.training import RunConfig, TrainConfig
from patarm_jax.data.pairs import shared_between
from patarm_jax.data.pipeline import EncodedPair, digest_of, encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.scores import room_for
from patarm_jax.evaluate.accuracy import Accuracy, accuracy_of_choices, gap_or_position, pairwise_accuracy
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.sharding import OnMesh, batch_shards, gather
from patarm_jax.rollout.judging import Judge, judge_all, make_judge, numbers_of, places_of, requests_of, rubrics_of
from patarm_jax.rollout.numbers import Numbers, make_numbers
from patarm_jax.run.drawing import heldout_sampling
from patarm_jax.run.learner import weight_sync
from patarm_jax.run.open_model import Model
from patarm_jax.run.peers import agree
from patarm_jax.run.process import say
from patarm_jax.types import Preference, Status, UserError


@dataclass(frozen=True)
class NowAndThen:
    """Anything that is measured on held-out pairs while a run goes on."""

    section: HeldoutSection

    def due(self, step: int, steps: int) -> bool:
        """Whether a step is followed by an evaluation; the last one always is."""
        return step % self.section.eval_every == 0 or step == steps


@dataclass(frozen=True)
class Heldout(NowAndThen):
    """What is judged, and by which programs."""

    judge: Judge
    to_rollout: Callable[[Params, Tree], Params]  # to the copy for sampling
    key: jax.Array  # the same at every step, so that a difference is the weights'
    records: Sequence[EncodedPair]
    # This process's part of them; behind the last the first ones follow again, so that devices share evenly.
    share: Sequence[EncodedPair]

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """Judges all held-out pairs; the metrics of that."""
        return heldout_metrics(*judge_heldout(self, params, frozen))


@dataclass(frozen=True)
class HeldoutRewards(NowAndThen):
    """What a reward model that writes nothing is measured on, and by what."""

    rewards: Numbers
    to_rollout: OnMesh[[Params, Tree], Params]  # to weights as that reads them
    records: Sequence[EncodedPair]

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """Gives every response of the held-out pairs its reward; the metrics of that."""
        conversations = [tokens for record in self.records for tokens in record.prompt_tokens]
        of_all, outside = np.zeros(len(conversations)), []
        for given in self.rewards(self.to_rollout(params, frozen), conversations):
            of_all[given.index] = given.value
            outside += [] if given.outside is None else [given.outside]
        rewards = of_all.reshape(-1, 2, 1)
        found = pairwise_accuracy(rewards, np.isfinite(rewards))
        chosen, rejected = rewards.mean(axis=(0, 2))
        means = {"eval/rewards/chosen/mean": float(chosen), "eval/rewards/rejected/mean": float(rejected)}
        return accuracy_metrics(found) | means | ({"eval/outside": float(np.mean(outside))} if outside else {})


def open_heldout(
    config: TrainConfig, model: Model, mesh: Mesh, training: Sequence[Preference]
) -> Heldout | HeldoutRewards | None:
    """Reads the held-out pairs; None when there are none. Those that are trained on are refused."""
    section = config.heldout
    if not section.path:
        return None
    preferences, read = read_heldout(config, training)
    form, to_rollout = FORMS[config.judge], weight_sync(config, model.arch, mesh)
    sampling = heldout_sampling(config, model) if form.writes else None
    new_tokens = sampling.max_new_tokens if sampling else 0
    settings = model.tokenizer, form, new_tokens, "heldout.sampling.max_new_tokens"
    room = room_for(model.arch.max_position_embeddings, *settings)
    records, encoded = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data, room, form)
    say(f"held out, {section.path}: {read}. Encoded: {encoded}.")
    asked = {"number of pairs": len(records), "pairs": digest_of(records)}
    agree("the held-out pairs they read", asked | ({"sampling": asdict(sampling)} if sampling else {}))
    if sampling is None:
        invariant = section.sampling.batch_invariant
        rewards = make_numbers(model.arch, model.tokenizer, mesh, config.model, form, invariant)
        return HeldoutRewards(section, rewards, to_rollout, records)
    return Heldout(
        section=section,
        judge=make_judge(model.arch, model.tokenizer, mesh, config.model, sampling, section.votes, form),
        to_rollout=to_rollout,
        key=jax.random.fold_in(jax.random.key(config.run.seed), 0),  # training's begin at step 1
        records=records,
        share=share_of(mesh, records),
    )


def read_heldout(
    config: RunConfig, training: Sequence[Preference], data: DataSection | None = None
) -> tuple[list[Preference], str]:
    """The held-out pairs, none of which is trained on, and a clause on what became of the rows.

    Args:
        config: of the run.
        training: what is trained on.
        data: how the rows are read; None: as those that are trained on.
    """
    section, data = config.heldout, data or config.data
    preferences, read = read_preferences(replace(data, path=section.path, split=section.split), "heldout")
    said = _refuse_shared_pairs(config, training, preferences)
    return preferences[: section.limit or None], f"{read}{said}"


def _refuse_shared_pairs(config: RunConfig, training: Sequence[Preference], heldout: Sequence[Preference]) -> str:
    """Refuses pairs that are trained on; a clause on prompts that are, with other responses."""
    shared = shared_between(training, heldout)
    if shared.example is not None:
        there, here = shared.example
        where, stand = config.data.path, "stands" if shared.pairs == 1 else "stand"
        raise UserError(
            f"{shared.pairs:,} of the {len(heldout):,} held-out pairs of {config.heldout.path} {stand} in the training "
            f"data too ({where}), with their responses in this order or the other: {here}, for one, which is {there} "
            "there. A model that learnt them is measured too high. Remove them from one of the two, or name other "
            "pairs with heldout.path and heldout.split."
        )
    if not shared.prompts:
        return ""
    return f"; {shared.prompts:,} of these pairs have a prompt that training has with other responses"


def share_of(mesh: Mesh, records: Sequence[EncodedPair]) -> list[EncodedPair]:
    """This process's part of some records; behind the last the first ones follow again, so that devices share evenly.

    `gather` puts the parts together again: what is known of the records themselves comes first.
    """
    shards, processes = batch_shards(mesh), jax.process_count()
    padded = list(itertools.islice(itertools.cycle(records), -(-len(records) // shards) * shards))
    each = len(padded) // processes
    return padded[jax.process_index() * each :][:each]


def judge_heldout(heldout: Heldout, params: Params, frozen: Tree) -> tuple[Accuracy, float]:
    """What the judge is worth on all held-out pairs, and the share of judgements that were cut off."""
    weights = heldout.to_rollout(params, frozen)
    return judge_pairs(heldout.judge, weights, heldout.share, len(heldout.records), heldout.key)


def judge_pairs(
    judge: Judge, weights: Params, share: Sequence[EncodedPair], number: int, key: jax.Array
) -> tuple[Accuracy, float]:
    """What a judge is worth on some pairs, and the share of judgements that were cut off.

    Args:
        judge: from `make_judge`.
        weights: of it.
        share: this process's part of the pairs, from `share_of`.
        number: of all pairs.
        key: that judgements draw from.
    """
    finished, judgements = judge_all(judge, weights, requests_of(share), key, rubrics_of(share))
    form = judge.form
    mine = (*numbers_of(judgements, places_of(share), form), finished.truncated)
    numbers, status, truncated = (x[: 2 * number] for x in gather(judge.engine.mesh, mine))
    pairs = (x.reshape(number, 2, -1) for x in (np.nan_to_num(numbers), status == Status.OK))
    accuracy = accuracy_of_choices if form.responses == 2 else pairwise_accuracy
    return accuracy(*pairs), float(truncated.mean())


def heldout_metrics(found: Accuracy, cut_off: float) -> dict[str, float]:
    """The same as metrics `eval/…`."""
    return accuracy_metrics(found) | {"eval/valid": found.valid, "eval/clipped_ratio": cut_off}


def accuracy_metrics(found: Accuracy) -> dict[str, float]:
    """What a model is worth on pairs, as metrics `eval/…`."""
    return {
        "eval/accuracy_strict": found.accuracy_strict,
        "eval/accuracy_half": found.accuracy_half,
        "eval/accuracy_low": found.interval[0],
        "eval/accuracy_high": found.interval[1],
        **{f"eval/{name}": value for name, value in gap_or_position(found).items()},
        "eval/ties": found.ties,
    }
