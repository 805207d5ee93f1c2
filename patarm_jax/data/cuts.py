r"""Where two texts without turns part into prompt and response: only where it is certain.

A row whose two texts contain the prompt does not say where it ends, and a cut inside an answer would have the judge
grade a fragment. So what both share is taken as the prompt in these cases alone, and the row is dropped in any other:

1. Both share one line that ends in a line break, a blank line or a question mark, and the responses begin right behind
   it and differ in their first word. Whatever else they shared could be the answer's, and so could any line or
   sentence behind the first: hence the line holds no end of a sentence, and no colon, that more text follows. Nor is
   it a prompt if it looks like an answer's first line: one word, a heading or an item of a list, or a line that ends
   in a colon or an exclamation mark, such as `Sure!` or `Here is a list:`.
2. Both complete a short sentence that has no end yet, as TRL's "The sky is" + " blue.", " green.". An answer behind a
   prompt begins with a capital letter or behind a mark. Where the shared words hold no mark at all and no capital
   letter but the first, no answer has begun in them, and they are all prompt. The sides differ from a word's first
   letter on, since 18 and 180 differ inside an answer more often.
"""

import re

from patarm_jax.data.cells import is_blank
from patarm_jax.data.reasons import NO_PROMPT, Dropped

_CLOSING = r"""["'”’)\]」』）]*"""
_GOES_ON = re.compile(rf"[.!?…:;]{_CLOSING}\s|[。！？：]{_CLOSING}")  # behind it a further sentence, or the answer
_QUESTION = re.compile(rf"[?？]{_CLOSING}\Z")
# A letter or digit first, two words or a script without spaces, and no mark at the end that leads over to an answer.
_ASKS = re.compile(rf"""["'“‘«(¿]?\w(?=.*(?:\S\s+\S|[\u2e80-\U0010ffff])).*(?<![:;!…：！,\\]){_CLOSING}\Z""", re.DOTALL)
_LISTED = re.compile(r"(?:\d{1,3}|[A-Za-z])[.)]\s")
_SENTENCE_BEGINS = re.compile(r"[A-ZÀ-ÖØ-Þ][a-zà-öø-ÿ]*(?: +[a-zà-öø-ÿ]+){0,9} +")
_SPACE = re.compile(r"\s*")


def shared_start(chosen: str, rejected: str) -> str:
    """What both texts begin with."""
    low, high = 0, min(len(chosen), len(rejected))
    while low < high:  # comparing slices is faster than comparing marks
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chosen[low:middle] == rejected[low:middle] else (low, middle - 1)
    return chosen[:low]


def cut_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""The prompt that two texts without turns share, and what each goes on with.

    >>> cut_texts("How long?\nAbout 18 minutes.", "How long?\nIt takes 180 minutes.")
    ('How long?', 'About 18 minutes.', 'It takes 180 minutes.')
    >>> cut_texts("The sky is blue.", "The sky is green.")
    ('The sky is', ' blue.', ' green.')

    Raises:
        Dropped: where no place is certain.
    """
    chosen, rejected = chosen.strip(), rejected.strip()
    shared = shared_start(chosen, rejected)
    if _SENTENCE_BEGINS.fullmatch(shared) and len(shared) < len(min(chosen, rejected, key=len)):
        end = len(shared) - 1  # the last space stands before the word, as TRL has it
        return shared[:end], chosen[end:], rejected[end:]
    end = len(_whole_words(shared, chosen, rejected).rstrip())
    prompt, *sides = shared[:end], chosen[end:], rejected[end:]
    question = _QUESTION.search(prompt)
    if not _ASKS.match(prompt) or _LISTED.match(prompt):
        raise Dropped(NO_PROMPT)
    if "\n" in prompt or any(mark.end() < end for mark in _GOES_ON.finditer(prompt)):
        raise Dropped(NO_PROMPT)
    for side in sides:
        gap = _SPACE.match(side)
        behind = gap[0] if gap else ""
        if not ("\n" in behind or (question and (behind or question[0].startswith("？")))):
            raise Dropped(NO_PROMPT)
    if is_blank(prompt) or any(map(is_blank, sides)):
        raise Dropped(NO_PROMPT)
    return prompt, sides[0].strip(), sides[1].strip()


def _whole_words(shared: str, chosen: str, rejected: str) -> str:
    """The shared text without the beginning of the word in which the texts part.

    Scripts that set no words apart, such as Chinese, show no such beginning: there the texts part at their first mark.
    """
    if all(len(text) == len(shared) or text[len(shared)].isspace() for text in (chosen, rejected)):
        return shared
    return re.sub(r"(?<!\S)[^\s\u2e80-\U0010ffff]+\Z", "", shared)
