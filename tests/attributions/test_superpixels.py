"""LIME, Kernel SHAP and XRAI against their definitions and other implementations."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from aftcli.attributions import perturbation as methods
from aftcli.core.methods import METHODS
from aftcli.errors import AftError
from tests.helpers.small import MEAN, STD, small
from tests.reference import perturbation as reference

pytest.importorskip("skimage")


@pytest.fixture
def few(monkeypatch):
    """Few superpixels, so that all coalitions can be enumerated."""
    monkeypatch.setattr(methods, "PLAYERS", 6)


def by_superpixel(attribution, parts):
    return np.array([float(attribution[parts == i][0]) for i in range(int(parts.max()) + 1)])


def test_superpixels_are_parts_of_the_photo(lite0, chelsea):
    parts = methods.superpixels(lite0, chelsea[0], 50)
    assert parts.shape == (224, 224)
    sizes = torch.bincount(parts.flatten())
    assert 20 <= len(sizes) <= 80 and sizes.min() > 0
    picture = methods.picture(lite0, chelsea[0])
    assert -1e-6 <= picture.min() and picture.max() <= 1 + 1e-6
    within = sum(picture[parts == i].var(0).sum() * n for i, n in enumerate(sizes.tolist()))
    assert within < 0.5 * picture.reshape(-1, 3).var(0).sum() * parts.numel()


def test_lime_is_a_weighted_ridge_regression(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(methods, "SAMPLES", 80)
    _, _, f, x, class_index = small("mlp")
    found = methods.signed_lime(f, class_index, x)
    for n, c in enumerate(class_index):
        parts = methods.superpixels(f, x[n], methods.SUPERPIXELS)
        z = np.random.RandomState(0).randint(0, 2, (80, int(parts.max()) + 1))
        z[0] = 1
        p = np.array([reference.probability(f, reference.show(x[n], parts, row), c) for row in z])
        ones = z[0]
        cosine = z @ ones / np.linalg.norm(z, axis=1) / np.linalg.norm(ones)
        weight = np.exp(-((1 - cosine) ** 2) / 0.25**2) ** 0.5
        expected = reference.ridge(z, p, weight, 1.0)
        np.testing.assert_allclose(by_superpixel(found[n], parts), expected, rtol=1e-6, atol=1e-12)


def test_lime_is_what_the_lime_package_gives(monkeypatch):
    lime_image = pytest.importorskip("lime.lime_image")
    monkeypatch.setattr(methods, "SAMPLES", 200)
    _, _, f, x, class_index = small("linear")
    found = methods.signed_lime(f, class_index, x)
    for n, c in enumerate(class_index.tolist()):
        parts = methods.superpixels(f, x[n], methods.SUPERPIXELS).numpy()

        def probabilities(images):
            with torch.no_grad():
                return f(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).softmax(1).numpy()

        explainer = lime_image.LimeImageExplainer(random_state=np.random.RandomState(0))
        explanation = explainer.explain_instance(
            x[n].permute(1, 2, 0).numpy(),
            probabilities,
            labels=(c,),
            top_labels=None,
            hide_color=0,
            num_samples=200,
            segmentation_fn=lambda image, parts=parts: parts,
            random_seed=0,
        )
        weights = dict(explanation.local_exp[c])
        expected = [weights[i] for i in range(parts.max() + 1)]
        np.testing.assert_allclose(by_superpixel(found[n], parts), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_kernel_shap_gives_shapley_values(kind, few):
    pytest.importorskip("shap")
    _, _, f, x, class_index = small(kind)
    found = methods.signed_kernel_shap(f, class_index, x)
    for n, c in enumerate(class_index):
        parts = methods.superpixels(f, x[n], methods.PLAYERS)
        assert 3 <= int(parts.max()) + 1 <= 8
        expected = reference.shapley(f, x[n], c, parts)
        np.testing.assert_allclose(by_superpixel(found[n], parts), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [1, 12, 60])
def test_kernel_shap_is_efficient(count, monkeypatch):
    """The values of all superpixels add up to y^c(x) - y^c(0)."""
    pytest.importorskip("shap")
    monkeypatch.setattr(methods, "PLAYERS", count)
    monkeypatch.setattr(methods, "COALITIONS", 300)
    _, _, f, x, class_index = small("mlp", seed=1)
    found = methods.signed_kernel_shap(f, class_index, x)
    for n, c in enumerate(class_index):
        parts = methods.superpixels(f, x[n], methods.PLAYERS)
        total = by_superpixel(found[n], parts).sum()
        expected = reference.score(f, x[n], c) - reference.score(f, torch.zeros_like(x[n]), c)
        assert total == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_sampled_kernel_shap_is_near_the_shapley_values(monkeypatch):
    pytest.importorskip("shap")
    _, _, f, x, class_index = small("mlp")
    monkeypatch.setattr(methods, "PLAYERS", 12)
    parts = methods.superpixels(f, x[0], 12)
    count = int(parts.max()) + 1
    assert 8 <= count <= 12
    monkeypatch.setattr(methods, "COALITIONS", 2**count // 4)
    found = by_superpixel(methods.signed_kernel_shap(f, class_index[:1], x[:1])[0], parts)
    expected = reference.shapley(f, x[0], class_index[0], parts)
    assert np.abs(found - expected).max() > 1e-9
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_xrai_adds_the_densest_region_first(kind, monkeypatch):
    pytest.importorskip("saliency")
    monkeypatch.setattr(methods, "STEPS", 5)
    # Larger than small's own, for regions with more than 50 new pixels.
    _, _, f, _, class_index = small(kind)
    x = smooth(2, 40, 48)
    found = methods.signed_xrai(f, class_index[:2], x)
    for n, c in enumerate(class_index[:2]):
        black, white = (
            torch.tensor([(v - m) / s for m, s in zip(MEAN, STD, strict=True)]).double()
            for v in (0, 1)
        )
        by_baseline = [
            reference.integrated_gradients(f, x[n], c, b[:, None, None].expand_as(x[n]), 5)
            for b in (black, white)
        ]
        attribution = (sum(by_baseline) / 2).amax(0).numpy()
        mean, std = (torch.tensor(v).double()[:, None, None] for v in (MEAN, STD))
        masks = reference.regions((x[n] * std + mean).permute(1, 2, 0).numpy())
        expected = reference.xrai(attribution, masks)
        assert len(np.unique(expected)) > 3
        # The package adds gradients up in float32.
        np.testing.assert_allclose(found[n].numpy(), expected, rtol=1e-4, atol=1e-7)
        assert found[n].sum().item() == pytest.approx(attribution.sum(), rel=1e-4)


def smooth(n, height, width):
    """Inputs with regions, as photographs have: coarse noise, stretched."""
    coarse = torch.randn(n, 3, 6, 7, generator=torch.Generator().manual_seed(3)).double()
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def test_xrai_of_one_colour_has_one_region(monkeypatch):
    pytest.importorskip("saliency")
    _, _, f, _, class_index = small("linear")
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (MEAN, STD))
    x = (torch.ones(1, 3, 20, 28).double() - mean) / std
    monkeypatch.setattr(methods, "picture", lambda f, x: np.ones((20, 28, 3)))
    found = methods.signed_xrai(f, class_index[:1], x)
    assert found.isfinite().all()
    assert_close(found, found[:, :1, :1].expand_as(found))


NAMES = [("lime", "sklearn"), ("kernel_shap", "shap"), ("xrai", "saliency")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), NAMES)
def test_batch_is_its_images_and_nothing_else_changes(name, package, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setattr(methods, "SAMPLES", 100)
    monkeypatch.setattr(methods, "COALITIONS", 100)
    monkeypatch.setattr(methods, "STEPS", 4)
    _, _, f, x, class_index = small("mlp")
    method = METHODS[name.replace("_", "")].load()
    found = reference.check_alone_and_clean(method, f, x[:2], class_index[:2])
    signed = getattr(methods, f"signed_{name}")(f, class_index[1:2], x[1:2])
    assert_close(found[1:], signed.relu())


@pytest.mark.parametrize(("name", "package"), NAMES)
def test_scores_that_are_not_finite_are_an_error(name, package, monkeypatch):
    pytest.importorskip(package)
    _, _, f, x, class_index = small("linear")
    monkeypatch.setattr(methods, "SAMPLES", 20)
    with torch.no_grad():
        next(f.head.parameters()).fill_(torch.nan)
    state = np.random.get_state()[1].copy()
    with pytest.raises(AftError, match="not finite"):
        METHODS[name.replace("_", "")].load()(f, x, class_index, x)
    assert (np.random.get_state()[1] == state).all()
