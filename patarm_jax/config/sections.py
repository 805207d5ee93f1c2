"""The sections of a config: nested frozen dataclasses, each setting with its default, its limits and what it does.

A comment beside a setting, or right above it, is its line of `--help`. Marks of a field:

    PLACE    names a file or folder on this machine; addresses such as gs://… are refused
    OWN      each process's own; all other settings but places must be the same in every process
    FREE     may change when a run is resumed; all other settings must stay as they were
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args, get_origin

from patarm_jax.files import refuse_address
from patarm_jax.types import OpensThinking, UsageError

PLACE = {"place": True}
OWN = {"own": True}
FREE = {"free": True}


@dataclass(frozen=True)
class Range:
    """The finite numbers between two ends; an open end is not one of them.

    >>> print(Range(0), Range(0, 1), Range(0, open_low=True), Range(0, 1, open_low=True), sep=" · ")
    0 or more · 0 to 1 · above 0 · above 0 up to 1
    >>> print(Range(0, 1, open_high=True), 0 in Range(0), 0 in Range(0, open_low=True), math.inf in Range(0))
    0 to below 1 True False False
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    or_all: bool = False  # -1 is allowed too

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high or self.high == math.inf else value <= self.high
        return (above and below) or (self.or_all and value == -1)  # a NaN is neither

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "any number"
        if self.high == math.inf:
            more = f"above {self.low}" if self.open_low else f"{self.low} or more"
            return f"{more}, or -1" if self.or_all else more
        start, to = (f"above {self.low}", "up to") if self.open_low else (str(self.low), "to")
        return f"{start} {to} {'below ' if self.open_high else ''}{self.high}"


def limits_of(kind: object) -> Range | None:
    """The limits in the type of a setting, None where it has none.

    >>> print(limits_of(Annotated[int, Range(1)] | None))
    1 or more
    """
    if limits := [each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Range)]:
        return limits[0]
    return next((found for part in get_args(kind) if (found := limits_of(part)) is not None), None)


def section_of_list(kind: object) -> type | None:
    """The section of which a setting is a list; None of any other setting."""
    first = next(iter(get_args(kind)), None)
    is_list = get_origin(kind) is tuple and dataclasses.is_dataclass(first)
    return first if is_list and isinstance(first, type) else None


