"""The configs of policies: trained by what others say of their responses, or on preferences."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from patarm_jax.config.presets import IN_WORDS
from patarm_jax.config.recipes import OWN_FUNCTION, refuse_drawing_heldout
from patarm_jax.config.sections import (
    FREE,
    AboveZero,
    EndpointSection,
    HeldoutSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    NotNegative,
    Number,
    Positive,
    RewardSection,
    RunSection,
    SamplingSection,
    Section,
    Share,
    Smoothing,
    Votes,
)
from patarm_jax.config.training import ReinforcedConfig, TrainConfig, refuse_equal_samples
from patarm_jax.types import PolicyKind, RubricMode, UsageError

_NAME = re.compile(r"\w[\w.-]*")
SourceKind = Literal["judge", "pairwise", "rubric_judge", "scalar", "ordinal", "function"]


@dataclass(frozen=True)
class SourceSection(Section):
    """One thing that says what a response is worth."""

    # judge: a pointwise judge's score from 0 to 10, or the mean of several votes. pairwise, rubric_judge: the share of
    # comparisons that a response wins, in both orders, against what the policy says when it takes the likeliest words
    # or, where pairs are made, against the other responses to its prompt. scalar, ordinal: a reward model's number.
    # function: a Python function of your own, called as TRL calls its reward functions.
    kind: SourceKind = "judge"
    name: str = ""  # in metrics and rollouts; empty: the kind, or the function's name
    weight: Number = 1.0  # by which it counts in the reward
    model: str = field(default="", metadata=FREE)  # the folder of the judge or reward model, or of the run that made it
    endpoint: EndpointSection = field(default_factory=EndpointSection)  # of a judge, in place of its folder
    function: str = ""  # module:name
    # Of a judge here: the folder of a generator, which writes one rubric for each prompt, to judge its whole group by,
    # in place of the primary ones or, of a rubric_judge, which needs it, as all there is.
    generator: str = field(default="", metadata=FREE)
    max_rubric_tokens: Positive = 512  # of what the generator writes
    rubrics: RubricMode = "adaptive"  # the rubrics that a judge's prompt holds, or asks for
    votes: Votes = 1  # judgements of each response
    expected_score: bool = False  # of a judge here, the expectation by its own probabilities, as of `patarm judge`
    # How a judge draws; what is unset, as its own generation_config.json says.
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    max_prompt_tokens: Positive = 4096  # of what a judge or reward model reads here; a longer one has no reward

    @property
    def called(self) -> str:
        """Its name in metrics."""
        return self.name or (self.function.rpartition(":")[2] if self.kind == "function" else self.kind)

    @property
    def is_judge(self) -> bool:
        """Whether a model writes judgements."""
        return self.kind in ("judge", "pairwise", "rubric_judge")

    @property
    def compares(self) -> bool:
        """Whether it compares with the policy's greedy response."""
        return self.kind in ("pairwise", "rubric_judge")


class AsksSources(Protocol):
    """A config by which sources say what a policy's responses are worth."""

    @property
    def model(self) -> ModelSection:
        """The policy, as which the models of sources compute."""

    @property
    def mesh(self) -> MeshSection:
        """The devices."""

    @property
    def run(self) -> RunSection:
        """The run, with its seed."""

    @property
    def every_source(self) -> Sequence[SourceSection]:
        """All of them, in order."""

    @property
    def prompts_at_once(self) -> int:
        """Prompts whose responses are sampled and judged together."""

    @property
    def rollouts_per_prompt(self) -> int:
        """Responses to each of them."""

    def place_of(self, number: int) -> str:
        """The settings of one of `every_source`."""

    def judged_per_prompt(self, source: SourceSection) -> int:
        """What a source is asked about a prompt: each response or, where it compares, each comparison in an order."""


_OF_JUDGES = ("endpoint", "generator", "max_rubric_tokens", "rubrics", "votes", "expected_score", "sampling")


@dataclass(frozen=True)
class ResponseRewardSection(RewardSection):
    """What a response earns, and how rewards become advantages."""

    sources: tuple[SourceSection, ...] = ()  # a list; their rewards are added up by their weights
    # sum: the weighted sum. gdpo: each source's rewards are first brought to mean 0 and deviation 1 in their group, so
    # that none drowns the others, and the sum to deviation 1 over the batch.
    combine: Literal["sum", "gdpo"] = "sum"
    # Whether sources see the thinking before an answer too. A response without an answer behind its thinking has no
    # reward.
    sees_thinking: bool = False
    # The share of a step's responses that may be without a reward though they have an answer, because something could
    # not be judged or did not come. When there are more, the run stops; of held-out ones nothing is then told.
    max_failed: Share = field(default=0.5, metadata=FREE)


