r"""Whole dialogues written as one text: `\n\nHuman: … \n\nAssistant: …` and the other notations that people use.

A row whose two texts contain the prompt does not say where it ends, and the answers may begin alike: what both texts
share is the prompt and perhaps more. A cut inside an answer would have the judge grade a fragment. So:

1. Where what both share holds an assistant's turn, in one of the notations below, both texts are read as messages.
   The last message of each is the response, whatever words the responses share.
2. Otherwise the cut is at the one place that can be told from every other. Where the shared text has line breaks,
   prompt and response are taken to stand on lines of their own; where it has none but ends of sentences, in sentences
   of their own. Of one such place it is certain that it does not lie inside the answer. Of two or more the first could
   lie inside the prompt, and any later one inside the answer: the row has no certain cut.
3. A shared text without either is a sentence that both complete ("The sky is" + " blue.", " green."): the cut is before
   the first word that differs.

What has no such place is dropped, and counted.
"""

import re
from dataclasses import dataclass

from patarm_jax.data.cells import ROLES, is_blank
from patarm_jax.data.reasons import NO_PROMPT, Dropped
from patarm_jax.types import Conversation, Message


@dataclass(frozen=True)
class Notation:
    """How turns are marked in a text."""

    turn: re.Pattern[str]  # what stands in front of a turn; its group `role` says whose
    signs: tuple[str, ...]  # no text without one of these holds an assistant's mark: they are found faster
    tokens: bool = False  # turns are closed by special tokens, which belong to no message
    words: bool = True  # the marks are words, which a message may hold too
    chat: bool = True  # the marks are of dialogues, and seldom of anything else


_TOKEN = r"<\|(?:im_end|eot_id|end|endoftext|begin_of_text)\|>|<end_of_turn>|<｜[^｜]{1,30}｜>|</?s>|<bos>|<eos>"
_OPENS, _CLOSES = re.compile(rf"(?:\s|{_TOKEN})*+"), re.compile(rf"(?:{_TOKEN})\Z")

_ROLE_OF = {
    **ROLES,
    **{role: role for role in ("user", "assistant", "system", "tool", "function", "developer")},
    **dict.fromkeys(("question", "q", "instruction", "prompt", "query", "task", "input", "[inst]"), "user"),
    **dict.fromkeys(("answer", "a", "response", "output", "completion", "tl;dr", "[/inst]"), "assistant"),
}

_CHAT = "human|user|assistant|system|Human|User|Assistant|System|HUMAN|USER|ASSISTANT|SYSTEM|AI|Bot|Chatbot"
_QUESTION = "Question|Answer|QUESTION|ANSWER"
_TASK = "Instruction|Prompt|Query|Task|Response|Output|Completion"


def _special(pattern: str, *signs: str) -> Notation:
    return Notation(re.compile(pattern), signs, tokens=True, words=False)


def _lines(words: str, *signs: str, behind: str = "", chat: bool = False) -> list[Notation]:
    """Turns that begin a paragraph and, where none do, turns that begin a line."""
    return [
        Notation(re.compile(rf"{gap}[^\S\n]*(?P<role>{words}):{behind}"), signs, chat=chat)
        for gap in (r"\n[^\S\n]*\n", r"\n")
    ]


