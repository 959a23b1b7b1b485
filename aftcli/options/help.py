"""Text below the options in the help of each command: words of options, examples."""

from __future__ import annotations

from aftcli.core.methods import FAMILIES, METHODS
from aftcli.measures.registry import by_group

# A family that is called as one of its methods has another word: --cam cam is CAM alone.
METHODS_HELP = (
    "--cam takes a method, or several by a word: "
    + ", ".join(
        f"{'all' if family in METHODS else family} "
        f"({', '.join(n for n, e in METHODS.items() if e.family == family)})"
        for family in FAMILIES
    )
    + "."
)

METRICS_HELP = (
    "--metrics takes "
    + "; ".join(f"{group}: {', '.join(names)}" for group, names in by_group())
    + "; all; quantus:NAME."
)

DEFAULT = f"{METHODS_HELP} Default: a checkpoint's, or"

# By command: words of options, then command lines that a user may start from.
BELOW: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "explain": (
        (f"{DEFAULT} layercam.",),
        ("aft explain photos/ --model net.py:build --checkpoint net.pth --tft",),
    ),
    "tft": (
        (f"{DEFAULT} gradcam.",),
        ("aft tft cat.jpg --map saliency.npy", "aft tft cat.jpg --threshold-mode percentile"),
    ),
    "gen_masks": (
        (f"{DEFAULT} gradcam.",),
        ("aft gen-masks imagenet/ --cam all", "aft gen-masks --show aft-run/masks/*.h5"),
    ),
    "finetune": (
        (),
        ("aft finetune photos/ --no-masks --epochs 20",),
    ),
    "evaluate": (
        (f"{METHODS_HELP} Default: those of all masks.", METRICS_HELP),
        ("aft evaluate --table --metrics all --figures",),
    ),
}


def epilog(command: str) -> str:
    """Return what stands below the options of a command's help; examples come last."""
    words, examples = BELOW[command]
    return "\n\n".join([*words, "\n".join(f"$ {line}" for line in examples)])
