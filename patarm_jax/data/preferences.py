"""Reads preferences: every form Hugging Face and TRL know, normalised to (prompt as messages, chosen, rejected).

What a file cannot mean (a broken line, no column of responses) is an error that names file and line. A row that cannot
be learnt from (an odd cell, an empty response, two identical ones) is dropped, counted, and reported by reason.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons
from patarm_jax.data.cells import is_blank, joined, number, word
from patarm_jax.data.pairs import laid_out, pair_key_and_order
from patarm_jax.data.reasons import Dropped
from patarm_jax.data.rows import Row, read_rows
from patarm_jax.data.sides import Sides, sides_of
from patarm_jax.judge.criteria import shown_rubric
from patarm_jax.types import DOMAINS, Conversation, Domain, Preference, UsageError, UserError

Record = TypeVar("Record")

JUDGEMENTS = ("chosen_judgement", "rejected_judgement")  # of the sides, by a pointwise judge
CHOICES = ("pairwise_judgement", "pairwise_judgement_swapped")  # of both, the chosen response first, and second
LABELS = ("chosen_score", "rejected_score")
MARGIN = "margin"
RUBRIC_COLUMN = "rubric"  # of the prompt
RESPONSE = "response"  # to the prompt, that a policy is taught
CHECKLISTS = ("chosen_checklist", "rejected_checklist")  # of the sides, by the rubric
COMPARISONS = ("chosen_first_judgement", "rejected_first_judgement")  # of both by the rubric, in either order
COLUMNS = (
    *("prompt", "chosen", "rejected", "id", "source", "domain"),
    *JUDGEMENTS,
    *CHOICES,
    *LABELS,
    MARGIN,
    RUBRIC_COLUMN,
    *COMPARISONS,
    *CHECKLISTS,
    RESPONSE,
)
_NEEDED = ("chosen", "rejected")
_AHEAD = 100  # rows of a file that say which columns it has


@dataclass(frozen=True)
class Kind:
    """What is read from a file: preferences, or prompts alone."""

    # From a row's values by our names, the row, the columns of its file and the names that the settings map.
    sides: Callable[[Mapping[str, Any], Mapping[str, object], Set[str], Set[str]], Sides]
    needed: tuple[tuple[str, ...], ...]  # columns by our names, of which a file must have all of one group
    words: str  # what those are
    has_responses: bool = True


PAIRS = Kind(sides_of, (_NEEDED,), "chosen and rejected, and prompt unless both contain it")


@dataclass(frozen=True)
class Report:
    """What became of the records that went in: kept + dropped is all of them."""

    kept: int
    dropped: dict[str, int]  # reason → count
    renamed: int = 0  # kept under another id, because theirs was taken
    not_read: str = ""  # a clause on files of the folder that were not read
    first: Mapping[str, str] = field(default_factory=dict)  # reason → where it was met first
    notes: tuple[str, ...] = ()  # what else was done, a clause each

    def __str__(self) -> str:
        """One clause for a log or an error."""
        reasons = "; ".join(
            f"{count:,} × {reason}" + (f" [{self.first[reason]}]" if reason in self.first else "")
            for reason, count in self.dropped.items()
        )
        renamed = f"; {self.renamed:,} ids were taken and got a number" if self.renamed else ""
        every = self.kept + sum(self.dropped.values())
        notes = "".join(f"; {note}" for note in self.notes)
        return f"kept {self.kept:,} of {every:,}; dropped {reasons or 'none'}{renamed}{notes}{self.not_read}"


def read_preferences(section: DataSection, setting: str = "data") -> tuple[list[Preference], Report]:
    """All usable preferences of `section.path`, in order, and what became of the rows.

    Ids are unique: a row without one gets `file-name:line`, and one whose id is taken gets it with `#2`, `#3`, …,
    since a folder of files numbered from zero is common and a run's rollouts name their pair by id alone.

    Args:
        section: what to read. An empty split means the only one there is.
        setting: the section of the settings that says path and split, as an error names it.
    """
    return collect(section, setting, lambda preference, _row, _values: preference)


def read_labelled_preferences(section: DataSection) -> tuple[list[Preference], Report]:
    """The same with a label of each response's score, from the columns chosen_score and rejected_score."""

    def labelled(preference: Preference, _row: Row, values: Mapping[str, object]) -> Preference:
        chosen, rejected = (_label(name, values) for name in LABELS)
        return replace(preference, labels=(chosen, rejected))

    return collect(section, "data", labelled)


