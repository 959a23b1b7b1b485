"""Load a classifier by name: installed models, torchvision's and timm's CNNs."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import Classifier, cut_classifier
from aftcli.core.methods import check_device
from aftcli.cutting.networks import outside_inference_mode
from aftcli.errors import AftError, first_line
from aftcli.models.checkpoint import card_classes, read_card, restore
from aftcli.models.sources import DEFAULT_MODEL, LAYERS, Network, find_source, imagenet_classes
from aftcli.models.weights import (
    check_weights,
    class_count,
    load_weights,
    own_names,
    read_state_dict,
)
from aftcli.settings import AUTO, SOFTMAX

OFFLINE = (
    f"works offline: --model {DEFAULT_MODEL} (weights installed with the package), or "
    "--checkpoint FILE with a state dict of the model that you have"
)

NEW_HEAD_SCALE = 0.01  # of the model's own initial weights; not 0, for a ReLU may follow


def _given(names: tuple[str, ...]) -> Classes:
    """Make classes of names that a user gave, literal unless they are ImageNet's list."""
    known = imagenet_classes()
    return known if names == known.names else Classes(names)


def _sketch(
    source: Callable[[str, bool, int | None], Network], name: str, count: int | None
) -> nn.Module:
    """Build a model without its numbers, to see what a file asks for."""
    try:
        with torch.device("meta"):
            return source(name, False, count).model
    except (NotImplementedError, RuntimeError):  # it reads numbers while it is built
        return source(name, False, count).model


def _published(name: str, source: Callable[[str, bool, int | None], Network]) -> Network:
    try:
        # torch.hub says on stdout what it downloads.
        with redirect_stdout(sys.stderr):
            return source(name, True, None)
    except AftError:
        raise
    except Exception as error:
        raise AftError(
            f"the published weights of {name} can't be loaded ({_reason(error)}); {OFFLINE}"
        ) from error


def _reason(error: Exception) -> str:
    return textwrap.shorten(first_line(error), 120, placeholder="...")


@outside_inference_mode
def load_classifier(
    name: str | None = None,
    checkpoint: str | Path | None = None,
    layer: str | None = None,
    *,
    classes: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
    weights: bool = True,
    output: str = AUTO,
    note: Callable[[str], None] = warnings.warn,
) -> Classifier:
    """Load a CNN and cut it at layer l into w0, w1, w2 (§4.2).

    Args:
        name: a key of INSTALLED, a classification CNN of torchvision's, or `timm:NAME`; default
            the checkpoint's, otherwise `efficientnet_lite0`.
        checkpoint: a file of `aft finetune`, which knows its model, layer and classes, or a
            state dict for the model; default the model's published weights.
        layer: a module's name, or consecutive modules joined by `+`; default the last
            convolutional layer.
        classes: class names, literal; default the model's.
        device: where the classifier runs.
        weights: False for random weights, without a download.
        output: what makes probabilities of the outputs, see `cut_classifier`; auto is what a file
            of `aft finetune` says.
        note: is told what was taken off the names of a state dict's weights, and what was assumed
            of the outputs.

    Returns:
        The classifier, in eval mode, its logits equal to the uncut model's bit for bit.

    Raises:
        AftError: model, layer or checkpoint is unknown, damaged, does not fit or can't be had.
    """
    card = read_card(Path(checkpoint)) if checkpoint else None
    if checkpoint and card:
        return _tuned(Path(checkpoint), card, name, layer, classes, output).to(device)
    name = DEFAULT_MODEL if name is None else name
    source = find_source(name)
    if checkpoint is None:
        network = _published(name, source) if weights else source(name, False, None)
    else:
        sketch = _sketch(source, name, None)
        saved, prefixes = own_names(
            read_state_dict(Path(checkpoint)), sketch.state_dict(), Path(checkpoint)
        )
        count = class_count(sketch, saved)
        check_weights(_sketch(source, name, count), saved, Path(checkpoint), name)
        network = source(name, False, count)
        load_weights(network.model, saved, Path(checkpoint))
        if prefixes:
            note(f"{checkpoint}: took {' and '.join(prefixes)} off the names of its weights")
    meant = _given(classes) if classes else network.classes
    classifier = _cut(name, network, layer, meant, output, note)
    classifier.checkpoint = str(Path(checkpoint).resolve()) if checkpoint else ""
    return classifier.to(device)


def _silent(text: str) -> None:
    """Say nothing, where nothing is guessed."""


def _cut(
    name: str,
    network: Network,
    layer: str | None,
    classes: Classes | None,
    output: str,
    note: Callable[[str], None] = _silent,
) -> Classifier:
    return cut_classifier(
        network.model,
        layer or LAYERS.get(name),
        name=name,
        preprocessing=network.preprocessing,
        classes=classes,
        own=True,
        output=output,
        note=note,
    )


def _tuned(
    path: Path,
    card: dict[str, Any],
    name: str | None,
    layer: str | None,
    classes: tuple[str, ...] | None,
    output: str,
) -> Classifier:
    """Load a classifier that `aft finetune` has written."""
    for what, asked, known in (
        ("--model", name, card["model"]),
        ("--layer", layer, card["layer"]),
        ("--output", None if output == AUTO else output, card.get("output", SOFTMAX)),
    ):
        if asked is not None and asked != known:
            raise AftError(
                f"{path}: was tuned for {what} {known}, asked for {asked}; leave {what} out"
            )
    own = card_classes(card)
    count = card.get("outputs", len(own))
    if classes and len(classes) not in (len(own), count):
        raise AftError(f"{path}: has {len(own)} classes, --classes names {len(classes)}")
    source = find_source(card["model"])
    needed = sum(value.numel() for value in _sketch(source, card["model"], count).parameters())
    if needed > path.stat().st_size:
        raise AftError(f"{path}: is no checkpoint of {card['model']}: it holds too few numbers")
    network = source(card["model"], False, count)
    network = network._replace(preprocessing=Preprocessing.from_dict(card["preprocessing"]))
    meant = _given(classes) if classes else own
    f = _cut(card["model"], network, card["layer"], meant, card.get("output", SOFTMAX))
    restore(f, path, card)
    f.checkpoint = str(path.resolve())
    return f


@outside_inference_mode
def with_new_head(f: Classifier, classes: tuple[str, ...], seed: int = 0) -> Classifier:
    """Give a classifier an output for each of other classes; all other weights stay.

    The new weights are small: all classes begin about equally likely (docs/decisions.md). Classes
    of a network with one output exclude each other afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = find_source(f.name)
        network = source(f.name, False, len(classes))
        larger = source(f.name, False, len(classes) + 1).model.state_dict()
    by_class = {k for k, v in network.model.state_dict().items() if v.shape != larger[k].shape}
    network = network._replace(preprocessing=f.preprocessing)
    output = AUTO if f.single else f.output
    new = _cut(f.name, network, f.layer_name, Classes(classes), output)
    before = f.zero_level or f  # a zero level belongs to the head that goes
    for own, other in ((new.stem, f.stem), (new.layer, before.layer), (new.head, before.head)):
        kept = {k: v for k, v in other.state_dict().items() if k not in by_class}
        own.load_state_dict(kept, strict=False)
        for key, value in own.state_dict().items():
            if key in by_class:
                value.mul_(NEW_HEAD_SCALE)
    new.checkpoint = f.checkpoint
    return new.to(f.device)


def find_device(name: str) -> torch.device:
    """Find a device by its command-line name."""
    check_device(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise AftError(
            f"device {name!r} can't be used here ({_reason(error)}); use --device auto or cpu"
        ) from error
    return device
