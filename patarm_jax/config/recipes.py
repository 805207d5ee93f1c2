"""The config of each verb: which sections it has, and what must hold between its settings."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from patarm_jax.config.flags import did_you_mean
from patarm_jax.config.presets import (
    CHOSEN_BY_MARGIN,
    IN_WORDS,
    MARGINS,
    completed,
    value_at,
    with_values,
)
from patarm_jax.config.sections import (
    FREE,
    PLACE,
    DataSection,
    EndpointSection,
    GeneratorSection,
    HeldoutSection,
    JudgementRewardSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    Natural,
    NotNegative,
    PairwiseSection,
    Positive,
    Section,
    Seed,
    Share,
    Votes,
)
from patarm_jax.config.training import ReinforcedConfig, SupervisedConfig, TrainConfig
from patarm_jax.types import (
    BY_RUBRICS,
    BenchmarkName,
    JudgeKind,
    RubricMode,
    UsageError,
)

OWN_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:name


@dataclass(frozen=True)
class JudgeTrainConfig(TrainConfig):
    """What every run has that trains a judge, which writes."""

    # What is trained: scores of one response, or choices of two; of sft also a policy, which answers, and may think
    # before or is policy_unthinking.
    judge: Literal["pointwise", "pairwise", "policy", "policy_unthinking"] = "pointwise"
    pairwise: PairwiseSection = field(default_factory=PairwiseSection)
    rubrics: RubricMode = "adaptive"  # the rubrics that the judge's prompt holds, or asks for

    def check(self) -> None:
        """Refuses settings that are right one by one and together make no sense."""
        super().check()
        _refuse_unread(self.rubrics, given=self.data.given_rubrics)
        if self.judge != "pairwise" and self.pairwise != PairwiseSection():
            reads = "policy reads no responses" if self.answers else "pointwise judge reads one response"
            raise UsageError(
                f"pairwise.orders is {self.pairwise.orders}, and a {reads}. Set judge to pairwise, or leave it out."
            )
        if self.answers and (self.rubrics != "adaptive" or self.data.given_rubrics):
            what = "data.given_rubrics" if self.data.given_rubrics else "rubrics"
            raise UsageError(f"{what} is set, and a policy reads none. Leave it out.")
        if self.answers and self.heldout.path:
            raise UsageError(
                f"heldout.path is set, and judge is {self.judge}: nothing says what a policy's responses are worth "
                "here. Leave it out, and measure the policy by `patarm policy` with heldout.path and gold."
            )
        if self.judge == "pairwise" and self.heldout.best == "score_gap":
            raise UsageError(
                "heldout.best is score_gap, and a pairwise judge gives no scores. Choose accuracy_strict, "
                "accuracy_half or valid."
            )

    @property
    def prompts_per_pair(self) -> int:
        """What a judge is asked about each pair: of both responses, or in both orders; of pairs in turns, once."""
        return 1 if self.alternates or self.answers else 2

    @property
    def answers(self) -> bool:
        """Whether a policy is trained, and no judge."""
        return self.judge in ("policy", "policy_unthinking")

    @property
    def alternates(self) -> bool:
        """Whether each pair comes with one of its two questions, and with the other one in the next epoch."""
        return self.judge == "pairwise" and self.pairwise.orders == "alternate"


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig, JudgeTrainConfig):
    """`patarm sft`: supervised fine-tuning on judgements."""

    recipe: Literal["sft"] = "sft"

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        return f"supervised fine-tuning on {'responses' if self.answers else 'judgements'}"

    def check(self) -> None:
        """Refuses to make up responses, where the form is not all there is to learn."""
        super().check()
        if self.answers and self.data.missing_judgements == "template":
            raise UsageError(
                "data.missing_judgements is template, and there is none of a response. Set it to drop, or leave it out."
            )


@dataclass(frozen=True)
class GRPOConfig(ReinforcedConfig, JudgeTrainConfig):
    """`patarm grpo`: reinforcement learning on preference pairs."""

    recipe: Literal["grpo"] = "grpo"
    reward: JudgementRewardSection = field(default_factory=JudgementRewardSection)

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        algorithm = IN_WORDS[self.update.algorithm]
        by = " with Preference-Aware Reward" if self.judge == "pointwise" and self.reward.kind == "par" else ""
        return f"reinforcement learning ({algorithm}) on preference pairs{by}"

    @property
    def own_group(self) -> str:
        """What advantages compare where reward.group_by is not set."""
        # Of a pairwise judge both orders: else always choosing the first is never wrong.
        return "pair" if self.judge == "pairwise" else "response"

    @property
    def margin_settings(self) -> dict[str, Any]:
        """What the margin uses by dotted name: what is set, and its own value for what is not."""
        name = self.reward.margin.name
        given = {name: value_at(self, name) for name in CHOSEN_BY_MARGIN}
        return completed("reward.margin.name", name, MARGINS.get(name, {}), given)

    @property
    def rollouts_per_prompt(self) -> int:
        """Judgements of each prompt: of a pairwise judge's two orders, half of the group."""
        return self.group_size // (2 if self.judge == "pairwise" and self.prompts_per_pair == 2 else 1)

    @property
    def reward_name(self) -> str:
        """What is rewarded, in the names of metrics."""
        return "accuracy" if self.judge == "pairwise" else self.reward.kind

    @property
    def reward_in_words(self) -> str:
        """What is rewarded, for the model card."""
        reward, each = self.reward, f"{self.group_size} judgements of each response"
        if self.judge == "pairwise":
            orders = "half of them in each order" if self.prompts_per_pair == 2 else "one order of each pair at a time"
            right, wrong = reward.accuracy.right, reward.accuracy.wrong
            return f"{right:g} for the right choice, {wrong:g} for the wrong; {self.group_size} judgements, {orders}"
        if reward.kind == "threshold":
            return f"1 for a score from 5 on of the chosen response, and below 5 of the rejected; {each}"
        if reward.kind == "labels":
            return f"nearness to labels of the scores; {each}"
        against = {"mean": "", "every": ", against every score of the other side", "one": ", against one drawn score"}
        loser = ", the wrong side minus it" if reward.loser == "minus" else ""
        return f"PAR with the {reward.margin.name} margin{against[reward.opponent]}{loser}, {each}"

    def complete(self) -> "GRPOConfig":
        """With the algorithm's and the margin's own values for what is unset."""
        rewarded_by_margin = self.judge == "pointwise" and self.reward.kind == "par"
        return with_values(super().complete(), self.margin_settings if rewarded_by_margin else {})

    def check(self) -> None:
        """Refuses settings that are right one by one and together make no sense."""
        if self.answers:
            raise UsageError(
                f"judge is {self.judge}, and grpo trains judges. `patarm policy` trains a policy; sft does so too, on "
                "responses."
            )
        super().check()
        self._check_reward()
        both_orders = self.judge == "pairwise" and self.prompts_per_pair == 2
        if both_orders and self.group_size % 2:
            raise UsageError(
                f"group_size is {self.group_size}; allowed is an even number where pairwise.orders is both: half of a "
                "pair's judgements are given in each order. Change one of the two."
            )
        group_by = self.algorithm_settings.get("reward.group_by")
        if group_by and self.rollouts_per_prompt * self.prompts_per_group == 1:
            raise UsageError(
                f"group_size is {self.group_size} where reward.group_by is {group_by}; allowed is "
                f"{4 if both_orders else 2} or more: a judgement that is compared with itself teaches nothing. Raise "
                "group_size."
            )

    def _check_reward(self) -> None:
        """Refuses an unknown margin, and settings of a reward that is not given."""
        reward, name = self.reward, self.reward.margin.name
        if name not in MARGINS and not OWN_FUNCTION.fullmatch(name):
            raise UsageError(
                f"reward.margin.name is {name!r}; allowed is {', '.join(MARGINS)}, or module:name for a function of "
                f"your own.{did_you_mean(name, list(MARGINS))}"
            )
        unset = JudgementRewardSection()
        unused: tuple[str, ...]
        if self.judge == "pairwise":
            unused, why = ("kind", "margin", "opponent", "loser"), "judge is pairwise: it gives choices and no scores"
        elif reward.kind == "par":
            unused, why = ("accuracy",), "judge is pointwise: it gives scores and no choices"
        else:
            unused = ("margin", "opponent", "loser", "accuracy")
            why = f"reward.kind is {reward.kind}, which does not use it"
        for each in unused:
            if getattr(reward, each) != getattr(unset, each):
                raise UsageError(f"reward.{each} is set, and {why}. Leave it out, or change that.")
        _ = self.margin_settings


