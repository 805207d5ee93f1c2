"""The files of an evaluation: all numbers, every judgement, and the official forms that others read.

results.json           every number under both tie rules, with intervals
summary.md, figures/   the same for people
judgements.parquet     every answer with its item, side and vote
units.parquet          what was measured of each prompt, which `--against` compares by
official/              RewardBench's and RM-Bench's own files
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patarm_jax import __version__
from patarm_jax.ask.answers import Answers
from patarm_jax.config.recipes import EvalConfig
from patarm_jax.evaluate.benchmarks import Item
from patarm_jax.evaluate.figures import draw
from patarm_jax.evaluate.findings import Evaluation
from patarm_jax.evaluate.outcomes import Choices, Scores, mean_scores, outcomes
from patarm_jax.evaluate.questions import ORDERS, SIDES, Asked
from patarm_jax.evaluate.scoring import TIE_RULES, Plan
from patarm_jax.evaluate.statistics import Difference, Measured, compare
from patarm_jax.evaluate.summary import markdown
from patarm_jax.files import one_line
from patarm_jax.types import UserError

RESULTS, UNITS = "results.json", "units.parquet"


def write_files(
    folder: Path, result: Evaluation, asked: Sequence[Asked], answers: Answers, said: Scores | Choices
) -> None:
    """Writes all of them."""
    _write_json(folder / RESULTS, _results(result))
    _write_judgements(folder / "judgements.parquet", result, asked, answers)
    _write_units(folder / UNITS, result)
    _write_official(folder / "official", result, said)
    layout = result.plan.layout
    draw(folder / "figures", result.findings, result.official, list(layout.sections), layout.chance)
    (folder / "summary.md").write_text(markdown(result), encoding="utf-8")


# ---- Ours -----------------------------------------------------------------------------------------------------------


def _results(result: Evaluation) -> dict[str, Any]:
    findings, config = result.findings, result.config
    scores: dict[str, Any] = {}
    for name, (value, low, high) in findings.scores.items():
        rule, section, column = name.split("/", 1)[0], *name.split("/", 1)[1].rsplit("/", 1)
        scores.setdefault(rule, {}).setdefault(section, {})[column] = {"value": value, "low": low, "high": high}
    return _ready(
        {
            "benchmark": config.benchmark,
            "judge": config.judge,
            "model": result.model,
            "votes": config.votes,
            "items": len(result.items),
            "limit": config.limit,
            "seed": config.seed,
            "rubrics": config.rubrics,
            "sampling": _sampling(config),
            "tie_rule": result.official,
            "rules": result.plan.layout.paper,
            "scores": scores,
            **{name: value for name, value in asdict(findings).items() if name != "scores"},
            "against": None if result.against is None else {k: asdict(v) for k, v in result.against.items()},
            "version": __version__,
        }
    )


def _sampling(config: EvalConfig) -> dict[str, float | None] | None:
    """What answers were drawn by, null for what was left to a server; None of a scalar head, which draws nothing."""
    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    return None if config.judge == "scalar" else {name: getattr(config.sampling, name) for name in names}


def _ready(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: both become null."""
    if isinstance(value, Mapping):
        return {name: _ready(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_ready(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, value: Any, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, **{"indent": 2, "ensure_ascii": False, "allow_nan": False} | how)
    path.write_text(text + "\n", encoding="utf-8")


def _write_judgements(path: Path, result: Evaluation, asked: Sequence[Asked], answers: Answers) -> None:
    rows = []
    for item, one in zip(result.items, asked, strict=True):
        about = {"item": item.id, "subset": item.subset, "domain": item.domain}
        places = [
            (
                {"side": SIDES[side], "chosen": number if side == 0 else None, "rejected": number if side else None},
                question,
            )
            for side in range(2)
            for number, question in enumerate(one.of_sides[side])
        ]
        places += [
            ({"side": ORDERS[order], "chosen": i, "rejected": j}, question) for i, j, order, question in one.of_pairs
        ]
        for place, question in places:
            for answer in answers.of(question, result.config.votes):
                said = asdict(answer)
                del said["question"], said["opened"]
                said["cut"] = answer.cut
                said["sent"] = json.dumps(answer.sent) if answer.sent else None
                rows.append(about | place | said)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_JUDGEMENTS), path)


