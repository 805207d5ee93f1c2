"""Policies: their prompts, what sources say of responses, how that becomes a reward, and whole runs of them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType

from patarm_jax.ask import worth_here
from patarm_jax.ask.worth import open_models, open_sources
from patarm_jax.config.load import load
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.config.sections import DataSection, MeshSection
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.data.prompts import read_prompts
from patarm_jax.data.tokenizer import decode
from patarm_jax.evaluate.responses import correlation
from patarm_jax.model.sharding import MESH_AXES, make_mesh
from patarm_jax.reward import combined_rewards
from patarm_jax.rollout.responses import NO_ANSWER, NO_BASELINE, Responses
from patarm_jax.types import Judgement, Preference, Status, UserError
from tests.chat_server import FORM, completion, served
from tests.test_algorithm_goldens import FLOAT32, array, cases
from tests.toys import TOPICS

FUNCTION = """
def short(prompts, completions, want, trainer_state, **more):
    assert all(prompt.startswith("Say ") or prompt == "Rice?" for prompt in prompts) and trainer_state.global_step >= 0
    return [None if len(text) % 5 == 0 else -float(len(text)) for text in completions]

def of_messages(prompts, completions, **more):
    assert prompts == [[{"role": "user", "content": "Rice?"}]] * len(prompts)
    return [len(completion[0]["content"]) for completion in completions]

def longest(completions, **more):
    return [len(text) for text in completions]

def in_words(completions, **more):
    return ["good"] * len(completions)

async def nothing(completions, **more):
    return [None] * len(completions)

def one_too_few(completions, **more):
    return [0.0] * (len(completions) - 1)

def broken(completions, **more):
    raise KeyError("want")
