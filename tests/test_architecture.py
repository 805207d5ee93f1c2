"""A config.json is understood key by key, or refused by name; what passes changes nothing for transformers."""

import json

import pytest
import transformers

from patarm_jax.model.architecture import Architecture, from_hf, read_architecture, to_hf
from patarm_jax.model.config_keys import EMPTY, INERT, ONLY, REFUSED
from patarm_jax.model.weights import load
from patarm_jax.types import UserError
from tests.toys import TINY, hf_model

# As Qwen publishes it, written by transformers 4.
V4 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B = Architecture(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, bos_token_id=151643, eos_token_id=151645,
)  # fmt: skip
V5 = {k: v for k, v in V4.items() if k not in ("rope_theta", "rope_scaling")} | {
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "layer_types": ["full_attention"] * 36,
}


@pytest.mark.parametrize("raw", [V4, V5], ids=["transformers 4", "transformers 5"])
def test_the_published_config(raw):
    assert from_hf(raw, "config.json") == QWEN3_8B
    assert from_hf(to_hf(QWEN3_8B, "bfloat16"), "config.json") == QWEN3_8B


def test_what_transformers_writes_today_is_read(tmp_path):
    transformers.Qwen3Config(**V4).save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == QWEN3_8B


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"bits": 4}}, "supported is none. The model is quantised: use the unquantised one"),
        ({"quantization": {"bits": 4}}, "supported is none. The model is quantised: use the unquantised one"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "If it is a plain Qwen3, remove auto_map from the file"),
        ({"transformers_weights": "other.safetensors"}, "Give that file the name model.safetensors"),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "Its layers differ from each other"),
        ({"is_causal": False}, "is_causal is False; supported is True"),
        ({"use_mrope": True}, "use_mrope is True; supported is False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported is 1"),
        ({"my_own_key": 1}, "keys that are not understood: my_own_key. Only dense Qwen3 and Qwen2 models are"),
        ({"num_experts": 8}, "num_experts is"),
        ({"model_type": "qwen2"}, "architectures is ['Qwen3ForCausalLM']; supported is ['Qwen2ForCausalLM']"),
        ({"model_type": None}, "model_type is None; supported is 'qwen3'"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures is ['Qwen3ForTokenClassification']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; supported is False"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; supported is 0"),
        ({"use_sliding_window": True}, "use_sliding_window is True; supported is False"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is True; supported is False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'; supported is 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'; supported is 'default'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}, "are not understood: mrope_section"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 5}},
            "rope_theta is 1000000 and rope_scaling.rope_theta",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 1000000}},
            "and rope_scaling {'rope_type': 'default'}. Keep the true one.",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers and num_hidden_layers is 36"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "supported is 'full_attention'"),
        ({"rope_parameters": {"rope_theta": 1, "factor": 2}}, "rope_parameters.factor is 2; supported is 1"),
        ({"rope_parameters": {"rope_theta": 1, "rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            "rope_theta is 1000000 and rope_parameters.rope_theta is 10000.0",
        ),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; supported is a mapping"),
        ({"layer_types": 3}, "layer_types is 3; supported is a list of 'full_attention'"),
        ({"layer_types": ["full_attention", [1]]}, "layer_types holds ['[1]', 'full_attention']; supported is"),
        ({"rope_theta": None}, "missing keys: rope_theta"),
        ({"head_dim": None}, "missing keys: head_dim"),
        ({"num_hidden_layers": "36"}, "Expected `int`, got `str` for num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be positive"),
        ({"rms_norm_eps": "tiny"}, "Expected `float`, got `str` for rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "Expected `bool`, got `str` for tie_word_embeddings"),
        ({"head_dim": 127}, "head_dim is 127; rotary embeddings need an even number"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5 key-value heads evenly"),
    ],
)
def test_configs_that_are_refused(change, says):
    with pytest.raises(UserError) as caught:
        from_hf(V4 | change, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ") and says in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "rope_theta", "vocab_size", "head_dim"])
def test_a_missing_key_is_never_a_silent_default(key):
    with pytest.raises(UserError, match=key):
        from_hf({k: v for k, v in V4.items() if k != key}, "config.json")


def test_several_eos_ids_in_the_config():
    assert from_hf(V4 | {"eos_token_id": [7, 8]}, "").eos_token_id == 7


# ----------------------------------------------------------------------- keys that change nothing, beside the numbers

# As people have them: after Unsloth, LLaMA-Factory, PEFT, older and newer transformers, vLLM and conversions.
SEEN = [
    {"sliding_window": 4096, "use_sliding_window": False},
    {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
    {"_attn_implementation_autoset": True},
    {"_attn_implementation": "sdpa"},
    {"attn_implementation": "sdpa"},
    {"unsloth_version": "2025.9.1", "unsloth_fixed": True},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_scaling": {"rope_type": "default", "type": "default", "factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": None},
    {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    {"use_mrope": False},
    {"partial_rotary_factor": 1.0},
    {"is_causal": True, "is_decoder": True, "pruned_heads": {}},
    {"tokenizer_class": "Qwen2TokenizerFast", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 3]},
    {"output_hidden_states": True, "return_dict": True, "torchscript": False},
    {"task_specific_params": None, "problem_type": None, "id2label": {"0": "A", "1": "B"}, "num_labels": 2},
    {"layer_types": ["full_attention", "full_attention"]},
    {"quantization_config": None, "auto_map": {}, "per_layer_config": None, "transformers_weights": None},
    {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_length": 99, "repetition_penalty": 1.1},
    {"gradient_checkpointing": False, "use_cache": False, "pretraining_tp": 1, "dtype": "float32"},
    {"mlp_bias": False, "attention_bias": False, "attention_dropout": 0.0, "chunk_size_feed_forward": 0},
    {"_name_or_path": "Qwen/Qwen3-8B", "transformers_version": "4.51.0", "torch_dtype": "float32"},
    {"original_max_position_embeddings": 128, "model_max_length": 512, "loss_type": "ForCausalLM"},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with weights, its raw config, and what transformers' model says to some tokens."""
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    folder = tmp_path_factory.mktemp("small")
    hf_model(vocab_size=96, tie_word_embeddings=False).save_pretrained(folder)
    raw = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key in to_hf_keys()}
    raw |= {"rope_theta": 10000.0}
    return folder, raw, logits(torch, folder, raw)


def to_hf_keys():
    numbers = set(to_hf(read_shape(), "float32"))
    return numbers - {"rope_scaling", "torch_dtype"}


def read_shape():
    return Architecture(**TINY)


def logits(torch, folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("change", SEEN, ids=lambda change: " ".join(change))
def test_what_is_inert_changes_nothing_in_transformers_nor_here(small, change):
    torch = pytest.importorskip("torch")
    folder, raw, plain = small
    assert torch.equal(logits(torch, folder, raw | change), plain)
    free = {"bos_token_id", "eos_token_id"}
    ours, theirs = (vars(from_hf(each, "")) for each in (raw | change, raw))
    assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}
    load(folder)


def test_the_tables_are_of_one_mind():
    """No key is of two kinds, each has its reason, and every key of transformers' Qwen3 is in one of them."""
    numbers = set(vars(read_shape()))
    kinds = [set(INERT), set(ONLY), set(REFUSED), numbers]
    assert sum(map(len, kinds)) == len(set().union(*kinds))
    assert all(INERT.values()) and all(why for _, why in ONLY.values()) and all(REFUSED.values())
    known = set().union(*kinds) | {"model_type", "architectures", "rope_parameters", "rope_scaling", "layer_types"}
    assert set(transformers.Qwen3Config().to_dict()) <= known
    for key, (allowed, _) in ONLY.items():
        for value in allowed:
            from_hf(V4 | {key: value}, "")
    for key in REFUSED:
        for value in EMPTY:
            from_hf(V4 | {key: value}, "")


def test_every_generation_setting_of_transformers_4_passes():
    """Its configs held them all, whatever model it was."""
    ours = {"output_attentions", "output_hidden_states", "return_dict", "use_cache"} | set(INERT)
    of_transformers_4 = set(
        """
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
        forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens""".split()
    )
    assert of_transformers_4 <= ours


def test_a_window_that_is_not_used(real_inputs):
    """The published config of the 4B model, as transformers 4.51 wrote it, with a window beside the switch."""
    raw = json.loads((real_inputs / "qwen3_tokenizer" / "Qwen3-4B.config.json").read_text())
    assert from_hf(raw | {"sliding_window": 4096}, "") == from_hf(raw, "")