@dataclass(frozen=True)
class PolicyConfig(ReinforcedConfig):
    """`patarm policy`: reinforcement learning of a policy, by judges, reward models and functions."""

    recipe: Literal["policy"] = "policy"
    reward: ResponseRewardSection = field(default_factory=ResponseRewardSection)
    # What tells, on the held-out prompts every heldout.eval_every steps, whether the reward is being fooled: sources
    # like those of the reward, which earn nothing; metrics gold/NAME.
    gold: tuple[SourceSection, ...] = ()
    thinking: bool = True  # whether the policy may think before it answers, as its chat template has it

    @property
    def judge(self) -> PolicyKind:
        """How the policy is asked."""
        return "policy" if self.thinking else "policy_unthinking"

    @property
    def every_source(self) -> tuple[SourceSection, ...]:
        """Those that reward, and behind them those that are gold."""
        return (*self.reward.sources, *self.gold)

    @property
    def compares(self) -> bool:
        """Whether a source compares with the policy's greedy response."""
        return any(source.compares for source in self.every_source)

    @property
    def prompts_at_once(self) -> int:
        """Those of a step."""
        return self.pairs_per_step

    def judged_per_prompt(self, source: SourceSection) -> int:
        """What a source is asked about a prompt: each response, or in both orders beside the greedy one."""
        return self.group_size * (2 if source.compares else 1)

    def place_of(self, number: int) -> str:
        """The settings of one of `every_source`."""
        rewarding = len(self.reward.sources)
        return f"reward.sources.{number}" if number < rewarding else f"gold.{number - rewarding}"

    @property
    def best_metric(self) -> str:
        """The first gold measure where there is one: the reward alone may be fooled."""
        return f"gold/{self.gold[0].called}/mean" if self.gold else "eval/reward"

    @property
    def rubrics(self) -> RubricMode:
        """The policy reads none."""
        return "adaptive"

    @property
    def prompts_per_pair(self) -> int:
        """A prompt stands for itself."""
        return 1

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        return f"reinforcement learning ({IN_WORDS[self.update.algorithm]}) from the rewards of its responses"

    @property
    def algorithm_settings(self) -> dict[str, Any]:
        """What the algorithm uses; GDPO's rewards are divided by deviations already."""
        settings = super().algorithm_settings
        if self.reward.combine == "gdpo" and "reward.normalise_std" in settings:
            settings["reward.normalise_std"] = False
        return settings

    @property
    def reward_name(self) -> str:
        """What is rewarded, in the names of metrics."""
        return "responses"

    @property
    def reward_in_words(self) -> str:
        """What is rewarded, for the model card."""
        each = ", ".join(
            f"{source.weight:g} × {source.called}" if source.weight != 1 else source.called
            for source in self.reward.sources
        )
        how = ", normalised one by one (GDPO)" if self.reward.combine == "gdpo" else ""
        return f"{each}{how}; {self.group_size} responses to each prompt"

    def check(self) -> None:
        """Refuses settings that are right one by one and together make no sense."""
        super().check()
        sources = self.reward.sources
        if not sources:
            raise UsageError(
                "reward.sources is empty: nothing says what a response is worth. Give a list of one or more, such as "
                "`sources: [{kind: judge, model: runs/judge}]`."
            )
        _check_sources(self)
        if self.heldout.best != HeldoutSection().best:
            raise UsageError(
                f"heldout.best is {self.heldout.best}, which is of judges. A policy's best checkpoint is the one with "
                "the highest first gold measure, or without one the highest reward on the held-out prompts. Leave it "
                "out."
            )
        if self.gold and not self.heldout.path:
            raise UsageError(
                "gold is set, and heldout.path names no prompts to measure it on. Name them, or leave gold out."
            )
        if self.reward.group_by == "pair":
            raise UsageError("reward.group_by is pair, and a policy answers prompts alone. Leave it out.")
        if self.group_size < 2 and "reward.group_by" in self.algorithm_settings:
            raise UsageError(
                "group_size is 1; allowed is 2 or more: a response that is compared with itself teaches nothing. "
                "Raise it."
            )
        if self.reward.combine == "gdpo" and self.reward.normalise_std:
            raise UsageError(
                "reward.normalise_std is true, and reward.combine is gdpo, which divides by deviations of its own. "
                "Leave one of the two out."
            )
        if self.data.given_rubrics:
            raise UsageError("data.given_rubrics is true, and a policy reads no rubric. Leave it out.")


