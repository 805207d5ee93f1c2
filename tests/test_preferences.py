"""Rows of every form become the same preferences; nothing is lost uncounted; each mistake gets its one sentence."""

import json
from dataclasses import replace

import datasets
import pytest

from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons as p
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.data.preferences import read_labelled_preferences, read_preferences
from patarm_jax.data.sft import template_choice, template_judgement
from patarm_jax.judge.forms import PAIRWISE
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.types import CHOSEN, REJECTED, Preference, Status, UsageError, UserError

USER = {"role": "user", "content": "The sky is"}
BLUE, GREEN = {"role": "assistant", "content": " blue."}, {"role": "assistant", "content": " green."}
SYSTEM = {"role": "system", "content": "Be brief."}
EXPLICIT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
SKY = Preference("x.jsonl:1", (USER,), " blue.", " green.", "chat", "")

JUDGEMENT = "<think>a</think><generate_rubrics>b</generate_rubrics><eval>c</eval><answer>8</answer>"


def write(folder, rows, name="x.jsonl"):
    """A file of rows, and the section that reads it."""
    path = folder / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
        )
    return DataSection(path=str(path), domain="chat")


def dropped(folder, *rows, **section):
    """What is counted as dropped when a good row stands beside these."""
    kept, report = read_preferences(replace(write(folder, [*rows, EXPLICIT]), **section))
    assert len(kept) == report.kept == 1
    assert report.kept + sum(report.dropped.values()) == len(rows) + 1
    return report.dropped


def refusal(section, kind=UserError, read=read_preferences):
    with pytest.raises(kind) as error:
        read(section)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- The forms ------------------------------------------------------------------------------------------------------

