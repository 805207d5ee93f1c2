"""How weights lie for sampling: a subtree for each layer, and what reads the same states in one weight.

A step of decoding does nothing but read weights and caches. A layer that is read out of a stack is copied first, and
three matmuls of the same few rows start three times where one would do; joined by XLA they are copied at every step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from patarm_jax.arrays import Params, Tree

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
_FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_LIKE = {QKV: ("k_proj", 2), GATE_UP: ("gate_proj", 1)}  # placed as this part is, with one axis more


def for_sampling(params: Params) -> Params:
    """Weights as they are trained, or with layers apart, as `prefill` and `decode` read them."""
    return fuse_projections(unstack_layers(params) if "layers" in params else params)


def unstack_layers(params: Params) -> Params:
    """The same parameters with a subtree `layers_i` for each layer; training goes through all in one compiled body."""
    return unstacked(params, lambda x, i: x[i])


def unstacked(params: Params, take: Callable[[Tree, int], Tree]) -> Params:
    """A tree with a subtree for each layer, each leaf of which is taken from a leaf of all of them."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {f"layers_{i}": jax.tree.map(lambda x, i=i: take(x, i), params["layers"]) for i in range(count)}
    return {name: part for name, part in params.items() if name != "layers"} | layers


def layer_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer's part of an abstract parameter that is stacked along the layers."""
    sharding = leaf.sharding and NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def fuse_projections(params: Params) -> Params:
    """Layers that are apart, with q, k and v in one weight and gate and up in one; those that are so stay as they are.

        qkv_proj [D, K, N/K + 2, H]: of each key-value head the queries that read it, its keys and its values
        gate_up_proj [D, 2, F]

    So devices that share heads, or the MLP's width, hold the parts that they held of each.
    """
    return {name: fuse_layer(part) if name.startswith("layers_") else part for name, part in params.items()}


def fuse_layer(layer: Params) -> Params:
    """One layer with its projections in one; see `fuse_projections`.

    Raises:
        ValueError: adapters stand beside a projection, which would be left out.
    """
    attention, mlp = dict(layer["self_attn"]), dict(layer["mlp"])
    if QKV in attention:
        return layer
    q, k, v = (attention.pop(f"{name}_proj") for name in "qkv")
    width, heads, size = k.shape
    by_head = q.reshape(width, heads, -1, size)
    attention[QKV] = jnp.concatenate([by_head, k[:, :, None], v[:, :, None]], axis=2)
    mlp[GATE_UP] = jnp.stack([mlp.pop("gate_proj"), mlp.pop("up_proj")], axis=1)
    if beside := [name for name in (*attention, *mlp) if name.startswith(_FUSED)]:
        raise ValueError(f"{beside[0]} stands beside a projection: merge adapters first, by `lora.merged`")
    return {**layer, "self_attn": attention, "mlp": mlp}


def shapes_for_sampling(stacked: Params) -> Params:
    """What `for_sampling` makes of abstract weights, each placed as its parts were."""
    apart = unstacked(stacked, lambda leaf, _: layer_shape(leaf))
    return {name: fused_shapes(part) if name.startswith("layers_") else part for name, part in apart.items()}


def fused_shapes(layer: Params) -> Params:
    """What `fuse_layer` makes of a layer, abstract or not, each weight placed as its parts were."""
    return _placed(jax.eval_shape(fuse_layer, layer), layer)


def _placed(fused: Params, parts: Params) -> Params:
    found: Params = {}
    for name, leaf in fused.items():
        if isinstance(leaf, dict):
            found[name] = _placed(leaf, parts[name])
        elif name in parts:
            found[name] = parts[name]
        else:
            part, axis = _LIKE[name]
            found[name] = _with_axis(leaf, parts[part].sharding, axis)
    return found


def _with_axis(leaf: jax.ShapeDtypeStruct, part: NamedSharding | None, axis: int) -> jax.ShapeDtypeStruct:
    """A leaf placed as a part is, whole along an axis that the part does not have."""
    if part is None:
        return leaf
    spec = [*part.spec, *(None,) * (len(leaf.shape) - 1 - len(part.spec))]
    spec.insert(axis, None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(part.mesh, PartitionSpec(*spec)))
