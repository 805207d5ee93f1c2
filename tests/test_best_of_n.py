"""Best of n equals what all draws of n come to, one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patarm_jax.evaluate.best_of_n import best_of_n

SCORES = arrays(np.float64, (3, 5), elements=st.sampled_from([np.nan, 0.0, 3.0, 7.5]))


@given(SCORES, arrays(np.bool_, (3, 5)), st.integers(1, 5))
def test_best_of_n_is_the_mean_over_all_draws(scores, right, n):
    found = []
    for of_prompt, is_right in zip(scores, right, strict=True):
        for drawn in itertools.combinations(range(5), n):
            known = [of_prompt[one] for one in drawn if not np.isnan(of_prompt[one])]
            best = [one for one in drawn if not known or of_prompt[one] == max(known)]
            found.append(np.mean([is_right[one] for one in best]))
    assert best_of_n(scores, right.astype(float), n) == pytest.approx(np.mean(found))
    by_knowledge = [
        any(is_right[one] for one in drawn) for is_right in right for drawn in itertools.combinations(range(5), n)
    ]
    assert best_of_n(right.astype(float), right.astype(float), n) == pytest.approx(np.mean(by_knowledge))
    assert best_of_n(np.zeros((3, 5)), right.astype(float), n) == pytest.approx(right.mean())
