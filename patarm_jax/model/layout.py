"""Our parameters and Hugging Face's tensors: which tensors make which parameter, turned and split how.

Hugging Face stores a linear map as [out, in], splits no heads and has a tensor for each layer; ours are [in…, out…],
the layers stacked. Both ways go tensor by tensor: a host holds at most one stacked parameter of its own devices.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import jax
import numpy as np

from patarm_jax.arrays import Params, Tree
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.for_sampling import layer_shape
from patarm_jax.model.sharding import fetch
from patarm_jax.model.weight_files import EMBEDDING, HEAD, open_file

SCORE = "score.weight"  # the head of a scalar reward model
# From the index of a device's part, None for all of it, to that part.
Read: TypeAlias = Callable[[tuple[slice, ...] | None], np.ndarray]


class _Slices(Protocol):
    """A tensor in a file, of which parts are read."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part itself."""


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors it is made of."""

    path: tuple[str, ...]
    name: str  # with {layer} when stacked
    inputs: int = 0  # our leading axes that are the linear map's input; 0: stored as it is, not transposed

    @property
    def stacked(self) -> bool:
        """Whether the parameter holds all layers, and each has a tensor of its own."""
        return "{layer}" in self.name

    def names(self, layers: int) -> list[str]:
        """The Hugging Face names, one of each layer when stacked."""
        return [self.name.format(layer=i) for i in range(layers)] if self.stacked else [self.name]

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its tensors, of a parameter of a shape."""
        one = shape[1:] if self.stacked else shape
        return (int(np.prod(one[self.inputs :])), int(np.prod(one[: self.inputs]))) if self.inputs else one


_LAYER = "model.layers.{layer}."
_NORMS = [Entry(("layers", "self_attn", f"{x}_norm"), f"{_LAYER}self_attn.{x}_norm.weight") for x in ("q", "k")]
_BIASES = [Entry(("layers", "self_attn", f"{x}_bias"), f"{_LAYER}self_attn.{x}_proj.bias") for x in ("q", "k", "v")]


def table_of(arch: Architecture) -> list[Entry]:
    """Every parameter of a network."""
    layer = _LAYER
    entries = [
        Entry(("embed_tokens",), EMBEDDING),
        *(
            Entry(("layers", "self_attn", f"{x}_proj"), f"{layer}self_attn.{x}_proj.weight", inputs=1)
            for x in ("q", "k", "v")
        ),
        Entry(("layers", "self_attn", "o_proj"), f"{layer}self_attn.o_proj.weight", inputs=2),
        *(_NORMS if arch.model_type == "qwen3" else _BIASES),
        *(
            Entry(("layers", "mlp", f"{x}_proj"), f"{layer}mlp.{x}_proj.weight", inputs=1)
            for x in ("gate", "up", "down")
        ),
        *(Entry(("layers", x), f"{layer}{x}.weight") for x in ("input_layernorm", "post_attention_layernorm")),
        Entry(("norm",), "model.norm.weight"),
    ]
    if arch.scalar_head:
        return [*entries, Entry(("score",), SCORE)]
    return entries if arch.tie_word_embeddings else [*entries, Entry(("lm_head",), HEAD)]


# ---------------------------------------------------------------------------------------------------------- reading


