"""The numbers that the paper publishes (Tables 3, 4 and 5), to stand beside ours."""

from __future__ import annotations

MODELS = ("ResNet-50", "VGG-16")
VARIANTS = ("original", "tft", "aft")

# Of each model: Original, TFT, AFT.
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

# Of each model: the original's accuracy, and that of the one tuned for the method.
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


def published(kind: str) -> str:
    """The paper's data set that is like one of a kind, "voc" or "folders"."""
    return "VOC" if kind == "voc" else "ImageNet"
