"""Judges behind an endpoint: what is asked, what is tried again, what is paid for, and when it is given up."""

import json
import re
import signal
import subprocess
import sys
import time
from email.utils import formatdate

import pyarrow.parquet
import pytest

from patarm_jax.cli import main
from tests.chat_server import ENVIRONMENT, overall, remote, served, write_pairs


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


@pytest.mark.parametrize("judge", ["pointwise", "pairwise"])
def test_an_endpoint_judges(pairs, judge):
    with served() as (url, chat):
        assert main(remote(pairs, url, "--judge", judge, "--votes", 3)) == 0
    results, value = overall(pairs)
    assert value == 1.0 and results["valid"] == 1.0 and results["model"] == "served-judge"
    assert len(chat.asked) == 6 * 2 * 3
    assert len({request["seed"] for request in chat.asked}) == len(chat.asked)
    if judge == "pairwise":
        assert results["position"]["same in both orders"] == 1 and results["position"]["chose the first"] == 0.5
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    assert all(row["text"].startswith("<think>hm</think><generate_rubrics>") and row["tokens"] == 12 for row in table)


def test_what_a_server_is_asked(pairs):
    """The settings of sampling, and seeds that hang on --seed, the question and the vote alone."""

    def requests(*more):
        with served() as (url, chat):
            command = remote(pairs, url, "--endpoint.concurrency", 1, *more, output=f"asked{len(more)}")
            assert main(command) == 0
        return chat.asked

    (request, *_), seeds = requests(), [one["seed"] for one in requests("--votes", 2)]
    assert request | {"seed": 0, "messages": []} == {
        "model": "served-judge", "messages": [], "max_tokens": 1024, "seed": 0,
    }  # fmt: skip
    results = json.loads((pairs / "asked0" / "results.json").read_text())
    assert results["sampling"] == {"temperature": None, "top_k": None, "top_p": None, "max_new_tokens": 1024}
    summary = (pairs / "asked0" / "summary.md").read_text()
    assert "Rubrics adaptive, temperature, top-p, top-k as the server has it, at most 1,024 new tokens" in summary
    assert [turn["role"] for turn in request["messages"]] == ["system", "user"]
    assert request["seed"] == seeds[0] and seeds[0] != seeds[1]  # of the second vote
    other = ["--seed", 1, "--endpoint.model", "named", "--endpoint.thinking", "off"]
    other += ["--sampling.temperature", 0.6, "--sampling.top_p", 0.95, "--sampling.top_k", 20]
    (request, *_) = requests(*other, "--sampling.max_new_tokens", 64)
    assert request["seed"] not in seeds
    assert request | {"seed": 0, "messages": []} == {
        "model": "named", "messages": [], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0,
        "repetition_penalty": 1.0, "max_tokens": 64, "seed": 0, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    (request, *_) = requests("--sampling.top_p", 0.5, "--sampling.top_k", 0, "--seed", 2)
    assert {name: request[name] for name in ("top_p", "top_k")} == {"top_p": 0.5, "top_k": -1}
    assert not {"temperature", "min_p", "repetition_penalty"} & request.keys()


def test_what_may_pass_is_tried_again(pairs):
    trouble = ["429", "500", "nonsense", "empty", "hang up", "slow", "trickle"]
    with served(*trouble) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.timeout", 1.0)) == 0
    results, value = overall(pairs)
    assert value == 1.0 and results["failed"] == 0
    assert len(chat.asked) == 12 + len(trouble)


def test_thinking_of_the_models_own_is_not_the_judgements(pairs):
    with served(*["thinks"] * 12) as (url, _):
        assert main(remote(pairs, url)) == 0
    results, value = overall(pairs)
    assert value == 1.0 and results["valid"] == 1.0


def test_a_server_that_refuses_everything_gives_no_result(pairs, capsys):
    with served(always="400") as (url, chat):
        assert main(remote(pairs, url)) == 1
        assert "answers 400: " in capsys.readouterr().err and len(chat.asked) <= 4  # as many as go at a time
        chat.always = ""
        assert not (pairs / "out" / "results.json").exists()
        assert main(remote(pairs, url)) == 0  # nothing was final: no judge had answered
    assert overall(pairs)[1] == 1.0


def test_a_question_that_is_refused_alone_gives_no_result(tmp_path, capsys):
    row = {"prompt": "Hi", "chosen": "a good answer", "rejected": "no", "domain": "chat"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with served(always="too long") as (url, _):
        assert main(remote(tmp_path, url)) == 1
    said = capsys.readouterr().err
    assert "no question was answered, the first one because: refused: 400" in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_busy_server_is_waited_for(pairs):
    """That it is busy is no try, however often it says so."""
    with served(*["429"] * 8) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.tries", 1, "--endpoint.concurrency", 2)) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == 20


@pytest.mark.parametrize("said", ["3", "a date", "Fri, 31 Dec 1999 23:59:59 GMT", "soon", "nan", "inf", "-1"])
def test_as_long_as_the_server_says(pairs, said):
    """By seconds or by a date: longer than the one to two seconds that are waited anyhow."""
    with served("429") as (url, chat):
        chat.retry_after = formatdate(time.time() + 300, usegmt=True) if said == "a date" else said
        command = remote(pairs, url, "--endpoint.concurrency", 1)
        if said == "a date":  # a minute at most, which no test waits for
            process = subprocess.Popen([sys.executable, "-m", "patarm_jax", *command], env=ENVIRONMENT)
            while not chat.asked:
                time.sleep(0.02)
            time.sleep(4)
            assert len(chat.asked) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 1
            return
        assert main(command) == 0
        assert overall(pairs)[1] == 1.0
        first, second = chat.times[:2]
        assert (second - first >= 3) == (said == "3")


def test_why_nothing_comes_is_told(pairs, capsys):
    with served("429", "429", "500") as (url, _):
        assert main(remote(pairs, url, "--endpoint.concurrency", 3)) == 0
    said = capsys.readouterr().err
    assert said.count("trying again, ") == 1 and "requests under way: 429: " in said  # once a minute


def test_money_that_is_spent_does_not_come_by_waiting(pairs, capsys):
    with served(*["quota"] * 20) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 2)) == 1
    assert "insufficient_quota" in capsys.readouterr().err and len(chat.asked) <= 4


