"""Best of n: which of a policy's n responses a judge picks, and how often that is a right one, over n.

answers.jsonl, judgements.jsonl   what the policy and the judge have written, kept as it comes
responses.jsonl                   every prompt with its responses, their scores, and which are right
results.json, summary.md, figures/best-of-n.svg   accuracy over n, beside a pick at random, the majority and the best
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from patarm_jax import __version__
from patarm_jax.ask.answers import KEPT, Question
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.ask.worth import FunctionOf
from patarm_jax.config.policy import SourceSection
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.data.prompts import DOMAIN, read_prompts
from patarm_jax.evaluate import ifeval
from patarm_jax.evaluate.best_of_n import curve_of, majority_of_n
from patarm_jax.evaluate.figures import draw_lines
from patarm_jax.evaluate.responded import PromptTask, Response
from patarm_jax.files import write_json, write_text, writing
from patarm_jax.recipes.judges import ask, open_responses_judge, refuse_lost
from patarm_jax.recipes.policy_responses import JUDGEMENTS, RESPONSES, RESULTS, opened, responded
from patarm_jax.rollout.responses import Responses
from patarm_jax.run.margin import imported
from patarm_jax.run.process import say
from patarm_jax.types import Preference, UsageError

Curve = list[tuple[float, float]]  # (n, per cent)


@dataclass(frozen=True)
class Task(PromptTask):
    """A prompt, and what knows whether a response to it is right."""

    of_ifeval: ifeval.Task | None = None


def main(config: PolicyEvalConfig, dry_run: bool = False) -> dict[str, Curve] | None:
    """Writes `config.output`; gives accuracy over n by who picks, or None when it was asked to stop before the end."""
    with opened(config, dry_run) as folder:
        if not config.judge.is_named:
            raise UsageError(
                "best-of-n is picked by a judge, and none is named. Give --judge-model with its folder, or "
                "--judge.endpoint.url."
            )
        if config.checker != "ifeval":
            imported(config.checker, "checker")  # before anything is paid for
        tasks, said = _tasks(config)
        say(f"{config.data.path or ifeval.HUB}: {said}")
        asked = tasks[: config.limit or None]
        found = responded(config, folder, tasks, asked, dry_run)
        if found is None:
            return None
        name, responses = found
        judged = _scores(config, folder, asked, responses)
        if judged is None:
            return None
        judge, scores = judged
        right = _right(config, asked, responses)
        answers = [[one.answer for one in each] for each in responses]
        sizes = _sizes(config.n)
        curves = {
            f"picked by {judge}": curve_of(scores, right, sizes),
            "at random": curve_of(np.zeros_like(right), right, sizes),
            "majority": [(float(n), 100 * majority_of_n(answers, right, n)) for n in sizes],
            "best possible": curve_of(right, right, sizes),
        }
        if jax.process_index() == 0:
            with writing(folder, KEPT):
                _write(config, folder, name, judge, asked, responses, scores, right, curves)
            say(f"done: {folder / 'summary.md'}")
        return curves


def _sizes(n: int) -> list[int]:
    """1, 2, 4, … and n itself.

    >>> _sizes(8), _sizes(6)
    ([1, 2, 4, 8], [1, 2, 4, 6])
    """
    return [*(size for size in (2**power for power in range(20)) if size < n), n]


def _tasks(config: PolicyEvalConfig) -> tuple[list[Task], str]:
    if config.checker == "ifeval":
        read, said = ifeval.read_tasks(config.data.path, config.data.split)
        prompts = [Preference(one.id, tuple(one.messages), "", "", DOMAIN, "") for one in read]
        return [Task(prompt, one) for prompt, one in zip(prompts, read, strict=True)], said
    given, report = read_prompts(config.data)
    return [Task(one) for one in given], str(report)


def _scores(
    config: PolicyEvalConfig, folder: Path, tasks: Sequence[Task], responses: Sequence[Sequence[Response]]
) -> tuple[str, np.ndarray] | None:
    """The judge's name and its scores [N, n], NaN where there is none; None when it was asked to stop before."""
    section = config.judge
    judge, form = open_responses_judge(config, folder / JUDGEMENTS)
    questions: dict[tuple[int, int], Question] = {}
    for place, (task, each) in enumerate(zip(tasks, responses, strict=True)):
        for member, one in enumerate(each):
            if one.answer.strip():
                prompt, domain = task.preference.prompt, task.preference.domain
                messages = form.ask(prompt, one.answer, domain=domain, rubrics=section.rubrics)
                questions[place, member] = Question(f"{task.id}/{member + 1}", place * config.n + member, messages)
    identity = {"benchmark": config.benchmark, "judge": section.kind, "rubrics": section.rubrics, **judge.identity}
    agree_on_questions(identity, list(questions.values()))
    say(f"{len(questions):,} responses are judged by {section.name or judge.name}")
    with shared_answers(folder / JUDGEMENTS, identity) as answers:
        finished = ask(judge, form, answers, list(questions.values()))
    if not done_by_all(finished):
        return None
    scores = np.full((len(tasks), config.n), np.nan)
    for (place, member), question in questions.items():
        given = answers.of(question, section.votes)
        refuse_lost(given, "judgements", "picked")
        known = [one.score for one in given if one.score is not None]
        scores[place, member] = np.mean(known) if known else np.nan
    return section.name or judge.name, scores


