"""How often a judge of two prefers a policy's responses to a baseline's, each pair of them in both orders.

answers.jsonl, judgements.jsonl   what the policy and the judge have written, kept as it comes
responses.jsonl                   every prompt with the policy's response
comparisons.jsonl                 both responses, what each judgement chose, and who wins
results.json, summary.md          win rate, wins, ties and losses with intervals, bias of position, lengths
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from patarm_jax import __version__
from patarm_jax.ask.answers import KEPT, Answer, Question
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.data.prompts import read_prompts
from patarm_jax.evaluate.policy_files import show_numbers
from patarm_jax.evaluate.responded import PromptTask, Response
from patarm_jax.evaluate.win_rate import Comparison, Scored
from patarm_jax.files import write_json, write_text, writing
from patarm_jax.recipes.judges import ask, open_responses_judge, refuse_lost
from patarm_jax.recipes.policy_responses import (
    ANSWERS,
    JUDGEMENTS,
    RESPONSES,
    RESULTS,
    of_file,
    opened,
    responses_of,
    write_responses,
)
from patarm_jax.run.process import say
from patarm_jax.types import UsageError

COMPARISONS = "comparisons.jsonl"
_WORDS = {"win_rate": "win rate (a tie is ½)", "wins": "wins", "ties": "ties", "losses": "losses"}


def main(config: PolicyEvalConfig, dry_run: bool = False) -> Scored | None:
    """Writes `config.output`; gives what was found, or None when it was asked to stop before the end."""
    with opened(config, dry_run) as folder:
        if not config.judge.is_named:
            raise UsageError(
                "the win rate is told by a judge of two, and none is named. Give --judge-model with its folder, or "
                "--judge.endpoint.url."
            )
        baseline = _file_of(config.against)
        # The prompts are those of the baseline where no others are named.
        data = config.data if config.data.path else replace(config.data, path=str(baseline))
        prompts, said = read_prompts(data)
        say(f"{data.path}: {said}")
        tasks, theirs = of_file(baseline, [PromptTask(one) for one in prompts][: config.limit or None])
        found = responses_of(config, folder, tasks, dry_run)
        if found is None or dry_run:
            return None
        name, answered, ours = found
        against = dict(zip([task.id for task in tasks], theirs, strict=True))
        scored = _compare(config, folder, name, baseline, answered, ours, [against[task.id] for task in answered])
        if scored is not None and jax.process_index() == 0:
            with writing(folder, KEPT):
                if (folder / ANSWERS).is_file() or not (folder / RESPONSES).exists():  # or it is the user's
                    write_responses(folder / RESPONSES, answered, ours)
                _write(config, folder, scored)
            say(f"done: {folder / 'summary.md'}")
        return scored


def _file_of(against: str) -> Path:
    """The baseline's file of responses, or the one in the folder of its evaluation."""
    path = Path(against).expanduser()
    return path / RESPONSES if path.is_dir() else path


