"""The whole truth about a run: nested frozen dataclasses, read from YAML, overridden by dotted flags.

No default stands anywhere else, nothing is changed after loading, and an unknown key is an error that names the
nearest known one.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

import msgspec
import yaml

from patarm_jax.files import one_line, refuse_address
from patarm_jax.flags import merged, nearest, settings_of
from patarm_jax.types import Benchmark, JudgeKind, OpensThinking, RubricMode, UsageError, UserError

Config = TypeVar("Config")
PLACE = {"place": True}  # metadata of a field that names a file or folder on this machine
OWN = {"own": True}  # metadata of a field that is each process's own, as places are


class _Checked:
    """What is checked of every section, wherever it comes from."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        section = kind.removesuffix("Section").lower() + "." if kind.endswith("Section") else ""
        for each in dataclasses.fields(cast(Any, self)):
            if each.metadata.get("place"):
                refuse_address(str(getattr(self, each.name)), section + each.name)


@dataclass(frozen=True)
class ModelSection(_Checked):
    """Where the weights come from and in what precision they compute."""

    path: str = field(default="", metadata=PLACE)  # a Hugging Face folder, or the folder of a finished run
    weights: Literal["load", "random"] = "load"  # random: only config.json and the tokenizer are read from path
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; the trained master copy is float32
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass recomputes: nothing, all but matmuls, all
    # Which kernel computes attention. NVIDIA: cudnn for rows of one sequence, pallas for all; TPU: splash. They differ
    # in rounding.
    attention: Literal["auto", "portable", "cudnn", "pallas", "splash"] = "auto"


@dataclass(frozen=True)
class MeshSection(_Checked):
    """How many devices stand along each mesh axis; one of them may be -1, "all that are left"."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    rollout: Literal["tensor", "replicated"] = "tensor"  # how the sampling copy of the weights is placed
    # Several processes find each other by jax.distributed.initialize. "auto": a TPU pod, Slurm, Open MPI or Kubernetes
    # knows the three values below; elsewhere give them.
    distributed: Literal["none", "auto"] = "none"
    coordinator: str = field(default="", metadata=OWN)  # host:port of process 0
    processes: int = 0
    process_id: int = field(default=-1, metadata=OWN)
    join_seconds: int = 600  # how long one waits for the others at the start: hosts of a pod start minutes apart
    heartbeat_seconds: int = 10  # without a sign of life, after which a process is taken for dead and all end
    stall_minutes: float = 20.0  # that a process may keep the others waiting, compiling apart, before all end


@dataclass(frozen=True)
class OptimizerSection(_Checked):
    """AdamW with warm-up, decay and clipping by the global norm."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # from the peak to final_fraction · peak
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass(frozen=True)
class DataSection(_Checked):
    """Which preferences are read, and how their columns are called."""

    # A .jsonl, .json, .csv or .tsv file (each also packed: .gz, .zst, .bz2, .xz), a .parquet or .arrow file, a folder
    # of them, a folder that datasets wrote with save_to_disk, or a Hub id.
    path: str = field(default="", metadata=PLACE)
    # Of a Hub id, and of a folder whose files or folders are named by their splits, as the Hub has it: train, training;
    # validation, valid, dev, val; test, testing, eval, evaluation.
    split: str = "train"
    # Ours → theirs, where they differ; several columns are joined without a space. Ours are: prompt, chosen, rejected,
    # id, source, domain, chosen_judgement, rejected_judgement.
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    domain: str = ""  # of every row that names none, or one by a word that is unknown
    domains: dict[str, str] = field(default_factory=dict)  # a row's own word → domain, such as stem: math
    # Source → domain, before `domain`; of a benchmark, subset → domain, before its own table.
    source_domains: dict[str, str] = field(default_factory=dict)
    drop_sources: tuple[str, ...] = ()
    # Of the whole encoded judge prompt. Training drops longer preferences and counts them, `judge` and `eval` record
    # them as too long; so they do with prompts that leave no room, within the model's max_position_embeddings, for all
    # the tokens that may be written behind them.
    max_prompt_tokens: int = 2048
    max_completion_tokens: int = 1024  # of an SFT judgement with its end token; longer rows are dropped and counted
    # What SFT does with a preference that carries no judgements: refuse, leave it out, or write one that has the form
    # and a score on the right side of the middle, and nothing to learn but the form.
    missing_judgements: Literal["error", "drop", "template"] = "error"


