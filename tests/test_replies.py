"""What servers say, sorted into kinds: every way to answer, to be cut off, to refuse and to fail."""

import json

import pyarrow.parquet
import pytest

from patarm_jax.ask.answers import Kind
from patarm_jax.ask.replies import FINISH_REASONS, Refused, Unavailable, raise_for_status, read_reply
from patarm_jax.cli import main
from tests.chat_server import FORM, GOOD, answer_to, completion, overall, remote, served, write_pairs

TEXT = FORM.format(7)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def kind_of(reply) -> Kind:
    """The kind of a reply of status 200."""
    try:
        return read_reply(reply).kind
    except Unavailable:
        return Kind.FAILED
    except Refused as refusal:
        return refusal.kind


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (completion(TEXT), Kind.ANSWER),
        (completion(TEXT, finish="STOP"), Kind.ANSWER),
        (completion(TEXT[:40], "length"), Kind.CUT),
        (completion("", "length"), Kind.CUT),  # all tokens went into thinking that is not shown
        (completion("", "stop", tokens=1), Kind.ANSWER),  # the end token alone
        (completion(None, "tool_calls", tool_calls=[{"id": "a"}]), Kind.ANSWER),
        (completion("", "stop", tokens=0), Kind.FAILED),
        (completion("", "length", tokens=0), Kind.FAILED),
        (completion(None, "stop", tokens=None), Kind.FAILED),
        (completion(TEXT[:40], "error"), Kind.FAILED),
        (completion(TEXT, "error"), Kind.FAILED),
        (completion(TEXT, "stop", choice={"error": {"code": 502, "message": "Provider disconnected"}}), Kind.FAILED),
        (completion(TEXT[:40], "abort"), Kind.FAILED),
        (completion(TEXT[:40], None), Kind.FAILED),
        (completion(TEXT, "a reason of next year"), Kind.FAILED),
        (completion(TEXT, "stop", choice={"native_finish_reason": "insufficient_system_resource"}), Kind.FAILED),
        (completion(TEXT, "stop", choice={"native_finish_reason": "eos_token"}), Kind.ANSWER),
        (completion("", "content_filter", tokens=0), Kind.REFUSED),
        (completion(TEXT, "content_filter"), Kind.REFUSED),
        (completion(None, "stop", refusal="I cannot help with that."), Kind.REFUSED),
        (completion([{"type": "refusal", "refusal": "I cannot help with that."}]), Kind.REFUSED),
        ({"error": {"message": "Rate limit exceeded", "code": 429}}, Kind.FAILED),
        ({"error": {"message": "This model's maximum context length is 8 tokens", "code": 400}}, Kind.TOO_LONG),
        ({"error": {"message": "flagged by moderation", "code": 403}}, Kind.REFUSED),
        ({"error": "overloaded"}, Kind.FAILED),
        ({"choices": None, "usage": None}, Kind.FAILED),
        ({"choices": []}, Kind.FAILED),
        ({"choices": [None]}, Kind.FAILED),
        ({"choices": [{"message": None, "finish_reason": "stop"}], "usage": {"completion_tokens": 9}}, Kind.FAILED),
        ({"choices": [{"text": TEXT, "finish_reason": "stop"}]}, Kind.FAILED),
        (completion(TEXT, error="boom"), Kind.FAILED),
        (completion([{"type": "image_url", "image_url": {}}]), Kind.FAILED),
        (completion([{"text": TEXT}]), Kind.ANSWER),
        (completion(content=7), Kind.FAILED),
        ([], Kind.FAILED),
        (None, Kind.FAILED),
    ],
)
def test_every_shape_of_a_reply_has_its_kind(reply, kind):
    assert kind_of(reply) == kind


