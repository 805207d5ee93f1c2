"""Rubrics that stand beside the pairs: a generator writes them with `patarm rubrics`, and judges go by them."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from patarm_jax.cli import main
from patarm_jax.config.sections import DataSection
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.tokenizer import decode, load_tokenizer
from patarm_jax.judge.forms import PAIRWISE, POINTWISE
from patarm_jax.types import UserError
from tests.chat_server import FORM, GOOD, completion, served, settings
from tests.runs import VAIN, config_file
from tests.test_judge_file import judge, rows_of
from tests.test_rubric_judge import RUBRIC_TEXT, both, pairs  # noqa: F401  # a fixture

SECTION = f"<rubrics>\n{RUBRIC_TEXT}\n</rubrics>"


def rubrics(folder, *more, output="ruled.jsonl"):
    return ["rubrics", *settings({"--input": folder / "pairs.jsonl", "--output": folder / output}, more)]


def give(path, *rubrics):
    """Puts rubrics beside the pairs of a file, one after the other and the last one for all that follow."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    every = [*rubrics, *[rubrics[-1]] * len(rows)]
    lines = [
        json.dumps(row | ({} if rubric is None else {"rubric": rubric}))
        for row, rubric in zip(rows, every, strict=False)
    ]
    path.write_text("\n".join(lines) + "\n")


# ---- Writing them ---------------------------------------------------------------------------------------------------


def test_a_generator_writes_one_rubric_for_each_prompt_beside_its_pairs(pairs, capsys):  # noqa: F811
    with served(always=both()) as (url, chat):
        assert main(rubrics(pairs, "--generator.endpoint.url", url)) == 0
        assert len(chat.asked) == 6  # of seven pairs
        assert main(rubrics(pairs, "--generator.endpoint.url", url)) == 0
        assert len(chat.asked) == 6
    before, after = rows_of(pairs, "pairs.jsonl"), rows_of(pairs, "ruled.jsonl")
    assert [{name: row[name] for name in before[0]} for row in after] == before
    assert {row["rubric"] for row in after} == {RUBRIC_TEXT}
    said = capsys.readouterr().err
    assert "7 pairs with the rubrics of 6 prompts by served-judge. 100.0 % of the rubrics are in form" in said
    assert "these rubrics were there already" in said
    assert sorted(path.name for path in pairs.iterdir()) == ["pairs.jsonl", "ruled.jsonl"]


def test_what_json_does_not_know_is_written_as_text_and_said(pairs, capsys):  # noqa: F811
    rows = [row | {"when": datetime.datetime(2026, 1, 2), "raw": b"ab"} for row in rows_of(pairs, "pairs.jsonl")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), pairs / "dated.parquet")
    with served(always=both()) as (url, _):
        command = rubrics(pairs, "--generator.endpoint.url", url)
        command[command.index("--input") + 1] = str(pairs / "dated.parquet")
        assert main(command) == 0 and main(command) == 0
    assert rows_of(pairs, "ruled.jsonl")[0]["when"] == "2026-01-02 00:00:00"
    said = capsys.readouterr().err
    assert "ruled.jsonl: what JSON does not know, such as dates, stands as text in raw, when" in said
    assert "these rubrics were there already" in said


def test_writing_goes_on_where_it_stopped(pairs, capsys):  # noqa: F811
    command = [pairs, "--generator.endpoint.tries", 1, "--generator.endpoint.url"]
    with served("500", "500", always=both()) as (url, _):
        assert main(rubrics(*command, url)) == 1
    assert "2 of 6 rubrics never came" in capsys.readouterr().err
    assert not (pairs / "ruled.jsonl").exists()
    with served(always=both()) as (url, chat):
        assert main(rubrics(*command, url)) == 0
        assert len(chat.asked) == 2


def test_what_is_there_is_not_written_over(pairs, capsys):  # noqa: F811
    (pairs / "ruled.jsonl").write_text('{"rubric": "mine"}\n')
    with served(always=both()) as (url, chat):
        assert main(rubrics(pairs, "--generator.endpoint.url", url)) == 1
        assert "ruled.jsonl is there and is not what this command writes" in capsys.readouterr().err
        give(pairs / "pairs.jsonl", None, "Be kind.")
        assert main(rubrics(pairs, "--generator.endpoint.url", url, output="other.jsonl")) == 1
        assert "pairs.jsonl:2 has a rubric already" in capsys.readouterr().err
        assert not chat.asked


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "no generator is named. Give its folder as GENERATOR"),
        (["--generator.endpoint.url", "http://x/v1", "--generator.model.path", "g"], "Give one"),
        (["--generator.model.path", "g", "--data.given_rubrics", "true"], "these rubrics are still to be written"),
        (["--generator.model.path", "g", "--votes", "2"], "votes"),
    ],
)
def test_mistakes_are_told(pairs, capsys, more, words):  # noqa: F811
    assert main(rubrics(pairs, *more)) == 2
    assert words in capsys.readouterr().err


def test_a_generator_here_writes_what_an_evaluation_shows(pairs, world, capsys):  # noqa: F811
    """The same model on the same prompts, whichever command asks it."""
    drawn = ["--generator.model.dtype", "float32", "--generator.max_new_tokens", 6]
    generator = world / "reference"
    assert main(["rubrics", str(generator), *rubrics(pairs, *drawn)[1:]]) == 0
    asked = ["--judge", "rubric_judge", "--generator", generator, *drawn, "--sampling.max_new_tokens", 4]
    assert main(["judge", str(generator), *judge(pairs, "--model.dtype", "float32", *asked)[1:]]) == 0
    assert [row["rubric"] for row in rows_of(pairs, "ruled.jsonl")] == [row["rubric"] for row in rows_of(pairs)]
    assert main(["rubrics", str(generator), *rubrics(pairs, *drawn, "--dry-run", output="more.jsonl")[1:]]) == 0
    assert "answers to be asked for: 6, to 6 questions" in capsys.readouterr().out
    assert not (pairs / "more.jsonl").exists()