@dataclass(frozen=True)
class OnPolicySection(Section):
    """Pairs of the policy's own responses, as sources judge them; the data then give the prompts."""

    sources: tuple[SourceSection, ...] = ()  # as of `patarm policy`; none: the pairs are those of the data
    # Each round makes pairs with the policy that the one before has left, and trains on them in a folder of its own.
    rounds: Positive = 1
    prompts: Literal["parts", "all"] = "parts"  # whether each round has a part of the prompts of its own, or all
    responses: Positive = 4  # to each prompt, 2 or more
    # By how much the rewards of the two must differ at least. Equal ones never make a pair, nor does a preference of a
    # judge of two that is another in the other order.
    min_gap: NotNegative = 0.0
    sees_thinking: bool = False  # whether sources see the thinking before an answer too
    sampling: SamplingSection = field(default_factory=SamplingSection)
    prompts_at_once: Positive = field(default=64, metadata=FREE)  # sampled and judged together, and then kept
    # The share of those responses that may be without a reward though they have an answer; else the run stops.
    max_failed: Share = field(default=0.5, metadata=FREE)


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """`patarm dpo`: direct preference optimisation of a policy on preference pairs, given ones or its own."""

    recipe: Literal["dpo"] = "dpo"
    on_policy: OnPolicySection = field(default_factory=OnPolicySection)
    beta: AboveZero = 0.1  # how much likelier than under the reference, which is what training starts from, is a reward
    smoothing: Smoothing = 0.0  # the probability that a preference is the wrong way round (cDPO)
    sft_coef: NotNegative = 0.0  # the weight of the chosen responses' cross entropy beside it
    # Whether that is the mean over all chosen tokens of a batch, or over each response's own and then the responses.
    sft_by: Literal["tokens", "responses"] = "tokens"
    thinking: bool = True  # whether the policy may think before it answers, as its chat template has it

    @property
    def judge(self) -> PolicyKind:
        """How the policy is asked."""
        return "policy" if self.thinking else "policy_unthinking"

    @property
    def rubrics(self) -> RubricMode:
        """The policy reads none."""
        return "adaptive"

    @property
    def samples_heldout(self) -> bool:
        """What is measured is how likely their responses are."""
        return False

    @property
    def units_per_step(self) -> int:
        """Whole pairs."""
        return self.pairs_per_step

    @property
    def every_source(self) -> tuple[SourceSection, ...]:
        """What judges the policy's own responses; none where pairs are given."""
        return self.on_policy.sources

    def place_of(self, number: int) -> str:
        """The settings of one of `every_source`."""
        return f"on_policy.sources.{number}"

    @property
    def prompts_at_once(self) -> int:
        """Prompts whose responses are sampled and judged together."""
        return self.on_policy.prompts_at_once

    @property
    def rollouts_per_prompt(self) -> int:
        """Responses to each of them."""
        return self.on_policy.responses

    def judged_per_prompt(self, source: SourceSection) -> int:
        """What a source is asked about a prompt: each response, or each beside all others in both orders."""
        responses = self.on_policy.responses
        return responses * (responses - 1) if source.compares else responses

    @property
    def stage_in_words(self) -> str:
        """What the recipe is, for the model card."""
        also = f" and {self.sft_coef:g} × SFT on the chosen responses" if self.sft_coef else ""
        return f"direct preference optimisation (β {self.beta:g}){also}"

    def check(self) -> None:
        """Refuses what is not measured, and what a policy does not read."""
        super().check()
        refuse_drawing_heldout(self.heldout, "the two responses of a held-out pair are there: none is drawn")
        self._check_on_policy()
        if self.sft_by != "tokens" and not self.sft_coef:
            raise UsageError(f"sft_by is {self.sft_by}, and sft_coef is 0: there is no SFT. Set it, or leave it out.")
        if self.data.given_rubrics:
            raise UsageError("data.given_rubrics is true, and a policy reads no rubric. Leave it out.")

    def _check_on_policy(self) -> None:
        own, unset = self.on_policy, OnPolicySection()
        if not own.sources:
            for name in (each.name for each in fields(own)):
                if getattr(own, name) != getattr(unset, name):
                    raise UsageError(
                        f"on_policy.{name} is set, and on_policy.sources is empty: the pairs are those of the data. "
                        "Give sources, such as `sources: [{kind: judge, model: runs/judge}]`, or leave it out."
                    )
            return
        _check_sources(self)
        if own.responses < 2:
            raise UsageError("on_policy.responses is 1; allowed is 2 or more: a pair is made of two. Raise it.")
        refuse_equal_samples(own.sampling, "on_policy.sampling", self.recipe)
        written, learnt = own.sampling.max_new_tokens, self.data.max_completion_tokens
        if written > learnt:
            raise UsageError(
                f"on_policy.sampling.max_new_tokens is {written}, and data.max_completion_tokens {learnt}: longer "
                "responses would be judged and then left out. Raise the one or lower the other."
            )
        if own.rounds > 1 and self.lora.export == "adapter":
            raise UsageError(
                f"lora.export is adapter, and on_policy.rounds is {own.rounds}: the next round begins with a whole "
                "model. Set lora.export to merged."
            )


