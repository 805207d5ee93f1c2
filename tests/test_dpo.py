"""Direct preference optimisation: TRL's values, torch's gradients, and whole runs; and SFT of policies."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from patarm_jax.arrays import PreferredPairs
from patarm_jax.cli import main
from patarm_jax.config.policy import DPOConfig
from patarm_jax.config.sections import DataSection, HeldoutSection, MeshSection, ModelSection
from patarm_jax.data.limits import Room
from patarm_jax.data.packing import preferred_batch, preferred_shape
from patarm_jax.data.pipeline import PairBatch, encode_pairs
from patarm_jax.data.prompts import read_answered_prompts, read_preferred_responses
from patarm_jax.evaluate.heldout_preferences import open_heldout_preferences
from patarm_jax.judge.forms import POLICY, POLICY_UNTHINKING
from patarm_jax.model import weights
from patarm_jax.model.sharding import MESH_AXES, make_mesh, place_batch
from patarm_jax.recipes.dpo import sums_of
from patarm_jax.recipes.programs import dpo_learner, two_streams
from patarm_jax.run.open_model import open_model
from patarm_jax.train.pair_losses import dpo
from patarm_jax.train.steps import dpo_loss
from patarm_jax.types import UserError
from tests.flags import FLAGS
from tests.runs import (
    CUBE,
    assert_nearly_equal,
    config_file,
    exported,
    lines_of,
    reward_config,
    run_as_two,
    run_whole_and_killed,
    timeless,
)
from tests.test_algorithm_goldens import cases
from tests.toys import hf_model, tiny_tokenizer_folder

ROWS = [
    {"prompt": "Rice?", "chosen": "18 minutes, with a lid.", "rejected": "No.", "domain": "chat"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "It is five, as far as I know."}]},
    {"prompt": "A poem about <|im_end|>, please.", "chosen": "Tea.", "rejected": "Rain, rain, rain."},
]  # fmt: skip


# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("trl_dpo", "trl/dpo"))
def test_loss_and_gradient_equal_trls(case):
    given, settings, out = case["inputs"], case["settings"], case["outputs"]

    def sides(name):
        rows = np.asarray(given[name], np.float32)
        return np.stack([rows[: len(rows) // 2], rows[len(rows) // 2 :]], axis=1)

    mask = sides("completion_mask") == 1
    reference = np.where(mask, sides("ref_logprobs"), 0).sum(axis=-1)
    weights = np.full(len(mask), len(mask) / mask[:, 0].sum(), np.float32)
    sft = dict(zip(settings["loss_type"], settings["loss_weights"], strict=True)).get("sft", 0.0)

    def loss(logprobs):
        found = dpo(logprobs, jnp.asarray(mask), reference, weights, settings["beta"], sft=sft)
        return found.loss[0] / found.loss[1], found.metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(sides("policy_logprobs")))
    np.testing.assert_allclose(value, out["loss"], rtol=1e-5)
    ours = np.concatenate([gradient[:, 0], gradient[:, 1]])
    np.testing.assert_allclose(ours, np.asarray(out["grad_policy_logprobs"]), rtol=1e-5, atol=2e-6)
    assert metrics["accuracy"][1] == len(mask)


def test_smoothing_and_weights_are_a_plain_loops():
    rng = np.random.default_rng(0)
    logprobs, reference = -rng.random((5, 2, 7)), -3 * rng.random((5, 2))
    lengths = rng.integers(1, 8, (5, 2))
    mask = np.arange(7) < lengths[..., None]
    weights = 1 / lengths[:, 0]
    found = dpo(*map(jnp.asarray, (logprobs, mask, reference, weights)), beta=0.3, smoothing=0.2, sft=0.5)
    expected = 0.0
    for of_pair, there, ref, weight in zip(logprobs, mask, reference, weights, strict=True):
        chosen, rejected = (one[members].sum() for one, members in zip(of_pair, there, strict=True))
        z = 0.3 * ((chosen - ref[0]) - (rejected - ref[1]))
        expected += 0.8 * np.log1p(np.exp(-z)) + 0.2 * np.log1p(np.exp(z)) - 0.5 * weight * chosen
    np.testing.assert_allclose(found.loss[0], expected, rtol=1e-5)


# ---- The network beside torch ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy of transformers', and pairs."""
    root = tmp_path_factory.mktemp("dpo")
    hf_model(3, vocab_size=512, tie_word_embeddings=True).save_pretrained(root / "saved")
    tiny_tokenizer_folder(root / "saved")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def of(folder, **changes):
    model = ModelSection(path=str(folder / "saved"), dtype="float32", remat="none")
    data = DataSection(path=str(folder / "pairs.jsonl"))
    return DPOConfig(model=model, data=data, thinking=False, pairs_per_step=3, **changes)


