"""Reads benchmarks in their official forms; adding one is adding a file, and its name to the list here and in `types`.

Nothing is judged or scored here. A row that is not of the format is an error that names row and field, and says which
benchmark it looks like.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

import msgspec

from patarm_jax.config.sections import DataSection
from patarm_jax.data.preferences import free_id, known_domain, read_preferences
from patarm_jax.data.rows import Row, read_rows
from patarm_jax.evaluate.benchmark import Benchmark
from patarm_jax.evaluate.benchmarks import judgebench, llmbar, pairs, ppe, rewardbench, rewardbench2, rm_bench, rmb
from patarm_jax.evaluate.items import Item
from patarm_jax.types import BenchmarkName, Domain, UsageError, UserError

BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (rewardbench, rewardbench2, rm_bench, judgebench, llmbar, rmb, ppe, pairs)
}
_SEPARATED = r"\.[ct]sv(\.gz|\.zst|\.bz2|\.xz)?$"


def read_benchmark(name: BenchmarkName, section: DataSection) -> tuple[list[Item], str]:
    """All items, ids unique, and a clause on what was read.

    Args:
        name: of the benchmark.
        section: of `pairs`, as training takes it. Of the others, path (a file, a folder or a Hub id; empty: the
            official Hub id), split, and source_domains, which overrides the table of domains by subset.
    """
    if name == "pairs":
        return _read_pairs(section)
    _refuse_what_has_no_effect(name, section)
    items, report = _read_official(name, section)
    return _with_free_ids(_with_domains(items, section.source_domains)), report


def _read_official(name: BenchmarkName, section: DataSection) -> tuple[list[Item], str]:
    source = BENCHMARKS[name]
    path = section.path or ("" if source.repository else source.hub)
    if not path:
        raise UsageError(f"{name} is not on the Hub. Give its files as --data PATH; they lie in {source.repository}.")
    items: list[Item] = []
    rows = without = 0
    split = section.split or source.split_of(path)
    # No official file is a CSV. A folder may hold a benchmark's further parts too.
    unwanted = "|".join(filter(None, (source.unwanted.replace("SPLIT", re.escape(split)), _SEPARATED)))
    splits = (split, source.further[1]) if source.further[1] and not section.split else (split,)
    table = read_rows(path, splits if split else None, unwanted)
    for row in table.rows:
        found = list(source.read(row, _converted(name, source, row)))
        rows, without = rows + 1, without + (not found)
        items += found
    left_out = f"; {without:,} rows prefer neither response and are left out" if without else ""
    _refuse_half_of_ties(items)
    if not items:
        raise UserError(f"{path} holds nothing to judge{left_out}. Give the files of {name}.")
    return items, f"{len(items):,} items of {name} from {rows:,} rows{left_out}{table.remark}"


def _refuse_half_of_ties(items: Sequence[Item]) -> None:
    """The subset Ties is scored by prompts that stand in it twice."""
    kinds: dict[str, set[str]] = {}
    for item in items:
        if item.subset == "Ties":
            kinds.setdefault(item.group, set()).add(item.kind)
    for number, found in kinds.items():
        for kind in ("ref", "tied"):
            if kind not in found:
                raise UserError(f"Ties {number} has no {kind} row, without which it has no score. Give the whole file.")


def _read_pairs(section: DataSection) -> tuple[list[Item], str]:
    preferences, report = read_preferences(section)
    return [pairs.item_of(one) for one in preferences], str(report)


def _converted(name: BenchmarkName, source: Benchmark, row: Row) -> object:
    shape = min(source.shapes, key=lambda shape: len(set(shape.__struct_fields__) - row.values.keys()))
    try:
        return msgspec.convert(row.values, shape)
    except msgspec.ValidationError as error:
        field = re.sub(r" - at `\$\.?(.*?)`$", r", in \1", str(error)).replace("Object missing", "it lacks the")
        others = [other for other, each in BENCHMARKS.items() if other != name and _fits(row, each)]
        hint = f" It looks like {' or '.join(others)}." if others else ""
        raise UserError(f"{row.where} is no row of {name}: {field}.{hint} It has {', '.join(row.values)}.") from error


def _fits(row: Row, source: Benchmark) -> bool:
    for shape in source.shapes:
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert(row.values, shape)
            return True
    return False


def _refuse_what_has_no_effect(name: BenchmarkName, section: DataSection) -> None:
    given = {
        "columns": section.columns,
        "domain": section.domain,
        "domains": section.domains,
        "drop_sources": section.drop_sources,
    }
    for setting, value in given.items():
        if value:
            raise UsageError(
                f"data.{setting} is given, and {name} has its own format. Leave it out; source_domains gives a subset "
                "other rubrics, and `patarm eval pairs` reads any file."
            )


def _with_domains(items: Sequence[Item], wanted: Mapping[str, str]) -> list[Item]:
    """Subsets by the rubrics of other domains, where the user says so."""
    subsets = dict.fromkeys(item.subset for item in items)
    domains_ = {}
    for subset, said in wanted.items():
        if subset not in subsets:
            raise UsageError(f"data.source_domains names {subset}, which is no subset here. Use {', '.join(subsets)}.")
        if (domain := known_domain(said)) is None:
            allowed = ", ".join(get_args(Domain))
            raise UsageError(f"data.source_domains.{subset} is {said!r}. Use one of {allowed}.")
        domains_[subset] = domain
    return [replace(item, domain=domains_.get(item.subset, item.domain)) for item in items]


def _with_free_ids(items: Sequence[Item]) -> list[Item]:
    """Ids are unique: one that is taken gets `#2`, `#3`, …, in the order of the file."""
    numbers: dict[str, int] = {}
    return [replace(item, id=free_id(item.id, numbers)) for item in items]
