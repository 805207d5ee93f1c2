"""The files of an evaluation: all numbers, every judgement, and the official forms that others read.

results.json           every number under both tie rules, with intervals
summary.md, figures/   the same for people
judgements.parquet     every answer with its item, side and vote
units.parquet          what was measured of each prompt, which `--against` compares by
official/              RewardBench's and RM-Bench's own files
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from patarm_jax import __version__
from patarm_jax.ask.answers import Answers
from patarm_jax.config.recipes import EvalConfig
from patarm_jax.evaluate.catalogue import BENCHMARKS
from patarm_jax.evaluate.figures import draw
from patarm_jax.evaluate.findings import Evaluation
from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.official import ready, write_json
from patarm_jax.evaluate.outcomes import Choices, Scores
from patarm_jax.evaluate.questions import ORDERS, SIDES, Asked
from patarm_jax.evaluate.scoring import TIE_RULES, Strata
from patarm_jax.evaluate.statistics import Difference, Measured, Name, compare
from patarm_jax.evaluate.summary import markdown
from patarm_jax.files import one_line
from patarm_jax.judge.forms import FORMS
from patarm_jax.types import UserError

RESULTS, UNITS, JUDGEMENTS = "results.json", "units.parquet", "judgements.parquet"


def write_files(
    folder: Path, result: Evaluation, asked: Sequence[Asked], answers: Answers, said: Scores | Choices
) -> None:
    """Writes all of them."""
    write_json(folder / RESULTS, _results(result))
    _write_judgements(folder / JUDGEMENTS, result, asked, answers)
    _write_units(folder / UNITS, result)
    for write in BENCHMARKS[result.config.benchmark].official:
        write(folder / "official", result, said)
    layout = result.strata.layout
    draw(folder / "figures", result.findings, result.official, list(layout.sections), layout.chance)
    (folder / "summary.md").write_text(markdown(result), encoding="utf-8")


# ---- Ours -----------------------------------------------------------------------------------------------------------


def _results(result: Evaluation) -> dict[str, object]:
    findings, config = result.findings, result.config
    scores: dict[str, Any] = {}
    for name, (value, low, high) in findings.scores.items():
        section = scores.setdefault(name.rule, {}).setdefault(name.place, {})
        section[name.column] = {"value": value, "low": low, "high": high}
    return ready(
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
            "rules": result.strata.layout.paper,
            "scores": scores,
            **{name: value for name, value in asdict(findings).items() if name != "scores"},
            "majority": {str(name): value for name, value in findings.majority.items()},
            "against": None if result.against is None else {str(k): asdict(v) for k, v in result.against.items()},
            "version": __version__,
        }
    )


def _sampling(config: EvalConfig) -> dict[str, float | None] | None:
    """What answers were drawn by, null for what was left to a server; None of a reward model that writes nothing."""
    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    return None if not FORMS[config.judge].writes else {name: getattr(config.sampling, name) for name in names}


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
                said["rubric"] = one.rubric or None
                rows.append(about | place | said)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_JUDGEMENTS), path)


_JUDGEMENTS = pa.schema(
    [
        ("item", pa.string()),
        ("subset", pa.string()),
        ("domain", pa.string()),
        ("side", pa.string()),  # which of two responses stood first
        ("chosen", pa.int32()),  # the index of the chosen response in its item
        ("rejected", pa.int32()),
        ("vote", pa.int32()),
        ("status", pa.string()),
        ("score", pa.float64()),
        ("drawn", pa.float64()),  # where the score is the expected one, the number that was written
        ("outside", pa.float64()),  # where it is, the probability of all but whole numbers from 0 to 10
        ("choice", pa.string()),
        ("text", pa.string()),
        ("reason", pa.string()),
        ("tokens", pa.int32()),
        ("cut", pa.bool_()),
        ("kind", pa.string()),
        ("finish_reason", pa.string()),
        ("sent", pa.string()),  # JSON
        ("rubric", pa.string()),  # a generator's, as the judge was shown it
    ]
)


# ---- Comparing ------------------------------------------------------------------------------------------------------


def _names(strata: Strata) -> list[str]:
    return [f"{rule} {column}" for rule in TIE_RULES for column in strata.layout.columns]


def _units(strata: Strata, items: Sequence[Item]) -> list[str]:
    """Names of the units, with their texts: the same name in another file is another unit."""
    names = []
    for members in strata.units:
        unit = [items[index] for index in members]
        texts = json.dumps([[list(item.prompt), item.chosen, item.rejected] for item in unit])
        digest = hashlib.sha256(texts.encode()).hexdigest()[:12]
        names.append(f"{' '.join(item.id for item in unit)} {digest}")
    return names


def _write_units(path: Path, result: Evaluation) -> None:
    columns: dict[str, object] = {"unit": _units(result.strata, result.items)}
    columns["subset"] = [result.strata.subsets[stratum] for stratum in result.measured.stratum]
    columns |= dict(zip(_names(result.strata), result.measured.values.T, strict=True))
    pyarrow.parquet.write_table(pa.table(columns), path)


def load_measured(folder: Path, strata: Strata, items: Sequence[Item]) -> Measured:
    """What another evaluation of the same items measured, in the order of ours."""
    path = folder / UNITS
    if not path.is_file():
        raise UserError(f"--against {folder} holds no finished evaluation: {UNITS} is missing. Finish that one first.")
    names, units = _names(strata), _units(strata, items)
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
    size = np.array([len(unit) for unit in strata.units], float)
    return Measured(values[[where[unit] for unit in units]], size, strata.stratum)


def compared(ours: Evaluation, theirs: Measured) -> dict[Name, Difference]:
    """Every number of ours minus theirs, with interval and p-value."""
    return compare(ours.measured, theirs, ours.strata.formulas, ours.config.seed)
