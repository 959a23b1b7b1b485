"""Parts of data sets: splits by the names of folders and files, and images that are held out."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aftcli.data.names import files_named, is_pattern
from aftcli.errors import AftError, listed
from aftcli.files import inside

# Usual names of splits, whatever the case; the first is what `--split` and defaults are named by.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class Held(NamedTuple):
    """A share of the images that is held out of a data set without a val split.

    Attributes:
        share: of the images of each class, in (0, 1).
        seed: chooses which.
        part: "val" for these images, "train" for the others; "" where that is not chosen yet.
    """

    share: float
    seed: int = 0
    part: str = ""


class Reading(NamedTuple):
    """Choices in reading a data set.

    Attributes:
        kind: the name of its format, a key of FORMATS; None recognises it by its content.
        every: a sample for each image and class that it shows; otherwise one for each image. None
            is as masks were made, otherwise one.
        held: what is held out where there is no val split; None holds out nothing.
        trained: names of the images that were not held out, where the data set has changed since.
        files: names of its files, below its folder; empty for all that are there.
    """

    kind: str | None = None
    every: bool | None = None
    held: Held | None = None
    trained: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()

    @classmethod
    def of(cls, made: Mapping[str, Any]) -> Reading:
        """Return the choices that a mask store or a checkpoint records."""
        held = made.get("held")
        kept = Held(held["share"], held["seed"]) if held else None
        given = made.get("files")  # of a file that may be anybody's
        files = tuple(map(str, given)) if isinstance(given, list) else ()
        return cls(made["data_kind"], bool(made.get("every")), kept, files=files)

    def place(self, path: Path) -> Path:
        """Return the name, or pattern, of these files in a folder; the folder itself for all.

        Raises:
            AftError: a file lies outside it.
        """
        if not self.files or not path.is_dir():
            return path
        names = [inside(path, name).relative_to(path).as_posix() for name in self.files]
        return path / (names[0] if len(names) == 1 else f"{{{','.join(names)}}}")

    def is_named(self, path: Path, folder: Path | None) -> bool:
        """Tell if a path, or a pattern, names just these files; for all, the folder itself."""
        found = files_named(path) if is_pattern(path) else [path]
        own = [folder / name for name in self.files] or [folder] if folder else []
        return [each.resolve() for each in found] == own


AS_FOUND = Reading()

LONGEST = 2**17  # characters of names of files that a store records

SPECIAL = frozenset("{},*?[")  # in patterns of names


def split_kind(name: str) -> str:
    """Name the kind of a split: a key of SPLITS, "" for another name.

    >>> split_kind("Validation")
    'val'
    """
    return next((kind for kind, names in SPLITS.items() if name.lower() in names), "")


def choose_split(path: Path, folders: list[str], known: list[str], wanted: str) -> str:
    """Choose a split by its name, otherwise by the kind that its name means.

    Args:
        path: of the data set.
        folders: names of all that may be asked for.
        known: those of them that are usual names of splits.
        wanted: the name that is asked for.

    Raises:
        AftError: there is none, or there are several of its kind.
    """
    if wanted in folders:
        return wanted
    same = [name for name in known if split_kind(name) == (split_kind(wanted) or None)]
    if len(same) == 1:
        return same[0]
    what = f"has several folders for the split {wanted!r}" if same else f"has no split {wanted!r}"
    raise AftError(f"{path}: {what}; there are {', '.join(same or folders)}; name one by --split")


class Chosen(NamedTuple):
    """Files of a split.

    Attributes:
        root: the folder that they lie in or below.
        split: the word for it in their names; "" where they have none.
        files: names below the root, with forward slashes.
        named: the files, where the user named them and they are of no split; empty otherwise.
    """

    root: Path
    split: str
    files: list[str]
    named: tuple[str, ...] = ()


def choose_files(path: Path, found: Sequence[Path], split: str | None, default: str) -> Chosen:
    """Choose the files of a split by the words in their names, such as `train-000.tar`.

    Args:
        path: what the user named: a folder, one file, or a pattern. Of files that are named, all
            of one split, no split has to be asked for.
        found: the files.
        split: that is asked for.
        default: otherwise.

    Raises:
        AftError: there is no such split, or only some files are of one.
    """
    named = not path.is_dir()
    root = Path(os.path.commonpath([file.parent for file in found])) if named else path
    files = [file.relative_to(root).as_posix() for file in found]
    words = [_word_of_split(name) for name in files]
    spelled = {word.lower(): word for word in reversed(words) if word}
    known = list(reversed(spelled.values()))  # one of those that differ in case alone
    if not known:
        if split:
            raise AftError(
                f"{path}: no name of a file says its split, so there is no {split!r}; leave "
                "--split out, or call the files train-..., val-..."
            )
        text = "\0".join(files)
        # Names with braces would be read as a pattern of others.
        kept = named and len(text) <= LONGEST and not SPECIAL.intersection(text)
        return Chosen(root, "", files, tuple(files) if kept else ())
    if "" in words:
        raise AftError(
            f"{path}: {files[words.index('')]} is of no split, but {files[words.index(known[0])]} "
            f"is of {known[0]}; name the files that you mean, by braces or wildcards"
        )
    wanted = known[0] if named and split is None and len(known) == 1 else split or default
    word = choose_split(path, known, known, wanted)
    chosen = [n for n, own in zip(files, words, strict=True) if own.lower() == word.lower()]
    return Chosen(root, word, chosen)


def are_of_split(root: Path, found: Sequence[Path], split: str) -> bool:
    """Tell if some of the files in a folder are of a split."""
    try:
        return bool(choose_files(root, found, split, split).files)
    except AftError:
        return False


def _word_of_split(name: str) -> str:
    """Find the word for a split in a file's name, otherwise in those of its folders."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[\W_\d]+", part):
            if split_kind(word):
                return word
    return ""


