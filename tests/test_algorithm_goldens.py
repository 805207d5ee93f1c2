"""Our algorithms give what TRL's, verl's and OpenRLHF's own functions gave; see goldens/algorithms/README.md."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.arrays import Rollouts
from patarm_jax.train.advantages import (
    centred_whitened,
    group_advantages,
    leave_one_out_advantages,
    returns_whitened,
)
from patarm_jax.train.penalties import KLPenalty, estimated_kl, overlong_penalty
from patarm_jax.train.policy_losses import (
    SampledTokens,
    clipped_loss,
    clipped_product_loss,
    clipped_sequence_loss,
    clipped_weight_loss,
    importance_weights,
    token_weights,
)

FOLDER = Path(__file__).parent / "goldens" / "algorithms"
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
VERLS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant_length",
}


def cases(file, *beginnings):
    every = json.loads((FOLDER / f"{file}.json").read_text())
    return [pytest.param(case, id=case["name"]) for case in every if case["name"].startswith(beginnings)]


def array(values):
    return np.asarray([np.nan if value is None else value for value in values], np.float32)


# --------------------------------------------------------------------------------------------------------- advantages


def ragged(groups, *columns):
    """Columns of rows as [R, G], and which members there are; groups may be of unlike sizes."""
    names = list(dict.fromkeys(groups))
    size = max(map(groups.count, names))
    places = {}
    for row, name in enumerate(groups):
        places[row] = names.index(name), sum(other == name for other in groups[:row])
    member = np.zeros((len(names), size), bool)
    shaped = [np.zeros((len(names), size, *np.shape(column)[1:]), np.float32) for column in columns]
    for row, place in places.items():
        member[place] = True
        for whole, column in zip(shaped, columns, strict=True):
            whole[place] = column[row]
    return member, shaped, [places[row] for row in range(len(groups))]


def advantages_of(function, groups, rewards, mask, old=None, ref=None, **settings):
    """By row: what the function gives for rewards that may be NaN, for tokens where it gives so many."""
    mask = np.asarray(mask)
    old, ref = (np.zeros(mask.shape) if x is None else np.asarray(x) for x in (old, ref))
    member, (shaped, lengths, old, ref), places = ragged(groups, array(rewards), mask.sum(axis=1), old, ref)
    rollouts = Rollouts(
        prompt_tokens=np.zeros((len(member), 1), np.int32),
        prompt_lengths=np.ones(len(member), np.int32),
        completion_tokens=np.zeros(old.shape, np.int32),
        completion_lengths=lengths.astype(np.int32),
        old_logprobs=old,
        ref_logprobs=ref,
        advantages=shaped,
    )
    valid = member & ~np.isnan(shaped)
    found = np.asarray(jax.jit(lambda *given: function(*given, **settings))(jnp.asarray(shaped), valid, rollouts))
    assert (found[~valid] == 0).all() and found.dtype == np.float32
    return np.stack([found[place] for place in places])


@pytest.mark.parametrize("case", cases("verl_advantages", "verl/adv"))
def test_advantages_equal_verls(case):
    given, out = case["inputs"], case["outputs"]
    kind = case["name"].split("/")[2]
    mask = np.asarray(given["response_mask"])
    if (np.sort(mask, axis=1)[:, ::-1] != mask).any():
        pytest.skip("a mask with holes, which completions here do not have")
    expected = np.asarray(out["advantages"], np.float64)
    kl_of = {"kl": "k1", "low_var_kl": "k3"}
    settings = {"normalise_std": case["settings"].get("norm_adv_by_std_in_grpo", True)} if "grpo" in kind else {}
    function, kl = {
        "grpo_std": (group_advantages, {}),
        "dr_grpo_no_std": (group_advantages, {}),
        "rloo": (leave_one_out_advantages, {}),
        "reinforce_pp_baseline": (centred_whitened, {}),
        "reinforce_pp": (returns_whitened, {}),
    }[kind]
    if kind == "reinforce_pp":
        charged = case["settings"]
        kl = {"kl": KLPenalty(coef=charged["kl_coef"], kind=kl_of[charged["kl_penalty"]], place="reward")}
    rewards = given["rewards"]
    groups = given.get("group_index", list(range(len(rewards))))
    log_probs = given.get("old_logprobs"), given.get("ref_logprobs")
    found = advantages_of(function, groups, rewards, mask, *log_probs, **settings, **kl)
    found = found if found.ndim == 2 else found[:, None] * mask
    sizes = np.asarray([groups.count(group) for group in groups])
    # A group of one is 0 here, and its reward there: nothing is learnt from a judgement compared with itself. Where
    # tokens are whitened this moves those of all.
    alone = (sizes == 1) & (kind != "reinforce_pp")
    if alone.any() and kind == "reinforce_pp_baseline":
        assert np.abs(found - expected * mask).max() > 0.1
        return
    np.testing.assert_allclose(found[~alone], (expected * mask)[~alone], rtol=1e-4, atol=5e-6)
    assert (found[alone] == 0).all()


@pytest.mark.parametrize("case", cases("trl_advantages", "trl/adv"))
def test_advantages_equal_trls(case):
    given, settings = case["inputs"], case["settings"]
    rewards = [row[0] if isinstance(row, list) else row for row in given["rewards"]]
    groups = [row // given["num_generations"] for row in range(len(rewards))]
    if "/rloo/" in case["name"]:
        kl = KLPenalty(coef=settings["beta"], kind="k1", place="reward")
        log_probs = given["old_logprobs"], given["ref_logprobs"]
        found = advantages_of(leave_one_out_advantages, groups, rewards, given["completion_mask"], *log_probs, kl=kl)
    else:
        scaled = settings["scale_rewards"] == "group"
        mask = np.ones((len(rewards), 1), int)
        found = advantages_of(group_advantages, groups, rewards, mask, normalise_std=scaled, eps=settings["epsilon"])
    np.testing.assert_allclose(found, array(case["outputs"]["advantages"]), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("case", cases("openrlhf", "openrlhf/adv"))
def test_advantages_equal_openrlhfs(case):
    given, settings = case["inputs"], case["settings"]
    groups = [row // given["num_samples_per_prompt"] for row in range(len(given["rewards"]))]
    mask = np.asarray(given["action_mask"])
    name = settings["estimator"]
    function = leave_one_out_advantages if name == "rloo" else group_advantages
    more = {} if name == "rloo" else {"normalise_std": name == "group_norm", "eps": 1e-9}
    found = advantages_of(function, groups, given["rewards"], mask, **more)
    expected = np.asarray(case["outputs"]["advantages"]) * mask
    np.testing.assert_allclose(found[:, None] * mask, expected, rtol=1e-5, atol=5e-6)


# ------------------------------------------------------------------------------------------------------------- losses


def loss_of(loss, given, aggregation, longest=0, importance=None, mask_name="response_mask", **settings):
    """(value, its gradient by the log-probs) of rows of tokens."""
    mask = jnp.asarray(given[mask_name], bool)
    advantages = jnp.asarray(given["advantages"], jnp.float32)
    weights, counts = token_weights(mask, aggregation, longest)
    tokens = SampledTokens(
        mask=mask,
        weights=weights,
        counts=counts,
        advantages=jnp.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], mask.shape),
        old_logprobs=jnp.asarray(given["old_logprobs"], jnp.float32),
        ref_logprobs=jnp.asarray(given["ref_logprobs"], jnp.float32) if "ref_logprobs" in given else None,
        importance=importance,
    )

    def value(logprobs):
        total, denominator = loss(logprobs, tokens, **settings).loss
        return total / denominator

    return jax.jit(jax.value_and_grad(value))(jnp.asarray(given["new_logprobs"], jnp.float32))


def assert_loss(found, out):
    value, gradient = found
    np.testing.assert_allclose(float(value), out["loss"], **FLOAT32)
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(out["grad_new_logprobs"], np.float64), **FLOAT32)


@pytest.mark.parametrize("case", cases("verl_policy_losses", "verl/loss"))
def test_losses_equal_verls(case):
    given, settings = case["inputs"], case["settings"]
    kind = case["name"].split("/")[2].split("_")[0]
    low, high = (settings.get(f"clip_ratio_{side}", settings["clip_ratio"]) for side in ("low", "high"))
    clips = {"clip_low": low, "clip_high": high}
    how = VERLS[settings["loss_agg_mode"]]
    if kind == "vanilla":
        clips["dual_clip"] = settings.get("clip_ratio_c", 3.0)
    loss = {"vanilla": clipped_loss, "gspo": clipped_sequence_loss, "cispo": clipped_weight_loss}[kind]
    how = "sequence_mean" if kind == "gspo" else how
    importance = given.get("rollout_is_weights")
    importance = None if importance is None else jnp.asarray(importance, jnp.float32)
    longest = np.shape(given["response_mask"])[1] if how == "constant_length" else 0  # without a loss_scale_factor
    assert_loss(loss_of(loss, given, how, longest, importance=importance, **clips), case["outputs"])


@pytest.mark.parametrize("case", cases("trl_policy_losses", "trl/loss"))
def test_losses_equal_trls(case):
    given, settings = case["inputs"], case["settings"]
    low, high = settings["epsilon"], settings["epsilon_high"]
    if "/rloo/" in case["name"]:
        found = loss_of(
            clipped_product_loss, given, "sequence_mean", mask_name="completion_mask", clip_low=low, clip_high=high
        )
        return assert_loss(found, case["outputs"])
    kind, level = settings["loss_type"], settings["importance_sampling_level"]
    clips = {"clip_low": low, "clip_high": high}
    if kind == "cispo":
        clips = {"clip_low": None, "clip_high": high - 1}
    by_ratio = settings.get("use_bias_correction_kl", False)
    kl = KLPenalty(coef=settings["beta"], kind="k3", place="loss", by_ratio=by_ratio)
    loss = clipped_weight_loss if kind == "cispo" else clipped_loss if level == "token" else clipped_sequence_loss
    how = {"grpo": "sequence_mean", "dr_grpo": "constant_length"}.get(kind, "token_mean")
    longest = settings["max_completion_length"] if kind == "dr_grpo" else 0
    found = loss_of(loss, given, how, longest, mask_name="completion_mask", kl=kl, **clips)
    assert_loss(found, case["outputs"])


@pytest.mark.parametrize("case", cases("openrlhf", "openrlhf/loss"))
def test_losses_equal_openrlhfs(case):
    given, settings = case["inputs"], case["settings"]
    clips = {"clip_low": settings["clip_eps_low"], "clip_high": settings["clip_eps_high"]}
    loss = clipped_sequence_loss
    if settings["policy_loss_type"] == "ppo":
        loss, clips = clipped_loss, clips | {"dual_clip": settings["dual_clip"]}
    how = "token_mean" if settings["token_level_loss"] else "sequence_mean"
    assert_loss(loss_of(loss, given, how, mask_name="action_mask", **clips), case["outputs"])


# ----------------------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("case", [*cases("verl_kl", "verl/kl"), *cases("openrlhf", "openrlhf/kl")])
def test_kl_equals_theirs(case):
    given, out = case["inputs"], case["outputs"]
    named = case["settings"].get("kl_penalty", case["settings"].get("kl_estimator"))
    kind = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(named, named)
    logprobs, ref = (np.asarray(given[name], np.float32) for name in ("logprobs", "ref_logprobs"))
    value = np.asarray(estimated_kl(logprobs, ref, kind))
    gradient = np.asarray(jax.grad(lambda x: estimated_kl(x, ref, kind).sum())(jnp.asarray(logprobs)))
    expected, theirs = np.asarray(out["kl"]), np.asarray(out["grad_logprobs"])
    inside = np.abs(ref - logprobs) < 10 if "verl" not in case["name"] or kind == "k3" else np.ones(ref.shape, bool)
    inside &= np.abs(value) < 10 if "verl" not in case["name"] or kind == "k3" else inside
    assert inside.sum() > inside.size / 3
    np.testing.assert_allclose(value[inside], expected[inside], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(gradient[inside], theirs[inside], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "case", [*cases("verl_overlong_and_rollout", "verl/dapo_overlong"), *cases("openrlhf", "openrlhf/overlong")]
)
def test_the_overlong_penalty_equals_theirs(case):
    settings, out = case["settings"], case["outputs"]
    longest = settings.get("max_resp_len", settings.get("max_new_tokens"))
    factor = settings.get("penalty_factor", settings.get("overlong_penalty_factor"))
    found = overlong_penalty(
        np.asarray(case["inputs"]["response_lengths"]), longest, settings["overlong_buffer_len"], factor
    )
    expected = out.get("overlong_penalty", out.get("penalty"))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", cases("verl_overlong_and_rollout", "verl/rollout_is"))
def test_importance_weights_equal_verls(case):
    given = case["inputs"]
    mask = np.asarray(given["response_mask"], bool)
    shape = (*mask.shape[:1], 1, mask.shape[1])
    rollouts = Rollouts(
        prompt_tokens=np.zeros((len(mask), 1), np.int32),
        prompt_lengths=np.ones(len(mask), np.int32),
        completion_tokens=np.zeros(shape, np.int32),
        completion_lengths=mask.sum(axis=1, keepdims=True).astype(np.int32),
        old_logprobs=np.asarray(given["train_logprobs"], np.float32).reshape(shape),
        ref_logprobs=None,
        advantages=np.zeros(shape[:2], np.float32),
        sampler_logprobs=np.asarray(given["rollout_logprobs"], np.float32).reshape(shape),
    )
    found = importance_weights(
        rollouts, jnp.asarray(mask.reshape(shape)), float(case["settings"]["rollout_is_threshold"])
    )
    expected = np.asarray(case["outputs"]["weights"]).reshape(shape)
    np.testing.assert_allclose(np.asarray(found), expected, **FLOAT32)
