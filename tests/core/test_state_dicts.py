"""State dicts as frameworks and torchvision save them."""

from pathlib import Path

import pytest
import torch
import torchvision

from aftcli.errors import AftError
from aftcli.models.load import load_classifier
from tests.helpers.command import aft
from tests.helpers.compare import assert_near

CHELSEA = Path(__file__).parents[2] / "docs/images/chelsea.jpg"


@pytest.fixture(scope="module")
def weights():
    """A state dict of a squeezenet with four classes."""
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(num_classes=4).state_dict()


def saved(path, weights, name=lambda key: key):
    torch.save({name(key): value for key, value in weights.items()}, path)
    return path


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "net.", "_orig_mod.", "module.model.", "_orig_mod.module.", "net.net."],
)
def test_prefixes_of_frameworks_are_taken_off_and_named(weights, prefix, tmp_path):
    path = saved(tmp_path / "four.pth", weights, lambda key: prefix + key)
    notes = []
    f = load_classifier("squeezenet1_1", path, note=notes.append)
    loaded = f.weights()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert notes == [f"{path}: took {prefix} off the names of its weights"]


def test_what_was_taken_off_is_said_on_stderr_unless_quiet(weights, tmp_path):
    path = saved(tmp_path / "four.pth", weights, lambda key: f"module.model.{key}")
    command = ("explain", CHELSEA, "--model", "squeezenet1_1", "--checkpoint", path)
    loud = aft(*command, "--out", tmp_path)
    assert (loud.code, loud.err) == (
        0,
        f"aft: {path}: took module.model. off the names of its weights\n",
    )
    quiet = aft(*command, "--out", tmp_path, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


def test_names_without_a_prefix_are_not_spoken_of(weights, tmp_path):
    load_classifier("squeezenet1_1", saved(tmp_path / "four.pth", weights), note=pytest.fail)


def test_weights_under_two_prefixes_are_refused(weights, tmp_path):
    both = {f"{prefix}.{k}": v for prefix in ("model", "net") for k, v in weights.items()}
    path = saved(tmp_path / "both.pth", both)
    first = next(iter(weights))
    with pytest.raises(AftError, match=f"holds {first} twice, as model.{first} and as net.{first}"):
        load_classifier("squeezenet1_1", path)


def test_a_beginning_that_no_framework_writes_is_taken_off_too(weights, tmp_path):
    path = saved(tmp_path / "four.pth", weights, lambda key: f"student.encoder.{key}")
    notes = []
    loaded = load_classifier("squeezenet1_1", path, note=notes.append).weights()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert notes == [f"{path}: took student.encoder. off the names of its weights"]


def test_the_message_that_weights_are_missing_names_the_first(weights, tmp_path):
    weights = dict(list(weights.items())[:-1])
    path = saved(tmp_path / "less.pth", weights)
    with pytest.raises(AftError, match="1 weights missing .*; pass the --model"):
        load_classifier("squeezenet1_1", path)
    path = saved(tmp_path / "other.pth", weights, lambda key: key.replace("features", "body"))
    with pytest.raises(AftError, match=r"weights missing \(first: features.0.weight\), .*unknown"):
        load_classifier("squeezenet1_1", path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("googlenet", 224), ("inception_v3", 299)])
def test_networks_load_without_the_heads_that_only_training_uses(name, size, tmp_path):
    torch.manual_seed(0)
    options = {"num_classes": 3, "init_weights": False, "transform_input": True}
    model = torchvision.models.get_model(name, aux_logits=False, **options).eval()
    path = saved(tmp_path / "three.pth", model.state_dict())
    f = load_classifier(name, path)
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert len(f.classes) == 3
        assert_near(f(x), model(x), 1e-5)


def test_a_head_of_which_a_part_is_missing_is_refused(tmp_path):
    model = torchvision.models.googlenet(num_classes=3, init_weights=False, aux_logits=True)
    weights = model.state_dict()
    load_classifier("googlenet", saved(tmp_path / "whole.pth", weights))
    del weights["aux1.fc1.weight"]
    with pytest.raises(AftError, match=r"1 weights missing \(first: aux1.fc1.weight\)"):
        load_classifier("googlenet", saved(tmp_path / "part.pth", weights))
