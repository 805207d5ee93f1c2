"""Where arrays live: the mesh, and the two tables that map logical axes to mesh axes.

Rules never change a result, only its placement.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from patarm_jax.arrays import Array, Tree
from patarm_jax.config.sections import MeshSection
from patarm_jax.types import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules: TypeAlias = Mapping[str, str | None]
Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

# Training: every weight is split over `fsdp` along the width that enters or leaves the residual stream, and over
# `tensor` along heads, MLP width or vocabulary, so that optimiser state is split as far as the mesh allows.
TRAIN_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "score": None,
    "mlp": "tensor",
}
# Sampling: a decode step touches every weight once for a handful of tokens, so gathering weights over `fsdp` at each
# layer would cost more than the step. They are split over `tensor` only, and whole along the rest.
ROLLOUT_RULES: Rules = {**TRAIN_RULES, "embed": None}
REPLICATED_RULES: Rules = dict.fromkeys(TRAIN_RULES)


def make_mesh(section: MeshSection, alone: bool = False) -> Mesh:
    """A mesh over all devices with the axes `data`, `fsdp` and `tensor`; `alone`: over those of this process."""
    sizes = {"data": section.data, "fsdp": section.fsdp, "tensor": section.tensor}
    devices = jax.local_devices() if alone else jax.devices()
    count = len(devices)
    asked = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {asked}: sizes must be positive, or -1 for all devices that are left.")
    if free := [axis for axis, size in sizes.items() if size == -1]:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if len(free) > 1 or count % fixed:
            raise UserError(
                f"mesh {asked} does not fit {count} devices: at most one axis may be -1, and the others must "
                f"multiply to a divisor of {count}."
            )
        sizes[free[0]] = count // fixed
    if (product := math.prod(sizes.values())) != count:
        raise UserError(f"mesh {asked} asks for {product} devices and there are {count}. Set one axis to -1.")
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)
    _refuse_torn_batches(mesh)
    return mesh


def _refuse_torn_batches(mesh: Mesh) -> None:
    """Each process feeds one part of a batch: its devices must hold that part, all of it, and no other."""
    shards, (mine, processes) = batch_shards(mesh), process_in(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    held = sorted({index[0].start or 0 for index in indices if index})
    if shards % processes or held != list(range(mine * shards // processes, (mine + 1) * shards // processes)):
        raise UserError(
            f"the mesh {dict(mesh.shape)} spreads one part of a batch over several of the {processes} processes, or "
            "orders the parts otherwise than the processes. Make mesh.data × mesh.fsdp a multiple of the number of "
            "processes, so that mesh.tensor stays within each."
        )


def named_sharding(mesh: Mesh, rules: Rules, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight with these logical axes; refuses a split that leaves a remainder."""
    spec = [rules[axis] if axis is not None else None for axis in axes]
    for axis, mesh_axis, size in zip(axes, spec, shape, strict=True):
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            raise UserError(
                f"{size} {axis} cannot be split over {mesh.shape[mesh_axis]} devices of mesh axis {mesh_axis!r}. "
                f"Choose mesh.{mesh_axis} so that it divides {size}."
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_in(mesh: Mesh) -> tuple[int, int]:
    """(which of the processes that share a mesh this one is, how many they are): of a mesh of one process, the only."""
    return (jax.process_index(), jax.process_count()) if mesh.is_multi_process else (0, 1)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class OnMesh(Generic[Inputs, Result]):
    """A jitted function that is always traced, compiled and called under its mesh, so that `constrain` has one."""

    def __init__(self, mesh: Mesh, function: Callable[Inputs, Result], **settings: Any) -> None:
        self.mesh = mesh
        self._jitted = jax.jit(function, **settings)

    def __call__(self, *inputs: Inputs.args, **keywords: Inputs.kwargs) -> Result:
        """The function's result."""
        with jax.set_mesh(self.mesh):
            return self._jitted(*inputs, **keywords)

    def lower(self, *inputs: Tree) -> jax.stages.Lowered:
        """The lowered program, as a jitted function gives it; inputs may be abstract."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*inputs)


# A jitted function, and the abstract arguments that it is compiled for.
Program: TypeAlias = tuple[OnMesh[..., Tree], tuple[Tree, ...]]


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Pins an activation to mesh axes inside `OnMesh`; without a mesh there is nothing to pin it to."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


@jax.custom_vjp
def gathered(x: jax.Array) -> jax.Array:
    """A weight [vocabulary, width], whole along its width before it is used in parts, which would gather it each time.

    Its gradient is split as the weight is, so that devices add up no more than each keeps.
    """
    return constrain(x, "tensor", None)


def _gathered_forward(x: jax.Array) -> tuple[jax.Array, None]:
    return gathered(x), None


def _gathered_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, "tensor", "fsdp"),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def between_blocks(x: jax.Array) -> jax.Array:
    """What layers hand on, [R, S, D], its tokens split over `tensor` where they divide: what is kept of each layer.

    Norms work on such a part; what needs all of a row's tokens gathers them, in place of adding up the whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = not mesh.empty and x.shape[1] % mesh.shape["tensor"] == 0
    return constrain(x, BATCH_AXES, "tensor" if divides else None, None)


def place_batch(mesh: Mesh, tree: Tree) -> Tree:
    """Host arrays, each process's part of a global batch, as global arrays split along their leading axis."""
    sharding, tree = batch_sharding(mesh), jax.tree.map(np.asarray, tree)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)  # all at once: sampling does it hundreds of times
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), tree)


def local_part(x: Array) -> np.ndarray:
    """This process's part of an array that is split along its leading axis: what `place_batch` was given."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def gather(mesh: Mesh, tree: Tree) -> Tree:
    """Host arrays, each process's part, put together along their leading axis on every process."""
    if not mesh.is_multi_process:
        return tree
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(np.asarray(x), tiled=True)), tree)


def gather_json(mesh: Mesh, mine: list[Any]) -> list[Any]:
    """JSON values, each process's list of them, put together on every process."""
    if not mesh.is_multi_process:
        return mine
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = gather(mesh, np.array([len(text)]))
    padded = gather(mesh, np.pad(text, (0, sizes.max() - len(text)))[None])
    return [value for size, part in zip(sizes, padded, strict=True) for value in json.loads(part[:size].tobytes())]


def fetch(tree: Tree) -> Tree:
    """The whole of each array as numpy, on every process."""
    return jax.tree.map(_fetch_array, tree)


def _fetch_array(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
