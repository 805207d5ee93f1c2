"""What becomes of rows by what models say of them: their domains, how hard they are for a judge, a teacher's words."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from patarm_jax.ask.answers import Answer
from patarm_jax.config.building import StageSection
from patarm_jax.corpus.rows import Pair
from patarm_jax.corpus.stages import Dropped, Sifted
from patarm_jax.corpus.texts import runs_of, words_of
from patarm_jax.judge.domains import domain_in
from patarm_jax.types import DOMAINS, Conversation, Domain

Scores = Sequence[float | None]
UNREAD = "a judgement of it could not be read"
_QUOTED = 13  # words in a row of the other response
_LABEL = re.compile(r"\b(?:chosen|rejected|preferred|dispreferred)[ _-](?:response|answer|one)\b", re.IGNORECASE)


def by_rules(pair: Pair, rules: Mapping[str, str]) -> Domain | None:
    """The domain of the first rule that a request's last words hold to; None where none does."""
    return next((DOMAINS[name] for name, rule in rules.items() if re.search(rule, pair.asked)), None)


def classified(
    pairs: Sequence[Pair], section: StageSection, said: Mapping[str, Answer]
) -> tuple[Sifted, dict[str, int]]:
    """Rows with the domains that rules or a model give them, and how many were sorted by what.

    A row that could not be sorted keeps the domain that it has.

    Args:
        pairs: of the stage before.
        section: its rules, and whose rows are sorted.
        said: by id of the rows that a model was asked about.
    """
    kept, counts = [], Counter[str]()
    for pair in pairs:
        found: Domain | None = None
        if section.corpora and pair.corpus not in section.corpora:
            counts["not asked about"] += 1
        elif (found := by_rules(pair, section.rules)) is not None:
            counts["by a rule"] += 1
        elif pair.id in said and (found := domain_in(said[pair.id].text)) is not None:
            counts["by the model"] += 1
        else:
            counts["could not be classified"] += 1
        kept.append(pair if found is None else replace(pair, domain=found))
    return Sifted(kept, []), dict(counts)


def accuracy_of(chosen: Scores, rejected: Scores, paired: bool) -> float | None:
    """The share of comparisons in which the chosen response's score is higher; equal ones are wrong.

    Scores that could not be read are in no comparison; None where none is left.

    >>> accuracy_of([7, 5], [5, 6], paired=False), accuracy_of([7, 5], [5, 6], paired=True)
    (0.5, 0.5)
    >>> accuracy_of([7, None], [5, 6], paired=True), accuracy_of([None], [5], paired=False)
    (1.0, None)
    """
    every = zip(chosen, rejected, strict=True) if paired else ((one, other) for one in chosen for other in rejected)
    found = [one > other for one, other in every if one is not None and other is not None]
    return sum(found) / len(found) if found else None


def judged(pairs: Sequence[Pair], section: StageSection, said: Mapping[tuple[str, int], Sequence[Answer]]) -> Sifted:
    """Rows with a judge's scores of both responses, by id and side, and its accuracy."""
    kept, dropped = [], []
    for pair in pairs:
        chosen, rejected = (tuple(answer.score for answer in said[pair.id, side]) for side in (0, 1))
        accuracy = accuracy_of(chosen, rejected, section.compared == "paired")
        if accuracy is None:
            dropped.append(Dropped(pair, UNREAD))
        else:
            kept.append(replace(pair, chosen_scores=chosen, rejected_scores=rejected, accuracy=accuracy))
    return Sifted(kept, dropped)


def selected(pairs: Sequence[Pair], section: StageSection) -> Sifted:
    """Rows for reinforcement learning, which a judge gets right neither always nor hardly ever, and the rest."""
    kept, dropped = [], []
    for pair in pairs:
        assert pair.accuracy is not None
        within = section.lowest <= pair.accuracy <= section.highest
        if not within and section.rest == "drop":
            high = pair.accuracy > section.highest
            limit = f"above {section.highest:g}" if high else f"below {section.lowest:g}"
            dropped.append(Dropped(pair, f"its accuracy is {limit}"))
        else:
            kept.append(replace(pair, part="rl" if within else "sft"))
    return Sifted(kept, dropped)


def taught(
    pairs: Sequence[Pair],
    section: StageSection,
    single: Mapping[tuple[str, int], Answer],
    both: Mapping[tuple[str, int], Answer],
) -> Sifted:
    """Rows with a teacher's judgements; those for reinforcement learning go on as they are.

    Args:
        pairs: of the stage before.
        section: which judgements a row must have.
        single: of each response, by id and side.
        both: of both, by id and which stands first.
    """
    kept, dropped = [], []
    for pair in pairs:
        if pair.part == "rl":
            kept.append(pair)
        elif reason := _why_not_taught(pair, section, single, both):
            dropped.append(Dropped(pair, reason))
        else:
            chosen, rejected, first, second = (
                found.text if (found := said.get((pair.id, place))) else None
                for said in (single, both)
                for place in (0, 1)
            )
            kept.append(
                replace(
                    pair,
                    chosen_judgement=chosen,
                    rejected_judgement=rejected,
                    pairwise_judgement=first,
                    pairwise_judgement_swapped=second,
                )
            )
    return Sifted(kept, dropped)


def _why_not_taught(
    pair: Pair,
    section: StageSection,
    single: Mapping[tuple[str, int], Answer],
    both: Mapping[tuple[str, int], Answer],
) -> str:
    """Why a row cannot be learnt from; empty where it can."""
    if "pointwise" in section.forms:
        answers = [single[pair.id, side] for side in (0, 1)]
        chosen, rejected = (answer.score for answer in answers)
        if chosen is None or rejected is None:
            return UNREAD
        if chosen - rejected <= section.min_gap:
            return f"its scores lie not more than {section.min_gap:g} apart on the right side"
        for answer, own, other in zip(answers, (pair.chosen, pair.rejected), (pair.rejected, pair.chosen), strict=True):
            if leaks(answer.text, own, other, pair.prompt):
                return "a judgement quotes the label or the other response"
    if "pairwise" in section.forms:
        answers = [both[pair.id, place] for place in (0, 1)]
        if any(answer.choice is None for answer in answers):
            return UNREAD
        if [answer.choice for answer in answers] != ["A", "B"]:
            return "a comparison of it is wrong in one of the orders"
        if any(_LABEL.search(answer.text) for answer in answers):
            return "a judgement quotes the label or the other response"
    return ""


def leaks(judgement: str, own: str, other: str, prompt: Conversation) -> bool:
    """Whether a judgement of one response speaks of the label, or in a long run of words of the other response.

    >>> leaks("The chosen response is right.", "4", "5", ())
    True
    >>> leaks("It is right.", "4", "5", ())
    False
    """
    if _LABEL.search(judgement):
        return True
    elsewhere = words_of(other)
    if len(elsewhere) < _QUOTED:
        return False
    known = " ".join([own, *(turn["content"] for turn in prompt)])
    said = set(runs_of(words_of(judgement), _QUOTED)) & set(runs_of(elsewhere, _QUOTED))
    return bool(said - set(runs_of(words_of(known), _QUOTED)))
