"""Options beside others: notes on those without effect, numbers, names of outputs."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from aftcli.cli.app import app
from aftcli.core.methods import FAMILIES, named
from aftcli.data.images import read_image, to_input
from aftcli.options.help import METHODS_HELP
from aftcli.pages.grids import Tables
from tests.helpers.command import aft, leftovers, objects, usage_error
from tests.helpers.stored import NAMES

pytestmark = pytest.mark.usefixtures("picture", "f")

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture
def idle_commands(monkeypatch):
    """Commands that take their options and have nothing to do."""
    monkeypatch.setattr("aftcli.evaluation.study.find_studies", lambda *_: [])
    monkeypatch.setattr("aftcli.cli.evaluate.evaluated", lambda *_: Tables())
    monkeypatch.setattr("aftcli.pages.evaluated.write_figures", lambda *_: None)
    monkeypatch.setattr("aftcli.aft.jobs.control_jobs", lambda *_: [])
    monkeypatch.setattr("aftcli.aft.jobs.mask_jobs", lambda *_: [])
    monkeypatch.setattr("aftcli.report.masks.show_store", lambda *_: None)
    np.save("m.npy", np.random.default_rng(1).random((32, 32)))


def notes(*arguments):
    """Return what a command says on stderr, which does not end it."""
    result = aft(*arguments)
    assert result.code in (0, None), result.err
    return result.err.splitlines()


ALONE = [
    (("--masking", "soft"), "--masking has no effect without --tft, --threshold or --mute"),
    (("--fill", "black"), "--fill has no effect without --tft, --threshold or --mute"),
    (
        ("--thresholds", "0.5", "--search", "fast"),
        "--thresholds, --search have no effect without --tft",
    ),
    (("--threshold-mode", "percentile"), "--threshold-mode has no effect without --tft"),
    (("--tft-judges", "mirror"), "--tft-judges has no effect without --tft"),
    (
        ("--colormap", "jet", "--save", "map"),
        "--colormap has no effect without pictures in --save, or --html",
    ),
]


@pytest.mark.parametrize(("options", "refusal"), ALONE)
def test_an_option_without_effect_is_refused(options, refusal):
    assert refusal in usage_error(aft("explain", "a.png", *options, "--quiet"))
    assert not Path("aft-out").exists()


def test_an_option_that_asks_for_what_is_so_anyway_is_named_and_changes_nothing():
    options = ("--cells", "--cam", "HiResCAM")
    result = aft("explain", "a.png", *options, "--json")
    note = "--cells has no effect on CAMs, which are of cells anyway"
    assert (result.code, result.err) == (0, f"aft: {note}\n")
    plain = objects("explain", "a.png", "--cam", "hirescam")
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
        (*TUNE, "--objective", "zero-level", "--lam", "1", "--patience", "2", "--lr", "0.1"),
        [
            "--lam, --patience have no effect with --objective zero-level",
            "--lr has no effect with --gauge t",
        ],
    ),
    *(
        ((*TUNE, *other, "--gauge", "v"), ["--gauge has no effect without --objective zero-level"])
        for other in (("--objective", "tuner"), ("--lam", "1"), ("--layer", "a", "--layer", "b"))
    ),
    (
        (*TUNE, "--no-masks", "--objective", "zero-level", "--gauge", "v", "--lr", "0.1"),
        ["--objective, --gauge have no effect with --no-masks"],
    ),
    (
        (*EVALUATE, "--image", "x", "--format", "csv", "--ci", "--json"),
        [
            "--image has no effect without --figures",
            "--format has no effect with --json",
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


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "expected"), NO_EFFECT, ids=lambda each: str(each)[:60])
def test_options_that_depend_on_others_are_refused(idle_commands, arguments, expected):
    assert usage_error(aft(*arguments)).endswith("; ".join(expected))


def test_intervals_that_are_printed_anyway_are_named(idle_commands):
    note = "--ci has no effect on JSON and CSV, which always hold the intervals"
    assert notes(*EVALUATE, "--format", "csv", "--ci") == [f"aft: {note}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "a.png", "--tft", "--masking", "soft", "--search", "fast", "--fill", "black"),
        ("explain", "a.png", "--mute", "0", "--masking", "soft", "--fill", "black"),
        (*MAP, "--absolute", "--masking", "soft"),
        (*TUNE, "--objective", "cam", "--patience", "9"),
        (*TUNE, "--gauge", "v", "--lr", "0.1", "--layer", "a"),
        (*EVALUATE, "--table", "5", "--masking", "soft", "--overwrite", "--paper"),
        (*EVALUATE, "--table", "4", "--sanity", "--masking", "soft", "--ci", "--cells"),
        (*EVALUATE, "--figures", "--image", "x", "--json", "--ci"),
        (*EVALUATE, "--table", "1", "--paper", "--json"),
    ],
    ids=lambda each: " ".join(each),
)
def test_options_with_an_effect_and_defaults_are_not_named(idle_commands, arguments, monkeypatch):
    monkeypatch.setenv("AFT_ENGINE", "torch")
    assert notes(*arguments) == []
    assert notes("gen-masks", "--show", "x.h5") == []


def test_an_error_is_told_alone_and_notes_beside_images_that_failed():
    wrong = aft("explain", "a.png", "--masking", "soft", "--cam", "nonsense")
    assert "nonsense" in usage_error(wrong) and "no effect" not in wrong.err
    wrong = aft("evaluate", "--table", "9", "--metrics", "adcc", "--image", "x")
    assert "there is no table '9'" in usage_error(wrong) and "no effect" not in wrong.err
    cells = ("--cells", "--cam", "hirescam")
    wrong = aft("explain", "a.png", *cells, "--target", "cat", "--top-k", "2")
    assert "--top-k exclude" in usage_error(wrong) and "no effect" not in wrong.err
    some = aft("explain", "a.png", "gone.png", *cells)
    gone, note = some.err.splitlines()
    assert some.code == 1 and "gone.png" in gone
    assert note == "aft: --cells has no effect on CAMs, which are of cells anyway"


def test_the_table_of_dependent_options_knows_the_commands():
    from aftcli.options.idle import IDLE

    assert set(IDLE) <= set(COMMANDS)
    for name, rules in IDLE.items():
        known = {p.opts[0] for p in COMMANDS[name].params if p.param_type_name == "option"}
        assert {option for rule in rules for option in rule.options} <= known | {"DATASET"}
    options = {p.opts[0] for p in COMMANDS["gen-masks"].params if p.param_type_name == "option"}
    with_show = {option for rule in IDLE["gen-masks"] for option in rule.options}
    assert options - with_show == {"--show", "--json", "--quiet", "--debug"}


@pytest.mark.slow
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


KINDS = ("--target", "pear", "--save", "overlay,map")
OWN = ("explain", "a.png", *KINDS)
GIVEN = ("tft", "a.png", *KINDS, "--map")
# Commands, no two of which write the same pictures.
SETTINGS = [
    (*OWN,),
    (*OWN, "--tft"),
    (*OWN, "--tft", "--masking", "soft"),
    (*OWN, "--tft", "--fill", "black"),
    (*OWN, "--tft", "--fill", "blur"),
    (*OWN, "--tft", "--threshold-mode", "percentile"),
    (*OWN, "--tft", "--search", "fast"),
    (*OWN, "--tft", "--tft-judges", "mirror"),
    (*OWN, "--tft", "--thresholds", "0:1:0.05"),
    (*OWN, "--tft", "--thresholds", "0,1"),
    (*OWN, "--tft", "--thresholds", ",".join(str(i / 1000) for i in range(1, 400))),
    (*OWN, "--tft", "--thresholds", ",".join(str(i / 1000) for i in range(1, 401))),
    (*OWN, "--threshold", "0.4"),
    (*OWN, "--threshold", "0.40000001"),
    (*OWN, "--mute", "40"),
    (*OWN, "--zero-level", "0.2"),
    (*OWN, "--model", "resnet50"),
    (*OWN, "--model", "timm:resnet50"),
    (*OWN, "--layer", "layer4.1"),
    (*OWN, "--layer", "layer4/1"),
    (*OWN, "--layer", "fusion"),
    (*OWN, "--cam", "gradcam"),
    (*OWN, "--precision", "bf16"),
    (*OWN, "--checkpoint", "one/mine.pth"),
    (*OWN, "--checkpoint", "two/mine.pth"),
    (*OWN, "--classes", "one/names.txt"),
    (*OWN, "--classes", "two/names.txt"),
    (*OWN, "--cells"),
    ("tft", "a.png", *KINDS, "--cells"),
    (*GIVEN, "one/m.npy"),
    (*GIVEN, "two/m.npy"),
    (*GIVEN, "two/m.npy", "--absolute"),
]
DEFAULT = {
    "overlay": "aft-out/a-pear-layercam-overlay.png",
    "map": "aft-out/a-pear-layercam-map.npy",
}


def test_each_setting_has_pictures_of_its_own(folder):
    for where, seed in (("one", 1), ("two", 2)):
        Path(where).mkdir()
        Path(where, "mine.pth").write_bytes(b"-")
        Path(where, "names.txt").write_text("\n".join(NAMES))
        np.save(f"{where}/m.npy", np.random.default_rng(seed).random((32, 32)))
    written = {}
    for command in SETTINGS:
        [found] = objects(*command)
        written[command] = found["outputs"]
    assert written[SETTINGS[0]] == DEFAULT
    overlays = [outputs["overlay"].lower() for outputs in written.values()]
    assert len(set(overlays)) == len(SETTINGS)
    # The plain map is the same whatever its threshold: one file.
    maps = {command: outputs["map"].lower() for command, outputs in written.items()}
    cut = [command for command in SETTINGS if {"--tft", "--threshold", "--mute"} & set(command)]
    assert {maps[command] for command in cut} == {DEFAULT["map"]}
    assert len(set(maps.values())) == len(SETTINGS) - len(cut)
    files = leftovers(folder / "aft-out")
    assert len(files) == 2 * len(SETTINGS) - len(cut)
    unsafe = set(':<>"|?*\\ ')
    assert all(name.isascii() and len(name) < 100 and not unsafe & set(name) for name in files)
    # The same commands replace their own files.
    for command in SETTINGS[:2] + SETTINGS[-2:]:
        [found] = objects(*command)
        assert found["outputs"] == written[command]
    assert leftovers(folder / "aft-out") == files


@pytest.mark.slow
@pytest.mark.parametrize("cut", [("--tft",), ("--threshold", "0.4"), ("--mute", "40")])
def test_all_that_a_threshold_changes_has_names_of_its_own(cut):
    options = ("--target", "pear", "--save", "overlay,figure,map,mask")
    [plain] = objects("explain", "a.png", *options)
    before = {kind: Path(path).read_bytes() for kind, path in plain["outputs"].items()}
    [found] = objects("explain", "a.png", *options, *cut)
    shared = {kind for kind, path in found["outputs"].items() if path == plain["outputs"][kind]}
    assert shared == {"map"}
    assert {kind: Path(path).read_bytes() for kind, path in plain["outputs"].items()} == before


@pytest.mark.slow
def test_names_say_the_settings_in_short():
    for options, expected in (
        (("--tft",), "tft"),
        (("--tft", "--masking", "soft", "--fill", "blur"), "tft-soft-blur"),
        (("--tft", "--thresholds", "0:1:.1"), "tft"),
        (("--tft", "--thresholds", "0:1:0.05"), "tft-T0..1..0.05"),
        (("--threshold", "0.4", "--masking", "soft"), "t0.4"),
        (("--mute", "85"), "mute85"),
        (("--zero-level", "0.15", "--mute", "85"), "zero0.15-mute85"),
        (("--model", "timm:resnet18"), "timm_resnet18"),
        (("--layer", "conv_head+bn2", "--mute", "5"), "layer_conv_head+bn2-mute5"),
        (("--precision", "bf16"), "bf16"),
    ):
        [found] = objects("explain", "a.png", "--target", "pear", *options)
        assert found["outputs"]["overlay"] == f"aft-out/a-pear-layercam-{expected}-overlay.png"


def test_the_longest_name_with_settings_can_be_written():
    long = f"{'n' * 251}.png"
    Path("a.png").rename(long)
    options = ("--cam", "integratedgradients", "--layer", "l" * 200, "--save", "overlay,map")
    pytest.importorskip("captum")
    [found] = objects("explain", long, *options)
    assert all(Path(path).is_file() for path in found["outputs"].values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_few_options_at_once(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = aft(name, "--help").out.splitlines()
    assert len(lines) <= {"explain": 60, "finetune": 80}.get(name, 95)
    starts = [i for i, line in enumerate(lines) if line.startswith("╭─")]
    ends = [i for i, line in enumerate(lines) if line.startswith("╰─")]
    spans = zip(starts, ends, strict=True)
    panels = {lines[i].strip("╭─╮ "): lines[i + 1 : end] for i, end in spans}
    assert 4 <= len(panels) <= 7 and "Options" not in panels
    options = [[line for line in rows if line.startswith("│ --")] for rows in panels.values()]
    assert max(map(len, options)) <= 10
    known = [p for p in COMMANDS[name].params if p.param_type_name == "option" and not p.hidden]
    assert sum(map(len, options)) == len(known) + 1  # --help
    # An option's name with two lines of help, and a default below.
    panels.pop("Arguments", None)
    rows = [row for rows in panels.values() for row in rows]
    # Examples come last, each on a line of its own.
    *_, example = [line for line in lines if line.strip()]
    assert f"{example.rstrip()} ".startswith(f" $ aft {name} ")
    assert "   " not in "".join("-" if row.startswith("│ --") else " " for row in rows)


def test_a_word_of_the_help_stands_for_the_methods_after_it():
    said = dict(re.findall(r"(\w+) \(([^)]*)\)", METHODS_HELP))
    assert list(said) == ["all", *list(FAMILIES)[1:]]
    for word, methods in said.items():
        assert named([word]) == methods.split(", ")