def refuse_mixed(root: Path, members: Sequence[str]) -> None:
    """Refuse archives with folders of several splits above those of classes.

    Args:
        root: the folder of the archives.
        members: files in them: the archive, folders and the file's name, with forward slashes.

    Raises:
        AftError: there are such; taken as one they would mix training and evaluation.
    """
    found: dict[str, str] = {}
    for member in members:
        for part in member.split("/")[1:-2]:
            if kind := split_kind(part):
                found.setdefault(kind, member)
    if len(found) > 1:
        raise AftError(
            f"{root}: holds several splits within its archives ({listed(list(found.values()))}); "
            "write each split as archives of its own, called train-... and val-..."
        )


def check_held(values: object) -> None:
    """Check what a file records of held-out images.

    Raises:
        ValueError: it is not what this module records.
    """
    if values is None:
        return
    kinds = {"share": float, "seed": int, "part": str}
    if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != kinds:
        raise ValueError("its held is not a share, a seed and a part")
    if not 0 < values["share"] < 1 or values["part"] not in ("train", "val"):
        raise ValueError(f"its held is {values}"[:120])


def held_names(
    samples: Iterable[tuple[str, int]], held: Held, trained: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Choose the images that are held out: of each class the same share.

    The choice depends on the names and the seed alone. A class of two images or more has one held
    out at the least, and one left. An image of several classes counts for its first one.

    Args:
        samples: names of images and labels.
        held: the share and the seed.
        trained: names that were not held out before. Then those that come before the first of
            their class in the order of the choice are held out: they were, or are new.
    """
    classes: dict[int, list[str]] = defaultdict(list)
    for name, label in dict(reversed([*samples])).items():
        classes[label].append(name)
    chosen: set[str] = set()
    for names in classes.values():
        count = min(max(round(held.share * len(names)), 1), len(names) - 1)
        ordered = sorted(names, key=lambda name: _order(name, held.seed))
        if trained:
            count = next((i for i, name in enumerate(ordered) if name in trained), 0)
        chosen.update(ordered[:count])
    return frozenset(chosen)


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest()


def held_note(
    root: object, out: frozenset[str], every: Iterable[str], held: Held, trained: frozenset[str]
) -> str:
    """Say which images are held out, and which are new where some were trained on before."""
    names, total = sorted(out), len(set(every))
    use = "only these are taken" if held.part == "val" else "these are left out"
    return (
        f"{root}: has no val split, so {len(names)} of {total} images are held out to evaluate on "
        f"(--val-share {held.share:g}, seed {held.seed}); {use}: "
        f"{listed(names)}{_new_note(set(every) - out - trained) if trained else ''}"
    )


def _new_note(new: set[str]) -> str:
    changed = "; the data set has changed since, the split stays as it was"
    if not new:
        return changed
    return f"{changed}, and {len(new)} new images are in no part of it: {listed(sorted(new))}"


def choose_held_out(
    names: Sequence[str], labels: Sequence[int], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide training images into those trained on and those that choose the epoch.

    Every n-th image in the order of the classes, within a class in an order that depends on
    the name and the seed only: the held-out images are spread over the classes. An image may have
    several samples, one for each label, which are all on the same side.

    Returns:
        Positions of those to train on and of those held out, each ascending.
    """

    def rank(i: int) -> tuple[int, bytes]:
        name = f"{seed}\0{names[i]}".encode("utf-8", "surrogateescape")
        return labels[i], hashlib.sha256(name).digest()

    order = sorted(range(len(names)), key=rank)
    count = int(len(order) * share)
    picked = {names[order[(2 * i + 1) * len(order) // (2 * count)]] for i in range(count)}
    train = [i for i, name in enumerate(names) if name not in picked]
    # Where one image has all of the labels, none is held out.
    return (train, sorted({*order} - {*train})) if train else (sorted(order), [])


def spread(total: int, count: int | None) -> list[int]:
    """Pick `count` of `total` places, evenly spread; None, or too many, picks all.

    >>> spread(10, 3)
    [0, 3, 6]
    """
    count = min(total if count is None else count, total)
    return [i * total // count for i in range(count)]
