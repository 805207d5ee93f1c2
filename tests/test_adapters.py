"""A judge as the reward of other trainers: what they hand over, what they get, and what is asked only once."""

import asyncio
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from patarm_jax.adapters import openrlhf, trl, tunix, verl
from patarm_jax.adapters.judge import judge_of
from patarm_jax.adapters.texts import shown, split_query
from patarm_jax.cli import main
from patarm_jax.config.adapters import AdapterConfig
from patarm_jax.config.flags import settings_of
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import make_world, write_pairs
from patarm_jax.judge.prompts import pointwise
from patarm_jax.types import UsageError, UserError
from tests.chat_server import BAD, GOOD, answer_to, served
from tests.test_imports import ARRAYS, PACKAGE


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATARM_JUDGE", raising=False)


def messages(text, role="user"):
    return [{"role": role, "content": text}]


def chat(prompt, completion=None):
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return text if completion is None else f"{text}{completion}<|im_end|>"


# ------------------------------------------------------------------------------------------------------ what is shown


@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("Rice?", "18 minutes."),
        (messages("Rice?"), messages("18 minutes.", "assistant")),
        (np.array(messages("Rice?"), dtype=object), "<think>Hm.</think>18 minutes."),
        (chat("Rice?"), "18 minutes.<|im_end|>"),
        (chat("Rice?") + "<think>\n\n</think>\n\n", "18 minutes.<|im_end|><|endoftext|>"),
        (chat("Rice?") + "<think>\n", "Hm.</think>\n18 minutes."),
        (
            [*messages("Rice?"), *messages("How much?", "assistant"), *messages("100 g")],
            [*messages("I look it up.", "assistant"), *messages("18", "tool"), *messages("18 minutes.", "assistant")],
        ),
    ],
)
def test_forms_of_prompts_and_completions(prompt, completion):
    found = shown(prompt, completion)
    assert found.response == "18 minutes." and not found.reason
    turns = [{"role": "user", "content": found.prompt}] if isinstance(found.prompt, str) else found.prompt
    assert turns[0] == {"role": "user", "content": "Rice?"}


@pytest.mark.parametrize(
    "prompt, completion, reason",
    [
        ("Rice?", "", "no answer stands behind the thinking"),
        (chat("Rice?") + "<think>\n", "Rice takes", "no answer stands behind the thinking"),
        ([], "18", "the prompt is empty"),
        ("Rice?", messages("18", "tool"), "the completion does not end with what the assistant says"),
        ("Rice?", [{"role": "assistant", "content": None}], "message without text in the completion"),
        (messages([{"type": "image", "url": "x"}]), "18", "message in the prompt that holds something else than text"),
        ("Rice?", 0.5, "the completion that is a number"),
    ],
)
def test_what_cannot_be_shown_is_said(prompt, completion, reason):
    assert shown(prompt, completion).reason.startswith(reason)


def test_a_response_that_is_json_stays_text():
    text = json.dumps(messages("Rice?"))
    assert shown("Write JSON.", text).response == text


def test_the_policys_template_may_open_its_thinking():
    """A prompt of messages does not show it; one response that closes it tells, or the setting."""
    with served() as (url, _):
        prompts, half = [messages("Topic")] * 2, messages("I look for an answer", "assistant")
        reward = trl.make_reward(url)
        assert reward(prompts=prompts[:1], completions=[half]) == [2.0]  # nothing tells yet
        both = [half, messages(f"Hm.</think>{GOOD}", "assistant")]
        assert reward(prompts=prompts, completions=both) == [None, 9.0]
        assert reward(prompts=prompts[:1], completions=[half]) == [None]
        assert trl.make_reward(url, opens_thinking="yes")(prompts=prompts[:1], completions=[half]) == [None]
        assert trl.make_reward(url, opens_thinking="no")(prompts=prompts, completions=both)[0] == 2.0


