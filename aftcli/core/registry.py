"""The CAM methods by their command-line names (§2.4).

One literal dict feeds the CLI's choices, its help and the parametrised tests. It names each
function instead of importing it, so that `aft --help` does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from aftcli.errors import AftError, nearest

if TYPE_CHECKING:
    from aftcli.core.cam import Method


@dataclass(frozen=True)
class Entry:
    """A method's title and source, and where its function is.

    Attributes:
        title: its name in tables.
        source: its paper.
        function: module and name.
        muted: the share of the map, in [0, 1], that its published default mutes (the paper's
            Table 1); None where there is none.
        trainable: its map is a smooth function of the weights, cheap enough to be trained
            (`--objective cam`).
    """

    title: str
    source: str
    function: str
    muted: float | None = None
    trainable: bool = True

    def load(self) -> Method:
        """Import the method's function."""
        module, name = self.function.split(":")
        return cast("Method", getattr(import_module(module), name))


METHODS: dict[str, Entry] = {
    "cam": Entry("CAM", "Zhou et al., CVPR 2016", "aftcli.core.cam:cam"),
    "gradcam": Entry("Grad-CAM", "Selvaraju et al., ICCV 2017", "aftcli.core.cam:grad_cam", 0.85),
    "gradcam++": Entry(
        "Grad-CAM++", "Chattopadhay et al., WACV 2018", "aftcli.core.cam:grad_cam_plus_plus", 0.5
    ),
    "scorecam": Entry(
        "Score-CAM", "Wang et al., CVPRW 2020", "aftcli.core.cam:score_cam", 0.5, trainable=False
    ),
    "ablationcam": Entry(
        "Ablation-CAM", "Desai and Ramaswamy, WACV 2020", "aftcli.core.cam:ablation_cam", 0.8
    ),
    "layercam": Entry("Layer-CAM", "Jiang et al., TIP 2021", "aftcli.core.cam:layer_cam", 0.85),
    "xgradcam": Entry("XGrad-CAM", "Fu et al., BMVC 2020", "aftcli.core.cam:x_grad_cam"),
    "hirescam": Entry("HiResCAM", "Draelos and Carin, 2020", "aftcli.core.cam:hires_cam"),
    "eigencam": Entry(
        "Eigen-CAM",
        "Muhammad and Yeasin, IJCNN 2020",
        "aftcli.core.cam:eigen_cam",
        trainable=False,
    ),
}

DEVICES = ("cpu", "cuda", "mps")


def check_device(name: str) -> None:
    """Check the name of a device; whether there is one here `find_device` knows.

    Raises:
        AftError: there is no device of that name anywhere.
    """
    if name != "auto" and name.split(":")[0] not in DEVICES:
        raise AftError(f"unknown device {name!r}; there are auto, cpu, cuda, cuda:N and mps")


def method(name: str) -> Entry:
    """Find a method by its command-line name.

    Args:
        name: a key of METHODS.

    Raises:
        AftError: there is no such method; the nearest names are in the message.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise AftError(
            f"unknown CAM method {name!r}; nearest: {nearest(name, METHODS)}; "
            f"all: {', '.join(METHODS)}"
        ) from None
