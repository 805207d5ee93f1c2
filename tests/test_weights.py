"""Weights come back from disk as they went there, on any mesh, and what is wrong with a folder is said by name."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers

from patarm_jax.config.sections import MeshSection
from patarm_jax.model import weight_files, weights
from patarm_jax.model.architecture import Architecture, from_hf
from patarm_jax.model.for_sampling import layer_shape, unstack_layers
from patarm_jax.model.for_sampling import unstacked as apart
from patarm_jax.model.sharding import REPLICATED_RULES, ROLLOUT_RULES, TRAIN_RULES, make_mesh
from patarm_jax.model.transformer import abstract_params
from patarm_jax.types import UserError
from tests.toys import TINY, hf_model

EVEN = TINY | dict(vocab_size=96)  # every axis can be split in two
DTYPES = ("float32", "bfloat16", "float16")


def save_hf(folder, dtype="float32", max_shard_size="5GB", **changes) -> Path:
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    model = hf_model(**EVEN | changes).to(getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(eos_token_id=[3, 5], pad_token_id=5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("sharded"), max_shard_size="20KB", tie_word_embeddings=False)


def stored(folder):
    """Name → (dtype, shape, bytes) of everything in a folder's safetensors, and the files' own metadata."""
    tensors, metadata = {}, set()
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "np") as opened:
            metadata.add(str(opened.metadata()))
            for name in opened.keys():
                part = opened.get_slice(name)
                tensors[name] = (part.get_dtype(), part.get_shape(), opened.get_tensor(name).tobytes())
    return tensors, metadata


def names_of_weights(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith("model")}


# --------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])
def test_loaded_and_saved_again_is_bit_identical(dtype, tied, shard, tmp_path):
    hf = save_hf(tmp_path / "hf", dtype, shard, tie_word_embeddings=tied)
    params, config = weights.load(hf)
    ours = tmp_path / "ours"
    weights.save(params, config, ours, dtype=dtype, stop_ids=(3, 5), pad_id=5, max_shard_size=shard)
    assert stored(ours) == stored(hf)
    assert ("lm_head.weight" in stored(ours)[0]) == (not tied)
    assert names_of_weights(ours) == names_of_weights(hf)
    if shard != "5GB":
        assert len(names_of_weights(ours)) > 2
        mine, theirs = (json.loads((folder / weight_files.INDEX).read_text()) for folder in (ours, hf))
        assert mine["weight_map"] == theirs["weight_map"]
        assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        for name, file in mine["weight_map"].items():
            assert name in safetensors.numpy.load_file(ours / file)

    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    model = transformers.Qwen3ForCausalLM.from_pretrained(ours)
    reference = transformers.Qwen3ForCausalLM.from_pretrained(hf)
    assert model.dtype == reference.dtype == getattr(torch, dtype)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert model.generation_config.eos_token_id == [3, 5]
    assert model.generation_config.pad_token_id == 5
    written = json.loads((ours / "config.json").read_text())
    assert written["transformers_version"] == transformers.__version__  # as transformers itself writes it
    assert from_hf(written, "") == Architecture(**vars(config) | {"eos_token_id": 3})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_dtype_may_be_asked_for(dtype, untied):
    wide, _ = weights.load(untied)
    narrow, _ = weights.load(untied, dtype=jnp.dtype(dtype))
    jax.tree.map(lambda n, w: np.testing.assert_array_equal(n, np.asarray(w).astype(n.dtype)), narrow, wide)


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("rules", [TRAIN_RULES, ROLLOUT_RULES, REPLICATED_RULES], ids=["train", "rollout", "whole"])
def test_eight_devices_hold_their_parts_of_what_one_device_holds(rules, unstacked, sharded):
    whole, config = weights.load(sharded)
    whole = unstack_layers(whole) if unstacked else whole
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    parts, _ = weights.load(sharded, mesh, rules, unstacked=unstacked)
    abstract = abstract_params(config, mesh, rules)
    abstract = apart(abstract, lambda leaf, _: layer_shape(leaf)) if unstacked else abstract
    assert jax.tree.structure(parts) == jax.tree.structure(abstract) == jax.tree.structure(whole)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        expected = dict(jax.tree_util.tree_leaves_with_path(whole))[path]
        asked = dict(jax.tree_util.tree_leaves_with_path(abstract))[path]
        assert leaf.sharding == asked.sharding
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.shape == asked.sharding.shard_shape(leaf.shape)
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])


def test_sharded_parameters_are_saved_whole(sharded, tmp_path):
    params, config = weights.load(sharded, make_mesh(MeshSection(data=2, fsdp=2, tensor=2)))
    weights.save(params, config, tmp_path / "out", dtype="float32")
    assert stored(tmp_path / "out")[0] == stored(sharded)[0]


@pytest.mark.long
def test_two_processes_load_their_parts_and_save_the_whole(sharded, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(Path(__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(index), str(sharded), str(tmp_path / "out")],
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert stored(tmp_path / "out") == stored(sharded)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


TWO_PROCESSES = """
import pathlib, sys
import jax
from patarm_jax.config.sections import MeshSection
from patarm_jax.model import weight_files, weights
from patarm_jax.model.sharding import make_mesh
from patarm_jax.types import UserError

