"""Preference pairs of a policy's own responses: several to each prompt, judged by sources, the best and the worst kept.

In the run folder, for each round:

    responses/round-N/batch-000001.jsonl   prompts with all their responses, and what the sources say of each
    pairs/round-N.jsonl                    the pairs that are made of them
    round-N/                               the run that learns from these: `patarm dpo` with pairs that are given
    export/                                what the last round has left

A stopped run goes on behind the last batch of prompts that was kept.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.ask.round_robin import RoundRobin
from patarm_jax.ask.worth import open_models, open_sources
from patarm_jax.ask.worth_here import JudgeHere, OpenedModel, load_source_weights, tell_resident
from patarm_jax.config.load import to_yaml
from patarm_jax.config.policy import DPOConfig, OnPolicySection
from patarm_jax.config.sections import DataSection, ModelSection
from patarm_jax.data.pairs import laid_out
from patarm_jax.data.pipeline import EncodedPair, PairBatch, encode_pairs
from patarm_jax.data.preferences import Report
from patarm_jax.data.prompts import read_prompts
from patarm_jax.data.scores import room_for
from patarm_jax.evaluate.heldout import share_of
from patarm_jax.files import appearing_whole, read_json_object, write_text, writing
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.sharding import gather_json, make_mesh
from patarm_jax.model.transformer import abstract_params
from patarm_jax.padding import bucket
from patarm_jax.recipes.fitting import fitted
from patarm_jax.recipes.programs import programs
from patarm_jax.recipes.ready import OpenEvaluation
from patarm_jax.rollout.engine import abstract_programs
from patarm_jax.rollout.judging import Judge, make_judge
from patarm_jax.rollout.preferring import Pair, preferred_pair
from patarm_jax.rollout.responses import Responses, Said, Source, Worth, ask_sources, refuse_many_failures
from patarm_jax.run.card import ModelCardFacts, card_of
from patarm_jax.run.claim import MARK, folder_of, write_mark
from patarm_jax.run.devices import tell_devices
from patarm_jax.run.export import refuse_adapters_of_no_model
from patarm_jax.run.folder import length_of
from patarm_jax.run.learner import check_batch, rollout_rules
from patarm_jax.run.open_model import EXPORT, Model, name_of, open_model
from patarm_jax.run.peers import agree, arrive, told, wait_to_see
from patarm_jax.run.process import TO_RESUME, say
from patarm_jax.run.programs import describe
from patarm_jax.run.progress import percent, progress
from patarm_jax.run.stopping import stop_after_steps
from patarm_jax.run.whose import WEIGHTS, fingerprint, refuse_another_run, with_known_start
from patarm_jax.types import UserError

ANSWERS, RESPONSES, PAIRS = "answers", "responses", "pairs"  # folders of a run


@dataclass(frozen=True)
class Making:
    """What all rounds of pairs begin with."""

    config: DPOConfig
    mesh: Mesh
    model: Model  # the policy before the first round
    models: Mapping[int, OpenedModel]  # of the sources, by their numbers
    records: Sequence[EncodedPair]  # all prompts
    parts: Sequence[Sequence[EncodedPair]]  # those of each round

    @property
    def folder(self) -> Path:
        """Of the run."""
        return folder_of(self.config.run)

    def pairs_of(self, number: int) -> Path:
        """The file of a round's pairs."""
        return self.folder / PAIRS / f"round-{number}.jsonl"

    def export_of(self, number: int) -> Path:
        """What a round leaves."""
        return self.folder / f"round-{number}" / EXPORT

    def batches_of(self, number: int, done: int = 0) -> list[Sequence[EncodedPair]]:
        """The prompts of a round behind the first `done` ones, as they are sampled together."""
        part, size = self.parts[number - 1], self.config.prompts_at_once
        return [part[first : first + size] for first in range(done, len(part), size)]

    def config_of(self, number: int) -> DPOConfig:
        """The run that learns from a round's pairs, which is one of pairs that are given."""
        config = self.config
        limits = {name: getattr(config.data, name) for name in ("max_prompt_tokens", "max_completion_tokens")}
        return replace(
            config,
            model=self._policy(number),
            data=replace(DataSection(path=str(self.pairs_of(number))), **limits),
            run=replace(config.run, folder=str(self.export_of(number).parent)),
            on_policy=OnPolicySection(),
        )

    def told_by(self, number: int, card: ModelCardFacts) -> ModelCardFacts:
        """A round's card, as that of all rounds up to it."""
        config, rounds = self.config, self.config.on_policy.rounds
        judged = ", ".join(source.called for source in config.every_source)
        how = f"{card.stage} on pairs of its own responses, as {judged} ranks them, round {number} of {rounds}"
        last = name_of(self.folder / EXPORT) if number == rounds else ""
        first = card_of(config, self.model)
        return replace(card, name=last, stage=how, base_model=first.base_model, data_path=first.data_path)

    def _policy(self, number: int) -> ModelSection:
        """The section of the policy that a round begins with."""
        if number == 1:
            return self.config.model
        before = self.export_of(number - 1)
        return replace(self.config.model, path=str(before), adapter="", weights="load")