def read_preferences_with_margins(section: DataSection) -> tuple[list[Preference], Report]:
    """The same with the margin of each pair, from the column margin."""

    def with_margin(preference: Preference, _row: Row, values: Mapping[str, object]) -> Preference:
        margin = number(MARGIN, values[MARGIN])
        if margin is None:
            raise Dropped(reasons.NO_MARGIN)
        if not math.isfinite(margin):
            raise Dropped(reasons.MARGIN_NOT_FINITE)
        return replace(preference, margin=margin)

    return collect(section, "data", with_margin)


def read_preferences_without_margins(section: DataSection) -> tuple[list[Preference], Report]:
    """The same as `read_preferences`, with a note on rows that have a margin, which is not read."""
    where: list[str] = []

    def without(preference: Preference, row: Row, values: Mapping[str, object]) -> Preference:
        if values[MARGIN] is not None:
            where.append(row.where)
        return preference

    read, report = collect(section, "data", without)
    note = f"{len(where):,} have a margin, which is not read unless margins is true [{where[0]}]" if where else ""
    return read, replace(report, notes=(*report.notes, note) if note else report.notes)


def collect(
    section: DataSection,
    setting: str,
    finish: Callable[[Preference, Row, Mapping[str, object]], Record],
    kind: Kind = PAIRS,
) -> tuple[list[Record], Report]:
    """What becomes of all usable preferences, in order, and of the rows.

    Args:
        section: what to read.
        setting: the section of the settings that says path and split.
        finish: makes a record of a preference, its row and the row's values by our names; may raise `Dropped`.
        kind: what is read.
    """
    words = _Words(section)
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    numbers: dict[str, int] = {}
    twice = _Twice("pair" if kind.has_responses else "prompt")
    unruled: list[str] = []
    renamed = 0
    table = read_rows(section.path, (section.split,) if section.split else (), setting=setting)
    for row, columns in _with_columns(table.rows, section.columns, kind):
        try:
            values = _our_columns(row, section.columns)
            preference = _preference(row, values, columns, section, words, kind)
            unique = replace(preference, id=free_id(preference.id, numbers))
            if section.given_rubrics:
                unique = replace(unique, rubric=_rubric_of(values))
            kept.append(finish(unique, row, values))
        except Dropped as reason:
            dropped[str(reason)] += 1
            first.setdefault(str(reason), row.where)
            continue
        renamed += unique.id != preference.id
        twice.see(unique, row)
        if section.given_rubrics and not unique.rubric:
            unruled.append(row.where)
    notes = (*words.notes(), *twice.notes())
    if unruled:
        notes += (f"{len(unruled):,} have no rubric and are judged without a given one [{unruled[0]}]",)
    report = Report(
        kept=len(kept),
        dropped=dict(dropped.most_common()),
        renamed=renamed,
        not_read=table.remark,
        first=first,
        notes=notes,
    )
    if not kept:
        what = "preference" if kind.has_responses else "prompt"
        raise UserError(f"no usable {what} in {section.path}: {report}. Fix the rows or the data section.")
    if len(unruled) == len(kept):
        raise UserError(
            f"data.given_rubrics is true, and no row of {section.path} has a rubric in the column "
            f"{' + '.join(section.columns.get(RUBRIC_COLUMN, (RUBRIC_COLUMN,)))}. Let a generator write them with "
            "`patarm rubrics`, name their column under data.columns.rubric, or leave data.given_rubrics out."
        )
    return kept, report


def _rubric_of(values: Mapping[str, object]) -> str:
    text = word(RUBRIC_COLUMN, values[RUBRIC_COLUMN])
    drop_lone_surrogates(text)
    return shown_rubric(text)


def free_id(wanted: str, numbers: dict[str, int]) -> str:
    """The id, with a number where it is taken; `numbers` remembers the last one, so that equal ids cost no search."""
    free, number = wanted, numbers.get(wanted, 1)
    while free in numbers:
        number += 1
        free = f"{wanted}#{number}"
    numbers[wanted] = number
    numbers.setdefault(free, 1)
    return free


# ---- Columns --------------------------------------------------------------------------------------------------------


