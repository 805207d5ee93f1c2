"""verl's own reward manager asks a judge, by its new keys and by its old ones: `verl_adapter.py MODEL URL FOLDER`."""

import asyncio
import json
import sys

import numpy as np
import torch
from hydra import compose, initialize_config_module
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
from verl.trainer.ppo.reward import load_reward_manager
from verl.workers.reward_manager.naive import NaiveRewardManager

from patarm_jax.adapters.verl import compute_score

model, url, folder = sys.argv[1:]
NEW, OLD = "reward.custom_reward_function", "custom_reward_function"
tokenizer = AutoTokenizer.from_pretrained(model)
completions = sys.stdin.read().split("\n")


def batch(text: str) -> DataProto:
    """A response as verl's rollouts are: right-padded, behind its prompt."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    responses = torch.tensor([ids + [tokenizer.pad_token_id] * 3])
    prompts = torch.tensor([tokenizer("Topic", add_special_tokens=False)["input_ids"]])
    mask = torch.tensor([[1] * (prompts.shape[1] + len(ids)) + [0] * 3])
    return DataProto.from_dict(
        tensors={"prompts": prompts, "responses": responses, "attention_mask": mask},
        non_tensors={
            "data_source": np.array(["topics"], dtype=object),
            "reward_model": np.array([{"style": "model", "ground_truth": ""}], dtype=object),
            "extra_info": np.array([{"question": "Topic", "index": 0}], dtype=object),
        },
    )


def by_keys(keys: str, name: str, *more: str) -> list[dict]:
    settings = [
        f"{keys}.path=pkg://patarm_jax.adapters.verl",
        f"{keys}.name={name}",
        f"+{keys}.reward_kwargs.judge={url}",
        f"+{keys}.reward_kwargs.kept={folder}/{name}",
        f"+{keys}.reward_kwargs.endpoint.concurrency=2",
        *more,
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=settings)
    manager = load_reward_manager(migrate_legacy_reward_impl(config), tokenizer)

    async def every() -> list[dict]:
        manager.loop = asyncio.get_running_loop()
        return await asyncio.gather(*(manager.run_single(batch(text)) for text in completions))

    return asyncio.run(every())


def before_the_loop() -> list[float | str]:
    """The manager of versions that had no reward loop, which calls the function of one response after the other."""

    def score(**asked):
        return compute_score(**asked, judge=url, kept=f"{folder}/before")

    manager, found = NaiveRewardManager(tokenizer, num_examine=0, compute_score=score), []
    for text in completions:
        try:
            found.append(manager(batch(text), return_dict=True)["reward_tensor"].sum().item())
        except TypeError:  # of None, which is no number
            found.append("TypeError")
    return found


new, old = by_keys(NEW, "compute_score_async"), by_keys(OLD, "compute_score")
print(json.dumps({"jax": "jax" in sys.modules, "new": new, "old": old, "before": before_the_loop()}))