@dataclass(frozen=True)
class RewardModelConfig(TrainConfig):
    """`patarm reward-model`: a reward model that gives a response a number and writes nothing, from the same pairs."""

    recipe: Literal["reward_model"] = "reward_model"
    # Where the number comes from. scalar: a head in place of the vocabulary's, by the loss of Bradley and Terry.
    # ordinal: the model's own probabilities of 0 to 10 as the score that it is asked for, of which it is the mean.
    head: Literal["scalar", "ordinal"] = "scalar"
    # Of a scalar head, as centring and packing: whether the column margin of the data is what a chosen response's
    # reward must exceed the rejected one's by.
    margins: bool = False
    # The weight of (chosen + rejected)^2 in the loss, which keeps rewards around 0; TRL recommends 0.01.
    centring: NotNegative = 0.0
    packing: bool = field(default=True, metadata=FREE)  # short pairs share a row; never changes the result

    @property
    def judge(self) -> JudgeKind:
        """How the trained model is asked."""
        return self.head

    @property
    def rubrics(self) -> RubricMode:
        """None are read: what the form of its question takes no notice of."""
        return "adaptive"

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        how = {"scalar": "Bradley-Terry", "ordinal": "ordinal"}[self.head]
        return f"{how} reward modelling on preference pairs"

    @property
    def samples_heldout(self) -> bool:
        """It writes nothing."""
        return False

    @property
    def units_per_step(self) -> int:
        """What a batch has along its first axis, which slices and devices share and never cut: whole pairs."""
        return self.pairs_per_step

    def check(self) -> None:
        """Refuses settings of what a model that writes nothing does not do."""
        super().check()
        if self.data.given_rubrics:
            raise UsageError("data.given_rubrics is true, and a reward model reads no rubric. Leave it out.")
        for name in ("margins", "centring"):
            if self.head == "ordinal" and getattr(self, name):
                raise UsageError(
                    f"{name} is set, and head is ordinal: its scores lie between 0 and 10, and only their order is "
                    "learnt. Leave it out, or set head to scalar."
                )
        same = "a reward model writes nothing: its score of a response is always the same"
        refuse_drawing_heldout(self.heldout, same)


