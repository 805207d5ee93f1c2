r"""Texts that contain the prompt are cut at their turns, or at the one certain place; never inside an answer."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from patarm_jax.config import DataSection
from patarm_jax.data import reasons as p
from patarm_jax.data.dialogues import cut_texts
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.reasons import Dropped

CASES = Path(__file__).parents[2] / "shared" / "cases"
GOOD = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


def read(folder, *rows):
    """What is kept of some rows, and the report."""
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(DataSection(str(path), domain="chat"))


def sides(folder, chosen, rejected, **more):
    """Prompt as (role, text), chosen and rejected of one row; the reason where it is dropped."""
    kept, report = read(folder, {"chosen": chosen, "rejected": rejected, **more}, {"prompt": None, **GOOD})
    if "prompt" in more:
        kept, report = read(folder, {"chosen": chosen, "rejected": rejected, **more}, GOOD)
    if len(kept) == 1:
        (reason,) = report.dropped
        return reason
    return [tuple(turn.values()) for turn in kept[0].prompt], kept[0].chosen, kept[0].rejected


def one(folder, chosen, rejected):
    """The same of a file that has no prompt column at all."""
    filler = {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    kept, report = read(folder, {"chosen": chosen, "rejected": rejected}, filler)
    if len(kept) == 1:
        (reason,) = report.dropped
        return reason
    return [tuple(turn.values()) for turn in kept[0].prompt], kept[0].chosen, kept[0].rejected


ASKED = [("user", "How long does rice take?")]
NOTATIONS = {
    "HH-RLHF": "\n\nHuman: How long does rice take?\n\nAssistant: {}",
    "HH-RLHF, other line ends": "\r\n\r\nHuman: How long does rice take?\r\n\r\nAssistant: {}",
    "lines": "User: How long does rice take?\nAssistant: {}",
    "LangChain": "Human: How long does rice take?\nAI: {}",
    "no user's mark": "How long does rice take?\n\nAssistant: {}",
    "Guanaco": "### Human: How long does rice take?### Assistant: {}",
    "Alpaca": "### Instruction:\nHow long does rice take?\n\n### Response:\n{}",
    "Vicuna": "USER: How long does rice take? ASSISTANT: {}</s>",
    "ChatML": "<|im_start|>user\nHow long does rice take?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow long does rice take?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    "Llama 2": "<s>[INST] How long does rice take? [/INST] {} </s>",
    "Gemma": "<bos><start_of_turn>user\nHow long does rice take?<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>\n",
    "Zephyr": "<|user|>\nHow long does rice take?</s>\n<|assistant|>\n{}</s>\n",
    "Open Assistant": "<|prompter|>How long does rice take?<|endoftext|><|assistant|>{}<|endoftext|>",
    "DeepSeek": "<｜User｜>How long does rice take?<｜Assistant｜>{}<｜end▁of▁sentence｜>",
    "questions": "Question: How long does rice take?\n\nAnswer: {}",
    "Q and A": "Q: How long does rice take?\nA: {}",
    "tasks": "Prompt: How long does rice take?\nResponse: {}",
    "summary": "How long does rice take?\n\nTL;DR: {}",
}
ALIKE = [
    ("I think rice takes 18 minutes.", "I think rice takes 180 minutes."),  # the texts part inside a number
    ("No, raw rice is hard.", "Not long."),  # inside a word
    ("Paris", "Paris, and it is in Spain."),  # one answer begins the other
    ("Sure!\n\nTake 18 minutes.\n\nDone.", "Sure!\n\nTake 18 minutes.\n\nOr not."),  # whole paragraphs alike
    ("Step 1.\nAnswer: 5", "Step 1.\nAnswer: 6"),  # a mark of another notation, or of the same, in the answer
]


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize(("chosen", "rejected"), ALIKE)
def test_the_cut_is_at_the_last_turn_whatever_the_answers_share(tmp_path, notation, chosen, rejected):
    text = NOTATIONS[notation]
    assert one(tmp_path, text.format(chosen), text.format(rejected)) == (ASKED, chosen, rejected)


def test_dialogues_of_several_turns_become_messages(tmp_path):
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\nHow are you?\n\nHuman: Fine.\nRice?\n\nAssistant: {}"
    turns = [("user", "Hi"), ("assistant", "Hello.\nHow are you?"), ("user", "Fine.\nRice?")]
    assert one(tmp_path, text.format("18"), text.format("180")) == (turns, "18", "180")
    text = "A chat with a helpful assistant. USER: Hi ASSISTANT: Hello.</s>USER: Rice? ASSISTANT: {}</s>"
    turns = [("system", "A chat with a helpful assistant."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Rice?")]
    assert one(tmp_path, text.format("18"), text.format("180")) == (turns, "18", "180")
    text = "Input: tea\nOutput: hot\nInput: ice\nOutput: {}"
    turns = [("user", "tea"), ("assistant", "hot"), ("user", "ice")]
    assert one(tmp_path, text.format("cold"), text.format("cool")) == (turns, "cold", "cool")


HH = "\n\nHuman: Rice?\n\nAssistant:{}"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (HH.format(" 18."), HH.format(""), p.EMPTY_RESPONSE),
        (HH.format(" 18."), HH.format(" 18.\n"), p.IDENTICAL),
        (HH.format(" 18.\n\nHuman: Thanks\n\nAssistant: Welcome"), HH.format(" 180."), p.UNEQUAL_PREFIXES),
        (HH.format(" 18.\n\nHuman: Sure?"), HH.format(" 18.\n\nHuman: Ok?"), p.NOT_ONE_MESSAGE),
        (HH.format(" Hi.\n\nAssistant: 18"), HH.format(" Hi.\n\nAssistant: 180"), p.NO_PROMPT),
        ("\n\nAssistant: 18", "\n\nAssistant: 180", p.EMPTY_PROMPT),
        ("\n\nHuman: 2?\n\nAssistant: 2", "\n\nHuman: 3?\n\nAssistant: 3", p.UNEQUAL_PREFIXES),
        ("Hm. USER: 2? ASSISTANT: 2", "Hm. USER: 3? ASSISTANT: 3", p.UNEQUAL_PREFIXES),
        ("Question: 2?\nAnswer: 2\nAnswer: 3", "Question: 2?\nAnswer: 2\nAnswer: 4", p.NO_PROMPT),
    ],
)
def test_dialogues_that_have_no_two_responses_to_one_prompt(tmp_path, chosen, rejected, reason):
    assert one(tmp_path, chosen, rejected) == reason


CERTAIN = [
    # The only line break.
    ("How long?\nIt takes 18 minutes.", "How long?\nIt takes 180 minutes.",
     "How long?", "It takes 18 minutes.", "It takes 180 minutes."),
    ("I have rice. How long?\n\nIt takes 18.", "I have rice. How long?\n\nIt is done.",
     "I have rice. How long?", "It takes 18.", "It is done."),
    ("\nHow long?\nIt\nis 1", "\nHow long?\nIt\tis 2", "How long?", "It\nis 1", "It\tis 2"),
    # The only end of a sentence.
    ("Capital of France? Paris", "Capital of France? Paris, in Spain.",
     "Capital of France?", "Paris", "Paris, in Spain."),
    ('Who said "Eureka!" It was X.', 'Who said "Eureka!" It was Y.', 'Who said "Eureka!"', "It was X.", "It was Y."),
    ("法国的首都是哪里？是巴黎。", "法国的首都是哪里？是柏林。", "法国的首都是哪里？", "是巴黎。", "是柏林。"),
    # A sentence that both complete.
    ("The sky is blue.", "The sky is green.", "The sky is", " blue.", " green."),
    ("It takes 18 minutes", "It takes 180 minutes", "It takes", " 18 minutes", " 180 minutes"),
    ("Dr. Who is great", "Dr. Who is green", "Dr. Who is", " great", " green"),
]  # fmt: skip


@pytest.mark.parametrize(("chosen", "rejected", "prompt", "good", "bad"), CERTAIN)
def test_without_turns_the_cut_is_at_the_only_place_that_is_certain(tmp_path, chosen, rejected, prompt, good, bad):
    assert one(tmp_path, chosen, rejected) == ([("user", prompt)], good, bad)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("ab", "ac"),  # inside a word
        ("rice18", "rice180"),  # inside a number
        ("blue", "green"),
        ("The sky", "The sky is"),  # is the response "sky", or nothing?
        ("How long?\nSure:\nIt takes 18.", "How long?\nSure:\nIt takes 180."),  # either line could end the prompt
        ("Rice? Sure. It takes 18.", "Rice? Sure. It takes 180."),
        ("天空是蓝色的", "天空是绿色的"),
    ],
)
def test_what_has_no_certain_place_is_dropped(tmp_path, chosen, rejected):
    assert one(tmp_path, chosen, rejected) == p.NO_PROMPT


def test_a_row_that_lacks_the_prompt_of_its_file_is_not_cut(tmp_path):
    """Its texts are answers: what they share is no prompt."""
    for without in ({}, {"prompt": None}, {"prompt": float("nan")}):
        row = {"chosen": "It is 12.", "rejected": "It is 13.", **without}
        kept, report = read(tmp_path, row, GOOD)
        assert (len(kept), report.dropped) == (1, {p.EMPTY_PROMPT: 1})
    row = {"prompt": None, "chosen": HH.format(" 18."), "rejected": HH.format(" 180.")}  # these say what it is
    assert read(tmp_path, row, GOOD)[0][0].chosen == "18."


@pytest.mark.parametrize("name", ["instruction", "question", "query", "input"])
def test_a_prompt_under_another_name_is_not_passed_over(tmp_path, name):
    row = {name: "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(GOOD | {name: ""}))
    with pytest.raises(Exception, match=rf"set data\.columns\.prompt {name}"):
        read(tmp_path, row)
    section = DataSection(str(tmp_path / "x.jsonl"), domain="chat", columns={"prompt": (name,)})
    assert read_preferences(section)[0][0].prompt[0]["content"] == "2 + 2?"


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", [("user", "Hi")]),
        ("\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hm\n\nAssistant: ",
         [("user", "Hi"), ("assistant", "Ho"), ("user", "Hm")]),
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
         [("system", "Be brief."), ("user", "Hi")]),
        ("Say Assistant: now", [("user", "Say Assistant: now")]),
        ("Fill in:\nAnswer:", [("user", "Fill in:\nAnswer:")]),
        ("\n\nHuman: Hi\n\nAssistant: Ho", [("user", "\n\nHuman: Hi\n\nAssistant: Ho")]),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}], [("user", "Hi")]),
    ],
)  # fmt: skip
def test_a_prompt_that_ends_where_the_assistant_begins(tmp_path, prompt, turns):
    assert sides(tmp_path, "4", "5", prompt=prompt) == (turns, "4", "5")


def test_a_prompt_that_ends_inside_the_assistants_turn_is_dropped(tmp_path):
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, "}]
    assert sides(tmp_path, "4", "5", prompt=prompt) == p.NOT_USERS_TURN


def test_dialogues_that_repeat_the_prompt_column(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    assert sides(tmp_path, prompt + " Ho", prompt + " No", prompt=prompt) == ([("user", "Hi")], "Ho", "No")


TEXT = st.text(st.sampled_from("ab1. ?\n:HumanAsit<|>[]/#é？"), max_size=30)


@given(TEXT, TEXT, TEXT)
@example("a", "a ", "a b")
def test_a_cut_loses_and_splits_nothing(shared, chosen, rejected):
    """Prompt and response make up the text, white space apart, and no word is cut in two."""
    one, other = shared + chosen, shared + rejected
    try:
        prompt, *responses = cut_texts(one, other)
    except Dropped:
        return
    for text, response in zip((one, other), responses, strict=True):
        assert "".join((prompt + response).split()) == "".join(text.split())
        before = text.lstrip()[len(prompt.lstrip()) :]
        assert not prompt or before[:1].isspace() or before == "" or prompt.rstrip("\"'”’)）」』")[-1] in ".!?…。！？"
    assert prompt.strip()


def test_hostile_texts_are_read_in_time(tmp_path):
    for text in ("\n" * 200_000, " " * 200_000, "<s>" * 50_000, "\n\nHuman:" * 20_000, "." * 200_000, "### " * 50_000):
        one(tmp_path, text + "\n\nAssistant: a" + text, text + "\n\nAssistant: b" + text)


def test_the_case_of_the_field():
    if not CASES.is_dir():
        pytest.skip(f"small inputs of the field are not at {CASES}")
    kept, report = read_preferences(DataSection(str(CASES / "hh_prefix" / "pairs.jsonl"), domain="chat"))
    assert (report.kept, report.dropped) == (3, {})
    assert [(one.chosen, one.rejected) for one in kept][1:] == [ALIKE[0], ALIKE[2]]
