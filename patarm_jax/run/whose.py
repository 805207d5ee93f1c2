"""Whose a checkpoint or a run folder is: what another run has written is refused, by the first thing that differs.

A run is told from others by a fingerprint, nested JSON of all that must not change between its processes. Settings are
compared by value. The weights that a run begins with, and those that its KL is measured from, are known by a digest
and not by their path: under `WEIGHTS` stands, of each, {"path": …, "digest": …}.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from patarm_jax.config.flags import with_names_of_now
from patarm_jax.config.load import lasting_settings
from patarm_jax.config.presets import CHOSEN_BY_MARGIN, MARGINS
from patarm_jax.config.sections import TARGETS, LoRASection
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.pipeline import EncodedPair, digest_of
from patarm_jax.run.open_model import Model, weights_digest
from patarm_jax.types import UserError

WEIGHTS = "weights"
START, REFERENCE = "start", "reference"  # the weights under WEIGHTS
# The setting of each; of Rubric-ARM's two models, what each of them begins with.
_CALLED = {
    REFERENCE: "update.reference",
    START: "model.path",
    "generator": "generator.path, or model.path,",
    "judge": "judge.path, or model.path,",
}


def fingerprint(
    config: TrainConfig,
    model: Model,
    records: Sequence[EncodedPair],
    reference: Model | None = None,
    further: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, object]:
    """What must not change between a checkpoint and its continuation; placement, logging and batching may.

    Args:
        config: of the run.
        model: what training starts from.
        records: the pairs that are trained on.
        reference: what the KL is measured from; None where there is no KL.
        further: what else must not change, by name.
    """
    network = dataclasses.asdict(model.arch)
    del network["scalar_head"]  # the recipe and its settings say so
    return {
        "recipe": config.recipe,
        "model": network | {"dtype": config.model.dtype},
        "data": digest_of(records),
        "seed": config.run.seed,
        **_lasting(config),
        **further,
        WEIGHTS: _weights_of(config, model, reference),
    }


def _lasting(config: TrainConfig) -> dict[str, object]:
    """The settings that must stay; in which order the targets of adapters are named does not matter."""
    targets = tuple(sorted(config.lora.targets))
    return lasting_settings(dataclasses.replace(config, lora=dataclasses.replace(config.lora, targets=targets)))


def _weights_of(config: TrainConfig, model: Model, reference: Model | None) -> dict[str, dict[str, str]]:
    with_adapters = f" with the adapters {config.model.adapter}" if config.model.adapter else ""
    found = {START: {"path": config.model.path + with_adapters, "digest": weights_digest(model)}}
    if reference is not None and config.kl_reference is not None:
        digest = found[START]["digest"] if reference is model else weights_digest(reference)
        found[REFERENCE] = {"path": config.kl_reference, "digest": digest}
    return found


def _as_written_now(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint that a run of an earlier version would have had from this one."""
    found = with_names_of_now(dict(fingerprint))
    if "policy" in fingerprint:  # `update` was called so, and knew one algorithm
        found["update"] = {"algorithm": "grpo"} | found["update"]
    if "update" in found and "dual_clip" not in found["update"]:  # every setting stood there, and these were not known
        kl = {"kind": "k3", "place": "loss", "by_ratio": False} | found["update"]["kl"]
        further = {"dual_clip": None, "old_logprobs": "sampler", "importance_cap": None}
        found["update"] = found["update"] | further | {"kl": kl}
        if found["update"]["algorithm"] == "gspo":
            kl["by_ratio"] = None
            if found["update"]["aggregation"] == "sequence_mean":  # what it weighs by in any case
                found["update"]["aggregation"] = None
    found = {name: _network_as_now(value) for name, value in found.items()}
    if found.get("recipe") == "rubric_arm":
        found["judge"] = {"kind": "rubric_judge"} | found["judge"]
    known: dict[str, Any] = {"lora": lasting_settings(LoRASection(targets=tuple(sorted(TARGETS))))}
    if found.get("recipe") == "reward_model":
        known["head"] = "scalar"
    found = known | found
    if isinstance(found.get("optimizer"), dict):
        found["optimizer"] = {"moments": "float32", **found["optimizer"]}
    return _before_pairwise_judges(found)


def _network_as_now(value: object) -> object:
    """The shape of a network, which was a Qwen3's before there were others; anything else as it is."""
    is_network = isinstance(value, dict) and "num_hidden_layers" in value
    return {"model_type": "qwen3"} | value if is_network and isinstance(value, dict) else value


def _before_pairwise_judges(found: dict[str, Any]) -> dict[str, Any]:
    """With settings that runs had without knowing of them: all were of pointwise judges, with one kind of reward."""
    if found.get("recipe", "grpo") not in ("sft", "grpo"):  # which was not named while there was nothing else
        return found
    found = {"judge": "pointwise", "pairwise": {"orders": "both"}} | found
    if isinstance(found.get("reward"), dict) and "kind" not in found["reward"]:
        own = {"name": "graded"} | found["reward"].get("margin", {})
        unset = dict.fromkeys(name.removeprefix("reward.margin.") for name in CHOSEN_BY_MARGIN)
        values = {name.removeprefix("reward.margin."): value for name, value in MARGINS[own["name"]].items()}
        new = {"kind": "par", "opponent": "mean", "loser": "zero", "accuracy": {"right": 1.0, "wrong": 0.0}}
        found["reward"] = new | found["reward"] | {"margin": own | unset | values}
        # The loss of DAPO was there, and its sampling was not.
        dapo = {"max_rounds": None, "overlong_buffer": None, "overlong_factor": None}
        without = {"max_rounds": 1, "overlong_buffer": 0, "overlong_factor": 1.0}
        found["dapo"] = without if found["update"]["algorithm"] == "dapo" else dapo
    return found


