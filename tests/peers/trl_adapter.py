"""Two steps of TRL's GRPOTrainer with a judge behind an endpoint as its reward: `trl_adapter.py MODEL URL FOLDER`."""

import json
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from patarm_jax.adapters.trl import make_reward

model, url, folder = sys.argv[1:]
reward, given = make_reward(url, kept=f"{folder}/answers"), []


def judged(completions, **columns):
    texts = [one[0]["content"] for one in completions]
    given.append(list(zip(texts, reward(completions=completions, **columns), strict=True)))
    return [score for _, score in given[-1]]


config = GRPOConfig(
    output_dir=folder, per_device_train_batch_size=8, num_generations=4, max_completion_length=12, max_steps=2,
    logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=1,
)  # fmt: skip
rows = [{"prompt": [{"role": "user", "content": f"Write of {name}."}], "domain": "chat"} for name in ("rice", "rain")]
trainer = GRPOTrainer(model=model, reward_funcs=judged, args=config, train_dataset=Dataset.from_list(rows * 4))
before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
trainer.train()
moved = any((weight != before[name]).any().item() for name, weight in trainer.model.named_parameters())
print(json.dumps({"jax": "jax" in sys.modules, "given": given, "moved": moved, "log": trainer.state.log_history[:2]}))