Positive = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
AboveOne = Annotated[float, Range(1, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Number = Annotated[float, Range(-math.inf, open_low=True)]
AboveZero = Annotated[float, Range(0, open_low=True)]
Share = Annotated[float, Range(0, 1)]
Smoothing = Annotated[float, Range(0, 0.5, open_high=True)]  # at a half nothing is preferred
Average = Annotated[float, Range(0, 1, open_high=True)]  # at 1 a moving average never moves
Nucleus = Annotated[float, Range(0, 1, open_low=True)]
Votes = Annotated[int, Range(1, 1024)]
Seed = Annotated[int, Range(0, 2**32, open_high=True)]  # jax drops the bits above
Axis = Annotated[int, Range(1, or_all=True)]
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)  # all matrices of a layer


@dataclass(frozen=True)
class Section:
    """What is checked of every section, wherever it comes from."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        section = kind.removesuffix("Section").lower() + "." if kind.endswith("Section") else ""
        for each in dataclasses.fields(self):
            if each.metadata.get("place"):
                refuse_address(str(getattr(self, each.name)), section + each.name)

    def check(self) -> None:
        """Refuses settings that do not go together, by a UsageError."""


@dataclass(frozen=True)
class ModelSection(Section):
    """Where the weights come from and in what precision they compute."""

    path: str = field(default="", metadata=PLACE)  # a Hugging Face folder, or the folder of a finished run
    # A folder of LoRA adapters in PEFT's format that belong to this model: they are added to its weights.
    adapter: str = field(default="", metadata=PLACE)
    weights: Literal["load", "random"] = "load"  # random: only config.json and the tokenizer are read from path
    # Numbers of the computation, and of weights that are only read; the master copy of what is trained is float32.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass recomputes: nothing, all but matmuls, all but attention, which is a hidden state of each
    # layer more to keep, all.
    remat: Literal["none", "dots", "attention", "full"] = "full"
    # Which kernel computes attention. NVIDIA: cudnn for rows of one sequence, pallas for all; TPU: splash. They differ
    # in rounding.
    attention: Literal["auto", "portable", "cudnn", "pallas", "splash"] = "auto"


@dataclass(frozen=True)
class LoRASection(Section):
    """Adapters that are trained in place of the weights: W + alpha / rank · A·B, as in LoRA (Hu et al., 2021)."""

    rank: Natural = 0  # the width between A and B; 0: no adapters, all weights are trained
    alpha: AboveZero = 32.0  # the adapters' scale, times the rank
    # The weights that have adapters, in every layer.
    targets: tuple[Target, ...] = TARGETS
    # What a run exports: a whole model with the adapters in its weights, or the adapters alone, in PEFT's format.
    export: Literal["merged", "adapter"] = field(default="merged", metadata=FREE)

    @property
    def scale(self) -> float:
        """What the product of a weight's two adapters is multiplied by; 1 where there are none."""
        return self.alpha / self.rank if self.rank else 1.0


@dataclass(frozen=True)
class MeshSection(Section):
    """How many devices stand along each mesh axis; one of them may be -1, "all that are left"."""

    data: Axis = 1  # devices that hold the same weights and take different rows
    fsdp: Axis = -1  # devices that share each weight, and take different rows
    tensor: Axis = 1  # devices that share heads, MLP and vocabulary, and take the same rows
    rollout: Literal["tensor", "replicated"] = "tensor"  # how the sampling copy of the weights is placed
    # Several processes find each other by jax.distributed.initialize. "auto": a TPU pod, Slurm, Open MPI or Kubernetes
    # knows the three values below; elsewhere give them.
    distributed: Literal["none", "auto"] = "none"
    coordinator: str = field(default="", metadata=OWN)  # host:port of process 0
    processes: Natural = 0  # how many there are
    # The number of this process, from 0; -1: unset.
    process_id: Annotated[int, Range(0, or_all=True)] = field(default=-1, metadata=OWN)
    join_seconds: Positive = 600  # how long one waits for the others at the start: hosts of a pod start minutes apart
    # Without a sign of life, after which a process is taken for dead and all end. Less than 5, and a pause of the
    # network would end a run.
    heartbeat_seconds: Annotated[int, Range(5)] = 10
    stall_minutes: AboveZero = 20.0  # how long a process may keep the others waiting, compiling apart, before all end


@dataclass(frozen=True)
class OptimizerSection(Section):
    """AdamW with warm-up, decay and clipping by the global norm."""

    learning_rate: NotNegative = 1e-6  # at its peak, after the warm-up
    warmup_steps: Natural = 0  # updates over which it rises from 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # from the peak to final_fraction · peak
    final_fraction: Share = 0.0  # the share of the peak learning rate where the decay ends
    beta1: Average = 0.9  # decay of the gradient's moving average
    beta2: Average = 0.999  # decay of the squared gradient's moving average
    epsilon: AboveZero = 1e-8  # added to the root of the second moment
    weight_decay: NotNegative = 0.0  # decoupled, for matrices alone; norms are not decayed
    clip_norm: AboveZero = 1.0  # the largest norm of the whole gradient
    # Numbers that both moving averages are kept in. In bfloat16 they take half the memory; they are rounded at random,
    # so that on average nothing is lost.
    moments: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataSection(Section):
    """Which preferences are read, and how their columns are called."""

    # A .jsonl, .json, .csv or .tsv file (each also packed: .gz, .zst, .bz2, .xz), a .parquet or .arrow file, a folder
    # of them, a folder that datasets wrote with save_to_disk, or a Hub id.
    path: str = field(default="", metadata=PLACE)
    # The split of a Hub id, or of a folder whose files or folders are named by splits as the Hub names them: train,
    # training; validation, valid, dev, val; test, testing, eval, evaluation.
    split: str = "train"
    # Ours → theirs, where they differ; several columns are joined without a space. Ours are: prompt, chosen, rejected,
    # id, source, domain, chosen_judgement, rejected_judgement, pairwise_judgement, pairwise_judgement_swapped,
    # chosen_score, rejected_score, margin, rubric, response, and what Rubric-ARM's warm-up reads besides.
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    domain: str = ""  # the domain of a row that names none, or one by a word that is unknown
    domains: dict[str, str] = field(default_factory=dict)  # a row's own word → domain, such as stem: math
    # Source → domain, before `domain`; of a benchmark, subset → domain, before its own table.
    source_domains: dict[str, str] = field(default_factory=dict)
    drop_sources: tuple[str, ...] = ()  # sources whose rows are left out
    # Whether a judge judges by the column rubric, which a generator (`patarm rubrics`) or a person has written for the
    # prompt, in place of the primary rubrics. Rows in which it is blank are judged by the primary ones, and counted.
    given_rubrics: bool = False
    # The most tokens of the whole encoded judge prompt. Training drops longer preferences and counts them; `judge` and
    # `eval` record them as too long. They do the same with prompts that leave no room, within the model's
    # max_position_embeddings, for all the tokens that may be written behind them.
    max_prompt_tokens: Positive = 2048
    # The most tokens of an SFT judgement with its end token; longer ones are dropped and counted.
    max_completion_tokens: Positive = 1024
    # What SFT does with a preference that carries no judgements: refuse, leave it out, or write one that has the form
    # and the right choice, or a score on the right side of the middle, and nothing to learn but the form.
    missing_judgements: Literal["error", "drop", "template"] = "error"


@dataclass(frozen=True)
class RunSection(Section):
    """The run folder and what is written into it when."""

    folder: str = field(default="", metadata=PLACE)  # the folder that the run writes; the same command resumes it
    seed: Seed = 0  # random seed for the order of the data, for random weights and for sampling
    epochs: Positive = 1  # passes over the data
    steps: Natural = 0  # so many steps instead of whole epochs; 0: `epochs`
    checkpoint_every: Positive = 100  # steps
    keep_checkpoints: Positive = 2  # so many last ones, besides the best on held-out pairs
    # What resuming and export do where a file of the newest checkpoint is cut or missing: stop, or take the checkpoint
    # before it and put the damaged one aside.
    on_damaged: Literal["stop", "previous"] = "stop"
    # An update whose gradient is not finite, or that would ruin a weight, changes none. skip: the run goes on, unless
    # so many of them come in a row; stop: the first one ends it. What is saved is sound in either case.
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped: Positive = 10  # updates in a row
    show_every: Natural = 10  # print a sample of judgements every so many steps; 0: never
    tensorboard: bool = True  # whether event files are written
    wandb_project: str = ""  # needs the wandb extra; empty: not used


@dataclass(frozen=True)
class SamplingSection(Section):
    """How judgements are drawn."""

    temperature: NotNegative = 1.0  # 0: greedy
    top_k: Natural = 0  # 0: all
    top_p: Nucleus = 1.0  # the likeliest tokens whose probabilities reach it; 1: all
    max_new_tokens: Positive = 1024  # the most tokens of a judgement, its end token included
    # Completions written at a time, over all devices; those that wait take the places of those that end; 0: all at
    # once. Never changes what is drawn, save for rounding in bfloat16; fewer need less memory, and waste less where
    # lengths differ.
    rows: Natural = field(default=0, metadata=FREE)
    # Whether what is drawn for a prompt is the same to the bit whatever else is drawn beside it, in bfloat16 too. It
    # costs time where few rows are busy: all of `rows` are computed up to the end, and nothing is read for several.
    batch_invariant: bool = field(default=False, metadata=FREE)

    def check(self) -> None:
        """Refuses rows of no fixed number where their number must not change."""
        _check_rows(self.rows, self.batch_invariant)


@dataclass(frozen=True)
class JudgingSection(Section):
    """How the judgements of a model that is not being trained are drawn."""

    # null: as the model's generation_config.json has it, which transformers and vLLM take for their defaults too; of a
    # held-out pair as the run draws; behind an endpoint nothing is sent, so that the server's default holds.
    temperature: NotNegative | None = None  # 0: greedy
    top_k: Natural | None = None  # 0: all
    top_p: Nucleus | None = None  # the likeliest tokens whose probabilities reach it; 1: all
    max_new_tokens: Positive | None = None  # null: of held-out pairs as the run has it, else 1024
    rows: Natural = 256  # as sampling.rows of a run
    # As sampling.batch_invariant of a run, so that a score depends on nothing but the response, its place in the file
    # and the model: on devices of the same kind and number, at the same rows, votes and limits.
    batch_invariant: bool = False

    def check(self) -> None:
        """Refuses rows of no fixed number where their number must not change."""
        _check_rows(self.rows, self.batch_invariant)


def _check_rows(rows: int, batch_invariant: bool) -> None:
    if batch_invariant and not rows:
        raise UsageError(
            "batch_invariant is true and rows, beside it, is 0, so that each batch would have another shape. Give rows "
            "a number, such as 64."
        )


@dataclass(frozen=True)
class EndpointSection(Section):
    """An OpenAI-compatible server, such as vLLM's or SGLang's, that judges instead of a model here."""

    url: str = field(default="", metadata=FREE)  # http://host:8000/v1; empty: the model judges here
    model: str = field(default="", metadata=FREE)  # as the server calls it; empty: the first one it lists
    # The environment variable that holds the key; unset: none is sent.
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=FREE)
    concurrency: Positive = field(default=32, metadata=FREE)  # requests under way at a time
    timeout: AboveZero = field(default=600.0, metadata=FREE)  # seconds for one answer
    # How often a request is sent, with growing pauses, before it is recorded as failed.
    tries: Positive = field(default=6, metadata=FREE)
    # Seconds a request waits for a server that answers 429, before it is recorded as failed.
    busy: AboveZero = field(default=1800.0, metadata=FREE)
    # chat_template_kwargs.enable_thinking; server: not sent, save to a generator of rubrics and a rubric_judge, which
    # do not think: off.
    thinking: Literal["server", "on", "off"] = "server"
    # Whether the server's chat template writes `<think>` itself, so that answers begin inside the thinking. auto: yes
    # once an answer held `</think>` alone; then a text that was cut off before it has no score.
    opens_thinking: OpensThinking = "auto"
    # The most that one command may send, those that are tried again included; 0: any number.
    max_requests: Natural = field(default=0, metadata=FREE)


