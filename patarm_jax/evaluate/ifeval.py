"""IFEval (arXiv 2311.07911): 25 kinds of instructions that a program can check, by lm-eval's own checker.

Strict: the response as it is follows an instruction. Loose: the response or one of seven variants does, without its
first line, its last line or both, and without asterisks. A prompt counts where all of its instructions are followed.
"""

import contextlib
import importlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec

from patarm_jax.data.rows import Row, read_rows
from patarm_jax.evaluate.responded import Response, Share, share_of_units
from patarm_jax.types import Message, UserError

HUB = "google/IFEval"
INSTALL = "pip install 'patarm_jax[ifeval]'"


class _Row(msgspec.Struct):
    key: int | str
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A prompt with its instructions."""

    id: str
    prompt: str
    instructions: tuple[str, ...]  # such as punctuation:no_comma
    kwargs: tuple[dict[str, Any], ...]  # of each

    @property
    def messages(self) -> list[Message]:
        """What the policy is asked."""
        return [Message(role="user", content=self.prompt)]


@dataclass(frozen=True)
class Verdict:
    """Which instructions a response follows, in the order of the task's."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


# ------------------------------------------------------------------------------------------------------------- reading


def read_tasks(path: str, split: str) -> tuple[list[Task], str]:
    """All prompts, and a clause on what was read.

    Args:
        path: official files, a folder of them or a Hub id; empty: the official one.
        split: of a Hub id; empty: train, which is the only one.
    """
    checker = open_checker()
    table = read_rows(path or HUB, (split,) if split else None)
    tasks = [_task(row, checker) for row in table.rows]
    if not tasks:
        raise UserError(f"{path or HUB} holds no prompt of IFEval. Give its input_data.jsonl.")
    return tasks, f"{len(tasks):,} prompts with {sum(len(one.instructions) for one in tasks):,} instructions"


def _task(row: Row, checker: ModuleType) -> Task:
    try:
        given = msgspec.convert(row.values, _Row)
    except msgspec.ValidationError as error:
        raise UserError(f"{row.where} is no row of ifeval: {error}. It has {', '.join(row.values)}.") from error
    known = checker.instructions_registry.INSTRUCTION_DICT
    for name in given.instruction_id_list:
        if name not in known:
            raise UserError(
                f"{row.where} has the instruction {name!r}, which the checker does not know. It knows "
                f"{', '.join(sorted(known))}."
            )
    if len(given.kwargs) != len(given.instruction_id_list):
        raise UserError(
            f"{row.where} has {len(given.instruction_id_list)} instructions and kwargs of {len(given.kwargs)}; each "
            "instruction has its own, which may be empty."
        )
    return Task(str(given.key), given.prompt, tuple(given.instruction_id_list), tuple(given.kwargs))


# ------------------------------------------------------------------------------------------------------------ checking


def open_checker() -> ModuleType:
    """lm-eval's module of IFEval, with its detector of languages seeded; it draws nothing else by itself.

    Raises:
        UserError: when it, or the sentence splitter's data, are not there, with what to do.
    """
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise UserError(f"IFEval's checker is not installed ({error}). Install it: {INSTALL}.") from error
    _need_sentences(nltk)
    try:
        checker = importlib.import_module("lm_eval.tasks.ifeval.utils")
    except ImportError as error:
        raise UserError(f"IFEval's checker is not installed ({error}). Install it: {INSTALL}.") from error
    langdetect.DetectorFactory.seed = 0
    return checker


def _need_sentences(nltk: ModuleType) -> None:
    """Sees to the data of NLTK's sentence splitter, which is downloaded where it is not there."""
    said = io.StringIO()
    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab")
        return
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        there = nltk.download("punkt_tab", quiet=True)
    if not there:
        raise UserError(
            "IFEval's checker needs NLTK's punkt_tab, which is not here and cannot be downloaded. On a machine with a "
            "network run `python -m nltk.downloader -d nltk_data punkt_tab`, and name that folder here as NLTK_DATA."
        )


def check(checker: ModuleType, task: Task, response: str) -> Verdict:
    """Which instructions a response follows; an empty one follows none.

    The checker draws what an instruction does not say, or says in a way that it does not know (the letter '#' of one
    prompt): it is seeded for each response, so that a verdict depends on nothing else.
    """
    random.seed(0)
    doc = {
        "key": task.id,
        "prompt": task.prompt,
        "instruction_id_list": list(task.instructions),
        "kwargs": list(task.kwargs),
    }
    found = checker.process_results(doc, [response])
    return Verdict(tuple(found["inst_level_strict_acc"]), tuple(found["inst_level_loose_acc"]))


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scored:
    """What a policy is worth."""

    name: str  # of the policy
    tasks: Sequence[Task]
    responses: Sequence[Response]
    verdicts: Sequence[Verdict]
    numbers: dict[str, Share]  # the four, by NUMBERS
    by_instruction: dict[str, dict[str, Share]]  # strict and loose, by family and by instruction


NUMBERS = {
    "prompt_strict": "prompts, strict",
    "inst_strict": "instructions, strict",
    "prompt_loose": "prompts, loose",
    "inst_loose": "instructions, loose",
}


def score(checker: ModuleType, name: str, tasks: Sequence[Task], responses: Sequence[Response]) -> Scored:
    """Has the checker look at every response's answer, and adds up what it says."""
    verdicts = [check(checker, task, one.answer) for task, one in zip(tasks, responses, strict=True)]
    return Scored(name, tasks, responses, verdicts, shares(verdicts), shares_by_instruction(tasks, verdicts))


def shares(verdicts: Sequence[Verdict]) -> dict[str, Share]:
    """The four numbers, by their names."""
    found = {}
    for name in NUMBERS:
        level, _, rule = name.partition("_")
        of_prompts = [getattr(verdict, rule) for verdict in verdicts]
        found[name] = share_of_units(of_prompts if level == "inst" else [[all(each)] for each in of_prompts])
    return found


def shares_by_instruction(tasks: Sequence[Task], verdicts: Sequence[Verdict]) -> dict[str, dict[str, Share]]:
    """The strict and the loose share of each kind of instruction, and before them of the family of these kinds."""
    found: dict[str, dict[str, Share]] = {}
    names = sorted({name for task in tasks for name in task.instructions})
    for name in dict.fromkeys(each for one in names for each in (one.partition(":")[0], one)):
        for rule in ("strict", "loose"):
            each = zip(tasks, verdicts, strict=True)
            of_prompts = [list(_of_kind(name, task, getattr(verdict, rule))) for task, verdict in each]
            found.setdefault(name, {})[rule] = share_of_units([each for each in of_prompts if each])
    return found


def _of_kind(name: str, task: Task, followed: Sequence[bool]) -> Iterator[bool]:
    for instruction, is_followed in zip(task.instructions, followed, strict=True):
        if name in (instruction, instruction.partition(":")[0]):
            yield is_followed
