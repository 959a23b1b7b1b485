"""Maps of targets beyond a class against the classes' own, literal loops and another library."""

import json

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from PIL import Image
from pytorch_grad_cam.utils.model_targets import (
    ClassifierOutputSoftmaxTarget,
    SemanticSegmentationTarget,
)
from torch import nn

from aftcli import (
    box_target,
    contrast_target,
    output_target,
    region_target,
    similarity_target,
    with_target,
)
from aftcli.attributions.maps import attribution_map, takes_target
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.errors import AftError
from aftcli.models.targets import image_of, overlap
from aftcli.settings import Search, Shaping
from aftcli.tft.explain import explain, fits
from aftcli.tft.search import fine_tune_threshold
from tests.helpers.command import aft, usage_error
from tests.helpers.compare import assert_near
from tests.helpers.small import CELLS, MEAN, SIZE, STD, small
from tests.helpers.stored import small_float
from tests.reference import paper as reference

C = 2  # the class in most tests
# The methods that explain probabilities.
OF_PROBABILITIES = ("rise", "lime")
QUICK = [
    name
    for name, entry in METHODS.items()
    if takes_target(name) and (entry.family in ("cam", "activation") or name == "rise")
]


def logit(output):
    return output[:, C]


def probability(output):
    return output.softmax(1)[:, C]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("method", [*QUICK, "integratedgradients", "occlusion"])
def test_a_classs_score_as_a_target_gives_the_classs_map(method, kind):
    if METHODS[method].needs:
        pytest.importorskip("captum")
    s = small(kind, 3)
    expected = attribution_map(s.f, s.x, torch.full((3,), C), method)
    target = probability if method in OF_PROBABILITIES else logit
    assert_near(attribution_map(s.f, s.x, target, method), expected)
    assert expected.any()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_difference_of_classes_is_the_gradients_difference(seed):
    s = small("mlp", seed)
    found = attribution_map(s.f, s.x, contrast_target(1, 4), "gradcam")
    for n in range(3):
        x = s.x[n : n + 1]
        g = [reference.gradient_of(s.model, s.layer, x, c) for c in (1, 4)]
        alpha = [(a - b).sum() / a.size for a, b in zip(*g, strict=True)]
        cells = reference.weighted_sum(alpha, reference.activation_of(s.model, s.layer, x))
        assert_near(found[n], reference.upsample(reference.scale(cells), SIZE))


def on_cells(extractor, model, layer, x, targets):
    with extractor(model, [model.get_submodule(layer)]) as extract:
        extract.get_target_width_height = lambda x: CELLS[::-1]
        found = np.asarray(extract(x, targets))
    return np.stack([reference.upsample(reference.scale(m), SIZE) for m in found])


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "HiResCAM"])
def test_a_probability_is_pytorch_grad_cams_target(name):
    s = small("linear", 4)
    theirs = [ClassifierOutputSoftmaxTarget(C)] * 3
    expected = on_cells(getattr(pytorch_grad_cam, name), s.model, s.layer, s.x, theirs)
    assert_near(attribution_map(s.f, s.x, probability, name.lower()), expected, 1e-5)


@pytest.mark.parametrize("method", ["gradcam", "scorecam", "ablationcam"])
def test_a_target_of_one_image_is_asked_image_by_image(method):
    s = small("mlp", 6)
    expected = attribution_map(s.f, s.x, torch.full((3,), C), method)
    assert_near(attribution_map(s.f, s.x, lambda output: output.flatten()[C], method), expected)


def test_outputs_of_an_image_are_told_apart():
    rows = torch.arange(6).view(3, 2)
    boxes = [{"scores": row} for row in rows]
    assert image_of(rows, 1, 3).tolist() == [[2, 3]]
    assert image_of({"out": rows, "n": 4}, 2, 3)["out"].tolist() == [[4, 5]]
    assert image_of((rows, rows), 0, 3)[1].tolist() == [[0, 1]]
    assert image_of(boxes, 1, 3)[0]["scores"].tolist() == [2, 3]


# Networks whose output is no logits


def features():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=4, padding=2), nn.ReLU())


