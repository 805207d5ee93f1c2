"""What a model of Rubric-ARM learns from in a phase of the rounds, and by what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeAlias

import jax

from patarm_jax.arrays import Params
from patarm_jax.config.rubric_arm import Role, TurnConfig
from patarm_jax.config.sections import SamplingSection
from patarm_jax.data.pipeline import EncodedPair, digest_of
from patarm_jax.data.ruled import place_of, without_some
from patarm_jax.evaluate.heldout import share_of
from patarm_jax.evaluate.heldout_rubrics import GeneratorOnHeldout, JudgeOnHeldout, rubric_metrics
from patarm_jax.recipes.arms import Arm, Arms, resting
from patarm_jax.recipes.programs import RolloutPrograms
from patarm_jax.recipes.reinforce import Sample
from patarm_jax.rollout.judging import Judge
from patarm_jax.rollout.rounds import Round, Written
from patarm_jax.rollout.rubrics import (
    FrozenJudge,
    WritingGenerator,
    make_verdict_rewards,
    sample_by_new_rubrics,
    sample_by_rubrics,
    sample_rubrics,
    write_rubrics,
)
from patarm_jax.run.folder import Evaluator
from patarm_jax.run.peers import agree, arrive, told
from patarm_jax.run.phases import Phase, Phases
from patarm_jax.run.process import say
from patarm_jax.run.rubrics import RUBRICS, RubricRow, keep_rubrics, kept_rubrics, sha256_of
from patarm_jax.types import Status

_Write: TypeAlias = Callable[[SamplingSection, Sequence[EncodedPair], jax.Array], list[Written]]
_BEFORE_STEPS = 2**32 - 3  # no step, from which the keys of its rollouts are folded


@dataclass(frozen=True)
class Turn:
    """A model in a phase of the rounds."""

    arms: Arms
    opened: Phases
    phase: Phase
    role: Role
    rollout: RolloutPrograms

    @property
    def arm(self) -> Arm:
        """The model."""
        return self.arms.arms[self.role]

    @property
    def config(self) -> TurnConfig:
        """How it is trained."""
        return self.arm.turn

    @property
    def part(self) -> list[EncodedPair]:
        """The pairs of its round, as the generator reads them, each to be shown to the judge in one order."""
        round_number, seed = self.phase.round, self.config.run.seed
        part = self.arms.parts[round_number - 1]
        return [replace(one, places=(place_of(seed, round_number, one.preference.id),)) for one in part]

    def ruled(self, record: EncodedPair, rubric: str) -> EncodedPair:
        """A pair as the judge reads it by a rubric: in the pair's order or, where it reads one response, each."""
        if self.arms.arms["judge"].form.responses == 1:
            return self.arms.ruled(record, rubric)
        place = place_of(self.config.run.seed, self.phase.round, record.preference.id)
        return self.arms.ruled(record, rubric).only(place)

    def taught_by(self, record: EncodedPair, rubric: str) -> EncodedPair:
        """A pair as the judge reads it while it learns: without some of the criteria, where the config says so."""
        config, pair = self.arms.config, record.preference.id
        return self.ruled(
            record, without_some(rubric, config.judge.rubric_dropout, config.run.seed, self.phase.round, pair)
        )


@dataclass(frozen=True)
class Lesson:
    """What a model learns from in a phase, and by what."""

    records: list[EncodedPair]
    asked: Judge  # the model itself, as it is sampled
    sample: Sample
    evaluation: Evaluator | None
    metrics: Callable[[Round], Mapping[str, float]]  # what else is logged of a step
    keep: Callable[[int, Round], None]  # writes down what belongs to a step beside its rollouts


def _nothing(_round: Round) -> Mapping[str, float]:
    return {}


def _keeps_nothing(_step: int, _round: Round) -> None:
    pass


def resting_weights(turn: Turn) -> Params:
    """The copy for sampling of the other model, as its last phase has left it."""
    other: Role = "judge" if turn.role == "generator" else "generator"
    return resting(turn.arms, other, turn.opened.before(turn.phase, other))[1]


def judges_lesson(turn: Turn, generator: Callable[[], Params]) -> Lesson:
    """Pairs by the rubrics that the generator writes for them before the phase begins; each in one order.

    Args:
        turn: of the judge.
        generator: its weights, which are asked for when the first rubric is to be written.
    """
    arms, number, seed, asked = turn.arms, turn.phase.round, turn.config.run.seed, _asked(turn)
    generator = cache(generator)  # which ends with this function: training needs the memory
    writer, write, part = arms.arms["generator"], _writer(arms, generator), arms.parts[turn.phase.round - 1]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _BEFORE_STEPS), number)
    rows = _rubrics(turn, f"round-{number}", part, lambda: write(writer.turn.sampling, part, key))
    rubrics = {row.prompt_id: _as_written(row) for row in rows}
    evaluation = None
    if (pairs := arms.heldout) is not None:
        name = f"heldout-{digest_of(pairs.records)[:8]}-round-{number}"
        kept = _rubrics(turn, name, pairs.records, lambda: write(writer.greedy, pairs.records, pairs.key))
        heldout = [_as_written(row) for row in kept]
        evaluation = JudgeOnHeldout(arms.config.heldout, pairs, lambda: heldout, turn.rollout.to_rollout)
    metrics = rubric_metrics(list(rubrics.values()), "rubrics")
    return Lesson(
        records=[turn.taught_by(record, row.text) for record, row in zip(part, rows, strict=True)],
        asked=asked,
        sample=partial(sample_by_rubrics, asked, make_verdict_rewards(turn.config), rubrics),
        evaluation=evaluation,
        metrics=lambda _: metrics,
        keep=_keeps_nothing,
    )


