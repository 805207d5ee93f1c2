"""The config of a judge that another trainer asks for its rewards."""

from dataclasses import dataclass, field

from patarm_jax.config.sections import (
    FREE,
    PLACE,
    AboveZero,
    EndpointSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    Number,
    Positive,
    Section,
    Seed,
    Votes,
)
from patarm_jax.types import Domain, OpensThinking, RubricMode, UsageError


@dataclass(frozen=True)
class AdapterConfig(Section):
    """A pointwise judge as the reward of TRL, verl, OpenRLHF or Tunix."""

    # The server of the judge. Its own defaults are longer: here a training step waits.
    endpoint: EndpointSection = field(default_factory=lambda: EndpointSection(timeout=120.0, tries=3, busy=600.0))
    model: ModelSection = field(default_factory=ModelSection)  # in its place, of TRL and Tunix, a judge in this process
    mesh: MeshSection = field(default_factory=MeshSection)  # of a judge in this process
    rubrics: RubricMode = "adaptive"  # the rubrics that its prompt holds, or asks for
    domain: Domain = "chat"  # of a prompt whose row names none
    domain_column: str = "domain"  # of the trainer's rows, or of verl's extra_info; "": all prompts are of `domain`
    votes: Votes = 1  # judgements of each response, whose mean is its reward
    sampling: JudgingSection = field(default_factory=lambda: JudgingSection(max_new_tokens=1024))
    max_prompt_tokens: Positive = 16384  # of a judge in this process; a longer prompt has no reward
    sees_thinking: bool = False  # whether it sees the thinking before an answer too
    # Whether the policy's chat template writes `<think>` itself, so that responses begin inside the thinking. auto: yes
    # once one held `</think>` alone; then one that was cut off before it has no answer.
    opens_thinking: OpensThinking = "auto"
    # Seconds that a call of the reward function waits. What has no answer by then has no reward; what is under way is
    # kept when it comes, and what is not sent yet is not sent. OpenRLHF, which waits for 180 s: 150.
    time_limit: AboveZero = field(default=1800.0, metadata=FREE)
    # What a response that could not be judged is given; null: None, which TRL leaves out of its group's baseline. verl
    # and OpenRLHF stop or fail at it.
    missing: Number | None = None
    # The folder of the answers, which are never asked for twice; several processes may share it. "": kept in memory.
    kept: str = field(default="judge-answers", metadata=PLACE)
    seed: Seed = 0  # random seed for sampling

    def check(self) -> None:
        """Refuses no judge, and two."""
        if bool(self.endpoint.url) == bool(self.model.path):
            both = "both endpoint.url and model.path are given" if self.endpoint.url else "no judge is named"
            raise UsageError(
                f"{both}. Give endpoint.url, such as http://host:8000/v1, or model.path, the folder of a judge that is "
                "to run in this process."
            )
