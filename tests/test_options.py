"""What options do beside others: notes on those without effect, numbers, names of outputs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import aft
from PIL import Image
from stored import small_float

from aftcli.data import read_image, to_input


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, with a picture."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 120, (44, 60, 3), dtype=np.uint8)
    pixels[8:28, 20:40] += 100
    Image.fromarray(pixels).save("a.png")
    return tmp_path


@pytest.fixture(autouse=True)
def f(monkeypatch):
    """The commands' classifier: a small one, the same every time."""
    small = small_float()
    monkeypatch.setattr("aftcli.core.models.load_classifier", lambda *_, **__: small)
    return small


def objects(*arguments):
    result = aft(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.parametrize("cut", [("--threshold", "0.4"), ("--mute", "70"), ("--mute", "0")])
@pytest.mark.parametrize("masking", ["binary", "soft"])
@pytest.mark.parametrize("fill", ["mean", "black"])
def test_a_fixed_threshold_tells_what_is_left_of_the_probability(f, cut, masking, fill):
    options = (*cut, "--masking", masking, "--fill", fill, "--target", "plum")
    [found] = objects("explain", "a.png", *options, "--save", "map,mask")
    x = to_input(read_image(Path("a.png")), f.preprocessing)[0]
    scores = np.load(found["outputs"]["map"])
    kept = np.asarray(Image.open(found["outputs"]["mask"])) > 0
    shown = x.clone()
    for row, column in itertools.product(*map(range, kept.shape)):
        for c, (mean, std) in enumerate(
            zip(f.preprocessing.mean, f.preprocessing.std, strict=True)
        ):
            weight = float(kept[row, column]) * (scores[row, column] if masking == "soft" else 1)
            muted = -mean / std if fill == "black" else 0
            shown[c, row, column] = weight * x[c, row, column] + (1 - weight) * muted
    with torch.no_grad():
        y_hat = f(shown[None]).softmax(1)[0, 2].item()
    fixed = found["fixed"]
    assert fixed == {
        "threshold": float(cut[1]) / (1 if cut[0] == "--threshold" else 100),
        "probability": pytest.approx(y_hat, rel=1e-4),
        "area": pytest.approx(kept.mean()),
        "masking": masking,
        "fill": fill,
        "threshold_mode": "value" if cut[0] == "--threshold" else "percentile",
    }
    head, row, *_ = aft("explain", "a.png", *options).out.splitlines()
    assert head.split() == ["image", "cam", "class", "prob.", "masked", "kept"]
    assert row.split()[-2:] == [f"{fixed['probability']:.4f}", f"{fixed['area']:.1%}"]