def open_making(config: DPOConfig, open_heldout: OpenEvaluation) -> Making:
    """Opens all that is needed, the cheapest to refuse first; `open_heldout` as of `make_ready`."""
    config, own = config.complete(), config.on_policy
    mesh = make_mesh(config.mesh)
    tell_devices()
    check_batch(mesh, config.units_per_step, config.micro_batches, f"pairs_per_step {config.pairs_per_step}")
    form = FORMS[config.judge]
    model = open_model(config.model, config.judge)
    refuse_adapters_of_no_model(config, model)
    models = open_models(config)
    prompts, read = read_prompts(config.data)
    setting = "on_policy.sampling.max_new_tokens"
    room = room_for(model.arch.max_position_embeddings, model.tokenizer, form, own.sampling.max_new_tokens, setting)
    records, encoded = encode_pairs(model.tokenizer, prompts, config.rubrics, config.data, room, form)
    say(f"{config.data.path}: {read}. Encoded: {encoded}.")
    config = fitted(config, model.arch, mesh)
    open_heldout(config, model, mesh, prompts)  # each round opens them anew; what is wrong with them is said now
    making = Making(config, mesh, model, models, records, _parts(records, own, config.run.seed))
    _refuse_too_few(making)
    return making


def _refuse_too_few(making: Making) -> None:
    """Refuses prompts that cannot make the pairs of one step in each round."""
    config, fewest = making.config, min(map(len, making.parts))
    if fewest < config.pairs_per_step:
        shared = config.on_policy.prompts == "parts" and config.on_policy.rounds > 1
        of_each = f", {fewest:,} in each of on_policy.rounds {config.on_policy.rounds}," if shared else ""
        raise UserError(
            f"{len(making.records):,} usable prompts{of_each} make no {config.pairs_per_step:,} pairs, as many as "
            f"pairs_per_step. Give more prompts, {'fewer rounds, ' if shared else ''}or lower pairs_per_step."
        )


def _parts(records: Sequence[EncodedPair], own: OnPolicySection, seed: int) -> list[list[EncodedPair]]:
    """The prompts of each round: all of them, or one part of all, shuffled."""
    if own.prompts == "all":
        return [list(records)] * own.rounds
    order = np.random.default_rng(seed % 2**64).permutation(len(records))
    return [[records[index] for index in sorted(part)] for part in np.array_split(order, own.rounds)]


def begin(making: Making) -> None:
    """Marks the run folder; refuses one that another run has marked."""
    config, folder = making.config, making.folder
    digests = {one.section.called: one.digest for one in making.models.values()}
    # The length of a round too: those that are done would not be trained on.
    length = {name: getattr(config.run, name) for name in ("steps", "epochs")}
    further = {"models of the sources": digests, "run": length}
    identity = fingerprint(config, making.model, making.records, further=further)
    noted = read_json_object(folder / MARK)
    whose = with_known_start(identity, noted)
    agree("what they read", {"prompts": whose["data"], "sources": digests, "weights": str(whose[WEIGHTS])})
    if noted is not None:
        refuse_another_run(str(folder), expected=whose, got=noted, what="holds another run")
    if not _is_there(folder / EXPORT):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_mark(folder, config, whose, keep_config=False)


def is_over(making: Making) -> bool:
    """Whether all rounds are; says so."""
    if over := _is_there(making.folder / EXPORT):
        say(f"{making.folder} is complete, all {making.config.on_policy.rounds} rounds, and is left as it is")
    return over


def is_trained(making: Making, number: int) -> bool:
    """Whether a round is over."""
    return _is_there(making.export_of(number))


def _is_there(path: Path) -> bool:
    return told(f"whether there is {path}", str(path.exists())) == "True"