@pytest.mark.parametrize(("finish", "kind"), FINISH_REASONS.items())
def test_every_finish_reason_has_its_kind(finish, kind):
    assert kind_of(completion(TEXT, finish=finish)) == kind_of(completion(TEXT, finish=finish.upper())) == kind


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 5000.", Kind.TOO_LONG),
        (400, "'max_tokens' is too large: 1024. This model's maximum context length is 512 tokens", Kind.TOO_LONG),
        (400, '{"error": {"code": "context_length_exceeded"}}', Kind.TOO_LONG),
        (422, "`inputs` must have less tokens: input too long", Kind.TOO_LONG),
        (413, "prompt is too long: 210000 tokens > 200000 maximum", Kind.TOO_LONG),
        (413, "request entity", Kind.TOO_LONG),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 4096", Kind.TOO_LONG),
        (400, "Range of input length should be [1, 30720]", Kind.TOO_LONG),
        (400, "prompt token count of 5000 exceeds the limit of 4096", Kind.TOO_LONG),
        (400, "DataInspectionFailed", Kind.REFUSED),
        (500, "Input length exceeds the model's maximum length", Kind.TOO_LONG),
        (400, "The response was filtered due to the prompt triggering content management policy", Kind.REFUSED),
        (400, "data_inspection_failed", Kind.REFUSED),
        (403, "your input was flagged", Kind.REFUSED),
        (400, "bad", Kind.REFUSED),
        (429, "slow down", Kind.FAILED),
        (503, "loading", Kind.FAILED),
    ],
)
def test_every_status_has_its_kind(status, said, kind):
    with pytest.raises((Refused, Unavailable)) as error:
        raise_for_status(status, said)
    assert (error.value.kind if isinstance(error.value, Refused) else Kind.FAILED) == kind


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:]}]}, TEXT),
        ({"content": [TEXT]}, TEXT),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "so"]},
            "<think>hm</think>so",
        ),
        ({"content": [{"type": "thinking", "thinking": "hm"}, "so"]}, "<think>hm</think>so"),
        ({"content": "so", "reasoning_content": "hm"}, "<think>hm</think>so"),
        ({"content": "so", "reasoning": "hm"}, "<think>hm</think>so"),
        ({"content": "so", "reasoning": "hm", "reasoning_content": "hm"}, "<think>hm</think>so"),
        ({"content": "<think>a</think>so", "reasoning_content": "hm"}, "<think>a</think>so"),
        ({"content": None, "reasoning_content": "hm <answer>9</answer>"}, "<think>hm <answer>9</answer></think>"),
        ({"content": None, "reasoning_content": TEXT}, TEXT),  # the judge itself says where its thinking ends
        ({"content": "", "reasoning_content": "hm</think>so"}, "<think>hm</think>so"),
        ({"content": "half \ud83d"}, "half ?"),
    ],
)
def test_what_stands_in_the_judges_turn(message, text):
    reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert read_reply(reply).text == text


# ---- Whole evaluations ----------------------------------------------------------------------------------------------


def some_fail(reply):
    """A server that answers three in ten questions, by their seeds, with such a reply; and all, once it is mended."""
    state = {"broken": True}

    def answer(request):
        return 200, reply if state["broken"] and request["seed"] % 10 < 3 else answer_to(request)

    return state, answer


@pytest.mark.parametrize(
    "reply", [completion("", "error", choice={"error": {"code": 502, "message": "x"}}), completion("", "stop", 0)]
)
def test_an_answer_that_is_none_is_never_kept_as_a_judgement(pairs, reply, capsys):
    """It is asked again by the same command, and moves no number for good."""
    state, answer = some_fail(reply)
    with served(always=answer) as (url, chat):
        command = remote(pairs, url, "--votes", 4, "--endpoint.tries", 1)
        assert main(command) == 1
        results, _ = overall(pairs)
        lost = results["counts"]["failed"]
        assert 0 < lost == 48 - results["counts"]["answered"] and results["counts"]["unreadable"] == 0
        assert f"{lost} of 48 answers never came" in capsys.readouterr().err.splitlines()[-1]
        state["broken"] = False
        asked = len(chat.asked)
        assert main(command) == 0
        assert len(chat.asked) == asked + lost
    results, value = overall(pairs)
    assert value == 1.0 and results["counts"]["failed"] == 0 and results["valid"] == 1.0


def test_what_is_final_is_counted_apart_and_not_asked_again(pairs):
    plan = [
        "", "too long", lambda _: (200, completion("", "content_filter", 0)), "cut", "400", "unread"
    ]  # fmt: skip
    with served(*plan) as (url, chat):
        for _ in range(2):
            assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert len(chat.asked) == 12
    results, _ = overall(pairs)
    assert results["counts"] == {
        "answered": 8, "cut": 1, "refused": 2, "too_long": 1, "failed": 0, "unreadable": 5,
    }  # fmt: skip
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    assert [row["kind"] for row in table[:6]] == ["ANSWER", "TOO_LONG", "REFUSED", "CUT", "REFUSED", "ANSWER"]
    assert [row["finish_reason"] for row in table[:6]] == ["stop", "", "content_filter", "length", "", "stop"]
    summary = (pairs / "out" / "summary.md").read_text()
    assert " 2 were refused. 1 were too long to ask." in summary


