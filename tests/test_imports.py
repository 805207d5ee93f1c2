"""Imports only go down, neighbours do not know each other, and what is pure stays pure."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "patarm_jax"
# From the ground up. Modules on one floor do not import each other, save within one room.
FLOORS = [
    ["types"],
    ["files", "flags"],
    ["config"],
    ["judge", "reward", "model"],
    ["data", "train", "rollout.sampler"],
    ["rollout"],
    ["evaluate"],
    ["recipes"],
    ["demo", "bench", "report"],
    ["cli"],
    ["__main__"],
]
PURE = [
    "types",
    "flags",
    "reward",
    "judge",
    "data.limits",
    "evaluate.accuracy",
    "evaluate.domains",
    "evaluate.findings",
    "evaluate.judges",
    "evaluate.outcomes",
    "evaluate.proportions",
    "evaluate.scoring",
    "evaluate.statistics",
    "model.attention",
    "model.flash",
    "model.kernels",
    "model.qwen3",
    "rollout.sampler",
    "train.health",
    "train.losses",
    "train.steps",
]
IMPURE = {"os", "io", "time", "pathlib", "shutil", "logging", "sys", "socket", "subprocess", "random", "datetime"}
ONE_HOME = {
    "transformers": "data.tokenizer",
    "datasets": "data.rows",
    "grain": "data.pipeline",
    "orbax": "train.checkpoint",
    "safetensors": "model.weight_files",
    "flax": "model.qwen3",
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(name):
    """(floor, room) of a module: the longest entry of FLOORS it begins with."""
    found = [
        (len(room), floor, room)
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if name == room or name.startswith(room + ".")
    ]
    assert found, f"{name} is on no floor"
    return max(found)[1:]


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    floor, room = home(name)
    for target in imported(MODULES[name]):
        if target.startswith("patarm_jax.") and target != "patarm_jax.__version__":
            other_floor, other_room = home(target.removeprefix("patarm_jax."))
            assert other_floor < floor or other_room == room, f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if any(name == p or name.startswith(p + ".") for p in PURE)])
def test_pure_modules_open_nothing(name):
    used = {target.split(".")[0] for target in imported(MODULES[name])}
    assert not used & IMPURE
    called = {n.func.id for n in ast.walk(MODULES[name]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"open", "print", "input"}


@pytest.mark.parametrize("library", ONE_HOME)
def test_a_library_has_one_home(library):
    homes = {name for name, tree in MODULES.items() for t in imported(tree) if t.split(".")[0] == library}
    assert homes == {ONE_HOME[library]}