def test_what_is_cut_off_or_empty_is_an_answer(pairs):
    """It is paid for, kept, and told of."""
    with served("cut", "nothing") as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert len(chat.asked) == 12
    results, _ = overall(pairs)
    assert (results["failed"], results["valid"], results["cut"]) == (0, 10 / 12, 2 / 12)
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    assert [(row["status"], row["cut"], row["tokens"]) for row in table[:3]] == [
        ("BAD_TAGS", True, 12), ("BAD_TAGS", True, 12), ("OK", False, 12),
    ]  # fmt: skip
    assert "cut off at the limit of new tokens 16.7 %" in (pairs / "out" / "summary.md").read_text()


def test_only_a_busy_server_is_given_up_by_the_clock(pairs):
    """A broken one gets all its tries, however long they take; the record says how often it was asked."""
    alone = ["--endpoint.concurrency", 1, "--endpoint.busy", 0.5]
    with served(*["500"] * 3) as (url, chat):
        assert main(remote(pairs, url, *alone, "--endpoint.tries", 4)) == 0
    assert overall(pairs)[0]["failed"] == 0 and len(chat.asked) == 15
    with served(*["429"] * 2) as (url, chat):
        assert main(remote(pairs, url, *alone, output="busy")) == 1
    assert overall(pairs, "busy")[0]["failed"] == 1
    table = pyarrow.parquet.read_table(pairs / "busy" / "judgements.parquet").to_pylist()
    assert [row["reason"] for row in table if row["status"] == "FAILED"] == ['after 2 requests: 429: {"error": "429"}']


def test_one_refusal_among_answers_is_that_questions_own(pairs):
    with served("", "", "", "400") as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert len(chat.asked) == 12  # it is not asked again
    assert overall(pairs)[0]["counts"]["refused"] == 1


@pytest.mark.parametrize("status", ["403", "404"])
def test_an_address_that_is_wrong_now_and_then_is_asked_again(pairs, status):
    with served("", "", "", status) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 1
        assert overall(pairs)[0]["failed"] == 1
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert len(chat.asked) == 13 and overall(pairs)[1] == 1.0


def test_those_under_way_tell_whether_a_refusal_is_for_all(pairs, capsys):
    """The first answer that comes is a refusal; nothing that was paid for meanwhile is lost."""
    with served("400", *["slow"] * 3) as (url, chat):
        assert main(remote(pairs, url)) == 0
        assert overall(pairs)[0]["counts"]["refused"] == 1 and len(chat.asked) == 12
    with served(*["403"] * 50) as (url, chat):
        assert main(remote(pairs, url, output="all")) == 1
        assert "answers 403" in capsys.readouterr().err and len(chat.asked) <= 4
        chat.plan.clear()
        assert main(remote(pairs, url, output="all")) == 0
    assert overall(pairs, "all")[1] == 1.0


