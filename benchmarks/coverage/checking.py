"""Networks as users write them: what is right for each, and a check that finds out.

A network is a function that returns an nn.Module, with what is right for it beside its name. The
networks themselves are in the folder users.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftcli import AftError, Classifier, Preprocessing, attribution_map, cut_classifier, explain
from benchmarks.coverage.judging import as_cells, first_line, leaf_at

Output = Any  # what a user's forward returns


def logits(out: Output) -> Tensor:
    """Return an output that is logits."""
    return out  # type: ignore[no-any-return]


def softmax(y: Tensor) -> Tensor:
    """Compute probabilities from logits, shape (N, C)."""
    return y.exp() / y.exp().sum(1, keepdim=True)


def sigmoid(y: Tensor) -> Tensor:
    """Compute probabilities that do not exclude each other, shape (N, C)."""
    return 1 / (1 + (-y).exp())


def as_they_are(y: Tensor) -> Tensor:
    """Return an output that has probabilities already."""
    return y


def both(y: Tensor) -> Tensor:
    """Make two scores of the one of a binary classifier, shape (N, 1) or (N,): -y and y.

    Their softmax at half their size is the sigmoid of -y and of y.
    """
    return torch.stack([-y.reshape(-1), y.reshape(-1)], 1)


@dataclass(frozen=True)
class Network:
    """A user's network and what is right for it.

    Attributes:
        build: makes it.
        layers: names of modules at whose output it may be cut; empty where refusal is right.
        y: takes the scores of all classes, shape (N, C), from what its forward returns.
        probabilities: computes those, shape (N, C), from y.
        size: (H, W) of its input, pixels.
        channels: of its input.
        dtype: of its weights and its input.
        grid: (h, w) of A, where its layers return tokens; () where they return maps.
        tokens_first: they have shape (T, N, K).
        plain: takes off what can't be hooked, such as torch.compile.
        options: of `cut_classifier`.
        size_known: the network itself tells its input size, `cut_classifier` is told nothing.
        may_refuse: refusal is as right as a right map.
        tolerance: of probabilities and of maps, in [0, 1].
    """

    build: Callable[[], nn.Module]
    layers: tuple[str, ...] = ()
    y: Callable[[Output], Tensor] = logits
    probabilities: Callable[[Tensor], Tensor] = softmax
    size: tuple[int, int] = (32, 32)
    channels: int = 3
    dtype: torch.dtype = torch.float32
    grid: tuple[int, ...] = ()
    tokens_first: bool = False
    plain: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    options: dict[str, Any] = field(default_factory=dict)
    size_known: bool = False
    may_refuse: bool = False
    tolerance: float = 1e-4

    @property
    def name(self) -> str:
        """The name of the function that builds it."""
        return self.build.__name__

    @property
    def about(self) -> str:
        """The first line about it."""
        return (self.build.__doc__ or "").partition("\n")[0]


class Outcome(NamedTuple):
    """Result of a check: right, refused, crash or wrong, and why."""

    result: str
    why: str = ""


NETWORKS: dict[str, Network] = {}


def network(
    *layers: str,
    **right: Any,  # noqa: ANN401 - fields of Network
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a function that builds a network, with what is right for it."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[build.__name__] = Network(build, layers, **right)
        return build

    return register


def checked(user: Network) -> Outcome:
    """Cut a network, explain an image by Grad-CAM, and compare with the plain network."""
    torch.manual_seed(0)
    model = user.build().eval()
    x = torch.rand(1, user.channels, *user.size, generator=torch.Generator().manual_seed(1))
    x = (2 * x - 1).to(user.dtype)
    known = inspect.signature(cut_classifier).parameters
    options = {name: value for name, value in user.options.items() if name in known}
    if not user.size_known:
        even = (0.5,) * user.channels
        options["preprocessing"] = Preprocessing(size=user.size, mean=even, std=even)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            f = cut_classifier(model, **options)
            found = explain(f, x, ["gradcam"], range(len(f.classes)))
            activation = f.activation(x)
        except AftError as error:
            right = not user.layers or user.may_refuse
            return Outcome("right" if right else "refused", first_line(error))
        except Exception as error:  # noqa: BLE001 - a crash is a result
            return Outcome("crash", first_line(error))
        if not user.layers:
            return Outcome("wrong", "it is cut, where a reason why it can't be would be right")
        why = _probability_wrong(user, user.plain(model), x, [each.probability for each in found])
        if why:
            return Outcome("wrong", why)
        maps = torch.stack([each.attribution for each in found])
        why = _map_wrong(user, user.plain(model), x, activation, maps)
        why = why or _batch_wrong(user, f, x)
    return Outcome("wrong" if why else "right", why)


def _probability_wrong(user: Network, model: nn.Module, x: Tensor, found: Sequence[float]) -> str:
    with torch.no_grad():
        right = user.probabilities(user.y(model(x)).double())[0]
    if len(found) != len(right):
        return f"it has {len(right)} classes, {len(found)} are found"
    if not torch.allclose(right, torch.tensor(found).double(), rtol=0, atol=user.tolerance):
        return f"probabilities {_rounded(found)} instead of {_rounded(right.tolist())}"
    return ""


def _map_wrong(user: Network, model: nn.Module, x: Tensor, activation: Tensor, maps: Tensor) -> str:
    """Compare A and the maps of all classes with those at the layers that are right."""
    why = f"A, {tuple(activation.shape)}, is the output of none of {', '.join(user.layers)}"
    for name in user.layers:
        with leaf_at(model.get_submodule(name), lambda a: a) as leaves:
            y = user.y(model(x))
        if not leaves:
            continue
        a = _cells(user, leaves[-1].detach()).double()
        if a.shape != activation.shape or not torch.allclose(
            a, activation.double(), rtol=user.tolerance, atol=user.tolerance
        ):
            continue
        # A norm behind a norm has its output: the gradient tells them apart.
        why = _maps_differ(user, x, y, leaves[-1], maps)
        if not why:
            break
    return why


def _maps_differ(user: Network, x: Tensor, y: Tensor, a: Tensor, maps: Tensor) -> str:
    """Compare the maps of all classes with Grad-CAM's at a layer, of output a."""
    for c, ours in enumerate(maps):
        (gradient,) = torch.autograd.grad(y[0, c], a, retain_graph=True)
        alpha = _cells(user, gradient).double().flatten(2).mean(2)
        signed = torch.einsum("nk,nk...->n...", alpha, _cells(user, a.detach()).double())
        cells = signed.clamp(min=0)
        cells = cells - cells.min()
        cells = cells / cells.max().clamp(min=1e-30)
        mode = "trilinear" if len(user.size) == 3 else "bilinear"
        right = F.interpolate(cells[:, None], x.shape[2:], mode=mode)[0, 0]
        difference = float((ours.double() - right).abs().max())
        if difference > user.tolerance:
            return f"the map of class {c} differs by {difference:.3g}"
    return ""


def _batch_wrong(user: Network, f: Classifier, x: Tensor) -> str:
    """Compare the maps of two images at once with those of each alone."""
    images = [x, x.flip(-1)]
    alone = torch.stack([explain(f, image, ["gradcam"], 0)[0].attribution for image in images])
    try:
        maps = attribution_map(f, torch.cat(images), torch.tensor([0, 0]), "gradcam")
    except Exception as error:  # noqa: BLE001 - refused or a crash
        return f"two images at once: {first_line(error)}"
    difference = float((maps - alone).abs().max())
    return f"maps of two images differ by {difference:.3g}" if difference > user.tolerance else ""


def _cells(user: Network, output: Tensor) -> Tensor:
    if not user.grid or output.dim() == 4 and output.shape[2:] == user.grid:
        return output
    output = output.transpose(0, 1) if user.tokens_first else output
    return as_cells(output, (output.shape[-1], *user.grid))


def _rounded(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values[:4]) + ")"
