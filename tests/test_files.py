"""What is written appears whole, under names that are no one else's; what cannot be written is said at once."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patarm_jax.files import (
    appearing_whole,
    cannot_write,
    check_writable,
    refuse_address,
    whole_file,
    write_json,
    write_text,
    writing,
)
from patarm_jax.types import UsageError, UserError

STALE = "patarm-0123abcd"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def disk(tmp_path):
    """`disk(options)`: an empty file system, mounted with such options."""
    mounted = []

    def mount(options="size=64k"):
        folder = tmp_path / f"disk {len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_appears_whole(tmp_path):
    with appearing_whole(tmp_path / "a" / "out") as part:
        assert part.parent == tmp_path / "a" and not (tmp_path / "a" / "out").exists()
        (part / "x").write_text("1")
    assert names(tmp_path / "a") == ["out"] and names(tmp_path / "a" / "out") == ["x"]


def test_a_folder_that_fails_was_never_there(tmp_path):
    with pytest.raises(ZeroDivisionError), appearing_whole(tmp_path / "out") as part:
        (part / "x").write_text("1")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


@pytest.mark.parametrize("new", [True, False], ids=["with the lost+found of a new disk", "bare"])
def test_an_empty_mount_point_is_filled(new, disk):
    """It cannot be renamed over, and the folder around it is another file system."""
    out = disk("size=1m")
    if new:
        (out / "lost+found").mkdir()
    with appearing_whole(out) as part:
        (part / "sub").mkdir()
        (part / "sub" / "x").write_text("1")
        (part / "config.json").write_text("{}")
    assert names(out) == ["config.json", *(["lost+found"] if new else []), "sub"]
    assert os.path.ismount(out)
    with pytest.raises(UserError, match="exists and is not empty"), appearing_whole(out):
        pass


def test_an_empty_folder_stays_the_folder_it_was(tmp_path):
    """A folder of the user's with rights of its own, in one where nothing else may be made."""
    (tmp_path / "out").mkdir(mode=0o750)
    before = (tmp_path / "out").stat()
    with appearing_whole(tmp_path / "out") as part:
        (part / "x").write_text("1")
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and names(tmp_path / "out") == ["x"]


@pytest.mark.parametrize("there", ["out.partial", "out.previous", ".out.partial", ".out", "out.whole", ".out.patarm"])
@pytest.mark.parametrize("replace", [True, False])
def test_folders_of_the_user_are_left_alone(there, replace, tmp_path):
    (tmp_path / there).mkdir()
    (tmp_path / there / "thesis").write_text("mine")
    if replace:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("1")
    with appearing_whole(tmp_path / "out", replace) as part:
        (part / "x").write_text("1")
    assert names(tmp_path) == sorted([there, "out"]) and names(tmp_path / "out") == ["x"]
    assert (tmp_path / there / "thesis").read_text() == "mine"


