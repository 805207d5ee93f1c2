"""Finds near-duplicates among many texts: candidates by MinHash, each measured exactly."""

import hashlib
from typing import Any, Protocol

import numpy as np

from patarm_jax.corpus.texts import runs_of, words_of
from patarm_jax.types import UserError

_PERMUTATIONS = 128
_IN_VAIN, _MISSED = 0.1, 0.9  # how a candidate that is measured in vain weighs against one that is missed


class _Index(Protocol):
    def query(self, minhash: Any) -> list[int]: ...

    def insert(self, key: int, minhash: Any) -> None: ...


class NearDuplicates:
    """Texts by number, and which of them a further text nearly repeats."""

    def __init__(self, threshold: float, shingle: int) -> None:
        """`threshold` is Jaccard's index of two texts' runs of `shingle` words; at 1 the same words are looked for."""
        self._threshold, self._shingle = threshold, shingle
        self._runs: list[np.ndarray] = []  # of each text, the hashes of its runs, sorted
        self._same: dict[bytes, int] = {}
        self._index: _Index | None = _open_index(threshold) if threshold < 1.0 else None

    def find(self, text: str) -> int | None:
        """The number of the first text that it nearly repeats; None where there is none."""
        words = words_of(text)
        if not words:
            return None  # without words nothing tells it from another that has none
        if (same := self._same.get(_hash(" ".join(words)))) is not None:
            return same
        if self._index is None:
            return None
        runs = self._hashes(words)
        candidates = sorted(self._index.query(_sketch(runs)))
        return next((one for one in candidates if jaccard(self._runs[one], runs) >= self._threshold), None)

    def add(self, text: str) -> None:
        """Takes a text, under the next number."""
        words, number = words_of(text), len(self._runs)
        if words:
            self._same.setdefault(_hash(" ".join(words)), number)
        runs = self._hashes(words) if self._index is not None else np.empty(0, np.uint64)
        self._runs.append(runs)
        if self._index is not None and words:
            self._index.insert(number, _sketch(runs))

    def _hashes(self, words: list[str]) -> np.ndarray:
        every = [int.from_bytes(_hash(run)) for run in runs_of(words, self._shingle)]
        return np.unique(np.array(every, np.uint64))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The share of both sets together that stands in either, of sorted arrays without repetition.

    >>> round(jaccard(np.array([1, 2]), np.array([2, 3])), 3)
    0.333
    """
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _sketch(runs: np.ndarray) -> Any:
    from datasketch import MinHash

    found = MinHash(num_perm=_PERMUTATIONS, seed=1)
    found.update_batch([run.tobytes() for run in runs])
    return found


def _open_index(threshold: float) -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise UserError(
            "near-duplicates are found by datasketch, which is not installed. Install it with `pip install "
            "'patarm-jax[data]'`, or set near to 1, so that only texts of the same words are duplicates."
        ) from error
    return MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(_IN_VAIN, _MISSED))
