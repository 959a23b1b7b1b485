"""OM-CAM against loops, finite differences and a line search written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aftcli.attributions import activation as optimised
from aftcli.attributions.activation import Masking, blurred, om_cam, optimise, sig_cam
from aftcli.core.cam import normalise
from tests.helpers.small import SIZE, small

KINDS = ("linear", "mlp", "conv")


@pytest.fixture(params=KINDS)
def net(request):
    return small(request.param)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(optimised, "ITERATIONS", 3)
    monkeypatch.setattr(optimised, "STEPS", 3)


def probability(model, x, c):
    logits = model(x[None])[0].tolist()
    return math.exp(logits[c]) / sum(map(math.exp, logits))


def mixed(mask, one, other):
    """Pixel by pixel: the mask's share of one image, the rest of another."""
    m = F.interpolate(mask[None], one.shape[1:], mode="bilinear")[0, 0]
    out = torch.empty_like(one)
    for i in range(one.shape[1]):
        for j in range(one.shape[2]):
            out[:, i, j] = m[i, j] * one[:, i, j] + (1 - m[i, j]) * other[:, i, j]
    return out


def literal_penalty(mask):
    (m,) = mask.tolist()
    h, w = len(m), len(m[0])
    size = sum(1 - m[i][j] for i in range(h) for j in range(w)) / (h * w)
    down = [(m[i][j] - m[i + 1][j]) ** 2 for i in range(h - 1) for j in range(w)]
    right = [(m[i][j] - m[i][j + 1]) ** 2 for i in range(h) for j in range(w - 1)]
    return size + 20 * (sum(down) / len(down) + sum(right) / len(right))


def literal_objective(model, x, c, mask):
    dim = blurred(x[None])[0]
    p = probability(model, x, c)
    deleted = probability(model, mixed(mask, x, dim), c) / p
    inserted = probability(model, mixed(mask, dim, x), c) / p
    return deleted - inserted + literal_penalty(mask)


def literal_path(model, x, c, mask, noise):
    """Compute the function whose gradient the direction is."""
    dim, p, steps = blurred(x[None])[0], probability(model, x, c), len(noise)
    total = 0
    for k, n in enumerate(noise, 1):
        total += probability(model, mixed(k / steps * mask, x, dim) + n, c) / p / steps
        total -= probability(model, mixed(k / steps * mask, dim, x) + n, c) / p / steps
    return total + literal_penalty(mask)


