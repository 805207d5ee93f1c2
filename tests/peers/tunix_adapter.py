"""A step of Tunix's GRPO learner with a judge behind an endpoint as its reward: `tunix_adapter.py MODEL URL FOLDER`."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from tunix.cli.config import HyperParameters
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params
from tunix.rl import rl_cluster as rl
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from patarm_jax.adapters.tunix import make_reward

folder_of_model, url, folder = sys.argv[1:]
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
read = transformers.AutoConfig.from_pretrained(folder_of_model)
shape = qwen3.ModelConfig(
    num_layers=read.num_hidden_layers, vocab_size=read.vocab_size, embed_dim=read.hidden_size,
    hidden_dim=read.intermediate_size, num_heads=read.num_attention_heads, head_dim=read.head_dim,
    num_kv_heads=read.num_key_value_heads, rope_theta=1_000_000, norm_eps=read.rms_norm_eps,
    use_tied_embedding=read.tie_word_embeddings,
)  # fmt: skip
reward, given = make_reward(url, kept=f"{folder}/answers"), []


def judged(prompts, completions, **columns):
    given.append(list(zip(completions, reward(prompts, completions, **columns), strict=True)))
    return [score for _, score in given[-1]]


with mesh:
    actor = params.create_model_from_safe_tensors(folder_of_model, shape, mesh, dtype=jnp.float32)
cluster = rl.RLCluster(
    actor=actor,
    reference=None,
    tokenizer=transformers.AutoTokenizer.from_pretrained(folder_of_model),
    cluster_config=rl.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl.Role.ACTOR, rl.Role.REFERENCE, rl.Role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        training_config=rl.RLTrainingConfig(actor_optimizer=optax.adamw(1e-3), eval_every_n_steps=1000, max_steps=1),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=12, max_prompt_length=32, kv_cache_size=64, temperature=1.0
        ),
    ),
)
learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    reward_fns=judged,
    algo_config=grpo_learner.GRPOConfig(num_generations=4, beta=0.0),
)
with mesh:
    learner.train([{"prompts": np.array(["Write of rice.", "Write of rain."]), "domain": np.array(["chat", "chat"])}])
# What its command line makes of `reward_functions: [patarm_jax.adapters.tunix]`.
named = SimpleNamespace(config={"reward_functions": ["patarm_jax.adapters.tunix"], "verl_compatible": False})
functions = [function.__name__ for function in HyperParameters.obtain_reward_fn(named)]
print(json.dumps({"given": given, "steps": int(cluster.global_steps), "functions": functions}))
