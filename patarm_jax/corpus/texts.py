"""When two texts say the same: the same words, a long run of words in common, or nearly all of them."""

import re
from collections.abc import Iterator

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text, without case and punctuation.

    >>> words_of("Don't over-cook the RICE!")
    ['don', 't', 'over', 'cook', 'the', 'rice']
    """
    return _WORD.findall(text.casefold())


def runs_of(words: list[str], length: int) -> Iterator[str]:
    """All runs of so many words; of a shorter text the whole, so that it has one.

    >>> list(runs_of(["a", "b", "c"], 2)), list(runs_of(["a"], 2)), list(runs_of([], 2))
    (['a b', 'b c'], ['a'], [])
    """
    if words and len(words) < length:
        yield " ".join(words)
    for start in range(len(words) - length + 1):
        yield " ".join(words[start : start + length])