def _right(config: PolicyEvalConfig, tasks: Sequence[Task], responses: Sequence[Sequence[Response]]) -> np.ndarray:
    """[N, n], 1 where a response is right."""
    if config.checker == "ifeval":
        checker = ifeval.open_checker()
        return np.array(
            [
                [float(all(ifeval.check(checker, task.of_ifeval, one.answer).strict)) for one in each]
                for task, each in zip(tasks, responses, strict=True)
                if task.of_ifeval is not None
            ]
        )
    function = FunctionOf(SourceSection(kind="function", function=config.checker), imported(config.checker, "checker"))
    for place, (task, each) in enumerate(zip(tasks, responses, strict=True)):
        answers = [one.answer or None for one in each]
        record = EncodedPair(place, task.preference, ())
        function.offer(Responses(place, record, answers, [one.text for one in each], [[] for _ in each]))
    found = function.collect(jax.random.key(config.seed), 0)
    values = [[0.0 if one.value is None else float(one.value > 0.5) for one in found[n]] for n in range(len(tasks))]
    return np.array(values)


def _write(
    config: PolicyEvalConfig,
    folder: Path,
    name: str,
    judge: str,
    tasks: Sequence[Task],
    responses: Sequence[Sequence[Response]],
    scores: np.ndarray,
    right: np.ndarray,
    curves: dict[str, Curve],
) -> None:
    rows = [
        {
            "key": task.id,
            "prompt": task.messages,
            "responses": [
                {
                    "response": one.text,
                    "cut_off": one.cut_off,
                    "score": None if np.isnan(scores[place, member]) else float(scores[place, member]),
                    "right": bool(right[place, member]),
                }
                for member, one in enumerate(each)
            ],
        }
        for place, (task, each) in enumerate(zip(tasks, responses, strict=True))
    ]
    write_text(folder / RESPONSES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    results = {
        "benchmark": config.benchmark,
        "model": name,
        "judge": judge,
        "checker": config.checker,
        "items": len(tasks),
        "n": config.n,
        "accuracy": {who: {str(int(n)): value / 100 for n, value in curve} for who, curve in curves.items()},
        "without_score": int(np.isnan(scores).sum()),
        "version": __version__,
    }
    write_json(folder / RESULTS, results)
    (folder / "figures").mkdir(exist_ok=True)
    draw_lines(folder / "figures" / "best-of-n", f"right responses of {name} (%), best of n", curves, "n")
    head = f"# Best of n: {name}, {len(tasks):,} prompts, picked by {judge}, checked by {config.checker}"
    sizes = [int(n) for n, _ in curves["at random"]]
    table = [f"| right responses, % |{''.join(f' {n} |' for n in sizes)}", "|---" * (len(sizes) + 1) + "|"]
    table += [f"| {who} |{''.join(f' {value:.1f} |' for _, value in curve)}" for who, curve in curves.items()]
    said = (
        "Each is the mean over the ways to draw n of the responses; the majority is of answers in the same words. "
        f"{int(np.isnan(scores).sum()):,} of {scores.size:,} responses have no score."
    )
    text = "\n\n".join([head, "\n".join(table), said, "![best of n](figures/best-of-n.svg)"]) + "\n"
    write_text(folder / "summary.md", text)
    print("\n".join(table))
