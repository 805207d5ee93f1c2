"""What an evaluation on IFEval leaves: numbers, a summary for people, and the verdicts in the official form."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import rich.box
import rich.console
import rich.table
import rich.text

from patarm_jax import __version__
from patarm_jax.config.recipes import PolicyEvalConfig
from patarm_jax.evaluate.ifeval import NUMBERS, Scored, Share
from patarm_jax.files import write_json, write_text

# In per cent, in the order of NUMBERS and then InFoBench's; nothing was measured here.
_RUBRIC_ARM = "arXiv 2602.01511, Table 3"
PUBLISHED: dict[str, tuple[tuple[float | None, ...], str]] = {
    "Qwen2.5-7B-Instruct": ((72.5, 79.9, 75.0, 81.8), _RUBRIC_ARM),
    "the same, DPO by Rubric-ARM": ((76.0, 82.5, 78.7, 84.7), _RUBRIC_ARM),
    "GPT-4 of November 2023, 540 of the prompts": (
        (77.22, 83.77, 79.63, 85.58),
        "google-research/instruction_following_eval",
    ),
}


def write_files(folder: Path, config: PolicyEvalConfig, scored: Scored) -> None:
    """Writes all of them."""
    write_json(folder / "results.json", _results(config, scored))
    for rule in ("strict", "loose"):
        rows = [
            {
                "follow_all_instructions": all(getattr(verdict, rule)),
                "follow_instruction_list": list(getattr(verdict, rule)),
                "instruction_id_list": list(task.instructions),
                "prompt": task.prompt,
                "response": one.answer,
            }
            for task, one, verdict in zip(scored.tasks, scored.responses, scored.verdicts, strict=True)
        ]
        (folder / "official").mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "official" / f"eval_results_{rule}.jsonl", text)
    write_text(folder / "summary.md", markdown(scored))


def _results(config: PolicyEvalConfig, scored: Scored) -> dict[str, object]:
    return {
        "benchmark": config.benchmark,
        "model": scored.name,
        "items": len(scored.tasks),
        "limit": config.limit,
        **{name: scored.numbers[name].value for name in NUMBERS},
        "intervals": {name: [share.low, share.high] for name, share in scored.numbers.items()},
        "by_instruction": {
            name: {rule: asdict(share) for rule, share in rules.items()}
            for name, rules in scored.by_instruction.items()
        },
        "cut_off": scored.cut_off,
        "cut_off_in_thought": scored.lost_in_thought,
        "without_answer": scored.empty,
        "checker": "lm-eval, lm_eval.tasks.ifeval",
        "version": __version__,
    }


def show(scored: Scored) -> None:
    """Prints the four numbers with intervals."""
    title = rich.text.Text(f"IFEval of {scored.name}, {len(scored.tasks):,} prompts, in %")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("followed", "", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "followed" else "right", no_wrap=True)
    for name, words in NUMBERS.items():
        share = scored.numbers[name]
        table.add_row(words, f"{100 * share.value:.2f}", _interval(share))
    console = rich.console.Console()
    console.print(table)
    console.print(_reading(scored), highlight=False)


def markdown(scored: Scored) -> str:
    """The whole summary."""
    said = f"{len(scored.tasks):,} prompts, checked by lm-eval's own checker. {_reading(scored)}"
    head = f"# IFEval of {scored.name}\n\n{said}"
    columns = "".join(f" {words} |" for words in NUMBERS.values())
    ours = "".join(
        f" **{100 * scored.numbers[name].value:.2f}** ({_interval(scored.numbers[name])}) |" for name in NUMBERS
    )
    rows = [
        f"| policy |{columns} source |",
        "|---" * (len(NUMBERS) + 2) + "|",
        f"| {scored.name} |{ours} measured here |",
    ]
    for name, (values, source) in PUBLISHED.items():
        rows.append(f"| {name} |{''.join(f' {_number(value)} |' for value in values)} {source} |")
    kinds = ["| instructions | number | strict | loose |", "|---|---|---|---|"]
    kinds += [f"| {_indented(name)} |{_of_kind(rules)}" for name, rules in scored.by_instruction.items()]
    return "\n\n".join([head, "\n".join(rows), "By kind of instruction:", "\n".join(kinds)]) + "\n"


def _of_kind(rules: Mapping[str, Share]) -> str:
    strict, loose = rules["strict"], rules["loose"]
    return "".join(
        f" {text} |"
        for text in (f"{strict.count:,}", *(f"{100 * one.value:.1f} ({_interval(one)})" for one in (strict, loose)))
    )


def _reading(scored: Scored) -> str:
    counts = {
        "without an answer, which follow nothing": scored.empty,
        "cut off inside their thinking (raise sampling.max_new_tokens)": scored.lost_in_thought,
        "cut off in all": scored.cut_off,
    }
    found = [f"{words}: {count:,}" for words, count in counts.items() if count]
    return f"Responses {'; '.join(found)}." if found else ""


def _indented(name: str) -> str:
    return f"– {name.partition(':')[2]}" if ":" in name else f"**{name}**"


def _interval(share: Share) -> str:
    return f"{100 * share.low:.1f} … {100 * share.high:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else str(value)
