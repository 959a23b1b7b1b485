"""pytorch-grad-cam's tests, and what its README promises: maps, targets, smoothing, layers."""

import gc

import numpy as np
import pytest
import pytorch_grad_cam as theirs
import torch
from PIL import Image
from pytorch_grad_cam.utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
)
from torch import nn

from aftcli import AftError, attribution_map, cut_classifier, explain
from aftcli.core.cam import eigen_cam
from aftcli.core.classes import Preprocessing
from aftcli.data.images import to_input
from aftcli.measures import metrics
from tests.helpers.command import aft
from tests.helpers.compare import assert_near
from tests.helpers.small import small
from tests.peers.networks import of_grad_cam, plain, resnet, scaled, tiny, tiny_cut
from tests.reference import paper as reference

# Theirs that compute what the papers say (docs/method/decisions/maps.md): Eigen-CAM is centred,
# and Score-CAM's masks are stretched from corner to corner.
EQUAL = {
    "gradcam": theirs.GradCAM,
    "gradcam++": theirs.GradCAMPlusPlus,
    "ablationcam": theirs.AblationCAM,
    "layercam": theirs.LayerCAM,
    "xgradcam": theirs.XGradCAM,
    "hirescam": theirs.HiResCAM,
}
SIZES = [(2, 32, 32), (1, 32, 40)]
# Behind the last block of the small ResNet.
LAYER = "5"


@pytest.mark.parametrize(("count", "high", "wide"), SIZES)
@pytest.mark.parametrize("asked", ["predicted", "chosen"])
@pytest.mark.parametrize("method", EQUAL)
def test_all_methods_give_their_maps(method, asked, count, high, wide):
    """pytorch-grad-cam: test_run_all_models.py::test_all_cam_models_can_run, a ResNet"""
    model = resnet(high, wide)
    f = cut_classifier(model, LAYER, preprocessing=plain(high, wide))
    x = torch.randn(count, 3, high, wide, generator=torch.Generator().manual_seed(1)).double()
    predicted = f(x).argmax(1).tolist()
    classes = predicted if asked == "predicted" else [(c + 1) % 6 for c in predicted]
    found = attribution_map(f, x, classes, method)
    assert found.shape == (count, high, wide)
    # Where the score is negative theirs turns Ablation-CAM inside out.
    if method != "ablationcam" or asked == "predicted":
        given = None if asked == "predicted" else classes
        expected = of_grad_cam(EQUAL[method], model, LAYER, x, given)
        assert_near(scaled(found), expected.double(), 1e-4)


@pytest.mark.parametrize("method", ["gradcam", "layercam", "hirescam", "xgradcam"])
def test_all_methods_give_their_maps_of_a_vgg(method):
    """pytorch-grad-cam: test_run_all_models.py::test_all_cam_models_can_run, a VGG"""
    case = small("mlp", seed=2)
    with torch.no_grad():
        case.model.fc1.weight.mul_(100)
    f = cut_classifier(case.model, "conv2+bn2+relu2", preprocessing=case.f.preprocessing)
    found = attribution_map(f, case.x, case.class_index, method)
    expected = of_grad_cam(EQUAL[method], case.model, case.layer, case.x, case.class_index.tolist())
    assert_near(scaled(found), expected.double(), 1e-4)


@pytest.mark.parametrize("method", ["scorecam", "eigencam"])
@pytest.mark.parametrize("count", [1, 2])
def test_methods_that_differ_give_the_papers_maps(method, count):
    """pytorch-grad-cam: test_run_all_models.py::test_all_cam_models_can_run, by a loop"""
    case = small("linear", seed=3)
    x, classes = case.x[:count], case.class_index[:count]
    found = attribution_map(case.f, x, classes, method)
    for n in range(count):
        own = (case.model, case.layer, x[n : n + 1], int(classes[n]), method)
        assert_near(found[n], reference.attribution_map(*own), 1e-6)


