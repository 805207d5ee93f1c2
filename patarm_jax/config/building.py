"""The config of `patarm data build`: sources, and the stages that make one set of preferences of them."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from patarm_jax.config.sections import (
    PLACE,
    DataSection,
    EndpointSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    Natural,
    NotNegative,
    Nucleus,
    Positive,
    Section,
    Seed,
    Share,
    Votes,
)
from patarm_jax.types import Domain, RubricMode, UsageError

StageKind = Literal["read", "clean", "deduplicate", "decontaminate", "classify", "judge", "select", "teach", "write"]
TaughtForm = Literal["pointwise", "pairwise"]
ASKING: tuple[StageKind, ...] = ("classify", "judge", "teach")  # what a model answers


_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class CorpusSection(Section):
    """Preferences that go into the set."""

    name: str = ""  # its source in the set, where its rows name none; empty: the path's last part
    data: DataSection = field(default_factory=DataSection)
    licence: str = ""  # as the Hub names licences, such as cc-by-nc-4.0; empty: not known

    @property
    def called(self) -> str:
        """Its source in the set."""
        return self.name or self.data.path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class StageSection(Section):
    """One stage: what it does with the rows of the one before."""

    # read: the sources, in order. clean: by language and length. deduplicate: rows that repeat an earlier one.
    # decontaminate: rows whose prompt stands in a benchmark. classify: rules, or a model, sort requests into domains.
    # judge: a pointwise judge scores both responses several times. select: rows that it gets right neither always nor
    # hardly ever are for reinforcement learning, the rest for teaching. teach: a teacher's judgements. write: training
    # and held-out pairs, with a card.
    kind: StageKind = "read"

    # Of clean, the language that a row's last prompt and chosen response must be in, such as en; empty: any.
    language: str = ""
    max_prompt_chars: Natural = 0  # of clean, of the whole prompt; 0: any number
    max_response_chars: Natural = 0  # of clean, of each response; 0: any number
    min_response_chars: Natural = 0  # of clean, of each response

    # Of deduplicate and decontaminate: texts are near-duplicates whose shingles, all runs of so many words, overlap by
    # this share at least (Jaccard's); 1: only those with the same words are.
    near: Nucleus = 0.8
    shingle: Positive = 5  # words

    # Of decontaminate, name → path of the official files, or {name: ""} for the Hub's; the name as of `patarm eval`, or
    # any other of a file of prompts.
    benchmarks: dict[str, str] = field(default_factory=dict)
    ngram: Natural = 13  # of decontaminate: a run of so many words in both prompts is an overlap; 0: it is none

    # Of classify, judge and teach, the model: a folder, or in its place a server.
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=2048))
    max_prompt_tokens: Positive = 16384  # of what a model here reads; a row with a longer one is left out
    seed: Seed = 0  # random seed for sampling
    rubrics: RubricMode = "adaptive"  # of judge and teach, the rubrics that the prompt holds, or asks for

    # Of classify, domain → a regular expression: the first that is found in a request's last words tells its domain. A
    # model, if one is named, sorts what no rule does.
    rules: dict[str, str] = field(default_factory=dict)
    corpora: tuple[str, ...] = ()  # of classify, the sources whose rows are sorted; empty: all

    votes: Votes = 8  # of judge, judgements of each response
    # Of judge, which scores are compared: every one of the chosen response with every one of the rejected, or the n-th
    # with the n-th. A row's accuracy is the share in which the chosen one's is higher; equal ones are wrong.
    compared: Literal["all", "paired"] = "all"

    lowest: Share = 0.125  # of select, the lowest accuracy of a row for reinforcement learning
    highest: Share = 0.75  # of select, the highest
    rest: Literal["teach", "drop"] = "teach"  # of select, what becomes of the others

    # Of teach, which judgements a row must have: of each response, whose scores must lie on the right side, or of both
    # in either order, of which both must be right. Rows that lack one are left out.
    forms: tuple[TaughtForm, ...] = ("pointwise",)
    min_gap: NotNegative = 2.0  # of teach, by how much more than this the chosen response's score must be higher

    heldout: Share = 0.05  # of write, the share of prompts whose rows are held out
    # Of write, whether rows may stand in one set though their licences forbid it. The card says so.
    mix_licences: bool = False

    def check(self) -> None:
        """Refuses settings that its kind does not use."""
        self.sampling.check()
        unset = StageSection()
        for name, kinds in _USED_BY.items():
            if getattr(self, name) != getattr(unset, name) and self.kind not in kinds:
                raise UsageError(f"{name} is set, and a stage of kind {self.kind} does not use it. Leave it out.")
        named = bool(self.model.path) + bool(self.endpoint.url)
        if self.kind in ASKING and named != 1 and not (self.kind == "classify" and self.rules and not named):
            raise UsageError(
                f"a stage {self.kind} names {'no model' if not named else 'two models'}. Give model.path, or "
                "endpoint.url."
            )
        if self.lowest > self.highest:
            raise UsageError(f"lowest is {self.lowest:g}, above highest {self.highest:g}. Exchange them.")
        if self.kind == "teach" and not self.forms:
            raise UsageError("forms is empty. Give pointwise, pairwise, or both.")
        for domain, pattern in self.rules.items():
            if domain not in get_args(Domain):
                raise UsageError(f"rules names the domain {domain!r}. Use {', '.join(get_args(Domain))}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"rules.{domain} is no regular expression: {error}. Correct it.") from error
        if self.kind == "decontaminate" and not self.benchmarks:
            raise UsageError(
                "a stage decontaminate names no benchmarks. Give them as `benchmarks: {rewardbench: path}`, or leave "
                "the stage out."
            )


_USED_BY = {
    "language": ("clean",),
    "max_prompt_chars": ("clean",),
    "max_response_chars": ("clean",),
    "min_response_chars": ("clean",),
    "near": ("deduplicate", "decontaminate"),
    "shingle": ("deduplicate", "decontaminate"),
    "benchmarks": ("decontaminate",),
    "ngram": ("decontaminate",),
    "model": ASKING,
    "endpoint": ASKING,
    "sampling": ASKING,
    "max_prompt_tokens": ASKING,
    "seed": ASKING,
    "rubrics": ("judge", "teach"),
    "rules": ("classify",),
    "corpora": ("classify",),
    "votes": ("judge",),
    "compared": ("judge",),
    "lowest": ("select",),
    "highest": ("select",),
    "rest": ("select",),
    "forms": ("teach",),
    "min_gap": ("teach",),
    "heldout": ("write",),
    "mix_licences": ("write",),
}


@dataclass(frozen=True)
class BuildConfig(Section):
    """`patarm data build`: a set of preferences from public sources, made in stages that are files."""

    folder: str = field(default="", metadata=PLACE)  # that is written; the same command goes on
    sources: tuple[CorpusSection, ...] = ()  # a list; of rows that repeat one another the earlier source's stays
    stages: tuple[StageSection, ...] = (
        StageSection("read"),
        StageSection("clean"),
        StageSection("deduplicate"),
        StageSection("write"),
    )
    mesh: MeshSection = field(default_factory=MeshSection)  # of models here

    def check(self) -> None:
        """Refuses stages in an order that makes no sense, and sources that cannot be told apart."""
        if not self.sources:
            raise UsageError("sources is empty. Give a list of one or more, such as `sources: [{data: {path: …}}]`.")
        names = [source.called for source in self.sources]
        for source, name in zip(self.sources, names, strict=True):
            if not source.data.path:
                raise UsageError("a source names no data.path. Give a file, a folder or a Hub id.")
            if not _NAME.fullmatch(name) or names.count(name) > 1:
                raise UsageError(
                    f"a source is called {name!r}, which is no name of its own. Give each a `name` of letters, digits, "
                    "dots and hyphens."
                )
        kinds = [stage.kind for stage in self.stages]
        if not kinds or kinds[0] != "read" or kinds.count("read") > 1:
            raise UsageError(f"stages are {', '.join(kinds) or 'none'}; the first, and no other, must be read.")
        if "select" in kinds and "judge" not in kinds[: kinds.index("select")]:
            raise UsageError("select goes by what a judge makes of rows, and no judge stands before it. Put one there.")
        if "write" in kinds[:-1]:
            raise UsageError("write is the end: no stage can follow it. Move it behind the others.")
        for stage in self.stages:
            stage.check()

    def settings_of(self, number: int) -> dict[str, Any]:
        """What the rows of a stage depend on, beside the rows of the one before; the first is 0."""
        stage = self.stages[number]
        used = {name: getattr(stage, name) for name, kinds in _USED_BY.items() if stage.kind in kinds}
        for name in ("model", "endpoint"):  # which of them it was is told by the answers' identity
            used.pop(name, None)
        for name, value in used.items():
            used[name] = asdict(value) if isinstance(value, Section) else value
        if stage.kind == "decontaminate":
            used["benchmarks"] = sorted(stage.benchmarks)  # files may move; what they hold is told by their hash
        if stage.kind != "read":
            return used
        every = [asdict(source) | {"name": source.called} for source in self.sources]
        for source in every:
            del source["data"]["path"]
        return {"sources": every}
