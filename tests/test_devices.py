"""What XLA is told before devices are used: by us where the user says nothing, by the user where he does."""

import os
import subprocess
import sys

import pytest

from tests.chat_server import ENVIRONMENT

SHOW = (
    "from patarm_jax.run.devices import devices_in_words, prepare_devices; prepare_devices(); "
    "print(devices_in_words('gpu')); print(devices_in_words('tpu')); print(repr(devices_in_words('cpu')))"
)
NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
OFF = "XLA's own rematerialisation is off: JAX_COMPILER_ENABLE_REMAT_PASS=1 turns it on"
ON = "XLA's own rematerialisation is on: JAX_COMPILER_ENABLE_REMAT_PASS=0 turns it off"


@pytest.mark.parametrize(
    ("given", "says", "share"),
    [
        ({}, OFF, "0.92"),
        ({"JAX_COMPILER_ENABLE_REMAT_PASS": "1"}, ON, "0.92"),
        ({"XLA_CLIENT_MEM_FRACTION": ".5"}, OFF, ".5"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}, OFF, ".6"),  # JAX refuses both names at once
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, OFF, "its own share"),
        # Ours would take the place of the user's.
        ({"XLA_FLAGS": "--xla_disable_hlo_passes=dce"}, "XLA's own rematerialisation is as XLA_FLAGS has it", "0.92"),
    ],
    ids=str,
)
def test_the_user_has_the_last_word(given, says, share):
    clean = {name: value for name, value in ENVIRONMENT.items() if name not in (*NAMES, "XLA_FLAGS")}
    run = subprocess.run([sys.executable, "-c", SHOW], env=clean | given, capture_output=True, text=True, check=True)
    gpu, tpu, cpu = run.stdout.splitlines()
    assert (tpu, cpu) == (says, "''")
    assert gpu == f"{says}; JAX takes {share} of the GPU's memory: XLA_CLIENT_MEM_FRACTION sets it"


def test_programs_are_compiled_without_the_pass():
    """What JAX tells the compiler, in a process that the command line has prepared."""
    show = (
        "import contextlib, io; from patarm_jax.cli import main; "
        "contextlib.redirect_stderr(io.StringIO()).__enter__(); main(['bench', 'nothing']); "
        "from jax._src import compiler; "
        "options = compiler.get_compile_options(num_replicas=1, num_partitions=1); "
        "print(options.executable_build_options.debug_options.xla_disable_hlo_passes)"
    )
    for given, passes in (({}, "rematerialization"), ({"JAX_COMPILER_ENABLE_REMAT_PASS": "1"}, "")):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"PYTHONPATH": ENVIRONMENT["PYTHONPATH"], **given}
        run = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == passes
