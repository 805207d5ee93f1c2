"""A judge in the process of the trainer that asks it, on whatever devices JAX has there."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from patarm_jax.arrays import Params
from patarm_jax.ask.answers import Answer, Answers, Question
from patarm_jax.ask.local import ask_local, load_weights, open_local
from patarm_jax.config.adapters import AdapterConfig


class Here:
    """A judge whose weights stay on the devices; it answers what it is asked at once."""

    answers: Answers  # where they are kept

    def __init__(self, config: AdapterConfig) -> None:
        drawn = config.sampling, config.votes, config.seed, config.max_prompt_tokens
        self._local = open_local(config.model, config.mesh, *drawn, "pointwise")
        self._params: Params | None = None
        self._alone = threading.Lock()

    @property
    def has_answered(self) -> bool:
        """It answers whatever it is asked."""
        return True

    @property
    def identity(self) -> dict[str, object]:
        """What an answer depends on beside the question."""
        return self._local.identity

    def ask(self, questions: Sequence[Question]) -> "list[Future[list[Answer]]]":
        """Their answers, which are all there; KeyboardInterrupt where it was asked to stop before."""
        with self._alone:
            if not ask_local(self._local, self.answers, questions, self._weights):
                raise KeyboardInterrupt
        given: list[Future[list[Answer]]] = [Future() for _ in questions]
        for question, future in zip(questions, given, strict=True):
            future.set_result(self.answers.of(question, self._local.votes))
        return given

    def _weights(self) -> Params:
        if self._params is None:
            self._params = load_weights(self._local)
        return self._params
