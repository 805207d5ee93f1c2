"""Rubric-ARM: a generator of rubrics and a judge that compares by them, trained in turns, the judge first.

Both are rewarded by one thing, whether the verdict prefers the chosen response. After a warm-up of both, each round has
its own part of the pairs and two phases: the generator writes one rubric for each pair, which is kept, and the judge
learns by these; then the judge rests, and the generator learns by what it makes of a group of rubrics for each prompt.
The same command resumes a run that was stopped, in whatever phase.

Source: Rubric-ARM (arXiv 2602.01511).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import jax

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.load import to_yaml
from patarm_jax.config.rubric_arm import Role, RubricArmConfig
from patarm_jax.config.sections import SamplingSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.pipeline import EncodedPair, digest_of
from patarm_jax.data.ruled import place_of, without_some
from patarm_jax.evaluate.heldout import share_of
from patarm_jax.evaluate.heldout_rubrics import GeneratorOnHeldout, JudgeOnHeldout, rubric_metrics
from patarm_jax.evaluate.rollouts import rollout_metrics, rollout_rows
from patarm_jax.model.generation import Drawing
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import TRAIN_RULES, Program
from patarm_jax.padding import bucket
from patarm_jax.recipes import sft
from patarm_jax.recipes.arms import Arm, Arms, open_arms, resting, steps_in_all
from patarm_jax.recipes.grpo import shown
from patarm_jax.recipes.programs import (
    RolloutPrograms,
    grpo_learner,
    grpo_programs,
    large,
    make_rollout_programs,
    sft_form,
    sft_learner,
)
from patarm_jax.recipes.ready import take_updates
from patarm_jax.recipes.reinforce import Sample, reinforce
from patarm_jax.rollout.judging import Judge
from patarm_jax.rollout.rounds import sample_round
from patarm_jax.rollout.rubrics import (
    FrozenJudge,
    Written,
    make_verdict_rewards,
    sample_rubrics,
    write_rubrics,
)
from patarm_jax.run.card import ModelCardFacts, card_of
from patarm_jax.run.claim import claimed
from patarm_jax.run.folder import Evaluator, batches_of
from patarm_jax.run.open_model import load_params, open_model
from patarm_jax.run.peers import agree, arrive, start_processes, told
from patarm_jax.run.phases import Phase, Phases, open_phases
from patarm_jax.run.process import say
from patarm_jax.run.programs import describe
from patarm_jax.run.rubrics import RUBRICS, RubricRow, keep_rubrics, kept_rubrics, sha256_of
from patarm_jax.types import LearntNothing, Status

_Write: TypeAlias = Callable[[SamplingSection, Sequence[EncodedPair], jax.Array], list[Written]]
_RUBRICS = 2**32 - 3  # no step, from which the keys of its rollouts are folded


def main(config: RubricArmConfig) -> bool:
    """Trains until done; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(open_arms(config))


def _train(arms: Arms) -> bool:
    phases = arms.phases()
    in_vain = 0  # phases of the rounds
    with open_phases(arms.config, phases, arms.identity()) as opened:
        for phase in phases:
            arm = arms.arms[_role(phase)]
            export = arm.export if phase.round else arm.warmed_up
            if opened.is_over(phase, export):
                continue
            say(f"{phase.name}: steps {phase.first + 1:,} to {phase.last:,} of {phases[-1].last:,}")
            verdict = (_turn if phase.round else _warm_up)(arms, arm, opened, phase)
            if verdict is None:
                return False
            if verdict:
                say(f"{phase.name}: {verdict}")
                in_vain += bool(phase.round)
    if in_vain == sum(bool(phase.round) for phase in phases):
        raise LearntNothing(f"{opened.folder}: nothing was learnt in any phase of the rounds, as is said of each.")
    say(f"done: {' and '.join(str(arms.arms[role].export) for role in dict.fromkeys(arms.config.turns))}")
    return True


def _role(phase: Phase) -> Role:
    return "judge" if phase.role == "judge" else "generator"


# ------------------------------------------------------------------------------------------------------------- phases


def _warm_up(arms: Arms, arm: Arm, opened: Phases, phase: Phase) -> str | None:
    """Fine-tunes a model on what it is to write.

    Returns:
        why nothing was learnt; empty where something was, None where the run was asked to stop.
    """
    config, mesh, model = arm.warmup, arms.mesh, arm.model
    learner = sft_learner(config, model.arch, mesh, updates=phase.last - phase.first)
    say(kernels_in_use(config.model, model.arch, mesh, sft_form(config)))
    run = opened.run(phase, config, model, arm.taught, learner, None)
    take_updates(run, partial(sft.prepare, config, mesh, model.tokenizer), sft.shown)
    ended = opened.end(run, arm.warmed_up, _card(arm, config, len(arm.taught)), updates_before=0)
    return run.watch.verdict if ended else None


