"""Probabilities of outputs: softmax, sigmoid, or none (docs/method/decisions/network.md)."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aftcli.aft.jobs import Job
from aftcli.attributions.maps import attribution_map
from aftcli.core.cam import ablated_by_batches, ablated_scores, grad_cam
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import CAMS, METHODS
from aftcli.core.outputs import cross_entropy, divergence, log_probabilities, probabilities
from aftcli.core.zero_level import give_zero_level
from aftcli.engine.accelerate import accelerated
from aftcli.errors import AftError
from aftcli.models.checkpoint import checkpoint_of
from aftcli.tft.judges import Judge
from tests.helpers.compare import assert_near
from tests.helpers.small import SIZE, small, small_model

LAYER = "conv2+bn2+relu2"


class Written(nn.Module):
    """An end as people write it in forward, which no module's name tells."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(x)


# Outputs of the last linear layer, and what follows it.
ENDS = {
    "logits": (4, lambda y: y),
    "logarithms": (4, lambda y: y.log_softmax(1)),
    "softmax": (4, lambda y: y.softmax(1)),
    "softmax by hand": (4, lambda y: y.exp() / y.exp().sum(1, keepdim=True)),
    "sigmoid": (4, lambda y: y.sigmoid()),
    "one logit": (1, lambda y: y),
    "one logit, squeezed": (1, lambda y: y.squeeze()),
    "one logit, picked": (1, lambda y: y[:, 0]),
    "one probability": (1, lambda y: y.sigmoid()),
    "one probability, squeezed": (1, lambda y: torch.sigmoid(y).squeeze(1)),
}


def network(end, negated=False):
    """A small network in float64 with an end of ENDS; negated, its logits are."""
    count, last = ENDS[end]
    model = small_model("linear", 0)
    torch.manual_seed(1)
    model.fc = nn.Linear(8, count).double()
    if negated:
        with torch.no_grad():
            model.fc.weight.neg_()
            model.fc.bias.neg_()
    model.add_module("end", Written(last))
    return model.eval()


def cut(model, said=None, **options):
    note = (lambda text: None) if said is None else said.append
    return cut_classifier(
        model, LAYER, preprocessing=Preprocessing(size=SIZE), note=note, **options
    )


def inputs(count=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, *SIZE, dtype=torch.float64, generator=generator)


def expected(end, outputs):
    """The probabilities of each image, number by number."""
    rows = []
    for row in outputs.reshape(len(outputs), -1).tolist():
        if end in ("logits", "logarithms"):
            total = sum(math.exp(y) for y in row)
            rows.append([math.exp(y) / total for y in row])
        elif end.startswith("one logit"):
            p = 1 / (1 + math.exp(-row[0]))
            rows.append([1 - p, p])
        elif end.startswith("one"):
            rows.append([1 - row[0], row[0]])
        else:
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("end", ENDS)
def test_probabilities_are_those_of_the_networks_end(end):
    model, said = network(end), []
    f, x = cut(model, said), inputs()
    with torch.no_grad():
        outputs, found = model(x), f.probabilities(f(x))
    assert_near(found, expected(end, outputs), 1e-12)
    assert_near(found.log(), log_probabilities(f(x), f.output), 1e-12)
    single = end.startswith("one")
    assert (f.single, len(f.classes)) == (single, 2 if single else 4)
    assert list(f.weights()) == list(model.state_dict())
    one, already = "its only output is taken for the logit of class 1", "are probabilities already"
    known = {"softmax": "", "sigmoid": one, "none": already}
    assert len(said) == (f.output != "softmax")
    assert all(known[f.output] in text and text.startswith("Sequential: ") for text in said)


