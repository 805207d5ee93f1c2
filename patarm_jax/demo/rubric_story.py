"""The demo of Rubric-ARM, end to end: data, a model, the warm-up of generator and judge, their rounds, their worth.

It calls the same recipes as any run, with configs that stand in the run folders afterwards. Nothing is downloaded.
"""

import contextlib
import io
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.console
import rich.panel
import rich.table
import rich.text

from patarm_jax.config.sections import DataSection
from patarm_jax.data.preferences import COMPARISONS, RUBRIC_COLUMN, read_preferences
from patarm_jax.demo.rubric_world import KNOWN_BY_RUBRIC, teacher_comparisons, teacher_rubric, with_rubrics_of_others
from patarm_jax.demo.settings import ArmSizes, by_rubrics_config, rubric_arm_config
from patarm_jax.demo.story import (
    ONE_JUDGEMENT,
    POSITION,
    accuracy_table,
    choices_of,
    reinforced,
    right_choices,
    say,
    stopped,
    summary_of,
)
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import make_world, write_pairs
from patarm_jax.evaluate.accuracy import Accuracy, accuracy_of_choices
from patarm_jax.files import whole_file, writing
from patarm_jax.judge.forms import ORDERS, RUBRIC, RUBRIC_JUDGE
from patarm_jax.recipes import evaluate, rubric_arm
from patarm_jax.recipes.evaluate import RUBRICS
from patarm_jax.report.main import main as report

RUN = "rubric-arm"
STAGES = {
    "untrained": "random weights as both",
    "sft": "after the warm-up, on the rubrics and judgements of a teacher that is often wrong",
    "rubric-arm": "after the rounds, on the pairs alone",
    "swapped": "the same judge, by the rubrics of other prompts",
}


@dataclass(frozen=True)
class _Stage:
    """The two models of a stage."""

    judge: Path
    generator: Path


def demo(out: Path, seed: int, short: bool) -> dict[str, Accuracy]:
    """Writes `out` and prints what came out; gives the accuracies by stage."""
    begun = time.monotonic()
    sizes = ArmSizes.short() if short else ArmSizes()
    say(f"making {sizes.train_pairs} training and {sizes.heldout_pairs} held-out pairs in three domains")
    with writing(out):
        make_data(out, seed, sizes)
        write_untrained_model(out / "model", out / "data" / "train.jsonl", seed, (RUBRIC, RUBRIC_JUDGE))

    say("Rubric-ARM: the warm-up of a generator and a judge, then their rounds")
    if not reinforced(lambda: rubric_arm.main(rubric_arm_config(out, seed, sizes)), short):
        raise stopped(out)

    say("judging the held-out pairs by one rubric for each prompt, one judgement in each order")
    results = {name: judged(out, name, seed) for name in STAGES}
    summary: dict[str, object] = {name: summary_of(result) for name, result in results.items()}
    summary["run"] = {"seed": seed, "seconds": round(time.monotonic() - begun), "heldout_pairs": sizes.heldout_pairs}
    with writing(out):
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report(out / RUN)
    _show(out, results)
    return results


def make_data(out: Path, seed: int, sizes: ArmSizes) -> None:
    """Writes data/train.jsonl with the teacher's rubrics and judgements, and held-out pairs."""
    world, rng = make_world(seed, sizes.train_pairs, sizes.heldout_pairs, KNOWN_BY_RUBRIC), random.Random(seed + 1)
    rubrics = [teacher_rubric(pair, rng) for pair in world.train]
    taught = [
        (rubric, *teacher_comparisons(pair, rubric, rng)) for pair, rubric in zip(world.train, rubrics, strict=True)
    ]
    write_pairs(out / "data" / "train.jsonl", world.train, taught, (RUBRIC_COLUMN, *COMPARISONS))
    write_pairs(out / "data" / "heldout.jsonl", world.heldout)


def _of_stage(out: Path, stage: str) -> _Stage:
    if stage == "untrained":
        return _Stage(out / "model", out / "model")
    last = "warmup" if stage == "sft" else "export"
    return _Stage(out / RUN / "judge" / last, out / RUN / "generator" / last)


def judged(out: Path, stage: str, seed: int) -> Accuracy:
    """What the two models of a stage make of the held-out pairs."""
    models, pairs, folder = _of_stage(out, stage), out / "data" / "heldout.jsonl", out / "choices" / stage
    if stage == "swapped":
        swap_rubrics(out / "choices" / RUN / RUBRICS, folder / RUBRICS, pairs, seed)
    with contextlib.redirect_stdout(io.StringIO()):  # the demo has a table of its own
        done = evaluate.main(by_rubrics_config(models.judge, models.generator, pairs, folder, seed))
    if done is None:
        raise stopped(out)
    return accuracy_of_choices(*right_choices(folder))


def swap_rubrics(kept: Path, swapped: Path, pairs: Path, seed: int) -> None:
    """The rubrics of an evaluation as another one would have kept them, each under another prompt of its domain.

    An evaluation asks for no rubric that it has kept, and so goes by these.
    """
    if swapped.exists():
        return
    first, *lines = kept.read_text(encoding="utf-8").rstrip("\n").split("\n")
    answers = [json.loads(line) for line in lines]
    preferences, _ = read_preferences(DataSection(path=str(pairs), split=""))
    by_id = {preference.id: preference for preference in preferences}
    asked = [by_id[answer["question"].rsplit("#", 1)[0]] for answer in answers]
    texts = with_rubrics_of_others([answer["text"] for answer in answers], asked, seed)
    with writing(swapped):
        swapped.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(swapped) as part:
            dealt = [json.dumps(one | {"text": text}) for one, text in zip(answers, texts, strict=True)]
            part.write_text("\n".join([first, *dealt, ""]), encoding="utf-8")


def _show(out: Path, results: Mapping[str, Accuracy]) -> None:
    console = rich.console.Console()
    console.print(accuracy_table(results, ONE_JUDGEMENT["pairwise"], STAGES | POSITION))
    folder = out / "choices" / RUN
    texts = [json.loads(line) for line in (out / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    judgements = choices_of(folder)
    for index in range(0, 2 * len(KNOWN_BY_RUBRIC), 2):  # one pair of each domain
        pair, place = texts[index], index // 2 % 2
        row = judgements[2 * index + place]
        shown = ("chosen", "rejected") if place == 0 else ("rejected", "chosen")
        responses = "\n→ ".join(pair[each][-1]["content"] for each in shown)
        said = f"[{ORDERS[place]}] {pair['prompt'][-1]['content']}\n→ {responses}\n\n{row['rubric']}\n\n{row['text']}"
        title = f"{pair['id']} · {pair['domain']}"
        console.print(rich.panel.Panel(rich.text.Text(said), title=title, title_align="left", width=100))
    made = {"judge": f"{RUN}/judge/export", "generator": f"{RUN}/generator/export", "report": f"{RUN}/report.html"}
    for what, path in (made | {"numbers": "summary.json"}).items():
        console.print(f"{what + ':':11}{out / path}", highlight=False, soft_wrap=True)