def test_what_is_replaced_stays_until_the_new_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(ZeroDivisionError), appearing_whole(tmp_path / "out", replace=True) as part:
        (part / "x").write_text("1")
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    for name in (f".out.{STALE}", ".out.patarm-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("1")
    held = os.open(tmp_path / ".out.patarm-00000000", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with appearing_whole(tmp_path / "out") as part:
        (part / "x").write_text("1")
    os.close(held)
    assert names(tmp_path) == [".out.patarm-00000000", "out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / f".empty.{STALE}").mkdir()  # killed while it filled a folder that was there
    with appearing_whole(tmp_path / "empty") as part:
        (part / "x").write_text("1")
    assert names(tmp_path / "empty") == ["x"]


def test_a_folder_that_does_not_fit_is_one_sentence(disk):
    out = disk("size=64k") / "out"
    with pytest.raises(UserError) as caught, appearing_whole(out) as part:
        (part / "x").write_bytes(bytes(1 << 20))
    said = (
        f"cannot write {out}: No space left on device; 0.0 GiB are free there. Free some space or name another place."
    )
    assert str(caught.value) == f"{said} Nothing else was touched."
    assert names(out.parent) == []


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_appears_whole_and_leaves_no_other(tmp_path):
    (tmp_path / "a.partial").write_text("mine")
    (tmp_path / f".a.{STALE}").write_text("half")
    write_text(tmp_path / "a", "one")
    write_json(tmp_path / "a", {"two": 2})
    assert json.loads((tmp_path / "a").read_text()) == {"two": 2}
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as part:
        part.write_text("three")
        1 / 0  # noqa: B018
    assert json.loads((tmp_path / "a").read_text()) == {"two": 2}
    assert names(tmp_path) == ["a", "a.partial"] and (tmp_path / "a.partial").read_text() == "mine"


def test_a_link_is_followed_and_a_device_is_no_file(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    write_text(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "a").read_text() == "1"
    write_text(Path("/dev/null"), "1")
    assert not Path("/dev/null").is_file() and Path("/dev/null").exists()


def test_a_name_as_long_as_file_systems_allow(tmp_path):
    path = tmp_path / ("ü" * 120)
    write_text(path, "1")
    assert names(tmp_path) == [path.name]


# ------------------------------------------------------------------------------------------------- what is in the way


def refusal(path, folder):
    with pytest.raises(UserError) as caught:
        check_writable(path, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("folder", [True, False])
def test_what_can_be_written_is_left_as_it_is(folder, tmp_path):
    check_writable(tmp_path / "a" / "b" / "out", folder)
    assert names(tmp_path) == []
    out = tmp_path / "out"
    out.mkdir() if folder else out.write_text("kept")
    before = out.stat().st_mtime_ns
    check_writable(out, folder)
    assert names(tmp_path) == ["out"] and (folder or (out.read_text() == "kept" and out.stat().st_mtime_ns == before))
    check_writable(Path("/dev/null"), folder=False)


@pytest.mark.parametrize("folder", [True, False])
def test_a_full_disk_is_noticed_beforehand(folder, disk):
    full = disk("size=64k")
    with pytest.raises(OSError):
        (full / "all").write_bytes(bytes(1 << 20))
    assert "No space left on device; 0.0 GiB are free there. Free some space" in refusal(full / "out", folder)
    assert names(full) == ["all"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_read_only_disk_is_not_a_full_one(folder, disk):
    readonly = disk("size=64k,ro")
    said = refusal(readonly / "new" / "out", folder)
    assert said.endswith("Read-only file system. Nothing can be written on that disk; name another place.")
    assert "Free some space" not in said


@pytest.mark.parametrize("folder", [True, False])
def test_a_parent_that_is_a_file(folder, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path / "notes" / "out", tmp_path / "notes" / "a" / "out"):
        said = refusal(out, folder)
        assert said == f"cannot write {out}: {tmp_path / 'notes'} is a file. Name a place inside a folder."


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path):
    (tmp_path / "notes").write_text("mine")
    assert refusal(tmp_path / "notes", True) == f"cannot write {tmp_path / 'notes'}: it is a file. Name a folder."
    assert refusal(tmp_path, False) == f"cannot write {tmp_path}: it is a folder. Name a file."


@pytest.mark.parametrize("folder", [True, False])
def test_a_folder_of_someone_else(folder, tmp_path):
    """As a user who may not write there; root may write everywhere."""
    (tmp_path / "theirs").mkdir(mode=0o755)
    code = (
        "import sys; from pathlib import Path; from tests.test_files import refusal; print(refusal(Path(sys.argv[1]), "
    )
    code += f"{folder}))"
    drop = "import os; os.setuid(65534); " if os.getuid() == 0 else ""
    if drop:
        for parent in [tmp_path, *tmp_path.parents[:-1]]:
            if parent.stat().st_mode & 0o005 != 0o005 and parent.is_relative_to("/tmp"):
                parent.chmod(0o755)
    else:
        (tmp_path / "theirs").chmod(0o555)
    # Everything is imported before the rights are given up: the environment may be another's too.
    head = "import patarm_jax.files, tests.test_files; "
    out = tmp_path / "theirs" / "new" / "out"
    done = subprocess.run(
        [sys.executable, "-c", head + drop + code, str(out)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    theirs = tmp_path / "theirs"
    assert done.stdout.strip() == (
        f"cannot write {out}: Permission denied. Name another place, or get the right to write in {theirs}."
    )


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "Remove some of your files there, ask for a larger quota, or name another place"),
        (errno.EMFILE, "Raise the limit of open files, such as with `ulimit -n 65536`"),
        (errno.ESTALE, "The disk, or the server that has it, does not answer as it should; look after it or name"),
        (errno.EPERM, "Name another place, or get the right to write in"),
        (errno.ENAMETOOLONG, "Name another place"),
    ],
)
def test_a_remedy_fits_what_is_in_the_way(number, remedy, tmp_path):
    said = str(cannot_write(tmp_path / "x", OSError(number, os.strerror(number))))
    assert said.startswith(f"cannot write {tmp_path / 'x'}: {os.strerror(number)}. {remedy}")
    assert "Free some space" not in said and "GiB" not in said


def test_a_disk_that_holds_no_more_files_is_not_called_full(disk):
    crowded = disk("size=1m,nr_inodes=3")
    (crowded / "a").touch()
    (crowded / "b").touch()
    assert refusal(crowded / "out", True).endswith(
        "No space left on device: it holds no more files. Remove some files or name another place."
    )


def test_what_is_kept_is_said(tmp_path):
    with pytest.raises(UserError, match=r"cannot write out: Is a directory\. Name another place\. Answers are kept\."):
        with writing(Path("out"), "Answers are kept."):
            tmp_path.write_text("")


# ----------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("gs://bucket/run", "Mount the bucket as a folder"),
        ("S3://bucket/run", "Mount the bucket as a folder"),
        (" abfss://bucket/run", "Mount the bucket as a folder"),
        ("simplecache::gs://bucket/run", "Mount the bucket as a folder"),
        ("hf://datasets/owner/name", "for data, the id on the Hub"),
        ("https://huggingface.co/datasets/owner/name", "for data on the Hugging Face Hub, the id (owner/name) will do"),
        ("file:///home/run", "Leave out file://"),
        ("file:/home/run", "Leave out file://"),
        ("C://x", "Mount"),
    ],
)
def test_an_address_is_no_path(address, says):
    with pytest.raises(UsageError) as caught:
        refuse_address(address, "run.folder")
    assert str(caught.value).startswith(f"run.folder is {address.strip()}, an address; a path is wanted. ")
    assert says in str(caught.value)


@pytest.mark.parametrize("path", ["runs/a", "/runs/a:b//c", "a:b/c", "owner/name", "", "~/x", "./gs:/x", "lr=1e-5:x"])
def test_a_path_is_no_address(path):
    refuse_address(path, "run.folder")