@pytest.mark.parametrize("end", [end for end in ENDS if end.startswith("one logit")])
def test_the_columns_of_one_logit_are_its_bits(end):
    model, x = network(end), inputs()
    f = cut(model)
    with torch.no_grad():
        y, columns = model(x).reshape(-1), f(x)
        assert torch.equal(columns[:, 1], y) and torch.equal(columns[:, 0], -y)
        assert torch.equal(f.probabilities(columns)[:, 1], y.sigmoid())
    copied = copy.deepcopy(f)
    assert copied.single and torch.equal(copied(x), columns)
    assert torch.equal(f(x[:1]), columns[:1])


@pytest.mark.parametrize("end", ["one logit", "one logit, squeezed", "one probability"])
@pytest.mark.parametrize(
    "method",
    [*CAMS, "relevancecam", "lrp", "lrp-epsilon", "clrp", "guidedbackprop", "integratedgradients"],
)
def test_the_negative_class_has_the_map_of_the_negated_network(end, method):
    if method not in CAMS:
        pytest.importorskip("zennit")
        pytest.importorskip("captum")
    if method == "cam" and end == "one probability":
        return
    x = inputs(2)
    f, negated = cut(network(end)), cut(network(end, negated=True))
    for own, other in ((0, 1), (1, 0)):
        found = attribution_map(f, x, [own] * 2, method)
        assert_near(found, attribution_map(negated, x, [other] * 2, method))
    if method in ("cam", "gradcam", "lrp", "relevancecam"):
        # None of both is the other one, or empty.
        both = [attribution_map(f, x, [c] * 2, method) for c in (0, 1)]
        assert all(each.max() > 0 for each in both) and (both[0] - both[1]).abs().max() > 0.1


def test_cam_and_ablation_know_the_weights_of_both_classes():
    f, x = cut(network("one logit, picked")), inputs(2)
    weight, bias = f.head.fc.weight[0], f.head.fc.bias[0]
    a = f.activation(x)
    mean = a.mean((2, 3))
    for c, sign in ((0, -1), (1, 1)):
        index = torch.tensor([c, c])
        by_hand = (sign * weight[None, :, None, None] * a).sum(1).relu()
        assert_near(METHODS["cam"].load()(f, a, index, x), by_hand)
        scores = ablated_scores(f, a, index)
        for n in range(2):
            for k in range(a.shape[1]):
                y = sign * ((weight * mean[n]).sum() - weight[k] * mean[n, k] + bias)
                assert abs(scores[n, k].item() - y.item()) < 1e-9
        assert_near(scores, ablated_by_batches(f, a, index))


def test_names_of_both_classes():
    assert cut(network("one logit")).classes.names == ("class 0", "class 1")
    one = cut(network("one logit"), classes=Classes(("cat",)))
    assert one.classes.names == ("not cat", "cat")
    two = cut(network("one logit"), classes=Classes(("dog", "cat")))
    assert two.classes.names == ("dog", "cat")
    with pytest.raises(AftError, match="3 class names for a model with 2 classes"):
        cut(network("one logit"), classes=Classes(("a", "b", "c")))


