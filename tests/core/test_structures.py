"""Networks that return more than logits: tuples, dictionaries, objects of tensors."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.cutting.outputs import at_path, find_output
from aftcli.errors import AftError

PREPROCESSING = Preprocessing(size=(32, 32), resize=36)

Pair = namedtuple("Pair", "logits embedding")


@dataclass
class Record:
    logits: Tensor
    embedding: Tensor


# What a network makes of its logits, (N, 3), and features, (N, 8), and where the logits are.
STRUCTURES = {
    "tuple": (lambda logits, features: (logits, features), "0"),
    "list": (lambda logits, features: [logits, [features]], "0"),
    "logits second": (lambda logits, features: {"features": features, "logits": logits}, "logits"),
    "named tuple": (lambda logits, features: Pair(logits, features), "logits"),
    "dataclass": (lambda logits, features: Record(logits, features), "logits"),
    "nested": (lambda logits, features: {"out": (logits, features), "loss": None}, "out.0"),
    "others are no candidates": (lambda logits, features: (features[:, :, None], logits), "1"),
}


class Body(nn.Module):
    """Returns a structure of what it computes."""

    def __init__(self, structure):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.relu = nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(8, 3)
        self.structure = structure

    def forward(self, x):
        features = self.pool(self.relu(self.conv(x)))
        return self.structure(self.last(features), features)


class Wrapped(nn.Module):
    """Returns what its last part returns: the structure is no part of the outer graph."""

    def __init__(self, structure):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.relu = nn.ReLU()
        self.end = End(structure)

    def forward(self, x):
        return self.end(self.relu(self.conv(x)))


class End(nn.Module):
    def __init__(self, structure):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(8, 3)
        self.structure = structure

    def forward(self, a):
        features = self.pool(a)
        return self.structure(self.last(features), features)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0, 2])


def quiet(_):
    pass


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("kind", [Body, Wrapped])
def test_a_network_is_cut_as_one_that_returns_its_logits(kind, name):
    structure, key = STRUCTURES[name]
    x, c = inputs()
    plain = kind(lambda logits, features: logits).eval()
    expected = cut_classifier(plain, "conv+relu", preprocessing=PREPROCESSING)
    for asked in (None, key):
        f = cut_classifier(
            kind(structure), "conv+relu", preprocessing=PREPROCESSING, output_key=asked, note=quiet
        )
        assert f.output_key == (asked or "")
        assert torch.equal(f(x), plain(x))
        for method in ("gradcam", "ablationcam"):
            one, other = (attribution_map(g, x, c, method) for g in (f, expected))
            assert one.any() and torch.allclose(one, other, atol=1e-6)
    # Built in the graph, only the logits are left of it: the head is as fast as the plain one.
    if kind is Body and name != "nested":
        assert f.linear_head and f.linear_head.is_last and f.linear_head.is_mean


def test_another_output_is_taken_by_its_name():
    x, _ = inputs()
    model = Body(STRUCTURES["logits second"][0]).eval()
    f = cut_classifier(model, preprocessing=PREPROCESSING, output_key="features", note=pytest.fail)
    assert torch.equal(f(x), model(x)["features"]) and len(f.classes) == 8


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_was_picked_of_several_is_said(name):
    structure, key = STRUCTURES[name]
    notes = []
    cut_classifier(Body(structure), preprocessing=PREPROCESSING, note=notes.append)
    if name == "others are no candidates":
        assert notes == []
    else:
        assert len(notes) == 1 and f"{key} is taken for the logits, not " in notes[0]


def logits_of(out, key=None):
    """Return the logits in what a network returns."""
    return at_path(out, find_output(out, key).path)


@pytest.mark.parametrize("name", STRUCTURES)
def test_logits_are_found_in_values(name):
    logits, features = torch.rand(2, 3), torch.rand(2, 8)
    structure, key = STRUCTURES[name]
    made = structure(logits, features)
    assert logits_of(made, key) is logits
    if name == "others are no candidates":
        assert logits_of(made) is logits
    assert logits_of(logits) is logits
    assert logits_of(SimpleNamespace(aux=features[0], logits=logits)) is logits


def test_errors_name_what_there_is():
    logits, maps = torch.rand(2, 3), torch.rand(2, 3, 4, 4)
    with pytest.raises(AftError, match="unknown output 'logit' .* nearest: logits"):
        logits_of({"logits": logits}, "logit")
    with pytest.raises(AftError, match="nearest: none, it returns one tensor"):
        logits_of(logits, "logits")
    with pytest.raises(AftError, match=r"no logits of shape \(N, C\) .*out \(2, 3, 4, 4\)"):
        logits_of({"out": maps})
