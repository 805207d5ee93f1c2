"""Reads what supervised fine-tuning learns from: preferences with a judgement for each question about them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons
from patarm_jax.data.cells import is_blank, word
from patarm_jax.data.mirror import mirrored
from patarm_jax.data.preferences import (
    CHECKLISTS,
    CHOICES,
    COMPARISONS,
    JUDGEMENTS,
    RUBRIC_COLUMN,
    Report,
    collect,
    drop_lone_surrogates,
)
from patarm_jax.data.reasons import Dropped
from patarm_jax.data.rows import Row
from patarm_jax.data.sft import (
    JudgedPreference,
    template_checklist,
    template_choice,
    template_comparison,
    template_judgement,
    template_rubric,
)
from patarm_jax.judge.criteria import shown_rubric
from patarm_jax.judge.forms import CHECKLIST, PAIRWISE, POINTWISE, RUBRIC, RUBRIC_JUDGE, Form
from patarm_jax.types import Preference, Status, UserError

_Values: TypeAlias = Mapping[str, object]
_Find: TypeAlias = Callable[[DataSection, Preference, Row, _Values], JudgedPreference]


def read_judged_preferences(
    section: DataSection, form: Form = POINTWISE, setting: str = "data"
) -> tuple[list[JudgedPreference], Report]:
    """The same as `read_preferences` with what a model of a form learns to write about each; others are dropped.

    A judge of single responses learns a judgement of each; one of pairs a judgement in each order: the second, where
    the rows have none, is the first one with the responses' names exchanged. A generator learns the rubric, and a judge
    that goes by it a judgement in each order, or a checklist of each response.

    Args:
        section: what to read.
        form: of what is learnt.
        setting: the section of the settings that says path and split, as an error names it.
    """
    read, report = collect(section, setting, partial(_FOUND_BY[form.name], section))
    if form is not PAIRWISE:
        return read, report
    wrong = sum(form.read(one.judgements[0]).choice == "B" for one in read)
    note = (f"{wrong:,} judgements with the chosen response first choose the rejected one",) if wrong else ()
    return read, replace(report, notes=(*report.notes, *note))


def _judgements(section: DataSection, preference: Preference, row: Row, values: _Values) -> JudgedPreference:
    """What is taught of the chosen and of the rejected response."""
    judgements = tuple(
        _given(name, values, POINTWISE) or _missing(name, row, section) or template_judgement(preference, side)
        for side, name in enumerate(JUDGEMENTS)
    )
    return JudgedPreference(preference, judgements)


def _choices(section: DataSection, preference: Preference, row: Row, values: _Values) -> JudgedPreference:
    """What is taught with the chosen response first, and with it second."""
    first, second = (_given(name, values, PAIRWISE) for name in CHOICES)
    if not first and not second:
        _missing(CHOICES[0], row, section)
        return JudgedPreference(preference, (template_choice(preference, 0), template_choice(preference, 1)))
    return JudgedPreference(preference, (first or _mirrored(second), second or _mirrored(first)))


def _rubric(section: DataSection, preference: Preference, row: Row, values: _Values) -> JudgedPreference:
    """The rubric that is taught of the prompt."""
    rubric = _given(RUBRIC_COLUMN, values, RUBRIC) or _missing(RUBRIC_COLUMN, row, section)
    return JudgedPreference(preference, (rubric or template_rubric(preference),))


def _by_rubric(
    form: Form,
    columns: Sequence[str],
    template: Callable[[Preference, int], str],
    section: DataSection,
    preference: Preference,
    row: Row,
    values: _Values,
) -> JudgedPreference:
    """What is taught by the rubric, of the two questions about the pair."""
    (rubric,) = _rubric(section, preference, row, values).judgements
    ruled = replace(preference, rubric=shown_rubric(rubric))

    def judgement(place: int, name: str) -> str:
        given = _given(name, values, form, ruled.rubric) or _missing(name, row, section)
        return given or template(ruled, place)

    return JudgedPreference(ruled, tuple(itertools.starmap(judgement, enumerate(columns))))


_FOUND_BY: dict[str, _Find] = {
    POINTWISE.name: _judgements,
    PAIRWISE.name: _choices,
    RUBRIC.name: _rubric,
    RUBRIC_JUDGE.name: partial(_by_rubric, RUBRIC_JUDGE, COMPARISONS, template_comparison),
    CHECKLIST.name: partial(_by_rubric, CHECKLIST, CHECKLISTS, template_checklist),
}


def _mirrored(judgement: str) -> str:
    other = mirrored(judgement)
    if other is None:
        raise Dropped(reasons.NOT_MIRRORED)
    return other


def _given(column: str, values: _Values, form: Form, rubric: str = "") -> str:
    """What a model of a form is to write, by the data; empty where they have none."""
    text = word(column, values[column])
    if is_blank(text):
        return ""
    if form.read(text, rubric).status is not Status.OK:
        raise Dropped(reasons.BAD_RUBRIC if form is RUBRIC else reasons.BAD_JUDGEMENT)
    drop_lone_surrogates(text)
    return text


def _missing(column: str, row: Row, section: DataSection) -> str:
    """Nothing, where it may be missing and a template takes its place."""
    if section.missing_judgements == "error":
        raise UserError(
            f"{row.where} has no {column}, which SFT learns from. Name its column under data.columns, or set "
            "data.missing_judgements to template, which teaches the form of a judgement and nothing else, or to "
            "drop, which leaves such rows out."
        )
    if section.missing_judgements == "drop":
        raise Dropped(reasons.NO_JUDGEMENT)
    return ""
