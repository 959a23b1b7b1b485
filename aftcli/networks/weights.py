"""Weights from files: state dicts, installed ones; read safely, no code of a file is run."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aftcli.errors import AftError
from aftcli.files import check_checkpoint
from aftcli.networks.names import INSTALLED

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


# Keys under which files keep a state dict; the first that fits is taken.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    *("ema", "state_dict_ema", "model_ema"),
)


class _Unread:
    """A stand-in for a value of a file that is ignored; it takes any arguments and does nothing."""

    def __new__(cls, *_: object) -> _Unread:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Plain values of training frameworks, by their names in files, and what replaces them: none of the
# frameworks' code is imported or run.
STAND_INS = {
    "argparse.Namespace": _Unread,
    "pathlib.PosixPath": _Unread,
    "pathlib.WindowsPath": _Unread,
    "pathlib._local.PosixPath": _Unread,
    "pathlib._local.WindowsPath": _Unread,
    "datetime.datetime": _Unread,
    "datetime.timedelta": _Unread,
    "numpy.dtype": _Unread,
    "numpy.core.multiarray.scalar": _Unread,
    "numpy._core.multiarray.scalar": _Unread,
    "numpy.dtypes.Float32DType": _Unread,
    "numpy.dtypes.Float64DType": _Unread,
    "numpy.dtypes.Int64DType": _Unread,
    "torch.torch_version.TorchVersion": _Unread,
    "easydict.EasyDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
}


def read_state_dict(path: Path, note: Callable[[str], None] = warnings.warn) -> dict[str, Tensor]:
    """Read a state dict; no code in the file is run.

    Args:
        path: `.safetensors`, or a file of torch.save (read with weights_only=True), Lightning's
            `.ckpt` too. The state dict may lie under a key of CONTAINERS.
        note: is told which key was taken, if several fit.
    """
    check_checkpoint(path)
    try:
        _check_archive(path)
        if path.suffix == ".safetensors":
            saved: object = load_file(path)
        else:
            with torch.serialization.safe_globals([(v, k) for k, v in STAND_INS.items()]):
                saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not the library's words: they tell how to run the file's code, or nothing at all.
        reason = getattr(error, "strerror", None) or "it is damaged, or holds more than tensors"
        if named := re.search(r"GLOBAL ([\w.]{1,80})", str(error)):
            reason = f"it holds more than tensors: {named[1]}"
        raise AftError(
            f"{path}: can't be read as a checkpoint ({reason}); give a .safetensors file, or a "
            ".pth or .pt file of torch.save(model.state_dict(), FILE)"
        ) from error
    while isinstance(saved, Mapping):
        fit = [k for k in CONTAINERS if isinstance(saved.get(k), Mapping) and saved[k]]
        if not fit:
            break
        if len(fit) > 1:
            note(f"{path}: took the weights under {fit[0]}, not those under {', '.join(fit[1:])}")
        saved = saved[fit[0]]
    if not isinstance(saved, Mapping) or not saved:
        raise AftError(f"{path}: holds no state dict; save model.state_dict()")
    if not all(isinstance(v, Tensor) and _is_dense(v) for v in saved.values()):
        raise AftError(f"{path}: holds entries that are not dense tensors; save model.state_dict()")
    # torch.compile writes it before the names of a part too.
    return {str(key).replace("._orig_mod.", "."): value for key, value in saved.items()}


def own_names(
    saved: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    path: Path,
    note: Callable[[str], None] = warnings.warn,
) -> dict[str, Tensor]:
    """Rename a state dict to the model's own names: remove the prefixes before them.

    The prefix under which most of the model's names lie is removed, then the one under which most
    of the missing names lie, and so on. Other weights beside a whole network are left out: losses,
    measures.

    Args:
        saved: the tensors, by the file's names.
        expected: a state dict of the model.
        path: the file's path.
        note: is told what was removed and left out.

    Raises:
        AftError: the same names lie under several prefixes.
    """
    ends = _ends(saved, expected)
    found: dict[str, str] = {}
    taken: list[str] = []
    while True:
        missing = expected.keys() - found
        new = {prefix: names & missing for prefix, names in ends.items()}
        best = max(new, key=lambda prefix: (len(new[prefix]), not prefix), default="")
        if not new.get(best):
            break
        twin = next((p for p in new if best and p != best and new[p] == new[best]), None)
        if twin is not None:
            first = next(name for name in expected if name in new[best])
            raise AftError(
                f"{path}: holds {first} twice, as {best}{first} and as {twin}{first}; save the "
                "one network that is meant"
            )
        found |= {name: f"{best}{name}" for name in new[best]}
        taken.append(best)
        # Further parts are no deeper ones of the same, and lie alone: no other network's.
        ends = {
            prefix: names
            for prefix, names in ends.items()
            if not prefix.startswith(best)
            and names.isdisjoint(found)
            and len(names) == sum(key.startswith(prefix) for key in saved)
        }
    if len(taken) > 1 and any(map(_is_needed, expected.keys() - found)):
        taken = taken[:1]
        found = {name: key for name, key in found.items() if key == f"{taken[0]}{name}"}
    used, prefixes = set(found.values()), [prefix for prefix in taken if prefix]
    others = [key for key in saved if key not in used]
    if prefixes:
        note(f"{path}: took {' and '.join(prefixes)} off the names of its weights")
        beside = not any(key.startswith(tuple(prefixes)) for key in others)
        if others and beside and not any(map(_is_needed, expected.keys() - found)):
            note(f"{path}: left out {len(others)} weights beside the network ({others[0]}, ...)")
            others = []
    first_prefix = prefixes[0] if prefixes else ""
    own = {name: saved[found[name]] for name in expected if name in found}
    return own | {key.removeprefix(first_prefix): saved[key] for key in others}


def _ends(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Find the prefixes that could be removed, and the model's names that lie under each."""
    depths = {name.count(".") for name in expected}
    ends: dict[str, set[str]] = {}
    for key in saved:
        parts = key.rsplit(".", max(depths, default=0) + 1)
        for depth in depths:
            name = ".".join(parts[-depth - 1 :])
            if name in expected:
                ends.setdefault(key.removesuffix(name), set()).add(name)
    return ends


def _is_needed(name: str) -> bool:
    """Tell if a network can't do without a weight; see `check_weights`."""
    return not name.endswith("num_batches_tracked") and not name.startswith(AUXILIARY)


def _check_archive(path: Path) -> None:
    """Refuse a zip file that is not as torch.save writes it: it may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are compressed, or share their bytes")


def _is_dense(value: Tensor) -> bool:
    """Tell if a tensor holds each of its numbers; others may claim any size."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def class_count(model: nn.Module, saved: Mapping[str, Tensor]) -> int | None:
    """Read the checkpoint's number of classes off its last entry, if it is not the model's."""
    *_, (last, value) = model.state_dict().items()
    if last in saved and saved[last].dim() and saved[last].shape[1:] == value.shape[1:]:
        return len(saved[last]) if len(saved[last]) != len(value) else None
    return None


def check_weights(model: nn.Module, saved: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Check that a state dict has the model's names and shapes."""
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
        raise AftError(
            f"{path}: is not a checkpoint of {name}: {', '.join(differences)}; pass the "
            "--model that it was saved from"
        )


def load_weights(model: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    """Load a checked state dict into the model; refuse numbers that are not finite."""
    model.load_state_dict(dict(saved), strict=False)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise AftError(f"{path}: {key} holds NaN or infinite weights; save the model again")
