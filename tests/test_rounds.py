"""The batch that DAPO makes of several rounds, against a plain loop."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from patarm_jax.config.load import from_mapping
from patarm_jax.config.recipes import GRPOConfig
from patarm_jax.data.pipeline import EncodedPair, PairBatch
from patarm_jax.model.sharding import MESH_AXES
from patarm_jax.reward import Rewards
from patarm_jax.rollout.batches import rollouts_of
from patarm_jax.rollout.rounds import Round, chosen_of, key_of, wants_another, with_spread
from patarm_jax.rollout.schedule import Finished, Request
from patarm_jax.types import Preference

ALONE = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
PAIRS, GROUP, WIDTH = 4, 3, 5
ROWS = 2 * PAIRS


def config(**dapo):
    return from_mapping(GRPOConfig, {"update": {"algorithm": "dapo"}, "dapo": dapo, "group_size": GROUP}, "")


def a_round(number, total):
    """A round of judgements that earn these [ROWS, GROUP]; no two of its tokens are those of another round."""
    rng = np.random.default_rng(number)
    requests = [Request(np.arange(1, 3 + row), 100 * number + row) for row in range(ROWS)]
    records = tuple(
        EncodedPair(
            number * PAIRS + pair,
            Preference(f"{number}-{pair}", (), "", "", "chat", ""),
            tuple(np.asarray(request.tokens) for request in requests[2 * pair : 2 * pair + 2]),
        )
        for pair in range(PAIRS)
    )
    finished = Finished(
        tokens=rng.integers(1, 1000, (ROWS, GROUP, WIDTH)),
        lengths=rng.integers(1, WIDTH + 1, (ROWS, GROUP)),
        logprobs=-rng.random((ROWS, GROUP, WIDTH)).astype(np.float32),
        truncated=rng.random((ROWS, GROUP)) < 0.5,
    )
    zero = np.zeros((PAIRS, 2, GROUP), np.float32)
    return Round(
        pairs=PairBatch(
            records, tuple(r.preference.id for r in records), tuple(side for r in records for side in r.lengths)
        ),
        requests=requests,
        finished=finished,
        judgements=[],
        numbers=total,
        status=np.zeros((ROWS, GROUP), int),
        lengths=finished.lengths,
        truncated=finished.truncated,
        rewards=Rewards(zero, zero, zero, total.reshape(PAIRS, 2, GROUP).astype(np.float32)),
    )


def rounds_of(seed, count, share):
    """Rounds in which about such a share of the groups has a spread."""
    rng = np.random.default_rng(seed)
    rounds = []
    for number in range(count):
        total = np.repeat(rng.integers(0, 3, (ROWS, 1)), GROUP, axis=1).astype(float)
        total[rng.random(ROWS) < share, 0] += 1.5
        rounds.append(a_round(number, total))
    return rounds


@pytest.mark.parametrize("by", ["response", "pair"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_the_batch_is_of_the_first_groups_with_a_spread(by, share):
    settings = {"update": {"algorithm": "dapo"}, "reward": {"group_by": by}, "group_size": GROUP}
    given, rounds = from_mapping(GRPOConfig, settings, ""), rounds_of(3, 3, share)
    unit = {"response": 1, "pair": 2}[by]
    expected = []
    for each in rounds:
        for start in range(0, ROWS, unit):
            earned = each.total[start : start + unit]
            if len(set(earned.ravel().tolist())) > 1:
                expected += [(each, row) for row in range(start, start + unit)]
    assert len(with_spread(rounds, unit)) == len(expected)
    chosen = chosen_of(given, ALONE, rounds)
    batch = rollouts_of(ALONE, chosen.requests, chosen.finished, 16, WIDTH)
    for row, (each, source) in enumerate(expected[:ROWS]):
        tokens, length = each.requests[source].tokens, int(batch.prompt_lengths[row])
        assert batch.prompt_tokens[row, :length].tolist() == list(tokens)
        assert chosen.requests[row].sample_id == each.requests[source].sample_id
        np.testing.assert_array_equal(batch.completion_tokens[row], each.finished.tokens[source])
        np.testing.assert_array_equal(batch.old_logprobs[row], each.finished.logprobs[source])
        np.testing.assert_array_equal(batch.completion_lengths[row], each.finished.lengths[source])
        np.testing.assert_array_equal(chosen.rewards[row], each.total[source])
    left = min(len(expected), ROWS)
    assert chosen.valid[:left].all() and not chosen.valid[left:].any()
    assert not np.asarray(batch.completion_lengths)[left:].any()  # they count in no sum and in no mean
    learnt = np.arange(ROWS * GROUP, dtype=np.float32).reshape(ROWS, GROUP)
    for number, each in enumerate(rounds):
        back = chosen.of_round(number, learnt, ROWS)
        for row in range(ROWS):
            place = [i for i, (source, at) in enumerate(expected[:ROWS]) if source is each and at == row]
            np.testing.assert_array_equal(back[row], learnt[place[0]] if place else np.full(GROUP, np.nan))


def test_rounds_go_on_until_the_batch_is_full_or_they_are_used_up():
    given, rounds = config(max_rounds=3), rounds_of(0, 4, 0.5)
    found = [len(with_spread(rounds[:count], 1)) for count in range(1, 5)]
    assert found[1] < ROWS <= found[2]
    assert [wants_another(given, rounds[:count]) for count in range(1, 4)] == [True, True, False]
    assert not wants_another(config(max_rounds=2), rounds[:2])
    assert not wants_another(from_mapping(GRPOConfig, {}, ""), rounds[:1])


def test_every_other_algorithm_learns_from_all_of_its_one_round():
    [only] = rounds_of(1, 1, 0.3)
    chosen = chosen_of(from_mapping(GRPOConfig, {}, ""), ALONE, [only])
    assert chosen.requests is only.requests and chosen.finished is only.finished and chosen.valid.all()
    np.testing.assert_array_equal(chosen.rewards, only.total)


def test_each_round_of_each_step_draws_from_a_key_of_its_own():
    keys = {jax.random.key_data(key_of(0, step, number)).tobytes() for step in range(1, 20) for number in range(5)}
    assert len(keys) == 19 * 5
    # The first is the one that steps have always had.
    first = jax.random.fold_in(jax.random.key(7), 3)
    assert (jax.random.key_data(key_of(7, 3)) == jax.random.key_data(first)).all()