@pytest.mark.slow  # it looks at every object of the process
def test_a_loop_of_maps_leaves_nothing_behind():
    """pytorch-grad-cam: test_context_release.py::test_memory_usage_in_loop"""

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    model, f, x = tiny_cut()
    counts = []
    for _ in range(3):
        for method in (*EQUAL, "scorecam", "eigencam"):
            attribution_map(f, x, [0, 1], method)
        counts.append(tensors())
    assert counts[1] == counts[-1]
    assert all(weight.grad is None for weight in (*model.parameters(), *f.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_loop_of_maps_leaves_nothing_behind_on_a_gpu():
    """pytorch-grad-cam: test_context_release_cuda.py::test_memory_usage_in_loop"""
    _, f, x = tiny_cut()
    f, x = f.cuda(), x.cuda()
    used = []
    for _ in range(3):
        for method in EQUAL:
            attribution_map(f, x, [0, 1], method)
        used.append(torch.cuda.memory_allocated())
    assert used[1] == used[-1]


def test_inputs_of_one_channel():
    """pytorch-grad-cam: test_one_channel.py::test_memory_usage_in_loop"""
    model = tiny()
    model[0] = nn.Conv2d(1, 4, 3, padding=1).double()
    model.eval()
    f = cut_classifier(model, "3", preprocessing=None)
    x = torch.rand(16, 1, 8, 8, dtype=torch.double)
    classes = model(x).argmax(1).tolist()
    expected = of_grad_cam(theirs.GradCAM, model, "3", x, classes)
    assert_near(scaled(attribution_map(f, x, classes, "gradcam")), expected.double(), 1e-4)


def test_eigen_cam_leaves_the_activation():
    """pytorch-grad-cam: test_svd_no_side_effect.py::test_get_2d_projection_does_not_mutate_caller

    ::test_get_2d_projection_with_sign_correction_does_not_mutate_caller
    """
    _, f, x = tiny_cut()
    with torch.no_grad():
        activation = f.activation(x)
        before = activation.clone()
        found = eigen_cam(f, activation, torch.tensor([0, 1]), x)
    assert torch.equal(activation, before)
    # Of the two signs of a singular vector the one that makes the sum positive.
    assert (found.flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    """pytorch-grad-cam: test_svd_no_side_effect.py, its activations with NaN"""
    _, f, x = tiny_cut()
    x[0, 0, 0, 0] = value
    for method in ("gradcam", "layercam", "xgradcam"):
        with pytest.raises(AftError, match="not finite"):
            attribution_map(f, x, [0, 1], method)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "layercam", "scorecam", "eigencam"])
def test_arcc_of_two_images_is_a_share(method):
    """pytorch-grad-cam: test_refine_cam.py::test_refine_cam, its measure (ARCC)"""
    model = resnet(16, 16)
    f = cut_classifier(model, LAYER, preprocessing=plain(16, 16))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    classes = f(x).argmax(1)

    def probability_of(images):
        with torch.no_grad():
            return f(images).softmax(1).gather(1, classes[:, None])[:, 0]

    maps = attribution_map(f, x, classes, method)
    masked = attribution_map(f, x * maps[:, None], classes, method)
    road = [metrics.road(x, m, probability_of, [0, 1]) for m in (maps, 1 - maps)]
    parts = metrics.coherency(maps, masked), metrics.complexity(maps), *road
    found = metrics.arcc(*parts)
    assert found.shape == (2,)
    assert ((found >= 0) & (found <= 1)).all()
    # A mean of three shares, which is 0 where one is.
    assert ((found > 0) == (road[1] > road[0])).all()


def test_a_class_as_a_target():
    """pytorch-grad-cam: README, ClassifierOutputTarget"""
    _, f, x = tiny_cut()
    (found,) = explain(f, x[:1], ["gradcam"], target=lambda y: y.flatten()[2])
    assert_near(found.attribution, attribution_map(f, x[:1], 2, "gradcam")[0])


@pytest.mark.parametrize("method", ["gradcam", "layercam", "hirescam"])
def test_a_probability_as_a_target(method):
    """pytorch-grad-cam: README, ClassifierOutputSoftmaxTarget"""
    model = resnet(32, 32)
    f = cut_classifier(model, LAYER, preprocessing=plain(32, 32))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    how = {"target": ClassifierOutputSoftmaxTarget}
    expected = of_grad_cam(EQUAL[method], model, LAYER, x, [1], **how)
    (found,) = explain(f, x, [method], target=lambda y: y.flatten().softmax(0)[1])
    assert_near(scaled(found.attribution[None]), expected.double(), 1e-4)


@pytest.mark.parametrize("c", [0, 1])
def test_both_classes_of_one_logit(c):
    """pytorch-grad-cam: README, BinaryClassifierOutputTarget"""
    model, _, x = tiny_cut(1)
    f = cut_classifier(model, "3", preprocessing=plain(8, 8), output="sigmoid")
    how = {"target": BinaryClassifierOutputTarget}
    expected = of_grad_cam(theirs.GradCAM, model, "3", x[:1], [c], **how)
    (found,) = explain(f, x[:1], ["gradcam"], targets=c)
    p = float(torch.sigmoid(model(x[:1])))
    assert found.probability == pytest.approx(p if c else 1 - p)
    assert_near(scaled(found.attribution[None]), expected.double(), 1e-4)


def segmenter():
    """A network of two classes for each pixel."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ).double()


def test_a_region_of_a_segmentation_as_a_target():
    """pytorch-grad-cam: README, SemanticSegmentationTarget"""
    model = segmenter().eval()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()

    class Region:
        def __init__(self, c):
            self.c = c

        def __call__(self, y):
            return y[..., self.c, 2:9, 3:8].sum()

    expected = of_grad_cam(theirs.GradCAM, model, "3", x, [1], target=Region)
    assert expected.any()
    f = cut_classifier(model, "3", preprocessing=plain(16, 16))
    (found,) = explain(f, x, ["gradcam"], target=Region(1))
    assert_near(scaled(found.attribution[None]), expected.double(), 1e-4)


class Detector(nn.Module):
    """A network of one box an image, its score by what it sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.score = nn.Linear(4, 1)
        nn.init.uniform_(self.score.weight, 0, 2)

    def forward(self, x):
        scores = self.score(self.features(x).mean((2, 3))).sigmoid()
        box = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).to(x)
        return [{"boxes": box, "labels": torch.tensor([1]), "scores": s} for s in scores]


