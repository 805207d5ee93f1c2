"""Every setting of a config in words, as `--help` lists them: default, what is allowed, and its comment."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Literal, get_args, get_origin, get_type_hints

from patarm_jax.config.sections import Section, limits_of, section_of_list

_WIDTH = 100


def settings_in_words(config: Section, prefix: str = "") -> str:
    """The settings of a config and of its sections, each with its default, its limits and its comment.

    A comment stands beside a setting in the source, or right above it.
    """
    kinds, comments = get_type_hints(type(config), include_extras=True), comments_of(type(config))
    own: list[str] = []
    sections: list[str] = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        listed = section_of_list(kinds[each.name])
        if listed is not None:
            heading = f"\n{prefix}{each.name}: a list, N from 0. {inspect.getdoc(listed)}"
            sections.append(f"{heading}\n{settings_in_words(listed(), f'{prefix}{each.name}.N.')}")
        elif isinstance(value, Section):
            heading = f"\n{prefix}{each.name}: {inspect.getdoc(type(value))}"
            sections.append(f"{heading}\n{settings_in_words(value, f'{prefix}{each.name}.')}")
        else:
            own += _setting(f"{prefix}{each.name}", value, kinds[each.name], comments.get(each.name, ""))
    return "\n".join([*own, *sections])


def comments_of(cls: type) -> dict[str, str]:
    """What the source says of each field of a dataclass, those of its parents included."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if dataclasses.is_dataclass(parent):
            found |= _own_comments(parent)
    return found


def _own_comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines, (definition,) = source.splitlines(), ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            above = [line.strip().removeprefix("#").strip() for line in lines[first : node.lineno - 1]]
            # A column is counted in bytes.
            beside = lines[last].encode()[node.end_col_offset :].decode().strip().removeprefix("#").strip()
            found[node.target.id] = " ".join(filter(None, [*above, beside]))
    return found


def _setting(name: str, value: object, kind: object, comment: str) -> list[str]:
    key = f"  --{name}{'.NAME' * isinstance(value, dict)} {_shown(value)}".rstrip()
    allowed = _allowed(kind)
    words = f"{comment} ({allowed})" if comment and allowed else comment or allowed
    return [key, *textwrap.wrap(words, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in ((), {}) else str(value)


def _allowed(kind: object) -> str:
    unset = " or null" if type(None) in get_args(kind) else ""
    for plain in (kind, *get_args(kind)):
        if get_origin(plain) is Literal:
            return f"{', '.join(map(str, get_args(plain)))}{unset}"
    limits = limits_of(kind)
    return f"{limits}{unset}" if limits else "true, false" if kind is bool else ""
