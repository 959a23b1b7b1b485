"""Classifiers loaded by name and from files."""

from __future__ import annotations

import platform
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
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
from aftcli.networks.own import CODE
from aftcli.networks.sources import (
    DEFAULT_MODEL,
    LAYERS,
    Network,
    Source,
    find_source,
    full_name,
    imagenet_classes,
    is_model,
    refuse_unnamed,
)
from aftcli.networks.weights import (
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
    """Turn a user's names into classes, literal unless they are ImageNet's list."""
    known = imagenet_classes()
    return known if names == known.names else Classes(names)


def _sketch(source: Source, name: str, count: int | None) -> nn.Module:
    """Build a model without its numbers, to see what a file must hold."""
    if count is None and CODE.fullmatch(name):
        # It may keep what it makes, and a network without numbers must not be kept.
        return source(name, False, None).model
    try:
        with torch.device("meta"):
            return source(name, False, count).model
    except (NotImplementedError, RuntimeError, AftError):  # it reads numbers while it is built
        return source(name, False, count).model


def _published(name: str, source: Source) -> Network:
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
    classes: Sequence[str] | Classes | None = None,
    device: str | torch.device = "cpu",
    output_key: str | None = None,
    weights: bool = True,
    output: str = AUTO,
    note: Callable[[str], None] = warnings.warn,
) -> Classifier:
    """Load an image classifier and cut it at layer l into w0, w1, w2 (§4.2).

    Args:
        name: a key of INSTALLED, a classifier of torchvision's, `timm:NAME`, `hf:NAME` or `hf:DIR`
            of transformers, or your own code, which is run: `FILE.py:NAME` or
            `package.module:NAME`. Default the checkpoint's, otherwise `efficientnet_lite0`.
        checkpoint: a file of `aft finetune`, which knows its model, layer and classes, or a
            state dict for the model; default the model's published weights.
        layer: a module's name, or consecutive modules joined by `+`; default see
            `cutting.layers.default_layer`.
        classes: class names, literal, or Classes; default the model's.
        device: where the classifier runs.
        output_key: the entry of what the network returns that has the logits; see
            `cut_classifier`.
        weights: False for random weights, without a download.
        output: how outputs become probabilities, see `cut_classifier`; auto takes what a file of
            `aft finetune` says.
        note: is told which prefixes of a state dict's names were removed, and what was guessed.

    Returns:
        The classifier, in eval mode. Its logits equal the uncut model's bit for bit; up to rounding
        where the network runs as it is.

    Raises:
        AftError: model, layer or checkpoint is unknown, damaged, does not fit or can't be had;
            or a checkpoint needs somebody's own code, or a hub, that `name` does not name.
    """
    if isinstance(classes, str | Path):
        raise AftError(f"classes is {classes!r}; give the names themselves, in the outputs' order")
    own = tuple(classes.names if isinstance(classes, Classes) else classes or ())
    card = read_card(Path(checkpoint)) if checkpoint else None
    if checkpoint and card:
        read = (output, output_key)
        return _tuned(Path(checkpoint), card, name, layer, own or None, *read, note).to(device)
    name = full_name(DEFAULT_MODEL if name is None else name)
    source = find_source(name)
    if checkpoint is None:
        network = _published(name, source) if weights else source(name, False, None)
    else:
        sketch = _sketch(source, name, None)
        saved = own_names(
            read_state_dict(Path(checkpoint), note), sketch.state_dict(), Path(checkpoint), note
        )
        count = class_count(sketch, saved)
        check_weights(_sketch(source, name, count), saved, Path(checkpoint), name)
        network = source(name, False, count)
        load_weights(network.model, saved, Path(checkpoint))
    network = network._replace(classes=_given(own) if own else network.classes)
    classifier = _cut(name, network, layer, output, output_key, note)
    classifier.checkpoint = str(Path(checkpoint).resolve()) if checkpoint else ""
    return classifier.to(device)


def _cut(
    name: str,
    network: Network,
    layer: str | None,
    output: str,
    output_key: str | None,
    note: Callable[[str], None],
) -> Classifier:
    for text in network.notes:
        note(text)
    return cut_classifier(
        network.model,
        layer or LAYERS.get(name),
        name=name,
        preprocessing=network.preprocessing,
        classes=network.classes,
        output_key=output_key,
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
    output_key: str | None,
    note: Callable[[str], None],
) -> Classifier:
    """Load a classifier that `aft finetune` has written."""
    own_key, own_output = card.get("output_key"), card.get("output", SOFTMAX)
    for what, asked, known, same in (
        ("--model", name, card["model"], is_model(name, card["model"])),
        ("--layer", layer, card["layer"], layer in (None, card["layer"])),
        ("--output", output, own_output, output in (AUTO, own_output)),
        ("--output-key", output_key, own_key, output_key in (None, own_key)),
    ):
        if not same:
            raise AftError(
                f"{path}: was tuned for {what} {known}, asked for {asked}; leave {what} out"
            )
    if name is None:
        refuse_unnamed(card["model"], path)
    name = card["model"] if name is None else full_name(name)
    own = card_classes(card)
    count = card.get("outputs", len(own))
    if classes and len(classes) not in (len(own), count):
        raise AftError(f"{path}: has {len(own)} classes, --classes names {len(classes)}")
    source = find_source(name)
    needed = sum(value.numel() for value in _sketch(source, name, count).parameters())
    if needed > path.stat().st_size:
        raise AftError(f"{path}: is not a checkpoint of {name}: it holds too few numbers")
    preprocessing = Preprocessing.from_dict(card["preprocessing"])
    meant = _given(classes) if classes else own
    network = Network(source(name, False, count).model, preprocessing, meant)
    f = _cut(name, network, card["layer"], own_output, own_key, note)
    restore(f, path, card)
    f.checkpoint = str(path.resolve())
    return f


@outside_inference_mode
def with_new_head(f: Classifier, classes: tuple[str, ...], seed: int = 0) -> Classifier:
    """Give a classifier outputs for other classes; all other weights stay.

    The new weights are small, so that all classes begin about equally likely
    (docs/method/decisions/fine-tuning.md).
    The new classes of a network that had one output exclude each other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = find_source(f.name)
        network = source(f.name, False, len(classes))
        larger = source(f.name, False, len(classes) + 1).model.state_dict()
    by_class = {k for k, v in network.model.state_dict().items() if v.shape != larger[k].shape}
    if not by_class:
        raise AftError(
            f"{f.name}: can't get {len(classes)} outputs: give its function an argument num_classes"
        )
    network = Network(network.model, f.preprocessing, Classes(classes))
    output = AUTO if f.single else f.output
    new = _cut(f.name, network, f.layer_name, output, f.output_key or None, warnings.warn)
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


def advice(f: Classifier) -> str:
    """Say what to do if a data set's labels are not among a classifier's classes.

    A network that its user has trained is never to be replaced.
    """
    if f.classes == Classes.numbered(len(f.classes)):
        return (
            f"; its {len(f.classes)} classes have no names: name them by --classes FILE, one a "
            "line, in the order of its outputs"
        )
    if f.checkpoint:
        return (
            "; name a data set of its classes, call the folders as its classes are called, or name "
            "the classes by --classes FILE, one a line, in the order of its outputs"
        )
    return (
        "; name a data set of its classes, or give it an output for each of these: aft finetune "
        "DATASET --no-masks, then run aft gen-masks and aft finetune with the --checkpoint that "
        "this writes"
    )


def device_name(device: torch.device) -> str:
    """Name the machine that figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.processor() or platform.machine()} GPU (mps)"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