address, index, source, target = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
params, config = weights.load(pathlib.Path(source), make_mesh(MeshSection(fsdp=4, tensor=2)))
weights.save(params, config, pathlib.Path(target), dtype="float32", max_shard_size="20KB")
assert (pathlib.Path(target) / "config.json").is_file()  # on every process, as soon as it returns
try:
    weights.save(params, config, pathlib.Path(target))
except UserError as error:
    assert "is not empty" in str(error)
else:
    raise AssertionError("an export was overwritten")
"""


# ------------------------------------------------------------------------------------------------------------- memory

BIG = dict(
    vocab_size=16_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_model_is_held_once_while_loading_and_a_shard_while_saving(tmp_path):
    model = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(Architecture(**BIG))))
    assert 250e6 < model < 300e6
    saving, loading = (measured(what, tmp_path / "model") for what in ("saving", "loading"))
    # One shard of 50 MB; two would be 0.6 of the model.
    assert saving < 0.45 * model
    # The model and one stacked parameter on its way to the device (50 MB); twice would be over 2.
    assert model < loading < 1.75 * model


def measured(what, folder):
    """Bytes by which a fresh process's resident memory peaks above what it was before."""
    # Freed memory goes back at once, so that the peak is what the program holds and not what malloc keeps.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | malloc | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", MEASURE, what, str(folder), json.dumps(BIG)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


MEASURE = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from patarm_jax.model import weight_files, weights
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.transformer import abstract_params

def memory(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))

what, folder, config = sys.argv[1], pathlib.Path(sys.argv[2]), Architecture(**json.loads(sys.argv[3]))
abstract = abstract_params(config)  # whatever tracing needs is there already
if what == "saving":
    params = jax.block_until_ready(jax.jit(lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.5), abstract))())
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
if what == "saving":
    weights.save(params, config, folder, dtype="float32", max_shard_size="50MB")
else:
    jax.block_until_ready(weights.load(folder)[0])
