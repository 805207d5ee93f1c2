"""Which weights of a folder are read: what transformers reads, or none."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.sharding import make_mesh
from patarm_jax.model.transformer import forward
from patarm_jax.model.weight_files import EMBEDDING, HEAD, INDEX, SINGLE, digest, read_stored
from patarm_jax.run.open_model import load_params, open_model
from patarm_jax.types import UserError
from tests.toys import hf_model, tiny_model_folder

SHARDS = pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="transformers' models need torch")


def write(folder, seed=0, shard="5GB", **changes):
    hf_model(seed, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


def write_with_head(folder, shard="5GB", seed=0, head=None):
    """A tied config beside a head of its own, as PEFT's modules_to_save leaves it once it is merged."""
    write(folder, seed, shard, tie_word_embeddings=False)
    if head is not None:
        edit(folder, lambda tensors: {HEAD: head(tensors)})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    return folder


def everything(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}


def edit(folder, change):
    """Writes other values of some tensors, each into its file."""
    for name, value in change(everything(folder)).items():
        for file in folder.glob("*.safetensors"):
            tensors = safetensors.numpy.load_file(file)
            if name in tensors:
                safetensors.numpy.save_file(tensors | {name: np.ascontiguousarray(value)}, file, {"format": "pt"})


def theirs(torch, folder):
    """Logits of transformers' model."""
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits.numpy()


def ours(folder, mesh=None):
    """Logits of ours, over the whole vocabulary."""
    params, config = weights.load(folder, mesh)
    out = jax.jit(forward, static_argnums=1)(params, config, jnp.arange(40)[None])
    return np.asarray(out.prompt @ out.head.T)


def said(folder, capsys, **section):
    """What opening a folder says."""
    capsys.readouterr()
    open_model(ModelSection(path=str(folder), **section))
    return capsys.readouterr().err.splitlines()


# --------------------------------------------------------------------------------------- a head beside a tied config


@SHARDS
def test_a_head_that_was_trained_is_kept(shard, torch, tmp_path):
    folder = write_with_head(tmp_path / "hf", shard)
    assert read_architecture(folder).tie_word_embeddings
    params, config = weights.load(folder)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"], everything(folder)[HEAD])
    np.testing.assert_allclose(ours(folder), theirs(torch, folder), atol=1e-4)
    # It is exported with it, and says so.
    weights.save(params, config, tmp_path / "out", dtype="float32", max_shard_size=shard)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = everything(folder), everything(tmp_path / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(theirs(torch, tmp_path / "out"), theirs(torch, folder))


@SHARDS
def test_a_head_that_is_the_embedding_stays_tied(shard, torch, tmp_path):
    folder = write_with_head(tmp_path / "hf", shard, head=lambda tensors: tensors[EMBEDDING])
    assert weights.load(folder)[1].tie_word_embeddings
    np.testing.assert_allclose(ours(folder), theirs(torch, folder), atol=1e-4)


@pytest.mark.parametrize("row", [0, 50, 95])
def test_one_number_of_the_head_is_enough(row, torch, tmp_path):
    def nearly(tensors):
        head = tensors[EMBEDDING].copy()
        head[row, 7] += 1
        return head

    folder = write_with_head(tmp_path / "hf", head=nearly)
    assert not weights.load(folder)[1].tie_word_embeddings
    np.testing.assert_allclose(ours(folder), theirs(torch, folder), atol=1e-4)


def test_the_head_is_compared_piece_by_piece(torch, tmp_path):
    """Vocabularies are larger than what is compared at a time; the last row counts as the first does."""

    def nearly(tensors):
        head = tensors[EMBEDDING].copy()
        head[-1, -1] += 1
        return head

    write(tmp_path / "hf", tie_word_embeddings=False, vocab_size=5000)
    edit(tmp_path / "hf", lambda tensors: {HEAD: tensors[EMBEDDING]})
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert read_stored(tmp_path / "hf").arch.tie_word_embeddings
    edit(tmp_path / "hf", lambda tensors: {HEAD: nearly(tensors)})
    assert not read_stored(tmp_path / "hf").arch.tie_word_embeddings


def test_a_head_of_another_shape_is_refused(torch, tmp_path):
    folder = write_with_head(tmp_path / "hf", head=lambda tensors: tensors[EMBEDDING][:90])
    with pytest.raises(UserError, match=r"lm_head\.weight has shape"):
        weights.load(folder)


def test_eight_devices_load_the_head(torch, tmp_path):
    folder = write_with_head(tmp_path / "hf", "20KB")
    parts, config = weights.load(folder, make_mesh(MeshSection(data=2, fsdp=2, tensor=2)))
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(parts["lm_head"], weights.load(folder)[0]["lm_head"])


def test_the_one_who_opens_the_model_is_told(torch, tmp_path, capsys):
    folder = write_with_head(tmp_path / "hf")
    tiny_model_folder(tmp_path / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tmp_path / "tokens" / name, folder)
    raw = json.loads((folder / "config.json").read_text())
    write_wide(folder, raw)
    line = f"{folder}: config.json says that the head is the embedding (tie_word_embeddings), and lm_head.weight is"
    lines = said(folder, capsys)
    assert len(lines) == 1 and lines[0].startswith(line)
    assert said(folder, capsys, weights="random") == []  # of weights that are not read nothing is said
    model = open_model(ModelSection(path=str(folder)))
    mesh = make_mesh(MeshSection())
    params = load_params(ModelSection(path=str(folder)), model, mesh, 0, weights.TRAIN_RULES, jnp.float32)
    assert "lm_head" in params and not model.arch.tie_word_embeddings


def write_wide(folder, raw):
    """The same with room for the tokenizer's tokens."""
    shutil.rmtree(folder / "wide", ignore_errors=True)
    write(folder / "wide", tie_word_embeddings=False, vocab_size=400)
    shutil.move(folder / "wide" / SINGLE, folder / SINGLE)
    shutil.rmtree(folder / "wide")
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 400}))


