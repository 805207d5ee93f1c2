"""How a config is read: from YAML, with dotted flags laid over it, converted and checked once.

Nothing is changed after loading, and an unknown key is an error that names the nearest known one.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from patarm_jax.config.flags import BECAME_SECTIONS, merged, nearest, now_called, settings_of, with_names_of_now
from patarm_jax.config.policy import DPOConfig, PolicyConfig
from patarm_jax.config.recipes import GRPOConfig, RewardModelConfig, SFTConfig
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.config.sections import Section, limits_of, section_of_list
from patarm_jax.config.training import RunConfig
from patarm_jax.files import one_line
from patarm_jax.types import UsageError, UserError

Config = TypeVar("Config", bound=Section)
TRAINING: dict[str, type[RunConfig]] = {  # by `recipe`
    "sft": SFTConfig,
    "grpo": GRPOConfig,
    "reward_model": RewardModelConfig,
    "rubric_arm": RubricArmConfig,
    "policy": PolicyConfig,
    "dpo": DPOConfig,
}


def load(cls: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with dotted overrides (`--optimizer.learning_rate 1e-6`) on top."""
    return override(from_mapping(cls, read_yaml(path), str(path)), overrides)


def load_run(folder: Path) -> RunConfig:
    """The config.yaml of a run folder, of an earlier version too."""
    path = folder / "config.yaml"
    mapping = with_names_of_now(read_yaml(path))
    update = mapping.get("update")
    if isinstance(update, dict) and update.get("algorithm") == "gspo" and "dual_clip" not in update:
        update.pop("aggregation", None)  # it has weighed sequences alike ever since
    recipe = mapping.get("recipe")
    if recipe not in TRAINING:
        raise UserError(f"{path} is of the recipe {recipe!r}; known are {', '.join(TRAINING)}. Give a run's folder.")
    return from_mapping(TRAINING[recipe], mapping, str(path))


