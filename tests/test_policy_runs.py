"""Whole runs of policies: killed and resumed, on any mesh, with servers that die, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.numpy
import yaml

from patarm_jax.cli import main
from patarm_jax.config.load import from_mapping, load, to_yaml
from patarm_jax.config.policy import PolicyConfig
from tests.chat_server import FORM, completion, served
from tests.flags import FLAGS
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
from tests.test_policy import config_of, ordinal, short, with_prompts


@pytest.fixture(scope="module")
def folder(world):
    return with_prompts(world)


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
        sources = [
            ordinal(folder),
            short(weight=0.1),
            {"kind": "judge", "endpoint": {"url": url}, "votes": 2, "name": "far"},
        ]
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
    start("policy", eight, XLA_FLAGS=f"{FLAGS} --xla_force_host_platform_device_count=8").end()
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

    with served(always=answer) as (url, chat):
        source = {"kind": "judge", "name": "far", "endpoint": {"url": url, "tries": 1, "concurrency": 4}}
        config = config_of(folder, "dying", [source], run={"steps": 2})
        said = start("policy", config).end(1)
        assert "step 2: 8 of 12 responses have no reward, more than reward.max_failed 0.5 allows; far says" in said
        assert "when that is put right, run the same command again" in said
        assert len(lines_of(folder / "dying")) == 1
        count[0] = -100
        chat.asked.clear()
        start("policy", config).end()
        assert len(chat.asked) == 8  # the four that came are kept
    assert len(lines_of(folder / "dying")) == 2


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dapo", "gdpo"])
def test_runs_of_every_kind_go_on_and_are_read_back(folder, started, kind):
    start = start_in(folder, started)
    sources = [ordinal(folder), short(weight=0.1)]
    more = {"update": {"algorithm": "dapo"}, "dapo": {"max_rounds": 2}} if kind == "dapo" else {}
    combine = {"combine": "gdpo"} if kind == "gdpo" else {}
    config = config_of(folder, f"on_{kind}", sources, **more, run={"steps": 2}, reward=combine)
    start("policy", config).end()
    start("policy", config, "--run.steps", "3").end()
    lines = lines_of(folder / f"on_{kind}")
    assert len(lines) == 3 and all(abs(line["reward"]) > 0.1 for line in lines)
    assert main(["report", str(folder / f"on_{kind}")]) == 0
    assert main(["export", str(folder / f"on_{kind}"), str(folder / f"made_{kind}")]) == 0
    other = (folder / "prompts.jsonl").read_text().replace('"want": "tea"', '"want": "beer"')
    (folder / f"other_{kind}.jsonl").write_text(other)
    said = start("policy", config, "--run.steps", "4", "--data.path", folder / f"other_{kind}.jsonl").end(1)
    assert "data is" in said and "give another run folder" in said


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
        (
            {"reward": {"sources": [{"kind": "judge", "model": "m", "endpoint": {"url": "http://h/v1"}}]}},
            "sources.0.endpoint.url are given",
        ),
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
        ({"reward": {"sources": [{"model": "m", "name": "a/b"}]}}, "allowed are letters, digits"),
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


@pytest.mark.long
def test_a_run_against_the_policys_own_greedy_response_resumes(folder, started):
    reference = str(folder / "reference")
    sources = [{"kind": "pairwise", "model": reference, "sampling": {"max_new_tokens": 4}}, ordinal(folder)]
    config = config_of(folder, "against", sources, run={"steps": 2}, reward={"max_failed": 1.0})
    said = start_in(folder, started)("policy", config).end(1)  # random weights choose nothing that can be read
    assert "in 2 of 2 steps no response had a reward" in said
    assert lines_of(folder / "against")[-1]["rewards/pairwise/failed"] == 1
    other = ["--reward.sources.0.model", str(folder / "doubled"), "--run.steps", "3"]
    weights = folder / "doubled"
    if not weights.is_dir():
        shutil.copytree(folder / "reference", weights)
        tensors = safetensors.numpy.load_file(weights / "model.safetensors")
        safetensors.numpy.save_file({name: 2 * x for name, x in tensors.items()}, weights / "model.safetensors")
    said = start_in(folder, started)("policy", config, *other).end(1)
    assert "models of the reward.pairwise is" in said


@pytest.mark.long
def test_a_dry_run_names_every_program_and_weight(folder, capsys):
    """Of the policy, of its greedy response, of a judge and of the generator of the judge's rubrics."""
    reference, few = str(folder / "reference"), {"sampling": {"max_new_tokens": 4}, "max_rubric_tokens": 6}
    sources = [{"kind": "rubric_judge", "model": reference, "generator": reference, **few}]
    assert main(["policy", str(config_of(folder, "dry", sources, pairs_per_step=8)), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for writer in ("", "greedy response: ", "rubric_judge: ", "rubric_judge's generator: "):
        assert f"\n{writer}prefill: " in said and f"\n{writer}decode: " in said
    assert "rubric_judge 0." in said and "rubric_judge's generator 0." in said
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"endpoint": {"max_requests": 3, "url": "http://h/v1"}}, "endpoint.max_requests is set, and a run asks until"),
        ({"endpoint": {"tries": 3}, "model": "m"}, "endpoint is set, and its url is empty: no server is asked"),
        ({"endpoint": {"url": "h"}}, "endpoint.url is not an address"),
    ],
)
def test_endpoints_of_sources_are_checked(folder, capsys, source, words):
    config = config_of(folder, "unserved", [{"kind": "judge", **source}], pairs_per_step=8)
    assert main(["policy", str(config)]) in (1, 2)
    assert words in capsys.readouterr().err