@pytest.mark.parametrize(
    ("end", "output", "message"),
    [
        ("one logit", "softmax", "the softmax of one output is 1 for every image"),
        ("logits", "none", "--output none needs probabilities, but the outputs range from -"),
        ("one logit", "none", "--output none needs probabilities, but the outputs range from -"),
        ("logits", "sigmoids", "unknown output 'sigmoids'; nearest: sigmoid"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(end, output, message):
    model = network(end)
    with torch.no_grad():
        model.fc.bias -= 9
    with pytest.raises(AftError, match=message):
        cut(model, output=output)


def test_a_softmax_or_a_mean_over_one_output_is_refused():
    model = network("one logit")
    model.end = nn.Softmax(1)
    with pytest.raises(AftError, match="comes out of a softmax, so it is 1 for every image"):
        cut(model)
    model.end = Written(lambda y: y.mean())
    with pytest.raises(AftError, match="one number for 3 images, not one for each"):
        cut(model)


def test_what_is_asked_for_is_taken_and_a_second_sigmoid_is_said():
    said, x = [], inputs()
    multi = cut(network("logits"), said, output="sigmoid")
    with torch.no_grad():
        found, y = multi.probabilities(multi(x)), multi(x)
    assert not said
    for row, scores in zip(found.tolist(), y.tolist(), strict=True):
        assert_near(row, [1 / (1 + math.exp(-score)) for score in scores], 1e-12)
    assert cut(network("sigmoid"), said, output="softmax").output == "softmax"
    (text,) = said
    assert "are probabilities already; --output softmax applies softmax to them" in text


def test_scores_that_lie_in_0_and_1_by_chance_are_scores():
    model = network("logits")
    model.end = Written(lambda y: 0.5 + 0.1 * y.tanh())
    said = []
    assert (cut(model, said).output, said) == ("softmax", [])


def coin(p, q):
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "none", "coins"])
def test_losses_are_those_of_the_probabilities(output):
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    labels = torch.tensor([2, 0, 3])
    if output == "none":
        logits, teacher = logits.softmax(1), teacher.softmax(1)
    elif output == "coins":
        output, logits, teacher = "none", logits.sigmoid(), teacher.sigmoid()
    p, q = probabilities(logits, output).tolist(), probabilities(teacher, output).tolist()
    excluding = abs(sum(p[0]) - 1) < 1e-9
    entropy = distance = 0.0
    for own, other, label in zip(p, q, labels.tolist(), strict=True):
        entropy -= math.log(own[label])
        if excluding:
            distance += sum(b * math.log(b / a) for a, b in zip(own, other, strict=True))
        else:
            entropy -= sum(math.log(1 - a) for j, a in enumerate(own) if j != label)
            distance += sum(coin(a, b) for a, b in zip(own, other, strict=True))
    assert abs(cross_entropy(logits, labels, output).item() - entropy / 3) < 1e-9
    assert abs(divergence(logits, teacher, output).item() - distance / 3) < 1e-9
    assert divergence(teacher, teacher, output).item() == 0


def test_a_certain_probability_has_finite_losses():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for labels in ([0, 1], [1, 0]):
        assert cross_entropy(p, torch.tensor(labels), "none").isfinite()
    assert divergence(p, p.flip(1), "none").isfinite()


def test_softmax_alone_has_a_zero_level():
    s = small("linear")
    assert "no sign" in Job(s.f, None, cam="gradcam++").no_zero_level
    assert Job(s.f, None, cam="gradcam").no_zero_level == ""
    f = cut(network("one logit"))
    why = "the network's output is sigmoid, and only softmax does not see a term that all logits"
    assert Job(f, None, cam="gradcam").no_zero_level.startswith(why)
    with pytest.raises(AftError, match=why):
        give_zero_level(f, torch.tensor(0.1))


def test_engines_and_checkpoints_keep_the_output():
    f, x = cut(network("one logit")).float(), inputs().float()
    with torch.no_grad():
        fast = accelerated(f, "torch")
        assert (fast.output, fast.single) == ("sigmoid", True)
        assert_near(fast(x), f(x), 1e-4)
    tensors, metadata = checkpoint_of(f, None, {})
    assert "end" not in str(list(tensors)) and '"outputs": 1' in metadata["aft"]
    assert '"output": "sigmoid"' in metadata["aft"]


def test_a_judge_has_the_probabilities_of_its_own_output():
    f, x = cut(network("logits")), inputs()
    outputs = ("sigmoid", "softmax")
    judges = [Judge("other", cut(network("logits"), output=output)) for output in outputs]
    assert judges[0].key(f) != judges[1].key(f)
    with torch.no_grad():
        y = f(x)
        assert_near(judges[0].probabilities(f, x), 1 / (1 + (-y).exp()), 1e-6)
        assert_near(judges[1].probabilities(f, x), y.exp() / y.exp().sum(1, keepdim=True), 1e-6)


class Branching(nn.Module):
    """A network that torch.fx can't follow."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y if float(y.detach().sum()) < 1e9 else -y


class Bypassed(nn.Module):
    """A network with a path past its second layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, 2, 1).double()
        self.second = nn.Conv2d(8, 8, 3, 1, 1).double()
        self.fc = nn.Linear(8, 1).double()

    def forward(self, x):
        a = self.first(x).relu()
        return self.fc((self.second(a).relu() + a).mean((2, 3))).squeeze(1)