class Boxes(nn.Module):
    """Four boxes an image, as torchvision's detectors give them."""

    def forward(self, pooled):
        boxes = torch.tensor([[0, 0, 8, 8], [1, 1, 9, 9], [0, 0, 8, 8], [20, 10, 28, 20]])
        fixed = {"boxes": boxes.to(pooled), "labels": torch.tensor([1, 1, 2, 1])}
        return [{**fixed, "scores": scores} for scores in pooled.sigmoid()]


class Ending(nn.Module):
    """Features of 5 x 7 cells, and an output of any kind."""

    def __init__(self, kind):
        super().__init__()
        self.features, self.kind = features(), kind
        self.map, self.pooled, self.boxes = nn.Conv2d(6, 3, 1), nn.Linear(6, 4), Boxes()

    def forward(self, x):
        a = self.features(x)
        if self.kind == "region":
            return self.map(a)
        if self.kind == "out":
            return {"out": self.map(a), "aux": a}
        pooled = self.pooled(a.mean((2, 3)))
        if self.kind == "embedding":
            return pooled[:, None], pooled
        if self.kind == "number":
            return pooled[:, 0]
        return self.boxes(pooled)


@pytest.fixture
def ending():
    def make(kind, layer="features.1"):
        model = Ending(kind).double().eval()
        preprocessing = Preprocessing(size=SIZE, mean=MEAN, std=STD)
        return model, cut_classifier(model, layer, preprocessing=preprocessing)

    return make


X = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.double)


def by_hand(model, score):
    """Grad-CAM's map of a scalar of the activation, at the input's size."""
    a = model.features(X).detach().requires_grad_()
    (g,) = torch.autograd.grad(score(a), a)
    cells = torch.einsum("k,khw->hw", g[0].mean((1, 2)), a[0]).relu().detach()
    assert cells.any()
    return reference.upsample(reference.scale(cells.numpy()), SIZE)


REGION = torch.zeros(CELLS, dtype=torch.bool)
REGION[1:4, 2:6] = True
EMBEDDING = torch.tensor([0.5, -1.0, 2.0, 0.1])


@pytest.mark.parametrize("kind", ["region", "out"])
def test_a_region_of_a_segmentation(ending, kind):
    model, f = ending(kind)
    found = attribution_map(f, X, region_target(1, REGION), "gradcam")

    def score(a):
        logits = model.map(a)[0, 1]
        cells = [logits[i, j] for i in range(5) for j in range(7) if REGION[i, j]]
        return sum(cells) / len(cells)

    assert_near(found[0], by_hand(model, score))
    if kind == "region":
        theirs = [SemanticSegmentationTarget(1, REGION.numpy())]
        expected = on_cells(pytorch_grad_cam.GradCAM, model, "features.1", X, theirs)
        assert_near(found, expected, 1e-5)


def test_a_similarity_of_embeddings(ending):
    model, f = ending("embedding")
    target = similarity_target(EMBEDDING)
    found = attribution_map(f, X, lambda output: target(output[1]), "gradcam")

    def score(a):
        e = model.pooled(a.mean((2, 3)))[0]
        return (e * EMBEDDING).sum() / (e.square().sum() * EMBEDDING.square().sum()).sqrt()

    assert_near(found[0], by_hand(model, score), 1e-7)


def test_a_number_of_a_regression(ending):
    model, f = ending("number")
    found = attribution_map(f, X, output_target(), "gradcam")
    assert_near(found[0], by_hand(model, lambda a: model.pooled(a.mean((2, 3)))[0, 0]))
    s = small("mlp", 1)
    assert_near(
        attribution_map(s.f, s.x, output_target(C), "layercam"),
        attribution_map(s.f, s.x, torch.full((3,), C), "layercam"),
    )


@pytest.mark.parametrize(
    ("box", "label", "place"),
    [((1, 1, 9, 9), None, 1), ((0, 0, 7, 8), 2, 2), ((21, 11, 28, 20), 1, 3)],
)
def test_the_score_of_a_detected_box(ending, box, label, place):
    model, f = ending("boxes")
    found = attribution_map(f, X, box_target(box, label), "gradcam")
    expected = by_hand(model, lambda a: model.pooled(a.mean((2, 3)))[0, place].sigmoid())
    assert_near(found[0], expected)
    [explained] = explain(f, X, ["gradcam"], target=box_target(box, label), settings=Search())
    assert explained.probability == pytest.approx(float(f(X)[0]["scores"][place]), rel=1e-6)


