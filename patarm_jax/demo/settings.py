"""Every number of the demo: how much of everything, the network's shape, and the configs of its runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from patarm_jax.config.policy import DPOConfig, OnPolicySection, PolicyConfig, ResponseRewardSection, SourceSection
from patarm_jax.config.recipes import EvalConfig, GRPOConfig, JudgeConfig, SFTConfig
from patarm_jax.config.rubric_arm import (
    GeneratorTrainingSection,
    JudgeTrainingSection,
    RubricArmConfig,
    WarmupSection,
)
from patarm_jax.config.sections import (
    DataSection,
    GeneratorSection,
    HeldoutSection,
    JudgingSection,
    KLSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    SamplingSection,
    UpdateSection,
)
from patarm_jax.model.architecture import Architecture

System = Literal["pointwise", "pairwise"]  # a judge that learns by itself


@dataclass(frozen=True)
class DemoSizes:
    """How much of everything."""

    train_pairs: int = 6000  # SFT passes over them twice, GRPO sees a sixth of them
    heldout_pairs: int = 500  # a 95 % interval of ± 4 points at 70 %, ± 2 at 95 %
    teacher_accuracy: float = 0.7  # how often one judgement is right; an exact imitation has 70 % of the pairs right
    sft_steps: int = 800  # the form is learnt after 200, what is asked and given after 400, sums last
    grpo_steps: int = 60  # nine tenths of the gain come in the first 20

    @classmethod
    def of(cls, system: System) -> "DemoSizes":
        """Of a whole demo. A judge that compares learns its teacher's errors by heart in a second pass over pairs."""
        return cls() if system == "pointwise" else cls(train_pairs=8000, sft_steps=500, grpo_steps=50)

    @classmethod
    def short(cls) -> "DemoSizes":
        """Enough to see that everything runs, and too little to learn anything."""
        return cls(train_pairs=100, heldout_pairs=100, sft_steps=4, grpo_steps=2)


@dataclass(frozen=True)
class ArmSizes:
    """How much of everything, where a generator and a judge are trained."""

    train_pairs: int = 6000
    heldout_pairs: int = 480
    warmup_steps: int = 800  # of each model
    turn_steps: int = 30  # of each phase
    rounds: int = 2

    @classmethod
    def short(cls) -> "ArmSizes":
        """Enough to see that everything runs."""
        return cls(train_pairs=96, heldout_pairs=96, warmup_steps=3, turn_steps=1)


@dataclass(frozen=True)
class PolicySizes:
    """How much of everything, where a policy is trained by a judge."""

    judge: DemoSizes = DemoSizes()
    right: float = 0.7  # how often the responses that the policy imitates are right
    # The world's sentences are learnt after 200. After 400 some say nothing clear, which the judge has never read and
    # takes for right: its score then climbs while what is right falls.
    sft_steps: int = 800
    policy_steps: int = 60
    dpo_steps: int = 100
    max_failed: float = 0.5  # of a step's responses

    @classmethod
    def short(cls) -> "PolicySizes":
        """Enough to see that everything runs, with a judge that nobody could read."""
        return cls(judge=DemoSizes.short(), sft_steps=4, policy_steps=2, dpo_steps=2, max_failed=1.0)


def model_shape(vocab_size: int) -> Architecture:
    """A Qwen3 of 440,000 parameters."""
    return Architecture(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,  # to read what is asked, to read what is given, to compare
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=10_000.0,  # sequences are a hundred tokens long
        tie_word_embeddings=True,  # the words that are read are those that are written
        max_position_embeddings=4096,
        initializer_range=0.05,
    )


