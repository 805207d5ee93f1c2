"""What a policy's responses earn, and what a gold measure says of them: while it trains, and on held-out prompts."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.config.sections import SamplingSection
from patarm_jax.data.pairs import prompt_key
from patarm_jax.data.pipeline import EncodedPair, digest_of, encode_pairs
from patarm_jax.data.prompts import read_prompts
from patarm_jax.data.scores import room_for
from patarm_jax.evaluate.heldout import NowAndThen, share_of
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.sharding import process_in
from patarm_jax.rollout.judging import Judge, make_judge
from patarm_jax.rollout.responses import Rewarding, Said, Source, ask_sources
from patarm_jax.rollout.rounds import Reinforced
from patarm_jax.run.drawing import heldout_sampling
from patarm_jax.run.learner import weight_sync
from patarm_jax.run.open_model import Model
from patarm_jax.run.peers import agree
from patarm_jax.run.process import say
from patarm_jax.run.rollouts import RolloutRow, gather_rows
from patarm_jax.types import Preference, Status

GOLD = "gold"


def response_metrics(config: PolicyConfig, found: Reinforced) -> dict[str, float]:
    """The vitals of a step; TRL's names where TRL has the metric."""
    rounds, chosen = found.rounds, found.chosen
    lengths, truncated, rewarded, total, lost = (
        np.concatenate(parts)
        for parts in zip(
            *((one.lengths, one.truncated, one.rewarded, one.total, np.asarray(one.rewards.length)) for one in rounds),
            strict=True,
        )
    )
    of_sources = {name: np.concatenate([one.worth[name] for one in rounds]) for name in rounds[0].worth}
    # GDPO's own rewards have mean 0 in every step: what is told is what was added up before.
    known = _weighted(config, list(of_sources.values()))
    metrics = {
        **_of_rewards(known),
        "frac_reward_zero_std": _share_without_spread(np.where(rewarded, total, np.nan)),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "rewards/length_correlation": correlation(known, lengths),
        "advantages/abs_mean": np.abs(found.advantages).sum() / max(chosen.valid.sum(), 1),
    }
    for name, values in of_sources.items():
        metrics |= _of_source(f"rewards/{name}", values)
    if "dapo.max_rounds" in config.algorithm_settings:
        metrics |= {"dapo/rounds": len(rounds), "dapo/filled": chosen.valid.mean(), "dapo/overlong": lost.mean()}
    return {name: float(value) for name, value in metrics.items()}