@dataclass(frozen=True)
class GeneratorSection(Section):
    """The model that writes a rubric for each prompt, greedily, by which a judge judges."""

    # A rubric_judge compares by it; a pointwise or pairwise judge reads it in place of the primary rubrics.
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    max_new_tokens: Positive = 1024  # of a rubric; a longer one is cut off, and shown as far as it goes

    @property
    def is_named(self) -> bool:
        """Whether there is one, here or behind an endpoint."""
        return bool(self.model.path or self.endpoint.url)

    def greedy(self, rows: int, batch_invariant: bool) -> JudgingSection:
        """How its rubrics are drawn; a server puts its own batches together."""
        here = batch_invariant and not self.endpoint.url
        return JudgingSection(
            temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=self.max_new_tokens, rows=rows, batch_invariant=here
        )

    def check(self) -> None:
        """Refuses two generators."""
        if self.model.path and self.endpoint.url:
            raise UsageError("both --generator and generator.endpoint.url are given. Give one.")


@dataclass(frozen=True)
class PairwiseSection(Section):
    """How a pairwise judge is shown the two responses of a pair while it is trained; a pointwise one is not."""

    # both: each pair in both orders, half of the group_size judgements in each; alternate: in one, which is the other
    # for every second pair and in every second epoch.
    orders: Literal["both", "alternate"] = "both"


