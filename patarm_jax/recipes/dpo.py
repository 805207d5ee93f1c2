"""Direct preference optimisation: a policy learns from preference pairs, with no reward model and no sampling.

What the weights that training starts from say of all responses is computed once, before the first step, and kept in the
run folder. The prompt of a pair is computed once for both responses. The same command resumes a run that was stopped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from patarm_jax.arrays import Params, PreferredPairs, Tree
from patarm_jax.config.policy import DPOConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.data.packing import preferred_batch, preferred_shape
from patarm_jax.data.pipeline import EncodedPair, PairBatch, digest_of
from patarm_jax.data.prompts import read_preferred_responses
from patarm_jax.evaluate.heldout import share_of
from patarm_jax.evaluate.heldout_preferences import HeldoutPreferences, Sums, SumsOf, open_heldout_preferences
from patarm_jax.files import read_json_object, whole_file, writing
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import TRAIN_RULES, fetch, place_batch
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.recipes.on_policy import (
    Making,
    begin,
    describe_making,
    finish,
    is_over,
    is_trained,
    make_pairs,
    open_making,
)
from patarm_jax.recipes.programs import dpo_learner, dpo_programs, make_response_logprobs
from patarm_jax.recipes.ready import Ready, describe_update, make_ready, take_updates
from patarm_jax.run.card import ModelCardFacts, card_of
from patarm_jax.run.claim import claimed
from patarm_jax.run.folder import Run, open_run
from patarm_jax.run.open_model import Model, load_params, weights_digest
from patarm_jax.run.peers import arrive, start_processes, told, wait_to_see
from patarm_jax.run.process import TO_RESUME, say
from patarm_jax.run.progress import Shown, percent
from patarm_jax.run.stopping import stop_after_steps
from patarm_jax.types import Preference

# Files of a run with what the reference says of all responses, those that are learnt from and those held out.
REFERENCE, REFERENCE_HELDOUT = "reference.json", "reference_heldout.json"


def main(config: DPOConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        if config.on_policy.sources:
            return _train_in_rounds(open_making(config, _open_heldout))
        return _train(_ready(config))


def _ready(config: DPOConfig, heldout: DataSection | None = None) -> Ready[DPOConfig]:
    """What a run begins with; `heldout` says how the held-out pairs are read where it is not as the others."""
    return make_ready(config, read_preferred_responses, open_evaluation=partial(_open_heldout, data=heldout))


def _open_heldout(
    config: DPOConfig, model: Model, mesh: Mesh, training: Sequence[Preference], data: DataSection | None = None
) -> HeldoutPreferences | None:
    return open_heldout_preferences(sums_of, config, model, mesh, training, data)


def _train_in_rounds(making: Making) -> bool:
    """Makes pairs of the policy's own responses and learns from them, again and again."""
    begin(making)
    if is_over(making):
        return True
    rounds = making.config.on_policy.rounds
    with stop_after_steps() as stop_asked:
        for number in range(1, rounds + 1):
            if is_trained(making, number):
                continue
            if not make_pairs(making, number):
                return False
            say(f"round {number} of {rounds}: learning from {making.pairs_of(number)}")
            ready = _ready(making.config_of(number), making.config.data)
            # A round begins with all that the one before has learnt, and not with what bfloat16 leaves of it.
            dtype = making.config.model.dtype if number == rounds else "float32"
            if not _train(ready, partial(making.told_by, number), dtype):
                return False
            wait_to_see(making.export_of(number) / "config.json", "run.folder")
            if stop_asked() and number < rounds:
                say(f"stopped after round {number} of {rounds}; run the command again to resume")
                return False
    finish(making)
    return True


def _train(
    ready: Ready[DPOConfig], told_by: Callable[[ModelCardFacts], ModelCardFacts] = lambda card: card, dtype: str = ""
) -> bool:
    """Trains on pairs that are there; the card is as `told_by` has it, the weights in `dtype`, else the model's."""
    config, mesh, model, records, length = ready.config, ready.mesh, ready.model, ready.records, ready.length
    learner = dpo_learner(config, model.arch, mesh, updates=length.steps)
    say(kernels_in_use(config.model, model.arch, mesh, "shared"))
    with open_run(config, model, records, length, learner, ready.heldout) as run:
        if run is None:
            return True
        reference = _references(ready, run)
        take_updates(run, partial(_prepare, ready, reference), _shown)
        return run.finish(told_by(card_of(config, model, len(records))), dtype)