def test_no_box_is_no_map(ending):
    _, f = ending("boxes")
    for target in (box_target((10, 15, 12, 18)), box_target((0, 0, 8, 8), 7)):
        [found] = explain(f, X, ["gradcam"], target=target)
        assert found.probability == 0 and not found.attribution.any()
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}]
    assert box_target((0, 0, 1, 1))(empty).tolist() == [0]


@pytest.mark.parametrize("seed", range(3))
def test_overlap_is_intersection_over_union(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 12, (20, 2, 2), generator=generator).sort(1).values.flatten(1).double()
    box = torch.tensor([3.0, 2.0, 9.0, 10.0], dtype=torch.double)
    for found, other in zip(overlap(boxes, box).tolist(), boxes.tolist(), strict=True):
        cells = [
            {(i, j) for i in range(int(b[0]), int(b[2])) for j in range(int(b[1]), int(b[3]))}
            for b in (other, box.tolist())
        ]
        assert found == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))


def test_an_output_without_classes_is_explained_by_a_target_only(ending):
    _, f = ending("out")
    for ask in (
        lambda: attribution_map(f, X, 0, "gradcam"),
        lambda: explain(f, X, ["gradcam"]),
        lambda: explain(f, X, ["gradcam"], 1),
    ):
        with pytest.raises(AftError, match="no logits of shape.*explain a target"):
            ask()


# Thresholds, several layers


@pytest.mark.parametrize("fuse", ["max", "product"])
def test_a_probability_is_searched_as_a_classs_is(fuse):
    s = small("mlp", 5)
    preprocessing = Preprocessing(size=SIZE, mean=MEAN, std=STD)
    shallow = cut_classifier(s.model, "conv1+bn1+relu1", preprocessing=preprocessing)
    layers, x = (s.f, shallow), s.x[:1]
    how = {"settings": Search(), "shaping": Shaping(fuse=fuse)}
    [found] = explain(layers, x, ["gradcam"], target=probability, **how)
    maps = [with_target(f, probability) for f in layers]
    assert_near(found.attribution, attribution_map(maps, x, 0, "gradcam", fuse=fuse)[0])
    expected = fine_tune_threshold(s.f, x, found.attribution[None], C)
    assert found.tft.tau == expected.tau
    assert_near(found.tft.probabilities, expected.probabilities, 1e-6)  # of float32
    assert found.probability == pytest.approx(float(s.f(x).softmax(1)[0, C]))


def test_a_score_beyond_probabilities_is_searched_for_no_threshold():
    s = small("mlp", 5)
    x, target = s.x[:1], lambda output: 3 + output[:, C]
    with pytest.raises(AftError, match=r"needs scores in \[0, 1\], and Sequential gives"):
        explain(s.f, x, ["gradcam"], target=target, settings=Search())
    one = Search(thresholds=(0.4,))
    [cut] = explain(s.f, x, ["gradcam"], target=target, settings=one, fixed=True)
    assert cut.fixed.mask.any() and cut.probability == pytest.approx(float(3 + s.f(x)[0, C]))


# What is refused


def test_targets_that_are_none():
    s = small("linear", 0)
    for target, message in (
        (lambda output: output, r"gives \(3, 5\) for 3 images"),
        (lambda output: output[:1, :2].sum(1)[:0], r"gives \(0,\) for 3 images"),
        (lambda output: output[:, 0].tolist(), "gives list; it must return a tensor"),
        (lambda output: output.argmax(1), "gives torch.int64"),
        (lambda output: output[:, 0].detach(), "gives a score without a gradient"),
        (lambda output: output.logits, r"fails on the output, a Tensor of shape \(3, 5\)"),
    ):
        with pytest.raises(AftError, match=f"target target {message}"):
            attribution_map(s.f, s.x, target, "gradcam")
    with pytest.raises(AftError, match="a target is a function of the output, got str"):
        with_target(s.f, "logit")
    with pytest.raises(AftError, match="leave targets and top_k out"):
        explain(s.f, s.x[:1], ["gradcam"], 0, target=logit)
    with pytest.raises(AftError, match="a region of shape .2, 2. with 4 pixels"):
        attribution_map(s.f, s.x, region_target(0, torch.ones(2, 2, dtype=torch.bool)), "gradcam")


