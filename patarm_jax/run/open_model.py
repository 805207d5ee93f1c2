"""A model as every story opens it: a folder that is read, weights that are loaded into their places."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.sections import ModelSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.tokenizer import Tokenizer, load_tokenizer
from patarm_jax.files import read_json_object
from patarm_jax.judge.forms import FORMS
from patarm_jax.model import weights
from patarm_jax.model.adapter_files import StoredAdapter, check_adapter, is_adapter, load_adapter, read_adapter
from patarm_jax.model.architecture import Architecture, read_architecture
from patarm_jax.model.for_sampling import fuse_layer, fused_shapes, unstack_layers
from patarm_jax.model.lora import init_adapters, joined, merged
from patarm_jax.model.sharding import TRAIN_RULES, OnMesh, Rules
from patarm_jax.model.transformer import abstract_params, init_params, new_score_head
from patarm_jax.model.weight_files import Stored, digest, read_stored
from patarm_jax.run.process import say
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.types import ModelKind, PolicyKind, UsageError, UserError

POLICY = "policy"  # what judge.json calls a policy, whether it thinks or not
EXPORT = "export"  # the folder of a run that holds the model it made
JUDGE = "judge.json"  # the file of a model that says how it is asked
BASE_DIGEST = "base_digest"  # in that file beside adapters: the digest of the weights that they belong to


def name_of(folder: Path) -> str:
    """What a model's folder is called; of the export of a run, the run."""
    folder = folder.expanduser().resolve()
    return folder.parent.name if folder.name == EXPORT else folder.name


@dataclass(frozen=True)
class Model:
    """A model folder, read but for its weights."""

    folder: Path
    arch: Architecture  # as the weights are, which config.json does not always say
    tokenizer: Tokenizer
    stored: Stored | None  # where its weights lie; None where they are random
    adapter: StoredAdapter | None = None  # what is added to them
    taught: Mapping[str, object] = field(default_factory=dict)  # how it was trained to be asked, from judge.json

    @property
    def judge(self) -> str:
        """What kind of judge it was trained to be, a `types.ModelKind`; empty where nothing says."""
        return str(self.taught.get("judge", ""))

    def holding(self, name: str) -> Path:
        """The folder whose file of this name counts: the adapters' where it has one, else the model's."""
        return _holding(name, self.folder, self.adapter)


def open_model(
    section: ModelSection, judge: ModelKind | None = None, new_head: bool = False, called: str = "model.path"
) -> Model:
    """The model in a Hugging Face folder, or the export of a finished run.

    Everything that is made from the config, such as the shapes of the weights, is made from the one that this gives.

    Args:
        section: which, and how it is loaded.
        judge: how it is asked; None where that is not known. A judge of another kind is refused.
        new_head: a scalar reward model is to be trained: a model that writes may be given too, and gets a head of its
            own, which `load_params` draws.
        called: the setting that names it.
    """
    scalar = judge is not None and FORMS[judge].has_score_head
    folder, adapter = _folders(section, called)
    named = folder if adapter is None else adapter.folder
    stored = None if section.weights == "random" else read_stored(folder)
    arch = read_architecture(folder) if stored is None else stored.arch
    remarks = stored.remarks if stored else ()
    if adapter is not None:
        arch = replace(arch, scalar_head=arch.scalar_head or adapter.has_score_head)
        check_adapter(adapter, arch)
        _refuse_another_base(adapter, stored)
    if new_head and not arch.scalar_head:
        arch = replace(arch, scalar_head=True)
        remarks = (*remarks, f"{folder} writes and gives no reward: it gets a head that does, drawn by run.seed")
    taught = read_json_object(_holding(JUDGE, folder, adapter) / JUDGE) or {}
    tokenizer = load_tokenizer(_holding("tokenizer.json", folder, adapter), folder)
    model = Model(folder, arch, tokenizer, stored, adapter, taught)
    if model.arch.scalar_head != scalar:
        is_, needed = (
            ("a scalar reward model", "one that writes")
            if model.arch.scalar_head
            else ("a model that writes", "a scalar reward model")
        )
        raise UserError(
            f"{named} is {is_}; needed is {needed}. `patarm eval --judge scalar` takes a scalar reward model, "
            "`patarm reward-model` either, every other command one that writes."
        )
    _refuse_another_kind(model, judge)
    if model.tokenizer.vocab_size > model.arch.vocab_size:
        raise UserError(
            f"{named}: the tokenizer has {model.tokenizer.vocab_size} tokens and the model {model.arch.vocab_size}. "
            "They are of different models."
        )
    for remark in remarks:
        say(remark)
    return model


