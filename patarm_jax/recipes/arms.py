"""What `patarm rubric-arm` begins with: two models, the pairs as each reads them, and the phases that there will be."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.load import lasting_settings
from patarm_jax.config.rubric_arm import ROLES, Role, RubricArmConfig, TurnConfig, WarmupConfig
from patarm_jax.config.sections import DataSection, JudgingSection, SamplingSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import EncodedPair, digest_of, encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.ruled import with_rubric
from patarm_jax.evaluate.heldout import read_heldout
from patarm_jax.evaluate.heldout_rubrics import HeldoutPairs
from patarm_jax.judge.forms import FORMS, Form
from patarm_jax.model.sharding import make_mesh
from patarm_jax.recipes.fitting import fitted, stays_beside
from patarm_jax.recipes.programs import update_of
from patarm_jax.rollout.judging import Judge, make_judge
from patarm_jax.rollout.verdicts import words_of
from patarm_jax.run.claim import folder_of
from patarm_jax.run.devices import tell_devices
from patarm_jax.run.drawing import heldout_sampling
from patarm_jax.run.learner import check_batch, rollout_rules
from patarm_jax.run.open_model import EXPORT, Model, load_params, open_model, weights_digest
from patarm_jax.run.peers import agree
from patarm_jax.run.phases import Phase, step_of
from patarm_jax.run.process import say
from patarm_jax.run.whose import WEIGHTS
from patarm_jax.types import Preference, UsageError, UserError

WARMED_UP = "warmup"  # the folder of a model beside its export: as it was when the rounds began


@dataclass(frozen=True)
class Arm:
    """One of the two models."""

    role: Role
    folder: Path
    model: Model  # what it begins with
    warmup: WarmupConfig
    turn: TurnConfig
    taught: list[EncodedPair]  # the pairs of its warm-up; none without one

    @property
    def form(self) -> Form:
        """How it is asked."""
        return FORMS[self.turn.judge]

    @property
    def warmed_up(self) -> Path:
        """What it was when the rounds began, where there was a warm-up."""
        return self.folder / WARMED_UP

    @property
    def export(self) -> Path:
        """What it was after its last phase of the rounds."""
        return self.folder / EXPORT

    @property
    def room(self) -> Room:
        """Its positions."""
        setting = f"{self.turn.settings_in}sampling.max_new_tokens"
        return Room(self.model.arch.max_position_embeddings, self.turn.sampling.max_new_tokens, setting)

    def asked(self, mesh: Mesh, sampling: SamplingSection, group: int) -> Judge:
        """The model as one that is asked, without its weights."""
        model = self.model
        return make_judge(model.arch, model.tokenizer, mesh, self.turn.model, sampling, group, self.form)

    @property
    def greedy(self) -> SamplingSection:
        """Its likeliest words, as many as in training."""
        return replace(self.turn.sampling, temperature=0.0, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class Arms:
    """Both models, and what they are trained on."""

    config: RubricArmConfig
    mesh: Mesh
    arms: dict[Role, Arm]
    records: list[EncodedPair]  # as the generator reads them; each fits the judge too
    data: str  # tells them from others, as both models read them
    parts: list[list[EncodedPair]]  # those of each round
    heldout: HeldoutPairs | None

    def ruled(self, record: EncodedPair, rubric: str) -> EncodedPair:
        """A pair as the judge reads it by a rubric, in both questions."""
        return _ruled(self.config.data, self.arms["judge"], record, rubric)

    def phases(self) -> list[Phase]:
        """All phases in order."""
        found: list[Phase] = []

        def add(roles: Sequence[Role], name: str, number: int, steps: int, per_epoch: int) -> None:
            """Steps and steps of an epoch are those of each model."""
            first, turns = found[-1].last if found else 0, len(roles)
            found.append(Phase(tuple(roles), name, number, first, first + turns * steps, turns * per_epoch))

        config, warmup = self.config, self.config.warmup
        for role in ROLES if config.is_warmed_up else ():
            per_epoch = len(self.arms[role].taught) // warmup.pairs_per_step
            add([role], f"warm-up of the {role}", 0, warmup.steps or warmup.epochs * per_epoch, per_epoch)
        for number, part in enumerate(self.parts, 1):
            for roles in [config.turns] if config.is_joint else [(role,) for role in config.turns]:
                section = config.section_of(roles[0])
                per_epoch = len(part) // section.pairs_per_step
                name = f"round {number} of {config.rounds}, {' and '.join(roles)}"
                add(roles, name, number, section.steps or config.run.epochs * per_epoch, per_epoch)
        return found

    def identity(self) -> dict[str, object]:
        """What must not change when the run is resumed."""
        taught = {f"{role} is taught": digest_of(arm.taught) for role, arm in self.arms.items() if arm.taught}
        networks = {f"{role} network": asdict(arm.model.arch) for role, arm in self.arms.items()}
        begun: dict[str, dict[str, str]] = {
            role: {"path": arm.turn.model.path, "digest": weights_digest(arm.model)} for role, arm in self.arms.items()
        }
        config = self.config
        return {
            "recipe": config.recipe,
            **networks,
            "dtype": config.model.dtype,
            "data": self.data,
            **taught,
            "seed": config.run.seed,
            "epochs": config.run.epochs,
            **lasting_settings(config),
            WEIGHTS: begun,
        }


def open_arms(config: RubricArmConfig) -> Arms:
    """Opens both models and reads all pairs, the cheapest to refuse first."""
    mesh = make_mesh(config.mesh)
    tell_devices()
    turns = {role: config.turn_of(role) for role in ROLES}
    warmups = {role: config.warmup_of(role) for role in ROLES}
    for role in config.turns:
        _check_batch(mesh, turns[role], f"{role}.pairs_per_step")
    for role in ROLES if config.is_warmed_up else ():
        _check_batch(mesh, warmups[role], "warmup.pairs_per_step")
    models = {role: _open(config, role) for role in ROLES}
    preferences, read = read_preferences(config.data)
    turns = {role: _with_heldout_sampling(one, turns["judge"], models["judge"]) for role, one in turns.items()}
    turns, warmups = _fitted(config, mesh, models, turns, warmups)
    taught = {role: _taught(config, warmups[role], models[role]) for role in ROLES}
    folder = folder_of(config.run)
    arms = {role: Arm(role, folder / role, models[role], warmups[role], turns[role], taught[role]) for role in ROLES}
    records, data = _fit_both(config, arms, preferences, f"{config.data.path}: {read}")
    parts = _parts(config, records)
    trained = [*preferences, *(record.preference for arm in arms.values() for record in arm.taught)]
    return Arms(config, mesh, arms, records, data, parts, _heldout(config, mesh, arms, trained))


def _check_batch(mesh: Mesh, config: TrainConfig, setting: str) -> None:
    check_batch(mesh, config.units_per_step, config.micro_batches, f"{setting} {config.pairs_per_step}")


def _fitted(
    config: RubricArmConfig,
    mesh: Mesh,
    models: dict[Role, Model],
    turns: dict[Role, TurnConfig],
    warmups: dict[Role, WarmupConfig],
) -> tuple[dict[Role, TurnConfig], dict[Role, WarmupConfig]]:
    """Both models' phases, with as many micro-batches as fit beside the other model where the config leaves it open.

    The other one rests as its copy for sampling; where both take turns step by step, its state is there too.
    """
    if config.micro_batches:
        return turns, warmups
    archs = {role: model.arch for role, model in models.items()}
    asleep: dict[Role, list[Tree]] = {role: stays_beside(turns[role], archs[role], mesh)[:1] for role in ROLES}
    if config.is_joint:
        for role in ROLES:
            (state, *_) = update_of(replace(turns[role], micro_batches=1), archs[role], mesh)[1]
            asleep[role] = [*stays_beside(turns[role], archs[role], mesh), state]
    others: dict[Role, Role] = {"judge": "generator", "generator": "judge"}
    found = {}
    for role in ROLES:
        own = stays_beside(turns[role], archs[role], mesh)
        found[role] = fitted(turns[role], archs[role], mesh, [*own, *asleep[others[role]]])
    if config.is_warmed_up:
        warmups = {role: fitted(warmups[role], archs[role], mesh) for role in ROLES}
    return found, warmups


def _with_heldout_sampling(config: TurnConfig, judge: TurnConfig, model: Model) -> TurnConfig:
    """With how held-out pairs are judged, whichever model is trained: what is not set as the judge's rollouts are."""
    sampling = JudgingSection(**asdict(heldout_sampling(judge, model)))
    return replace(config, heldout=replace(config.heldout, sampling=sampling))


