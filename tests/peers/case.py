"""What all workers share: the work to be done, read from the command line, and whose turn it is. Needs NumPy alone."""

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.01
PAD, FIRST_WORD = 0, 3


@dataclass(frozen=True)
class Case:
    """One worker's work."""

    task: str  # sft, sample, grpo or policy
    folder: str  # of the model
    vocab: int
    rows: int  # of sft: sequences
    length: int  # tokens of each
    prompts: int
    prompt: int  # tokens of each
    alike: int  # with how many of these all begin alike
    group: int
    new: int
    question: int  # of policy: tokens that the judge reads beside prompt and response
    judgement: int  # and tokens that it writes at most
    micro: int  # prompts of a slice of the peers' updates
    stop_ids: tuple[int, ...]  # empty: nothing ends before `new`

    def tokens(self, *shape: int) -> np.ndarray:
        """The same made-up words for everybody."""
        return np.random.default_rng(0).integers(FIRST_WORD, self.vocab, shape, dtype=np.int32)

    def questions(self, count: int) -> np.ndarray:
        """Prompts [count, prompt]."""
        tokens = self.tokens(count, self.prompt)
        tokens[:, : self.alike] = tokens[0, : self.alike]
        return tokens

    def texts(self, count: int) -> list[str]:
        """Prompts as text; the tokenizer spells token i `w<i>`."""
        return [" ".join(f"w{i}" for i in row) for row in self.questions(count)]


def read_case() -> Case:
    """The case that the driver gave as JSON."""
    fields = json.loads(sys.argv[1])
    return Case(**fields | {"stop_ids": tuple(fields["stop_ids"])})


class Turns:
    """A worker's side of the driver's round: `begin`, the work, `end`; the first two warm up and ask for no turn."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")  # libraries print to stdout: the driver listens to this copy
        os.dup2(2, 1)
        self._number, self._started = 0, time.perf_counter()

    def begin(self) -> None:
        """Waits for the driver's word."""
        if self._number == 2:
            self._say(ready=True)
        if self._number >= 2 and sys.stdin.readline().strip() != "go":
            self._say(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            os._exit(0)
        self._started = time.perf_counter()

    def end(self, **facts: float) -> None:
        """Tells how long it took."""
        seconds = time.perf_counter() - self._started
        self._number += 1
        if self._number > 2:
            self._say(seconds=seconds, **facts)

    def _say(self, **facts: object) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()


def case_folder(size: str) -> Path:
    """Where the random model of a size lies."""
    return Path(__file__).parents[2] / ".venv-peers" / "models" / size