def test_tools_that_were_called_are_shown():
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    prompt = [*messages("Rice?"), called, *messages("noon", "tool"), *messages("And now?")]
    found = shown(prompt, [called, *messages("noon", "tool"), *messages("18 minutes.", "assistant")])
    assert found.response == "18 minutes." and "clock" in found.prompt[1]["content"]


@pytest.mark.parametrize(
    "prompt, query, expected",
    [
        ("Rice?", "Rice? 18.", " 18."),
        (chat("Où est le café ?"), chat("Où est le café ?", "Là."), "Là.<|im_end|>"),
        (chat("Two  spaces"), chat("Two spaces", "Yes."), "Yes.<|im_end|>"),
        (chat("Rice?") + "<think>\n", chat("Rice?", "<think>\nHm.</think>18."), "Hm.</think>18.<|im_end|>"),
        (chat("A long prompt that was cut"), chat("prompt that was cut", "18."), None),
        ("Rice?", "Beans? No.", None),
    ],
)
def test_prompt_and_response_in_one_text(prompt, query, expected):
    import unicodedata

    assert split_query(query, unicodedata.normalize("NFD", prompt)) == expected


def test_thinking_is_seen_where_it_is_to_be():
    assert shown("Rice?", "<think>Hm.</think>18.", sees_thinking=True).response == "<think>Hm.</think>18."


# ---------------------------------------------------------------------------------------------------------------- trl


def test_trl_in_both_forms_and_its_logs():
    logged = {}
    with served() as (url, handler):
        reward = trl.make_reward(url, votes=2)
        texts = reward(
            prompts=["Topic"] * 3,
            completions=[GOOD, BAD, "<think>hm"],
            completion_ids=[[1]] * 3,
            domain=["math", "chat", None],
            log_metric=lambda name, value: logged.update({name: value}),
            log_extra=lambda name, values: logged.update({name: values}),
            trainer_state=None,
        )
        asked = len(handler.asked)
        conversational = reward(
            prompts=[messages("Topic")] * 2, completions=[messages(GOOD, "assistant"), messages(BAD, "assistant")]
        )
        shown_first = {json.dumps(request["messages"]) for request in handler.asked[:4]}
    assert texts == [9.0, 2.0, None] and conversational == [9.0, 2.0]
    assert asked == 4  # two votes of two responses
    by_domain = [("math", GOOD), ("chat", BAD)]
    assert shown_first == {json.dumps(list(pointwise("Topic", text, domain=name))) for name, text in by_domain}
    assert logged["judge/without_reward"] == pytest.approx(1 / 3)
    assert logged["without_reward"][2] == "no answer stands behind the thinking"
    assert logged["judgement"][0].count("<answer>9</answer>") == 2


def test_the_environment_names_the_judge(tmp_path, monkeypatch):
    with served() as (url, _):
        (tmp_path / "judge.yaml").write_text(f"endpoint: {{url: {url}, concurrency: 2}}\nkept: ''\n")
        monkeypatch.setenv("PATARM_JUDGE", str(tmp_path / "judge.yaml"))
        assert trl.reward(prompts=["Topic"], completions=[GOOD]) == [9.0]
        assert judge_of(None, {}).config.endpoint.timeout == 120  # what the file leaves out keeps its default
    assert not (tmp_path / "judge-answers").exists()


def test_a_judge_that_cannot_be_read_has_no_score():
    with served("unread", always="") as (url, _):
        given = trl.make_reward(url, votes=1)(prompts=["Topic"], completions=[GOOD])
        with_number = trl.make_reward(url, votes=1, missing=1.5, kept="other")
    assert given == [None]
    assert with_number.__name__ == "patarm_judge"


def test_what_is_missing_may_be_a_number():
    with served(always="unread") as (url, _):
        assert trl.make_reward(url, missing=1.5)(prompts=["Topic"], completions=[GOOD]) == [1.5]