_JUDGEMENTS = pa.schema(
    [
        ("item", pa.string()),
        ("subset", pa.string()),
        ("domain", pa.string()),
        ("side", pa.string()),  # of two responses: which stood first
        ("chosen", pa.int32()),  # which of the item's chosen responses
        ("rejected", pa.int32()),
        ("vote", pa.int32()),
        ("status", pa.string()),
        ("score", pa.float64()),
        ("choice", pa.string()),
        ("text", pa.string()),
        ("reason", pa.string()),
        ("tokens", pa.int32()),
        ("cut", pa.bool_()),
        ("kind", pa.string()),
        ("finish_reason", pa.string()),
        ("sent", pa.string()),  # JSON
    ]
)


# ---- Comparing ------------------------------------------------------------------------------------------------------


def _names(plan: Plan) -> list[str]:
    return [f"{rule} {column}" for rule in TIE_RULES for column in plan.layout.columns]


def _units(plan: Plan, items: Sequence[Item]) -> list[str]:
    """Names of the units, with their texts: the same name in another file is another unit."""
    names = []
    for members in plan.units:
        unit = [items[index] for index in members]
        texts = json.dumps([[list(item.prompt), item.chosen, item.rejected] for item in unit])
        digest = hashlib.sha256(texts.encode()).hexdigest()[:12]
        names.append(f"{' '.join(item.id for item in unit)} {digest}")
    return names


def _write_units(path: Path, result: Evaluation) -> None:
    columns: dict[str, Any] = {"unit": _units(result.plan, result.items)}
    columns["subset"] = [result.plan.subsets[stratum] for stratum in result.measured.stratum]
    columns |= dict(zip(_names(result.plan), result.measured.values.T, strict=True))
    pyarrow.parquet.write_table(pa.table(columns), path)


def load_measured(folder: Path, plan: Plan, items: Sequence[Item]) -> Measured:
    """What another evaluation of the same items measured, in the order of ours."""
    path = folder / UNITS
    if not path.is_file():
        raise UserError(f"--against {folder} holds no finished evaluation: {UNITS} is missing. Finish that one first.")
    names, units = _names(plan), _units(plan, items)
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {path}: {one_line(error)}. Start that evaluation again, which scores it."
        ) from error
    where = {unit: index for index, unit in enumerate(table["unit"].to_pylist())}
    lacking = [unit for unit in units if unit not in where]
    if lacking or any(name not in table.column_names for name in names):
        what = f"{len(lacking)} of our {len(units)} items, such as {lacking[0]}" if lacking else "our measures"
        raise UserError(f"--against {folder} lacks {what}. Compare evaluations of the same benchmark, data and limit.")
    values = np.stack([table[name].to_numpy() for name in names], axis=-1)
    size = np.array([len(unit) for unit in plan.units], float)
    return Measured(values[[where[unit] for unit in units]], size, plan.stratum)


def compared(ours: Evaluation, theirs: Measured) -> dict[str, Difference]:
    """Every number of ours minus theirs, with interval and p-value."""
    return compare(ours.measured, theirs, ours.plan.formulas, ours.config.seed)


# ---- Official forms -------------------------------------------------------------------------------------------------


def _write_official(folder: Path, result: Evaluation, said: Scores | Choices) -> None:
    name, benchmark = result.model.replace("/", "__"), result.config.benchmark
    place = Path(*[part for part in result.model.split("/") if part.strip(".")][-2:])  # org/model, as the leaderboard
    if benchmark in ("rewardbench", "rewardbench2"):
        _write_json(folder / "eval-set" / f"{place}.json", _about(result) | _subsets(result), indent=4, sort_keys=True)
    if benchmark == "rm-bench":
        _write_rm_bench(folder, name, result, said)
    elif benchmark != "rewardbench2":
        lines = _outputs(result, said)
        _write_outputs(folder, name, result, lines)
        if benchmark == "rewardbench":
            columns = {column: [line[column] for line in lines] for column in lines[0] if column != "prompt"}
            _write_json(folder / "eval-set-scores" / f"{place}.json", _about(result) | columns)


