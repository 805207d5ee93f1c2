"""True and false as a judge meant them: how likely each of the two was where it wrote one of them.

    s = Σᵢ wᵢ·(p(true) − p(false))        of the criteria i of a rubric, with p at the place of the i-th word

The probabilities are the sampler's own, of the softmax at its temperature before top-k and top-p: it is told to note
the log-probs of the two words' tokens at every step.

Source: RUBRIC-ARROW (arXiv 2605.29156).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from patarm_jax.data.tokenizer import Tokenizer, encode_text
from patarm_jax.rollout.probabilities import tokens_before
from patarm_jax.types import Judgement, UserError, Verdict

_WORDS = {True: "true", False: "false"}


@dataclass(frozen=True)
class Words:
    """The tokens of true and false, alone and behind a space."""

    of: dict[bool, tuple[int, ...]]

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them, true's first."""
        return (*self.of[True], *self.of[False])


def words_of(tokenizer: Tokenizer) -> Words:
    """The tokens of both words.

    Raises:
        UserError: when the vocabulary has no token for a word behind a space, where a judgement has it.
    """
    found = {}
    for met, word in _WORDS.items():
        spelled = [encode_text(tokenizer, f"{before}{word}") for before in (" ", "")]
        if len(spelled[0]) != 1:
            raise UserError(
                f"the tokenizer has no token for {word!r} behind a space, and a checklist counts how likely it is. "
                "Give a model with Qwen3's vocabulary, or another judge."
            )
        found[met] = tuple(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1))
    return Words(found)


def weighed(
    tokenizer: Tokenizer, words: Words, written: Sequence[int], named: np.ndarray, judgement: Judgement
) -> Judgement:
    """A judgement whose score counts each verdict by its probabilities.

    Args:
        tokenizer: of the judge.
        words: of the tokenizer.
        written: the tokens of the judgement, without the end token.
        named: [Tc, n], log-probs of `words.ids` at every step.
        judgement: what they say; stays as it is where it holds no verdicts.
    """
    if not judgement.verdicts:
        return judgement
    score = 0.0
    for verdict in judgement.verdicts:
        step = tokens_before(tokenizer, written, verdict.place)  # the token with which the word begins
        score += verdict.weight * _lead(words, int(written[step]), named[step], verdict)
    return replace(judgement, score=score)


def _lead(words: Words, token: int, logprobs: np.ndarray, verdict: Verdict) -> float:
    """p(true) − p(false); where the word was written in several tokens, what is written counts in full."""
    if token not in words.of[verdict.met]:
        return 1.0 if verdict.met else -1.0
    likely = np.exp(logprobs.astype(np.float64))
    count = len(words.of[True])
    return float(likely[:count].sum() - likely[count : len(words.ids)].sum())
