r"""Whole dialogues written as one text: `\n\nHuman: … \n\nAssistant: …` and the other notations that people use.

Where what two texts share holds an assistant's turn, in one of the notations below, both are read as messages, and the
last message of each is the response, whatever words the responses share. What no notation is sure of, `cuts` cuts.

A notation of special tokens comes before one of words, which a message may hold too. Of those of words, one that the
text begins in (or that has `###` in front) comes before the others. Where two of the same rank mark an assistant's
turn, the row is dropped, and so is one whose shared text holds a role's mark or a special token that is not in the
table: a wrong guess would have the judge grade a fragment. Of words, `Answer:` and its like count only behind a user's
mark, `TL;DR:` only behind the marks of a post.
"""

import re
from dataclasses import dataclass

from patarm_jax.data.cells import ROLES
from patarm_jax.data.cuts import shared_start
from patarm_jax.data.reasons import NO_PROMPT, OPEN_TURN, TWO_NOTATIONS, UNKNOWN_MARK, Dropped
from patarm_jax.types import Conversation, Message


@dataclass(frozen=True)
class Notation:
    """How turns are marked in a text."""

    turn: re.Pattern[str]  # what stands in front of a turn; its group `role` says whose
    signs: tuple[str, ...]  # no text without one of these holds an assistant's mark: they are found faster
    tokens: bool = False  # turns are closed by special tokens, which belong to no message
    words: bool = True  # the marks are words, which a message may hold too
    chat: bool = True  # the marks are of dialogues, and seldom of anything else
    family: str = ""  # notations of one share marks; of special tokens each is its own
    opening: re.Pattern[str] | None = None  # stands in for a user's mark in front of the assistant's


_TOKEN = (
    r"<\|(?:im_end|eot_id|end|return|endoftext|begin_of_text|END_OF_TURN_TOKEN)\|>|<end_of_turn>|<｜[^｜]{1,30}｜>"
    r"|</?s>|<bos>|<eos>|<(?:BOS|EOS)_TOKEN>|</(?:[Hh]uman|[Uu]ser|[Aa]ssistant|[Bb]ot|[Ss]ystem)>"
)
_OPENS, _CLOSES = re.compile(rf"(?:\s|{_TOKEN})*+"), re.compile(rf"(?:{_TOKEN})\Z")
# What looks like a special token or a role's mark, in whatever notation.
_MARK = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<｜[^｜\n]{1,40}｜>|\[\|[^|\]\n]{1,40}\|\]|<(?:start|end)_of_turn>|</?s>|\[/?INST\]"
    r"|(?i:</?(?:human|user|assistant|bot|system)>|\[/?(?:human|user|assistant|bot|system)\])"
)

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
    return Notation(re.compile(pattern), signs, tokens=True, words=False, family=pattern)


def _lines(
    words: str, *signs: str, family: str, behind: str = "", opening: str = "", chat: bool = False
) -> list[Notation]:
    """Turns that begin a paragraph and, where none do, turns that begin a line."""
    marks = [re.compile(rf"{gap}[^\S\n]*(?P<role>{words}):{behind}") for gap in (r"\n[^\S\n]*\n", r"\n")]
    openings = [re.compile(opening) if opening else None, None if chat else re.compile(opening) if opening else None]
    return [
        Notation(mark, signs, chat=chat, family=family, opening=one) for mark, one in zip(marks, openings, strict=True)
    ]


