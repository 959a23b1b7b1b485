"""`--tft-judges`: who is asked, what is printed and written of it, masks of data sets included."""

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

# Imported here: it takes load_classifier when it is first imported.
import aftcli.engine.export  # noqa: F401
from aftcli import MaskStore
from aftcli.core.classes import Classes
from aftcli.models.checkpoint import read_card
from aftcli.models.load import load_classifier
from aftcli.settings import Search
from aftcli.tft.explain import explain
from aftcli.tft.judges import Judge
from aftcli.tft.search import fine_tune_threshold
from tests.helpers import faulty
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import NAMES, generate, make_images, small_float
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


def done(*arguments):
    """A command that must succeed."""
    found = aft(*arguments)
    assert found.code in (0, None), found.err
    return found


MASKS = ("gen-masks", "data", "--workers", "0", "--val-share", "0")


@pytest.fixture
def data(monkeypatch):
    """A data set with a val split; later commands take the small network too."""
    for part in ("train", "val"):
        make_images(Path("data", part), each=4, seed=len(part))
    for module in ("models.source", "evaluation.study"):
        monkeypatch.setattr(f"aftcli.{module}.load_classifier", faulty.load_small)


def test_masks_of_judges_are_tuned_with_and_their_judges_said(data):
    Path("other.pth").write_bytes(b"-")
    done(*MASKS, "--tft-judges", "mirror", "--tft-judges", "other.pth")
    generate("data/train", "python", ["gradcam"], judges=(MIRROR, another()), workers=0)
    path, recorded = Path("aft-run/masks/small-gradcam.h5"), ["mirror", "other"]
    with MaskStore(path) as store, MaskStore("python/masks/small-gradcam.h5") as wanted:
        made = store.settings["tft_judges"]
        assert [each["name"] for each in made] == recorded
        assert made[1]["weights"] == another().classifier.weights_hash()
        assert [record.tau for record in store] == [record.tau for record in wanted]
    shown = done("gen-masks", "--show", path)
    said = f"mirror, other ({made[1]['key'].removeprefix('judge')})"
    assert f"tft_judges {said}" in " ".join(shown.out.split())

    learned = done("finetune", "--workers", "0", "--epochs", "1", "--objective", "cam")
    assert f"; the search of the masks asked {said}\n" in learned.err
    card = read_card(Path("aft-run/tuned/small-gradcam.safetensors"))
    assert card["masks"]["tft_judges"] == made

    rows = ("evaluate", "--workers", "0", "--table", "4", "--json")
    tables = done(*rows)
    assert f"search of its masks asked {said}; TFT in the tables asks the network" in tables.err
    [study] = json.loads(tables.out)["settings"]["studies"]
    assert study["tft_judges"] == made

    # The masks are made again without judges, and are no longer those that tuned the network.
    refused = aft(*MASKS)
    assert refused.code == 1 and f"tft_judges is {said}, asked for none" in refused.err
    done(*MASKS, "--overwrite")
    refused = aft("finetune", "--workers", "0", "--epochs", "1", "--objective", "cam")
    assert refused.code == 1 and f"masks: tft_judges is {said}, asked for none" in refused.err
    refused = aft(*rows)
    assert refused.code == 1 and f"different --tft-judges ({said}; none)" in refused.err


def test_masks_of_several_methods_have_the_same_judges(data):
    done(*MASKS, "--cam", "gradcam", "--tft-judges", "mirror")
    done(*MASKS, "--cam", "layercam")
    learned = done("finetune", "--workers", "0", "--cam", "gradcam")
    assert "; the search of the masks asked mirror, t asks the network alone\n" in learned.err
    for command in ("finetune", "evaluate"):
        refused = aft(command, "--workers", "0")
        assert refused.code == 1 and "different --tft-judges (mirror; none)" in refused.err
        assert "choose some by --cam" in refused.err
    tables = done("evaluate", "--workers", "0", "--cam", "layercam", "--table", "4", "--json")
    assert "asked" not in tables.err
    assert "tft_judges" not in json.loads(tables.out)["settings"]["studies"][0]


def test_classes_that_a_judge_does_not_know_are_counted(data, monkeypatch):
    other = another(("else", *NAMES[1:])).classifier
    monkeypatch.setattr("aftcli.tft.judges.load_classifier", lambda *_, **__: other)
    made = done(*MASKS, "--tft-judges", "other", "--limit", "3")
    said = "other does not know 1 of 3 classes (first: apple), so the search of their images does"
    assert said in made.err
    assert "does not know" not in done(*MASKS, "--tft-judges", "mirror", "--overwrite").err
