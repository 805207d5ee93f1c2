"""Settings from a command line: `--section.key value`, with the types of a config class, as nested mappings.

A setting is given once. Its words go up to the next flag; `--section.key=value` is the same with one word. Booleans are
true or false, a setting that may be unset takes null, a list takes several words, a mapping is given key by key,
`--data.columns.chosen accepted`, and a list of sections by numbers from 0: `--reward.sources.0.weight 2`.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from patarm_jax.config.sections import section_of_list
from patarm_jax.types import UsageError

RENAMED = {"policy": "update", "update.kl_coef": "update.kl.coef"}  # dotted names, before → now, one after another
# Settings that are sections today, and under which key what they were stands there.
BECAME_SECTIONS = {"reward.margin": "name"}
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}


def settings_of(cls: type, arguments: Sequence[str]) -> dict[str, object]:
    """The settings that arguments give, as nested mappings of values.

    Args:
        cls: of the config, a dataclass of dataclasses.
        arguments: the words of the command line, without the verb's own.

    Raises:
        UsageError: an option is unknown, given twice, or has a value that its setting cannot take.
    """
    result: dict[str, Any] = {}
    given: set[str] = set()
    for flag, words in _grouped(arguments):
        path, kind = _place(cls, flag)
        name = ".".join(path)
        if name in given:
            raise UsageError(f"--{name} is given twice. Give it once.")
        given.add(name)
        section = result
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = _value(name, kind, words)
    return result


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, object]:
    """Nested mappings, the second laid over the first.

    >>> merged({"run": {"seed": 0, "steps": 2}}, {"run": {"seed": 1}})
    {'run': {'seed': 1, 'steps': 2}}
    """
    result = dict(settings)
    for key, value in changes.items():
        if isinstance(result.get(key), list | tuple) and isinstance(value, dict):
            result[key] = _merged_list(key, result[key], value)
            continue
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _merged_list(key: str, sections: Sequence[dict[str, Any]], changes: dict[str, dict[str, Any]]) -> list[object]:
    """A list of sections with what is said of some of them by their numbers, and with those that follow."""
    result: list[object] = list(sections)
    for number in sorted(map(int, changes)):
        if number > len(result):
            raise UsageError(
                f"--….{key}.{number} has no section before it: there are {len(result)}, so that the next one is "
                f"{len(result)}. Number them from 0 without a gap."
            )
        before = sections[number] if number < len(sections) else {}
        result[number : number + 1] = [merged(before, changes[str(number)])]
    return result


def now_called(name: str) -> str:
    """The dotted name of a setting or section today.

    >>> now_called("policy.kl_coef"), now_called("policy.clip_low"), now_called("run.seed")
    ('update.kl.coef', 'update.clip_low', 'run.seed')
    """
    for before, now in RENAMED.items():
        if name == before or name.startswith(f"{before}."):
            name = now + name.removeprefix(before)
    return name


def with_names_of_now(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of an earlier version, nested, under the names they have today."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        here, now = f"{prefix}{key}", now_called(f"{prefix}{key}")
        renamed: Any = with_names_of_now(value, f"{now}.") if isinstance(value, dict) else value
        if now in BECAME_SECTIONS and not isinstance(value, dict):
            renamed = {BECAME_SECTIONS[now]: value}
        # Keys of a mapping may hold dots of their own.
        for part in reversed(now.removeprefix(prefix).split(".") if now != here else [key]):
            renamed = {part: renamed}
        found = merged(found, renamed)
    return found


def dotted_keys(cls: object, prefix: str = "") -> list[str]:
    """Every key of a config class in dotted form."""
    keys: list[str] = []
    for name, kind in get_type_hints(cls).items():
        keys += dotted_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """A sentence on what was meant, or on what is known, to stand behind another."""
    return did_you_mean(name, known, prefix) or f" Known are: {', '.join(known)}."


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """A sentence on what was meant, to stand behind another; empty where nothing is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _grouped(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name of a flag, its words)."""
    groups: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            groups.append((name, [value] if equals else []))
        elif groups and not re.fullmatch(r"-[A-Za-z].*", word):
            groups[-1][1].append(word)
        else:
            raise UsageError(f"unknown argument {word}. Give settings as --section.key value.")
    return groups


def _place(cls: type, flag: str) -> tuple[list[str], object]:
    """(section, …, key) of a flag, and the type of its value; a key of a mapping is the rest of the flag."""
    path: list[str] = []
    kind: object = cls
    parts = flag.split(".")
    while parts and dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        if parts[0] not in kinds:
            raise _unknown(cls, flag)
        path.append(parts.pop(0))
        kind = kinds[path[-1]]
        if (section := section_of_list(kind)) is not None:
            if not parts or not parts[0].isdecimal():
                raise UsageError(
                    f"--{flag} is a list of sections. Give their settings one by one, by numbers from 0, such as "
                    f"--{'.'.join(path)}.0.{next(iter(get_type_hints(section)))}; or give it in the config."
                )
            path.append(str(int(parts.pop(0))))
            kind = section
    if dataclasses.is_dataclass(kind):
        keys = ", ".join(f"--{flag}.{key}" for key in get_type_hints(kind))
        raise UsageError(f"--{flag} is a section. Give one of its settings: {keys}.")
    if get_origin(kind) is dict:
        if not parts:
            raise UsageError(f"--{flag} takes its values key by key, such as --{flag}.{_example(flag)}.")
        return [*path, ".".join(parts)], get_args(kind)[1]
    if parts:
        raise _unknown(cls, flag)
    return path, kind


def _example(flag: str) -> str:
    return "chosen accepted" if flag.endswith("columns") else "NAME VALUE"


def _unknown(cls: type, flag: str) -> UsageError:
    every = dotted_keys(cls)
    if (now := now_called(flag)) != flag and now in every:
        return UsageError(f"--{flag} is called --{now} now. Say so.")
    known = [f"--{key}" for key in every]
    if (positive := flag.replace("no-", "", 1)) in every:
        return UsageError(f"unknown option --{flag}. Say --{positive} false.")
    return UsageError(f"unknown option --{flag}.{nearest(f'--{flag}', known)}")


def _value(name: str, kind: object, words: Sequence[str]) -> object:
    if get_origin(kind) is tuple:
        return list(words)
    if len(words) != 1:
        more = f"{len(words)} values, {' '.join(words)}" if words else "no value"
        quotes = " Put a value with spaces into quotes." if words else f" Give one, as in --{name} VALUE."
        raise UsageError(f"--{name} has {more}; allowed is {_allowed(kind)}.{quotes}")
    (word,) = words
    may_be_unset = type(None) in get_args(kind)
    if may_be_unset and word == "null":
        return None
    plain = get_args(kind)[0] if may_be_unset else kind
    try:
        if plain is bool:
            return _BOOLEANS[word]
        if plain in (int, float):
            return plain(word)
    except (KeyError, ValueError):
        raise UsageError(f"--{name} is {word!r}; allowed is {_allowed(kind)}.") from None
    if get_origin(plain) is Literal and word not in get_args(plain):
        meant = did_you_mean(word, [str(each) for each in get_args(plain)])
        raise UsageError(f"--{name} is {word!r}; allowed is {_allowed(kind)}.{meant}")
    return word


def _allowed(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if type(None) in get_args(kind):
        return f"{_allowed(get_args(kind)[0])}, or null"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "one value")
