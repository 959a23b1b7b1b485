"""Attribution maps of CNNs, with fine-tuned thresholds; the public Python API.

Names are imported when first used, so that `import aftcli` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aftcli.aft import AftSettings as AftSettings
    from aftcli.aft_training import Training as Training
    from aftcli.core.cam import attribution_map as attribution_map
    from aftcli.core.classifier import Classes as Classes
    from aftcli.core.classifier import Classifier as Classifier
    from aftcli.core.classifier import Preprocessing as Preprocessing
    from aftcli.core.classifier import cut_classifier as cut_classifier
    from aftcli.core.models import load_classifier as load_classifier
    from aftcli.core.registry import METHODS as METHODS
    from aftcli.data import read_image as read_image
    from aftcli.data import to_input as to_input
    from aftcli.engine import accelerated as accelerated
    from aftcli.errors import AftError as AftError
    from aftcli.evaluate_jobs import Study as Study
    from aftcli.evaluate_jobs import find_studies as find_studies
    from aftcli.evaluate_run import evaluate_study as evaluate_study
    from aftcli.explanation import Explanation as Explanation
    from aftcli.explanation import TftSettings as TftSettings
    from aftcli.explanation import explain as explain
    from aftcli.finetune import fine_tune as fine_tune
    from aftcli.finetune_jobs import control_job as control_job
    from aftcli.finetune_jobs import mask_job as mask_job
    from aftcli.generate import generate_masks as generate_masks
    from aftcli.masks import MaskStore as MaskStore
    from aftcli.measures import MEASURES as MEASURES
    from aftcli.metrics import Average as Average
    from aftcli.tft import TftResult as TftResult
    from aftcli.tft import fine_tune_threshold as fine_tune_threshold

__version__ = "0.1.0"

_HOMES = {
    "AftError": "aftcli.errors",
    "AftSettings": "aftcli.aft",
    "Average": "aftcli.metrics",
    "Classes": "aftcli.core.classifier",
    "Classifier": "aftcli.core.classifier",
    "Explanation": "aftcli.explanation",
    "MEASURES": "aftcli.measures",
    "METHODS": "aftcli.core.registry",
    "MaskStore": "aftcli.masks",
    "Preprocessing": "aftcli.core.classifier",
    "Study": "aftcli.evaluate_jobs",
    "TftResult": "aftcli.tft",
    "TftSettings": "aftcli.explanation",
    "Training": "aftcli.aft_training",
    "accelerated": "aftcli.engine",
    "attribution_map": "aftcli.core.cam",
    "control_job": "aftcli.finetune_jobs",
    "cut_classifier": "aftcli.core.classifier",
    "evaluate_study": "aftcli.evaluate_run",
    "explain": "aftcli.explanation",
    "find_studies": "aftcli.evaluate_jobs",
    "fine_tune": "aftcli.finetune",
    "fine_tune_threshold": "aftcli.tft",
    "generate_masks": "aftcli.generate",
    "load_classifier": "aftcli.core.models",
    "mask_job": "aftcli.finetune_jobs",
    "read_image": "aftcli.data",
    "to_input": "aftcli.data",
}
__all__ = list(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'aftcli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