def _turn(arms: Arms, arm: Arm, opened: Phases, phase: Phase) -> str | None:
    """Reinforces a model in a round, while the other one rests; returns as `_warm_up`."""
    config, mesh, model = arm.turn, arms.mesh, arm.model
    last, kept = opened.before(phase), arms.config.optimizer_per_phase == "kept"
    steps = steps_in_all(opened.phases, arm.role) if kept else phase.last - phase.first
    learner = grpo_learner(config, model.arch, mesh, updates=steps * config.update.updates_per_rollout)
    rollout = make_rollout_programs(config, model.arch, mesh)
    say(kernels_in_use(config.model, model.arch, mesh, "causal", "shared", "written"))
    lesson = (_judges_lesson if arm.role == "judge" else _generators_lesson)(arms, opened, phase, rollout)
    goes_on = kept and last is not None and last.round > 0
    run = opened.run(phase, config, model, lesson.records, learner, lesson.evaluation, goes_on)
    reference = _load_reference(arms, arm)
    for step in run.steps(
        lambda pairs: bucket(pairs.longest_prompt),
        lambda width: large(grpo_programs(config, model.arch, learner, rollout, lesson.asked.engine, width)),
        shown,
    ):
        found = reinforce(config, mesh, rollout, reference, step, lesson.sample)
        step.metrics |= {**rollout_metrics(config, found), **lesson.metrics}
        step.rows = rollout_rows(mesh, arm.form, found, lesson.rubrics)
    ended = opened.end(
        run, arm.export, _card(arm, config, len(arms.records)), _updates_before(opened, phase, arm, kept)
    )
    return run.watch.verdict if ended else None


def _updates_before(opened: Phases, phase: Phase, arm: Arm, kept: bool) -> int:
    """Updates of a model in its earlier phases, but for those that an optimizer which is kept has counted."""
    earlier = [one for one in opened.phases if one.role == phase.role and one.last <= phase.first]
    each = {True: 0 if kept else arm.turn.update.updates_per_rollout, False: 1}
    return sum(each[bool(one.round)] * (one.last - one.first) for one in earlier)


@dataclass(frozen=True)
class _Lesson:
    """What a model learns from in a phase, and by what."""

    records: list[EncodedPair]
    asked: Judge  # the model itself, as it is sampled
    sample: Sample
    evaluation: Evaluator | None
    rubrics: Mapping[str, str]  # by the id of a pair, what it is judged by; none where rubrics are what is sampled
    metrics: Mapping[str, float]  # the same at every step


def _judges_lesson(arms: Arms, opened: Phases, phase: Phase, rollout: RolloutPrograms) -> _Lesson:
    """Pairs by the rubrics that the generator writes for them before the phase begins; each in one order."""
    arm, config, seed = arms.arms["judge"], arms.config, arms.config.run.seed
    part = arms.parts[phase.round - 1]
    write = _writer(arms, _last_phase(opened, "generator", phase))
    sampling = arms.arms["generator"].turn.sampling
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _RUBRICS), phase.round)
    rows = _rubrics(opened, f"round-{phase.round}", part, arms.ruled, lambda: write(sampling, part, key))
    shown_of = partial(without_some, share=config.judge.rubric_dropout, seed=seed, round_number=phase.round)
    records = [
        arms.ruled(record, shown_of(row.text, pair=row.prompt_id)).only(place_of(seed, phase.round, row.prompt_id))
        for record, row in zip(part, rows, strict=True)
    ]
    evaluation = None
    if arms.heldout is not None:
        pairs = arms.heldout
        greedy = arms.arms["generator"].greedy
        name = f"heldout-{digest_of(pairs.records)[:8]}-round-{phase.round}"
        kept = _rubrics(opened, name, pairs.records, arms.ruled, lambda: write(greedy, pairs.records, pairs.key))
        evaluation = JudgeOnHeldout(config.heldout, pairs, [_as_written(row) for row in kept], rollout.to_rollout)
    asked = arm.asked(arms.mesh, arm.turn.sampling, arm.turn.group_size)
    return _Lesson(
        records=records,
        asked=asked,
        sample=partial(sample_round, asked, make_verdict_rewards(arm.turn)),
        evaluation=evaluation,
        rubrics={row.prompt_id: row.text for row in rows},
        metrics=rubric_metrics([_as_written(row) for row in rows], "rubrics"),
    )


def _generators_lesson(arms: Arms, opened: Phases, phase: Phase, rollout: RolloutPrograms) -> _Lesson:
    """Prompts, and the judge that says what each rubric is worth: one greedy judgement of the pair, in one order."""
    arm, config = arms.arms["generator"], arms.config
    place = partial(place_of, config.run.seed, phase.round)
    _, weights = resting(arms, "judge", _last_phase(opened, "judge", phase))

    def ruled(record: EncodedPair, rubric: str) -> EncodedPair:
        return arms.ruled(record, rubric).only(place(record.preference.id))

    judge = arms.arms["judge"]
    by = FrozenJudge(judge.asked(arms.mesh, judge.greedy, 1), weights, ruled)
    pairs = arms.heldout
    asked = arm.asked(arms.mesh, arm.turn.sampling, arm.turn.group_size)
    return _Lesson(
        records=[replace(record, places=(place(record.preference.id),)) for record in arms.parts[phase.round - 1]],
        asked=asked,
        sample=partial(sample_rubrics, asked, make_verdict_rewards(arm.turn), by),
        evaluation=None if pairs is None else GeneratorOnHeldout(config.heldout, pairs, weights, rollout.to_rollout),
        rubrics={},
        metrics={},
    )


