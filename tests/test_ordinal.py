"""An ordinal reward model: its loss and gradient are torch's, its numbers transformers' own, wherever it is asked."""

import json
import re

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from patarm_jax.cli import main
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.config.sections import DataSection, MeshSection, ModelSection
from patarm_jax.data.limits import Room
from patarm_jax.data.packing import scored_batch, scored_shape
from patarm_jax.data.pipeline import PairBatch, encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.scores import opened_answer, room_for, score_tokens
from patarm_jax.data.tokenizer import decode, load_tokenizer
from patarm_jax.judge.forms import ORDINAL
from patarm_jax.judge.prompts import ordinal
from patarm_jax.model import weights
from patarm_jax.model.sharding import MESH_AXES, TRAIN_RULES, make_mesh, place_batch
from patarm_jax.recipes.programs import ordinal_learner, two_streams
from patarm_jax.run.open_model import load_params, open_model
from patarm_jax.train.pair_losses import ordinal as ordinal_loss
from patarm_jax.train.steps import ordinal_loss as loss_of_pairs
from tests.runs import exported, lines_of, reward_config, run_whole_and_killed, timeless
from tests.toys import hf_model, tiny_tokenizer_folder

ROWS = [
    {"prompt": f"Say {a} about tea.", "chosen": f"I like tea {b}.", "rejected": f"{c} tea"}
    for a, b, c in (("a word", "much", "No"), ("nothing", "with milk", "Oh,"), ("it", "", "Bad"), ("a", "b", "c"))
]


def test_the_loss_is_a_loop_over_all_pairs_of_scores():
    rng = np.random.default_rng(0)
    logprobs = rng.normal(size=(3, 2, 11)) * 3 - 4
    found = ordinal_loss(logprobs.astype(np.float32))
    expected, rewards, outside = [], [], []
    for chosen, rejected in np.exp(logprobs):
        outside.append(1 - (chosen.sum() + rejected.sum()) / 2)
        chosen, rejected = chosen / chosen.sum(), rejected / rejected.sum()
        expected.append(-np.log(sum(chosen[a] * rejected[b] for a in range(11) for b in range(a))))
        rewards.append([sum(s * p[s] for s in range(11)) for p in (chosen, rejected)])
    rewards = np.array(rewards)
    values = {name: float(total / count) for name, (total, count) in found.metrics.items()}
    assert float(found.loss[0] / found.loss[1]) == values["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert values["outside"] == pytest.approx(np.mean(outside), rel=1e-5)
    assert values["accuracy"] == np.mean(rewards[:, 0] > rewards[:, 1])
    assert values["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4)
    assert values["rewards/chosen/mean"] == pytest.approx(rewards[:, 0].mean(), rel=1e-5)


def test_a_pair_that_is_certainly_wrong_still_has_a_gradient():
    """All of the chosen response's probability on 0: no log of 0, which would end a run."""
    logprobs = np.full((1, 2, 11), -200.0, np.float32)
    logprobs[0, 0, 0] = logprobs[0, 1, 10] = 0.0

    def loss(logprobs):
        return ordinal_loss(logprobs).loss[0]

    value, gradient = jax.value_and_grad(loss)(logprobs)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient).max() > 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ordinal")
    model = hf_model(seed=4, vocab_size=512, max_position_embeddings=1024)
    model.save_pretrained(tiny_tokenizer_folder(root / "saved"))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def case_of(folder, **changes):
    """The config, the model, the pairs encoded, and these as a batch."""
    section = ModelSection(path=str(folder / "saved"), dtype="float32", remat="none")
    data = DataSection(path=str(folder / "pairs.jsonl"), domain="chat")
    config = RewardModelConfig(model=section, data=data, head="ordinal", **changes)
    model = open_model(section, "ordinal")
    preferences, _ = read_preferences(config.data)
    records, _ = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data, Room(1024), ORDINAL)
    lengths = tuple(side for record in records for side in record.lengths)
    pairs = PairBatch(tuple(records), tuple(one.preference.id for one in records), lengths)
    scores = score_tokens(model.tokenizer)
    return config, model, records, scored_batch(pairs, scored_shape(pairs, 16, scores), 0, scores)


