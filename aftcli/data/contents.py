"""What files hold, by hash: so that a data set that changes between runs is noticed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aftcli.files import durable

GONE = 0  # the content of what can't be read


def stamp_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns of a file; zeros of what is not there."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_size, found.st_mtime_ns


def content_of(path: Path) -> int:
    """The first 64 bits of the SHA-256 of a file, signed; GONE if it can't be read."""
    try:
        return _short(_file_hash(path))
    except OSError:
        return GONE


def _short(sha256: str) -> int:
    return int.from_bytes(bytes.fromhex(sha256)[:8], "little", signed=True)


def changed(paths: Iterable[Path], contents: np.ndarray, stamps: np.ndarray) -> Iterator[int]:
    """Find the files that no longer hold what they did; those of the same stamp are not read.

    Args:
        paths: n files.
        contents: of each when it was used, shape (n,) int64.
        stamps: likewise, shape (n, 2) int64.

    Yields:
        Their places. What can't be read is left to whoever reads it.
    """
    for i, (path, content, stamp) in enumerate(zip(paths, contents, stamps, strict=True)):
        if stamp_of(path) != (stamp[0], stamp[1]) and content_of(path) not in (content, GONE):
            yield i


def content_hash(files: Iterable[Path], known_in: Path) -> str:
    """A hash of files' names and contents; each content is read again only if it changed.

    Args:
        files: in their order.
        known_in: a JSON file that remembers size, time and hash of each.

    Raises:
        AftError: what is to be remembered can't be written.
    """
    digest = hashlib.sha256()
    for path, found in _hashes(files, known_in):
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {found or 'unreadable'}\n"))
    return digest.hexdigest()


def contents_of(files: Iterable[Path], known_in: Path) -> list[int]:
    """The content of each file (`content_of`); arguments as of `content_hash`."""
    return [_short(found) if found else GONE for _, found in _hashes(files, known_in)]


def pack(contents: Iterable[int]) -> str:
    """Contents as text, each once.

    >>> sorted(unpack(pack([3, -1, 3])))
    [-1, 3]
    """
    return base64.b64encode(np.unique(np.array([*contents], "<i8")).tobytes()).decode()


def unpack(text: str) -> frozenset[int]:
    """The inverse of `pack`."""
    return frozenset(np.frombuffer(base64.b64decode(text), "<i8").tolist())


def _hashes(files: Iterable[Path], known_in: Path) -> list[tuple[Path, str]]:
    """Files with the SHA-256 of each, "" for what can't be read; remembered in `known_in`."""
    known = _known(known_in)
    seen: dict[str, list[Any]] = {}
    found = []
    for path in files:
        name = str(path.absolute())
        try:
            stat = path.stat()
            at = [stat.st_size, stat.st_mtime_ns]
            old = known.get(name)
            new = old if old and old[:2] == at else [*at, _file_hash(path)]
        except OSError:
            new = [0, 0, "unreadable"]
        seen[name] = new
        found.append((path, "" if new[2] == "unreadable" else str(new[2])))
    if any(known.get(name) != value for name, value in seen.items()):
        with durable(known_in) as temporary:
            temporary.write_text(json.dumps({**known, **seen}), encoding="utf-8")
    return found


def _known(path: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
