"""Judges the pairs of a file, one JSON line per pair.

A judge of one response gives each response N judgements, and their mean is its score; a judge of two compares both in
either order, N times each, and the pair goes to the response that is chosen more often. A run that was stopped goes on
where it stopped; the output appears when it is whole.
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

from patarm_jax.ask.answers import Answer, Question, missing, read_answers
from patarm_jax.ask.estimate import estimate
from patarm_jax.ask.local import AGAIN, Local
from patarm_jax.ask.remote import Remote
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import JudgeConfig
from patarm_jax.config.sections import JudgingSection
from patarm_jax.data.preferences import read_preferences
from patarm_jax.evaluate.accuracy import Accuracy, accuracy_of_choices, pairwise_accuracy
from patarm_jax.evaluate.expected import Pair, spread_of
from patarm_jax.evaluate.outcomes import mean_scores
from patarm_jax.evaluate.rubrics import prompt_of
from patarm_jax.evaluate.summary import hardly_readable
from patarm_jax.files import check_writable, write_text, writing
from patarm_jax.judge.forms import FORMS, POINTWISE, Form
from patarm_jax.locks import hold_output
from patarm_jax.recipes.judges import (
    Rubrics,
    ask,
    ask_for_rubrics,
    open_generator,
    open_judge,
    refuse_lost,
    refuse_many_processes,
)
from patarm_jax.run.peers import start_processes, told
from patarm_jax.run.process import say
from patarm_jax.types import CHOSEN, REJECTED, Preference, Status, UsageError, UserError


def main(config: JudgeConfig, dry_run: bool = False) -> Accuracy | None:
    """Writes `config.output`; gives the accuracy over the whole file, or None when it was asked to stop before the end.

    A dry run says what is still to be judged and what it will cost, and writes nothing; it gives None.
    """
    if not config.output:
        raise UsageError("no output is named. Give --output scores.jsonl.")
    refuse_many_processes(config)
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
    # Always the same names: a stopped run goes on from these files.
    part, kept_rubrics = (output.with_name(f".{output.name}.patarm-{what}") for what in ("answers", "rubrics"))
    served = before[0].get("served", {}) if before else {}
    judge = open_judge(config, part, dry_run, served.get("judge", ""))
    begun = served.get("generator", "")
    generator = open_generator(config, kept_rubrics, dry_run, begun) if config.has_generator else None
    form = FORMS[config.judge]

    # ------------------------------------------------------------------------------------------------------ questions
    preferences, read = read_preferences(config.data)
    say(f"{config.data.path}: {read}")
    identity = judge.identity | {"rubrics": config.rubrics}
    if form is not POINTWISE:
        identity["judge"] = config.judge
    if generator is not None:
        identity |= {f"generator's {name}": value for name, value in generator.identity.items()}
    sampling = {name: identity[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    remote = {"judge": judge, "generator": generator}
    by_server = {role: one.name for role, one in remote.items() if isinstance(one, Remote)}
    run = _run(identity, _questions(config, preferences, {}), config.votes)
    if any(row.get("run") != run for row in before):
        raise UserError(
            f"{output} holds scores of another judge, of other data or with other settings. Name another file as "
            "--output, or remove it."
        )
    finished = [row["id"] for row in before] == [one.id for one in preferences]
    if not dry_run and told("whether all is judged", str(finished)) == "True":
        return _tell(form, output, before, "these judgements were there already")

    # ------------------------------------------------------------------------------------------------------------ ask
    rubrics: Rubrics | None = Rubrics({})
    if generator is not None and not finished:
        rubrics = ask_for_rubrics(generator, kept_rubrics, preferences, preferences, {}, dry_run)
    if rubrics is None:
        return None
    questions = _questions(config, preferences, rubrics.shown)
    if dry_run:
        lacking = [] if finished else missing(read_answers(part, identity), questions, config.votes, AGAIN)
        _describe(config, judge, lacking, rubrics)
        return None
    agree_on_questions(identity, questions)
    with shared_answers(part, identity) as answers:
        finished = ask(judge, form, answers, questions)
    if not done_by_all(finished):
        return None

    # ---------------------------------------------------------------------------------------------------------- write
    refuse_lost([answer for one in questions for answer in answers.of(one, config.votes)], "judgements", "written")
    rows = []
    for index, preference in enumerate(preferences):
        places = [answers.of(question, config.votes) for question in questions[2 * index : 2 * index + 2]]
        has_rubrics = generator is not None or config.data.given_rubrics
        by: dict[str, object] = {"rubric": _rubric_of(preference, rubrics.shown)} if has_rubrics else {}
        by |= {"served": by_server} if by_server else {}
        rows.append({"run": run, **_row(form, preference, places), **by, "sampling": sampling})
    if jax.process_index():
        return _accuracy(form, rows)  # the first one writes and tells
    with writing(output, "What is judged is kept."):
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        part.unlink()
        kept_rubrics.unlink(missing_ok=True)
    return _tell(form, output, rows, "done")


def _questions(config: JudgeConfig, preferences: Sequence[Preference], rubrics: Mapping[str, str]) -> list[Question]:
    """Two about each pair: its responses, or both in either order; by generator's rubrics where there are some."""
    form = FORMS[config.judge]
    questions = []
    for index, one in enumerate(preferences):
        rubric = _rubric_of(one, rubrics)
        about = partial(form.ask, domain=one.domain, rubrics=config.rubrics, rubric=rubric)
        for place, responses in enumerate(form.shown(one)):
            name = f"{one.id}/{form.places[place]}"
            read_by = rubric if form.weighs_words else ""
            questions.append(Question(name, 2 * index + place, about(one.prompt, *responses), read_by))
    return questions


