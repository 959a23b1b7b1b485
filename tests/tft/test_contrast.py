"""Contrasts of two classes, and maps before their ReLU."""

import pytest
import torch
from torch import nn

from aftcli.attributions.maps import attribution_map, takes_target
from aftcli.core.cam import normalise, upsample
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.errors import AftError
from aftcli.models.targets import output_target
from aftcli.settings import Search, Shaping
from aftcli.tft.explain import explain
from tests.helpers.compare import assert_near
from tests.helpers.small import SIZE, small
from tests.tft.test_explain import assert_same_explanation

A, B = 3, 1
PIXELS = ("integratedgradients", "lrp", "occlusion")


def stretched(cells, size):
    """Literal bilinear stretch between the centres of cells, shape (h, w) to (H, W)."""
    (h, w), (high, wide) = cells.shape, size
    found = torch.zeros(size, dtype=torch.float64)
    for i in range(high):
        for j in range(wide):
            y = min(max((i + 0.5) * h / high - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / wide - 0.5, 0), w - 1)
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            v, u = y - top, x - left
            for di, dj, share in (
                *((0, 0, (1 - v) * (1 - u)), (0, 1, (1 - v) * u)),
                *((1, 0, v * (1 - u)), (1, 1, v * u)),
            ):
                found[i, j] += share * cells[top + di, left + dj]
    return found


def grad_cam_of_difference(f, x, a, b):
    """sum_k A_k mean_ij d(y^a - y^b)/dA_ij^k, cell by cell."""
    activation = f.activation(x).detach().requires_grad_()
    y = f.head(activation)[0]
    (g,) = torch.autograd.grad(y[a] - y[b], activation)
    _, channels, h, w = activation.shape
    cells = torch.zeros(h, w, dtype=torch.float64)
    for k in range(channels):
        alpha = sum(g[0, k, i, j] for i in range(h) for j in range(w)) / (h * w)
        for i in range(h):
            for j in range(w):
                cells[i, j] += alpha * activation[0, k, i, j].detach()
    return cells


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_grad_cam_of_a_contrast_is_that_of_the_difference(kind):
    s = small(kind, 2)
    x = s.x[:1]
    [e] = explain(s.f, x, ["gradcam"], A, contrast=B)
    cells = grad_cam_of_difference(s.f, x, A, B)
    assert_near(e.signed, stretched(cells / cells.abs().max(), SIZE))
    positive = cells.clamp(min=0)
    span = positive.max() - positive.min()
    assert_near(e.attribution, stretched((positive - positive.min()) / span, SIZE))
    y = s.f(x).softmax(1)[0]
    assert (e.class_index, e.contrast) == (A, B)
    assert (e.probability, e.contrast_probability) == pytest.approx((y[A].item(), y[B].item()))
    # The sign turns with the classes; a map of one class is another one.
    [turned] = explain(s.f, x, ["gradcam"], B, contrast=A)
    assert_near(turned.signed, -e.signed)
    [plain] = explain(s.f, x, ["gradcam"], A)
    assert plain.contrast is None and (plain.signed - e.signed).abs().max() > 1e-3


@pytest.mark.parametrize("method", [m for m in METHODS if takes_target(m) and m != "omcam"])
def test_a_contrast_is_the_map_of_a_network_that_returns_the_difference(method):
    """An independent way there: a linear layer after the logits, and its class 0."""
    if METHODS[method].passes not in (0, None):
        pytest.skip("draws by the number of outputs, or is slow")
    s = small("mlp", 4)
    x = s.x[:1]
    difference = nn.Linear(5, 2, bias=False).double()
    with torch.no_grad():
        difference.weight[:] = 0
        difference.weight[0, A], difference.weight[0, B] = 1, -1
    model = nn.Sequential(s.model, difference)
    g = cut_classifier(model, f"0.{s.layer}", preprocessing=s.f.preprocessing)
    [e] = explain(s.f, x, [method], A, contrast=B)
    [expected] = explain(g, x, [method], 0)
    assert_near(e.attribution, expected.attribution, 1e-9)
    assert (e.signed is None) == (expected.signed is None)
    if e.signed is not None:
        assert_near(e.signed, expected.signed, 1e-9)


