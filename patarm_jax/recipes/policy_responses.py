"""A policy's responses to a benchmark's prompts: from here, a server, a file, or a folder that is taken up."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import jax

from patarm_jax.ask.answers import KEPT, Kind, Question, missing, read_answers
from patarm_jax.ask.estimate import estimate
from patarm_jax.ask.local import Local
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.config.load import to_yaml
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.config.sections import JudgingSection
from patarm_jax.data.cells import text_or_messages
from patarm_jax.data.reasons import Dropped
from patarm_jax.data.rows import read_rows
from patarm_jax.evaluate.responded import Response, Task
from patarm_jax.files import check_writable, read_json_object, write_text, writing
from patarm_jax.judge.forms import FORMS
from patarm_jax.locks import hold_folder
from patarm_jax.recipes.judges import ask, open_policy, refuse_lost, refuse_many_processes
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.types import Message, UsageError, UserError

ANSWERS, RESPONSES, JUDGEMENTS, RESULTS = "answers.jsonl", "responses.jsonl", "judgements.jsonl", "results.json"
Some = TypeVar("Some", bound=Task)


@contextlib.contextmanager
def opened(config: PolicyEvalConfig, dry_run: bool) -> Iterator[Path]:
    """Joins the other processes and holds the output, which must be this evaluation's or empty."""
    config.check()
    refuse_many_processes(config)
    start_processes(config, dry_run=dry_run)
    if not config.output:
        raise UsageError(f"no output is named. Give --output runs/{config.benchmark}.")
    folder = Path(config.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output {folder} is a file. Name a folder, such as runs/{config.benchmark}.")
    if not dry_run:
        _refuse_foreign(config, folder)
    with contextlib.nullcontext() if dry_run or jax.process_index() else hold_folder(folder, say):
        yield folder


def _refuse_foreign(config: PolicyEvalConfig, folder: Path) -> None:
    """Refuses a folder that cannot be written, or that holds anything but responses or this evaluation."""
    check_writable(folder, folder=True)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    before = (read_json_object(folder / RESULTS) or {}).get("benchmark", config.benchmark)
    if before != config.benchmark or (names and not names & {ANSWERS, RESPONSES, RESULTS}):
        holds = f"an evaluation on {before}" if before != config.benchmark else f"{', '.join(sorted(names)[:3])}"
        raise UserError(f"the output {folder} holds {holds}. Name another folder as --output.")


def responses_of(
    config: PolicyEvalConfig, folder: Path, tasks: Sequence[Some], dry_run: bool
) -> tuple[str, list[Some], list[Response]] | None:
    """The policy's name, and prompts with its responses; None when it was asked to stop before, and of a dry run."""
    asked = list(tasks[: config.limit or None])
    given = _given(config, folder)
    if given is not None:
        return config.name or given.stem, *of_file(given, asked)
    answered = responded(config, folder, tasks, asked, dry_run)
    return answered and (answered[0], asked, [one for (one,) in answered[1]])


def _given(config: PolicyEvalConfig, folder: Path) -> Path | None:
    """The file of responses that are there; None where a policy is to respond."""
    if config.responses:
        return Path(config.responses).expanduser()
    here = folder / RESPONSES
    if config.has_policy:
        if here.is_file() and not (folder / ANSWERS).is_file():
            raise UserError(
                f"{folder} holds {RESPONSES} of someone else. Score them without --model and --endpoint.url, or name "
                "another folder as --output."
            )
        return None
    if here.is_file():
        return here
    raise UsageError(
        f"nothing says who responds. Give --model with the policy's folder, --endpoint.url, --responses with a file of "
        f"prompts and responses, or as --output a folder that holds {RESPONSES}."
    )


def of_file(path: Path, tasks: Sequence[Some]) -> tuple[list[Some], list[Response]]:
    """The prompts that a file has a response to, with these."""
    by_prompt: dict[str, Response] = {}
    for row in read_rows(str(path), None, setting="responses").rows:
        response, prompt = row.values.get("response"), _prompt_of(row.values.get("prompt"))
        if not prompt or not isinstance(response, str):
            raise UserError(
                f"{row.where} is no response: it has {', '.join(row.values)}. Needed are prompt, as text or messages, "
                "and response, as text."
            )
        found = Response(response, bool(row.values.get("cut_off")))
        if by_prompt.setdefault(_key_of(prompt), found) != found:
            raise UserError(f"{row.where} is another response to a prompt that has one before. Give one to each.")
    answered = [task for task in tasks if _key_of(task.messages) in by_prompt]
    if not answered:
        raise UserError(f"{path} has no response to any of the {len(tasks):,} prompts. Give those to this benchmark.")
    if lacking := len(tasks) - len(answered):
        say(f"{lacking:,} of {len(tasks):,} prompts have no response in {path} and are left out: compare with care")
    return answered, [by_prompt[_key_of(task.messages)] for task in answered]


def _prompt_of(value: object) -> str | Sequence[Message] | None:
    """Text or messages; None where it is neither."""
    if isinstance(value, str):
        return value
    with contextlib.suppress(Dropped):
        return text_or_messages("prompt", value)
    return None


def _key_of(prompt: str | Sequence[Message]) -> str:
    """The text of a prompt of one turn; of a conversation all turns, as JSON."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return json.dumps([[turn["role"], turn["content"]] for turn in prompt])


def responded(
    config: PolicyEvalConfig, folder: Path, whole: Sequence[Task], tasks: Sequence[Task], dry_run: bool
) -> tuple[str, list[list[Response]]] | None:
    """The policy's name, and n responses to each prompt; None when it was asked to stop before, and of a dry run."""
    policy = open_policy(config, folder / ANSWERS, dry_run)
    if isinstance(policy, Local):
        config = replace(config, sampling=JudgingSection(**asdict(policy.sampling)))  # complete, for what is written
    identity = {"benchmark": config.benchmark, "thinking": config.thinking, **policy.identity}
    every = {task.id: Question(task.id, number, task.messages) for number, task in enumerate(whole)}
    questions = [every[task.id] for task in tasks]
    if dry_run:
        if not jax.process_index():
            print(to_yaml(config))
            print(estimate(policy, missing(read_answers(folder / ANSWERS, identity), questions, config.n)))
        return None
    agree_on_questions(identity, questions)
    with shared_answers(folder / ANSWERS, identity) as answers:
        if jax.process_index() == 0:
            with writing(folder, KEPT):
                write_text(folder / "config.yaml", to_yaml(config))
        finished = ask(policy, FORMS[config.policy], answers, questions)
    if not done_by_all(finished):
        return None
    given = [answers.of(question, config.n) for question in questions]
    every_one = [one for each in given for one in each]
    refuse_lost(every_one, "responses", "scored")
    if without := [one for one in every_one if one.kind in (Kind.REFUSED, Kind.TOO_LONG)]:
        say(
            f"{len(without):,} of {len(every_one):,} responses did not come and count as empty, the first one because: "
            f"{without[0].reason}"
        )
    return config.name or policy.name, [[Response(one.text, one.cut) for one in each] for each in given]


def _shown_prompt(task: Task) -> str | list[Message]:
    """A prompt of one turn as text, as the official files have it; a conversation as messages."""
    return task.messages if _key_of(task.messages) != task.prompt else task.prompt


def write_responses(path: Path, tasks: Sequence[Task], responses: Sequence[Response]) -> None:
    """Writes the file that a later evaluation takes up."""
    rows: list[Mapping[str, object]] = [
        {"key": task.id, "prompt": _shown_prompt(task), "response": one.text, "cut_off": one.cut_off}
        for task, one in zip(tasks, responses, strict=True)
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
