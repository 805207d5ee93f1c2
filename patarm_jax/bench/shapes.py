"""The networks that are measured: two that fit two CPU cores, and the published Qwen3 family; weights are random."""

from patarm_jax.model.config import Qwen3Config


def _shape(vocab: int, width: int, mlp: int, layers: int, heads: int, kv: int, head: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        tie_word_embeddings=tied,
        rope_theta=1_000_000.0,
        max_position_embeddings=40_960,
    )


SHAPES = {
    "tiny": _shape(4_096, 256, 768, 4, 8, 4, 32, True),
    "small": _shape(32_768, 512, 1_536, 8, 8, 4, 64, True),
    "0.6b": _shape(151_936, 1_024, 3_072, 28, 16, 8, 128, True),
    "1.7b": _shape(151_936, 2_048, 6_144, 28, 16, 8, 128, True),
    "4b": _shape(151_936, 2_560, 9_728, 36, 32, 8, 128, True),
    "8b": _shape(151_936, 4_096, 12_288, 36, 32, 8, 128, False),
    "14b": _shape(151_936, 5_120, 17_408, 40, 40, 8, 128, False),
}


def layer_weights(config: Qwen3Config) -> int:
    """Weights of all layers' matrices."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def forward_flops(config: Qwen3Config, tokens: int, reads: int, predicted: int) -> int:
    """Multiplications and additions of a forward pass.

    Args:
        config: of the network.
        tokens: that go through the layers.
        reads: pairs of a token and a key it may read.
        predicted: tokens that meet the vocabulary.
    """
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * reads
    return 2 * layer_weights(config) * tokens + attention + 2 * config.vocab_size * config.hidden_size * predicted


def cache_bytes(config: Qwen3Config, itemsize: int) -> int:
    """Of the keys and values of one token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
