"""How often the 95 % intervals cover the truth, by simulation with the functions that evaluations use.

The quick tests take some cells and few draws; the long ones print a table of all (`pytest -s -m long`).
"""

import numpy as np
import pytest

from patarm_jax.evaluate.proportions import difference, limits, put_together

DRAWS = 20_000
SHARES = (0.5, 0.73, 0.93, 0.968, 0.98)
COUNTS = (30, 46, 100, 164, 500)
# Items of each prompt, and the correlation of two answers about the same prompt.
KINDS = {"single items": (1, 0.0), "fives, ρ 0": (5, 0.0), "fives, ρ ½": (5, 0.5), "fives, ρ 1": (5, 1.0)}
PORTION = 2_000  # draws at a time


def rates(rng, share, correlation, draws, count):
    """[draws, count]: how likely an item of each prompt is right; beta distributed."""
    if share == 1.0 or correlation in (0.0, 1.0):
        return (rng.random((draws, count)) < share) * 1.0 if correlation == 1.0 else np.full((draws, count), share)
    spread = (1 - correlation) / correlation
    return rng.beta(share * spread, (1 - share) * spread, (draws, count))


def judged(rng, share, kind, draws, count):
    """[draws, count] shares right of each prompt's items, and the sizes."""
    items, correlation = KINDS[kind]
    return rng.binomial(items, rates(rng, share, correlation, draws, count)) / items, np.full(count, float(items))


def coverage(draws, truth, simulate):
    """How often the interval holds the truth, and its mean width."""
    rng, covered, width = np.random.default_rng(0), 0, 0.0
    for _ in range(draws // PORTION):
        low, high = simulate(rng, PORTION).interval
        covered += int(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).sum())
        width += float((high - low).sum())
    return covered / draws, width / draws


def enough(covered, draws, level=0.93):
    """Two standard errors of the simulation are allowed."""
    return covered + 2 * np.sqrt(covered * (1 - covered) / draws) >= level


def of_one_judge(kind, count, share, draws):
    return coverage(draws, share, lambda rng, some: limits(*judged(rng, share, kind, some, count)))


@pytest.mark.parametrize(
    ("kind", "count", "share"),
    [("single items", 100, 0.968), ("single items", 46, 0.93), ("fives, ρ 1", 30, 0.98), ("fives, ρ ½", 46, 0.93)],
)
def test_intervals_hold_their_level(kind, count, share):
    """Where a percentile bootstrap covers 0.83 to 0.91."""
    covered, width = of_one_judge(kind, count, share, 4_000)
    assert enough(covered, 4_000) and width < 0.25


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_their_level_everywhere(kind):
    worst = 1.0
    for count in COUNTS:
        cells = [of_one_judge(kind, count, share, DRAWS) for share in SHARES]
        print(f"| {kind} | {count} |", " | ".join(f"{covered:.3f} ({width:.3f})" for covered, width in cells), "|")
        worst = min(worst, *(covered for covered, _ in cells))
        assert all(enough(covered, DRAWS) for covered, _ in cells)
    assert worst >= 0.947


