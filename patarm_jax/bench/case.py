"""What every benchmark starts from, and what it gives."""

from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from patarm_jax.bench.measure import Timing
from patarm_jax.bench.shapes import SHAPES
from patarm_jax.config.recipes import BenchConfig
from patarm_jax.config.sections import ModelSection
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import make_mesh


@dataclass(frozen=True)
class Result:
    """What a task took, and what it did in that time."""

    task: str
    shape: str
    timing: Timing
    tokens: int = 0  # useful ones: real tokens, each counted once whatever is recomputed or padded
    flops: float = 0  # useful ones
    read: float = 0  # bytes that had to be read from memory
    phases: dict[str, float] = field(default_factory=dict)  # median seconds


@dataclass(frozen=True)
class Bench:
    """What every task starts from."""

    config: BenchConfig
    arch: Architecture
    mesh: Mesh

    @property
    def section(self) -> ModelSection:
        """How the network computes."""
        c = self.config
        return ModelSection(dtype=c.dtype, remat=c.remat, attention=c.attention)

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator, the same each time."""
        return np.random.default_rng(self.config.seed)

    def tokens(self, *shape: int) -> np.ndarray:
        """Made-up token ids."""
        return self.rng.integers(0, self.arch.vocab_size, shape, dtype=np.int32)


def open_bench(config: BenchConfig) -> Bench:
    """The network and mesh of a config."""
    return Bench(config, SHAPES[config.model], make_mesh(config.mesh))