def refuse_drawing_heldout(heldout: HeldoutSection, why: str) -> None:
    """Refuses settings of how held-out pairs are drawn, where nothing is."""
    unset = HeldoutSection()
    for name in ("votes", "sampling"):
        if getattr(heldout, name) != getattr(unset, name):
            raise UsageError(f"heldout.{name} is set, and {why}. Leave it out.")
    if heldout.best == "valid":
        raise UsageError(
            f"heldout.best is valid, and all that is measured here is, as {why}. Choose accuracy_strict, accuracy_half "
            "or score_gap."
        )


def _refuse_unread(rubrics: RubricMode, given: bool, generator: bool = False) -> None:
    """Refuses rubrics that come from elsewhere where a judge reads none but its own."""
    if rubrics == "generated" and (given or generator):
        what = "data.given_rubrics is true" if given else "settings of a generator are given"
        raise UsageError(
            f"{what}, and rubrics is generated, by which a judge reads none but its own. Leave one of the two out."
        )


@dataclass(frozen=True)
class AskingConfig(Section):
    """What is asked: a judge, here or behind an endpoint, and a generator of rubrics where it has one."""

    judge: JudgeKind = "pointwise"  # how the judge is asked
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    generator: GeneratorSection = field(default_factory=GeneratorSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=DataSection)
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    rubrics: RubricMode = "adaptive"  # the rubrics that the judge's prompt holds, or asks for
    output: str = field(default="", metadata=PLACE)  # the same as --output
    votes: Votes = 1  # answers to each question
    # Of a pointwise judge here: whether the score is the expectation over 0 to 10 by the judge's own probabilities
    # behind what it has written, at temperature 1, instead of the number that it drew: it varies less from judgement to
    # judgement.
    expected_score: bool = False
    seed: Seed = 0  # random seed for sampling

    @property
    def has_generator(self) -> bool:
        """Whether a generator writes rubrics."""
        return self.generator.is_named

    @property
    def generator_sampling(self) -> JudgingSection:
        """How rubrics are drawn."""
        return self.generator.greedy(self.sampling.rows, self.sampling.batch_invariant)

    @property
    def has_endpoint(self) -> bool:
        """Whether one of the models is behind an endpoint."""
        return bool(self.endpoint.url or self.generator.endpoint.url)

    def check(self) -> None:
        """Refuses expected scores where there are none, and a judge without the rubrics that it needs."""
        has_settings, given = self.generator != GeneratorSection(), self.data.given_rubrics
        if self.judge in BY_RUBRICS and not (self.has_generator or given):
            raise UsageError(
                f"judge is {self.judge}, and no model is named that writes the rubrics. Give --generator with its "
                "folder, or generator.endpoint.url."
            )
        if has_settings and given:
            raise UsageError(
                "a generator is given, and data.given_rubrics is true: each would write the rubrics. Leave one of the "
                "two out."
            )
        if (has_settings or given) and self.judge not in (*BY_RUBRICS, "pointwise", "pairwise"):
            what = "data.given_rubrics is true" if given else "a generator is given"
            raise UsageError(
                f"{what}, and a {self.judge} judge reads no rubric of one. Leave it out, or set judge to "
                "rubric_judge, checklist, pointwise or pairwise."
            )
        _refuse_unread(self.rubrics, given, has_settings)
        if has_settings and not self.has_generator:
            raise UsageError(
                "settings of a generator are given, and no generator. Give --generator with its folder, or "
                "generator.endpoint.url, or leave them out."
            )
        if self.expected_score and self.judge != "pointwise":
            raise UsageError(
                f"expected_score is set, and a {self.judge} judge writes no score from 0 to 10. Leave it out, or set "
                "judge to pointwise."
            )
        if self.expected_score and self.endpoint.url:
            raise UsageError(
                "expected_score is set, and a server does not say how likely whole scores are: 10 is two of Qwen3's "
                "tokens, and 1 begins 1, 1.5 and 10. Judge here, by the model's folder, or leave it out."
            )


