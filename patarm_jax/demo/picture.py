"""The curves of a demo as one PNG."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure

INK, ACCENT, MUTED = "#1f2430", "#2f6fde", "#9aa4b2"


def draw_curves(sft_metrics: Path, grpo_metrics: Path, summary: Mapping[str, Any], path: Path) -> None:
    """Six panels: the SFT loss, four vitals of GRPO over its steps, and held-out accuracy by stage."""
    sft, grpo = _read(sft_metrics), _read(grpo_metrics)
    figure = matplotlib.figure.Figure(figsize=(12, 6.4), layout="constrained")
    panels = figure.subplots(2, 3)
    _curve(panels[0, 0], sft, "loss", "SFT: loss (nats per token)")
    panels[0, 0].set_yscale("log")
    _curve(panels[0, 1], grpo, "reward", "GRPO: reward (PAR + format)")
    _curve(panels[0, 2], grpo, "judge/accuracy_half", "GRPO: accuracy on the batch's pairs")
    _curve(panels[1, 0], grpo, "judge/score_gap", "GRPO: score gap, chosen − rejected")
    _curve(panels[1, 1], grpo, "entropy", "GRPO: entropy per token (nats)")
    _bars(panels[1, 2], summary)
    figure.suptitle("A judge learns from preference pairs", color=INK)
    figure.savefig(path, dpi=130)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _curve(panel: Any, lines: list[dict[str, Any]], name: str, title: str) -> None:
    points = [(line["step"], line[name]) for line in lines if line[name] is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    panel.plot(steps, values, color=MUTED, linewidth=0.8)
    panel.plot(steps, _smoothed(values), color=ACCENT, linewidth=1.8)
    _dress(panel, title)
    panel.set_xlabel("step", color=INK)


def _smoothed(values: Any, share: float = 0.7) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + value, share * weight + 1.0
        result.append(total / weight)
    return result


def _bars(panel: Any, summary: Mapping[str, Any]) -> None:
    names = ["untrained", "sft", "grpo", "swapped"]
    heights = [100 * summary[name]["accuracy_half"] for name in names]
    low, high = ([100 * summary[name]["interval"][i] for name in names] for i in (0, 1))
    spread = [[h - a for h, a in zip(heights, low, strict=True)], [b - h for h, b in zip(heights, high, strict=True)]]
    bars = panel.bar(names, heights, yerr=spread, color=[MUTED, MUTED, ACCENT, MUTED], capsize=4, ecolor=INK)
    panel.bar_label(bars, fmt="%.0f", label_type="center", color="white")
    panel.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    panel.set_ylim(0, 100)
    _dress(panel, "Held-out accuracy, tie = ½, 95 % interval (%)")


def _dress(panel: Any, title: str) -> None:
    panel.set_title(title, fontsize=10, color=INK, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color=MUTED, alpha=0.3)
    panel.tick_params(colors=INK)
