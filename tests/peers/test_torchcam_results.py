"""torchcam's tests of explanations and measures: test_explain, test_metrics."""

import itertools
from functools import partial
from operator import itemgetter

import pytest
import torch
from torch import nn
from torchcam.methods import LayerCAM
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

from aftcli import AftError, Average, Classes, attribution_map, cut_classifier, explain
from aftcli.measures import metrics
from tests.helpers.compare import assert_near
from tests.helpers.small import small
from tests.peers.networks import plain, tiny, tiny_cut
from tests.reference import metrics as slow


def cut_tiny(model=None, **given):
    """The tiny network in float32, which names its classes, and an input."""
    model = (model or tiny()).float()
    named = Classes(("a", "b", "c"))
    f = cut_classifier(model, preprocessing=plain(8, 8), classes=named, **given)
    return f, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Counting(nn.Module):
    """A layer that counts its passes."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, x):
        self.passes.append(1)
        return x * 1


def test_the_predicted_class_is_explained_at_the_default_layer():
    """torchcam: test_explain.py::test_explain_predicted_class_with_automatic_cnn_target"""
    f, x = cut_tiny()
    (found,) = explain(f, x, ["gradcam"])
    y = f(x)
    assert found.class_index == int(y.argmax())
    assert found.probability == pytest.approx(float(y.softmax(1).max()))
    assert found.attribution.shape == (8, 8) and found.attribution.dtype == torch.float32
    assert not found.attribution.requires_grad and found.attribution.device.type == "cpu"
    assert (found.cam, f.layer_name) == ("gradcam", "2+3")
    assert f.classes.name(found.class_index) in "abc"


@pytest.mark.parametrize("methods", [["gradcam"], ["gradcam", "layercam", "ablationcam"]])
def test_classes_and_methods_share_one_pass(methods):
    """torchcam: test_explain.py::test_explain_runs_fresh_forward_for_distinct_expected_class"""
    model = nn.Sequential(Counting(), *tiny())
    f, x = cut_tiny(model, own=True)
    c = int(f(x).argmax())
    model[0].passes.clear()
    found = explain(f, x, methods, targets=[c, (c + 1) % 3])
    assert len(model[0].passes) == 1
    assert [e.class_index for e in found] == [c, (c + 1) % 3] * len(methods)


def test_the_predicted_class_is_explained_once():
    """torchcam: test_explain.py::test_explain_reuses_map_when_expected_class_is_predicted"""
    f, x = cut_tiny()
    c = int(f(x).argmax())
    (given,), (found,) = explain(f, x, ["gradcam"], targets=c), explain(f, x, ["gradcam"])
    assert given.class_index == found.class_index == c
    assert torch.equal(given.attribution, found.attribution)


WRONG = {
    "no tensor": lambda f, x: explain(f, None, ["gradcam"]),
    "two images": lambda f, x: explain(f, x.repeat(2, 1, 1, 1), ["gradcam"]),
    "no batch": lambda f, x: explain(f, x[0], ["gradcam"]),
    "integers": lambda f, x: explain(f, x.to(torch.uint8), ["gradcam"]),
    "too many channels": lambda f, x: explain(f, x.repeat(1, 2, 1, 1), ["gradcam"]),
    "a class that is not there": lambda f, x: explain(f, x, ["gradcam"], targets=3),
    "a class that nobody named": lambda f, x: explain(f, x, ["gradcam"], targets="cat"),
    "no method": lambda f, x: explain(f, x, ["missing"]),
    "no class": lambda f, x: explain(f, x, ["gradcam"], top_k=0),
    "names of other classes": lambda f, x: cut_classifier(
        tiny(), "2", preprocessing=plain(8, 8), classes=Classes(("a",))
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests_are_told(what):
    """torchcam: test_explain.py::test_explain_rejects_invalid_requests"""
    with pytest.raises(AftError):
        WRONG[what](*cut_tiny())


def test_logits_that_are_not_finite_are_told():
    """torchcam: test_explain.py::test_explain_rejects_invalid_outputs"""
    model = tiny()
    with torch.no_grad():
        model[6].weight.fill_(float("nan"))
    with pytest.raises(AftError, match="not finite|returns NaN"):
        explain(*cut_tiny(model), ["gradcam"])


def test_inference_mode_changes_nothing():
    """torchcam: test_explain.py::test_explain_rejects_invalid_outputs, which refuses that mode"""
    f, x = cut_tiny()
    (expected,) = explain(f, x, ["gradcam"])
    with torch.inference_mode():
        (found,) = explain(f, x, ["gradcam"])
    assert torch.equal(found.attribution, expected.attribution)


def test_explaining_leaves_the_network_as_it_was():
    """torchcam: test_explain.py::test_explain_cleans_hooks_and_preserves_model_state"""
    model = tiny().float().train()
    first = next(model.parameters())
    first.grad = gradient = torch.ones_like(first)
    model[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()], [w.requires_grad for w in model.parameters()]
    f, x = cut_tiny(model)
    x.requires_grad_()
    explain(f, x, ["gradcam", "layercam", "scorecam"])
    assert first.grad is gradient and x.grad is None
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [m.training for m in model.modules()] == flags[0]
    assert [w.requires_grad for w in model.parameters()] == flags[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_drop_and_increase_equal_torchcams():
    """torchcam: test_metrics.py::test_classification_metric"""
    model, f, x = tiny_cut(layer="3")
    with torch.no_grad():
        model[6].weight.mul_(30)
    f = cut_classifier(model, "3", preprocessing=plain(8, 8))
    with LayerCAM(model, "3") as extract:
        theirs = ClassificationMetric(extract, partial(torch.softmax, dim=-1))
        theirs.update(x, class_idx=[0, 2])
    classes = torch.tensor([0, 2])
    maps = attribution_map(f, x, classes, "layercam")
    y, y_hat = (f(v).softmax(1).gather(1, classes[:, None])[:, 0] for v in (x, x * maps[:, None]))
    found = {"avg_drop": metrics.drop(y_hat, y), "conf_increase": metrics.increase(y_hat, y)}
    averages = {name: float(values.double().mean()) for name, values in found.items()}
    assert averages == pytest.approx(theirs.summary(), abs=1e-6)
    assert 0 < averages["avg_drop"] < 1


def test_drop_of_a_known_score():
    """torchcam: test_metrics.py::test_classification_metric_exact_value"""
    y, y_hat = torch.tensor([1.0]), torch.tensor([0.4])
    assert metrics.drop(y_hat, y).tolist() == pytest.approx([0.6])
    assert metrics.increase(y_hat, y).tolist() == [0]


class Sum(nn.Module):
    """torchcam's network: the sum of the input, and the rest to 1."""

    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x):
        score = self.identity(x).flatten(1).sum(1)
        return torch.stack([score, 1 - score], 1)