def judges_lesson_by_new_rubrics(turn: Turn, generator: Callable[[], Params]) -> Lesson:
    """Pairs by rubrics that the generator writes for them in the step itself; each in one order.

    Args:
        turn: of the judge.
        generator: its weights, as they are by then.
    """
    arms, pairs, asked = turn.arms, turn.arms.heldout, _asked(turn)
    writer = arms.arms["generator"]

    def ruled(record: EncodedPair, rubric: str) -> tuple[EncodedPair, str]:
        kept = arms.ruled(record, rubric).preference.rubric
        return turn.taught_by(record, kept), kept

    def keep(step: int, found: Round) -> None:
        rows = [_as_row(pair, one.shown, one.status) for pair, one in found.rubrics.items()]
        _keep(turn, f"step-{step}", rows)

    by = WritingGenerator(writer.asked(arms.mesh, writer.turn.sampling, 1), generator, ruled)
    evaluation = None
    if pairs is not None:
        evaluation = JudgeOnHeldout(
            arms.config.heldout, pairs, lambda: pairs.write(generator()), turn.rollout.to_rollout
        )
    return Lesson(
        records=turn.part,
        asked=asked,
        sample=partial(sample_by_new_rubrics, asked, make_verdict_rewards(turn.config), by),
        evaluation=evaluation,
        metrics=lambda found: rubric_metrics(list(found.rubrics.values()), "rubrics"),
        keep=keep,
    )


def generators_lesson(turn: Turn, judge: Callable[[], Params]) -> Lesson:
    """Prompts, and the judge that says what each rubric is worth: one greedy judgement of the pair, in one order.

    Args:
        turn: of the generator.
        judge: its weights.
    """
    arms, pairs, asked = turn.arms, turn.arms.heldout, _asked(turn)
    judging = arms.arms["judge"]
    by = FrozenJudge(judging.asked(arms.mesh, judging.greedy, 1), judge, turn.ruled)
    evaluation = None
    if pairs is not None:
        evaluation = GeneratorOnHeldout(arms.config.heldout, pairs, judge, turn.rollout.to_rollout)
    return Lesson(
        records=turn.part,
        asked=asked,
        sample=partial(sample_rubrics, asked, make_verdict_rewards(turn.config), by),
        evaluation=evaluation,
        metrics=_nothing,
        keep=_keeps_nothing,
    )


def _asked(turn: Turn) -> Judge:
    return turn.arm.asked(turn.arms.mesh, turn.config.sampling, turn.config.group_size)


# ------------------------------------------------------------------------------------------------------------ rubrics


def _writer(arms: Arms, weights: Callable[[], Params]) -> _Write:
    """The generator, to write one rubric for each of some records."""

    def write(sampling: SamplingSection, records: Sequence[EncodedPair], key: jax.Array) -> list[Written]:
        generator = arms.arms["generator"].asked(arms.mesh, sampling, 1)
        return write_rubrics(generator, weights(), share_of(arms.mesh, records), key, len(records))

    return write


def _rubrics(
    turn: Turn,
    name: str,
    records: Sequence[EncodedPair],
    write: Callable[[], list[Written]],
) -> list[RubricRow]:
    """The rubrics of some pairs as they are kept, written where they are not there yet."""
    path = turn.opened.folder / RUBRICS / f"{name}.jsonl"
    rows: list[RubricRow] = []
    if told(f"whether {name} is kept", str(path.is_file())) == "True":
        rows = kept_rubrics(path, [record.preference.id for record in records])
    else:
        say(f"{name}: the generator writes {len(records):,} rubrics")
        shortened = 0
        for record, one in zip(records, write(), strict=True):
            text = turn.arms.ruled(record, one.shown).preference.rubric
            shortened += text != one.shown
            rows.append(_as_row(record.preference.id, text, one.status))
        if shortened:
            say(f"{name}: {shortened:,} rubrics are longer than data.max_prompt_tokens leaves, and lose their end")
        _keep(turn, name, rows)
    agree("the rubrics they judge by", {"rubrics": sha256_of("".join(row.sha256 for row in rows))})
    if blank := sum(not row.text for row in rows):
        say(f"{name}: {blank:,} of {len(rows):,} rubrics are empty; the judge is asked without one there")
    if malformed := sum(row.status != Status.OK.name for row in rows):
        say(f"{name}: {malformed:,} of {len(rows):,} rubrics are out of form")
    return rows


def _keep(turn: Turn, name: str, rows: Sequence[RubricRow]) -> None:
    path = turn.opened.folder / RUBRICS / f"{name}.jsonl"
    if jax.process_index() == 0:
        keep_rubrics(path, rows)
    arrive(f"keeping {path}")


def _as_row(pair: str, text: str, status: Status) -> RubricRow:
    return RubricRow(pair, text, sha256_of(text), status.name)


def _as_written(row: RubricRow) -> Written:
    return Written(row.text, Status[row.status])
