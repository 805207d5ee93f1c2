"""Eight CPU devices before JAX starts; where the real inputs lie; golden files; what Hypothesis tries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.flags import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FLAGS}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # a test runs what the code says now

import pytest
from hypothesis import settings

from tests.runs import environment, started, world  # noqa: F401  # fixtures, which tests find here

# The same code gives the same result; `launch/test.sh --all` looks for new examples.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("steady")

REAL_INPUTS = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens from what the code says now")


# Files whose fixtures train for minutes come first: a worker that is through with its own tests takes over the last of
# another's, and would make such fixtures again.
FIRST = ("test_rubric_arm.py",)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """Compiled programs are memory maps, and those of an hour of tests would be more than a process may have."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def golden(request):
    """`golden(name, text)`: text equals tests/goldens/name, which --update-goldens rewrites."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "goldens" / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run pytest --update-goldens and review the diff"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session")
def real_inputs() -> Path:
    """The folder of real preference data and the real Qwen3 tokenizer."""
    if not REAL_INPUTS.is_dir():
        pytest.skip(f"real inputs are not at {REAL_INPUTS}")
    return REAL_INPUTS


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, and a function that gives it another size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def browser():
    """Chromium, to open pages with; while it is there, this thread takes no other event loop."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is checked through playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome to open the page with")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()
