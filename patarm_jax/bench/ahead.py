"""`patarm bench --compiled-for`: what programs would do on a card that is not here, read from the compiled programs.

Bytes and multiplications are counted in the compiled text (see `hlo`); of our own kernels, which read what was written
and not what there is room for, they are computed. Beside them stands the least that the work takes: weights and kept
keys once, nothing recomputed.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from patarm_jax.arrays import Params, SFTShape
from patarm_jax.bench.case import Bench
from patarm_jax.bench.hlo import Formula, Launch, launches
from patarm_jax.bench.shapes import SHAPES, cache_bytes, forward_flops, layer_weights
from patarm_jax.bench.targets import Target, described_mesh, target_of
from patarm_jax.bench.tasks import grpo_config, make_sampler, sft_config
from patarm_jax.config.recipes import BenchConfig
from patarm_jax.model.kernels import kernel_for
from patarm_jax.model.sharding import ROLLOUT_RULES, Program
from patarm_jax.model.transformer import abstract_params
from patarm_jax.padding import bucket
from patarm_jax.recipes.programs import (
    grpo_learner,
    grpo_programs,
    make_rollout_programs,
    sft_form,
    sft_learner,
    sft_programs,
)
from patarm_jax.rollout.engine import abstract_programs
from patarm_jax.run.learner import check_batch
from patarm_jax.types import UsageError


@dataclass(frozen=True)
class Ahead:
    """What a program does each time it runs, on each card; of decoding, at each token of all rows."""

    program: str
    shape: str
    tokens: int  # useful ones, of all cards
    flops: float
    flops_least: float
    bytes_read: float  # and written
    bytes_least: float  # 0: not what holds it back
    told: dict[str, float]  # by collective, bytes that it leaves on a card
    kernels: int
    kernels_per_layer: float
    seconds: float  # estimated
    temp_bytes: int
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Estimated."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Work:
    """A program with what is known of it beside its text."""

    name: str
    shape: str
    program: Program
    tokens: int
    flops_least: float
    bytes_least: float
    known: dict[str, Formula]
    is_loop: bool = False  # whether one round of its loop counts, and not what stands around it


def compiled_for(name: str, tasks: Sequence[str], config: BenchConfig) -> tuple[Target, list[Ahead]]:
    """The programs of tasks, compiled for a card of that name.

    Raises:
        UsageError: a task has no program of its own, or a batch cannot be shared evenly.
        UserError: there is no such card, or nobody to compile for it.
    """
    if unknown := [task for task in tasks if task not in _WORK]:
        raise UsageError(f"task {unknown[0]} is not compiled ahead. Those that are: {', '.join(_WORK)}.")
    target = target_of(name)
    if config.attention == "cudnn":
        raise UsageError("cuDNN's kernels tell nobody what they do. Leave attention at auto: ours stand for them.")
    attention = "pallas" if config.attention == "auto" and config.dtype == "bfloat16" else config.attention
    bench = Bench(replace(config, attention=attention), SHAPES[config.model], described_mesh(target, config.mesh))
    check_batch(bench.mesh, config.rows, config.micro_batches, f"rows {config.rows}")
    check_batch(bench.mesh, config.responses, config.micro_batches, f"responses {config.responses}")
    return target, [_looked_at(bench, target, work) for task in tasks or _WORK for work in _WORK[task](bench)]


def counted(bench: Bench, task: str) -> tuple[float, float] | None:
    """(FLOPs, bytes read and written) of a task on each device that is here, as its compiled program says them.

    None of tasks that are more than one program, and where cuDNN computes attention, whose kernels do not tell.
    """
    if task != "sft":
        return None
    config = sft_config(bench)
    if kernel_for(config.model, bench.arch, bench.mesh, sft_form(config)).name == "cudnn":
        return None
    (work,) = _sft(bench)
    program, arguments = work.program
    text = program.lower(*arguments).compile().as_text()
    assert text is not None, "compilers tell what they have made"
    every = launches(text, work.known)
    return sum(one.times * one.flops for one in every), sum(one.times * one.bytes for one in every)


def _looked_at(bench: Bench, target: Target, work: _Work) -> Ahead:
    program, arguments = work.program
    compiled = program.lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "compilers for GPUs tell both"
    every = [launch for launch in launches(text, work.known) if launch.in_open_loop or not work.is_loop]

    def total(of: Callable[[Launch], float]) -> float:
        return sum(launch.times * of(launch) for launch in every)

    told: dict[str, float] = {}
    for launch in every:
        if launch.told:
            told[launch.kind] = told.get(launch.kind, 0.0) + launch.times * launch.told
    cards = bench.mesh.size
    in_layers = sum(launch.times for launch in every if "layers" in launch.name)
    return Ahead(
        program=work.name,
        shape=work.shape,
        tokens=work.tokens,
        flops=total(lambda launch: launch.flops),
        flops_least=work.flops_least / cards,
        bytes_read=total(lambda launch: launch.bytes),
        bytes_least=work.bytes_least,
        told=told,
        kernels=sum(launch.times for launch in every),
        kernels_per_layer=in_layers / bench.arch.num_hidden_layers,
        seconds=total(lambda launch: target.seconds(launch.flops, launch.bytes)),
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )


# ------------------------------------------------------------------------------------------------------------ programs


def _sft(bench: Bench) -> list[_Work]:
    c, arch = bench.config, bench.arch
    tokens, predicted = c.rows * c.length, c.rows * (c.length - 1)
    reads = c.rows * c.length * (c.length + 1) // 2
    learner = sft_learner(sft_config(bench), arch, bench.mesh)
    programs = sft_programs(learner, SFTShape(c.rows, c.length, c.length - 1))
    shape = f"{c.rows} × {c.length}, {'packed' if c.packing else 'plain'} rows"
    flops = 3 * forward_flops(arch, tokens, reads, predicted)
    return [_Work("sft update", shape, programs["update"], tokens, flops, 0, _attention(bench, reads))]


def _grpo(bench: Bench) -> list[_Work]:
    c, arch = bench.config, bench.arch
    config = grpo_config(bench)
    config = replace(
        config,
        sampling=replace(config.sampling, max_new_tokens=c.new),
        group_size=c.group,
        pairs_per_step=max(1, c.responses // config.prompts_per_pair),
    )
    learner, rollout = grpo_learner(config, arch, bench.mesh), make_rollout_programs(config, arch, bench.mesh)
    programs = grpo_programs(config, arch, learner, rollout, make_sampler(bench), c.prompt)
    prompts = config.units_per_step
    written = prompts * c.group * c.new
    own = prompts * c.group * c.new * (c.new + 1) // 2
    reads = prompts * c.prompt * (c.prompt + 1) // 2 + written * c.prompt + own
    tokens = prompts * c.prompt + written
    flops = 3 * forward_flops(arch, tokens, reads, written)
    shape = f"{prompts} × {c.prompt}, G {c.group} × {c.new}"
    return [_Work("policy update", shape, programs["update"], tokens, flops, 0, _attention(bench, reads))]


def _sample(bench: Bench) -> list[_Work]:
    """Reading as many prompts as are read at a time, and one token of all rows."""
    c, arch = bench.config, bench.arch
    engine = make_sampler(bench)
    weights: Params = abstract_params(arch, bench.mesh, ROLLOUT_RULES, c.dtype, sampling=True)
    programs = abstract_programs(engine, weights, c.responses, bucket(c.prompt))
    prompts = programs["prefill"][1][2].tokens.shape[0]
    reads = prompts * c.prompt * (c.prompt + 1) // 2
    item = jnp.dtype(c.dtype).itemsize
    matrices = (layer_weights(arch) + arch.vocab_size * arch.hidden_size) * item
    rows = min(c.decode_rows or c.responses * c.group, c.responses * c.group)
    seated, own = -(-rows // c.group), round(c.filled * c.new)
    kept = (seated * c.prompt + rows * own) * cache_bytes(arch, item)
    decoded = 2 * (layer_weights(arch) + arch.vocab_size * arch.hidden_size) * rows
    decoded += 4 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * rows * (c.prompt + own)
    return [
        _Work(
            "prefill",
            f"{prompts} × {c.prompt}",
            programs["prefill"],
            prompts * c.prompt,
            forward_flops(arch, prompts * c.prompt, reads, prompts),
            0,
            _attention(bench, reads),
        ),
        _Work(
            "decode",
            f"{rows} rows on {seated} × {c.prompt}, {own} of {c.new} written",
            programs["decode"],
            rows,
            decoded,
            matrices / bench.mesh.shape["tensor"] + kept / bench.mesh.size,
            {"flash_decode": _decoding(bench, rows, seated, own)},
            is_loop=True,
        ),
    ]


_WORK: dict[str, Callable[[Bench], list[_Work]]] = {"sft": _sft, "sample": _sample, "grpo": _grpo}


# -------------------------------------------------------------------------------------------------------- our kernels


def _attention(bench: Bench, reads: int) -> dict[str, Formula]:
    """Of our attention over whole rows: a matmul with scores has 2·N·H multiplications for each pair that is read."""
    each = 2.0 * bench.arch.num_attention_heads * bench.arch.head_dim * reads
    each /= bench.config.micro_batches * bench.mesh.size

    def multiplies(matmuls: int) -> Formula:
        return lambda sizes: (matmuls * each, float(sum(sizes)))

    return {
        "shared_prompt_attention_d_q": multiplies(3),
        "shared_prompt_attention_d_keys": multiplies(4),
        "shared_prompt_attention": multiplies(2),
    }


def _decoding(bench: Bench, rows: int, seated: int, own: int) -> Formula:
    """Of our attention of new tokens: keys and values that are there, and what goes in and out of it.

    The pool of the rows' own pages has a table, which no prompt needs: it is told by the bytes of its second operand.
    """
    arch, item = bench.arch, jnp.dtype(bench.config.dtype).itemsize
    of_key = 2 * arch.num_key_value_heads * arch.head_dim * item
    prompts = seated * bench.config.prompt

    def moved(sizes: list[int]) -> tuple[float, float]:
        counts, table, queries, _, _, *out = sizes
        has_table = table > counts
        keys = (rows * own if has_table else prompts) / bench.mesh.size
        read_by = 1 if has_table else bench.config.group
        flops = 4.0 * arch.num_attention_heads * arch.head_dim * keys * read_by
        return flops, float(keys * of_key + counts + table + queries + sum(out))

    return moved


def as_row(ahead: Ahead) -> dict[str, Any]:
    """For JSON."""
    return asdict(ahead) | {"tokens_per_s": ahead.tokens_per_s}