def _folders(section: ModelSection, called: str) -> tuple[Path, StoredAdapter | None]:
    """The folder of the model, and the adapters that belong to it.

    Adapters that are named as the model lead to the one that they were trained on.
    """
    # The settings beside it, where it is a section's path.
    own = called.removesuffix(".path") if called.endswith(".path") else "model"
    if not section.path:
        raise UsageError(f"{called} is empty. Give a Hugging Face folder, or the folder of a finished run.")
    folder = _of_run(called, section.path)
    if section.weights == "random" and (section.adapter or is_adapter(folder)):
        named = f"{own}.adapter {section.adapter}" if section.adapter else f"{own}.path {section.path}"
        raise UsageError(f"{named} holds adapters, and {own}.weights is random. Set {own}.weights to load.")
    if not is_adapter(folder):
        return folder, read_adapter(_of_run(f"{own}.adapter", section.adapter)) if section.adapter else None
    if section.adapter:
        raise UsageError(
            f"{own}.path {section.path} holds adapters, and so does {own}.adapter {section.adapter}. Name the model "
            f"that they belong to as {own}.path."
        )
    adapters = read_adapter(folder)
    base = Path(adapters.base).expanduser()
    if not adapters.base or not base.is_dir():
        named = f"calls it {adapters.base!r}, which is no folder here" if adapters.base else "does not name it"
        remedy = (
            f"Give that model as {own}.path, and this folder as {own}.adapter"
            if called == f"{own}.path"
            else "Merge the two, and give the merged folder"
        )
        raise UserError(
            f"{called} {section.path} holds LoRA adapters alone, and not the model that they belong to; its config "
            f"{named}. {remedy}."
        )
    return _of_run(f"the model that {folder} names,", adapters.base), adapters


