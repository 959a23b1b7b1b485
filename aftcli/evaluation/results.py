"""Results of an evaluation: on disk, named after their inputs, resumable.

A result file holds one value an image of each measure (docs/reference/files.md). Its name has a
hash of all that decides the values: weights, images, annotations, settings. So a changed input is
another file, and a second call finds the first one's.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.data.blocks import Broken
from aftcli.files import read_sealed, values_hash, write_sealed
from aftcli.measures.registry import BASELINES, completed
from aftcli.measures.values import Values
from aftcli.tft.judges import JUDGED

FORMAT_VERSION = 1

HEAD = "aft_result"


class Result(NamedTuple):
    """A stored result.

    Attributes:
        columns: tensors by their names in the file; none where no image could be read.
        broken: images that could not be read.
        identity: what it was computed from.
        extras: of the measures among them that cost much.
    """

    columns: dict[str, Tensor]
    broken: list[Broken]
    identity: dict[str, Any]
    extras: frozenset[str]

    @property
    def values(self) -> Values | None:
        """The columns of an evaluation; None where no image could be read."""
        return Values.of(self.columns) if self.columns else None


class ResultFile:
    """A result and, until it is complete, its parts.

    Args:
        folder: of the results.
        stem: of the file's name.
        identity: plain values; all that decides what the columns hold.
        extras: of measures that cost much (`extras_of` of measures); a file with more is reused.
        names: of the classes, where only their user knows them; they change no value.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        identity: Mapping[str, Any],
        extras: frozenset[str],
        names: Sequence[str] = (),
    ) -> None:
        whole = {"format_version": FORMAT_VERSION, **identity}
        self.identity: dict[str, Any] = json.loads(json.dumps(whole, sort_keys=True))
        self.key = values_hash(whole)[:12]
        self.folder, self.stem, self.extras, self.names = folder, stem, extras, names
        self.path = folder / f"{stem}-{self.key}.safetensors"
        self.parts = folder / f".{'-'.join([stem, self.key, *sorted(extras)])}.parts"

    def read(self, span: range | None = None) -> Result | None:
        """Read the result, or a block of it; None if missing, damaged or without its extras."""
        stored = self._stored(self.path if span is None else self._part(span))
        return stored if stored and self.extras <= stored.extras else None

    def lacking(self) -> ResultFile | None:
        """Return the file of what is still to be measured, joined later; None if all is there."""
        there = self._stored(self.path)
        if there is None:
            return self
        if self.extras <= there.extras:
            return None
        new = completed(self.extras - there.extras)
        # Fixed cut-offs are another view, which has all measures that the others have.
        if BASELINES in there.extras:
            new |= {BASELINES}
        elif BASELINES in new:
            # Only those judges can be asked about the new view that are at hand.
            new |= self.extras | _measures(there.extras)
        return ResultFile(self.folder, self.stem, self.identity, new, self.names)

    def has(self, span: range) -> bool:
        """Tell if a block of images is done."""
        return self.read(span) is not None

    def write(self, columns: Mapping[str, Tensor]) -> None:
        """Store a result that has no parts."""
        self._write(self.path, columns, [], self.extras)

    def write_part(
        self, span: range, columns: Mapping[str, Tensor], broken: Sequence[Broken]
    ) -> None:
        """Store a block of images."""
        self.parts.mkdir(parents=True, exist_ok=True)
        self._write(self._part(span), columns, broken, self.extras)

    def join(self, spans: Iterable[range]) -> bool:
        """Make one file of all blocks and of the measures there; False if a block is damaged."""
        read = [self.read(span) for span in spans]
        whole = [part for part in read if part is not None]
        if len(whole) < len(read):
            return False
        # A block of broken images has no columns.
        names = next((part.columns for part in whole if part.columns), {})
        columns = {n: torch.cat([p.columns[n] for p in whole if p.columns]) for n in names}
        broken, extras = [b for part in whole for b in part.broken], self.extras
        there = self._stored(self.path)
        # Only images that did not fit into memory can be readable once and not again.
        if there and [b.path for b in there.broken] == [b.path for b in broken]:
            kept = there.extras
            if BASELINES in extras - kept:
                # A judge that was not asked about the new view is to be asked again.
                kept = _measures(kept)
            columns, extras = columns | there.columns, extras | kept
        self._write(self.path, columns, broken, extras)
        self._clear_parts(extras)
        return True

    def clear(self) -> None:
        """Delete what is there."""
        self.path.unlink(missing_ok=True)
        self._clear_parts(None)

    def clear_parts(self) -> None:
        """Delete the blocks of this file."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _clear_parts(self, extras: frozenset[str] | None) -> None:
        """Delete the blocks of this result that have no more than these extras; None is any."""
        start = f".{self.stem}-{self.key}"
        for parts in self.folder.glob(f"{glob.escape(start)}*.parts"):
            own = parts.name.removeprefix(start).removesuffix(".parts").split("-")[1:]
            if extras is None or extras >= set(own):
                shutil.rmtree(parts, ignore_errors=True)

    def _part(self, span: range) -> Path:
        return self.parts / f"{span.start:09d}-{span.stop:09d}"

    def _write(
        self,
        path: Path,
        columns: Mapping[str, Tensor],
        broken: Sequence[Broken],
        extras: frozenset[str],
    ) -> None:
        head = {"identity": self.identity, "broken": broken, "extras": sorted(extras)}
        head |= {"class_names": list(self.names)} if self.names else {}
        write_sealed(path, columns, HEAD, head)

    def _stored(self, path: Path) -> Result | None:
        """Read a file, whatever is wanted; None if it is missing, damaged or of other inputs."""
        columns, head = read_sealed(path, HEAD) or ({}, {})
        if head.get("identity") != self.identity:
            return None
        broken = [Broken(*b) for b in head["broken"]]
        return Result(columns, broken, self.identity, frozenset(head["extras"]))


def with_kept_names(f: Classifier, run: Path) -> Classifier:
    """Name a network's classes as earlier results of its weights do, where nobody else has."""
    if f.classes == Classes.numbered(len(f.classes)):
        weights = f.weights_hash()
        for path in sorted((run / "results").glob("*.safetensors")):
            _, head = read_sealed(path, HEAD) or ({}, {})
            names, identity = head.get("class_names", []), head.get("identity", {})
            if identity.get("weights") == weights and len(names) == len(f.classes):
                f.classes = Classes(tuple(map(str, names)))
    return f


def _measures(extras: frozenset[str]) -> frozenset[str]:
    """Return the extras that are no judges."""
    return frozenset(extra for extra in extras if not extra.startswith(JUDGED))