def test_thresholds_are_searched_by_the_probability_of_the_class_explained():
    s = small("linear", 1)
    x, settings = s.x[:1], Search((0.0, 0.3, 0.6))
    found = explain(s.f, x, ["gradcam", "layercam"], [A, 0], settings=settings, contrast=B)
    assert [(e.cam, e.class_index) for e in found] == [
        *(("gradcam", A), ("gradcam", 0), ("layercam", A), ("layercam", 0)),
    ]
    for e in found:
        assert_same_explanation(e, s.f, x, e.class_index, e.attribution[None], settings)


class Skipping(nn.Module):
    """A network of one output, where something bypasses the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        z = self.conv1(x).relu()
        return self.last((z + self.conv2(z)).relu().mean((2, 3)))


def test_both_classes_of_one_output_are_contrasted_where_something_bypasses_the_layer():
    model = Skipping().double()
    f = cut_classifier(model, "conv2", note=lambda _: None)
    assert f.bypassed and f.single
    x = torch.randn(1, 3, *f.preprocessing.size, dtype=torch.float64)
    [e] = explain(f, x, ["hirescam"], 1, contrast=0)
    z = model.conv1(x).relu()
    a = model.conv2(z).detach().requires_grad_()
    (g,) = torch.autograd.grad(model.last((z + a).relu().mean((2, 3))).sum(), a)
    cells = (g * a).detach().sum(1)
    assert_near(e.signed, upsample(cells / cells.abs().max(), x)[0])


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].signed or m in PIXELS])
def test_the_positive_part_of_a_signed_map_is_the_map(method):
    s = small("linear", 3)
    x = s.x[:1]
    [e] = explain(s.f, x, [method], A)
    assert torch.equal(e.attribution, attribution_map(s.f, x, A, method)[0])
    assert e.signed.abs().max() <= 1
    if method in PIXELS:
        assert e.signed.abs().max() == 1 and e.signed.min() < 0
        assert_near(e.attribution, normalise(e.signed[None].relu())[0])


@pytest.mark.parametrize(
    "shaping",
    [Shaping(smooth="aug"), Shaping(cells=True), Shaping(zero_level=0.2)],
    ids=["smooth", "cells", "zero level"],
)
def test_a_map_that_was_changed_has_no_sign(shaping):
    s = small("linear", 3)
    [e] = explain(s.f, s.x[:1], ["gradcam"], A, shaping=shaping)
    assert e.signed is None
    for method in ("layercam", "eigencam", "smoothgrad", "rise"):
        assert METHODS[method].load_before_relu() is None


def test_completeness_holds_of_what_is_shown():
    """Integrated Gradients of a contrast sum to its rise, up to the scale of the picture."""
    s = small("mlp", 6)
    x = s.x[:1]
    pairs = [(A, B), (A, 0), (2, B)]
    rises, sums = [], []
    for a, b in pairs:
        [e] = explain(s.f, x, ["integratedgradients"], a, contrast=b)
        y = s.f(x)[0] - s.f(torch.zeros_like(x))[0]
        rises.append((y[a] - y[b]).item())
        sums.append(e.signed.sum().item())
    assert [rise > 0 for rise in rises] == [total > 0 for total in sums]


def test_what_cannot_be_contrasted_is_refused():
    s = small("linear", 0)
    x = s.x[:1]
    with pytest.raises(AftError, match="is the class explained; contrast it with another"):
        explain(s.f, x, ["gradcam"], [0, B], contrast=B)
    with pytest.raises(AftError, match="explains one class, not a difference of two; take one of"):
        explain(s.f, x, ["cam"], A, contrast=B)
    with pytest.raises(AftError, match="class"):
        explain(s.f, x, ["gradcam"], A, contrast=99)
    with pytest.raises(AftError, match="a target is no class"):
        explain(s.f, x, ["gradcam"], target=output_target(1), contrast=0)