def finish(making: Making) -> None:
    """Puts what the last round has left where the export of a run is looked for; no second copy where disks allow."""
    last = making.export_of(making.config.on_policy.rounds)
    with appearing_whole(making.folder / EXPORT) as part:
        for path in sorted(last.iterdir()) if jax.process_index() == 0 else ():
            try:
                os.link(path, part / path.name)
            except OSError:  # a file system without links
                shutil.copy2(path, part / path.name)
    say(f"done: {making.folder / EXPORT}")


def describe_making(making: Making) -> None:
    """Shows the config, the first prompts, and what sampling, judging and an update need at their limits."""
    config, mesh, model = making.config, making.mesh, making.model
    width = bucket(max(record.longest_prompt for record in making.records))
    weights = abstract_params(model.arch, mesh, rollout_rules(config.mesh), config.model.dtype, sampling=True)
    asked = abstract_programs(policy_of(config, model, mesh).engine, weights, config.prompts_at_once, width)
    every = {f"policy: {name}": program for name, program in asked.items()}
    for opened in making.models.values():
        every |= opened.programs(config, mesh)
    every |= programs(config, model.arch, mesh)
    first = tuple(making.batches_of(1)[0])
    shown = PairBatch(
        first, tuple(one.preference.id for one in first), tuple(side for one in first for side in one.lengths)
    )
    longest = max(length_of(config.run, part, config.pairs_per_step).steps for part in making.parts)
    rounds = config.on_policy.rounds
    each = "1 round" if rounds == 1 else f"{rounds} rounds, each"
    say(f"{each} of at most {longest:,} steps: as many as the pairs that are made give")
    describe(to_yaml(config), mesh, every, shown, model.tokenizer, rounds * longest)
    tell_resident(list(making.models.values()), config, mesh)


# --------------------------------------------------------------------------------------------------------------- pairs


def make_pairs(making: Making, number: int) -> bool:
    """Writes the pairs of a round where they are not there; False when it was asked to stop before."""
    path = making.pairs_of(number)
    if _is_there(path):
        return True
    folder = making.folder / RESPONSES / f"round-{number}"
    kept = sum(1 for _ in _rows_in(folder)) if jax.process_index() == 0 else 0
    done = int(told("how many prompts have responses", str(kept)))
    if done < len(making.parts[number - 1]) and not _sample(making, number, folder, done):
        return False
    if jax.process_index() == 0:
        _write_pairs(making, number, folder)
    told("that the pairs are written", "")
    wait_to_see(path, "run.folder")
    return True


def _rows_in(folder: Path) -> Iterator[dict[str, Any]]:
    """The prompts of a round that have responses, in order."""
    for path in sorted(folder.glob("batch-*.jsonl")):
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)


def _sample(making: Making, number: int, folder: Path, done: int) -> bool:
    """Samples and judges the prompts of a round behind the first `done` ones; False when it was asked to stop."""
    config, mesh, own = making.config, making.mesh, making.config.on_policy
    of_round, batches, rounds = making.config_of(number), making.batches_of(number, done), own.rounds
    count, before = len(making.parts[number - 1]), len(list(folder.glob("batch-*.jsonl")))
    say(f"round {number} of {rounds}: {own.responses} responses to each of {count:,} prompts")
    model = open_model(of_round.model, config.judge)
    policy = policy_of(config, model, mesh)
    weights = load_source_weights(config, of_round.model, model, mesh)
    sources = _sources(making, number)
    key = jax.random.fold_in(jax.random.key(config.run.seed), number)
    with stop_after_steps() as stop_asked, progress(count, done, unit="prompt") as report:
        tokens = 0
        for place, batch in enumerate(batches, before + 1):
            done += len(batch)
            asked = policy, None, sources, own.sees_thinking, place, weights, share_of(mesh, batch), key
            said = ask_sources(*asked, lambda _: contextlib.nullcontext(), prompts=len(batch))
            where = f"round {number}, prompts up to {done:,}"
            refuse_many_failures(said, mesh, where, "on_policy.max_failed", own.max_failed)
            rows = gather_json(mesh, _rows(config, said))[: len(batch)]
            if jax.process_index() == 0:
                _write_rows(folder / f"batch-{place:06}.jsonl", rows)
            arrive("keeping responses")
            for source in sources:
                source.settle()
            tokens += sum(one["tokens"] for row in rows for one in row["responses"])
            report(done, _shown(rows), tokens)
            if stop_asked():
                say(f"stopped after {done:,} of {count:,} prompts of round {number}; run the command again to resume")
                return False
    return True


def policy_of(config: DPOConfig, model: Model, mesh: Mesh) -> Judge:
    """The policy as it is sampled, without its weights."""
    own = config.on_policy
    settings = config.model, own.sampling, own.responses, FORMS[config.judge]
    return make_judge(model.arch, model.tokenizer, mesh, *settings)