@dataclass(frozen=True)
class RunSection(_Checked):
    """The run folder and what is written into it when."""

    folder: str = field(default="", metadata=PLACE)
    seed: int = 0
    epochs: int = 1
    steps: int = 0  # so many steps instead of whole epochs; 0: `epochs`
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    # What resuming and export do where a file of the newest checkpoint is cut or missing: stop, or take the checkpoint
    # before it and put the damaged one aside.
    on_damaged: Literal["stop", "previous"] = "stop"
    # An update whose gradient is not finite, or that would ruin a weight, changes none. skip: the run goes on, unless
    # so many of them come in a row; stop: the first one ends it. What is saved is sound in either case.
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped: int = 10
    show_every: int = 10  # print a sample of judgements every so many steps; 0: never
    tensorboard: bool = True
    wandb_project: str = ""  # needs the wandb extra; empty: not used


@dataclass(frozen=True)
class SamplingSection(_Checked):
    """How judgements are drawn."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    max_new_tokens: int = 1024
    # Completions written at a time, over all devices; those that wait take the places of those that end; 0: all at
    # once. Never changes what is drawn, save for rounding in bfloat16; fewer need less memory, and waste less where
    # lengths differ.
    rows: int = 0


@dataclass(frozen=True)
class JudgingSection(_Checked):
    """How the judgements of a model that is not being trained are drawn."""

    # null: as the model's generation_config.json has it, which transformers and vLLM take for their defaults too; of a
    # held-out pair as the run draws; behind an endpoint nothing is sent, so that the server's default holds.
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # 0: all
    top_p: float | None = None
    max_new_tokens: int | None = None  # null: of held-out pairs as the run has it, else 1024
    rows: int = 256  # as sampling.rows of a run


@dataclass(frozen=True)
class RewardSection(_Checked):
    """Preference-Aware Reward and how rewards become advantages."""

    margin: Literal["graded", "constant"] = "graded"
    group_by: Literal["response", "pair"] = "response"
    normalise_std: bool = True


@dataclass(frozen=True)
class PolicySection(_Checked):
    """The policy update of GRPO."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.001  # 0: no reference is loaded
    reference: str = field(default="", metadata=PLACE)  # a model folder; empty: model.path
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    updates_per_rollout: int = 1


@dataclass(frozen=True)
class HeldoutSection(_Checked):
    """Pairs that are judged now and then while the run trains, and never learnt from."""

    # As data.path, whose other settings hold here too; empty: nothing is held out.
    path: str = field(default="", metadata=PLACE)
    split: str = "test"  # as data.split; of train.jsonl and eval.jsonl, the latter
    eval_every: int = 50  # steps; the last step is evaluated too
    votes: int = 1  # judgements of each response
    limit: int = 0  # so many of the pairs, the first ones; 0: all
    # The metric that selects the best checkpoint, which is kept besides the last ones.
    best: Literal["accuracy_strict", "accuracy_half", "score_gap", "valid"] = "accuracy_strict"
    sampling: JudgingSection = field(default_factory=JudgingSection)


@dataclass(frozen=True)
class SFTConfig(_Checked):
    """`patarm sft`: supervised fine-tuning on judgements."""

    recipe: Literal["sft"] = "sft"
    model: ModelSection = field(default_factory=ModelSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)
    heldout: HeldoutSection = field(default_factory=HeldoutSection)
    rubrics: RubricMode = "adaptive"
    pairs_per_step: int = 32  # each gives two sequences, the chosen's judgement and the rejected's
    packing: bool = True  # short sequences share a row; never changes the result
    micro_batches: int = 1  # slices summed inside one update; never changes the result


