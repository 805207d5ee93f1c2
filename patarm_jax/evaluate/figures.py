"""The figures of an evaluation, each as PNG and SVG."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure

from patarm_jax.evaluate.findings import Findings
from patarm_jax.evaluate.statistics import Name, TieRule

INK, ACCENT, MUTED, WARM = "#1f2430", "#2f6fde", "#9aa4b2", "#d9822b"


def draw(folder: Path, findings: Findings, official: TieRule, sections: Sequence[str], chance: float) -> None:
    """Draws what there is to draw; `chance` is what a judge has right that knows nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sections", "votes", "scores", "calibration"):  # an evaluation with more votes may have left some
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    _save(folder / "sections", _sections(findings, official, sections, chance))
    if len({point["votes"] for point in findings.votes}) > 1:
        _save(folder / "votes", _votes(findings, official))
    if findings.histogram:
        _save(folder / "scores", _histogram(findings.histogram))
    if findings.calibration:
        _save(folder / "calibration", _calibration(findings))


def draw_bars(path: Path, title: str, bars: Mapping[str, tuple[float, float, float]]) -> None:
    """Draws shares as bars, each a (value, low, high) by its label; the axis begins where it shows differences.

    Args:
        path: of the files, without a suffix.
        title: of the figure.
        bars: shares by label.
    """
    figure, axes = _figure(title, max(7.5, 1.1 * len(bars)))  # the title has its place
    for index, found in enumerate(bars.values()):
        value, low, high = (100 * each for each in found)
        axes.errorbar(index, value, [[value - low], [high - value]], fmt="o", color=ACCENT, ecolor=INK, capsize=4)
        axes.annotate(f"{value:.1f}", (index, value), (7, -3), textcoords="offset points", color=INK, fontsize=9)
    broken = (textwrap.fill(label, 12, break_long_words=False).replace("_", "_\n") for label in bars)
    axes.set_xticks(range(len(bars)), list(broken))
    axes.set_xlim(-0.6, len(bars) - 0.3)
    _save(path, figure)


def _save(path: Path, figure: matplotlib.figure.Figure) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "patarm"}):  # text stays text; files repeat
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _figure(title: str, width: float = 7.0) -> tuple[matplotlib.figure.Figure, Any]:
    figure = matplotlib.figure.Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=MUTED, alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def draw_lines(path: Path, title: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str) -> None:
    """Points (x, y) joined in their order, a line for each name, as path.svg and path.png.

    Args:
        path: without its ending.
        title: of the figure.
        lines: by name.
        across: what x is.
    """
    figure, axes = _figure(title, 7.0)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel(across, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines
    _save(path, figure)


def _sections(
    findings: Findings, official: TieRule, sections: Sequence[str], chance: float
) -> matplotlib.figure.Figure:
    names = [name for name in ("overall", *sections) if Name(official, name) in findings.scores]
    figure, axes = _figure("Accuracy with 95 % interval (%)", max(5.0, 1.1 * len(names)))
    for index, name in enumerate(names):
        value, low, high = findings.scores[Name(official, name)]
        _bar(axes, index, (value, low, high), f"{100 * value:.1f}", ACCENT if index == 0 else MUTED)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.8, max(len(names), 3) - 0.2)
    axes.axhline(100 * chance, color=INK, linewidth=0.8, linestyle=":")
    most = max(100 * findings.scores[Name(official, name)][0] for name in names)
    axes.set_ylim(0, max(100.0, most))  # Ties of RewardBench 2 go to 101
    return figure


def _bar(axes: Any, index: int, shares: tuple[float, float, float], text: str, colour: str) -> None:
    """A share with its interval, in per cent, and a word in the bar, or above it where it is too low for that."""
    value, low, high = (100 * share for share in shares)
    known = low == low  # one unit has no interval
    spread = [[max(value - low, 0)], [max(high - value, 0)]] if known else [[0.0], [0.0]]
    axes.bar(index, value, 0.6, color=colour, yerr=spread, capsize=4, ecolor=INK)
    inside = value > 10
    axes.text(index, 3 if inside else value + 2, text, ha="center", color="white" if inside else INK, fontsize=9)


def _votes(findings: Findings, official: TieRule) -> matplotlib.figure.Figure:
    figure, axes = _figure("Overall accuracy by number of votes (%)")
    for rule, colour in (("mean", ACCENT), ("majority", WARM)):
        points = [(point["votes"], 100 * point[official]) for point in findings.votes if point["rule"] == rule]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=rule)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({point["votes"] for point in findings.votes}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("votes", color=INK)
    axes.legend(frameon=False)
    return figure


def _histogram(histogram: dict[str, Any]) -> matplotlib.figure.Figure:
    figure, axes = _figure("Scores (share of judgements)")
    for side, colour in (("chosen", ACCENT), ("rejected", WARM)):
        counts = histogram[side]
        shares = [count / max(1, sum(counts)) for count in counts]
        axes.stairs(shares, histogram["edges"], color=colour, fill=True, alpha=0.45, label=side)
    axes.set_xlabel("score", color=INK)
    axes.legend(frameon=False)
    return figure


def _calibration(findings: Findings) -> matplotlib.figure.Figure:
    figure, axes = _figure("How often the higher score is right, by gap (%)")
    for index, each in enumerate(findings.calibration):
        _bar(axes, index, (each["right"], each["low"], each["high"]), f"{each['pairs']:,}", ACCENT)
    last = findings.calibration[-1]["up to"] == math.inf
    labels = [f"{each['above']:g} … {each['up to']:g}" for each in findings.calibration[: -1 if last else None]]
    labels += [f"> {findings.calibration[-1]['above']:g}"] if last else []
    axes.set_xticks(range(len(labels)), labels)
    axes.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 100)
    axes.set_xlabel("gap of mean scores; on the bars: pairs", color=INK)
    return figure
