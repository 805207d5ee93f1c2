"""LoRA equals PEFT's: what adapters give, their gradients, and their files, in both directions."""

import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from patarm_jax.config.sections import LoRASection, MeshSection, ModelSection
from patarm_jax.model import weights
from patarm_jax.model.adapter_files import load_adapter, read_adapter, save_adapter
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.for_sampling import unstack_layers
from patarm_jax.model.lora import abstract_adapters, abstract_parts, init_adapters, joined, merged
from patarm_jax.model.sharding import TRAIN_RULES, make_mesh
from patarm_jax.model.transformer import abstract_params, forward
from patarm_jax.run.open_model import load_params, open_model
from tests.toys import TINY, hf_model, tiny_tokenizer_folder

torch = pytest.importorskip("torch", reason="PEFT needs torch")
transformers = pytest.importorskip("transformers")
# PEFT asks transformers by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
peft = pytest.importorskip("peft")

CONFIG = Architecture(**TINY)
RANK, ALPHA = 4, 6.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 11))


def random_adapters(model, targets=TARGETS, seed=1, **settings):
    """PEFT's adapters on a model, neither of whose two factors is zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


SOME = pytest.param(("q_proj", "v_proj", "down_proj"), marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[TARGETS, SOME], ids=["every weight", "some"])
def saved(request, tmp_path_factory):
    """A model's folder, its adapters' folder, and PEFT's own model of both."""
    root = tmp_path_factory.mktemp("lora")
    model = hf_model(seed=5)
    model.save_pretrained(tiny_tokenizer_folder(root / "model"))
    adapted = random_adapters(model, request.param)
    adapted.save_pretrained(root / "adapter")
    return root / "model", root / "adapter", adapted


def logits_of(params, **settings):
    out = forward(params, CONFIG, jnp.asarray(TOKENS), **settings)
    return out.prompt @ out.head.T


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_adapters_give_what_peft_gives_beside_the_weights_and_merged_into_them(saved):
    folder, adapter, theirs = saved
    stored, params = read_adapter(adapter), weights.load(folder)[0]
    assert stored.scale == ALPHA / RANK
    both = joined(load_adapter(stored, CONFIG, None, TRAIN_RULES), params)
    expected = torch_logits(theirs)
    with theirs.disable_adapter():
        assert np.abs(expected - torch_logits(theirs)).max() > 0.1
    np.testing.assert_allclose(logits_of(both, lora_scale=stored.scale), expected, rtol=1e-4, atol=1e-4)
    whole = merged(both, stored.scale, jnp.float32)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    np.testing.assert_allclose(logits_of(whole), expected, rtol=1e-4, atol=1e-4)
    apart = merged(unstack_layers(both), stored.scale, jnp.float32)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), apart, unstack_layers(whole))


def test_the_gradient_of_adapters_is_pefts(saved, tmp_path):
    folder, adapter, theirs = saved
    stored, params = read_adapter(adapter), weights.load(folder)[0]
    adapters = load_adapter(stored, CONFIG, None, TRAIN_RULES)

    def loss(adapters):
        logprobs = jax.nn.log_softmax(logits_of(joined(adapters, params), lora_scale=stored.scale)[:, :-1])
        return -jnp.take_along_axis(logprobs, jnp.asarray(TOKENS[:, 1:, None]), axis=-1).mean()

    value, gradient = jax.value_and_grad(loss)(adapters)
    tokens = torch.tensor(TOKENS)
    found = torch.nn.functional.cross_entropy(theirs(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    found.backward()
    np.testing.assert_allclose(value, found.item(), rtol=1e-5)
    # Saved as weights, theirs are read as ours are.
    holder = copy.deepcopy(theirs)
    with torch.no_grad():
        for ours, source in zip(holder.parameters(), theirs.parameters(), strict=True):
            if source.grad is not None:
                ours.copy_(source.grad)
    holder.save_pretrained(tmp_path)
    theirs.zero_grad()
    expected = load_adapter(read_adapter(tmp_path), CONFIG, None, TRAIN_RULES)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-4
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), gradient, expected)


