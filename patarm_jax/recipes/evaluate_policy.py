"""Scores a policy on a benchmark of instructions: it responds, the official checker or a judge says what that is worth.

responses.jsonl     every prompt with the policy's response, in the form that the official script reads
judgements.jsonl    of InFoBench, what the judge has answered
results.json        the numbers with intervals
summary.md          the same for people, beside what others have published
official/           the verdicts in the official form

Responses are kept as they come: a stopped evaluation goes on where it stopped. A folder that holds responses.jsonl
alone, from wherever, is scored without a policy.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import jax

from patarm_jax.ask.answers import KEPT, Question
from patarm_jax.ask.local import Local, load_weights
from patarm_jax.ask.remote import Remote
from patarm_jax.ask.shared import shared_answers
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.evaluate import ifeval, infobench
from patarm_jax.evaluate.policy_files import show, write_files
from patarm_jax.evaluate.responded import Response
from patarm_jax.files import writing
from patarm_jax.judge.forms import FORMS
from patarm_jax.judge.parse import answer_of
from patarm_jax.recipes.judges import ask, open_answering, refuse_lost
from patarm_jax.recipes.policy_responses import ANSWERS, JUDGEMENTS, RESPONSES, opened, responses_of, write_responses
from patarm_jax.run.process import say
from patarm_jax.types import Message, UsageError

RECORDED = "recorded"  # the name of a policy or judge whose words stand in a file of results
NO_JUDGE = (
    "infobench is scored by a judge, and none is named. Give --judge.model.path with its folder, or "
    "--judge.endpoint.url; or as --data a file of results, with output and eval in each row."
)
Scored: TypeAlias = ifeval.Scored | infobench.Scored


def main(config: PolicyEvalConfig, dry_run: bool = False) -> Scored | None:
    """Writes `config.output`; gives what was found, or None when it was asked to stop before the end."""
    with opened(config, dry_run) as folder:
        return _evaluate(config, folder, dry_run)


def _evaluate(config: PolicyEvalConfig, folder: Path, dry_run: bool) -> Scored | None:
    by = _on_ifeval if config.benchmark == "ifeval" else _on_infobench
    scored = by(config, folder, dry_run)
    if scored is None:
        return None
    if jax.process_index() == 0:
        with writing(folder, KEPT):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / ANSWERS).is_file() or not (folder / RESPONSES).exists():  # or it is the user's
                write_responses(folder / RESPONSES, scored.tasks, scored.responses)
            write_files(folder, config, scored)
        show(scored)
        say(f"done: {folder / 'summary.md'}")
    return scored


def _on_ifeval(config: PolicyEvalConfig, folder: Path, dry_run: bool) -> ifeval.Scored | None:
    tasks, said = ifeval.read_tasks(config.data.path, config.data.split)
    say(f"{config.data.path or ifeval.HUB}: {said}")
    found = responses_of(config, folder, tasks, dry_run)
    return None if found is None or dry_run else ifeval.score(ifeval.open_checker(), *found)


def _on_infobench(config: PolicyEvalConfig, folder: Path, dry_run: bool) -> infobench.Scored | None:
    if not config.judge.is_named and (config.has_policy or config.responses):
        raise UsageError(NO_JUDGE)
    tasks, said = infobench.read_tasks(config.data.path, config.data.split)
    say(f"{config.data.path or infobench.HUB}: {said}")
    name, limited = config.name or RECORDED, tasks[: config.limit or None]
    recorded = not (config.has_policy or config.responses or (folder / RESPONSES).is_file())
    if recorded and all(task.output is not None for task in limited):  # a file of results
        found = name, limited, [Response(task.output or "") for task in limited]
    else:
        recorded, answered = False, responses_of(config, folder, tasks, dry_run)
        if answered is None:
            return None
        found = answered
    name, tasks, responses = found
    if config.judge.is_named:
        judge = open_answering(config, folder / JUDGEMENTS, dry_run)
        judged = None if dry_run else _judged(config, folder, judge, tasks, responses)
        if judged is None:
            return None
        return infobench.score(name, config.judge.name or judge.name, tasks, responses, judged)
    if not recorded or any(task.verdicts is None for task in tasks):
        raise UsageError(NO_JUDGE)
    return infobench.score(name, RECORDED, tasks, responses, [task.verdicts or () for task in tasks])


def _judged(
    config: PolicyEvalConfig,
    folder: Path,
    judge: Local | Remote,
    tasks: Sequence[infobench.Task],
    responses: Sequence[Response],
) -> list[infobench.Verdicts] | None:
    """What a judge says to every question; None when it was asked to stop before the end."""
    identity = {"benchmark": config.benchmark, **judge.identity}
    numbers = {f"{task.id}/{n + 1}": (place, n) for place, task in enumerate(tasks) for n in range(len(task.questions))}
    most = max(len(task.questions) for task in tasks)
    weights = None if isinstance(judge, Remote) else cache(partial(load_weights, judge))
    say(f"{len(numbers):,} questions about {len(responses):,} responses, at most {most} of each, one after the other")
    with shared_answers(folder / JUDGEMENTS, identity) as answers:

        def say_all(chats: Sequence[tuple[str, list[Message]]]) -> list[str | None] | None:
            questions = [Question(name, numbers[name][0] * most + numbers[name][1], chat) for name, chat in chats]
            if not ask(judge, FORMS[config.judge.form], answers, questions, weights):
                return None
            given = [answers.known[question.key, 0] for question in questions]
            refuse_lost(given, "answers of the judge", "scored")
            return [answer_of(one.text) for one in given]

        return infobench.ask_all(say_all, tasks, responses)