# ------------------------------------------------------------------------------------------------------------ rubrics


def _writer(arms: Arms, since: Phase | None) -> _Write:
    """The generator as its last phase has left it, which is loaded when the first rubric is to be written."""
    weights = functools.cache(lambda: resting(arms, "generator", since)[1])

    def write(sampling: SamplingSection, records: Sequence[EncodedPair], key: jax.Array) -> list[Written]:
        generator = arms.arms["generator"].asked(arms.mesh, sampling, 1)
        return write_rubrics(generator, weights(), share_of(arms.mesh, records), key, len(records))

    return write


def _rubrics(
    opened: Phases,
    name: str,
    records: Sequence[EncodedPair],
    ruled: Callable[[EncodedPair, str], EncodedPair],
    write: Callable[[], list[Written]],
) -> list[RubricRow]:
    """The rubrics of some pairs as they are kept, written where they are not there yet."""
    path = opened.folder / RUBRICS / f"{name}.jsonl"
    rows: list[RubricRow] = []
    if told(f"whether {name} is kept", str(path.is_file())) == "True":
        rows = kept_rubrics(path, [record.preference.id for record in records])
    else:
        say(f"{name}: the generator writes {len(records):,} rubrics")
        shortened = 0
        for record, one in zip(records, write(), strict=True):
            text = ruled(record, one.shown).preference.rubric
            shortened += text != one.shown
            rows.append(RubricRow(record.preference.id, text, sha256_of(text), one.status.name))
        if shortened:
            say(f"{name}: {shortened:,} rubrics are longer than data.max_prompt_tokens leaves, and lose their end")
        if jax.process_index() == 0:
            keep_rubrics(path, rows)
        arrive(f"keeping {path}")
    agree("the rubrics they judge by", {"rubrics": sha256_of("".join(row.sha256 for row in rows))})
    if blank := sum(not row.text for row in rows):
        say(f"{name}: {blank:,} of {len(rows):,} rubrics are empty; the judge is asked without one there")
    if malformed := sum(row.status != Status.OK.name for row in rows):
        say(f"{name}: {malformed:,} of {len(rows):,} rubrics are out of form")
    return rows


def _as_written(row: RubricRow) -> Written:
    return Written(row.text, Status[row.status])


def _last_phase(opened: Phases, role: Role, phase: Phase) -> Phase | None:
    """The last phase of the other model before a phase."""
    return opened.before(replace(phase, role=role))


# ---------------------------------------------------------------------------------------------------------- what else


def _load_reference(arms: Arms, arm: Arm) -> tuple[Params, Tree] | None:
    """What the KL is measured from: the model as it was when the rounds began; None where there is no KL."""
    config = arm.turn
    if not config.charges_kl:
        return None
    model, section = arm.model, config.model
    if arms.config.is_warmed_up:
        section = replace(section, path=str(arm.warmed_up), adapter="", weights="load")
        model = open_model(section, config.judge)
    return load_params(section, model, arms.mesh, config.run.seed, TRAIN_RULES, section.dtype), None


def _card(arm: Arm, config: TrainConfig, pairs: int) -> ModelCardFacts:
    """What a model's card says; the generator is served greedily, as it is asked here."""
    drawing = Drawing(0.0, 0, 1.0) if arm.role == "generator" else None
    card = card_of(config, arm.model, pairs)
    return replace(card, drawing=drawing or card.drawing, measured_on="")


def dry_run(config: RubricArmConfig) -> None:
    """Shows the config, the first pairs, and what each program needs at the longest prompt of the data."""
    start_processes(config, dry_run=True)
    arms = open_arms(config)
    phases = arms.phases()
    for phase in phases:
        say(f"{phase.name}: steps {phase.first + 1:,} to {phase.last:,}")
    every = {
        f"{role}: {name}": program for role, arm in arms.arms.items() for name, program in _programs(arms, arm).items()
    }
    first = next(batches_of(arms.arms["generator"].turn, arms.parts[0]))
    describe(to_yaml(config), arms.mesh, every, first, arms.arms["generator"].model.tokenizer, phases[-1].last)


def _programs(arms: Arms, arm: Arm) -> dict[str, Program]:
    """Those of a model's phases in the rounds; the judge's prompts have room for the longest rubric."""
    config, mesh, arch = arm.turn, arms.mesh, arm.model.arch
    longest = max(record.longest_prompt for record in arms.records)
    if arm.role == "judge":
        bare = max(arms.ruled(record, "").longest_prompt for record in arms.records)
        longest = min(bare + arms.arms["generator"].turn.sampling.max_new_tokens, arms.config.data.max_prompt_tokens)
    learner, rollout = grpo_learner(config, arch, mesh), make_rollout_programs(config, arch, mesh)
    engine = arm.asked(mesh, config.sampling, config.group_size).engine
    return grpo_programs(config, arch, learner, rollout, engine, bucket(longest))