def pairs_of(config):
    model = open_model(config.model)
    preferences, _ = read_preferred_responses(config.data)
    room = Room(model.arch.max_position_embeddings)
    records, _ = encode_pairs(model.tokenizer, preferences, "adaptive", config.data, room, POLICY_UNTHINKING)
    lengths = tuple(side for record in records for side in record.lengths)
    return model, PairBatch(tuple(records), tuple(one.preference.id for one in records), lengths)


def torchs(folder, pairs, config, reference):
    """(loss, gradients by name) of torch, one response at a time."""
    import torch
    import transformers

    model = transformers.Qwen3ForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32)
    terms, crossed, tokens = [], 0.0, 0
    for record, kept in zip(pairs.records, reference, strict=True):
        (prompt,), sums = record.prompt_tokens, []
        for completion in record.completion_tokens:
            ids = torch.tensor(np.concatenate([prompt, completion])[None].astype(np.int64))
            logprobs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            sums.append(logprobs[range(len(completion)), ids[0, len(prompt) :]].sum())
        z = config.beta * ((sums[0] - kept[0]) - (sums[1] - kept[1]))
        terms.append(-torch.nn.functional.logsigmoid(z))
        crossed, tokens = crossed - sums[0], tokens + len(record.completion_tokens[0])
    loss = torch.stack(terms).mean() + config.sft_coef * crossed / tokens
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


REFERENCE = [(-40.0, -12.5), (-9.0, -80.25), (-20.0, -61.0)]


