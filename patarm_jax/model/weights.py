"""Weights on disk: Hugging Face folders ⇄ sharded parameters, tensor by tensor.

A host holds at most one stacked parameter of its own devices at a time, never the model twice. Tokenizers and model
cards are not written here.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from patarm_jax.arrays import Params, Tree
from patarm_jax.files import appearing_whole, write_json
from patarm_jax.model.architecture import Architecture, to_hf
from patarm_jax.model.generation import FILE, Drawing, to_generation_config
from patarm_jax.model.sharding import TRAIN_RULES, Rules, fetch
from patarm_jax.model.transformer import abstract_params, layer_shape, new_score_head
from patarm_jax.model.weight_files import (
    EMBEDDING,
    HEAD,
    INDEX,
    Stored,
    check_file,
    no_weights,
    open_file,
    read_stored,
    write_file,
)
from patarm_jax.types import UserError

SCORE = "score.weight"  # the head of a scalar reward model
# From the index of a device's part, None for all of it, to that part.
Read: TypeAlias = Callable[[tuple[slice, ...] | None], np.ndarray]


class _Slices(Protocol):
    """A tensor in a file, of which parts are read."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part itself."""


@dataclass(frozen=True)
class _Entry:
    """One of our parameters and the Hugging Face tensors it is made of."""

    path: tuple[str, ...]
    name: str  # with {layer} when stacked
    inputs: int = 0  # our leading axes that are the linear map's input; 0: stored as it is, not transposed

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def names(self, arch: Architecture) -> list[str]:
        """The Hugging Face names, one of each layer when stacked."""
        return [self.name.format(layer=i) for i in range(arch.num_hidden_layers)] if self.stacked else [self.name]


def _table(arch: Architecture) -> list[_Entry]:
    """Hugging Face stores a linear map as [out, in] and splits no heads; we store [in…, out…]."""
    layer = "model.layers.{layer}."
    entries = [
        _Entry(("embed_tokens",), EMBEDDING),
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
        _Entry(("norm",), "model.norm.weight"),
    ]
    if arch.scalar_head:
        return [*entries, _Entry(("score",), SCORE)]
    return entries if arch.tie_word_embeddings else [*entries, _Entry(("lm_head",), HEAD)]


# ---------------------------------------------------------------------------------------------------------- reading


def load(
    folder: Path | str,
    mesh: Mesh | None = None,
    rules: Rules = TRAIN_RULES,
    dtype: DTypeLike = jnp.float32,
    unstacked: bool = False,
    stored: Stored | None = None,
    head_key: jax.Array | None = None,
) -> tuple[Params, Architecture]:
    """Parameters and config of a Hugging Face Qwen3 folder, in one file or in shards.

    The config is as the weights are: not tied where the files hold a head that is not the embedding.

    Args:
        folder: holds config.json and safetensors in bfloat16, float16 or float32.
        mesh: where the parameters are placed; None: on the default device.
        rules: how they are placed.
        dtype: the dtype they are given.
        unstacked: with a subtree for each layer, as `transformer.unstack_layers` gives, but never stacked on the way.
        stored: what `read_stored` found in the folder; None: it is read now.
        head_key: draws the score head, which the files do not have; None: it is read like all others.

    Raises:
        UserError: naming file and tensor, when a file is missing or cut short, a tensor is missing, unknown or of
            another shape than config.json says.
    """
    stored = stored or read_stored(Path(folder))
    arch, files = stored.arch, stored.files
    abstract = abstract_params(arch, mesh, rules, dtype)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    drawn = {SCORE} if head_key is not None else set()
    table = [entry for entry in _table(arch) if entry.name not in drawn]
    _refuse_another_model(stored, table, abstract)
    params: Params = {}
    if head_key is not None:
        leaf = abstract["score"]
        params["score"] = jax.device_put(new_score_head(arch, head_key).astype(dtype), leaf.sharding or default)
    for entry in table:
        leaf = _get(abstract, entry.path)
        # Pages of a mapped file count as this process's memory until it is closed: map anew for each parameter.
        with contextlib.ExitStack() as stack:
            opened = {file: open_file(file, stack) for file in {files[name] for name in entry.names(arch)}}
            read = _reader(entry, leaf, [opened[files[name]].get_slice(name) for name in entry.names(arch)])
            if not (unstacked and entry.stacked):
                _set(params, entry.path, jax.make_array_from_callback(leaf.shape, leaf.sharding or default, read))
                continue
            one = layer_shape(leaf)
            for layer in range(leaf.shape[0]):
                of_layer = _of_layer(read, layer, len(one.shape))
                array = jax.make_array_from_callback(one.shape, one.sharding or default, of_layer)
                _set(params, (f"layers_{layer}", *entry.path[1:]), array)
    return params, arch


def _of_layer(read: Read, layer: int, rank: int) -> Read:
    """The reader of one layer's part of a stacked parameter."""
    return lambda index: read((slice(layer, layer + 1), *(index or (slice(None),) * rank)))[0]


def _reader(entry: _Entry, leaf: jax.ShapeDtypeStruct, stored: list[_Slices]) -> Read:
    """A function from the index of a device's part to that part, read from the files and from nothing else."""
    of_layer = leaf.shape[1:] if entry.stacked else leaf.shape

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(leaf.shape)
        spans = [slice(*span.indices(size)) for span, size in zip(index or whole, leaf.shape, strict=True)]
        part = spans[1:] if entry.stacked else spans
        shape = [span.stop - span.start for span in part]

        def one(tensor: _Slices) -> np.ndarray:
            found = tensor[_hf_slices(entry, part, of_layer)]
            return (found.T if entry.inputs else found).reshape(shape)

        if not entry.stacked:
            return one(stored[0]).astype(leaf.dtype)
        layers = stored[spans[0]]
        out = np.empty((len(layers), *shape), leaf.dtype)
        for row, tensor in zip(out, layers, strict=True):
            row[...] = one(tensor)
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


