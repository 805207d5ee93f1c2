"""The config of Rubric-ARM: a generator of rubrics and a judge that compares by them train each other in turns."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from patarm_jax.config.presets import IN_WORDS
from patarm_jax.config.sections import (
    FREE,
    PLACE,
    HeldoutSection,
    ModelSection,
    Natural,
    NotNegative,
    OptimizerSection,
    Positive,
    RewardSection,
    SamplingSection,
    Section,
    Share,
    UpdateSection,
)
from patarm_jax.config.training import ReinforcedConfig, RunConfig, SupervisedConfig
from patarm_jax.types import JudgeByRubrics, RubricMode, UsageError

Role = Literal["generator", "judge"]
ROLES: tuple[Role, Role] = ("generator", "judge")
OfAnArm = Literal["rubric", "rubric_judge", "checklist"]
Order = Literal["judge_first", "generator_first", "joint", "judge_only", "generator_only"]
# Who trains in a round, one after the other; jointly, step by step in turn.
TURNS: dict[Order, tuple[Role, ...]] = {
    "judge_first": ("judge", "generator"),
    "generator_first": ("generator", "judge"),
    "joint": ("judge", "generator"),
    "judge_only": ("judge",),
    "generator_only": ("generator",),
}


@dataclass(frozen=True)
class WarmupSection(Section):
    """Supervised fine-tuning of both models before the rounds, the generator first."""

    epochs: Natural = 1  # passes over the data; 0: both begin the rounds as they are
    steps: Natural = 0  # of each model; so many instead of whole epochs
    # As data.path, whose other settings hold here too; empty: data.path.
    path: str = field(default="", metadata=PLACE | FREE)
    pairs_per_step: Positive = 32  # each gives one prompt to the generator and two to the judge
    packing: bool = field(default=True, metadata=FREE)  # short sequences share a row; never changes the result
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)


@dataclass(frozen=True)
class GeneratorTrainingSection(Section):
    """How the generator is trained in its phase of a round: by what the judge, as it is, makes of its rubrics."""

    path: str = field(default="", metadata=PLACE | FREE)  # what it begins with; empty: model.path
    group_size: Positive = 6  # G, rubrics of a prompt, each of which is judged by once, greedily
    pairs_per_step: Positive = 48  # each gives one prompt
    steps: Natural = 0  # of each phase; 0: run.epochs passes over the round's pairs
    # What a rubric in form earns, beside 1 (by checklists ±1) where the judge by it prefers the chosen response; the
    # paper states none.
    format_reward: NotNegative = 0.0
    normalise_std: bool | None = None  # as reward.normalise_std; null: as update.algorithm has it
    sampling: SamplingSection = field(default_factory=lambda: SamplingSection(max_new_tokens=512))
    update: UpdateSection = field(default_factory=UpdateSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)


@dataclass(frozen=True)
class JudgeTrainingSection(Section):
    """How the judge is trained in its phase of a round, by rubrics that the generator writes beforehand."""

    path: str = field(default="", metadata=PLACE | FREE)  # what it begins with; empty: model.path
    # rubric_judge compares both responses by the rubric. checklist (RUBRIC-ARROW) says of one response which criteria
    # it meets, which counts by how likely the judge's words were; its reward is ±1 against the other response's mean.
    kind: JudgeByRubrics = "rubric_judge"
    group_size: Positive = 7  # G, judgements of a pair, in the one order in which it is shown; or of each response
    pairs_per_step: Positive = 32  # each gives one prompt, or one for each response
    steps: Natural = 0  # of each phase; 0: run.epochs passes over the round's pairs
    # What a judgement in form earns, beside 1 for preferring the chosen response, or ±1 of a checklist.
    format_reward: NotNegative = 1.0
    normalise_std: bool | None = None  # as reward.normalise_std; null: as update.algorithm has it
    # The share of criteria that are left out of the rubrics it is trained by, at random.
    rubric_dropout: Share = 0.0
    sampling: SamplingSection = field(default_factory=SamplingSection)
    update: UpdateSection = field(default_factory=UpdateSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)


@dataclass(frozen=True)
class WarmupConfig(SupervisedConfig):
    """The warm-up of one model."""

    judge: OfAnArm = "rubric"
    rubrics: RubricMode = "adaptive"

    @property
    def prompts_per_pair(self) -> int:
        """What the model reads of each pair: its prompt, or both responses, together in both orders or one by one."""
        return 1 if self.judge == "rubric" else 2

    beside: JudgeByRubrics = "rubric_judge"  # the kind of the judge, of whichever model this is

    @property
    def judged_by(self) -> JudgeByRubrics:
        """The kind of judge that the generator writes for."""
        return self.beside

    @property
    def settings_in(self) -> str:
        """Where its settings are."""
        return "warmup."

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        what = {"rubric": "rubrics", "rubric_judge": "judgements by rubrics", "checklist": "checklists by rubrics"}
        return f"supervised fine-tuning on {what[self.judge]}"


@dataclass(frozen=True)
class TurnConfig(ReinforcedConfig):
    """The phases of one model in the rounds."""

    judge: OfAnArm = "rubric"
    rubrics: RubricMode = "adaptive"
    beside: JudgeByRubrics = "rubric_judge"  # the kind of the judge, of whichever model this is
    format_reward: NotNegative = 0.0
    turns: str = ""  # the order of the whole, in words

    @property
    def prompts_per_pair(self) -> int:
        """What the model reads of each pair: its prompt, both responses in one order, or each by itself."""
        return 2 if self.judge == "checklist" else 1

    @property
    def judged_by(self) -> JudgeByRubrics:
        """The kind of judge that the generator writes for."""
        return self.beside

    @property
    def settings_in(self) -> str:
        """Where its settings are."""
        return "generator." if self.judge == "rubric" else "judge."

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        algorithm = IN_WORDS[self.update.algorithm]
        return f"Rubric-ARM: reinforcement learning ({algorithm}) of a rubric generator and a judge, {self.turns}"

    @property
    def taught_in_words(self) -> str:
        """How the form of what is sampled is taught."""
        return "in the warm-up (warmup.epochs, warmup.steps)"

    @property
    def reward_in_words(self) -> str:
        """What is rewarded, for the model card."""
        form = f", and {self.format_reward:g} for the form" if self.format_reward else ""
        if self.judge == "checklist":
            return f"±1 against the mean of the other response's checklists{form}; {self._each}"
        if self.judge == "rubric":
            won = "1" if self.beside == "rubric_judge" else "±1"
            return f"{won} where the judge, greedily, prefers the chosen response by the rubric{form}; {self._each}"
        return f"1 for preferring the chosen response{form}; {self._each}"

    @property
    def _each(self) -> str:
        what = {
            "rubric": "rubrics of each prompt",
            "rubric_judge": "judgements of each pair, in one order",
            "checklist": "checklists of each response",
        }
        return f"{self.group_size} {what[self.judge]}"


@dataclass(frozen=True)
class RubricArmConfig(RunConfig):
    """`patarm rubric-arm`: a generator of rubrics and a judge that compares by them, trained in turns."""

    recipe: Literal["rubric_arm"] = "rubric_arm"
    warmup: WarmupSection = field(default_factory=WarmupSection)
    generator: GeneratorTrainingSection = field(default_factory=GeneratorTrainingSection)
    judge: JudgeTrainingSection = field(default_factory=JudgeTrainingSection)
    # Who trains first in each round; judge_only and generator_only train one of the two and leave the other as the
    # warm-up has made it. joint: both stay on the devices and take turns step by step, on the same pairs; the judge
    # learns by rubrics that are written in the step itself.
    order: Order = "judge_first"
    rounds: Positive = 3  # each on a part of the pairs of its own
    # A model's optimizer where its next phase begins: anew, or as its last phase has left it, which rests on disk.
    optimizer_per_phase: Literal["fresh", "kept"] = "fresh"
    # Slices summed in one update, which never change the result; 0: the fewest that fit, found by compiling.
    micro_batches: Natural = field(default=1, metadata=FREE)

    def model_of(self, role: Role) -> ModelSection:
        """What a model begins with."""
        own = self.section_of(role).path
        return replace(self.model, path=own, adapter="") if own else self.model

    def form_of(self, role: Role) -> OfAnArm:
        """How a model is asked."""
        return self.judge.kind if role == "judge" else "rubric"

    def section_of(self, role: Role) -> GeneratorTrainingSection | JudgeTrainingSection:
        """How a model is trained in the rounds."""
        return self.judge if role == "judge" else self.generator

    @property
    def turns(self) -> tuple[Role, ...]:
        """Who trains in a round, one after the other."""
        return TURNS[self.order]

    @property
    def is_joint(self) -> bool:
        """Whether the models take turns step by step."""
        return self.order == "joint"

    @property
    def keeps_optimizers(self) -> bool:
        """Whether a model's optimizer goes on from phase to phase."""
        return self.optimizer_per_phase == "kept"

    @property
    def is_warmed_up(self) -> bool:
        """Whether the models are fine-tuned before the rounds."""
        return bool(self.warmup.steps or self.warmup.epochs)

    def warmup_of(self, role: Role) -> WarmupConfig:
        """The warm-up of one model, as a run of its own would be set."""
        section = self.warmup
        return WarmupConfig(
            **self._shared(role),
            optimizer=section.optimizer,
            pairs_per_step=section.pairs_per_step,
            packing=section.packing,
            judge=self.form_of(role),
            beside=self.judge.kind,
        )

    def turn_of(self, role: Role) -> TurnConfig:
        """The phases of one model in the rounds, as a run of its own would be set."""
        section = self.section_of(role)
        config = TurnConfig(
            **self._shared(role),
            optimizer=section.optimizer,
            pairs_per_step=section.pairs_per_step,
            sampling=section.sampling,
            reward=RewardSection(normalise_std=section.normalise_std),
            update=section.update,
            group_size=section.group_size,
            judge=self.form_of(role),
            beside=self.judge.kind,
            format_reward=section.format_reward,
            turns=f"{self.rounds} round{'s' * (self.rounds > 1)}, {self.order.replace('_', ' ')}",
        )
        return config.complete()

    def _shared(self, role: Role) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "model": self.model_of(role),
            "mesh": self.mesh,
            "data": self.data,
            "lora": self.lora,
            "run": self.run,
            "heldout": self.heldout,
            "micro_batches": self.micro_batches,
        }

    def check(self) -> None:
        """Refuses settings that are right one by one and together make no sense."""
        super().check()
        if self.data.given_rubrics:
            raise UsageError(
                "data.given_rubrics is true, and here the generator writes the rubrics; the column rubric is what its "
                "warm-up learns from in any case. Leave it out."
            )
        for role in ROLES:
            self._check_turn(role)
        if self.is_joint:
            self._check_joint()
        if self.run.steps:
            raise UsageError(
                f"run.steps is {self.run.steps}, and this run has phases. Set warmup.steps, generator.steps and "
                "judge.steps, or leave it out."
            )
        if self.lora.export == "adapter":
            raise UsageError(
                "lora.export is adapter, and each of the two models is loaded as a whole where the other one trains. "
                "Set lora.export to merged, or leave it out."
            )
        if self.heldout.best != HeldoutSection().best:
            raise UsageError(
                f"heldout.best is {self.heldout.best}, and two models that belong together have no best checkpoint "
                "each. Leave it out."
            )

    def _check_joint(self) -> None:
        for name in ("pairs_per_step", "steps"):
            of_judge, of_generator = (getattr(self.section_of(role), name) for role in ("judge", "generator"))
            if of_judge != of_generator:
                raise UsageError(
                    f"order is joint, in which both models learn from the same pairs in turn; judge.{name} is "
                    f"{of_judge} and generator.{name} {of_generator}. Set both to one number, or order to judge_first."
                )
        for role in ROLES:
            if self.section_of(role).update.algorithm == "dapo":
                raise UsageError(
                    f"order is joint and {role}.update.algorithm is dapo, which draws further pairs that the other "
                    "model would not see. Set another algorithm, or order to judge_first."
                )

    def _check_turn(self, role: Role) -> None:
        section = self.section_of(role)
        try:
            self.turn_of(role).check()
        except UsageError as error:
            raise UsageError(f"of the {role}: {error}") from None
        if section.group_size < 2:
            raise UsageError(
                f"{role}.group_size is {section.group_size}; allowed is 2 or more: what is compared with itself "
                "teaches nothing. Raise it."
            )
        if section.update.reference:
            raise UsageError(
                f"{role}.update.reference is {section.update.reference}, and a model's KL is measured from what it was "
                "when the rounds began. Leave it out."
            )
