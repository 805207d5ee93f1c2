"""The stages of `patarm data build` that ask a model: what it has answered is kept, and nothing is asked twice."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from patarm_jax.ask.answers import Answer, Kind, Question, open_answers, take_in
from patarm_jax.ask.local import Local
from patarm_jax.ask.remote import Remote
from patarm_jax.config.building import BuildConfig, StageSection
from patarm_jax.corpus.judged import by_rules, classified, judged, taught
from patarm_jax.corpus.rows import Pair
from patarm_jax.corpus.stages import Sifted
from patarm_jax.judge.forms import CLASSIFY, PAIRWISE, POINTWISE, Form
from patarm_jax.recipes.judges import ask, open_any, refuse_lost
from patarm_jax.run.process import say

Shard = tuple[int, int]  # this one, from 1, and how many there are


def classify(
    config: BuildConfig, stage: StageSection, here: Path, pairs: Sequence[Pair], shard: Shard
) -> tuple[Sifted, dict[str, int], str] | None:
    """Rows with their domains, how many were sorted by what, and the model's name; None where it is not at an end."""
    said: Mapping[tuple[str, int], list[Answer]] = {}
    name = ""
    if stage.model.path or stage.endpoint.url:
        asked = [
            pair
            for pair in pairs
            if (not stage.corpora or pair.corpus in stage.corpora) and by_rules(pair, stage.rules) is None
        ]
        questions = {
            (pair.id, 0): Question(pair.id, place, CLASSIFY.ask(pair.prompt, domain="chat", rubrics="adaptive"))
            for place, pair in enumerate(asked)
        }
        found = _answers(config, stage, here / "answers.jsonl", CLASSIFY, questions, 1, shard)
        if found is None:
            return None
        said, name = found
    return *classified(pairs, stage, {pair: one for (pair, _), (one,) in said.items()}), name


def judge(
    config: BuildConfig, stage: StageSection, here: Path, pairs: Sequence[Pair], shard: Shard
) -> tuple[Sifted, str] | None:
    """Rows with a judge's scores, and its name; None where it is not at an end."""
    found = _answers(config, stage, here / "answers.jsonl", POINTWISE, _of_sides(stage, pairs), stage.votes, shard)
    return found and (judged(pairs, stage, found[0]), found[1])


def teach(
    config: BuildConfig, stage: StageSection, here: Path, pairs: Sequence[Pair], shard: Shard
) -> tuple[Sifted, str] | None:
    """Rows with a teacher's judgements, and its name; None where it is not at an end."""
    learners = [pair for pair in pairs if pair.part != "rl"]
    name, found = "", []
    for form, of in ((POINTWISE, _of_sides), (PAIRWISE, _of_both)):
        said: dict[tuple[str, int], list[Answer]] = {}
        if form.name in stage.forms:
            answered = _answers(config, stage, here / f"{form.name}.jsonl", form, of(stage, learners), 1, shard)
            if answered is None:
                return None
            said, name = answered
        found.append({place: one for place, (one,) in said.items()})
    return taught(pairs, stage, *found), name


def _of_sides(stage: StageSection, pairs: Sequence[Pair]) -> dict[tuple[str, int], Question]:
    """A question about each response, by id and side."""
    return {
        (pair.id, side): Question(
            f"{pair.id}/{POINTWISE.places[side]}",
            2 * place + side,
            POINTWISE.ask(pair.prompt, response, domain=pair.domain, rubrics=stage.rubrics),
        )
        for place, pair in enumerate(pairs)
        for side, response in enumerate((pair.chosen, pair.rejected))
    }


def _of_both(stage: StageSection, pairs: Sequence[Pair]) -> dict[tuple[str, int], Question]:
    """A question about both responses in either order, by id and whether the chosen one stands second."""
    return {
        (pair.id, order): Question(
            f"{pair.id}/{PAIRWISE.places[order]}",
            2 * place + order,
            PAIRWISE.ask(pair.prompt, *shown, domain=pair.domain, rubrics=stage.rubrics),
        )
        for place, pair in enumerate(pairs)
        for order, shown in enumerate(((pair.chosen, pair.rejected), (pair.rejected, pair.chosen)))
    }


def _answers(
    config: BuildConfig,
    stage: StageSection,
    path: Path,
    form: Form,
    questions: Mapping[tuple[str, int], Question],
    votes: int,
    shard: Shard,
) -> tuple[dict[tuple[str, int], list[Answer]], str] | None:
    """What the model of a stage answers, and its name; None where it was asked to stop, or for its shard alone."""
    number, shards = shard
    own = path if shards == 1 else path.with_name(f"{path.stem}.shard-{number}-of-{shards}.jsonl")
    model = open_any(
        stage.model, stage.endpoint, config.mesh, stage.sampling, form, votes, stage.seed, stage.max_prompt_tokens, own
    )
    identity = {"form": form.name, "rubrics": stage.rubrics, **model.identity}
    every = list(questions.values())
    mine = every[number - 1 :: shards]
    with open_answers(own, identity) as answers:
        take_in(answers, sorted(path.parent.glob(f"{path.stem}*.jsonl")), identity)  # of shards
        say(f"{len(mine):,} questions to {model.name}" + (f", shard {number} of {shards}" if shards > 1 else ""))
        if not ask(model, form, answers, mine):
            return None
        refuse_lost([one for question in mine for one in answers.of(question, votes)], "answers", "written")
        if shards > 1:
            say(f"shard {number} of {shards} is answered; when all are, run the command without --shard")
            return None
        _tell_lost(form, model, [one for question in every for one in answers.of(question, votes)])
        return {place: answers.of(question, votes) for place, question in questions.items()}, model.name


def _tell_lost(form: Form, model: Local | Remote, answers: Sequence[Answer]) -> None:
    """Says how many answers were none."""
    without = [one for one in answers if one.status != "OK"]
    if without:
        refused = sum(one.kind in (Kind.REFUSED, Kind.TOO_LONG) for one in without)
        say(
            f"{len(without):,} of {len(answers):,} answers of {model.name} could not be read as {form.name}, "
            f"{refused:,} of them refused or too long; the first one: {without[0].reason}"
        )
