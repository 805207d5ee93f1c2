"""The demo of a policy, end to end: a judge as in the demo of judges, and a policy that it is the reward of.

It calls the same recipes as any run, with configs that stand in the run folders afterwards. Nothing is downloaded.
"""

import json
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import rich.box
import rich.console
import rich.panel
import rich.table
import rich.text

from patarm_jax.arrays import Params
from patarm_jax.ask.worth import open_models, open_sources
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.demo.policy_world import write_responses
from patarm_jax.demo.settings import PolicySizes, demo_configs, model_section, policy_config, policy_sft_config
from patarm_jax.demo.story import make_data, reinforced, say, stopped
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import make_world
from patarm_jax.evaluate.responses import HeldoutResponses, open_heldout_prompts
from patarm_jax.files import writing
from patarm_jax.judge.forms import POLICY_UNTHINKING
from patarm_jax.model.sharding import TRAIN_RULES, make_mesh
from patarm_jax.recipes import grpo, policy, sft
from patarm_jax.report.main import main as report
from patarm_jax.rollout.responses import Rewarding, make_response_rewards
from patarm_jax.run.claim import ROLLOUTS
from patarm_jax.run.open_model import load_params, open_model

STAGES = {
    "untrained": "random weights",
    "sft": "after SFT on responses that are often wrong",
    "grpo": "after GRPO with the judge as the reward",
}
MODELS = {"untrained": "policy", "sft": "policy-sft", "grpo": "policy-grpo"}
COLUMNS = {
    "right": ("gold/right/mean", "responses that give what the prompt calls for, as the world knows"),
    "score": ("eval/rewards/judge/mean", "the judge's, of those that it could judge"),
    "closing": (
        "gold/closing/mean",
        "responses with a friendly closing, which means nothing and charms the judge's teacher",
    ),
    "tokens": ("eval/mean_length", "of a response, in the mean"),
}


def demo(out: Path, seed: int, short: bool) -> Mapping[str, Mapping[str, float]]:
    """Writes `out` and prints what came out; gives the metrics of each stage on the held-out prompts."""
    begun = time.monotonic()
    sizes = PolicySizes.short() if short else PolicySizes()
    judge_sft, judge_grpo = demo_configs(out, seed, sizes.judge)
    say(f"making {sizes.judge.train_pairs} pairs, judgements and responses in five domains")
    with writing(out):
        make_data(out, seed, sizes.judge)
        world = make_world(seed, sizes.judge.train_pairs, sizes.judge.heldout_pairs)
        write_responses(out / "data" / "responses.jsonl", world.train, sizes.right, random.Random(seed + 3))
        write_untrained_model(out / "model", out / "data" / "train.jsonl", seed)
        write_untrained_model(out / "policy", out / "data" / "train.jsonl", seed + 1, [POLICY_UNTHINKING])

    say("the judge: SFT on judgements, then GRPO with PAR on the pairs alone")
    finished = sft.main(judge_sft) and reinforced(lambda: grpo.main(judge_grpo), short)
    if finished:
        say("the policy: SFT on responses, then GRPO with the judge as the reward")
        finished = sft.main(policy_sft_config(out, seed, sizes))
    config = policy_config(out, seed, sizes, out / "grpo")
    if not (finished and reinforced(lambda: policy.main(config), short)):
        raise stopped(out)

    say("measuring the policy's stages on the held-out prompts")
    results = {stage: _measured(config, out / folder) for stage, folder in MODELS.items()}
    summary: dict[str, object] = dict(results)
    summary["run"] = {"seed": seed, "seconds": round(time.monotonic() - begun)}
    with writing(out):
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(out / "policy-grpo")
    _show(out, results)
    return results


def _measured(config: PolicyConfig, folder: Path) -> dict[str, float]:
    """What the policy in a folder makes of the held-out prompts, as its run measures itself."""
    heldout, weights = opened_heldout(config, folder)
    return heldout(weights, None)


def opened_heldout(config: PolicyConfig, folder: Path) -> tuple[HeldoutResponses, Params]:
    """The held-out prompts of a run with all their sources, and the weights of the policy in a folder."""
    config = replace(config, model=model_section(folder)).complete()
    models, mesh = open_models(config), make_mesh(config.mesh)
    sources = open_sources(config, models, mesh, folder / "answers")
    rewarding = Rewarding(config, lambda: sources, make_response_rewards(config))
    model = open_model(config.model, config.judge)
    heldout = open_heldout_prompts(rewarding, lambda: sources, config, model, mesh, [])
    assert heldout is not None
    return heldout, load_params(config.model, model, mesh, config.run.seed, TRAIN_RULES, np.float32)


def _show(out: Path, results: Mapping[str, Mapping[str, float]]) -> None:
    console = rich.console.Console()
    captions = [*STAGES.items(), *((name, what) for name, (_, what) in COLUMNS.items())]
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title="held-out prompts, one response to each",
        title_justify="left",
        caption="\n".join(f"{name}: {what}" for name, what in captions),
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("right", "± 2 se", "score", "closing", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, found in results.items():
        right, score, closing, tokens = (found[metric] for metric, _ in COLUMNS.values())
        spread = 200 * found["gold/right/error"]
        table.add_row(
            stage, f"{100 * right:.1f} %", f"{spread:.1f}", f"{score:.2f}", f"{100 * closing:.1f} %", f"{tokens:.1f}"
        )
    console.print(table)
    lines = (out / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = {row["id"]: row for row in map(json.loads, lines)}
    last = max((out / "policy-grpo" / ROLLOUTS).glob("*.parquet"))
    shown = {row["pair_id"]: row for row in pyarrow.parquet.read_table(last).to_pylist()}
    by_domain = {prompts[name]["domain"]: name for name in shown}
    for domain, name in by_domain.items():
        asked = prompts[name]["prompt"][-1]["content"]
        said = rich.text.Text(f"{asked}\n→ {shown[name]['text']}\n\n{shown[name]['judgement']}")
        console.print(rich.panel.Panel(said, title=f"{name} · {domain}", title_align="left", width=100))
    made = {"policy": "policy-grpo/export", "judge": "grpo/export", "report": "policy-grpo/report.html"}
    for what, path in (made | {"numbers": "summary.json"}).items():
        console.print(f"{what + ':':9}{out / path}", highlight=False, soft_wrap=True)
