"""What JAX and XLA are told before a device is used, unless the user has told them otherwise."""

import os
from pathlib import Path

import jax

from patarm_jax.run.process import say

# Of a GPU's memory, which JAX takes when it starts; by itself it would take three quarters. The rest is for NCCL, cuDNN
# and the CUDA context.
SHARE = "0.92"
_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the old name
_ALLOCATION = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")
_PASSES = "xla_disable_hlo_passes"  # the flag that JAX would take the place of
PASS = "JAX_COMPILER_ENABLE_REMAT_PASS"


def prepare_devices() -> None:
    """Lets JAX have nearly all of a GPU's memory, and turns XLA's own rematerialisation off, on TPUs too.

    That pass begins above 80 % of the memory, and recomputes much to save little; what is recomputed is `model.remat`'s
    to say. Where memory is not short it does nothing. Whoever sets an environment variable that decides either has the
    last word. Call it before JAX has looked for devices.
    """
    if not any(name in os.environ for name in (*_SHARES, *_ALLOCATION)):
        os.environ[_SHARES[0]] = SHARE
    if PASS not in os.environ and _PASSES not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_compiler_enable_remat_pass", False)


def keep_compiled_programs() -> None:
    """On disk, for the next run, unless JAX is told otherwise; JAX_ENABLE_COMPILATION_CACHE=0 turns it off."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "patarm_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def devices_in_words(platform: str) -> str:
    """What a run says of these settings; nothing on CPUs, for which they mean nothing."""
    if platform == "cpu":
        return ""
    on = bool(jax.config.values["jax_compiler_enable_remat_pass"])
    now, other = ("on", "off") if on else ("off", "on")
    said = f"XLA's own rematerialisation is {now}: {PASS}={int(not on)} turns it {other}"
    if on and _PASSES in os.environ.get("XLA_FLAGS", ""):
        said = "XLA's own rematerialisation is as XLA_FLAGS has it"
    if platform != "gpu":
        return said
    share = next((os.environ[name] for name in _SHARES if name in os.environ), "")
    return f"{said}; JAX takes {share or 'its own share'} of the GPU's memory: {_SHARES[0]} sets it"


def tell_devices() -> None:
    """Says it, where there is anything to say."""
    if words := devices_in_words(jax.default_backend()):
        say(words)