def _with_columns(
    rows: Iterator[Row], mapping: Mapping[str, tuple[str, ...]], kind: Kind
) -> Iterator[tuple[Row, Set[str]]]:
    """Each row, and the columns of its file. A row may lack one; a file that does is refused."""
    for _, its in itertools.groupby(rows, key=lambda row: row.origin):
        ahead = list(itertools.islice(its, _AHEAD))
        columns = {name for row in ahead for name in row.values}
        _refuse_missing_columns(ahead[0], columns, mapping, kind)
        for row in itertools.chain(ahead, its):
            columns |= row.values.keys()
            yield row, columns


def _refuse_missing_columns(row: Row, columns: Set[str], mapping: Mapping[str, tuple[str, ...]], kind: Kind) -> None:
    def lacking(expected: Iterable[str]) -> list[str]:
        return [their for our in expected for their in mapping.get(our, (our,)) if their not in columns]

    of_groups = [lacking(group) for group in kind.needed]
    missing = lacking(our for our in COLUMNS if our in mapping)
    if all(of_groups):
        missing = list(dict.fromkeys([*missing, *of_groups[0]]))
    if missing:
        first = kind.needed[0][0]
        theirs = {"chosen": "accepted"}.get(first, "question")
        raise UserError(
            f"{row.where} has no column {', '.join(missing)}; it has {', '.join(row.values) or 'none'}. Needed is "
            f"{kind.words}: say under data.columns what the columns are called, such as `{first}: {theirs}`, or "
            f"--data.columns.{first} {theirs}."
        )


def _our_columns(row: Row, mapping: Mapping[str, tuple[str, ...]]) -> dict[str, object]:
    """The row's values under our names; None where a column is absent."""
    return {our: _joined(row, mapping.get(our, (our,))) for our in COLUMNS}


def _joined(row: Row, names: tuple[str, ...]) -> object:
    values = [row.values.get(name) for name in names]
    return values[0] if len(names) == 1 else joined(names, values)


# ---- From a row to a preference -------------------------------------------------------------------------------------


def _preference(
    row: Row, values: Mapping[str, object], columns: Set[str], section: DataSection, words: "_Words", kind: Kind
) -> Preference:
    source = word("source", values["source"])
    if words.drops(source):
        raise Dropped(reasons.DROPPED_SOURCE)
    sides = kind.sides(values, row.values, columns, section.columns.keys())
    _drop_what_teaches_nothing(*sides, kind.has_responses)
    name = word("id", values["id"]) or row.name
    said = word("domain", values["domain"])
    drop_lone_surrogates(name + source + said)  # they are hashed and logged
    domain = words.domain(said, source)
    if domain is None:
        raise Dropped(reasons.UNKNOWN_DOMAIN)
    prompt, chosen, rejected = sides
    return Preference(id=name, prompt=prompt, chosen=chosen, rejected=rejected, domain=domain, source=source)


def _drop_what_teaches_nothing(prompt: Conversation, chosen: str, rejected: str, has_responses: bool) -> None:
    if not prompt or is_blank(prompt[-1]["content"]):
        raise Dropped(reasons.EMPTY_PROMPT)
    if prompt[-1]["role"] != "user":
        raise Dropped(reasons.NOT_USERS_TURN)
    if has_responses and (is_blank(chosen) or is_blank(rejected)):
        raise Dropped(reasons.EMPTY_RESPONSE)
    if has_responses and laid_out(chosen) == laid_out(rejected):
        raise Dropped(reasons.IDENTICAL)
    for text in (chosen, rejected, *(message["content"] for message in prompt)):
        drop_lone_surrogates(text)


def drop_lone_surrogates(text: str) -> None:
    r"""Drops what is not Unicode: JSON can spell half a character (`\ud83d`), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Dropped(reasons.NOT_UNICODE) from None


class _Twice:
    """Pairs, or prompts, that stand more than once, which are kept, and counted."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: dict[bytes, bool] = {}  # pair → whether its responses stand in the order of their texts
        self._counts: Counter[bool] = Counter()  # in the other order than the first time → how many
        self._first: dict[bool, str] = {}

    def see(self, preference: Preference, row: Row) -> None:
        """Counts the pair if it was seen before."""
        key, order = pair_key_and_order(preference)
        if key in self._seen:
            turned = self._seen[key] != order
            self._counts[turned] += 1
            self._first.setdefault(turned, row.where)
        else:
            self._seen[key] = order

    def notes(self) -> Iterator[str]:
        """A clause on pairs that stand twice, and one on those that contradict each other."""
        for turned, how in ((False, ""), (True, " with chosen and rejected exchanged")):
            if count := self._counts[turned]:
                rows = "row repeats" if count == 1 else "rows repeat"
                yield f"{count:,} kept {rows} an earlier {self._what}{how} [{self._first[turned]}]"


