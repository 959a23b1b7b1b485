"""The meaning of what a network takes and gives: images, layers' outputs, classes."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from aftcli.errors import AftError, first_line, nearest
from aftcli.settings import Preprocessing as Preprocessing
from aftcli.settings import recorded_preprocessing

# Sides of square inputs, pixels, that are tried where a network of unknown input refuses 224.
SIDES = (32, 64, 96, 128, 192, 240, 256, 288, 299, 320, 384, 448, 512)

NESTED = 3  # structures in structures that are searched for logits

MOST_NAMED = 8  # classes in a message


def input_channels(model: nn.Module) -> int:
    """Return the channels of a network's input: those of its first convolution; otherwise 3."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first else 3


@torch.no_grad()
def find_preprocessing(model: nn.Module, note: Callable[[str], None]) -> Preprocessing:
    """Find a preprocessing whose inputs a network takes: the one it records, or the usual one.

    Args:
        model: in eval mode.
        note: is told what was guessed.

    Raises:
        AftError: the network takes inputs of no size that is tried.
    """
    recorded, config = recorded_preprocessing(model), getattr(model, "config", None)
    found, side = recorded or Preprocessing(), getattr(config, "image_size", None)
    if recorded is None and isinstance(side, int | list | tuple):
        found = found.with_size((side, side) if isinstance(side, int) else (side[0], side[-1]))
    sized = found.with_channels(input_channels(model))
    tried = [sized, *(sized.with_size((side, side)) for side in SIDES)]
    problem: AftError | None = None
    for each in tried:
        try:
            run(model, each)
        except AftError as error:
            problem = problem or error
            continue
        if each != recorded:
            note(_guess(model, each, recorded is not None))
        return each
    assert problem
    raise problem


def _guess(model: nn.Module, guessed: Preprocessing, is_recorded: bool) -> str:
    depth, height, width = guessed.shape
    because = "takes other inputs than it records" if is_recorded else "records no preprocessing"
    colours = "the usual mean and std" if depth in (1, 3) else "mean 0 and std 1"
    return (
        f"{type(model).__name__} {because}; guessed: {depth} x {height} x {width} values, "
        f"{colours}; if that is wrong, give the network an attribute `preprocessing` "
        "(docs/own-network.md)"
    )


class Tried(NamedTuple):
    """An input x of a network, shape (1, C, H, W), and what the network returns of it."""

    x: Tensor
    out: Any


@torch.no_grad()
def run(model: nn.Module, preprocessing: Preprocessing) -> Tried:
    """Run a network on a random input, of its type and on its device.

    Raises:
        AftError: it does not take such inputs.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *preprocessing.shape, generator=generator)
    x = x.to(next(model.parameters(), x))
    try:
        return Tried(x, model(x))
    except Exception as error:
        raise AftError(
            f"{type(model).__name__} can't run an input of shape {tuple(x.shape)} "
            f"({first_line(error)[:200]}); say what it takes: preprocessing=Preprocessing("
            "size=(H, W), mean=(...), std=(...)), or an attribute `preprocessing` of it"
        ) from error


class Output(NamedTuple):
    """The place of logits in what a network returns.

    Attributes:
        path: keys, indices and attributes that lead to them, one in another.
    """

    path: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """The path as `--output-key` takes it."""
        return ".".join(map(str, self.path))


def find_output(
    out: object, key: str | None = None, note: Callable[[str], None] = warnings.warn
) -> Output:
    """Find the logits in what a network returns.

    Args:
        out: a tensor, or tuples, lists, mappings and objects of tensors.
        key: the name of an entry, its number in a tuple, or several of them joined by dots;
            default `logits`, otherwise the first tensor of shape (N, C).
        note: is told what was taken where there are several.

    Raises:
        AftError: nothing is named so, or nothing has such a shape.
    """
    tensors = dict(_tensors(out))
    if key is None and isinstance(out, Tensor):
        return Output(())
    named = {Output(path).name: path for path in tensors}
    if key is not None:
        under = [path for name, path in named.items() if f"{name}.".startswith(f"{key}.")]
        if not under:
            known = nearest(key, named) if any(named) else "none, it returns one tensor"
            raise AftError(f"unknown output {key!r} of the network; nearest: {known}")
        return Output(under[0])
    fit = [path for path, tensor in tensors.items() if tensor.dim() == 2]
    if not fit:
        shapes = ", ".join(f"{name} {tuple(tensors[path].shape)}" for name, path in named.items())
        raise AftError(
            f"the network returns no logits of shape (N, C) (it returns {shapes or type(out)}); "
            "name the output that has them: --output-key KEY, or output_key= in Python"
        )
    chosen = ("logits",) if ("logits",) in fit else fit[0]
    if len(fit) > 1:
        others = ", ".join(Output(path).name for path in fit if path != chosen)
        note(
            f"the network returns several tensors: {Output(chosen).name} is taken for the logits, "
            f"not {others}; --output-key KEY takes another"
        )
    return Output(chosen)


def _tensors(out: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tensors in a structure, each with its path, in order."""
    parts: Any = ()
    if isinstance(out, Tensor):
        yield path, out
    elif isinstance(out, Mapping):
        parts = out.items()
    elif isinstance(out, tuple) and hasattr(out, "_fields"):
        parts = zip(out._fields, out, strict=True)
    elif isinstance(out, list | tuple):
        parts = enumerate(out)
    elif is_dataclass(out):
        parts = [(each.name, getattr(out, each.name)) for each in fields(out)]
    elif hasattr(out, "__dict__"):
        parts = vars(out).items()
    for key, part in parts:
        if len(path) < NESTED:
            yield from _tensors(part, (*path, key))


