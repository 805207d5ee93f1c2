"""The config of each verb: which sections it has, and what must hold between its settings."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from patarm_jax.config.presets import CHOSEN_BY_ALGORITHM, IN_WORDS, PRESETS, completed, value_at, with_values
from patarm_jax.config.sections import (
    FREE,
    PLACE,
    DataSection,
    EndpointSection,
    HeldoutSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    Natural,
    NotNegative,
    OptimizerSection,
    Positive,
    RewardSection,
    RunSection,
    SamplingSection,
    Section,
    Seed,
    UpdateSection,
    Votes,
)
from patarm_jax.types import BenchmarkName, JudgeKind, RubricMode, UsageError

Training = TypeVar("Training", bound="TrainConfig")


@dataclass(frozen=True)
class TrainConfig(Section):
    """What every training run has, whatever it trains."""

    recipe: str = ""
    # The model and the data are compared by what is in them when a run is resumed, not by their paths.
    model: ModelSection = field(default_factory=ModelSection, metadata=FREE)
    mesh: MeshSection = field(default_factory=MeshSection, metadata=FREE)
    data: DataSection = field(default_factory=DataSection, metadata=FREE)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection, metadata=FREE)
    heldout: HeldoutSection = field(default_factory=HeldoutSection, metadata=FREE)
    rubrics: RubricMode = "adaptive"  # the rubrics that the judge's prompt holds, or asks for
    pairs_per_step: Positive = 32  # each gives two prompts, the chosen response's and the rejected one's
    micro_batches: Positive = field(default=1, metadata=FREE)  # slices summed in one update; never changes the result

    def complete(self: Training) -> Training:
        """With what other settings decide for those that are unset."""
        return self

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        return self.recipe

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates in a step."""
        return 1

    @property
    def rollout_sampling(self) -> SamplingSection | None:
        """How training draws judgements; None where it draws none."""
        return None

    @property
    def kl_reference(self) -> str | None:
        """The model folder that the KL is measured from; None where there is no KL."""
        return None

    @property
    def reward_in_words(self) -> str:
        """What is rewarded, for the model card; empty where nothing is."""
        return ""


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """`patarm sft`: supervised fine-tuning on judgements."""

    recipe: Literal["sft"] = "sft"
    packing: bool = field(default=True, metadata=FREE)  # short sequences share a row; never changes the result

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        return "supervised fine-tuning on judgements"


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """`patarm grpo`: reinforcement learning on preference pairs."""

    recipe: Literal["grpo"] = "grpo"
    sampling: SamplingSection = field(default_factory=SamplingSection)
    reward: RewardSection = field(default_factory=RewardSection)
    update: UpdateSection = field(default_factory=UpdateSection)
    group_size: Positive = 8  # G, judgements of each response

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        algorithm = IN_WORDS[self.update.algorithm]
        return f"reinforcement learning ({algorithm}) on preference pairs with Preference-Aware Reward"

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates in a step."""
        return self.update.updates_per_rollout

    @property
    def rollout_sampling(self) -> SamplingSection:
        """How training draws judgements."""
        return self.sampling

    @property
    def kl_reference(self) -> str | None:
        """The model folder that the KL is measured from; None where there is no KL."""
        return self.update.reference or self.model.path if self.charges_kl else None

    @property
    def algorithm_settings(self) -> dict[str, Any]:
        """What the algorithm uses by dotted name: what is set, and its own value for what is not."""
        return completed(self.update.algorithm, {name: value_at(self, name) for name in CHOSEN_BY_ALGORITHM})

    @property
    def charges_kl(self) -> bool:
        """Whether a KL to the reference is charged at all."""
        return bool(self.algorithm_settings["update.kl.coef"])

    @property
    def reference_model(self) -> ModelSection:
        """Where the KL's reference comes from: the weights that training starts from, unless others are named."""
        if not self.update.reference:
            return self.model
        return replace(self.model, path=self.update.reference, weights="load")

    @property
    def reward_in_words(self) -> str:
        """What is rewarded, for the model card."""
        return f"PAR with the {self.reward.margin} margin, {self.group_size} judgements of each response"

    def complete(self) -> "GRPOConfig":
        """With the algorithm's own values for what is unset.

        Raises:
            UsageError: when something is said of a KL that is not charged.
        """
        settings = self.algorithm_settings
        own = PRESETS[self.update.algorithm]
        said = [name for name in settings if name.startswith("update.kl.") and settings[name] != own[name]]
        said = [name for name in said if name != "update.kl.coef"] + ["update.reference"] * bool(self.update.reference)
        if said and not self.charges_kl:
            raise UsageError(
                f"{said[0]} is {value_at(self, said[0])}, and update.kl.coef is 0, which it is with "
                f"{self.update.algorithm} unless it is set: no KL is charged. Set update.kl.coef, or leave it out."
            )
        return with_values(self, settings)

    def check(self) -> None:
        """Refuses settings that are right one by one and together make no sense."""
        settings = self.algorithm_settings
        if self.group_size == 1 and settings.get("reward.group_by") == "response":
            raise UsageError(
                "group_size is 1 where reward.group_by is response; allowed is 2 or more: a judgement that is "
                "compared with itself teaches nothing. Raise group_size."
            )
        if settings.get("update.kl.by_ratio") and settings["update.kl.place"] != "loss":
            raise UsageError(
                "update.kl.by_ratio is true, and update.kl.place is reward; only a KL in the loss has ratios. Set "
                "update.kl.place to loss, or leave by_ratio out."
            )
        if self.update.importance_cap is not None and self.update.old_logprobs != "trainer":
            raise UsageError(
                f"update.importance_cap is {self.update.importance_cap}, and update.old_logprobs is sampler: the "
                "sampler's own log-probs make every weight 1. Set update.old_logprobs to trainer, or leave the cap out."
            )
        for always_the_same, got, allowed in (
            (self.sampling.temperature == 0, "temperature is 0", "above 0, such as 1"),
            (self.sampling.top_k == 1, "top_k is 1", "0, for all, or 2 or more"),
        ):
            if always_the_same:
                raise UsageError(
                    f"sampling.{got}; allowed for grpo is {allowed}: judgements of a response that are all the same "
                    "teach nothing when they are compared."
                )


