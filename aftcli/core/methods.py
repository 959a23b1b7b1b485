"""The attribution methods by their command-line names: CAMs (§2.4), and families beyond them.

One literal dict feeds the CLI's choices, its help and the parametrised tests. It names each
function instead of importing it, so that `aft --help` does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from aftcli.errors import AftError, nearest

if TYPE_CHECKING:
    from aftcli.core.classifier import Method


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
        family: a key of FAMILIES.
        needs: the modules, of the extra `attributions`, that it runs on.
        passes: how many images pass the network without gradients for one map, at the most;
            None: one a channel of A. The pass that gives A is not counted.
    """

    title: str
    source: str
    function: str
    muted: float | None = None
    trainable: bool = True
    family: str = "cam"
    needs: tuple[str, ...] = ()
    passes: int | None = 0

    @property
    def of_pixels(self) -> bool:
        """The map scores pixels one by one, so that a threshold leaves single pixels."""
        return self.family in ("gradient", "decomposition")

    def load(self) -> Method:
        """Import the method's function."""
        self.check_installed()
        module, name = self.function.split(":")
        return cast("Method", getattr(import_module(module), name))

    def check_installed(self) -> None:
        """Check that what the method needs is there, without importing it."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            raise AftError(
                f"{self.title} needs {' and '.join(missing)}, which this installation lacks; "
                f"install the extra of attribution methods: {INSTALL}"
            )


def _beyond(
    family: str,
    title: str,
    source: str,
    function: str,
    needs: tuple[str, ...] = (),
    passes: int = 0,
) -> Entry:
    where = f"aftcli.attributions.{function}"
    return Entry(title, source, where, trainable=False, family=family, needs=needs, passes=passes)


INSTALL = "pip install 'aftcli[attributions]'"

# What a family is called on the command line and what it goes by.
FAMILIES = {
    "cam": "weighted sums of one layer's activations",
    "activation": "activations beyond one layer's weighted sum",
    "gradient": "gradients of the score in the input",
    "decomposition": "relevance handed back layer by layer",
    "perturbation": "scores of changed images",
}

METHODS: dict[str, Entry] = {
    "cam": Entry("CAM", "Zhou et al., CVPR 2016", "aftcli.core.cam:cam"),
    "gradcam": Entry("Grad-CAM", "Selvaraju et al., ICCV 2017", "aftcli.core.cam:grad_cam", 0.85),
    "gradcam++": Entry(
        "Grad-CAM++", "Chattopadhay et al., WACV 2018", "aftcli.core.cam:grad_cam_plus_plus", 0.5
    ),
    "scorecam": Entry(
        "Score-CAM",
        "Wang et al., CVPRW 2020",
        "aftcli.core.cam:score_cam",
        0.5,
        trainable=False,
        passes=None,
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
    "relevancecam": _beyond(
        "activation",
        "Relevance-CAM",
        "Lee et al., CVPR 2021",
        "activation:relevance_cam",
        ("zennit",),
    ),
    "omcam": _beyond(
        "activation",
        "OM-CAM (SIGCAM)",
        "Zhang, Rao and Yang, AAAI 2021",
        "activation:om_cam",
        passes=223,
    ),
    "layercam-fusion": _beyond(
        "activation", "Layer-CAM, fused", "Jiang et al., TIP 2021", "activation:layer_cam_fusion"
    ),
    "guidedbackprop": _beyond(
        "gradient",
        "Guided Backpropagation",
        "Springenberg et al., ICLRW 2015",
        "gradient:guided_backpropagation",
        ("zennit",),
    ),
    "integratedgradients": _beyond(
        "gradient",
        "Integrated Gradients",
        "Sundararajan et al., ICML 2017",
        "gradient:integrated_gradients",
        ("captum",),
    ),
    "deeplift": _beyond(
        "gradient", "DeepLIFT", "Shrikumar et al., ICML 2017", "gradient:deep_lift", ("captum",)
    ),
    "smoothgrad": _beyond(
        "gradient", "SmoothGrad", "Smilkov et al., 2017", "gradient:smooth_grad", ("captum",)
    ),
    "gradientshap": _beyond(
        "gradient", "GradientSHAP", "Lundberg and Lee, 2017", "gradient:gradient_shap", ("captum",)
    ),
    "lrp": _beyond("decomposition", "LRP", "Bach et al., 2015", "decomposition:lrp", ("zennit",)),
    "lrp-epsilon": _beyond(
        "decomposition",
        "LRP, epsilon",
        "Bach et al., 2015",
        "decomposition:lrp_epsilon",
        ("zennit",),
    ),
    "lrp-gamma": _beyond(
        "decomposition",
        "LRP, gamma",
        "Montavon et al., 2019",
        "decomposition:lrp_gamma",
        ("zennit",),
    ),
    "lrp-alphabeta": _beyond(
        "decomposition",
        "LRP, alpha-beta",
        "Bach et al., 2015",
        "decomposition:lrp_alpha_beta",
        ("zennit",),
    ),
    "clrp": _beyond(
        "decomposition", "CLRP", "Gu et al., ACCV 2018", "decomposition:clrp", ("zennit",)
    ),
    "rap": _beyond(
        "decomposition", "RAP", "Nam et al., AAAI 2020", "decomposition:rap", ("zennit",)
    ),
    "occlusion": _beyond(
        "perturbation",
        "Occlusion",
        "Zeiler and Fergus, ECCV 2014",
        "perturbation:occlusion",
        ("captum",),
        passes=626,
    ),
    "rise": _beyond(
        "perturbation", "RISE", "Petsiuk et al., BMVC 2018", "perturbation:rise", passes=2000
    ),
    "lime": _beyond(
        "perturbation",
        "LIME",
        "Ribeiro et al., KDD 2016",
        "perturbation:lime",
        ("skimage", "sklearn"),
        passes=1000,
    ),
    "kernelshap": _beyond(
        "perturbation",
        "KernelSHAP",
        "Lundberg and Lee, 2017",
        "perturbation:kernel_shap",
        ("shap", "skimage"),
        passes=2002,
    ),
    "xrai": _beyond(
        "perturbation",
        "XRAI",
        "Kapishnikov et al., ICCV 2019",
        "perturbation:xrai",
        ("saliency", "skimage"),
    ),
}

CAMS: dict[str, Entry] = {name: e for name, e in METHODS.items() if e.family == "cam"}

DEVICES = ("cpu", "cuda", "mps")


def check_device(name: str) -> None:
    """Check the name of a device; `find_device` checks that it is here."""
    if name != "auto" and name.split(":")[0] not in DEVICES:
        raise AftError(f"unknown device {name!r}; there are auto, cpu, cuda, cuda:N and mps")


def named(words: Iterable[str]) -> list[str]:
    """Find the methods that words stand for: names, `all` for every CAM, or a family's."""
    found: list[str] = []
    families = [family for family in FAMILIES if family not in METHODS]
    for word in words:
        if word == "all":
            found += CAMS
        elif word in families:
            found += (name for name, entry in METHODS.items() if entry.family == word)
        elif word in METHODS:
            found.append(word)
        else:
            raise AftError(
                f"unknown method {word!r}; nearest: {nearest(word, [*METHODS, *families])}; all: "
                f"{', '.join(METHODS)}; `all` for every CAM, or a family: {', '.join(families)}"
            )
    for name in found:
        METHODS[name].check_installed()
    return list(dict.fromkeys(found))


def method(name: str) -> Entry:
    """Find a method by its command-line name."""
    try:
        return METHODS[name]
    except KeyError:
        raise AftError(
            f"unknown method {name!r}; nearest: {nearest(name, METHODS)}; all: {', '.join(METHODS)}"
        ) from None
