"""What an evaluation of a policy leaves: numbers, a summary for people, and the verdicts in the official form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import rich.box
import rich.console
import rich.table
import rich.text

from patarm_jax import __version__
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.evaluate import ifeval, infobench
from patarm_jax.evaluate.responded import Response, Share
from patarm_jax.files import write_json, write_text

# Per cent, as they stand in papers; nothing was measured here. Of each: the numbers in order, and the source.
_RUBRIC_ARM = "arXiv 2602.01511, Table 3"
Published = Mapping[str, tuple[Sequence[float | None], str]]
IFEVAL: Published = {  # the four, and their average
    "Qwen2.5-7B-Instruct": ((72.5, 79.9, 75.0, 81.8, 77.3), _RUBRIC_ARM),
    "the same, DPO by RLCF": ((None, None, None, None, 78.6), _RUBRIC_ARM),
    "the same, DPO by Rubric-ARM": ((76.0, 82.5, 78.7, 84.7, 80.4), _RUBRIC_ARM),
    "the same, iterative DPO by Rubric-ARM": ((None, None, None, None, 80.8), _RUBRIC_ARM),
    "GPT-4 of November 2023, 540 of the prompts": ((77.22, 83.77, 79.63, 85.58, 81.55), "its authors' repository"),
}
INFOBENCH: Published = {
    "Qwen2.5-7B-Instruct": ((78.1, None, None), _RUBRIC_ARM),
    "the same, DPO by RLCF": ((84.1, None, None), _RUBRIC_ARM),
    "the same, DPO by Rubric-ARM": ((83.7, None, None), _RUBRIC_ARM),
    "the same, iterative DPO by Rubric-ARM": ((85.0, None, None), _RUBRIC_ARM),
}
_PATARM = (
    "PaTaRM (arXiv 2510.24235) says of its policies that IFEval and InFoBench rise by 13.6 % of the base policies' "
    "values, in the mean over both."
)
WORDS = {**ifeval.NUMBERS, "drfr": "all questions (DRFR)", "easy": "of the easy set", "hard": "of the hard set"}
Scored = ifeval.Scored | infobench.Scored


def write_files(folder: Path, config: PolicyEvalConfig, scored: Scored) -> None:
    """Writes all of them."""
    write_json(folder / "results.json", _results(config, scored))
    (folder / "official").mkdir(exist_ok=True)
    official = _of_ifeval(scored) if isinstance(scored, ifeval.Scored) else _of_infobench(scored)
    for name, rows in official.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "official" / name, text)
    write_text(folder / "summary.md", markdown(scored))


def _of_ifeval(scored: ifeval.Scored) -> dict[str, list[dict[str, object]]]:
    """The rows that the official script writes."""
    return {
        f"eval_results_{rule}.jsonl": [
            {
                "follow_all_instructions": all(getattr(verdict, rule)),
                "follow_instruction_list": list(getattr(verdict, rule)),
                "instruction_id_list": list(task.instructions),
                "prompt": task.prompt,
                "response": one.answer,
            }
            for task, one, verdict in zip(scored.tasks, scored.responses, scored.verdicts, strict=True)
        ]
        for rule in ("strict", "loose")
    }


def _of_infobench(scored: infobench.Scored) -> dict[str, list[dict[str, object]]]:
    """Its rows with what was responded and what the judge says of it, as the official script adds them."""
    rows: list[dict[str, object]] = [
        {
            "id": task.id,
            "input": task.input,
            "instruction": task.instruction,
            "decomposed_questions": list(task.questions),
            "subset": task.subset,
            "output": one.answer,
            "eval": list(verdicts),
        }
        for task, one, verdicts in zip(scored.tasks, scored.responses, scored.verdicts, strict=True)
    ]
    return {"infobench_eval.jsonl": rows}


def _results(config: PolicyEvalConfig, scored: Scored) -> dict[str, object]:
    own: dict[str, object]
    if isinstance(scored, ifeval.Scored):
        kinds = scored.by_instruction.items()
        of_kinds = {name: {rule: asdict(share) for rule, share in rules.items()} for name, rules in kinds}
        own = {"by_instruction": of_kinds, "checker": "lm-eval, lm_eval.tasks.ifeval"}
    else:
        own = {"judge": scored.judge, "unread": scored.unread}
    return {
        "benchmark": config.benchmark,
        "model": scored.name,
        "items": len(scored.tasks),
        "limit": config.limit,
        **{name: share.value for name, share in scored.numbers.items()},
        "intervals": {name: [share.low, share.high] for name, share in scored.numbers.items()},
        **own,
        **_counts(scored.responses),
        "version": __version__,
    }


def _counts(responses: Sequence[Response]) -> dict[str, int]:
    return {
        "without_answer": sum(not one.answer.strip() for one in responses),
        "cut_off_in_thought": sum(one.is_lost_in_thought for one in responses),
        "cut_off": sum(one.cut_off for one in responses),
    }


# ---------------------------------------------------------------------------------------------------------- for people


def show(scored: Scored) -> None:
    """Prints the numbers with intervals."""
    numbers = {WORDS[name]: (f"{100 * share.value:.2f}", share.interval) for name, share in scored.numbers.items()}
    show_numbers(_title(scored), "followed", numbers, _reading(scored))


def show_numbers(title: str, what: str, numbers: Mapping[str, tuple[str, str]], reading: str) -> None:
    """Prints numbers in per cent, each with its interval, and what else there is to know of them."""
    words = rich.text.Text(f"{title}, in %")  # names may hold what rich takes for markup
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=words, title_justify="left")
    for heading in (what, "", "95 % interval"):
        table.add_column(heading, justify="left" if heading == what else "right", no_wrap=True)
    for name, (value, interval) in numbers.items():
        table.add_row(name, value, interval)
    console = rich.console.Console()
    console.print(table)
    if reading:
        console.print(reading, highlight=False)


def markdown(scored: Scored) -> str:
    """The whole summary."""
    ours = "".join(f" **{100 * share.value:.2f}** ({share.interval}) |" for share in scored.numbers.values())
    columns, published = [WORDS[name] for name in scored.numbers], INFOBENCH
    if isinstance(scored, ifeval.Scored):
        columns, published = [*columns, "average"], IFEVAL
        ours += f" **{100 * fmean(share.value for share in scored.numbers.values()):.2f}** |"
    rows = [
        f"| policy |{''.join(f' {column} |' for column in columns)} source |",
        "|---" * (len(columns) + 2) + "|",
        f"| {scored.name} |{ours} measured here |",
    ]
    for name, (values, source) in published.items():
        known = "".join(f" {'–' if value is None else value} |" for value in values)
        rows.append(f"| {name} |{known} {source} |")
    parts = [f"# {_title(scored)}", _reading(scored), "\n".join(rows), _PATARM]
    if isinstance(scored, ifeval.Scored):
        parts += ["By kind of instruction, their families first:", _kinds(scored)]
    else:
        parts.append("Numbers by other judges do not compare with these; the papers' are by judges of their own.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(scored: Scored) -> str:
    if isinstance(scored, ifeval.Scored):
        return f"IFEval of {scored.name}, {len(scored.tasks):,} prompts, by lm-eval's checker"
    return f"InFoBench of {scored.name}, {len(scored.tasks):,} instructions, judged by {scored.judge}"


def _kinds(scored: ifeval.Scored) -> str:
    rows = ["| instructions | number | strict | loose |", "|---|---|---|---|"]
    for name, rules in scored.by_instruction.items():
        called = f"– {name.partition(':')[2]}" if ":" in name else f"**{name}**"
        numbers = "".join(f" {_in_words(rules[rule])} |" for rule in ("strict", "loose"))
        rows.append(f"| {called} | {rules['strict'].count:,} |{numbers}")
    return "\n".join(rows)


def _in_words(share: Share) -> str:
    return f"{100 * share.value:.1f} ({share.interval})"


def _reading(scored: Scored) -> str:
    counts = _counts(scored.responses)
    words = {
        "without an answer, which follow nothing": counts["without_answer"],
        "cut off inside their thinking (raise sampling.max_new_tokens)": counts["cut_off_in_thought"],
        "cut off in all": counts["cut_off"],
    }
    found = [f"{said}: {count:,}" for said, count in words.items() if count]
    parts = [f"Responses {'; '.join(found)}."] if found else []
    if isinstance(scored, infobench.Scored) and scored.unread:
        parts.append(
            f"Questions that the judge has answered with neither yes nor no, which count as no: {scored.unread:,}."
        )
    return " ".join(parts)
