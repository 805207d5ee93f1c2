"""`patarm bench`: a table for people and JSON for programs."""

import dataclasses
import datetime
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from patarm_jax import __version__
from patarm_jax.bench.ahead import as_row, compiled_for, counted
from patarm_jax.bench.case import Result, open_bench
from patarm_jax.bench.measure import Roofline, device_peak, host_peak, limits
from patarm_jax.bench.quick import ratios
from patarm_jax.bench.targets import BANDWIDTH_REACHED, BETWEEN_KERNELS, FLOPS_REACHED
from patarm_jax.bench.tasks import TASKS
from patarm_jax.config.recipes import BenchConfig
from patarm_jax.files import check_writable, write_json, writing
from patarm_jax.run.learner import check_batch
from patarm_jax.types import UsageError, UserError


def main(tasks: Sequence[str], config: BenchConfig, output: Path | None = None) -> None:
    """Measures the tasks named, all when none is, prints a table and writes JSON."""
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UsageError(f"there is no task {unknown[0]}. The tasks are {', '.join(TASKS)}.")
    about = {"config": dataclasses.asdict(config), "tasks": list(tasks or TASKS)}
    _check(output, about)
    bench = open_bench(config)
    check_batch(bench.mesh, config.rows, config.micro_batches, f"rows {config.rows}")
    check_batch(bench.mesh, config.responses, config.micro_batches, f"responses {config.responses}")
    most = limits(config.dtype)
    rows: list[dict[str, object]] = []
    for task in tasks or TASKS:
        print(f"{task} …", file=sys.stderr, flush=True)
        rows.append(_row(TASKS[task](bench), most, counted(bench, task)))
    _show(rows, most, config)
    _write(output, about | {"limits": dataclasses.asdict(most), "results": rows})


def quick(config: BenchConfig, output: Path | None = None) -> bool:
    """Prints how our ways compare with the plain ones; False when one fell below its floor."""
    about = {"config": dataclasses.asdict(config), "tasks": ["quick"]}
    _check(output, about)
    found = ratios(config)
    table = Table("", "plain, ms", "ours, ms", "times faster", "floor", title="ours against the plain way", box=None)
    for each in found:
        values = (f"{1000 * each.plain:,.1f}", f"{1000 * each.ours:,.1f}", f"{each.value:.2f}", f"{each.floor:.1f}")
        table.add_row(each.name, *values, style="" if each.value >= each.floor else "bold red")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    _write(output, about | {"ratios": [dataclasses.asdict(each) | {"times_faster": each.value} for each in found]})
    return all(each.value >= each.floor for each in found)


def ahead(card: str, tasks: Sequence[str], config: BenchConfig, output: Path | None = None) -> None:
    """Prints what the programs of tasks would do on a card that is not here."""
    about = {"config": dataclasses.asdict(config), "tasks": list(tasks), "compiled_for": card}
    _check(output, about)
    target, found = compiled_for(card, tasks, config)
    cards = math.prod(max(1, size) for size in (config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
    title = f"{config.model}, {config.dtype}, compiled for {cards} × {target.words}, not run; of each card"
    amounts = "TFLOP", "of it least", "GB", "least", "told, GB", "kernels", "a layer"
    table = Table("program", "shape", *amounts, "ms", "tokens/s", "peak", box=None, title=title)
    for each in found:
        table.add_row(
            each.program,
            each.shape,
            f"{each.flops / 1e12:,.2f}",
            f"{each.flops_least / each.flops:.0%}",
            f"{each.bytes_read / 1e9:,.1f}",
            f"{each.bytes_least / 1e9:,.1f}" if each.bytes_least else "–",
            ", ".join(f"{kind} {told / 1e9:,.2f}" for kind, told in each.told.items()) or "–",
            f"{each.kernels:,}",
            f"{each.kernels_per_layer:.0f}",
            f"{1000 * each.seconds:,.1f}",
            f"{each.tokens_per_s:,.0f}",
            f"{each.peak_bytes / 2**30:,.1f} GiB",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(
        f"times are estimates: {FLOPS_REACHED:.0%} of the published FLOPs, {BANDWIDTH_REACHED:.0%} of the bandwidth, "
        f"{1e6 * BETWEEN_KERNELS:g} µs for each kernel, nothing for what cards tell each other"
    )
    _write(output, about | {"results": [as_row(each) for each in found]})


def _row(result: Result, most: Roofline, done: tuple[float, float] | None) -> dict[str, object]:
    """A result for JSON, with what its program does on all devices together, where that is counted."""
    median = result.timing.median
    # Decoding and loading are held back by memory, the rest by arithmetic.
    used = result.read / median / most.bandwidth if result.read else result.flops / median / most.flops
    return {
        "task": result.task,
        "shape": result.shape,
        "first_s": result.timing.first,
        "median_s": median,
        "spread": result.timing.spread,
        "tokens_per_s": result.tokens / median if result.tokens else None,
        "flops_least": result.flops or None,
        "flops": done[0] * jax.device_count() if done else None,
        "bytes_least": result.read or None,
        "bytes_read": done[1] * jax.device_count() if done else None,
        "of_limit": used or None,
        "limit": ("memory" if result.read else "matmul") if used else None,
        "phases_s": result.phases,
        # The process's so far, on devices where these count it: name one task to have its own.
        "peak_bytes": device_peak() or host_peak(),
    }


def _show(rows: list[dict[str, Any]], most: Roofline, config: BenchConfig) -> None:
    device = jax.devices()[0].device_kind
    title = (
        f"{config.model}, {config.dtype}, {jax.device_count()} × {device}: matmul {most.flops / 1e12:.2f} TFLOP/s, "
        f"memory {most.bandwidth / 1e9:.0f} GB/s"
    )
    columns = "task", "shape", "first, s", "median, s", "spread", "tokens/s", "of limit", "peak"
    table = Table(*columns, title=title, box=None)
    for row in rows:
        table.add_row(
            row["task"],
            row["shape"],
            f"{row['first_s']:.2f}",
            f"{row['median_s']:.4f}",
            f"{100 * row['spread']:.0f} %",
            f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "–",
            f"{100 * row['of_limit']:.0f} % {row['limit']}" if row["of_limit"] else "–",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        )
        for name, seconds in row["phases_s"].items():
            table.add_row("", f"  {name}", "", f"{seconds:.4f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _check(output: Path | None, about: dict[str, Any]) -> None:
    """Refuses an output that cannot be written, or that holds anything but an earlier run of the same bench."""
    if output is None:
        return
    check_writable(output, folder=False)
    if output.is_file() and output.stat().st_size:
        try:
            before = json.loads(output.read_text(encoding="utf-8"))
            same = {name: before[name] for name in about} == json.loads(json.dumps(about))
        except (OSError, ValueError, LookupError, TypeError):
            same = False
        if not same:
            raise UserError(f"{output} is there and is not of this bench with these settings. Name another file.")


def _write(output: Path | None, content: dict[str, Any]) -> None:
    if output is None:
        return
    about = {
        "date": datetime.date.today().isoformat(),
        "patarm_jax": __version__,
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
        "machine": platform.machine(),
    }
    with writing(output):
        write_json(output, about | content)
