"""Reinforcement learning of a policy: what judges, reward models and functions say of its responses is its reward.

A step samples a group of responses to each prompt, has every source say what each is worth, and updates the weights. A
judge here lies beside the policy on the same devices, and works when the policy has ended; a server is asked while the
policy still samples. The same command resumes a run that was stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax

from patarm_jax.ask.worth import open_models, open_sources
from patarm_jax.ask.worth_here import OpenedModel, tell_resident
from patarm_jax.config.load import to_yaml
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.data.prompts import read_prompts
from patarm_jax.evaluate.responses import greedily, open_heldout_prompts, response_metrics, response_rows
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import make_mesh
from patarm_jax.padding import bucket
from patarm_jax.recipes.programs import grpo_learner, grpo_programs, large, make_rollout_programs
from patarm_jax.recipes.ready import Ready, make_ready
from patarm_jax.recipes.reinforce import load_reference, loaded_once, open_reference, reinforce
from patarm_jax.rollout.engine import abstract_programs
from patarm_jax.rollout.judging import Judge, make_judge
from patarm_jax.rollout.responses import Rewarding, Source, make_response_rewards, sample_responses
from patarm_jax.run.card import card_of
from patarm_jax.run.claim import claimed, folder_of
from patarm_jax.run.folder import open_run
from patarm_jax.run.health import parted
from patarm_jax.run.metrics import read_metrics
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.run.programs import describe
from patarm_jax.run.progress import Shown, percent

ANSWERS = "answers"  # the folder of a run that keeps what servers have answered


@dataclass(frozen=True)
class _Policy:
    """A policy, and who rewards it."""

    ready: Ready[PolicyConfig]
    rewarding: Rewarding
    models: Mapping[int, OpenedModel]  # of the sources, by their numbers


def main(config: PolicyConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(_ready(config))


def _ready(config: PolicyConfig) -> _Policy:
    models = open_models(config)
    sources = _sources(config, models)
    number = len(config.reward.sources)
    rewarding = Rewarding(config, lambda: sources()[:number], make_response_rewards(config))
    ready = make_ready(
        config,
        read_prompts,
        partial(open_reference, config) if config.charges_kl else None,
        partial(open_heldout_prompts, rewarding, sources),
        lambda config, mesh: [weights for one in models.values() for weights in one.resident(config, mesh).values()],
    )
    return _Policy(loaded_once(ready), rewarding, models)


def _sources(config: PolicyConfig, models: Mapping[int, OpenedModel]) -> Callable[[], Sequence[Source]]:
    """All sources, opened when they are first asked for: their weights are loaded then."""
    return cache(lambda: open_sources(config, models, make_mesh(config.mesh), folder_of(config.run) / ANSWERS))


def _train(policy: _Policy) -> bool:
    ready = policy.ready
    config, mesh, model, records, length = ready.config, ready.mesh, ready.model, ready.records, ready.length
    learner = grpo_learner(config, model.arch, mesh, updates=length.steps * config.update.updates_per_rollout)
    rollout = make_rollout_programs(config, model.arch, mesh)
    asked, greedy = _asked(ready), _greedy(ready)
    say(kernels_in_use(config.model, model.arch, mesh, "causal", "shared", "written"))

    further = {"models of the reward": {one.section.called: one.digest for one in policy.models.values()}}
    with open_run(config, model, records, length, learner, ready.heldout, ready.reference, further) as run:
        if run is None:
            return True
        reference = load_reference(ready, run.trained.frozen)
        for step in run.steps(
            lambda pairs: bucket(pairs.longest_prompt),
            lambda width: large(grpo_programs(config, model.arch, learner, rollout, asked.engine, width, full=False)),
            shown,
        ):
            sample = partial(sample_responses, asked, greedy, policy.rewarding, step.number)
            found = reinforce(config, mesh, rollout, reference, step, sample)
            step.metrics |= response_metrics(config, found)
            step.rows = response_rows(mesh, found)
        if (said := parted(read_metrics(run.folder / "metrics.jsonl"))) and jax.process_index() == 0:
            say(said)
        return run.finish(card_of(config, model))


def _asked(ready: Ready[PolicyConfig]) -> Judge:
    """The policy as it is sampled."""
    config, model = ready.config, ready.model
    settings = config.model, config.sampling, config.rollouts_per_prompt, FORMS[config.judge]
    return make_judge(model.arch, model.tokenizer, ready.mesh, *settings, longest=ready.longest_prompt)


def _greedy(ready: Ready[PolicyConfig]) -> Judge | None:
    """The policy with its likeliest words, where a source compares with these."""
    config, model = ready.config, ready.model
    if not config.compares:
        return None
    settings = config.model, greedily(config.sampling), 1, FORMS[config.judge]
    return make_judge(model.arch, model.tokenizer, ready.mesh, *settings, longest=ready.longest_prompt)


def dry_run(config: PolicyConfig) -> None:
    """Shows the config, the first batch, and what each program needs, those of the sources' models too."""
    start_processes(config, dry_run=True)
    policy = _ready(config)
    ready = policy.ready
    config, mesh, model, length = ready.config, ready.mesh, ready.model, ready.length
    say(kernels_in_use(config.model, model.arch, mesh, "causal", "shared", "written"))
    width = bucket(ready.longest_prompt)
    every = grpo_programs(
        config,
        model.arch,
        grpo_learner(config, model.arch, mesh, updates=length.steps * config.update.updates_per_rollout),
        make_rollout_programs(config, model.arch, mesh),
        _asked(ready).engine,
        width,
    )
    if (greedy := _greedy(ready)) is not None:
        _, (weights, *_) = every["decode"]
        own = abstract_programs(greedy.engine, weights, config.pairs_per_step, width)
        every |= {f"greedy response: {name}": program for name, program in own.items()}
    for opened in policy.models.values():
        every |= opened.programs(config, mesh)
    describe(to_yaml(config), mesh, every, next(ready.batches()), model.tokenizer, length.steps)
    tell_resident(list(policy.models.values()), config, mesh)


def shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    shares = {"without a reward": "rewards/failed", "cut off": "completions/clipped_ratio"}
    return {"reward": values["reward"], **{words: percent(values[name]) for words, name in shares.items()}}
