"""The demo's world for Rubric-ARM: what matters differs from prompt to prompt, and a teacher who often mistakes it.

The pairs are those of `world` in the domains where a prompt does not itself name what it calls for: a sum, a function,
a crime or a tool. Here that is the rubric's to say, "The response names theft.", and the judge's to find in the
responses. The teacher's rubrics are wrong for a
third of what prompts ask for, more often than not and always in the same way, so that a generator which imitates it
errs even where it takes the likeliest words. Its judgements go by the rubric that they have, right or wrong, and lean
to the response that stands first. The preferences know nothing of all that.
"""

import hashlib
import random
from collections.abc import Sequence

from patarm_jax.demo.world import answers_of, asked, given
from patarm_jax.judge.checklist import render_checklist
from patarm_jax.judge.criteria import Criterion, judged_by, render_comparison, render_criteria
from patarm_jax.types import Domain, Preference

KNOWN_BY_RUBRIC: tuple[Domain, ...] = ("math", "code", "safety")
MISTAKEN = 3  # the teacher mistakes one in so many of the answers that a domain's prompts call for
RIGHT, RIGHT_WHERE_MISTAKEN = 0.9, 0.4  # how often its rubric names the right answer
FAITHFUL = 0.85  # how often it chooses the response that its rubric names
LEAN = 0.6  # how often it chooses the first response where the rubric names neither


def rubric_naming(answer: str) -> str:
    """The rubric that asks for an answer.

    >>> rubric_naming("theft")
    '1. The response names theft. [Hard Rule]'
    """
    return render_criteria([_naming(answer)])


def _naming(answer: str) -> Criterion:
    return Criterion(f"The response names {answer}.", "Hard Rule")


def teacher_rubric(preference: Preference, rng: random.Random) -> str:
    """A rubric as the teacher writes it."""
    wanted = asked(preference.domain, preference.prompt[-1]["content"])
    mistaken = mistaken_for(preference.domain, wanted)
    right = rng.random() < (RIGHT if mistaken is None else RIGHT_WHERE_MISTAKEN)
    if right:
        return rubric_naming(wanted)
    others = [answer for answer in answers_of(preference.domain) if answer != wanted]
    return rubric_naming(mistaken or rng.choice(others))


def mistaken_for(domain: Domain, wanted: str) -> str | None:
    """What the teacher takes an answer for, in the long run; None where it does not mistake it."""
    answers = list(answers_of(domain))
    drawn = hashlib.sha256(f"{domain} {wanted}".encode()).digest()
    if drawn[0] % MISTAKEN:
        return None
    others = [answer for answer in answers if answer != wanted]
    return others[drawn[1] % len(others)]


def teacher_comparisons(preference: Preference, rubric: str, rng: random.Random) -> tuple[str, str]:
    """Judgements by a rubric, with the chosen response first, and with it second."""
    return (
        _comparison(preference, preference.chosen, preference.rejected, rubric, rng),
        _comparison(preference, preference.rejected, preference.chosen, rubric, rng),
    )


def _comparison(preference: Preference, first: str, second: str, rubric: str, rng: random.Random) -> str:
    named = [given(preference.domain, response) for response in (first, second)]
    fits = [rubric == rubric_naming(answer) for answer in named]
    if any(fits):
        winner = "AB"[fits.index(True) if rng.random() < FAITHFUL else fits.index(False)]
    else:
        winner = "A" if rng.random() < LEAN else "B"
    of_a, of_b = (
        [judged_by(_naming(answer), f"It names {answer} {'too' if fit else 'instead'}.")]
        for answer, fit in zip(named, fits, strict=True)
    )
    return render_comparison("Criterion 1", of_a, of_b, f"{winner} is better.", winner)


def teacher_checklists(preference: Preference, rubric: str, rng: random.Random) -> tuple[str, str]:
    """Checklists of the chosen and of the rejected response by a rubric; as often right as a comparison is."""

    def checked(response: str) -> str:
        named = given(preference.domain, response)
        fits = rubric == rubric_naming(named)
        met = fits == (rng.random() < FAITHFUL)
        return render_checklist([(f"It names {named} {'too' if fits else 'instead'}.", met)])

    return checked(preference.chosen), checked(preference.rejected)


def with_rubrics_of_others(rubrics: Sequence[str], preferences: Sequence[Preference], seed: int) -> list[str]:
    """The rubrics dealt to other prompts of their domain: a judge that goes by them has nothing to go by."""
    rng = random.Random(seed)
    dealt = list(rubrics)
    for domain in dict.fromkeys(preference.domain for preference in preferences):
        places = [place for place, preference in enumerate(preferences) if preference.domain == domain]
        moved = places[1:] + places[:1]
        rng.shuffle(moved)
        for place, source in zip(places, moved, strict=True):
            dealt[place] = rubrics[source]
    return dealt