def _of_run(name: str, path: str) -> Path:
    """A model's folder; of a run's folder, its export."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name} {path} is not a folder. Give a Hugging Face folder, or the folder of a finished run.")
    if (folder / "config.json").is_file():
        return folder
    if not (folder / "config.yaml").is_file():
        return folder / EXPORT if (folder / EXPORT).is_dir() else folder  # one of the two models of a run
    if all((folder / one).is_dir() for one in ("generator", "judge")):
        raise UserError(
            f"{name} {path} is a run of two models. Give {folder / 'judge'} or {folder / 'generator'} instead."
        )
    if not (folder / EXPORT).is_dir():
        raise UserError(
            f"the run {folder} is not finished, so it has no {EXPORT} folder. Start its command again to finish it, or "
            f"take a checkpoint with `patarm export {folder} OUT`."
        )
    return folder / EXPORT


def _refuse_another_base(adapter: StoredAdapter, stored: Stored | None) -> None:
    """Refuses adapters that one of our runs has trained beside other weights of the same shapes."""
    noted = (read_json_object(adapter.folder / JUDGE) or {}).get(BASE_DIGEST)
    if noted is None or stored is None or not stored.files or noted == digest(stored):
        return
    raise UserError(
        f"the adapters in {adapter.folder} were trained beside other weights (digest {noted}) than those of "
        f"{stored.folder} (digest {digest(stored)}), of the same shapes. Give the model that they were trained on, "
        f"{adapter.base} by their config, as model.path."
    )


def _holding(name: str, folder: Path, adapter: StoredAdapter | None) -> Path:
    return adapter.folder if adapter is not None and (adapter.folder / name).is_file() else folder


# Of each kind that a model can be trained to be: what it does, how it is used, and how it is trained on.
_KINDS = {
    "pointwise": (
        "gives one response a score",
        "patarm judge and patarm eval with --judge pointwise ask it so",
        "sft and grpo train it on with judge: pointwise",
    ),
    "pairwise": (
        "chooses between two responses",
        "patarm judge and patarm eval with --judge pairwise ask it so",
        "sft and grpo train it on with judge: pairwise",
    ),
    "ordinal": (
        "gives a score at once and writes nothing",
        "patarm judge and patarm eval with --judge ordinal ask it so",
        "reward-model trains it on with head: ordinal",
    ),
    "rubric": (
        "writes a rubric for a prompt and judges nothing",
        "patarm judge and patarm eval with --judge rubric_judge take it as --generator",
        "rubric-arm trains it on as generator.path",
    ),
    "checklist": (
        "says which criteria of another model's rubric a response meets",
        "patarm judge and patarm eval with --judge checklist ask it so, with that other as --generator",
        "rubric-arm trains it on as judge.path, with judge.kind: checklist",
    ),
    "rubric_judge": (
        "chooses between two responses by a rubric that another model writes",
        "patarm judge and patarm eval with --judge rubric_judge ask it so, with that other as --generator",
        "rubric-arm trains it on as judge.path",
    ),
    "policy": (
        "answers prompts and judges nothing",
        "patarm policy trains it on",
        "to teach it to judge, remove judge.json from its folder and begin with sft",
    ),
}
_NOUNS = {"rubric": "generator", "policy": "policy"}


def _refuse_another_kind(model: Model, judge: ModelKind | None) -> None:
    """Refuses to ask a model for what it was not trained to give, where it was trained to give something else."""
    was, wanted = model.judge, POLICY if judge in get_args(PolicyKind) else judge
    if wanted in (None, was) or was not in _KINDS:
        return
    if wanted == "scalar" or (
        was in ("pointwise", "pairwise", POLICY) and wanted in ("baseline", "ordinal", "classify")
    ):
        return
    named = model.folder if model.adapter is None else model.adapter.folder
    does, takes, train = _KINDS[was]
    noun = _NOUNS.get(was, "judge")
    kind = "" if was == POLICY else f" of the kind {was}"
    raise UsageError(
        f"{named} is a {noun}{kind}, which {does}, and is to be {judge} here. {takes}{train and '; '}"
        f"{train}. Say so, or give another model."
    )


def other_rubrics(model: Model, name: str, rubrics: str, given: bool) -> str:
    """How a judge that reads rubrics is asked by others than it was trained by, as a sentence; empty where it is not.

    Args:
        model: the judge.
        name: what it is called.
        rubrics: the mode that it is asked in.
        given: whether rubrics from elsewhere stand in place of the primary ones.
    """
    taught = model.taught
    if not taught.get("rubrics") or model.judge not in FORMS or not FORMS[model.judge].reads_rubrics:
        return ""
    by = {True: "with given ones, a generator's or from the data, in place of the primary ones", False: "without"}
    trained = taught["rubrics"], by[bool(taught.get("given_rubrics"))]
    asked = rubrics, by[given]
    if trained == asked:
        return ""
    return (
        f"{name} was trained with rubrics {trained[0]}, {trained[1]}, and is asked with rubrics {asked[0]}, "
        f"{asked[1]}, by which it judges less well"
    )


def load_parts(
    config: TrainConfig, model: Model, mesh: Mesh, shapes: Params, begins: bool = True
) -> tuple[Params | None, Tree]:
    """What is trained as it is before the first update, and what is only read.

    Args:
        config: of the run.
        model: what training starts from.
        mesh: where everything lies.
        shapes: of what is trained, with shardings.
        begins: False of a run that goes on, or of a checkpoint: what is trained is there, and is not loaded.
    """
    load = partial(load_params, config.model, model, mesh, config.run.seed, TRAIN_RULES)
    if not config.lora.rank:
        return (load(np.float32) if begins else None), None
    frozen, shapes = load(config.model.dtype), dict(shapes)
    score = frozen.pop("score", None)  # of a scalar reward model, which trains it beside the adapters
    if not begins:
        return None, frozen
    shapes.pop("score", None)
    adapters = init_adapters(shapes, jax.random.key(config.run.seed))
    return adapters | ({} if score is None else {"score": score.astype(np.float32)}), frozen


def weights_digest(model: Model) -> str:
    """What weights are known by, wherever they lie: see `weight_files.digest`.

    "random" where the config asks for random ones, which the seed and the network say; "" of a folder without weights.
    """
    if model.stored is None:
        return "random"
    found = digest(model.stored) if model.stored.files else ""
    if model.adapter is None:
        return found
    added = f"{found} {digest(model.adapter.stored(model.arch))} {model.adapter.scale!r}"
    return hashlib.sha256(added.encode()).hexdigest()[:16]


def judge_digest(model: Model) -> str:
    """What a judge is known by: its weights, its network and its tokenizer."""
    tokenizer = model.tokenizer
    about = repr((model.arch, tokenizer.stop_ids, sorted(tokenizer.files.items()), weights_digest(model)))
    # Spelled as in the first version, so that the answers kept since then are still this judge's.
    about = about.replace("(Architecture(", "(Qwen3Config(", 1).replace(", model_type='qwen3')", ")", 1)
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def load_params(
    section: ModelSection, model: Model, mesh: Mesh, seed: int, rules: Rules, dtype: DTypeLike, sampling: bool = False
) -> Params:
    """The model's weights in their places, or random ones, when the config asks for them; or as sampling reads them.

    What adapters add is in them. A score head that no file holds is drawn.
    """
    key = jax.random.key(seed)
    if section.weights == "random":
        params = init_params(model.arch, key, mesh, rules)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return _fused(unstack_layers(params), mesh) if sampling else params
    assert model.stored is not None, "weights that are not random lie somewhere"
    without_head = model.arch.scalar_head and not model.stored.arch.scalar_head
    stored = replace(model.stored, arch=model.arch)
    params = weights.load(model.folder, mesh, rules, dtype, sampling, stored, without_head)[0]
    if without_head:
        place = abstract_params(model.arch, mesh, rules)["score"].sharding
        params["score"] = jax.device_put(new_score_head(model.arch, key).astype(dtype), place)
    if model.adapter is not None:
        adapters = load_adapter(model.adapter, model.arch, mesh, rules, sampling)
        if "score" in adapters:
            params["score"] = adapters.pop("score")
        places = jax.tree.map(lambda leaf: leaf.sharding, params)
        scale = model.adapter.scale

        def added(weights: Params, adapters: Params) -> Params:
            return merged(joined(adapters, weights), scale, dtype)

        params = OnMesh(mesh, added, out_shardings=places, donate_argnums=0)(params, adapters)
    if sampling:
        return _fused(params, mesh)
    # They are trained, or trained against: one that is no number would spoil every update.
    refuse_ruined(params, f"the model {model.folder}", "Copy the model again, or give another one")
    return params


def _fused(params: Params, mesh: Mesh) -> Params:
    """Weights whose layers are apart as sampling reads them, fused one by one: no more than one is there twice."""
    places = jax.tree.map(lambda leaf: leaf.sharding, fused_shapes(params["layers_0"]))
    fuse = OnMesh(mesh, fuse_layer, out_shardings=places)
    for name in params:
        if name.startswith("layers_"):
            params[name] = fuse(params[name])
    return params
