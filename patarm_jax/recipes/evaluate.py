"""Evaluates a judge on a benchmark: asks, scores by the official formulas, and writes files that others can use.

The folder keeps every answer as it comes, so that a stopped evaluation goes on where it stopped, and one that is
finished is only scored anew.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax

from patarm_jax.ask.answers import (
    KEPT,
    Answers,
    Kind,
    Question,
    missing,
    read_answers,
)
from patarm_jax.ask.estimate import estimate
from patarm_jax.ask.local import Local
from patarm_jax.ask.remote import Remote
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import EvalConfig
from patarm_jax.config.sections import JudgingSection
from patarm_jax.evaluate.benchmark import Benchmark
from patarm_jax.evaluate.catalogue import BENCHMARKS, read_benchmark
from patarm_jax.evaluate.files import RESULTS, compared, load_measured, write_files
from patarm_jax.evaluate.findings import Evaluation, find
from patarm_jax.evaluate.items import Item, limited
from patarm_jax.evaluate.questions import ask_about, judged, questions_of
from patarm_jax.evaluate.scoring import strata_of
from patarm_jax.evaluate.summary import show, verdict
from patarm_jax.files import check_writable, write_text, writing
from patarm_jax.judge.forms import FORMS, Form
from patarm_jax.locks import hold_folder
from patarm_jax.recipes.judges import Rubrics, ask, ask_for_rubrics, open_generator, open_judge, refuse_many_processes
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.types import UsageError, UserError

ANSWERS, RUBRICS = "answers.jsonl", "rubrics.jsonl"


def main(config: EvalConfig, dry_run: bool = False) -> Evaluation | None:
    """Writes `config.output`; gives what was found, or None when it was asked to stop before the end."""
    refuse_many_processes(config)
    start_processes(config, dry_run=dry_run)
    folder = _output(config)
    if dry_run:
        return _evaluate(config, folder, dry_run)
    _refuse_foreign(folder)
    with contextlib.nullcontext() if jax.process_index() else hold_folder(folder, say):
        return _evaluate(config, folder, dry_run)


def _evaluate(config: EvalConfig, folder: Path, dry_run: bool) -> Evaluation | None:
    first = jax.process_index() == 0
    judge = open_judge(config, folder / ANSWERS, dry_run)
    generator = open_generator(config, folder / RUBRICS, dry_run) if config.has_generator else None
    if isinstance(judge, Local):
        config = replace(config, sampling=JudgingSection(**asdict(judge.sampling)))  # complete, for what is written

    # ------------------------------------------------------------------------------------------------------ questions
    items, read = read_benchmark(config.benchmark, config.data)
    form, benchmark = FORMS[config.judge], BENCHMARKS[config.benchmark]
    items, left_out = _that_can_be_asked(items, benchmark, form)
    say(f"{config.data.path or benchmark.hub}: {read}{left_out}")
    if not items:
        raise UserError(f"nothing is left to ask of {config.benchmark}{left_out}. Give the whole benchmark.")
    whole, items = items, limited(items, config.limit)
    groups = strata_of(benchmark.layout, items, whole)
    # Before anything is asked: another evaluation that cannot be gone on or compared with costs nothing.
    theirs = load_measured(Path(config.against).expanduser(), groups, items) if config.against else None
    identity = _identity(config, judge, generator)
    there = read_answers(folder / ANSWERS, identity)
    rubrics: Rubrics | None = Rubrics({})
    if generator is not None:
        of = {"benchmark": config.benchmark}
        rubrics = ask_for_rubrics(generator, folder / RUBRICS, whole, items, of, dry_run)
    if rubrics is None:
        return None
    about = ask_about(whole, form, config.rubrics, rubrics.shown)
    everything = dict(zip([item.id for item in whole], about, strict=True))
    asked = [everything[item.id] for item in items]
    questions = questions_of(asked)
    if dry_run:
        if not first:
            return None
        print(to_yaml(config))
        if generator is not None:
            print(f"rubrics, before anything is judged:\n{rubrics.cost}\njudgements, to which these rubrics come:")
        print(estimate(judge, missing(there, questions, config.votes)))
        if isinstance(judge, Local):
            print("for a rate and a time, judge some: --limit 50")
        return None

    # ------------------------------------------------------------------------------------------------------------ ask
    agree_on_questions(identity, questions)
    with shared_answers(folder / ANSWERS, identity) as answers:
        _refuse_other_data(folder, answers, questions_of(list(everything.values())))
        if first:
            with writing(folder, KEPT):
                write_text(folder / "config.yaml", to_yaml(config))
        finished = ask(judge, form, answers, questions)
    if not done_by_all(finished):
        return None

    # ---------------------------------------------------------------------------------------------------------- score
    given = [answer for question in questions for answer in answers.of(question, config.votes)]
    came = any(answer.kind in (Kind.ANSWER, Kind.CUT) for answer in given)
    if not came and any(not answer.came for answer in given):
        raise UserError(
            f"no question was answered, the first one because: {given[0].reason}. Nothing is scored. When that is put "
            "right, run the same command again to ask for what failed."
        )
    said = judged(asked, answers, config.votes)
    findings, measured = find(groups, items, said, given, config.seed, rubrics.written)
    result = Evaluation(
        config=config, model=config.name or judge.name, items=items, strata=groups, findings=findings, measured=measured
    )
    if theirs is not None:
        result = replace(result, against=compared(result, theirs))
    if not first:
        return result  # the first one writes and tells
    _tell_what_is_replaced(folder, len(items))
    with writing(folder, KEPT):
        write_files(folder, result, asked, answers, said)
    show(result)
    say(f"done: {folder / 'summary.md'}")
    if caution := verdict(result, str(folder / ANSWERS)):
        say(caution)
    return result


def _output(config: EvalConfig) -> Path:
    if not config.output:
        raise UsageError("no output is named. Give --output runs/eval.")
    folder = Path(config.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output {folder} is a file. Name a folder, such as runs/eval.")
    return folder


def _refuse_foreign(folder: Path) -> None:
    """Refuses a folder that cannot be written, or that holds anything but an evaluation."""
    check_writable(folder, folder=True)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if name[0] != "." and not name.endswith((".log", ".out", ".err", ".txt"))]
    if foreign and not {ANSWERS, RUBRICS} & set(names):
        raise UserError(
            f"the output {folder} is not empty and holds no evaluation, but {', '.join(foreign[:3])}. Name another "
            "folder as --output."
        )


def _refuse_other_data(folder: Path, answers: Answers, questions: Sequence[Question]) -> None:
    """Refuses a folder whose answers are all to other questions; that some of them are is told."""
    asked = {question.key for question in questions}
    known = {question for question, _ in answers.known}
    if known and not known & asked:
        raise UserError(
            f"{folder} holds an evaluation on other data: none of its {len(known):,} questions is asked here. Name "
            "another folder as --output."
        )
    if others := len(known - asked):
        say(f"{folder} has answers to {others:,} questions that are not asked of these data; they are left out")


def _that_can_be_asked(items: Sequence[Item], benchmark: Benchmark, form: Form) -> tuple[list[Item], str]:
    """Some subsets are scored by margins between scores of several prompts.

    A judge of pairs gives none, and by a rubric of each prompt they do not compare.
    """
    why = "a pairwise judge gives no scores" if form.responses == 2 else "scores by other rubrics do not compare"
    without = benchmark.no_scores_of_pairs if form.responses == 2 or form.weighs_words else ()
    kept = [item for item in items if item.subset not in without]
    if len(kept) == len(items):
        return kept, ""
    return kept, f"; {len(items) - len(kept)} of {', '.join(without)} are left out: {why}"


def _identity(config: EvalConfig, judge: Local | Remote, generator: Local | Remote | None) -> dict[str, object]:
    written = {f"generator's {name}": value for name, value in (generator.identity if generator else {}).items()}
    return {
        "benchmark": config.benchmark,
        "judge": config.judge,
        "rubrics": config.rubrics,
        **written,
        **judge.identity,
    }


def _tell_what_is_replaced(folder: Path, items: int) -> None:
    """A quick look after the whole takes the place of its results; the answers stay."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = int(json.loads((folder / RESULTS).read_text(encoding="utf-8"))["items"])
        if before > items:
            say(f"the results of {before:,} items make room for those of {items:,}; without --limit they come back")
