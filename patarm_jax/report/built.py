"""`patarm report RUN` of what `patarm data build` made: what each stage kept, how rows are spread, and rows to read."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_jax.config.building import BuildConfig
from patarm_jax.config.load import from_mapping, read_yaml
from patarm_jax.corpus.folders import DROPPED, ROWS, folder_of, reports_of
from patarm_jax.corpus.rows import Pair, read_pairs
from patarm_jax.corpus.written import part_of, table_of
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.report.page import Bundle, Content, beginning, make_page, packed, within
from patarm_jax.types import UserError

CONFIG = "config.yaml"
_SCORES = 11  # bins of scores: 0 … 10, each for what is nearest to it
_BANDS = 8  # of accuracy, and one for what is always right


@dataclass(frozen=True)
class _Stage:
    """A stage that is there."""

    name: str
    report: Mapping[str, Any]
    kept: list[Pair]
    dropped: list[tuple[Pair, str]]  # with why


def is_built(folder: Path) -> bool:
    """Whether a folder is one that `patarm data build` writes."""
    path = folder / CONFIG
    return path.is_file() and "stages" in read_yaml(path)


def main(folder: Path, out: Path | None = None, megabytes: int = 25) -> tuple[Path, str]:
    """Writes the page of a set, whole or not; see `make_page`."""
    return make_page(folder, out, megabytes, lambda limit: _content(folder, limit))


def _content(folder: Path, limit: int) -> Content:
    config = from_mapping(BuildConfig, read_yaml(folder / CONFIG), str(folder / CONFIG))
    stages = list(_stages(config, folder))
    if not stages:
        raise UserError(f"{folder} holds no stage that is whole yet. Give it some time.")
    parts = _parts(config, stages)
    share = limit // len(parts)
    taken = {name: within(rows, lambda row: len(packed(row)), share) for name, rows in parts.items()}
    every, shown = (sum(map(len, one.values())) for one in (parts, taken))
    payload = {
        "facts": _facts(config, stages),
        "tables": _tables(stages),
        "panels": [],
        "steps": [],
        "histograms": _histograms(stages),
        "rows": "Rows",
        "bundle": "part",
        "extent": f"The page holds {shown:,} of {every:,} rows, evenly spaced." if shown < every else "",
        "preferences": {},
        "missing": "",
        "pairwise": False,
        "policy": False,
        "set": True,
    }
    bundles = [Bundle(name, packed({"pairs": rows})) for name, rows in taken.items()]
    return Content(payload, bundles, f"{len(stages)} stages, {shown:,} of {every:,} rows")


def _stages(config: BuildConfig, folder: Path) -> Iterable[_Stage]:
    before: dict[str, Pair] = {}
    there = dict(reports_of(config, folder))
    for number, stage in enumerate(config.stages):
        here = folder_of(folder, number, stage)
        if here.name not in there:
            return
        kept = read_pairs(here / ROWS)
        lines = (here / DROPPED).read_text(encoding="utf-8").split("\n")
        dropped = [json.loads(line) for line in lines if line]
        why = [(before[one["id"]], ": ".join(filter(None, (one["reason"], one["about"])))) for one in dropped]
        yield _Stage(here.name, there[here.name], kept, why)
        before = {pair.id: pair for pair in kept}


# ---- Numbers --------------------------------------------------------------------------------------------------------


def _facts(config: BuildConfig, stages: Sequence[_Stage]) -> list[tuple[str, str]]:
    last = stages[-1]
    facts = [("rows read", f"{stages[0].report['rows']:,}"), ("rows kept", f"{len(last.kept):,}")]
    if len(stages) < len(config.stages):
        facts.append(("stages", f"{len(stages)} of {len(config.stages)}, the others are not there yet"))
    for source in config.sources:
        facts.append((source.called, source.licence or "licence not known"))
    facts += [(stage.name, stage.report["model"]) for stage in stages if stage.report.get("model")]
    return facts


def _tables(stages: Sequence[_Stage]) -> list[dict[str, object]]:
    """What each stage kept; what was left out and why; overlaps with benchmarks; how rows were sorted into domains."""
    reports = [(stage.name, stage.report) for stage in stages]
    tables: list[dict[str, object]] = [
        {
            "title": "Rows kept by each stage",
            "head": ["source", "domain", *(name for name, _ in reports)],
            "rows": table_of(reports),
        }
    ]
    reasons = [[name, why, f"{count:,}"] for name, report in reports for why, count in report["dropped"].items()]
    if reasons:
        tables.append({"title": "Rows left out", "head": ["stage", "why", "rows"], "rows": reasons})
    overlaps = [
        [name, benchmark, *(f"{count:,}" for count in found.values())]
        for name, report in reports
        for benchmark, found in report.get("overlaps", {}).items()
    ]
    if overlaps:
        head = ["stage", "benchmark", "word for word", "a long run of words", "nearly"]
        tables.append({"title": "Overlaps with benchmarks", "head": head, "rows": overlaps})
    sorted_by = [
        [name, by, f"{count:,}"] for name, report in reports for by, count in report.get("classified", {}).items()
    ]
    if sorted_by:
        tables.append({"title": "Rows sorted into domains", "head": ["stage", "by", "rows"], "rows": sorted_by})
    return tables


def _histograms(stages: Sequence[_Stage]) -> list[dict[str, object]]:
    """Of each judge its scores and its accuracy, of the teacher its scores, and how long the texts are."""
    found: list[dict[str, object]] = []
    for stage in stages:
        by = f"{stage.name}, {stage.report.get('model')}"
        if stage.report["stage"] == "judge":
            sides = {
                "chosen": [one.chosen_scores or () for one in stage.kept],
                "rejected": [one.rejected_scores or () for one in stage.kept],
            }
            scores = {name: [score for row in rows for score in row] for name, rows in sides.items()}
            found += [_of_scores(f"Scores: {by}", scores), _of_accuracy(f"Accuracy of rows: {by}", stage, stages)]
        if stage.report["stage"] == "teach" and any(one.chosen_judgement for one in stage.kept):
            taught = {
                "chosen": [one.chosen_judgement for one in stage.kept],
                "rejected": [one.rejected_judgement for one in stage.kept],
            }
            read = {name: [parse_pointwise(text).score for text in texts if text] for name, texts in taught.items()}
            found.append(_of_scores(f"Scores: {by}", read))
    return [*found, _of_lengths(stages[-1].kept)]


def _of_scores(title: str, scores: Mapping[str, Sequence[float | None]]) -> dict[str, object]:
    """How often each score was given, as a share of a side's judgements."""
    series = []
    for name, side in scores.items():
        read = [min(max(score, 0.0), 10.0) for score in side if score is not None]
        counts = [0] * _SCORES
        for score in read:
            counts[math.floor(score + 0.5)] += 1
        mean = f"mean {sum(read) / len(read):.2f}" if read else "none"
        unread = f", {len(side) - len(read):,} could not be read" if len(read) < len(side) else ""
        values = [count / max(1, len(read)) for count in counts]
        series.append({"label": name, "values": values, "about": f"{mean}{unread}"})
    return {"title": title, "labels": [str(score) for score in range(_SCORES)], "series": series}


