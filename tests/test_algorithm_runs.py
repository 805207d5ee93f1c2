"""Every algorithm trains by the command, says the settings it has, and ends alike whether or not it is killed."""

import pytest
import yaml

from patarm_jax.config.load import load_run
from patarm_jax.config.presets import PRESETS, value_at
from tests.runs import VAIN, config_file, exported, lines_of, run_whole_and_killed, timeless


@pytest.mark.long
@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_killed_run_of_any_algorithm_ends_like_a_whole_one(world, started, algorithm):
    """With the trainer's log-probs as the old ones, and a KL where the algorithm has it."""
    update = {"algorithm": algorithm, "old_logprobs": "trainer"}
    if "update.importance_cap" in PRESETS[algorithm]:
        update["importance_cap"] = 2.0
    names = [f"{algorithm}_{fate}" for fate in ("whole", "killed")]
    more = {"heldout": {"path": ""}}
    if algorithm == "dapo":  # random weights write nothing that can be read: only lengths make rewards differ
        more["dapo"] = {"overlong_buffer": 8}
    configs = [config_file(world, name, "grpo", update=update, **more) for name in names]
    folders = [world / name for name in names]
    run_whole_and_killed(started, "grpo", *configs, folders[1], VAIN["grpo"])
    assert timeless(folders[0]) == timeless(folders[1]) and exported(folders[0]) == exported(folders[1])
    last = lines_of(folders[0])[-1]
    # One device, one kind of number: the sampler's log-probs and the trainer's are the same but for rounding.
    assert last["sampling/logprob_gap_mean"] < 1e-3 and last["sampling/ratio_outside"] == 0 and last["kl"] > 0
    coef = yaml.safe_load(configs[0].read_text())["update"]["kl"]["coef"]
    resolved = load_run(folders[0])
    for name, value in PRESETS[algorithm].items():
        set_here = {"update.kl.coef": coef, "update.importance_cap": 2.0, "dapo.overlong_buffer": 8}
        expected = set_here.get(name, value)
        assert value_at(resolved, name) == expected
