"""A policy's responses to a benchmark's prompts, as those who score them see them."""

from dataclasses import dataclass

from patarm_jax.judge.parse import answer_of


@dataclass(frozen=True)
class Response:
    """What a policy has written."""

    text: str  # all of it, its thinking included
    cut_off: bool = False  # at the limit of new tokens

    @property
    def answer(self) -> str:
        """What is scored: what stands behind the thinking, and without thinking the text as it is; empty where nothing.

        >>> Response("Rice. ").answer, Response("<think>hm</think> Rice.").answer, Response("<think>hm").answer
        ('Rice. ', 'Rice.', '')
        """
        answer = answer_of(self.text) or ""
        return self.text if answer == self.text.strip() else answer

    @property
    def is_lost_in_thought(self) -> bool:
        """Whether it was cut off before its thinking ended."""
        return self.cut_off and bool(self.text.strip()) and not self.answer
