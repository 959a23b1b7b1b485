"""Metrics of Quantus (Hedström et al., JMLR 2023), by the library and with its defaults."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.errors import AftError, first_line, nearest

INSTALL = "pip install 'aftcli[quantus]'"

# Metrics that give no value of one image and its map.
NO_VALUE = {
    "Consistency": "compares images with one another",
    "Sufficiency": "compares images with one another",
    "SensitivityN": "compares images with one another",
    "Focus": "needs mosaics of images",
}


class Metric(NamedTuple):
    """A metric of Quantus.

    Attributes:
        kind: its class.
        group: its category, in lower case.
        version: of the library.
    """

    kind: Any
    group: str
    version: str

    @property
    def name(self) -> str:
        """The name of the class."""
        return str(self.kind.__name__)

    @property
    def better(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return 1 if self.kind.score_direction.value == "higher" else -1


def find_metric(name: str) -> Metric:
    """Find a metric by the name of its class.

    Raises:
        AftError: Quantus is not installed, has no such metric, or the metric has no value of one
            image.
    """
    if find_spec("quantus") is None:
        raise AftError(
            f"--metrics quantus:{name} needs quantus, which this installation lacks; install it: "
            f"{INSTALL}"
        )
    library = import_module("quantus")
    known = {
        kind.__name__: Metric(kind, group.lower(), str(library.__version__))
        for group, kinds in library.AVAILABLE_METRICS.items()
        for kind in kinds.values()
    }
    if name not in known:
        raise AftError(
            f"Quantus {library.__version__} has no metric {name!r}; nearest: "
            f"{nearest(name, known)}; all: {', '.join(n for n in known if n not in NO_VALUE)}"
        )
    if name in NO_VALUE:
        raise AftError(
            f"--metrics quantus:{name} {NO_VALUE[name]}, so it has no value for a single image; "
            "leave it out"
        )
    return known[name]


class Image(NamedTuple):
    """An image whose map is measured.

    Attributes:
        x: input, shape (3, H, W).
        class_index: c, a number.
        attribution: I, shape (H, W).
        segmentation: the object, shape (H, W), bool; None where it is not known.
        seed: of all that is random.
        explain: gives the maps, shape (N, H, W), of a network, inputs and classes.
    """

    x: Tensor
    class_index: int
    attribution: Tensor
    segmentation: Tensor | None
    seed: int
    explain: Callable[[Classifier, Tensor, Tensor], Tensor]


def measure_image(metric: Metric, f: Classifier, image: Image) -> float:
    """Measure the map of one image; a curve, or a value a layer, is averaged.

    Args:
        metric: of `find_metric`.
        f: the classifier, without an engine: some metrics replace its weights.
        image: what it sees, and its map.

    Returns:
        The value; NaN where this map or one that the metric asks for is constant and Quantus
        refuses it, where localisation has no object to find, where no finite number comes out.

    Raises:
        AftError: the metric fails on this network or map.
    """
    own, seen, device = image.attribution, image.segmentation, image.x.device
    is_lost = metric.group == "localisation" and (seen is None or not seen.any())
    if is_lost or own.min() == own.max():
        return float("nan")

    def explain(model: Classifier, inputs: Any, targets: Any, **_: Any) -> Any:  # noqa: ANN401
        x = torch.as_tensor(np.asarray(inputs)).to(image.x)
        classes = torch.as_tensor(np.asarray(targets)).to(device)
        maps = image.explain(model, x, classes)
        constant.append(bool((maps.amax((1, 2)) == maps.amin((1, 2))).any()))
        return maps.cpu().numpy()

    constant: list[bool] = []

    with _seeded(image.seed):
        try:
            found = _made(metric, f)(
                model=f,
                x_batch=image.x[None].cpu().numpy(),
                y_batch=np.array([image.class_index]),
                a_batch=own[None, None].cpu().numpy(),
                s_batch=None if seen is None else seen[None, None].cpu().numpy(),
                channel_first=True,
                explain_func=explain,
                device=str(device),
            )
            value = _mean(found)
        except Exception as error:
            if any(constant):
                return float("nan")
            raise AftError(
                f"--metrics quantus:{metric.name} fails in Quantus {metric.version} on {f.name}: "
                f"{first_line(error)}; leave it out"
            ) from error
    return value if np.isfinite(value) else float("nan")


def _made(metric: Metric, f: Classifier) -> Any:  # noqa: ANN401 - Quantus is untyped
    """Make the metric; only the number of classes, which Quantus can't know, is given."""
    known = inspect.signature(metric.kind.__init__).parameters
    own = {"num_classes": len(f.classes.names)} if "num_classes" in known else {}
    return metric.kind(
        return_aggregate=False, disable_warnings=True, display_progressbar=False, **own
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all that Quantus draws from, and restore it; silence its warnings."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _mean(found: Any) -> float:  # noqa: ANN401 - a list, or a list for each layer
    """Average the values of one image; the layer "original" is the network as it is."""
    if isinstance(found, Mapping):
        found = [values for layer, values in found.items() if layer != "original"]
    return float(np.mean(np.asarray(found, dtype=float)))
