"""GRPO with Preference-Aware Reward: the judge learns from which response is preferred, with no score given.

A step samples G judgements of both responses of each pair, rewards each one that beats the mean of the other side, and
updates the weights. The same command resumes a run that was stopped.
"""

from collections.abc import Mapping
from functools import partial

from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import GRPOConfig
from patarm_jax.data.preferences import read_labelled_preferences, read_preferences
from patarm_jax.evaluate.rollouts import rollout_metrics, rollout_rows
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.padding import bucket
from patarm_jax.recipes.programs import grpo_learner, grpo_programs, large, make_rollout_programs
from patarm_jax.recipes.ready import Ready, make_ready
from patarm_jax.recipes.reinforce import load_reference, loaded_once, open_reference, reinforce
from patarm_jax.reward import MarginFn
from patarm_jax.rollout.judging import Judge, make_judge
from patarm_jax.rollout.rewards import make_rewards
from patarm_jax.rollout.rounds import sample_round
from patarm_jax.run.card import card_of
from patarm_jax.run.claim import claimed
from patarm_jax.run.folder import open_run
from patarm_jax.run.margin import margin_of, values_of
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.run.programs import describe
from patarm_jax.run.progress import Shown, percent


def main(config: GRPOConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    margin = margin_of(config)
    with claimed(config.run):
        return _train(_ready(config), margin)


def _ready(config: GRPOConfig) -> Ready[GRPOConfig]:
    read = read_labelled_preferences if config.reward.kind == "labels" else read_preferences
    return loaded_once(make_ready(config, read, partial(open_reference, config) if config.charges_kl else None))


def _train(ready: Ready[GRPOConfig], margin: MarginFn) -> bool:
    config, mesh, model, records, length = ready.config, ready.mesh, ready.model, ready.records, ready.length
    learner = grpo_learner(config, model.arch, mesh, updates=length.steps * config.update.updates_per_rollout)
    rollout = make_rollout_programs(config, model.arch, mesh)
    judge = _make_judge(ready)
    reward = make_rewards(config, margin)
    say(kernels_in_use(config.model, model.arch, mesh, "causal", "shared", "written"))

    further = values_of(config, margin)
    with open_run(config, model, records, length, learner, ready.heldout, ready.reference, further) as run:
        if run is None:
            return True
        reference = load_reference(ready, run.trained.frozen)
        for step in run.steps(
            lambda pairs: bucket(pairs.longest_prompt),
            lambda width: large(grpo_programs(config, model.arch, learner, rollout, judge.engine, width, full=False)),
            shown,
        ):
            found = reinforce(config, mesh, rollout, reference, step, partial(sample_round, judge, reward))
            step.metrics |= rollout_metrics(config, found)
            step.rows = rollout_rows(mesh, judge.form, found)
        return run.finish(card_of(config, model, len(records)))


def _make_judge(ready: Ready[GRPOConfig]) -> Judge:
    config, model = ready.config, ready.model
    settings = config.model, config.sampling, config.rollouts_per_prompt, FORMS[config.judge]
    return make_judge(model.arch, model.tokenizer, ready.mesh, *settings, longest=ready.longest_prompt)


def dry_run(config: GRPOConfig) -> None:
    """Shows the config, the first batch, and what each program needs at the longest prompt of the data."""
    start_processes(config, dry_run=True)
    margin_of(config)  # refuses one that cannot be had
    ready = _ready(config)
    config, mesh, model, length = ready.config, ready.mesh, ready.model, ready.length
    say(kernels_in_use(config.model, model.arch, mesh, "causal", "shared", "written"))
    every = grpo_programs(
        config,
        model.arch,
        grpo_learner(config, model.arch, mesh, updates=length.steps * config.update.updates_per_rollout),
        make_rollout_programs(config, model.arch, mesh),
        _make_judge(ready).engine,
        bucket(ready.longest_prompt),
    )
    describe(to_yaml(config), mesh, every, next(ready.batches()), model.tokenizer, length.steps)


def shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    shares = {"readable": "judge/valid", "cut off": "completions/clipped_ratio"}
    return {"reward": values["reward"], **{words: percent(values[name]) for words, name in shares.items()}}
