"""A scalar reward model: its loss and gradient are TRL's and torch's, its runs like any other, its export loads."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from patarm_jax.cli import main
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.config.sections import DataSection, MeshSection, ModelSection
from patarm_jax.data.limits import Room
from patarm_jax.data.packing import compared_batch, compared_shape
from patarm_jax.data.pipeline import PairBatch, digest_of, encode_pairs
from patarm_jax.data.preferences import read_preferences_with_margins, read_preferences_without_margins
from patarm_jax.judge.forms import SCALAR
from patarm_jax.model import weights
from patarm_jax.model.sharding import MESH_AXES, TRAIN_RULES, make_mesh, place_batch
from patarm_jax.recipes.programs import pair_forward, reward_learner
from patarm_jax.run.learner import rows_multiple
from patarm_jax.run.open_model import load_params, open_model
from patarm_jax.train.pair_losses import bradley_terry
from patarm_jax.train.steps import pair_rewards, reward_loss
from tests.flags import FLAGS
from tests.runs import (
    CUBE,
    assert_nearly_equal,
    exported,
    lines_of,
    reward_config,
    run_whole_and_killed,
    timeless,
)
from tests.toys import TINY, tiny_tokenizer_folder

PACKINGS = [True, pytest.param(False, marks=pytest.mark.long)]
GOLDENS = json.loads((Path(__file__).parent / "goldens" / "algorithms" / "trl_reward.json").read_text())
ROWS = [
    {"prompt": f"Topic {n}? " * (9 if n == 7 else 1 + n % 3), "chosen": f"good {n}",
     "rejected": f"bad {n} " * (1 + n % 4), "domain": "chat", "margin": 0.3 * n - 1}
    for n in range(8)
]  # fmt: skip


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case["name"])
def test_loss_and_gradient_equal_trls(case):
    given, out = case["inputs"], case["outputs"]
    sides = jnp.stack([jnp.asarray(given[f"scores_{side}"], jnp.float32) for side in ("chosen", "rejected")], -1)
    margins = np.asarray(given["margin"] or np.zeros(len(sides)), np.float32)
    centring = case["settings"]["center_rewards_coefficient"] or 0.0

    def mean(sides):
        # Rows that are no pair count for nothing, whatever stands in them.
        sides = jnp.concatenate([sides, jnp.full((2, 2), 9.0)])
        there = jnp.arange(len(sides)) < len(margins)
        (total, count), metrics = bradley_terry(sides, np.append(margins, [5, 5]), there, centring)
        return total / count, {name: value / count for name, (value, count) in metrics.items()}

    (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(sides)
    close = {"rtol": 1e-5, "atol": 2e-6}
    np.testing.assert_allclose(value, out["loss"], **close)
    for side, name in enumerate(("chosen", "rejected")):
        np.testing.assert_allclose(gradient[:, side], out[f"grad_scores_{name}"], **close)
    np.testing.assert_allclose(metrics["accuracy"], out["accuracy"], **close)
    np.testing.assert_allclose(metrics["margin"], out["margin_mean"], **close)


# ------------------------------------------------------------------------------------------- the network beside torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model of transformers', and pairs."""
    torch = pytest.importorskip("torch", reason="the other side of these equalities is torch's")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Qwen3Config(**(TINY | {"vocab_size": 512}), num_labels=1, pad_token_id=0)
    made = transformers.Qwen3ForSequenceClassification(config).float()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    root = tmp_path_factory.mktemp("reward")
    made.save_pretrained(root / "saved")
    tiny_tokenizer_folder(root / "saved")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def of(folder, **changes):
    changes = {"model": ModelSection(path=str(folder / "saved"), dtype="float32", remat="none"), **changes}
    return RewardModelConfig(data=DataSection(path=str(folder / "pairs.jsonl")), margins=True, **changes)


def pairs_of(config):
    model = open_model(config.model, "scalar")
    preferences, _ = read_preferences_with_margins(config.data)
    room = Room(model.arch.max_position_embeddings)
    records, _ = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data, room, SCALAR)
    lengths = tuple(side for record in records for side in record.lengths)
    return model, PairBatch(tuple(records), tuple(one.preference.id for one in records), lengths)


def batch_of(config, model, pairs, multiple=1):
    shape = compared_shape(pairs, 16, multiple, config.packing)
    return compared_batch(pairs, shape, model.tokenizer.pad_id, config.packing)