def test_what_is_paid_for_is_kept_when_the_key_goes(pairs, capsys):
    with served("", "slow", "slow", "401") as (url, chat):
        assert main(remote(pairs, url)) == 1
        assert "answers 401" in capsys.readouterr().err
        kept = (pairs / "out" / "answers.jsonl").read_text().count('"status": "OK"')
        assert kept >= 3
        assert main(remote(pairs, url)) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == kept + 1 + (12 - kept)


@pytest.mark.parametrize("odd", ["tokens without end", "tokens beyond count", "no tokens", "nested"])
def test_odd_numbers_of_a_server_break_nothing(pairs, odd):
    with served(odd) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == 12 + (odd == "nested")


def test_many_questions_may_be_refused_where_others_are_answered(pairs):
    """So long that the model cannot read them, say; what was never asked comes before what was refused."""
    alone = ["--endpoint.concurrency", 1, "--votes", 3]
    with served("", *["400"] * 30) as (url, chat):
        assert main(remote(pairs, url, *alone)) == 0
    assert overall(pairs)[0]["counts"]["refused"] == 30 and len(chat.asked) == 36
    with served() as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1, "--votes", 4)) == 0
    assert len(chat.asked) == 12  # the fourth votes


GONE = [
    "Your credit balance is too low to access the API. Please go to Plans & Billing",
    "Key limit exceeded (total limit)",
    "API key expired. Please renew the API key.",
    "The model `judge-x` is not loaded",
]


@pytest.mark.parametrize("words", GONE)
@pytest.mark.parametrize("status", [400, 403])
def test_what_ends_everything_is_never_final(pairs, capsys, words, status):
    """Money, keys and models go in the middle of things; what is lacking then is asked when they are back."""
    gone = lambda _: (status, {"error": {"message": words}})  # noqa: E731
    with served("", "", "", always=gone) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 1
        assert words[:20] in capsys.readouterr().err and len(chat.asked) == 4
        chat.always = ""
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert len(chat.asked) == 4 + 9
    assert overall(pairs)[1] == 1.0


def test_refusals_that_no_answer_follows_are_asked_once_more(pairs):
    """The judge may be gone, in words that nobody knows. Refused in the same words again, they are final."""
    with served("", "", "", always="400") as (url, chat):
        alone = ["--endpoint.concurrency", 1]
        assert main(remote(pairs, url, *alone)) == 1
        assert overall(pairs)[0]["counts"]["failed"] == 9
        assert main(remote(pairs, url, *alone)) == 0
        assert overall(pairs)[0]["counts"]["refused"] == 9 and len(chat.asked) == 12 + 9


def test_a_refusal_before_the_server_went_away_is_asked_once_more(pairs):
    """Alone at the end it would be final; here what followed were failures, so that it may have been their first."""
    with served("", "", "", "400", *["500"] * 100) as (url, chat):
        command = remote(pairs, url, "--endpoint.concurrency", 1, "--votes", 4)
        assert main([*command, "--endpoint.tries", "1"]) == 1
        chat.plan.clear()
        assert main(command) == 0
    found, accuracy = overall(pairs)
    assert (found["counts"]["refused"], found["counts"]["failed"], accuracy) == (0, 0, 1.0)


