"""A recipe of its own, by what `run/` and `train/` offer: likelihoods of responses are taught to follow preferences.

It couples the two sides of a pair, so its batch has the pair as its unit: [P, 2, T].
"""

import json
import signal
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.config.recipes import JudgeTrainConfig
from patarm_jax.config.sections import DataSection, ModelSection, OptimizerSection, RunSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.model.sharding import make_mesh, place_batch
from patarm_jax.model.transformer import abstract_params, forward
from patarm_jax.padding import bucket
from patarm_jax.run.card import card_of
from patarm_jax.run.claim import claimed
from patarm_jax.run.folder import length_of, open_run
from patarm_jax.run.learner import check_batch, make_learner
from patarm_jax.run.open_model import open_model
from patarm_jax.run.peers import start_processes
from patarm_jax.train.losses import Loss, mask_from_lengths
from tests.toys import small_world


@dataclass(frozen=True)
class LikelihoodConfig(JudgeTrainConfig):
    recipe: Literal["likelihood"] = "likelihood"
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(learning_rate=1e-2))

    @property
    def stage_in_words(self):
        return "likelihoods that follow preferences"


def train(config, trouble=None):
    start_processes(config)
    with claimed(config.run):
        # ---- model and data
        mesh, model = make_mesh(config.mesh), open_model(config.model)
        check_batch(mesh, config.pairs_per_step, config.micro_batches, "pairs_per_step")
        preferences, _ = read_preferences(config.data)
        room = Room(model.arch.max_position_embeddings)
        records, _ = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data, room)
        length = length_of(config.run, records, config.pairs_per_step)

        # ---- learner
        run_forward = partial(forward, arch=model.arch, dtype=config.model.dtype)

        def loss(params, _frozen, batch):
            tokens, lengths = batch
            sides = tokens.reshape(-1, tokens.shape[-1])
            out = run_forward(params, prompt=sides)
            logprobs = jax.nn.log_softmax(out.prompt[:, :-1] @ out.head.T)
            taken = jnp.take_along_axis(logprobs, sides[:, 1:, None], axis=-1)[..., 0].reshape(*tokens.shape[:2], -1)
            mask = mask_from_lengths(lengths - 1, taken.shape[-1])
            whole = (taken * mask).sum(-1)
            total, count = jnp.logaddexp(0.0, whole[:, 1] - whole[:, 0]).sum(), jnp.float32(len(tokens))
            return Loss((total, count), {"loss": (total, count)})

        learner = make_learner(config, abstract_params(model.arch, mesh), mesh, loss, updates=length.steps)

        # ---- train
        def prepare(pairs):
            width = bucket(pairs.longest_prompt)
            tokens = np.zeros((len(pairs.records), 2, width), np.int32)
            for index, side in np.ndindex(*tokens.shape[:2]):
                prompt = pairs.records[index].prompt_tokens[side]
                tokens[index, side, : len(prompt)] = prompt
            lengths = [list(map(len, record.prompt_tokens)) for record in pairs.records]
            return place_batch(mesh, (tokens, np.array(lengths, np.int32)))

        with open_run(config, model, records, length, learner) as run:
            if run is None:
                return True
            for step in run.steps(
                prepare,
                lambda batch: {"update": (learner.update, (run.trained.state, learner.frozen, batch))},
                lambda values: {"loss": values["loss"]},
            ):
                if trouble:
                    raise trouble
                step.update(step.batch)
                step.tokens = int(step.batch[1].sum())
            return run.finish(card_of(config, model, len(records)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    world = small_world(tmp_path_factory.mktemp("likelihood"))
    return LikelihoodConfig(
        model=ModelSection(path=str(world / "model"), weights="random", dtype="float32"),
        data=DataSection(path=str(world / "pairs.jsonl")),
        run=RunSection(folder=str(world / "whole"), steps=4, tensorboard=False),
        pairs_per_step=8,
    )


def weights_of(config):
    return (Path(config.run.folder) / "export" / "model.safetensors").read_bytes()


@pytest.mark.long
def test_it_learns_and_resumes_like_any_other(config):
    assert train(config) and train(config)  # the second time there is nothing left to do
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    stopped = replace(config, run=replace(config.run, folder=f"{config.run.folder}-stopped", steps=2))
    assert train(stopped)
    resumed = replace(stopped, run=replace(stopped.run, steps=4))
    assert train(resumed) and weights_of(resumed) == weights_of(config)


@pytest.mark.long
def test_after_an_error_in_a_step_signals_and_streams_are_as_they_were(config):
    folder = f"{config.run.folder}-failed"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError) as error:
        train(replace(config, run=replace(config.run, folder=folder)), trouble=ZeroDivisionError())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.stdout, sys.stderr) == before
    assert error.tb  # whose frames still hold the iteration over the steps