@dataclass(frozen=True)
class GRPOConfig(_Checked):
    """`patarm grpo`: reinforcement learning on preference pairs."""

    recipe: Literal["grpo"] = "grpo"
    model: ModelSection = field(default_factory=ModelSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)
    heldout: HeldoutSection = field(default_factory=HeldoutSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    reward: RewardSection = field(default_factory=RewardSection)
    policy: PolicySection = field(default_factory=PolicySection)
    rubrics: RubricMode = "adaptive"
    pairs_per_step: int = 32
    group_size: int = 8  # G, judgements of each response
    micro_batches: int = 1


@dataclass(frozen=True)
class JudgeConfig(_Checked):
    """`patarm judge`: the knobs of scoring the pairs of a file; MODEL, --input and --output come beside them."""

    model: ModelSection = field(default_factory=ModelSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=DataSection)
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    rubrics: RubricMode = "adaptive"
    output: str = field(default="", metadata=PLACE)
    votes: int = 1  # judgements of each response; their mean is the score
    seed: int = 0


@dataclass(frozen=True)
class EndpointSection(_Checked):
    """An OpenAI-compatible server, such as vLLM's or SGLang's, that judges instead of a model here."""

    url: str = ""  # http://host:8000/v1; empty: the model judges here
    model: str = ""  # as the server calls it; empty: the first one it lists
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; unset: none is sent
    concurrency: int = 32  # requests under way at a time
    timeout: float = 600.0  # seconds for one answer
    tries: int = 6  # of one request, with growing pauses, before it is recorded as failed
    busy: float = 1800.0  # seconds a request waits for a server that answers 429, before it is recorded as failed
    thinking: Literal["server", "on", "off"] = "server"  # chat_template_kwargs.enable_thinking; server: not sent
    # Whether the server's chat template writes `<think>` itself, so that answers begin inside the thinking. auto: yes
    # once an answer held `</think>` alone; then a text that was cut off before it has no score.
    opens_thinking: OpensThinking = "auto"
    max_requests: int = 0  # that one command may send, those that are tried again included; 0: any number


@dataclass(frozen=True)
class EvalConfig(_Checked):
    """`patarm eval`: the knobs of an evaluation; BENCHMARK, --model, --data and --output come beside them."""

    benchmark: Benchmark = "rewardbench"
    judge: JudgeKind = "pointwise"
    model: ModelSection = field(default_factory=ModelSection)
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    data: DataSection = field(default_factory=lambda: DataSection(split="", max_prompt_tokens=16384))
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    rubrics: RubricMode = "adaptive"
    output: str = field(default="", metadata=PLACE)
    name: str = ""  # of the judge, such as org/judge-8b, in results; empty: its folder's, or as the server calls it
    votes: int = 1  # answers to each question
    limit: int = 0  # about so many items, spread over the subsets; 0: all
    seed: int = 0
    # The folder of another evaluation of the same items, to compare with.
    against: str = field(default="", metadata=PLACE)


@dataclass(frozen=True)
class BenchConfig(_Checked):
    """`patarm bench`: what is measured, on random weights and made-up tokens."""

    model: Literal["tiny", "small", "0.6b", "1.7b", "4b", "8b", "14b"] = "tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "full"
    attention: Literal["auto", "portable", "cudnn", "pallas", "splash"] = "auto"
    mesh: MeshSection = field(default_factory=MeshSection)
    rows: int = 8  # of sft and attention
    length: int = 512  # tokens of each of them
    packing: bool = False  # sft by the program for packed rows, though each holds one sequence
    responses: int = 4  # of sample, logprobs and grpo: prompts, each completed by a group; even
    prompt: int = 1024  # tokens of each of them
    group: int = 8  # G
    new: int = 256  # tokens of a completion at most
    mean_new: float = 0  # mean of their lengths, before the longest are cut off; 0: all of `new`
    decode_rows: int = 0  # completions written at a time; 0: all
    halvings: int = 3  # how often they may be halved when they run out
    kl_coef: float = 0.0  # above 0: the reference's log-probs are computed too
    micro_batches: int = 1
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Range:
    """The finite numbers between two ends; an open end is not one of them.

    >>> print(Range(0), Range(0, 1), Range(0, open_low=True), Range(0, 1, open_low=True), sep=" · ")
    0 or more · 0 to 1 · above 0 · above 0 up to 1
    >>> print(Range(0, 1, open_high=True), 0 in Range(0), 0 in Range(0, open_low=True), math.inf in Range(0))
    0 to below 1 True False False
    """

    low: int
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high or self.high == math.inf else value <= self.high
        return above and below  # a NaN is neither

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.open_low else f"{self.low} or more"
        start, to = (f"above {self.low}", "up to") if self.open_low else (str(self.low), "to")
        return f"{start} {to} {'below ' if self.open_high else ''}{self.high}"


# What a number may be, by the name of its setting; names mean the same in every section.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("pairs_per_step", "group_size", "micro_batches"), Range(1)),
    "votes": Range(1, 1024),
    **dict.fromkeys(("max_prompt_tokens", "max_completion_tokens", "max_new_tokens"), Range(1)),
    **dict.fromkeys(("length", "responses", "prompt", "group", "new", "repeats"), Range(1)),
    **dict.fromkeys(("epochs", "checkpoint_every", "keep_checkpoints", "max_skipped", "updates_per_rollout"), Range(1)),
    **dict.fromkeys(("steps", "show_every", "warmup_steps", "top_k", "rows", "processes", "temperature"), Range(0)),
    **dict.fromkeys(("concurrency", "tries", "eval_every"), Range(1)),
    **dict.fromkeys(("limit", "max_requests"), Range(0)),
    **dict.fromkeys(("timeout", "busy", "stall_minutes"), Range(0, open_low=True)),
    "join_seconds": Range(1),
    "heartbeat_seconds": Range(5),  # less, and a pause of the network ends a run
    **dict.fromkeys(("learning_rate", "weight_decay", "clip_high", "kl_coef"), Range(0)),
    **dict.fromkeys(("mean_new", "decode_rows", "halvings"), Range(0)),
    **dict.fromkeys(("epsilon", "clip_norm"), Range(0, open_low=True)),
    **dict.fromkeys(("final_fraction", "clip_low"), Range(0, 1)),
    **dict.fromkeys(("beta1", "beta2"), Range(0, 1, open_high=True)),  # at 1 the average never moves
    **dict.fromkeys(("data", "fsdp", "tensor", "process_id"), Range(-1)),
    "top_p": Range(0, 1, open_low=True),
    "seed": Range(0, 2**32, open_high=True),  # jax drops the bits above
}