# Texts are given line breaks in front, so that a mark may be the first thing in them.
NOTATIONS = [
    _special(r"<\|im_start\|>(?P<role>\w+)\n?", "<|im_start|>assistant"),  # ChatML
    _special(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>", "<|start_header_id|>assistant"),  # Llama 3
    _special(r"<\|start\|>(?P<role>\w+)(?:<\|channel\|>final)?<\|message\|>", "<|start|>assistant"),  # gpt-oss
    _special(  # Cohere
        r"(?:<\|START_OF_TURN_TOKEN\|>)?<\|(?P<role>USER|CHATBOT|SYSTEM)_TOKEN\|>", "<|CHATBOT_TOKEN|>"
    ),
    _special(r"<start_of_turn>(?P<role>\w+)\n?", "<start_of_turn>model"),  # Gemma
    _special(r"<\|(?P<role>user|assistant|system|prompter)\|>", "<|assistant|>"),  # Zephyr, Phi, Open Assistant
    _special(r"<｜(?P<role>User|Assistant)｜>", "<｜Assistant｜>"),  # DeepSeek
    _special(r"(?P<role>\[/?INST\])", "[/INST]"),  # Llama 2
    _special(r"\[\|(?P<role>Human|User|AI|Assistant|System)\|\]:?", "[|AI|]", "[|Assistant|]"),  # Baize
    _special(r"<(?P<role>(?i:human|user|assistant|bot|system))>", "<assistant>", "<Assistant>", "<bot>", "<Bot>"),
    Notation(  # Guanaco, Alpaca
        re.compile(rf"###[^\S\n]*(?P<role>{_CHAT}|{_QUESTION}|{_TASK})[^\S\n]*:"), ("###",), family="###"
    ),
    # HH-RLHF. Without a user's mark in front, only a paragraph that begins with `Assistant:` is sure to be a turn.
    *_lines(
        _CHAT, "ssistant:", "ASSISTANT:", "AI:", "Bot:", "hatbot:", family="chat", chat=True,
        opening=r"(?s:.*?)\n[^\S\n]*\n[^\S\n]*(?=Assistant:|ASSISTANT:)",
    ),
    Notation(  # Vicuna
        re.compile(r"(?<![^\s>])(?P<role>USER|ASSISTANT|SYSTEM):"), ("ASSISTANT:",), tokens=True, family="chat"
    ),
    *_lines(_QUESTION, "nswer:", "ANSWER:", family="question"),
    *_lines("Q|A", "A:", behind=r"(?![^\n]*\n\s*B:)", family="Q"),  # but not the choices A, B, C
    *_lines(f"{_TASK}|Input", "esponse:", "utput:", "ompletion:", family="task"),
    *_lines("TL;DR", "TL;DR:", family="post", opening=r"\s*(?:SUBREDDIT|TITLE|POST|Subreddit|Title|Post):"),
]  # fmt: skip


def read_dialogues(chosen: str, rejected: str, known: bool = False) -> tuple[Conversation, Conversation] | None:
    r"""Both texts as messages, where what they share says that they are dialogues; None where it does not.

    >>> sides = read_dialogues("\n\nHuman: Rice?\n\nAssistant: 18 minutes.", "\n\nHuman: Rice?\n\nAssistant: 180.")
    >>> [[tuple(message.values()) for message in side] for side in sides]
    [[('user', 'Rice?'), ('assistant', '18 minutes.')], [('user', 'Rice?'), ('assistant', '180.')]]

    Args:
        chosen: one text.
        rejected: the other.
        known: whether the prompt is known from elsewhere, so that odd marks in the texts lead nobody astray.
    """
    chosen, rejected = _headed(chosen), _headed(rejected)
    shared = shared_start(chosen, rejected)
    notation = _notation(shared) or _notation_of_each(chosen, rejected)
    if not known:
        _drop_unknown_marks(shared, notation)
    if notation is None:
        return None
    return _without_open_turns(*(_messages(text, notation, len(shared)) for text in (chosen, rejected)))


def _drop_unknown_marks(shared: str, notation: Notation | None) -> None:
    known = re.compile(rf"{notation.turn.pattern}|{_TOKEN}") if notation else None
    if _MARK.search(known.sub(" ", shared) if known else shared):
        raise Dropped(UNKNOWN_MARK)


def _without_open_turns(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, Conversation]:
    """Both dialogues without a user's turn behind the response, as HH-RLHF has it where a text was cut too late."""
    is_open = [
        [message["role"] for message in side[-2:]] == ["assistant", "user"] and len(side) > 2
        for side in (chosen, rejected)
    ]
    if all(is_open):
        return chosen[:-1], rejected[:-1]
    if any(is_open) and abs(len(chosen) - len(rejected)) == 1:
        raise Dropped(OPEN_TURN)
    return chosen, rejected


def _headed(text: str) -> str:
    return "\n\n" + text.lstrip()


def read_open_prompt(prompt: str) -> tuple[Conversation, Notation] | None:
    r"""The messages of a prompt that is a dialogue up to where the assistant begins, and how it is written.

    None of any other text.

    >>> read_open_prompt("\n\nHuman: Rice?\n\nAssistant:")[0]
    ({'role': 'user', 'content': 'Rice?'},)
    >>> read_open_prompt("Who says 'Assistant: hello'?")
    """
    if not prompt.rstrip().endswith((":", ">", "]", "assistant", "model")):
        return None
    prompt = _headed(prompt)
    try:
        notation = _notation(prompt)
    except Dropped:  # a text that shows dialogues
        return None
    if notation is None or not notation.chat:
        return None
    *before, last = _messages(prompt, notation, len(prompt))
    if not before or last["content"] or last["role"] != "assistant" or before[-1]["role"] != "user":
        return None
    first = notation.turn.search(prompt)
    return (tuple(before), notation) if first and _role(first) != "assistant" else None


def closed(answer: str, notation: Notation) -> str:
    """An answer to a prompt in a notation, without the tokens that close it there."""
    return _clean(answer, notation) if notation.tokens else answer


def _notation(shared: str) -> Notation | None:
    """The notation that marks an assistant's turn in the shared text; None where none does.

    Raises:
        Dropped: where several do, and either could be meant.
    """
    found: list[tuple[int, int, Notation]] = []  # rank, place of the first mark
    for notation in NOTATIONS:
        if any(sign in shared for sign in notation.signs):
            marks = list(notation.turn.finditer(shared))
            if _answers_somebody(notation, marks, shared):
                found.append((_rank(notation, marks[0], shared), marks[0].start(), notation))
    if not found:
        return None
    first = min(rank for rank, _, _ in found)
    best = [(start, index, one) for index, (rank, start, one) in enumerate(found) if rank == first]
    if len({one.family for _, _, one in best}) > 1:
        raise Dropped(TWO_NOTATIONS)
    return min(best, key=lambda each: each[:2])[2]


def _answers_somebody(notation: Notation, marks: list[re.Match[str]], shared: str) -> bool:
    """Whether there is an assistant's mark and, where marks are words, what shows that it is one."""
    roles = [_role(mark) for mark in marks]
    if "assistant" not in roles:
        return False
    if not notation.words or (notation.opening and notation.opening.match(shared)):
        return True
    return "user" in roles and "assistant" in roles[roles.index("user") :]


def _rank(notation: Notation, first: re.Match[str], shared: str) -> int:
    if not notation.words:
        return 0
    begins = first.start() <= 2 and _role(first) != "assistant"  # behind the two line breaks in front
    is_post = notation.family == "post"  # a post begins with other marks than its turns do
    return 1 if notation.family == "###" or is_post or (notation.chat and begins) else 2


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

    Where marks are words, a turn ends where another role begins: `Answer:` inside an answer is the answer's. So are,
    behind what both texts share, words that mark no turn in it. But the same assistant's mark twice in what both share
    leaves open where the answer begins.
    """
    found = list(notation.turn.finditer(text))
    told = [mark for mark in found if mark.end() <= shared]
    if notation.words and any(_role(mark) == "assistant" for mark in told):
        words = {mark["role"] for mark in told}
        found = told + [mark for mark in found[len(told) :] if mark["role"] in words]
    marks: list[re.Match[str]] = []
    for mark in found:
        if marks and notation.words and _role(mark) == _role(marks[-1]):
            if _role(mark) == "assistant" and mark.end() <= shared and mark["role"] == marks[-1]["role"]:
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
