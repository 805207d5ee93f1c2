"""Programs before they run: compiled ahead of the first step, or described by `--dry-run`."""

import contextlib
import io
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Tree
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.data.tokenizer import Tokenizer, decode
from patarm_jax.model.sharding import Program
from patarm_jax.run.peers import COMPILING, arrive
from patarm_jax.run.process import say
from patarm_jax.run.timing import compilations

GIB = 2**30


def per_device(shapes: Tree) -> int:
    """Bytes that an abstract tree takes on each device."""
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def compile_ahead(programs: Mapping[str, Program]) -> None:
    """Compiles jitted functions before they are called: it may take minutes, and says so beforehand."""
    begun, before = time.perf_counter(), dict(compilations().counts)
    say(f"compiling {', '.join(programs)} …")
    arrive(f"{COMPILING} {', '.join(programs)}")
    for program, arguments in programs.values():
        program.lower(*arguments).compile()
    after = compilations().counts
    compiled, read = (after[name] - before[name] for name in ("time/compiled_programs", "time/programs_from_disk"))
    from_disk = f", {read:.0f} of {compiled:.0f} from what was kept on disk" if read else ""
    say(f"compiled in {time.perf_counter() - begun:.1f} s{from_disk}")


def describe(
    config: str, mesh: Mesh, programs: Mapping[str, Program], batch: PairBatch, tokenizer: Tokenizer, steps: int
) -> None:
    """Prints the resolved config, the first batch, and what each program, compiled but not run, needs per device.

    Of several processes the first one prints, and all compile.
    """
    with contextlib.redirect_stdout(sys.stdout if jax.process_index() == 0 else io.StringIO()):
        _describe(config, mesh, programs, batch, tokenizer, steps)


def _describe(
    config: str, mesh: Mesh, programs: Mapping[str, Program], batch: PairBatch, tokenizer: Tokenizer, steps: int
) -> None:
    print(config)
    first = batch.records[0]
    print(f"first batch: {len(batch.ids)} pairs, prompts up to {batch.longest_prompt} tokens: {', '.join(batch.ids)}")
    print(f"the model reads of {first.preference.id}, first of all:")
    print(decode(tokenizer, first.prompt_tokens[0].tolist()))
    if first.completion_tokens is not None:
        print("and learns to write:")
        print(decode(tokenizer, first.completion_tokens[0].tolist()))
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"\nmesh: {shape} ({mesh.devices.size} × {mesh.devices.flat[0].device_kind}); {steps} steps")
    for name, (program, arguments) in programs.items():
        memory = program.lower(*arguments).compile().memory_analysis()
        needs = (
            "unknown memory"
            if memory is None
            else (
                f"{memory.argument_size_in_bytes / GIB:.3f} GiB of arguments and "
                f"{memory.temp_size_in_bytes / GIB:.3f} GiB of temporary memory"
            )
        )
        read = [argument for argument in arguments[1:] if not isinstance(argument, dict)]  # weights are dictionaries
        print(f"{name}: {summed_up(read)}; per device {needs}")
    print(
        "beside a program, what it takes no part in stays on the devices: state, reference, the weights beside "
        "adapters, the rollout copy"
    )
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    print(f"each device offers {limit / GIB:.1f} GiB" if limit else "this kind of device does not say what it offers")


def summed_up(batch: Tree) -> str:
    """The shapes of a batch's arrays in a few words: each once, with how many have it.

    >>> import jax.numpy as jnp
    >>> summed_up([jnp.zeros((4, 2, 64)), jnp.zeros((4, 2)), jnp.zeros((4, 2)), jnp.zeros(())])
    'arrays [4, 2, 64], 2 × [4, 2], a number'
    """
    counts = Counter(np.shape(leaf) for leaf in jax.tree.leaves(batch))
    words = [
        (f"{count} × " if count > 1 else "") + (f"[{', '.join(map(str, shape))}]" if shape else "a number")
        for shape, count in counts.items()
    ]
    return "arrays " + ", ".join(words)
