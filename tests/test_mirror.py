"""Judgements of two responses in the other order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patarm_jax.data.mirror import mirrored
from patarm_jax.data.sft import template_choice
from patarm_jax.judge.parse import parse_pairwise
from patarm_jax.types import Preference

EXCHANGED = {
    "Response A is better than response B.": "Response B is better than response A.",
    "<eval>A is right. B is not.</eval>": "<eval>B is right. A is not.</eval>",
    "A clear answer is needed: response B gives one.": "A clear answer is needed: response A gives one.",
    "Both responses A and B fail; A's error is worse.": "Both responses B and A fail; B's error is worse.",
    "Response **A** adds, and I prefer A over B.": "Response **B** adds, and I prefer B over A.",
    "The second response wins. The first assistant lost.": "The first response wins. The second assistant lost.",
    "<response_a> stands there": "<response_b> stands there",
    "<answer>\nA\n</answer>": "<answer>\nB\n</answer>",
    "No name at all: ABBA, A-level, C++ and grade A+ stay.": "No name at all: ABBA, A-level, C++ and grade A+ stay.",
}
NOT_SURE = [
    "The right option is B.",
    "As plan B says, response A is late.",
    "Vitamin B helps.",
    "The first answer is better.",
    "A recommends another book.",
    "It got an A in the test.",
]


@pytest.mark.parametrize(("text", "expected"), EXCHANGED.items(), ids=range(len(EXCHANGED)))
def test_names_are_exchanged_and_nothing_else(text, expected):
    assert mirrored(text) == expected
    assert mirrored(expected) == text


@pytest.mark.parametrize("text", NOT_SURE)
def test_a_letter_that_may_be_no_name_is_not_guessed(text):
    assert mirrored(text) is None


_PIECES = st.sampled_from([*EXCHANGED, *NOT_SURE, "The sky is blue.", "\n", "Response", "A", "B", "first response"])


@given(st.lists(_PIECES, max_size=6).map(" ".join))
def test_exchanged_twice_is_the_same(text):
    once = mirrored(text)
    assert once is None or mirrored(once) in (text, None)


@pytest.mark.parametrize("domain", ["chat", "math", "code", "safety", "instruction_following"])
def test_a_template_choice_is_in_form_and_right_in_both_orders(domain):
    preference = Preference("a", ({"role": "user", "content": "Hi"},), "yes", "no", domain, "")
    first, second = (template_choice(preference, place) for place in (0, 1))
    assert (parse_pairwise(first).choice, parse_pairwise(second).choice) == ("A", "B")
    assert mirrored(first) == second
