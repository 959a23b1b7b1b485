"""`--tft-judges`: who is asked, what is printed and written of it."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.core.classes import Classes
from aftcli.models.load import load_classifier
from aftcli.settings import Search
from aftcli.tft.explain import explain
from aftcli.tft.judges import Judge
from aftcli.tft.search import fine_tune_threshold
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import NAMES, small_float
from tests.tft.test_judges import another

MIRROR = Judge("mirror")


@pytest.fixture(autouse=True)
def f(tmp_path, monkeypatch):
    """A folder with a picture, the small classifier, and another one as every other judge."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    small = small_float()
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: small)
    monkeypatch.setattr("aftcli.tft.judges.load_classifier", lambda *_, **__: another().classifier)
    return small


def inputs(f):
    from aftcli.data.images import read_image, to_input

    return to_input(read_image(Path("a.png")), f.preprocessing)


@pytest.mark.parametrize("command", [("explain", "a.png", "--tft"), ("tft", "a.png")])
@pytest.mark.parametrize("search", ["exact", "fast"])
def test_the_commands_ask_judges(f, command, search):
    options = ("--cam", "gradcam", "--tft-judges", "mirror", "--tft-judges", "other.pth")
    Path("other.pth").write_bytes(b"-")
    done = aft(*command, *options, "--save", "none", "--json", "--search", search)
    [found] = json.loads(done.out)
    x, judges = inputs(f), (MIRROR, Judge("other", another().classifier))
    [plain] = explain(f, x, ["gradcam"])
    thresholds = found["tft"]["thresholds"]
    maps, c = plain.attribution[None], plain.class_index
    wanted = fine_tune_threshold(f, x, maps, c, thresholds, judges=judges, search=search)
    assert found["tft"]["tau"] == thresholds[int(wanted.best)]
    said = found["tft"]["judges"]
    assert [each["name"] for each in said] == ["self", "mirror", "other"]
    assert said[0]["whole"] == found["probability"]
    assert said[0]["probability"] == found["tft"]["probability"]
    for each in said:
        odds = [math.log(p / (1 - p)) for p in (each["probability"], each["whole"])]
        assert each["log_odds_increase"] == pytest.approx(odds[0] - odds[1], abs=1e-4)
    asked = wanted.increases[0].tolist()
    assert [each["log_odds_increase"] for each in said] == pytest.approx(asked, abs=1e-4)


def test_a_map_of_another_tool_is_judged_too(f):
    np.save("m.npy", np.random.default_rng(1).random((32, 32)))
    options = ("--map", "m.npy", "--save", "none", "--json", "--tft-judges", "mirror")
    [found] = json.loads(aft("tft", "a.png", *options).out)
    assert [each["name"] for each in found["tft"]["judges"]] == ["self", "mirror"]


def test_a_line_says_what_each_gains():
    options = ("--save", "map", "--tft", "--tft-judges", "mirror")
    lines = aft("explain", "a.png", *options).out.splitlines()
    [line] = [line for line in lines if "log-odds" in line]
    assert re.fullmatch(
        r"a\.png, layercam, \w+ \(\d\): log-odds at tau\* self [+-]\d\.\d\d, mirror [+-]\d\.\d\d",
        line,
    )
    assert "log-odds" not in aft("explain", "a.png", "--save", "none", "--tft").out
    [plain] = json.loads(aft("explain", "a.png", "--tft", "--save", "none", "--json").out)
    assert "judges" not in plain["tft"]


def test_csv_says_what_each_gains():
    options = ("explain", "a.png", "--save", "none", "--tft", "--tft-judges", "mirror")
    [found] = json.loads(aft(*options, "--json").out)
    [line] = csv.DictReader(io.StringIO(aft(*options, "--format", "csv").out))
    judges = found["tft"]["judges"]
    expected = {each["name"]: each["log_odds_increase"] for each in judges}
    assert set(expected) == {"self", "mirror"} and json.loads(line["judges"]) == expected
    [line] = csv.DictReader(io.StringIO(aft(*options[:-2], "--format", "csv").out))
    assert line["judges"] == ""


def test_files_are_named_by_their_judges():
    options = ("--tft", "--target", "pear", "--save", "overlay", "--json")
    [found] = json.loads(aft("explain", "a.png", *options, "--tft-judges", "mirror").out)
    assert found["outputs"]["overlay"] == "aft-out/a-pear-layercam-tft-by_mirror-overlay.png"
    assert "--tft-judges mirror" in Path("aft-out/manifest.json").read_text()
    names = set()
    for folder in ("one", "two"):
        Path(folder).mkdir()
        Path(folder, "mine.pth").write_bytes(b"-")
        judge = ("--tft-judges", f"{folder}/mine.pth")
        [found] = json.loads(aft("explain", "a.png", *options, *judge).out)
        names.add(Path(found["outputs"]["overlay"]).name)
        assert "tft-by_mine-" in found["outputs"]["overlay"]
    assert len(names) == 2