def torchs(folder, records, scores):
    """(loss, expected scores, gradients by name) of torch, one continuation at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32)

    def probabilities(prefix):
        logprobs = []
        for ids in scores:
            row = torch.tensor([[*prefix.tolist(), *ids]])
            found = model(row).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
            logprobs.append(found[range(len(ids)), list(ids)].sum())
        return torch.stack(logprobs).softmax(0)

    losses, rewards = [], []
    for record in records:
        chosen, rejected = map(probabilities, record.prompt_tokens)
        losses.append(-torch.log((torch.outer(chosen, rejected)).tril(-1).sum()))
        rewards.append([(p * torch.arange(11)).sum().item() for p in (chosen, rejected)])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), np.array(rewards), {name: p.grad.numpy() for name, p in model.named_parameters()}


def test_the_whole_gradient_equals_torchs(folder, tmp_path):
    pytest.importorskip("torch", reason="the other side of this equality is torch's")
    config, model, records, batch = case_of(folder)
    params, arch = weights.load(folder / "saved")
    loss = loss_of_pairs(two_streams(config, arch, make_mesh(MeshSection())))

    def mean(params):
        found = loss(params, None, batch)
        return found.loss[0] / found.loss[1], found.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    expected, rewards, theirs = torchs(folder, records, score_tokens(model.tokenizer))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    weights.save(gradient, arch, tmp_path / "gradient", dtype="float32")  # under Hugging Face's names
    ours = safetensors.numpy.load_file(tmp_path / "gradient" / "model.safetensors")
    for name, mine in ours.items():
        np.testing.assert_allclose(mine, theirs[name], rtol=1e-4, atol=1e-5 * np.abs(theirs[name]).max(), err_msg=name)
    for side, name in enumerate(("chosen", "rejected")):
        total, count = metrics[f"rewards/{name}/mean"]
        np.testing.assert_allclose(total / count, rewards[:, side].mean(), rtol=1e-4)


def test_slices_and_devices_change_nothing(folder):
    """A pair is never cut."""

    def updated(mesh, micro_batches):
        config, model, _, batch = case_of(folder, micro_batches=micro_batches)
        learner = ordinal_learner(config, model.arch, mesh)
        state = learner.new_state(load_params(config.model, model, mesh, 0, TRAIN_RULES, np.float32))
        _, metrics = learner.update(state, None, place_batch(mesh, batch))
        return {name: float(value) for name, value in metrics.items()}

    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
    in_slices = updated(alone, 4)
    assert in_slices["grad_norm"] > 0.01
    assert updated(make_mesh(MeshSection(data=4, fsdp=1, tensor=2)), 1) == pytest.approx(in_slices, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- the question


def test_the_answer_begins_as_qwen3_writes_it_without_thinking(real_inputs):
    tokenizer = load_tokenizer(real_inputs / "qwen3_tokenizer")
    messages = ordinal("2 + 2?", "4")
    text = tokenizer.fast.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    asked = tokenizer.fast.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    ids = opened_answer(tokenizer)
    assert asked + decode(tokenizer, ids) == text + "<answer>"
    assert ids == tokenizer.fast(text + "<answer>", add_special_tokens=False).input_ids[-len(ids) :]
    assert max(map(len, score_tokens(tokenizer))) == 5 == room_for(100, tokenizer, ORDINAL, 7).new_tokens


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_learns_and_is_measured_as_eval_and_its_card_measure(world, capsys):
    start = {"path": str(world / "reference"), "weights": "load"}
    config = reward_config(
        world, "ordinal", head="ordinal", model=start, optimizer={"learning_rate": 0.003}, run={"steps": 6}
    )
    assert main(["reward-model", str(config), "--mesh.fsdp", "8", "--pairs_per_step", "8"]) == 0
    lines = lines_of(world / "ordinal")
    assert lines[-1]["loss"] < lines[0]["loss"] and {"outside", "accuracy", "margin"} <= lines[0].keys()
    export = world / "ordinal" / "export"
    assert json.loads((export / "judge.json").read_text()) == {"judge": "ordinal"}

    data = world / "five.jsonl"
    data.write_text("".join((world / "heldout.jsonl").read_text().splitlines(keepends=True)[:5]))
    asked = ["eval", "pairs", "--model", str(world / "ordinal"), "--model.dtype", "float32", "--data", str(data)]
    assert main([*asked, "--judge", "ordinal", "--output", str(world / "planned"), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "prompt tokens: " in planned and "completion tokens" not in planned and "writing" not in planned
    assert main([*asked, "--judge", "ordinal", "--output", str(world / "measured")]) == 0
    assert "lies on no whole number from 0 to 10" in (world / "measured" / "summary.md").read_text()
    table = pyarrow.parquet.read_table(world / "measured" / "judgements.parquet").to_pylist()
    numbers = np.array([row["score"] for row in table]).reshape(-1, 2)
    measured = [lines[-1][f"eval/rewards/{side}/mean"] for side in ("chosen", "rejected")]
    np.testing.assert_allclose(numbers.mean(axis=0), measured, rtol=1e-4)
    assert 0 < lines[-1]["eval/outside"] < 1

    pytest.importorskip("torch", reason="the card's code needs torch")
    code = re.search(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)[1]
    row = json.loads(data.read_text().splitlines()[0])
    code = code.replace('"ordinal"', repr(str(export))).replace('dtype="auto"', 'dtype="float32"')
    code = code.replace('"What is 2 + 2?", "4"', f"{row['prompt']!r}, {row['chosen']!r}")
    exec(compile(code, "card", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(numbers[0, 0], rel=1e-4)

    # It reasons no more: what asks it to is refused, and so are settings of another head.
    assert main([*asked, "--judge", "pointwise", "--output", str(world / "wrong")]) == 2
    assert "gives a score at once and writes nothing" in capsys.readouterr().err
    assert main(["reward-model", str(config), "--margins", "true"]) == 2
    assert "margins is set, and head is ordinal" in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_run_ends_like_a_whole_one(world, started):
    whole, killed = (reward_config(world, name, head="ordinal") for name in ("whole_ordinal", "killed_ordinal"))
    run_whole_and_killed(started, "reward-model", whole, killed, world / "killed_ordinal")
    folders = world / "whole_ordinal", world / "killed_ordinal"
    assert timeless(folders[0]) == timeless(folders[1]) and exported(folders[0]) == exported(folders[1])
