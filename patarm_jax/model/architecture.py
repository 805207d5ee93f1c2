"""The shape of a dense Qwen3 or Qwen2, read from and written to Hugging Face's config.json.

Every key of the file is either understood or refused by name: a silent default would train a wrong model.
"""

import dataclasses
import importlib.metadata
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from patarm_jax.files import read_json_object
from patarm_jax.model.config_keys import EMPTY, INERT, OF_QWEN2, ONLY, REFUSED, ROPE
from patarm_jax.types import UserError


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix the network; names are Hugging Face's."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H, independent of D / N
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    scalar_head: bool = False  # one score, of a Bradley-Terry reward model, in place of the vocabulary's logits
    # qwen3 normalises queries and keys; qwen2, which is Qwen2.5's too, adds a bias to queries, keys and values.
    model_type: Literal["qwen3", "qwen2"] = "qwen3"

    @property
    def name(self) -> str:
        """What the network is called."""
        return FAMILIES[self.model_type]


FAMILIES = {"qwen3": "Qwen3", "qwen2": "Qwen2"}
_ONLY_THESE = "Only dense Qwen3 and Qwen2 models are (Qwen2.5 calls itself Qwen2)"
_HEADS = {False: "ForCausalLM", True: "ForSequenceClassification"}  # by scalar_head, behind the family's name
# What `from_hf` reads itself, beside the fields of `Architecture`.
_READ = {"architectures", "rope_parameters", "rope_scaling", "layer_types"}


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the model in a Hugging Face folder."""
    path = folder / "config.json"
    raw = read_json_object(path)
    if raw is None:
        raise UserError(f"{folder} holds no config.json. Give the folder of a Hugging Face Qwen3 or Qwen2 model.")
    return from_hf(raw, str(path))


def from_hf(raw: dict[str, object], where: str) -> Architecture:
    """Our architecture from Hugging Face's keys, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
        UserError: when a key is missing, not known, or says something that would make another network.
    """
    known = {field.name for field in dataclasses.fields(Architecture)} - {"scalar_head"}
    scalar = _refuse_another_architecture(raw, where)
    _refuse_keys(raw, known, where)
    _refuse_layers(raw, where)
    values: dict[str, Any] = {key: raw[key] for key in known if key in raw} | _rope_theta(raw, where)
    if raw["model_type"] == "qwen2" and values.get("head_dim") is None:
        values |= _even_heads(values, where)
    required = [f.name for f in dataclasses.fields(Architecture) if f.default is dataclasses.MISSING]
    if missing := [key for key in [*required, "rope_theta"] if values.get(key) is None]:
        raise UserError(f"{where}: missing keys: {', '.join(missing)}. Copy the file again from where the model came.")
    labels = raw.get("id2label")
    if scalar and (raw.get("num_labels", 1) != 1 or (isinstance(labels, dict) and len(labels) != 1)):
        raise UserError(f"{where}: a classifier of several classes; supported is one score: num_labels 1.")
    values["scalar_head"] = scalar
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = next(iter(values["eos_token_id"]), None)  # generation_config.json holds them all
    try:
        config = msgspec.convert(values, Architecture)
    except msgspec.ValidationError as error:
        message = re.sub(r" - at `\$\.?(.*?)`$", r" for \1", str(error))
        raise UserError(f"{where}: {message}. Copy the file again from where the model came.") from error
    if small := [key for key in [*required, "rope_theta"] if values[key] <= 0]:
        raise UserError(f"{where}: {small[0]} is {values[small[0]]}; it must be positive. Copy the file again.")
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim is {config.head_dim}; rotary embeddings need an even number.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{where}: {config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key-value "
            "heads evenly; num_attention_heads must be a multiple of num_key_value_heads."
        )
    return config


def to_hf(arch: Architecture, dtype: str) -> dict[str, object]:
    """Hugging Face's config.json, readable by transformers 4 and 5 alike."""
    numbers = dataclasses.asdict(arch)
    del numbers["scalar_head"]
    if arch.model_type == "qwen2" and arch.head_dim * arch.num_attention_heads == arch.hidden_size:
        del numbers["head_dim"]  # which its own files do not name
    biases = {"attention_bias": False} if arch.model_type == "qwen3" else {}  # qwen2 always has them
    return {
        "architectures": [arch.name + _HEADS[arch.scalar_head]],
        **numbers,
        **({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if arch.scalar_head else {}),
        "rope_scaling": None,
        "hidden_act": "silu",
        **biases,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
        "torch_dtype": dtype,
        # Without it releases of transformers from 4.57.3 on (5.17 was seen) call the tokenizer beside it wrong, and
        # advise Mistral's regex, which would make it so.
        "transformers_version": importlib.metadata.version("transformers"),
    }


def _refuse_another_architecture(raw: dict[str, object], where: str) -> bool:
    """Refuses all but the two heads of a dense Qwen3 or Qwen2; says whether the head gives a score."""
    if raw.get("model_type") not in FAMILIES:
        got = f"is {raw['model_type']!r}" if "model_type" in raw else "is missing"
        raise UserError(f"{where}: model_type {got}; supported is 'qwen3' or 'qwen2'. {_ONLY_THESE}.")
    of_text, of_score = ([FAMILIES[str(raw["model_type"])] + head] for head in _HEADS.values())
    named = raw.get("architectures")
    if named not in (None, of_text, of_score):
        raise UserError(f"{where}: architectures is {named!r}; supported is {of_text!r}. {_ONLY_THESE}.")
    return bool(named == of_score)


def _even_heads(values: dict[str, Any], where: str) -> dict[str, int]:
    """The width of a head where the file does not name it: the heads share the network's width."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
        return {}  # what is wrong with them is said with all that is missing
    if width % heads:
        raise UserError(
            f"{where}: hidden_size is {width}, which {heads} heads do not share evenly, and head_dim is missing. Copy "
            "the file again from where the model came."
        )
    return {"head_dim": width // heads}


def _refuse_keys(raw: dict[str, object], known: set[str], where: str) -> None:
    """Refuses what the tables of `config_keys` do not let pass."""
    for key in sorted(REFUSED.keys() & raw.keys()):
        if raw[key] not in EMPTY:
            raise UserError(f"{where}: {key} is {reprlib.repr(raw[key])}; supported is none. {REFUSED[key]}.")
    if unknown := sorted(raw.keys() - known - _READ - INERT.keys() - ONLY.keys() - REFUSED.keys()):
        raise UserError(
            f"{where}: keys that are not understood: {', '.join(unknown)}. {_ONLY_THESE}. Where they "
            "change nothing in what this model computes, remove them from the file."
        )
    only = ONLY if raw["model_type"] == "qwen3" else ONLY | OF_QWEN2
    for key, (supported, why) in only.items():
        if key in raw and raw[key] not in supported:
            raise UserError(f"{where}: {key} is {raw[key]!r}; supported is {supported[0]!r}: {why}.")


def _refuse_layers(raw: dict[str, object], where: str) -> None:
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise UserError(f"{where}: layer_types is {layer_types!r}; supported is a list of 'full_attention'.")
    if any(kind != "full_attention" for kind in layer_types):
        raise UserError(
            f"{where}: layer_types holds {sorted(set(map(str, layer_types)))}; supported is 'full_attention'."
        )
    if layer_types and len(layer_types) != raw.get("num_hidden_layers"):
        raise UserError(
            f"{where}: layer_types has {len(layer_types)} layers and num_hidden_layers is "
            f"{raw.get('num_hidden_layers')!r}. Copy the file again from where the model came."
        )


def _rope_theta(raw: dict[str, Any], where: str) -> dict[str, float]:
    """The one `rope_theta` that stands outside, in `rope_parameters` or in `rope_scaling`, and unscaled everywhere."""
    found = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    both = [raw.get(name) for name in ("rope_parameters", "rope_scaling")]
    if all(both) and both[0] != both[1]:  # transformers forgets what rope_parameters says, the base included
        raise UserError(f"{where}: rope_parameters is {both[0]!r} and rope_scaling {both[1]!r}. Keep the true one.")
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {name} is {rope!r}; supported is a mapping such as {{'rope_type': 'default'}}.")
        # transformers reads no more than the names of these where the type is default.
        if unknown := sorted(rope.keys() - ROPE.keys() - {"rope_theta", "original_max_position_embeddings"}):
            raise UserError(f"{where}: {name} holds keys that are not understood: {', '.join(unknown)}.")
        for key, (supported, why) in ROPE.items():
            if key in rope and rope[key] not in supported:
                raise UserError(f"{where}: {name}.{key} is {rope[key]!r}; supported is {supported[0]!r}: {why}.")
        if rope.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    if any(theta != next(iter(found.values())) for theta in found.values()):
        said = " and ".join(f"{name} is {theta!r}" for name, theta in found.items())
        raise UserError(f"{where}: {said}. Keep the true one.")
    return {"rope_theta": next(iter(found.values()))} if found else {}
