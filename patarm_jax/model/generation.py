"""How a model's folder says that answers are to be drawn: what transformers and vLLM take for their defaults.

It stands in generation_config.json or, where that file is missing, in config.json, as both of them read it. Whatever
else the file asks of the drawing is named, so that it can be said that it is not done here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patarm_jax.files import read_json_object
from patarm_jax.types import UserError

FILE, OLD_FILE = "generation_config.json", "config.json"


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn; the default is from the model's own distribution."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def __str__(self) -> str:
        """Such as `temperature 0.6, top_k 20, top_p 0.95`."""
        return f"temperature {self.temperature:g}, top_k {self.top_k}, top_p {self.top_p:g}"


@dataclass(frozen=True)
class Generation:
    """What a folder says of the drawing."""

    source: str  # the file; empty where none says anything
    temperature: float | None  # 0: greedy; None: not said
    top_k: int | None  # 0: all
    top_p: float | None
    others: Mapping[str, object]  # what else would change what is drawn, which the sampler here does not know


# What would change what is drawn, and the values at which it does not.
_OTHERS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "top_h"), (None, 0)),
    **dict.fromkeys(("typical_p", "repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (None, 1)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "diversity_penalty", "penalty_alpha"), (None, 0)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (None, 0)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (None, 0, 1)),
    **dict.fromkeys(("min_length", "min_new_tokens"), (None, 0)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "sequence_bias", "suppress_tokens"), (None, [], {})),
    **dict.fromkeys(("begin_suppress_tokens", "stop_strings", "constraints"), (None, [], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), (None,)),
    **dict.fromkeys(("dola_layers", "watermarking_config", "max_new_tokens", "max_time"), (None,)),
    **dict.fromkeys(("renormalize_logits", "token_healing", "use_mtp"), (None, False)),
}
# What never does: ids, what is returned, how it is computed, and lengths that other settings say here.
_INERT = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("_from_model_config", "do_sample", "temperature", "top_k", "top_p", "max_length", "use_cache"),
        *("cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size", "low_memory"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("num_return_sequences", "early_stopping", "length_penalty", "remove_invalid_values", "trust_remote_code"),
        *("compile_config", "disable_compile", "is_assistant", "num_assistant_tokens", "assistant_early_exit"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "chat_format", "_name_or_path"),
        *("generation_kwargs", "continuous_batching_config"),
    )
)


def read_generation(folder: Path) -> Generation:
    """What a model's folder says of the drawing.

    `do_sample: false` is greedy, as transformers has it; where it is absent, the rest counts, as vLLM has it.

    Raises:
        UserError: when a value is none that can be drawn by.
    """
    source, raw = FILE, read_json_object(folder / FILE)
    if raw is None:
        source, raw = OLD_FILE, read_json_object(folder / OLD_FILE) or {}
        raw = {name: value for name, value in raw.items() if name in _OTHERS or name in _DRAWN}
    if not raw:
        return Generation(source="", temperature=None, top_k=None, top_p=None, others={})
    where = str(folder / source)
    temperature, top_k, top_p = (_number(where, name, raw.get(name)) for name in ("temperature", "top_k", "top_p"))
    others = {
        name: value
        for name, value in raw.items()
        if name not in _INERT and value not in _OTHERS.get(name, (None, {}, []))
    }
    return Generation(
        source=source,
        temperature=0.0 if raw.get("do_sample") is False else temperature,
        top_k=None if top_k is None else max(0, int(top_k)),
        top_p=top_p,
        others=others,
    )


# What a number may be, in words, and whether it is that.
_DRAWN = {
    "do_sample": ("true or false", lambda value: isinstance(value, bool)),
    "temperature": ("0 or more", lambda value: 0 <= value < float("inf")),
    "top_k": ("-1, for all, or a whole number from 0", lambda value: value >= -1 and value == int(value)),
    "top_p": ("above 0 up to 1", lambda value: 0 < value <= 1),
}


def _number(where: str, name: str, value: object) -> float | None:
    allowed, holds = _DRAWN[name]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise UserError(f"{where}: {name} is {value!r}; allowed is {allowed}. Set it in the file.")
    return float(value)


def to_generation_config(drawing: Drawing) -> dict[str, object]:
    """Keys of generation_config.json by which transformers and vLLM draw in this way.

    All are written: of those that are missing, transformers and vLLM have different defaults. Greedy is `do_sample` to
    transformers and a temperature of 0 to vLLM.
    """
    if drawing.temperature == 0:
        return {"do_sample": False, "temperature": 0.0}
    return {
        "do_sample": True,
        "temperature": drawing.temperature,
        "top_k": drawing.top_k,
        "top_p": drawing.top_p,
    }
