"""A judgement of two responses as it would read had they stood in the other order.

Data with a judgement in one order alone would teach that the first response is the better one. So the same judgement
is taught in both orders, in the second with its names exchanged: A and B, the first and the second response. Whether a
letter is a name is decided by the words beside it; a text in which one may be something else, such as the option B of
a question, is not exchanged at all.
"""

import re

_LETTER = re.compile(r"(?<![\w'’.+#-])[AB](?![\w+#-]|\.\w)")
_NOUN = r"(?:responses?|assistants?)"
# What stands before a letter that is a name: the noun, or the noun with other letters, as in "responses A and B".
_AFTER_NOUN = re.compile(rf"\b{_NOUN}[\s_]+(?:[\"'“*(]*[AB][\"'”*)]*(?:\s*(?:,|/|and|or|vs\.?)\s*)+)*[\"'“*(]*\Z", re.I)
_AFTER_WORD = re.compile(
    r"\b(?:than|over|versus|vs\.?|prefer|both|neither|either|between|unlike|while|whereas)\s+\Z", re.I
)
# What stands behind one: a genitive, a verb, another letter.
_BEFORE_WORD = re.compile(
    r"['’]s\b|\s+(?:is|was|are|has|does|did|do|wins|gives|answers|fails|misses|says|states|shows|meets|names|also|but"
    r"|(?:and|or|vs\.?|versus|over|than)\s+[AB]\b)\b",
)
_AFTER_LETTER = re.compile(r"(?<![\w'’])[AB]\s+(?:and|or|nor|vs\.?|versus|over)\s+\Z")
_ARTICLE = re.compile(r"A\s+(?!\w*[^su\W]s\b)[a-z]")  # a verb may end in a single s
_SENTENCE_BEGINS = re.compile(r"(?:\A|[.!?:;,\n>\"“(-])\s*\Z")
_ANSWER = re.compile(r"<answer>\s*\Z")
_ORDINAL = re.compile(rf"\b(first|second)(\s+{_NOUN}\b)", re.IGNORECASE)
_OTHER_ORDINAL = re.compile(r"\b(?:first|second)\s+(?:answer|one|option|reply|candidate)\b", re.IGNORECASE)
_TAG = re.compile(r"(</?response_)([ab])(>)")
_OTHER = {"A": "B", "B": "A", "a": "b", "b": "a", "first": "second", "second": "first"}


def mirrored(text: str) -> str | None:
    """The judgement with the two responses' names exchanged; None where a letter may be no name.

    >>> mirrored("<eval>A clear case: response A adds, B does not.</eval><answer>A</answer>")
    '<eval>A clear case: response B adds, A does not.</eval><answer>B</answer>'
    >>> mirrored("The First response is right. Responses A and B differ.")
    'The Second response is right. Responses B and A differ.'
    >>> mirrored("The question's option B is right, as response A says.") is None
    True
    """
    if _OTHER_ORDINAL.search(text):
        return None
    parts, end = [], 0
    for letter in _LETTER.finditer(text):
        before, behind = text[: letter.start()], text[letter.end() :]
        if not _is_name(before, behind):
            if _is_article(before, text[letter.start() :]):
                continue
            return None
        parts += [text[end : letter.start()], _OTHER[letter.group()]]
        end = letter.end()
    exchanged = "".join([*parts, text[end:]])
    exchanged = _ORDINAL.sub(lambda found: _in_case_of(found[1], _OTHER[found[1].lower()]) + found[2], exchanged)
    return _TAG.sub(lambda found: found[1] + _OTHER[found[2]] + found[3], exchanged)


def _is_name(before: str, behind: str) -> bool:
    near = before[-80:]
    if _AFTER_NOUN.search(near) or _ANSWER.search(near) or _AFTER_WORD.search(near) or _AFTER_LETTER.search(near):
        return True
    return _BEFORE_WORD.match(behind) is not None and _SENTENCE_BEGINS.search(near) is not None


def _is_article(before: str, here: str) -> bool:
    return _ARTICLE.match(here) is not None and _SENTENCE_BEGINS.search(before[-80:]) is not None


def _in_case_of(word: str, other: str) -> str:
    return other.capitalize() if word[0].isupper() else other
