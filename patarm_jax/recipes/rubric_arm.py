"""Rubric-ARM: a generator of rubrics and a judge that compares by them, trained in turns, the judge first.

Both are rewarded by one thing, whether the verdict prefers the chosen response. After a warm-up of both, each round has
its own part of the pairs and two phases: the generator writes one rubric for each pair, which is kept, and the judge
learns by these; then the judge rests, and the generator learns by what it makes of a group of rubrics for each prompt.
Or both take turns step by step. The same command resumes a run that was stopped, in whatever phase.

Source: Rubric-ARM (arXiv 2602.01511).
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.load import to_yaml
from patarm_jax.config.rubric_arm import Role, RubricArmConfig
from patarm_jax.config.training import TrainConfig
from patarm_jax.evaluate.rollouts import rollout_metrics, rollout_rows
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import TRAIN_RULES, Program
from patarm_jax.padding import bucket
from patarm_jax.recipes import sft
from patarm_jax.recipes.arms import Arm, Arms, open_arms, steps_in_all
from patarm_jax.recipes.grpo import shown
from patarm_jax.recipes.lessons import (
    Lesson,
    Turn,
    generators_lesson,
    judges_lesson,
    judges_lesson_by_new_rubrics,
    resting_weights,
)
from patarm_jax.recipes.programs import (
    grpo_learner,
    grpo_programs,
    large,
    make_rollout_programs,
    sft_form,
    sft_learner,
)
from patarm_jax.recipes.ready import take_updates
from patarm_jax.recipes.reinforce import reinforce
from patarm_jax.run.card import ModelCardFacts, card_of
from patarm_jax.run.claim import claimed
from patarm_jax.run.folder import Run, batches_of
from patarm_jax.run.open_model import load_params, open_model
from patarm_jax.run.peers import start_processes
from patarm_jax.run.phases import Phase, Phases, Pupil, is_put_away, open_phases
from patarm_jax.run.process import say
from patarm_jax.run.programs import GIB, describe, per_device
from patarm_jax.types import LearntNothing


def main(config: RubricArmConfig) -> bool:
    """Trains until done; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(open_arms(config))


def _train(arms: Arms) -> bool:
    phases = arms.phases()
    trained = dict.fromkeys(role for phase in phases for role in _roles(phase) if phase.round)
    if is_put_away(arms.config, phases, arms.identity(), {role: arms.arms[role].export for role in trained}):
        return True
    with open_phases(arms.config, phases, arms.identity()) as opened:
        for phase in phases:
            if opened.is_over(phase, [_export(arms.arms[role], phase) for role in _roles(phase)]):
                continue
            say(f"{phase.name}: steps {phase.first + 1:,} to {phase.last:,} of {phases[-1].last:,}")
            run = (_take_turns if phase.round else _warm_up)(arms, opened, phase)
            if run is None:
                return False
            for one in run.models:
                if one.watch.verdict:
                    say(f"{phase.name}, of the {one.name}: {one.watch.verdict}")
        in_vain = all(
            opened.watch(phase, role, arms.arms[role].turn, arms.config.keeps_optimizers).verdict
            for phase in phases
            for role in _roles(phase)
            if phase.round
        )
    if in_vain:
        raise LearntNothing(f"{opened.folder}: nothing was learnt in any phase of the rounds, as is said of each.")
    opened.note_end()
    say(f"done: {' and '.join(str(arms.arms[role].export) for role in dict.fromkeys(arms.config.turns))}")
    return True


def _roles(phase: Phase) -> list[Role]:
    """Its models, in the order of their turns."""
    return [_role(role) for role in phase.roles]


def _role(name: str) -> Role:
    return "judge" if name == "judge" else "generator"


def _export(arm: Arm, phase: Phase) -> Path:
    """Where a phase leaves a model."""
    return arm.export if phase.round else arm.warmed_up


# ------------------------------------------------------------------------------------------------------------- phases


def _warm_up(arms: Arms, opened: Phases, phase: Phase) -> Run | None:
    """Fine-tunes a model on what it is to write; None where the run was asked to stop before the end."""
    (role,) = _roles(phase)
    arm, mesh = arms.arms[role], arms.mesh
    config, model = arm.warmup, arm.model
    learner = sft_learner(config, model.arch, mesh, updates=phase.steps_of_each)
    say(kernels_in_use(config.model, model.arch, mesh, sft_form(config)))
    run = opened.run(phase, [Pupil(role, config, model, learner, evaluation=None)], arm.taught)
    take_updates(run, partial(sft.prepare, config, mesh, model.tokenizer), sft.shown)
    card = _card(arm, config, len(arm.taught), updates_before=0)
    return run if opened.end(run, {role: (arm.warmed_up, card)}) else None


