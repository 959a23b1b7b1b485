"""Tar shards as a format of data sets, as WebDataset names their members.

Nothing is unpacked: an index, made once and kept in the user's cache folder, says where in its
shard each picture begins.
"""

from __future__ import annotations

import json
import os
import random
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from aftcli.core.classes import Classes
from aftcli.data.names import files_named, is_pattern
from aftcli.data.parts import Chosen, are_of_split, choose_files, refuse_mixed
from aftcli.data.picture import SUFFIXES, FilePicture, Picture, is_picture
from aftcli.data.sets import DataSet, Format, Sample
from aftcli.errors import AftError, AftWarning, listed, reason
from aftcli.files import FOLLOW, cache_folder, inside, replacing
from aftcli.formats.folders import has_pictures, is_hidden
from aftcli.formats.listed import label_classes

ENDING = ".tar"

VERSION = 1  # of an index

LABEL = ".cls"

FIELDS = ("class_name", "label_name", "wnid", "label", "class", "cls")  # of a .json, in this order

LARGEST_LABEL = 2**20  # bytes of a .cls or .json

LONGEST_LABEL = 200  # characters

MANY = 20  # shards without an index, of which it is said that they are read

# What is said of members that are no samples, by the key that an index keeps them under.
SAID = {
    "hidden": "skipped hidden members",
    "outside": "skipped members whose names lead out of their shard",
    "linked": "skipped members that are links",
    "twice": "skipped members whose name another one has",
    "several": "skipped further pictures of a key",
    "last": "members may be missing, for a shard has no end after",
}


class Shards(Format):
    """Tar files with pictures, and labels beside them or as their folders."""

    def open(self, path: Path, split: str | None, classes: Classes, default: str) -> DataSet | None:
        """Open a folder with *.tar, a tar, or those that a pattern names; see `Format.open`."""
        found = _shards(path)
        if not found:
            return None
        chosen = choose_files(path, found, split, default)
        indices = _indices([inside(chosen.root, name) for name in chosen.files])
        return _data_set(chosen, indices, classes)

    def suits(self, path: Path) -> bool:
        """Tell shards from archives that lie beside the pictures that were in them."""
        return not path.is_dir() or not has_pictures(path)

    def picture(self, data_set: DataSet, name: str) -> Picture:
        """Return a member of a shard."""
        shard, ending, member = name.partition(f"{ENDING}/")
        if not ending or _is_outside(member):
            raise AftError(f"{data_set.root / name}: is no member of a shard of this data set")
        path = _inside(data_set.root, shard + ENDING, data_set.named, os.environ.get(FOLLOW))
        try:
            stamp = FilePicture(path).stat()
        except OSError as error:
            raise AftError(f"{path}: can't be read ({reason(error)})") from error
        place = _places(path, stamp).get(member)
        if place is None:
            raise AftError(f"{data_set.root / name}: the shard has no such member")
        return Member(path, str(data_set.root / name), *place, stamp)

    def has_split(self, root: Path, split: str) -> bool:
        """Tell if names of shards are of a split."""
        return are_of_split(root, _shards(root), split)


class Member(Picture):
    """A picture in a shard, of which only its own bytes are read.

    Args:
        shard: the tar file.
        name: see `Picture`.
        offset: of its first byte in the shard.
        size: bytes.
        stamp: size and time of the last change of the shard.
    """

    def __init__(
        self, shard: Path, name: str, offset: int, size: int, stamp: tuple[int, int]
    ) -> None:
        self.shard, self.name, self.offset, self.size = shard, name, offset, size
        self.stamp = stamp
        self._read: bytes | None = None

    def open(self) -> BinaryIO:
        """Read it into memory, once."""
        if self._read is None:
            # Before memory is taken for it: a header may claim any size.
            if self.offset + self.size > self.stamp[0]:
                raise OSError("its shard ends amid it")
            self._read = os.pread(_handle(self.shard, self.stamp).number, self.size, self.offset)
        return BytesIO(self._read)

    def stat(self) -> tuple[int, int]:
        """Return its size and when its shard changed last."""
        return self.size, self.stamp[1]