def torchs(folder, pairs, margins, centring):
    """(loss, reward of each side of each pair, gradients by name) of torch, one conversation at a time."""
    import torch
    import transformers

    model = transformers.Qwen3ForSequenceClassification.from_pretrained(folder / "saved", dtype=torch.float32)
    rewards = torch.stack(
        [
            torch.stack([model(input_ids=torch.tensor(side[None].astype(np.int64))).logits[0, 0] for side in sides])
            for sides in (record.prompt_tokens for record in pairs.records)
        ]
    )
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(margins)).mean()
    loss = loss + centring * ((chosen + rejected) ** 2).mean()
    loss.backward()
    return (
        loss.item(),
        rewards.detach().numpy(),
        {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_whole_gradient_equals_torchs(folder, tmp_path, packing):
    config = of(folder, centring=0.05, packing=packing)
    model, pairs = pairs_of(config)
    batch = batch_of(config, model, pairs)
    assert (len(batch.tokens) < len(ROWS)) == packing and batch.counts.sum() == len(ROWS)
    params, arch = weights.load(folder / "saved")
    forward = pair_forward(config, arch, make_mesh(MeshSection()))
    loss = reward_loss(forward, config.centring)

    def mean(params):
        total, count = loss(params, None, batch).loss
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    expected, rewards, theirs = torchs(folder, pairs, [row["margin"] for row in ROWS], config.centring)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    weights.save(gradient, arch, tmp_path / "gradient", dtype="float32")  # under Hugging Face's names
    ours = safetensors.numpy.load_file(tmp_path / "gradient" / "model.safetensors")
    assert ours.keys() == theirs.keys() and np.abs(theirs["score.weight"]).max() > 0.01
    for name, mine in ours.items():
        np.testing.assert_allclose(mine, theirs[name], rtol=1e-4, atol=1e-5 * np.abs(theirs[name]).max(), err_msg=name)
    found = np.asarray(pair_rewards(forward, params, None, batch))
    found = np.concatenate([row[:count] for row, count in zip(found, batch.counts, strict=True)])
    np.testing.assert_allclose(sorted(found.ravel()), sorted(rewards.ravel()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_slices_and_devices_change_nothing(folder, packing):
    """A pair is never cut: it lies in one row, and every row in one slice on one device."""

    def updated(mesh, micro_batches):
        config = of(folder, packing=packing, micro_batches=micro_batches)
        model, pairs = pairs_of(config)
        learner = reward_learner(config, model.arch, mesh)
        state = learner.new_state(load_params(config.model, model, mesh, 0, TRAIN_RULES, np.float32))
        batch = place_batch(mesh, batch_of(config, model, pairs, rows_multiple(mesh, micro_batches)))
        _, metrics = learner.update(state, None, batch)
        return {name: float(value) for name, value in metrics.items()}

    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
    in_slices = updated(alone, 4)  # one slice is held equal to torch's above
    assert in_slices["grad_norm"] > 0.1
    assert updated(make_mesh(MeshSection(data=2, fsdp=2, tensor=2)), 1) == pytest.approx(in_slices, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_learns_exports_and_is_measured_as_eval_measures(world, capsys):
    """From a model that writes; and the export is transformers' reward model, and ours."""
    start = {"path": str(world / "reference"), "weights": "load"}
    config = reward_config(world, "reward", model=start, optimizer={"learning_rate": 0.003}, run={"steps": 9})
    assert main(["reward-model", str(config), "--mesh.fsdp", "8", "--pairs_per_step", "8"]) == 0
    said = "".join(capsys.readouterr())
    assert "writes and gives no reward: it gets a head that does, drawn by run.seed" in said
    lines = lines_of(world / "reward")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"] and lines[-1]["margin"] > lines[0]["margin"]
    assert {"accuracy", "rewards/chosen/mean", "rewards/rejected/mean", "num_tokens"} <= lines[0].keys()
    assert "best on the held-out pairs" in said and not {"eval/clipped_ratio", "eval/valid"} & lines[-1].keys()

    export = world / "reward" / "export"
    assert json.loads((export / "judge.json").read_text()) == {"judge": "scalar"}
    card = (export / "README.md").read_text()
    assert "vllm serve reward --runner pooling" in card and "text-classification" in card and "rubrics" not in card
    asked = ["eval", "pairs", "--judge", "scalar", "--model", str(world / "reward"), "--model.dtype", "float32"]
    data = world / "five.jsonl"
    data.write_text("".join((world / "heldout.jsonl").read_text().splitlines(keepends=True)[:5]))
    assert main([*asked, "--data", str(data), "--output", str(world / "measured")]) == 0
    table = pyarrow.parquet.read_table(world / "measured" / "judgements.parquet").to_pylist()
    rewards = np.array([row["score"] for row in table]).reshape(-1, 2)
    measured = [lines[-1][f"eval/rewards/{side}/mean"] for side in ("chosen", "rejected")]
    np.testing.assert_allclose(rewards.mean(axis=0), measured, rtol=1e-4, atol=1e-5)
    assert lines[-1]["eval/accuracy_half"] == np.mean([np.sign(a - b) / 2 + 0.5 for a, b in rewards])

    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    messages = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": row[side]}], tokenize=False)
        if isinstance(row["prompt"], list)
        else tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}], tokenize=False
        )
        for row in messages
        for side in ("chosen", "rejected")
    ]
    together = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        theirs = model(**together).logits[:, 0].numpy()
    np.testing.assert_allclose(rewards.ravel(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_killed_run_ends_like_a_whole_one(world, started):
    whole, killed = (reward_config(world, name) for name in ("whole_reward", "killed_reward"))
    run_whole_and_killed(started, "reward-model", whole, killed, world / "killed_reward")
    assert len(timeless(world / "killed_reward")) == 7
    assert timeless(world / "killed_reward") == timeless(world / "whole_reward")
    assert exported(world / "killed_reward") == exported(world / "whole_reward")


@pytest.mark.long
def test_two_processes_learn_as_one(world, started):
    two = {"run": {"steps": 3}, "optimizer": {"learning_rate": 1e-4}}
    alone = reward_config(world, "alone_reward", **two, mesh=CUBE)
    assert main(["reward-model", str(alone)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pod = reward_config(world, "pod_reward", **two, mesh={**CUBE, "distributed": "auto"})
    flags = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=4"}
    joined = ["--mesh.coordinator", address, "--mesh.processes", "2", "--mesh.process_id"]
    for process in [started("reward-model", pod, *joined, i, **flags) for i in range(2)]:
        process.end()
    assert_nearly_equal(world / "pod_reward", world / "alone_reward")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # theirs
def test_trl_takes_the_export_as_a_reward_model(world, folder, tmp_path):
    """Two real steps of TRL's GRPO, rewarded by what we trained."""
    trl = pytest.importorskip("trl", reason="TRL is no dependency: pip install trl accelerate")
    datasets = pytest.importorskip("datasets")
    short = {"run": {"steps": 1}, "heldout": {"path": ""}, "optimizer": {"warmup_steps": 0}}
    assert main(["reward-model", str(reward_config(world, "for_trl", **short)), "--pairs_per_step", "8"]) == 0
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS])
    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), logging_steps=1, use_cpu=True, bf16=False, report_to="none", **settings
    )
    export = str(world / "for_trl" / "export")
    trainer = trl.GRPOTrainer(model=str(world / "reference"), reward_funcs=export, args=arguments, train_dataset=data)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert type(trainer.reward_funcs[0]).__name__ == "Qwen3ForSequenceClassification"
    assert len(rewards) == 2 and np.isfinite(rewards).all() and rewards[0] != 0


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--margins", "true"], "8 × no margin, which margins asks for: name its column under data.columns"),
        (["--heldout.votes", "2"], "heldout.votes is set, and a reward model writes nothing"),
        (["--heldout.best", "valid"], "heldout.best is valid, and all that is measured here is"),
        (["--judge", "pairwise"], "judge"),
        (["--micro_batches", "3"], "pairs_per_step 4 gives 4 rows"),
    ],
)
def test_what_cannot_be_is_refused(world, capsys, arguments, said):
    config = reward_config(world, "refused_reward", heldout={"path": ""})
    (world / "eight.jsonl").write_text("".join((world / "pairs.jsonl").read_text().splitlines(keepends=True)[:8]))
    alone = ["--data.path", str(world / "eight.jsonl"), "--mesh.fsdp", "1", "--mesh.tensor", "-1"]
    assert main(["reward-model", str(config), *alone, *arguments]) in (1, 2)
    assert said in capsys.readouterr().err


