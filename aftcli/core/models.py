"""Load a classifier by name: installed models, torchvision's and timm's CNNs."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aftcli.core.classifier import Classes, Classifier, Preprocessing, cut_classifier
from aftcli.core.methods import check_device
from aftcli.core.networks import outside_inference_mode
from aftcli.core.weights import (
    INSTALLED,
    _own_names,
    card_classes,
    installed_weights,
    read_card,
    read_state_dict,
    restore,
)
from aftcli.errors import AftError, first_line, nearest

DEFAULT_MODEL = "efficientnet_lite0"

OFFLINE = (
    f"works offline: --model {DEFAULT_MODEL} (weights installed with the package), or "
    "--checkpoint FILE with a state dict of the model that you have"
)

# Heads of torchvision's GoogLeNet and Inception that only its training looks at.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")

NEW_HEAD_SCALE = 0.01  # of the model's own initial weights; not 0, for a ReLU may follow

# The layer l where the automatic choice (core.cut.last_layer) is not what the paper means.
LAYERS = {
    **dict.fromkeys(INSTALLED, "conv_head+bn2"),
    "resnet50": "layer4.2",
    "vgg16": "features.28+features.29",
    "squeezenet1_0": "features.12",
    "squeezenet1_1": "features.12",
}


class Network(NamedTuple):
    """An uncut model and what is known about it."""

    model: nn.Module
    preprocessing: Preprocessing
    classes: Classes | None


def imagenet_classes() -> Classes:
    """Return the 1000 classes of ILSVRC 2012, names with synonyms, and wnids.

    They are timm's; a copy, for an import of timm takes half a second.
    """
    table = resources.files("aftcli.core").joinpath("imagenet-1k.tsv").read_text("utf-8")
    wnids, names = zip(*(line.split("\t") for line in table.splitlines()), strict=True)
    return Classes(names, wnids)


def _given(names: tuple[str, ...]) -> Classes:
    """Make classes of names that a user gave, literal unless they are ImageNet's list."""
    known = imagenet_classes()
    return known if names == known.names else Classes(names)


def _installed(name: str, weights: bool, num_classes: int | None) -> Network:
    """Build a model of timm's with its ImageNet weights from an installed package."""
    network = _timm(INSTALLED[name].timm_name, False, num_classes)
    if weights:
        saved = read_state_dict(installed_weights(name))
        # The same architecture under other names: the entries correspond by their order.
        names = network.model.state_dict()
        network.model.load_state_dict(dict(zip(names, saved.values(), strict=True)))
    return network


def _torchvision(name: str, weights: bool, num_classes: int | None) -> Network:
    from torchvision.models import get_model, get_model_weights

    published = get_model_weights(name)
    # The paper's accuracies (ResNet-50 .737) are those of the first weights, not of the newest.
    chosen = getattr(published, "IMAGENET1K_V1", None) or next(iter(published), None)
    options: dict[str, Any] = {"progress": sys.stderr is not None and sys.stderr.isatty()}
    if name in ("inception_v3", "googlenet"):
        options |= {"transform_input": True, "init_weights": False}
    if num_classes:
        options["num_classes"] = num_classes
    model = get_model(name, weights=chosen if weights else None, **options)
    if chosen is None:
        return Network(model, Preprocessing(), None)
    preset = chosen.transforms()
    preprocessing = Preprocessing(
        (preset.crop_size[0], preset.crop_size[0]),
        preset.resize_size[0],
        preset.interpolation.value,
        tuple(preset.mean),
        tuple(preset.std),
    )
    categories = tuple(chosen.meta["categories"])
    classes = imagenet_classes() if len(categories) == 1000 else Classes(categories)
    return Network(model, preprocessing, None if num_classes else classes)


def _timm(name: str, weights: bool, num_classes: int | None) -> Network:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    options: dict[str, Any] = {"num_classes": num_classes} if num_classes else {}
    if weights:
        timm.models.set_pretrained_check_hash(True)  # as torchvision does
        _go_offline_if_unreachable()
    model = timm.create_model(name.removeprefix("timm:"), pretrained=weights, **options)
    config = resolve_model_data_config(model)
    _, height, width = config["input_size"]
    whole = config["crop_mode"] == "squash"
    known = ("nearest", "bilinear", "bicubic")
    preprocessing = Preprocessing(
        (height, width),
        None if whole else int(min(height, width) / config["crop_pct"]),
        config["interpolation"] if config["interpolation"] in known else "bicubic",
        tuple(config["mean"]),
        tuple(config["std"]),
    )
    subset = None if num_classes else infer_imagenet_subset(model)
    if subset is None:
        return Network(model, preprocessing, None)
    info = ImageNetInfo(subset)
    classes = Classes(tuple(info.label_descriptions()), tuple(info.label_names()))
    return Network(model, preprocessing, classes)


def _go_offline_if_unreachable() -> None:
    """Look in the hub's cache only, where there is no network: the hub retries for a minute."""
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _source(name: str) -> Callable[[str, bool, int | None], Network]:
    if name in INSTALLED:
        return _installed
    if name.startswith("timm:"):
        import timm

        bare = name.removeprefix("timm:")
        if not timm.is_model(bare.split(".")[0]):
            raise AftError(f"unknown model {name!r}; nearest: {_timm_names(bare)}")
        return _timm
    import torchvision.models
    from torchvision.models import list_models

    known = list_models(module=torchvision.models)
    if name not in known:
        raise AftError(
            f"unknown model {name!r}; nearest: {nearest(name, [*INSTALLED, *known])}; "
            f"for a model of timm's write timm:NAME (nearest: {_timm_names(name)})"
        )
    return _torchvision


