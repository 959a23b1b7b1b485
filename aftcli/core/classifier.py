"""The classifier f(x) = head(layer(stem(x))) with weights w0, w1, w2 (§4.2)."""

from __future__ import annotations

import copy
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aftcli.core.cut import LinearHead, cut, last_layer, linear_head
from aftcli.core.networks import copied, outside_inference_mode, unwrapped
from aftcli.errors import AftError, nearest
from aftcli.files import tensors_hash

LARGEST = 4096  # pixels of a side that a file may ask for

MOST_NAMED = 8  # classes in a message


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image to the input x of a model.

    Attributes:
        size: height and width of x, pixels.
        resize: the shorter side before the centre crop, pixels; None squashes the whole image
            to `size`.
        interpolation: nearest, bilinear or bicubic (with antialiasing).
        mean: of each channel, subtracted from values in [0, 1].
        std: of each channel, divided by.
    """

    size: tuple[int, int] = (224, 224)
    resize: int | None = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std, shape (3, 1, 1), of the type and device of another tensor."""
        mean, std = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON gives them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Build it from the values of `as_dict`.

        Raises:
            AftError: the values, of a file, are none that an image can be prepared by.
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
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"interpolation {self.interpolation!r}")
        if not len(self.mean) == len(self.std) == 3:
            raise ValueError("mean and std have three values")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}")


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
        """Make classes that nobody has named."""
        return cls(tuple(f"class {i}" for i in range(count)))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def own(self) -> tuple[str, ...]:
        """The names, where only their user knows them: neither ImageNet's nor mere numbers."""
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
        named = ", ".join(dict.fromkeys(within[:MOST_NAMED])) or nearest(target, known)
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


def _plain(name: str) -> str:
    """Strip a name of its case, underscores, spaces and the encoding of its accents."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def _once(names: Iterable[str]) -> dict[str, int]:
    """Find the places of the names that occur once."""
    names = list(names)
    counts = Counter(names)
    return {name: index for index, name in enumerate(names) if counts[name] == 1}


def probabilities(logits: Tensor) -> Tensor:
    """Compute probabilities of classes, shape (N, C), from logits: their softmax (§2.1)."""
    check_several(logits.shape[1])
    return logits.softmax(1)


def check_several(classes: int) -> None:
    """Check that there are classes enough for softmax to say something."""
    if classes == 1:
        raise AftError(
            "the network has one output, so its class has probability 1 for every image; softmax "
            "needs two classes or more: train it on as many, or give its last layer a first row of "
            "zeros (weights and bias), then class 1 has the sigmoid of the old output"
        )


class Engine(Protocol):
    """Another way to run a classifier's passes without gradients (aftcli/engine/accelerate.py)."""

    name: str
    precision: str  # a key of aftcli.engine.accelerate.TOLERANCES

    def takes(self, x: Tensor) -> bool:
        """Tell if it can run inputs of this shape and type."""

    def activation(self, x: Tensor) -> Tensor:
        """Compute A of inputs x, as `Classifier.activation`."""

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits of inputs x, as the classifier itself."""


class Before(Protocol):
    """The layer and the head that a classifier had before a zero level, and its tensors."""

    layer: nn.Module
    head: nn.Module

    def tensors(self) -> dict[str, Tensor]:
        """Return what moved the maps, by names in a checkpoint."""


class Classifier(nn.Module):
    """A network cut at layer l: logits = head(layer(stem(x))).

    Attributes:
        stem: w0, from the input to layer l.
        layer: w1, layer l; its output is the activation A.
        head: w2, from A to the logits.
        name: the model's name, as `--model` takes it.
        layer_name: the layer's name, as `--layer` takes it.
        preprocessing: what makes x of an image.
        classes: the names of the classes.
        activation_shape: (K, h, w) of A at the preprocessing's input size.
        cam: the CAM method that it was fine-tuned for (§4.2); None without.
        checkpoint: the file its weights are from; "" for published or given ones.
        engine: what runs passes without gradients; None runs all as they are written.
        zero_level: what `layer` and `head` were before a zero level was given; None without.
        watch: is told of each pass how many images it has; None for nobody.
    """

    def __init__(
        self,
        stem: nn.Module,
        layer: nn.Module,
        head: nn.Module,
        *,
        name: str,
        layer_name: str,
        preprocessing: Preprocessing,
        classes: Classes,
        activation_shape: tuple[int, int, int],
        cam: str | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.layer, self.head = stem, layer, head
        self.name, self.layer_name = name, layer_name
        self.preprocessing, self.classes = preprocessing, classes
        self.activation_shape = activation_shape
        self.cam, self.checkpoint = cam, ""
        self.engine: Engine | None = None
        self.zero_level: Before | None = None
        self.watch: Callable[[int], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, shape (N, C), of inputs x, shape (N, 3, H, W)."""
        if self.watch:
            self.watch(len(x))
        engine = self._engine_for(x)
        return engine.logits(x) if engine else self.head(self.activation(x))

    def activation(self, x: Tensor) -> Tensor:
        """Compute activations A of layer l, shape (N, K, h, w), of x, shape (N, 3, H, W)."""
        engine = self._engine_for(x)
        return engine.activation(x) if engine else self.layer(self.stem(x))

    def with_engine(self, engine: Engine | None) -> Classifier:
        """Return a classifier of the same modules whose inference passes run on an engine."""
        fast = copy.copy(self)
        fast.engine = engine
        return fast

    @property
    def precision(self) -> str:
        """Precision of inference passes; "no" means the weights' own dtype."""
        return self.engine.precision if self.engine else "no"

    def _engine_for(self, x: Tensor) -> Engine | None:
        usable = self.engine and not torch.is_grad_enabled() and self.engine.takes(x)
        return self.engine if usable else None

    @cached_property
    def linear_head(self) -> LinearHead | None:
        """The head split at its first linear layer, where it can be (see core/cut.py)."""
        return linear_head(self.head, self.activation_shape)

    def weights(self) -> dict[str, Tensor]:
        """All weights and statistics, under the names of the uncut model."""
        plain = self.zero_level or self
        parts = (self.stem, plain.layer, plain.head)
        found = {name: value for part in parts for name, value in part.state_dict().items()}
        return found | (self.zero_level.tensors() if self.zero_level else {})

    def weights_hash(self) -> str:
        """SHA-256 of all weights, under the names of the uncut model."""
        return tensors_hash(self.weights())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


