"""Scores the pairs of a file: G judgements of each response, their mean as its score, one JSON line per pair.

A run that was stopped goes on where it stopped; the output appears when it is whole.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patarm_jax.config import JudgeConfig
from patarm_jax.data.pipeline import EncodedPair, encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.evaluate.accuracy import Accuracy, pairwise_accuracy, side_means
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import REPLICATED_RULES, ROLLOUT_RULES, make_mesh
from patarm_jax.recipes.run import Model, load_params, open_model, say, stop_requests
from patarm_jax.rollout.judging import judge, make_judge, requests_of
from patarm_jax.train.metrics import progress
from patarm_jax.types import CHOSEN, REJECTED, Judgement, Status, UsageError, UserError

SIDES = ("chosen", "rejected")


def main(config: JudgeConfig) -> Accuracy | None:
    """Writes `config.output`; gives the accuracy over the whole file, or None when it was asked to stop before."""
    if not config.output:
        raise UsageError("no output is named. Give --output scores.jsonl.")
    output = Path(config.output).expanduser()
    if output.is_dir():
        raise UsageError(f"the output {output} is a folder. Name a file, such as {output / 'scores.jsonl'}.")
    if config.mesh.distributed != "none":
        raise UsageError(
            "judging runs in one process. Set mesh.distributed to none, and give each process its own pairs."
        )
    mesh = make_mesh(config.mesh)

    # ------------------------------------------------------------------------------------------------ model and data
    model = open_model(config.model.path)
    preferences, read = read_preferences(config.data)
    records, encoded = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data)
    say(f"{config.data.path}: {read}. Encoded: {encoded}.")
    rules = ROLLOUT_RULES if config.mesh.rollout == "tensor" else REPLICATED_RULES
    params = load_params(config.model, model, mesh, config.seed, rules, jnp.dtype(config.model.dtype), apart=True)
    judging = make_judge(model.config, model.tokenizer, mesh, config.model, config.sampling, config.votes)
    say(kernels_in_use(config.model, model.config, mesh, "causal"))

    # ---------------------------------------------------------------------------------------------------------- judge
    part = output.with_name(f"{output.name}.{_identity(config, model, records)}.partial")
    key, size = jax.random.key(config.seed), config.pairs_per_batch
    with _writing(output), stop_requests() as asked:
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(part)
        if lines:
            say(f"{part}: {len(lines)} of {len(records)} pairs are judged")
        with part.open("ab") as file, progress(len(records), len(lines), unit="pair") as report:
            for start in range(len(lines), len(records), size):
                batch = records[start : start + size]
                # Row ids are the pairs' own, so a batch's size and order change no judgement.
                judgements = judge(judging, params, requests_of(batch), key)
                new = [_line(record, judgements[2 * i : 2 * i + 2]) for i, record in enumerate(batch)]
                file.write("".join(new).encode())
                file.flush()
                lines += new
                report(len(lines), {})
                if asked(start) and len(lines) < len(records):
                    say(f"stopped after {len(lines)} of {len(records)} pairs; the same command goes on from there")
                    return None
        os.replace(part, output)
    result = _accuracy([json.loads(line) for line in lines])
    low, high = (100 * bound for bound in result.interval)
    say(
        f"done: {output}. The chosen response scored higher in {100 * result.accuracy_strict:.1f} % of the pairs, "
        f"{100 * result.accuracy_half:.1f} % with a tie as half (95 % interval {low:.1f} to {high:.1f}); "
        f"{100 * result.valid:.1f} % of the judgements could be read"
    )
    return result


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {output}: {reason}. Free some space or name another file; what is judged stays beside it."
        ) from error


def _line(record: EncodedPair, sides: Sequence[Sequence[Judgement]]) -> str:
    """One pair as a JSON line; a side's score is null when none of its judgements could be read."""
    scores = [_mean(side) for side in sides]
    row = {
        "id": record.preference.id,
        "source": record.preference.source,
        "domain": record.preference.domain,
        "score_chosen": scores[CHOSEN],
        "score_rejected": scores[REJECTED],
        "prefers": _preferred(*scores),
        "judgements": {
            name: [_judgement(one) for one in side] for name, side in zip(("chosen", "rejected"), sides, strict=True)
        },
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _judgement(one: Judgement) -> dict[str, Any]:
    return {"score": one.score, "status": one.status.name, "reason": one.reason, "text": one.text}


def _mean(side: Sequence[Judgement]) -> float | None:
    scores = np.array([one.score or 0.0 for one in side])
    mean = float(side_means(scores, np.array([one.score is not None for one in side])))
    return None if math.isnan(mean) else mean


def _preferred(chosen: float | None, rejected: float | None) -> str | None:
    if chosen is None or rejected is None:
        return None
    if chosen == rejected:
        return "tie"
    return "chosen" if chosen > rejected else "rejected"


def _accuracy(rows: Sequence[dict[str, Any]]) -> Accuracy:
    sides = [[row["judgements"][side] for side in SIDES] for row in rows]
    valid = np.array([[[one["status"] == Status.OK.name for one in side] for side in pair] for pair in sides])
    scores = np.array([[[one["score"] or 0.0 for one in side] for side in pair] for pair in sides])
    return pairwise_accuracy(scores, valid)


def _identity(config: JudgeConfig, model: Model, records: Sequence[EncodedPair]) -> str:
    """Names what is being judged, by whom and how, so that only the same work is gone on with."""
    drawn = (config.model.weights, config.model.dtype, config.sampling, config.votes, config.seed)
    digest = hashlib.sha256(repr(drawn).encode())
    for file in sorted(model.folder.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for record in records:
        digest.update(record.preference.id.encode() + b"".join(tokens.tobytes() for tokens in record.prompt_tokens))
    return digest.hexdigest()[:8]


def _whole_lines(path: Path) -> list[str]:
    """The lines of an unfinished output, after cutting off what a killed process did not finish writing."""
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")  # not splitlines: a judgement may hold other ends of lines
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return [line.decode() + "\n" for line in lines]
