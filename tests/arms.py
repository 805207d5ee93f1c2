"""A small world for Rubric-ARM: pairs with a teacher's rubrics and judgements, and an untrained model."""

import random

import yaml

from patarm_jax.data.preferences import CHECKLISTS, COMPARISONS, RUBRIC_COLUMN
from patarm_jax.demo.rubric_world import teacher_checklists, teacher_comparisons, teacher_rubric
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import make_world, write_pairs
from patarm_jax.judge.forms import CHECKLIST, RUBRIC, RUBRIC_JUDGE


def write_arms_world(root, pairs=40, heldout=10, seed=1, kind=RUBRIC_JUDGE):
    """Writes pairs.jsonl, heldout.jsonl and model/, whose vocabulary two devices can share; returns the folder."""
    world, rng = make_world(seed, pairs, heldout), random.Random(seed)
    rubrics = [teacher_rubric(pair, rng) for pair in world.train]
    columns, teach = (CHECKLISTS, teacher_checklists) if kind is CHECKLIST else (COMPARISONS, teacher_comparisons)
    taught = [(rubric, *teach(pair, rubric, rng)) for pair, rubric in zip(world.train, rubrics, strict=True)]
    write_pairs(root / "pairs.jsonl", world.train, taught, (RUBRIC_COLUMN, *columns))
    write_pairs(root / "heldout.jsonl", world.heldout)
    write_untrained_model(root / "model", root / "pairs.jsonl", seed, (RUBRIC, kind))
    return root


def arms_config(world, name, **sections):
    """Writes the config of a run in two rounds and returns its path."""
    adam = {"learning_rate": 0.003, "beta2": 0.95}
    gentle = {"learning_rate": 3e-4, "beta2": 0.95}
    update = {"kl": {"coef": 0.05}, "updates_per_rollout": 2}
    base = {
        "model": {"path": str(world / "model"), "dtype": "float32", "remat": "none"},
        "data": {"path": str(world / "pairs.jsonl")},
        "heldout": {"path": str(world / "heldout.jsonl"), "eval_every": 4, "limit": 5},
        "run": {"folder": str(world / name), "checkpoint_every": 2, "show_every": 3, "tensorboard": False},
        "warmup": {"steps": 60, "pairs_per_step": 8, "optimizer": adam},
        "generator": {"group_size": 4, "pairs_per_step": 4, "steps": 3, "sampling": {"max_new_tokens": 24},
                      "format_reward": 0.5, "update": update, "optimizer": gentle},
        "judge": {"group_size": 4, "pairs_per_step": 4, "steps": 3, "sampling": {"max_new_tokens": 96},
                  "update": update, "optimizer": gentle},
        "rounds": 2,
    }  # fmt: skip
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(base), encoding="utf-8")
    return path
