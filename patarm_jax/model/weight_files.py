"""The safetensors files of a Hugging Face folder: which of them are read, whether the head is the embedding, one file.

The only file that knows safetensors. A folder is read as transformers reads it, or refused; what lies there and is
not read is told.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from patarm_jax.files import read_json_object
from patarm_jax.model.architecture import Architecture, read_architecture
from patarm_jax.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
# Names that weights have on disk, in the words of all who write them.
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_model*.bin", "consolidated*.pth", "tf_model*.h5", "flax_model*.msgpack"),
)
_DTYPES = {"F32", "F16", "BF16"}
_ROWS = 4096  # how many rows of two tensors are compared at a time
_SAMPLED = 1 << 16  # bytes in the middle of each tensor that tell a large model from another
_SMALL = 1 << 26  # bytes of a model that is read whole to tell it from another


@dataclass(frozen=True)
class Stored:
    """A model folder, as transformers would read it."""

    folder: Path
    arch: Architecture  # as the weights are: not tied where the files hold another head than the embedding
    listing: Path  # the file that says which tensors there are
    files: Mapping[str, Path]  # tensor → its file; empty: there are no weights
    remarks: tuple[str, ...]  # what the user is to be told, one line each

    @property
    def weight_files(self) -> list[Path]:
        """The files that are read, in order."""
        return sorted(set(self.files.values()))


def read_stored(folder: Path) -> Stored:
    """Finds out what a folder holds, before a shape is made of it; no weights are read but those of two heads.

    A folder without weights has no files: what can be planned without them is planned.

    Raises:
        UserError: when files are missing or damaged, or when the weights could be read in two ways.
    """
    arch = read_architecture(folder)
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{folder} holds {ADAPTER} beside config.json: an adapter, which transformers puts on top of the weights. "
            "Give the adapter's files a folder of their own and name it with model.adapter, or remove them if the "
            "weights are merged already."
        )
    listing, files = _list(folder)
    remarks = []
    if _has_its_own_head(arch, files):
        arch = dataclasses.replace(arch, tie_word_embeddings=False)
        remarks.append(
            f"{folder}: config.json says that the head is the embedding (tie_word_embeddings), and {HEAD} is another "
            "tensor: the model is taken with a head of its own, which it keeps when it is exported"
        )
    if arch.scalar_head and HEAD in files:
        remarks.append(f"{folder}: not read: {HEAD}, for which a scalar reward model has no use")
    if files and (left := _left_over(folder, {listing, *files.values()})):
        remarks.append(f"{folder}: weights are read from {listing.name}; not read: {_few(left)}")
    return Stored(folder=folder, arch=arch, listing=listing, files=files, remarks=tuple(remarks))


def _list(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The file that says which tensors there are, and the file of each tensor.

    Where both a single file and an index stand, transformers reads the single file, whichever is newer.
    """
    index, single = folder / INDEX, folder / SINGLE
    for path in (single, index):
        if path.is_symlink() and not path.exists():
            raise UserError(f"cannot read {path}: it is a link to a file that is not there. Copy the model again.")
    if single.is_file():
        with contextlib.ExitStack() as stack:
            return single, dict.fromkeys(open_file(single, stack).keys(), single)
    listed = read_json_object(index)
    if listed is None:
        return single, {}
    weight_map = listed.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(
            f"{index} is not a safetensors index: its weight_map is {reprlib.repr(weight_map)}, and should give a "
            "file for each tensor. Copy the file again."
        )
    files = {name: folder / shard for name, shard in weight_map.items()}
    for file in sorted(set(files.values())):
        _check_listing(file, {name for name, of in files.items() if of == file})
    return index, files


def _check_listing(file: Path, listed: set[str]) -> None:
    """Transformers takes from the index which files there are, and from each file all that is in it."""
    if not file.is_file():
        raise UserError(
            f"{file} is missing; it holds tensor {min(listed)} and {len(listed) - 1} more. Copy it again, and {INDEX}."
        )
    with contextlib.ExitStack() as stack:
        present = set(open_file(file, stack).keys())
    if missing := sorted(listed - present):
        raise UserError(f"{file}: tensor {missing[0]} is missing though {INDEX} lists it. Copy both files again.")
    if unlisted := sorted(present - listed):
        raise UserError(
            f"{file}: tensor {unlisted[0]} is there though {INDEX} does not list it in this file ({len(unlisted)} such "
            "in all), so it could be read in two ways. The two are not of one model; copy both files again."
        )


