"""The set that is made, split by prompt, in the forms that training takes, with a card that says where it is from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patarm_jax.config.building import StageSection
from patarm_jax.corpus.rows import Pair, values_of, write_pairs
from patarm_jax.data.pairs import prompt_key
from patarm_jax.files import write_text
from patarm_jax.types import UserError

Report = Mapping[str, Any]


def is_held_out(pair: Pair, share: float) -> bool:
    """Whether a pair's prompt is among the share that is held out, which hangs on the prompt alone."""
    return int.from_bytes(prompt_key(pair.prompt)[:8]) < share * 2**64


def part_of(pair: Pair, heldout: float) -> str:
    """The part of the set that a pair belongs to, such as rl_train."""
    return f"{pair.part}_" * bool(pair.part) + ("heldout" if is_held_out(pair, heldout) else "train")


def write_set(
    folder: Path, section: StageSection, pairs: Sequence[Pair], reports: Sequence[tuple[str, Report]]
) -> None:
    """Writes train and heldout, of rows that were selected rl_train, sft_train and so on, and README.md.

    Each is there as JSON lines and as parquet.

    Raises:
        UserError: licences forbid that these rows stand in one set, and the section does not say that they may.
        OSError: as writing files does.
    """
    conflict = conflict_of({pair.licence for pair in pairs})
    if conflict and not section.mix_licences:
        raise UserError(
            f"{conflict} Leave a source out, make a set of each, or set mix_licences to true if you have the right to."
        )
    labels = sorted({pair.part for pair in pairs} or {""})
    parts: dict[str, list[Pair]] = {
        f"{label}_" * bool(label) + half: [] for label in labels for half in ("train", "heldout")
    }
    for pair in pairs:
        parts[part_of(pair, section.heldout)].append(pair)
    for name, part in parts.items():
        lines = [json.dumps(values_of(pair), ensure_ascii=False) for pair in part]
        write_text(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        write_pairs(folder / f"{name}.parquet", part)
    write_text(folder / "README.md", card_of(parts, reports, conflict))


def conflict_of(licences: set[str]) -> str:
    """Why rows of these licences may not stand in one set, a sentence; empty where they may, as far as is known.

    >>> conflict_of({"mit", "apache-2.0", ""}), conflict_of({"cc-by-nc-4.0"})
    ('', '')
    >>> conflict_of({"cc-by-nc-4.0", "mit"})
    'cc-by-nc-4.0 forbids commercial use, and mit does not: the whole set would be bound by it.'
    >>> conflict_of({"cc-by-nd-4.0", "mit"})
    'cc-by-nd-4.0 forbids derivatives, which a set of several sources is.'
    """
    known = sorted(one for one in licences if one)
    for one in known:
        if _has(one, "nd") and len(licences) > 1:
            return f"{one} forbids derivatives, which a set of several sources is."
    bound = [one for one in known if _has(one, "nc")]
    free = [one for one in known if not _has(one, "nc")]
    if bound and free:
        others = f"{', '.join(free)} {'do' if len(free) > 1 else 'does'}"
        return f"{', '.join(bound)} forbids commercial use, and {others} not: the whole set would be bound by it."
    return ""


def _has(licence: str, clause: str) -> bool:
    return clause in licence.lower().split("-")


def card_of(parts: Mapping[str, Sequence[Pair]], reports: Sequence[tuple[str, Report]], conflict: str) -> str:
    """The README of a data set, as the Hub reads it."""
    every = [pair for part in parts.values() for pair in part]
    licences = {pair.corpus: pair.licence for pair in every}
    known = next(iter(licences.values())) if len(set(licences.values())) == 1 else "other"
    head = ["---", f"license: {known or 'unknown'}", "task_categories: [text-ranking]", "configs:"]
    for name in parts:
        prefix = name.rpartition("_")[0]
        split = "test" if name.endswith("heldout") else "train"
        if split == "train":
            head += [f"- config_name: {prefix or 'default'}", "  data_files:"]
        head.append(f"  - {{split: {split}, path: {name}.parquet}}")
    head.append("---")
    sizes = "; ".join(f"{name}: {len(part):,} pairs" for name, part in parts.items())
    said = [
        f"# Preferences from {len(licences)} source{'s' if len(licences) != 1 else ''}",
        f"{sizes}. No prompt stands in a training and a held-out part. Each row says where it is from: `corpus`, "
        "`source`, `licence`, `origin`.",
    ]
    if conflict:
        said.append(f"**Licences are mixed.** {conflict}")
    table = ["| source | licence | rows |", "|---|---|---|"]
    for corpus, licence in licences.items():
        table.append(f"| {corpus} | {licence or 'not known'} | {sum(pair.corpus == corpus for pair in every):,} |")
    names = [name for name, _ in reports]
    stages = [f"| source | domain |{''.join(f' {name} |' for name in names)}", "|---" * (len(names) + 2) + "|"]
    stages += ["| " + " | ".join(cells) + " |" for cells in table_of(reports)]
    dropped = ["| stage | rows left out | why |", "|---|---|---|"]
    for name, report in reports:
        for reason, count in report["dropped"].items():
            dropped.append(f"| {name} | {count:,} | {reason} |")
    parts_of = ["\n".join(head), *said, "\n".join(table), "What each stage has kept:", "\n".join(stages)]
    if len(dropped) > 2:
        parts_of += ["What was left out:", "\n".join(dropped)]
    return "\n\n".join(parts_of) + "\n"


def table_of(reports: Sequence[tuple[str, Report]]) -> list[list[str]]:
    """Rows kept by each stage, per source and domain, and all."""
    kept = [report["kept_of"] for _, report in reports]
    places = dict.fromkeys((source, domain) for one in kept for source, of in one.items() for domain in of)
    rows = [[source, domain, *(f"{one.get(source, {}).get(domain, 0):,}" for one in kept)] for source, domain in places]
    return [*rows, ["all", "", *(f"{report['kept']:,}" for _, report in reports)]]
