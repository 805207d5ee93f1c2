"""A judge as others load it: a Hugging Face folder with weights, tokenizer, chat template and model card."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.tokenizer import Tokenizer, save_tokenizer
from patarm_jax.files import appearing_whole, write_text
from patarm_jax.model import weights
from patarm_jax.model.adapter_files import save_adapter
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.weights import save_generation
from patarm_jax.run.card import JUDGES, AdapterFacts, ModelCardFacts, model_card
from patarm_jax.run.learner import whole_weights
from patarm_jax.run.open_model import BASE_DIGEST, JUDGE, POLICY, Model, name_of, weights_digest
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.types import PolicyKind, UsageError

_NOT_EXPORTED = "nothing is exported", "Export an earlier checkpoint, `patarm export RUN/checkpoints/STEP OUT`"


def write_export(
    folder: Path,
    params: Params,
    arch: Architecture,
    tokenizer: Tokenizer,
    card: ModelCardFacts,
    dtype: str = "bfloat16",
    replace: bool = False,
    noted: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Writes a folder that transformers, vLLM and `patarm judge` load as it is; it appears whole or not at all.

    All processes must call it; the first one writes.

    Args:
        folder: must not exist, or be empty.
        params: the trained parameters, sharded in any way.
        arch: the network's shape.
        tokenizer: written as it was read; its stop ids become the model's.
        card: the facts for README.md.
        dtype: of the stored weights: "bfloat16", "float16" or "float32".
        replace: a folder that is not empty makes room for the new one, when that is whole.
        noted: what judge.json says besides.

    Raises:
        UserError: when the folder is not empty, or cannot be written, or when the weights are ruined.
    """
    refuse_ruined(params, *_NOT_EXPORTED)
    with appearing_whole(folder, replace) as part:
        ids: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
        weights.save(params, arch, part, dtype=dtype, drawing=card.drawing, **ids)
        if jax.process_index() == 0:
            save_tokenizer(tokenizer, part)
            _write_judge(part, card, name_of(folder), tokenizer.opening, noted)


def export_trained(
    folder: Path,
    config: TrainConfig,
    model: Model,
    mesh: Mesh,
    params: Params,
    frozen: Tree,
    card: ModelCardFacts,
    replace: bool = False,
    noted: Mapping[str, object] = MappingProxyType({}),
    dtype: str = "",
) -> None:
    """Exports what a run has trained as its config says: a whole model, or adapters alone, in PEFT's format.

    Args:
        folder: see `write_export`, as for what follows that is not said here.
        config: of the run.
        model: what training started from.
        mesh: where the parameters lie.
        params: what is trained.
        frozen: what is only read.
        card: the facts for README.md.
        replace: whether a folder that is not empty makes room.
        noted: what judge.json of a whole model says besides.
        dtype: of a whole model's weights; empty: that of the config.
    """
    refuse_adapters_of_no_model(config, model)
    if exports_adapters(config):
        _write_adapter(folder, params, config, model, card, replace)
        return
    whole = whole_weights(config, model.arch, mesh, params, frozen)
    write_export(folder, whole, model.arch, model.tokenizer, card, dtype or config.model.dtype, replace, noted)


def exports_adapters(config: TrainConfig) -> bool:
    """Whether a run's export holds adapters alone."""
    return bool(config.lora.rank) and config.lora.export == "adapter"


def refuse_adapters_of_no_model(config: TrainConfig, model: Model) -> None:
    """Refuses to export adapters alone where the weights beside them are those of adapters merged before."""
    if exports_adapters(config) and model.adapter is not None:
        raise UsageError(
            f"lora.export is adapter, and model.path {config.model.path} holds adapters itself: no folder holds the "
            "merged weights that new ones would belong to. Set lora.export to merged."
        )


def _write_adapter(
    folder: Path, params: Params, config: TrainConfig, model: Model, card: ModelCardFacts, replace: bool
) -> None:
    """A folder of adapters, with what says how the judge is asked and served."""
    refuse_ruined(params, *_NOT_EXPORTED)
    base = str(model.folder.resolve())
    card = dataclasses.replace(card, adapters=AdapterFacts(base, config.lora.rank, model.tokenizer.stop_ids))
    with appearing_whole(folder, replace) as part:
        save_adapter(params, model.arch, config.lora, base, part)
        if jax.process_index() == 0:
            save_tokenizer(model.tokenizer, part)
            if card.drawing is not None:
                save_generation(part, model.arch, card.drawing, model.tokenizer.stop_ids, model.tokenizer.pad_id)
            beside = {BASE_DIGEST: weights_digest(model)}
            _write_judge(part, card, name_of(folder), model.tokenizer.opening, beside)


def _write_judge(
    part: Path, card: ModelCardFacts, name: str, opening: str, further: Mapping[str, object] = MappingProxyType({})
) -> None:
    """How the judge is asked, for programs and for people."""
    rubrics: dict[str, object] = {"rubrics": card.rubrics} if card.judge in JUDGES else {}
    rubrics |= {"given_rubrics": True} if card.given_rubrics else {}
    kind = POLICY if card.judge in get_args(PolicyKind) else card.judge
    write_text(part / JUDGE, json.dumps({"judge": kind} | rubrics | dict(further)) + "\n")
    model_card(card, card.name or name, opening).save(part / "README.md")
