"""Meaning of a network's input and outputs: preprocessing and class names."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aftcli.errors import AftError, nearest, reason
from aftcli.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 4096  # pixels of a side that a file may ask for

DEEPEST = 1024  # channels that a file may ask for

MOST_NAMED = 8  # classes in a message


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image to the input x of a model.

    Attributes:
        size: height and width of x, pixels.
        resize: the shorter side before the centre crop, pixels; None squashes the whole image
            to `size`.
        interpolation: nearest, bilinear or bicubic (with antialiasing).
        mean: of each channel, subtracted from values in [0, 1]; one value for grey inputs.
        std: of each channel, divided by.
    """

    size: tuple[int, int] = (224, 224)
    resize: int | None = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an input."""
        return (len(self.mean), *self.size)

    def channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std, shape (C, 1, 1), of the type and device of another tensor."""
        mean, std = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def with_channels(self, count: int) -> Preprocessing:
        """Return the same for another number of channels.

        Equal values of all channels stay. Otherwise it is a guess: one channel takes the means of
        the colours' values; more than one are not normalised: mean 0, std 1.
        """
        if count == len(self.mean):
            return self
        if self.is_even or count == 1:
            mean, std = (round(sum(v) / len(v), 6) for v in (self.mean, self.std))
        else:
            mean, std = 0.0, 1.0
        return replace(self, mean=(mean,) * count, std=(std,) * count)

    @property
    def is_even(self) -> bool:
        """True where all channels have the same mean and std."""
        return len(set(self.mean)) == len(set(self.std)) == 1

    def with_size(self, size: tuple[int, int]) -> Preprocessing:
        """Return the same for another input size; the crop takes the usual share, 7/8."""
        return replace(self, size=size, resize=self.resize and round(min(size) * 8 / 7))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON gives them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build it from the values of `as_dict`.

        Raises:
            AftError: no image can be prepared by these values.
        """
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        try:
            read = cls(**{**values, **lists})
            read._check()
        except (TypeError, ValueError) as error:
            raise AftError(f"no preprocessing of images: {error}") from error
        return read

    def _check(self) -> None:
        sides = (*self.size, *(() if self.resize is None else (self.resize,)))
        if len(self.size) != 2 or not all(type(n) is int and 0 < n <= LARGEST for n in sides):
            raise ValueError(f"sizes {self.size} and {self.resize} must lie in 1..{LARGEST}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}")
        if len(self.mean) != len(self.std) or not 0 < len(self.mean) <= DEEPEST:
            raise ValueError(f"mean and std have one value a channel, of 1 to {DEEPEST} channels")
        if math.prod(self.shape) > 3 * LARGEST**2:
            raise ValueError(f"inputs of {self.shape} values are too large")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}")


INTERPOLATIONS = ("nearest", "bilinear", "bicubic")

TIMM_CROP = 0.875  # timm's default share of the scaled picture


def preprocessing_of_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of timm's `pretrained_cfg`; what it lacks is timm's default."""
    usual, known = Preprocessing(), {k: v for k, v in config.items() if v}
    _, height, width = known.get("input_size", (3, *usual.size))
    whole = known.get("crop_mode") == "squash"
    interpolation = known.get("interpolation", "bicubic")
    return Preprocessing(
        (height, width),
        None if whole else int(min(height, width) / known.get("crop_pct", TIMM_CROP)),
        interpolation if interpolation in INTERPOLATIONS else "bicubic",
        tuple(known.get("mean", usual.mean)),
        tuple(known.get("std", usual.std)),
    )


