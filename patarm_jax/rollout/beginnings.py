"""Which prompts begin alike, so that what they share is read once. Pure functions over token ids, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Fewer tokens than these are read again sooner than they are found and copied.
LEAST_SHARED = 64
# Requests that are looked at together: a family has no more members.
LARGEST_FAMILY = 64


@dataclass(frozen=True)
class Families:
    """Requests that begin alike; those of a number belong together."""

    number: np.ndarray  # [n] int32, which family each belongs to
    shared: np.ndarray  # [n] int32, tokens that all of its family begin with; 0: it is alone


def families_of(prompts: Sequence[Sequence[int] | np.ndarray], least: int = LEAST_SHARED) -> Families:
    """Divides prompts into families so that as few tokens as possible are read.

    In lexical order, what begins alike stands side by side; a family is a run of it, which reads its common beginning
    once. Every member has a token at least behind it, whose state the next token is drawn from. The best division is
    found from the front on: of the first n prompts it is that of the first m, and the rest as one family. What is
    shared is `least` tokens long, or nothing.

    >>> found = families_of([[7] * 100 + [1], [8] * 100, [7] * 100 + [2, 3]])
    >>> found.number.tolist(), found.shared.tolist()
    ([0, 1, 0], [100, 0, 100])
    """
    count = len(prompts)
    arrays = [np.asarray(tokens, np.int32) for tokens in prompts]
    # Bytes compare as numbers do where the highest comes first.
    order = sorted(range(count), key=lambda i: arrays[i].astype(">u4").tobytes())
    alike = [_common(arrays[a], arrays[b]) for a, b in pairwise(order)]
    most = np.array([len(arrays[i]) - 1 for i in order], np.int32)
    saved, begins = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)  # of the first n: the best, its last
    common = np.zeros(count + 1, np.int32)
    for end in range(1, count + 1):
        saved[end], begins[end], shared = saved[end - 1], end - 1, most[end - 1]
        for begin in range(end - 2, max(end - 1 - LARGEST_FAMILY, -1), -1):
            shared = min(shared, alike[begin], most[begin])
            if shared < least:
                break
            if (gain := saved[begin] + int(shared) * (end - begin - 1)) > saved[end]:
                saved[end], begins[end], common[end] = gain, begin, shared
    number, together = np.zeros(count, np.int32), np.zeros(count, np.int32)
    end = count
    while end:
        members = order[begins[end] : end]
        number[members], together[members] = min(members), common[end] if len(members) > 1 else 0
        end = int(begins[end])
    return Families(number, together)


def dealt(families: Sequence[Sequence[int]], shares: int) -> list[list[int]]:
    """Members of families dealt to so many, equally many to each, a family to one where it has room.

    >>> dealt([[0, 1, 2, 3], [4], [5]], 2), dealt([[0], [1], [2], [3]], 2)
    ([[0, 1, 2], [3, 4, 5]], [[0, 2], [1, 3]])
    """
    most = -(-sum(map(len, families)) // shares)
    found: list[list[int]] = [[] for _ in range(shares)]
    for family in families:
        left = list(family)
        while left:
            share = min(found, key=len)
            room = most - len(share)
            share.extend(left[:room])
            left = left[room:]
    return found


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two prompts begin with alike."""
    width = min(len(a), len(b))
    differ = a[:width] != b[:width]
    return int(differ.argmax()) if differ.any() else width
