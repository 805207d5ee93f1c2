"""The models that are asked: a judge, here or behind an endpoint, and the generator of rubrics that it may have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patarm_jax.arrays import Params
from patarm_jax.ask.answers import Answer, Answers, Question, identity_of, missing, read_answers
from patarm_jax.ask.endpoint import ask_endpoint
from patarm_jax.ask.estimate import estimate
from patarm_jax.ask.local import Local, ask_local, open_local
from patarm_jax.ask.remote import Remote, ask_name
from patarm_jax.ask.shared import agree_on_questions, done_by_all, shared_answers
from patarm_jax.config.recipes import AskingConfig, RubricsConfig
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.config.sections import (
    DataSection,
    EndpointSection,
    JudgingSection,
    MeshSection,
    ModelSection,
    SamplingSection,
)
from patarm_jax.evaluate.rubrics import (
    Prompted,
    Written,
    counted,
    hardly_usable,
    prompt_of,
    rubric_questions,
    rubrics_shown,
)
from patarm_jax.judge.forms import FORMS, RUBRIC, Form
from patarm_jax.run.drawing import as_the_server_says
from patarm_jax.run.open_model import other_rubrics
from patarm_jax.run.process import say
from patarm_jax.types import BY_RUBRICS, UsageError, UserError


@dataclass(frozen=True)
class Rubrics:
    """A generator's rubrics."""

    shown: Mapping[str, str]  # by `prompt_of`
    written: Written | None = None  # what became of them
    cost: str = ""  # what those will cost that are not there, of a dry run


def ask_for_rubrics(
    generator: Local | Remote,
    path: Path,
    whole: Sequence[Prompted],
    asked: Sequence[Prompted],
    about: Mapping[str, object],
    dry_run: bool,
) -> Rubrics | None:
    """The rubrics of some prompts, those asked for that are not there; None when it was asked to stop.

    Args:
        generator: that writes them.
        path: the file that keeps them.
        whole: all that may ever be asked about.
        asked: what is asked about now.
        about: tells these prompts from others, beside what the generator's answers depend on.
        dry_run: whether nothing is asked, and only said what it would cost.
    """
    every, identity = rubric_questions(whole), {**about, **generator.identity}
    questions = list({prompt: every[prompt] for prompt in map(prompt_of, asked)}.values())
    if dry_run:
        known = read_answers(path, identity)
        return Rubrics(rubrics_shown(every, known), cost=estimate(generator, missing(known, questions, 1)))
    agree_on_questions(identity, questions)
    with shared_answers(path, identity) as answers:
        say(f"rubrics of {len(questions):,} prompts by {generator.name}")
        finished = ask(generator, RUBRIC, answers, questions)
    if not done_by_all(finished):
        return None
    given = [answers.known[question.key, 0] for question in questions]
    refuse_lost(given, "rubrics", "judged")
    written = counted(generator.name, given)
    if caution := hardly_usable(written):
        say(caution)
    return Rubrics(rubrics_shown(every, answers.known), written)


def refuse_lost(answers: Sequence[Answer], what: str, nothing_is: str) -> None:
    """Raises UserError where some of the answers never came."""
    lost = [answer for answer in answers if not answer.came]
    if lost:
        raise UserError(
            f"{len(lost):,} of {len(answers):,} {what} never came, the first one because: {lost[0].reason}. Nothing is "
            f"{nothing_is}. When that is put right, run the same command again to ask for what failed."
        )


def open_generator(
    config: AskingConfig | RubricsConfig, rubrics: Path, dry_run: bool, begun: str = ""
) -> Local | Remote:
    """The model that writes rubrics into a file; `begun` as of `open_judge`."""
    section, longest = config.generator, config.data.max_prompt_tokens
    sampling = config.generator_sampling
    if not section.endpoint.url:
        drawn = sampling, 1, config.seed, longest
        return open_local(section.model, config.mesh, *drawn, "rubric", called="generator.model.path")
    return _open_remote(section.endpoint, sampling, RUBRIC, 1, config.seed, rubrics, dry_run, begun)


def open_judge(config: AskingConfig, answers: Path, dry_run: bool, begun: str = "") -> Local | Remote:
    """The judge whose answers a file keeps.

    Args:
        config: names it.
        answers: the file.
        dry_run: whether nothing is asked.
        begun: the name of the server's model that has answered before, where the file does not say it any more.
    """
    form = FORMS[config.judge]
    if not form.reads_rubrics and config.rubrics != "adaptive":
        reads = "a generator's alone" if config.judge in BY_RUBRICS else "none"
        raise UsageError(f"rubrics is {config.rubrics}, and a {config.judge} judge reads {reads}. Leave it out.")
    if not config.endpoint.url:
        longest = config.data.max_prompt_tokens
        if not form.writes and config.votes > 1:
            kind = f"a reward model ({config.judge})"
            raise UsageError(f"votes is {config.votes}; allowed for {kind} is 1: its score is always the same.")
        drawn, expects = (config.sampling, config.votes, config.seed, longest), config.expected_score
        local = open_local(config.model, config.mesh, *drawn, config.judge, expects=expects)
        given = config.has_generator or config.data.given_rubrics
        if form.reads_rubrics and (caution := other_rubrics(local.model, local.name, config.rubrics, given)):
            say(f"{caution}. --rubrics, --generator and --data.given_rubrics say by which it is asked")
        return local
    if config.model.path:
        raise UsageError("both a model and --endpoint.url are given. Give one; the server's model is endpoint.model.")
    if not form.writes:
        raise UsageError(
            f"a reward model ({config.judge}) writes nothing that a server could send. Give the model's folder "
            "instead of --endpoint.url, or another --judge."
        )
    if form.weighs_words:
        raise UsageError(
            f"a {config.judge} judge counts how likely the words true and false were, and what a server says of that "
            "is not asked for. Give the model's folder instead of --endpoint.url."
        )
    return _open_remote(config.endpoint, config.sampling, form, config.votes, config.seed, answers, dry_run, begun)


