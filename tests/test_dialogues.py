r"""Texts that contain the prompt are cut at their turns, or at the one certain place; never inside an answer."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons as p
from patarm_jax.data.cuts import cut_texts
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
    "gpt-oss": "<|start|>user<|message|>How long does rice take?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "Cohere": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>How long does rice take?<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "Baize": "[|Human|] How long does rice take?\n[|AI|] {}",
    "tags": "<user>How long does rice take?</user>\n<assistant>{}</assistant>",
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
        (HH.format(" 18.\n\nHuman: Sure?"), HH.format(" 18.\n\nHuman: Ok?"), p.IDENTICAL),
        (HH.format(" 18.\n\nHuman: Sure?"), HH.format(" 180."), p.OPEN_TURN),
        (HH.format(" 180."), HH.format(" 18.\n\nHuman:"), p.OPEN_TURN),
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
    # Lines of their own.
    ("How long?\nAbout 18 minutes.", "How long?\nIt takes 180 minutes.",
     "How long?", "About 18 minutes.", "It takes 180 minutes."),
    ("Name a tea\n\nGreen.\n\nIt is good.", "Name a tea\n\nBlack.", "Name a tea", "Green.\n\nIt is good.", "Black."),
    ("\nHow long?\r\nNo", "\nHow long?\r\nNot long", "How long?", "No", "Not long"),
    ("How long?\n\nLong", "How long?\nShort", "How long?", "Long", "Short"),
    # A question.
    ("Capital of France? Paris", "Capital of France? Paris, in Spain.",
     "Capital of France?", "Paris", "Paris, in Spain."),
    ('Who said "Eureka?" It was X.', 'Who said "Eureka?" X.', 'Who said "Eureka?"', "It was X.", "X."),
    ("法国的首都是哪里？巴黎。", "法国的首都是哪里？柏林。", "法国的首都是哪里？", "巴黎。", "柏林。"),
    # A sentence that both complete.
    ("The sky is blue.", "The sky is green.", "The sky is", " blue.", " green."),
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
        # The answer begins in what both share.
        ("How do I cook rice? Boil water first.\nThen add the rice.", "How do I cook rice? Boil water first.\nEat it."),
        ("How do I cook rice? Boil it first.\n\nThen add it.", "How do I cook rice? Boil it first.\n\nEat it raw."),
        ("List fruits: Sure!\n- apple", "List fruits: Sure!\n- pear"),
        ("List fruits: Sure!\nApple", "List fruits: Sure!\nPear"),
        ("Describe rice Rice is a grain. It is good", "Describe rice Rice is a grain. It is bad"),
        ("Describe rice Rice is a grain. Good", "Describe rice Rice is a grain. Bad"),
        ("Describe rice Rice is good", "Describe rice Rice is bad"),
        ("describe rice it is good", "describe rice it is bad"),
        ("Tell me about Mr. Smith He is old", "Tell me about Mr. Smith He is young"),
        ("Tell me about Mr. Smith", "Tell me about Mr. Jones"),
        # What both share looks like the beginning of an answer.
        ("Sure\n\nApples", "Sure\n\nPears"),
        ("Of course!\n\nApples", "Of course!\n\nPears"),
        ("Here is a list:\nApples", "Here is a list:\nPears"),
        ("# A title\n\nApples", "# A title\n\nPears"),
        ("- an apple\nPears", "- an apple\nPlums"),
        ("1) an apple\nPears", "1) an apple\nPlums"),
        ("def f(x):\n    return 1", "def f(x):\n    pass"),
        ("Really? Yes", "Really? No"),
        ("Dr. Who is great", "Dr. Who is green"),
        ("It takes 18 minutes", "It takes 180 minutes"),
        ("How long?\nIt takes 18 minutes.", "How long?\nIt takes 180 minutes."),
        ("法国的首都是哪里？是巴黎。", "法国的首都是哪里？是柏林。"),
        # A mark alone makes no dialogue.
        ("Tell me a riddle\nHere: what runs?\nAnswer: a river", "Tell me a riddle\nHere: what runs?\nAnswer: a nose"),
        ("Explain rice\nA grain.\n\nTL;DR: good", "Explain rice\nA grain.\n\nTL;DR: bad"),
        ("Write a play\nAI: hi one", "Write a play\nAI: hi two"),
    ],
)  # fmt: skip
def test_what_has_no_certain_place_is_dropped(tmp_path, chosen, rejected):
    assert one(tmp_path, chosen, rejected) == p.NO_PROMPT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<|im_start|>user\nHi?<|im_sep|>\n{}", p.UNKNOWN_MARK),
        ("<|human|>Hi?\n<|bot|>{}", p.UNKNOWN_MARK),
        ("[USER] Hi?\n[ASSISTANT] {}", p.UNKNOWN_MARK),
        ("<human>Hi?</human>\n{}", p.UNKNOWN_MARK),
        ("<｜Anfang｜>Hi?\n{}", p.UNKNOWN_MARK),
        ("<start_of_turn>user\nHi?\n{}", p.UNKNOWN_MARK),
        ("\n\nHuman: a <|tool|> b\n\nAssistant: {}", p.UNKNOWN_MARK),
        ("<|user|>Hi<|tool_call|>x<|assistant|>{}", p.UNKNOWN_MARK),
        ("Q: y\nA: z\n\nPrompt: a\n\nResponse: s {}", p.TWO_NOTATIONS),
        ("Hm\n\nQ: y\nA: z\n\nQuestion: y\n\nAnswer: s {}", p.TWO_NOTATIONS),
        ("\n\nHuman: a\n\nAssistant: b ### Question: c\n### Answer: {}", p.TWO_NOTATIONS),
        ("<|user|>a<|assistant|>b<|im_start|>user\nc<|im_start|>assistant\n{}", p.TWO_NOTATIONS),
    ],
)
def test_notations_that_are_unknown_or_mixed_are_dropped_for_their_own_reason(tmp_path, text, reason):
    assert one(tmp_path, text.format("one"), text.format("two")) == reason


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("POST: x\n\nQ: y\nA: z\n\nTL;DR: {}", [("user", "POST: x\n\nQ: y\nA: z")]),
        ("SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: x\n\nTL;DR: {}", [("user", "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: x")]),
        ("<|im_start|>user\nQ: y\nA: z<|im_end|>\n<|im_start|>assistant\n{}", [("user", "Q: y\nA: z")]),
        ("\n\nHuman: Q: y\nQ: v\nA: z\n\nAssistant: {}", [("user", "Q: y\nQ: v\nA: z")]),
    ],
)
def test_of_two_notations_one_may_be_sure(tmp_path, text, prompt):
    assert one(tmp_path, text.format("s one"), text.format("s two")) == (prompt, "s one", "s two")


@pytest.mark.parametrize("end", ["\n\nHuman:", "\n\nHuman: thanks!", "\n\nHuman: "])
def test_an_open_users_turn_behind_both_responses_is_none_of_them(tmp_path, end):
    assert one(tmp_path, HH.format(" 18." + end), HH.format(" 180." + end)) == ([("user", "Rice?")], "18.", "180.")
    chatml = "<|im_start|>user\nRice?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n"
    assert one(tmp_path, chatml.format("18."), chatml.format("180.")) == ([("user", "Rice?")], "18.", "180.")


@pytest.mark.parametrize("inside", ["AI: smart", "User: you", "System: Linux", "Bot: a\n\nUser: b"])
def test_marks_inside_an_answer_are_the_answers(tmp_path, inside):
    for chosen, rejected in ((f"Kinds:\n\n{inside}", "None."), (f"K:\n\n{inside} 1", f"L:\n\n{inside} 2")):
        got = one(tmp_path, HH.format(" " + chosen), HH.format(" " + rejected))
        assert got == ([("user", "Rice?")], chosen, rejected)
    text = "### Instruction:\nPlan\n\n### Response:\n{}"
    chosen = "Plan:\n\n### Task: one\nDo."
    assert one(tmp_path, text.format(chosen), text.format("No.")) == ([("user", "Plan")], chosen, "No.")


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


@pytest.mark.parametrize("prompt", ["What is it?", [{"role": "user", "content": "What is it?"}]])
@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: What is it?\n\nAssistant: {}", "What is it?\n{}", "What is it? {}",
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>",
    ],
)  # fmt: skip
def test_a_prompt_that_both_texts_repeat_is_no_part_of_the_responses(tmp_path, prompt, text):
    chosen, rejected = text.format("yes x"), text.format("yes y")
    assert sides(tmp_path, chosen, rejected, prompt=prompt) == ([("user", "What is it?")], "yes x", "yes y")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Rice", "Rice is a grain", "Rice is an animal"),
        ("Hello!", "Hello! How are you", "Hello! Go"),
        ("Why is it?", "Why is it?\nBecause.", "No."),
        ("Write a play", "A: Hm\n\nHuman: a\n\nAssistant: b", "A: Hm\n\nHuman: a\n\nAssistant: c"),
        ("What is a token?", "It is <|pad|> a", "It is <|pad|> b"),
    ],
)
def test_answers_that_only_begin_alike_stay_whole(tmp_path, prompt, chosen, rejected):
    assert sides(tmp_path, chosen, rejected, prompt=prompt) == ([("user", prompt)], chosen, rejected)


def test_texts_may_repeat_a_part_of_the_prompt_and_hold_marks_of_their_own(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    turns = [("system", "Be brief."), ("user", "a")]
    assert sides(tmp_path, "Human: a\nAI: yes x", "Human: a\nAI: yes y", prompt=prompt) == (turns, "yes x", "yes y")
    prompt = "\n\nHuman: a\n\nAssistant:"
    got = sides(tmp_path, prompt + " use <|x|> 1", prompt + " use <|x|> 2", prompt=prompt)
    assert got == ([("user", "a")], "use <|x|> 1", "use <|x|> 2")


def test_an_answer_loses_the_tokens_that_close_it_in_the_notation_of_its_prompt(tmp_path):
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert sides(tmp_path, "yes a<|im_end|>", "no<|im_end|>\n", prompt=prompt) == ([("user", "a")], "yes a", "no")
    assert sides(tmp_path, "yes a<|im_end|>", "no", prompt="a") == ([("user", "a")], "yes a<|im_end|>", "no")


@pytest.mark.parametrize(
    "text",
    ['[{"role":"assistant","content":"x"}]', '{"role": "admin", "content": "x"}', '{"role": "admin", …}'],
)
def test_an_answer_in_json_stays_as_it_is(tmp_path, text):
    prompt = "Give the JSON of a chat message"
    assert sides(tmp_path, text, "I cannot.", prompt=prompt) == ([("user", prompt)], text, "I cannot.")
    assert sides(tmp_path, "I cannot.", text, prompt=prompt) == ([("user", prompt)], "I cannot.", text)


TEXT = st.text(st.sampled_from("ab1. ?\n:HumanAsit<|>[]/#é？"), max_size=30)


@given(TEXT, TEXT, TEXT)
@example("a", "a ", "a b")
@example("1？]", "1", ":")
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
        assert not prompt or before[:1].isspace() or before == "" or prompt.rstrip("\"'”’)]）」』")[-1] in ".!?…。！？"
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