@dataclass(frozen=True)
class MarginSection(Section):
    """f(δ) of PAR: what a judgement earns whose score beats its opponent's by δ."""

    # graded: low up to the threshold, and high above it. constant: value. linear: offset + scale·δ. tanh: offset +
    # scale·tanh(δ / width). power: scale·δ^exponent. Or a Python function of your own as module:name, of one δ or of an
    # array of them.
    name: str = "graded"
    # Null, here and below: as the margin has it. A parameter that the margin does not use is refused.
    low: NotNegative | None = None  # graded: 1.2, PaTaRM's
    high: NotNegative | None = None  # graded: 1.4, PaTaRM's
    threshold: NotNegative | None = None  # graded: 2, PaTaRM's
    value: NotNegative | None = None  # constant: 1.3, PaTaRM's
    offset: Number | None = None  # linear and tanh: 1
    scale: Number | None = None  # linear: 0.1; tanh: 0.5; power: 1
    width: AboveZero | None = None  # tanh: 2
    exponent: NotNegative | None = None  # power: 0.5


@dataclass(frozen=True)
class AccuracySection(Section):
    """What a pairwise judge's choice earns, beside the format penalty; PaTaRM names no values."""

    right: Number = 1.0  # the chosen response
    wrong: Number = 0.0  # the rejected one


@dataclass(frozen=True)
class RewardSection(Section):
    """How rewards become advantages."""

    # Whether advantages compare the judgements of one response, or those of both responses of a pair; of a pairwise
    # judge, those of one order or of both. Null, here and below: as update.algorithm has it; of a pairwise judge: pair.
    group_by: Literal["response", "pair"] | None = None
    normalise_std: bool | None = None  # whether advantages are divided by their group's standard deviation