def _check_sources(config: AsksSources) -> None:
    for number, source in enumerate(config.every_source):
        _check_source(config.place_of(number), source)
    counts = Counter(source.called for source in config.every_source)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UsageError(f"two sources are called {twice[0]}. Give each a name of its own, such as `name: helpful`.")


def _check_source(where: str, source: SourceSection) -> None:
    unset = SourceSection()

    def refuse(names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(source, name) != getattr(unset, name):
                raise UsageError(f"{where}.{name} is set, and {why}. Leave it out.")

    if not _NAME.fullmatch(source.called):
        raise UsageError(
            f"{where} is called {source.called!r}; allowed are letters, digits, '.', '_' and '-'. Give it another name."
        )
    if source.kind == "function":
        refuse(("model", "max_prompt_tokens", *_OF_JUDGES), "kind is function, which asks no model")
        if not OWN_FUNCTION.fullmatch(source.function):
            raise UsageError(f"{where}.function is {source.function!r}; allowed is module:name of a Python function.")
        return
    refuse(("function",), f"kind is {source.kind}, which calls no function")
    source.sampling.check()
    if not source.is_judge:
        refuse(_OF_JUDGES, f"kind is {source.kind}, which writes nothing")
    if source.endpoint.url and source.model:
        raise UsageError(
            f"both {where}.model and {where}.endpoint.url are given. Give one; the server's model is endpoint.model."
        )
    if not (source.endpoint.url or source.model):
        or_served = ", or the address of a server as endpoint.url" if source.is_judge else ""
        raise UsageError(f"{where} names no model. Give its folder as model{or_served}.")
    if source.compares:
        refuse(("endpoint",), f"kind is {source.kind}, which is asked here: give its folder as model")
        refuse(("expected_score",), f"kind is {source.kind}, which gives choices and no scores")
    if source.kind == "rubric_judge":
        refuse(("rubrics",), "kind is rubric_judge, which goes by a generator's rubric alone")
        if not source.generator:
            raise UsageError(f"{where}.generator names no model that writes rubrics. Give its folder.")
    if source.rubrics == "generated":
        refuse(("generator",), "rubrics is generated, by which a judge reads none but its own")
    if source.endpoint.url and source.expected_score:
        raise UsageError(
            f"{where}.expected_score is true, and a server does not say how likely whole scores are. Judge here, by "
            "the model's folder, or leave it out."
        )
    if source.endpoint.max_requests:
        raise UsageError(
            f"{where}.endpoint.max_requests is set, and a run asks until its last step. Leave it out, and lower "
            "run.steps or votes."
        )
    if source.endpoint.url:
        refuse(("max_prompt_tokens",), "a server reads what its own context holds")
        refuse(("generator", "max_rubric_tokens"), "a server is asked: a generator writes for judges here")
    else:
        refuse(("endpoint",), "its url is empty: no server is asked")
    if not source.generator:
        refuse(("max_rubric_tokens",), "no generator is given")
