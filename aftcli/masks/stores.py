"""The mask stores of a run, and the classifiers that they were made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from aftcli.core.classes import Classes
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.errors import AftError
from aftcli.masks.settings import differences
from aftcli.masks.store import MaskStore
from aftcli.models.checkpoint import read_card
from aftcli.models.source import Source
from aftcli.networks.sources import is_model


def with_names_of_run(f: Classifier, run: Path, note: Callable[[str], None]) -> Classifier:
    """Name a network's classes as a run's masks and checkpoints do, where nobody else has."""
    if f.classes != Classes.numbered(len(f.classes)):
        return f
    weights, paths = f.weights_hash(), sorted((run / "tuned").glob("[!.]*.safetensors"))
    stores = [s.settings for s in open_stores(run, f.name, []) if s.settings["weights"] == weights]
    cards = [c for c in map(read_card, paths) if c and c["start"] == weights]
    names = Source().named_by(stores, cards).known
    if len(names) == len(f.classes):
        note(f"{run}: class names are taken from its masks or checkpoints: {', '.join(names)}")
        f.classes = Classes(names)
    return f


def open_stores(run: Path, model: str | None, cams: Sequence[str]) -> list[MaskStore]:
    """Open the mask stores that a run has, perhaps none; arguments as of `find_stores`."""
    paths = sorted((run / "masks").glob("*.h5"))
    stores = [MaskStore(path) for path in paths if not path.name.startswith(".")]
    for store in stores:
        if store.settings["cam"] not in METHODS:
            raise AftError(
                f"{store.path}: its masks are of a method that this aft does not know "
                f"({store.settings['cam']}); take the file out of the folder"
            )
    return [
        s
        for s in stores
        if is_model(model, s.settings["model"]) and (not cams or s.settings["cam"] in cams)
    ]


def find_stores(run: Path, model: str | None, cams: Sequence[str]) -> list[MaskStore]:
    """Open the mask stores of a run.

    Args:
        run: where the study lives.
        model: only those of this model; None for all.
        cams: only those of these methods; empty for all.
    """
    found = open_stores(run, model, cams)
    missing = set(cams) - {s.settings["cam"] for s in found}
    if not found or missing:
        whose = f" of {model}" if model else ""
        which = f" by {', '.join(sorted(missing))}" if missing else ""
        paths = sorted((run / "masks").glob("*.h5"))
        there = ", ".join(path.name for path in paths) or "nothing"
        raise AftError(
            f"{run / 'masks'}: there are no masks{whose}{which} (there is {there}); make them with "
            "aft gen-masks DATASET, or pass the --run that has them"
        )
    return found


def check_made_for(store: MaskStore, f: Classifier) -> None:
    """Check that masks were made for a classifier."""
    made = store.settings
    asked = {
        "model": made["model"] if is_model(f.name, made["model"]) else f.name,
        "layer": f.layer_name,
        "weights": f.weights_hash(),
        "activation_shape": list(f.activation_shape),
        "preprocessing": f.preprocessing.as_dict(),
        "output": f.output,
        "output_key": f.output_key,
    }
    other = differences({key: made[key] for key in asked if key in made}, asked)
    if other:
        raise AftError(
            f"{store.path}: the masks were made for another classifier: {'; '.join(other)}; pass "
            "the --model, --checkpoint, --layer and --output that they were made with, or make "
            "them again with aft gen-masks"
        )
