"""LoRA: a product of two thin matrices beside each weight, which is trained in its place.

    y = x·W + (alpha / rank) · x·A·B,   A [in…, rank] random, B [rank, out…] zero at first

The weights W are only read. Adapters stand beside them in the tree of parameters, those of `q_proj` as `q_proj_lora_A`
and `q_proj_lora_B`; a network that finds them there adds what they give. Source: Hu et al., "LoRA", 2021, as PEFT's
`LoraConfig` has it.
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.sections import LoRASection
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.transformer import LORA_A, LORA_B, abstract_params
from patarm_jax.rounding import round_at_random

INPUTS = {"o_proj": 2}  # of a weight's axes, so many are its inputs; of all others, one


def abstract_parts(
    arch: Architecture, mesh: Mesh | None, section: LoRASection, dtype: DTypeLike
) -> tuple[Params, Tree]:
    """What is trained, and what is only read: all weights and nothing or, of adapters, these and the weights.

    A head that gives scores is trained beside adapters, for it begins as random numbers.

    Args:
        arch: the network's shape.
        mesh: where everything is placed, by the rules of training.
        section: the adapters, if any.
        dtype: of weights that are only read; what is trained is float32.
    """
    if not section.rank:
        return abstract_params(arch, mesh), None
    frozen = abstract_params(arch, mesh, dtype=dtype)
    trained = abstract_adapters(frozen, section.rank, section.targets)
    if arch.scalar_head:
        del frozen["score"]
        trained["score"] = abstract_params(arch, mesh)["score"]
    return trained, frozen


def abstract_adapters(weights: Params, rank: int, targets: Sequence[str]) -> Params:
    """Shapes and places of the adapters of abstract weights, layers stacked; whole along the rank, in float32."""
    return {"layers": _beside(weights["layers"], rank, targets)}


def _beside(weights: Params, rank: int, targets: Sequence[str]) -> Params:
    found: Params = {}
    for name, weight in weights.items():
        if isinstance(weight, dict):
            if inner := _beside(weight, rank, targets):
                found[name] = inner
        elif name in targets:
            first = 1 + INPUTS.get(name, 1)  # behind the layers
            axes = weight.sharding.spec if weight.sharding else (None,) * len(weight.shape)
            axes = (*axes, *(None,) * (len(weight.shape) - len(axes)))

            def leaf(shape: tuple[int, ...], spec: tuple[str | None, ...], weight: Tree = weight) -> Tree:
                placed = weight.sharding and NamedSharding(weight.sharding.mesh, PartitionSpec(*spec))
                return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)

            found[name + LORA_A] = leaf((*weight.shape[:first], rank), (*axes[:first], None))
            found[name + LORA_B] = leaf((weight.shape[0], rank, *weight.shape[first:]), (axes[0], None, *axes[first:]))
    return found


def init_adapters(shapes: Params, key: jax.Array) -> Params:
    """Adapters that add nothing yet: A uniform within ±1/√inputs, as PEFT draws it, and B zero; each in its place."""

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = "/".join(part.key for part in path)
        if name.endswith(LORA_B):
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = math.prod(leaf.shape[1:-1]) ** -0.5
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)

    def every(key: jax.Array) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: draw(path, leaf, key), shapes)

    return jax.jit(every, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))(key)


def joined(trained: Params, frozen: Tree) -> Params:
    """What the network reads: one tree of what is trained and what is only read.

    >>> joined({"layers": {"q_proj_lora_A": 1}, "score": 2}, {"layers": {"q_proj": 3}, "norm": 4})
    {'layers': {'q_proj': 3, 'q_proj_lora_A': 1}, 'norm': 4, 'score': 2}
    >>> joined({"norm": 5}, None)
    {'norm': 5}
    """
    if frozen is None:
        return trained
    both = dict(frozen)
    for name, part in trained.items():
        both[name] = joined(part, both[name]) if name in both else part
    return both


def merged(params: Params, scale: float, dtype: DTypeLike) -> Params:
    """The weights with what their adapters add, and no adapters: W + scale · A·B, added in float32.

    In bfloat16 a sum is rounded at random: to the nearest, what young adapters add, which is less than half of the last
    place of W, would be lost from nearly every weight. The same adapters are merged to the same weights each time.

    Args:
        params: from `joined`; layers stacked, which are merged one after another, or unstacked.
        scale: alpha / rank.
        dtype: of the result.
    """

    def of_layer(number: jax.Array, layer: Params) -> Params:
        return _merged(layer, scale, jnp.dtype(dtype), jax.random.key(number))

    found: Params = {}
    for name, part in params.items():
        if name == "layers":
            numbers = jnp.arange(jax.tree.leaves(part)[0].shape[0])
            found[name] = jax.lax.map(lambda one: of_layer(*one), (numbers, part))
        elif isinstance(part, dict):
            found[name] = of_layer(jnp.int32(int(name.removeprefix("layers_"))), part)
        else:
            found[name] = part.astype(dtype)
    return found


def _merged(part: Params, scale: float, dtype: jnp.dtype, key: jax.Array) -> Params:
    found: Params = {}
    for name, weight in part.items():
        if isinstance(weight, dict):
            found[name] = _merged(weight, scale, dtype, key)
        elif name + LORA_A in part:
            a, b = (part[name + end].astype(jnp.float32) for end in (LORA_A, LORA_B))
            added = scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            found[name] = _rounded(weight.astype(jnp.float32) + added, dtype, own)
        elif not name.endswith((LORA_A, LORA_B)):
            found[name] = weight.astype(dtype)
    return found


def _rounded(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    return round_at_random(x, key) if dtype == jnp.bfloat16 else x.astype(dtype)
