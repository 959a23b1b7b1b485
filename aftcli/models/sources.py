"""Networks by name: installed models, torchvision's and timm's CNNs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

from torch import nn

from aftcli.core.classes import Classes, Preprocessing
from aftcli.errors import AftError, nearest
from aftcli.models.weights import INSTALLED, installed_weights, read_state_dict

DEFAULT_MODEL = "efficientnet_lite0"

# The layer l where the automatic choice (cutting.layers.default_layer) is not what the paper means.
LAYERS = {
    **dict.fromkeys(INSTALLED, "conv_head+bn2"),
    "resnet50": "layer4.2",
    "vgg16": "features.28+features.29",
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
    table = resources.files("aftcli.models").joinpath("imagenet-1k.tsv").read_text("utf-8")
    wnids, names = zip(*(line.split("\t") for line in table.splitlines()), strict=True)
    return Classes(names, wnids)


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


def find_source(name: str) -> Callable[[str, bool, int | None], Network]:
    """Find what builds a network of a name: (name, with weights, number of classes).

    Raises:
        AftError: no network has that name.
    """
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