@dataclass(frozen=True)
class JudgeConfig(AskingConfig):
    """`patarm judge`: judging the pairs of a file; MODEL, --input and --output come beside these settings."""


@dataclass(frozen=True)
class EvalConfig(AskingConfig):
    """`patarm eval`: an evaluation; BENCHMARK, --model, --data and --output come beside these settings."""

    data: DataSection = field(default_factory=lambda: DataSection(split="", max_prompt_tokens=16384))
    benchmark: BenchmarkName = "rewardbench"  # the same as BENCHMARK
    name: str = ""  # the judge's name in results, such as org/judge-8b; empty: its folder's, or the server's
    limit: Natural = 0  # about so many items, spread over the subsets; 0: all
    seed: Seed = 0  # random seed for sampling, for the votes drawn and for p-values
    # The folder of another evaluation of the same items, to compare with.
    against: str = field(default="", metadata=PLACE)

    def check(self) -> None:
        """Refuses rubrics in the data too, which benchmarks have not."""
        super().check()
        if self.data.given_rubrics:
            raise UsageError(
                "data.given_rubrics is true, and `patarm eval` reads no rubrics from its data. Give --generator, or "
                "judge the file with `patarm judge`, which does."
            )


@dataclass(frozen=True)
class RubricsConfig(Section):
    """`patarm rubrics`: a generator's rubrics for the prompts of a file; GENERATOR and --input come beside these."""

    generator: GeneratorSection = field(default_factory=GeneratorSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=DataSection)
    output: str = field(default="", metadata=PLACE)  # the same as --output
    rows: Natural = 256  # rubrics written at a time, as sampling.rows of a run
    batch_invariant: bool = False  # as sampling.batch_invariant of a run
    seed: Seed = 0  # random seed that a server is sent

    @property
    def generator_sampling(self) -> JudgingSection:
        """How rubrics are drawn."""
        return self.generator.greedy(self.rows, self.batch_invariant)

    @property
    def has_endpoint(self) -> bool:
        """Whether the generator is behind an endpoint."""
        return bool(self.generator.endpoint.url)

    def check(self) -> None:
        """Refuses two generators, and data that are to have rubrics before."""
        if self.data.given_rubrics:
            raise UsageError("data.given_rubrics is true, and these rubrics are still to be written. Leave it out.")


