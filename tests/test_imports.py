"""Imports only go down, neighbours do not know each other, and what is pure stays pure."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "patarm_jax"
# From the ground up. Modules on one floor do not import each other, save within one room.
FLOORS = [
    ["types", "arrays", "padding", "rounding"],
    ["flags", "files"],
    ["locks"],
    ["config"],
    ["judge", "reward", "shaping", "model", "rollout.draw"],
    ["data", "train", "rollout.sampler"],
    ["rollout"],
    ["run"],
    ["report"],
    ["ask"],
    ["adapters", "evaluate"],
    ["corpus"],
    ["recipes", "report.built"],
    ["demo", "bench"],
    ["verbs"],
    ["cli"],
    ["__main__"],
]
PURE = [
    "types",
    "arrays",
    "padding",
    "rounding",
    "flags",
    "reward",
    "shaping",
    "judge",
    "data.limits",
    "evaluate.accuracy",
    "evaluate.items",
    "evaluate.findings",
    "evaluate.questions",
    "evaluate.outcomes",
    "evaluate.proportions",
    "evaluate.scoring",
    "evaluate.statistics",
    "model.attention",
    "model.flash",
    "model.kernels",
    "model.transformer",
    "model.cache",
    "rollout.draw",
    "rollout.sampler",
    "run.health",
    "train.advantages",
    "train.algorithms",
    "train.losses",
    "train.penalties",
    "train.policy_losses",
    "train.steps",
]
IMPURE = {"os", "io", "time", "pathlib", "shutil", "logging", "sys", "socket", "subprocess", "random", "datetime"}
ONE_HOME = {
    "transformers": "data.tokenizer",
    "datasets": "data.rows",
    "grain": "data.pipeline",
    "orbax": "run.checkpoint",
    "safetensors": "model.weight_files",
    "flax": "model.transformer",
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
ARRAYS = ("jax", "jaxlib", "numpy", "flax", "transformers", "torch", "datasets")


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


def test_a_judge_is_asked_and_read_without_arrays():
    """A client of a judge that is served needs strings alone: none of these libraries need be there."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ARRAYS!r}))  # whoever imports one of them gets an ImportError
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.judge.prompts import pointwise
from patarm_jax.judge.rubrics import primary
assert pointwise("What is 2 + 2?", "4", domain="math")[0]["role"] == "system" and primary("math")
text = "<think>…</think><generate_rubrics>…</generate_rubrics><eval>…</eval><answer>9</answer>"
print(parse_pointwise(text).score)
"""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": os.environ["PATH"]}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout == "9.0\n", ran.stderr


def test_the_benches_run_on_a_bare_accelerator_image():
    """With jax, flax, optax, numpy and the config's parser; of the rest of our dependencies none is imported."""
    absent = (
        "transformers", "tokenizers", "datasets", "grain", "orbax", "safetensors", "pyarrow", "tqdm", "tensorboardX",
        "scipy", "matplotlib", "huggingface_hub",
    )  # fmt: skip
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from patarm_jax.cli import main
from patarm_jax.bench import quick, tasks
sys.exit(main(["bench", "attention", "--rows", "1", "--length", "16", "--repeats", "1"]))
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "XLA_FLAGS": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "attention  1 × 16" in ran.stdout, ran.stderr
