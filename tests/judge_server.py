"""A judge of this project behind a chat server on loopback: python -m tests.judge_server MODEL ASKED.

It prints its address, and writes each request to the file ASKED as it comes. A request is answered by one completion,
which depends on its messages and its seed alone, and takes its time as a larger judge would.
"""

import json
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.data.pipeline import encode_question
from patarm_jax.data.tokenizer import written
from patarm_jax.judge.forms import POINTWISE
from patarm_jax.model.sharding import make_mesh
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import make_engine, network_for
from patarm_jax.rollout.judging import written_ids
from patarm_jax.rollout.schedule import Request, completed_groups
from patarm_jax.run.learner import rollout_rules
from patarm_jax.run.open_model import load_params, open_model
from tests.chat_server import completion, served

MAX_NEW = 96
SECONDS = 0.05  # that an answer takes longer


def answering(folder, asked):
    """A function from a request to its answer, which writes down that it was asked."""
    section, placement = ModelSection(path=str(folder), dtype="float32"), MeshSection()
    model, mesh = open_model(section), make_mesh(placement, alone=True)
    tokenizer = model.tokenizer
    params = load_params(section, model, mesh, 0, rollout_rules(placement), jnp.float32, sampling=True)
    drawn = SamplingParams(tokenizer.stop_ids, MAX_NEW, temperature=1.0, top_k=0, top_p=1.0)
    engine = make_engine(network_for(section, model.arch, mesh), mesh, 1, drawn, 1)
    alone = threading.Lock()

    def answer(request):
        with alone:
            with asked.open("a") as file:
                file.write(json.dumps(request, sort_keys=True) + "\n")
            tokens = encode_question(tokenizer, request["messages"], POINTWISE)
            sampling = SamplingParams(
                tokenizer.stop_ids, MAX_NEW, request.get("temperature", 1.0), request.get("top_k", 0), top_p=1.0
            )
            one = Request(tokens, request["seed"] % 2**31, sampling)
            (group,) = completed_groups(engine, params, [one], jax.random.key(0))
        time.sleep(SECONDS)
        text = written(tokenizer, written_ids(group)[0])
        finish = "length" if group.truncated[0] else "stop"
        return 200, completion(text, finish, int(group.lengths[0]))

    return answer


if __name__ == "__main__":
    with served(always=answering(sys.argv[1], Path(sys.argv[2]))) as (url, _):
        print(url, flush=True)
        sys.stdin.read()  # until whoever started it closes it
