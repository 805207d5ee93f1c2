"""A model as every story opens it: a folder that is read, weights that are loaded into their places."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from patarm_jax.arrays import Params
from patarm_jax.config.sections import ModelSection
from patarm_jax.data.tokenizer import Tokenizer, load_tokenizer
from patarm_jax.files import read_json_object
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture, read_architecture
from patarm_jax.model.sharding import Rules
from patarm_jax.model.transformer import init_params, unstack_layers
from patarm_jax.model.weight_files import Stored, digest, read_stored
from patarm_jax.run.process import say
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.types import JudgeKind, UsageError, UserError

EXPORT = "export"  # the folder of a run that holds the model it made
JUDGE = "judge.json"  # the file of a model that says how it is asked


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
    judge: str = ""  # what kind of judge it was trained to be, a `types.JudgeKind`; empty where nothing says


def open_model(section: ModelSection, judge: JudgeKind | None = None, new_head: bool = False) -> Model:
    """The model in a Hugging Face folder, or the export of a finished run.

    Everything that is made from the config, such as the shapes of the weights, is made from the one that this gives.

    Args:
        section: which, and how it is loaded.
        judge: how it is asked; None where that is not known. A judge of another kind is refused.
        new_head: a scalar reward model is to be trained: a model that writes may be given too, and gets a head of its
            own, which `load_params` draws.
    """
    scalar = judge == "scalar"
    path = section.path
    if not path:
        raise UsageError("model.path is empty. Give a Hugging Face folder, or the folder of a finished run.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path {path} is not a folder. Give a Hugging Face folder, or the folder of a finished run."
        )
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        if not (folder / EXPORT).is_dir():
            raise UserError(
                f"the run {folder} is not finished, so it has no {EXPORT} folder. Start its command again to finish "
                f"it, or take a checkpoint with `patarm export {folder} OUT`."
            )
        folder = folder / EXPORT
    stored = None if section.weights == "random" else read_stored(folder)
    arch = read_architecture(folder) if stored is None else stored.arch
    remarks = stored.remarks if stored else ()
    if new_head and not arch.scalar_head:
        arch = replace(arch, scalar_head=True)
        remarks = (*remarks, f"{folder} writes and gives no reward: it gets a head that does, drawn by run.seed")
    model = Model(folder=folder, arch=arch, tokenizer=load_tokenizer(folder), stored=stored, judge=_kind(folder))
    if model.arch.scalar_head != scalar:
        is_, needed = (
            ("a scalar reward model", "one that writes")
            if model.arch.scalar_head
            else ("a model that writes", "a scalar reward model")
        )
        raise UserError(
            f"{folder} is {is_}; needed is {needed}. `patarm eval --judge scalar` takes a scalar reward model, "
            "`patarm reward-model` either, every other command one that writes."
        )
    _refuse_another_kind(model, judge)
    if model.tokenizer.vocab_size > model.arch.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {model.tokenizer.vocab_size} tokens and the model {model.arch.vocab_size}. "
            "They are of different models."
        )
    for remark in remarks:
        say(remark)
    return model


def _kind(folder: Path) -> str:
    return str((read_json_object(folder / JUDGE) or {}).get("judge", ""))


def _refuse_another_kind(model: Model, judge: JudgeKind | None) -> None:
    """Refuses to ask a judge of pairs for a score, and one of single responses for a choice."""
    if {model.judge, judge} != {"pointwise", "pairwise"}:
        return
    does, takes = {
        "pointwise": ("gives one response a score", "patarm judge, and patarm eval with --judge pointwise, ask it so"),
        "pairwise": ("chooses between two responses", "patarm eval with --judge pairwise asks it so"),
    }[model.judge]
    raise UsageError(
        f"{model.folder} is a {model.judge} judge, which {does}, and is to be a {judge} one here. {takes}; sft and "
        f"grpo train it on with judge: {model.judge}. Say so, or give another model."
    )


def weights_digest(model: Model) -> str:
    """What weights are known by, wherever they lie: see `weight_files.digest`.

    "random" where the config asks for random ones, which the seed and the network say; "" of a folder without weights.
    """
    if model.stored is None:
        return "random"
    return digest(model.stored) if model.stored.files else ""


def judge_digest(model: Model) -> str:
    """What a judge is known by: its weights, its network and its tokenizer."""
    tokenizer = model.tokenizer
    about = repr((model.arch, tokenizer.stop_ids, sorted(tokenizer.files.items()), weights_digest(model)))
    # Spelled as in the first version, so that the answers kept since then are still this judge's.
    return hashlib.sha256(about.replace("(Architecture(", "(Qwen3Config(", 1).encode()).hexdigest()[:16]


def load_params(
    section: ModelSection, model: Model, mesh: Mesh, seed: int, rules: Rules, dtype: DTypeLike, unstacked: bool = False
) -> Params:
    """The model's weights in their places, or random ones, when the config asks for them; `unstacked` for sampling."""
    if section.weights == "random":
        params = init_params(model.arch, jax.random.key(seed), mesh, rules)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return unstack_layers(params) if unstacked else params
    assert model.stored is not None, "weights that are not random lie somewhere"
    stored, head_key = model.stored, None
    if model.arch.scalar_head and not stored.arch.scalar_head:
        stored, head_key = replace(stored, arch=model.arch), jax.random.key(seed)
    params = weights.load(model.folder, mesh, rules, dtype, unstacked, stored, head_key)[0]
    if not unstacked:  # they are trained, or trained against: one that is no number would spoil every update
        refuse_ruined(params, f"the model {model.folder}", "Copy the model again, or give another one")
    return params
