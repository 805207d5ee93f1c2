"""The demo, end to end: data, tokenizer, an untrained Qwen3, SFT, GRPO, and how well each stage judges.

It calls the same recipes as any run, with configs that stand in the run folders afterwards. Nothing is downloaded.
"""

import contextlib
import io
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import rich.box
import rich.console
import rich.panel
import rich.table

from patarm_jax.config.recipes import SFTConfig
from patarm_jax.data.preferences import CHOICES, JUDGEMENTS
from patarm_jax.demo.settings import DemoSizes, System, compare_config, demo_configs, judge_config
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import (
    deal_to_other_prompts,
    make_world,
    teacher_choice,
    teacher_judgement,
    write_pairs,
)
from patarm_jax.evaluate.accuracy import Accuracy, accuracy_of_choices
from patarm_jax.evaluate.files import JUDGEMENTS as SAID
from patarm_jax.files import LOCK, check_writable, writing
from patarm_jax.judge.forms import FORMS, ORDERS, SIDES
from patarm_jax.locks import hold_folder
from patarm_jax.recipes import evaluate, grpo, judge_file, sft
from patarm_jax.report.main import main as report
from patarm_jax.types import CHOSEN, REJECTED, LearntNothing, Status, UserError

MARK = "demo.json"  # says whose folder it is
STAGES = {
    "untrained": "random weights",
    "sft": "after SFT on the judgements of a teacher that is often wrong",
    "grpo": "after GRPO with PAR on the pairs alone",
    "swapped": "the same judge, when the response pairs are dealt to other prompts",
}
POSITION = {  # columns of judges that compare
    "first": "choices of the response that stood first",
    "same": "pairs of which both orders have the same choice",
}
# What else the table's caption says, by system.
CAPTIONS: Mapping[System, Mapping[str, str]] = {
    "pointwise": {},
    "pairwise": {
        "grpo": "after GRPO on the pairs alone",
        **POSITION,
    },
}
ONE_JUDGEMENT: Mapping[System, str] = {"pointwise": "one judgement per response", "pairwise": "one judgement per order"}


def main(
    out: Path, seed: int, short: bool, system: System | Literal["rubric-arm", "policy"] = "pointwise"
) -> Mapping[str, object]:
    """Writes `out` and prints what came out; gives what each stage is worth."""
    demo: Callable[[Path, int, bool], Mapping[str, object]]
    if system == "rubric-arm":
        from patarm_jax.demo.rubric_story import demo
    elif system == "policy":
        from patarm_jax.demo.policy_story import demo
    else:
        demo = partial(_demo, system=system)
    mark = json.dumps({"seed": seed, "short": short} | ({} if system == "pointwise" else {"system": system}))
    refuse_another(out, mark)
    with hold_folder(out, say):
        begin_anew(out, mark)
        return demo(out, seed, short)


def _demo(out: Path, seed: int, short: bool, system: System) -> dict[str, Accuracy]:
    begun = time.monotonic()
    sizes = DemoSizes.short() if short else DemoSizes.of(system)
    sft_config, grpo_config = demo_configs(out, seed, sizes, system)

    # -------------------------------------------------------------------------------------- data, tokenizer, weights
    say(f"making {sizes.train_pairs} training and {sizes.heldout_pairs} held-out pairs in five domains")
    with writing(out):
        make_data(out, seed, sizes, system)
        write_untrained_model(out / "model", out / "data" / "train.jsonl", seed, [FORMS[system]])

    # ---------------------------------------------------------------------------------------------------------- train
    say("SFT: learning the form, and the opinions of the teacher")
    finished = sft.main(sft_config)
    if finished:
        say("GRPO: learning from which response is preferred, with no score given")
        finished = reinforced(lambda: grpo.main(grpo_config), short)
    if not finished:
        raise stopped(out)

    # ------------------------------------------------------------------------------------------------------- evaluate
    say(f"judging the held-out pairs, {ONE_JUDGEMENT[system]}")
    judged = _judge if system == "pointwise" else _compare
    results = {name: judged(out, name, seed, sft_config) for name in STAGES}
    summary = {name: summary_of(result) for name, result in results.items()}
    summary["run"] = {"seed": seed, "seconds": round(time.monotonic() - begun), "heldout_pairs": sizes.heldout_pairs}
    with writing(out):
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(out / "sft")
    report(out / "grpo")
    _show(out, results, system)
    return results