# Texts are given line breaks in front, so that a mark may be the first thing in them.
NOTATIONS = [
    _special(r"<\|im_start\|>(?P<role>\w+)\n?", "<|im_start|>assistant"),  # ChatML
    _special(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>", "<|start_header_id|>assistant"),  # Llama 3
    _special(r"<start_of_turn>(?P<role>\w+)\n?", "<start_of_turn>model"),  # Gemma
    _special(r"<\|(?P<role>user|assistant|system|prompter)\|>", "<|assistant|>"),  # Zephyr, Phi, Open Assistant
    _special(r"<｜(?P<role>User|Assistant)｜>", "<｜Assistant｜>"),  # DeepSeek
    _special(r"(?P<role>\[/?INST\])", "[/INST]"),  # Llama 2
    Notation(re.compile(rf"###[^\S\n]*(?P<role>{_CHAT}|{_QUESTION}|{_TASK})[^\S\n]*:"), ("###",)),  # Guanaco, Alpaca
    *_lines(_CHAT, "ssistant:", "ASSISTANT:", "AI:", "Bot:", "hatbot:", chat=True),  # HH-RLHF
    Notation(re.compile(r"(?<![^\s>])(?P<role>USER|ASSISTANT|SYSTEM):"), ("ASSISTANT:",), tokens=True),  # Vicuna
    *_lines(_QUESTION, "nswer:", "ANSWER:"),
    *_lines("Q|A", "A:", behind=r"(?![^\n]*\n\s*B:)"),  # but not the choices A, B, C
    *_lines(f"{_TASK}|Input", "esponse:", "utput:", "ompletion:"),
    *_lines("TL;DR", "TL;DR:"),
]

_LINE_BREAK = re.compile(r"(?P<gap>\n\s*)")
_SENTENCE_END = re.compile(r"""(?:[.!?…]["'”’)\]]*(?=\s)|[。！？]["'”’）」』]*)(?P<gap>\s*)""")


def read_dialogues(chosen: str, rejected: str) -> tuple[Conversation, Conversation] | None:
    r"""Both texts as messages, where what they share says that they are dialogues; None where it does not.

    >>> sides = read_dialogues("\n\nHuman: Rice?\n\nAssistant: 18 minutes.", "\n\nHuman: Rice?\n\nAssistant: 180.")
    >>> [[tuple(message.values()) for message in side] for side in sides]
    [[('user', 'Rice?'), ('assistant', '18 minutes.')], [('user', 'Rice?'), ('assistant', '180.')]]
    """
    chosen, rejected = _headed(chosen), _headed(rejected)
    shared = _shared(chosen, rejected)
    notation = _notation(shared) or _notation_of_each(chosen, rejected)
    if notation is None:
        return None
    return _messages(chosen, notation, len(shared)), _messages(rejected, notation, len(shared))


def _shared(chosen: str, rejected: str) -> str:
    """What both begin with."""
    low, high = 0, min(len(chosen), len(rejected))
    while low < high:  # comparing slices is faster than comparing marks
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chosen[low:middle] == rejected[low:middle] else (low, middle - 1)
    return chosen[:low]


def _headed(text: str) -> str:
    return "\n\n" + text.lstrip()


def read_open_prompt(prompt: str) -> Conversation | None:
    r"""The messages of a prompt that is a dialogue up to where the assistant begins; None of any other text.

    >>> read_open_prompt("\n\nHuman: Rice?\n\nAssistant:")
    ({'role': 'user', 'content': 'Rice?'},)
    >>> read_open_prompt("Who says 'Assistant: hello'?")
    """
    if not prompt.rstrip().endswith((":", ">", "]", "assistant", "model")):
        return None
    prompt = _headed(prompt)
    notation = _notation(prompt)
    if notation is None or not notation.chat:
        return None
    *before, last = _messages(prompt, notation, len(prompt))
    if not before or last["content"] or last["role"] != "assistant" or before[-1]["role"] != "user":
        return None
    first = notation.turn.search(prompt)
    return tuple(before) if first and _role(first) != "assistant" else None


def _notation(shared: str) -> Notation | None:
    """The notation whose marks begin first in the shared text, of those that mark an assistant's turn in it."""
    found = []
    for index, notation in enumerate(NOTATIONS):
        if not any(sign in shared for sign in notation.signs):
            continue
        marks = list(notation.turn.finditer(shared))
        if any(_role(mark) == "assistant" for mark in marks):
            found.append((marks[0].start(), index))
    return NOTATIONS[min(found)[1]] if found else None


def _notation_of_each(chosen: str, rejected: str) -> Notation | None:
    """The notation of two dialogues that part before the assistant's turn: each begins with another's."""
    notation = _notation(chosen)
    if notation is None or not notation.chat or notation is not _notation(rejected):
        return None
    begin = [next(notation.turn.finditer(text)) for text in (chosen, rejected)]
    return None if any(_role(mark) == "assistant" for mark in begin) else notation


def _role(mark: re.Match[str]) -> str:
    said = mark["role"]
    return _ROLE_OF.get(said.lower(), said)


def _messages(text: str, notation: Notation, shared: int) -> Conversation:
    """The turns of a text. What stands before the first is a system's message, or the user's if an assistant follows.

    Where marks are words, a turn ends where another role begins: `Answer:` inside an answer is the answer's. But a
    second one in what both texts share leaves open where the answer begins.
    """
    marks: list[re.Match[str]] = []
    for mark in notation.turn.finditer(text):
        if marks and notation.words and _role(mark) == _role(marks[-1]):
            if _role(mark) == "assistant" and mark.end() <= shared:
                raise Dropped(NO_PROMPT)
            continue
        marks.append(mark)
    messages: list[Message] = []
    before = _clean(text[: marks[0].start()], notation)
    if before:
        messages.append(Message(role="user" if _role(marks[0]) == "assistant" else "system", content=before))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        messages.append(Message(role=_role(mark), content=_clean(text[mark.end() : end], notation)))
    return tuple(messages)


def _clean(text: str, notation: Notation) -> str:
    """A message without what closes it at either end."""
    if not notation.tokens:
        return text.strip()
    start, end = 0, len(text.rstrip())
    if match := _OPENS.match(text):
        start = match.end()
    while match := _CLOSES.search(text, max(start, end - 40), end):
        end = match.start()
        while end > start and text[end - 1].isspace():
            end -= 1
    return text[start:end].strip()


def cut_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""The prompt that two texts without turns share, and what each goes on with.

    >>> cut_texts("How long?\nIt takes 18 minutes.", "How long?\nIt takes 180 minutes.")
    ('How long?', 'It takes 18 minutes.', 'It takes 180 minutes.')
    >>> cut_texts("The sky is blue.", "The sky is green.")
    ('The sky is', ' blue.', ' green.')

    Raises:
        Dropped: where no place is certain.
    """
    shared = _shared(chosen, rejected)
    for boundary in (_LINE_BREAK, _SENTENCE_END):
        gaps = [match.span("gap") for match in boundary.finditer(shared)]
        gaps = [gap for gap in gaps if _ends_something(shared[: gap[0]], boundary)]
        if len(gaps) > 1:
            raise Dropped(NO_PROMPT)
        if gaps:
            start, end = gaps[0]
            return shared[:start].strip(), chosen[end:].strip(), rejected[end:].strip()
    return _cut_before_a_word(chosen, rejected, shared)


def _ends_something(before: str, boundary: re.Pattern[str]) -> bool:
    """Whether a line or a sentence ends here. One word and a full stop are no sentence: `Dr. Who`, `1. Tea`."""
    if boundary is _LINE_BREAK:
        return not is_blank(before)
    return len(before.split(maxsplit=1)) > 1 or not before.rstrip("\"'”’)]").endswith(".")


def _cut_before_a_word(chosen: str, rejected: str, shared: str) -> tuple[str, str, str]:
    space = max((index for index, mark in enumerate(shared) if mark.isspace()), default=0)
    sides = chosen[space:], rejected[space:]
    words = [(side.split(maxsplit=1) or [""])[0] for side in sides]
    if is_blank(shared[:space]) or "" in words or words[0] == words[1]:
        raise Dropped(NO_PROMPT)
    return shared[:space], *sides