def _timm_names(name: str) -> str:
    import timm

    return nearest(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()], n=3)


def _sketch(
    source: Callable[[str, bool, int | None], Network], name: str, count: int | None
) -> nn.Module:
    """Build a model without its numbers, to see what a file asks for."""
    try:
        with torch.device("meta"):
            return source(name, False, count).model
    except (NotImplementedError, RuntimeError):  # it reads numbers while it is built
        return source(name, False, count).model


def _class_count(model: nn.Module, saved: Mapping[str, Tensor]) -> int | None:
    """Read the checkpoint's number of classes, where it is not the model's, off its last entry."""
    *_, (last, value) = model.state_dict().items()
    if last in saved and saved[last].dim() and saved[last].shape[1:] == value.shape[1:]:
        return len(saved[last]) if len(saved[last]) != len(value) else None
    return None


def _check_weights(model: nn.Module, saved: Mapping[str, Tensor], path: Path, name: str) -> None:
    expected = model.state_dict()
    # Counters of old checkpoints and heads for training; they play no part in the output.
    unsaved = tuple(head for head in AUXILIARY if not any(k.startswith(head) for k in saved))
    optional = {k for k in expected if k.endswith("num_batches_tracked") or k.startswith(unsaved)}
    missing = [key for key in expected if key not in saved and key not in optional]
    foreign = [key for key in saved if key not in expected]
    other = [k for k in expected if k in saved and saved[k].shape != expected[k].shape]
    if missing or foreign or other:
        differences = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (
                ("weights missing", missing),
                ("unknown to the model", foreign),
                ("of another shape", other),
            )
            if keys
        ]
        common = ".".join(os.path.commonprefix([key.split(".")[:-1] for key in saved]))
        renamed = common and len(missing) == len(expected) - len(optional)
        rename = f"all its names begin with '{common}.': take that off, or " if renamed else ""
        raise AftError(
            f"{path}: is not a checkpoint of {name}: {', '.join(differences)}; {rename}pass the "
            "--model that it was saved from"
        )


def _load_weights(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    model.load_state_dict(dict(saved), strict=False)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise AftError(f"{path}: {key} holds NaN or infinite weights; save the model again")


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
        note: is told what was taken off the names of a state dict's weights.

    Returns:
        The classifier, in eval mode, its logits equal to the uncut model's bit for bit.

    Raises:
        AftError: model, layer or checkpoint is unknown, damaged, does not fit or can't be had.
    """
    card = read_card(Path(checkpoint)) if checkpoint else None
    if checkpoint and card:
        return _tuned(Path(checkpoint), card, name, layer, classes).to(device)
    name = DEFAULT_MODEL if name is None else name
    source = _source(name)
    if checkpoint is None:
        network = _published(name, source) if weights else source(name, False, None)
    else:
        sketch = _sketch(source, name, None)
        saved, prefixes = _own_names(
            read_state_dict(Path(checkpoint)), sketch.state_dict(), Path(checkpoint)
        )
        count = _class_count(sketch, saved)
        _check_weights(_sketch(source, name, count), saved, Path(checkpoint), name)
        network = source(name, False, count)
        _load_weights(network.model, saved, Path(checkpoint))
        if prefixes:
            note(f"{checkpoint}: took {' and '.join(prefixes)} off the names of its weights")
    classifier = _cut(name, network, layer, _given(classes) if classes else network.classes)
    classifier.checkpoint = str(Path(checkpoint).resolve()) if checkpoint else ""
    return classifier.to(device)


def _cut(name: str, network: Network, layer: str | None, classes: Classes | None) -> Classifier:
    return cut_classifier(
        network.model,
        layer or LAYERS.get(name),
        name=name,
        preprocessing=network.preprocessing,
        classes=classes,
        own=True,
    )


def _tuned(
    path: Path,
    card: dict[str, Any],
    name: str | None,
    layer: str | None,
    classes: tuple[str, ...] | None,
) -> Classifier:
    """Load a classifier that `aft finetune` has written."""
    for what, asked, known in (
        ("--model", name, card["model"]),
        ("--layer", layer, card["layer"]),
    ):
        if asked is not None and asked != known:
            raise AftError(
                f"{path}: was tuned for {what} {known}, asked for {asked}; leave {what} out"
            )
    own = card_classes(card)
    if classes and len(classes) != len(own):
        raise AftError(f"{path}: has {len(own)} classes, --classes names {len(classes)}")
    source = _source(card["model"])
    needed = sum(value.numel() for value in _sketch(source, card["model"], len(own)).parameters())
    if needed > path.stat().st_size:
        raise AftError(f"{path}: is no checkpoint of {card['model']}: it holds too few numbers")
    network = source(card["model"], False, len(own))
    network = network._replace(preprocessing=Preprocessing.from_dict(card["preprocessing"]))
    f = _cut(card["model"], network, card["layer"], _given(classes) if classes else own)
    restore(f, path, card)
    f.checkpoint = str(path.resolve())
    return f


@outside_inference_mode
def with_new_head(f: Classifier, classes: tuple[str, ...], seed: int = 0) -> Classifier:
    """Give a classifier an output for each of other classes; all other weights stay.

    The new weights are small: all classes begin about equally likely (docs/decisions.md).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = _source(f.name)
        network = source(f.name, False, len(classes))
        larger = source(f.name, False, len(classes) + 1).model.state_dict()
    by_class = {k for k, v in network.model.state_dict().items() if v.shape != larger[k].shape}
    network = network._replace(preprocessing=f.preprocessing)
    new = _cut(f.name, network, f.layer_name, Classes(classes))
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