def refuse_rounds(folder: Path, config: RunConfig) -> None:
    """Refuses a run of rounds, each of which is a run of its own, where one run is meant."""
    if isinstance(config, DPOConfig) and config.on_policy.sources:
        begun = sorted(folder.glob("round-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        which = f"Give one of them, such as {begun[-1]}" if begun else "Its first one has not begun"
        raise UserError(f"{folder} is a run of {config.on_policy.rounds} rounds, each with a folder. {which}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a key that stands twice is refused, where YAML's readers take the last."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}. Give the path of a YAML file.") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)
        mapping = loader.get_single_data()
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {one_line(error)}. Correct it there.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply. See the files in configs/ for what a config is.") from error
    if not isinstance(mapping, dict):
        raise UsageError(f"{path} holds no mapping of sections. See the files in configs/ for what one looks like.")
    return mapping


def from_mapping(cls: type[Config], mapping: Mapping[str, object], where: str) -> Config:
    """A config from nested mappings, found in a file or, where `where` is empty, given on the command line.

    Raises:
        UsageError: a key is unknown, or a value is of the wrong type or out of its range.
    """
    where = f"{where}: " if where else ""
    _refuse_unknown_keys(cls, mapping, where, prefix="")
    try:
        config = msgspec.convert(_floats(cls, mapping), cls)
    except msgspec.ValidationError as error:
        message = re.sub(r" - at `\$\.?(.*?)`$", r" for \1", str(error))
        raise UsageError(f"{where}{message}.{_meant(cls, message)}") from error
    _refuse_out_of_range(config, where)
    try:
        for section in _sections(config):
            section.check()
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None
    return config


def _sections(config: Section) -> Iterator[Section]:
    """The config, and before it every section within; of those in a list the config knows which one is wrong."""
    for each in dataclasses.fields(config):
        if isinstance(value := getattr(config, each.name), Section):
            yield from _sections(value)
    yield config


def _meant(cls: type, message: str) -> str:
    """What msgspec's message is about, where a word is none of those that its setting may be."""
    if not (found := re.fullmatch(r"Invalid enum value '(.*)' for ([\w.]+)", message)):
        return ""
    kind = functools.reduce(lambda kind, name: get_type_hints(kind)[name], found[2].split("."), cls)
    plain = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    return nearest(found[1], [str(word) for word in get_args(plain)])


def override(config: Config, arguments: Sequence[str]) -> Config:
    """The config with `--section.key value` (or `--section.key=value`) flags laid over it."""
    changes = settings_of(type(config), arguments)
    return from_mapping(type(config), merged(dataclasses.asdict(config), changes), where="")


def to_yaml(config: Section) -> str:
    """The resolved config, complete, as YAML that `load` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def shared_settings(config: Section, prefix: str = "") -> dict[str, object]:
    """The settings that all processes of a run must have alike, by dotted name: all but places and what is their own.

    >>> [name for name in shared_settings(SFTConfig()) if name.startswith("mesh.")][-3:]
    ['mesh.join_seconds', 'mesh.heartbeat_seconds', 'mesh.stall_minutes']
    """
    found: dict[str, object] = {}
    kinds = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        value, name = getattr(config, each.name), f"{prefix}{each.name}"
        if isinstance(value, Section):
            found |= shared_settings(value, f"{name}.")
        elif section_of_list(kinds[each.name]):
            for number, one in enumerate(value):
                found |= shared_settings(one, f"{name}.{number}.")
        elif not each.metadata.get("place") and not each.metadata.get("own"):
            found[name] = value
    return found


def lasting_settings(config: Section) -> dict[str, object]:
    """The settings that must stay as they were when a run is resumed: nested mappings, without those marked FREE."""
    return {
        each.name: lasting_settings(value)
        if isinstance(value, Section)
        else [lasting_settings(one) if isinstance(one, Section) else one for one in value]  # as JSON gives it back
        if isinstance(value, tuple)
        else value
        for each in dataclasses.fields(config)
        if not each.metadata.get("free")
        for value in [getattr(config, each.name)]
    }


def _refuse_unknown_keys(cls: object, mapping: object, where: str, prefix: str) -> None:
    if not isinstance(mapping, Mapping):
        if within := BECAME_SECTIONS.get(prefix.rstrip(".")):
            raise UsageError(
                f"{where}{prefix.rstrip('.')} {mapping} is called {prefix}{within} {mapping} now. Rename it."
            )
        raise UsageError(f"{where}{prefix.rstrip('.')} is a section of keys, got {mapping!r}.")
    kinds = get_type_hints(cls)
    for key, value in mapping.items():
        now = now_called(f"{prefix}{key}").removeprefix(prefix)
        if key not in kinds and now.partition(".")[0] in kinds:
            what = "the section " if isinstance(value, Mapping) else ""
            raise UsageError(f"{where}{what}{prefix}{key} is called {prefix}{now} now. Rename it.")
        if key not in kinds:
            raise UsageError(f"{where}unknown key {prefix}{key}.{nearest(str(key), list(kinds), prefix)}")
        if dataclasses.is_dataclass(kinds[key]):
            _refuse_unknown_keys(kinds[key], value, where, f"{prefix}{key}.")
        if section := section_of_list(kinds[key]):
            if not isinstance(value, list | tuple):
                raise UsageError(f"{where}{prefix}{key} is a list of sections of keys, got {value!r}.")
            for number, one in enumerate(value):
                _refuse_unknown_keys(section, one, where, f"{prefix}{key}.{number}.")


def _refuse_out_of_range(config: Section, where: str, prefix: str = "") -> None:
    kinds = get_type_hints(type(config), include_extras=True)
    for name, value in ((each.name, getattr(config, each.name)) for each in dataclasses.fields(config)):
        if isinstance(value, Section):
            _refuse_out_of_range(value, where, f"{prefix}{name}.")
        elif section_of_list(kinds[name]):
            for number, one in enumerate(value):
                _refuse_out_of_range(one, where, f"{prefix}{name}.{number}.")
        elif (limits := limits_of(kinds[name])) is not None and value is not None and value not in limits:
            finite = "" if -math.inf < value < math.inf else ", and finite"
            raise UsageError(f"{where}{prefix}{name} is {value}; allowed is {limits}{finite}.")


class _Loader(yaml.SafeLoader):
    """YAML without the two surprises of SafeLoader: a key that stands twice, and an error that is not a YAMLError."""

    name: str

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(
                    f"{self.name}: the key {key.value} stands in line {lines[key.value]} and again in line {line}. "
                    "Keep one of them."
                )
            lines[key.value] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError) as error:  # `2024-99-99` is no date
            raise UsageError(
                f"{self.name}:{node.start_mark.line + 1}: {str(node.value)[:40]} cannot be read: {one_line(error)}. "
                "Put it in quotes if it is text."
            ) from error


def _floats(cls: object, mapping: Mapping[str, Any]) -> dict[str, object]:
    """YAML 1.1 reads `1e-6` as text: turn the text of a float field into the number that was meant."""
    kinds, result = get_type_hints(cls), dict(mapping)
    for key, value in mapping.items():
        if dataclasses.is_dataclass(kinds[key]):
            result[key] = _floats(kinds[key], value)
        elif section := section_of_list(kinds[key]):
            result[key] = [_floats(section, one) for one in value]
        elif float in (kinds[key], *get_args(kinds[key])) and isinstance(value, str):
            with contextlib.suppress(ValueError):
                result[key] = float(value)
        elif kinds[key] == dict[str, tuple[str, ...]] and isinstance(value, Mapping):
            result[key] = {name: [text] if isinstance(text, str) else text for name, text in value.items()}
    return result