def _subsets(result: Evaluation) -> dict[str, float]:
    return {
        subset: result.findings.scores[f"{result.official}/subset {subset}/accuracy"][0]
        for subset in result.plan.subsets
    }


def _about(result: Evaluation) -> dict[str, Any]:
    """What RewardBench's leaderboard calls a model, in eval-set with every subset and in eval-set-scores with rows."""
    kind = "Seq. Classifier" if result.config.judge == "scalar" else "Generative RM"
    return {"model": result.model, "model_type": kind, "chat_template": None}


def _outputs(result: Evaluation, said: Scores | Choices) -> list[dict[str, Any]]:
    """RewardBench's outputs, one for each pair."""
    won = outcomes(said)[:, 0, 0]
    right = won == 1.0 if result.official == "strict" else won
    chosen, rejected = _scores_of_pairs(said)
    lines = [
        {
            "prompt": item.prompt[0]["content"] if len(item.prompt) == 1 else list(item.prompt),
            "results": float(right[index]),
            "scores_chosen": float(chosen[index]),
            "scores_rejected": float(rejected[index]),
            "text_chosen": item.chosen[0],
            "text_rejected": item.rejected[0],
            "subset": item.subset,
            "id": item.row.get("id", item.id),
        }
        for index, item in enumerate(result.items)
    ]
    return [_ready(line) for line in lines]


def _write_outputs(folder: Path, name: str, result: Evaluation, lines: Sequence[Mapping[str, Any]]) -> None:
    """RewardBench's result JSON, and its outputs as JSON lines."""
    summary = {
        "accuracy": float(np.mean([line["results"] for line in lines])),
        "num_prompts": len(result.items),
        "model": result.model,
        "ref_model": None,
        "tokenizer": result.model,
        "chat_template": None,
        "extra_results": _subsets(result),
    }
    _write_json(folder / f"{name}.json", summary)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"{name}_outputs.jsonl").write_text(text, encoding="utf-8")


def _scores_of_pairs(said: Scores | Choices) -> tuple[np.ndarray, np.ndarray]:
    """Mean scores; of choices, the share of the answers that chose each."""
    if isinstance(said, Scores):
        return mean_scores(said.chosen)[:, 0], mean_scores(said.rejected)[:, 0]
    choices = said.choices[:, 0, 0].reshape(len(said.choices), -1)
    return mean_scores(np.where(np.isnan(choices), np.nan, choices > 0)), mean_scores(
        np.where(np.isnan(choices), np.nan, choices < 0)
    )


def _write_rm_bench(folder: Path, name: str, result: Evaluation, said: Scores | Choices) -> None:
    """RM-Bench's rows with scores, as its own scripts read them, and its final result."""
    if isinstance(said, Scores):
        chosen, rejected = mean_scores(said.chosen), mean_scores(said.rejected)
        rows = [
            {
                **item.row,
                "domain": item.subset,
                "score_chosen": chosen[index].tolist(),
                "score_rejected": rejected[index].tolist(),
            }
            for index, item in enumerate(result.items)
        ]
        # With NaN, which RM-Bench's scripts read, and count as wrong.
        _write_json(folder / f"total_dataset_{name}.json", rows, allow_nan=True)
    names = {domain.lower(): f"{domain}/accuracy" for domain in ("Chat", "Math", "Code", "Safety")}
    if not result.missing_sections:  # a mean of some domains is another number
        names |= {f"{column}_acc": f"overall/{column}" for column in ("hard", "normal", "easy")}
        names["total_avg_acc"] = "overall/accuracy"
    found = {key: result.value(f"strict/{name}") for key, name in names.items()}
    _write_json(folder / "final_result.json", {key: value[0] for key, value in found.items() if value})
