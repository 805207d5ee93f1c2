"""Weights on disk: Hugging Face folders ⇄ sharded parameters, tensor by tensor.

A host holds at most one stacked parameter of its own devices at a time, never the model twice. Tokenizers and model
cards are not written here.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from patarm_jax.model.config import Qwen3Config, read_config, to_hf
from patarm_jax.model.qwen3 import Params, abstract_params
from patarm_jax.model.sharding import TRAIN_RULES, Rules
from patarm_jax.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Sampling defaults Qwen publishes for its thinking models; both ends of a turn stop generation.
GENERATION_DEFAULTS = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@dataclass(frozen=True)
class _Entry:
    """One of our parameters and the Hugging Face tensors it is made of."""

    path: tuple[str, ...]
    name: str  # with {layer} when stacked
    inputs: int = 0  # our leading axes that are the linear map's input; 0: stored as it is, not transposed

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


def _table(config: Qwen3Config) -> list[_Entry]:
    """Hugging Face stores a linear map as [out, in] and splits no heads; we store [in…, out…]."""
    layer = "model.layers.{layer}."
    entries = [
        _Entry(("embed_tokens",), "model.embed_tokens.weight"),
        _Entry(("norm",), "model.norm.weight"),
        *(
            _Entry(("layers", "self_attn", f"{x}_proj"), f"{layer}self_attn.{x}_proj.weight", inputs=1)
            for x in ("q", "k", "v")
        ),
        _Entry(("layers", "self_attn", "o_proj"), f"{layer}self_attn.o_proj.weight", inputs=2),
        *(_Entry(("layers", "self_attn", f"{x}_norm"), f"{layer}self_attn.{x}_norm.weight") for x in ("q", "k")),
        *(
            _Entry(("layers", "mlp", f"{x}_proj"), f"{layer}mlp.{x}_proj.weight", inputs=1)
            for x in ("gate", "up", "down")
        ),
        *(_Entry(("layers", x), f"{layer}{x}.weight") for x in ("input_layernorm", "post_attention_layernorm")),
    ]
    return entries if config.tie_word_embeddings else [*entries, _Entry(("lm_head",), "lm_head.weight")]


# ---------------------------------------------------------------------------------------------------------- reading


def load(
    folder: Path, mesh: Mesh | None = None, rules: Rules = TRAIN_RULES, dtype: Any = jnp.float32
) -> tuple[Params, Qwen3Config]:
    """Parameters and config of a Hugging Face Qwen3 folder, in one file or in shards.

    Args:
        folder: holds config.json and safetensors in bfloat16, float16 or float32.
        mesh: where the parameters are placed; None: on the default device.
        rules: how they are placed.
        dtype: the dtype they are given.

    Raises:
        UserError: naming file and tensor, when a file is missing or cut short, a tensor is missing, unknown or of
            another shape than config.json says.
    """
    config = read_config(folder)
    abstract = abstract_params(config, mesh, rules, dtype)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, config, stack)
        params: Params = {}
        for entry in _table(config):
            leaf = _get(abstract, entry.path)
            read = _reader(entry, leaf, tensors)
            _set(params, entry.path, jax.make_array_from_callback(leaf.shape, leaf.sharding or default, read))
    return params, config


def _reader(
    entry: _Entry, leaf: jax.ShapeDtypeStruct, tensors: dict[str, Any]
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """A function from the index of a device's part to that part, read from the files and from nothing else."""
    layer_shape = leaf.shape[1:] if entry.stacked else leaf.shape
    names = [entry.name.format(layer=i) for i in range(leaf.shape[0])] if entry.stacked else [entry.name]
    for name in names:
        tensors[name].expect(_hf_shape(entry, layer_shape))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        spans = [slice(*s.indices(n)) for s, n in zip(index or (slice(None),) * len(leaf.shape), leaf.shape, strict=True)]
        part = spans[1:] if entry.stacked else spans
        shape = [s.stop - s.start for s in part]

        def one(name: str) -> np.ndarray:
            stored = tensors[name].part[_hf_slices(entry, part, layer_shape)]
            return (stored.T if entry.inputs else stored).reshape(shape)

        if not entry.stacked:
            return one(names[0]).astype(leaf.dtype)
        chosen = names[spans[0]]
        out = np.empty((len(chosen), *shape), leaf.dtype)
        for row, name in zip(out, chosen, strict=True):
            row[...] = one(name)
        return out

    return read