def _has_its_own_head(arch: Architecture, files: Mapping[str, Path]) -> bool:
    """Whether a tied config stands beside a head that is not the embedding, as after training with modules_to_save."""
    if arch.scalar_head or not arch.tie_word_embeddings or not {HEAD, EMBEDDING} <= files.keys():
        return False
    with contextlib.ExitStack() as stack:
        one, other = (open_file(files[name], stack).get_slice(name) for name in (EMBEDDING, HEAD))
        shape = one.get_shape()
        if shape != other.get_shape() or len(shape) != 2 or not {one.get_dtype(), other.get_dtype()} <= _DTYPES:
            return True  # and one of the two will be refused
        pieces = [slice(start, min(start + _ROWS, shape[0])) for start in range(0, shape[0], _ROWS)]
        return not all(_equal(one[piece], other[piece]) for piece in pieces)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether all numbers are equal, as torch.equal has it: a NaN is unlike everything."""
    return bool(np.array_equal(one.astype(np.float32), other.astype(np.float32)))


def no_weights(stored: Stored) -> UserError:
    """What is said of a folder without weights that are read here."""
    left = _left_over(stored.folder, set())
    return UserError(
        f"{stored.folder} holds neither {SINGLE} nor {INDEX}{f', but {_few(left)}' if left else ''}. Give a folder "
        "with safetensors weights; shards need the index that was written with them."
    )


def _left_over(folder: Path, taken: set[Path]) -> list[str]:
    """Files of weights in a folder that are not read."""
    names = sorted(path.name for path in folder.iterdir() if path not in taken and path.is_file())
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHTS)]


def _few(names: list[str], most: int = 4) -> str:
    """A list that stays on one line.

    >>> _few(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def digest(stored: Stored) -> str:
    """Tells the weights that are read from all others, in 16 hexadecimal digits.

    Names, shapes, dtypes and bytes of the tensors count; where the folder lies, into how many files it is cut, and what
    is not read do not. Of a model of more than 64 MiB the middle 64 KiB of every tensor stand for all of it: a few
    hundred reads, 28 MB for 14B weights.
    """
    found, places = hashlib.sha256(), _places(stored)
    unread = {HEAD} if stored.arch.tie_word_embeddings or stored.arch.scalar_head else set()
    read = sorted(places.keys() - unread)
    whole = sum(end - begin for _, begin, end, _ in places.values()) <= _SMALL
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(file)) for file in stored.weight_files}
        for name in read:
            file, begin, end, about = places[name]
            found.update(json.dumps([name, about["dtype"], about["shape"]]).encode())
            if not whole:
                begin = max(begin, (begin + end - _SAMPLED) // 2)
                end = min(end, begin + _SAMPLED)
            try:
                opened[file].seek(begin)
                found.update(opened[file].read(end - begin))
            except OSError as error:
                raise _unreadable(file, error) from error
    return found.hexdigest()[:16]


def _places(stored: Stored) -> dict[str, tuple[Path, int, int, dict[str, object]]]:
    """Tensor → (its file, where in it the tensor begins, where it ends, what the header says of it)."""
    places = {}
    for file in stored.weight_files:
        with _opened(file) as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, about in header.items():
            if stored.files.get(name) == file:
                begin, end = (8 + size + offset for offset in about["data_offsets"])
                places[name] = file, begin, end, about
    return places


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {file}: {error.strerror}. Check that the whole model is there.")


# ------------------------------------------------------------------------------------------------------------ one file


def check_file(
    file: Path,
    wanted: Mapping[str, tuple[int, ...]],
    asks: str = "config.json",
    wrong: str = "The weights and the config are of different models.",
) -> None:
    """Refuses a file in which a tensor has another shape or dtype than can be read.

    Args:
        file: of safetensors.
        wanted: tensor → shape.
        asks: what asks for these shapes.
        wrong: a sentence on what a tensor of another shape means.
    """
    with contextlib.ExitStack() as stack:
        opened = open_file(file, stack)
        for name, shape in wanted.items():
            tensor = opened.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{file}: tensor {name} is stored as {tensor.get_dtype()}; supported are F32, F16 and BF16. "
                    "Use the unquantised model."
                )
            if tuple(tensor.get_shape()) != shape:
                raise UserError(
                    f"{file}: tensor {name} has shape {tensor.get_shape()} and {asks} asks for {list(shape)}. {wrong}"
                )


def open_file(file: Path, stack: contextlib.ExitStack) -> Any:
    """A safetensors file, mapped until the stack is closed."""
    try:
        return stack.enter_context(safetensors.safe_open(file, "np"))
    except safetensors.SafetensorError as error:
        tensor = _first_cut_tensor(file)
        at = f"it ends before tensor {tensor} does" if tensor else "its header is damaged, so no tensor can be read"
        raise UserError(f"{file} is truncated or damaged: {at} ({error}). Copy the file again.") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}. Make it a file that you may read.") from error


def write_file(file: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a file as transformers does; OSError when the disk does not take it."""
    try:
        safetensors.numpy.save_file(dict(tensors), file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor whose bytes lie past the end of a file that safetensors will not open."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size))
            spans = sorted((v["data_offsets"][1], k) for k, v in header.items() if k != "__metadata__")
            end = file.stat().st_size - 8 - size
            return next((name for stop, name in spans if stop > end), None)
        except (ValueError, MemoryError, OverflowError, RecursionError):
            return None
        except (AttributeError, LookupError, TypeError):  # JSON, but not that of a header
            return None