def reinforced(train: Callable[[], bool], short: bool) -> bool:
    """Reinforcement learning; that a shortened demo learns nothing is no failure."""
    try:
        return train()
    except LearntNothing as nothing:
        if not short:
            raise
        say(f"{nothing} A shortened demo ends too early to learn anything.")
        return True


def make_data(out: Path, seed: int, sizes: DemoSizes, system: System = "pointwise") -> None:
    """Writes data/train.jsonl with the teacher's judgements, and held-out pairs as they are and swapped."""
    world = make_world(seed, sizes.train_pairs, sizes.heldout_pairs)
    teacher, accuracy = random.Random(seed + 1), sizes.teacher_accuracy
    if system == "pairwise":
        judgements, columns = [teacher_choice(pair, accuracy, teacher) for pair in world.train], CHOICES
    else:
        judgements = [
            (teacher_judgement(pair, CHOSEN, accuracy, teacher), teacher_judgement(pair, REJECTED, accuracy, teacher))
            for pair in world.train
        ]
        columns = JUDGEMENTS
    write_pairs(out / "data" / "train.jsonl", world.train, judgements, columns)
    write_pairs(out / "data" / "heldout.jsonl", world.heldout)
    write_pairs(out / "data" / "swapped.jsonl", deal_to_other_prompts(world.heldout, seed))


