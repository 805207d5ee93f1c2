"""The page of a set that `patarm data build` made, in a real browser: its numbers are those of its files."""

import json
import shutil

import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.corpus.rows import read_pairs
from tests.chat_server import served
from tests.test_data import write_rows
from tests.test_data_models import DIFFICULT, Models, build, config, row
from tests.test_report import HOSTILE, drawn, ids, press

DROPS = {"kind": "clean", "max_response_chars": 60}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A set of 23 of 24 rows; the last one's response is too long, and hostile. It is made before a browser runs."""
    tmp_path = tmp_path_factory.mktemp("built")
    rows = [row(n) for n in range(24)]
    rows[5]["chosen"] += f" {HOSTILE[:40]}"
    rows[23]["chosen"] += 60 * "x" + HOSTILE
    write_rows(tmp_path / "pairs.jsonl", rows)
    with served(always=Models()) as (url, _):
        stages = yaml.safe_load(config(tmp_path, url).read_text())["stages"]
        assert build(tmp_path, url, stages=[stages[0], DROPS, *stages[1:]]) == 0
    return tmp_path / "run"


def table(page, title):
    """The cells of a table's rows."""
    rows = page.query_selector_all(f"section[data-table='{title}'] tbody tr")
    return [[cell.inner_text() for cell in one.query_selector_all("td")] for one in rows]


def bars(page, title):
    """What the bars of a chart say, by series and bin."""
    found = page.query_selector_all(f"figure[data-title='{title}'] rect.bar title")
    return dict(one.text_content().split(": ") for one in found)


def pick(page, part):
    page.select_option("#step", part)
    page.wait_for_function("name => document.querySelector('#step').value === name", arg=part)
    return ids(page)


def test_numbers_are_those_of_the_files(built, browser):
    page = drawn(browser, built)
    report = json.loads((built / "04-judge" / "report.json").read_text())
    assert table(page, "Rows kept by each stage")[-1] == ["all", "", "24", "23", "23", "23", "23", "23", "23"]
    assert table(page, "Rows left out") == [["02-clean", "response of more than 60 characters", "1"]]
    assert ["03-classify", "by a rule", "10"] in table(page, "Rows sorted into domains")
    judged = read_pairs(built / "04-judge" / "rows.parquet")
    scores = bars(page, f"Scores: 04-judge, {report['model']}")
    given = [score for one in judged for score in one.chosen_scores]
    assert float(scores["chosen 6"]) == pytest.approx(given.count(6) / len(given), abs=5e-4)
    assert scores["rejected 5"] == "1" and scores["chosen 9"] == "0"
    bands = bars(page, f"Accuracy of rows: 04-judge, {report['model']}")
    for eighths in range(9):
        rows = sum(DIFFICULT[n] == eighths for n in range(23))
        part = "for reinforcement learning" if 1 <= eighths <= 6 else "for teaching"
        assert bands[f"{part} {f'{eighths}/8' if eighths < 8 else '1'}"] == str(rows)
    lengths = bars(page, "Characters of texts, bins from")
    assert lengths["rejected 4"] == str(sum(4 <= len(one.rejected) < 8 for one in judged))
    page.close()


def test_rows_are_read_by_part_with_what_became_of_them(built, browser):
    page = drawn(browser, built)
    parts = [option.text_content() for option in page.query_selector_all("#step option")]
    assert set(parts) <= {"rl_train", "rl_heldout", "sft_train", "sft_heldout", "left out by 02-clean"}
    for part in parts[:-1]:
        lines = (built / "07-write" / f"{part}.jsonl").read_text().splitlines()
        assert pick(page, part) == [json.loads(line)["id"] for line in lines]
    wrong = press(page, "wrong")
    means = [one for one in read_pairs(built / "04-judge" / "rows.parquet") if one.accuracy < 0.5]
    assert set(wrong) <= {one.id for one in means}
    assert pick(page, "left out by 02-clean") == []  # of no outcome
    assert press(page, "all") == ["mine/pairs.jsonl:24"]
    read = page.inner_text("#pair")
    assert "response of more than 60 characters" in read and "onerror" in read and page.title() == "run"
    assert "the teacher" not in read
    page.select_option("#step", "sft_train")
    assert "the teacher, both responses, chosen first" in page.inner_text("#pair")
    page.close()


def test_a_large_set_is_thinned_evenly(tmp_path, browser, capsys):
    noise = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(3900))
    write_rows(tmp_path / "pairs.jsonl", [row(n) | {"chosen": noise[n:] + noise[:n]} for n in range(300)])
    assert build(tmp_path, "", stages=[{"kind": "read"}]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--megabytes", "1"]) == 0
    said = capsys.readouterr().out
    shown = int(said.split("1 stages, ")[1].split(" of 300 rows")[0])
    assert 50 < shown < 300 and (tmp_path / "run" / "report.html").stat().st_size < 1_300_000
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'run' / 'report.html'}")
    page.wait_for_selector("body[data-ready=yes]")
    assert page.inner_text("#extent") == f"The page holds {shown} of 300 rows, evenly spaced."
    assert {"mine/pairs.jsonl:1", "mine/pairs.jsonl:300"} <= set(ids(page))
    page.close()


def test_a_set_that_is_not_whole_yet(tmp_path, browser, capsys):
    write_rows(tmp_path / "pairs.jsonl", [row(n) for n in range(3)])
    assert build(tmp_path, "", stages=[{"kind": "read"}]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["stages"] = yaml.safe_load(config(tmp_path, "http://127.0.0.1:9/v1").read_text())["stages"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    page = drawn(browser, tmp_path / "run")
    assert "1 of 6, the others are not there yet" in page.inner_text("#facts")
    assert ids(page) == [f"mine/pairs.jsonl:{n}" for n in (1, 2, 3)]
    page.close()
    shutil.rmtree(tmp_path / "run" / "01-read")
    assert main(["report", str(tmp_path / "run")]) == 1
    assert "holds no stage that is whole yet. Give it some time." in capsys.readouterr().err