def _take_turns(arms: Arms, opened: Phases, phase: Phase) -> Run | None:
    """Reinforces a model in a round while the other one rests, or both in turn; returns as `_warm_up`."""
    mesh = arms.mesh
    turns: dict[Role, Turn] = {}
    for role in _roles(phase):
        config, arch = arms.arms[role].turn, arms.arms[role].model.arch
        turns[role] = Turn(arms, opened, phase, role, make_rollout_programs(config, arch, mesh))
        say(kernels_in_use(config.model, arch, mesh, "causal", "shared", "written"))

    def beside(role: Role) -> Params:
        """The copy for sampling of the model beside one, where both are trained: as the run has it by now."""
        (other,) = (one for one in run.models if one.name != role)
        return turns[_role(other.name)].rollout.to_rollout(other.state.params, other.frozen)

    lessons: dict[Role, Lesson] = {}
    for role, turn in turns.items():
        together = len(turns) > 1
        other = partial(beside, role) if together else partial(resting_weights, turn)
        if role == "generator":
            lessons[role] = generators_lesson(turn, other if together else cache(other))
        else:
            lessons[role] = (judges_lesson_by_new_rubrics if together else judges_lesson)(turn, other)
    pupils = {role: _pupil(turn, lessons[role]) for role, turn in turns.items()}
    run = opened.run(phase, list(pupils.values()), next(iter(lessons.values())).records)
    references = {_role(one.name): _load_reference(arms, arms.arms[_role(one.name)], one.frozen) for one in run.models}
    ahead = list(turns)[-1]  # what a judge reads in its turn is not written yet

    def programs(width: int) -> dict[str, Program]:
        turn, learner = turns[ahead], pupils[ahead].learner
        engine = lessons[ahead].asked.engine
        return large(grpo_programs(turn.config, turn.arm.model.arch, learner, turn.rollout, engine, width, full=False))

    for step in run.steps(lambda pairs: bucket(pairs.longest_prompt), programs, shown):
        role = _role(run.trained.name)
        turn, lesson = turns[role], lessons[role]
        found = reinforce(turn.config, mesh, turn.rollout, references[role], step, lesson.sample)
        step.metrics |= {**rollout_metrics(turn.config, found), **lesson.metrics(found.rounds[0])}
        step.rows = rollout_rows(mesh, turn.arm.form, found)
        lesson.keep(step.number, found.rounds[0])
    exports = {
        role: (turn.arm.export, _card(turn.arm, turn.config, len(arms.records), _updates_before(turn)))
        for role, turn in turns.items()
    }
    return run if opened.end(run, {str(role): export for role, export in exports.items()}) else None


def _pupil(turn: Turn, lesson: Lesson) -> Pupil:
    arms, phase, arm, config = turn.arms, turn.phase, turn.arm, turn.config
    last = turn.opened.before(phase, turn.role)
    steps = steps_in_all(turn.opened.phases, turn.role) if turn.arms.config.keeps_optimizers else phase.steps_of_each
    learner = grpo_learner(config, arm.model.arch, arms.mesh, updates=steps * config.update.updates_per_rollout)
    goes_on = turn.arms.config.keeps_optimizers and last is not None and last.round > 0
    return Pupil(turn.role, config, arm.model, learner, lesson.evaluation, goes_on)


def _updates_before(turn: Turn) -> int:
    """Updates of a model in its earlier phases, but for those that an optimizer which is kept has counted."""
    each = {True: 0 if turn.arms.config.keeps_optimizers else turn.config.update.updates_per_rollout, False: 1}
    earlier = [one for one in turn.opened.phases if turn.role in one.roles and one.last <= turn.phase.first]
    return sum(each[bool(one.round)] * one.steps_of_each for one in earlier)


# ---------------------------------------------------------------------------------------------------------- what else


def _load_reference(arms: Arms, arm: Arm, frozen: Tree) -> tuple[Params, Tree] | None:
    """What the KL is measured from, as of `reinforce`: the model as it was when the rounds began; None without a KL.

    Under adapters that had no warm-up it is the weights that they stand beside, which are there already.
    """
    config = arm.turn
    if not config.charges_kl:
        return None
    model, section = arm.model, config.model
    if frozen is not None and not arms.config.is_warmed_up:
        return {}, frozen
    if arms.config.is_warmed_up:
        section = replace(section, path=str(arm.warmed_up), adapter="", weights="load")
        model = open_model(section, config.judge)
    return load_params(section, model, arms.mesh, config.run.seed, TRAIN_RULES, section.dtype), None


def _card(arm: Arm, config: TrainConfig, pairs: int, updates_before: int) -> ModelCardFacts:
    """What a model's card says."""
    return replace(card_of(config, arm.model, pairs), measured_on="", steps=updates_before)


def dry_run(config: RubricArmConfig) -> None:
    """Shows the config, the first pairs, and what each program needs at the longest prompt of the data."""
    start_processes(config, dry_run=True)
    arms = open_arms(config)
    phases = arms.phases()
    for phase in phases:
        say(f"{phase.name}: steps {phase.first + 1:,} to {phase.last:,}")
    if config.is_joint:
        learners = {role: grpo_learner(arm.turn, arm.model.arch, arms.mesh) for role, arm in arms.arms.items()}
        resting = {role: per_device((learner.shape, learner.frozen)) for role, learner in learners.items()}
        sizes = " or ".join(f"{size / GIB:.3f} GiB ({role})" for role, size in resting.items())
        say(
            "order is joint: beside the programs of one model stay the other's weights and moments, "
            f"{sizes} per device, its reference where there is a KL, and while one is sampled the other's copy for it"
        )
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
