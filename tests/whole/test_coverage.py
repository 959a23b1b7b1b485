"""The benchmark coverage finds what is wrong: layers, layouts, probabilities, maps."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import pages
from benchmarks.coverage import catalogue, coverage
from benchmarks.coverage.checking import sigmoid
from benchmarks.coverage.judging import (
    Verdict,
    as_cells,
    judged,
    later_mixing,
    misplaced,
    turned,
)
from benchmarks.coverage.users import NETWORKS, checked
from benchmarks.coverage.users.cnn import C, Net
from benchmarks.coverage.users.tokens import Vit

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def quiet(model):
    return model.eval().requires_grad_(False)


def built(name):
    torch.manual_seed(0)
    return quiet(NETWORKS[name].build())


@pytest.mark.parametrize(
    ("layer", "shape", "found"),
    [
        ("features.5", (12, 8, 8), ""),
        ("features.3+features.4+features.5", (12, 8, 8), ""),
        ("features.3", (12, 8, 8), ""),
        ("features.2", (8, 16, 16), "features.3 mixes cells behind it"),
    ],
)
def test_a_convolution_behind_the_layer_is_found(layer, shape, found):
    assert later_mixing(built("plain"), layer, X, shape) == found


def test_a_convolution_of_single_cells_behind_the_layer_is_found():
    model = built("plain")
    model.features.append(nn.Conv2d(12, 12, 1))
    found = later_mixing(quiet(model), "features.5", X, (12, 8, 8))
    assert found == "features.6 changes cells behind it"


@pytest.mark.parametrize(
    ("name", "layer", "found"),
    [
        ("vit", "blocks.1.norm1", ""),
        ("vit", "blocks.0", ""),
        ("vit", "blocks.0.norm1", "blocks.1.mlp.0 mixes cells behind it"),
        ("vit", "patch_embed", "blocks.1.mlp.0 mixes cells behind it"),
        ("vit_mean", "blocks.1.norm1", ""),
        ("vit_mean", "blocks.1", ""),
        ("vit_mean", "blocks.0", "blocks.1.mlp.2 mixes cells behind it"),
        ("mixer", "patch_embed", "blocks.1.mlp.2 mixes cells behind it"),
    ],
)
def test_attention_behind_the_layer_is_found(name, layer, found):
    assert later_mixing(built(name), layer, X, (16, 4, 4)).split(" ")[1:] == (found.split(" ")[1:])


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ((0, 1, 2, 3), ""),
        ((0, 2, 3, 1), "dimension 2 of A is not the rows of the image"),
        ((0, 1, 3, 2), "dimension 2 of A is not the rows of the image"),
        ((0, 2, 1, 3), "dimension 2 of A is not the rows of the image"),
    ],
)
def test_dimensions_that_are_not_the_images_are_found(order, found):
    features = built("plain").features
    assert turned(SimpleNamespace(activation=lambda x: features(x).permute(order)), X) == found


def test_an_activation_without_cells_is_found():
    features = built("plain").features
    flat = SimpleNamespace(activation=lambda x: features(x).mean((2, 3)))
    assert misplaced(flat, X) == "A has no cells: its shape is (12,)"


def test_tokens_become_cells_in_the_order_of_rows():
    tokens = torch.randn(2, 7, 4)
    cells = as_cells(tokens, (4, 2, 3))
    for n in range(2):
        for k in range(4):
            for i in range(2):
                for j in range(3):
                    assert cells[n, k, i, j] == tokens[n, 1 + 3 * i + j, k]
    last = torch.randn(2, 2, 3, 4)
    assert torch.equal(as_cells(last, (4, 2, 3)), last.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="no cells"):
        as_cells(tokens, (5, 2, 3))


def test_a_plain_network_is_judged_right():
    verdict = judged("plain", built("plain"), (32, 32))
    assert (verdict.result, verdict.shape) == ("right", (12, 8, 8))
    assert verdict.difference < 1e-5


@pytest.mark.parametrize(
    ("finding", "result"),
    [
        ({"refused": "a reason"}, "refused"),
        ({"crashed": "an error"}, "crash"),
        ({"equal": False}, "logits differ"),
        ({"silent": "a reason"}, "silent"),
        ({"difference": 0.1}, "map differs"),
        ({"other": "layer3"}, "two layers"),
        ({"difference": 0.1, "name": "densenet121"}, "right"),
        ({"difference": 1e-6}, "right"),
        ({}, "right"),
    ],
)
def test_a_verdict_is_one_word(finding, result):
    assert Verdict(**{"name": "net", "layer": "l", "equal": True, **finding}).result == result


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"probabilities": sigmoid}, "probabilities"),
        ({"layers": ("features.2",)}, "is the output of none of features.2"),
        ({"layers": ()}, "it is cut, where a reason"),
        ({"y": lambda y: -y}, "probabilities"),
        ({"y": lambda y: y[:, :3]}, "3 classes, 4 are found"),
        ({"y": lambda y: y[:, [0, 0, 0, 0]], "probabilities": lambda y: y}, "probabilities"),
    ],
)
def test_a_users_network_that_is_not_right_is_wrong(changed, why):
    outcome = checked(replace(NETWORKS["plain"], **changed))
    assert outcome.result == "wrong"
    assert why in outcome.why


def test_a_wrong_map_is_wrong():
    class Other(Net):
        def forward(self, x):
            x = self.features(x)
            # The same logits, and gradients of other channels.
            return self.head(x.detach()) + (x - x.detach())[:, :C].mean((2, 3))

    torch.manual_seed(0)
    model = Net().eval()
    plain = Other().eval()
    plain.load_state_dict(model.state_dict())
    outcome = checked(replace(NETWORKS["plain"], build=lambda: model, plain=lambda _: plain))
    assert outcome.result == "wrong"
    assert outcome.why.startswith("the map of class 0 differs by")


def test_a_refusal_and_a_crash_are_told_apart():
    refused = checked(replace(NETWORKS["no_convolution"], layers=("1",)))
    assert refused.result == "refused"

    class Broken(Vit):
        def forward(self, x):
            raise KeyError("broken")

    assert checked(replace(NETWORKS["plain"], build=Broken)).result in ("refused", "crash")


def test_222_published_networks_are_named_once():
    names = catalogue.names()
    assert len(names) == len(set(names)) == 222
    assert sum(name.startswith("timm:") for name in names) == 142


def test_the_page_has_each_network():
    assert list(coverage.results("networks")) == catalogue.names()
    assert list(coverage.results("users")) == list(NETWORKS)


def test_what_was_right_must_stay_so():
    row = coverage.Row("net", (), "refused", "a reason", 1.0)
    line = "net: was right, is now refused: a reason"
    assert coverage.fallen({"net": "right"}, [row]) == [line]
    assert coverage.fallen({"net": "silent"}, [row]) == []
    assert coverage.fallen({}, [row]) == []
    assert coverage.fallen({"net": "right"}, [row._replace(result="right")]) == []


def test_a_sweep_of_a_few_replaces_their_rows_only(tmp_path, monkeypatch):
    (tmp_path / "coverage").mkdir()
    for name in ("coverage.json", "coverage_text.md"):
        shutil.copy(pages.HERE / "coverage" / name, tmp_path / "coverage" / name)
    monkeypatch.setattr(pages, "HERE", tmp_path)
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    before = coverage.results("users")
    coverage.keep({"users": [coverage.Row("plain", ("a|b",), "crash", "why", 0.1)]})
    assert coverage.results("users") == {**before, "plain": "crash"}
    assert "| `plain` | a\\|b | crash | why |" in (tmp_path / "results/coverage.md").read_text()
    assert coverage.results("networks")