def box_score(output):
    """A score of the boxes of class 1, of one image's output or of a batch of one."""
    first = output[0] if isinstance(output, list | tuple) else output
    return (first["scores"] * (first["labels"] == 1)).sum()


def cut_detector(dtype=torch.double):
    model = Detector().to(dtype).eval()
    return model, cut_classifier(model, "features.1", preprocessing=plain(8, 8))


def test_the_score_of_a_box_as_a_target():
    """pytorch-grad-cam: test_fasterrcnn_target_device.py::test_target_inherits_output_device_cpu"""
    model, f = cut_detector()
    x = torch.rand(1, 3, 8, 8, dtype=torch.double)
    (found,) = explain(f, x, ["gradcam"], target=box_score)
    expected = torch.einsum("k,nkhw->nhw", model.score.weight[0], model.features(x)).relu()
    assert expected.any()
    assert_near(found.attribution[None], scaled(expected.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_score_of_a_box_keeps_the_type(dtype):
    """pytorch-grad-cam: test_fasterrcnn_target_device.py::test_target_preserves_boxes_dtype"""
    _, f = cut_detector(dtype)
    (found,) = explain(f, torch.rand(1, 3, 8, 8, dtype=dtype), ["gradcam"], target=box_score)
    assert found.attribution.dtype == dtype


def test_no_box_gives_an_empty_map():
    """pytorch-grad-cam: test_fasterrcnn_target_device.py

    ::test_target_returns_zero_on_empty_boxes
    """
    _, f = cut_detector()

    def none(output):
        first = output[0] if isinstance(output, list | tuple) else output
        return first["scores"][:0].sum()

    (found,) = explain(f, torch.rand(1, 3, 8, 8, dtype=torch.double), ["gradcam"], target=none)
    assert not found.attribution.any()


NETWORK = """
import torch
from torch import nn


def network():
    torch.manual_seed(7)
    layers = [nn.Conv2d(3, 6, 9, stride=8, padding=4), nn.ReLU()]
    layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(*layers)
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The network from its file, a picture, and what `aft explain` maps of both."""
    (tmp_path / "own.py").write_text(NETWORK)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(NETWORK, names)  # noqa: S102 - the lines above

    def mapped(*options, c=1):
        """Explain a class by Grad-CAM."""
        cam = ("--cam", "gradcam", "--target", str(c), "--save", "map", "--out", "out")
        done = aft("explain", "a.png", "--model", "own.py:network", *cam, *options)
        assert done.code in (0, None), done.err
        (path,) = (tmp_path / "out").glob("*-map.npy")
        return torch.from_numpy(np.load(path))[None].double()

    return names["network"]().eval(), to_input(picture, Preprocessing()), mapped


@pytest.mark.parametrize(("kind", "c"), [("aug", 1), ("eigen", 0)])
def test_smoothed_maps(kind, c, written):
    """pytorch-grad-cam: test_run_all_models.py, its aug_smooth and eigen_smooth"""
    model, x, mapped = written
    # The sign of a component is arbitrary in theirs: a class is compared where it is ours.
    found = mapped("--layer", "3", "--smooth", kind, c=c)
    expected = of_grad_cam(theirs.GradCAM, model, "3", x, [c], **{f"{kind}_smooth": True})
    correlation = torch.corrcoef(torch.stack([found.flatten(), expected.double().flatten()]))
    assert correlation[0, 1] > 0.98


def test_maps_of_two_layers_fused_by_a_maximum(written):
    """torchcam: test_methods_core.py::test_fuse_cams"""
    model, x, mapped = written
    found = mapped("--layer", "1", "--layer", "3")
    cut = [cut_classifier(model, layer) for layer in ("1", "3")]
    one, two = (attribution_map(f, x, 1, "gradcam").double() for f in cut)
    fused = torch.maximum(one, two)
    assert torch.corrcoef(torch.stack([found.flatten(), fused.flatten()]))[0, 1] > 0.98
    assert not torch.equal(one, two)


def test_maps_of_two_layers_fused_by_a_product(written):
    """pytorch-grad-cam: test_refine_cam.py::test_refine_cam

    torchcam: test_methods_gradient.py::test_refinecam_fuse_cams, ::test_refinecam_base_methods
    ::test_refinecam_metric_compatibility, ::test_refinecam_shared_wrapper_regression
    """
    model, x, mapped = written
    found = mapped("--layer", "1", "--layer", "3", "--fuse", "product")
    expected = of_refine(model, ["1", "3"], x)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.98
    area = metrics.deletion(x.double(), found, lambda v: v.mean((1, 2, 3)).sigmoid())
    assert 0 < float(area) < 1


def test_a_product_needs_two_layers(written):
    """torchcam: test_methods_gradient.py::test_refinecam_rejects_invalid_configuration"""
    _, _, mapped = written
    mapped("--layer", "1", "--layer", "3")
    done = aft("explain", "a.png", "--model", "own.py:network", "--layer", "3", "--fuse", "product")
    assert done.code not in (0, None) and "two layers" in done.err


def of_refine(model, layers, x):
    """pytorch-grad-cam's RefineCAM on Grad-CAM, class 1."""
    modules = [model.get_submodule(name) for name in layers]
    extract = theirs.RefineCAM(model, modules, base_method=theirs.GradCAM)
    return torch.from_numpy(extract(x, [ClassifierOutputTarget(1)])).double()
