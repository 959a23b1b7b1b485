"""manifest.json of an output folder: what made each file, and which image has which name."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from aftcli.errors import AftError
from aftcli.files import replacing, sweep
from aftcli.locks import BusyError, waiting
from aftcli.version import __version__

NAME = "manifest.json"

FORMAT = 1

PAUSE = 2.0  # seconds, the least between two writes of the file

SHARE = 0.05  # of the time, the most that writes of the file take: it lists all there is

LENGTHS = (6, 12, 64)  # digits of an image's hash in its name, more where fewer are taken

Entries = dict[str, dict[str, Any]]


class Listed(NamedTuple):
    """The content of a manifest.

    Attributes:
        images: by the name that files begin with, in lower case: path, hash, size, time.
        files: by name: the kind of file and what made it.
    """

    images: Entries
    files: Entries


class Manifest:
    """The manifest of one folder, as one call adds to it.

    It is read and written whole under a lock, so that calls may run side by side. A call writes it
    at the start, where it takes names for its images, some seconds apart, and at the end.

    Args:
        folder: where the files are.
        call: what is the same for all files: settings and the command.
        note: is told what a user does not expect.
        inputs: files beside images that results depend on, such as checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        call: Mapping[str, Any],
        note: Callable[[str], None],
        inputs: Iterable[Path] = (),
    ) -> None:
        self.path = folder / NAME
        self.inputs = {str(_absolute(path)): _Image(path).hash() for path in inputs}
        self.call = {**call, **({"inputs": self.inputs} if self.inputs else {})}
        self.call["version"] = __version__
        self.note = note
        self.taken: Entries = {}  # images that this call has names for
        self.new: set[str] = set()  # names that no file had
        self.added: Entries = {}  # files that are not saved yet
        self.known: dict[str, Any] = {}  # inputs of files that the manifest lists, by name
        self.unlisted: list[str] = []  # files that were overwritten and that it does not list
        self.outdated: list[str] = []  # files that were overwritten and had other inputs
        self.due = 0.0

    def names(self, stems: Mapping[Path, str]) -> dict[Path, str]:
        """Take the names that files begin with; a name of another image gets a hash at its end.

        Args:
            stems: wanted names by image, different ones.

        Raises:
            AftError: the manifest can't be read, or another process holds it.
        """
        found, others = {}, []
        with self._held():
            listed = self._read()
            _drop_gone(listed, self.path.parent)
            self.known = {name: entry.get("inputs", {}) for name, entry in listed.files.items()}
            for path, stem in stems.items():
                image = _Image(path)
                found[path] = next(c for c in image.candidates(stem) if image.owns(c, listed))
                if found[path] != stem:
                    others.append(path)
                key = found[path].lower()
                if key not in listed.images and image.stat:
                    self.new.add(key)
                    listed.images[key] = image.entry()
                self.taken[key] = listed.images.get(key, {})
            with suppress(OSError):  # of a full disk: pictures say it better, and `close`
                self._write(listed)
        self.due = time.monotonic() + PAUSE
        if others:
            first = others[0]
            more = f"; so are {len(others) - 1} more" if others[1:] else ""
            self.note(
                f"{self.path.parent}: has files of another image named {stems[first]}; those of "
                f"{first} are named {found[first]}{more}"
            )
        return found

    def add(self, path: Path, images: Mapping[str, Path], made: Mapping[str, Any]) -> None:
        """List a file that is about to be written.

        If it is not, the manifest does not list it in the end.

        Args:
            path: of the file.
            images: that it shows, by the names taken for them.
            made: what made it.
        """
        if path.name not in self.known and path.exists():
            self.unlisted.append(path.name)
        # Calls on several networks name more inputs than each file has.
        before = self.known.get(path.name, {})
        if any(before.get(file, digest) != digest for file, digest in self.inputs.items()):
            self.outdated.append(path.name)
        shown = [self._image(*each) for each in images.items()]
        of = {key: [image.get(key) for image in shown] for key in ("image", "sha256")}
        entry = {"stem": next(iter(images)) if len(images) == 1 else ""}
        alone = {key: values[0] if entry["stem"] else values for key, values in of.items()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.added[path.name] = {**entry, **alone, **made, **self.call, "time": now}
        self.known[path.name] = self.inputs
        if time.monotonic() > self.due:
            with suppress(AftError):  # said by `close`
                self.save()

    def hash_of(self, stem: str, image: Path) -> str:
        """Return the SHA-256 of an image that has a name; "" if it can't be read."""
        return str(self._image(stem, image).get("sha256") or "")

    def _image(self, stem: str, path: Path) -> dict[str, Any]:
        image = self.taken.setdefault(stem.lower(), {})
        image |= {} if image.get("sha256") else _Image(path).entry(hashed=True)
        return image

    def save(self) -> None:
        """Write what was added since.

        Raises:
            AftError: the file can't be read or written, or another process holds it.
        """
        written = {k: v for k, v in self.added.items() if self.path.with_name(k).exists()}
        if not written:
            return
        start = time.monotonic()
        try:
            with self._held():
                listed = self._read()
                listed.files.update(written)
                listed.images.update((k, v) for k, v in self.taken.items() if v)
                self._write(listed)
        except OSError as error:
            raise AftError(
                f"{self.path}: can't be written ({error.strerror or error}); it does not list "
                f"{len(written)} of the files beside it"
            ) from error
        self.added = {k: v for k, v in self.added.items() if k not in written}
        self.new -= {entry["stem"].lower() for entry in written.values()}
        took = time.monotonic() - start
        self.due = time.monotonic() + max(PAUSE, took / SHARE)

    def close(self) -> None:
        """Write what was added, give back names without files, and say what was overwritten.

        Raises:
            AftError: see `save`.
        """
        changed = ", ".join(Path(path).name for path in self.inputs)
        for names, why in (
            (self.unlisted, f"which {NAME} did not list"),
            (self.outdated, f"made with another content of {changed}"),
        ):
            if names:
                left = len(names) - 1
                more = f" and {left} more file{'s' * (left > 1)}" if left else ""
                self.note(f"{self.path.parent}: overwrote {names[0]}{more}, {why}")
                names.clear()
        self.save()
        if unused := self.new:
            self.new = set()
            with suppress(OSError, AftError), self._held():
                listed = self._read()
                used = {entry["stem"].lower() for entry in listed.files.values()}
                for key in unused - used:
                    listed.images.pop(key, None)
                if self.path.exists():
                    self._write(listed)

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            with waiting(self.path):
                yield
        except BusyError as error:
            raise AftError(
                f"{self.path}: another process has held it for too long; end it, or give another "
                "--out"
            ) from error

    def _read(self) -> Listed:
        try:
            return _parsed(self.path.read_bytes())
        except FileNotFoundError:
            return Listed({}, {})
        except OSError as error:
            raise AftError(
                f"{self.path}: can't be read ({error.strerror or error}); give another --out"
            ) from error
        except (ValueError, RecursionError):
            kept = self.path.with_name(f"{NAME}.bak")
            os.replace(self.path, kept)
            self.note(
                f"{self.path}: is damaged, or of another version of aft; it is kept as "
                f"{kept.name}, and a new one lists files from now on"
            )
            return Listed({}, {})

    def _write(self, listed: Listed) -> None:
        sweep(self.path)
        with replacing(self.path) as temporary:
            temporary.write_text(_text(listed), encoding="ascii")


@contextmanager
def writing(
    manifest: Manifest | None, path: Path, images: Mapping[str, Path], made: Mapping[str, Any]
) -> Iterator[Path]:
    """Write a file whole or not at all, and list it.

    Args:
        manifest: lists it; None for no list.
        path: see `Manifest.add`.
        images: see `Manifest.add`.
        made: see `Manifest.add`.

    Raises:
        AftError: it can't be written.
    """
    if manifest:
        manifest.add(path, images, made)
    with unwritable(path), replacing(path) as temporary:
        yield temporary


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Tell that a file can't be written where the system says so."""
    try:
        yield
    except OSError as error:
        raise AftError(f"{path}: can't be written ({error.strerror or error})") from error


class _Image:
    """A file of an image or another input: a name is its own as long as its content is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256: str | None = None
        self.stat: os.stat_result | None = None
        with suppress(OSError):
            self.stat = path.stat()

    def entry(self, hashed: bool = False) -> dict[str, Any]:
        """Return the values that tell it from others; the hash may come later."""
        values: dict[str, Any] = {"image": str(_absolute(self.path)), "sha256": self.sha256}
        if self.stat:
            values |= {"size": self.stat.st_size, "modified": self.stat.st_mtime_ns}
        return {**values, "sha256": self.hash()} if hashed else values

    def hash(self) -> str | None:
        """Compute the SHA-256 of the file; None if it can't be read."""
        if self.sha256 is None:
            with suppress(OSError), self.path.open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self.sha256

    def candidates(self, stem: str) -> Iterator[str]:
        """Yield names: the one wanted, then with more and more digits of the hash."""
        yield stem
        if digest := self.hash():
            yield from (f"{stem}-{digest[:length]}" for length in LENGTHS)
        yield stem  # what can't be read writes nothing

    def owns(self, name: str, listed: Listed) -> bool:
        """Tell if a name is free, or this image's already, by its content."""
        owner = listed.images.get(name.lower())
        if owner is None or self.stat is None:
            return True
        mine = self.entry()
        if all(owner.get(key) == mine[key] for key in ("image", "size", "modified")):
            return True
        # Without a hash yet, its call is running, or was killed.
        return bool(owner.get("sha256")) and owner["sha256"] == self.hash()


def written_in(folder: Path) -> set[str]:
    """Return the names of files that a folder's manifest lists; none if it can't be read."""
    path = folder / NAME
    try:
        return set(_parsed(path.read_bytes()).files) if path.is_file() else set()
    except (OSError, ValueError, RecursionError):
        return set()


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _drop_gone(listed: Listed, folder: Path) -> None:
    """Drop files that were deleted, and the names of images that have no file left."""
    there = {each.name for each in os.scandir(folder)}
    stems = {entry["stem"].lower() for entry in listed.files.values()}
    for name in set(listed.files) - there:
        del listed.files[name]
    left = {entry["stem"].lower() for entry in listed.files.values()}
    for stem in stems - left:
        listed.images.pop(stem, None)


def _parsed(data: bytes) -> Listed:
    """Read a manifest.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(data)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("no manifest")
    listed = Listed(found.get("images", {}), found.get("files", {}))
    for entries in listed:
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise ValueError("no entries")
    for entry in listed.files.values():
        if not isinstance(entry.get("stem"), str) or not isinstance(entry.get("inputs", {}), dict):
            raise ValueError("no entry")
    return listed


def _text(listed: Listed) -> str:
    """Write a manifest as JSON, a line an entry."""
    parts = []
    for name, entries in zip(Listed._fields, listed, strict=True):
        lines = (f"  {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
        body = ",\n".join(lines)
        parts.append(f' "{name}": {{\n{body}\n }}' if body else f' "{name}": {{}}')
    joined = ",\n".join(parts)
    return f'{{\n "format": {FORMAT},\n{joined}\n}}\n'