def test_an_answer_is_paid_once(tmp_path):
    """Neither twice in a batch, nor in a later one, nor by another process; the same response, the same score."""
    with served() as (url, handler):
        reward = trl.make_reward(url)
        assert reward(prompts=["Topic"] * 4, completions=[GOOD] * 4) == [9.0] * 4
        assert reward(prompts=["Topic"], completions=[GOOD]) == [9.0]
        assert len(handler.asked) == 1
        code = (
            "from patarm_jax.adapters.trl import make_reward\n"
            f"print(make_reward({url!r})(prompts=['Topic', 'Topic'], completions=[{GOOD!r}, {BAD!r}]))"
        )
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout == "[9.0, 2.0]\n", done.stderr
        assert len(handler.asked) == 2
    files = list((tmp_path / "judge-answers").rglob("*.jsonl"))
    assert len(files) == 2  # one for each process that was there at a time


def test_other_settings_are_another_judge():
    with served() as (url, handler):
        assert trl.make_reward(url)(prompts=["Topic"], completions=[GOOD]) == [9.0]
        assert trl.make_reward(url, sampling={"temperature": 0.5})(prompts=["Topic"], completions=[GOOD]) == [9.0]
        assert [request.get("temperature") for request in handler.asked] == [None, 0.5]


def test_what_comes_too_late_has_no_reward_and_is_kept():
    with served("slow") as (url, handler):
        reward = trl.make_reward(url, time_limit=0.3)
        assert reward(prompts=["Topic"], completions=[GOOD]) == [None]
        given = judge_of(url, {"time_limit": 0.3})
        question = given._question(shown("Topic", GOOD), None)
        assert given._asked.ask([question])[0].result(10)[0].score == 9.0
        assert reward(prompts=["Topic"], completions=[GOOD]) == [9.0]
        assert len(handler.asked) == 1


def test_a_server_that_is_gone_ends_the_training_with_the_cause():
    with served(always="404") as (url, _):
        reward = trl.make_reward(url, endpoint={"model": "judge", "tries": 1})
        with pytest.raises(UserError, match=r"has not answered the last 8 questions.*check endpoint\.url"):
            reward(prompts=[f"Topic {n}" for n in range(8)], completions=[GOOD] * 8)
    with pytest.raises(UserError, match="does not list its models"):
        trl.make_reward("http://127.0.0.1:9/v1", endpoint={"tries": 1})


def test_a_judge_that_dies_in_the_middle_ends_the_training_after_a_few_steps():
    dead = threading.Event()
    failing = (500, {"error": "gone"})
    with served(always=lambda request: failing if dead.is_set() else answer(request)) as (url, _):
        reward = trl.make_reward(url, endpoint={"tries": 1})

        def step(number):
            return reward(prompts=[f"Topic {number} {n}" for n in range(6)], completions=[GOOD] * 6)

        assert step(0) == [9.0] * 6
        dead.set()
        assert step(1) == step(2) == [None] * 6  # the failed ones are no zeros, and might be an accident
        with pytest.raises(UserError, match="has not answered the last 18 questions"):
            step(3)
        dead.clear()
        assert step(3) == [9.0] * 6  # what failed is asked again


def test_a_first_failure_among_answers_is_no_dead_judge():
    def judge(request):
        if "Topic 0" in str(request):
            return 500, {"error": "no"}
        time.sleep(0.2)
        return answer(request)

    with served(always=judge) as (url, _):
        reward = trl.make_reward(url, endpoint={"tries": 1})
        given = reward(prompts=[f"Topic {n}" for n in range(4)], completions=[GOOD] * 4)
        alone = [
            verl.compute_score("data", GOOD, "", {"question": f"Topic 0{n}"}, judge=url, endpoint={"tries": 1})
            for n in "ab"
        ]
    assert given == [None, 9.0, 9.0, 9.0] and [one["score"] for one in alone] == [None, None]