@dataclass(frozen=True)
class JudgeConfig(Section):
    """`patarm judge`: scoring the pairs of a file; MODEL, --input and --output come beside these settings."""

    model: ModelSection = field(default_factory=ModelSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=DataSection)
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    rubrics: RubricMode = "adaptive"  # the rubrics that the judge's prompt holds, or asks for
    output: str = field(default="", metadata=PLACE)  # the same as --output
    votes: Votes = 1  # judgements of each response; their mean is the score
    seed: Seed = 0  # random seed for sampling


@dataclass(frozen=True)
class EvalConfig(Section):
    """`patarm eval`: an evaluation; BENCHMARK, --model, --data and --output come beside these settings."""

    benchmark: BenchmarkName = "rewardbench"  # the same as BENCHMARK
    judge: JudgeKind = "pointwise"  # how the judge is asked
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=lambda: DataSection(split="", max_prompt_tokens=16384))
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    rubrics: RubricMode = "adaptive"  # the rubrics that the judge's prompt holds, or asks for
    output: str = field(default="", metadata=PLACE)  # the same as --output
    name: str = ""  # the judge's name in results, such as org/judge-8b; empty: its folder's, or the server's
    votes: Votes = 1  # answers to each question
    limit: Natural = 0  # about so many items, spread over the subsets; 0: all
    seed: Seed = 0  # random seed for sampling, for the votes drawn and for p-values
    # The folder of another evaluation of the same items, to compare with.
    against: str = field(default="", metadata=PLACE)


@dataclass(frozen=True)
class BenchConfig(Section):
    """`patarm bench`: what is measured, on random weights and made-up tokens."""

    model: Literal["tiny", "small", "0.6b", "1.7b", "4b", "8b", "14b"] = "tiny"  # the network's size
    dtype: Literal["float32", "bfloat16"] = "float32"  # numbers of the computation
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass recomputes
    attention: Literal["auto", "portable", "cudnn", "pallas", "splash"] = "auto"  # the kernel that computes attention
    mesh: MeshSection = field(default_factory=MeshSection)
    rows: Positive = 8  # rows of tasks sft and attention
    length: Positive = 512  # tokens of each row
    packing: bool = False  # sft by the program for packed rows, though each row holds one sequence
    responses: Positive = 4  # prompts of tasks sample, logprobs and grpo, each completed by a group
    prompt: Positive = 1024  # tokens of each prompt
    group: Positive = 8  # G, completions of a prompt
    new: Positive = 256  # tokens of a completion at most
    mean_new: NotNegative = 0  # mean of their lengths, before the longest are cut off; 0: all of `new`
    decode_rows: Natural = 0  # completions written at a time; 0: all
    halvings: Natural = 3  # how often those rows may be halved when no completion waits any more
    kl_coef: NotNegative = 0.0  # above 0: the reference's log-probs are computed too
    micro_batches: Positive = 1  # slices summed in one update
    repeats: Positive = 5  # timed runs of each task
    seed: Seed = 0  # random seed for weights and tokens
