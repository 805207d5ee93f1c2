"""Attention by the kernel that suits the hardware and the shape: over whole rows, and over what rows have written.

`portable` is plain JAX (`model/attention.py`); `cudnn` and `splash` are the libraries' for NVIDIA GPUs and TPUs;
`pallas` is ours for NVIDIA GPUs, for rows that cuDNN has no mask for (`model/flash.py`) and for rows that are being
written (`model/flash_decode.py`). All of them compute the same.

Axis letters: R rows · S tokens of a row · Tp of them the prompt's · G completions behind it · N query heads ·
              K key-value heads · H head width · B rows that are being written · M queries of such a row and head
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from patarm_jax.config.sections import ModelSection
from patarm_jax.model import attention, flash, flash_decode
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.attention import Partial, Pool, Streams
from patarm_jax.model.pages import Held
from patarm_jax.model.sharding import BATCH_AXES
from patarm_jax.types import UserError

Name = Literal["portable", "cudnn", "pallas", "splash"]
# Plain rows · several sequences in a row · a prompt and its completions · rows of which a token is written at a time.
Form = Literal["causal", "packed", "shared", "written"]
Hardware = Literal["cpu", "gpu", "other gpu", "tpu"]  # gpu: NVIDIA's from Ampere on

# Splash works on blocks of a multiple of so many tokens, and holds a block of keys and values in fast memory.
SPLASH_LANES = 128
SPLASH_BLOCK = 512


@dataclass(frozen=True)
class Kernel:
    """How attention is computed."""

    name: Name = "portable"
    interpret: bool = False  # Pallas kernels as ordinary JAX, on any device: what tests compare
    blockwise: bool = False  # of the portable one over written rows: see `attention.read_pages`


PORTABLE = Kernel()


def choose(asked: Name | Literal["auto"], form: Form, hardware: Hardware, dtype: DTypeLike, head_dim: int) -> Kernel:
    """The kernel for such rows on such devices.

    Args:
        asked: a kernel, or "auto" for the first of cudnn, pallas and splash that can do it, else portable.
        form: what the rows look like.
        hardware: from `hardware_of`.
        dtype: of the computation.
        head_dim: H.

    Raises:
        UserError: the kernel asked for cannot do it.
    """
    kind = jnp.dtype(dtype)
    gpu = _unless(hardware == "gpu", f"needs an NVIDIA GPU from Ampere on, not {hardware}")
    half = _unless(kind == jnp.bfloat16, f"computes in bfloat16, not {kind}")
    lacks: dict[Name, list[str]] = {
        "cudnn": [
            *gpu,
            *_unless(form == "causal", f"has no mask for {form} rows"),
            *half,
            *_unless(head_dim % 8 == 0 and head_dim <= 128, f"needs heads of at most 128 and 8·n, not {head_dim}"),
        ],
        "pallas": [
            *gpu,
            *half,
            *_unless(head_dim in (16, 32, 64, 128), f"needs heads of 16, 32, 64 or 128, not {head_dim}"),
        ],
        "splash": [
            *_unless(hardware == "tpu", f"needs a TPU, not {hardware}"),
            *_unless(form != "written", "has no mask for written rows"),
            *_unless(head_dim % SPLASH_LANES == 0, f"needs heads of 128·n, not {head_dim}"),
        ],
        "portable": [],
    }
    if asked == "auto":
        return Kernel(next(name for name, missing in lacks.items() if not missing))
    if lacks[asked]:
        raise UserError(
            f"attention {asked} {' and '.join(lacks[asked])}. Leave model.attention at auto, which takes what fits."
        )
    return Kernel(asked)


def hardware_of(device: jax.Device) -> Hardware:
    """What of a device decides about kernels. Triton compiles for NVIDIA's compute capability 8.0 and up."""
    if device.platform != "gpu":
        return "tpu" if device.platform == "tpu" else "cpu"
    generation = device.compute_capability.partition(".")[0]  # AMD's are names, such as gfx942
    return "gpu" if generation.isdigit() and int(generation) >= 8 else "other gpu"


def kernel_for(section: ModelSection, arch: Architecture, mesh: Mesh, form: Form) -> Kernel:
    """The kernel a config gets for rows of this form on the devices of a mesh.

    Written rows are read by what fits them where a library's kernel is asked for: it knows whole rows alone.
    """
    asked = "auto" if form == "written" and section.attention in ("cudnn", "splash") else section.attention
    return choose(asked, form, hardware_of(mesh.devices.flat[0]), section.dtype, arch.head_dim)


def kernels_in_use(section: ModelSection, arch: Architecture, mesh: Mesh, *forms: Form) -> str:
    """What a run says of the kernels it has chosen."""
    chosen = ", ".join(f"{kernel_for(section, arch, mesh, form).name} for {form} rows" for form in forms)
    return f"attention: {chosen} ({hardware_of(mesh.devices.flat[0])}, {section.dtype}, heads of {arch.head_dim})"


