"""An odd cell costs its own row, by name and place; what people write in cells is read; domains by their words."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patarm_jax.config.load import load
from patarm_jax.config.recipes import JudgeConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons as p
from patarm_jax.data.preferences import read_preferences
from patarm_jax.types import UserError

CASES = Path(__file__).parents[2] / "shared" / "cases"
USER, BLUE = {"role": "user", "content": "The sky is"}, {"role": "assistant", "content": "blue."}
GREEN = {"role": "assistant", "content": "green."}
GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def write(folder, *rows):
    """A file of rows, and the section that reads it."""
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(str(folder / "x.jsonl"), domain="chat")


def read_one(folder, row):
    """The preference of a row that stands beside a good one; the reason where it is dropped."""
    kept, report = read_preferences(write(folder, GOOD, row))
    assert len(kept) == report.kept == 2 - sum(report.dropped.values())
    if report.dropped:
        ((reason, count),) = report.dropped.items()
        assert count == 1 and report.first == {reason: f"{folder / 'x.jsonl'}:2"}
        return reason
    return kept[1]


def all_wrong(folder, row):
    with pytest.raises(UserError) as error:
        read_preferences(write(folder, *[row] * 3))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Odd cells ------------------------------------------------------------------------------------------------------

IMAGE = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}]
ODD = [
    ({"rejected": [{"role": "assistant", "content": None, "tool_calls": []}]}, "message without text in rejected"),
    ({"rejected": [{"role": "assistant", "content": math.nan}]}, "message without text in rejected"),
    ({"rejected": [{"role": "assistant"}]}, "message without text in rejected"),
    ({"prompt": [{"role": "user", "content": IMAGE}]}, "message in prompt that holds something else than text"),
    ({"prompt": [{"role": "user", "content": {"a": 1}}]}, "message in prompt that holds something else than text"),
    ({"prompt": [{"role": "user", "content": True}]}, "message in prompt that holds something else than text"),
    ({"prompt": [{"role": "a b", "content": "x"}]}, "message in prompt whose role is not a word"),
    ({"prompt": [{"role": "", "content": "x"}]}, "message in prompt whose role is not a word"),
    ({"prompt": [{"content": "x"}]}, "message in prompt that is not of the form"),
    ({"prompt": [{"role": 1, "content": "x"}]}, "message in prompt that is not of the form"),
    ({"chosen": ["x"]}, "message in chosen that is not of the form"),
    ({"chosen": [None]}, "message in chosen that is not of the form"),
    ({"chosen": [["x"]]}, "message in chosen that is not of the form"),
    ({"chosen": {"text": "x"}}, "chosen that is an object, neither text nor a list of messages"),
    ({"chosen": True}, "chosen that is true or false"),
    ({"chosen": 1.5}, "chosen that is a number"),
    ({"chosen": math.inf}, "chosen that is a number"),
    ({"chosen": math.nan}, "empty response"),
    ({"rejected": None}, "empty response"),
    ({"prompt": math.nan}, "empty prompt"),
    ({"prompt": None}, "empty prompt"),
    ({"id": True}, "id that is true or false, not text"),
    ({"id": [1]}, "id that is a list, not text"),
    ({"source": {"a": 1}}, "source that is an object, not text"),
    ({"domain": ["chat"]}, "domain that is a list, not text"),
    ({"id": math.inf}, "id that is a number, not text"),
    ({"chosen": '[{"role": "assistant", "content": "x"'}, "chosen that looks like messages written as text"),
    ({"chosen": "[{'role': 'assistant', 'content': 'x'}\n {'role': 'user'"}, "chosen that looks like messages"),
]


@pytest.mark.parametrize(("cells", "reason"), ODD)
def test_an_odd_cell_costs_its_row_and_no_other(tmp_path, cells, reason):
    assert read_one(tmp_path, GOOD | cells).startswith(reason)


@pytest.mark.parametrize(("cells", "reason"), ODD)
def test_a_column_that_is_wrong_in_every_row_is_named_with_the_first_place(tmp_path, cells, reason):
    message = all_wrong(tmp_path, GOOD | cells)
    assert f"kept 0 of 3; dropped 3 × {reason}" in message and f"[{tmp_path / 'x.jsonl'}:1]" in message


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_row_that_lacks_a_column_is_dropped_and_a_file_that_does_is_refused(tmp_path, name):
    lacking = {key: value for key, value in GOOD.items() if key != name}
    assert read_one(tmp_path, lacking) == (p.EMPTY_PROMPT if name == "prompt" else p.EMPTY_RESPONSE)
    kept, report = read_preferences(write(tmp_path, lacking, GOOD))  # it may be the first one
    assert (len(kept), sum(report.dropped.values())) == (1, 1)
    if name != "prompt":
        assert f"x.jsonl:1 has no column {name}" in all_wrong(tmp_path, lacking)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", " ", "x", "\ud83d", "[1]", '{"role": '
    '"user", "content": 1}', "[{'role': 'user', 'content': None}]", "\n\nHuman: a\n\nAssistant: b", "a\nb", "a b. c"]),
    st.text(max_size=4), st.lists(st.none() | st.text(max_size=2), max_size=2),
    st.lists(st.fixed_dictionaries({}, optional={
        "role": st.sampled_from(["user", "assistant", "gpt", "", 1]), "content": st.none() | st.text(max_size=3)
        | st.floats() | st.lists(st.dictionaries(st.sampled_from(["type", "text"]), st.none() | st.text(max_size=3))),
        "from": st.just("human"), "value": st.text(max_size=3)}), max_size=3),
    st.dictionaries(st.sampled_from(["role", "content", "messages", "from", "value"]), st.none() | st.lists(
        st.text(max_size=2), max_size=2) | st.text(max_size=3)),
)  # fmt: skip
NAMES = ["prompt", "chosen", "rejected", "id", "source", "domain", "conversations", "messages", "system", "question"]
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), max_size=6)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from(["", "chat"]))
def test_any_mixture_of_odd_cells_is_kept_or_dropped(tmp_path, rows, domain):
    """No row is lost uncounted, none is kept without two visible responses, and nothing is a traceback."""
    section = replace(write(tmp_path, *rows, GOOD | {"domain": "math"}), domain=domain)
    kept, report = read_preferences(section)
    assert len(kept) == report.kept and report.kept + sum(report.dropped.values()) == len(rows) + 1
    assert report.first.keys() == report.dropped.keys()
    assert len({one.id for one in kept}) == len(kept)
    for one in kept:
        assert one.chosen.strip() and one.rejected.strip() and one.prompt[-1]["role"] == "user"
        assert all(isinstance(turn["content"], str) for turn in one.prompt)


# ---- What people write ----------------------------------------------------------------------------------------------

SKY = ((USER,), "blue.", "green.")
PARTS = [{"type": "text", "text": "The "}, {"type": "text", "text": "sky is"}]
READ = {
    "JSON in text": {"prompt": json.dumps([USER]), "chosen": json.dumps([BLUE]), "rejected": json.dumps([GREEN])},
    "JSON in text, whole dialogues": {"chosen": json.dumps([USER, BLUE]), "rejected": json.dumps([USER, GREEN])},
    "one message in text": {"prompt": json.dumps(USER), "chosen": json.dumps(BLUE), "rejected": "green."},
    "as Python prints it": {"prompt": str([USER]), "chosen": str([BLUE]), "rejected": str([GREEN])},
    "parts": {"prompt": [{"role": "user", "content": PARTS}], "chosen": [BLUE], "rejected": [GREEN]},
    "one object": {"prompt": USER, "chosen": BLUE, "rejected": GREEN},
    "columns of lists": {
        "prompt": {"role": ["user"], "content": ["The sky is"]}, "chosen": [BLUE], "rejected": [GREEN]
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "The sky is"}],
        "chosen": {"from": "gpt", "value": "blue."}, "rejected": {"from": "gpt", "value": "green."},
    },
    "ShareGPT on both sides": {
        "chosen": [{"from": "human", "value": "The sky is"}, {"from": "gpt", "value": "blue."}],
        "rejected": [{"from": "human", "value": "The sky is"}, {"from": "gpt", "value": "green."}],
    },
    "OpenAI": {"messages": [USER], "chosen": "blue.", "rejected": "green."},
    "messages in an object": {"prompt": {"messages": [USER], "tools": []}, "chosen": [BLUE], "rejected": [GREEN]},
    "messages beside whole dialogues": {"messages": [USER, BLUE], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "capitals": {"prompt": [USER | {"role": "User"}], "chosen": [BLUE | {"role": "ASSISTANT"}], "rejected": "green."},
}  # fmt: skip


@pytest.mark.parametrize("form", READ)
def test_messages_in_the_forms_people_have_them(tmp_path, form):
    kept, report = read_preferences(write(tmp_path, READ[form]))
    assert [(one.prompt, one.chosen, one.rejected) for one in kept] == [SKY] and report.dropped == {}


def test_the_preference_form_of_openai_by_mapping(tmp_path):
    row = {"input": {"messages": [USER]}, "preferred_output": [BLUE], "non_preferred_output": [GREEN]}
    columns = {"prompt": ("input",), "chosen": ("preferred_output",), "rejected": ("non_preferred_output",)}
    ((one,), _) = read_preferences(replace(write(tmp_path, row), columns=columns))
    assert (one.prompt, one.chosen, one.rejected) == SKY


def test_the_system_column_of_llama_factory(tmp_path):
    row = READ["LLaMA-Factory"] | {"system": "Be brief."}
    ((one,), _) = read_preferences(write(tmp_path, row))
    assert one.prompt == ({"role": "system", "content": "Be brief."}, USER)


@pytest.mark.parametrize("text", ['{"role": "admin"}', '[{"role": "user"}]', "[1, 2]", '{"a": 1}', "{'role': 'x'}"])
def test_a_response_that_is_json_itself_stays_text(tmp_path, text):
    assert read_one(tmp_path, GOOD | {"chosen": text}).chosen == text


@pytest.mark.parametrize(
    ("value", "name"),
    [(0, "0"), (0.0, "0"), (7.0, "7"), (-3, "-3"), (0.5, "0.5"), ("0.0", "0.0"), (None, ""), (math.nan, ""), ("", "")],
)
def test_ids_and_sources_by_any_type(tmp_path, value, name):
    one = read_one(tmp_path, GOOD | {"id": value, "source": value})
    assert (one.id, one.source) == (name or "x.jsonl:2", name)


def test_ids_that_pandas_made_float(tmp_path):
    rows = pandas.DataFrame([GOOD | {"id": 0}, GOOD | {"id": None}, GOOD | {"id": 12}])
    rows.to_parquet(tmp_path / "x.parquet")
    kept, _ = read_preferences(DataSection(str(tmp_path / "x.parquet"), domain="chat"))
    assert [one.id for one in kept] == ["0", "x.parquet:2", "12"]


def test_responses_that_are_whole_numbers(tmp_path):
    one = read_one(tmp_path, GOOD | {"chosen": 4, "rejected": 5})
    assert (one.chosen, one.rejected) == ("4", "5")


# ---- Domains --------------------------------------------------------------------------------------------------------

WORDS = ("general", "stem", "code", "multilingual", "General")


def with_words(folder):
    return write(folder, *[GOOD | {"id": word, "domain": word} for word in WORDS])


def test_an_unknown_word_falls_back_to_the_domain_of_all(tmp_path):
    kept, report = read_preferences(with_words(tmp_path))
    assert [one.domain for one in kept] == ["chat", "chat", "code", "chat", "chat"]
    assert report.notes[0] == (
        "4 of a domain that is unknown by data.domain (general 1, stem 1, multilingual 1, General 1; "
        "data.domains can map them)"
    )


def test_words_can_be_mapped(tmp_path):
    section = replace(with_words(tmp_path), domains={"STEM": "math", "general": "Instruction Following", "x": "code"})
    kept, report = read_preferences(section)
    following = "instruction_following"
    assert [one.domain for one in kept] == [following, "math", "code", "chat", following]
    assert report.notes[:4] == (
        "2 of domain general by data.domains as instruction_following",
        "1 of domain stem by data.domains as math",
        "1 of a domain that is unknown by data.domain (multilingual 1; data.domains can map them)",
        "data.domains met no row of x",
    )
    assert [one.domain for one in read_preferences(replace(section, domains={"code": "math"}))[0]][2] == "math"


def test_a_source_comes_before_the_domain_of_all(tmp_path):
    rows = [GOOD | {"domain": "stem", "source": "a"}, GOOD | {"domain": "stem", "source": "b"}]
    section = replace(write(tmp_path, *rows), source_domains={"a": "math", "c": "code"}, drop_sources=("d",))
    kept, report = read_preferences(section)
    assert [one.domain for one in kept] == ["math", "chat"]
    assert report.notes[:3] == (
        "2 of a domain that is unknown by data.source_domains or data.domain (stem 2; data.domains can map them)",
        "data.source_domains met no row of c",
        "data.drop_sources met no row of d",
    )


def test_what_the_message_names_helps(tmp_path):
    section = replace(with_words(tmp_path), domain="")
    kept, report = read_preferences(section)
    assert len(kept) == 1 and report.dropped == {p.UNKNOWN_DOMAIN: 4}
    assert "set data.domain" in p.UNKNOWN_DOMAIN and "data.domains.stem math" in p.UNKNOWN_DOMAIN
    assert report.notes[0] == "the domains that are unknown are general 1, stem 1, multilingual 1, General 1"
    assert len(read_preferences(replace(section, domain="chat"))[0]) == 5
    assert len(read_preferences(replace(section, domains={"stem": "math"}))[0]) == 2


def test_domains_stand_in_yaml(tmp_path):
    (tmp_path / "judge.yaml").write_text("data: {domains: {stem: math, general: chat}}")
    assert load(JudgeConfig, tmp_path / "judge.yaml").data.domains == {"stem": "math", "general": "chat"}


# ---- The cases of the field -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        ("domain_column/pairs.jsonl", 20, None),
        ("float_id/pairs.parquet", 20, None),
        ("json_in_text/pairs.jsonl", 5, None),
        ("nan_optional/pairs.jsonl", 19, "empty response"),
        ("nan_optional/chosen.jsonl", 19, "empty response"),
        ("null_content/pairs.jsonl", 19, "message without text in rejected, such as a tool call"),
        ("null_content/null_text.jsonl", 19, "empty response"),
    ],
)
def test_the_cases_of_the_field(name, kept, dropped):
    if not CASES.is_dir():
        pytest.skip(f"small inputs of the field are not at {CASES}")
    preferences, report = read_preferences(DataSection(str(CASES / name), domain="chat"))
    assert (report.kept, report.dropped) == (kept, {dropped: 1} if dropped else {})
    assert not any(text.lstrip().startswith("[{") for one in preferences for text in (one.chosen, one.rejected))