def _sources(making: Making, number: int) -> list[Source]:
    """All sources with their weights; judges of two compare all responses to a prompt."""
    every = open_sources(making.config, making.models, making.mesh, making.folder / ANSWERS / f"round-{number}")
    compares = [section.compares for section in making.config.every_source]
    return [
        RoundRobin(source) if compare and isinstance(source, JudgeHere) else source
        for source, compare in zip(every, compares, strict=True)
    ]


def _rows(config: DPOConfig, said: Said) -> list[dict[str, Any]]:
    """This process's prompts, with their responses and what the sources say of each."""
    return [
        {
            "id": one.preference.id,
            "domain": one.preference.domain,
            "prompt": list(one.preference.prompt),
            "responses": [_row(config, said, one, member) for member in range(len(one.texts))],
        }
        for one in said.responses
    ]


def _row(config: DPOConfig, said: Said, one: Responses, member: int) -> dict[str, Any]:
    worth: dict[str, Worth] = {name: of_source[one.index][member] for name, of_source in said.of_sources.items()}
    cut_off = bool(said.finished.truncated[one.index][member])
    values = [each.value for each in worth.values()]
    weights = [source.weight for source in config.every_source]
    known = [value * weight for value, weight in zip(values, weights, strict=True) if value is not None]
    return {
        "text": one.texts[member],
        "tokens": len(one.ids[member]),
        "cut_off": cut_off,
        "reward": sum(known) if len(known) == len(values) and not cut_off else None,
        "sources": {
            name: {"value": each.value, "said": each.said} | ({} if each.beats is None else {"beats": each.beats})
            for name, each in worth.items()
        },
    }


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with writing(path, TO_RESUME):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _shown(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | str]:
    """What of a batch is printed."""
    rewards = [one["reward"] for row in rows for one in row["responses"]]
    known = [reward for reward in rewards if reward is not None]
    mean = {"reward": float(np.mean(known))} if known else {}
    return {**mean, "without a reward": percent(1 - len(known) / len(rewards))}


def _write_pairs(making: Making, number: int, folder: Path) -> None:
    """Makes the pairs of a round's responses, and says what became of the prompts."""
    pairs: list[Mapping[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row in _rows_in(folder):
        found = pair_of(row["responses"], making.config.on_policy.min_gap)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            pairs.append(_made(row, found))
    report = Report(len(pairs), dict(dropped.most_common()))
    path = making.pairs_of(number)
    if not pairs:
        raise UserError(
            f"round {number}: no pair comes of the responses: {report}. What the sources say of each is kept in "
            f"{folder}. Sample more responses to a prompt, hotter, ask judges for more votes, or lower "
            "on_policy.min_gap, in another run folder."
        )
    if len(pairs) < making.config.pairs_per_step:
        raise UserError(
            f"round {number}: {len(pairs):,} pairs come of the responses, fewer than pairs_per_step "
            f"{making.config.pairs_per_step:,}: {report}. What the sources say of each is kept in {folder}. Give more "
            "prompts or lower pairs_per_step, in another run folder."
        )
    _write_rows(path, pairs)
    say(f"round {number}, pairs of prompts: {report}: {path}")


def pair_of(responses: Sequence[Mapping[str, Any]], min_gap: float) -> Pair | str:
    """The two of a prompt's responses that make a pair, or why none do."""
    rewards = np.array([np.nan if one["reward"] is None else one["reward"] for one in responses])
    agreed = np.ones((len(responses), len(responses)), bool)
    for member, one in enumerate(responses):
        for source in one["sources"].values():
            if "beats" in source:
                agreed[member] &= np.isin(np.arange(len(responses)), source["beats"])
    texts = [laid_out(one["text"]) for one in responses]
    for member, other in itertools.permutations(range(len(texts)), 2):
        agreed[member, other] &= texts[member] != texts[other]  # which no one could learn to tell apart
    return preferred_pair(rewards, agreed, min_gap)


def _made(row: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
    """A row of preferences, as any trainer of DPO reads it."""
    sides = {"chosen": row["responses"][pair.chosen], "rejected": row["responses"][pair.rejected]}
    said = {name: [{"role": "assistant", "content": side["text"]}] for name, side in sides.items()}
    rewards = {f"{name}_reward": side["reward"] for name, side in sides.items()}
    return {"id": row["id"], "domain": row["domain"], "prompt": row["prompt"], **said, **rewards}
