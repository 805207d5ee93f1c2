"""Writes a generator's rubrics beside the pairs of a file: the same rows, with the rubric of their prompt.

Each prompt has one rubric, whatever pairs share it, so that a judge which goes by them (`data.given_rubrics`) measures
all responses to a prompt alike. A run that was stopped goes on where it stopped; the output appears when it is whole.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from patarm_jax.ask.answers import Question
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import RubricsConfig
from patarm_jax.data.cells import is_blank, word
from patarm_jax.data.preferences import RUBRIC_COLUMN, collect
from patarm_jax.data.rows import Row
from patarm_jax.evaluate.rubrics import Written, prompt_of, rubric_questions
from patarm_jax.files import check_writable, write_text, writing
from patarm_jax.locks import hold_output
from patarm_jax.recipes.judges import ask_for_rubrics, open_generator, refuse_many_processes
from patarm_jax.run.peers import start_processes, told
from patarm_jax.run.process import say
from patarm_jax.types import Preference, UsageError, UserError

RUN = "rubric_run"  # the column that tells which command has written a row's rubric


@dataclass(frozen=True)
class _Record:
    """A pair, and its row as it was read."""

    preference: Preference
    row: Row


def main(config: RubricsConfig, dry_run: bool = False) -> Written | bool:
    """Writes `config.output`; gives what became of the rubrics, True where they were there, False when asked to stop.

    A dry run says what is still to be written and what it will cost, and writes nothing.
    """
    if not config.output:
        raise UsageError("no output is named. Give --output pairs_with_rubrics.jsonl.")
    if not config.generator.is_named:
        raise UsageError("no generator is named. Give its folder as GENERATOR, or --generator.endpoint.url.")
    refuse_many_processes(config)
    start_processes(config, dry_run=dry_run)
    output = Path(config.output).expanduser()
    if output.is_dir() or output.suffix != ".jsonl":
        raise UsageError(f"the output {output} is no .jsonl file. Name one, such as pairs_with_rubrics.jsonl.")
    if dry_run:
        return _write(config, output, dry_run)
    check_writable(output, folder=False)
    with contextlib.nullcontext() if jax.process_index() else hold_output(output, say):
        return _write(config, output, dry_run)


def _write(config: RubricsConfig, output: Path, dry_run: bool) -> Written | bool:
    kept = output.with_name(f".{output.name}.patarm-rubrics")  # always the same: a stopped run goes on from it
    generator = open_generator(config, kept, dry_run)
    records, read = collect(config.data, "data", _without_rubric)
    say(f"{config.data.path}: {read}")
    preferences = [record.preference for record in records]
    run = _run(generator.identity, list(rubric_questions(preferences).values()), [record.row for record in records])
    if not dry_run and told("whether all rubrics are written", str(_is_written(output, run))) == "True":
        say(f"these rubrics were there already: {output}")
        return True
    rubrics = ask_for_rubrics(generator, kept, preferences, preferences, {}, dry_run)
    if rubrics is None:
        return False
    if dry_run:
        if not jax.process_index():
            print(to_yaml(config))
            print(rubrics.cost)
        return True
    assert rubrics.written is not None  # it is no dry run
    if not jax.process_index():  # the first one writes and tells
        rows = [
            {**record.row.values, RUBRIC_COLUMN: rubrics.shown.get(prompt_of(record.preference), ""), RUN: run}
            for record in records
        ]
        with writing(output, "What the generator wrote is kept."):
            write_text(output, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
            if others := sorted({name for row in rows for name, value in row.items() if not _is_json(value)}):
                say(f"{output}: what JSON does not know, such as dates, stands as text in {', '.join(others)}")
            kept.unlink()
        _tell(rubrics.written, output, len(rows))
    return rubrics.written


def _without_rubric(preference: Preference, row: Row, values: Mapping[str, object]) -> _Record:
    """A pair with its row, which must have no rubric: it would be lost."""
    if not is_blank(word(RUBRIC_COLUMN, values[RUBRIC_COLUMN])) or RUN in row.values:
        raise UserError(
            f"{row.where} has a rubric already. Give the pairs without the column {RUBRIC_COLUMN}, or learn from these "
            "as they are, with data.given_rubrics."
        )
    return _Record(preference, row)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _run(identity: Mapping[str, object], questions: Sequence[Question], rows: Sequence[Row]) -> str:
    """Names a command by all that its output depends on."""
    about = json.dumps([identity, [question.key for question in questions], [row.values for row in rows]], default=str)
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _is_written(output: Path, run: str) -> bool:
    """Whether this command has written the file before; another file is refused."""
    if not output.is_file():
        return False
    with contextlib.suppress(OSError, ValueError, TypeError):
        lines = output.read_text(encoding="utf-8").split("\n")
        if {json.loads(line).get(RUN) for line in lines if line} == {run}:
            return True
    raise UserError(
        f"{output} is there and is not what this command writes: its rubrics are another generator's, of other pairs "
        "or no rubrics at all. Name another file as --output, or remove it."
    )


def _tell(written: Written, output: Path, rows: int) -> None:
    blank = f", {written.blank:,} are blank" if written.blank else ""
    say(
        f"done: {output}, {rows:,} pairs with the rubrics of {written.prompts:,} prompts by {written.generator}. "
        f"{100 * written.in_form:.1f} % of the rubrics are in form{blank}, {written.cut:,} were cut off"
    )