class _Handle:
    """A file that is open until nothing uses it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.number)


@lru_cache(maxsize=8)
def _handle(path: Path, stamp: tuple[int, int]) -> _Handle:
    # It may be inherited by workers: reads by offset do not move it.
    return _Handle(path)


@lru_cache(maxsize=64)
def _inside(root: Path, shard: str, named: Path | None, follow: str | None) -> Path:
    return inside(root, shard, named)


def _shards(path: Path) -> list[Path]:
    """Find the tar files that a name means: a folder's, one, or those of a pattern."""
    if path.is_dir():
        found = sorted([*path.glob(f"*{ENDING}"), *path.glob(f"*/*{ENDING}")])
        return [p for p in found if not any(map(is_hidden, p.relative_to(path).parts))]
    found = files_named(path) if is_pattern(path) else [path]
    return found if all(p.suffix == ENDING and p.is_file() for p in found) else []


def _data_set(chosen: Chosen, indices: Sequence[Index], classes: Classes) -> DataSet:
    """Join the indices of shards: their order and that in them is kept."""
    root, split, shards, named = chosen
    skipped: dict[str, list[str]] = defaultdict(list)
    from_files = any(label is not None for index in indices for label in index.labels)
    labels: list[str | None] = []
    names: list[str] = []
    for shard, index in zip(shards, indices, strict=True):
        for why, members in index.skipped.items():
            skipped[SAID[why]] += [f"{shard}/{member}" for member in members]
        names += [f"{shard}/{member}" for member in index.names]
        labels += index.labels if from_files else map(_folder_of, index.names)
    skipped["skipped pictures without a label"] = [
        name for name, label in zip(names, labels, strict=True) if label is None
    ]
    notes = [f"{root}: {why}: {listed(n)}" for why, n in skipped.items() if n]
    if not from_files:
        refuse_mixed(root, names)
    known = dict.fromkeys(label for label in labels if label is not None)
    if not known:
        raise AftError(
            f"{root}: there is no labelled picture in {listed(shards)}; beside key.jpg lies its "
            f"label as key.cls or key.json, or pictures lie in folders named by their classes"
            f"{''.join(f'; {note}' for note in notes[:1])}"
        )

    def refuse(label: str, why: str) -> AftError:
        return AftError(f"{root / names[labels.index(label)]}: {why}")

    found = label_classes(list(known), classes, refuse)
    samples = [
        Sample(name, found.class_of[label])
        for name, label in zip(names, labels, strict=True)
        if label is not None
    ]
    notes += [f"{root}: {note}" for note in found.notes]
    of = ("shards", root, split, found.names, found.mapped, samples)
    return DataSet(*of, notes=tuple(notes), files=named)


def _folder_of(member: str) -> str | None:
    return os.path.basename(os.path.dirname(member)) or None


class Index(NamedTuple):
    """The pictures of a shard, in their order.

    Attributes:
        names: of the members.
        offsets: of their first bytes.
        sizes: in bytes.
        labels: texts; None where no member says one.
        skipped: names of other members, by a key of SAID.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[str | None]
    skipped: dict[str, list[str]]


def _indices(shards: Sequence[Path]) -> list[Index]:
    """Read the index of each shard, and make those that are missing."""
    stamps = {}
    for shard in shards:
        try:
            stamps[shard] = FilePicture(shard).stat()
        except OSError as error:
            raise AftError(f"{shard}: can't be read ({reason(error)})") from error
    found = {shard: _kept(shard, stamps[shard]) for shard in shards}
    missing = [shard for shard, index in found.items() if index is None]
    if len(missing) > MANY:
        warnings.warn(
            f"{missing[0].parent}: reads where the members of {len(missing)} shards begin, once",
            AftWarning,
            stacklevel=2,
        )
    # Processes that share a run meet different shards first, and do the work once together.
    for shard in random.Random(os.getpid()).sample(missing, len(missing)):
        found[shard] = _index_of(shard, stamps[shard])
    return [index for index in found.values() if index is not None]


@lru_cache(maxsize=64)
def _places(shard: Path, stamp: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return offset and size of each picture of a shard, by its name."""
    index = _index_of(shard, stamp)
    places = zip(index.offsets, index.sizes, strict=True)
    return dict(zip(index.names, places, strict=True))


def _index_of(shard: Path, stamp: tuple[int, int]) -> Index:
    kept = _kept(shard, stamp)
    if kept is not None:
        return kept
    index = _scan(shard)
    path = _kept_in(shard)
    with suppress(OSError):  # without a cache folder it is made again at each start
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps([VERSION, *stamp, *index]), encoding="utf-8")
    return index


