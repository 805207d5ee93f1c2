"""By which settings answers are drawn: those that are set, and the model's own for those that are not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from patarm_jax.config.sections import JudgingSection, SamplingSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.judge.forms import FORMS, RUBRIC
from patarm_jax.model.generation import FILE, Drawing, Generation, read_generation
from patarm_jax.run.open_model import Model
from patarm_jax.run.process import say

_DRAWN = ("temperature", "top_k", "top_p")
Training = TypeVar("Training", bound=TrainConfig)


@dataclass(frozen=True)
class Drawn:
    """Settings that are complete, and a line on where they come from."""

    sampling: SamplingSection
    said: str


def as_the_model_says(section: JudgingSection, model: Model) -> Drawn:
    """The settings with what is unset from the model's generation_config.json.

    What that file does not say is as vLLM has it without the file: temperature 1, all tokens.
    """
    generation = read_generation(model.holding(FILE))
    found = {name: getattr(generation, name) for name in _DRAWN}
    return Drawn(_completed(section, found), _said(section, generation))


def as_the_server_says(section: JudgingSection) -> str:
    """A line on what is sent to a server, and what is left to it."""
    left = [name for name in _DRAWN if getattr(section, name) is None]
    sent = [f"{name} {getattr(section, name):g}" for name in _DRAWN if name not in left]
    parts = [f"{_listed(sent)} as set"] if sent else []
    if left:
        parts.append(f"{_listed(left)} not sent, so that the server draws as it does for all")
    return f"sampling: {'; '.join(parts)}"


def with_heldout_sampling(config: Training, model: Model) -> Training:
    """The config with complete settings for the held-out pairs: what is not set is as the run's export will be served.

    GRPO's are drawn as its rollouts are. SFT draws nothing else, so that the base model's generation_config.json holds.
    """
    sampling = heldout_sampling(config, model)
    rollouts = config.rollout_sampling
    if rollouts is None:
        generation = read_generation(model.holding(FILE))
        also = "the held-out pairs and for " if config.heldout.path and config.samples_heldout else ""
        say(f"{_said(config.heldout.sampling, generation)}, for {also}whoever serves the export")
    elif config.heldout.path and (measured := _drawing(sampling)) != (served := _drawing(rollouts)):
        say(f"held-out pairs are judged at {measured}, and the export will be served at {served}")
    if not config.samples_heldout:
        return config
    complete = JudgingSection(**asdict(sampling))
    return replace(config, heldout=replace(config.heldout, sampling=complete))


def heldout_sampling(config: TrainConfig, model: Model) -> SamplingSection:
    """How the held-out pairs of a run are drawn."""
    section = config.heldout.sampling
    if rollouts := config.rollout_sampling:
        return _completed(section, {name: getattr(rollouts, name) for name in (*_DRAWN, "max_new_tokens")})
    generation = read_generation(model.holding(FILE))
    own = {name: getattr(generation, name) for name in _DRAWN}
    return _completed(section, own | {"max_new_tokens": config.data.max_completion_tokens})


def exported_drawing(config: TrainConfig, model: Model) -> Drawing | None:
    """What a run's export says of its drawing: GRPO's rollouts', of SFT that of its held-out pairs; None of no text."""
    if not FORMS[config.judge].writes:
        return None
    if FORMS[config.judge] is RUBRIC:
        return Drawing(0.0, 0, 1.0)  # a generator is asked for its likeliest rubric
    return _drawing(config.rollout_sampling or heldout_sampling(config, model))


def heldout_in_words(config: TrainConfig, model: Model) -> str:
    """What a run's held-out numbers were measured on and how, for its model card; empty where nothing is held out."""
    section = config.heldout
    if not section.path:
        return ""
    pairs = f", the first {section.limit:,} pairs" if section.limit else ""
    if not config.samples_heldout:
        return f"`{section.path}`{pairs}"
    sampling = heldout_sampling(config, model)
    drawn = _drawing(sampling)
    votes = "1 judgement" if section.votes == 1 else f"the mean of {section.votes:,} judgements"
    return f"`{section.path}`{pairs}, {votes} of each response, {drawn}, at most {sampling.max_new_tokens:,} new tokens"


def _drawing(sampling: SamplingSection) -> Drawing:
    return Drawing(sampling.temperature, sampling.top_k, sampling.top_p)


def _completed(section: JudgingSection, found: Mapping[str, float | None]) -> SamplingSection:
    given = {name: value for name, value in asdict(section).items() if value is not None}
    theirs = {name: value for name, value in found.items() if value is not None}
    return SamplingSection(**{**theirs, **given})


def _said(section: JudgingSection, generation: Generation) -> str:
    default = SamplingSection()
    groups: dict[str, list[str]] = {}
    for name in _DRAWN:
        given, theirs = getattr(section, name), getattr(generation, name)
        if given is not None:
            value, source = given, "as set"
        elif theirs is not None:
            value, source = theirs, f"from the model's {generation.source}"
        else:
            value = getattr(default, name)
            source = f"as {generation.source or FILE} says nothing"
        greedy = " (greedy)" if name == "temperature" and value == 0 else ""
        groups.setdefault(source, []).append(f"{name} {value:g}{greedy}")
    parts = [f"{_listed(values)} {source}" for source, values in groups.items()]
    if generation.others:
        others = _listed([f"{name} {value}" for name, value in generation.others.items()])
        parts.append(f"not applied here: {others}, which transformers or vLLM may take from that file")
    return f"sampling: {'; '.join(parts)}"


def _listed(words: list[str]) -> str:
    """Words as a sentence has them.

    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b and c', 'a')
    """
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