def open_policy(config: PolicyEvalConfig, answers: Path, dry_run: bool) -> Local | Remote:
    """The policy whose responses a file keeps; `dry_run` as of `open_judge`."""
    if not config.endpoint.url:
        drawn = config.sampling, config.n, config.seed, config.data.max_prompt_tokens
        return open_local(config.model, config.mesh, *drawn, config.policy)
    form = FORMS[config.policy]
    return _open_remote(config.endpoint, config.sampling, form, config.n, config.seed, answers, dry_run, begun="")


def open_any(
    model: ModelSection,
    endpoint: EndpointSection,
    mesh: MeshSection,
    sampling: JudgingSection,
    form: Form,
    votes: int,
    seed: int,
    longest: int,
    answers: Path,
) -> Local | Remote:
    """A model here or, where an endpoint is named, behind it, whose answers a file keeps."""
    if not endpoint.url:
        return open_local(model, mesh, sampling, votes, seed, longest, form.name)
    return _open_remote(endpoint, sampling, form, votes, seed, answers, dry_run=False, begun="")


def open_responses_judge(config: PolicyEvalConfig, judgements: Path) -> tuple[Local | Remote, Form]:
    """The judge of a policy's responses, whose answers a file keeps, and how it is asked."""
    section = config.judge
    sampling = section.sampling
    if sampling.max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=1024)
    asking = AskingConfig(
        judge=section.kind,
        model=section.model,
        endpoint=section.endpoint,
        mesh=config.mesh,
        data=DataSection(max_prompt_tokens=section.max_prompt_tokens),
        sampling=sampling,
        rubrics=section.rubrics,
        votes=section.votes,
        expected_score=section.expected_score,
        seed=config.seed,
    )
    asking.check()
    return open_judge(asking, judgements, dry_run=False), FORMS[section.kind]


def open_answering(config: PolicyEvalConfig, judgements: Path, dry_run: bool) -> Local | Remote:
    """The judge that answers questions about a policy's responses, whose answers a file keeps."""
    judge = config.judge
    sampling = judge.sampling
    if sampling.temperature is None:
        sampling = replace(sampling, temperature=0.0)
    if sampling.max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=256)
    if not judge.endpoint.url:
        drawn = sampling, 1, config.seed, judge.max_prompt_tokens
        return open_local(judge.model, config.mesh, *drawn, judge.form, called="judge.model.path")
    form = FORMS[judge.form]
    return _open_remote(judge.endpoint, sampling, form, 1, config.seed, judgements, dry_run, begun="")


def _open_remote(
    section: EndpointSection,
    sampling: JudgingSection,
    form: Form,
    votes: int,
    seed: int,
    answers: Path,
    dry_run: bool,
    begun: str,
) -> Remote:
    begun = str((identity_of(answers) or {}).get("endpoint model", begun))
    # A dry run plans for a server that may not be up yet, and a finished evaluation for one that may not be any more.
    name = section.model or begun or ("" if dry_run else ask_name(section))
    if sampling.max_new_tokens is None:  # a limit is always sent: without one, a server writes without end
        sampling = replace(sampling, max_new_tokens=SamplingSection().max_new_tokens)
    say(f"{'generator: ' if form is RUBRIC else ''}{as_the_server_says(sampling)}")
    if not form.thinks and section.thinking == "server":
        section = replace(section, thinking="off")
    return Remote(section=section, name=name, sampling=sampling, votes=votes, seed=seed)


def ask(
    judge: Local | Remote,
    form: Form,
    answers: Answers,
    questions: Sequence[Question],
    weights: Callable[[], Params] | None = None,
) -> bool:
    """Answers what is not answered yet; False when it was asked to stop before the end. `weights` as of `ask_local`."""
    if isinstance(judge, Remote):
        return ask_endpoint(judge, answers, questions, form.read)
    return ask_local(judge, answers, questions, weights)


def refuse_many_processes(config: AskingConfig | RubricsConfig | PolicyEvalConfig) -> None:
    """Refuses several processes where a server is asked."""
    if config.mesh.distributed != "none" and config.has_endpoint:
        raise UsageError("a model behind an endpoint is asked by one process. Set mesh.distributed to none.")
