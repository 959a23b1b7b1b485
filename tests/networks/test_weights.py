"""State dicts as training leaves them: under any beginning of names, in containers, in .ckpt."""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aftcli.errors import AftError
from aftcli.networks.weights import CONTAINERS, own_names, read_state_dict


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


EXPECTED = network().state_dict()


def named(prefix, weights=None):
    return {prefix + key: value for key, value in (weights or EXPECTED).items()}


def renamed(saved, notes=None):
    return own_names(saved, EXPECTED, Path("w.pth"), (notes if notes is not None else []).append)


def assert_same(found, expected=None):
    expected = EXPECTED if expected is None else expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# Names


@pytest.mark.parametrize(
    "prefix", ["backbone.", "network.", "classifier.", "student.encoder.", "a.b.c.d.", "0.", "1.0."]
)
def test_any_beginning_is_taken_off_and_named(prefix):
    notes = []
    assert_same(renamed(named(prefix), notes))
    assert notes == [f"w.pth: took {prefix} off the names of its weights"]


def test_names_that_are_right_stay_and_are_not_spoken_of():
    notes = []
    assert_same(renamed(EXPECTED, notes))
    assert notes == []


def test_parts_under_several_beginnings_are_put_together():
    body = {k: v for k, v in EXPECTED.items() if k[0] != "3"}
    head = {k: v for k, v in EXPECTED.items() if k[0] == "3"}
    notes = []
    assert_same(renamed(named("body.", body) | named("end.", head), notes))
    assert notes == ["w.pth: took body. and end. off the names of its weights"]


@pytest.mark.parametrize("beside", [{"3.bias", "9.bias"}, {"3.bias", "3.weight"}])
def test_a_part_of_another_network_does_not_fill_a_gap(beside):
    """The teacher's bias is not the student's, which is missing."""
    student = {k: v for k, v in named("student.").items() if "3.bias" not in k}
    found = renamed(student | {f"teacher.{name}": torch.ones(2) for name in beside})
    assert "3.bias" not in found and "teacher.3.bias" in found
    assert torch.equal(found["3.weight"], EXPECTED["3.weight"])


def test_parts_are_put_together_only_where_they_make_a_whole():
    parts = named("body.", {k: v for k, v in EXPECTED.items() if k[0] == "0"})
    parts |= named("end.", {k: v for k, v in EXPECTED.items() if k == "3.weight"})
    found = renamed(parts)
    assert "0.weight" in found and "end.3.weight" in found and "3.weight" not in found


def test_deeper_names_of_the_same_network_are_not_its_missing_ones():
    less = {k: v for k, v in EXPECTED.items() if k != "3.weight"}
    found = renamed(less | {"aux.3.weight": EXPECTED["3.weight"]})
    assert "3.weight" not in found and "aux.3.weight" in found
    found = renamed(named("net.", less) | {"net.aux.3.weight": EXPECTED["3.weight"]})
    assert "3.weight" not in found and "aux.3.weight" in found


def test_what_lies_beside_a_whole_network_is_left_out_and_said():
    notes = []
    saved = named("model.") | {"criterion.weight": torch.ones(2), "metric.total": torch.ones(1)}
    assert_same(renamed(saved, notes))
    assert notes[1:] == ["w.pth: left out 2 weights beside the network (criterion.weight, ...)"]
    # Not where the names are the model's own: then the file is of another, larger model.
    assert "criterion.weight" in renamed(EXPECTED | {"criterion.weight": torch.ones(2)})
    # Nor where the network is not whole.
    del saved["model.0.bias"]
    assert "criterion.weight" in renamed(saved)


def test_a_mean_of_weights_beside_them_is_left_out_but_not_a_twin():
    ema = {k: v for k, v in named("ema.").items() if "tracked" not in k}
    assert_same(renamed(named("model.") | ema))
    with pytest.raises(AftError, match="holds 0.weight twice, as model.0.weight and as ema.0.wei"):
        renamed(named("model.") | named("ema."))


def test_a_compiled_part_of_a_network(tmp_path):
    torch.save({f"a._orig_mod.{key}": value for key, value in EXPECTED.items()}, tmp_path / "w.pth")
    assert_same(renamed(read_state_dict(tmp_path / "w.pth")))


def test_names_of_any_length_are_read_quickly():
    long = {".".join(["a"] * 200_000) + f".{key}": value for key, value in EXPECTED.items()}
    assert_same(renamed(long))


# Containers


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_around_a_state_dict_is_taken_off(container, tmp_path):
    torch.save({"epoch": 3, container: EXPECTED, "best": 0.5}, tmp_path / "w.pth")
    assert_same(read_state_dict(tmp_path / "w.pth", pytest.fail))


def test_the_container_that_was_taken_is_named_where_several_fit(tmp_path):
    notes = []
    other = network(seed=1).state_dict()
    torch.save({"ema": other, "model": {"state_dict": EXPECTED}}, tmp_path / "w.pth")
    assert_same(read_state_dict(tmp_path / "w.pth", notes.append))
    assert notes == [f"{tmp_path / 'w.pth'}: took the weights under model, not those under ema"]


@pytest.fixture
def lightning(monkeypatch):
    """Lightning's class of hyper-parameters, by a look-alike that only writing needs."""
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    name = "lightning.fabric.utilities.data"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    made = type("AttributeDict", (dict,), {"__module__": name})
    module.AttributeDict = made
    return made


def test_a_checkpoint_of_lightning_is_read_without_it(lightning, tmp_path):
    hyper = lightning(lr=0.1, where=Path("/data"), options=argparse.Namespace(deep=3))
    saved = {
        "epoch": 2,
        "pytorch-lightning_version": "2.5",
        "state_dict": named("model."),
        "hyper_parameters": hyper,
        "best": np.float64(0.5),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [torch.optim.Adam(network().parameters()).state_dict()],
    }
    torch.save(saved, tmp_path / "last.ckpt")
    notes = []
    assert_same(renamed(read_state_dict(tmp_path / "last.ckpt", pytest.fail), notes))
    assert notes == ["w.pth: took model. off the names of its weights"]


class Hyper:
    """An object of the user's own class."""


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(("value", "named"), [(Hyper(), "Hyper"), (Evil(), "print")])
def test_other_objects_are_refused_with_how_to_save_the_weights(value, named, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": EXPECTED, "hyper_parameters": {"own": value}}, path)
    message = rf"it holds more than tensors: [\w.]*{named}\); .*torch.save\(model.state_dict\(\)"
    with pytest.raises(AftError, match=message):
        read_state_dict(path)
    assert capsys.readouterr().out == ""


def test_a_stand_in_is_no_weight(tmp_path):
    torch.save({"state_dict": EXPECTED | {"a": Path("/b")}}, tmp_path / "w.pth")
    with pytest.raises(AftError, match="holds entries that are not dense tensors"):
        read_state_dict(tmp_path / "w.pth")