def _refuse_another_model(stored: Stored, table: Sequence[_Entry], abstract: Params) -> None:
    """All that can be wrong with the tensors is found before a weight is read."""
    arch, files = stored.arch, stored.files
    if not files:
        raise no_weights(stored)
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in table:
        shape = _get(abstract, entry.path).shape
        hf_shape = _hf_shape(entry, shape[1:] if entry.stacked else shape)
        wanted |= dict.fromkeys(entry.names(arch), hf_shape)
    if missing := sorted(wanted.keys() - files.keys()):
        raise UserError(
            f"{stored.listing}: tensor {missing[0]} is missing ({len(missing)} missing in all). "
            "The weights are incomplete, or config.json is of another model."
        )
    # A tied model may carry a copy of its head, which is the embedding; one that gives a score has no use for it.
    spare = {HEAD} if arch.tie_word_embeddings or arch.scalar_head else set()
    if extra := sorted(files.keys() - wanted.keys() - spare):
        raise UserError(
            f"{files[extra[0]]}: tensor {extra[0]} is not part of the Qwen3 in config.json ({len(extra)} such in "
            "all). The weights and the config are of different models."
        )
    for file in stored.weight_files:
        check_file(file, {name: shape for name, shape in wanted.items() if files[name] == file})


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, eq=False)
class _HFTensor:
    """A Hugging Face tensor that is fetched from the devices when it is written."""

    name: str
    array: jax.Array  # the parameter it is, or is a layer of
    layer: int | None
    turned: bool  # [in…, out…] of ours is [out, in] of theirs
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        part = fetch(self.array if self.layer is None else self.array[self.layer]).astype(self.dtype, copy=False)
        return np.ascontiguousarray(part.reshape(self.shape[::-1]).T if self.turned else part.reshape(self.shape))


def save(
    params: Params,
    arch: Architecture,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    stop_ids: tuple[int, ...] = (),
    pad_id: int | None = None,
    drawing: Drawing | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes config.json, generation_config.json and safetensors (shards with an index when large) into `folder`.

    All processes must call it; the first one writes. The folder appears whole or not at all.

    Args:
        params: as from `load`.
        arch: the network's shape.
        folder: must not exist, or be empty.
        dtype: of the stored tensors: "bfloat16", "float16" or "float32".
        stop_ids: written as generation_config's eos_token_id; the first one is config.json's.
        pad_id: generation_config's pad_token_id; of a scalar reward model, config.json's.
        drawing: how transformers and vLLM are to sample unless they are told; None: at temperature 1, all tokens.
        max_shard_size: of one file, as huggingface_hub reads it.

    Raises:
        UserError: when the folder is not empty or the disk is full.
    """
    tensors = {tensor.name: tensor for tensor in _hf_tensors(params, arch, np.dtype(dtype))}
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,  # no two tensors share storage
        max_shard_size=max_shard_size,
    )
    first = jax.process_index() == 0
    with appearing_whole(folder) as part:
        for file, names in plan.filename_to_tensors.items():
            _write_shard(part / file, [tensors[name] for name in names])
        if first:
            if plan.is_sharded:
                index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
                write_json(part / INDEX, index | {"weight_map": plan.tensor_to_filename})
            # A classifier's score is that of the last token that is not the padding's, so its config must say which.
            padding = {"pad_token_id": pad_id} if arch.scalar_head else {}
            write_json(part / "config.json", to_hf(arch, dtype) | _first_eos(stop_ids) | padding)
            if arch.scalar_head:
                return  # it writes nothing that would be drawn
            ids = {"bos_token_id": arch.bos_token_id, "eos_token_id": list(stop_ids) or arch.eos_token_id}
            drawn = to_generation_config(drawing or Drawing())
            write_json(part / FILE, ids | {"pad_token_id": pad_id} | drawn)


def _write_shard(file: Path, tensors: list[_HFTensor]) -> None:
    arrays = [(tensor.name, tensor.read()) for tensor in tensors]  # all processes take part in fetching
    if jax.process_index() == 0:
        write_file(file, arrays)


def _hf_tensors(params: Params, arch: Architecture, dtype: np.dtype) -> list[_HFTensor]:
    """In transformers' order, layer by layer, so that each shard holds what it would in a folder of theirs."""
    tensors = []
    for entry in _table(arch):
        array = _get(params, entry.path)
        shape = _hf_shape(entry, array.shape[1:] if entry.stacked else array.shape)
        for layer, name in enumerate(entry.names(arch)):
            tensors.append(
                _HFTensor(
                    name=name,
                    array=array,
                    layer=layer if entry.stacked else None,
                    turned=bool(entry.inputs),
                    shape=shape,
                    dtype=dtype,
                )
            )
    embedding, *others = tensors
    return [embedding, *sorted(others, key=lambda t: arch.num_hidden_layers if t.layer is None else t.layer)]


def _first_eos(stop_ids: tuple[int, ...]) -> dict[str, int]:
    return {"eos_token_id": stop_ids[0]} if stop_ids else {}


def _get(tree: Params, path: tuple[str, ...]) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Params, path: tuple[str, ...], value: Tree) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
