"""What a Qwen3's or Qwen2's config.json may hold beside the network's numbers, and why each key is taken or refused.

Four kinds: understood (the fields of `Architecture`, and what `config.from_hf` reads itself), inert whatever they say,
inert at some values alone, and refused when they say anything. A key that stands nowhere here is refused by name.
"""

_WRITTEN_BY = "tells who wrote the file"
_KERNEL = "picks the kernel that computes the same attention; model.attention does so here"
_RETURNED = "says what transformers' forward returns besides the logits"
_TOKENS = "an id of the tokenizer; the tokenizer's files say it here"
_GENERATION = "how transformers' generate draws; the sampling section says it here"
_CLASSES = "describes classes for a training loss or a label; no logit depends on it"
_FULL_ATTENTION = "is only read where use_sliding_window is true"

# Keys that change nothing in what the network computes, whatever they say.
INERT: dict[str, str] = {
    **dict.fromkeys(("_name_or_path", "name_or_path", "_commit_hash"), "tells where the model was loaded from"),
    **dict.fromkeys(("transformers_version", "unsloth_version", "unsloth_fixed"), _WRITTEN_BY),
    "transformers.js_config": "is read by transformers.js alone",
    **dict.fromkeys(("dtype", "torch_dtype"), "the dtype of the files says how the weights are stored"),
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"), _KERNEL),
    **dict.fromkeys(("_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attention_2"), _KERNEL),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), "a dense network has no experts"),
    "_experts_implementation_internal": "a dense network has no experts",
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"), _RETURNED),
    "tie_last_hidden_states": _RETURNED,
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing"), "memory against time; model.remat here"),
    "use_cache": "keeps keys and values while generating, which changes no logit",
    "chunk_size_feed_forward": "computes the same feed-forward in pieces, and neither Qwen3 nor Qwen2 reads it",
    "pretraining_tp": "of Llama's first checkpoints; neither Qwen3 nor Qwen2 reads it",
    **dict.fromkeys(("torchscript", "use_bfloat16", "tf_legacy_loss"), "a switch of transformers 4 for other backends"),
    **dict.fromkeys(("max_window_layers", "sliding_window"), _FULL_ATTENTION),
    "original_max_position_embeddings": "is only read by scaled rotary embeddings, which are refused",
    **dict.fromkeys(("pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"), _TOKENS),
    **dict.fromkeys(("decoder_start_token_id", "tokenizer_class", "model_max_length", "prefix"), _TOKENS),
    **dict.fromkeys(("task_specific_params", "finetuning_task", "problem_type", "classifier_dropout"), _CLASSES),
    **dict.fromkeys(("id2label", "label2id", "num_labels"), _CLASSES),  # with a scalar head they are checked besides
    "loss_type": "names a training loss of transformers",
    "neftune_noise_alpha": "noise on embeddings while transformers trains",
    "logits_to_keep": "how many logits transformers' forward returns",
    "max_seq_len": "of the tool that trained the model; max_position_embeddings says what the network was made for",
    "trust_remote_code": "says whether code of a model may run, and no such code is run here",
    **dict.fromkeys(
        (
            *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
            *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "num_beams"),
            *("num_beam_groups", "num_return_sequences", "diversity_penalty", "length_penalty", "repetition_penalty"),
            *("encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
            *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
            *("forced_eos_token_id", "remove_invalid_values", "output_scores", "return_dict_in_generate"),
        ),
        _GENERATION,
    ),
}

_OTHER_NETWORK = "anything else is another network than the dense Qwen3 and Qwen2"

# Keys with values that change nothing, and why any other would. The first value is the one that an error names.
ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu",), _OTHER_NETWORK),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias"), ((False,), "biases are not computed here")),
    "attention_dropout": ((0, 0.0), "dropout is not computed here"),
    "use_sliding_window": ((False, None), "attention over a window is not computed here"),
    "is_causal": ((True,), "attention to later tokens is another network"),
    "attention_chunk_size": ((None,), "attention within chunks is not computed here"),
    "use_mrope": ((False, None), "rotary embeddings of several axes are Qwen-VL's"),
    "partial_rotary_factor": ((1, 1.0, None), "rotary embeddings of a part of a head are not computed here"),
    "is_encoder_decoder": ((False, None), _OTHER_NETWORK),
    "is_decoder": ((False, True, None), _OTHER_NETWORK),
    **dict.fromkeys(("add_cross_attention", "tie_encoder_decoder"), ((False, None), _OTHER_NETWORK)),
    "cross_attention_hidden_size": ((None,), _OTHER_NETWORK),
    "pruned_heads": (({}, None), "heads that were cut away are another network"),
    "mlp_only_layers": (([], None), "experts are not computed here"),
    **dict.fromkeys(("num_experts", "num_local_experts"), ((0, None), "experts are not computed here")),
    "output_router_logits": ((False, None), "experts are not computed here"),
    "num_nextn_predict_layers": ((0, None), "layers that predict further tokens are not read here"),
}

# What is another in a Qwen2, whose queries, keys and values have biases whatever the file says.
OF_QWEN2: dict[str, tuple[tuple[object, ...], str]] = dict.fromkeys(
    ("attention_bias", "qkv_bias"), ((True, None), "a Qwen2 without biases is not computed here")
)

# Keys that are refused unless they are empty, and what to do.
_QUANTISED = "The model is quantised: use the unquantised one"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("quantization_config", "quantization", "compression_config"), _QUANTISED),
    "auto_map": "The model brings code of its own, which may compute something else. If it is a plain Qwen3, remove "
    "auto_map from the file",
    "per_layer_config": "Its layers differ from each other; use a model whose layers are alike",
    "transformers_weights": "It names the file that transformers reads its weights from. Give that file the name "
    "model.safetensors, and remove transformers_weights",
}
EMPTY: tuple[object, ...] = (None, {}, [], "")

# What may stand inside rope_parameters and rope_scaling beside rope_theta: unscaled rotary embeddings, in all words.
ROPE: dict[str, tuple[tuple[object, ...], str]] = {
    "rope_type": (("default",), "scaled rotary embeddings are not computed here"),
    "type": (("default",), "scaled rotary embeddings are not computed here"),
    "factor": ((1, 1.0, None), "scaled rotary embeddings are not computed here"),
    "attention_factor": ((1, 1.0, None), "scaled rotary embeddings are not computed here"),
    "partial_rotary_factor": ((1, 1.0, None), "rotary embeddings of a part of a head are not computed here"),
}
