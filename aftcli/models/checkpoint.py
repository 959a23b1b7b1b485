"""Weights from files: state dicts, checkpoints of `aft finetune`, installed ones; read safely.

The tuner is here too, whose weights a checkpoint holds beside the network's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.core.zero_level import PREFIX, give_zero_level
from aftcli.errors import AftError, check_name, first_line
from aftcli.files import tensors_hash, values_hash
from aftcli.settings import OUTPUTS, SOFTMAX

FORMAT_VERSION = 1

CARD = "aft"

TUNER = "aft_tuner."


def checkpoint_of(
    f: Classifier, tuner: Tuner | None, card: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a classifier and its card as tensors and metadata of a safetensors file."""
    tensors = f.weights()
    if tuner is not None:
        tensors |= {f"{TUNER}{name}": value for name, value in tuner.state_dict().items()}
    own = {
        "format_version": FORMAT_VERSION,
        "model": f.name,
        "layer": f.layer_name,
        "cam": f.cam,
        "output": f.output,
        **({"outputs": 1} if f.single else {}),
        "classes": {"names": f.classes.names, "wnids": f.classes.wnids},
        "preprocessing": f.preprocessing.as_dict(),
        "digest": tensors_hash(tensors),
        **({"output_key": f.output_key} if f.output_key else {}),
    }
    whole = {**card, **own}
    # One flipped bit would be other settings.
    sealed = {"card": whole, "sha256": values_hash(whole)}
    return tensors, {CARD: json.dumps(sealed, sort_keys=True)}


def read_card(path: str | Path) -> dict[str, Any] | None:
    """Read what a file of `aft finetune` says of itself, without its tensors.

    Args:
        path: any checkpoint.

    Returns:
        The card; None for another kind of file, or one whose header can't be read.

    Raises:
        AftError: the card is damaged or of a format that this version can't read.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(CARD)
    except (SafetensorError, OSError):
        return None
    if text is None:
        return None
    try:
        read = json.loads(text)
        card: dict[str, Any] = read["card"]
        whole = values_hash(card) == read["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    if not whole:
        raise _damaged(path)
    if card.get("format_version") != FORMAT_VERSION:
        raise AftError(
            f"{path}: is a checkpoint of format {card.get('format_version')}, this aft reads "
            f"format {FORMAT_VERSION}; upgrade aft, or tune again"
        )
    _check_form(path, card)
    return card


def _check_form(path: Path, card: Any) -> None:  # noqa: ANN401 - what JSON gives
    """Refuse a card that no classifier can be made of; a seal is easily made."""
    try:
        Preprocessing.from_dict(card["preprocessing"])
        names = [*card["classes"]["names"], *card["classes"]["wnids"]]
        plain = [card["model"], card["layer"], card["digest"], card["cam"] or "", *names]
        plain.append(card.get("output_key", ""))
        if not card["classes"]["names"] or not all(isinstance(value, str) for value in plain):
            raise ValueError("names are not text")
        check_name("CAM method", card["cam"] or "gradcam", METHODS)
        check_name("tuner", card.get("tuner", "linear"), TUNERS)
        check_name("output", card.get("output", SOFTMAX), OUTPUTS[1:])
        if card.get("outputs", 1) != 1 or ("outputs" in card and len(names) != 2):
            raise ValueError("one output needs two classes")
    except (AftError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AftError(
            f"{path}: does not say which network it belongs to ({first_line(error)}); write it "
            "again with aft finetune"
        ) from error


def _damaged(path: Path) -> AftError:
    return AftError(f"{path}: is damaged or cut short; write it again with aft finetune")


def card_classes(card: Mapping[str, Any]) -> Classes:
    """Return the classes that a card names."""
    return Classes(tuple(card["classes"]["names"]), tuple(card["classes"]["wnids"]))


# Entries of cards that a tuned classifier and its control must share. Of IMAGES only the first
# difference is told: it explains the others.
IMAGES = {
    "images": "images",
    "images_hash": "names or labels of images",
    "trained_contents": "contents of images",
}

RECIPE = {
    **{"split": "split", "held_out": "held-out share", "seed": "seed"},
    **{"augment": "augmentation", "layer": "layer", "earlier_layers": "earlier layers"},
    **{"trained": "trained weights", "learning_rate": "learning rate", "epochs": "epochs"},
    **{"batch": "batch size", "patience": "patience", "optimizer": "optimizer"},
    "precision": "precision",
}


def trained_otherwise(control: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    """Name the settings in which the cards of a control and a tuned classifier differ."""

    def differing(keys: dict[str, str]) -> list[str]:
        return [k for k in keys if k in control and k in card and control[k] != card[k]]

    values = {k: f" {control[k]} and {card[k]}" for k in differing({"images": ""})}
    named = [f"{IMAGES[key]}{values.get(key, '')}" for key in differing(IMAGES)[:1]]
    return named + [f"{RECIPE[key]} {control[key]} and {card[key]}" for key in differing(RECIPE)]


def restore(f: Classifier, path: Path, card: Mapping[str, Any]) -> Tuner | None:
    """Load a checkpoint's weights into a classifier of the same architecture.

    Returns:
        The tuner; None where the file is a control's.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error
    if tensors_hash(tensors) != card["digest"]:
        raise _damaged(path)
    own, level = _under(TUNER, tensors), _under(PREFIX, tensors)
    weights = {k: v for k, v in tensors.items() if not k.startswith((TUNER, PREFIX))}
    shapes = {k: v.shape for k, v in f.weights().items() if not k.startswith(PREFIX)}
    if {k: v.shape for k, v in weights.items()} != shapes:
        raise AftError(
            f"{path}: its weights do not fit {f.name} as it is installed here; install the "
            f"versions it was tuned with: {card.get('versions', 'unknown')}"
        )
    for name, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise AftError(f"{path}: {name} holds NaN or infinite weights; tune again")
    plain = f.zero_level or f
    for part in (f.stem, plain.layer, plain.head):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    f.cam = card["cam"]
    try:
        if level:
            give_zero_level(f, level["t"].view(()), level.get("v"))
        if not own:
            return None
        hidden, channels = own["reduce.weight"].shape[:2]
        tuner = Tuner(channels, hidden, card.get("tuner", "linear")).to(next(iter(own.values())))
        tuner.load_state_dict(own)
    except (KeyError, ValueError, RuntimeError) as error:
        raise _damaged(path) from error
    return tuner.eval().requires_grad_(False)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# What is between the tuner's two convolutions.
TUNERS: dict[str, type[nn.Module]] = {"linear": nn.Identity, "relu": nn.ReLU}


class Tuner(nn.Module):
    """Two 1x1 convolutions, K -> 3 -> 1, with weights w'; space keeps its size.

    The paper names no activation function between them, so by default there is none: f_tuner(A)
    is linear in A (docs/method/decisions/fine-tuning.md).

    Args:
        channels: K of A.
        hidden: channels between the two convolutions.
        kind: a key of TUNERS, the operation between them.
        seed: seed of the initial weights; the global random state stays as it is.
    """

    def __init__(
        self, channels: int, hidden: int = 3, kind: str = "linear", *, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reduce = nn.Conv2d(channels, hidden, 1)
            self.combine = nn.Conv2d(hidden, 1, 1)
        self.between = TUNERS[kind]()

    def forward(self, activation: Tensor) -> Tensor:
        """Compute f_tuner(A), shape (N, h, w), of activations A, shape (N, K, h, w)."""
        return self.combine(self.between(self.reduce(activation))).squeeze(1)  # type: ignore[no-any-return]