@pytest.mark.parametrize("end", ["one logit, squeezed", "one probability"])
def test_one_output_of_a_network_that_fx_cannot_follow(end):
    model, said = Branching(network(end)).eval(), []
    own = {"preprocessing": Preprocessing(size=SIZE), "note": said.append}
    f, x = cut_classifier(model, "inner.relu2", **own), inputs()
    assert any("running it twice" in text for text in said) and f.single
    with torch.no_grad():
        assert_near(f.probabilities(f(x)), expected(end, model(x)), 1e-12)
    assert set(model.state_dict()) <= set(f.weights())
    plain = cut(network(end))
    for c in (0, 1):
        found = attribution_map(copy.deepcopy(f), x, [c] * 3, "gradcam")
        assert_near(found, attribution_map(plain, x, [c] * 3, "gradcam"))


def test_one_output_behind_a_path_past_the_layer():
    model = Bypassed().eval()
    own = {"preprocessing": Preprocessing(size=SIZE), "note": lambda text: None}
    f, x = cut_classifier(model, "second", **own), inputs()
    assert f.bypassed and f.single and set(f.weights()) == set(model.state_dict())
    with torch.no_grad():
        y = model(x)
        assert torch.equal(f(x), torch.stack([-y, y], 1))
        g, a = f.at(x)
        assert_near(g.head(a), torch.stack([-y, y], 1), 1e-12)
    weight = model.fc.weight[0]
    for c, sign in ((0, -1), (1, 1)):
        gradient = sign * weight[None, :, None, None] * (a > 0)
        by_hand = (gradient.mean((2, 3), keepdim=True) * a).sum(1).relu()

        assert_near(grad_cam(g, a, torch.full((3,), c), x), by_hand / a[0, 0].numel())


class Unfit(nn.Module):
    """A network whose output is changed, of inputs x and logits y, to one that is no good."""

    def __init__(self, change):
        super().__init__()
        self.network, self.change = small_model("linear", 0), change

    def forward(self, x):
        return self.change(x, self.network(x))


UNFIT = {
    "returns NaN": lambda x, y: y * math.nan,
    "returns infinity": lambda x, y: y / 0,
    "int64 numbers": lambda x, y: (100 * y).long(),
    "complex64 numbers": lambda x, y: y.to(torch.complex64),
    "returns None": lambda x, y: None,
    "returns 'cat'": lambda x, y: "cat",
    "a row for each": lambda x, y: y.mean(0, keepdim=True),
    "not two at once": lambda x, y: y.view(1, 5),
    "different values each time": lambda x, y: F.dropout(y, training=True),
}


@pytest.mark.parametrize("why", UNFIT)
@pytest.mark.parametrize("inside", [False, True])
def test_an_output_that_is_no_good_is_refused_with_the_reason(why, inside):
    def change(x, y):
        y = UNFIT[why](x, y)
        return {"logits": y} if inside and isinstance(y, torch.Tensor) else y

    preprocessing = Preprocessing(size=SIZE)
    with pytest.raises(AftError, match=why):
        cut_classifier(Unfit(change), preprocessing=preprocessing, note=lambda _: None)


def test_images_that_depend_on_each_other_are_said():
    notes = []
    mixing = Unfit(lambda x, y: y - y.mean() + len(x))
    cut_classifier(mixing, preprocessing=Preprocessing(size=SIZE), note=notes.append)
    assert "depends on the other images of the batch" in notes[0]
