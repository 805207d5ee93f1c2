"""Scores as tokens: 0 to 10 as a judge writes them, and what stands before and behind them."""

from patarm_jax.data.limits import Room
from patarm_jax.data.tokenizer import Tokenizer, cannot_be_unthought, encode_text, encode_trusted, unthought
from patarm_jax.judge.forms import Form
from patarm_jax.types import SCORES

OPENING, CLOSING = "<answer>", "</answer>"


def score_tokens(tokenizer: Tokenizer, before: str = "") -> tuple[tuple[int, ...], ...]:
    """Each score with what closes it: with Qwen3's vocabulary "10" is two tokens, and "1" begins 1, 1.5 and 10.

    Args:
        tokenizer: of the judge.
        before: text that belongs to the continuation too, such as the end of `OPENING`.
    """
    return tuple(tuple(encode_text(tokenizer, f"{before}{score}{CLOSING}")) for score in SCORES)


def opened_answer(tokenizer: Tokenizer) -> list[int]:
    """The ids of what a judge that does not reason has written where its score begins: see `answer_opening`."""
    text = answer_opening(tokenizer.opening)
    if text is None:
        raise cannot_be_unthought(tokenizer)
    return encode_trusted(tokenizer, text)


def answer_opening(opening: str) -> str | None:
    r"""What stands between a chat template's own words and a score that is given at once: no thinking, and the tag.

    >>> answer_opening("")
    '<think>\n\n</think>\n\n<answer>'
    """
    text = unthought(opening)
    return None if text is None else text + OPENING


def room_for(
    positions: int, tokenizer: Tokenizer, form: Form, new_tokens: int, setting: str = "sampling.max_new_tokens"
) -> Room:
    """The positions of a network that is asked as a judge of a form.

    Args:
        positions: all of them.
        tokenizer: of the judge.
        form: one that writes takes `new_tokens`, one that gives a score at once the longest score's.
        new_tokens: how many may be written.
        setting: says how many.
    """
    if form.writes:
        return Room(positions, new_tokens, setting)
    if form.has_score_head:
        return Room(positions)
    return Room(positions, max(map(len, score_tokens(tokenizer))), "a score")
