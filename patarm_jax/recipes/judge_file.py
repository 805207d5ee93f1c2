"""Scores the pairs of a file: N judgements of each response, their mean as its score, one JSON line per pair.

A run that was stopped goes on where it stopped; the output appears when it is whole.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from patarm_jax.ask.answers import Answer, Answers, Question, missing, read_answers
from patarm_jax.ask.estimate import estimate
from patarm_jax.ask.local import AGAIN, ask_local, open_local
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import JudgeConfig
from patarm_jax.config.sections import JudgingSection
from patarm_jax.data.preferences import read_preferences
from patarm_jax.evaluate.accuracy import Accuracy, pairwise_accuracy
from patarm_jax.evaluate.expected import Pair, spread_of
from patarm_jax.evaluate.outcomes import mean_scores
from patarm_jax.evaluate.questions import SIDES
from patarm_jax.evaluate.summary import hardly_readable
from patarm_jax.files import check_writable, write_text, writing
from patarm_jax.judge.forms import POINTWISE
from patarm_jax.locks import hold_output
from patarm_jax.run.peers import start_processes, told
from patarm_jax.run.process import say
from patarm_jax.types import CHOSEN, REJECTED, Preference, Status, UsageError, UserError


def main(config: JudgeConfig, dry_run: bool = False) -> Accuracy | None:
    """Writes `config.output`; gives the accuracy over the whole file, or None when it was asked to stop before the end.

    A dry run says what is still to be judged and what it will cost, and writes nothing; it gives None.
    """
    if not config.output:
        raise UsageError("no output is named. Give --output scores.jsonl.")
    start_processes(config, dry_run=dry_run)
    output = Path(config.output).expanduser()
    if output.is_dir():
        raise UsageError(f"the output {output} is a folder. Name a file, such as {output / 'scores.jsonl'}.")
    if dry_run:
        return _judge(config, output, dry_run)
    check_writable(output, folder=False)
    _written_before(output)
    with contextlib.nullcontext() if jax.process_index() else hold_output(output, say):
        return _judge(config, output, dry_run)


def _judge(config: JudgeConfig, output: Path, dry_run: bool) -> Accuracy | None:
    before = _written_before(output)
    longest = config.data.max_prompt_tokens
    drawn, expects = (config.sampling, config.votes, config.seed, longest), config.expected_score
    local = open_local(config.model, config.mesh, *drawn, "pointwise", expects=expects)

    # ------------------------------------------------------------------------------------------------------ questions
    preferences, read = read_preferences(config.data)
    say(f"{config.data.path}: {read}")
    ask = partial(POINTWISE.ask, rubrics=config.rubrics)
    questions = [
        Question(f"{one.id}/{name}", 2 * index + side, ask(one.prompt, response, domain=one.domain))
        for index, one in enumerate(preferences)
        for side, (name, response) in enumerate(zip(SIDES, (one.chosen, one.rejected), strict=True))
    ]

    # ---------------------------------------------------------------------------------------------------------- judge
    identity = local.identity | {"rubrics": config.rubrics}
    sampling = {name: identity[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    run = _run(identity, questions, config.votes)
    if any(row.get("run") != run for row in before):
        raise UserError(
            f"{output} holds scores of another judge, of other data or with other settings. Name another file as "
            "--output, or remove it."
        )
    part = output.with_name(f".{output.name}.patarm-answers")  # always the same: a stopped run goes on from it
    finished = [row["id"] for row in before] == [one.id for one in preferences]
    if dry_run:
        if jax.process_index():
            return None
        print(to_yaml(replace(config, sampling=JudgingSection(**asdict(local.sampling)))))
        known = read_answers(part, identity)
        print(estimate(local, [] if finished else missing(known, questions, config.votes, AGAIN)))
        return None
    if told("whether all is judged", str(finished)) == "True":
        return _tell(output, before, "these scores were there already")
    agree_on_questions(identity, questions)
    with shared_answers(part, identity) as answers:
        finished = ask_local(local, answers, questions)
    if not done_by_all(finished):
        return None
    rows = [
        {"run": run, **_row(one, questions[2 * i : 2 * i + 2], answers, config.votes), "sampling": sampling}
        for i, one in enumerate(preferences)
    ]
    if jax.process_index():
        return _accuracy(rows)  # the first one writes and tells
    with writing(output, "What is judged is kept."):
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        part.unlink()
    return _tell(output, rows, "done")


def _written_before(output: Path) -> list[dict[str, object]]:
    """The rows that an earlier command wrote; a file that is not of this command is refused."""
    if not output.is_file():
        return []
    try:
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
        if all("run" in row and "judgements" in row for row in rows):
            return rows
    except (OSError, ValueError, TypeError):
        pass  # it is no file of ours
    raise UserError(f"{output} is there and holds no scores of `patarm judge`. Name another file as --output.")


def _run(identity: Mapping[str, object], questions: Sequence[Question], votes: int) -> str:
    """Names a command by all that its scores depend on."""
    about = json.dumps([identity, votes, [question.key for question in questions]])
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _tell(output: Path, rows: Sequence[dict[str, Any]], what: str) -> Accuracy:
    result = _accuracy(rows)
    low, high = (100 * bound for bound in result.interval)
    interval = f" (95 % interval of that: {low:.1f} to {high:.1f} %)" if low == low else ""  # one pair has none
    say(
        f"{what}: {output}. The chosen response scored higher in {100 * result.accuracy_strict:.1f} % of the pairs; "
        f"with a tie as half that is {100 * result.accuracy_half:.1f} %{interval}; "
        f"{100 * result.valid:.1f} % of the judgements could be read"
    )
    if spread := spread_of(_expected(row["judgements"][side]) for row in rows for side in SIDES):
        say(str(spread))
    every = [one for row in rows for side in SIDES for one in row["judgements"][side]]
    reasons = Counter(one["reason"] for one in every if one["reason"]).most_common()
    counts = Counter(str(one["kind"]).lower() for one in every)
    if caution := hardly_readable(result.valid, len(every), reasons, counts, str(output)):
        say(caution)
    return result


def _row(preference: Preference, questions: Sequence[Question], answers: Answers, votes: int) -> dict[str, object]:
    """One pair; a side's score is null when none of its judgements could be read."""
    sides = [answers.of(question, votes) for question in questions]
    scores = [_mean(side) for side in sides]
    return {
        "id": preference.id,
        "source": preference.source,
        "domain": preference.domain,
        "score_chosen": scores[CHOSEN],
        "score_rejected": scores[REJECTED],
        "prefers": _preferred(*scores),
        "judgements": {name: [_judgement(one) for one in side] for name, side in zip(SIDES, sides, strict=True)},
    }


def _judgement(one: Answer) -> dict[str, object]:
    names = ("score", "status", "kind", "reason", "tokens", "text")
    expected = {"drawn": one.drawn, "outside": one.outside} if one.drawn is not None else {}
    return {name: getattr(one, name) for name in names} | expected


def _expected(judgements: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The judgements of a response whose scores are expected ones."""
    return [(one["score"], one["drawn"], one["outside"]) for one in judgements if "drawn" in one]


def _mean(side: Sequence[Answer]) -> float | None:
    mean = float(mean_scores(np.array([math.nan if one.score is None else one.score for one in side])))
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