def _of_accuracy(title: str, judge: _Stage, stages: Sequence[_Stage]) -> dict[str, object]:
    """In which share of comparisons a judge is right about a row, by what became of the row when it was selected."""
    behind = stages[stages.index(judge) + 1 :]
    select = next((stage for stage in behind if stage.report["stage"] == "select"), None)
    parts = {one.id: one.part for one in select.kept} if select else {}
    names = {"rl": "for reinforcement learning", "sft": "for teaching", "": "left out" if select else "rows"}
    counts = {name: [0] * (_BANDS + 1) for name in names}
    for one in judge.kept:
        assert one.accuracy is not None
        counts[parts.get(one.id, "")][math.floor(one.accuracy * _BANDS)] += 1
    labels = [*(f"{band}/{_BANDS}" for band in range(_BANDS)), "1"]  # where each begins
    series = [
        {"label": names[part], "values": values, "about": f"{sum(values):,}"}
        for part, values in counts.items()
        if sum(values)
    ]
    return {"title": title, "labels": labels, "series": series, "stacked": True, "whole": True}


def _of_lengths(pairs: Sequence[Pair]) -> dict[str, object]:
    """How many characters prompts and responses have, from each power of two to the next."""
    texts = {
        "prompt": [sum(len(turn["content"]) for turn in one.prompt) for one in pairs],
        "chosen": [len(one.chosen) for one in pairs],
        "rejected": [len(one.rejected) for one in pairs],
    }
    orders = {name: [length.bit_length() for length in lengths] for name, lengths in texts.items()}
    every = [order for one in orders.values() for order in one] or [0]
    low, high = min(every), max(every)
    series = [
        {
            "label": name,
            "values": [one.count(order) for order in range(low, high + 1)],
            "about": f"median {sorted(texts[name])[len(one) // 2]:,}" if one else "",
        }
        for name, one in orders.items()
    ]
    labels = [f"{2 ** (order - 1):,}" if order else "0" for order in range(low, high + 1)]
    return {"title": "Characters of texts, bins from", "labels": labels, "series": series, "whole": True}


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _parts(config: BuildConfig, stages: Sequence[_Stage]) -> dict[str, list[dict[str, object]]]:
    """Rows to read, by part: those of the set, and what each stage has left out."""
    last = stages[-1]
    found: dict[str, list[dict[str, object]]] = {}
    section = config.stages[len(stages) - 1]
    for one in last.kept:
        name = part_of(one, section.heldout) if section.kind == "write" else "rows"
        found.setdefault(name, []).append(_told(one, ""))
    for stage in stages:
        if stage.dropped:
            found[f"left out by {stage.name}"] = [_told(pair, why) for pair, why in stage.dropped]
    return found or {"rows": []}


def _told(pair: Pair, left_out: str) -> dict[str, object]:
    """A row as the page shows it."""
    facts = {
        "left out": left_out,
        "domain": pair.domain,
        "source": pair.source,
        "licence": pair.licence or "not known",
        "read from": pair.origin,
        "accuracy": "" if pair.accuracy is None else f"{pair.accuracy:.3f}",
    }
    judgements = (
        (pair.chosen_judgement, pair.pairwise_judgement),
        (pair.rejected_judgement, pair.pairwise_judgement_swapped),
    )
    titles = ("the teacher, both responses, chosen first", "the teacher, both responses, rejected first")
    sides = []
    for place, (response, scores) in enumerate(
        ((pair.chosen, pair.chosen_scores), (pair.rejected, pair.rejected_scores))
    ):
        alone, both = judgements[place]
        shown = {
            "response": response,
            "scores": ", ".join("–" if score is None else f"{score:g}" for score in scores or ()),
            "the teacher": alone or "",
            titles[place]: both or "",
        }
        sides.append([(name, beginning(text)) for name, text in shown.items() if text])
    told = {
        "mark": left_out.partition(":")[0],
        "facts": [(name, value) for name, value in facts.items() if value],
        "prompt": [(turn["role"], beginning(turn["content"])) for turn in pair.prompt],
        "sides": sides,
        "scores": [pair.chosen_scores, pair.rejected_scores] if pair.accuracy is not None else None,
    }
    return {"id": pair.id, "told": told, "chosen": [], "rejected": []}
