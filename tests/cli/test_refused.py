"""Methods that do not fit a network: left out of families, and said once for all images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aftcli.attributions import maps
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.errors import AftError
from aftcli.tft import explain as engine
from tests.helpers.command import aft
from tests.helpers.stored import NAMES

PICTURES = ("a.png", "b.png", "c.png")


def smooth_network():
    """A network without ReLUs, and with more than a mean before its last layer."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=4, padding=2),
        nn.GELU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.LPPool2d(2, 1),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    sizes = Preprocessing(size=(32, 32), resize=36)
    return cut_classifier(model, "2+3", name="smooth", preprocessing=sizes, classes=Classes(NAMES))


@pytest.fixture
def f(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in PICTURES:
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(name)
    found = smooth_network()
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: found)
    return found


def explained(*options):
    done = aft("explain", *options, "--save", "none", "--json")
    return done, [each["cam"] for each in json.loads(done.out)]


def test_what_is_wrong_with_a_method_is_said_once(f):
    done, found = explained(*PICTURES, "--cam", "cam")
    assert (done.code, found) == (1, [])
    (line,) = done.err.splitlines()
    assert line.startswith("aft: a.png: cam needs a head of global average pooling")
    assert line.endswith("use gradcam or layercam (the same for all 3 images)")
    Path("a.png").write_bytes(b"")
    done, _ = explained(*PICTURES, "--cam", "cam")
    empty, line = done.err.splitlines()
    assert empty == "aft: a.png: the file is empty"
    assert line.startswith("aft: b.png: cam ") and line.endswith(" (the same for all 2 images)")
    done, _ = explained("c.png", "--cam", "cam")
    assert "the same for all" not in done.err


def test_what_is_wrong_with_pictures_is_said_of_each(f):
    for name in PICTURES[:2]:
        Path(name).write_bytes(b"")
    done, _ = explained(*PICTURES, "--cam", "cam")
    assert [line.split(": ")[1] for line in done.err.splitlines()] == ["a.png", "b.png", "c.png"]


def test_families_leave_out_what_does_not_fit_and_say_so(f):
    done, found = explained("a.png", "--cam", "all")
    assert done.code in (0, None)
    assert found == [name for name, e in METHODS.items() if e.family == "cam" and name != "cam"]
    assert "aft: skipped cam: cam needs a head" in done.err
    quiet, again = explained("a.png", "--cam", "all", "--quiet")
    assert (quiet.err, again) == ("", found)
    # By its own name it must fit.
    done, _ = explained("a.png", "--cam", "all,cam")
    assert done.code == 1 and "skipped" not in done.err


@pytest.mark.parametrize("family", ["gradient", "decomposition", "activation"])
def test_what_a_family_keeps_explains_and_what_it_skips_does_not(f, family):
    pytest.importorskip("captum")
    pytest.importorskip("zennit")
    names = [
        name
        for name, entry in METHODS.items()
        if entry.family == family
        and (not maps.takes_target(name) or name == "layercam-fusion")
        and (entry.passes or 0) <= engine.TRIED
    ]
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    skipped, reasons = [], engine.refusals([f], names)
    for name in names:
        reason = reasons.get(name)
        if not reason:
            assert maps.attribution_map(f, x, 1, name).shape == (1, 32, 32)
            continue
        skipped.append(name)
        with pytest.raises(AftError) as error:
            maps.attribution_map(f, x, 1, name)
        assert str(error.value) == reason
    expected = {
        "gradient": ["guidedbackprop", "deeplift"],
        "decomposition": names,
        "activation": ["relevancecam"],
    }
    assert skipped == expected[family]


def test_what_a_way_of_smoothing_does_not_fit_is_said_once(f):
    # By its own name it must fit, which is known before pictures are read.
    for way, reason in (("noise", "takes no gradient"), ("eigen", "is no weighted sum")):
        done = aft("explain", "a.png", "b.png", "--cam", "all,Eigen-CAM", "--smooth", way)
        (line,) = done.err.splitlines()
        assert done.code == 1 and line.startswith(f"aft: Eigen-CAM {reason}")
    assert not Path("aft-out").exists()
    done, found = explained("a.png", "--cam", "all", "--smooth", "noise")
    assert found == ["gradcam", "gradcam++", "layercam", "xgradcam", "hirescam", "finercam"]
    (line,) = done.err.splitlines()
    left_out = "cam, scorecam, ablationcam, eigencam"
    assert line.startswith(f"aft: skipped {left_out}: --smooth noise takes gradcam, ")


def test_a_family_of_which_nothing_fits_is_refused(f):
    pytest.importorskip("zennit")
    done = aft("explain", "a.png", "--cam", "decomposition")
    assert done.code == 1 and not Path("aft-out").exists()
    assert done.err.startswith("aft: no method of --cam decomposition fits smooth: ")


def test_a_folder_of_own_pictures_is_told_from_an_empty_one(f):
    aft("explain", *PICTURES)
    Path("empty").mkdir()
    for given, said in (
        ("aft-out", "aft-out: holds only pictures that aft has written; name your own"),
        ("aft-ou*", "aft-ou*: holds only pictures that aft has written; name your own"),
        ("empty", "empty: there is no image in this folder"),
        ("gone", "gone: there is no such file or folder"),
    ):
        done = aft("explain", given, "--json")
        assert (done.code, done.out, done.err) == (1, "[]\n", f"aft: {said}\n")