def test_a_scalar_head_has_no_use_for_another(torch, tmp_path):
    config = hf_model().config
    config.num_labels = 1
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    before, _ = weights.load(tmp_path)
    for tied in (True, False):
        tensors = safetensors.numpy.load_file(tmp_path / SINGLE)
        safetensors.numpy.save_file(tensors | {HEAD: np.ones((96, 32), np.float32)}, tmp_path / SINGLE)
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": tied}))
        again, now = weights.load(tmp_path)
        assert now.scalar_head and now.tie_word_embeddings is tied
        jax.tree.map(np.testing.assert_array_equal, again, before)
        assert [remark.split(": ", 1)[1] for remark in read_stored(tmp_path).remarks] == [
            "not read: lm_head.weight, for which a scalar reward model has no use"
        ]


# ------------------------------------------------------------------------------------------------- two sets of weights


@pytest.mark.parametrize("newer", ["shards", "one file"])
def test_of_a_single_file_and_an_index_the_single_file_is_read(newer, torch, tmp_path):
    """A fine-tune saved in one file over a sharded base, and the other way round: transformers minds no dates."""
    sharded, single = write(tmp_path / "sharded", 1, "20KB"), write(tmp_path / "single", 2)
    order = [single, sharded] if newer == "shards" else [sharded, single]
    for source in order:
        shutil.copytree(source, tmp_path / "both", dirs_exist_ok=True)
    np.testing.assert_allclose(ours(tmp_path / "both"), theirs(torch, tmp_path / "both"), atol=1e-4)
    np.testing.assert_array_equal(ours(tmp_path / "both"), ours(single))
    remark = read_stored(tmp_path / "both").remarks[-1]
    assert remark.startswith(f"{tmp_path / 'both'}: weights are read from {SINGLE}; not read: model-00001-of-")
    assert "more" in remark and "\n" not in remark


def test_an_index_that_is_damaged_is_in_no_ones_way(torch, tmp_path):
    folder = write(tmp_path / "hf")
    (folder / INDEX).write_text("{")
    np.testing.assert_allclose(ours(folder), theirs(torch, folder), atol=1e-4)
    assert read_stored(folder).remarks == (f"{folder}: weights are read from {SINGLE}; not read: {INDEX}",)


LEFT = ["model-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf",
        "consolidated.safetensors", "adapter_model.safetensors", "consolidated.00.pth", "model.fp16.safetensors",
        "tf_model.h5", "flax_model.msgpack"]  # fmt: skip


@SHARDS
@pytest.mark.parametrize("left", LEFT)
def test_what_is_left_over_is_said(shard, left, torch, tmp_path):
    folder = write(tmp_path / "hf", 0, shard)
    alone, listing = ours(folder), SINGLE if shard == "5GB" else INDEX
    assert read_stored(folder).remarks == ()
    shutil.copy(next(folder.glob("*.safetensors")), folder / left)
    (folder / "training_args.bin").write_bytes(b"no weights")
    assert read_stored(folder).remarks == (f"{folder}: weights are read from {listing}; not read: {left}",)
    np.testing.assert_array_equal(ours(folder), alone)
    np.testing.assert_allclose(alone, theirs(torch, folder), atol=1e-4)


def test_shards_without_their_index_are_named(torch, tmp_path):
    folder = write(tmp_path / "hf", 0, "20KB")
    (folder / INDEX).unlink()
    with pytest.raises(
        UserError, match=r"holds neither .*, but model-00001-of-000.*safetensors, .* and \d+ more\. Give"
    ):
        weights.load(folder)
    with pytest.raises(OSError):
        theirs(torch, folder)


def test_an_adapter_is_refused(torch, tmp_path):
    folder = write(tmp_path / "hf")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, which transformers puts on top of the weights"):
        weights.load(folder)
    (folder / "adapter_config.json").unlink()
    weights.load(folder)


def test_a_shard_with_more_than_its_index_says_is_refused(torch, tmp_path):
    """Transformers would take the tensor, of the last file that has it, and the index would be the liar."""
    folder = write(tmp_path / "hf", 0, "20KB")
    index = json.loads((folder / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    tensors = safetensors.numpy.load_file(folder / last)
    name = next(name for name, file in index["weight_map"].items() if file == first)
    safetensors.numpy.save_file(tensors | {name: safetensors.numpy.load_file(folder / first)[name]}, folder / last)
    with pytest.raises(UserError, match=f"{last}: tensor {name} is there though .* could be read in two ways"):
        weights.load(folder)


def test_a_judge_is_known_by_the_weights_that_are_read(torch, tmp_path):
    folder = write(tmp_path / "hf")
    before = digest(read_stored(folder))
    (folder / "consolidated.safetensors").write_bytes((folder / SINGLE).read_bytes())
    assert digest(read_stored(folder)) == before
    for layer in range(2):  # a layer in the middle of the file is as good as its ends
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        edit(write(tmp_path / f"other {layer}"), lambda tensors, name=name: {name: tensors[name] * 1.5})
        assert digest(read_stored(tmp_path / f"other {layer}")) != before
