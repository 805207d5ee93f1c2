"""`micro_batches: 0`: the fewest slices of a batch whose update fits on the devices, found by compiling."""

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from jax.sharding import Mesh

from patarm_jax.arrays import Tree
from patarm_jax.config.sections import DataSection
from patarm_jax.config.training import ReinforcedConfig, TrainConfig
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import Program, batch_shards
from patarm_jax.model.transformer import abstract_params
from patarm_jax.recipes.programs import update_of
from patarm_jax.run.learner import rollout_rules
from patarm_jax.run.peers import gather
from patarm_jax.run.process import say
from patarm_jax.run.programs import GIB, per_device

Config = TypeVar("Config", bound=TrainConfig)

# Of what a device offers, what an update may take: memory is given out in pieces, and not every gap can be used.
USABLE = 0.95


def fitted(config: Config, arch: Architecture, mesh: Mesh, beside: Sequence[Tree] = ()) -> Config:
    """The config with the fewest micro-batches that fit, where it asks for these; any other as it is.

    All processes choose alike, by the device that offers least. Where none fit, those that need least are taken, and it
    is said: the device has the last word.

    Args:
        config: complete; the largest batch is as long as its data section allows.
        arch: of the network that is trained.
        mesh: the devices.
        beside: abstract trees that are on the devices meanwhile, and that the update takes no part in.
    """
    if config.micro_batches:
        return config
    allowed = allowed_slices(config.units_per_step, batch_shards(mesh))
    kept = sum(map(per_device, beside))
    offered = min(map(int, gather("the memory of their devices", str(_offered(mesh)))))

    def needed(slices: int) -> int:
        return kept + bytes_of(update_of(replace(config, micro_batches=slices), arch, mesh))

    say("micro_batches is 0: compiling the update with more and more slices, until it fits …")
    chosen, needs = fewest(allowed, needed, round(USABLE * offered))
    found = f"{needs / GIB:.2f} GiB of {offered / GIB:.2f} GiB on each device, with what stays beside it"
    if needs > USABLE * offered:
        say(f"caution: not even micro_batches {chosen}, which needs least, seems to fit: {found}")
    else:
        say(f"micro_batches {chosen}: the update needs {found}")
    return replace(config, micro_batches=chosen)


def allowed_slices(units: int, shards: int) -> list[int]:
    """The numbers of slices that leave each device equally many of a batch's units.

    >>> allowed_slices(24, 4)
    [1, 2, 3, 6]
    """
    return [slices for slices in range(1, units + 1) if units % slices == 0 and units // slices % shards == 0]


def fewest(allowed: Sequence[int], needed: Callable[[int], int], offered: int) -> tuple[int, int]:
    """The first number of slices whose need is no more than is offered, and that need; else the one that needs least.

    From two on, more slices never need more; so few of them are tried. One may need less than two, which hold their
    gradient from the first slice on.

    >>> fewest([1, 2, 4, 8], lambda slices: 80 // slices, 25)
    (4, 20)
    >>> fewest([1, 2, 4], lambda slices: 30 if slices == 1 else 30 + 8 // slices, 25)
    (1, 30)
    """
    tried: dict[int, int] = {}

    def fits(slices: int) -> bool:
        tried[slices] = needed(slices)
        return tried[slices] <= offered

    if not fits(allowed[0]) and len(allowed) > 1:
        place = bisect_left(allowed, True, lo=1, hi=len(allowed) - 1, key=fits)
        fits(allowed[place])
    fitting = [slices for slices in tried if tried[slices] <= offered]
    chosen = min(fitting) if fitting else min(tried, key=lambda slices: tried[slices])
    return chosen, tried[chosen]


def bytes_of(program: Program) -> int:
    """What a compiled program needs on each device: what it is given and gives back, and what it needs meanwhile."""
    compiled, arguments = program
    memory = compiled.lower(*arguments).compile().memory_analysis()
    if memory is None:
        return 0
    given_back = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + given_back + memory.temp_size_in_bytes)


def as_long_as(data: DataSection, records: Sequence[EncodedPair]) -> DataSection:
    """The section with limits no wider than what was read."""
    lengths = [side for record in records for side in record.lengths]
    prompt, written = (max(1, *(side[place] for side in lengths)) for place in (0, 1))
    return replace(
        data,
        max_prompt_tokens=min(prompt, data.max_prompt_tokens),
        max_completion_tokens=min(written, data.max_completion_tokens),
    )


def stays_beside(config: TrainConfig, arch: Architecture, mesh: Mesh) -> list[Tree]:
    """What lies on the devices while a model is updated: its copy for sampling, and what a KL is measured from."""
    if not isinstance(config, ReinforcedConfig):
        return []
    dtype = config.model.dtype
    found: list[Tree] = [abstract_params(arch, mesh, rollout_rules(config.mesh), dtype, sampling=True)]
    if config.charges_kl and (not config.lora.rank or config.update.reference):
        found.append(abstract_params(arch, mesh, dtype=dtype))
    return found


def _offered(mesh: Mesh) -> int:
    """Bytes that a device of this process offers; CPUs share the machine's memory."""
    device = mesh.local_devices[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