def refuse_another_run(
    where: str, expected: Mapping[str, Any], got: Mapping[str, object], what: str = "is a checkpoint of another run"
) -> None:
    """Refuses what another run has written, naming the first setting that differs.

    Args:
        where: the checkpoint or folder, to begin the sentence with.
        expected: the fingerprint of this run.
        got: the one that was found.
        what: the rest of the sentence, up to the setting.
    """
    expected, got = json.loads(json.dumps(dict(expected))), _as_written_now(got)  # tuples, as JSON gives them back
    stored = _flat(got)
    for key, value in _flat({name: value for name, value in expected.items() if name != WEIGHTS}).items():
        if key not in stored or stored[key] != value:
            was = f"is {stored[key]!r}" if key in stored else "is absent"
            raise UserError(
                f"{where} {what}: {key} {was} there and {value!r} here. Set it as it was, or give another run folder."
            )
    ours, theirs = expected.get(WEIGHTS, {}), got.get(WEIGHTS)
    if theirs is None:
        _refuse_another_path(where, what, ours, got)
        return
    for role in _CALLED:
        beside_adapters = bool(expected.get("lora", {}).get("rank"))
        _refuse_other_weights(f"{where} {what}", role, ours.get(role), theirs.get(role), beside_adapters)


def notes_no_digests(got: Mapping[str, object] | None) -> bool:
    """Whether a fingerprint is of a version that knew weights by their path."""
    return got is not None and WEIGHTS not in got


def with_known_start(fingerprint: Mapping[str, Any], got: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fingerprint of a run whose model folder holds no weights any more, with those that were noted before."""
    ours = dict(fingerprint.get(WEIGHTS, {}))
    theirs = (got or {}).get(WEIGHTS, {})
    for role in ours.keys() & theirs.keys() - {REFERENCE}:
        if not ours[role]["digest"]:
            ours[role] = theirs[role]
    return dict(fingerprint) | ({WEIGHTS: ours} if WEIGHTS in fingerprint else {})


def _refuse_another_path(where: str, what: str, ours: Mapping[str, Any], got: Mapping[str, object]) -> None:
    """Refuses another path where a run knew its reference by path: it must be the same, letter for letter."""
    reference, stored = ours.get(REFERENCE), got.get(REFERENCE)
    if reference is not None and stored is not None and reference["path"] != stored:
        raise UserError(
            f"{where} {what}: the KL reference is {stored!r} there and {reference['path']!r} here. Set "
            f"{_CALLED[REFERENCE]} as it was, or give another run folder."
        )


def _refuse_other_weights(
    wrong: str, role: str, ours: Mapping[str, str] | None, theirs: Mapping[str, str] | None, beside_adapters: bool
) -> None:
    if ours is None or theirs is None or ours["digest"] in ("", theirs["digest"]):
        return
    found = f"{_known_by(theirs)} there and {_known_by(ours)} here"
    if role == REFERENCE:
        raise UserError(
            f"{wrong}: its KL is measured from other weights, {found}. Put those weights back, name a folder that "
            f"holds them as {_CALLED[role]}, or give another run folder."
        )
    without = (
        ""
        if beside_adapters
        else " A run that has saved a checkpoint also goes on with a folder of the model's config and tokenizer that "
        "holds no weights."
    )
    raise UserError(
        f"{wrong}: it began with other weights, {found}. Name a folder that holds those as {_CALLED[role]}, or give "
        f"another run folder.{without}"
    )


def refuse_another_start(folder: Path, noted: Mapping[str, Any], model: Model, role: str = START) -> None:
    """Refuses to put adapters on other weights than those that their run has trained them beside.

    Args:
        folder: of the run.
        noted: the fingerprint that stands in it.
        model: what its adapters are to be put on.
        role: under which the weights that they were trained beside are noted.
    """
    theirs = noted.get(WEIGHTS, {}).get(role)
    ours = {"path": _named(model), "digest": weights_digest(model)}
    if theirs is not None and theirs["digest"] != ours["digest"]:
        raise UserError(
            f"{folder}: its adapters were trained beside {_known_by(theirs)}, and {_known_by(ours)} lies there now. "
            "Put those weights back, or begin the run anew in another folder."
        )


def _named(model: Model) -> str:
    return str(model.folder) + (f" with the adapters {model.adapter.folder}" if model.adapter else "")


def _known_by(weights: Mapping[str, str]) -> str:
    """Such as `runs/sft (digest 0123456789abcdef)`."""
    digest = weights["digest"]
    return f"random ones for {weights['path']}" if digest == "random" else f"{weights['path']} (digest {digest})"


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted keys.

    >>> _flat({"model": {"layers": 2, "heads": {}}, "data": "ab"})
    {'model.layers': 2, 'data': 'ab'}
    """
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {key: leaf for name, part in tree.items() for key, leaf in _flat(part, f"{prefix}{name}.").items()}
