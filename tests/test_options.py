"""What options do beside others: notes on those without effect, numbers, names of outputs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from command import aft
from PIL import Image
from stored import small_float

from aftcli.cli import app
from aftcli.data import read_image, to_input

COMMANDS = typer.main.get_command(app).commands


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


def notes(*arguments):
    """What a command says on stderr, but for the error that ends it."""
    result = aft(*arguments)
    lines = result.err.splitlines()
    return lines if result.code == 0 else lines[:-1]


ALONE = [
    (("--masking", "soft"), "--masking has no effect without --tft, --threshold or --mute"),
    (("--fill", "black"), "--fill has no effect without --tft, --threshold or --mute"),
    (
        ("--thresholds", "0.5", "--search", "fast"),
        "--thresholds, --search have no effect without --tft",
    ),
    (("--threshold-mode", "percentile"), "--threshold-mode has no effect without --tft"),
    (("--cells", "--cam", "hirescam"), "--cells has no effect on CAMs, which are of cells anyway"),
]


@pytest.mark.parametrize(("options", "note"), ALONE)
def test_an_option_without_effect_is_named_and_changes_nothing(options, note):
    result = aft("explain", "a.png", *options, "--json")
    assert (result.code, result.err) == (0, f"aft: {note}\n")
    plain = objects("explain", "a.png", *(options[1:] if options[0] == "--cells" else ()))
    for one, two in zip(json.loads(result.out), plain, strict=True):
        del one["outputs"], two["outputs"]
        assert {**one, "cells": None} == {**two, "cells": None}
    assert aft("explain", "a.png", *options, "--quiet").err == ""


MAP = ("tft", "a.png", "--map", "m.npy")
EVALUATE = ("evaluate", "--run", "none")
TUNE = ("finetune", "--run", "none")
NO_EFFECT = [
    (("tft", "a.png", "--absolute"), ["--absolute has no effect without --map"]),
    ((*MAP, "--cam", "cam", "--layer", "x"), ["--layer, --cam have no effect with --map"]),
    (
        ("gen-masks", ".", "--show", "x.h5", "--limit", "3", "--json"),
        ["DATASET, --limit have no effect with --show"],
    ),
    (
        (*TUNE, "--no-masks", "--objective", "cam", "--held-out", "0", "--patience", "9"),
        ["--objective has no effect with --no-masks", "--patience has no effect with --held-out 0"],
    ),
    (
        (*EVALUATE, "--image", "x", "--format", "csv", "--ci", "--json"),
        [
            "--image has no effect without --figures",
            "--format has no effect with --json",
            "--ci has no effect on JSON and CSV, which always hold the intervals",
        ],
    ),
    (
        (*EVALUATE, "--table", "1", "--metrics", "adcc", "--paper", "--ci"),
        [
            "--metrics has no effect without table 3",
            "--ci has no effect without table 3 or 4, or --sanity",
            "--paper has no effect without table 3, 4 or 5",
        ],
    ),
    (
        (*EVALUATE, "--table", "4", "--masking", "soft", "--baselines"),
        [
            "--baselines has no effect without table 3",
            "--masking has no effect without table 3 or 5, or --sanity, --figures",
        ],
    ),
    (
        (*EVALUATE, "--table", "2", "--overwrite"),
        ["--overwrite has no effect without table 3, 4 or 5, or --sanity, --figures"],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), NO_EFFECT, ids=lambda each: str(each)[:60])
def test_options_that_depend_on_others_are_named(arguments, expected):
    np.save("m.npy", np.random.default_rng(1).random((32, 32)))
    assert notes(*arguments) == [f"aft: {each}" for each in expected]


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "a.png", "--tft", "--masking", "soft", "--search", "fast", "--fill", "black"),
        ("explain", "a.png", "--mute", "0", "--masking", "soft", "--fill", "black"),
        (*MAP, "--absolute", "--masking", "soft"),
        (*TUNE, "--objective", "cam", "--patience", "9"),
        (*EVALUATE, "--table", "5", "--masking", "soft", "--overwrite", "--paper"),
        (*EVALUATE, "--table", "4", "--sanity", "--masking", "soft", "--ci", "--cells"),
        (*EVALUATE, "--figures", "--image", "x", "--json", "--ci"),
        (*EVALUATE, "--table", "1", "--paper", "--json"),
        (*EVALUATE, "--table", "9", "--metrics", "adcc"),
    ],
    ids=lambda each: " ".join(each),
)
def test_options_with_an_effect_and_defaults_are_not_named(arguments, monkeypatch):
    monkeypatch.setenv("AFT_ENGINE", "torch")
    np.save("m.npy", np.random.default_rng(1).random((32, 32)))
    assert notes(*arguments) == []
    assert notes("gen-masks", "--show", "x.h5") == []


def test_the_table_of_dependent_options_knows_the_commands():
    from aftcli.cli_idle import IDLE

    assert set(IDLE) <= set(COMMANDS)
    for name, rules in IDLE.items():
        known = {p.opts[0] for p in COMMANDS[name].params if p.param_type_name == "option"}
        assert {option for rule in rules for option in rule.options} <= known | {"DATASET"}
    options = {p.opts[0] for p in COMMANDS["gen-masks"].params if p.param_type_name == "option"}
    with_show = {option for rule in IDLE["gen-masks"] for option in rule.options}
    assert options - with_show == {"--show", "--json", "--quiet", "--debug"}


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
