"""Accelerators that programs are compiled for without being there: what the compiler is told of them, what they reach.

Compute capability, cores, memory and bandwidth are NVIDIA's published ones; what is said to be reached is an
assumption, and so is every time that follows from it.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from patarm_jax.config.sections import MeshSection
from patarm_jax.model.sharding import MESH_AXES
from patarm_jax.types import UsageError, UserError

TargetName = Literal["h100", "a100"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)

# Of the published bandwidth a kernel that only reads and writes reaches so much, of the published FLOPs a large matmul.
BANDWIDTH_REACHED, FLOPS_REACHED = 0.9, 0.65
# Seconds from one kernel of a captured graph to the next.
BETWEEN_KERNELS = 1.5e-6
CARDS = 8  # of a host at most
PLUGIN = "pip install jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"

_DESCRIBED = """
gpu_device_info {{
  cuda_compute_capability {{ major: {capability} minor: 0 }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_of_core}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{words}"
"""


@dataclass(frozen=True)
class Target:
    """One kind of card."""

    words: str  # as its maker calls it
    capability: int
    cores: int
    units: int  # of float32, in a core
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes per second, published
    flops: float  # of bfloat16 matmuls per second, published
    cache: int  # bytes of the second level
    shared: int  # bytes of fast memory that a block may ask for
    shared_of_core: int

    def seconds(self, flops: float, moved: float) -> float:
        """What one kernel takes: as long as its arithmetic or its memory needs, and the pause before it."""
        arithmetic = flops / (FLOPS_REACHED * self.flops)
        return max(arithmetic, moved / (BANDWIDTH_REACHED * self.bandwidth)) + BETWEEN_KERNELS


_OF: dict[TargetName, Target] = {
    "h100": Target(
        words="NVIDIA H100 80GB HBM3",
        capability=9,
        cores=132,
        units=128,
        clock=1.98,
        memory=84_978_106_368,
        bandwidth=3_352_320_000_000,
        flops=989e12,
        cache=52_428_800,
        shared=232_448,
        shared_of_core=233_472,
    ),
    "a100": Target(
        words="NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        units=64,
        clock=1.41,
        memory=85_100_068_864,
        bandwidth=2_039_000_000_000,
        flops=312e12,
        cache=41_943_040,
        shared=166_912,
        shared_of_core=167_936,
    ),
}


def target_of(name: str) -> Target:
    """The card of a name."""
    for known, target in _OF.items():
        if known == name:
            return target
    raise UserError(f"--compiled-for {name}: programs can be compiled for {' and '.join(TARGETS)}. Name one of them.")


def described_mesh(target: Target, section: MeshSection) -> Mesh:
    """A mesh of cards that are described and not there; an axis without a size has one.

    Raises:
        UserError: without the CUDA plugin there is nobody who could compile for it.
    """
    jax.config.update("jax_platforms", "cpu")  # the plugin would look for a driver
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it would tell many times that there is no driver
    text = _DESCRIBED.format(**vars(target))
    sizes = [max(1, size) for size in (section.data, section.fsdp, section.tensor)]
    hosts = -(-math.prod(sizes) // CARDS)
    if math.prod(sizes) % hosts:
        raise UsageError(
            f"mesh.data × mesh.fsdp × mesh.tensor is {math.prod(sizes)}: more than {CARDS} cards are told as hosts of "
            f"equally many. Choose a multiple of {hosts}."
        )
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=text,
            topology=f"1x{hosts}x{math.prod(sizes) // hosts}",
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"nothing here compiles for a {target.words} ({error}). JAX's plugin does, without a card or a driver: "
            f"{PLUGIN.format(version=jax.__version__)}"
        ) from None
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=described.devices)
