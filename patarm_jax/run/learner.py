"""A learner: what is trained, its optimizer and its jitted update. A recipe has one for each model that it trains."""

from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import jax
import optax
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.sections import MeshSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.for_sampling import fuse_projections, unstack_layers
from patarm_jax.model.lora import joined, merged
from patarm_jax.model.sharding import (
    REPLICATED_RULES,
    ROLLOUT_RULES,
    OnMesh,
    Rules,
    batch_sharding,
    batch_shards,
)
from patarm_jax.model.transformer import abstract_params
from patarm_jax.train.optimizer import make_optimizer, make_schedule
from patarm_jax.train.steps import LossFn, TrainState, abstract_state, init_state, make_step
from patarm_jax.types import UsageError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Learner(Generic[Batch]):
    """One jitted update with the state that it changes and what it only reads."""

    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # updates that changed the weights → learning rate of the next one
    shape: TrainState  # shapes and shardings of the state
    update: OnMesh[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]  # the state is donated
    frozen: Tree = None  # shapes and shardings of what is only read, such as the weights beside adapters

    def new_state(self, params: Params) -> TrainState:
        """The state before the first update: the parameters as they are given, moments of 0, each in its place."""
        create = OnMesh(
            self.mesh, partial(init_state, optimizer=self.optimizer), out_shardings=shardings_of(self.shape)
        )
        return create(params)


def make_learner(
    config: TrainConfig, trained: Params, mesh: Mesh, loss: LossFn[Batch], updates: int, frozen: Tree = None
) -> Learner[Batch]:
    """A learner of any parameters.

    Args:
        config: whose optimizer and micro_batches it has.
        trained: the parameters, as abstract arrays with their shardings.
        mesh: where they lie.
        loss: of (parameters, frozen, batch).
        updates: of the whole run, by which the learning rate decays.
        frozen: what is only read, as abstract arrays with their shardings.
    """
    if not config.micro_batches:
        raise ValueError("micro_batches is 0, in place of which `recipes.fitting.fitted` gives the number that fits")
    optimizer = make_optimizer(config.optimizer, updates)
    shape = abstract_state(trained, optimizer, mesh)
    shardings = shardings_of(shape)
    update = OnMesh(
        mesh,
        make_step(loss, optimizer, config.micro_batches),
        in_shardings=(shardings, frozen and shardings_of(frozen), batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return Learner(
        mesh=mesh,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, updates),
        shape=shape,
        update=update,
        frozen=frozen,
    )


def shardings_of(shape: Tree) -> Tree:
    """Where each part of an abstract tree lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, shape)


def check_batch(mesh: Mesh, units: int, micro_batches: int, what: str) -> None:
    """Refuses a batch that the mesh or the micro-batches cannot share evenly; 0 of these are not chosen yet."""
    shards, micro_batches = batch_shards(mesh), micro_batches or 1
    if units % micro_batches or units // micro_batches % shards:
        raise UsageError(
            f"{what} gives {units} rows, which micro_batches {micro_batches} × {shards} devices (mesh.data × "
            f"mesh.fsdp) cannot share evenly. Make it a multiple of {micro_batches * shards}, or change the mesh."
        )


def rows_multiple(mesh: Mesh, micro_batches: int) -> int:
    """What the number of a process's packed rows must be a multiple of, so that slices and devices share them."""
    return micro_batches * max(1, batch_shards(mesh) // jax.process_count())


def weight_sync(config: TrainConfig, arch: Architecture, mesh: Mesh) -> OnMesh[[Params, Tree], Params]:
    """The jitted program that makes the copy for sampling of what is trained and what is only read."""
    dtype = config.model.dtype
    rollout = abstract_params(arch, mesh, rollout_rules(config.mesh), dtype, sampling=True)

    def copied(trained: Params, frozen: Tree) -> Params:
        return fuse_projections(merged(unstack_layers(joined(trained, frozen)), config.lora.scale, dtype))

    return OnMesh(mesh, copied, out_shardings=shardings_of(rollout))


def whole_weights(config: TrainConfig, arch: Architecture, mesh: Mesh, trained: Params, frozen: Tree) -> Params:
    """The weights of a whole model: those that are trained, or those that are only read with the adapters in them."""
    if not config.lora.rank:
        return trained
    whole = abstract_params(arch, mesh, dtype=config.model.dtype)
    merge = OnMesh(
        mesh,
        lambda trained, frozen: merged(joined(trained, frozen), config.lora.scale, config.model.dtype),
        out_shardings=shardings_of(whole),
    )
    return merge(trained, frozen)


def rollout_rules(placement: MeshSection) -> Rules:
    """How the copy for sampling is placed."""
    return ROLLOUT_RULES if placement.rollout == "tensor" else REPLICATED_RULES