def test_an_answers_line_says_what_was_sent(pairs):
    with served() as (url, chat):
        drawn = ["--sampling.temperature", 1, "--sampling.top_k", 0, "--sampling.top_p", 1]
        assert main(remote(pairs, url, "--endpoint.concurrency", 1, *drawn)) == 0
    first = json.loads((pairs / "out" / "answers.jsonl").read_text().splitlines()[1])
    assert {"question", "vote", "status", "kind", "finish_reason", "sent"} <= first.keys()
    request = chat.asked[0]
    assert first["sent"] == {name: value for name, value in request.items() if name not in ("model", "messages")}
    assert first["sent"].keys() >= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
    (sent,) = overall(pairs)[0]["sent"]
    assert sent == {name: value for name, value in first["sent"].items() if name != "seed"} | {"answers": 12}


def test_of_an_earlier_version_what_could_not_be_read_is_asked_again(pairs):
    """It took errors for judgements that could not be read; what could be read stays paid for."""
    with served("unread", "unread") as (url, chat):
        assert main(remote(pairs, url)) == 0
        path = pairs / "out" / "answers.jsonl"
        first, *lines = path.read_text().splitlines()
        new = ("kind", "sent", "opened", "finish_reason")
        old = [{"cut": False} | {k: v for k, v in json.loads(line).items() if k not in new} for line in lines]
        path.write_text("\n".join([first, *map(json.dumps, old)]) + "\n")
        assert main(remote(pairs, url)) == 0
        assert len(chat.asked) == 12 + 2
    assert overall(pairs)[1] == 1.0


# ---- Thinking that the server's template opens ----------------------------------------------------------------------


def opened(request, cut=False, form=FORM):
    """As a server answers whose chat template has written <think> already."""
    score = 9 if GOOD in request["messages"][-1]["content"] else 2
    text = f"I could say <answer>{10 - score}</answer>, but no." if cut else form.format(score).removeprefix("<think>")
    return 200, completion(text, "length" if cut else "stop")


@pytest.mark.parametrize("judge", ["pointwise", "baseline"])
@pytest.mark.parametrize("opens", ["auto", "yes"])
@pytest.mark.parametrize("place", [0, 11])
def test_thinking_that_the_template_opened_is_thinking(pairs, judge, opens, place):
    """A text that was cut off inside it has no score, whether it comes before the others have shown that, or after."""
    plan = [opened] * 12
    plan[place] = lambda request: opened(request, cut=True)
    form = FORM if judge == "pointwise" else "Draft: <answer>5</answer></think>Well. <answer>{}</answer>"
    plan = [each if i == place else lambda r: opened(r, form=form) for i, each in enumerate(plan)]
    with served(*plan) as (url, _):
        more = ["--judge", judge, "--endpoint.concurrency", 1, "--endpoint.opens_thinking", opens]
        assert main(remote(pairs, url, *more)) == 0
    results, value = overall(pairs)
    assert value == 5 / 6 and results["valid"] == 11 / 12 and results["counts"]["cut"] == 1
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    assert {row["score"] for row in table} == {9.0, 2.0, None}
    assert all(row["text"].startswith("<think>") for row in table)


def test_without_a_sign_of_thinking_a_cut_text_is_read_as_it_stands(pairs):
    """And the same answers are read anew, not asked anew, when the user knows better."""
    with served(always=lambda request: opened(request, cut=True)) as (url, chat):
        more = ["--judge", "baseline", "--endpoint.opens_thinking"]
        assert main(remote(pairs, url, *more, "auto")) == 0
        assert overall(pairs)[0]["valid"] == 1.0
        assert main(remote(pairs, url, *more, "yes")) == 0
        assert overall(pairs)[0]["valid"] == 0.0
        assert main(remote(pairs, url, *more, "no")) == 0
        assert overall(pairs)[0]["valid"] == 1.0 and len(chat.asked) == 12


# ---- When little can be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda _: (200, completion("I cannot say.")), "none of the 12 answers could be read"),
        (
            lambda _: (200, completion("I cannot say.")),
            "(12 ×): <think> is missing. Look at the fields text and",
        ),
        (lambda _: (200, completion("<think>hm", "length")), "Most were cut off: raise --sampling.max_new_tokens"),
        (lambda _: (200, completion(None, reasoning_content="ok <answer>9</answer>")), "without a reasoning parser"),
    ],
)
def test_that_nothing_could_be_read_is_the_last_word(pairs, capsys, answer, words):
    with served(always=answer) as (url, _):
        assert main(remote(pairs, url)) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last and str(pairs / "out" / "answers.jsonl") in last