def test_margins_that_are_not_read_are_told(folder):
    section = DataSection(path=str(folder / "pairs.jsonl"))
    pairs, report = read_preferences_without_margins(section)
    assert {pair.margin for pair in pairs} == {None}
    assert f"{len(ROWS)} have a margin, which is not read unless margins is true [" in str(report)


def test_margins_and_labels_belong_to_what_a_run_reads(folder):
    config = of(folder)
    _, pairs = pairs_of(config)
    without = [replace(one, preference=replace(one.preference, margin=None)) for one in pairs.records]
    other = [replace(one, preference=replace(one.preference, margin=0.5)) for one in pairs.records]
    labelled = [replace(one, preference=replace(one.preference, labels=(7.0, 2.0))) for one in without]
    assert len({digest_of(records) for records in (pairs.records, without, other, labelled)}) == 4


def test_a_new_head_is_small_and_the_seeds_own(world):
    section = ModelSection(path=str(world / "reference"), dtype="float32")
    model, mesh = open_model(section, "scalar", new_head=True), make_mesh(MeshSection())
    one, same, other = (load_params(section, model, mesh, seed, TRAIN_RULES, np.float32)["score"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    width = model.arch.hidden_size
    assert one.shape == (1, width) and 0.7 < np.std(one) * (width + 1) < 1.3


def test_a_reward_model_that_is_trained_on_keeps_its_head(folder):
    section, mesh = ModelSection(path=str(folder / "saved"), dtype="float32"), make_mesh(MeshSection())
    model = open_model(section, "scalar", new_head=True)
    head = load_params(section, model, mesh, 0, TRAIN_RULES, np.float32)["score"]
    np.testing.assert_array_equal(head, weights.load(folder / "saved")[0]["score"])