def test_a_class_that_a_judge_does_not_know_is_said(f, monkeypatch):
    lacking = Classes(("else", *NAMES[1:]))
    other = another().classifier
    other.classes = lacking
    monkeypatch.setattr("aftcli.tft.judges.load_classifier", lambda *_, **__: other)
    options = ("--tft", "--save", "none", "--tft-judges", "other", "--json")
    done = aft("explain", "a.png", *options, "--target", NAMES[0])
    assert f"a.png: other does not know {NAMES[0]}, so the search did not ask it" in done.err
    [found] = json.loads(done.out)
    unasked = {"name": "other", "whole": None, "probability": None, "log_odds_increase": None}
    assert found["tft"]["judges"][1] == unasked
    [alone] = json.loads(
        aft("explain", "a.png", "--tft", "--save", "none", "--json", "--target", NAMES[0]).out
    )
    assert found["tft"]["tau"] == alone["tft"]["tau"]
    done = aft("explain", "a.png", *options[:-1], "--target", NAMES[0])
    assert "other not asked" in done.out
    done = aft("explain", "a.png", *options, "--target", NAMES[1])
    assert "did not ask" not in done.err
    other.classes = Classes(("one", "two", "three"))
    done = aft("explain", "a.png", *options)
    assert done.code == 1 and "--tft-judges other: has none of the 3 classes of small" in done.err


def test_a_judge_without_class_names_has_those_of_the_network(monkeypatch):
    other = another(Classes.numbered(3).names).classifier
    options = ("--tft", "--save", "none", "--tft-judges", "other", "--json")
    [named] = json.loads(aft("explain", "a.png", *options).out)
    monkeypatch.setattr("aftcli.tft.judges.load_classifier", lambda *_, **__: other)
    done = aft("explain", "a.png", *options)
    said = "--tft-judges other: its 3 classes have no names; taken to be those of small in the same"
    assert said in done.err
    assert json.loads(done.out)[0]["tft"] == named["tft"] and named["tft"]["judges"]


@pytest.mark.parametrize("name", ["none", ""])
def test_nobody_is_no_judge(name):
    said = usage_error(aft("explain", "a.png", "--tft", "--tft-judges", name))
    assert "name a judge: mirror, a model, a checkpoint or MODEL=FILE" in said


def test_a_missing_judge_is_named_by_its_option(monkeypatch):
    monkeypatch.setattr("aftcli.tft.judges.load_classifier", load_classifier)
    done = aft("explain", "a.png", "--tft", "--tft-judges", "gone.pth")
    assert done.code == 1 and "--tft-judges gone.pth: " in done.err


def test_in_python_explanations_ask_judges_too(f):
    import aftcli

    [found] = aftcli.explain(f, inputs(f), "gradcam", tft=True, judges=[MIRROR])
    assert found.judges == ("mirror",)
    assert found.tft.judged.shape == (1, 1, 11) and torch.isfinite(found.tft.increases).all()


@pytest.mark.parametrize(
    "judges", ["mirror", MIRROR, ["mirror"], [MIRROR, Judge("other", "resnet18")]]
)
def test_in_python_judges_are_no_names(f, judges):
    import aftcli

    said = r"^judges is .*; give a list of aftcli.Judge: Judge\('mirror'\) is"
    with pytest.raises(aftcli.AftError, match=said):
        aftcli.explain(f, inputs(f), "gradcam", tft=True, judges=judges)


def test_in_python_judges_need_a_search_and_a_fixed_cut_one_threshold(f):
    import aftcli

    one, several = Search((0.5,)), Search((0.2, 0.5))
    with pytest.raises(aftcli.AftError, match="^judges take part in a search"):
        aftcli.explain(f, inputs(f), judges=[MIRROR])
    with pytest.raises(aftcli.AftError, match="^judges take part in a search"):
        aftcli.explain(f, inputs(f), settings=one, fixed=True, judges=[MIRROR])
    for settings in (None, several):
        with pytest.raises(aftcli.AftError, match="^a fixed cut needs one threshold"):
            aftcli.explain(f, inputs(f), settings=settings, fixed=True)
