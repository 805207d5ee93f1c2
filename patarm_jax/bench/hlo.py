"""What a compiled program does, counted in its own text: multiplications, bytes, kernels, what devices tell each other.

XLA's own `cost_analysis` counts the body of a loop once, and says nothing at all of programs for a GPU that is not
there. Here the program's text is walked as it runs: loops as often as they go round, fusions by what they contain, of a
condition the dearer branch, and of an array that is sliced or updated in place no more than the slice.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from patarm_jax.rollout.draw import RARE

# Of a kernel that is not XLA's, from the bytes of its operands and its result: what it multiplies and adds, and the
# bytes that it reads and writes.
Formula: TypeAlias = Callable[[list[int]], tuple[float, float]]

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier domain "
    "add-dependency".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_VIEWS = frozenset(("bitcast", "copy", "reshape", "transpose", "convert"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which of their operands is written over the first
_COLLECTIVES = frozenset(
    "all-reduce all-gather reduce-scatter all-to-all collective-permute collective-broadcast ragged-all-to-all".split()
)


@dataclass(frozen=True)
class Launch:
    """One kernel of a program: an instruction that reads and writes memory, or that tells other devices something."""

    name: str  # where it comes from, as JAX has it
    kind: str  # its opcode; of a kernel that is not XLA's its target
    times: int  # how often it runs
    flops: float  # multiplications and additions in matmuls, each time
    bytes: float  # read and written, each time
    told: float = 0  # bytes that a collective leaves on this device, each time
    in_open_loop: bool = False  # in a loop of which no text says how often it goes round: counted for one time


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    config: str

    @cached_property
    def bytes(self) -> int:
        return _bytes(self.type)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    def numbers(self, attribute: str) -> list[int]:
        found = re.search(rf"\b{attribute}=\{{([0-9,]*)\}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []

    @property
    def origin(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.name


class _Computation(dict[str, _Instruction]):
    """Instructions by name, in their order."""

    root: _Instruction

    def users(self, name: str) -> list[_Instruction]:
        return [each for each in self.values() if name in each.operands]

    def operands(self, of: _Instruction) -> list[_Instruction]:
        return [self[name] for name in of.operands if name in self]


def launches(text: str, known: Mapping[str, Formula] | None = None) -> list[Launch]:
    """The kernels of a program, in the order of its text.

    Args:
        text: of a compiled program, as `compiled.as_text()` gives it.
        known: for kernels of others, by a part of their name, where what they do hangs on more than shapes.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, computations[entry], 1, False, known or {}))


def _walk(
    all_: Mapping[str, _Computation],
    computation: _Computation,
    times: int,
    is_open: bool,
    known: Mapping[str, Formula],
) -> Iterator[Launch]:
    for each in computation.values():
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            continue
        if each.opcode == "while":
            rounds = _rounds(each)
            for name in (*each.called("body"), *each.called("condition")):
                yield from _walk(all_, all_[name], times * (rounds or 1), is_open or rounds is None, known)
        elif each.opcode == "conditional":
            names = each.called("branch_computations") or each.called("true_computation") + each.called(
                "false_computation"
            )
            branches = [list(_walk(all_, all_[name], times, is_open, known)) for name in names]
            of = min if RARE in each.origin else max
            yield from of(branches, key=lambda branch: sum(one.times * (one.bytes + one.flops) for one in branch))
        elif each.opcode in ("call", "async-start") and not _is_one_kernel(each):
            for name in each.called("to_apply") or each.called("calls"):
                yield from _walk(all_, all_[name], times, is_open, known)
        else:
            yield replace(_launch(all_, computation, each, known), times=times, in_open_loop=is_open)


def _launch(
    all_: Mapping[str, _Computation],
    computation: _Computation,
    each: _Instruction,
    known: Mapping[str, Formula],
) -> Launch:
    inputs = [one.bytes for one in computation.operands(each)]
    new = Launch(each.origin, each.opcode, 1, 0.0, float(sum(inputs) + each.bytes))
    base = each.opcode.removesuffix("-start")
    if base in _COLLECTIVES:
        # What is begun gives back what was sent beside what comes.
        told = each.bytes - (sum(inputs) if each.opcode.endswith("-start") and base != "all-reduce" else 0)
        return replace(new, kind=base, told=float(told))
    if each.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
        new = replace(new, kind=target[1] if target else each.opcode)
        for name, formula in known.items():
            if name in each.origin:
                flops, moved = formula([*inputs, each.bytes])
                return replace(new, flops=flops, bytes=moved)
        return new
    if each.opcode == "fusion":
        inner = all_[each.called("calls")[0]]
        return replace(new, flops=_flops_of(all_, inner), bytes=float(_moved(inner)))
    return replace(new, flops=_flops(computation, each), bytes=float(_moved_by(computation, each)))