def some_mask(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand(1, 2, 3, dtype=torch.float64, generator=generator)


@torch.no_grad()
def test_objective_is_its_equation(net):
    for n, c in enumerate(net.class_index.tolist()):
        masking = Masking(net.f, net.x[n : n + 1], net.class_index[n : n + 1])
        masks = torch.cat([some_mask(0), some_mask(1)])
        expected = [literal_objective(net.model, net.x[n], c, mask[None]) for mask in masks]
        assert_close(masking.objective(masks).tolist(), expected)


@pytest.mark.slow
@torch.no_grad()
def test_direction_is_the_integrated_gradient(net):
    x, c = net.x[:1], net.class_index[:1]
    masking, mask, tiny = Masking(net.f, x, c), some_mask(), 1e-6
    noise = torch.randn(
        3, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(optimised.SEED)
    )
    found = masking.direction(mask)
    for i in range(2):
        for j in range(3):
            change = torch.zeros_like(mask)
            change[0, i, j] = tiny
            high, low = (
                literal_path(net.model, x[0], c.item(), m, 0.05 * noise)
                for m in (mask + change, mask - change)
            )
            assert found[0, i, j].item() == pytest.approx((high - low) / (2 * tiny), rel=1e-5)


@torch.no_grad()
def test_base_map_weights_gradients_by_the_feature_map(net):
    a = net.f.activation(net.x)
    for n, c in enumerate(net.class_index.tolist()):
        with torch.enable_grad():
            leaf = a[n : n + 1].clone().requires_grad_()
            (g,) = torch.autograd.grad(net.f.head(leaf)[0, c], leaf)
        expected = torch.zeros_like(a[n, 0])
        for a_k, g_k in zip(a[n], g[0], strict=True):
            alpha = sum(x * y for x, y in zip(a_k.flatten(), g_k.flatten(), strict=True))
            expected += alpha / a_k.numel() * a_k
        assert_close(sig_cam(net.f, a, net.class_index)[n], expected.relu())


def literal_search(model, x, c, masking, mask):
    """Steps of a backtracking line search, each trial scored by the literal objective."""
    value = literal_objective(model, x, c, mask)
    for _ in range(3):
        d = masking.direction(mask)
        for power in range(11):  # 200 * 0.2^10 is the last one above 1e-5
            step = 200 * 0.2**power
            trial = torch.tensor([[min(max(v, 0), 1) for v in (mask - step * d).flatten()]])
            trial = trial.to(mask).view_as(mask)
            reached = literal_objective(model, x, c, trial)
            if reached <= value - 1e-4 * step * sum(v * v for v in d.flatten().tolist()):
                mask, value = trial, reached
                break
        else:
            return mask
    return mask


@pytest.mark.slow
@torch.no_grad()
def test_map_is_the_descent_from_the_base_map(net):
    a = net.f.activation(net.x)
    base = normalise(sig_cam(net.f, a, net.class_index))
    starts = 1 - F.interpolate(base[:, None], (2, 3), mode="bilinear")[:, 0]
    found = om_cam(net.f, a, net.class_index, net.x)
    assert found.shape == (3, *SIZE) and found.min() >= 0 and found.max() < 1 + 1e-9
    fallen = []
    for n, c in enumerate(net.class_index.tolist()):
        masking = Masking(net.f, net.x[n : n + 1], net.class_index[n : n + 1])
        mask, curve = optimise(masking, starts[n : n + 1])
        assert all(after < before for before, after in zip(curve, curve[1:], strict=False))
        assert curve[0] == pytest.approx(
            literal_objective(net.model, net.x[n], c, starts[n : n + 1])
        )
        assert curve[-1] == pytest.approx(literal_objective(net.model, net.x[n], c, mask))
        fallen.append(curve[0] - curve[-1])
        assert_close(mask, literal_search(net.model, net.x[n], c, masking, starts[n : n + 1]))
        assert_close(found[n], 1 - F.interpolate(mask[:, None], SIZE, mode="bilinear")[0, 0])
    assert max(fallen) > 0.1


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(net):
    weights = {k: v.clone() for k, v in net.f.state_dict().items()}
    before, x = torch.get_rng_state(), net.x.clone()
    together = om_cam(net.f, net.f.activation(x), net.class_index, x)
    torch.randn(5)
    for n in range(3):
        here = slice(n, n + 1)
        alone = om_cam(net.f, net.f.activation(x[here]), net.class_index[here], x[here])
        assert_close(alone, together[here])
    torch.set_rng_state(before)
    om_cam(net.f, net.f.activation(x[:1]), net.class_index[:1], x[:1])
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, net.x)
    assert_close(dict(net.f.state_dict()), weights, rtol=0, atol=0)
    assert not any(p.requires_grad or p.grad is not None for p in net.f.parameters())


@torch.no_grad()
def test_an_improbable_class_gives_a_finite_map(net):
    for p in list(net.f.head.parameters())[-2:]:
        p.mul_(300)
    logits = net.f(net.x)
    worst = logits.argmin(1)
    assert logits.softmax(1).amin(1).min() < 1e-30
    assert om_cam(net.f, net.f.activation(net.x), worst, net.x).isfinite().all()


@torch.no_grad()
def test_blur_is_a_gaussian_with_edges_repeated():
    x = torch.randn(1, 2, 27, 30, dtype=torch.float64)
    radius, sigma = round(25 * 27 / 224), 50 * 27 / 224
    expected = torch.zeros_like(x)
    for i in range(27):
        for j in range(30):
            total = 0.0
            for di in range(-radius, radius + 1):
                for dj in range(-radius, radius + 1):
                    weight = math.exp(-(di**2 + dj**2) / (2 * sigma**2))
                    row, column = min(max(i + di, 0), 26), min(max(j + dj, 0), 29)
                    expected[0, :, i, j] += weight * x[0, :, row, column]
                    total += weight
            expected[0, :, i, j] /= total
    assert_close(blurred(x), expected)


@pytest.mark.slow
@torch.no_grad()
def test_objective_falls_on_a_photograph(lite0, chelsea, monkeypatch):
    monkeypatch.setattr(optimised, "ITERATIONS", 1)
    c = lite0(chelsea).argmax(1)
    base = normalise(sig_cam(lite0, lite0.activation(chelsea), c))
    start = 1 - F.interpolate(base[:, None], (28, 28), mode="bilinear")[:, 0]
    found = om_cam(lite0, lite0.activation(chelsea), c, chelsea)
    mask, curve = optimise(Masking(lite0, chelsea, c), start)
    assert len(curve) == 2 and curve[1] < curve[0] - 0.1
    assert_close(found, 1 - F.interpolate(mask[:, None], (224, 224), mode="bilinear")[:, 0])
