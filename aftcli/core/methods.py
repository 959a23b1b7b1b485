"""The attribution methods by their command-line names: CAMs (§2.4), and families beyond them.

One literal dict feeds the CLI's choices, its help and the parametrised tests. It names each
function instead of importing it, so that `aft --help` does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from aftcli.errors import AftError, nearest, squeezed

if TYPE_CHECKING:
    from torch import Tensor

    from aftcli.core.classifier import Classifier


class Method(Protocol):
    """Contract of attribution methods: f stays as it is, and each image's map is its own.

    A method of signed attributions of the input, which its `Entry` reduces to I_pre, takes f,
    class_index and x, and returns shape (N, 3, H, W) or (N, H, W): positive speaks for c.
    """

    def __call__(self, f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
        """Return I_pre, before scaling, shape (N, h, w) as A or (N, H, W) as x.

        Args:
            f: the classifier, in eval mode.
            activation: A = f.activation(x), shape (N, K, h, w).
            class_index: c, shape (N,).
            x: inputs, shape (N, 3, H, W), normalised.

        Raises:
            AftError: the method does not fit the network, or what it computes is not finite.
        """


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
        reduction: of signed attributions to I_pre, "positive" or "magnitude"; "" for a function
            that returns I_pre itself (see `Method`).
        given: what a function of signed attributions takes after f, class_index and x.
        signed: module and name of the function of a CAM's map before its ReLU, where that map
            moves with a term that all logits share (docs/method/zero-level.md); "" where none does.
    """

    title: str
    source: str
    function: str
    muted: float | None = None
    trainable: bool = True
    family: str = "cam"
    needs: tuple[str, ...] = ()
    passes: int | None = 0
    reduction: str = ""
    given: tuple[str, ...] = ()
    signed: str = ""

    @property
    def of_pixels(self) -> bool:
        """Return whether its map scores pixels one by one: a threshold leaves single pixels."""
        return self.family in ("gradient", "decomposition")

    @property
    def of_signed(self) -> bool:
        """Return whether it attributes with signs: I_pre is the positive part of what it gives."""
        return self.reduction == "positive"

    def load(self) -> Method:
        """Import the method's function."""
        self.check_installed()
        function = _imported(self.function)
        if not self.reduction:
            return function  # type: ignore[no-any-return]
        reduce = _imported(f"aftcli.attributions.gradient:{self.reduction}")

        def reduced(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
            return reduce(function(f, class_index, x, *self.given))  # type: ignore[no-any-return]

        return reduced

    def load_signed(self) -> Method:
        """Import the function of the map before its ReLU; only where `signed` names one."""
        return _imported(self.signed)  # type: ignore[no-any-return]

    def load_before_relu(self) -> Method | None:
        """Import the function whose ReLU is I_pre, shape (N, h, w); None where signs are lost."""
        if self.signed:
            return self.load_signed()
        if not self.of_signed:
            return None
        self.check_installed()
        function = _imported(self.function)

        def summed(f: Classifier, activation: Tensor, class_index: Tensor, x: Tensor) -> Tensor:
            signed = function(f, class_index, x, *self.given)
            return signed.sum(1) if signed.dim() == 4 else signed  # type: ignore[no-any-return]

        return summed

    def check_installed(self) -> None:
        """Check that what the method needs is installed, without importing it."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            raise AftError(
                f"{self.title} needs {' and '.join(missing)}, which this installation lacks; "
                f"install the extra of attribution methods: {INSTALL}"
            )


def _imported(function: str) -> Any:  # noqa: ANN401 - a function of any kind
    module, name = function.split(":")
    return getattr(import_module(module), name)


def _beyond(
    family: str,
    title: str,
    source: str,
    function: str,
    *needs: str,
    reduction: str = "positive",
    passes: int = 0,
    given: tuple[str, ...] = (),
) -> Entry:
    where = f"aftcli.attributions.{family}:{function}"
    return Entry(title, source, where, None, False, family, needs, passes, reduction, given)


_activation = partial(_beyond, "activation", reduction="")
_gradient = partial(_beyond, "gradient")
_decomposition = partial(_beyond, "decomposition")
_perturbation = partial(_beyond, "perturbation")

INSTALL = "pip install 'aftcli[attributions]'"

# The families by their command-line names, and what each goes by.
FAMILIES = {
    "cam": "weighted sums of one layer's activations",
    "activation": "activations beyond one layer's weighted sum",
    "gradient": "gradients of the score in the input",
    "decomposition": "relevance handed back layer by layer",
    "perturbation": "scores of changed images",
}

METHODS: dict[str, Entry] = {
    "cam": Entry(
        "CAM", "Zhou et al., CVPR 2016", "aftcli.core.cam:cam", signed="aftcli.core.cam:_signed_cam"
    ),
    "gradcam": Entry(
        "Grad-CAM",
        "Selvaraju et al., ICCV 2017",
        "aftcli.core.cam:grad_cam",
        0.85,
        signed="aftcli.core.cam:_signed_grad_cam",
    ),
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
        "Ablation-CAM",
        "Desai and Ramaswamy, WACV 2020",
        "aftcli.core.cam:ablation_cam",
        0.8,
        signed="aftcli.core.cam:_signed_ablation",
    ),
    "layercam": Entry("Layer-CAM", "Jiang et al., TIP 2021", "aftcli.core.cam:layer_cam", 0.85),
    "xgradcam": Entry(
        "XGrad-CAM",
        "Fu et al., BMVC 2020",
        "aftcli.core.cam:x_grad_cam",
        signed="aftcli.core.cam:_signed_x_grad_cam",
    ),
    "hirescam": Entry(
        "HiResCAM",
        "Draelos and Carin, 2020",
        "aftcli.core.cam:hires_cam",
        signed="aftcli.core.cam:_signed_hires_cam",
    ),
    "eigencam": Entry(
        "Eigen-CAM",
        "Muhammad and Yeasin, IJCNN 2020",
        "aftcli.core.cam:eigen_cam",
        trainable=False,
    ),
    "finercam": Entry(
        "Finer-CAM", "Zhang et al., CVPR 2025", "aftcli.attributions.activation:finer_cam"
    ),
    "relevancecam": _activation(
        "Relevance-CAM", "Lee et al., CVPR 2021", "relevance_cam", "zennit"
    ),
    "omcam": _activation("OM-CAM (SIGCAM)", "Zhang, Rao and Yang, AAAI 2021", "om_cam", passes=223),
    "layercam-fusion": _activation(
        "Layer-CAM, fused", "Jiang et al., TIP 2021", "layer_cam_fusion"
    ),
    "guidedbackprop": _gradient(
        "Guided Backpropagation",
        "Springenberg et al., ICLRW 2015",
        "signed_guided_backpropagation",
        "zennit",
    ),
    "integratedgradients": _gradient(
        "Integrated Gradients",
        "Sundararajan et al., ICML 2017",
        "signed_integrated_gradients",
        "captum",
    ),
    "deeplift": _gradient("DeepLIFT", "Shrikumar et al., ICML 2017", "signed_deep_lift", "captum"),
    "smoothgrad": _gradient(
        "SmoothGrad", "Smilkov et al., 2017", "signed_smooth_grad", "captum", reduction="magnitude"
    ),
    "gradientshap": _gradient(
        "GradientSHAP", "Lundberg and Lee, 2017", "signed_gradient_shap", "captum"
    ),
    "lrp": _decomposition("LRP", "Bach et al., 2015", "signed_lrp", "zennit"),
    "lrp-epsilon": _decomposition(
        "LRP, epsilon", "Bach et al., 2015", "signed_lrp", "zennit", given=("epsilon",)
    ),
    "lrp-gamma": _decomposition(
        "LRP, gamma", "Montavon et al., 2019", "signed_lrp", "zennit", given=("gamma",)
    ),
    "lrp-alphabeta": _decomposition(
        "LRP, alpha-beta", "Bach et al., 2015", "signed_lrp", "zennit", given=("alpha-beta",)
    ),
    "clrp": _decomposition("CLRP", "Gu et al., ACCV 2018", "signed_clrp", "zennit"),
    "rap": _decomposition("RAP", "Nam et al., AAAI 2020", "signed_rap", "zennit"),
    "occlusion": _perturbation(
        "Occlusion", "Zeiler and Fergus, ECCV 2014", "signed_occlusion", "captum", passes=626
    ),
    "rise": _perturbation("RISE", "Petsiuk et al., BMVC 2018", "rise", reduction="", passes=2000),
    "lime": _perturbation(
        "LIME", "Ribeiro et al., KDD 2016", "signed_lime", "skimage", "sklearn", passes=1000
    ),
    "kernelshap": _perturbation(
        "KernelSHAP", "Lundberg and Lee, 2017", "signed_kernel_shap", "shap", "skimage", passes=2002
    ),
    "xrai": _perturbation(
        "XRAI", "Kapishnikov et al., ICCV 2019", "signed_xrai", "saliency", "skimage"
    ),
}

CAMS: dict[str, Entry] = {name: e for name, e in METHODS.items() if e.family == "cam"}

DEVICES = ("cpu", "cuda", "mps")


def check_device(name: str) -> None:
    """Check the name of a device; `find_device` looks if there is one here."""
    if name != "auto" and name.split(":")[0] not in DEVICES:
        raise AftError(f"unknown device {name!r}; there are auto, cpu, cuda, cuda:N and mps")


def spelled(words: Iterable[str]) -> list[str]:
    """Return words as METHODS and FAMILIES spell them, or `all`.

    A word may list several, joined by commas. Names are taken as people write them.

    Raises:
        AftError: there is no such method; the message names the nearest.

    >>> spelled(["Grad-CAM++,layer_cam", "All"])
    ['gradcam++', 'layercam', 'all']
    """
    known = {_squeezed(name): name for name in ("all", *FAMILIES, *METHODS)}
    found = []
    for part in (part.strip() for word in words for part in word.split(",")):
        if _squeezed(part) not in known:
            families = [family for family in FAMILIES if family not in METHODS]
            raise AftError(
                f"unknown method {part!r}; nearest: {nearest(part, [*METHODS, *families])}; all: "
                f"{', '.join(METHODS)}; `all` for every CAM, or a family: {', '.join(families)}"
            )
        found.append(known[_squeezed(part)])
    return found


def named(words: Iterable[str]) -> list[str]:
    """Return the methods that words stand for: names, `all` for every CAM, or a family's."""
    found: list[str] = []
    for word in spelled(words):
        if word == "all":
            found += CAMS
        elif word in METHODS:
            found.append(word)
        else:
            found += (name for name, entry in METHODS.items() if entry.family == word)
    for name in found:
        METHODS[name].check_installed()
    return list(dict.fromkeys(found))


def _squeezed(name: str) -> str:
    """Strip a method's name to what all its spellings share."""
    return re.sub("(plusplus|pp)$", "++", squeezed(name))


def method(name: str) -> Entry:
    """Find a method by its command-line name; the error names the nearest ones."""
    try:
        return METHODS[name]
    except KeyError:
        raise AftError(
            f"unknown method {name!r}; nearest: {nearest(name, METHODS)}; all: {', '.join(METHODS)}"
        ) from None