def _hf_shape(entry: _Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not entry.inputs:
        return shape
    return int(np.prod(shape[entry.inputs :])), int(np.prod(shape[: entry.inputs]))


def _hf_slices(entry: _Entry, part: list[slice], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Our slices of [in…, out…] as slices of [out, in]; head_dim, the folded axis, is never split."""
    if not entry.inputs:
        return tuple(part)

    def fold(spans: list[slice], sizes: tuple[int, ...]) -> slice:
        inner = int(np.prod(sizes[1:]))
        return slice(spans[0].start * inner, spans[0].stop * inner)

    return fold(part[entry.inputs :], shape[entry.inputs :]), fold(part[: entry.inputs], shape[: entry.inputs])


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, opened and not yet read."""

    file: Path
    name: str
    part: Any  # safetensors' slice object

    def expect(self, shape: tuple[int, ...]) -> None:
        got = tuple(self.part.get_shape())
        if got != shape:
            raise UserError(
                f"{self.file}: tensor {self.name} has shape {list(got)} and config.json asks for {list(shape)}. "
                "The weights and the config are of different models."
            )
        if self.part.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(
                f"{self.file}: tensor {self.name} is stored as {self.part.get_dtype()}; supported are F32, F16 and "
                "BF16. Use the unquantised model."
            )


def _open_tensors(folder: Path, config: Qwen3Config, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """Every tensor the config asks for, by Hugging Face name."""
    where = _weight_map(folder, stack)
    layers = range(config.num_hidden_layers)
    wanted = {e.name.format(layer=i) for e in _table(config) for i in (layers if e.stacked else [0])}
    if missing := sorted(wanted - where.keys()):
        files = INDEX if (folder / INDEX).is_file() else SINGLE
        raise UserError(
            f"{folder / files}: tensor {missing[0]} is missing ({len(missing)} missing in all). "
            "The weights are incomplete, or config.json is of another model."
        )
    # A tied model may carry a copy of its head, which is the embedding.
    extra = sorted(where.keys() - wanted - ({"lm_head.weight"} if config.tie_word_embeddings else set()))
    if extra:
        raise UserError(
            f"{where[extra[0]].file}: tensor {extra[0]} is not part of the Qwen3 in config.json ({len(extra)} such in "
            "all). The weights and the config are of different models."
        )
    return {name: where[name] for name in wanted}


def _weight_map(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}. Give a folder with safetensors weights.")
        file = folder / SINGLE
        opened = _open(file, stack)
        return {name: _Stored(file, name, opened.get_slice(name)) for name in opened.keys()}
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{index} is not a safetensors index ({error!r}). Copy the file again.") from error
    result: dict[str, _Stored] = {}
    for shard in sorted(set(listed.values())):
        names = [name for name, file in listed.items() if file == shard]
        file = folder / shard
        if not file.is_file():
            raise UserError(f"{file} is missing; it holds tensor {names[0]} and {len(names) - 1} more. Copy it again.")
        opened = _open(file, stack)
        present = set(opened.keys())
        for name in names:
            if name not in present:
                raise UserError(f"{file}: tensor {name} is missing though {INDEX} lists it. Copy both files again.")
            result[name] = _Stored(file, name, opened.get_slice(name))
    return result


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, "np"))
    except safetensors.SafetensorError as error:
        tensor = _first_cut_tensor(file)
        at = f"it ends before tensor {tensor} does" if tensor else "its header is damaged, so no tensor can be read"
        raise UserError(f"{file} is truncated or damaged: {at} ({error}). Copy the file again.") from error


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor whose bytes lie past the end of a file that safetensors will not open."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size))
        except (ValueError, MemoryError, OverflowError):
            return None
    end = file.stat().st_size - 8 - size
    spans = sorted((v["data_offsets"][1], k) for k, v in header.items() if k != "__metadata__")
    return next((name for stop, name in spans if stop > end), None)


# ---------------------------------------------------------------------------------------------------------- writing


def save(
    params: Params,
    config: Qwen3Config,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    stop_ids: tuple[int, ...] = (),
    pad_id: int | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes config.json, generation_config.json and safetensors (shards with an index when large) into `folder`.

    All processes must call it; the first one writes. The folder appears whole or not at all.

    Args:
        params: as from `load`.
        config: the network's shape.
        folder: must not exist, or be empty.
        dtype: of the stored tensors: "bfloat16", "float16" or "float32".
        stop_ids: written as generation_config's eos_token_id; the first one is config.json's.
        pad_id: generation_config's pad_token_id.
        max_shard_size: of one file, as huggingface_hub reads it.

    Raises:
        UserError: when the folder is not empty or the disk is full.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty. Give another folder, or remove it first.")
    tensors = {tensor.name: tensor for tensor in _hf_tensors(params, config, np.dtype(dtype))}
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,  # no two tensors share storage
        max_shard_size=max_shard_size,
    )
    first = jax.process_index() == 0
    part = folder.with_name(folder.name + ".partial")
    with removed_on_failure(part):
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        for file, names in plan.filename_to_tensors.items():
            arrays = {name: tensors[name].read() for name in names}
            if first:
                safetensors.numpy.save_file(arrays, part / file, metadata={"format": "pt"})
        if first:
            if plan.is_sharded:
                index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
                _write_json(part / INDEX, index | {"weight_map": plan.tensor_to_filename})
            _write_json(part / "config.json", to_hf(config, dtype) | _first_eos(stop_ids))
            _write_json(part / "generation_config.json", _generation_config(config, stop_ids, pad_id))
            if folder.is_dir():
                folder.rmdir()
            os.replace(part, folder)


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Removes a half-written folder when writing fails, and says so in a sentence when the disk is why."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | safetensors.SafetensorError):
            free = shutil.disk_usage(_existing(folder)).free / 2**30
            raise UserError(
                f"cannot write {folder}: {error}; {free:.1f} GiB are free there. Free some space or give another "
                "folder; nothing else was touched."
            ) from error
        raise


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


@dataclass(frozen=True)
class _HFTensor:
    """A Hugging Face tensor that is fetched from the devices when it is written."""

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def _hf_tensors(params: Params, config: Qwen3Config, dtype: np.dtype) -> Iterator[_HFTensor]:
    for entry in _table(config):
        array = _get(params, entry.path)
        layers = range(config.num_hidden_layers) if entry.stacked else [None]
        for layer in layers:
            shape = array.shape if layer is None else array.shape[1:]
            yield _HFTensor(
                entry.name.format(layer=layer),
                int(np.prod(shape)) * dtype.itemsize,
                lambda array=array, layer=layer, shape=_hf_shape(entry, shape), turn=bool(entry.inputs): _fetch(
                    array, layer, shape, turn, dtype
                ),
            )


def _fetch(array: jax.Array, layer: int | None, shape: tuple[int, ...], turn: bool, dtype: np.dtype) -> np.ndarray:
    part = array if layer is None else array[layer]
    whole = np.asarray(part) if part.is_fully_addressable else multihost_utils.process_allgather(part, tiled=True)
    flat = whole.astype(dtype).reshape(shape[::-1] if turn else shape)
    return np.ascontiguousarray(flat.T if turn else flat)


def _first_eos(stop_ids: tuple[int, ...]) -> dict[str, int]:
    return {"eos_token_id": stop_ids[0]} if stop_ids else {}


def _generation_config(config: Qwen3Config, stop_ids: tuple[int, ...], pad_id: int | None) -> dict[str, Any]:
    eos = list(stop_ids) or config.eos_token_id
    return {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": pad_id} | GENERATION_DEFAULTS


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _get(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
