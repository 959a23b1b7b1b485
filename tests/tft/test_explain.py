"""Explanations of one image: what `explain` shares between maps must not change them."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from aftcli.attributions.maps import attribution_map
from aftcli.core.cam import score_gradient
from aftcli.core.methods import CAMS
from aftcli.settings import Search, Shaping
from aftcli.tft.explain import explain, explain_map
from aftcli.tft.search import fine_tune_threshold, tune_batch
from tests.helpers.compare import assert_near
from tests.helpers.small import SIZE, GradientPasses, small

SETTINGS = [
    Search(),
    Search((0.2, 0.5, 0.8), "soft", "black", "percentile"),
    Search(masking="binary", fill="blur"),
]


def assert_same_explanation(explanation, f, x, class_index, attribution, settings):
    c = torch.tensor([class_index])
    assert explanation.class_index == class_index
    assert explanation.probability == pytest.approx(f(x).softmax(1)[0, class_index].item())
    assert_near(explanation.attribution, attribution[0])
    assert explanation.thresholds == settings.thresholds
    alone = fine_tune_threshold(
        f,
        x,
        attribution,
        c,
        settings.thresholds,
        settings.masking,
        settings.fill,
        settings.mode,
    )
    assert explanation.tft.tau == alone.tau
    assert_near(1 + explanation.tft.rpi, 1 + alone.rpi, 1e-6)
    assert_near(explanation.tft.attribution, alone.attribution)
    assert torch.equal(explanation.tft.mask, alone.mask)
    assert_near(explanation.tft.probabilities, alone.probabilities, 1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_methods_and_classes_together_equal_each_alone(settings):
    s = small("linear", 1)
    x, methods, targets = s.x[:1], list(CAMS), [3, 0]
    found = explain(s.f, x, methods, targets, settings=settings)
    asked = [(method, c) for method in methods for c in targets]
    assert [(e.cam, e.class_index) for e in found] == asked
    for explanation, (method, c) in zip(found, asked, strict=True):
        attribution = attribution_map(s.f, x, torch.tensor([c]), method)
        assert_same_explanation(explanation, s.f, x, c, attribution, settings)


def test_without_targets_the_most_probable_classes_are_explained():
    s = small("mlp", 2)
    x = s.x[1:2]
    ranked = s.f(x)[0].argsort(descending=True).tolist()
    assert [e.class_index for e in explain(s.f, x, ["gradcam"])] == ranked[:1]
    best = explain(s.f, x, ["gradcam", "layercam"], top_k=3)
    assert [e.class_index for e in best] == ranked[:3] * 2
    assert all(e.tft is None and e.thresholds == () for e in best)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_map_from_elsewhere_is_searched_for_each_class(settings):
    s = small("mlp", 3)
    x, attribution = s.x[:1], torch.rand(1, *SIZE, dtype=torch.float64)
    found = explain_map(s.f, x, attribution, [4, 1], settings=settings)
    assert [(e.cam, e.class_index) for e in found] == [("map", 4), ("map", 1)]
    for explanation in found:
        c = explanation.class_index
        assert_same_explanation(explanation, s.f, x, c, attribution, settings)


def test_one_pass_of_the_stem_serves_all_methods_and_classes():
    s = small("linear", 4)
    passes = []
    s.f.stem.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    plain = [method for method in CAMS if method != "scorecam"]
    explain(s.f, s.x[:1], plain, targets=[0, 1, 2])
    assert passes == [1]


def counted(kind, seed):
    """A small network whose head counts, an image, and the CAMs that fit."""
    s = small(kind, seed)
    assert s.f.linear_head or kind == "mixing"  # found before the head is wrapped, and kept
    s.f.head = GradientPasses(s.f.head)
    return s.f, s.x[:1], [method for method in CAMS if method != "cam" or kind == "linear"]


@pytest.mark.parametrize("smooth", ["none", "eigen"])
@pytest.mark.parametrize("kind", ["linear", "mixing"])
def test_all_cams_need_one_gradient_of_each_score(kind, smooth):
    f, x, methods = counted(kind, 7)
    methods = [method for method in methods if smooth == "none" or method != "eigencam"]
    shaping = Shaping(smooth=smooth)
    alone = [explain(f, x, [method], [2, 0], shaping=shaping) for method in methods]
    assert f.head.count == 6  # gradcam, gradcam++, layercam, xgradcam, hirescam; finercam
    together = explain(f, x, methods, [2, 0], shaping=shaping)
    assert f.head.count == 6 + 2  # of the class's score, and of Finer-CAM's
    for found, expected in zip(together, (e for each in alone for e in each), strict=True):
        assert (found.cam, found.class_index) == (expected.cam, expected.class_index)
        assert torch.equal(found.attribution, expected.attribution)
    assert f.gradients is None  # nothing is kept for the next call


def test_a_gradient_is_shared_for_the_same_activation_and_classes_only():
    s = small("mixing", 8)
    a, c = s.f.activation(s.x), s.class_index
    shared = s.f.sharing(a, c)
    first = score_gradient(shared, a, c)
    assert score_gradient(shared, a, c) is first
    asked = {
        "other classes": (a, c.flip(0)),
        "other cells": (2 * a, c),
        "other images": (a[:1], c[:1]),
    }
    for each in asked.values():
        assert torch.equal(score_gradient(shared, *each), score_gradient(s.f, *each))
    other = small("mixing", 9).f.head
    changed = copy(shared)
    changed._modules = {**shared._modules, "head": other}
    assert not torch.equal(score_gradient(changed, a, c), first)
    with torch.enable_grad():
        trained = a.detach().clone().requires_grad_()
        assert score_gradient(s.f.sharing(trained, c), trained, c).requires_grad


def test_masks_by_all_cams_need_one_gradient_of_each_score():
    f, x, methods = counted("linear", 10)
    alone = [tune_batch(f, x, [method], Search())[0] for method in methods]
    f.head.count = 0
    together = tune_batch(f, x, methods, Search())
    assert f.head.count == 2
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found.attribution, expected.attribution)
        assert torch.equal(found.tft.tau, expected.tft.tau)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 1.0])
def test_a_fixed_threshold_mutes_what_is_below_it(tau):
    s = small("linear", 5)
    attribution = torch.rand(SIZE, dtype=torch.float64)
    attribution[2, 3] = tau
    by_value = [[v if v >= tau else 0 for v in row] for row in attribution.tolist()]

    def muted(mode):
        settings = Search((tau,), mode=mode)
        [found] = explain_map(s.f, s.x[:1], attribution[None], [1], settings=settings)
        return found.tft.attribution[0]

    assert muted("value").tolist() == by_value
    kept = (muted("percentile") > 0).sum().item()
    assert kept == pytest.approx((1 - tau) * attribution.numel(), abs=1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_fixed_threshold_is_a_search_of_this_one(settings):
    s = small("mlp", 6)
    asked = (s.f, s.x[:1], ["gradcam", "layercam"], [2, 0])
    one = replace(settings, thresholds=(0.4,))
    searched = explain(*asked, settings=one)
    for found, expected in zip(explain(*asked, settings=one, fixed=True), searched, strict=True):
        assert found.tft is None and found.cut is found.fixed
        assert found.thresholds == (0.4,)
        assert all(map(torch.equal, found.fixed, expected.tft))
