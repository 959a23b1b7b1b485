"""The numbers that the paper printed (Tables 3 to 5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MODELS = ("ResNet-50", "VGG-16")

PAPER_VARIANTS = ("original", "tft", "aft")

# By data set, method and measure: Original, TFT, AFT of each model.
TABLE3: dict[tuple[str, str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("ImageNet", "gradcam", "average_increase"): ((0.334, 0.439, 0.449), (0.294, 0.385, 0.561)),
    ("ImageNet", "gradcam", "average_drop"): ((0.130, 0.117, 0.116), (0.159, 0.144, 0.124)),
    ("ImageNet", "gradcam++", "average_increase"): ((0.342, 0.454, 0.507), (0.228, 0.322, 0.505)),
    ("ImageNet", "gradcam++", "average_drop"): ((0.136, 0.123, 0.105), (0.188, 0.174, 0.153)),
    ("ImageNet", "ablationcam", "average_increase"): ((0.342, 0.456, 0.514), (0.261, 0.352, 0.496)),
    ("ImageNet", "ablationcam", "average_drop"): ((0.137, 0.123, 0.109), (0.173, 0.159, 0.136)),
    ("ImageNet", "layercam", "average_increase"): ((0.340, 0.452, 0.512), (0.230, 0.325, 0.492)),
    ("ImageNet", "layercam", "average_drop"): ((0.128, 0.124, 0.104), (0.187, 0.172, 0.150)),
    ("VOC", "gradcam", "average_increase"): ((0.546, 0.679, 0.659), (0.569, 0.670, 0.698)),
    ("VOC", "gradcam", "average_drop"): ((0.055, 0.045, 0.037), (0.054, 0.045, 0.053)),
    ("VOC", "gradcam++", "average_increase"): ((0.522, 0.674, 0.618), (0.445, 0.583, 0.618)),
    ("VOC", "gradcam++", "average_drop"): ((0.059, 0.046, 0.041), (0.067, 0.056, 0.062)),
    ("VOC", "ablationcam", "average_increase"): ((0.523, 0.682, 0.666), (0.519, 0.638, 0.674)),
    ("VOC", "ablationcam", "average_drop"): ((0.049, 0.036, 0.033), (0.052, 0.044, 0.050)),
    ("VOC", "layercam", "average_increase"): ((0.486, 0.645, 0.620), (0.420, 0.538, 0.562)),
    ("VOC", "layercam", "average_drop"): ((0.063, 0.051, 0.042), (0.069, 0.058, 0.059)),
}


# By data set and method: accuracy before and after AFT of each model.
TABLE4: dict[tuple[str, str], tuple[tuple[float, float], tuple[float, float]]] = {
    ("ImageNet", "gradcam"): ((0.737, 0.736), (0.720, 0.720)),
    ("ImageNet", "gradcam++"): ((0.737, 0.737), (0.720, 0.718)),
    ("ImageNet", "ablationcam"): ((0.737, 0.737), (0.720, 0.720)),
    ("ImageNet", "layercam"): ((0.737, 0.736), (0.720, 0.719)),
    ("VOC", "gradcam"): ((0.922, 0.922), (0.905, 0.904)),
    ("VOC", "gradcam++"): ((0.922, 0.923), (0.905, 0.903)),
    ("VOC", "ablationcam"): ((0.922, 0.922), (0.905, 0.903)),
    ("VOC", "layercam"): ((0.922, 0.922), (0.905, 0.904)),
}


# Seconds a map without and with TFT, VGG-16 on an RTX 2080 Ti.
TABLE5: dict[str, tuple[float, float]] = {
    "gradcam": (0.017, 0.045),
    "gradcam++": (0.017, 0.046),
    "ablationcam": (1.691, 1.719),
    "layercam": (0.018, 0.047),
}


def published_records() -> dict[str, list[dict[str, Any]]]:
    """Return the paper's numbers as records of our tables, by table."""
    return {"table3": list(_records3()), "table4": list(_records4()), "table5": list(_records5())}


def _records3() -> Iterator[dict[str, Any]]:
    for (data, cam, measure), models in TABLE3.items():
        for model, own in zip(MODELS, models, strict=True):
            for variant, value in zip(PAPER_VARIANTS, own, strict=True):
                where = {"dataset": data, "model": model, "cam": cam, "variant": variant}
                yield {**where, "measure": measure, "value": value}


def _records4() -> Iterator[dict[str, Any]]:
    for (data, cam), models in TABLE4.items():
        for model, own in zip(MODELS, models, strict=True):
            for tuned, variant, value in zip((None, cam), ("original", "aft"), own, strict=True):
                where = {"dataset": data, "model": model, "cam": tuned, "variant": variant}
                yield {**where, "accuracy": value}


def _records5() -> Iterator[dict[str, Any]]:
    for cam, (without, with_tft) in TABLE5.items():
        seconds = {"without": without, "with": with_tft, "delta": round(with_tft - without, 3)}
        yield {"model": "VGG-16", "cam": cam, **seconds, "device": "RTX 2080 Ti"}
