"""Tunix's trainer, sampler and GRPO learner: `tunix_peer.py CASE`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from case import LEARNING_RATE, PAD, WEIGHT_DECAY, Case, Turns, read_case
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer, utils

MESH = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def network(case: Case) -> qwen3.ModelConfig:
    """Tunix reads no config.json: the shape is spelled out."""
    read = transformers.AutoConfig.from_pretrained(case.folder)
    return qwen3.ModelConfig(
        num_layers=read.num_hidden_layers, vocab_size=read.vocab_size, embed_dim=read.hidden_size,
        hidden_dim=read.intermediate_size, num_heads=read.num_attention_heads, head_dim=read.head_dim,
        num_kv_heads=read.num_key_value_heads, rope_theta=1_000_000, norm_eps=read.rms_norm_eps,
        use_tied_embedding=True,
    )  # fmt: skip


def load(case: Case):
    return params.create_model_from_safe_tensors(case.folder, network(case), MESH, dtype=jnp.float32)


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))


def sft(case: Case, turns: Turns) -> None:
    def inputs(batch):
        mask = batch.input_tokens != PAD
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    trainer = peft_trainer.PeftTrainer(
        load(case), optimizer(), peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=None)
    ).with_gen_model_input_fn(inputs)
    trainer.is_managed_externally = True  # so that train() may be called again
    ids = case.tokens(case.rows, case.length)
    batch = peft_trainer.TrainingInput(input_tokens=ids, input_mask=np.ones_like(ids))
    while True:
        turns.begin()
        trainer.train([batch])
        turns.end()


def sample(case: Case, turns: Turns) -> None:
    shape = network(case)
    drawing = sampler.Sampler(
        transformer=load(case),
        tokenizer=transformers.AutoTokenizer.from_pretrained(case.folder),
        cache_config=sampler.CacheConfig(
            cache_size=case.prompt + case.new, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        ),
    )  # fmt: skip
    texts, number = case.texts(case.prompts), 0
    while True:
        turns.begin()
        drawing(
            input_strings=texts, max_generation_steps=case.new, max_prompt_length=case.prompt, temperature=1.0,
            top_p=1.0, top_k=None, seed=number, eos_tokens=list(case.stop_ids) or [case.vocab],
        )  # fmt: skip
        turns.end()
        number += 1


def grpo(case: Case, turns: Turns) -> None:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        texts = np.array(case.texts(case.prompts))
        while True:  # the learner asks for the next batch when it is through with one
            turns.begin()
            yield {"prompts": texts}
            turns.end()

    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=case.new, max_prompt_length=case.prompt, kv_cache_size=case.prompt + case.new,
        temperature=1.0, top_p=1.0, top_k=None, eos_tokens=list(case.stop_ids) or None,
    )  # fmt: skip
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=load(case),
        tokenizer=transformers.AutoTokenizer.from_pretrained(case.folder),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, MESH),
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer(),
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=case.prompts,
                train_micro_batch_size=case.micro,
            ),
            rollout_config=rollout,
        ),
    )
    grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=lambda prompts, completions, **_: [float(len(text) % 7) for text in completions],
        algo_config=grpo_learner.GRPOConfig(num_generations=case.group, beta=0.0),
    ).train(batches())


if __name__ == "__main__":
    given = read_case()
    with MESH:
        {"sft": sft, "sample": sample, "grpo": grpo}[given.task](given, Turns())