# ---- Judging by them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pointwise", "rubric_judge"])
def test_a_file_is_judged_by_its_own_rubrics_as_by_the_generator_that_wrote_them(pairs, kind):  # noqa: F811
    def answer(request):
        user = request["messages"][-1]["content"]
        if "<response>" not in user:
            return both()(request)
        good = GOOD in user[user.index("<response>") :]
        return 200, completion(FORM.format(8 if good and SECTION in user else 3))

    with served(always=answer) as (url, chat):
        here = ["--endpoint.url", url, "--judge", kind]
        assert main(judge(pairs, *here, "--generator.endpoint.url", url)) == 0
        asked = [one["messages"] for one in chat.asked if "<response" in one["messages"][-1]["content"]]
        give(pairs / "pairs.jsonl", RUBRIC_TEXT)
        chat.asked.clear()
        assert main(judge(pairs, *here, "--data.given_rubrics", "true", output="by_column.jsonl")) == 0
        assert sorted(map(str, asked)) == sorted(str(one["messages"]) for one in chat.asked)
    found, by_column = rows_of(pairs), rows_of(pairs, "by_column.jsonl")
    for one, other in zip(found, by_column, strict=True):
        assert (one["prefers"], one["rubric"]) == (other["prefers"], other["rubric"]) == ("chosen", RUBRIC_TEXT)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--generator", "g"], "each would write the rubrics"),
        (["--judge", "baseline"], "data.given_rubrics is true, and a baseline judge reads no rubric of one"),
        (["--rubrics", "generated"], "by which a judge reads none but its own"),
    ],
)
def test_rubrics_that_would_not_be_read_are_refused(pairs, capsys, more, words):  # noqa: F811
    given = ["m", "--data.given_rubrics", "true", *more]
    assert main(["judge", *given, *judge(pairs)[1:]]) == 2
    assert words in capsys.readouterr().err


def test_an_evaluation_names_what_reads_them(pairs, capsys):  # noqa: F811
    given = ["--model", "m", "--data", str(pairs / "pairs.jsonl"), "--output", str(pairs / "out")]
    assert main(["eval", "pairs", *given, "--data.given_rubrics", "true"]) == 2
    assert "judge the file with `patarm judge`, which does" in capsys.readouterr().err


def test_rows_without_a_rubric_are_counted_and_a_file_without_any_is_refused(pairs):  # noqa: F811
    path = pairs / "pairs.jsonl"
    section = DataSection(path=str(path), given_rubrics=True)
    with pytest.raises(UserError, match=r"no row of .* has a rubric in the column rubric"):
        read_preferences(section)
    give(path, None, "  ", RUBRIC_TEXT)
    read, report = read_preferences(section)
    assert [one.rubric for one in read] == ["", "", *[RUBRIC_TEXT] * 5]
    assert f"2 have no rubric and are judged without a given one [{path}:1]" in str(report)
    read, report = read_preferences(DataSection(path=str(path)))
    assert not any(one.rubric for one in read)


# ---- Training by them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [POINTWISE, PAIRWISE], ids=lambda form: form.name)
def test_what_is_learnt_from_shows_them_in_place_of_the_primary_ones(pairs, world, form):  # noqa: F811
    give(pairs / "pairs.jsonl", RUBRIC_TEXT)
    section = DataSection(path=str(pairs / "pairs.jsonl"), given_rubrics=True, missing_judgements="template")
    tokenizer, room = load_tokenizer(world / "model"), Room(4096, 0, "")
    for read in (read_preferences(section), read_judged_preferences(section, form)):
        records, _ = encode_pairs(tokenizer, read[0], "adaptive", section, room, form)
        for record in records:
            for prompt in record.prompt_tokens:
                text = decode(tokenizer, prompt.tolist())
                assert SECTION in text and text.count("<rubrics>") == 2  # the instruction names the tag too


@pytest.mark.long
def test_a_run_by_them_says_so_in_what_it_exports_and_is_another_run_without(world, started, tmp_path):
    for name in ("pairs", "heldout"):
        path = world / f"{name}.jsonl"
        (tmp_path / path.name).write_text(path.read_text())
        give(tmp_path / path.name, "1. The response is kind. [Principle]")
    config = config_file(
        world, "given", "sft", heldout={"path": str(tmp_path / "heldout.jsonl")}, run={"steps": 2},
        data={"path": str(tmp_path / "pairs.jsonl"), "given_rubrics": True},
    )  # fmt: skip
    started("sft", config).end(VAIN["sft"])
    export = world / "given" / "export"
    assert json.loads((export / "judge.json").read_text()) == {
        "judge": "pointwise", "rubrics": "adaptive", "given_rubrics": True,
    }  # fmt: skip
    card = (export / "README.md").read_text()
    assert "| rubrics | adaptive, with given ones in place of the primary ones |" in card
    assert "--output scores.jsonl --generator GENERATOR\n" in card
    assert 'rubrics="adaptive", rubric="1. The response names the sum. [Hard Rule]")' in card
    assert "give another run folder" in started("sft", config, "--data.given_rubrics", "false").end(1)
    asked = ["--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "s.jsonl", "--sampling.max_new_tokens", 4]
    asked += ["--model.dtype", "float32"]
    said = started("judge", world / "given", *asked).end()
    assert "given was trained with rubrics adaptive, with given ones" in said
    (tmp_path / "s.jsonl").unlink()
    said = started("judge", world / "given", *asked, "--data.given_rubrics", "true").end()
    assert "was trained with" not in said