def _kept_in(shard: Path) -> Path:
    name = sha256(os.fsencode(os.path.realpath(shard))).hexdigest()[:32]
    return cache_folder() / "shards" / f"{name}.json"


def _kept(shard: Path, stamp: tuple[int, int]) -> Index | None:
    """Read the index that was made of a shard as it is now; None if there is none."""
    try:
        version, size, changed, *parts = json.loads(_kept_in(shard).read_text(encoding="utf-8"))
        index = Index(*parts)
        whole = len({len(part) for part in index[:4]}) == 1 and set(index.skipped) <= set(SAID)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return index if whole and (version, size, changed) == (VERSION, *stamp) else None


def _scan(shard: Path) -> Index:
    """Read a shard's headers, and the members that are labels, from its begin to its end."""
    pictures: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    labels: dict[str, dict[str, str | None]] = defaultdict(dict)
    skipped: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for file, member in _members(shard, skipped):
        name = member.name.removeprefix("./")
        key, ending = _key_of(name)
        is_label = ending in (LABEL, ".json")
        if member.isdir() or not (is_label or is_picture(name)):
            continue
        if why := _why_skipped(name, member, seen):
            skipped[why].append(name)
            continue
        seen.add(name)
        if is_label:
            file.seek(member.offset_data)
            labels[key][ending] = _label_in(file.read(min(member.size, LARGEST_LABEL)), ending)
        else:
            pictures[key].append((name, member.offset_data, member.size))
    index = Index([], [], [], [], skipped)
    for key, found in pictures.items():
        own = labels.get(key, {})
        label = own.get(LABEL) or own.get(".json")
        if label is not None:
            found.sort(key=lambda each: _key_of(each[0])[1] not in SUFFIXES)
            skipped["several"] += [name for name, *_ in found[1:]]
            found = found[:1]
        for name, offset, size in found:
            index.names.append(name)
            index.offsets.append(offset)
            index.sizes.append(size)
            index.labels.append(label)
    return index


def _why_skipped(name: str, member: tarfile.TarInfo, seen: set[str]) -> str | None:
    """Say by a key of SAID why a member is no picture or label; None if it is one."""
    if any(map(is_hidden, name.split("/"))) and ".." not in name.split("/"):
        return "hidden"
    if _is_outside(name):
        return "outside"
    if not member.isreg() or member.issparse():
        return "linked"
    return "twice" if name in seen else None


def _is_outside(name: str) -> bool:
    return os.path.isabs(name) or ".." in name.split("/") or "\0" in name


def _members(
    shard: Path, skipped: Mapping[str, list[str]]
) -> Iterator[tuple[BinaryIO, tarfile.TarInfo]]:
    """Yield the members of a tar file up to its end, or to where it is cut off.

    Raises:
        AftError: it can't be read, or is damaged amid.
    """
    last = ""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            length = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                last = member.name
                yield file, member
                tar.members = []  # type: ignore[attr-defined] # they would fill memory
                if member.offset_data + member.size > length:
                    break
            # A damaged header ends it too, like its last block, which is of zeros.
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
            if any(end):
                raise tarfile.ReadError("the next header is damaged")
            if not end:
                skipped["last"].append(last)
    except (tarfile.TarError, OSError, EOFError) as error:
        where = f" after {last}" if last else ", or is compressed"
        raise AftError(
            f"{shard}: is no whole tar file{where} ({reason(error)}); copy or unpack it again, or "
            "name the others by braces or wildcards"
        ) from error


def _key_of(name: str) -> tuple[str, str]:
    """Divide a member's name into its key and its ending, at the first dot as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    key, dot, ending = base.partition(".")
    return f"{folder}{slash}{key}", f"{dot}{ending}".lower()


def _label_in(content: bytes, ending: str) -> str | None:
    """Read a label; None where the member does not say one."""
    try:
        text = content.decode("utf-8-sig")
        value: Any = text.strip() if ending == LABEL else _field(json.loads(text))
    except (ValueError, RecursionError):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    is_one = isinstance(value, str) and value.strip() and len(value) <= LONGEST_LABEL
    return value.strip() if is_one else None


def _field(values: object) -> object:
    """Return the first of a JSON object's usual fields of a label; another value is one itself."""
    if not isinstance(values, dict):
        return values
    return next((values[field] for field in FIELDS if values.get(field) is not None), None)