class Given:
    """An extractor for torchcam's measures that gives a map."""

    def __init__(self, cam):
        self.model, self.cam, self._hooks_enabled = Sum(), cam, True

    def __call__(self, *_, **__):
        return [self.cam.clone()]

    def _hooks_off(self):
        from contextlib import nullcontext

        return nullcontext()

    fuse_cams = staticmethod(lambda cams: cams[0])


def total(x):
    return x.flatten(1).sum(1)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0.5), (2, 0.4), (4, 0.375)])
def test_deletion_equals_torchcams(steps, expected):
    """torchcam: test_metrics.py::test_deletion_insertion_complete_curves_and_auc"""
    x = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    theirs = DeletionInsertionMetric(Given(x[:, 0]), steps=steps)
    theirs.update(x, class_idx=0)
    found = float(metrics.deletion(x, x[:, 0], total, steps))
    assert found == pytest.approx(theirs.summary()["deletion_auc"]) == expected


def test_steps_that_do_not_divide_the_pixels():
    """torchcam: test_metrics.py::test_deletion_insertion_non_divisible_steps"""
    x = torch.tensor([[[[0.3, 0.25, 0.2, 0.15, 0.1]]]])
    # Without two, three and five pixels: 1, 0.45, 0.25, 0.
    assert float(metrics.deletion(x, x[:, 0], total, 3)) == pytest.approx(1.2 / 3)


def test_measures_of_any_score():
    """torchcam: test_metrics.py::test_classification_metric_accepts_output_targets

    ::test_deletion_insertion_accepts_output_targets
    """
    x = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    first = itemgetter("score")
    found = metrics.deletion(x, x[:, 0], lambda v: first({"score": total(v)}), 2)
    assert float(found) == pytest.approx(0.4)
    assert metrics.drop(total(x * (x > 0.35)), total(x)).tolist() == pytest.approx([0.6])


@pytest.mark.parametrize("measure", ["insertion", "deletion"])
def test_areas_of_a_batch_are_those_of_its_images(measure):
    """torchcam: test_metrics.py::test_deletion_insertion_chunked_parity

    ::test_deletion_insertion_custom_baselines_and_non_mutation
    """
    generator = torch.Generator().manual_seed(4)
    x, maps = torch.rand(3, 3, 6, 7, generator=generator), torch.rand(3, 6, 7, generator=generator)
    before, function = (x.clone(), maps.clone()), getattr(metrics, measure)
    found = function(x, maps, lambda v: v.flatten(1).mean(1), 5)
    alone = [function(x[n : n + 1], maps[n : n + 1], lambda v: v.mean()[None], 5) for n in range(3)]
    assert_near(found, torch.cat(alone), 1e-6)
    assert torch.equal(x, before[0]) and torch.equal(maps, before[1])
    start, goal = (x, 0 * x) if measure == "deletion" else (metrics.blurred(x), x)
    for n in range(3):
        area = slow.area(start[n], maps[n], goal[n], lambda v: float(v.mean()), 5)
        assert float(found[n]) == pytest.approx(area, abs=1e-6)


