"""Scores as tokens: 0 to 10 as a judge writes them, and what stands before and behind them.

And how the turn of a model begins that does not think first.
"""

from patarm_jax.data.limits import Room
from patarm_jax.data.tokenizer import THINKING, Tokenizer, encode_text, encode_trusted
from patarm_jax.judge.forms import Form
from patarm_jax.types import SCORES, UserError

OPENING, CLOSING = "<answer>", "</answer>"


def score_tokens(tokenizer: Tokenizer, before: str = "") -> tuple[tuple[int, ...], ...]:
    """Each score with what closes it: with Qwen3's vocabulary "10" is two tokens, and "1" begins 1, 1.5 and 10.

    Args:
        tokenizer: of the judge.
        before: text that belongs to the continuation too, such as the end of `OPENING`.
    """
    return tuple(tuple(encode_text(tokenizer, f"{before}{score}{CLOSING}")) for score in SCORES)


def opened_answer(tokenizer: Tokenizer) -> list[int]:
    """The ids of what a judge that does not reason has written where its score begins; see `answer_opening`."""
    return encode_trusted(tokenizer, _unthought(tokenizer) + OPENING)


def unthought_opening(tokenizer: Tokenizer) -> list[int]:
    """The ids that begin the turn of a model that does not think, behind what the chat template has written.

    There are none where neither the vocabulary nor the template knows of thinking.
    """
    if not tokenizer.thinking_tokens and not tokenizer.opening:
        return []
    return encode_trusted(tokenizer, _unthought(tokenizer))


def _unthought(tokenizer: Tokenizer) -> str:
    text = unthought(tokenizer.opening)
    if text is None:
        raise UserError(
            f"the chat template in {tokenizer.fast.name_or_path} begins the thinking with {tokenizer.opening!r}, which "
            "cannot be ended unthought. Take Qwen3's template."
        )
    return text


def answer_opening(opening: str) -> str | None:
    r"""What stands between a chat template's own words and a score that is given at once: no thinking, and the tag.

    >>> answer_opening("")
    '<think>\n\n</think>\n\n<answer>'
    """
    text = unthought(opening)
    return None if text is None else text + OPENING


def unthought(opening: str) -> str | None:
    r"""What stands between a chat template's own words and the answer of a model that does not think.

    So Qwen3's template writes it with enable_thinking off. What the template has written is not repeated.

    Args:
        opening: what the template writes of the judge's thinking: see `Tokenizer.opening`.

    Returns:
        The text; None where the template begins the thinking in another way.

    >>> unthought(""), unthought("<think>\n"), unthought("<think>\n\n</think>\n\n")
    ('<think>\n\n</think>\n\n', '\n</think>\n\n', '')
    """
    nothing = f"{THINKING[0]}\n\n{THINKING[1]}\n\n"
    if nothing.startswith(opening):
        return nothing.removeprefix(opening)
    begun, closed, behind = opening.partition(THINKING[1])
    if closed and not behind.strip() and not begun.strip().removeprefix(THINKING[0]).strip():
        return ""
    return None


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