"""


@pytest.fixture(scope="module")
def folder(world):
    return with_prompts(world)


def with_prompts(world):
    """The world with prompts, and functions that reward answers to them."""
    rows = [{"prompt": f"Say {topic}.", "want": topic} for topic in TOPICS]
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "my_rewards.py").write_text(FUNCTION)
    return world


def config_of(folder, name, sources, **sections):
    base = {
        "model": {"path": str(folder / "model"), "weights": "random", "dtype": "float32", "remat": "none"},
        "data": {"path": str(folder / "prompts.jsonl")},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "run": {"folder": str(folder / name), "steps": 5, "checkpoint_every": 1, "show_every": 2, "tensorboard": False},
        "sampling": {"max_new_tokens": 8},
        "reward": {"sources": sources},
        "group_size": 3,
        "pairs_per_step": 4,
        "thinking": False,
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(base), encoding="utf-8")
    return path


def short(**more):
    return {"kind": "function", "function": "my_rewards:short", **more}


def ordinal(folder, **more):
    return {"kind": "ordinal", "model": str(folder / "reference"), **more}


# ---- Prompts --------------------------------------------------------------------------------------------------------


def test_prompts_come_in_every_form(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rice?"}]
    answer = {"role": "assistant", "content": "18 minutes."}
    rows = {
        "text": {"prompt": "Rice?"},
        "messages": {"prompt": turns},
        "dialogue": {"messages": [*turns, answer]},
        "preference": {"prompt": "Rice?", "chosen": "18 minutes.", "rejected": "180."},
        "implicit": {"chosen": [*turns, answer], "rejected": [*turns, {"role": "assistant", "content": "180."}]},
        "hh": {"prompt": "\n\nHuman: Rice?\n\nAssistant:"},
    }
    alone, with_system = ({"role": "user", "content": "Rice?"},), tuple(turns)
    expected = dict(zip(rows, (alone, with_system, with_system, alone, with_system, alone), strict=True))
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row | {"id": name, "more": 1}) + "\n")
        (found,), _ = read_prompts(DataSection(path=str(path)))
        assert found.prompt == expected[name], name
        assert (found.chosen, found.rejected, found.domain, found.row["more"]) == ("", "", "instruction_following", 1)


def test_a_file_without_prompts_says_what_it_has(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "Rice?"}\n')
    with pytest.raises(UserError, match=r"has no column prompt; it has instruction\. Needed is a prompt"):
        read_prompts(DataSection(path=str(path)))
    (found,), _ = read_prompts(DataSection(path=str(path), columns={"prompt": ("instruction",)}))
    assert found.prompt[0]["content"] == "Rice?"
    path.write_text('{"prompt": "Rice?"}\n{"prompt": "Rice?"}\n{"prompt": " "}\n')
    _, report = read_prompts(DataSection(path=str(path)))
    assert "dropped 1 × empty prompt" in str(report) and "1 kept row repeats an earlier prompt" in str(report)


# ---- Rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["sum", "gdpo"])
def test_rewards_are_a_plain_loops(combine):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(3, 5, 4)), np.array([1.0, 0.5, -2.0])
    values[0, 1, 2] = values[2, 3, :] = np.nan
    values[:, 4, :] = 1.0  # all equal
    rewards, valid = combined_rewards(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32), combine)
    whole = ~np.isnan(values).any(axis=0)
    expected = np.zeros((5, 4))
    for prompt in range(5):
        members = np.flatnonzero(whole[prompt])
        for source, weight in zip(values, weights, strict=True):
            group = source[prompt, members]
            if combine == "gdpo":
                spread = len(group) > 1 and np.ptp(group) > 0
                group = (group - group.mean()) / (group.std(ddof=1) + 1e-4) if spread else 0 * group
            expected[prompt, members] += weight * group
    if combine == "gdpo":
        known = expected[whole]
        expected[whole] = (known - known.mean()) / (known.std(ddof=1) + 1e-4)
    assert (np.asarray(valid) == whole).all() and whole.sum() == 20 - 1 - 4
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases("trl_combined", "trl/adv"))
def test_several_sources_are_combined_as_trl_does(case):
    given, settings = case["inputs"], case["settings"]
    values = np.asarray(given["rewards"], np.float32).T.reshape(2, -1, given["num_generations"])
    weights = jnp.asarray(settings["reward_weights"], jnp.float32)
    if settings["multi_objective_aggregation"] == "sum_then_normalize":
        total, _ = combined_rewards(jnp.asarray(values), weights, "sum")
        found = (total - total.mean(axis=1, keepdims=True)) / (total.std(axis=1, keepdims=True, ddof=1) + 1e-4)
    else:
        found, _ = combined_rewards(jnp.asarray(values), weights, "gdpo")
    np.testing.assert_allclose(found.reshape(-1), array(case["outputs"]["advantages"]), rtol=1e-4, atol=5e-6)
    assert FLOAT32["rtol"] <= 1e-4


def test_rewards_are_seen_to_grow_with_length():
    assert correlation(np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([[10, 20], [30, 1]])) == 1.0
    assert correlation(np.array([1.0, 1.0]), np.array([3, 9])) == 0.0


# ---- Sources --------------------------------------------------------------------------------------------------------


def responses_to(*answers, index=0):
    prompt = Preference(
        f"p{index}", ({"role": "user", "content": "Rice?"},), "", "", "chat", "", row={"prompt": "Rice?", "want": "x"}
    )
    record = EncodedPair(index, prompt, (np.array([1], np.int32),), places=(0,))
    return Responses(index, record, answers, [answer or "<think>" for answer in answers], [[1]] * len(answers))


def opened(folder, *sources):
    config = load(PolicyConfig, config_of(folder, "opened", list(sources)))
    mesh = make_mesh(MeshSection(fsdp=-1))
    return open_sources(config, open_models(config), mesh, folder / "answers")


def collected(source, *offered):
    for one in offered:
        source.offer(one)
    return source.collect(jax.random.key(3), 1)


@pytest.mark.parametrize(
    "kind",
    [{"kind": "judge", "votes": 2, "sampling": {"max_new_tokens": 6}}, {"kind": "ordinal"}],
    ids=["judge", "ordinal"],
)
def test_a_response_is_worth_the_same_in_any_company(folder, kind):
    (source,) = opened(folder, {**kind, "model": str(folder / "reference")})
    every = [responses_to("18 minutes.", None, "I like rice. " * 9, index=0), responses_to("No.", "Yes.", "", index=1)]
    together = collected(source, *every)
    for one in every:
        ((_, alone),) = collected(source, one).items()
        assert alone == together[one.index]
    assert together[0][1].value is None and together[0][1].said == NO_ANSWER
    said = {worth.said for group in together.values() for worth in group}
    values = [worth.value for group in together.values() for worth in group]
    assert len(said) > 4 if kind["kind"] == "judge" else sum(value is not None for value in values) == 5


def test_what_is_too_long_for_a_judge_has_no_value(folder):
    (source,) = opened(folder, ordinal(folder, max_prompt_tokens=400))
    ((_, (short_one, long_one)),) = collected(source, responses_to("Yes.", "rice " * 500)).items()
    assert short_one.value is not None and long_one.value is None
    assert "longer than max_prompt_tokens 400" in long_one.said


def test_a_function_is_called_as_trl_calls_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    short_one, nothing = opened(folder, short(), short(function="my_rewards:nothing"))
    found = collected(short_one, responses_to("abc", "abcde", None))[0]
    assert [worth.value for worth in found] == [-3.0, None, None]
    assert [worth.value for worth in collected(nothing, responses_to("a", "b"))[0]] == [None, None]
    messages, words = opened(folder, short(function="my_rewards:of_messages"), short(function="my_rewards:in_words"))
    one = responses_to("ab")
    row = {"prompt": [{"role": "user", "content": "Rice?"}]}
    asked = replace(one, record=replace(one.record, preference=replace(one.preference, row=row)))
    assert [worth.value for worth in collected(messages, asked)[0]] == [2]
    with pytest.raises(UserError, match=r"gives 'good' \(str\) for a completion\. Return a number for each"):
        collected(words, responses_to("a"))
    few, broken = opened(folder, short(function="my_rewards:one_too_few"), short(function="my_rewards:broken"))
    with pytest.raises(UserError, match="gives 1 values for 2 completions"):
        collected(few, responses_to("a", "b"))
    with pytest.raises(UserError, match="raises KeyError: 'want'"):
        collected(broken, responses_to("a", "b"))


def test_a_server_is_asked_at_once_and_never_twice(folder):
    """Each response gets the mean of its votes; what cannot be read counts in none."""

    def answer(request):
        user = request["messages"][-1]["content"]
        return 200, completion("nonsense" if "mumble" in user else FORM.format(9 if "yes" in user else 2))

    with served(always=answer) as (url, chat):
        sources = [{"kind": "judge", "endpoint": {"url": url}, "votes": 2, "name": "far"}]
        (source,) = opened(folder, *sources)
        source.offer(responses_to("yes", "no", "mumble", None))
        found = source.collect(jax.random.key(0), 1)[0]
        assert [worth.value for worth in found] == [9, 2, None, None]
        assert len(chat.asked) == 3 * 2
        found = collected(source, responses_to("yes", "maybe", index=0))[0]
        assert [worth.value for worth in found] == [9, 2] and len(chat.asked) == 6 + 2
        found = collected(source, responses_to("so", "so", "so", index=0))[0]  # equal responses are asked about once
        assert [worth.value for worth in found] == [2, 2, 2] and len(chat.asked) == 6 + 2 + 2


def test_what_has_failed_and_was_learnt_from_stays_failed(folder):
    """A run that goes on after a kill must not learn from what came only then; what was refused is asked again."""
    key = jax.random.key(0)
    with served("500", always=lambda request: (200, completion(FORM.format(4)))) as (url, chat):
        endpoint = {"url": url, "tries": 1, "concurrency": 1}
        source = {"kind": "judge", "name": "shaky", "endpoint": endpoint}
        (first,) = opened(folder, source)
        assert [worth.value for worth in collected(first, responses_to("a", "b"))[0]] == [None, 4]
        first.settle()
        first._open.close()
        (again,) = opened(folder, source)
        assert [worth.value for worth in collected(again, responses_to("a", "b"))[0]] == [None, 4]
        assert len(chat.asked) == 2
        again._open.close()
        (folder / "answers" / "shaky.jsonl").rename(folder / "answers" / "shaky.process-1.jsonl")
        (alone,) = opened(folder, source)  # of a run that had two processes
        alone.offer(responses_to("b"))
        assert alone.collect(key, 1)[0][0].value == 4 and len(chat.asked) == 2


# ---- Comparisons ----------------------------------------------------------------------------------------------------


def test_a_comparison_is_won_in_both_orders(folder):
    """Against the greedy response; a choice of the first whatever it says is worth a half."""
    sampling = {"max_new_tokens": 4}
    (source,) = opened(folder, {"kind": "pairwise", "model": str(folder / "reference"), "sampling": sampling})
    offered = replace(responses_to("yes"), baseline="base")
    shown = [decode(source.judge.tokenizer, one.tolist()) for one in source.opened.questions(offered, "yes")]
    first, second = (text.index("\nyes\n") < text.index("\nbase\n") for text in shown)
    assert first and not second

    def worth(*votes):
        """Of the choices of two votes in each order."""
        judgements = [[Judgement("", Status.OK, "", choice=choice) for choice in of_it] for of_it in votes]
        return source._share_won([SimpleNamespace(judgements=of_it) for of_it in judgements])

    def value(*votes):
        return worth(*votes).value

    assert worth("AA", "AB").orders == (1.0, 0.5) and worth("AB", [None, None]).orders == (0.5, None)
    assert value("AA", "BB") == 1.0 and value("BB", "AA") == 0.0 and value("AA", "AA") == 0.5
    assert value("AB", "BB") == 0.75 and value("AA", [None, "B"]) == 1.0 and value("AA", [None, None]) is None
    assert collected(source, responses_to("yes"))[0][0].said == NO_BASELINE


def test_what_the_questions_about_a_group_begin_with_is_read_once(folder, monkeypatch):
    """Some more tokens of prompts than there are different beginnings, and a third of all at most."""
    section = {"kind": "judge", "model": str(folder / "reference"), "sampling": {"max_new_tokens": 2}}
    config = load(PolicyConfig, config_of(folder, "once", [section]))
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    (source,) = open_sources(config, open_models(config), mesh, folder / "answers")
    every = [
        responses_to(*(f"{i} minutes of {word}." for i in range(5)), index=n) for n, word in enumerate(("rice", "tea"))
    ]
    asked = [source.opened.questions(one, answer)[0].tolist() for one in every for answer in one.answers]
    groups, judged = [], worth_here.judge
    monkeypatch.setattr(worth_here, "judge", lambda *given: [groups.append(one.group) or one for one in judged(*given)])
    collected(source, *every)
    read, whole = sum(group.read for group in groups), sum(map(len, asked))
    beginnings = {tuple(tokens[: place + 1]) for tokens in asked for place in range(len(tokens))}
    assert len(beginnings) <= read < whole / 3


@pytest.mark.parametrize("kind", ["rubric_judge", "judge"])
def test_a_group_is_judged_by_one_rubric_of_its_prompt(folder, kind):
    reference = str(folder / "reference")
    more = {"max_rubric_tokens": 6, "sampling": {"max_new_tokens": 4}}
    (source,) = opened(folder, {"kind": kind, "model": reference, "generator": reference, **more})
    every = [replace(responses_to("yes", "no", index=index), baseline="base") for index in range(2)]
    rubrics = source._rubrics(every, jax.random.key(0))
    assert len(rubrics) == 2 and rubrics[0] == rubrics[1] and rubrics[0]  # of one prompt, written greedily
    shown = [decode(source.judge.tokenizer, q.tolist()) for q in source.opened.questions(every[0], "yes", rubrics[0])]
    assert len(shown) == (2 if kind == "rubric_judge" else 1)
    assert all(f"<rubrics>\n{rubrics[0]}\n</rubrics>" in text for text in shown)
    found = collected(source, *every)
    assert [len(found[index]) for index in range(2)] == [2, 2]