def recorded_preprocessing(model: object) -> Preprocessing | None:
    """Read the preprocessing that a network's object records; None if it records none.

    That is its attribute `preprocessing`, a Preprocessing or the values of `as_dict`, or timm's
    `pretrained_cfg`.

    Raises:
        AftError: no image can be prepared by these values.
    """
    own = getattr(model, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own
    if isinstance(own, Mapping):
        return Preprocessing.from_dict(own)
    config = getattr(model, "pretrained_cfg", None)
    return preprocessing_of_timm(config) if isinstance(config, Mapping) else None


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        names: one for each class, literal; in ImageNet's list, which has wnids, synonyms are
            separated by commas.
        wnids: WordNet ids, where the classes are ImageNet's.
    """

    names: tuple[str, ...]
    wnids: tuple[str, ...] = field(default=())

    @classmethod
    def numbered(cls, count: int) -> Classes:
        """Return classes that nobody has named: `class 0`, `class 1`, ..."""
        return cls(tuple(f"class {i}" for i in range(count)))

    @classmethod
    def of_one(cls, name: str) -> Classes:
        """Return both classes of a binary classifier, given the name of the positive one."""
        return cls((f"not {name}", name))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def own(self) -> tuple[str, ...]:
        """Names that are the user's own: neither ImageNet's nor mere numbers; otherwise none."""
        return () if self.wnids or self == Classes.numbered(len(self)) else self.names

    def name(self, index: int) -> str:
        """Name a class, by its first synonym where it has several."""
        return self.synonyms(index)[0]

    def synonyms(self, index: int) -> list[str]:
        """Return all names of a class."""
        name = self.names[index]
        return [part.strip() for part in name.split(",")] if self.wnids else [name]

    def index(self, target: str) -> int:
        """Find a class by name, synonym or wnid, whatever the case, or by index.

        A name as it is written comes first: of "Cat" and "cat", of a class "2" and class 2.

        Raises:
            AftError: no class has that name, several have, or the index is out of range.
        """
        wanted, count = _plain(target), range(len(self))
        found = (
            [i for i in count if self.names[i] == target]
            or [i for i in count if _plain(self.names[i]) == wanted]
            or [i for i in count if wanted in map(_plain, self.synonyms(i))]
            or [i for i, wnid in enumerate(self.wnids) if wnid == wanted]
        )
        if len(found) == 1:
            return found[0]
        if found:
            which = "; ".join(f"{i}: {self.names[i]}" for i in found)
            raise AftError(f"class {target!r} is ambiguous, give the index: {which}")
        if re.fullmatch(r"-?[0-9]{1,9}", target):
            if int(target) in count:
                return int(target)
            raise AftError(f"class {target} is out of range: the classes are 0..{len(self) - 1}")
        known = [synonym for i in count for synonym in self.synonyms(i)]
        # A long name is not near to a word that it contains.
        within = [name for name in known if wanted and f" {wanted} " in f" {_plain(name)} "]
        within += [name for name in known if len(wanted) > 2 and wanted in _plain(name)]
        named = ", ".join([*dict.fromkeys(within)][:MOST_NAMED]) or nearest(target, known)
        raise AftError(f"unknown class {target!r}; nearest: {named}")

    def match(self, names: Sequence[str]) -> list[int | None]:
        """Find the classes that a data set's names mean; None where there is none.

        Names mean a class as they are written, otherwise whatever the case, underscores and spaces,
        where just one name and one class are the same then. Of ImageNet's list they are wnids; or
        all of them are first synonyms.

        Raises:
            AftError: a name means several classes, which have the same name.
        """
        if self.wnids:
            known = {wnid: index for index, wnid in enumerate(self.wnids)}
            if any(name in known for name in names):
                return [known.get(name) for name in names]
            first = {_plain(self.name(index)): index for index in range(len(self))}
            found = [first.get(_plain(name)) for name in names]
            whole = len(first) == len(self) and None not in found
            return found if whole else [None] * len(names)
        counts = Counter(self.names)
        for name in names:
            if counts[name] > 1:
                places = [str(i) for i in range(len(self)) if self.names[i] == name]
                raise AftError(
                    f"classes {' and '.join(places)} of the model are all named {name!r}, so it "
                    "is unclear which is meant; give each class a name of its own, by --classes "
                    "FILE, one a line"
                )
        exact, near = _once(self.names), _once(map(_plain, self.names))
        alone = _once(map(_plain, names))
        return [
            exact.get(name, near.get(_plain(name)) if _plain(name) in alone else None)
            for name in names
        ]


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names, one a line."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise AftError(
            f"{path}: can't be read as class names, one a line in UTF-8 ({reason(error)})"
        ) from error
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if not names or not all(names):
        what = f"an empty line, number {names.index('') + 1}" if names else "no class names"
        raise AftError(f"{path}: holds {what}; write one class name a line")
    return names


def _plain(name: str) -> str:
    """Strip a name of its case, underscores, spaces and the encoding of its accents."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def _once(names: Iterable[str]) -> dict[str, int]:
    """Find the places of the names that occur once."""
    names = list(names)
    counts = Counter(names)
    return {name: index for index, name in enumerate(names) if counts[name] == 1}