def _unless(fits: bool, reason: str) -> list[str]:
    return [] if fits else [reason]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, streams: Streams, kernel: Kernel) -> jax.Array:
    """Attention of rows of tokens as `streams` says what each reads; under a mesh each device does its rows and heads.

    Args:
        q: [R, S, N, H].
        k: [R, S, K, H].
        v: [R, S, K, H].
        streams: what the rows are made of.
        kernel: that `choose` gave for their form.

    Returns:
        [R, S, N, H], float32 from the portable kernel, else in q's dtype; at padded positions something finite.
    """
    if kernel.name == "portable":  # XLA divides it among devices by itself
        return attention.attend_streams(q, k, v, streams)
    local: Callable[..., jax.Array] = {"cudnn": _cudnn, "pallas": _pallas, "splash": _splash}[kernel.name]
    if kernel.interpret:
        local = partial(local, interpret=True)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, streams)
    heads, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES)
    of_streams = jax.tree.map(lambda _: rows, streams)
    return jax.shard_map(local, in_specs=(heads, heads, heads, of_streams), out_specs=heads, check_vma=False)(
        q, k, v, streams
    )


def read_pages(q: jax.Array, k: Pool, v: Pool, held: Held, kernel: Kernel) -> Partial:
    """Attention of queries to what their row holds; under a mesh each device does its rows, pages and heads.

    Args:
        q: [B, K, M, H].
        k: the parts of a pool, [Pᵢ, K, H, S] each, S a multiple of `key_block(kernel)`; see `takes_parts`.
        v: [Pᵢ, K, S, H] each.
        held: how many keys each row has, and on which pages of its device.
        kernel: that `choose` gave for written rows.

    Returns:
        out [B, K, M, H] and lse [B, K, M], both float32; see `attention.read_pages`.
    """
    local: Callable[..., Partial] = partial(attention.read_pages, blockwise=kernel.blockwise)
    if not takes_parts(kernel):
        local = partial(flash_decode.read_pool, interpret=kernel.interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, held)
    heads, rows = PartitionSpec(BATCH_AXES, "tensor"), PartitionSpec(BATCH_AXES)
    of_pools, of_held = jax.tree.map(lambda _: heads, (k, v)), jax.tree.map(lambda _: rows, held)
    return jax.shard_map(local, in_specs=(heads, *of_pools, of_held), out_specs=heads, check_vma=False)(q, k, v, held)


def takes_parts(kernel: Kernel) -> bool:
    """Whether a pool may have several parts; else it is one array."""
    return kernel.name == "portable"


def key_block(kernel: Kernel) -> int:
    """Pages hold a multiple of so many keys."""
    return 1 if kernel.name == "portable" else flash_decode.KEYS


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, streams: Streams) -> jax.Array:
    """Plain rows: no token reads the padding behind it, so causality is all the mask they need."""
    del streams
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _pallas(q: jax.Array, k: jax.Array, v: jax.Array, streams: Streams, interpret: bool = False) -> jax.Array:
    length = q.shape[1]
    position, begins = layout_of(length, streams)
    start = jnp.asarray(begins)[None] if streams.starts is None else streams.starts
    prefix = jnp.where(position >= streams.width, streams.lengths[:, None], 0)
    stop = jnp.asarray(position + 1)[None]
    return flash.attend(q, k, v, flash.Reads(prefix, start, stop), interpret)


def layout_of(length: int, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
    """The place of every token [S] in its row, and where the prompt or completion that it belongs to begins there."""
    position = np.arange(length, dtype=np.int32)
    each = max(1, (length - streams.width) // max(1, streams.group))
    behind = position - streams.width
    return position, np.where(behind < 0, 0, position - behind % each)


# ------------------------------------------------------------------------------------------------------------ splash


@dataclass(frozen=True)
class _StreamsMask(Mask):
    """Who may read whom in a row, padding aside, in blocks as they are asked for; splash skips what is all False."""

    length: int
    begins: tuple[int, ...]  # where the prompt or completion of each token begins
    width: int  # tokens of the prompt, which all behind it read

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query, key = (np.arange(self.length)[part] for part in index)
        begin = np.asarray(self.begins)[query]
        own = (begin[:, None] <= key) & (key <= query[:, None])
        return own | ((query[:, None] >= self.width) & (key < self.width))


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, streams: Streams, interpret: bool = False) -> jax.Array:
    """Splash attention: the layout is a mask known when compiling, lengths and sequences are segments.

    A token reads only keys of its segment: its sequence in packed rows, 0 for whatever is real in the others.
    """
    length, size = q.shape[1], q.shape[3]
    block = min(SPLASH_BLOCK, length + -length % SPLASH_LANES)
    padding = -length % block
    whole = length + padding
    _, begins = layout_of(length, streams)
    mask = _StreamsMask(whole, (*begins.tolist(), *range(length, whole)), streams.width if streams.group else whole)
    splash = make_splash_mha(
        MultiHeadMask([mask] * q.shape[2]),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=attention.KEPT,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    queries = keys = jnp.zeros((q.shape[0], length), jnp.int32)
    if streams.starts is not None:
        queries = keys = streams.starts
    elif streams.group:
        position = jnp.arange(length)
        keys = ((streams.lengths[:, None] <= position) & (position < streams.width)).astype(jnp.int32)
    segments = SegmentIds(*(jnp.pad(x, ((0, 0), (0, padding)), constant_values=-1) for x in (queries, keys)))
    scaled = (q * size**-0.5).astype(q.dtype)
    by_head = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (scaled, k, v))
    return jax.vmap(splash)(*by_head, segments)[:, :, :length].swapaxes(1, 2)
