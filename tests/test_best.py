"""The checkpoint that the held-out pairs chose, and what a run writes about how it was measured."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from patarm_jax.cli import main
from patarm_jax.model import weights
from patarm_jax.run.checkpoint import open_checkpoints
from patarm_jax.run.checkpoint_files import best_of, metrics_of, note_files
from tests.toys import tiny_model_folder, write_preferences


@pytest.mark.parametrize(
    ("values", "best"),
    [([0.5, 0.9, 0.7], 2), ([0.5, 0.9, 0.9], 3), ([float("nan"), 0.1, None], 2), ([None, None, None], None)],
    ids=["in the middle", "the last of equals", "not a number", "none was evaluated"],
)
def test_the_best_checkpoint_is_the_one_that_is_kept(tmp_path, values, best):
    checkpoints = open_checkpoints(tmp_path / "c", 1, {}, best="eval/valid")
    for step, value in enumerate(values, start=1):
        checkpoints.save(step, {"w": jnp.ones(2)}, {}, None if value is None else {"eval/valid": value})
    checkpoints.wait()
    assert best_of(tmp_path / "c", "eval/valid") == checkpoints.best() == best
    assert best_of(tmp_path / "c", "eval/other") is None and best_of(tmp_path / "nowhere", "eval/valid") is None
    assert metrics_of(tmp_path / "c" / "99") == {}
    checkpoints.close()


@pytest.mark.long
def test_a_run_is_exported_at_its_best(tmp_path, capsys):
    model = tiny_model_folder(tmp_path / "model")
    ends = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(ends | {"temperature": 0.6, "top_k": 20, "top_p": 0.95}))
    write_preferences(tmp_path / "pairs.jsonl")
    held = (tmp_path / "pairs.jsonl").read_text().replace("I like", "I love")
    (tmp_path / "held.jsonl").write_text(held)
    run = tmp_path / "judge-1b"
    config = {
        "model": {"path": str(model), "weights": "random", "dtype": "float32", "remat": "none"},
        "data": {"path": str(tmp_path / "pairs.jsonl"), "missing_judgements": "template"},
        "optimizer": {"learning_rate": 0.01},
        "run": {"folder": str(run), "steps": 2, "checkpoint_every": 1, "tensorboard": False},
        "heldout": {"path": str(tmp_path / "held.jsonl"), "eval_every": 1, "limit": 4, "best": "valid",
                    "sampling": {"max_new_tokens": 4}},
        "pairs_per_step": 8,
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    assert main(["sft", str(tmp_path / "sft.yaml")]) == 0

    # What was measured is what is served, in all that the run writes.
    drawn = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["heldout"]["sampling"] == drawn | {"max_new_tokens": 4, "rows": 256}
    served = json.loads((run / "export" / "generation_config.json").read_text())
    assert served.items() >= drawn.items() and served["do_sample"] is True
    card = ModelCard.load(run / "export" / "README.md").text
    assert card.strip().startswith("# judge-1b\n")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| held-out accuracy | {100 * last['eval/accuracy_strict']:.1f} % with a tie as wrong, " in card
    assert (
        f"| measured on | `{tmp_path / 'held.jsonl'}`, the first 4 pairs, 1 judgement of each response, "
        "temperature 0.6, top_k 20, top_p 0.95, at most 4 new tokens |" in card
    )

    def export(source, name, *more):
        capsys.readouterr()
        return main(["export", str(source), str(tmp_path / name), *more])

    first = run / "checkpoints" / "1"
    metrics = metrics_of(first) | {"eval/valid": 0.5}
    (first / "metrics" / "metrics").write_text(json.dumps(metrics))
    note_files(first)
    assert export(run, "best", "--best") == 0
    assert "best on the held-out pairs: step 1, eval/valid 0.5" in capsys.readouterr().err
    assert export(first, "first") == 0
    assert export(run, "newest") == 0
    best, named, newest = (weights.load(tmp_path / name)[0]["norm"] for name in ("best", "first", "newest"))
    assert np.array_equal(best, named) and not np.array_equal(best, newest)
    assert "50.0 % of the judgements could be read" in (tmp_path / "best" / "README.md").read_text()
    assert json.loads((tmp_path / "best" / "generation_config.json").read_text()) == served
    assert export(first, "both", "--best") == 2
    assert "--best and the checkpoint of step 1 are both given" in capsys.readouterr().err
    for step in (1, 2):
        (run / "checkpoints" / str(step) / "metrics" / "metrics").unlink()
    assert export(run, "none", "--best") == 1
    assert "was judged on held-out pairs, so none is the best. Leave --best out" in capsys.readouterr().err