@outside_inference_mode
def cut_classifier(
    model: nn.Module,
    layer: str | None = None,
    *,
    name: str | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Classes | None = None,
    own: bool = False,
) -> Classifier:
    """Cut any CNN of the user's into a Classifier and check that nothing has changed.

    Args:
        model: a network from (N, 3, H, W) to logits (N, C); it is copied, not changed. Of
            DataParallel and torch.compile the network inside is taken.
        layer: where to cut; default the last convolutional layer with spatial extent.
        name: the model's name in results; default its class's name.
        preprocessing: what makes its input; default ImageNet's usual.
        classes: the names of the classes; default numbers.
        own: cut the model itself, without a copy; its activations may become out-of-place.

    Returns:
        A classifier in eval mode whose logits equal the model's bit for bit.

    Raises:
        AftError: the layer is unknown or can't be cut, the parts do not equal the model, or the
            model can't be copied.
    """
    model = unwrapped(model)
    if own and any(tensor.is_inference() for tensor in model.state_dict().values()):
        raise AftError(
            f"{type(model).__name__} was made in torch.inference_mode(), where nothing has a "
            "gradient; make it outside, or leave own out for a copy"
        )
    model = (model if own else copied(model)).eval().requires_grad_(False)
    preprocessing = preprocessing or Preprocessing()
    layer = layer or last_layer(model, preprocessing.size)
    parts = cut(model, layer)
    x = torch.randn(1, 3, *preprocessing.size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()))
    with torch.no_grad():
        activation = parts.layer(parts.stem(x))
        if not isinstance(activation, Tensor) or activation.dim() != 4:
            raise AftError(
                f"layer {layer!r} can't be used: its output has shape "
                f"{tuple(getattr(activation, 'shape', ()))}, a CAM needs (N, K, h, w)"
            )
        before = activation.clone()
        logits = parts.head(activation)
        if logits.dim() != 2 or not torch.equal(logits, model(x)):
            raise AftError(f"cutting at {layer!r} changes the logits; cut at another layer")
        if not torch.equal(before, activation):
            raise AftError(f"what follows {layer!r} writes into its output; cut at another layer")
    count = logits.shape[1]
    classes = classes or Classes.numbered(count)
    if len(classes) != count:
        raise AftError(
            f"{len(classes)} class names for a model with {count} classes; give one name a line, "
            "in the order of the model's outputs"
        )
    _, *shape = activation.shape
    return Classifier(
        *parts,
        name=name or type(model).__name__,
        layer_name=layer,
        preprocessing=preprocessing,
        classes=classes,
        activation_shape=(shape[0], shape[1], shape[2]),
    ).eval()