def demo_configs(
    folder: Path, seed: int, sizes: DemoSizes, system: System = "pointwise"
) -> tuple[SFTConfig, GRPOConfig]:
    """The two runs, in folder/sft and folder/grpo; the second begins with the judge that the first has made."""
    data = DataSection(path=str(folder / "data" / "train.jsonl"))
    sft = SFTConfig(
        model=model_section(folder / "model"),
        data=data,
        optimizer=OptimizerSection(
            learning_rate=3e-3,  # a small network from scratch: a thousand times what an 8B judge is given
            warmup_steps=20,
            decay="cosine",
            final_fraction=0.1,
            beta2=0.99,  # the average of 100 steps; that of 1,000 would never be reached
        ),
        run=RunSection(folder=str(folder / "sft"), seed=seed, steps=sizes.sft_steps, checkpoint_every=200),
        judge=system,
        pairs_per_step=16,
    )
    grpo = GRPOConfig(
        model=model_section(folder / "sft"),
        data=data,
        optimizer=OptimizerSection(
            # A sixth of SFT's. A choice hangs on one token: at this rate it would swing between A and B.
            learning_rate=5e-4 if system == "pointwise" else 2.5e-4,
            warmup_steps=5,
            decay="linear",  # at a constant rate the accuracy swings by some points at the end
            beta2=0.99,
        ),
        run=RunSection(folder=str(folder / "grpo"), seed=seed, steps=sizes.grpo_steps, checkpoint_every=20),
        judge=system,
        sampling=_sampling(),
        # Without it, the first ten steps spoil one judgement in ten: what earns nothing drifts at this learning rate.
        update=UpdateSection(kl=KLSection(coef=0.02)),
        pairs_per_step=16 if system == "pointwise" else 32,  # equally many judgements: of a pair 16, or 8
        group_size=8,
    )
    return sft, grpo


def policy_sft_config(folder: Path, seed: int, sizes: PolicySizes) -> SFTConfig:
    """The policy's first run, in folder/policy-sft."""
    return SFTConfig(
        model=model_section(folder / "policy"),
        data=DataSection(path=str(folder / "data" / "responses.jsonl")),
        optimizer=OptimizerSection(learning_rate=3e-3, warmup_steps=20, decay="cosine", final_fraction=0.1, beta2=0.99),
        run=RunSection(folder=str(folder / "policy-sft"), seed=seed, steps=sizes.sft_steps, checkpoint_every=200),
        judge="policy_unthinking",
        pairs_per_step=32,
    )


def policy_config(folder: Path, seed: int, sizes: PolicySizes, judge: Path) -> PolicyConfig:
    """The policy's second run, in folder/policy-grpo: a judge is its reward, and the world measures it."""
    world = "patarm_jax.demo.policy_world"
    return PolicyConfig(
        model=model_section(folder / "policy-sft"),
        data=DataSection(path=str(folder / "data" / "train.jsonl")),
        optimizer=OptimizerSection(learning_rate=3e-4, warmup_steps=5, decay="linear", beta2=0.99),
        run=RunSection(folder=str(folder / "policy-grpo"), seed=seed, steps=sizes.policy_steps, checkpoint_every=20),
        heldout=HeldoutSection(path=str(folder / "data" / "heldout.jsonl"), split="", eval_every=10, limit=200),
        sampling=SamplingSection(max_new_tokens=48),
        reward=ResponseRewardSection(
            sources=(SourceSection(model=str(judge), sampling=_judging()),), max_failed=sizes.max_failed
        ),
        gold=(
            SourceSection(kind="function", function=f"{world}:is_right", name="right"),
            SourceSection(kind="function", function=f"{world}:closes", name="closing"),
        ),
        update=UpdateSection(kl=KLSection(coef=0.1)),  # where the judge has read, it is hard to fool
        thinking=False,
        pairs_per_step=16,
        group_size=8,
    )


def dpo_config(folder: Path, run: Path, seed: int, sizes: PolicySizes, sft_coef: float) -> DPOConfig:
    """DPO of the policy on the demo's pairs, instead of its second run."""
    return DPOConfig(
        model=model_section(folder / "policy-sft"),
        data=DataSection(path=str(folder / "data" / "train.jsonl")),
        optimizer=OptimizerSection(learning_rate=3e-4, warmup_steps=5, decay="linear", beta2=0.99),
        run=RunSection(folder=str(run), seed=seed, steps=sizes.dpo_steps, checkpoint_every=100),
        sft_coef=sft_coef,
        thinking=False,
        pairs_per_step=32,
    )


