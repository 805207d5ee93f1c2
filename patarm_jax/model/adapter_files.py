"""LoRA adapters on disk, in PEFT's format: adapter_config.json beside adapter_model.safetensors.

A key of the config that would make another network than W + scale · A·B is refused by name.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.config.sections import TARGETS, LoRASection
from patarm_jax.files import read_json_object, write_json
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.config_keys import EMPTY
from patarm_jax.model.layout import SCORE, Entry, hf_tensors, read_into, table_of, tensor_shapes
from patarm_jax.model.lora import abstract_adapters
from patarm_jax.model.sharding import Rules
from patarm_jax.model.transformer import LORA_A, LORA_B, abstract_params
from patarm_jax.model.weight_files import ADAPTER, Stored, check_file, open_file
from patarm_jax.model.weights import write_tensors
from patarm_jax.types import UserError

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before the name of a tensor, as PEFT wraps a model
_BASE = "base_model_name_or_path"
# Keys that change nothing in what trained adapters compute.
_INERT = {
    *(_BASE, "auto_mapping", "revision", "task_type", "inference_mode", "lora_dropout", "peft_version"),
    *("target_modules", "exclude_modules", "layers_pattern", "megatron_config", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "modules_to_save", "bias", "init_lora_weights"}
# The beginnings of adapters that leave the weights beside them as they were.
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class StoredAdapter:
    """A folder of adapters."""

    folder: Path
    base: str  # the model that they were trained on, as its config calls it
    rank: int
    scale: float  # of A·B
    files: Mapping[str, Path]  # tensor → its file

    @property
    def has_score_head(self) -> bool:
        """Whether a head that gives scores was trained beside them."""
        return _PREFIX + SCORE in self.files

    @property
    def targets(self) -> list[str]:
        """The weights that have adapters."""
        parts = {part for name in self.files for part in name.split(".")}
        return [target for target in TARGETS if target in parts]

    def stored(self, arch: Architecture) -> Stored:
        """As the files of a model are known, for their digest."""
        return Stored(self.folder, arch, self.folder / ADAPTER, self.files, ())


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters, and no model of its own."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: Path) -> StoredAdapter:
    """Finds out what a folder of adapters holds; no weight is read.

    Raises:
        UserError: when it holds none, or such as are not supported.
    """
    path = folder / ADAPTER
    raw = read_json_object(path)
    if raw is None:
        raise UserError(
            f"model.adapter {folder} holds no {ADAPTER}. Give a folder of LoRA adapters as PEFT's save_pretrained, or "
            "lora.export adapter, writes it."
        )
    _refuse_other_adapters(raw, path)
    rank, alpha = raw.get("r"), raw.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(
            f"{path}: r is {rank!r} and lora_alpha {alpha!r}; both must be positive numbers. Copy the file again."
        )
    file = folder / WEIGHTS
    if not file.is_file():
        other = folder / "adapter_model.bin"
        got = f"but {other.name}, which is not read" if other.exists() else "and no other weights"
        raise UserError(f"{folder} holds no {WEIGHTS}, {got}. Save the adapters with safe_serialization.")
    with contextlib.ExitStack() as stack:
        files = dict.fromkeys(open_file(file, stack).keys(), file)
    scale = alpha / math.sqrt(rank) if raw.get("use_rslora") else alpha / rank
    return StoredAdapter(folder=folder, base=str(raw.get(_BASE) or ""), rank=rank, scale=scale, files=files)


def _refuse_other_adapters(raw: Mapping[str, object], path: Path) -> None:
    """Refuses what is no plain LoRA."""
    for key, allowed in (
        ("peft_type", ("LORA",)),
        ("bias", ("none", None)),
        ("init_lora_weights", _INITIAL),
    ):
        if raw.get(key) not in allowed:
            shown = " or ".join(map(repr, (each for each in allowed if each not in (None, []))))
            raise UserError(
                f"{path}: {key} is {raw.get(key)!r}; supported is {shown}: only plain LoRA is. Merge the adapters into "
                "their model with PEFT's merge_and_unload, and give the merged folder."
            )
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not set(map(str, saved)) <= {"score", "classifier"}:
        raise UserError(
            f"{path}: modules_to_save is {saved!r}; supported is ['score']: only the head of a reward model may have "
            "been trained beside the adapters. Merge them into their model with PEFT's merge_and_unload."
        )
    for key in sorted(raw.keys() - _INERT - _READ):
        if raw[key] not in (*EMPTY, False):
            raise UserError(
                f"{path}: {key} is {raw[key]!r}; supported is none: only plain LoRA is. Merge the adapters into their "
                "model with PEFT's merge_and_unload, and give the merged folder."
            )


def check_adapter(adapter: StoredAdapter, arch: Architecture) -> None:
    """Refuses adapters of another network: a tensor is missing, unknown, or of another shape."""
    table = _table(arch, adapter.targets, adapter.has_score_head)
    wanted = tensor_shapes(table, _abstract(arch, None, {}, adapter), arch.num_hidden_layers)
    file = adapter.folder / WEIGHTS
    fault = "The adapters are of another model: name the one that they were trained on as model.path"
    base = f", {adapter.base} by {ADAPTER}" if adapter.base else ""
    if missing := sorted(wanted.keys() - adapter.files.keys()):
        raise UserError(f"{file}: tensor {missing[0]} is missing ({len(missing)} missing in all). {fault}{base}.")
    if extra := sorted(adapter.files.keys() - wanted.keys()):
        raise UserError(
            f"{file}: tensor {extra[0]} belongs to no weight that can have adapters ({len(extra)} such in all); these "
            f"are {', '.join(TARGETS)} of {arch.num_hidden_layers} layers. {fault}{base}."
        )
    check_file(file, wanted, asks="the model", wrong=f"{fault}{base}.")


def load_adapter(
    adapter: StoredAdapter, arch: Architecture, mesh: Mesh | None, rules: Rules, unstacked: bool = False
) -> Params:
    """The adapters in float32, as a tree to be joined with the weights; with a score head where there is one."""
    params: Params = {}
    table = _table(arch, adapter.targets, adapter.has_score_head)
    abstract = _abstract(arch, mesh, rules, adapter)
    read_into(params, table, abstract, adapter.files, arch.num_hidden_layers, unstacked)
    return params


def _abstract(arch: Architecture, mesh: Mesh | None, rules: Rules, adapter: StoredAdapter) -> Params:
    weights = abstract_params(arch, mesh, rules)
    score = {"score": weights["score"]} if adapter.has_score_head else {}
    return abstract_adapters(weights, adapter.rank, adapter.targets) | score


def save_adapter(params: Params, arch: Architecture, section: LoRASection, base: str, part: Path) -> None:
    """Writes trained adapters into a folder; all processes must call it, and the first one writes.

    Args:
        params: the adapters, and a score head where there is one.
        arch: the network's shape.
        section: how they were trained.
        base: the model that they belong to, as PEFT is to look for it.
        part: the folder.
    """
    table = _table(arch, section.targets, arch.scalar_head)
    write_tensors(part / WEIGHTS, hf_tensors(params, table, arch.num_hidden_layers, np.dtype(np.float32)))
    if jax.process_index() == 0:
        write_json(
            part / ADAPTER,
            {
                "peft_type": "LORA",
                "task_type": "SEQ_CLS" if arch.scalar_head else "CAUSAL_LM",
                _BASE: base,
                "r": section.rank,
                "lora_alpha": section.alpha,
                "target_modules": list(section.targets),
                "modules_to_save": ["score"] if arch.scalar_head else None,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "init_lora_weights": True,
                "inference_mode": True,
            },
        )


def _table(arch: Architecture, targets: Sequence[str], score: bool) -> list[Entry]:
    """The tensors of adapters: A is stored as [rank, in], B as [out, rank]."""
    found = []
    for entry in table_of(arch):
        if entry.path[-1] in targets:
            name = _PREFIX + entry.name.removesuffix(".weight")
            *above, weight = entry.path
            found.append(Entry((*above, weight + LORA_A), f"{name}.lora_A.weight", inputs=entry.inputs))
            found.append(Entry((*above, weight + LORA_B), f"{name}.lora_B.weight", inputs=1))
    return [*found, Entry(("score",), _PREFIX + SCORE)] if score else found
