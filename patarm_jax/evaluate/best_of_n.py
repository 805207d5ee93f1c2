"""Best of n: how often the response to a prompt that someone picks from n is right, over all ways to draw n of V."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_DRAWS = 200


def best_of_n(scores: np.ndarray, right: np.ndarray, n: int) -> float:
    """The share of prompts on which the response with the highest score of n is right, in expectation.

        Σ_s P(the highest score of n is s) · mean of right over those with s,   in the mean over prompts
        P(the highest is s) = [C(below + equal, n) − C(below, n)] / C(V, n)

    where below and equal count a prompt's responses by s. Equal scores are picked from at random, and a response
    without a score only where all n have none. With scores = `right` it is the best that any picker could do, and with
    equal scores a pick at random.

    Args:
        scores: [N, V] of V responses to each of N prompts, NaN where there is none.
        right: [N, V], 1 where a response is right.
        n: from 1 to V.

    >>> scores, right = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 1.0]])
    >>> [round(best_of_n(scores, right, n), 3) for n in (1, 2, 3)]
    [0.667, 0.667, 1.0]
    """
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    return float(np.mean([_of_prompt(*prompt, n) for prompt in zip(ranked, right, strict=True)]))


def _of_prompt(scores: np.ndarray, right: np.ndarray, n: int) -> float:
    ways = math.comb(len(scores), n)
    total = 0.0
    for score in np.unique(scores):
        equal, below = scores == score, int((scores < score).sum())
        chance = (math.comb(below + int(equal.sum()), n) - math.comb(below, n)) / ways
        total += chance * float(right[equal].mean())
    return total


def curve_of(scores: np.ndarray, right: np.ndarray, sizes: Sequence[int]) -> list[tuple[float, float]]:
    """`best_of_n` at each of some n, in %."""
    return [(float(n), 100 * best_of_n(scores, right, n)) for n in sizes]


def majority_of_n(answers: Sequence[Sequence[str]], right: np.ndarray, n: int) -> float:
    """The share of prompts on which the answer that most of n responses give is right, in expectation.

    Answers are the same where their words are. Of several that are given as often one is picked at random, and an empty
    one only where all are. The mean is over all ways to draw n of V; where these are many, over 200 of them.

    >>> right = np.array([[1.0, 0.0, 1.0]])
    >>> [round(majority_of_n([["4", "5", " 4"]], right, n), 3) for n in (1, 2, 3)]
    [0.667, 0.667, 1.0]
    """
    rng, found = np.random.default_rng(0), []
    for given, is_right in zip(answers, right, strict=True):
        words = np.array([" ".join(answer.split()) for answer in given])
        if math.comb(len(words), n) <= _DRAWS:
            draws = [list(drawn) for drawn in itertools.combinations(range(len(words)), n)]
        else:
            draws = [rng.choice(len(words), n, replace=False).tolist() for _ in range(_DRAWS)]
        found.append(np.mean([_of_majority(words[drawn], is_right[drawn]) for drawn in draws]))
    return float(np.mean(found))


def _of_majority(words: np.ndarray, right: np.ndarray) -> float:
    counts = Counter(word for word in words.tolist() if word) or Counter(words.tolist())
    most = [word for word, count in counts.items() if count == max(counts.values())]
    return float(np.mean([right[words == word].mean() for word in most]))