def refuse_another(out: Path, mark: str) -> None:
    """Refuses a folder that cannot be written, that holds a demo of other arguments, or something else."""
    check_writable(out, folder=True)
    file = out / MARK
    if file.is_file() and (found := file.read_text(encoding="utf-8")) != mark:
        raise UserError(f"{out} holds a demo with other arguments: {found}. Give another folder as --out.")
    if out.is_dir() and not file.is_file() and any(each.name != LOCK for each in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no demo. Give another folder as --out.")


def begin_anew(out: Path, mark: str) -> None:
    """A finished demo is made anew, an unfinished one goes on."""
    refuse_another(out, mark)  # another demo may have written there before this one had the folder
    if (out / "summary.json").is_file():
        for each in out.iterdir():
            if each.name != LOCK:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    (out / MARK).write_text(mark, encoding="utf-8")


def _of_stage(out: Path, stage: str) -> tuple[Path, Path]:
    """The judge of a stage, and the pairs that it judges."""
    model = {"untrained": "model", "sft": "sft", "grpo": "grpo", "swapped": "grpo"}[stage]
    return out / model, out / "data" / f"{'swapped' if stage == 'swapped' else 'heldout'}.jsonl"


def _judge(out: Path, stage: str, seed: int, config: SFTConfig) -> Accuracy:
    """By scores of single responses."""
    scores = out / "scores" / f"{stage}.jsonl"
    result = judge_file.main(judge_config(*_of_stage(out, stage), scores, seed, config))
    if result is None:
        raise stopped(out)
    return result


def _compare(out: Path, stage: str, seed: int, config: SFTConfig) -> Accuracy:
    """By choices in both orders."""
    folder = out / "choices" / stage
    with contextlib.redirect_stdout(io.StringIO()):  # the demo has a table of its own
        finished = evaluate.main(compare_config(*_of_stage(out, stage), folder, seed, config)) is not None
    if not finished:
        raise stopped(out)
    return accuracy_of_choices(*right_choices(folder))


def right_choices(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which judgements of an evaluation chose the chosen response, and which are valid: both [P, orders, 1]."""
    rows = choices_of(folder)
    right = np.array([row["choice"] == "AB"[ORDERS.index(row["side"])] for row in rows], float)
    valid = np.array([row["status"] == Status.OK.name for row in rows])
    return right.reshape(-1, 2, 1), valid.reshape(-1, 2, 1)


def choices_of(folder: Path) -> list[dict[str, Any]]:
    """The judgements of an evaluation, both orders of a pair one after the other."""
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(folder / SAID).to_pylist()
    return rows


def stopped(out: Path) -> UserError:
    """What is said of a demo that was asked to stop."""
    return UserError(f"the demo was stopped. Start it again to go on in {out}.")


def summary_of(result: Accuracy) -> dict[str, object]:
    """What a stage is worth, as JSON."""
    values = asdict(result)
    position, gap = values.pop("position"), values.pop("gap")
    if position:  # of choices; NaN is no JSON
        return values | {"position": {name: share if share == share else None for name, share in position.items()}}
    return values | {"gap": gap if gap == gap else None}


def _show(out: Path, results: Mapping[str, Accuracy], system: System) -> None:
    console = rich.console.Console()
    console.print(results_table(results, system))
    pairs = [json.loads(line) for line in (out / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    for index in range(0, 10, 2):  # one pair of each domain
        pair, place = pairs[index], index // 2 % 2
        side, told = _told_of(out, system, index, place)
        shown = (side,) if system == "pointwise" else (SIDES if place == 0 else SIDES[::-1])
        responses = "\n→ ".join(pair[each][-1]["content"] for each in shown)
        text = rich.text.Text(f"[{side}] {pair['prompt'][-1]['content']}\n→ {responses}\n\n{told}")
        console.print(rich.panel.Panel(text, title=f"{pair['id']} · {pair['domain']}", title_align="left", width=100))
    for what, path in {"judge": "grpo/export", "report": "grpo/report.html", "numbers": "summary.json"}.items():
        console.print(f"{what + ':':9}{out / path}", highlight=False, soft_wrap=True)


def _told_of(out: Path, system: System, index: int, place: int) -> tuple[str, str]:
    """What the last stage's judge wrote about a held-out pair: (of which side or in which order, the text)."""
    if system == "pairwise":
        return ORDERS[place], choices_of(out / "choices" / "grpo")[2 * index + place]["text"]
    lines = (out / "scores" / "grpo.jsonl").read_text(encoding="utf-8").splitlines()
    return SIDES[place], json.loads(lines[index])["judgements"][SIDES[place]][0]["text"]


def results_table(results: Mapping[str, Accuracy], system: System = "pointwise") -> rich.table.Table:
    """The accuracies by stage, in per cent."""
    return accuracy_table(results, ONE_JUDGEMENT[system], {**STAGES, **CAPTIONS[system]})


def accuracy_table(results: Mapping[str, Accuracy], judged: str, captions: Mapping[str, str]) -> rich.table.Table:
    """Accuracies by stage, in per cent.

    Args:
        results: by stage.
        judged: how the pairs were judged, in words.
        captions: what is said of stages and columns below the table.
    """
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title=f"held-out pairs, {judged}, in %",
        title_justify="left",
        caption="\n".join(f"{name}: {what}" for name, what in captions.items()),
        caption_justify="left",
    )
    table.add_column("judge", no_wrap=True)
    gives_scores = all(result.gap is not None for result in results.values())
    last = ("score gap",) if gives_scores else ("first", "same")
    for heading in ("valid", "tie = wrong", "tie = ½", "95 % interval", *last):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        low, high = result.interval
        if result.gap is None:
            more = [percent(result.position[each]) for each in ("chose the first", "same in both orders")]
        else:
            more = [f"{result.gap:+.2f}" if result.gap == result.gap else "–"]
        shares = map(percent, (result.valid, result.accuracy_strict, result.accuracy_half))
        table.add_row(name, *shares, f"{100 * low:.1f} … {100 * high:.1f}", *more)
    return table


def percent(share: float) -> str:
    """A share in per cent; a dash where there is none."""
    return f"{100 * share:.1f}" if share == share else "–"


def say(message: str) -> None:
    """Says how far the demo is."""
    rich.console.Console(stderr=True).print(message, style="bold", highlight=False)
