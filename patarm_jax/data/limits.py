"""How many tokens a judge may read: by the config, and by the positions that its network was made for.

One rule for training, held-out pairs, `judge` and `eval`: what does not fit, with all that may be written after it, is
left out and counted, or recorded as too long; it is never asked.
"""

from dataclasses import dataclass

from patarm_jax.types import UsageError


@dataclass(frozen=True)
class Room:
    """The positions of a network, of which what it writes takes some.

    >>> room = Room(positions=40_960, new_tokens=1_024)
    >>> room.excess(39_936, 39_936), room.excess(40_000, 39_936)
    ('', 'longer than data.max_prompt_tokens 39,936')
    >>> room.excess(40_000, 65_536)
    'longer than the 39,936 tokens that sampling.max_new_tokens 1,024 leaves of max_position_embeddings 40,960'
    """

    positions: int  # max_position_embeddings of config.json; rotary embeddings that are scaled are refused there
    new_tokens: int = 0  # how many may be written after a prompt
    setting: str = "sampling.max_new_tokens"  # says how many, or what they are

    def check(self) -> None:
        """Refuses a network that has no position for a prompt.

        Raises:
            UsageError: when what may be written takes them all.
        """
        if self.new_tokens >= self.positions:
            raise UsageError(
                f"{self.setting} is {self.new_tokens:,}, and max_position_embeddings of the model {self.positions:,}, "
                "so that no prompt fits before it. Lower the setting."
            )

    @property
    def _taken(self) -> str:
        """What takes the positions: a setting and its value, or what is always written."""
        number = f"{self.new_tokens:,}"
        return f"{self.setting} {number}" if "." in self.setting else f"{self.setting} of {number} tokens"

    def excess(self, prompt: int, limit: int) -> str:
        """How a prompt of so many tokens is too long, as a clause; empty when it is not.

        Args:
            prompt: its tokens.
            limit: data.max_prompt_tokens.
        """
        if prompt > limit:
            return f"longer than data.max_prompt_tokens {limit:,}"
        if prompt + self.new_tokens <= self.positions:
            return ""
        if not self.new_tokens:
            return f"longer than max_position_embeddings {self.positions:,} of the model"
        return (
            f"longer than the {self.positions - self.new_tokens:,} tokens that {self._taken} leaves of "
            f"max_position_embeddings {self.positions:,}"
        )
