"""What the configs of recipes that train are made of: what every run has, what trains weights, what reinforces them."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from patarm_jax.config.presets import CHOSEN_BY_ALGORITHM, PRESETS, completed, value_at, with_values
from patarm_jax.config.sections import (
    FREE,
    TARGETS,
    DAPOSection,
    DataSection,
    HeldoutSection,
    LoRASection,
    MeshSection,
    ModelSection,
    Natural,
    OptimizerSection,
    Positive,
    RewardSection,
    RunSection,
    SamplingSection,
    Section,
    UpdateSection,
)
from patarm_jax.types import JudgeByRubrics, ModelKind, RubricMode, UsageError

Training = TypeVar("Training", bound="TrainConfig")
Reinforced = TypeVar("Reinforced", bound="ReinforcedConfig")


@dataclass(frozen=True)
class RunConfig(Section):
    """What every run has that leaves models: where from, where, on which data, and the folder that it writes."""

    recipe: str = ""
    # The model and the data are compared by what is in them when a run is resumed, not by their paths.
    model: ModelSection = field(default_factory=ModelSection, metadata=FREE)
    mesh: MeshSection = field(default_factory=MeshSection, metadata=FREE)
    data: DataSection = field(default_factory=DataSection, metadata=FREE)
    lora: LoRASection = field(default_factory=LoRASection)
    run: RunSection = field(default_factory=RunSection, metadata=FREE)
    heldout: HeldoutSection = field(default_factory=HeldoutSection, metadata=FREE)

    def check(self) -> None:
        """Refuses settings of adapters that are not there, and adapters that would belong to no model on disk."""
        lora, unset = self.lora, LoRASection()
        for name in ("alpha", "targets", "export"):
            if not lora.rank and getattr(lora, name) != getattr(unset, name):
                raise UsageError(
                    f"lora.{name} is set, and lora.rank is 0: all weights are trained. Set lora.rank, such as 32, or "
                    "leave it out."
                )
        if not lora.targets or len(set(lora.targets)) < len(lora.targets):
            raise UsageError(
                f"lora.targets is {list(lora.targets)}; allowed is one or more of {', '.join(TARGETS)}, each once."
            )
        beside = "random" if self.model.weights == "random" else self.model.adapter and "changed by model.adapter"
        if lora.export == "adapter" and beside:
            raise UsageError(
                f"lora.export is adapter, and the weights beside them are {beside}: no folder holds what the adapters "
                "would belong to. Set lora.export to merged."
            )

    @property
    def kl_reference(self) -> str | None:
        """The model folder that the KL is measured from; None where there is no KL, or where that is not set."""
        return None


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What every run has that trains one model by steps, or what each phase of a run is."""

    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    pairs_per_step: Positive = 32  # each gives a prompt for each response; of a pairwise judge, for each order
    # Slices summed in one update, which never change the result; 0: the fewest that fit, found by compiling.
    micro_batches: Natural = field(default=1, metadata=FREE)

    def complete(self: Training) -> Training:
        """With what other settings decide for those that are unset."""
        return self

    @property
    def judge(self) -> ModelKind:
        """How the trained model is asked."""
        raise NotImplementedError

    @property
    def rubrics(self) -> RubricMode:
        """The rubrics that its prompts hold, or ask for."""
        raise NotImplementedError

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        return self.recipe

    @property
    def best_metric(self) -> str:
        """The metric of held-out pairs that selects the best checkpoint."""
        return f"eval/{self.heldout.best}"

    @property
    def samples_heldout(self) -> bool:
        """Whether held-out pairs are measured by what the model writes about them."""
        return True

    @property
    def prompts_per_pair(self) -> int:
        """What the model reads of each pair."""
        return 2

    @property
    def alternates(self) -> bool:
        """Whether each pair comes with one of its two questions, and with the other one in the next epoch."""
        return False

    @property
    def units_per_step(self) -> int:
        """What a batch has along its first axis, which slices and devices share and never cut."""
        return self.prompts_per_pair * self.pairs_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates in a step."""
        return 1

    @property
    def rollout_sampling(self) -> SamplingSection | None:
        """How training draws judgements; None where it draws none."""
        return None

    @property
    def reward_in_words(self) -> str:
        """What is rewarded, for the model card; empty where nothing is."""
        return ""

    @property
    def settings_in(self) -> str:
        """What the names of its settings begin with, where a run has them for each of its models."""
        return ""

    @property
    def judged_by(self) -> JudgeByRubrics:
        """The kind of judge that a generator of rubrics writes for."""
        return "rubric_judge"

    @property
    def taught_in_words(self) -> str:
        """How the form of what is sampled is taught, for what is said of a run in which nothing can be read."""
        return "with `patarm sft`"


@dataclass(frozen=True)
class SupervisedConfig(TrainConfig):
    """What every run has that learns to write what is given."""

    packing: bool = field(default=True, metadata=FREE)  # short sequences share a row; never changes the result

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        return "supervised fine-tuning on judgements"


@dataclass(frozen=True)
class ReinforcedConfig(TrainConfig):
    """What every run has that samples from the model it trains, and learns from what the samples earn."""

    sampling: SamplingSection = field(default_factory=SamplingSection)
    reward: RewardSection = field(default_factory=RewardSection)
    update: UpdateSection = field(default_factory=UpdateSection)
    dapo: DAPOSection = field(default_factory=DAPOSection)
    group_size: Positive = 8  # G, judgements of each response; of a pairwise judge, of each pair

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates in a step."""
        return self.update.updates_per_rollout

    @property
    def rollout_sampling(self) -> SamplingSection:
        """How training draws what it learns from."""
        return self.sampling

    @property
    def reward_name(self) -> str:
        """What is rewarded, in the names of metrics."""
        return "accuracy"

    @property
    def algorithm_settings(self) -> dict[str, Any]:
        """What the algorithm uses by dotted name: what is set, and its own value for what is not."""
        own = dict(PRESETS[self.update.algorithm])
        if "reward.group_by" in own:
            own["reward.group_by"] = self.own_group
        if "dapo.overlong_buffer" in own:
            own["dapo.overlong_buffer"] = self.sampling.max_new_tokens // 5
        given = {name: value_at(self, name) for name in CHOSEN_BY_ALGORITHM}
        return completed("update.algorithm", self.update.algorithm, own, given)

    @property
    def own_group(self) -> str:
        """What advantages compare where reward.group_by is not set."""
        return "response"

    @property
    def rollouts_per_prompt(self) -> int:
        """Samples of each prompt."""
        return self.group_size

    @property
    def prompts_per_group(self) -> int:
        """So many consecutive prompts make one group of samples that are compared; 1 where none are."""
        return self.prompts_per_pair if self.algorithm_settings.get("reward.group_by") == "pair" else 1

    @property
    def charges_kl(self) -> bool:
        """Whether a KL to the reference is charged at all."""
        return bool(self.algorithm_settings["update.kl.coef"])

    @property
    def kl_reference(self) -> str | None:
        """The model folder that the KL is measured from; None where there is no KL."""
        return self.update.reference or self.model.path if self.charges_kl else None

    @property
    def reference_model(self) -> ModelSection:
        """Where the KL's reference comes from: the weights that training starts from, unless others are named."""
        if not self.update.reference:
            return self.model
        return replace(self.model, path=self.update.reference, adapter="", weights="load")

    def complete(self: Reinforced) -> Reinforced:
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
        super().check()
        settings = self.algorithm_settings
        if (settings.get("dapo.overlong_buffer") or 0) > self.sampling.max_new_tokens:
            raise UsageError(
                f"dapo.overlong_buffer is {self.dapo.overlong_buffer}; allowed is 0 to sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens}. Lower it."
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
        refuse_equal_samples(self.sampling, "sampling", self.recipe)


def refuse_equal_samples(sampling: SamplingSection, where: str, recipe: str) -> None:
    """Refuses settings by which all samples of a prompt are one.

    Args:
        sampling: how they are drawn.
        where: the section of the settings that says so.
        recipe: what compares them.
    """
    for always_the_same, got, allowed in (
        (sampling.temperature == 0, "temperature is 0", "above 0, such as 1"),
        (sampling.top_k == 1, "top_k is 1", "0, for all, or 2 or more"),
    ):
        if always_the_same:
            raise UsageError(
                f"{where}.{got}; allowed for {recipe} is {allowed}: samples of a prompt that are all the same teach "
                "nothing when they are compared."
            )