def test_the_whole_gradient_equals_torchs(folder, tmp_path):
    pytest.importorskip("torch", reason="the other side of this equality is torch's")
    config = of(folder, sft_coef=0.2)
    model, pairs = pairs_of(config)
    reference = {record.index: sums for record, sums in zip(pairs.records, REFERENCE, strict=True)}
    batch = preferred_batch(pairs, preferred_shape(pairs, 16), model.tokenizer.pad_id, reference)
    params, arch = weights.load(folder / "saved")
    loss = dpo_loss(two_streams(config, arch, make_mesh(MeshSection())), config.beta, sft=config.sft_coef)

    def mean(params):
        total, count = loss(params, None, batch).loss
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    expected, theirs = torchs(folder, pairs, config, REFERENCE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    weights.save(gradient, arch, tmp_path / "gradient", dtype="float32")  # under Hugging Face's names
    ours = safetensors.numpy.load_file(tmp_path / "gradient" / "model.safetensors")
    for name, mine in ours.items():
        np.testing.assert_allclose(mine, theirs[name], rtol=1e-4, atol=1e-5 * np.abs(theirs[name]).max(), err_msg=name)


def test_held_out_pairs_are_measured_as_torch_measures_them(folder):
    pytest.importorskip("torch", reason="the other side of this equality is torch's")
    (folder / "heldout.jsonl").write_text("".join(json.dumps({**row, "id": n}) + "\n" for n, row in enumerate(ROWS)))
    config = of(folder, heldout=HeldoutSection(path=str(folder / "heldout.jsonl"), split="", eval_every=2))
    config = dataclasses.replace(config, pairs_per_step=2)  # of three pairs one is left over
    model, pairs = pairs_of(config)
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
    heldout = open_heldout_preferences(sums_of, config, model, alone, training=[])
    heldout.reference.update({record.index: sums for record, sums in zip(heldout.records, REFERENCE, strict=True)})
    found = heldout(weights.load(folder / "saved", alone)[0], None)
    expected, _ = torchs(folder, pairs, config, REFERENCE)
    assert found["eval/loss"] == pytest.approx(expected, rel=1e-5)
    rewards = found["eval/rewards/chosen/mean"], found["eval/rewards/rejected/mean"]
    assert rewards[0] - rewards[1] == pytest.approx(found["eval/score_gap"], rel=1e-5)


def test_slices_and_devices_change_nothing(folder):
    def updated(mesh, micro_batches):
        config = of(folder, micro_batches=micro_batches, sft_coef=0.5)
        model, pairs = pairs_of(config)
        pairs = PairBatch(pairs.records * 4, pairs.ids * 4, pairs.lengths * 4)
        learner = dpo_learner(config, model.arch, mesh)
        state = learner.new_state(weights.load(folder / "saved", mesh)[0])
        rows = preferred_batch(pairs, preferred_shape(pairs, 16), model.tokenizer.pad_id, dict(enumerate(REFERENCE)))
        batch: PreferredPairs = place_batch(mesh, rows)
        return {name: float(value) for name, value in learner.update(state, None, batch)[1].items()}

    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
    whole = updated(alone, 1)
    assert whole["grad_norm"] > 0.1
    assert updated(alone, 4) == pytest.approx(whole, rel=1e-4)
    assert updated(make_mesh(MeshSection(data=2, fsdp=2, tensor=2)), 1) == pytest.approx(whole, rel=1e-4)


# ---- Runs -----------------------------------------------------------------------------------------------------------


def run_config(world, name, **sections):
    """As of a reward model, whose held-out pairs are not sampled either."""
    return reward_config(world, name, **{"thinking": False, "sft_coef": 0.1, **sections})


def test_a_killed_run_ends_like_a_whole_one(world, started):
    run_whole_and_killed(
        started, "dpo", run_config(world, "dpo_whole"), run_config(world, "dpo_killed"), world / "dpo_killed"
    )
    ours, theirs = (timeless(world / f"dpo_{name}") for name in ("killed", "whole"))
    assert ours == theirs and len(ours) == 7
    assert exported(world / "dpo_killed") == exported(world / "dpo_whole")
    assert [line["step"] for line in ours if "eval/loss" in line] == [3, 6, 7]
    assert (world / "dpo_killed" / "reference_heldout.json").is_file()
    first, last = ours[0], ours[-1]
    assert first["margin"] == 0 and first["dpo_loss"] == pytest.approx(
        np.log(2), rel=1e-5
    )  # the reference is the start
    assert last["dpo_loss"] < first["dpo_loss"] and last["margin"] > 0
    card = (world / "dpo_whole" / "export" / "README.md").read_text()
    assert "direct preference optimisation (β 0.1) and 0.1 × SFT on the chosen responses" in card
    kept = json.loads((world / "dpo_whole" / "reference.json").read_text())
    assert len(kept["sums"]) == 12
    adapted = run_config(world, "dpo_lora", lora={"rank": 2})
    started("dpo", adapted).end()
    lora = json.loads((world / "dpo_lora" / "reference.json").read_text())
    np.testing.assert_allclose(lora["sums"], kept["sums"], rtol=1e-5)
    assert lines_of(world / "dpo_lora")[0]["margin"] == 0


@pytest.mark.long
def test_eight_devices_and_two_processes_learn_as_one(world, started):
    two = {"run": {"steps": 3}, "optimizer": {"learning_rate": 1e-4}}
    started("dpo", run_config(world, "dpo_one", **two)).end()
    eight = run_config(world, "dpo_eight", **two, mesh=CUBE)
    started("dpo", eight, XLA_FLAGS=f"{FLAGS} --xla_force_host_platform_device_count=8").end()
    assert_nearly_equal(world / "dpo_eight", world / "dpo_one")
    run_as_two(started, "dpo", run_config(world, "dpo_pod", **two, mesh={**CUBE, "distributed": "auto"}))
    assert_nearly_equal(world / "dpo_pod", world / "dpo_eight")


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"heldout": {"path": "p.jsonl", "votes": 2}}, "heldout.votes is set, and the two responses of a held-out"),
        ({"heldout": {"path": "p.jsonl", "best": "valid"}}, "Choose accuracy_strict, accuracy_half or score_gap"),
        ({"smoothing": 0.5}, "smoothing is 0.5; allowed is 0 to below 0.5"),
        ({"sft_by": "responses", "sft_coef": 0.0}, "there is no SFT"),
    ],
)
def test_what_cannot_be_is_refused(world, capsys, sections, words):
    assert main(["dpo", str(run_config(world, "dpo_wrong", **sections))]) == 2
    assert words in capsys.readouterr().err


