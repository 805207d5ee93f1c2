"""Servers that do not take every field of a request; money, keys and ways that a person must not lose."""

import json

import pytest

from patarm_jax.cli import main
from tests.chat_server import answer_to, overall, remote, served, write_pairs


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def refusing(wrong, **error):
    """A server that refuses the requests of which `wrong` is true."""

    def answer(request):
        return (400, {"error": {"type": "invalid_request_error", **error}}) if wrong(request) else answer_of(request)

    return answer


def answer_of(request):
    return 200, answer_to(request)


def both(*refusals):
    def answer(request):
        return next((said for each in refusals if (said := each(request))[0] != 200), answer_of(request))

    return answer


MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead."
BOTH = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
# Nothing is left to the server, so that fields without effect are sent too.
ALL_SET = ("--sampling.temperature", 1, "--sampling.top_k", 0, "--sampling.top_p", 1)
UNKNOWN = "Unrecognized request argument supplied: "


@pytest.mark.parametrize(
    ("answer", "without", "with_"),
    [
        (refusing(lambda r: "max_tokens" in r, message=MAX_TOKENS, param="max_tokens"), "max_tokens",
         {"max_completion_tokens": 1024}),
        (refusing(lambda r: r.get("top_k") == -1, message="top_k must be greater than 0"), "-", {"top_k": 0}),
        (refusing(lambda r: "min_p" in r, message="min_p must be in (0, 1], got 0.0"), "min_p", {"top_k": -1}),
        (refusing(lambda r: "seed" in r, message="seed must be between 0 and 1000"), "seed", {"top_k": -1}),
        (refusing(lambda r: "top_k" in r, message="Argument not known: top_k"), "top_k", {"min_p": 0.0}),
        (refusing(lambda r: "repetition_penalty" in r, message="repetition_penalty is not enabled here"),
         "repetition_penalty", {"min_p": 0.0}),
        (refusing(lambda r: "max_tokens" in r, message=MAX_TOKENS), "max_tokens", {"max_completion_tokens": 1024}),
        (refusing(lambda r: {"temperature", "top_p"} <= r.keys(), message=BOTH), "top_p", {"temperature": 1.0}),
        (refusing(lambda r: "seed" in r, message="seed is not supported"), "seed", {}),
        (refusing(lambda r: "seed" in r, message="bad", param="seed"), "seed", {}),
        (refusing(lambda r: r.get("top_k") == -1, message="top_k must be 0 or at least 1, got -1"), "-", {"top_k": 0}),
        (both(*(refusing(lambda r, n=name: n in r, message=UNKNOWN + name)
                for name in ("top_k", "min_p", "repetition_penalty"))), "repetition_penalty", {"temperature": 1.0}),
    ],
)  # fmt: skip
def test_a_field_that_a_server_refuses_is_left_out_and_said_once(pairs, capsys, answer, without, with_):
    with served(always=answer) as (url, chat):
        assert main(remote(pairs, url, *ALL_SET)) == 0
        said = capsys.readouterr().err
    results, value = overall(pairs)
    assert value == 1.0 and results["counts"]["answered"] == 12
    lines = [json.loads(line) for line in (pairs / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        assert without not in line["sent"] and line["sent"].items() >= with_.items()
    assert said.count("which the server does not take. Every answer is kept with what was sent") >= 1
    assert len(set(said.splitlines())) == len(said.splitlines())  # nothing twice
    assert len(chat.asked) <= 12 + 4 * 4


def test_a_server_without_a_system_is_asked_in_the_users_turn(pairs, capsys):
    """As templates of Gemma and of Mistral's first models have it."""
    message = "Conversation roles must alternate user/assistant/user/assistant/..."
    answer = refusing(lambda r: r["messages"][0]["role"] == "system", message=message)
    with served(always=answer) as (url, chat):
        assert main(remote(pairs, url)) == 0
    assert overall(pairs)[1] == 1.0
    (turn,) = chat.asked[-1]["messages"]
    assert turn["role"] == "user" and turn["content"].startswith("You are an expert assessor")
    assert "it takes no turn of the system" in capsys.readouterr().err
    line = json.loads((pairs / "out" / "answers.jsonl").read_text().splitlines()[-1])
    assert line["sent"]["messages"] == "the system's words begin the user's turn"


def test_too_large_a_limit_is_no_reason_for_another_name(pairs, capsys):
    answer = refusing(lambda r: True, message="max_tokens is too large: 1024. This model supports at most 512")
    with served(always=answer) as (url, _):
        assert main(remote(pairs, url)) == 1
    said = capsys.readouterr().err
    assert "supports at most 512" in said and "max_completion_tokens" not in said


def test_fastapis_way_to_refuse_a_field(pairs):
    """By the place in `detail`, with status 422."""

    def answer(request):
        if "min_p" in request:
            return 422, {"detail": [{"loc": ["body", "min_p"], "msg": "extra fields not permitted"}]}
        return answer_of(request)

    with served(always=answer) as (url, _):
        assert main(remote(pairs, url)) == 0
    assert overall(pairs)[1] == 1.0


def test_of_two_that_exclude_each_other_the_one_without_effect_goes(pairs):
    answer = refusing(lambda r: {"temperature", "top_p"} <= r.keys(), message=BOTH)
    with served(always=answer) as (url, chat):
        assert main(remote(pairs, url, "--sampling.top_p", 0.9)) == 0
    assert chat.asked[-1]["top_p"] == 0.9 and "temperature" not in chat.asked[-1]


def test_a_value_that_the_user_chose_is_for_the_user_to_change(pairs, capsys):
    answer = refusing(
        lambda r: r["temperature"] > 2, message="temperature must be between 0 and 2", param="temperature"
    )
    with served(always=answer) as (url, chat):
        assert main(remote(pairs, url, "--sampling.temperature", 3)) == 1
    assert "temperature must be between 0 and 2" in capsys.readouterr().err and len(chat.asked) <= 4


@pytest.mark.parametrize("always", ["nonsense", "empty"])
def test_a_server_of_another_protocol_is_given_up_at_once(pairs, capsys, always):
    with served(always=always) as (url, chat):
        assert main(remote(pairs, url)) == 1
    said = capsys.readouterr().err
    assert "does not answer as OpenAI's chat protocol has it" in said and len(chat.asked) <= 8


def test_a_mistake_cannot_cost_a_fortune(pairs, capsys):
    with served() as (url, chat):
        assert main(remote(pairs, url, "--endpoint.max_requests", 11)) == 1
        assert "12 answers are to be asked for, and endpoint.max_requests allows 11" in capsys.readouterr().err
        assert not chat.asked
        assert main(remote(pairs, url, "--endpoint.max_requests", 12)) == 0
    with served("500", "500") as (url, chat):
        command = remote(pairs, url, "--endpoint.max_requests", 12, "--endpoint.concurrency", 1, output="more")
        assert main(command) == 1
        assert "endpoint.max_requests 12 have been sent" in capsys.readouterr().err and len(chat.asked) == 12
        assert main(command) == 0
        assert len(chat.asked) == 14
    assert overall(pairs, "more")[1] == 1.0


@pytest.mark.parametrize(
    "reply",
    [
        (401, {"error": {"message": "Incorrect API key provided: sk-very-secret"}}),
        (200, {"error": {"code": 401, "message": "Incorrect API key provided: Bearer sk-very-secret"}}),
        (200, {"error": "Incorrect API key provided: sk-very-secret"}),
        (200, {"Incorrect API key provided": "sk-very-secret"}),
    ],
)
def test_a_key_is_in_no_error_and_no_file(pairs, capsys, monkeypatch, reply):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")  # as `cat key` gives it

    def answer(request):
        return reply

    with served(always=answer) as (url, _):
        assert main(remote(pairs, url, "--endpoint.tries", 1)) == 1
    said = capsys.readouterr().err
    assert "Incorrect API key provided" in said and "***" in said and "very-secret" not in said
    for file in (pairs / "out").iterdir():
        assert "very-secret" not in file.read_text()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:secret@127.0.0.1:9/v1", "endpoint.url holds a name or password"),
        ("http://127.0.0.1:9/v1?key=secret", "endpoint.url goes on behind ? or #"),
        ("ftp://127.0.0.1/v1", "endpoint.url is not an address"),
    ],
)
def test_an_address_that_would_lose_or_show_something_is_refused(pairs, capsys, url, words):
    assert main(remote(pairs, url)) in (1, 2)
    said = capsys.readouterr().err
    assert words in said and "secret" not in said


def test_a_proxy_in_the_environment_does_not_stand_before_this_machine(pairs, monkeypatch, capsys):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with served() as (url, _):
        assert main(remote(pairs, url)) == 0
    assert main(remote(pairs, "http://judge.invalid:8000/v1", output="far")) == 1
    said = capsys.readouterr().err
    assert "through the proxy that HTTP_PROXY or ALL_PROXY names (NO_PROXY=judge.invalid goes around it)" in said
    monkeypatch.setenv("HTTP_PROXY", "nonsense://proxy")
    monkeypatch.setenv("http_proxy", "nonsense://proxy")
    assert main(remote(pairs, "http://judge.invalid:8000/v1", output="bad")) == 1
    said = capsys.readouterr().err
    assert "the environment names a proxy that cannot be used" in said and "Traceback" not in said