@dataclass(frozen=True)
class JudgementRewardSection(RewardSection):
    """What a judgement earns for its score or choice, and how rewards become advantages."""

    # What a pointwise judge's score earns. par: Preference-Aware Reward. The others are what PAR is compared with.
    # threshold: 1 for a chosen response's from 5 on, and for a rejected one's below 5. labels: -((score - label)/10)^2,
    # with labels from 0 to 10 in the columns chosen_score and rejected_score.
    kind: Literal["par", "threshold", "labels"] = "par"
    margin: MarginSection = field(default_factory=MarginSection)
    # Of PAR, what a score must beat: the other side's mean, as the method has it; every judgement of the other side,
    # which gives the mean of what each win earns; or one of them, drawn at random.
    opponent: Literal["mean", "every", "one"] = "mean"
    loser: Literal["zero", "minus"] = "zero"  # of PAR, what the wrong side of the opponent earns: 0, or -f(|δ|)
    accuracy: AccuracySection = field(default_factory=AccuracySection)


@dataclass(frozen=True)
class DAPOSection(Section):
    """DAPO's sampling, of update.algorithm dapo alone; null: as the algorithm has it."""

    # Groups of equal reward teach nothing: they are left out, and further pairs drawn, until the batch is full or so
    # many rounds are sampled; each round draws pairs_per_step pairs, so that a run passes over the data more often than
    # run.epochs says. 1: one round, and what is left of it. The algorithm's: 10, as in verl.
    max_rounds: Positive | None = None
    # A judgement that comes within so many tokens of sampling.max_new_tokens loses reward, the more the nearer; 0:
    # none does. The algorithm's: a fifth of the limit, as the paper's 4,096 of 20,480.
    overlong_buffer: Natural | None = None
    overlong_factor: NotNegative | None = None  # what it loses at the limit; the algorithm's: 1


@dataclass(frozen=True)
class KLSection(Section):
    """The KL to the reference, and where it is charged; null: as update.algorithm has it."""

    coef: NotNegative | None = None  # its weight; 0: no reference is loaded
    kind: Literal["k1", "k2", "k3"] | None = None  # which estimate; k3 is unbiased and never negative
    place: Literal["loss", "reward"] | None = None  # added to the loss, or taken off the reward
    by_ratio: bool | None = None  # whether a token's estimate in the loss is multiplied by its ratio, as in TRL 1.16


@dataclass(frozen=True)
class UpdateSection(Section):
    """How rollouts become an update; a setting that is null is as the algorithm has it."""

    # Its values for what is null stand in patarm_jax/config/presets.py. A setting that it does not use is refused.
    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo", "cispo"] = (
        "grpo"
    )
    clip_low: Share | None = None  # how far a ratio may fall below 1
    clip_high: NotNegative | None = None  # how far it may rise above 1
    dual_clip: AboveOne | None = None  # times -A, the most that a token of negative advantage A may cost; 3 in verl
    # What a loss over tokens is divided by: the tokens; for each sequence its own, then the sequences; the sequences;
    # or the sequences times sampling.max_new_tokens.
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"] | None = None
    kl: KLSection = field(default_factory=KLSection)
    # The model that the KL is measured from; empty: model.path. It is known by its weights when a run is resumed.
    reference: str = field(default="", metadata=PLACE | FREE)
    # Whose log-probs are the old ones: the sampler's own, or the trainer's, computed once more for the same tokens.
    old_logprobs: Literal["sampler", "trainer"] = "sampler"
    # With the trainer's: the most that a token's loss is multiplied by, exp(old - sampler); null: by nothing.
    importance_cap: AboveZero | None = None
    updates_per_rollout: Positive = 1  # optimiser updates on the rollouts of a step


@dataclass(frozen=True)
class HeldoutSection(Section):
    """Pairs that are judged now and then while the run trains, and never learnt from."""

    # As data.path, whose other settings hold here too; empty: nothing is held out.
    path: str = field(default="", metadata=PLACE)
    split: str = "test"  # as data.split; of train.jsonl and eval.jsonl, the latter
    eval_every: Positive = 50  # steps; the last step is evaluated too
    votes: Votes = 1  # judgements of each response
    limit: Natural = 0  # so many of the pairs, the first ones; 0: all
    # The metric that selects the best checkpoint, which is kept besides the last ones.
    best: Literal["accuracy_strict", "accuracy_half", "score_gap", "valid"] = "accuracy_strict"
    sampling: JudgingSection = field(default_factory=JudgingSection)