@dataclass(frozen=True)
class BenchConfig(Section):
    """`patarm bench`: what is measured, on random weights and made-up tokens."""

    model: Literal["tiny", "small", "0.6b", "1.7b", "4b", "8b", "14b"] = "tiny"  # the network's size
    dtype: Literal["float32", "bfloat16"] = "float32"  # numbers of the computation
    # What the backward pass recomputes: nothing, all but matmuls, all but attention, all.
    remat: Literal["none", "dots", "attention", "full"] = "full"
    attention: Literal["auto", "portable", "cudnn", "pallas", "splash"] = "auto"  # the kernel that computes attention
    mesh: MeshSection = field(default_factory=MeshSection)
    rows: Positive = 8  # rows of tasks sft and attention
    length: Positive = 512  # tokens of each row
    packing: bool = False  # sft by the program for packed rows, though each row holds one sequence
    responses: Positive = 4  # prompts of tasks sample, logprobs, grpo and policy, each completed by a group
    prompt: Positive = 1024  # tokens of each prompt
    alike: Natural = 0  # with how many of these all prompts begin alike
    group: Positive = 8  # G, completions of a prompt
    new: Positive = 256  # tokens of a completion at most
    question: Positive = 256  # of task policy: tokens that a judge of the same size reads beside prompt and response
    judgement: Positive = 256  # and tokens of its judgement at most
    mean_new: NotNegative = 0  # mean of these lengths, before the longest are cut off; 0: all as long as they may be
    # Above 0, where `new` is more, completions end after so many tokens at most: the same whatever `new` is.
    longest: Natural = 0
    decode_rows: Natural = 0  # completions written at a time; 0: all
    halvings: Natural = 3  # how often those rows may be halved when no completion waits any more
    batch_invariant: bool = False  # as sampling.batch_invariant of a run, of tasks sample, grpo and policy
    kl_coef: NotNegative = 0.0  # above 0: the reference's log-probs are computed too
    micro_batches: Positive = 1  # slices summed in one update
    filled: Share = 0.25  # with --compiled-for: how much of its limit each row that is decoded has written
    repeats: Positive = 5  # timed runs of each task
    seed: Seed = 0  # random seed for weights and tokens

    def check(self) -> None:
        """Refuses prompts that begin with more than they are, and rows of no fixed number where it must not change."""
        if self.alike > self.prompt:
            raise UsageError(f"alike is {self.alike}; allowed is at most prompt, which is {self.prompt}.")
        if self.batch_invariant and not self.decode_rows:
            raise UsageError(
                "batch_invariant is true and decode_rows is 0, so that each batch would have another shape. Give "
                "decode_rows a number, such as 16."
            )
