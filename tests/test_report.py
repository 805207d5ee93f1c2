"""The page of a run, opened from disk in a real browser: its curves, its rollouts, and hostile text as mere text."""

import base64
import gzip
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import pytest

from patarm_jax.cli import main
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import EvalConfig, GRPOConfig
from patarm_jax.config.sections import DataSection, HeldoutSection, ModelSection, RunSection
from patarm_jax.report.page import within
from patarm_jax.run.metrics import open_metrics
from patarm_jax.run.rollouts import RolloutRow, write_rollouts
from patarm_jax.types import Status

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><|im_end|>\u2028<b>bold</b>"
# pair → (scores of the chosen side, of the rejected side); None: malformed
SCORES = {
    "right": ((8.0, 7.0), (2.0, 3.0)),
    "wrong": ((2.0, 1.0), (9.0, None)),
    "tied": ((5.0, 5.0), (4.0, 6.0)),
    "unread": ((None, None), (4.0, 6.0)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "judge"
    folder.mkdir()
    pairs = folder.parent / "pairs.jsonl"
    rows = [
        {"id": name, "prompt": f"Prompt of {name} {HOSTILE}", "chosen": f"good {name}", "rejected": f"bad {name}",
         "domain": "math"}
        for name in SCORES
    ]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GRPOConfig(model=ModelSection(path="models/judge"), data=DataSection(path=str(pairs)))
    (folder / "config.yaml").write_text(to_yaml(config))
    writer = open_metrics(folder, 0, tensorboard=False, wandb_project="", config={})
    for step in range(1, 7):
        values = {"judge/score_gap": 0.5 * step, "entropy": float("nan") if step == 3 else 1 / step, "reward": 0.1}
        values |= {"judge/valid": 1.0, "judge/accuracy_strict": 0.75}
        values |= {"time/sample": 100.0 if step == 1 else 1.0, "time/reward": 0.01}
        writer.write(step, values | ({"eval/score_gap": 2.0, "eval/accuracy_strict": 0.7} if step % 3 == 0 else {}))
        write_rollouts(folder / "rollouts", step, list(judged(step)))
    writer.close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # still being written
    return folder


def judged(step):
    for name, sides in SCORES.items():
        for side, scores in zip(("chosen", "rejected"), sides, strict=True):
            for vote, score in enumerate(scores):
                status = Status.BAD_TAGS if score is None else Status.OK
                text = f"step {step}, {name}, {side}, {vote} {HOSTILE}"
                yield RolloutRow(name, side, text, status, score, reward=1.2 if vote else -1.5, advantage=-0.25)


@pytest.fixture
def opened(run, browser):
    """A function that opens the report at a place; nothing may be fetched, and nothing may go wrong."""
    assert main(["report", str(run)]) == 0
    pages, trouble = [], []

    def open_at(where="", **how):
        page = browser.new_page(**how)
        pages.append(page)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or trouble.append(request.url))
        page.goto(f"file://{run / 'report.html'}{where}")
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield open_at
    for page in pages:
        assert page.title() == "judge"
        page.close()
    assert trouble == []


def drawn(browser, folder):
    """The report of a run, opened."""
    assert main(["report", str(folder)]) == 0
    page = browser.new_page()
    page.goto(f"file://{folder / 'report.html'}")
    page.wait_for_selector("body[data-ready=yes]")
    return page


def ids(page):
    return [button.get_attribute("data-id") for button in page.query_selector_all("#pairs button")]


def press(page, name):
    page.click(f"#filters button[value={name}]")
    return ids(page)


def test_curves(opened):
    page = opened()
    titles = [figure.get_attribute("data-title") for figure in page.query_selector_all("figure.chart")]
    assert titles[:4] == ["Score gap, chosen − rejected", "Entropy (nats per token)", "Valid judgements", "Accuracy"]
    assert "KL to the reference" not in titles  # a metric that the run does not have
    gap, entropy = page.query_selector_all("figure.chart")[:2]
    assert gap.query_selector("path.raw").get_attribute("d").count("L") == 5
    assert len(gap.query_selector_all("circle.dot")) == 2  # held out, at steps 3 and 6
    path = entropy.query_selector("path.raw").get_attribute("d")
    assert (path.count("M"), path.count("L")) == (2, 3)  # a gap where the value was no number
    box = gap.query_selector("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + 40)
    shown = [legend.inner_text() for legend in page.query_selector_all(".legend")[:2]]
    assert "3" in shown[0] and all("step 6" in one for one in shown)  # one cursor for all charts


def test_seconds_are_drawn_by_their_orders_of_magnitude(opened):
    """A hundredth, one and a hundred stand equally far from each other."""
    figure = opened().query_selector("figure[data-title='Seconds of a step']")
    sample, parse = (path.get_attribute("d") for path in figure.query_selector_all("path.raw"))
    first, second = (float(point.split()[1]) for point in sample.removeprefix("M").split("L")[:2])
    least = float(parse.removeprefix("M").split("L")[0].split()[1])
    assert first < second < least and second - first == pytest.approx(least - second, abs=0.2)
    assert [text.text_content() for text in figure.query_selector_all("text[text-anchor=end]")][:2] == ["0.01", "0.1"]


def test_only_steps_that_are_looked_at_are_unpacked(opened):
    page = opened("#step=2")
    assert page.evaluate("[...unpackedSteps.keys()]") == ["2"]
    page.select_option("#step", "5")
    page.get_by_text("step 5, right, chosen, 0").wait_for()
    assert page.evaluate("[...unpackedSteps.keys()]") == ["2", "5"]


def test_no_script_but_the_pages_own_runs(run, browser, tmp_path):
    """Were markup ever to come in, the browser would not run it."""
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page_ = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").write_text(page_.replace("</main>", "</main><script>window.owned = true</script>"))
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.wait_for_selector("body[data-ready=yes]")
    assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 2
    assert page.evaluate("window.owned === undefined")
    page.close()


def test_both_sides_are_read(opened):
    page = opened("#step=4&pair=wrong")
    assert page.query_selector("#pair .prompt").text_content() == f"Prompt of wrong {HOSTILE}"
    for side, scores in zip(("chosen", "rejected"), SCORES["wrong"], strict=True):
        section = page.query_selector(f"[data-side={side}]")
        assert (
            section.query_selector(".response").text_content() == {"chosen": "good", "rejected": "bad"}[side] + " wrong"
        )
        said = section.query_selector_all(".said")
        texts = [one.query_selector(".judgement").text_content() for one in said]
        assert texts == [f"step 4, wrong, {side}, {vote} {HOSTILE}" for vote in range(2)]
        numbers = [one.query_selector(".numbers").inner_text() for one in said]
        for score, reward, line in zip(scores, ("-1.5", "+1.2"), numbers, strict=True):
            assert ("BAD_TAGS" if score is None else f"score {score:g}") in line
            assert f"reward {reward}" in line and "advantage -0.25" in line
    assert page.query_selector("#pair img, #pair b.bold") is None


# what a pairwise judge chose with the chosen response first, and with the rejected one first; None: malformed
CHOICES = {
    "right": ("AA", "BB"),
    "position": ("AA", "AA"),
    "wrong": ("BA", "AA"),
    "half": ("A ", "  "),
    "unread": ("  ", "  "),
}


def test_the_choices_of_a_pairwise_judge_in_both_orders(run, browser, tmp_path):
    """A pair is right when more choices are than not, in whichever order; one that always chooses A is tied."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts", "report.html"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(GRPOConfig(judge="pairwise")))
    lines = [{"step": n, "judge/chose_first": 0.9, "judge/accuracy_chosen_first": 0.8} for n in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        RolloutRow(name, side, f"{name} {HOSTILE}", Status.OK if choice else Status.BAD_TAGS, None, 1.0, 0.5, choice)
        for name, orders in CHOICES.items()
        for side, choices in zip(("chosen first", "rejected first"), orders, strict=True)
        for choice in (letter.strip() or None for letter in choices)
    ]
    write_rollouts(tmp_path / "run" / "rollouts", 1, rows)
    page = drawn(browser, tmp_path / "run")
    assert [name for name in ids(page) if "right" in page.inner_text(f"[data-id={name}] small")] == ["right", "half"]
    assert press(page, "wrong") == ["wrong"]
    assert press(page, "tied") == ["position", "unread"]
    assert press(page, "malformed") == ["half", "unread"]
    assert press(page, "all") == list(CHOICES)
    page.click("[data-id=wrong]")
    for side, percent, choices in (("chosen", 50, "BA"), ("rejected", 0, "AA")):
        section = page.query_selector(f"[data-side={side}]")
        assert f"{side} first · {percent} % right" in section.inner_text()
        numbers = [one.inner_text() for one in section.query_selector_all(".numbers")]
        assert [line.split()[:2] for line in numbers] == [["chose", letter] for letter in choices]
    assert page.title() == "run" and page.query_selector("#pair img") is None
    titles = {figure.get_attribute("data-title") for figure in page.query_selector_all("figure")}
    assert {"Choices of the first response", "Accuracy by order"} <= titles
    page.close()


def test_filters_search_and_keys(opened):
    page = opened()
    assert page.input_value("#step") == "6" and ids(page) == list(SCORES)
    assert press(page, "wrong") == ["wrong"]
    assert press(page, "tied") == ["tied", "unread"]  # what cannot be read decides nothing
    assert press(page, "malformed") == ["wrong", "unread"]
    assert press(page, "all") == list(SCORES)
    page.fill("#search", "TIED, REJECTED")
    assert ids(page) == ["tied"]
    page.fill("#search", "good wrong")  # in a response
    assert ids(page) == ["wrong"]
    page.fill("#search", "")
    page.click("h1")
    page.keyboard.press("j")
    chosen = "#pairs [aria-current=true]"
    here = list(SCORES).index(page.get_attribute(chosen, "data-id"))
    page.keyboard.press("ArrowDown")  # in the list now
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")
    assert list(SCORES).index(page.get_attribute(chosen, "data-id")) == here - 1


def test_a_place_can_be_shared(opened):
    page = opened()
    page.select_option("#step", "2")
    press(page, "malformed")
    page.click("[data-id=unread]")
    again = opened(page.evaluate("location.hash"))
    assert again.input_value("#step") == "2" and ids(again) == ["wrong", "unread"]
    assert again.get_attribute("#pairs [aria-current=true]", "data-id") == "unread"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened, scheme):
    page = opened("#pair=wrong", viewport={"width": 390, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_large_run_is_thinned_evenly(run, capsys):
    many = [Path(str(number)) for number in range(1000)]
    measured = []

    def size(path):
        measured.append(path)
        return 90 + int(path.name) % 21

    assert within(many, size, 120_000) == many
    measured.clear()
    few = within(many, size, 5000)
    assert few[0] == many[0] and few[-1] == many[-1] and len(measured) < 200
    assert 4500 < sum(map(size, few)) <= 5000
    gaps = {int(b.name) - int(a.name) for a, b in itertools.pairwise(few)}
    assert max(gaps) - min(gaps) <= 1
    assert within(many, size, 1) == [many[0], many[-1]] and within(many[:1], size, 1) == many[:1]
    assert within([], size, 1) == []

    large, out = run.parent / "large", run.parent / "small.html"
    shutil.copytree(run, large)
    for step in range(1, 7):
        noise = random.Random(step).randbytes(180_000).hex()  # 0.27 MB each, packed
        write_rollouts(large / "rollouts", step, [RolloutRow("right", "chosen", noise, Status.OK, 1.0, 0.0, 0.0)])
    (large / "rollouts" / "step_old.parquet").write_text("of someone else")
    assert main(["report", str(large), "--out", str(out), "--megabytes", "1"]) == 0
    assert "rollouts of 3 of 6 steps" in capsys.readouterr().out


def test_a_run_of_very_many_steps_opens(run, browser, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts"))
    lines = [{"step": step, "reward": 1 / step, "rewards/chosen/mean": 1, "loss": 1} for step in range(1, 80_001)]
    lines += [{"step": 3, "eval/valid": 0.5}]  # of a step that has a line
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"step": 80001, "loss": NaN}\n')
    page = drawn(browser, tmp_path / "run")
    path = page.get_attribute("figure[data-title=Loss] path.raw", "d")
    assert (path.count("M"), path.count("L")) == (1, 79_999)
    page.close()


def report_of(browser, run, folder, lines):
    """The report of a run with these metrics and without rollouts, opened."""
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("rollouts"))
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return drawn(browser, folder / "run")


def test_a_value_between_two_gaps_is_a_dot(run, browser, tmp_path):
    values = (1, None, 3, None, 5, 1, 4, 2, 5, 1, 4, 2, 5)
    page = report_of(browser, run, tmp_path, [{"step": step, "loss": value} for step, value in enumerate(values, 1)])
    for curve in ("raw", "smooth"):  # the average too begins anew after a gap
        path = page.get_attribute(f"figure[data-title=Loss] path.{curve}", "d")
        assert (path.count("M"), path.count("h0"), path.count("L")) == (3, 2, 8)
    page.close()


def test_only_what_is_noisy_is_smoothed(run, browser, tmp_path):
    """A smoothed schedule would show rates that were never set, and a smoothed dip would hide it."""
    noise = random.Random(0)
    lines = [
        {
            "step": n,
            "loss": noise.random(),
            "reward": n / 40,
            "entropy": 1 / n,
            "judge/valid": 0.5 if n in (9, 25) else 1.0,
            "learning_rate": 0.1 * (n % 2),
        }
        for n in range(1, 41)
    ]
    page = report_of(browser, run, tmp_path, lines)
    titles = {"Loss": True, "Reward": False, "Entropy": False, "Valid judgements": False, "Learning rate": False}
    for title, smooth in titles.items():
        figure = page.query_selector(f"figure[data-title^='{title}']")
        assert (figure.query_selector("path.smooth") is not None) == smooth, title
        assert ("stroke-width:1.8" in figure.query_selector("path.raw").get_attribute("style")) != smooth
    page.close()


@pytest.mark.parametrize("last", [3, 4, 7, 12, 40, 97, 1000, 12345])
def test_every_axis_has_three_ticks(last, run, browser, tmp_path):
    names = ("loss", "reward", "entropy", "kl", "grad_norm", "time/update", "time/sample")
    ends = ((1.01, 1.99), (0, 0.9), (-3.1, -0.2), (0.11, 0.13), (7, 7.5), (1.1, 1.9), (0.4, 60))
    rows = [
        {"step": n} | {name: low + (high - low) * (n == last) for name, (low, high) in zip(names, ends, strict=True)}
        for n in (1, 2, last)
    ]
    page = report_of(browser, run, tmp_path, rows)
    figures = page.query_selector_all("figure.chart")
    assert len(figures) == 6
    for figure in figures:
        for anchor in ("end", "middle"):
            ticks = [text.text_content() for text in figure.query_selector_all(f"text[text-anchor={anchor}]")]
            assert 3 <= len(set(ticks)) == len(ticks) <= 12, (figure.get_attribute("data-title"), ticks)
            assert anchor == "end" or all(1 <= int(tick) <= last for tick in ticks)
    page.close()


def test_no_label_is_cut_off(run, browser, tmp_path):
    """However many digits tell the ticks apart: GRPO's loss is 0 but for rounding where nothing was updated yet."""
    ends = {"loss": (1.5755e-15, 1.5865e-15), "kl": (-1.88e-14, -1.95e-14), "reward": (123456.1, 123456.2)}
    rows = [{"step": (1, 100_000)[n]} | {name: values[n] for name, values in ends.items()} for n in (0, 1)]
    page = report_of(browser, run, tmp_path, rows)
    every = [label.evaluate("it => [it.getBBox().x + it.getBBox().width, it.textContent]") for label in
             page.query_selector_all("figure.chart text")]  # fmt: skip
    assert max(end for end, _ in every) <= 340 and "100000" in [text for _, text in every]
    labels = page.query_selector_all("figure.chart text[text-anchor=end]")
    assert len(labels) >= 9 and max(len(label.text_content()) for label in labels) > 8
    assert all(label.evaluate("it => it.getBBox().x") >= 0 for label in labels)
    page.close()


def test_a_pair_may_be_called_anything(run, browser, tmp_path):
    """Also as what every object of JavaScript has, whether its texts are known or not."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts"))
    names = ["constructor", "__proto__", "toString", "hasOwnProperty"]
    rows = [{"id": name, "prompt": f"Of {name}", "chosen": "good", "rejected": "bad"} for name in names[:2]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GRPOConfig(data=DataSection(path=str(tmp_path / "pairs.jsonl"), domain="chat"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    judged = [
        RolloutRow(name, side, f"<answer>{score}</answer>", Status.OK, score, 0.0, 0.0)
        for name in names
        for side, score in (("chosen", 7.0), ("rejected", 2.0))
    ]
    write_rollouts(tmp_path / "run" / "rollouts", 1, judged)
    page = drawn(browser, tmp_path / "run")
    assert ids(page) == names
    for name in names:
        page.click(f"[data-id={name}]")
        shown = page.inner_text("#pair")
        assert "mean 7" in shown and "mean 2" in shown
        assert (f"Of {name}" in shown) == (name in names[:2])
        assert ("This pair is not in the data any more." in shown) == (name not in names[:2])
    page.close()


def test_values_that_hardly_differ_can_be_told_apart(run, browser, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts"))
    lines = [{"step": n, "loss": 6.731 + n / 1e5, "entropy": (0.3, 0.30000000000000004)[n % 2]} for n in range(1, 9)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = drawn(browser, tmp_path / "run")
    ticks = page.query_selector_all("figure[data-title=Loss] text[text-anchor=end]")
    texts = [tick.text_content() for tick in ticks]
    assert len(texts) >= 3 and len(set(texts)) == len(texts) and all(6.731 <= float(text) <= 6.7311 for text in texts)
    assert page.query_selector("figure[data-title^=Entropy] path.raw") is not None
    page.close()


def test_the_best_held_out_step_is_that_of_the_kept_checkpoint(run, browser, tmp_path):
    """By the metric that the config names; of equal ones the last."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts"))
    config = GRPOConfig(data=DataSection(path="x"), heldout=HeldoutSection(path="y", best="score_gap"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    gaps = {2: 1.0, 4: 3.0, 6: 3.0, 8: 2.0}
    lines = [{"step": n, "eval/score_gap": gap, "eval/accuracy_strict": n / 10} for n, gap in gaps.items()]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = drawn(browser, tmp_path / "run")
    facts = page.inner_text("#facts")
    assert "best held out, score_gap" in facts and "3.000 at step 6" in facts
    page.close()


def test_without_its_data_a_run_can_still_be_read(run, opened):
    pairs = run.parent / "pairs.jsonl"
    kept = pairs.read_text()
    pairs.unlink()
    try:
        assert main(["report", str(run)]) == 0
        page = opened("#pair=right")
    finally:
        pairs.write_text(kept)
    assert "The prompts and responses are not shown" in page.inner_text("#pair")
    assert f"step 6, right, chosen, 0 {HOSTILE}" in page.text_content("#pair")


def test_mistakes(run, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "is no run folder: it holds no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(to_yaml(EvalConfig()))
    assert main(["report", str(tmp_path)]) == 1
    assert "is an evaluation and has no steps. Read" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "rollouts" / "step_000002.parquet").write_bytes(b"PAR1")
    assert main(["report", str(tmp_path / "run")]) == 1
    assert "step_000002.parquet holds no rollouts" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert main(["report", str(tmp_path / "run")]) == 1
    assert "line 1 is not metrics of a step" in capsys.readouterr().err
    for line in (b'{"step": 1, "loss": "low"}', b'{"step": 1, "l\xff": 1}'):
        (tmp_path / "run" / "metrics.jsonl").write_bytes(line + b"\n")
        assert main(["report", str(tmp_path / "run")]) == 1
        assert "line 1 is not metrics of a step" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--megabytes", "0"]) == 2
    assert "--megabytes is 0. Give 1 or more." in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["report", str(tmp_path / "run")]) == 1
    assert "the run has done no step yet" in capsys.readouterr().err


def test_a_page_says_what_went_wrong(tmp_path):
    """Skipped updates, pairs without PAR and cut-off shares, as facts and curves; and the sentence of the run's end."""
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(GRPOConfig(run=RunSection(folder=str(folder)))))
    line = {"judge/valid": 0.0, "completions/clipped_ratio": 1.0, "judge/pairs_without_par": 1.0, "skipped_updates": 1}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in (1, 2)))
    assert main(["report", str(folder)]) == 0
    packed = re.search(r'id="payload"[^>]*>([^<]*)<', (folder / "report.html").read_text())[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    facts = dict(data["facts"])
    assert facts["updates skipped"] == "1 of 2"
    assert facts["cut off"] == facts["pairs without PAR"] == "1.000"
    assert facts["what went wrong"].startswith("nothing but the format penalty was learnt: in 2 of 2 steps all that")
    assert {"Cut-off samples", "Pairs without PAR", "Updates skipped so far"} <= {p["title"] for p in data["panels"]}