def own_pairs_config(folder: Path, run: Path, seed: int, sizes: PolicySizes) -> DPOConfig:
    """The same in two rounds, on pairs that the demo's judge makes of the policy's own responses to the prompts."""
    source = SourceSection(model=str(folder / "grpo"), sampling=_judging())
    sampling = SamplingSection(max_new_tokens=48)
    own = OnPolicySection(sources=(source,), rounds=2, min_gap=1.0, sampling=sampling, max_failed=sizes.max_failed)
    given = dpo_config(folder, run, seed, sizes, sft_coef=0.2)
    data = replace(given.data, path=str(folder / "data" / "prompts.jsonl"))
    return replace(given, on_policy=own, data=data, run=replace(given.run, steps=sizes.dpo_steps // own.rounds))


def judge_config(model: Path, pairs: Path, scores: Path, seed: int, config: SFTConfig) -> JudgeConfig:
    """Scores for a file of pairs, one judgement of each response."""
    return JudgeConfig(
        model=model_section(model),
        data=DataSection(path=str(pairs)),
        sampling=_judging(),
        rubrics=config.rubrics,
        output=str(scores),
        votes=1,
        seed=seed,
    )


def compare_config(model: Path, pairs: Path, folder: Path, seed: int, config: SFTConfig) -> EvalConfig:
    """Choices of the pairs of a file, one judgement in each order."""
    return EvalConfig(
        benchmark="pairs",
        judge="pairwise",
        model=model_section(model),
        data=DataSection(path=str(pairs), split=""),
        sampling=judge_config(model, pairs, folder, seed, config).sampling,
        rubrics=config.rubrics,
        output=str(folder),
        seed=seed,
    )


def model_section(path: Path) -> ModelSection:
    """Float32, for CPUs gain nothing by bfloat16; and nothing is recomputed, for memory is no concern."""
    return ModelSection(path=str(path), dtype="float32", remat="none")


def _judging() -> JudgingSection:
    """As GRPO draws."""
    return JudgingSection(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=48)


def _sampling() -> SamplingSection:
    """The judge's own distribution, by which all stages are compared too. A judgement has 37 tokens."""
    return SamplingSection(temperature=1.0, max_new_tokens=48)


def rubric_arm_config(folder: Path, seed: int, sizes: ArmSizes) -> RubricArmConfig:
    """The run of a generator and a judge, in folder/rubric-arm."""
    adam = OptimizerSection(learning_rate=3e-3, warmup_steps=20, decay="cosine", final_fraction=0.1, beta2=0.99)
    gentle = OptimizerSection(learning_rate=5e-4, warmup_steps=5, beta2=0.99)
    update = UpdateSection(clip_high=0.28, kl=KLSection(coef=0.02))
    return RubricArmConfig(
        model=model_section(folder / "model"),
        data=DataSection(path=str(folder / "data" / "train.jsonl")),
        run=RunSection(folder=str(folder / "rubric-arm"), seed=seed, checkpoint_every=100),
        warmup=WarmupSection(steps=sizes.warmup_steps, pairs_per_step=16, optimizer=adam),
        generator=GeneratorTrainingSection(
            group_size=6,
            pairs_per_step=32,
            steps=sizes.turn_steps,
            sampling=SamplingSection(max_new_tokens=24),  # a rubric has 12
            update=update,
            optimizer=gentle,
        ),
        judge=JudgeTrainingSection(
            group_size=7,
            pairs_per_step=16,
            steps=sizes.turn_steps,
            sampling=SamplingSection(max_new_tokens=88),  # a judgement has 71
            update=update,
            optimizer=gentle,
        ),
        rounds=sizes.rounds,
    )


def by_rubrics_config(judge: Path, generator: Path, pairs: Path, folder: Path, seed: int) -> EvalConfig:
    """Choices of the pairs of a file by a generator's rubrics, one judgement in each order."""
    return EvalConfig(
        benchmark="pairs",
        judge="rubric_judge",
        model=model_section(judge),
        generator=GeneratorSection(model=model_section(generator), max_new_tokens=24),
        data=DataSection(path=str(pairs), split=""),
        sampling=JudgingSection(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=88),  # as it is trained
        output=str(folder),
        seed=seed,
    )