def _rubric_of(preference: Preference, rubrics: Mapping[str, str]) -> str:
    """A generator's, or the one that stands in the pair's row; empty where there is none."""
    return preference.rubric or rubrics.get(prompt_of(preference), "")


def _describe(
    config: JudgeConfig, judge: Local | Remote, lacking: Sequence[tuple[Question, list[int]]], rubrics: Rubrics
) -> None:
    """Says what is still to be judged, and what it will cost."""
    if jax.process_index():
        return
    if isinstance(judge, Local):
        config = replace(config, sampling=JudgingSection(**asdict(judge.sampling)))
    print(to_yaml(config))
    if rubrics.cost:
        print(f"rubrics, before anything is judged:\n{rubrics.cost}\njudgements, to which these rubrics come:")
    print(estimate(judge, lacking))


def _written_before(output: Path) -> list[dict[str, Any]]:
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


def _tell(form: Form, output: Path, rows: Sequence[dict[str, Any]], what: str) -> Accuracy:
    result = _accuracy(form, rows)
    low, high = (100 * bound for bound in result.interval)
    interval = f" (95 % interval of that: {low:.1f} to {high:.1f} %)" if low == low else ""  # one pair has none
    won = "scored higher" if form.responses == 1 else "was chosen more often"
    say(
        f"{what}: {output}. The chosen response {won} in {100 * result.accuracy_strict:.1f} % of the pairs; "
        f"with a tie as half that is {100 * result.accuracy_half:.1f} %{interval}; "
        f"{100 * result.valid:.1f} % of the judgements could be read"
    )
    if bias := result.position:
        first, same = (100 * bias[name] for name in ("chose the first", "same in both orders"))
        say(
            f"{first:.1f} % of its choices went to the response that stood first; {same:.1f} % of the pairs were "
            "decided alike in both orders"
        )
    if spread := spread_of(_expected(row["judgements"][place]) for row in rows for place in form.places):
        say(str(spread))
    every = [one for row in rows for place in form.places for one in row["judgements"][place]]
    reasons = Counter(one["reason"] for one in every if one["reason"]).most_common()
    counts = Counter(str(one["kind"]).lower() for one in every)
    if caution := hardly_readable(result.valid, len(every), reasons, counts, str(output)):
        say(caution)
    return result


def _row(form: Form, preference: Preference, places: Sequence[Sequence[Answer]]) -> dict[str, object]:
    """One pair, by the answers to its two questions.

    A side's score is null where none of its judgements could be read; wins are null where no choice could be.
    """
    if form.responses == 1:
        what, sides = "score", [_mean(answers) for answers in places]
    else:
        right = [_is_right(one, place) for place, answers in enumerate(places) for one in answers]
        what, sides = "wins", [right.count(True), right.count(False)] if any(right) or False in right else [None, None]
    return {
        "id": preference.id,
        "source": preference.source,
        "domain": preference.domain,
        f"{what}_chosen": sides[CHOSEN],
        f"{what}_rejected": sides[REJECTED],
        "prefers": _preferred(sides[CHOSEN], sides[REJECTED]),
        "judgements": {
            name: [_judgement(form, one) for one in answers] for name, answers in zip(form.places, places, strict=True)
        },
    }


def _is_right(answer: Answer, place: int) -> bool | None:
    """Whether it chooses the chosen response, which stands first in place 0; None where it could not be read."""
    return None if answer.choice is None else (answer.choice == "A") == (place == 0)


def _judgement(form: Form, one: Answer) -> dict[str, object]:
    names = ("score" if form.responses == 1 else "choice", "status", "kind", "reason", "tokens", "text")
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


def _accuracy(form: Form, rows: Sequence[dict[str, Any]]) -> Accuracy:
    places = [[row["judgements"][place] for place in form.places] for row in rows]
    valid = np.array([[[one["status"] == Status.OK.name for one in place] for place in pair] for pair in places])
    if form.responses == 1:
        scores = np.array([[[one["score"] or 0.0 for one in place] for place in pair] for pair in places])
        return pairwise_accuracy(scores, valid)
    first = np.array([[[one["choice"] == "A" for one in place] for place in pair] for pair in places])
    return accuracy_of_choices(np.stack([first[:, 0], ~first[:, 1]], axis=1).astype(float), valid)