def tensor_shapes(table: Sequence[Entry], abstract: Params, layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors that make the parameters of a table, by name."""
    return {
        name: entry.tensor_shape(get_at(abstract, entry.path).shape) for entry in table for name in entry.names(layers)
    }


def read_into(
    params: Params, table: Sequence[Entry], abstract: Params, files: Mapping[str, Path], layers: int, unstacked: bool
) -> None:
    """Reads the parameters of a table into a tree, each device's part from the files and into its place.

    Args:
        params: the tree, which grows.
        table: which are read.
        abstract: their shapes, dtypes and places.
        files: tensor → its file.
        layers: how many there are.
        unstacked: with a subtree for each layer, as `for_sampling.unstack_layers` gives, but never stacked on the way.
    """
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for entry in table:
        leaf, names = get_at(abstract, entry.path), entry.names(layers)
        # Pages of a mapped file count as this process's memory until it is closed: map anew for each parameter.
        with contextlib.ExitStack() as stack:
            opened = {file: open_file(file, stack) for file in {files[name] for name in names}}
            read = _reader(entry, leaf, [opened[files[name]].get_slice(name) for name in names])
            if not (unstacked and entry.stacked):
                set_at(params, entry.path, jax.make_array_from_callback(leaf.shape, leaf.sharding or default, read))
                continue
            one = layer_shape(leaf)
            for layer in range(leaf.shape[0]):
                of_layer = _of_layer(read, layer, len(one.shape))
                array = jax.make_array_from_callback(one.shape, one.sharding or default, of_layer)
                set_at(params, (f"layers_{layer}", *entry.path[1:]), array)


def _of_layer(read: Read, layer: int, rank: int) -> Read:
    """The reader of one layer's part of a stacked parameter."""
    return lambda index: read((slice(layer, layer + 1), *(index or (slice(None),) * rank)))[0]


def _reader(entry: Entry, leaf: jax.ShapeDtypeStruct, stored: list[_Slices]) -> Read:
    """A function from the index of a device's part to that part, read from the files and from nothing else."""
    of_layer = leaf.shape[1:] if entry.stacked else leaf.shape

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(leaf.shape)
        spans = [slice(*span.indices(size)) for span, size in zip(index or whole, leaf.shape, strict=True)]
        part = spans[1:] if entry.stacked else spans
        shape = [span.stop - span.start for span in part]

        def one(tensor: _Slices) -> np.ndarray:
            found = tensor[_tensor_slices(entry, part, of_layer)]
            return (found.T if entry.inputs else found).reshape(shape)

        if not entry.stacked:
            return one(stored[0]).astype(leaf.dtype)
        layers = stored[spans[0]]
        out = np.empty((len(layers), *shape), leaf.dtype)
        for row, tensor in zip(out, layers, strict=True):
            row[...] = one(tensor)
        return out

    return read


def _tensor_slices(entry: Entry, part: list[slice], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Our slices of [in…, out…] as slices of [out, in]; head_dim, the folded axis, is never split."""
    if not entry.inputs:
        return tuple(part)

    def fold(spans: list[slice], sizes: tuple[int, ...]) -> slice:
        inner = int(np.prod(sizes[1:]))
        return slice(spans[0].start * inner, spans[0].stop * inner)

    return fold(part[entry.inputs :], shape[entry.inputs :]), fold(part[: entry.inputs], shape[: entry.inputs])


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, eq=False)
class HFTensor:
    """A Hugging Face tensor that is fetched from the devices when it is written."""

    name: str
    array: jax.Array  # the parameter it is, or is a layer of
    layer: int | None
    turned: bool  # [in…, out…] of ours is [out, in] of theirs
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor; all processes take part in fetching it."""
        part = fetch(self.array if self.layer is None else self.array[self.layer]).astype(self.dtype, copy=False)
        return np.ascontiguousarray(part.reshape(self.shape[::-1]).T if self.turned else part.reshape(self.shape))


def hf_tensors(params: Params, table: Sequence[Entry], layers: int, dtype: np.dtype) -> list[HFTensor]:
    """The tensors of a table's parameters: what is of no layer and stands first, each layer's, and the rest."""
    tensors = []
    for entry in table:
        array = get_at(params, entry.path)
        for layer, name in enumerate(entry.names(layers)):
            tensors.append(
                HFTensor(
                    name=name,
                    array=array,
                    layer=layer if entry.stacked else None,
                    turned=bool(entry.inputs),
                    shape=entry.tensor_shape(array.shape),
                    dtype=dtype,
                )
            )
    # transformers' order, so that each shard holds what it would in a folder of theirs.
    first, *others = tensors
    return [first, *sorted(others, key=lambda tensor: layers if tensor.layer is None else tensor.layer)]


# ------------------------------------------------------------------------------------------------------------- trees


def get_at(tree: Params, path: tuple[str, ...]) -> Tree:
    """What stands at a path in nested dictionaries."""
    for key in path:
        tree = tree[key]
    return tree


def set_at(tree: Params, path: tuple[str, ...], value: Tree) -> None:
    """Puts a value at a path in nested dictionaries."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
