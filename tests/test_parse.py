"""Judgements as they come: well formed, mutilated, and written to be misread."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patarm_jax.judge import parse
from patarm_jax.judge.parse import parse_baseline, parse_pairwise, parse_pointwise
from patarm_jax.types import Judgement, Status

PARSERS = [parse_pointwise, parse_pairwise, parse_baseline]
TAGS = [tag for name in parse.JUDGEMENT_TAGS for tag in (f"<{name}>", f"</{name}>")]
INSIDE = ["Let me see.", "Brevity: is it short?", "It is short.", "{}"]
FORM = "\n".join(f"<{name}>\n{inside}\n</{name}>" for name, inside in zip(parse.JUDGEMENT_TAGS, INSIDE, strict=True))

# The same examples in every run, and no example carried over from another machine.
ci = settings(derandomize=True, deadline=None, max_examples=200, database=None)

scores = st.one_of(
    st.integers(0, 10).map(str),
    st.decimals(0, 10, places=3).map(lambda number: f"{number:f}"),
    st.sampled_from(["0.0", "10.000", "007", "3.14159"]),
)
space = st.text(alphabet=" \t\n\r\f\v", max_size=3)
tag_like = st.sampled_from([*TAGS, "<", ">", "<answer", "9", "\n", "A", "<ANSWER>", "</ answer>"])
free_text = st.lists(st.one_of(tag_like, st.text(max_size=5)), max_size=8).map("".join)
thinking = free_text.map(lambda text: text.replace("</think>", ""))  # the first one ends it
tagless = st.text(max_size=20).filter(lambda text: not any(tag in text for tag in TAGS))


def judgement_of(parts: list[str], gaps: list[str]) -> str:
    sections = [f"<{name}>{part}</{name}>" for name, part in zip(parse.JUDGEMENT_TAGS, parts, strict=True)]
    return "".join(itertools.chain.from_iterable(zip(gaps, [*sections, ""], strict=True)))


def reason(text: str, parser=parse_pointwise) -> tuple[str, str]:
    judgement = parser(text)
    assert judgement.score is None and judgement.choice is None
    return judgement.status.name, judgement.reason


def described(name: str, text: str, judgement: Judgement) -> str:
    shown = text if len(text) < 500 else f"{text[:60]} … {len(text)} characters"
    lines = [f"════ {name} ════", shown, "────", f"status:   {judgement.status.name}", f"reason:   {judgement.reason}"]
    lines += [f"score:    {judgement.score}", f"choice:   {judgement.choice}", f"thinking: {judgement.thinking!r}"]
    lines += [f"rubrics:  {judgement.generated_rubrics!r}", f"eval:     {judgement.evaluation!r}"]
    return "\n".join(lines) + "\n\n"


def test_parsed_judgements(golden):
    good = FORM.format("7.5")
    cases = [
        ("plain", good, parse_pointwise),
        ("tags in the thinking", good.replace("Let me see.", "So <answer>1</answer> <think>?"), parse_pointwise),
        ("remarks between the sections", good.replace(">\n<", ">\nWell.\n<") + "\nThat is all.", parse_pointwise),
        ("a word before the thinking", "Sure. " + good, parse_pointwise),
        ("thinking never ends", "<think>\nLet me see, and see, and", parse_pointwise),
        ("no rubrics of its own", good.replace("<generate_rubrics>", ""), parse_pointwise),
        ("two answers", good + "<answer>9</answer>", parse_pointwise),
        ("evaluation after the answer", "<think></think><answer>9</answer>" + "".join(TAGS[2:6]), parse_pointwise),
        ("capital tag", good.replace("<eval>", "<Eval>"), parse_pointwise),
        ("a fraction", FORM.format("8/10"), parse_pointwise),
        ("full-width digits", FORM.format("８"), parse_pointwise),
        ("too high", FORM.format("10.5"), parse_pointwise),
        ("no answer", FORM.format("  "), parse_pointwise),
        ("a long answer", FORM.format("I would say that it deserves a seven or so. " * 20), parse_pointwise),
        ("pairwise", FORM.format("B"), parse_pairwise),
        ("pairwise, undecided", FORM.format("A or B"), parse_pairwise),
        ("baseline", "Short and right.\n<answer>9</answer>", parse_baseline),
        ("baseline that thinks", "<think>Is it <answer>1</answer>?</think>Right.<answer>9</answer>", parse_baseline),
        ("baseline out of range", "Bad.<answer>0</answer>", parse_baseline),
        ("baseline without a score", "Short and right. 9", parse_baseline),
    ]
    golden("judgements.txt", "".join(described(name, text, parser(text)) for name, text, parser in cases))


# ── tags ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def swapped(tags: list[str], i: int, j: int) -> str:
    mixed = list(tags)
    mixed[i], mixed[j] = mixed[j], mixed[i]
    return "".join(mixed)


@pytest.mark.parametrize("tag", TAGS)
def test_a_missing_tag_is_named(tag):
    assert reason(FORM.format("8").replace(tag, "")) == ("BAD_TAGS", f"{tag} is missing")


@pytest.mark.parametrize("tag", TAGS)
def test_a_repeated_tag_is_named(tag):
    assert reason(FORM.format("8") + tag) == ("BAD_TAGS", f"{tag} is repeated")


def test_an_early_answer_is_out_of_order():
    body = "<answer>8</answer><generate_rubrics></generate_rubrics><eval></eval>"
    expected = ("BAD_TAGS", "<answer> is out of order: <generate_rubrics> should come first")
    assert reason(f"<think></think>{body}") == expected
    nested = "<generate_rubrics><eval></eval></generate_rubrics><answer>8</answer>"
    expected = ("BAD_TAGS", "<eval> is out of order: </generate_rubrics> should come first")
    assert reason(f"<think></think>{nested}") == expected


@pytest.mark.parametrize("before", ["Sure.", "</think>", "<eval>", ".", "\u200b", "\ufeff", "\u00a0"])
def test_nothing_stands_before_the_thinking(before):
    assert reason(before + FORM.format("8")) == ("BAD_TAGS", "<think> does not come first: text stands before it")


@pytest.mark.parametrize("spelling", ["<Answer>", "< answer>", "<answer >", "<answer/>", "<answer id=1>", "＜answer＞"])
def test_tags_are_exact(spelling):
    assert reason(FORM.format("8").replace("<answer>", spelling)) == ("BAD_TAGS", "<answer> is missing")


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NOT_PLAIN = "nan NaN inf -inf Infinity -1 +5 -0 8/10 80% 5e0 1E1 .5 5. 1,5 5.5.5 0x5 1_0 7/ 7–8 7~8 [7] {7} **7** eight"
NOT_ASCII = "８ ٥ ५ ² Ⅴ ５.０"


@pytest.mark.parametrize(
    "answer",
    [*NOT_PLAIN.split(), *NOT_ASCII.split(), "7 8", "7\n8", "score: 7", "7 <b>", "\u00a07", "7\u2003", "7\x1c"],
)
def test_only_one_plain_number_is_a_score(answer):
    for parser, form in ((parse_pointwise, FORM), (parse_baseline, "<answer>{}</answer>")):
        assert reason(form.replace("{}", answer), parser) == (
            "BAD_SCORE",
            f"<answer> holds {answer!r}; it must hold one plain number",
        )


@pytest.mark.parametrize("score", ["10.1", "11", "100", "10.00000000000000000001", "9" * 400])
def test_scores_above_10_are_refused(score):
    status, why = reason(FORM.format(score))
    assert status == "BAD_SCORE" and why.endswith("is not between 0 and 10") and len(why) < 80


@pytest.mark.parametrize("score", ["0", "0.99999999999999999999", "11"])
def test_a_baseline_scores_from_1_to_10(score):
    assert reason(f"<answer>{score}</answer>", parse_baseline) == (
        "BAD_SCORE",
        f"score {score} is not between 1 and 10",
    )
    assert parse_baseline("<answer>1</answer>").score == 1.0


@pytest.mark.parametrize("answer", ["a", "C", "AB", "A B", "A.", "Ａ", "А", "response A", "A/B", "[[A]]", "tie", "5"])
def test_only_a_or_b_is_a_choice(answer):
    assert reason(FORM.format(answer), parse_pairwise) == (
        "BAD_SCORE",
        f"<answer> holds {answer!r}; it must hold A or B alone",
    )


@pytest.mark.parametrize("parser", [parse_pointwise, parse_pairwise])
def test_an_empty_answer_has_its_own_words(parser):
    assert reason(FORM.format(" \n "), parser)[1].startswith("<answer> is empty; it must hold ")


def test_a_bad_score_keeps_what_could_be_read():
    judgement = parse_pointwise(FORM.format("eleven"))
    assert judgement.status is Status.BAD_SCORE
    assert [judgement.thinking, judgement.generated_rubrics, judgement.evaluation] == INSIDE[:3]


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────────────


@ci
@given(st.one_of(free_text, st.text(), st.text(alphabet=st.characters(categories=["Cs", "Nd", "Zs"]))))
def test_any_text_is_read_without_raising(text):
    for parser in PARSERS:
        judgement = parser(text)
        assert judgement.text == text
        assert (judgement.status is Status.OK) == (judgement.reason == "")
        assert (judgement.status is Status.OK) == (judgement.score is not None or judgement.choice is not None)


@ci
@given(
    st.one_of(
        st.text(max_size=8), st.floats().map(str), st.integers().map(str), st.text("0123456789.٣５ -+e", max_size=6)
    )
)
def test_whatever_is_accepted_lies_between_0_and_10(answer):
    for parser, form, lowest in ((parse_pointwise, FORM, 0), (parse_baseline, "<answer>{}</answer>", 1)):
        judgement = parser(form.replace("{}", answer))
        if judgement.status is Status.OK:
            assert answer.isascii() and set(answer.strip()) <= set("0123456789.")
            assert judgement.score == float(answer) and lowest <= float(answer) <= 10


@ci
@given(scores, space, space, thinking, tagless, tagless, st.tuples(space, tagless, tagless, tagless, tagless))
def test_a_valid_judgement_gives_its_score(score, before, behind, thought, own, evaluation, gaps):
    judgement = parse_pointwise(judgement_of([thought, own, evaluation, before + score + behind], list(gaps)))
    assert judgement == Judgement(
        judgement.text, Status.OK, "", float(score), None, thought.strip(), own.strip(), evaluation.strip()
    )


@ci
@given(st.sampled_from(["A", "B"]), space, thinking)
def test_a_valid_judgement_gives_its_choice(choice, around, thought):
    judgement = parse_pairwise(judgement_of([thought, "", "", around + choice + around], [""] * 5))
    assert (judgement.status, judgement.choice, judgement.score) == (Status.OK, choice, None)


@ci
@given(thinking)
def test_the_thinking_counts_for_nothing(thought):
    for parser, answer in ((parse_pointwise, "6"), (parse_pairwise, "A"), (parse_baseline, "6")):
        read, empty = parser(FORM.format(answer).replace(INSIDE[0], thought)), parser(FORM.format(answer))
        assert (
            (read.status, read.score, read.choice)
            == (empty.status, empty.score, empty.choice)
            != (Status.OK, None, None)
        )
        assert (read.thinking, read.evaluation) == (thought.strip(), empty.evaluation)


PIECES = ["<think>", "a", "</think>", "<generate_rubrics>", "b", "</generate_rubrics>"]
PIECES += ["<eval>", "c", "</eval>", "<answer>", "7", "</answer>"]
PLACES = [place for place, piece in enumerate(PIECES) if piece in TAGS]


def test_removing_a_tag_is_always_seen():
    assert parse_pointwise("".join(PIECES)).score == 7.0
    for i in PLACES:
        assert parse_pointwise("".join(PIECES[:i] + PIECES[i + 1 :])).status is Status.BAD_TAGS


def test_swapping_two_tags_is_always_seen():
    for i, j in itertools.combinations(PLACES, 2):
        assert parse_pointwise(swapped(PIECES, i, j)).status is Status.BAD_TAGS


def test_duplicating_a_tag_is_always_seen():
    for i, at in itertools.product(PLACES, range(len(PIECES) + 1)):
        text = "".join([*PIECES[:at], PIECES[i], *PIECES[at:]])
        # Between <think> and the first </think> a tag is text; only a second </think> there is seen, as it leaves the
        # old one over. Before <think> it is seen too, save that <think><think> is a thinking that begins with a tag.
        is_text = PIECES[i] != "</think>" if at in (1, 2) else PIECES[i] == "<think>" and at == 0
        assert parse_pointwise(text).status is (Status.OK if is_text else Status.BAD_TAGS), text


FLOODS = ["<", "<answer", "</", "<answer>", "</answer>", "<think>", "</think>", "1", "1.", "1 ", " ", "\n<eval>"]


@pytest.mark.parametrize("piece", FLOODS)
def test_large_hostile_text_is_read_to_its_end(piece):
    flood = piece * (100_000 // len(piece))
    good, holds_tags = FORM.format("8"), piece.strip() in TAGS
    assert parse_pointwise(flood).status is Status.BAD_TAGS
    assert parse_pointwise(good + flood).status is (Status.BAD_TAGS if holds_tags else Status.OK)
    inside_answer = parse_pointwise(FORM.replace("{}", flood))
    assert inside_answer.status is (Status.BAD_TAGS if holds_tags else Status.BAD_SCORE)
    assert len(inside_answer.reason) < 100
    inside_thinking = parse_pointwise(good.replace(INSIDE[0], flood))
    assert inside_thinking.status is (Status.BAD_TAGS if piece == "</think>" else Status.OK)
    # To a baseline only the thinking's and the answer's tags are tags.
    alone = parse_baseline(f"<answer>{flood}</answer>")
    own = ("<answer>", "</answer>", "<think>", "</think>")
    assert alone.status is (Status.BAD_TAGS if piece in own else Status.BAD_SCORE)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("I could say <answer>9</answer> but no.\n</think>\n\nPoor. <answer>2</answer>", 2.0),
        ("<think>Perhaps <answer>9</answer>.</think>Poor. <answer>2</answer>", 2.0),
        ("Sure. <think>Perhaps <answer>9</answer>.</think>Poor. <answer>2</answer>", 2.0),
        ("<think>Perhaps <answer>9</answer>, but", None),  # cut off
        ("Sure. <think>Perhaps <answer>9</answer>, but", None),
        ("Poor. <answer>2</answer><think>Or <answer>9</answer>?", None),
        ("a</think><answer>9</answer></think><answer>2</answer>", None),
        ("</think><answer>2</answer>", 2.0),
        ("[THINK]Perhaps <answer>9</answer>", None),
        ("[THINK]Perhaps <answer>9</answer>[/THINK]<answer>2</answer>", 2.0),
        ("<thinking>Perhaps <answer>9</answer>, but", None),
        ("<|channel|>analysis<|message|>Perhaps <answer>9</answer>", None),
        ("<|channel|>analysis<|message|><answer>9</answer><|channel|>final<|message|><answer>2</answer>", 2.0),
        ("◁think▷<answer>9</answer>◁/think▷<answer>2</answer>", 2.0),
        ("<seed:think><answer>9</answer>", None),
    ],
)
def test_no_score_is_read_from_inside_thinking(text, score):
    assert parse_baseline(text).score == score
