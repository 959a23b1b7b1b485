"""Attribution maps of image classifiers, with fine-tuned thresholds; the public Python API.

Names are imported when first used, so that `import aftcli` does not import torch. What is not
listed here is private and may change in any version.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from aftcli.version import __version__ as __version__

if TYPE_CHECKING:
    from aftcli.aft.jobs import control_job as control_job
    from aftcli.aft.jobs import mask_job as mask_job
    from aftcli.aft.loss import Recipe as Recipe
    from aftcli.aft.run import fine_tune as fine_tune
    from aftcli.aft.training import Training as Training
    from aftcli.attributions.maps import attribution_map as attribution_map
    from aftcli.core.classes import Classes as Classes
    from aftcli.core.classes import Preprocessing as Preprocessing
    from aftcli.core.classifier import Classifier as Classifier
    from aftcli.core.classifier import cut_classifier as cut_classifier
    from aftcli.core.methods import METHODS as METHODS
    from aftcli.data.images import read_image as read_image
    from aftcli.data.images import to_input as to_input
    from aftcli.data.sets import open_data_set as open_data_set
    from aftcli.engine.accelerate import accelerated as accelerated
    from aftcli.errors import AftError as AftError
    from aftcli.evaluation.run import evaluate_study as evaluate_study
    from aftcli.evaluation.study import Study as Study
    from aftcli.evaluation.study import find_studies as find_studies
    from aftcli.evaluation.tables import table3 as table3
    from aftcli.evaluation.tables import table4 as table4
    from aftcli.masks.generate import generate_masks as generate_masks
    from aftcli.masks.store import MaskStore as MaskStore
    from aftcli.measures.metrics import Average as Average
    from aftcli.measures.registry import MEASURES as MEASURES
    from aftcli.models.checkpoint import read_card as read_card
    from aftcli.models.load import load_classifier as load_classifier
    from aftcli.models.source import Source as Source
    from aftcli.models.targets import box_target as box_target
    from aftcli.models.targets import contrast_target as contrast_target
    from aftcli.models.targets import output_target as output_target
    from aftcli.models.targets import region_target as region_target
    from aftcli.models.targets import similarity_target as similarity_target
    from aftcli.models.targets import with_target as with_target
    from aftcli.pictures.notebook import explain as explain
    from aftcli.pictures.notebook import figure as figure
    from aftcli.pictures.notebook import grid as grid
    from aftcli.pictures.notebook import overlay as overlay
    from aftcli.settings import Search as Search
    from aftcli.tft.explain import Explanation as Explanation
    from aftcli.tft.judges import Judge as Judge
    from aftcli.tft.result import TftResult as TftResult
    from aftcli.tft.search import fine_tune_threshold as fine_tune_threshold

_HOMES = {
    "AftError": "aftcli.errors",
    "Average": "aftcli.measures.metrics",
    "Classes": "aftcli.core.classes",
    "Classifier": "aftcli.core.classifier",
    "Explanation": "aftcli.tft.explain",
    "Judge": "aftcli.tft.judges",
    "MEASURES": "aftcli.measures.registry",
    "METHODS": "aftcli.core.methods",
    "MaskStore": "aftcli.masks.store",
    "Preprocessing": "aftcli.core.classes",
    "Recipe": "aftcli.aft.loss",
    "Search": "aftcli.settings",
    "Source": "aftcli.models.source",
    "Study": "aftcli.evaluation.study",
    "TftResult": "aftcli.tft.result",
    "Training": "aftcli.aft.training",
    "accelerated": "aftcli.engine.accelerate",
    "attribution_map": "aftcli.attributions.maps",
    "box_target": "aftcli.models.targets",
    "contrast_target": "aftcli.models.targets",
    "control_job": "aftcli.aft.jobs",
    "cut_classifier": "aftcli.core.classifier",
    "evaluate_study": "aftcli.evaluation.run",
    "explain": "aftcli.pictures.notebook",
    "figure": "aftcli.pictures.notebook",
    "find_studies": "aftcli.evaluation.study",
    "fine_tune": "aftcli.aft.run",
    "fine_tune_threshold": "aftcli.tft.search",
    "generate_masks": "aftcli.masks.generate",
    "grid": "aftcli.pictures.notebook",
    "load_classifier": "aftcli.models.load",
    "mask_job": "aftcli.aft.jobs",
    "open_data_set": "aftcli.data.sets",
    "output_target": "aftcli.models.targets",
    "overlay": "aftcli.pictures.notebook",
    "read_card": "aftcli.models.checkpoint",
    "read_image": "aftcli.data.images",
    "region_target": "aftcli.models.targets",
    "similarity_target": "aftcli.models.targets",
    "table3": "aftcli.evaluation.tables",
    "table4": "aftcli.evaluation.tables",
    "to_input": "aftcli.data.images",
    "with_target": "aftcli.models.targets",
}
# Old names, of one version.
_RENAMED = {"AftSettings": "Recipe", "TftSettings": "Search"}
__all__ = list(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"aftcli.{name} is now aftcli.{new}", DeprecationWarning, stacklevel=2)
        name = new
    if name not in _HOMES:
        raise AttributeError(f"module 'aftcli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
