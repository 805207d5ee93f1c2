"""Qwen2, which is Qwen2.5 too: biases on queries, keys and values, and no norms of them; equal to transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from jax.sharding import PartitionSpec

from patarm_jax.config.sections import MeshSection
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture, from_hf
from patarm_jax.model.for_sampling import unstack_layers
from patarm_jax.model.sharding import TRAIN_RULES, make_mesh
from patarm_jax.model.transformer import forward, init_params
from patarm_jax.train.optimizer import _decayed
from patarm_jax.types import UserError
from tests.test_transformer import (
    logits_of,
    shared_case,
    two_streams,
    unshared,
)
from tests.test_transformer import test_decoding_over_a_cache_equals_two_streams as decoding_equals_two_streams
from tests.toys import TINY, hf_model

VARIANTS = {
    "tied, 2 query heads per kv head": dict(tie_word_embeddings=True),
    "untied, 1 query head per kv head": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "2 heads of 16, one layer": dict(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1),
    "published rope, long and narrow": dict(rope_theta=1e6, num_hidden_layers=4, num_attention_heads=8),
}
# As published with Qwen2.5-7B-Instruct.
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2")
    hf_model(family="Qwen2", tie_word_embeddings=True).save_pretrained(path)
    return path


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(changes, tmp_path):
    model = hf_model(family="Qwen2", **changes)
    model.save_pretrained(tmp_path)
    params, arch = weights.load(tmp_path)
    torch = pytest.importorskip("torch")
    tokens = np.random.default_rng(0).integers(0, 96, (3, 29))
    out = jax.jit(forward, static_argnums=1)(params, arch, jnp.asarray(tokens))
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits_of(out.prompt, out.head), theirs, atol=1e-4)
    biases = [name for name in params["layers"]["self_attn"] if name.endswith("_bias")]
    assert sorted(biases) == ["k_bias", "q_bias", "v_bias"] and "q_norm" not in params["layers"]["self_attn"]


def test_gradients_equal_transformers(folder):
    """Those of the biases too, of a mean cross entropy."""
    torch = pytest.importorskip("torch")
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 17))
    model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    params, arch = weights.load(folder)

    def loss(params):
        out = forward(params, arch, jnp.asarray(tokens))
        logprobs = jax.nn.log_softmax(out.prompt @ out.head.T)[:, :-1]
        return -jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, 1:, None], axis=-1).mean()

    ours = jax.jit(jax.grad(loss))(params)["layers"]["self_attn"]
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            _, _, layer, _, projection, _ = name.split(".")
            expected = parameter.grad.numpy()
            got = ours[f"{projection[0]}_bias"][int(layer)]
            assert np.abs(expected).max() > 1e-4 or projection == "k_proj"
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    """Bit by bit, from one device and from eight; transformers loads it as a Qwen2."""
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    for name, on in (("one", None), ("eight", mesh)):
        params, arch = weights.load(folder, on, TRAIN_RULES)
        weights.save(params, arch, tmp_path / name, dtype="float32")
        ours, theirs = (safetensors.numpy.load_file(each / "model.safetensors") for each in (tmp_path / name, folder))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "eight")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    written = json.loads((tmp_path / "eight" / "config.json").read_text())
    assert "head_dim" not in written and "attention_bias" not in written
    assert from_hf(written, "") == arch
    if mesh.shape["tensor"] == 2:  # what heads add is split as the heads are
        assert params["layers"]["self_attn"]["q_bias"].sharding.spec == PartitionSpec(None, "tensor")


def test_completions_that_share_a_prompt_and_decoding_equal_the_plain_pass(monkeypatch):
    def with_biases(arch, key):
        params = init_params(arch, key)
        attention = params["layers"]["self_attn"]
        biases = [name for name in attention if name.endswith("_bias")]
        for name, one in zip(biases, jax.random.split(key, len(biases)), strict=True):
            attention[name] = jax.random.normal(one, attention[name].shape)
        return params

    monkeypatch.setattr("tests.test_transformer.TINY", TINY | {"model_type": "qwen2"})
    monkeypatch.setattr("tests.test_transformer.init_params", with_biases)
    arch = Architecture(**TINY | {"model_type": "qwen2"})
    params, *case, _ = shared_case(7, arch, 2, 9, 3, 5)
    assert all(np.abs(params["layers"]["self_attn"][f"{x}_bias"]).max() > 1 for x in "qkv")
    shared, apart = (run(params, arch, *case) for run in (two_streams, unshared))
    np.testing.assert_allclose(shared, apart, rtol=1e-5, atol=1e-5)
    decoding_equals_two_streams(2, 1, monkeypatch)


def test_the_published_config_is_understood():
    arch = from_hf(PUBLISHED, "config.json")
    assert (arch.model_type, arch.head_dim, arch.name) == ("qwen2", 128, "Qwen2")
    qwen2 = transformers.Qwen2Config(**{key: value for key, value in PUBLISHED.items() if key != "architectures"})
    assert from_hf(qwen2.to_dict(), "") == arch  # as transformers 5 writes it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": False}, "attention_bias is False; supported is True: a Qwen2 without biases"),
        ({"my_key": 1}, "keys that are not understood: my_key. Only dense Qwen3 and Qwen2 models are"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "supported is ['Qwen2ForCausalLM']"),
        ({"use_sliding_window": True}, "attention over a window is not computed here"),
        ({"num_attention_heads": 27}, "hidden_size is 3584, which 27 heads do not share evenly"),
        ({"model_type": "qwen2_moe"}, "supported is 'qwen3' or 'qwen2'"),
        ({"hidden_size": None}, "missing keys: hidden_size"),
    ],
)
def test_another_network_is_refused(changes, words):
    with pytest.raises(UserError) as refused:
        from_hf(PUBLISHED | changes, "config.json")
    assert words in str(refused.value)


def test_a_qwen3_is_not_taken_for_one(folder, tmp_path):
    hf_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    del config["attention_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"k_proj\.bias is missing"):
        weights.load(tmp_path)


def test_biases_are_not_decayed(folder):
    params, _ = weights.load(folder)
    decayed = _decayed(params)["layers"]["self_attn"]
    assert decayed == {name: name.endswith("_proj") for name in decayed}
    apart = unstack_layers(params)
    assert not _decayed(apart)["layers_0"]["self_attn"]["v_bias"]