def _open(config: RubricArmConfig, role: Role) -> Model:
    called = f"{role}.path" if config.section_of(role).path else "model.path"
    model = open_model(config.model_of(role), config.form_of(role), called=called)
    if FORMS[config.form_of(role)].weighs_words:
        words_of(model.tokenizer)  # refuses a vocabulary without them before anything is trained
    return model


def _taught(config: RubricArmConfig, warmup: WarmupConfig, model: Model) -> list[EncodedPair]:
    """The pairs of a warm-up with what is taught of them."""
    if not config.is_warmed_up:
        return []
    data = replace(config.data, path=config.warmup.path or config.data.path)
    form = FORMS[warmup.judge]
    pairs, read = read_judged_preferences(data, form, "warmup" if config.warmup.path else "data")
    room = Room(model.arch.max_position_embeddings)
    records, encoded = encode_pairs(model.tokenizer, pairs, warmup.rubrics, data, room, form)
    say(f"taught, {data.path}: {read}. Encoded as {form.name}: {encoded}.")
    if len(records) < warmup.pairs_per_step:
        raise UserError(
            f"{len(records):,} usable pairs do not fill one batch of warmup.pairs_per_step {warmup.pairs_per_step:,}. "
            "Lower it, or give more data."
        )
    return records


def _fit_both(
    config: RubricArmConfig, arms: dict[Role, Arm], preferences: Sequence[Preference], read: str
) -> tuple[list[EncodedPair], str]:
    """The pairs that fit both models, as the generator reads them, and a digest of what both read."""
    fit: dict[Role, list[EncodedPair]] = {}
    for role, arm in arms.items():
        fit[role], encoded = encode_pairs(arm.model.tokenizer, preferences, "adaptive", config.data, arm.room, arm.form)
        say(f"{read}. Encoded for the {role}: {encoded}.")
    judged = {record.index: record for record in fit["judge"]}
    both = [record for record in fit["generator"] if record.index in judged]
    if not both:
        raise UserError(
            "no pair fits both models: the prompts of the judge and of the generator that are short enough are of "
            "different pairs. Raise data.max_prompt_tokens."
        )
    return both, f"{digest_of(both)} {digest_of([judged[record.index] for record in both])}"


