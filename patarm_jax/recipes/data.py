"""Makes a set of preferences of public sources, in stages; each is a folder, and is made once.

The same command goes on with the first stage that is not there. A stage that is there must have been made with the
same settings from the same rows, which their hashes tell; else it is refused, and its folder has to be removed.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import rich.box
import rich.console
import rich.panel
import rich.table
import rich.text

from patarm_jax import __version__
from patarm_jax.config.building import ASKING, BuildConfig, CorpusSection, StageSection
from patarm_jax.config.load import to_yaml
from patarm_jax.config.sections import DataSection
from patarm_jax.corpus.folders import DROPPED, REPORT, ROWS, folder_of, reports_of
from patarm_jax.corpus.judged import selected
from patarm_jax.corpus.languages import open_languages
from patarm_jax.corpus.rows import Pair, digest_of, read_pairs, write_pairs
from patarm_jax.corpus.stages import Sifted, clean, decontaminate, deduplicate
from patarm_jax.corpus.written import table_of, write_set
from patarm_jax.data.preferences import collect, free_id, read_preferences
from patarm_jax.data.prompts import read_prompts
from patarm_jax.data.rows import Row
from patarm_jax.evaluate.catalogue import BENCHMARKS, read_benchmark
from patarm_jax.files import check_writable, read_json_object, write_json, write_text, writing
from patarm_jax.locks import hold_folder
from patarm_jax.recipes.data_asking import Shard, classify, judge, teach
from patarm_jax.run.open_model import name_of
from patarm_jax.run.process import say
from patarm_jax.types import Preference, UsageError, UserError

KEPT = "The stages that are whole are kept."


def main(config: BuildConfig, dry_run: bool = False, shard: Shard = (1, 1)) -> list[Pair] | None:
    """Writes `config.folder`; gives the rows of the last stage, or None when it was asked to stop before.

    Args:
        config: sources and stages.
        dry_run: whether nothing is made, and only said what is there; it gives None.
        shard: of a stage that asks a model, the part that is asked here; then it stops until all parts are there.
    """
    config.check()
    if not config.folder:
        raise UsageError("no folder is named. Give `folder` in the config, or --folder runs/data.")
    folder = Path(config.folder).expanduser()
    if dry_run:
        print(to_yaml(config))
        for number, stage in enumerate(config.stages):
            there = (folder_of(folder, number, stage) / REPORT).is_file()
            print(f"{folder_of(folder, number, stage).name}: {'is there' if there else 'is to be made'}")
        return None
    check_writable(folder, folder=True)
    with contextlib.nullcontext() if shard[1] > 1 else hold_folder(folder, say):  # shards write files of their own
        with writing(folder, KEPT):
            write_text(folder / "config.yaml", to_yaml(config))
        pairs: list[Pair] | None = None
        before: Path | None = None
        for number, stage in enumerate(config.stages):
            here = folder_of(folder, number, stage)
            inputs = _inputs(config, stage, before)
            if _is_there(config, number, here, inputs):
                pairs = None  # read when the next one needs them
            else:
                made = _make(config, number, here, inputs, before, pairs, shard)
                if made is None:
                    return None
                pairs = made
            before = here
        _tell(config, folder)
        assert before is not None
        return pairs if pairs is not None else read_pairs(before / ROWS)


def _inputs(config: BuildConfig, stage: StageSection, before: Path | None) -> dict[str, str]:
    """What a stage is made from, by hash: the rows before it, or the sources; and benchmarks."""
    found = {name: digest_of(Path(path).expanduser()) for name, path in stage.benchmarks.items() if path}
    if before is not None:
        return {ROWS: digest_of(before / ROWS), **found}
    return {source.called: digest_of(Path(source.data.path).expanduser()) for source in config.sources}


def _is_there(config: BuildConfig, number: int, here: Path, inputs: Mapping[str, str]) -> bool:
    """Whether a stage was made before, with these settings from these rows; UserError where from others."""
    report = read_json_object(here / REPORT)
    if report is None:
        return False
    settings, stage = json.loads(json.dumps(config.settings_of(number))), config.stages[number]
    asked = stage.endpoint.model or (stage.model.path and name_of(Path(stage.model.path)))
    if stage.kind in ASKING and asked and asked != report["model"]:
        raise UserError(
            f"{here} was made by {report['model']}, and here the model is {asked}. Remove {here} and the stages behind "
            "it to make them again, or name another folder."
        )
    remedy = f"Remove {here} and the stages behind it to make them again, or name another folder."
    for name, value in settings.items():
        if report["settings"].get(name) != value:
            raise UserError(
                f"{here} was made with {name} {report['settings'].get(name)!r}, and here it is {value!r}. {remedy}"
            )
    for name in {**inputs, **report["inputs"]}:
        if inputs.get(name) != report["inputs"].get(name):
            raise UserError(f"{here} was made from another {name} than is there now. {remedy}")
    if digest_of(here / ROWS) != report["rows_sha256"]:
        raise UserError(f"{here / ROWS} is not what its {REPORT} tells of. {remedy}")
    say(f"{here.name}: is there, {report['kept']:,} rows")
    return True


def _make(
    config: BuildConfig,
    number: int,
    here: Path,
    inputs: Mapping[str, str],
    before: Path | None,
    pairs: list[Pair] | None,
    shard: Shard,
) -> list[Pair] | None:
    """Makes a stage, and gives its rows; None where it was asked to stop, or has asked for its shard alone."""
    stage = config.stages[number]
    if before is not None and pairs is None:
        pairs = read_pairs(before / ROWS)
    say(f"{here.name}: {'reading' if before is None else f'{len(pairs or []):,} rows'}")
    with writing(here, KEPT):
        here.mkdir(parents=True, exist_ok=True)
    unread: Mapping[str, int] = {}
    more: dict[str, object] = {}
    if before is None:
        sifted, unread = _read(config)
    elif stage.kind in ASKING:
        asked = _ask(config, stage, here, pairs or [], shard)
        if asked is None:
            return None
        sifted, more = asked
    elif shard[1] > 1:
        raise UserError(
            f"{here} is to be made, and --shard {shard[0]}/{shard[1]} is of stages that ask a model. Run the command "
            "without --shard, which makes it."
        )
    else:
        sifted = _sift(stage, pairs or [])
    with writing(here, KEPT):
        if stage.kind == "write":
            write_set(here, stage, sifted.kept, reports_of(config, here.parent))
        lines = [{"id": one.pair.id, "reason": one.reason, "about": one.about} for one in sifted.dropped]
        write_text(here / DROPPED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        write_pairs(here / ROWS, sifted.kept)
        write_json(here / REPORT, _report(config, number, here, inputs, sifted, unread) | more)
    return sifted.kept


def _report(
    config: BuildConfig,
    number: int,
    here: Path,
    inputs: Mapping[str, str],
    sifted: Sifted,
    unread: Mapping[str, int],
) -> dict[str, object]:
    reasons = Counter(one.reason for one in sifted.dropped)
    reasons.update(unread)
    return {
        "stage": config.stages[number].kind,
        "settings": config.settings_of(number),
        "inputs": dict(inputs),
        "rows": len(sifted.kept) + sum(reasons.values()),
        "kept": len(sifted.kept),
        "dropped": dict(reasons.most_common()),
        "kept_of": _by_source(sifted.kept),
        **({"overlaps": sifted.counts} if sifted.counts is not None else {}),
        "rows_sha256": digest_of(here / ROWS),
        "version": __version__,
    }


def _by_source(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """Source → domain → rows."""
    found: dict[str, Counter[str]] = {}
    for one in pairs:
        found.setdefault(one.corpus, Counter())[one.domain] += 1
    return {source: dict(sorted(domains.items())) for source, domains in found.items()}


# -------------------------------------------------------------------------------------------------------------- stages


def _read(config: BuildConfig) -> tuple[Sifted, dict[str, int]]:
    """All usable rows of the sources, and how many are not, by reason."""
    pairs: list[Pair] = []
    numbers: dict[str, int] = {}
    unread: Counter[str] = Counter()
    for number, source in enumerate(config.sources):
        corpus = source.called
        read, report = collect(source.data, f"sources.{number}.data", partial(_pair, source, numbers))
        say(f"{corpus}: {report}")
        pairs += read
        unread.update(report.dropped)
    return Sifted(pairs, []), dict(unread)


def _pair(
    source: CorpusSection, numbers: dict[str, int], preference: Preference, row: Row, _: Mapping[str, object]
) -> Pair:
    """A preference with where it is from, under an id of its own."""
    return Pair(
        id=free_id(f"{source.called}/{preference.id}", numbers),
        prompt=preference.prompt,
        chosen=preference.chosen,
        rejected=preference.rejected,
        domain=preference.domain,
        source=preference.source or source.called,
        corpus=source.called,
        licence=source.licence,
        origin=row.name,
    )


def _ask(
    config: BuildConfig, stage: StageSection, here: Path, pairs: Sequence[Pair], shard: Shard
) -> tuple[Sifted, dict[str, object]] | None:
    """What a stage that asks a model makes of rows, and what its report says besides."""
    if stage.kind == "classify":
        found = classify(config, stage, here, pairs, shard)
        return None if found is None else (found[0], {"classified": found[1], "model": found[2]})
    asked = {"judge": judge, "teach": teach}[stage.kind](config, stage, here, pairs, shard)
    return None if asked is None else (asked[0], {"model": asked[1]})


def _sift(stage: StageSection, pairs: Sequence[Pair]) -> Sifted:
    sifts: Mapping[str, Callable[[], Sifted]] = {
        "clean": lambda: clean(pairs, stage, open_languages() if stage.language else None),
        "deduplicate": lambda: deduplicate(pairs, stage),
        "decontaminate": lambda: decontaminate(pairs, stage, _benchmarks(stage)),
        "select": lambda: selected(pairs, stage),
        "write": lambda: Sifted(list(pairs), []),
    }
    return sifts[stage.kind]()


def _benchmarks(stage: StageSection) -> dict[str, list[str]]:
    """The last prompts of the items of each benchmark."""
    found: dict[str, list[str]] = {}
    for name, path in stage.benchmarks.items():
        data = DataSection(path=path, split="")
        if name in BENCHMARKS and name != "pairs":
            items, said = read_benchmark(name, data)
            prompts = [item.prompt for item in items]
        else:
            read, report = read_prompts(replace(data, domain="chat"))
            prompts, said = [one.prompt for one in read], str(report)
        say(f"{name}: {said}")
        found[name] = list(dict.fromkeys(prompt[-1]["content"] for prompt in prompts))
    return found


# -------------------------------------------------------------------------------------------------------- for people


def show(path: Path, rows: int) -> None:
    """Prints some rows of a file of pairs, spread over it, as a person reads them."""
    pairs, said = read_preferences(DataSection(path=str(path), split="", domain="chat"))
    say(f"{path}: {said}")
    console = rich.console.Console()
    for one in pairs[:: max(1, len(pairs) // max(1, rows))][:rows]:
        console.rule(rich.text.Text(" · ".join(filter(None, (one.id, one.domain, one.source)))))
        turns = [(turn["role"], turn["content"]) for turn in one.prompt]
        for name, text in (*turns, ("chosen", one.chosen), ("rejected", one.rejected)):
            console.print(rich.panel.Panel(rich.text.Text(text), title=name, title_align="left"))


def _tell(config: BuildConfig, folder: Path) -> None:
    """Prints what each stage has kept, per source and domain."""
    reports = reports_of(config, folder)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="rows kept by each stage", title_justify="left")
    rows = table_of(reports)
    headings = ["source", "domain", *(name.partition("-")[2] for name, _ in reports)]
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place > 1 else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*map(rich.text.Text, cells))
    needed = sum(max(map(len, cells)) + 3 for cells in zip(headings, *rows, strict=True)) + 3
    # A terminal that is narrower breaks lines and cuts none.
    rich.console.Console(width=max(rich.console.Console().width, needed)).print(table)
    say(f"done: {folder_of(folder, len(config.stages) - 1, config.stages[-1])}")
