"""Inputs and classes that callers give: taken where their meaning is plain, refused otherwise."""

import numpy as np
import pytest
import torch
from torch import nn

from aftcli.aft.loss import Batch, Outputs, Recipe, aft_loss
from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.errors import AftError
from aftcli.settings import Search
from aftcli.tft.explain import explain, explain_map
from aftcli.tft.search import fine_tune_threshold, tune_batch
from tests.helpers.small import CLASSES, SIZE, small, small_model

SETTINGS = Search((0.2, 0.5))


def given_maps(count=1):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *SIZE, dtype=torch.float64, generator=generator)


# What a caller calls with (classifier, inputs, classes).
CALLS = {
    "attribution_map": lambda f, x, c: attribution_map(f, x, c, "gradcam"),
    "fine_tune_threshold": lambda f, x, c: fine_tune_threshold(f, x, given_maps(len(x)), c).rpi,
    "explain": lambda f, x, c: explain(f, x, ["gradcam"], c)[0].attribution[None],
    "explain_map": lambda f, x, c: explain_map(f, x, given_maps(), c, 1, SETTINGS)[0].tft.rpi,
}


@pytest.mark.parametrize("call", ["attribution_map", "fine_tune_threshold"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_image_of_a_batch_needs_one_class(call, count):
    s = small("linear")
    with pytest.raises(AftError, match=r"class_index must have shape \(3,\), one class for each"):
        CALLS[call](s.f, s.x, torch.ones(count, dtype=torch.long))


@pytest.mark.parametrize("call", CALLS)
def test_a_plain_number_is_the_class_of_one_image(call):
    s = small("linear")
    found = CALLS[call](s.f, s.x[:1], 3)
    assert torch.equal(found, CALLS[call](s.f, s.x[:1], torch.tensor([3])))
    assert torch.equal(found, CALLS[call](s.f, s.x[:1], torch.tensor([3], dtype=torch.uint8)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([-1], "class -1 is out of range: the classes of Sequential are 0..4"),
        ([CLASSES], "class 5 is out of range"),
        ([1.0], "must be integers, got torch.float32"),
        ([True], "must be integers, got torch.bool"),
        (["cat"], "must be integers, got list"),
    ],
)
def test_what_is_no_class_is_refused(call, wrong, message):
    s = small("linear")
    with pytest.raises(AftError, match=message):
        CALLS[call](s.f, s.x[:1], wrong)


@pytest.mark.parametrize("call", CALLS)
def test_inputs_of_another_form_are_refused(call):
    s = small("linear")
    with pytest.raises(AftError, match=r"got \(3, 20, 28\); for one image pass x\[None\]"):
        CALLS[call](s.f, s.x[0], [1])
    with pytest.raises(AftError, match="x must be a tensor of shape .*, got list"):
        CALLS[call](s.f, s.x.tolist(), [1])


@pytest.mark.parametrize("call", ["attribution_map", "explain"])
def test_inputs_of_another_type_or_colour_are_refused(call):
    s = small("linear")
    with pytest.raises(AftError, match="it has torch.float32 instead of torch.float64; to_input"):
        CALLS[call](s.f, s.x[:1].float(), [1])
    with pytest.raises(AftError, match="it has 1 channels instead of 3 channels"):
        CALLS[call](s.f, s.x[:1, :1], [1])


def test_explain_takes_one_image_and_no_more_classes_than_there_are():
    s = small("linear")
    with pytest.raises(AftError, match="x must hold 1 image, got 3"):
        explain(s.f, s.x, ["gradcam"])
    with pytest.raises(AftError, match=r"top_k must lie in 1..5, the classes of Sequential; got 6"):
        explain(s.f, s.x[:1], ["gradcam"], top_k=6)


def one_output():
    """A network whose only output is a logit, and the same with a row of zeros before it."""
    model, two = small_model("linear", 0), small_model("linear", 0)
    model.fc, two.fc = nn.Linear(8, 1).double(), nn.Linear(8, 2).double()
    with torch.no_grad():
        two.fc.weight.copy_(torch.cat([torch.zeros(1, 8), model.fc.weight]))
        two.fc.bias.copy_(torch.cat([torch.zeros(1), model.fc.bias]))
    own = {"preprocessing": Preprocessing(size=SIZE), "note": lambda text: None}
    return [cut_classifier(m, "conv2+bn2+relu2", **own) for m in (model, two)]


def tune_without_masks(f, x):
    out = Outputs(f(x))
    return aft_loss(out, Batch((x,), torch.tensor([1])), Recipe(lam=None), f.output).total


@pytest.mark.parametrize(
    ("call", "factor"),
    [
        (lambda f, x: torch.tensor(explain(f, x, ["gradcam"], 1)[0].probability), 1),
        (lambda f, x: explain_map(f, x, given_maps(), 1, 1, SETTINGS)[0].tft.rpi, 1),
        (lambda f, x: fine_tune_threshold(f, x, given_maps(), 0).probabilities, 1),
        (lambda f, x: tune_batch(f, x, ["eigencam"], SETTINGS)[0].tft.rpi, 1),
        (lambda f, x: attribution_map(f, x, 1, "gradcam"), 1),
        (lambda f, x: attribution_map(f, x, 0, "rise"), 1),
        (lambda f, x: attribution_map(f, x, 1, "lime"), 1),
        (lambda f, x: attribution_map(f, x, 1, "omcam"), 1),
        # Two coins instead of one.
        (tune_without_masks, 2),
    ],
)
def test_the_only_output_has_its_sigmoid_for_probability(call, factor):
    f, two = one_output()
    x = small("linear").x[:1]
    # Of probabilities in float32, whose rounding RPI divides by a probability.
    assert (call(f, x) - factor * call(two, x)).abs().max() < 1e-6


@pytest.mark.parametrize("call", CALLS)
def test_numbers_of_numpy_and_tensors_are_classes(call):
    s = small("linear")
    wanted = CALLS[call](s.f, s.x[:1], 3)
    for given in (np.int64(3), np.array([3]), torch.tensor(3), [np.int32(3)], (3,)):
        assert torch.equal(CALLS[call](s.f, s.x[:1], given), wanted)


@pytest.mark.parametrize("call", ["attribution_map", "fine_tune_threshold"])
def test_one_truth_among_numbers_is_no_class(call):
    s = small("linear")
    for truth in (True, np.bool_(True)):
        with pytest.raises(AftError, match="class_index must be integers, got torch.bool"):
            CALLS[call](s.f, s.x[:2], [truth, 2])
    with pytest.raises(AftError, match="class_index must be integers"):
        CALLS[call](s.f, s.x[:1], 2**70)
    with pytest.raises(AftError, match=r"class_index must have shape \(2,\)"):
        CALLS[call](s.f, s.x[:2], 3)
