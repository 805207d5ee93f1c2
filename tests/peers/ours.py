"""Our side: the programs that recipes train with."""

from dataclasses import replace

import jax
from case import Turns, read_case

from patarm_jax.bench import tasks
from patarm_jax.bench.case import open_bench
from patarm_jax.config.recipes import BenchConfig

case, turns = read_case(), Turns()
size = case.folder.rsplit("/", 1)[-1]
mean = case.vocab / len(case.stop_ids) if case.stop_ids else 0.0
config = BenchConfig(
    model=size, rows=case.rows, length=case.length, responses=case.prompts, prompt=case.prompt, group=case.group,
    new=case.new, mean_new=mean, alike=case.alike, question=case.question, judgement=case.judgement,
)  # fmt: skip
bench = open_bench(config)
if case.task == "sft":
    step = tasks.sft_update(bench)
elif case.task == "sample":
    step = tasks.sampling(replace(bench, config=replace(config, group=1)))
elif case.task == "policy":
    step = tasks.policy_step(bench)
else:
    step = tasks.grpo_step(bench)
while True:
    turns.begin()
    jax.block_until_ready(step())
    turns.end()
