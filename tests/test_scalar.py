"""A scalar reward model's scores are those of transformers' Qwen3ForSequenceClassification."""

import json

import jax
import numpy as np
import pyarrow.parquet
import pytest

from patarm_jax.cli import main
from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from tests.toys import TINY, tiny_tokenizer_folder

torch = pytest.importorskip("torch", reason="the other side of these equalities is torch's")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = transformers.Qwen3Config(**(TINY | {"vocab_size": 512}), num_labels=1, pad_token_id=0)
    made = transformers.Qwen3ForSequenceClassification(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return made


ROWS = [
    {"prompt": f"Topic {n}? " * (1 + 3 * n), "chosen": f"good {n}", "rejected": f"bad {n} " * 9, "domain": "chat"}
    for n in range(7)
]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("scalar")
    model.save_pretrained(root / "saved")
    tiny_tokenizer_folder(root / "saved")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def test_scores_equal_transformers(model, folder):
    """Through `patarm eval`, on one device's worth of batch and on eight."""
    found = {}
    for name, mesh in (("spread", ["--mesh.data", "8", "--mesh.fsdp", "1"]), ("cube", ["--mesh.tensor", "2"])):
        command = ["eval", "pairs", "--judge", "scalar", "--model", str(folder / "saved"), "--model.dtype", "float32"]
        command += ["--data", str(folder / "pairs.jsonl"), "--output", str(folder / name), *mesh]
        assert main(command) == 0
        table = pyarrow.parquet.read_table(folder / name / "judgements.parquet").to_pylist()
        found[name] = [row["score"] for row in table]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "saved")
    expected = []
    for row in ROWS:
        for side in ("chosen", "rejected"):
            said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected.append(model(input_ids=ids).logits[0, 0].item())
    np.testing.assert_allclose(found["spread"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["cube"], expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected) > 0.5
    results = json.loads((folder / "spread" / "results.json").read_text())
    right = np.mean([a > b for a, b in zip(expected[::2], expected[1::2], strict=True)])
    assert results["scores"]["strict"]["overall"]["accuracy"]["value"] == pytest.approx(right)


def test_there_and_back(model, folder, tmp_path):
    params, config = weights.load(folder / "saved")
    assert config.scalar_head and params["score"].shape == (1, TINY["hidden_size"]) and "lm_head" not in params
    weights.save(params, config, tmp_path / "again", dtype="float32")
    assert read_architecture(tmp_path / "again") == config
    again = transformers.Qwen3ForSequenceClassification.from_pretrained(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert jax.tree.structure(weights.load(tmp_path / "again")[0]) == jax.tree.structure(params)


def test_a_model_of_the_other_kind_is_refused(folder, capsys):
    common = ["--data", str(folder / "pairs.jsonl"), "--output", str(folder / "other")]
    assert main(["eval", "pairs", "--model", str(folder / "saved"), *common]) == 1
    assert "is a scalar reward model; needed is one that writes" in capsys.readouterr().err
    assert main(["eval", "pairs", "--model", str(folder / "saved"), "--judge", "scalar", "--votes", "2", *common]) == 2
    assert "allowed for a reward model (scalar) is 1" in capsys.readouterr().err
    config = json.loads((folder / "saved" / "config.json").read_text())
    several = folder / "several"
    several.mkdir()
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (several / "config.json").write_text(json.dumps(config | labels))
    assert main(["eval", "pairs", "--model", str(several), "--judge", "scalar", *common]) == 1
    assert "several classes" in capsys.readouterr().err


def test_a_dry_run_counts_reading_alone(folder, capsys):
    common = ["--data", str(folder / "pairs.jsonl"), "--output", str(folder / "dry"), "--dry-run"]
    assert main(["eval", "pairs", "--model", str(folder / "saved"), "--judge", "scalar", *common]) == 0
    said = capsys.readouterr().out
    assert "answers to be asked for: 14, to 14 questions" in said and "reading: " in said
    assert "completion tokens" not in said and "writing" not in said


def test_a_score_that_is_no_number_is_no_score(folder, tmp_path):
    params, config = weights.load(folder / "saved")
    params["score"] = params["score"] * np.nan
    weights.save(params, config, tmp_path / "broken", dtype="float32")
    tiny_tokenizer_folder(tmp_path / "broken")
    command = [
        "eval",
        "pairs",
        "--model",
        str(tmp_path / "broken"),
        "--judge",
        "scalar",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main([*command, "--data", str(folder / "pairs.jsonl")]) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert (results["valid"], results["failed"], results["ties"]) == (0, 0, 1)
    row = pyarrow.parquet.read_table(tmp_path / "o" / "judgements.parquet").to_pylist()[0]
    assert (row["status"], row["score"], row["reason"]) == ("BAD_SCORE", None, "the reward model gives nan")