def test_what_nobody_waits_for_any_more_is_not_asked():
    """Else one slow step would keep the judge from the next ones."""

    def judge(request):
        time.sleep(0.25)
        return answer(request)

    with served(always=judge) as (url, handler):
        reward = trl.make_reward(url, endpoint={"concurrency": 2}, time_limit=1.5)
        steps = [reward(prompts=[f"Topic {step} {n}" for n in range(40)], completions=[GOOD] * 40) for step in range(3)]
        judged = [sum(score == 9.0 for score in step) for step in steps]
        # So many that come too late, one after the other, are no dead judge where others came.
        assert max(judged) < 40 - 16 and min(judged) >= 3
        time.sleep(1)
        assert len(handler.asked) <= sum(judged) + 2 * 3  # and those that were under way at the end of a step


def test_a_reward_function_goes_to_other_processes(tmp_path):
    """Pickled, as to a worker, and forked, where no thread is left of the parent's."""
    with served() as (url, _):
        reward = pickle.loads(pickle.dumps(trl.make_reward(url)))
        assert reward(prompts=["Topic"], completions=[GOOD]) == [9.0] and reward.__name__ == "patarm_judge"
        code = (
            "import os\n"
            "from patarm_jax.adapters.trl import make_reward\n"
            f"reward = make_reward({url!r})\n"
            f"reward(prompts=['First'], completions=[{GOOD!r}])\n"
            "child = os.fork()\n"
            f"print(reward(prompts=['Then'], completions=[{BAD!r}]), flush=True)\n"
            "os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        assert done.stdout == "[2.0]\n[2.0]\n", done.stderr


def test_what_failed_elsewhere_does_not_hide_what_came(tmp_path):
    with served("500", always="") as (url, handler):
        first = judge_of(url, {"endpoint": {"tries": 1}, "seed": 1})
        assert first.opinions([shown("Topic", GOOD)], [None])[0].score is None
        folder = next((tmp_path / "judge-answers").iterdir())
        lines = (folder / "answers-0.jsonl").read_text().splitlines()
        came = json.loads(lines[1]) | {"kind": "ANSWER", "status": "OK", "score": 7.0, "reason": ""}
        (folder / "answers-1.jsonl").write_text("\n".join([lines[0], json.dumps(came)]) + "\n")
        again = judge_of(url, {"endpoint": {"tries": 1, "timeout": 50}, "seed": 1})
        assert again.opinions([shown("Topic", GOOD)], [None])[0].score == 7.0
        assert len(handler.asked) == 1


def test_texts_do_not_pile_up_in_memory(tmp_path):
    with served() as (url, _):
        judge = judge_of(url, {})
        assert "<answer>9" in judge.opinions([shown("Topic", GOOD)], [None])[0].judgements[0]
        assert all(not one.text for one in judge._answers.known.values())
        assert "<answer>9" in next((tmp_path / "judge-answers").rglob("*.jsonl")).read_text()
        nowhere = judge_of(url, {"kept": ""})
        assert nowhere.opinions([shown("Topic", GOOD)], [None])[0].score == 9.0


def test_one_refusal_among_answers_is_its_own():
    def refuse(request):
        return 400, {"error": {"message": "This model's maximum context length is 8 tokens."}}

    with served(always=lambda request: refuse(request) if "LONG" in str(request) else answer(request)) as (url, _):
        given = trl.make_reward(url)(prompts=["Topic", "LONG", "Topic 2"], completions=[GOOD, GOOD, BAD])
    assert given == [9.0, None, 2.0]


def answer(request):
    return 200, answer_to(request)


def test_many_threads_ask_one_judge():
    """As verl's reward workers do: each response by itself, while others are under way."""
    with served() as (url, handler):
        results, asked = {}, {"judge": url, "endpoint": {"concurrency": 4}}

        def ask(number):
            text = GOOD if number % 2 else BAD
            info = {"question": f"Topic {number % 8}"}
            results[number] = verl.compute_score("data", text, "", info, **asked)["score"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: 9.0 if number % 2 else 2.0 for number in range(32)}
        assert len(handler.asked) == 8


# ------------------------------------------------------------------------------------------------------------- the rest


def test_verl_by_sample_in_both_ways():
    with served() as (url, _):
        info = {"question": np.array(messages("Topic"), dtype=object), "domain": "math"}

        async def all_at_once():
            texts = [GOOD, BAD, "<think>hm"]
            return await asyncio.gather(*(verl.compute_score_async("data", t, "", info, judge=url) for t in texts))

        later = asyncio.run(all_at_once())
        now = verl.compute_score("data", GOOD, "", info, judge=url, reward_model_tokenizer=object())
        routed = verl.compute_score("data", BAD, "", info, reward_router_address=url.split("/")[2])
    assert now == {"score": 9.0, "judged": 1.0, "without_reward": ""} and routed["score"] == 2.0
    assert [one["score"] for one in later] == [9.0, 2.0, None]
    assert later[2]["without_reward"] == "no answer stands behind the thinking"
    assert [{name: type(value) for name, value in one.items() if name != "score"} for one in later] == [
        {"judged": float, "without_reward": str}
    ] * 3


def test_verl_without_the_prompt_is_told_where_to_put_it():
    with served() as (url, _), pytest.raises(UserError, match="extra_info holds index, and no question"):
        verl.compute_score("data", GOOD, "", {"index": 3}, judge=url)


def test_tunix_gets_no_zero_for_a_failed_judgement():
    with served() as (url, _):
        reward = tunix.make_reward(url)
        given = reward(prompts=["a", "a", "a", "b"], completions=[GOOD, BAD, "<think>hm", BAD], mode="train")
        nothing = reward(prompts=["a", "a"], completions=["<think>hm", ""], mode="train")
        with_number = tunix.make_reward(url, missing=1.0)(prompts=["a", "a"], completions=["<think>hm", BAD])
    assert given == [9.0, 2.0, 5.5, 2.0] and nothing == [5.0, 5.0] and with_number == [1.0, 2.0]


def test_openrlhf_as_it_was_recorded():
    """The request and the response of the contract, by a real HTTP server, and the function of a file."""
    keys = json.loads((Path(__file__).parent / "goldens" / "openrlhf" / "get_reward.json").read_text())
    prompts = [chat("Topic"), chat("Topic")]
    queries = [chat("Topic", GOOD), chat("Topic", "<think>hm")]
    with served() as (url, _):
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        port = free_port()
        command = [sys.executable, "-m", "patarm_jax.adapters.openrlhf", "--judge", url, "--port", str(port)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                request = {"query": queries, "prompts": prompts, "labels": ["", ""]}
                assert request.keys() == keys["request"].keys()
                given = post(f"http://127.0.0.1:{port}/get_reward", request)
                wrong = post(f"http://127.0.0.1:{port}/get_reward", {"texts": []}, status=400)
            finally:
                server.terminate()
    assert given.keys() == keys["response"].keys()
    assert given == {"rewards": [9.0, None], "scores": [0.9, None], "extra_logs": {"judged": [1.0, 0.0]}}
    assert "not a request of OpenRLHF" in wrong["error"]


@pytest.mark.parametrize("adapter", [trl, tunix])
def test_a_trainer_that_takes_all_functions_of_the_module_finds_one(adapter):
    """Tunix's rule for a module that its YAML names: public ones that stand in it."""
    every = inspect.getmembers(adapter, inspect.isfunction)
    own = [name for name, one in every if one.__module__ == adapter.__name__ and not name.startswith("_")]
    assert own == ["reward"] and adapter.make_reward.__name__ == "make_reward"


def test_openrlhf_by_its_file_and_its_flags(monkeypatch):
    """As `--reward.remote_url /path/to/openrlhf.py` loads it."""
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with served() as (url, _):
        monkeypatch.setenv("PATARM_JUDGE", url)
        assert module.reward_func([chat("Topic", GOOD)], [chat("Topic")], [""])["rewards"].tolist() == [9.0]
        judge = judge_of(url, settings_of(AdapterConfig, ["--missing", "5"]))
        assert judge.config.missing == 5.0


def test_openrlhf_by_a_function(monkeypatch):
    torch = pytest.importorskip("torch")
    with served() as (url, _):
        monkeypatch.setenv("PATARM_JUDGE", url)
        given = openrlhf.reward_func([chat("Topic", GOOD)], [chat("Topic")], [""])
        failed = openrlhf.reward_func([chat("Topic", "<think>hm")], [chat("Topic")], [""])
        cut = openrlhf.reward_func(["opic" + GOOD], [chat("Topic")], [""])
    assert torch.equal(given["rewards"], torch.tensor([9.0])) and torch.equal(given["scores"], torch.tensor([0.9]))
    assert failed["rewards"] is None and cut["rewards"] is None


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def post(url, content, status=200):
    import urllib.error

    data = json.dumps(content).encode()
    for _ in range(200):
        try:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as response:
                assert response.status == status
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            assert error.code == status
            return json.loads(error.read())
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.mark.parametrize("adapter", ["trl", "verl", "tunix", "openrlhf"])
def test_an_adapter_needs_neither_jax_nor_a_model(adapter):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ARRAYS!r}))  # whoever imports one of them gets an ImportError
from patarm_jax.adapters import {adapter}
from patarm_jax.adapters.judge import judge_of
from patarm_jax.adapters.texts import shown, split_query
judge = judge_of(sys.argv[1], {{}})
print(judge.opinions([shown("Topic", {GOOD!r})], [None])[0].score)
"""
    with served() as (url, _):
        environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": os.environ["PATH"]}
        command = [sys.executable, "-c", code, url]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "9.0\n", done.stderr


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "no judge is named"),
        ({"endpoint": {"url": "http://x/v1"}, "model": {"path": "judge"}}, "both endpoint.url and model.path"),
        ({"endpoint": {"url": "http://x/v1"}, "vote": 2}, "unknown key vote"),
        ({"endpoint": {"url": "http://x/v1"}, "votes": 0}, "votes is 0"),
        ("missing.yaml", "cannot read the config missing.yaml"),
    ],
)
def test_settings_that_cannot_be_meant(settings, said):
    with pytest.raises((UsageError, UserError), match=said):
        trl.make_reward(settings)


def test_a_judge_in_this_process_says_what_patarm_judge_says(tmp_path):
    world = make_world(1, 10, 10)
    write_pairs(tmp_path / "pairs.jsonl", world.train)
    write_untrained_model(tmp_path / "model", tmp_path / "pairs.jsonl", 1)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    model = {"path": str(tmp_path / "model"), "dtype": "float32"}
    prompts = [pair["prompt"] for pair in pairs for _ in "ab"]
    completions = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    logged = {}
    settings = {"model": model, "sampling": {"max_new_tokens": 16, "temperature": 0.0}}
    given = trl.make_reward(settings)(
        prompts=prompts,
        completions=completions,
        domain=[pair["domain"] for pair in pairs for _ in "ab"],
        log_extra=lambda name, values: logged.update({name: values}),
    )
    command = ["judge", tmp_path / "model", "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "scores.jsonl"]
    drawn = ["--sampling.temperature", "0", "--sampling.max_new_tokens", "16", "--model.dtype", "float32"]
    main([str(word) for word in [*command, *drawn]])
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    said = [one["text"] for row in rows for side in row["judgements"].values() for one in side]
    assert logged["judgement"] == said and len(set(said)) > 1
    assert given == [None] * 20  # random weights write no judgement that could be read
    with pytest.raises(UsageError, match="vllm serve"):
        verl.compute_score("data", "text", "", {"question": "Topic"}, judge=settings)
