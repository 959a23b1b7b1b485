"""Files of users, read within bounds; our own, written whole or not at all; and seals."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from aftcli.errors import AftError

if TYPE_CHECKING:
    from torch import Tensor


FOLLOW = "AFT_FOLLOW_LINKS"  # set by who trusts the links in a data set

LARGEST_TEXT = 2**24  # bytes of class names, of a list, of an annotation

TEMPORARY = re.compile(r"\.(?P<writer>[0-9]+)-(?P<name>.*)", re.DOTALL)  # of a process by its id


def check_folder(path: Path) -> None:
    """Check that a folder is there."""
    if not path.is_dir():
        raise AftError(f"{path}: there is no such folder")


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint is there."""
    if not path.is_file():
        raise AftError(f"{path}: there is no such checkpoint file")


def cache_folder() -> Path:
    """Return the folder of what is kept for later runs: $AFT_CACHE, or the user's cache/aft."""
    own = os.environ.get("AFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "aft"


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote a file."""
    _delete_stale(path, _temporaries(path.parent))


def _temporaries(folder: Path) -> dict[str, list[str]]:
    """Find what may be temporary files in a folder: their writers, by the files' names."""
    writers = defaultdict(list)
    with suppress(OSError):
        for name in os.listdir(folder):
            if found := TEMPORARY.fullmatch(name):
                writers[found["name"]].append(found["writer"])
    return writers


# Scanned once a process: each file's own scan would make a folder of many take quadratic time.
_scanned = cache(_temporaries)


def _delete_stale(path: Path, writers: Mapping[str, Sequence[str]]) -> None:
    for writer in writers.get(path.name, ()):
        if not psutil.pid_exists(int(writer)):
            path.with_name(f".{writer}-{path.name}").unlink(missing_ok=True)


def inside(folder: Path, name: str, named: Path | None = None) -> Path:
    """Return a file below a folder that someone else may have packed, refusing any outside it.

    Args:
        folder: where names are relative to.
        name: of the file, from a listing or another file.
        named: the folder that the user named, which links must not leave; default `folder`.
    """
    path, named = folder / name, named or folder
    if os.path.isabs(name) or ".." in name.split("/"):
        raise AftError(f"{path}: leads out of {folder}; only files below it are read")
    if not os.environ.get(FOLLOW):
        real, allowed = os.path.realpath(path), os.path.realpath(named)
        if os.path.commonpath([real, allowed]) != allowed:
            raise AftError(
                f"{path}: is a link that leads out of {named}; set {FOLLOW}=1 if you trust the "
                "links there"
            )
    return path


def read_bounded(path: Path) -> bytes:
    """Read a file that may be any user's.

    Raises:
        OSError: it can't be read.
        ValueError: it is no regular file, or larger than LARGEST_TEXT.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT} bytes")
    return content


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        OSError: it can't be read.
        ValueError: it is no regular file, larger than LARGEST_TEXT, or not in UTF-8.
    """
    return read_bounded(path).decode("utf-8-sig")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: to a temporary one, renamed at the end."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    _delete_stale(path, _scanned(path.parent.absolute()))
    temporary.unlink(missing_ok=True)
    # Made exclusively, so that a link planted under its name is not followed.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all, also through a power loss.

    Args:
        path: of the file; what is written to the path that is yielded is renamed to it.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise AftError(
            f"{path}: can't be written ({getattr(error, 'strerror', None) or error}); free space "
            "or choose another --run; the same command resumes where it stopped"
        ) from error


def require_space(path: Path, size: int) -> None:
    """Fail cleanly, with OSError, if a file of that size can't be written."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Args:
        path: of the file.
        tensors: by name.
        metadata: text by name.
    """
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with durable(path) as temporary:
        # Not save_file: it writes another temporary file, which a kill would leave behind.
        temporary.write_bytes(save(plain, dict(metadata)))


def values_hash(values: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of plain values, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors, their names, shapes and types."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def write_sealed(
    path: Path, tensors: Mapping[str, Tensor], name: str, head: Mapping[str, Any]
) -> None:
    """Write tensors and plain values whole or not at all, with a hash of both.

    Args:
        path: of the safetensors file.
        tensors: by name.
        name: of the metadata's entry for the values.
        head: plain values, such as the settings that the tensors were computed with.
    """
    text = json.dumps(head)
    # One entry: safetensors writes several in an order that changes from run to run.
    sealed = {"head": text, "sha256": _seal(text, tensors)}
    write_tensors(path, tensors, {name: json.dumps(sealed)})


def read_sealed(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the tensors and the head of a sealed file; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
        with safe_open(path, "pt") as file:
            sealed = json.loads(file.metadata()[name])
        # Not load_file: its tensors are the file itself, which may change.
        tensors = dict(sorted(load(path.read_bytes()).items()))
        if sealed["sha256"] == _seal(sealed["head"], tensors):
            return tensors, json.loads(sealed["head"])
    return None


def _seal(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash both, so that a flipped bit in either is found."""
    return hashlib.sha256((text + tensors_hash(tensors)).encode()).hexdigest()


def file_stem(model: str, what: str) -> str:
    """Name the files of a run after a model and what was done with it.

    >>> file_stem("timm:resnet18.a1_in1k", "gradcam")
    'timm_resnet18.a1_in1k-gradcam'
    >>> file_stem("/home/me/nets/mine.py:small", "gradcam")
    'mine.py_small-gradcam'
    """
    kind, absolute, place = model.rpartition(":/")  # hf:/home/me/nets/vit
    if absolute or model.startswith("/"):
        model = f"{kind}{':' if absolute else ''}{Path(place).name}"
    return f"{model.replace(':', '_').replace('/', '_')}-{what}"


def make_folder(path: Path) -> Path:
    """Make a folder of a run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AftError(
            f"{path}: can't be made ({error.strerror or error}); give another --run"
        ) from error
    return path
