"""Pascal VOC: what is none of its classes, broken, listed twice, or of another year."""

import json

import pytest
from PIL import Image

from aftcli.core.classes import Classes, Preprocessing
from aftcli.data.objects import Objects
from aftcli.data.sets import open_data_set
from aftcli.errors import AftError
from aftcli.formats.voc import VOC_CLASSES
from tests.helpers.command import aft
from tests.helpers.stored import small_float
from tests.helpers.voc import annotation, make_voc

PREP = Preprocessing((32, 32), 36)
CAT = VOC_CLASSES.index("cat")
BOX = (1, 1, 32, 64)
A_CAT = annotation([("cat", *BOX)], (64, 64))
OTHER = annotation([("zebra", *BOX)], (64, 64))
UNUSABLE = {
    "zebra": (OTHER, "zebra shows none of VOC's 20 classes, only 'zebra'"),
    "nothing": (annotation([], (64, 64)), "nothing shows none of VOC's 20 classes"),
    "cut": (A_CAT[:-9], "cut has neither .* readable boxes .*is not XML"),
    "doctype": ("<!DOCTYPE a>" + A_CAT, "DOCTYPE"),
}


def opened(root, classes=None):
    return open_data_set(root, "val", classes or small_float().classes)


def test_a_networks_other_classes_have_no_boxes(tmp_path):
    root = make_voc(tmp_path / "VOC2012", {"one": annotation([("aeroplane", *BOX)], (64, 64))})
    data = opened(root, Classes(("background", *VOC_CLASSES, "void")))
    objects = Objects(data, PREP)
    assert data.mapped and data.samples[0].label == 1
    boxed = [objects.regions(0, c).boxes is not None for c in range(22)]
    assert boxed == [c == 1 for c in range(22)]


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_picture_without_a_class_of_voc_is_left_out_and_said(tmp_path, name):
    content, reason = UNUSABLE[name]
    data = opened(make_voc(tmp_path / "VOC2012", {"a": A_CAT, name: content, "z": A_CAT}))
    assert [(s.name, s.label) for s in data.samples] == [
        ("JPEGImages/a.jpg", CAT),
        ("JPEGImages/z.jpg", CAT),
    ]
    (note,) = data.notes
    assert note.startswith(f"left out JPEGImages/{name}.jpg: {name} ")
    with pytest.raises(AftError, match=reason):
        opened(make_voc(tmp_path / "alone/VOC2012", {name: content}))


def test_a_segmentation_of_background_names_no_class(tmp_path):
    root = make_voc(tmp_path / "VOC2012", {"a": A_CAT, "b": A_CAT})
    labels = Image.new("L", (64, 64))
    labels.paste(255, (0, 0, 9, 9))
    labels.save(root / "SegmentationClass/b.png")
    data = opened(root)
    assert [s.name for s in data.samples] == ["JPEGImages/a.jpg"]
    assert "b.jpg: b shows none" in data.notes[0]


def test_other_classes_beside_a_known_one_count_for_nothing(tmp_path):
    mixed = annotation([("zebra", 1, 1, 64, 64), ("Dining table", *BOX)], (64, 64))
    data = opened(make_voc(tmp_path / "VOC2012", {"one": mixed}))
    assert data.samples[0].label == VOC_CLASSES.index("diningtable")
    assert "1 pictures also show" in data.notes[0] and "'zebra' in one" in data.notes[0]


def test_commands_say_what_is_left_out(tmp_path, monkeypatch):
    root = make_voc(tmp_path / "VOC2012", {"a": A_CAT, "cut": A_CAT[:-9]}, "train")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\ncut\n")
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: small_float())
    run = tmp_path / "run"
    done = aft("gen-masks", root, "--run", run, "--thresholds", "0.3", "--workers", "0", "--json")
    assert done.code in (0, None), done.err
    assert json.loads(done.out)["stores"][0]["images"] == 1
    assert "aft: left out JPEGImages/cut.jpg: cut has neither a readable segmentation" in done.err


def test_a_picture_that_is_listed_twice_counts_once(tmp_path):
    root = make_voc(tmp_path / "VOC2012", {"a": A_CAT, "b": A_CAT})
    listed = root / "ImageSets/Segmentation/val.txt"
    listed.write_text("a\nb\na\n")
    data = opened(root)
    assert [s.name for s in data.samples] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert data.notes == (f"{listed}: 1 lines repeat a picture; each picture counts once",)


@pytest.mark.parametrize("below", ["VOC2007", "VOCdevkit/VOC2007", "VOCdevkit/voc2010"])
def test_voc_of_any_year_is_voc(tmp_path, below):
    root = make_voc(tmp_path / below, {"one": A_CAT})
    data = opened(tmp_path)
    assert (data.kind, data.root, data.samples[0].label) == ("voc", root, CAT)
    # 2012 is the one of the paper.
    root = make_voc((tmp_path / below).parent / "VOC2012", {"one": A_CAT})
    assert opened(tmp_path).root == root


def test_several_years_are_no_choice_to_make_silently(tmp_path):
    for year in (2007, 2010):
        make_voc(tmp_path / f"VOC{year}", {"one": A_CAT})
    with pytest.raises(AftError, match=r"several data sets of VOC \(VOC2007, VOC2010\); name one"):
        opened(tmp_path)


@pytest.mark.parametrize("named", ["", "VOC2007"])
def test_voc_without_segmentation_lists_is_no_folder_of_classes(tmp_path, named):
    root = make_voc(tmp_path / "VOC2007", {"one": A_CAT})
    (root / "ImageSets/Segmentation/val.txt").unlink()
    (root / "ImageSets/Segmentation").rename(root / "ImageSets/Main")
    with pytest.raises(AftError, match=r"VOC2007: is Pascal VOC without ImageSets/Segmentation"):
        open_data_set(tmp_path / named, None, small_float().classes)