@pytest.mark.parametrize("method", [name for name in METHODS if not takes_target(name)])
def test_methods_of_classes_take_no_target(method):
    s = small("linear", 0)
    with pytest.raises(AftError, match="explains classes only, not a target; take one of gradcam"):
        attribution_map(s.f, s.x, logit, method)
    assert not fits(with_target(s.f, logit), method) and fits(s.f, method)


def test_the_network_itself_keeps_its_classes():
    s = small("linear", 0)
    before = attribution_map(s.f, s.x, s.class_index, "ablationcam")
    g = with_target(s.f, logit)
    assert g.classes.names == ("logit",) and len(s.f.classes) == 5
    assert g(s.x).shape == (3, 1) and torch.equal(g(s.x)[:, 0], s.f(s.x)[:, C])
    assert s.f.linear_head is not None and g.linear_head is None
    assert torch.equal(attribution_map(s.f, s.x, s.class_index, "ablationcam"), before)


# The command line

CODE = """
def warm(output):
    return output.softmax(1)[:, :2].sum(1)

def raw(output):
    return output[:, 0] - output[:, 1]

WORD = "none"
"""


@pytest.fixture
def f(tmp_path, monkeypatch):
    """A folder with a picture and a file of targets; the commands' classifier."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (44, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    for name in ("mine.py", "other/mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CODE)
    small = small_float()
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: small)
    return small


def objects(*arguments):
    done = aft(*arguments, "--save", "map", "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


@pytest.mark.parametrize("command", ["explain", "tft"])
def test_a_function_of_a_file_is_explained(f, command):
    options = ("--target-fn", "mine.py:warm", "--cam", "gradcam")
    [found] = objects(command, "a.png", *options, *(["--tft"] if command == "explain" else []))
    from aftcli.data.images import read_image, to_input

    x = to_input(read_image("a.png"), f.preprocessing)
    expected = attribution_map(f, x, lambda y: y.softmax(1)[:, :2].sum(1), "gradcam")
    assert_near(np.load(found["outputs"]["map"])[None], expected, 1e-5)
    assert found["class_name"] == found["target"] == "warm"
    assert found["probability"] == pytest.approx(float(f(x).softmax(1)[0, :2].sum()), rel=1e-5)
    assert 0 <= found["tft"]["probability"] <= 1
    head, *_ = aft("explain", "a.png", *options).out.splitlines()
    assert head.split() == ["image", "cam", "class", "score"]


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_results_name_a_last_step_that_is_no_softmax(f, output):
    f.output = output
    [found] = objects("explain", "a.png")
    assert found.get("output", "softmax") == output
    assert ("output" in found) == (output != "softmax")


def test_targets_have_files_of_their_own(f):
    targets = ("mine.py:warm", "mine.py:raw", "other/mine.py:warm")
    maps = {objects("explain", "a.png", "--target-fn", t)[0]["outputs"]["map"] for t in targets}
    assert len(maps) == len(targets)


def test_functions_that_can_not_be_loaded_are_named(f, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    for text, message in (
        ("mine", "'mine' names no function in a file; write FILE.py:NAME"),
        ("gone.py:warm", "gone.py: there is no such file"),
        ("mine.py:cold", "mine.py: has no function 'cold'; there are warm, raw"),
        ("mine.py:WORD", "mine.py: has no function 'WORD'"),
        ("broken.py:warm", "broken.py: can't be run (division by zero)"),
    ):
        done = aft("explain", "a.png", "--target-fn", text)
        assert done.code == 1 and message in done.err and done.err.count("\n") == 1
    options = ("explain", "a.png", "--target-fn", "mine.py:warm")
    for more in (("--target", "pear"), ("--top-k", "2")):
        assert "exclude each other" in usage_error(aft(*options, *more))
    assert "leave --precision out" in usage_error(aft(*options, "--precision", "bf16"))
    refused = usage_error(aft(*options, "--engine", "torch"))
    assert refused.endswith("--engine has no effect with --target-fn")


@pytest.mark.parametrize("command", ["explain", "tft"])
def test_a_network_without_classes_needs_a_target(f, ending, monkeypatch, command):
    _, without = ending("out")
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: without)
    wrong = aft(command, "a.png")
    assert wrong.code == 1 and "returns no logits of shape (N, C)" in wrong.err
    assert "explain a target" in wrong.err and "--target-fn FILE.py:NAME" in wrong.err
