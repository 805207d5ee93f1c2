"""Weights on disk: Hugging Face folders ⇄ sharded parameters. Tokenizers and model cards are not written here."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from patarm_jax.arrays import Params
from patarm_jax.files import appearing_whole, write_json
from patarm_jax.model.architecture import Architecture, to_hf
from patarm_jax.model.generation import FILE, Drawing, to_generation_config
from patarm_jax.model.layout import SCORE, Entry, HFTensor, hf_tensors, read_into, table_of, tensor_shapes
from patarm_jax.model.sharding import TRAIN_RULES, Rules
from patarm_jax.model.transformer import abstract_params
from patarm_jax.model.weight_files import HEAD, INDEX, Stored, check_file, no_weights, read_stored, write_file
from patarm_jax.types import UserError

# ---------------------------------------------------------------------------------------------------------- reading


def load(
    folder: Path | str,
    mesh: Mesh | None = None,
    rules: Rules = TRAIN_RULES,
    dtype: DTypeLike = jnp.float32,
    unstacked: bool = False,
    stored: Stored | None = None,
    without_head: bool = False,
) -> tuple[Params, Architecture]:
    """Parameters and config of a Hugging Face folder of a Qwen3 or Qwen2, in one file or in shards.

    The config is as the weights are: not tied where the files hold a head that is not the embedding.

    Args:
        folder: holds config.json and safetensors in bfloat16, float16 or float32.
        mesh: where the parameters are placed; None: on the default device.
        rules: how they are placed.
        dtype: the dtype they are given.
        unstacked: with a subtree for each layer, as `for_sampling.unstack_layers` gives, but never stacked on the way.
        stored: what `read_stored` found in the folder; None: it is read now.
        without_head: the files do not have the score head of the config, which is left out.

    Raises:
        UserError: naming file and tensor, when a file is missing or cut short, a tensor is missing, unknown or of
            another shape than config.json says.
    """
    stored = stored or read_stored(Path(folder))
    arch = stored.arch
    abstract = abstract_params(arch, mesh, rules, dtype)
    table = [entry for entry in table_of(arch) if entry.name != SCORE or not without_head]
    _refuse_another_model(stored, table, abstract)
    params: Params = {}
    read_into(params, table, abstract, stored.files, arch.num_hidden_layers, unstacked)
    return params, arch


def _refuse_another_model(stored: Stored, table: Sequence[Entry], abstract: Params) -> None:
    """All that can be wrong with the tensors is found before a weight is read."""
    arch, files = stored.arch, stored.files
    if not files:
        raise no_weights(stored)
    wanted = tensor_shapes(table, abstract, arch.num_hidden_layers)
    if missing := sorted(wanted.keys() - files.keys()):
        raise UserError(
            f"{stored.listing}: tensor {missing[0]} is missing ({len(missing)} missing in all). "
            "The weights are incomplete, or config.json is of another model."
        )
    # A tied model may carry a copy of its head, which is the embedding; one that gives a score has no use for it.
    spare = {HEAD} if arch.tie_word_embeddings or arch.scalar_head else set()
    if extra := sorted(files.keys() - wanted.keys() - spare):
        raise UserError(
            f"{files[extra[0]]}: tensor {extra[0]} is not part of the {arch.name} in config.json ({len(extra)} such in "
            "all). The weights and the config are of different models."
        )
    for file in stored.weight_files:
        check_file(file, {name: shape for name, shape in wanted.items() if files[name] == file})


# ---------------------------------------------------------------------------------------------------------- writing


def save(
    params: Params,
    arch: Architecture,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    stop_ids: tuple[int, ...] = (),
    pad_id: int | None = None,
    drawing: Drawing | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes config.json, generation_config.json and safetensors (shards with an index when large) into `folder`.

    All processes must call it; the first one writes. The folder appears whole or not at all.

    Args:
        params: as from `load`.
        arch: the network's shape.
        folder: must not exist, or be empty.
        dtype: of the stored tensors: "bfloat16", "float16" or "float32".
        stop_ids: written as generation_config's eos_token_id; the first one is config.json's.
        pad_id: generation_config's pad_token_id; of a scalar reward model, config.json's.
        drawing: how transformers and vLLM are to sample unless they are told; None: at temperature 1, all tokens.
        max_shard_size: of one file, as huggingface_hub reads it.

    Raises:
        UserError: when the folder is not empty or the disk is full.
    """
    tensors = {
        tensor.name: tensor for tensor in hf_tensors(params, table_of(arch), arch.num_hidden_layers, np.dtype(dtype))
    }
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,  # no two tensors share storage
        max_shard_size=max_shard_size,
    )
    first = jax.process_index() == 0
    with appearing_whole(folder) as part:
        for file, names in plan.filename_to_tensors.items():
            write_tensors(part / file, [tensors[name] for name in names])
        if first:
            if plan.is_sharded:
                index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
                write_json(part / INDEX, index | {"weight_map": plan.tensor_to_filename})
            # A classifier's score is that of the last token that is not the padding's, so its config must say which.
            padding = {"pad_token_id": pad_id} if arch.scalar_head else {}
            write_json(part / "config.json", to_hf(arch, dtype) | _first_eos(stop_ids) | padding)
            if arch.scalar_head:
                return  # it writes nothing that would be drawn
            save_generation(part, arch, drawing or Drawing(), stop_ids, pad_id)


def save_generation(
    part: Path, arch: Architecture, drawing: Drawing, stop_ids: tuple[int, ...], pad_id: int | None
) -> None:
    """Writes generation_config.json: how transformers and vLLM are to sample, and where they are to end."""
    ids = {"bos_token_id": arch.bos_token_id, "eos_token_id": list(stop_ids) or arch.eos_token_id}
    write_json(part / FILE, ids | {"pad_token_id": pad_id} | to_generation_config(drawing))


def write_tensors(file: Path, tensors: Sequence[HFTensor]) -> None:
    """One file of tensors; all processes must call it, and the first one writes."""
    arrays = [(tensor.name, tensor.read()) for tensor in tensors]  # all processes take part in fetching
    if jax.process_index() == 0:
        write_file(file, arrays)


def _first_eos(stop_ids: tuple[int, ...]) -> dict[str, int]:
    return {"eos_token_id": stop_ids[0]} if stop_ids else {}