def test_peft_reads_the_adapters_that_are_written(saved, tmp_path):
    folder, adapter, _ = saved
    targets = read_adapter(adapter).targets
    section = LoRASection(rank=3, alpha=5.0, targets=tuple(targets))
    shapes = abstract_adapters(abstract_params(CONFIG), section.rank, section.targets)
    first = init_adapters(shapes, jax.random.key(0))
    drawn = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), first)
    save_adapter(drawn, CONFIG, section, str(folder), tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    params = weights.load(folder)[0]
    ours = logits_of(joined(drawn, params), lora_scale=section.scale)
    np.testing.assert_allclose(ours, torch_logits(theirs), rtol=1e-4, atol=1e-4)
    again = load_adapter(read_adapter(tmp_path), CONFIG, None, TRAIN_RULES)
    jax.tree.map(np.testing.assert_array_equal, again, drawn)


def test_adapters_begin_as_nothing_and_as_peft_draws_them():
    arch = Architecture(**TINY | {"hidden_size": 256})
    shapes = abstract_adapters(abstract_params(arch), 64, TARGETS)
    adapters = init_adapters(shapes, jax.random.key(0))
    other = init_adapters(shapes, jax.random.key(1))
    linear = peft.tuners.lora.Linear(torch.nn.Linear(256, 48, bias=False), "default", peft.LoraConfig(), r=64)
    theirs = linear.lora_A["default"].weight.detach().numpy()
    for (path, leaf), differs in zip(
        jax.tree_util.tree_leaves_with_path(adapters), jax.tree.leaves(other), strict=True
    ):
        if path[-1].key.endswith("_B"):
            assert not leaf.any()
            continue
        assert not np.array_equal(leaf, differs)
        bound = np.prod(leaf.shape[1:-1]) ** -0.5
        assert 0.97 * bound < np.abs(leaf).max() <= bound and abs(leaf.std() * np.sqrt(3) / bound - 1) < 0.05
    ours = adapters["layers"]["self_attn"]["q_proj_lora_A"]
    assert abs(np.abs(ours).max() - np.abs(theirs).max()) < 1e-3 and abs(ours.std() / theirs.std() - 1) < 0.05


def test_rank_0_trains_all_weights_and_a_head_of_scores_is_trained_beside_adapters():
    mesh = make_mesh(MeshSection(fsdp=2, tensor=2, data=2))
    assert abstract_parts(CONFIG, mesh, LoRASection(), "float32") == (abstract_params(CONFIG, mesh), None)
    scalar = replace(CONFIG, scalar_head=True)
    trained, frozen = abstract_parts(scalar, mesh, LoRASection(rank=4), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
    whole = jax.tree.structure(abstract_params(scalar, mesh))
    assert "score" in trained and "score" not in frozen
    again = jax.eval_shape(lambda trained, frozen: merged(joined(trained, frozen), 1.0, "float32"), trained, frozen)
    assert jax.tree.structure(again) == whole
    # Split where their weights are, and whole along the rank.
    attention = trained["layers"]["self_attn"]
    assert attention["q_proj_lora_A"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert attention["q_proj_lora_B"].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert attention["o_proj_lora_A"].sharding.spec == PartitionSpec(None, "tensor", None, None)
    assert attention["o_proj_lora_B"].sharding.spec == PartitionSpec(None, None, "fsdp")


def test_in_bfloat16_what_adapters_add_is_not_lost_in_the_rounding():
    """A hundredth of the last place: to the nearest, next to nothing of it would be left."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(0.02 * rng.normal(size=(2, 256, 4, 64)), jnp.bfloat16)
    a = jnp.asarray(rng.normal(size=(2, 256, 8)), jnp.float32)
    b = jnp.asarray(3e-7 * rng.normal(size=(2, 8, 4, 64)), jnp.float32)
    params = {"layers": {"q_proj": weight, "q_proj_lora_A": a, "q_proj_lora_B": b}}
    added = np.einsum("ldr,lrnh->ldnh", a, b)
    once, twice = (merged(params, 1.0, "bfloat16")["layers"]["q_proj"] for _ in range(2))
    np.testing.assert_array_equal(once, twice)

    def kept(of):
        moved = np.asarray(of, np.float32) - np.asarray(weight, np.float32)
        return (moved * added).sum() / (added**2).sum()

    nearest = (np.asarray(weight, np.float32) + added).astype(jnp.bfloat16)
    assert kept(nearest) < 0.3 and kept(once) == pytest.approx(1, abs=0.15)
    layer = unstack_layers(params)  # and as the copy for sampling merges them
    of_copy = merged(layer, 1.0, "bfloat16")
    np.testing.assert_array_equal(once[1], of_copy["layers_1"]["q_proj"])


def test_a_head_of_scores_travels_with_its_adapters(tmp_path):
    """PEFT's adapters of a reward model give the same rewards here, and ours the same there."""
    model = hf_model(seed=7, vocab_size=512)
    model.save_pretrained(tiny_tokenizer_folder(tmp_path / "model"))
    classifier = partial(
        transformers.AutoModelForSequenceClassification.from_pretrained,
        tmp_path / "model", num_labels=1, pad_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    adapted = peft.get_peft_model(classifier(), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(1).integers(3, 90, (4, 9))

    def theirs(of):
        with torch.no_grad():
            return of(torch.tensor(tokens)).logits[:, 0].numpy()

    section = ModelSection(path=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), dtype="float32")
    opened, mesh = open_model(section, "scalar"), make_mesh(MeshSection())
    params = load_params(section, opened, mesh, 0, TRAIN_RULES, jnp.float32)
    out = forward(params, opened.arch, jnp.asarray(tokens))
    np.testing.assert_allclose(out.prompt[:, -1] @ out.head[0], theirs(adapted), rtol=1e-4, atol=1e-4)

    stored = read_adapter(tmp_path / "adapter")
    drawn = load_adapter(stored, opened.arch, None, TRAIN_RULES)
    section = LoRASection(rank=RANK, alpha=ALPHA, targets=tuple(stored.targets))
    (tmp_path / "ours").mkdir()
    save_adapter(drawn, opened.arch, section, str(tmp_path / "model"), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(again), theirs(adapted), rtol=1e-5)


def test_the_tokenizer_beside_adapters_is_theirs(tmp_path):
    """Trained with another template, they are asked by that."""
    model = hf_model(vocab_size=512)
    folder, adapter = tiny_tokenizer_folder(tmp_path / "model"), tmp_path / "adapter"
    model.save_pretrained(folder)
    random_adapters(model, ("q_proj",)).save_pretrained(adapter)
    section = ModelSection(path=str(folder), adapter=str(adapter))
    assert open_model(section).tokenizer.opening == ""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text()
        (adapter / name).write_text(text.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n"))
    tokenizer = open_model(section).tokenizer
    assert tokenizer.opening.startswith("<think>")
    assert tokenizer.stop_ids == open_model(replace(section, adapter="")).tokenizer.stop_ids