def test_classes_of_a_batch():
    """torchcam: test_metrics.py::test_deletion_insertion_class_indices"""
    _, f, x = tiny_cut()
    predicted = f(x).argmax(1)
    as_list = attribution_map(f, x, predicted.tolist(), "gradcam")
    assert torch.equal(as_list, attribution_map(f, x, predicted, "gradcam"))
    for n in range(2):
        (found,) = explain(f, x[n : n + 1], ["gradcam"])
        assert found.class_index == predicted[n]
        assert_near(found.attribution, as_list[n])
    # One number for several images could mean two things.
    with pytest.raises(AftError, match="torch.full"):
        attribution_map(f, x, 1, "gradcam")


@pytest.mark.parametrize("wrong", [2, "0", [0], [0, 9], [0.0, 1.0], [[0, 1]]])
def test_wrong_classes_of_a_batch(wrong):
    """torchcam: test_metrics.py::test_metrics_reject_invalid_class_indices"""
    _, f, x = tiny_cut()
    with pytest.raises(AftError, match="class"):
        attribution_map(f, x, wrong, "gradcam")


def test_true_is_no_class():
    """torchcam: test_metrics.py::test_metrics_reject_invalid_class_indices"""
    _, f, x = tiny_cut()
    with pytest.raises(AftError):
        attribution_map(f, x, [False, 1], "gradcam")


@pytest.mark.parametrize("shape", [(1, 1), (1, 3, 8), (1, 3, 4, 8, 8)])
def test_inputs_of_another_rank(shape):
    """torchcam: test_metrics.py::test_metrics_reject_unsupported_spatial_rank"""
    _, f, _ = tiny_cut()
    with pytest.raises(AftError, match="shape|channels"):
        attribution_map(f, torch.rand(shape, dtype=torch.double), 0, "gradcam")


def test_values_that_are_undefined_are_left_out():
    """torchcam: test_metrics.py::test_metrics_skip_nan_cams, ::test_metrics_all_nan_cams"""
    average, nothing = Average(), Average()
    average.update(torch.tensor([0.5, float("nan"), 0.25]))
    nothing.update(torch.tensor([float("nan")] * 2))
    assert float(average.compute()) == 0.375
    assert torch.isnan(nothing.compute())


def test_an_average_starts_again():
    """torchcam: test_metrics.py::test_deletion_insertion_reset"""
    average = Average(metrics.drop)
    average.update(torch.tensor([0.4]), torch.tensor([1.0]))
    average.reset()
    average.update(torch.tensor([0.9]), torch.tensor([1.0]))
    assert float(average.compute()) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_areas_keep_the_type(dtype):
    """torchcam: test_metrics.py::test_deletion_insertion_preserves_dtype_and_device"""
    x, seen = torch.rand(1, 3, 4, 4, dtype=dtype), []
    for measure in (metrics.deletion, metrics.insertion):
        measure(x, x[:, 0], lambda v: seen.append(v.dtype) or total(v), 2)
    assert seen == [dtype] * 6


def test_an_error_in_scoring_is_passed_on():
    """torchcam: test_metrics.py::test_metrics_restore_model_and_hooks_on_scoring_error"""
    x, average, calls = torch.rand(1, 3, 4, 4), Average(), itertools.count()

    def fail(v):
        if next(calls):
            raise RuntimeError("scoring failed")
        return total(v)

    with pytest.raises(RuntimeError, match="scoring failed"):
        average.update(metrics.deletion(x, x[:, 0], fail, 2))
    average.update(torch.tensor([0.5]))
    assert float(average.compute()) == 0.5


@pytest.mark.parametrize("method", ["layercam", "layercam-fusion"])
def test_areas_of_maps_of_one_and_of_several_layers(method):
    """torchcam: test_metrics.py::test_deletion_insertion_extractor_protocols"""
    case = small("linear", seed=7)
    maps = attribution_map(case.f, case.x, case.class_index, method)

    def probability_of(x):
        with torch.no_grad():
            return case.f(x).softmax(1).gather(1, case.class_index[:, None])[:, 0]

    for measure in (metrics.deletion, metrics.insertion):
        found = measure(case.x, maps, probability_of)
        assert found.shape == (3,) and ((found >= 0) & (found <= 1)).all()