@pytest.mark.long
@pytest.mark.parametrize("pattern", [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (1, 1, 1, 1, 1, 1, 1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_intervals_of_prompts_of_unlike_size_hold_their_level(pattern, correlation):
    for count in (30, 100, 500):
        size = np.resize(pattern, count)

        def simulate(rng, draws, share, size=size, count=count):
            return limits(rng.binomial(size, rates(rng, share, correlation, draws, count)) / size, size.astype(float))

        cells = [coverage(DRAWS, share, lambda rng, some, p=share: simulate(rng, some, p)) for share in SHARES]
        print(f"| {max(pattern)}, ρ {correlation} | {count} |", " | ".join(f"{c:.3f} ({w:.3f})" for c, w in cells), "|")
        assert all(enough(covered, DRAWS) for covered, _ in cells)


# ---- Strata ---------------------------------------------------------------------------------------------------------

# Weight, prompts, and share right of each stratum.
STRATA = {
    "one small at the ceiling": [(0.5, 10, 1.0), (0.5, 400, 0.9)],
    "all near the ceiling": [(0.25, 12, 0.97), (0.25, 40, 0.98), (0.25, 100, 0.99), (0.25, 150, 1.0)],
    "sections of RewardBench": [
        (0.25, 358, 0.95), (0.25, 456, 0.75), (0.25, 740, 0.9), (0.125, 447, 0.99), (0.125, 984, 0.9),
    ],
    "subsets of LLMBar": [(0.2, 100, 0.96), (0.2, 134, 0.85), (0.2, 92, 0.9), (0.2, 47, 0.72), (0.2, 46, 0.98)],
    "many of two": [(1 / 20, 2, 0.9)] * 20,
    "weights unlike sizes": [(0.8, 20, 0.93), (0.15, 200, 0.6), (0.05, 1000, 0.98)],
}  # fmt: skip


def of_strata(name, kind, draws):
    strata = STRATA[name]
    weights = np.array([weight for weight, _, _ in strata])

    def simulate(rng, some):
        return put_together([limits(*judged(rng, share, kind, some, count)) for _, count, share in strata], weights)

    return coverage(draws, sum(weight * share for weight, _, share in strata), simulate)


@pytest.mark.parametrize("name", ["one small at the ceiling", "subsets of LLMBar"])
def test_strata_put_together_hold_their_level(name):
    covered, _ = of_strata(name, "single items", 4_000)
    assert enough(covered, 4_000)


@pytest.mark.long
@pytest.mark.parametrize("name", STRATA)
def test_strata_put_together_hold_their_level_everywhere(name):
    cells = [of_strata(name, kind, DRAWS) for kind in KINDS]
    print(f"| {name} |", " | ".join(f"{covered:.3f} ({width:.3f})" for covered, width in cells), "|")
    assert all(enough(covered, DRAWS) for covered, _ in cells)


def test_strata_taken_as_one_hold_their_level():
    """Those that weigh as they are large, here of 0.99 and of 0.7 right."""

    def simulate(rng, some):
        parts = [judged(rng, share, "single items", some, count) for share, count in ((0.99, 60), (0.7, 40))]
        return limits(*(np.concatenate(each, axis=-1) for each in zip(*parts, strict=True)))

    covered, _ = coverage(4_000, 0.6 * 0.99 + 0.4 * 0.7, simulate)
    assert enough(covered, 4_000)


# ---- Differences ----------------------------------------------------------------------------------------------------

# Shares right of two judges.
PAIRS = ((0.5, 0.5), (0.73, 0.5), (0.73, 0.73), (0.93, 0.73), (0.93, 0.93), (0.968, 0.93), (0.98, 0.968), (0.98, 0.98))


def of_two_judges(kind, count, shares, likeness, draws):
    """Judges who answer an item alike with the given probability, and otherwise each for itself."""
    items, correlation = KINDS[kind]

    def simulate(rng, some):
        luck = rng.random((some, count, items))
        other = np.where(rng.random((some, count, items)) < likeness, luck, rng.random((some, count, items)))
        each = [
            (drawn < rates(rng, share, correlation, some, count)[..., None]).mean(axis=-1)
            for drawn, share in zip((luck, other), shares, strict=True)
        ]
        return difference(*each, np.full(count, float(items)))

    return coverage(draws, shares[0] - shares[1], simulate)


@pytest.mark.parametrize("likeness", [0.0, 0.9])
def test_differences_hold_their_level(likeness):
    for count, shares in ((46, (0.93, 0.93)), (100, (0.73, 0.5))):
        covered, _ = of_two_judges("single items", count, shares, likeness, 4_000)
        assert enough(covered, 4_000)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "likeness"),
    [("single items", 0.0), ("single items", 0.5), ("single items", 0.9), ("fives, ρ ½", 0.0), ("fives, ρ ½", 0.9)],
)
def test_differences_hold_their_level_everywhere(kind, likeness):
    for count in (30, 46, 100, 164) if kind == "single items" else (30, 100):
        cells = [of_two_judges(kind, count, shares, likeness, DRAWS) for shares in PAIRS]
        print(f"| {kind}, alike {likeness} | {count} |", " | ".join(f"{c:.3f} ({w:.3f})" for c, w in cells), "|")
        assert all(enough(covered, DRAWS, 0.947 if likeness == 0 else 0.93) for covered, _ in cells)