def _compare(
    config: PolicyEvalConfig,
    folder: Path,
    name: str,
    baseline: Path,
    tasks: Sequence[PromptTask],
    ours: Sequence[Response],
    theirs: Sequence[Response],
) -> Scored | None:
    """Has the judge compare them; None when it was asked to stop before the end."""
    section = config.judge
    judge, form = open_responses_judge(replace(config, judge=replace(section, kind="pairwise")), folder / JUDGEMENTS)
    questions: list[tuple[Question, Question] | None] = []
    for place, (task, one, other) in enumerate(zip(tasks, ours, theirs, strict=True)):
        both = one.answer, other.answer
        if not all(answer.strip() for answer in both):
            questions.append(None)
            continue
        first, second = (
            Question(
                f"{task.id}/{called}",
                2 * place + order,
                form.ask(task.preference.prompt, *shown, domain=task.preference.domain, rubrics=section.rubrics),
            )
            for order, (called, shown) in enumerate(zip(("first", "second"), (both, both[::-1]), strict=True))
        )
        questions.append((first, second))
    every = [question for pair in questions if pair for question in pair]
    identity = {"benchmark": config.benchmark, "rubrics": section.rubrics, **judge.identity}
    agree_on_questions(identity, every)
    say(f"{len(every) // 2:,} pairs of responses are compared in both orders by {section.name or judge.name}")
    with shared_answers(folder / JUDGEMENTS, identity) as answers:
        finished = ask(judge, form, answers, every)
    if not done_by_all(finished):
        return None
    comparisons: list[Comparison | None] = []
    for asked in questions:
        if asked is None:
            comparisons.append(None)
            continue
        given = [answers.of(question, section.votes) for question in asked]
        refuse_lost([answer for each in given for answer in each], "judgements", "counted")
        comparisons.append(Comparison(_chose(given[0], "A"), _chose(given[1], "B")))
    called = baseline.parent.name if baseline.name == RESPONSES else baseline.stem
    return Scored(name, called, section.name or judge.name, tasks, ours, theirs, comparisons)


def _chose(answers: Sequence[Answer], letter: str) -> list[bool | None]:
    return [None if answer.choice is None else answer.choice == letter for answer in answers]


def _write(config: PolicyEvalConfig, folder: Path, scored: Scored) -> None:
    rows = [
        {
            "key": task.id,
            "prompt": task.messages,
            "response": one.answer,
            "baseline": other.answer,
            "chosen_standing_first": None if compared is None else list(compared.first),
            "chosen_standing_second": None if compared is None else list(compared.second),
            "outcome": outcome,
        }
        for task, one, other, compared, outcome in zip(
            scored.tasks, scored.ours, scored.theirs, scored.comparisons, scored.outcomes, strict=True
        )
    ]
    write_text(folder / COMPARISONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    results = {
        "benchmark": config.benchmark,
        "model": scored.name,
        "baseline": scored.baseline,
        "judge": scored.judge,
        "items": len(scored.tasks),
        "votes": config.judge.votes,
        **{name: share.value for name, share in scored.numbers.items()},
        "intervals": {name: [share.low, share.high] for name, share in scored.numbers.items()},
        "first_chosen": scored.first_chosen,
        "unread": scored.unread,
        "without_answer": list(scored.without_answer),
        "characters": list(scored.lengths),
        "version": __version__,
    }
    write_json(folder / RESULTS, results)
    title = f"{scored.name} against {scored.baseline}, {len(scored.tasks):,} prompts, compared by {scored.judge}"
    table = ["| of the prompts | % | 95 % interval |", "|---|---|---|"]
    table += [f"| {_WORDS[name]} | {100 * one.value:.1f} | {one.interval} |" for name, one in scored.numbers.items()]
    write_text(folder / "summary.md", "\n\n".join([f"# {title}", "\n".join(table), _reading(scored)]) + "\n")
    numbers = {_WORDS[name]: (f"{100 * one.value:.1f}", one.interval) for name, one in scored.numbers.items()}
    show_numbers(title, "of the prompts", numbers, _reading(scored))


def _reading(scored: Scored) -> str:
    """What else there is to know of these numbers."""
    (ours, theirs), (lacking, lacked) = scored.lengths, scored.without_answer
    said = ["A prompt is won where most judgements of both orders choose the policy's response."]
    if scored.first_chosen is not None:
        said.append(f"The response that stands first is chosen in {100 * scored.first_chosen:.1f} % of the judgements.")
    said.append(
        f"An answer has {ours:,.0f} characters in the mean, one of the baseline {theirs:,.0f}: judges tend to prefer "
        "the longer."
    )
    if lacking or lacked:
        said.append(f"Without an answer, which loses: {lacking:,} of the policy, {lacked:,} of the baseline.")
    if scored.unread:
        said.append(f"Prompts without a readable judgement in one of the orders, which are ties: {scored.unread:,}.")
    return " ".join(said)