# ---- SFT of policies ------------------------------------------------------------------------------------------------


def test_responses_come_in_every_form(tmp_path):
    answer = {"role": "assistant", "content": "18 minutes."}
    turns = [{"role": "user", "content": "Rice?"}]
    rows = {
        "response": {"prompt": "Rice?", "response": "18 minutes."},
        "completion": {"prompt": turns, "completion": [answer]},
        "messages": {"messages": [*turns, answer]},
        "preference": {"prompt": "Rice?", "chosen": "18 minutes.", "rejected": "180."},
    }
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (found,), _ = read_answered_prompts(DataSection(path=str(path)))
        assert (found.preference.prompt, found.judgements) == (
            ({"role": "user", "content": "Rice?"},),
            ("18 minutes.",),
        ), name
    (tmp_path / "some.jsonl").write_text('{"prompt": "Rice?", "response": "18."}\n{"prompt": "Tea?"}\n')
    section = DataSection(path=str(tmp_path / "some.jsonl"))
    with pytest.raises(UserError, match=r"some\.jsonl:2 has no response, which SFT of a policy learns from"):
        read_answered_prompts(section)
    section = DataSection(path=str(tmp_path / "some.jsonl"), missing_judgements="drop")
    assert "dropped 1 × no response" in str(read_answered_prompts(section)[1])


@pytest.mark.parametrize("thinking", [True, False])
def test_a_policy_learns_what_transformers_would_show_it(world, thinking):
    """The prompt as the template begins the assistant's turn, and the response with its end."""
    from transformers import AutoTokenizer

    form = POLICY if thinking else POLICY_UNTHINKING
    path = world / "one.jsonl"
    path.write_text(json.dumps({"prompt": "Rice?", "response": "18 minutes."}) + "\n")
    tokenizer = open_model(ModelSection(path=str(world / "model"), weights="random")).tokenizer
    section = DataSection(path=str(path))
    (record,), _ = encode_pairs(tokenizer, read_answered_prompts(section)[0], "adaptive", section, Room(4096), form)
    theirs = AutoTokenizer.from_pretrained(world / "model")
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": "Rice?"}], add_generation_prompt=True, enable_thinking=thinking, tokenize=False
    )
    assert record.prompt_tokens[0].tolist() == theirs(asked, add_special_tokens=False).input_ids
    assert record.completion_tokens[0].tolist() == theirs("18 minutes.<|im_end|>", add_special_tokens=False).input_ids


@pytest.mark.long
def test_sft_of_a_policy_runs_and_resumes(world, started, capsys):
    more = {"judge": "policy_unthinking", "heldout": {"path": ""}}
    data = {"path": str(world / "pairs.jsonl"), "missing_judgements": "error"}
    whole, killed = (config_file(world, f"policy_{name}", "sft", data=data, **more) for name in ("whole", "killed"))
    run_whole_and_killed(started, "sft", whole, killed, world / "policy_killed")
    assert timeless(world / "policy_killed") == timeless(world / "policy_whole")
    assert exported(world / "policy_killed") == exported(world / "policy_whole")
    assert json.loads((world / "policy_whole" / "export" / "judge.json").read_text()) == {"judge": "policy"}
    for flags, words in (
        (["--heldout.path", str(world / "heldout.jsonl")], "nothing says what a policy's responses are worth here"),
        (["--data.missing_judgements", "template"], "there is none of a response"),
        (["--rubrics", "primary"], "a policy reads none"),
    ):
        assert main(["sft", str(whole), *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["grpo", str(config_file(world, "policy_grpo", "grpo", judge="policy"))]) == 2
    assert "`patarm policy` trains a policy" in capsys.readouterr().err
