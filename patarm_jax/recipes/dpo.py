"""Direct preference optimisation: a policy learns from preference pairs, with no reward model and no sampling.

What the weights that training starts from say of all responses is computed once, before the first step, and kept in the
run folder. The prompt of a pair is computed once for both responses. The same command resumes a run that was stopped.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax

from patarm_jax.arrays import PreferredPairs, Tree
from patarm_jax.config.policy import DPOConfig
from patarm_jax.data.packing import preferred_batch, preferred_shape
from patarm_jax.data.pipeline import PairBatch, digest_of
from patarm_jax.data.prompts import read_preferred_responses
from patarm_jax.evaluate.heldout import share_of
from patarm_jax.files import read_json_object, whole_file, writing
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import TRAIN_RULES, fetch, place_batch
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.recipes.programs import dpo_learner, dpo_programs, make_response_logprobs
from patarm_jax.recipes.ready import Ready, describe_update, make_ready, take_updates
from patarm_jax.run.card import card_of
from patarm_jax.run.claim import claimed
from patarm_jax.run.folder import open_run
from patarm_jax.run.open_model import load_params, weights_digest
from patarm_jax.run.peers import arrive, start_processes, told
from patarm_jax.run.process import TO_RESUME, say
from patarm_jax.run.progress import Shown, percent

REFERENCE = "reference.json"  # the file of a run with what the reference says of all responses
Sums = Mapping[int, Sequence[float]]  # by a record's index, of the chosen and of the rejected response


def main(config: DPOConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(_ready(config))


def _ready(config: DPOConfig) -> Ready[DPOConfig]:
    return make_ready(config, read_preferred_responses)


def _train(ready: Ready[DPOConfig]) -> bool:
    config, mesh, model, records, length = ready.config, ready.mesh, ready.model, ready.records, ready.length
    learner = dpo_learner(config, model.arch, mesh, updates=length.steps)
    say(kernels_in_use(config.model, model.arch, mesh, "shared"))
    with open_run(config, model, records, length, learner) as run:
        if run is None:
            return True
        reference = _kept_reference(ready, run.folder / REFERENCE, run.trained.frozen)
        take_updates(run, partial(_prepare, ready, reference), _shown)
        return run.finish(card_of(config, model, len(records)))


def dry_run(config: DPOConfig) -> None:
    """Shows the config, the first batch, and what the update needs at the largest batch of an epoch."""
    start_processes(config, dry_run=True)
    ready = _ready(config)
    learner = dpo_learner(ready.config, ready.model.arch, ready.mesh, ready.length.steps)
    describe_update(ready, partial(preferred_shape, multiple=WIDTH_MULTIPLE), partial(dpo_programs, learner))


def _prepare(ready: Ready[DPOConfig], reference: Sums, pairs: PairBatch) -> PreferredPairs:
    """A batch of pairs on the devices."""
    shape, pad_id = preferred_shape(pairs, WIDTH_MULTIPLE), ready.model.tokenizer.pad_id
    rows = preferred_batch(pairs, shape, pad_id, reference, ready.config.sft_by == "tokens")
    batch: PreferredPairs = place_batch(ready.mesh, rows)
    return batch


def _kept_reference(ready: Ready[DPOConfig], path: Path, frozen: Tree) -> Sums:
    """What the reference says of all responses, read where the run has computed it before."""
    about = {"data": digest_of(ready.records), "weights": weights_digest(ready.model)}
    kept = json.loads(told("what the reference says", json.dumps(_read(path, about))))
    if kept is None:
        say(f"log-probs of {2 * len(ready.records):,} responses by the weights that training starts from …")
        kept = _reference(ready, frozen)
        if jax.process_index() == 0:
            with writing(path, TO_RESUME), whole_file(path) as part:
                part.write_text(json.dumps(about | {"sums": kept}) + "\n", encoding="utf-8")
        arrive("keeping what the reference says")
    return dict(zip([record.index for record in ready.records], kept, strict=True))


def _read(path: Path, about: Mapping[str, str]) -> list[list[float]] | None:
    found = read_json_object(path) or {}
    same = all(found.get(name) == value for name, value in about.items())
    return found.get("sums") if same else None


def _reference(ready: Ready[DPOConfig], frozen: Tree) -> list[list[float]]:
    """The sums of log-probs of both responses of every record; batches of records of like lengths, on all processes."""
    config, mesh, model = ready.config, ready.mesh, ready.model
    sums = make_response_logprobs(config, model.arch, mesh)
    # Under adapters the reference is the weights that they stand beside, which are there already.
    weights = (
        {}
        if frozen is not None
        else load_params(config.model, model, mesh, config.run.seed, TRAIN_RULES, config.model.dtype)
    )
    by_length = sorted(ready.records, key=lambda record: (max(map(sum, record.lengths)), record.index))
    found: dict[int, list[float]] = {}
    for first in range(0, len(by_length), config.pairs_per_step):
        some = by_length[first : first + config.pairs_per_step]
        full = [*some, *some[:1] * (config.pairs_per_step - len(some))]  # as large as every batch
        share = PairBatch(
            tuple(share_of(mesh, full)),
            ids=tuple(record.preference.id for record in full),
            lengths=tuple(side for record in full for side in record.lengths),
        )
        values = fetch(sums(weights, frozen, _prepare(ready, {}, share)))
        found |= {record.index: value.tolist() for record, value in zip(some, values[: len(some)], strict=True)}
    return [found[record.index] for record in ready.records]


def _shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    return {"loss": values["loss"], "right": percent(values["accuracy"])}
