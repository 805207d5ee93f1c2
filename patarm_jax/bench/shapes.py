"""The networks that are measured: two that fit two CPU cores, and the published Qwen3 family; weights are random."""

from patarm_jax.model.architecture import Architecture
from patarm_jax.model.transformer import Remat


def _shape(vocab: int, width: int, mlp: int, layers: int, heads: int, kv: int, head: int, tied: bool) -> Architecture:
    return Architecture(
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


def layer_weights(arch: Architecture) -> int:
    """Weights of all layers' matrices."""
    attention = arch.hidden_size * arch.head_dim * 2 * (arch.num_attention_heads + arch.num_key_value_heads)
    return arch.num_hidden_layers * (attention + 3 * arch.hidden_size * arch.intermediate_size)


def forward_flops(arch: Architecture, tokens: int, reads: int, predicted: int) -> int:
    """Multiplications and additions of a forward pass.

    Args:
        arch: of the network.
        tokens: that go through the layers.
        reads: pairs of a token and a key it may read.
        predicted: tokens that meet the vocabulary.
    """
    attention = 4 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * reads
    return 2 * layer_weights(arch) * tokens + attention + 2 * arch.vocab_size * arch.hidden_size * predicted


def step_flops(arch: Architecture, tokens: int, reads: int, predicted: int, remat: Remat) -> int:
    """Multiplications and additions of a forward and a backward pass, and of what `model.remat` lets it recompute.

    Every matmul has two in the backward pass; those of the head are taken along with the loss, of which nothing is
    recomputed. Attention has two matmuls forward, five backward, where it computes the scores anew, and two more where
    its output was not kept. The last matmul of a layer is not among what is recomputed: nobody asks for its result.

    Args:
        arch: of the network.
        tokens: that go through the layers.
        reads: pairs of a token and a key whose score is computed.
        predicted: tokens that meet the vocabulary.
        remat: what is recomputed.
    """
    down = arch.num_hidden_layers * arch.hidden_size * arch.intermediate_size
    again = layer_weights(arch) - down if remat in ("attention", "full") else 0
    matmuls = 3.5 if remat in ("none", "attention") else 4.5  # of attention, in forward passes
    attention = matmuls * 4 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * reads
    head = 3 * 2 * arch.vocab_size * arch.hidden_size * predicted
    return 2 * (3 * layer_weights(arch) + again) * tokens + round(attention) + head


def cache_bytes(arch: Architecture, itemsize: int) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    return 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * itemsize
