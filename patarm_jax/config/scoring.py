"""The config of what scores a policy's responses."""

from dataclasses import dataclass, field
from typing import Literal

from patarm_jax.config.recipes import OWN_FUNCTION
from patarm_jax.config.sections import (
    PLACE,
    DataSection,
    EndpointSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    Natural,
    Positive,
    Section,
    Seed,
    Votes,
)
from patarm_jax.types import PolicyBenchmarkName, PolicyKind, RubricMode, UsageError


@dataclass(frozen=True)
class PolicysJudgeSection(Section):
    """Who judges a policy's responses, here or behind an endpoint."""

    # Of infobench any model, which answers questions with yes or no. Of best-of-n a judge of single responses, or a
    # reward model, asked as --judge of `patarm judge` says: pointwise, baseline, scalar or ordinal. Of win-rate a judge
    # of two.
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    sampling: JudgingSection = field(default_factory=JudgingSection)  # infobench: greedy, 256 tokens, unless it is set
    thinking: bool = False  # of infobench, whether it may think before it answers
    # How it is asked; of win-rate pairwise, whether it is said or not.
    kind: Literal["pointwise", "pairwise", "baseline", "scalar", "ordinal"] = "pointwise"
    rubrics: RubricMode = "adaptive"  # of best-of-n and win-rate, the rubrics that its prompt holds, or asks for
    votes: Votes = 1  # of best-of-n judgements of each response, of win-rate in each order
    expected_score: bool = False  # of best-of-n, as of `patarm judge`
    max_prompt_tokens: Positive = 16384  # of what it reads; what is longer is not judged
    name: str = ""  # in results; empty: its folder's, or the server's

    @property
    def is_named(self) -> bool:
        """Whether there is one."""
        return bool(self.model.path or self.endpoint.url)

    @property
    def form(self) -> PolicyKind:
        """How it is asked: as any model that answers."""
        return "policy" if self.thinking else "policy_unthinking"


@dataclass(frozen=True)
class PolicyEvalConfig(Section):
    """`patarm eval ifeval`: a policy's responses scored; BENCHMARK, --model, --data and --output come beside these."""

    benchmark: PolicyBenchmarkName = "ifeval"  # the same as BENCHMARK
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=lambda: DataSection(split="", max_prompt_tokens=16384))
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=2048))
    thinking: bool = True  # whether the policy may think before it answers, as its chat template has it
    judge: PolicysJudgeSection = field(default_factory=PolicysJudgeSection)  # of all but ifeval
    n: Positive = 1  # responses to each prompt; of best-of-n, which picks from so many, 2 or more
    # Of best-of-n, who knows what is right: ifeval, whose prompts the data then are, or module:name of a function in
    # Python that is called as TRL calls a reward function and gives more than ½ for a right response.
    checker: str = ""
    # A file of responses that are there already, {"prompt": …, "response": …} in each row, in place of a policy.
    responses: str = field(default="", metadata=PLACE)
    # Of win-rate, the baseline: a file of its responses, or the folder of its evaluation.
    against: str = field(default="", metadata=PLACE)
    output: str = field(default="", metadata=PLACE)  # the same as --output
    name: str = ""  # the policy's name in results; empty: its folder's, the server's, or the file's
    limit: Natural = 0  # so many prompts, the first ones; 0: all
    seed: Seed = 0  # random seed for sampling

    @property
    def has_policy(self) -> bool:
        """Whether a policy responds, here or behind an endpoint."""
        return bool(self.model.path or self.endpoint.url)

    @property
    def policy(self) -> PolicyKind:
        """How it is asked."""
        return "policy" if self.thinking else "policy_unthinking"

    @property
    def has_endpoint(self) -> bool:
        """Whether the policy is behind an endpoint."""
        return bool(self.endpoint.url or self.judge.endpoint.url)

    def check(self) -> None:
        """Refuses more than one thing that answers, and settings of what another benchmark does."""
        self._check_judge()
        best = self.benchmark == "best-of-n"
        if best and self.n < 2:
            raise UsageError(f"n is {self.n}; allowed for best-of-n is 2 or more, such as --n 16.")
        if best and self.checker != "ifeval" and not OWN_FUNCTION.fullmatch(self.checker):
            raise UsageError(
                f"checker is {self.checker!r}, and best-of-n needs to know what is right. Give ifeval, or module:name "
                "of a Python function."
            )
        if best and self.responses:
            raise UsageError("responses is given, and best-of-n picks from several of a policy. Give --model.")
        if (self.benchmark == "win-rate") != bool(self.against):
            raise UsageError(
                "win-rate compares with a baseline, and none is named. Give --against with a file of its responses, or "
                "the folder of its evaluation."
                if not self.against
                else f"against is given, and {self.benchmark} compares with nobody. Leave it out, or use win-rate."
            )
        for name in ("n", "checker"):
            if not best and getattr(self, name) != getattr(PolicyEvalConfig, name, 1):
                raise UsageError(f"{name} is given, and {self.benchmark} takes one response as it is. Leave it out.")
        given = {
            "--model": self.model.path,
            "--endpoint.url": self.endpoint.url,
            "--responses": self.responses,
        }
        if len(named := [name for name, value in given.items() if value]) > 1:
            raise UsageError(f"{' and '.join(named)} are given. Give one: the policy, its server, or its responses.")
        own = self.benchmark in ("ifeval", "infobench") or self.checker == "ifeval"
        for name in ("columns", "domain", "domains", "source_domains", "drop_sources", "given_rubrics"):
            if own and getattr(self.data, name):
                raise UsageError(f"data.{name} is given, and {self.benchmark} has its own format. Leave it out.")

    def _check_judge(self) -> None:
        judge, unset = self.judge, PolicysJudgeSection()
        if judge != unset and self.benchmark == "ifeval":
            raise UsageError("a judge is given, and ifeval is checked by a program. Leave it out.")
        if self.benchmark == "infobench" and self.mesh.distributed != "none":
            raise UsageError(
                "mesh.distributed is set, and infobench's questions wait for one another: one process asks them. Leave "
                "it out."
            )
        if judge.model.path and judge.endpoint.url:
            raise UsageError("both judge.model.path and judge.endpoint.url are given. Give one.")
        if judge != unset and not judge.is_named:
            raise UsageError(
                "settings of a judge are given, and no judge. Give --judge.model.path with its folder, or "
                "judge.endpoint.url, or leave them out."
            )
        for name in ("kind", "rubrics", "votes", "expected_score"):
            if self.benchmark == "infobench" and getattr(judge, name) != getattr(unset, name):
                raise UsageError(
                    f"judge.{name} is set, and infobench's judge answers questions with yes or no. Leave it out."
                )
        if self.benchmark in ("best-of-n", "win-rate") and judge.thinking:
            raise UsageError(
                f"judge.thinking is set, and a judge of {self.benchmark} thinks as its form has it. Leave it out."
            )
        if self.benchmark == "best-of-n" and judge.kind == "pairwise":
            raise UsageError("judge.kind is pairwise, and best-of-n picks by scores. Give a judge of single responses.")
        if self.benchmark == "win-rate" and judge.kind not in ("pairwise", unset.kind):
            raise UsageError(f"judge.kind is {judge.kind}, and win-rate compares two responses. Give pairwise.")
