"""What `--dry-run` tells before anything is trained: config, programs, memory per device, the first batch."""

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from patarm_jax.data.pipeline import PairBatch
from patarm_jax.data.tokenizer import Tokenizer, decode

GIB = 2**30

# A jitted function and the abstract arguments it is compiled for: the widest bucket of the data.
Program = tuple[Any, tuple[Any, ...]]


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
    print(f"the judge reads of the chosen response of {first.preference.id}:")
    print(decode(tokenizer, first.prompt_tokens[0].tolist()))
    if first.completion_tokens is not None:
        print("and learns to write:")
        print(decode(tokenizer, first.completion_tokens[0].tolist()))
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"\nmesh: {shape} ({mesh.devices.size} × {mesh.devices.flat[0].device_kind}); {steps} steps")
    for name, (program, arguments) in programs.items():
        with jax.set_mesh(mesh):
            memory = program.lower(*arguments).compile().memory_analysis()
        needs = (
            "unknown memory"
            if memory is None
            else (
                f"{memory.argument_size_in_bytes / GIB:.3f} GiB of arguments and "
                f"{memory.temp_size_in_bytes / GIB:.3f} GiB of temporary memory"
            )
        )
        print(f"{name}: {summed_up(arguments[1])}; per device {needs}")
    print("beside a program, what it takes no part in stays on the devices: state, reference, the rollout copy")
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    print(f"each device offers {limit / GIB:.1f} GiB" if limit else "this kind of device does not say what it offers")


def summed_up(batch: Any) -> str:
    """The shapes of a batch's arrays in a few words: each once, with how many have it.

    >>> import jax.numpy as jnp
    >>> summed_up([jnp.zeros((4, 2, 64)), jnp.zeros((4, 2)), jnp.zeros((4, 2)), jnp.zeros(())])
    'arrays [4, 2, 64], 2 × [4, 2], a number'
    """
    counts = Counter(leaf.shape for leaf in jax.tree.leaves(batch))
    words = [
        (f"{count} × " if count > 1 else "") + (f"[{', '.join(map(str, shape))}]" if shape else "a number")
        for shape, count in counts.items()
    ]
    return "arrays " + ", ".join(words)
