"""Files in the forms of RewardBench, which other tools read too, and the JSON of all result files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from patarm_jax.evaluate.findings import Evaluation
from patarm_jax.evaluate.outcomes import Choices, Scores, mean_scores, outcomes
from patarm_jax.evaluate.statistics import Name


def write_eval_set(folder: Path, result: Evaluation, _said: Scores | Choices) -> None:
    """eval-set/ORG/MODEL.json of RewardBench's leaderboard: every subset."""
    path = folder / "eval-set" / f"{_place(result)}.json"
    write_json(path, _about(result) | _subsets(result), indent=4, sort_keys=True)


def write_eval_set_scores(folder: Path, result: Evaluation, said: Scores | Choices) -> None:
    """eval-set-scores/ORG/MODEL.json of RewardBench's leaderboard: every row."""
    lines = _outputs(result, said)
    columns = {column: [line[column] for line in lines] for column in lines[0] if column != "prompt"}
    write_json(folder / "eval-set-scores" / f"{_place(result)}.json", _about(result) | columns)


def write_outputs(folder: Path, result: Evaluation, said: Scores | Choices) -> None:
    """RewardBench's result JSON, and its outputs as JSON lines."""
    name, lines = file_name(result), _outputs(result, said)
    summary = {
        "accuracy": float(np.mean([line["results"] for line in lines])),
        "num_prompts": len(result.items),
        "model": result.model,
        "ref_model": None,
        "tokenizer": result.model,
        "chat_template": None,
        "extra_results": _subsets(result),
    }
    write_json(folder / f"{name}.json", summary)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"{name}_outputs.jsonl").write_text(text, encoding="utf-8")


def file_name(result: Evaluation) -> str:
    """What a judge's files are called."""
    return result.model.replace("/", "__")


def _place(result: Evaluation) -> Path:
    return Path(*[part for part in result.model.split("/") if part.strip(".")][-2:])  # org/model, as the leaderboard


def _subsets(result: Evaluation) -> dict[str, float]:
    return {
        subset: result.findings.scores[Name(result.official, f"subset {subset}")][0] for subset in result.strata.subsets
    }


def _about(result: Evaluation) -> dict[str, object]:
    """What RewardBench's leaderboard calls a model, in eval-set with every subset and in eval-set-scores with rows."""
    kind = "Seq. Classifier" if result.config.judge == "scalar" else "Generative RM"
    return {"model": result.model, "model_type": kind, "chat_template": None}


def _outputs(result: Evaluation, said: Scores | Choices) -> list[dict[str, object]]:
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
    return [ready(line) for line in lines]


def _scores_of_pairs(said: Scores | Choices) -> tuple[np.ndarray, np.ndarray]:
    """Mean scores; of choices, the share of the answers that chose each."""
    if isinstance(said, Scores):
        return mean_scores(said.chosen)[:, 0], mean_scores(said.rejected)[:, 0]
    choices = said.choices[:, 0, 0].reshape(len(said.choices), -1)
    return mean_scores(np.where(np.isnan(choices), np.nan, choices > 0)), mean_scores(
        np.where(np.isnan(choices), np.nan, choices < 0)
    )


def ready(value: object) -> Any:
    """JSON knows neither NaN nor infinity: both become null."""
    if isinstance(value, Mapping):
        return {name: ready(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [ready(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: object, **how: Any) -> None:
    """Strict JSON with two blanks of indent, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, **{"indent": 2, "ensure_ascii": False, "allow_nan": False} | how)
    path.write_text(text + "\n", encoding="utf-8")
