"""What asking a judge will cost, before a weight is loaded or a request is sent."""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from patarm_jax.ask.answers import Question
from patarm_jax.ask.local import Local, encode_questions
from patarm_jax.ask.remote import Remote
from patarm_jax.model.transformer import abstract_params


def estimate(judge: Local | Remote, lacking: Sequence[tuple[Question, list[int]]]) -> str:
    """Answers, tokens and arithmetic, as lines.

    Args:
        judge: who will be asked.
        lacking: the questions with the votes that they lack, as from `ask.answers.missing`.
    """
    asked = sum(len(votes) for _, votes in lacking)
    lines = [f"answers to be asked for: {asked:,}, to {len(lacking):,} questions"]
    if not lacking:
        return lines[0]
    writes_nothing = isinstance(judge, Local) and not judge.form.writes
    written = 0 if writes_nothing else asked * (judge.sampling.max_new_tokens or 0)
    lines += [f"completion tokens: {written:,} at most"] if written else []
    if isinstance(judge, Remote):
        # Its tokenizer is not here; English has some four characters to a token.
        tokens = [sum(len(message["content"]) for message in question.messages) // 4 for question, _ in lacking]
        read = sum(length * len(votes) for length, (_, votes) in zip(tokens, lacking, strict=True))
        return "\n".join([*lines, f"prompt tokens: about {read:,} over all answers, {max(tokens):,} at most in one"])
    lengths = [len(one.tokens) for one in encode_questions(judge, lacking)]
    excesses = Counter(excess for length in lengths if (excess := judge.excess(length)))
    for excess, count in excesses.most_common():
        lines.append(f"{count:,} questions are {excess}, and will be recorded as too long")
    mean, longest = np.mean(lengths), max(lengths)
    lines.append(f"prompt tokens: {sum(lengths):,} in all, {mean:,.0f} in the mean, {longest:,} at most")
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(judge.model.arch, judge.mesh)))
    for part, tokens_ in {"reading": sum(lengths), "writing, at most": written}.items():
        flop = 2 * weights * tokens_ / 1e15
        lines += [f"{part}: {flop:,.3g} PFLOP in matrix products ({weights / 1e9:,.3g} B weights)"] if tokens_ else []
    return "\n".join(lines)