print(memory("VmHWM") - before)
"""


# ----------------------------------------------------------------------------------------------------- damaged folders


@pytest.fixture
def broken(sharded, tmp_path):
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


def rewrite(folder, change):
    """Changes the tensors of the first shard."""
    file = folder / f"model-00001-of-{len(names_of_weights(folder)) - 1:05}.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    return file.name


def edit_index(folder, change):
    path = folder / weight_files.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def refused(folder, *parts):
    """Loading says all of this, in one line."""
    with pytest.raises(UserError) as caught:
        weights.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


EMBEDDING = "model.embed_tokens.weight"


def test_a_truncated_shard(broken):
    shard = json.loads((broken / weight_files.INDEX).read_text())["weight_map"][EMBEDDING]
    data = (broken / shard).read_bytes()
    last = max(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).items(), key=_end)[0]
    (broken / shard).write_bytes(data[:-10])
    refused(broken, shard, "truncated", f"before tensor {last} does", "Copy the file again")
    (broken / shard).write_bytes(data[:20])
    refused(broken, shard, "header is damaged")
    (broken / shard).write_bytes(b"")
    refused(broken, shard, "header is damaged")


def _end(item):
    return 0 if item[0] == "__metadata__" else item[1]["data_offsets"][1]


def test_a_missing_shard(broken):
    shard = json.loads((broken / weight_files.INDEX).read_text())["weight_map"][EMBEDDING]
    (broken / shard).unlink()
    refused(broken, f"{broken / shard} is missing", "holds tensor model.embed_tokens.weight", "Copy it again")


def test_a_missing_tensor(broken):
    gone = "model.norm.weight"
    shard = json.loads((broken / weight_files.INDEX).read_text())["weight_map"][gone]
    tensors = safetensors.numpy.load_file(broken / shard)
    del tensors[gone]
    safetensors.numpy.save_file(tensors, broken / shard)
    edit_index(broken, lambda names: names.pop(gone))
    refused(broken, weight_files.INDEX, "tensor model.norm.weight is missing (1 missing in all)")


def test_a_tensor_the_index_lists_and_the_shard_lacks(broken):
    gone = []
    file = rewrite(broken, lambda tensors: gone.append(tensors.popitem()[0]))
    refused(broken, file, f"tensor {gone[0]} is missing though {weight_files.INDEX} lists it")


def test_a_tensor_of_another_shape(broken):
    changed = []

    def flip(tensors):
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and len(set(tensor.shape)) == 2)
        tensors[name] = np.ascontiguousarray(tensors[name].T)
        changed.append((name, list(tensors[name].shape)))

    file = rewrite(broken, flip)
    (name, shape), *_ = changed
    refused(broken, file, f"tensor {name} has shape {shape} and config.json asks for {shape[::-1]}")


def test_a_tensor_nobody_knows(broken):
    file = rewrite(broken, lambda tensors: tensors.update({"model.extra.bias": np.zeros(3, np.float32)}))
    edit_index(broken, lambda names: names.update({"model.extra.bias": file}))
    refused(broken, file, "tensor model.extra.bias is not part of the Qwen3 in config.json (1 such")


def test_a_quantised_tensor(broken):
    changed = []

    def quantise(tensors):
        changed.append(next(iter(tensors)))
        tensors[changed[0]] = tensors[changed[0]].astype(np.int8)

    file = rewrite(broken, quantise)
    refused(broken, file, f"tensor {changed[0]} is stored as I8", "Use the unquantised model")


def test_no_weights_no_config_no_index(broken, tmp_path):
    for content in ("[]", "{", "[" * 100_000):
        (broken / weight_files.INDEX).write_text(content)
        refused(broken, weight_files.INDEX, "JSON", "Copy the file again")
    for weight_map in ([1], None, 3, {EMBEDDING: 3}, {EMBEDDING: ["a"]}):
        (broken / weight_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(broken, f"{weight_files.INDEX} is not a safetensors index: its weight_map is", "Copy the file again")
    (broken / weight_files.INDEX).unlink()
    refused(broken, f"{broken} holds neither model.safetensors nor model.safetensors.index.json")
    (broken / "config.json").write_text("[]")
    refused(broken, "config.json is a JSON list, not an object")
    for content in (b"{", b'{"model_type": "\xff"}', b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"):
        (broken / "config.json").write_bytes(content)
        refused(broken, "config.json is not valid JSON", "Copy the file again")
    (broken / "config.json").unlink()
    refused(broken, f"{broken} holds no config.json")
    (broken / "config.json").mkdir()
    refused(broken, f"cannot read {broken / 'config.json'}: Is a directory")


def test_a_weight_file_that_may_not_be_read(broken, monkeypatch):
    def forbidden(file, _):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(safetensors, "safe_open", forbidden)
    refused(broken, "cannot read", "Permission denied", "Make it a file that you may read")


@pytest.mark.parametrize("header", [b"[1]", b'{"a": 1}', b'{"a": {"data_offsets": 1}}', b"[" * 100_000])
def test_a_header_that_is_json_and_nothing_more(broken, header):
    shard = json.loads((broken / weight_files.INDEX).read_text())["weight_map"][EMBEDDING]
    (broken / shard).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(broken, shard, "header is damaged")


def test_a_tied_model_may_carry_its_head(tmp_path):
    folder = save_hf(tmp_path, tie_word_embeddings=True)
    params, _ = weights.load(folder)
    tensors = safetensors.numpy.load_file(folder / weight_files.SINGLE)
    tensors["lm_head.weight"] = tensors[EMBEDDING]
    safetensors.numpy.save_file(tensors, folder / weight_files.SINGLE)
    again, _ = weights.load(folder)
    jax.tree.map(np.testing.assert_array_equal, again, params)


# ------------------------------------------------------------------------------------------------------------- writing


def test_an_earlier_export_is_untouched(untied, tmp_path):
    params, config = weights.load(untied)
    weights.save(params, config, tmp_path / "export")
    before = stored(tmp_path / "export")
    with pytest.raises(UserError, match="exists and is not empty"):
        weights.save(params, config, tmp_path / "export", dtype="float32")
    assert stored(tmp_path / "export") == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_a_killed_save_left_is_replaced(untied, tmp_path):
    params, config = weights.load(untied)
    left = tmp_path / ".export.patarm-0123abcd"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_text("half")
    (tmp_path / "export").mkdir()  # an empty folder may be there
    weights.save(params, config, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert names_of_weights(tmp_path / "export") == {"model.safetensors"}


def test_a_full_disk_is_one_sentence_and_leaves_no_part(untied, small_disk):
    params, config = weights.load(untied)
    weights.save(params, config, small_disk / "first")
    before = stored(small_disk / "first")
    with pytest.raises(UserError) as caught:
        weights.save(params, config, small_disk / "second", dtype="float32", max_shard_size="20KB")
    message = str(caught.value)
    assert message.startswith(f"cannot write {small_disk / 'second'}: ") and "No space left on device" in message
    assert "0.0 GiB are free there. Free some space or name another place" in message and "\n" not in message
    assert [path.name for path in small_disk.iterdir()] == ["first"]
    assert stored(small_disk / "first") == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
