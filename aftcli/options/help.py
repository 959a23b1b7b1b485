"""What stands below the options in the help of each command."""

from __future__ import annotations

from aftcli.core.methods import FAMILIES, METHODS
from aftcli.evaluation.measures import by_group

METHODS_HELP = (
    "--cam takes "
    + "; ".join(
        f"{family}: {', '.join(n for n, e in METHODS.items() if e.family == family)}"
        for family in FAMILIES
    )
    + "; all for every CAM, or a family."
)

METRICS_HELP = (
    "--metrics takes "
    + "; ".join(f"{group}: {', '.join(names)}" for group, names in by_group())
    + "; or all. quantus:NAME takes a metric of Quantus, such as quantus:Sparseness."
)

DEFAULT = f"{METHODS_HELP} Default: a checkpoint's, or"

EPILOGS = {
    "explain": f"{DEFAULT} layercam.",
    "tft": f"{DEFAULT} gradcam.",
    "gen_masks": f"{DEFAULT} gradcam.",
    "finetune": "--cam takes the methods of aft gen-masks. Default: those of all masks.",
    "evaluate": f"{METHODS_HELP} Default: those of all masks.\n\n{METRICS_HELP}",
}