def at_path(out: Any, path: Sequence[str | int]) -> Any:  # noqa: ANN401 - a structure of anything
    """Follow a path into what a network returns, which torch.fx may trace."""
    for i, key in enumerate(path):
        if isinstance(out, fx.Proxy):
            return out.tracer.create_proxy("call_function", at_path, (out, tuple(path[i:])), {})
        inside = isinstance(out, Mapping) or (isinstance(out, list | tuple) and type(key) is int)
        out = out[key] if inside else getattr(out, str(key))
    return out


def logits_of(out: object, key: str | None = None) -> Tensor:
    """Take the logits, shape (N, C), out of what a network returns; see `find_output`."""
    return at_path(out, find_output(out, key).path)  # type: ignore[no-any-return]


class _Logits(nn.Module):
    """A network that returns a part of what another returns, of the same modules and names."""

    def __init__(self, network: nn.Module, path: tuple[str | int, ...]) -> None:
        super().__init__()
        self._modules, self._parameters = network._modules, network._parameters
        self._buffers = network._buffers
        self.__dict__["network"] = network  # not as a module: names would begin with it
        self.path, self.training = path, network.training

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of inputs x."""
        # As torch.fx calls it: the network is no module of this one.
        return at_path(self.__dict__["network"].forward(x), self.path)  # type: ignore[no-any-return]


@torch.no_grad()
def with_logits(
    model: nn.Module, tried: Tried, key: str | None, note: Callable[[str], None]
) -> nn.Module:
    """Return a network that returns its logits alone: itself, where it does so already.

    Args:
        model: in eval mode.
        tried: what it returned of an input.
        key: see `find_output`.
        note: see `find_output`.

    Raises:
        AftError: there are no such logits, or hooks of the network change what it returns.
    """
    output = find_output(tried.out, key, note)
    if not output.path:
        return model
    # Messages name its class.
    logits: nn.Module = type(type(model).__name__, (_Logits,), {})(model, output.path)
    if not torch.equal(logits(tried.x), at_path(tried.out, output.path)):
        raise AftError(
            f"{type(model).__name__} returns other values each time, or hooks of its own change "
            "them; remove the hooks, or let its forward do what they do"
        )
    return logits


class Layout(NamedTuple):
    """The places of channels and cells in a layer's output, where it is not (N, K, h, w).

    Attributes:
        kind: "last", (N, h, w, K); "tokens", (N, T, K); "sequence", (T, N, K).
        height: h, cells.
        width: w, cells.
        prefix: tokens before those of the cells: of the class, registers.
    """

    kind: str
    height: int
    width: int
    prefix: int = 0


def to_maps(out: Tensor, kind: str, height: int, width: int, prefix: int) -> Tensor:
    """Make A, shape (N, K, h, w), of a layer's output; arguments as of `Layout`."""
    if kind == "last":
        return out.permute(0, 3, 1, 2)
    tokens = out.transpose(0, 1) if kind == "sequence" else out
    maps: Tensor = tokens[:, prefix:].mT.unflatten(2, (height, width))
    return maps


def before_maps(out: Tensor, kind: str, height: int, width: int, prefix: int) -> Tensor:
    """Take the tokens that belong to no cell, shape (N, prefix, K), of a layer's output."""
    tokens = out.transpose(0, 1) if kind == "sequence" else out
    return tokens[:, :prefix]


def from_maps(
    maps: Tensor, before: Sequence[Tensor], kind: str, height: int, width: int, prefix: int
) -> Tensor:
    """Make a layer's output of A and the tokens before its cells, as `Layout` says."""
    if kind == "last":
        return maps.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    tokens = torch.cat([*before, maps.flatten(2).mT], 1)
    return (tokens.transpose(0, 1) if kind == "sequence" else tokens).contiguous()


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
