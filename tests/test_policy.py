"""Policies: their prompts, what sources say of responses, how that becomes a reward, and whole runs of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

from patarm_jax.ask.worth import open_models, open_sources
from patarm_jax.cli import main
from patarm_jax.config.load import from_mapping, load, to_yaml
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.config.sections import DataSection, MeshSection
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.data.prompts import read_prompts
from patarm_jax.data.tokenizer import decode
from patarm_jax.evaluate.responses import correlation
from patarm_jax.model.sharding import make_mesh
from patarm_jax.reward import combined_rewards
from patarm_jax.rollout.responses import NO_ANSWER, NO_BASELINE, Responses
from patarm_jax.types import Judgement, Preference, Status, UserError
from tests.chat_server import FORM, completion, served
from tests.runs import (
    CUBE,
    assert_nearly_equal,
    exported,
    judged_texts,
    judgements,
    lines_of,
    run_as_two,
    run_whole_and_killed,
    timeless,
)
from tests.test_algorithm_goldens import FLOAT32, array, cases
from tests.toys import TOPICS

FUNCTION = """
def short(prompts, completions, want, trainer_state, **more):
    assert [len(prompt) for prompt in prompts] == [1] * len(prompts) and trainer_state.global_step >= 0
    found = [completion[0]["content"] for completion in completions]
    return [None if len(text) % 5 == 0 else -float(len(text)) for text in found]

async def nothing(completions, **more):
    return [None] * len(completions)

def one_too_few(completions, **more):
    return [0.0] * (len(completions) - 1)

def broken(completions, **more):
    raise KeyError("want")