# -------------------------------------------------------------------------------------------------------------- counts


def _flops_of(all_: Mapping[str, _Computation], computation: _Computation) -> float:
    """The matmuls of a fusion, and of what is fused in it."""
    total = 0.0
    for each in computation.values():
        total += _flops(computation, each)
        for name in each.called("calls") if each.opcode in ("fusion", "call") else []:
            total += _flops_of(all_, all_[name])
    return total


def _flops(computation: _Computation, each: _Instruction) -> float:
    if each.opcode == "dot":
        left = _dims(computation[each.operands[0]].type)
        contracted = math.prod(left[axis] for axis in each.numbers("lhs_contracting_dims"))
        return 2.0 * math.prod(_dims(each.type)) * contracted
    if each.opcode == "convolution":
        raise ValueError("this program has convolutions, as matmuls for TPUs are, and those are not counted")
    return 0.0


def _moved(fused: _Computation) -> int:
    """Bytes that a fusion reads and writes: of what it slices the slices, of what it updates in place the updates."""
    total = 0
    for each in fused.values():
        if each.opcode == "parameter":
            total += _read_of(fused, each)
    return total + _written_by(fused, fused.root)


def _read_of(fused: _Computation, source: _Instruction) -> int:
    total = 0
    for user in fused.users(source.name):
        if user.opcode in _SLICES and user.operands[0] == source.name:
            total += user.bytes
        elif user.opcode in _UPDATES and user.operands[0] == source.name:
            pass  # written over where it lies
        elif user.opcode in _VIEWS:
            total += _read_of(fused, user) if user is not fused.root else source.bytes
        else:
            return source.bytes
    return min(total, source.bytes)


def _written_by(fused: _Computation, result: _Instruction) -> int:
    if result.opcode == "tuple":
        return sum(_written_by(fused, fused[name]) for name in result.operands)
    if result.opcode in ("bitcast", "copy") and result.operands[0] in fused:
        return _written_by(fused, fused[result.operands[0]])
    if result.opcode in _UPDATES:
        return fused[result.operands[_UPDATES[result.opcode]]].bytes
    return result.bytes


def _moved_by(computation: _Computation, each: _Instruction) -> int:
    """Bytes of an instruction that is fused with nothing."""
    operands = computation.operands(each)
    if each.opcode in _SLICES:
        return 2 * each.bytes
    if each.opcode in _UPDATES and len(operands) > _UPDATES[each.opcode]:
        return 2 * operands[_UPDATES[each.opcode]].bytes
    if each.opcode in ("iota", "broadcast"):
        return each.bytes + (sum(one.bytes for one in operands) if each.opcode == "broadcast" else 0)
    return each.bytes + sum(one.bytes for one in operands)


def _rounds(each: _Instruction) -> int | None:
    """How often a loop goes round, where its text says so."""
    found = re.search(r'"known_trip_count":(\{[^}]*\})', each.config)
    return int(json.loads(found[1])["n"]) if found else None


def _is_one_kernel(each: _Instruction) -> bool:
    """Whether what is called runs as one kernel, such as a collective that goes on beside others."""
    return "async_execution_thread" not in each.attributes and each.opcode == "async-start"


# ------------------------------------------------------------------------------------------------------------- reading


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            each = _instruction(line)
            current[each.name] = each
            if line.lstrip().startswith("ROOT "):
                current.root = each
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no entry")
    return computations, entry


def _instruction(line: str) -> _Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = re.findall(r"%?([\w.\-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing]) + ",")
    attributes, _, config = rest[closing + 1 :].partition(", backend_config=")
    return _Instruction(name.lstrip("%"), kind, rest[:opening], tuple(operands), attributes, config)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis is closed that opens there."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is never closed: {text[:80]}")


def _dims(kind: str) -> list[int]:
    found = _ARRAY.search(kind)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _bytes(kind: str) -> int:
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _bits(name) // 8 for name, dims in _ARRAY.findall(kind)
    )


def _bits(name: str) -> int:
    """Bits of an element of a type such as f32, bf16 or f8e4m3fn."""
    found = re.match(r"[a-z]+(\d+)", name)
    return _BITS[name] if name in _BITS else int(found[1]) if found else 32