FORMS = {
    "explicit strings": EXPLICIT,
    "explicit messages": {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
    "implicit strings": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "implicit messages": {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "prompt text, message responses": EXPLICIT | {"chosen": [BLUE], "rejected": [GREEN]},
    "prompt messages, text responses": EXPLICIT | {"prompt": [USER]},
    "text beside a message": EXPLICIT | {"chosen": [BLUE]},
    "prompt text, whole dialogues": EXPLICIT | {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "prompt messages, whole dialogues": {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "empty optional columns": EXPLICIT | {"id": None, "source": None, "domain": None, "chosen_judgement": None},
    "null prompt": {"prompt": None, "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "larger messages": {"chosen": [USER | {"name": "Ann"}, BLUE], "rejected": [USER, GREEN | {"name": None}]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_form_in_every_file_is_the_same_preference(tmp_path, form, suffix):
    kept, report = read_preferences(write(tmp_path, [FORMS[form]], "x" + suffix))
    assert kept == [replace(SKY, id=f"x{suffix}:1")]
    assert (report.kept, report.dropped, report.renamed) == (1, {}, 0)


@pytest.mark.parametrize("prompt", ["The sky is", [USER], [SYSTEM, USER], None])
def test_a_dialogue_may_say_more_than_the_prompt_column(tmp_path, prompt):
    row = {"prompt": prompt, "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}
    assert read_preferences(write(tmp_path, [row]))[0] == [replace(SKY, prompt=(SYSTEM, USER))]


def trl_extract_prompt(chosen, rejected):
    """TRL's `extract_prompt`, in the cases where it is well-defined: both sides share a first character and differ."""
    for index in range(min(len(chosen), len(rejected))):
        if chosen[index] != rejected[index]:
            if chosen[index - 1] == " ":
                index -= 1
            break
    return chosen[:index], chosen[index:], rejected[index:]


@pytest.mark.parametrize("chosen, rejected", [("A b", "A c"), ("A  b", "A  c"), ("Ces é x", "Ces é yy")])
def test_a_sentence_that_both_complete_is_split_where_trl_splits_it(tmp_path, chosen, rejected):
    """Where TRL would cut inside a word, or inside an answer, we do not: see tests/test_dialogues.py."""
    [got], _ = read_preferences(write(tmp_path, [{"chosen": chosen, "rejected": rejected}]))
    assert (got.prompt[0]["content"], got.chosen, got.rejected) == trl_extract_prompt(chosen, rejected)


def test_a_json_file_may_be_an_object_with_one_list(tmp_path):
    section = write(tmp_path, {"version": 2, "data": [EXPLICIT]}, "x.json")
    assert read_preferences(section)[0] == [replace(SKY, id="x.json:1")]


def test_a_folder_is_its_files_in_order(tmp_path):
    for name in ("b.json", "a.jsonl", "c.parquet"):
        write(tmp_path, [EXPLICIT, EXPLICIT], name)
    (tmp_path / "README.md").write_text("not data")
    kept, _ = read_preferences(DataSection(path=str(tmp_path), domain="chat"))
    assert [each.id for each in kept] == [f"{name}:{n}" for name in ("a.jsonl", "b.json", "c.parquet") for n in (1, 2)]


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    section = write(tmp_path, [])
    (tmp_path / "x.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(EXPLICIT).encode() + b"\r\n\n" + json.dumps(EXPLICIT).encode()
    )
    assert [each.id for each in read_preferences(section)[0]] == ["x.jsonl:1", "x.jsonl:3"]


# ---- Data sets people have, by mapping alone ------------------------------------------------------------------------


def test_math_step_dpo(tmp_path):
    row = {
        "dataset": "gsm8k", "prompt": "2 + 2?", "initial_reason_steps": "Step 1: count. Step 2:", "chosen": " a",
        "rejected": " b", "full_chosen": " It is 4.", "full_rejected": " It is 5.", "answer": "4",
    }  # fmt: skip
    columns = {side: ("initial_reason_steps", f"full_{side}") for side in ("chosen", "rejected")}
    section = replace(write(tmp_path, [row], "x.parquet"), domain="math", columns=columns | {"source": ("dataset",)})
    [got], _ = read_preferences(section)
    prompt = ({"role": "user", "content": "2 + 2?"},)
    steps = "Step 1: count. Step 2:"
    assert got == Preference("x.parquet:1", prompt, f"{steps} It is 4.", f"{steps} It is 5.", "math", "gsm8k")


def test_code_preference(tmp_path):
    row = {"input": "The sky is", "accepted": " blue.", "rejected": " green.", "ID": 7}
    columns = {"prompt": ("input",), "chosen": ("accepted",), "id": ("ID",)}
    section = replace(write(tmp_path, [row]), domain="code", columns=columns)
    assert read_preferences(section)[0] == [replace(SKY, id="7", domain="code")]


def test_skywork(tmp_path):
    sources = ("magpie_ultra", "helpsteer2", "wildguard")
    rows = [{"chosen": [USER, BLUE], "rejected": [USER, GREEN], "source": source} for source in sources]
    section = replace(
        write(tmp_path, rows, "x.parquet"), drop_sources=("magpie_ultra",), source_domains={"wildguard": "Safety"}
    )
    kept, report = read_preferences(section)
    assert [(each.id, each.source, each.domain) for each in kept] == [
        ("x.parquet:2", "helpsteer2", "chat"),
        ("x.parquet:3", "wildguard", "safety"),
    ]
    assert report.dropped == {p.DROPPED_SOURCE: 1}


def test_the_real_preferences(real_inputs):
    section = DataSection(path=str(real_inputs / "preferences.jsonl"), domain="chat")
    kept, report = read_preferences(section)
    assert (report.kept, report.dropped, report.renamed) == (1600, {p.EMPTY_RESPONSE: 1}, 0)
    assert sum(len(each.prompt) > 1 for each in kept) == 186  # have several turns
    assert len({each.id for each in kept}) == len(kept) == 1600
    kept, report = read_preferences(replace(section, domain="", source_domains={"llmbar": "instruction following"}))
    assert {each.domain for each in kept} == {"instruction_following"}
    assert (report.kept, report.dropped) == (464, {p.UNKNOWN_DOMAIN: 1601 - 465, p.EMPTY_RESPONSE: 1})


# ---- Domain and id --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instruction_following", "Instruction Following", " INSTRUCTION-FOLLOWING "])
def test_a_domain_by_any_spelling(tmp_path, name):
    by_row, by_source, by_config = (tmp_path / folder for folder in ("row", "source", "config"))
    for folder in (by_row, by_source, by_config):
        folder.mkdir()
    for section in (
        write(by_row, [EXPLICIT | {"domain": name}]),
        replace(write(by_source, [EXPLICIT | {"source": "s"}]), source_domains={"s": name}),
        replace(write(by_config, [EXPLICIT]), domain=name),
    ):
        assert read_preferences(section)[0][0].domain == "instruction_following"


def test_the_row_knows_its_domain_better_than_its_source_and_that_better_than_the_config(tmp_path):
    rows = [EXPLICIT | {"source": "s", "domain": "math"}, EXPLICIT | {"source": "s"}, EXPLICIT]
    kept, _ = read_preferences(replace(write(tmp_path, rows), source_domains={"s": "code"}))
    assert [each.domain for each in kept] == ["math", "code", "chat"]


def test_ids_are_unique(tmp_path):
    rows = [EXPLICIT | {"id": name} for name in ("a", "a", "b", "a", "a#2", 0)]
    kept, report = read_preferences(write(tmp_path, rows))
    assert [each.id for each in kept] == ["a", "a#2", "b", "a#3", "a#2#2", "0"]
    assert report.renamed == 3
    assert "3 ids were taken" in str(report)


# ---- Dropped and counted --------------------------------------------------------------------------------------------

DROPPED = [
    (EXPLICIT | {"chosen": " \n"}, p.EMPTY_RESPONSE),
    (EXPLICIT | {"rejected": None}, p.EMPTY_RESPONSE),
    (EXPLICIT | {"prompt": " "}, p.EMPTY_PROMPT),
    (EXPLICIT | {"prompt": []}, p.EMPTY_PROMPT),
    ({"chosen": [BLUE], "rejected": [GREEN]}, p.EMPTY_PROMPT),
    (EXPLICIT | {"prompt": [USER, BLUE]}, p.NOT_USERS_TURN),
    (EXPLICIT | {"prompt": [SYSTEM]}, p.NOT_USERS_TURN),
    (EXPLICIT | {"rejected": " blue. "}, p.IDENTICAL),
    ({"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, p.IDENTICAL),
    ({"prompt": None, "chosen": "blue", "rejected": "green"}, p.EMPTY_PROMPT),
    ({"chosen": "same", "rejected": "same "}, p.IDENTICAL),
    (EXPLICIT | {"chosen": "\u200b\u2060"}, p.EMPTY_RESPONSE),
    (EXPLICIT | {"chosen": "The  sky.\n", "rejected": "The sky."}, p.IDENTICAL),
    (EXPLICIT | {"chosen": "if a:\r\n    b", "rejected": "if a:\n    b\n"}, p.IDENTICAL),
    ({"chosen": "The sky is", "rejected": [USER, GREEN]}, p.TEXT_AND_MESSAGES),
    ({"chosen": [USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, p.UNEQUAL_PREFIXES),
    ({"chosen": [USER, BLUE], "rejected": [USER | {"content": "The sea is"}, GREEN]}, p.UNEQUAL_PREFIXES),
    ({"chosen": [USER, BLUE, USER], "rejected": [USER, BLUE, SYSTEM]}, p.NOT_ONE_MESSAGE),
    ({"chosen": [], "rejected": []}, p.NOT_ONE_MESSAGE),
    (EXPLICIT | {"chosen": [], "rejected": [GREEN]}, p.NOT_ONE_MESSAGE),
    (EXPLICIT | {"chosen": [USER], "rejected": [GREEN]}, p.NOT_ONE_MESSAGE),
    (EXPLICIT | {"prompt": "Else?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, p.OTHER_PROMPT),
    (EXPLICIT | {"chosen": " \ud83d"}, p.NOT_UNICODE),
    (EXPLICIT | {"id": "a\ud83d"}, p.NOT_UNICODE),
    (EXPLICIT | {"source": "a\ud83d"}, p.NOT_UNICODE),
]


@pytest.mark.parametrize(("row", "reason"), DROPPED)
def test_what_teaches_nothing_is_dropped_and_counted(tmp_path, row, reason):
    assert dropped(tmp_path, row) == {reason: 1}


def test_counts_add_up_to_the_rows(tmp_path):
    rows = [row for row, _ in DROPPED] * 2
    counts = dropped(tmp_path, *rows)
    assert counts == {reason: 2 * [r for _, r in DROPPED].count(reason) for _, reason in DROPPED}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_nothing_left_is_an_error_with_the_counts_and_the_first_of_each(tmp_path):
    rows = [EXPLICIT | {"chosen": ""}] * 2 + [EXPLICIT | {"domain": "poetry"}]
    message = refusal(replace(write(tmp_path, rows), domain=""))
    assert "no usable preference" in message
    assert f"kept 0 of 3; dropped 2 × empty response [{tmp_path / 'x.jsonl'}:1]; 1 × no domain" in message
    assert f"[{tmp_path / 'x.jsonl'}:3]" in message and "set data.domain" in message


def test_pairs_that_stand_twice_are_kept_and_counted(tmp_path):
    turned = EXPLICIT | {"chosen": "green.", "rejected": "blue."}
    kept, report = read_preferences(write(tmp_path, [EXPLICIT, EXPLICIT | {"id": "b"}, turned, EXPLICIT]))
    assert report.kept == len(kept) == 4
    assert report.notes == (
        f"2 kept rows repeat an earlier pair [{tmp_path / 'x.jsonl'}:2]",
        f"1 kept row repeats an earlier pair with chosen and rejected exchanged [{tmp_path / 'x.jsonl'}:3]",
    )


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"\n', ["x.jsonl:2 is not JSON", "column", "one JSON object per line"]),
        ('{"prompt": "a", "ch', ["x.jsonl:2 is not JSON", "without a line end", "fetch it again"]),
        ("[1]\n", ["x.jsonl:2 holds list", "column: value"]),
        (b"\xff\xfe\n", ["x.jsonl:2 is not UTF-8", "Save the file as UTF-8"]),
        ("[" * 100_000 + "\n", ["x.jsonl:2 is nested too deeply", "list of messages"]),
        ('{"chosen": "a", "rejected": ' + "9" * 5000 + "}\n", ["x.jsonl:2", "too many digits", "as text"]),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_what_was_got_and_what_to_do(tmp_path, content, words):
    section = write(tmp_path, [EXPLICIT])
    with (tmp_path / "x.jsonl").open("ab") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    message = refusal(section)
    assert all(word in message for word in words), message


def test_no_depth_of_nesting_is_a_traceback(tmp_path):
    section = write(tmp_path, [EXPLICIT])
    for depth in range(800, 1000):  # somewhere here json's reader gives up; what it still reads, the error must show
        (tmp_path / "x.jsonl").write_text('{"chosen": [' + "[" * depth + "]" * depth + '], "rejected": "a"}')
        assert "list of messages" in refusal(section) or "message in chosen that is not of the form" in refusal(section)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", "", ["x.jsonl is empty", "one preference per row"]),
        ("x.jsonl", " \n\n", ["x.jsonl is empty"]),
        ("x.json", "", ["x.json is empty"]),
        ("x.json", "[]", ["x.json is empty"]),
        ("x.json", "[\n{,}]", ["x.json:2 is not JSON", "Fix it"]),
        ("x.json", "{}\n{}\n", ["x.json:2 is not JSON", "name it .jsonl"]),
        ("x.json", '[{"chosen":' * 100_000, ["x.json is nested too deeply", "list of messages"]),
        ("x.json", "[" + "9" * 5000 + "]", ["x.json holds a number of too many digits", "as text"]),
        ("x.json", "3", ["x.json holds int", "a list of rows"]),
        ("x.json", '{"a": [], "b": []}', ["x.json holds an object with 2 lists", "one list of rows"]),
        ("x.json", '[{"chosen": "a", "rejected": "ab"}, 3]', ["x.json, row 2 holds int"]),
        ("x.parquet", "nonsense", ["cannot read", "x.parquet", "Give a parquet file"]),
        ("x.txt", "chosen,rejected", ["x.txt", "by its name", ".jsonl, .json, .csv or .tsv", ".parquet or .arrow"]),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_what_was_got_and_what_to_do(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    message = refusal(DataSection(path=str(tmp_path / name), domain="chat"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("", UsageError, ["data.path is empty", "Hub id"]),
        ("no/such/file", UserError, ["no/such/file does not exist", "Hub id"]),
        ("data/pairs.jsonl", UserError, ["data/pairs.jsonl does not exist"]),
        ("org/nowhere", UserError, ["split train of org/nowhere", "no local file", "data.path, data.split"]),
    ],
)
def test_a_path_that_leads_nowhere(path, kind, words):
    message = refusal(DataSection(path=path), kind)
    assert all(word in message for word in words), message


def test_a_hub_data_set_is_loaded_by_its_id_and_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load_dataset(path, split):
        assert (path, split) == ("org/sky", "train[:1]")
        return datasets.Dataset.from_list([EXPLICIT])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    kept, _ = read_preferences(DataSection(path="org/sky", split="train[:1]", domain="chat"))
    assert kept == [replace(SKY, id="org/sky:1")]
    write(tmp_path, [EXPLICIT])
    (tmp_path / "x.jsonl").rename(tmp_path / "sky")  # a local path is never taken for a Hub id
    (tmp_path / "org").mkdir()
    (tmp_path / "sky").rename(tmp_path / "org" / "sky")
    assert "cannot tell what org/sky is" in refusal(DataSection(path="org/sky", domain="chat"))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"columns": {"answer": ("a",)}}, ["data.columns maps answer", "chosen, rejected"]),
        ({"columns": {"chosen": ()}}, ["data.columns maps chosen to []"]),
        ({"domain": "poetry"}, ["data.domain is 'poetry'", "chat, math"]),
        ({"source_domains": {"s": "poetry"}}, ["data.source_domains.s is 'poetry'"]),
        ({"domains": {"stem": "poetry"}}, ["data.domains.stem is 'poetry'", "chat, math"]),
        ({"domains": {"A b": "chat", "a-B": "math"}}, ["data.domains gives a-B two domains"]),
    ],
)
def test_a_data_section_that_cannot_be_meant(tmp_path, section, words):
    message = refusal(replace(write(tmp_path, [EXPLICIT]), **section), UsageError)
    assert all(word in message for word in words), message


def test_a_mapped_column_must_be_there_and_be_text_to_be_joined(tmp_path):
    section = replace(write(tmp_path, [EXPLICIT]), columns={"source": ("sauce",)})
    assert "x.jsonl:1 has no column sauce; it has prompt, chosen, rejected" in refusal(section)
    section = replace(write(tmp_path, [EXPLICIT | {"steps": [USER]}]), columns={"chosen": ("steps", "chosen")})
    assert "1 × steps that is a list, where only text can be joined" in refusal(section)


# ---- Judgements -----------------------------------------------------------------------------------------------------


def test_judgements_are_read_from_their_columns(tmp_path):
    rows = [EXPLICIT | {"good": JUDGEMENT, "rejected_judgement": JUDGEMENT.replace("8", "2")}]
    section = replace(write(tmp_path, rows), columns={"chosen_judgement": ("good",)})
    [judged], report = read_judged_preferences(section)
    assert judged.preference == SKY
    assert judged.judgements == (JUDGEMENT, JUDGEMENT.replace("8", "2"))
    assert report.kept == 1


def test_a_judgement_out_of_form_is_dropped_and_counted(tmp_path):
    good = EXPLICIT | {"chosen_judgement": JUDGEMENT, "rejected_judgement": JUDGEMENT}
    rows = [
        good,
        good | {"rejected_judgement": "It is bad."},
        good | {"chosen_judgement": JUDGEMENT.replace("8", "11")},
    ]
    judged, report = read_judged_preferences(write(tmp_path, rows))
    assert (len(judged), report.dropped) == (1, {p.BAD_JUDGEMENT: 2})


def test_a_missing_judgement_is_refused_or_written(tmp_path):
    section = write(tmp_path, [EXPLICIT | {"chosen_judgement": JUDGEMENT, "rejected_judgement": ""}])
    message = refusal(section, read=read_judged_preferences)
    assert "x.jsonl:1 has no rejected_judgement" in message
    assert "data.missing_judgements to template" in message
    message = refusal(replace(section, missing_judgements="drop"), read=read_judged_preferences)
    assert "kept 0 of 1; dropped 1 × no judgement [" in message
    [judged], _ = read_judged_preferences(replace(section, missing_judgements="template"))
    assert judged.judgements == (JUDGEMENT, template_judgement(SKY, REJECTED))


@pytest.mark.parametrize("domain", ["chat", "math", "code", "safety", "instruction_following"])
def test_a_template_judgement_is_in_form_and_on_the_right_side(domain):
    scores = {CHOSEN: set(), REJECTED: set()}
    for side, found in scores.items():
        for number in range(60):
            judgement = parse_pointwise(template_judgement(replace(SKY, id=str(number), domain=domain), side))
            assert judgement.status is Status.OK
            found.add(judgement.score)
    assert scores == {CHOSEN: {6, 7, 8, 9}, REJECTED: {1, 2, 3, 4}}


CHOICE = "<think>t</think><generate_rubrics>r</generate_rubrics><eval>Response {} is right.</eval><answer>{}</answer>"


def choice(letter: str) -> str:
    return CHOICE.format(letter, letter)


def test_a_choice_in_one_order_is_taught_in_both(tmp_path):
    rows = [EXPLICIT | {"pairwise_judgement": choice("A")}, EXPLICIT | {"pairwise_judgement_swapped": choice("B")}]
    judged, _ = read_judged_preferences(write(tmp_path, rows), PAIRWISE)
    assert [one.judgements for one in judged] == [(choice("A"), choice("B"))] * 2


def test_choices_that_cannot_be_taught_are_dropped_and_counted(tmp_path):
    good = EXPLICIT | {"pairwise_judgement": choice("A")}
    unsure = choice("A").replace("is right", "names option B")
    rows = [
        good,
        good | {"pairwise_judgement": choice("B")},
        good | {"pairwise_judgement": JUDGEMENT},
        good | {"pairwise_judgement": unsure},
        good | {"pairwise_judgement": unsure, "pairwise_judgement_swapped": choice("B")},
    ]
    judged, report = read_judged_preferences(write(tmp_path, rows), PAIRWISE)
    assert [one.judgements[0] for one in judged] == [choice("A"), choice("B"), unsure]
    assert report.dropped == {p.BAD_JUDGEMENT: 1, p.NOT_MIRRORED: 1}
    assert report.notes[-1] == "1 judgements with the chosen response first choose the rejected one"


def test_a_missing_choice_is_refused_or_written(tmp_path):
    section = write(tmp_path, [EXPLICIT | {"chosen_judgement": JUDGEMENT, "rejected_judgement": JUDGEMENT}])
    message = refusal(section, read=lambda given: read_judged_preferences(given, PAIRWISE))
    assert "x.jsonl:1 has no pairwise_judgement" in message
    [judged], _ = read_judged_preferences(replace(section, missing_judgements="template"), PAIRWISE)
    assert judged.judgements == (template_choice(SKY, 0), template_choice(SKY, 1))


# ---- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labels_are_numbers_from_0_to_10(tmp_path, suffix):
    given = [(7, 2.5), (0, 10), (11, 2), (-1, 2), (None, 2), (float("nan"), 2)]
    rows = [EXPLICIT | {"score_chosen": chosen, "rejected_score": rejected} for chosen, rejected in given]
    section = replace(write(tmp_path, rows, "x" + suffix), columns={"chosen_score": ("score_chosen",)})
    labelled, report = read_labelled_preferences(section)
    assert [one.labels for one in labelled] == [(7.0, 2.5), (0.0, 10.0)]
    assert report.dropped == {p.LABEL_OUT_OF_RANGE: 2, p.NO_LABEL: 2}


def test_labels_that_are_missing_throughout_are_refused(tmp_path):
    message = refusal(write(tmp_path, [EXPLICIT]), read=read_labelled_preferences)
    assert "data.columns.chosen_score score_chosen" in message