def load(cls: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with dotted overrides (`--optimizer.learning_rate 1e-6`) on top."""
    return override(from_mapping(cls, read_yaml(path), str(path)), overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a key that stands twice is refused, where YAML's readers take the last."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}. Give the path of a YAML file.") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)
        mapping = loader.get_single_data()
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {one_line(error)}. Mend it there.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply. See the files in configs/ for what a config is.") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} holds no mapping of sections. See the files in configs/ for what one looks like.")
    return mapping


def from_mapping(cls: type[Config], mapping: Mapping[str, Any], where: str) -> Config:
    """A config from nested mappings, found in a file or, where `where` is empty, given on the command line.

    Raises:
        UsageError: a key is unknown, or a value is of the wrong type or out of its range.
    """
    where = f"{where}: " if where else ""
    _refuse_unknown_keys(cls, mapping, where, prefix="")
    try:
        config = msgspec.convert(_floats(cls, mapping), cls)
    except msgspec.ValidationError as error:
        message = re.sub(r" - at `\$\.?(.*?)`$", r" for \1", str(error))
        raise UsageError(f"{where}{message}.") from error
    _refuse_out_of_range(config, where)
    _refuse_what_learns_nothing(config, where)
    return config


def override(config: Config, arguments: Sequence[str]) -> Config:
    """The config with `--section.key value` (or `--section.key=value`) flags laid over it."""
    changes = settings_of(type(config), arguments)
    return from_mapping(type(config), merged(dataclasses.asdict(cast(Any, config)), changes), where="")


def to_yaml(config: Any) -> str:
    """The resolved config, complete, as YAML that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def shared_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings that all processes of a run must have alike, by dotted name: all but places and what is their own.

    >>> list(shared_settings(MeshSection()))[-4:]
    ['processes', 'join_seconds', 'heartbeat_seconds', 'stall_minutes']
    """
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value, name = getattr(config, each.name), f"{prefix}{each.name}"
        if dataclasses.is_dataclass(value):
            found |= shared_settings(value, f"{name}.")
        elif not each.metadata.get("place") and not each.metadata.get("own"):
            found[name] = value
    return found


def _refuse_unknown_keys(cls: Any, mapping: Any, where: str, prefix: str) -> None:
    if not isinstance(mapping, Mapping):
        raise UsageError(f"{where}{prefix.rstrip('.')} is a section of keys, got {mapping!r}.")
    kinds = get_type_hints(cls)
    for key, value in mapping.items():
        if key not in kinds:
            raise UsageError(f"{where}unknown key {prefix}{key}.{nearest(str(key), list(kinds), prefix)}")
        if dataclasses.is_dataclass(kinds[key]):
            _refuse_unknown_keys(kinds[key], value, where, f"{prefix}{key}.")


def _refuse_out_of_range(config: Any, where: str, prefix: str = "") -> None:
    for name, value in ((each.name, getattr(config, each.name)) for each in dataclasses.fields(config)):
        if dataclasses.is_dataclass(value):
            _refuse_out_of_range(value, where, f"{prefix}{name}.")
        elif name in RANGES and value is not None:
            if value not in RANGES[name]:
                finite = "" if -math.inf < value < math.inf else ", and finite"
                raise UsageError(f"{where}{prefix}{name} is {value}; allowed is {RANGES[name]}{finite}.")


def _refuse_what_learns_nothing(config: Any, where: str) -> None:
    """Settings that are right one by one, and together leave every advantage at 0."""
    if not isinstance(config, GRPOConfig):
        return
    if config.group_size == 1 and config.reward.group_by == "response":
        raise UsageError(
            f"{where}group_size is 1 where reward.group_by is response; allowed is 2 or more: a judgement that is "
            "compared with itself teaches nothing. Raise group_size."
        )
    sampling = config.sampling
    for greedy, got, allowed in (
        (sampling.temperature == 0, "temperature is 0", "above 0, such as 1"),
        (sampling.top_k == 1, "top_k is 1", "0, for all, or 2 or more"),
    ):
        if greedy:
            raise UsageError(
                f"{where}sampling.{got}; allowed for grpo is {allowed}: judgements of a response that are all the same "
                "teach nothing when they are compared."
            )


class _Loader(yaml.SafeLoader):
    """YAML without the two surprises of SafeLoader: a key that stands twice, and an error that is not a YAMLError."""

    name: str

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(
                    f"{self.name}: the key {key.value} stands in line {lines[key.value]} and again in line {line}. "
                    "Keep one of them."
                )
            lines[key.value] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:  # `2024-99-99` is no date
            raise UsageError(
                f"{self.name}:{node.start_mark.line + 1}: {str(node.value)[:40]} cannot be read: {one_line(error)}. "
                "Put it in quotes if it is text."
            ) from error


def _floats(cls: Any, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads `1e-6` as text: turn the text of a float field into the number that was meant."""
    kinds, result = get_type_hints(cls), dict(mapping)
    for key, value in mapping.items():
        if dataclasses.is_dataclass(kinds[key]):
            result[key] = _floats(kinds[key], value)
        elif float in (kinds[key], *get_args(kinds[key])) and isinstance(value, str):
            with contextlib.suppress(ValueError):
                result[key] = float(value)
        elif kinds[key] == dict[str, tuple[str, ...]] and isinstance(value, Mapping):
            result[key] = {name: [text] if isinstance(text, str) else text for name, text in value.items()}
    return result