"""


@pytest.fixture(scope="module")
def folder(world):
    """Prompts, and functions that reward answers to them."""
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
        sources = [{"kind": "judge", "url": url, "votes": 2, "name": "far"}]
        (source,) = opened(folder, *sources)
        source.offer(responses_to("yes", "no", "mumble", None))
        found = source.collect(jax.random.key(0), 1)[0]
        assert [worth.value for worth in found] == [9, 2, None, None]
        assert len(chat.asked) == 3 * 2
        found = collected(source, responses_to("yes", "maybe", index=0))[0]
        assert [worth.value for worth in found] == [9, 2] and len(chat.asked) == 6 + 2


# ---- Whole runs -----------------------------------------------------------------------------------------------------


def start_in(folder, started):
    return lambda *arguments, **changes: started(
        *arguments, **{"PYTHONPATH": f"{Path(__file__).parents[1]}:{folder}"} | changes
    )


def test_a_killed_run_ends_like_a_whole_one_and_its_judge_is_not_paid_twice(folder, started):
    """A reward model here, a function, and a judge behind a server, with gold on held-out prompts."""
    start = start_in(folder, started)

    def answer(request):
        response = request["messages"][-1]["content"].partition("<response>")[2]
        return 200, completion(FORM.format(len(response) % 11))

    with served(always=answer) as (url, chat):
        heldout = {
            "path": str(folder / "prompts.jsonl"),
            "eval_every": 2,
            "limit": 5,
            "sampling": {"max_new_tokens": 6},
        }
        sources = [ordinal(folder), short(weight=0.1), {"kind": "judge", "url": url, "votes": 2, "name": "far"}]
        more = {"heldout": heldout, "gold": [short(name="truth")]}
        whole, killed = (config_of(folder, name, sources, **more) for name in ("whole", "killed"))
        start("policy", whole).end()
        asked = [json.dumps(one) for one in chat.asked]
        chat.asked.clear()
        run_whole_and_killed(start, "policy", config_of(folder, "again", sources, **more), killed, folder / "killed")
        ours = [json.dumps(one) for one in chat.asked]
    runs = [timeless(folder / name) for name in ("whole", "killed", "again")]
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 5
    assert exported(folder / "killed") == exported(folder / "whole")
    assert judgements(folder / "killed") == judgements(folder / "whole")
    assert sorted(ours) == sorted(asked * 2)  # of two runs
    last = runs[0][-1]
    assert {"rewards/ordinal/mean", "rewards/short/failed", "rewards/far/std", "gold/truth/mean", "eval/reward"} <= set(
        last
    )
    rows = judgements(folder / "whole")["step_000005.parquet"]
    assert {row["side"] for row in rows} == {"response"} and len(rows) == 12
    without = [row for row in rows if row["reward"] is None]
    assert without and all(row["advantage"] == 0 for row in without)
    for row in rows:
        number, penalty, score = (part.partition(": ")[2] for part in row["judgement"].split("\n\n")[:3])
        if row["reward"] is not None:
            total = float(number) + 0.1 * float(penalty) + float(score.split("\n")[0])
            assert row["reward"] == pytest.approx(total, abs=1e-3)
    card = (folder / "whole" / "export" / "README.md").read_text()
    assert "| reward | ordinal, 0.1 × short, far; 3 responses to each prompt |" in card and "truth" in card


@pytest.mark.long
@pytest.mark.parametrize("combine", ["sum", "gdpo"])
def test_eight_devices_and_two_processes_learn_as_one(folder, started, combine):
    start = start_in(folder, started)
    two = {"run": {"steps": 2}, "optimizer": {"learning_rate": 1e-4}, "reward": {"combine": combine}}
    sources = [ordinal(folder), short(weight=0.1)]
    mute = {"kind": "judge", "model": str(folder / "reference"), "votes": 2, "sampling": {"max_new_tokens": 4}}
    two["gold"] = [{**mute, "name": "mute"}, {**mute, "kind": "pairwise"}]
    two["heldout"] = {"path": str(folder / "prompts.jsonl"), "limit": 5, "sampling": {"max_new_tokens": 6}}
    two["reward"]["sources"] = sources
    start("policy", config_of(folder, f"one_{combine}", sources, **two)).end()
    eight = config_of(folder, f"eight_{combine}", sources, **two, mesh=CUBE)
    start(
        "policy", eight, XLA_FLAGS="--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    ).end()
    assert_nearly_equal(folder / f"eight_{combine}", folder / f"one_{combine}")
    assert judged_texts(folder / f"eight_{combine}") == judged_texts(folder / f"one_{combine}")
    pod = config_of(folder, f"pod_{combine}", sources, **two, mesh={**CUBE, "distributed": "auto"})
    run_as_two(start, "policy", pod)
    assert_nearly_equal(folder / f"pod_{combine}", folder / f"eight_{combine}")
    assert judgements(folder / f"pod_{combine}").keys() == judgements(folder / f"eight_{combine}").keys()


def test_a_server_that_dies_stops_the_run_with_everything_kept(folder, started):
    start, count = start_in(folder, started), [0]

    def answer(request):
        count[0] += 1
        return (200, completion(FORM.format(count[0] % 7))) if count[0] <= 16 else (500, {"error": "gone"})

    source = {"kind": "judge", "name": "far", "tries": 1, "concurrency": 4}
    with served(always=answer) as (url, chat):
        config = config_of(folder, "dying", [{**source, "url": url}], run={"steps": 2})
        said = start("policy", config).end(1)
        assert "step 2: far says nothing of 8 of 12 responses, more than reward.max_failed 0.5 allows" in said
        assert "when that is put right, run the same command again" in said
        assert len(lines_of(folder / "dying")) == 1
        count[0] = -100
        chat.asked.clear()
        start("policy", config).end()
        assert len(chat.asked) == 8  # the four that came are kept
    assert len(lines_of(folder / "dying")) == 2


def test_a_policy_is_no_judge_and_a_judge_no_policy(folder, started, capsys):
    start = start_in(folder, started)
    once = {"run": {"steps": 1}, "optimizer": {"warmup_steps": 0}}
    config = config_of(folder, "made", [short()], **once)
    start("policy", config).end()
    asked = ["--input", str(folder / "pairs.jsonl"), "--output", str(folder / "scores.jsonl")]
    assert main(["judge", str(folder / "made"), *asked]) == 2
    assert (
        "is a policy, which answers prompts and judges nothing, and is to be pointwise here" in capsys.readouterr().err
    )
    further = {"path": str(folder / "made"), "weights": "load"}
    again = config_of(folder, "further", [short()], **once, model=further)
    start("policy", again).end()
    judged_by_it = config_of(folder, "fooled", [{"kind": "judge", "model": str(folder / "made")}])
    assert main(["policy", str(judged_by_it)]) == 2
    assert "is a policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"reward": {"sources": []}}, "reward.sources is empty: nothing says what a response is worth"),
        ({"reward": {"sources": [{"kind": "judge"}]}}, "reward.sources.0 names no model"),
        ({"reward": {"sources": [{"kind": "judge", "model": "m", "url": "http://h/v1"}]}}, "both a model and a url"),
        ({"reward": {"sources": [{"kind": "function", "function": "f"}]}}, "allowed is module:name"),
        ({"reward": {"sources": [{"kind": "function", "function": "a:b", "votes": 2}]}}, "votes is set, and kind is"),
        (
            {"reward": {"sources": [{"kind": "scalar", "model": "m", "votes": 2}]}},
            "kind is scalar, which writes nothing",
        ),
        ({"reward": {"sources": [{"model": "m"}, {"model": "n"}]}}, "two sources are called judge"),
        ({"reward": {"sources": [{"modl": "m"}]}}, "unknown key reward.sources.0.modl. Did you mean"),
        ({"reward": {"sources": {"kind": "judge"}}}, "reward.sources is a list of sections"),
        ({"reward": {"combine": "gdpo", "normalise_std": True}}, "divides by deviations of its own"),
        ({"reward": {"sources": [{"model": "m", "votes": 0}]}}, "reward.sources.0.votes is 0"),
        ({"gold": [{"kind": "function", "function": "a:b"}]}, "heldout.path names no prompts"),
        ({"group_size": 1}, "a response that is compared with itself teaches nothing"),
        ({"heldout": {"best": "valid"}}, "which is of judges"),
    ],
)
def test_what_cannot_be_is_refused(folder, capsys, sections, words):
    assert main(["policy", str(config_of(folder, "wrong", [short()], **sections))]) == 2
    assert words in capsys.readouterr().err


def test_settings_of_sources_are_given_by_number(folder, capsys):
    config = str(config_of(folder, "numbered", [short()]))
    assert main(["policy", config, "--reward.sources.2.model", "m"]) == 2
    assert "has no section before it: there are 1" in capsys.readouterr().err
    changed = load(PolicyConfig, Path(config), ["--reward.sources.0.weight", "3", "--reward.sources.1.model", "m"])
    assert [source.weight for source in changed.reward.sources] == [3, 1] and changed.reward.sources[1].kind == "judge"
    assert from_mapping(PolicyConfig, yaml.safe_load(to_yaml(changed)), "there") == changed


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
        return source._share_won([SimpleNamespace(judgements=of_it) for of_it in judgements]).value

    assert worth("AA", "BB") == 1.0 and worth("BB", "AA") == 0.0 and worth("AA", "AA") == 0.5
    assert worth("AB", "BB") == 0.75 and worth("AA", [None, "B"]) == 1.0 and worth("AA", [None, None]) is None
    assert collected(source, responses_to("yes"))[0][0].said == NO_BASELINE


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


def test_a_run_against_the_policys_own_greedy_response_resumes(folder, started):
    reference = str(folder / "reference")
    sources = [{"kind": "pairwise", "model": reference, "sampling": {"max_new_tokens": 4}}, ordinal(folder)]
    config = config_of(folder, "against", sources, run={"steps": 2}, reward={"max_failed": 1.0})
    said = start_in(folder, started)("policy", config).end(1)  # random weights choose nothing that can be read
    assert "in 2 of 2 steps no response had a reward" in said
    assert lines_of(folder / "against")[-1]["rewards/pairwise/failed"] == 1
    other = ["--reward.sources.0.model", str(folder / "further"), "--run.steps", "3"]
    weights = folder / "further"
    if not weights.is_dir():
        shutil.copytree(folder / "reference", weights)
        tensors = safetensors.numpy.load_file(weights / "model.safetensors")
        safetensors.numpy.save_file({name: 2 * x for name, x in tensors.items()}, weights / "model.safetensors")
    said = start_in(folder, started)("policy", config, *other).end(1)
    assert "models of the reward.pairwise is" in said
