"""Scores the pairs of a file: G judgements of each response, their mean as its score, one JSON line per pair.

A run that was stopped goes on where it stopped; the output appears when it is whole.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patarm_jax.config import JudgeConfig, to_yaml
from patarm_jax.data.pipeline import EncodedPair, encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.evaluate.accuracy import Accuracy, pairwise_accuracy
from patarm_jax.model.sharding import REPLICATED_RULES, ROLLOUT_RULES, make_mesh
from patarm_jax.recipes.run import load_params, open_model, say, stop_requests
from patarm_jax.rollout.judging import Request, judge, make_judge
from patarm_jax.train.metrics import progress
from patarm_jax.types import CHOSEN, REJECTED, Judgement, Status, UsageError, UserError

SIDES = ("chosen", "rejected")


def main(config: JudgeConfig) -> Accuracy | None:
    """Writes `config.output`; gives the accuracy over the whole file, or None when it was asked to stop before."""
    if not config.output:
        raise UsageError("no output is named. Give --output scores.jsonl.")
    output = Path(config.output).expanduser()
    mesh = make_mesh(config.mesh)

    # ------------------------------------------------------------------------------------------------ model and data
    model = open_model(config.model.path)
    preferences, read = read_preferences(config.data)
    records, encoded = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data)
    say(f"{config.data.path}: {read}. Encoded: {encoded}.")
    rules = ROLLOUT_RULES if config.mesh.rollout == "tensor" else REPLICATED_RULES
    params = load_params(config.model, model, mesh, config.seed, rules, jnp.dtype(config.model.dtype))
    judging = make_judge(model.config, model.tokenizer, mesh, config.sampling, config.votes, config.model.dtype)

    # ---------------------------------------------------------------------------------------------------------- judge
    part = output.with_name(f"{output.name}.{_identity(config, records)}.partial")
    lines = _whole_lines(part)
    if lines:
        say(f"{part}: {len(lines)} of {len(records)} pairs are judged")
    key, size = jax.random.key(config.seed), config.pairs_per_batch
    with _writing(output), stop_requests() as asked, progress(len(records), len(lines), unit="pair") as report:
        output.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            for start in range(len(lines), len(records), size):
                batch = records[start : start + size]
                # Row ids are the pairs' own, so a batch's size and order change no judgement.
                judgements = judge(judging, params, _requests(batch), key, rows=2 * size)
                lines += [_line(record, judgements[2 * i : 2 * i + 2]) for i, record in enumerate(batch)]
                file.writelines(lines[start:])
                file.flush()
                report(len(lines), {})
                if asked(start) and len(lines) < len(records):
                    say(f"stopped after {len(lines)} of {len(records)} pairs; the same command goes on from there")
                    return None
        os.replace(part, output)
    say(f"done: {output}")
    return _accuracy([json.loads(line) for line in lines])


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}. Free some space or name another file.") from error


def _requests(batch: Sequence[EncodedPair]) -> list[Request]:
    return [
        Request(tokens, 2 * record.index + side) for record in batch for side, tokens in enumerate(record.prompt_tokens)
    ]


def _line(record: EncodedPair, sides: Sequence[Sequence[Judgement]]) -> str:
    """One pair as a JSON line; a side's score is null when none of its judgements could be read."""
    scores = [_mean([one.score for one in side if one.score is not None]) for side in sides]
    decided = None not in scores
    row = {
        "id": record.preference.id,
        "source": record.preference.source,
        "domain": record.preference.domain,
        "score_chosen": scores[CHOSEN],
        "score_rejected": scores[REJECTED],
        "prefers": _preferred(*scores) if decided else None,
        "judgements": {
            name: [_judgement(one) for one in side] for name, side in zip(("chosen", "rejected"), sides, strict=True)
        },
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _judgement(one: Judgement) -> dict[str, Any]:
    return {"score": one.score, "status": one.status.name, "reason": one.reason, "text": one.text}


def _mean(scores: Sequence[float]) -> float | None:
    return float(np.mean(scores)) if scores else None


def _preferred(chosen: float | None, rejected: float | None) -> str:
    if chosen == rejected or chosen is None or rejected is None:
        return "tie"
    return "chosen" if chosen > rejected else "rejected"


def _accuracy(rows: Sequence[dict[str, Any]]) -> Accuracy:
    sides = [[row["judgements"][side] for side in SIDES] for row in rows]
    valid = np.array([[[one["status"] == Status.OK.name for one in side] for side in pair] for pair in sides])
    scores = np.array([[[one["score"] or 0.0 for one in side] for side in pair] for pair in sides])
    return pairwise_accuracy(scores, valid)


def _identity(config: JudgeConfig, records: Sequence[EncodedPair]) -> str:
    """Names what is being judged, by whom and how, so that only the same work is gone on with."""
    digest = hashlib.sha256(to_yaml(config).encode())
    for record in records:
        digest.update(record.preference.id.encode() + b"".join(tokens.tobytes() for tokens in record.prompt_tokens))
    return digest.hexdigest()[:8]


def _whole_lines(path: Path) -> list[str]:
    """The lines of an unfinished output; one that was cut off is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