# ---- Domains --------------------------------------------------------------------------------------------------------


def known_domain(name: str) -> Domain | None:
    """The domain meant by a name, whatever its capitals, spaces and hyphens.

    >>> known_domain("Instruction-Following")
    'instruction_following'
    """
    return DOMAINS.get(_spelled(name))


def _spelled(name: str) -> str:
    return "_".join(name.lower().replace("-", " ").replace("_", " ").split())


class _Words:
    """What the settings say about domains and sources, and what they met in the rows."""

    def __init__(self, section: DataSection) -> None:
        _refuse_unknown_names(section)
        self._section = section
        self._domains = {_spelled(said): known_domain(domain) for said, domain in section.domains.items()}
        self._mapped: Counter[str] = Counter()  # words that data.domains gives a domain
        self._fallen_back: Counter[str] = Counter()  # unknown words, of rows whose source or the settings say a domain
        self._lost: Counter[str] = Counter()  # unknown words, of rows that nothing gives one
        self._sources: set[str] = set()  # those that settings name and rows have

    def drops(self, source: str) -> bool:
        """Whether rows of a source are left out."""
        self._sources.add(source)
        return source in self._section.drop_sources

    def domain(self, said: str, source: str) -> Domain | None:
        """A row's domain: by its own word, else by its source, else the one of all rows; None where none is known."""
        spelled = _spelled(said)
        if (mapped := self._domains.get(spelled)) is not None:
            self._mapped[spelled] += 1
            return mapped
        if (known := known_domain(said)) is not None:
            return known
        domain = known_domain(self._section.source_domains.get(source, self._section.domain))
        if spelled:
            (self._lost if domain is None else self._fallen_back)[said.strip()] += 1
        return domain

    def notes(self) -> Iterator[str]:
        """A clause on each thing that was done with words, and on settings that met none."""
        for said, count in self._mapped.items():
            yield f"{count:,} of domain {said} by data.domains as {self._domains[said]}"
        if self._fallen_back:
            by = "data.source_domains or data.domain" if self._section.source_domains else "data.domain"
            yield (
                f"{self._fallen_back.total():,} of a domain that is unknown by {by} "
                f"({_counted(self._fallen_back)}; data.domains can map them)"
            )
        if self._lost:
            yield f"the domains that are unknown are {_counted(self._lost)}"
        named = {
            "data.domains": self._domains.keys() - self._mapped.keys(),
            "data.source_domains": self._section.source_domains.keys() - self._sources,
            "data.drop_sources": set(self._section.drop_sources) - self._sources,
        }
        for setting, unmet in named.items():
            if unmet:
                yield f"{setting} met no row of {', '.join(sorted(unmet))}"


def _counted(words: Counter[str]) -> str:
    listed = ", ".join(f"{said[:40]} {count:,}" for said, count in words.most_common(5))
    return listed + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def _refuse_unknown_names(section: DataSection) -> None:
    for ours, theirs in section.columns.items():
        if ours not in COLUMNS or not theirs:
            raise UsageError(f"data.columns maps {ours} to {list(theirs)}. Map any of {', '.join(COLUMNS)} to columns.")
    named = {"data.domain": section.domain} if section.domain else {}
    named |= {f"data.source_domains.{source}": domain for source, domain in section.source_domains.items()}
    named |= {f"data.domains.{said}": domain for said, domain in section.domains.items()}
    for where, domain in named.items():
        if known_domain(domain) is None:
            raise UsageError(f"{where} is {domain!r}. Use one of {', '.join(DOMAINS)}.")
    spelled: dict[str, str] = {}
    for said, domain in section.domains.items():
        if known_domain(spelled.setdefault(_spelled(said), domain)) != known_domain(domain):
            raise UsageError(f"data.domains gives {said} two domains, however it is spelled. Keep one of them.")


# ---- Labels ---------------------------------------------------------------------------------------------------------


def _label(column: str, values: Mapping[str, object]) -> float:
    label = number(column, values[column])
    if label is None:
        raise Dropped(reasons.NO_LABEL)
    if not 0 <= label <= 10:  # NaN is neither
        raise Dropped(reasons.LABEL_OUT_OF_RANGE)
    return label