def _weighted(config: PolicyConfig, values: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of the sources' values by their weights; NaN where one says nothing."""
    weights = [source.weight for source in config.reward.sources]
    total: np.ndarray = np.tensordot(weights, np.stack(values), axes=1)
    return total


def _of_rewards(known: np.ndarray) -> dict[str, float]:
    """Of rewards [R, G], NaN where there is none; deviations are those within groups, in the mean. NaN of nothing."""
    some = ~np.isnan(known)
    groups = [group[~np.isnan(group)] for group in known]
    spreads = [group.std(ddof=1) for group in groups if len(group) > 1]
    return {
        "reward": float(known[some].mean()) if some.any() else math.nan,
        "reward_std": float(np.mean(spreads)) if spreads else math.nan,
        "rewards/failed": float(1 - some.mean()),
    }


def _share_without_spread(known: np.ndarray) -> float:
    groups = [group[~np.isnan(group)] for group in known]
    return float(np.mean([len(group) < 2 or np.ptp(group) == 0 for group in groups]))


def _of_source(name: str, values: np.ndarray, most: float = 1.0) -> dict[str, float]:
    """Of what a source says [R, G]; where it says nothing of more than a share of `most`, NaN."""
    some = values[~np.isnan(values)]
    told = len(some) > 0 and np.isnan(values).mean() <= most
    mean, std = (float(some.mean()), float(some.std())) if told else (math.nan, math.nan)
    return {f"{name}/mean": mean, f"{name}/std": std, f"{name}/failed": float(np.isnan(values).mean())}


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of values [R, V], by prompts: the V votes of one are no independent values."""
    means = [group[~np.isnan(group)].mean() for group in values if not np.isnan(group).all()]
    return float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0


def correlation(known: np.ndarray, lengths: np.ndarray) -> float:
    """Pearson's, of rewards that are there with lengths; 0 where one of the two is always the same.

    >>> correlation(np.array([1.0, 2.0, np.nan]), np.array([10, 20, 5]))
    1.0
    """
    some = ~np.isnan(known)
    x, y = known[some].astype(float), lengths[some].astype(float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(round(np.corrcoef(x, y)[0, 1], 6))


def response_rows(mesh: Mesh, found: Reinforced) -> list[RolloutRow]:
    """One row for each response of all processes, in the order of prompts."""
    mine, processes = process_in(mesh)
    rows: list[RolloutRow] = []
    for number, each in enumerate(found.rounds):
        size = len(each.status)
        share = slice(mine * size // processes, (mine + 1) * size // processes)
        learnt = found.chosen.of_round(number, found.advantages, size)[share].reshape(-1)
        prompts = [record.preference.id for record in each.pairs.records for _ in range(each.status.shape[-1])]
        texts = [one.text for group in each.judgements for one in group]
        rewards = np.where(each.rewarded, each.total, np.nan)[share].reshape(-1)
        own = [
            RolloutRow(
                pair_id=prompt,
                side="response",
                text=text,
                status=Status.OK,
                score=None,
                reward=None if np.isnan(reward) else float(reward),
                advantage=None if np.isnan(advantage) else float(advantage),
                judgement=said,
            )
            for prompt, text, reward, advantage, said in zip(prompts, texts, rewards, learnt, each.said, strict=True)
        ]
        rows += gather_rows(mesh, own)
    return rows


# ------------------------------------------------------------------------------------------------------------ held out


def greedily(sampling: SamplingSection) -> SamplingSection:
    """The same with the likeliest words."""
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class HeldoutResponses(NowAndThen):
    """Held-out prompts, answered now and then by the weights that are being trained."""

    policy: Judge
    greedy: Judge | None  # where a source compares with its likeliest words
    rewarding: Rewarding
    sources: Callable[[], Sequence[Source]]  # the reward's and behind them the gold ones
    gold: Sequence[str]  # the names of these
    to_rollout: Callable[[Params, Tree], Params]  # to the copy for sampling
    key: jax.Array  # the same at every step, so that a difference is the weights'
    records: Sequence[EncodedPair]
    share: Sequence[EncodedPair]  # this process's part of them

    def asked(self, params: Params, frozen: Tree) -> Said:
        """Has all held-out prompts answered, and all sources say what they think of it."""
        weights, seen = self.to_rollout(params, frozen), self.rewarding.config.reward.sees_thinking
        by = self.policy, self.greedy, self.sources(), seen
        phase, number = (lambda _: contextlib.nullcontext()), len(self.records)
        return ask_sources(*by, 0, weights, self.share, self.key, phase, prompts=number)

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """The metrics of that."""
        said, number = self.asked(params, frozen), len(self.records)
        for source in self.sources():
            source.settle()
        worth = {name: values[:number] for name, values in said.worth.items()}
        rewarding = [values for name, values in worth.items() if name not in self.gold]
        config, most = self.rewarding.config, self.rewarding.config.reward.max_failed
        total = _weighted(config, rewarding)
        if np.isnan(total).mean() > most:
            total = np.full_like(total, np.nan)
        metrics = {f"eval/{name}": value for name, value in _of_rewards(total).items()}
        for name, values in worth.items():
            of = f"{GOLD}/{name}" if name in self.gold else f"eval/rewards/{name}"
            metrics |= _of_source(of, values, most)
            if name in self.gold:
                metrics[f"{of}/error"] = _standard_error(values)
        lengths = said.lengths[:number]
        return metrics | {
            "eval/mean_length": float(lengths.mean()),
            "eval/length_correlation": correlation(total, lengths),
            "eval/clipped_ratio": float(said.truncated[:number].mean()),
        }


def open_heldout_prompts(
    rewarding: Rewarding,
    sources: Callable[[], Sequence[Source]],
    config: PolicyConfig,
    model: Model,
    mesh: Mesh,
    training: Sequence[Preference],
) -> HeldoutResponses | None:
    """Reads the held-out prompts; None when there are none."""
    section = config.heldout
    if not section.path:
        return None
    prompts, read = read_prompts(replace(config.data, path=section.path, split=section.split), "heldout")
    trained = {prompt_key(one.prompt) for one in training}
    shared = sum(prompt_key(one.prompt) in trained for one in prompts)
    also = f"; {shared:,} of these prompts are trained on too" if shared else ""
    form, sampling = FORMS[config.judge], heldout_sampling(config, model)
    room = room_for(
        model.arch.max_position_embeddings,
        model.tokenizer,
        form,
        sampling.max_new_tokens,
        "heldout.sampling.max_new_tokens",
    )
    limited = prompts[: section.limit or None]
    records, encoded = encode_pairs(model.tokenizer, limited, config.rubrics, config.data, room, form)
    say(f"held out, {section.path}: {read}{also}. Encoded: {encoded}.")
    agree("the held-out prompts they read", {"number of prompts": len(records), "prompts": digest_of(records)})
    asked = partial(make_judge, model.arch, model.tokenizer, mesh, config.model, form=form)
    return HeldoutResponses(
        section=section,
        policy=asked(sampling, section.votes),
        greedy=asked(greedily(sampling), 1) if config.compares else None,
        rewarding=rewarding,
        sources=sources,
        gold=[source.called for source in config.gold],
        to_rollout=weight_sync(config, model.arch, mesh),
        key=jax.random.fold_in(jax.random.key(config.run.seed), 0),
        records=records,
        share=share_of(mesh, records),
    )