def _parts(config: RubricArmConfig, records: list[EncodedPair]) -> list[list[EncodedPair]]:
    """The pairs of each round, dealt by the seed; where they do not divide, the first rounds have one more.

    Where a round takes fewer steps than its pairs fill, it has no more than it takes: none is asked about in vain.
    """
    sections = [config.section_of(role) for role in config.turns]
    most = max(section.steps * section.pairs_per_step or len(records) for section in sections)
    order = np.random.default_rng([config.run.seed, 2602]).permutation(len(records))
    parts = [[records[index] for index in sorted(part[:most])] for part in np.array_split(order, config.rounds)]
    smallest = len(parts[-1])
    for role in config.turns:
        needed = config.section_of(role).pairs_per_step
        if smallest < needed:
            raise UsageError(
                f"rounds is {config.rounds}, and its part of the {len(records):,} usable pairs, {smallest:,}, does not "
                f"fill one batch of {role}.pairs_per_step {needed:,}. Lower one of the two, or give more data."
            )
    sizes = " and ".join(f"{size:,}" for size in sorted({len(part) for part in parts}, reverse=True))
    unused = {
        role: sum(len(part) % config.section_of(role).pairs_per_step for part in parts)
        for role in config.turns
        if config.run.epochs == 1 and not config.section_of(role).steps
    }
    left = "".join(
        f"; {count:,} fill no batch of {role}.pairs_per_step and are not learnt from by the {role}"
        for role, count in unused.items()
        if count
    )
    say(f"each round has {sizes} of the {len(records):,} pairs{left}")
    return parts


def _heldout(
    config: RubricArmConfig, mesh: Mesh, arms: dict[Role, Arm], training: Sequence[Preference]
) -> HeldoutPairs | None:
    if not config.heldout.path:
        return None
    preferences, read = read_heldout(config, training)
    records, digest = _fit_both(config, arms, preferences, f"held out, {config.heldout.path}: {read}")
    judge, generator = arms["judge"], arms["generator"]
    agree("the held-out pairs they read", {"number of pairs": len(records), "pairs": digest})
    sampling = heldout_sampling(judge.turn, judge.model)
    return HeldoutPairs(
        generator=generator.asked(mesh, generator.greedy, 1),
        judge=judge.asked(mesh, sampling, config.heldout.votes),
        records=records,
        ruled=partial(_ruled, config.data, judge),
        key=jax.random.fold_in(jax.random.key(config.run.seed), 0),  # training's begin at step 1
    )


def _ruled(data: DataSection, judge: Arm, record: EncodedPair, rubric: str) -> EncodedPair:
    return with_rubric(judge.model.tokenizer, record, rubric, data, judge.room, judge.form)


def resting(arms: Arms, role: Role, since: Phase | None) -> tuple[Model, Params]:
    """A model that is only asked, as it was after its last phase: opened, with its copy for sampling.

    Args:
        arms: both models.
        role: which of them.
        since: that phase; None where it has had none.
    """
    arm, config = arms.arms[role], arms.config
    model, section = arm.model, arm.turn.model
    if since is not None:
        folder = arm.export if since.round else arm.warmed_up
        if step_of(folder) != since.last:
            raise UserError(
                f"{folder} is not of step {since.last}, after which the {role} was to rest there. Give another run "
                "folder to begin anew."
            )
        section = replace(section, path=str(folder), adapter="", weights="load")
        model = open_model(section, config.form_of(role), called=f"the {role} of this run,")
    rules = rollout_rules(config.mesh)
    return model, load_params(section, model, arms.mesh, config.run.seed, rules, section.dtype, sampling=True)


def steps_in_all(phases: Sequence[Phase], role: Role) -> int:
    """Steps of a model in the phases of the rounds."""
    return sum(phase.steps_of_each for phase in phases if role in phase.roles and phase.round)
