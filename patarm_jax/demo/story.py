"""The demo, end to end: data, tokenizer, an untrained Qwen3, SFT, GRPO, and how well each stage judges.

It calls the same recipes as any run, with configs that stand in the run folders afterwards. Nothing is downloaded.
"""

import json
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import rich.box
import rich.console
import rich.panel
import rich.table

from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.demo.settings import DemoSizes, demo_configs, judge_config
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import deal_to_other_prompts, make_world, teacher_judgement, write_pairs
from patarm_jax.evaluate.accuracy import Accuracy
from patarm_jax.files import LOCK, check_writable, writing
from patarm_jax.locks import hold_folder
from patarm_jax.recipes import grpo, judge_file, sft
from patarm_jax.report.main import main as report
from patarm_jax.types import CHOSEN, REJECTED, LearntNothing, UserError

MARK = "demo.json"  # says whose folder it is
STAGES = {
    "untrained": "random weights",
    "sft": "after SFT on the judgements of a teacher that is often wrong",
    "grpo": "after GRPO with PAR on the pairs alone",
    "swapped": "the same judge, when the response pairs are dealt to other prompts",
}


def main(out: Path, seed: int, short: bool) -> dict[str, Accuracy]:
    """Writes `out` and prints what came out; gives the accuracies by stage."""
    _refuse_another(out, seed, short)
    with hold_folder(out, _say):
        return _demo(out, seed, short)


def _demo(out: Path, seed: int, short: bool) -> dict[str, Accuracy]:
    begun = time.monotonic()
    _begin_anew(out, seed, short)
    sizes = DemoSizes.short() if short else DemoSizes()
    sft_config, grpo_config = demo_configs(out, seed, sizes)

    # -------------------------------------------------------------------------------------- data, tokenizer, weights
    _say(f"making {sizes.train_pairs} training and {sizes.heldout_pairs} held-out pairs in five domains")
    with writing(out):
        make_data(out, seed, sizes)
        write_untrained_model(out / "model", out / "data" / "train.jsonl", seed)

    # ---------------------------------------------------------------------------------------------------------- train
    _say("SFT: learning the form, and the opinions of the teacher")
    finished = sft.main(sft_config)
    if finished:
        _say("GRPO: learning from which response is preferred, with no score given")
        finished = _reinforced(grpo_config, short)
    if not finished:
        raise UserError(f"the demo was stopped. Start it again to go on in {out}.")

    # ------------------------------------------------------------------------------------------------------- evaluate
    _say("judging the held-out pairs, one judgement per response")
    results = {name: _judge(out, name, seed, sft_config) for name in STAGES}
    summary = {name: _summary(result) for name, result in results.items()}
    summary["run"] = {"seed": seed, "seconds": round(time.monotonic() - begun), "heldout_pairs": sizes.heldout_pairs}
    with writing(out):
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(out / "sft")
    report(out / "grpo")
    _show(out, results)
    return results


def _reinforced(config: GRPOConfig, short: bool) -> bool:
    """GRPO; that a shortened demo learns nothing is no failure."""
    try:
        return grpo.main(config)
    except LearntNothing as nothing:
        if not short:
            raise
        _say(f"{nothing} A shortened demo ends too early to learn anything.")
        return True


def make_data(out: Path, seed: int, sizes: DemoSizes) -> None:
    """Writes data/train.jsonl with the teacher's judgements, and held-out pairs as they are and swapped."""
    world = make_world(seed, sizes.train_pairs, sizes.heldout_pairs)
    teacher = random.Random(seed + 1)
    judgements = [
        (
            teacher_judgement(pair, CHOSEN, sizes.teacher_accuracy, teacher),
            teacher_judgement(pair, REJECTED, sizes.teacher_accuracy, teacher),
        )
        for pair in world.train
    ]
    write_pairs(out / "data" / "train.jsonl", world.train, judgements)
    write_pairs(out / "data" / "heldout.jsonl", world.heldout)
    write_pairs(out / "data" / "swapped.jsonl", deal_to_other_prompts(world.heldout, seed))


def _refuse_another(out: Path, seed: int, short: bool) -> None:
    """Refuses a folder that cannot be written, that holds a demo of another seed or length, or something else."""
    check_writable(out, folder=True)
    mark = out / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8") != _mark(seed, short):
        raise UserError(f"{out} holds a demo with other arguments: {mark.read_text()}. Give another folder as --out.")
    if out.is_dir() and not mark.is_file() and any(each.name != LOCK for each in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no demo. Give another folder as --out.")


def _begin_anew(out: Path, seed: int, short: bool) -> None:
    """A finished demo is made anew, an unfinished one goes on."""
    _refuse_another(out, seed, short)  # another demo may have written there before this one had the folder
    if (out / "summary.json").is_file():
        for each in out.iterdir():
            if each.name != LOCK:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    (out / MARK).write_text(_mark(seed, short), encoding="utf-8")


def _mark(seed: int, short: bool) -> str:
    return json.dumps({"seed": seed, "short": short})


def _judge(out: Path, stage: str, seed: int, config: SFTConfig) -> Accuracy:
    model = {"untrained": "model", "sft": "sft", "grpo": "grpo", "swapped": "grpo"}[stage]
    pairs = "swapped" if stage == "swapped" else "heldout"
    scores = out / "scores" / f"{stage}.jsonl"
    result = judge_file.main(judge_config(out / model, out / "data" / f"{pairs}.jsonl", scores, seed, config))
    if result is None:
        raise UserError(f"the demo was stopped. Start it again to go on in {out}.")
    return result


def _summary(result: Accuracy) -> dict[str, object]:
    values = asdict(result)
    return values | {"gap": values["gap"] if values["gap"] == values["gap"] else None}  # NaN is no JSON


def _show(out: Path, results: Mapping[str, Accuracy]) -> None:
    console = rich.console.Console()
    console.print(results_table(results))
    rows = [json.loads(line) for line in (out / "scores" / "grpo.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [json.loads(line) for line in (out / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    for index in range(0, 10, 2):  # one pair of each domain
        side = ("chosen", "rejected")[index // 2 % 2]
        row, pair = rows[index], pairs[index]
        read = f"[{side}] {pair['prompt'][-1]['content']}\n→ {pair[side][-1]['content']}"
        text = rich.text.Text(f"{read}\n\n{row['judgements'][side][0]['text']}")
        console.print(rich.panel.Panel(text, title=f"{row['id']} · {row['domain']}", title_align="left", width=100))
    for what, path in {"judge": "grpo/export", "report": "grpo/report.html", "numbers": "summary.json"}.items():
        console.print(f"{what + ':':9}{out / path}", highlight=False, soft_wrap=True)


def results_table(results: Mapping[str, Accuracy]) -> rich.table.Table:
    """The accuracies by stage, in per cent."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title="held-out pairs, one judgement per response, in %",
        title_justify="left",
        caption="\n".join(f"{name}: {what}" for name, what in STAGES.items()),
        caption_justify="left",
    )
    table.add_column("judge", no_wrap=True)
    for heading in ("valid", "tie = wrong", "tie = ½", "95 % interval", "score gap"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        low, high = result.interval
        table.add_row(
            name,
            *(f"{100 * x:.1f}" for x in (result.valid, result.accuracy_strict, result.accuracy_half)),
            f"{100 * low:.1f} … {100 * high:.1f}",
            f"{result.gap:+.2f}" if result.gap == result.gap else "–",
        )
    return table


def _say(message: str) -> None:
    rich.console.Console(stderr=True).print(message, style="bold", highlight=False)