def dry_run(config: DPOConfig) -> None:
    """Shows the config, the first batch, and what the update needs at the largest batch of an epoch."""
    start_processes(config, dry_run=True)
    if config.on_policy.sources:
        describe_making(open_making(config, _open_heldout))
        return
    ready = _ready(config)
    learner = dpo_learner(ready.config, ready.model.arch, ready.mesh, ready.length.steps)
    describe_update(ready, partial(preferred_shape, multiple=WIDTH_MULTIPLE), partial(dpo_programs, learner))


def _prepare(ready: Ready[DPOConfig], reference: Sums, pairs: PairBatch) -> PreferredPairs:
    """A batch of pairs on the devices."""
    shape, pad_id = preferred_shape(pairs, WIDTH_MULTIPLE), ready.model.tokenizer.pad_id
    return _placed(ready.mesh, preferred_batch(pairs, shape, pad_id, reference, ready.config.sft_by == "tokens"))


def _placed(mesh: Mesh, rows: PreferredPairs) -> PreferredPairs:
    batch: PreferredPairs = place_batch(mesh, rows)
    return batch


def sums_of(config: DPOConfig, model: Model, mesh: Mesh) -> SumsOf:
    """Sums up log-probs of both responses of records, in batches of like lengths, all processes together."""
    program = make_response_logprobs(config, model.arch, mesh)

    def sums(records: Sequence[EncodedPair], params: Params, frozen: Tree) -> Sums:
        by_length = sorted(records, key=lambda record: (max(map(sum, record.lengths)), record.index))
        found: dict[int, Sequence[float]] = {}
        for first in range(0, len(by_length), config.pairs_per_step):
            some = by_length[first : first + config.pairs_per_step]
            full = [*some, *some[:1] * (config.pairs_per_step - len(some))]  # as large as every batch
            share = PairBatch(
                tuple(share_of(mesh, full)),
                ids=tuple(record.preference.id for record in full),
                lengths=tuple(side for record in full for side in record.lengths),
            )
            rows = preferred_batch(share, preferred_shape(share, WIDTH_MULTIPLE), model.tokenizer.pad_id)
            values = fetch(program(params, frozen, _placed(mesh, rows)))
            found |= {record.index: value.tolist() for record, value in zip(some, values[: len(some)], strict=True)}
        return found

    return sums


# ---------------------------------------------------------------------------------------------------------- reference


def _references(ready: Ready[DPOConfig], run: Run) -> Sums:
    """What the reference says of all responses; of held-out ones the evaluation is told."""
    weights = cache(partial(_reference_weights, ready, run.trained.frozen))
    if isinstance(heldout := ready.heldout, HeldoutPreferences):
        heldout.reference.update(_kept(ready, heldout.records, run.folder / REFERENCE_HELDOUT, weights))
    return _kept(ready, ready.records, run.folder / REFERENCE, weights)


def _reference_weights(ready: Ready[DPOConfig], frozen: Tree) -> tuple[Params, Tree]:
    """The weights that training starts from; under adapters those that they stand beside, which are there already."""
    config = ready.config
    if frozen is not None:
        return {}, frozen
    return load_params(config.model, ready.model, ready.mesh, config.run.seed, TRAIN_RULES, config.model.dtype), None


def _kept(
    ready: Ready[DPOConfig], records: Sequence[EncodedPair], path: Path, weights: Callable[[], tuple[Params, Tree]]
) -> Sums:
    """What the reference says of some pairs, read where the run has computed it before."""
    about = {"data": digest_of(records), "weights": weights_digest(ready.model)}
    kept = json.loads(told("what the reference says", json.dumps(_read(path, about))))
    if kept is None:
        say(f"log-probs of {2 * len(records):,} responses by the weights that training starts from …")
        found = sums_of(ready.config, ready.model, ready.mesh)(records, *weights())
        kept = [found[record.index] for record in records]
        if jax.process_index() == 0:
            with writing(path, TO_RESUME), whole_file(path) as part:
                part.write_text(json.dumps(about | {"sums": kept}) + "\n", encoding="utf-8")
        arrive("keeping what the reference says")
    return dict(zip([record.index for record in records], kept, strict=True))


def _read(path: Path, about: Mapping[str, str]) -> list[list[float]] | None:
    found = read_json_object(path) or {}
    same = all(found.get(name) == value for name, value in about.items())
    return found.get("sums") if same else None


def _shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    return {"loss": values["loss"], "right": percent(values["accuracy"])}
