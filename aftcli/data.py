"""Images and maps: from files to tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from aftcli.core.cam import normalise, upsample
from aftcli.core.classifier import Preprocessing
from aftcli.data_files import reason
from aftcli.errors import AftError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# A longer picture is cut to this many shorter sides before it is scaled: a 1 x 10000 one would
# otherwise become 256 x 2560000 for the sake of its centre.
LONGEST = 16


class View(NamedTuple):
    """What of a picture the model sees: scale it to `scaled`, then crop `crop` of that."""

    scaled: tuple[int, int]
    crop: tuple[int, int, int, int]

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the view in pixels of a picture of `size` (w, h)."""
        across, down = size[0] / self.scaled[0], size[1] / self.scaled[1]
        left, top, right, bottom = self.crop
        return (left * across, top * down, right * across, bottom * down)


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as people see it: upright, 8 bits, RGB, transparency over white.

    Args:
        path: of a file in any format and mode that Pillow reads.

    Raises:
        AftError: the file is missing, empty, damaged, no picture, or larger than Pillow's
            limit (about 179 million pixels).
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise AftError(f"{path}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # In place: a copy of a large picture is hundreds of megabytes.
                ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except AftError:
        raise
    except UnidentifiedImageError as error:
        raise AftError(f"{path}: is not a picture in a known format, or is damaged") from error
    except Image.DecompressionBombError as error:
        raise AftError(f"{path}: is too large ({error}); scale it down first") from error
    except Exception as error:
        damaged = "" if isinstance(error, OSError) and error.strerror else "; it may be damaged"
        raise AftError(f"{path}: can't be read as a picture ({reason(error)}){damaged}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        top = values.max(initial=0)
        scale = 1.0 if 1 < top <= 255 else 255 / (65535 if top > 1 else 1)
        if image.mode.startswith("I;16"):
            scale = 255 / 65535
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
        image.info.pop("icc_profile", None)  # of another colour space
    return image


def view_of(size: tuple[int, int], preprocessing: Preprocessing) -> View:
    """Find what of a picture of `size` (width, height) the model sees."""
    high, wide = preprocessing.size
    if preprocessing.resize is None:
        return View((wide, high), (0, 0, wide, high))
    width, height = size
    short = preprocessing.resize
    if width <= height:
        scaled = (short, max(int(short * height / width), 1))
    else:
        scaled = (max(int(short * width / height), 1), short)
    left, top = round((scaled[0] - wide) / 2), round((scaled[1] - high) / 2)
    return View(scaled, (left, top, left + wide, top + high))


def _centre(image: Image.Image) -> Image.Image:
    """Cut an extremely long picture to its middle."""
    width, height = image.size
    most = LONGEST * min(width, height)
    across, down = max(width - most, 0) // 2, max(height - most, 0) // 2
    return image.crop((across, down, width - across, height - down)) if across + down else image


def to_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Turn a picture into x: scale, crop, normalise, as the model was trained.

    Args:
        image: RGB.
        preprocessing: of the model.

    Returns:
        x, shape (1, 3, H, W).
    """
    if preprocessing.resize is not None:
        image = _centre(image)
    view = view_of(image.size, preprocessing)
    image = image.resize(view.scaled, INTERPOLATIONS[preprocessing.interpolation]).crop(view.crop)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    return ((pixels - mean) / std)[None]


def read_map(path: Path) -> Tensor:
    """Read an attribution map from another tool.

    Args:
        path: `.npy`, `.npz` with one array, or a grey picture.

    Returns:
        The map, shape (h, w), float64, scaled to magnitudes of at most 1.

    Raises:
        AftError: the file is missing, damaged or of another kind, or its array is not a
            finite, two-dimensional one of numbers.
    """
    if not path.is_file():
        raise AftError(f"{path}: there is no such map file")
    try:
        array = _array(path)
    except AftError:
        raise
    except Exception as error:
        raise AftError(
            f"{path}: can't be read as a map ({reason(error)}); give .npy, .npz or a grey picture"
        ) from error
    if array.ndim != 2 or 0 in array.shape:
        raise AftError(
            f"{path}: a map has two dimensions (height, width), this has shape {array.shape}; "
            "save the map of one image and one class"
        )
    if array.dtype.kind not in "fiub":
        raise AftError(f"{path}: a map holds numbers, this holds {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise AftError(f"{path}: the map has values that are NaN or infinite")
    # To [-1, 1]: the span of finite float64 values may not be finite, nor they in float32.
    return torch.from_numpy(array / max(np.abs(array).max(), np.finfo(float).tiny))


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as arrays:
            if len(arrays.files) != 1:
                raise AftError(
                    f"{path}: a map file holds one array, this has {len(arrays.files)}"
                    f"{': ' if arrays.files else ''}{', '.join(arrays.files)[:100]}; save one map"
                )
            return arrays[arrays.files[0]]  # type: ignore[no-any-return]
    with Image.open(path) as image:
        if image.mode.startswith("I") or image.mode in ("F", "L"):
            return np.asarray(image)
        pixels = np.asarray(image.convert("RGB"))
    if (pixels != pixels[..., :1]).any():
        raise AftError(f"{path}: is a coloured picture; a map's picture is grey")
    return pixels[..., 0]


def fit_map(
    values: Tensor, x: Tensor, size: tuple[int, int], view: View, absolute: bool = False
) -> Tensor:
    """Turn a map of any size and scale into I at the input's size.

    Args:
        values: the map, shape (h, w). One of the picture's own size lies on the picture and is
            cropped with it; any other covers what the model sees.
        x: inputs, shape (1, 3, H, W).
        size: width and height of the picture.
        view: what of the picture the model sees.
        absolute: take magnitudes; by default negatives become zero.

    Returns:
        I, shape (1, H, W), in [0, 1].
    """
    values = values.abs() if absolute else values.relu()
    if values.shape == (size[1], size[0]) and values.shape != x.shape[2:]:
        left, top, right, bottom = (round(edge) for edge in view.box(size))
        values = values[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)]
    attribution = normalise(values[None])
    high, wide = x.shape[2:]
    if attribution.shape[1] > high or attribution.shape[2] > wide:
        shrunk = F.interpolate(
            attribution[None], (high, wide), mode="bilinear", align_corners=False, antialias=True
        )
        return shrunk[0].clamp(0, 1).to(x)
    return upsample(attribution, x).to(x)