def test_where_every_answer_is_a_refusal_that_is_the_result(pairs, capsys):
    refusal = {"choices": [{"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}]}
    with served(always=lambda _: (200, refusal)) as (url, chat):
        assert main(remote(pairs, url)) == 0
        assert "none of the 12 answers could be read" in capsys.readouterr().err
        assert main(remote(pairs, url)) == 0 and len(chat.asked) == 12
    assert overall(pairs)[0]["counts"]["refused"] == 12


def test_a_moved_address_is_named(pairs, capsys):
    moved = {"Location": "http://elsewhere:8000/v1/chat/completions"}
    with served(always=lambda _: (307, {}, moved)) as (url, _):
        assert main(remote(pairs, url)) == 1
    assert "307: moved to http://elsewhere:8000/v1/chat/completions; give that address" in capsys.readouterr().err


def test_what_was_never_asked_comes_before_what_failed(pairs):
    alone = ["--endpoint.concurrency", 1, "--endpoint.tries", 1]
    with served("", *["500"] * 11) as (url, chat):
        assert main(remote(pairs, url, *alone)) == 1
    with served() as (url, chat):
        assert main(remote(pairs, url, *alone, "--votes", 2)) == 0
    lines = [json.loads(line) for line in (pairs / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    assert [one["vote"] for one in lines[12:]] == [1] * 12 + [0] * 11 and len(chat.asked) == 23


def test_a_server_that_went_away_stops_the_evaluation(pairs, capsys):
    with served("", "", *["500"] * 100) as (url, chat):
        command = remote(pairs, url, "--endpoint.concurrency", 1, "--votes", 4)
        assert main([*command, "--endpoint.tries", "1"]) == 1
        assert "did not answer the last 21 questions, the last one after 1 requests: 500" in capsys.readouterr().err
        assert len(chat.asked) == 23
        chat.plan.clear()
        assert main(command) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == 23 + 46


def test_what_fails_again_for_the_same_reason_is_not_written_again(pairs):
    for _ in range(2):
        with served(*["500"] * 2) as (url, _chat):
            assert main(remote(pairs, url, "--endpoint.concurrency", 1, "--endpoint.tries", 1)) == 1
    lines = (pairs / "out" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 12


def test_what_never_comes_is_failed_counted_and_asked_again(pairs):
    with served(*["500"] * 3) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.tries", 1, "--endpoint.concurrency", 1)) == 1
    results, value = overall(pairs)
    assert results["failed"] == 3 and results["valid"] == 0.75 and value < 1  # never a score of 0: a tie
    assert overall(pairs, rule="half")[1] > value
    with served() as (url, chat):
        assert main(remote(pairs, url)) == 0
        assert len(chat.asked) == 3  # the others are paid for
        assert overall(pairs)[1] == 1.0
        assert main(remote(pairs, url, "--votes", 2)) == 0
        assert len(chat.asked) == 3 + 12  # more votes keep those there are
        assert main(remote(pairs, url, "--votes", 2)) == 0
        assert len(chat.asked) == 3 + 12


def test_a_stopped_evaluation_pays_for_nothing_twice(pairs):
    with served(*["slower"] * 100) as (url, chat):
        command = [sys.executable, "-m", "patarm_jax", *remote(pairs, url)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(chat.asked) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1 and "of 12 answers; run the same command again to resume" in said
        assert re.search("waiting for [1-4] answers that are under way, 600 s at most", said)
        paid = len(chat.asked)  # what was under way was waited for
        assert 5 <= paid < 12 and (pairs / "out" / "answers.jsonl").read_text().count("\n") == 1 + paid
        chat.plan.clear()
        assert main(remote(pairs, url)) == 0
        assert len(chat.asked) == 12 and overall(pairs)[1] == 1.0


def test_a_key_that_is_missing_stops_everything(pairs, capsys):
    with served(*["401"] * 20) as (url, chat):
        assert main(remote(pairs, url)) == 1
    assert "401" in capsys.readouterr().err and len(chat.asked) <= 8


def test_a_key_is_sent(pairs, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with served() as (url, chat):
        seen = []
        original = chat.do_POST

        def noting(self):
            seen.append(self.headers["Authorization"])
            original(self)

        chat.do_POST = noting
        assert main(remote(pairs, url, "--endpoint.api_key_env", "MY_KEY")) == 0
    assert set(seen) == {"Bearer secret"}


def test_a_server_that_is_gone(pairs, capsys):
    assert main(remote(pairs, "http://127.0.0.1:9/v1", "--endpoint.tries", 1)) == 1
    assert "does not list its models: cannot reach the server" in capsys.readouterr().err
    assert main(remote(pairs, "127.0.0.1:9", "--endpoint.tries", 1)) == 1
    assert "endpoint.url is not an address" in capsys.readouterr().err
    assert main(remote(pairs, "127.0.0.1:9", "--endpoint.model", "named")) == 1
    assert "endpoint.url is not an address" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_nothing_is_paid_for_twice(pairs, small_disk, capsys):
    """The answers that found room are kept whole; with room again the rest is asked."""
    disk, resize = small_disk
    long = {"choices": [{"message": {"content": "x" * 3_000}, "finish_reason": "stop"}]}
    with served(always=lambda _: (200, long)) as (url, chat):
        command = remote(pairs, url, "--endpoint.concurrency", 1, "--votes", 16)
        command[command.index("--output") + 1] = str(disk / "out")
        assert main(command) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"patarm: cannot write {disk / 'out' / 'answers.jsonl'}: No space left on device; ")
        kept = (disk / "out" / "answers.jsonl").read_bytes().count(b"\n") - 1
        assert 0 < kept < 192 and len(chat.asked) == kept + 1
        resize("8m")
        assert main(command) == 0
        assert len(chat.asked) == kept + 1 + (192 - kept)
    lines = (disk / "out" / "answers.jsonl").read_text().splitlines()
    asked = {(one["question"], one["vote"]) for one in map(json.loads, lines[1:])}
    assert len(asked) == 192 == len(lines) - 1
