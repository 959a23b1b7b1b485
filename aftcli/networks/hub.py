"""Image classifiers of Hugging Face's transformers: `hf:NAME`, or `hf:DIR` of a local folder.

No code of a model's folder is run (trust_remote_code=False), and weights are read from
safetensors files alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aftcli.core.classes import Classes, Preprocessing
from aftcli.errors import AftError, first_line

INSTALL = "pip install 'aftcli[hf]'"

RESAMPLINGS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# Entries of processors that change the input, and that a Preprocessing can't hold.
INEXPRESSIBLE = {
    "do_flip_channel_order": "swaps red and blue",
    "do_pad": "pads",
    "do_color_quantize": "quantises colours",
}

UNNAMED = re.compile(r"LABEL_\d+")  # transformers' names of classes that nobody has named


def place_of(name: str) -> str:
    """Return the place where transformers looks: a folder's whole path, or a name on the hub.

    >>> place_of("hf:google/vit-base-patch16-224")
    'google/vit-base-patch16-224'
    """
    bare = name.removeprefix("hf:")
    return str(Path(bare).resolve()) if Path(bare).is_dir() else bare


def hub_model(name: str, weights: bool, num_classes: int | None) -> nn.Module:
    """Build an image classifier of transformers.

    Args:
        name: `hf:NAME` or `hf:DIR`.
        weights: False for random weights, built from the configuration alone.
        num_classes: number of classes; default the configuration's.

    Raises:
        AftError: transformers is missing, or the model is no image classifier in .safetensors.
    """
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise AftError(f"{name} needs transformers; install it: {INSTALL}") from error

    place = place_of(name)
    only_here = {"trust_remote_code": False, "local_files_only": Path(place).is_dir()}
    kind: Any = AutoModelForImageClassification
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(place, **only_here)
            if num_classes and num_classes != config.num_labels:
                config.num_labels = num_classes
            if weights:
                made = kind.from_pretrained(place, config=config, use_safetensors=True, **only_here)
            else:
                made = kind.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AftError(
            f"{name}: can't be loaded as an image classifier of transformers "
            f"({first_line(error)[:200]}); --model hf:DIR takes a folder with config.json and "
            "model.safetensors, hf:NAME a model of the hub"
        ) from error
    return made  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and the training advice of transformers."""
    from transformers import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def hub_preprocessing(name: str) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """Read the preprocessing of a model's processor, and say what can't be followed.

    The preprocessing is None where the model has no processor.
    """
    from transformers import AutoImageProcessor

    place = place_of(name)
    try:
        with _quiet():
            processor = AutoImageProcessor.from_pretrained(
                place, trust_remote_code=False, local_files_only=Path(place).is_dir()
            )
    except (OSError, ValueError, ImportError):
        return None, ()
    return read_processor(name, processor.to_dict())


def read_processor(name: str, config: Mapping[str, Any]) -> tuple[Preprocessing, tuple[str, ...]]:
    """Turn a processor's values into a Preprocessing, and say what can't be followed.

    Args:
        name: the model's name, for the message.
        config: all values of an image processor, with its class's defaults.
    """
    said = [f"it {what}" for key, what in INEXPRESSIBLE.items() if config.get(key)]
    size, resize, problem = _sizes(config)
    said += [problem] if problem else []
    resample = config.get("resample")
    number = 2 if resample is None else int(resample)
    if number not in RESAMPLINGS:
        said.append("it scales by another interpolation")
    mean, std = np.zeros(3), np.ones(3)
    if config.get("do_normalize"):
        mean, std = np.array(config["image_mean"]), np.array(config["image_std"])
    # Its values are r v where ours are v / 255: (r v - mean) / std with r = rate / 255.
    rate = 255 * (config.get("rescale_factor") or 1 / 255) if config.get("do_rescale") else 255
    if config.get("rescale_offset"):  # EfficientNet's, into [-1, 1]
        mean = mean + 1
    if config.get("include_top"):  # EfficientNet's divides by std once more
        std = std * np.array(config["image_std"])
    normalisation = (tuple((values / rate).round(9).tolist()) for values in (mean, std))
    text = (
        f"{name}: aft can't follow all of its processor: {'; '.join(said)}; maps and "
        "probabilities may differ from those of transformers"
    )
    preprocessing = Preprocessing(size, resize, RESAMPLINGS.get(number, "bicubic"), *normalisation)
    return preprocessing, (text,) if said else ()


def _sizes(config: Mapping[str, Any]) -> tuple[tuple[int, int], int | None, str]:
    """Return the input's size, the shorter side before the crop, and the difference in words."""
    scaled, crop = _size(config.get("size")), _size(config.get("crop_size"))
    cropped = crop if config.get("do_center_crop") else None
    shortest = (config.get("size") or {}).get("shortest_edge") if config.get("do_resize") else None
    share = config.get("crop_pct")
    if share and scaled and config.get("do_resize"):
        shortest = min(scaled)
    if shortest and share:  # ConvNeXt, PoolFormer
        whole = not cropped and shortest >= 384
        size = cropped or (shortest, shortest)
        return size, None if whole else int(shortest / share), ""
    if shortest and config.get("image_processor_type", "").startswith("Levit"):
        shortest = int(shortest * 256 / 224)
    if shortest:
        problem = (
            "" if cropped else "it keeps the whole picture, of any aspect; the centre is taken"
        )
        return cropped or (shortest, shortest), shortest, problem
    if scaled is None or not config.get("do_resize"):
        return cropped or (224, 224), min(cropped or (224, 224)), "it does not scale pictures"
    if cropped in (None, scaled):
        return scaled, None, ""
    return cropped, min(scaled), "it squashes pictures before it crops them; their aspect is kept"


def _size(value: Any) -> tuple[int, int] | None:  # noqa: ANN401 - what JSON gives
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    return None


def hub_classes(model: nn.Module, imagenet: Classes) -> Classes | None:
    """Return the class names of a model's configuration; None if it has none.

    Args:
        model: a model of transformers.
        imagenet: ImageNet's classes, returned if the names are theirs, in the same order.
    """
    names = tuple(str(name) for _, name in sorted(model.config.id2label.items()))  # type: ignore[union-attr, operator]
    if all(map(UNNAMED.fullmatch, names)):
        return None
    first = [name.split(",")[0].strip().lower() for name in names]
    same = sum(a == imagenet.name(i).lower() for i, a in enumerate(first[: len(imagenet)]))
    return imagenet if len(names) == len(imagenet) and same > 0.9 * len(names) else Classes(names)
