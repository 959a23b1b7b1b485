"""Manifests: files that list pictures and labels, and what is wrong with them."""

import csv
import os
import re

import pytest
import torch
from PIL import Image

from aftcli import AftError, MaskStore
from aftcli.core.classes import Classes, Preprocessing
from aftcli.data.objects import Objects
from aftcli.data.parts import Reading
from aftcli.data.sets import data_name, open_data_set, validation_of
from aftcli.networks.sources import imagenet_classes
from aftcli.settings import Search
from tests.helpers.command import aft
from tests.helpers.stored import NAMES, generate, make_images

FRUIT = Classes(NAMES)


def pictures(root, *names, size=(64, 64)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "grey").save(root / name)


def manifest(root, *lines, name="labels.csv", encoding="utf-8"):
    """A file of these lines, and a picture for each first value that is a plain name."""
    root.mkdir(exist_ok=True)
    (root / name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return root / name


def listing(path, split=None, classes=FRUIT, **options):
    return [tuple(s) for s in open_data_set(path, split, classes, **options).samples]


@pytest.fixture
def root(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "sub/c.png", "d.png")
    return tmp_path


def test_labels_are_names_ordered_by_class_and_name(root):
    path = manifest(root, "path,label", "d.png,plum", "sub/c.png,apple", "b.png,pear", "a.png,pear")
    assert listing(path) == [("sub/c.png", 0), ("a.png", 1), ("b.png", 1), ("d.png", 2)]
    data = open_data_set(path, None, FRUIT)
    assert (data.kind, data.root, data.split, data.mapped) == ("manifest", path, "", True)
    assert data.notes == () and data.picture(0).path == root / "sub/c.png"
    assert data_name(path, "manifest", "") == root.name


@pytest.mark.parametrize(
    ("name", "lines", "notes"),
    [
        ("labels.tsv", ("path\tlabel", "a.png\tpear"), []),
        ("labels.csv", ("path;label", "a.png;pear"), ["separated by ';'"]),
        (
            "labels.csv",
            ("Filename,Class", "a.png,pear"),
            ["'Filename' is taken as path", "'Class'"],
        ),
        ("labels.CSV", ("id,path,label", "7,a.png,pear", "", "8,a.png,pear"), ["1 lines repeat"]),
        ("labels.csv", ("\ufeffpath,label", '"a.png"," pear "'), []),
        ("labels.csv", ("path,label", "./a.png,Pear"), []),
        ("labels.csv", ("sep=;", "path;label", "a.png;pear"), []),
        ("labels.csv", ('"sep=|"\r', "path|label", "a.png|pear"), []),
        ("labels.tsv", ("\ufeffsep=,", "path,label", "a.png,pear"), []),
        ("labels.csv", ("path;label;;", "a.png;pear;;", ";;;", " ;;;"), ["separated by ';'"]),
    ],
)
def test_usual_spellings_are_read_and_guesses_said(root, name, lines, notes):
    data = open_data_set(manifest(root, *lines, name=name), None, FRUIT)
    assert [tuple(s) for s in data.samples] == [("a.png", 1)]
    assert len(data.notes) == len(notes)
    for note, part in zip(data.notes, notes, strict=True):
        assert part in note and name in note


def test_names_may_be_any_text(root):
    odd = ["größe, 1.png", "喵.png", 'quo"te.png', "two\nlines.png"]
    pictures(root, *odd)
    with open(root / "odd.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows([name, "plum"] for name in odd)
    assert sorted(name for name, _ in listing(root / "odd.csv")) == sorted(odd)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (("path,label", "a.png,pear", "b.png,"), "line 3: has no label; write one"),
        (("path,label", ",pear"), "line 2: has no path"),
        (
            ("path,label", "a.png,pear", "b.png,grape"),
            "line 3: 'grape' is not a class of the model",
        ),
        (("path,label", '"a\n.png",pear', "b.png,"), "line 4: has no label"),
        (("path,label", "a.png,pear", "", "a.png,plum"), "line 4: a.png has the label 'plum' here"),
        (("path,label", "a.png,pear", "../b.png,pear"), "line 3: '../b.png' is not a path below"),
        (("path,label", "/etc/b.png,pear"), "line 2: '/etc/b.png' is not a path below"),
        (("path,label", "a.png,pear,7"), "line 2: has 3 values, but the first line names 2"),
        (("path,label", 'a.png,"pear'), "can't be read as a list of pictures"),
        (("path,label", "x.png,pear"), "line 2: there is no .*x.png, nor any other picture"),
        (("path,label", "sub\\c.png,pear"), r"line 2: there is no .*; write paths with / in place"),
        (("path,label", "a.png,pear", "b.png,PEAR"), "line 3: 'PEAR' .*'PEAR' and 'pear'"),
        (("path,label",), "lists no picture"),
        (
            ("picture,label", "a.png,pear"),
            "is not a list of pictures: .* which are picture, label",
        ),
        (("path,label,x,y,w,h", "a.png,pear,1,2,0,4"), "line 2: its box has a width of 0"),
        (("path,label,x,y,w,h", "a.png,pear,1,2,3,"), "line 2: its box has a width of 3 and a hei"),
        (("path,label,x,y,w,h", "a.png,pear,1,2,3,b"), "line 2: could not convert"),
        (("path,label,split", "a.png,pear,train", "b.png,pear,"), "line 3: has no split"),
        (("path,label,split", "a.png,pear,one"), "has no split 'train'; there are one"),
        (("path,label,label", "a.png,pear,plum"), "has the columns 'label' and 'label'; rename"),
        (("path,Label,label", "a.png,pear,plum"), "has the columns 'Label' and 'label'; rename"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(root, lines, wrong):
    path = manifest(root, *lines)
    with pytest.raises(AftError, match=f"labels.csv: {wrong}"):
        open_data_set(path, None, FRUIT)


def test_other_encodings_are_refused_with_their_line(root):
    path = manifest(root, "path,label", "a.png,pear", "größe.png,plum", encoding="latin-1")
    with pytest.raises(AftError, match="labels.csv: line 3: is not in UTF-8; save the file"):
        open_data_set(path, None, FRUIT)
    path = manifest(root, "path,label", "a.png,pear", encoding="utf-16")
    with pytest.raises(AftError, match="labels.csv: line 1: is not in UTF-8"):
        open_data_set(path, None, FRUIT)


def test_absolute_paths_below_the_folder_are_taken_and_links_out_of_it_are_broken(root, tmp_path):
    path = manifest(root, "path,label", f"{root}/a.png,pear", "out.png,plum")
    os.symlink("/dev/null", root / "out.png")
    assert listing(path) == [("a.png", 1), ("out.png", 2)]
    with pytest.raises(AftError, match="is a link that leads out"):
        open_data_set(path, None, FRUIT).picture(1)


def test_missing_pictures_are_skipped_and_said(root):
    path = manifest(root, "path,label", "a.png,pear", "x.png,plum", "y.png,plum")
    data = open_data_set(path, None, FRUIT)
    assert [tuple(s) for s in data.samples] == [("a.png", 1)]
    assert data.notes == (
        f"{path}: skipped entries whose picture is missing: x.png (line 3), y.png (line 4)",
    )


def test_paths_of_windows_and_labels_in_two_cases_are_said(root):
    path = manifest(root, "path,label", "a.png,x", "b.png,X", "sub\\c.png,y")
    said, missing = open_data_set(path, None, FRUIT).notes
    assert said.endswith("differ in case alone are taken as several classes: 'X' and 'x'")
    assert missing.endswith("sub\\c.png (line 4); write paths with / in place of \\")


def test_labels_map_as_class_folders_do(root):
    own = open_data_set(manifest(root, "path,label", "a.png,x", "b.png,w"), None, FRUIT)
    assert (own.classes, own.mapped, [s.label for s in own.samples]) == (("w", "x"), False, [0, 1])
    known = imagenet_classes()
    path = manifest(root, "path,label", "a.png,n01440764", "b.png,n02102040")
    data = open_data_set(path, None, known)
    assert data.mapped and [known.wnids[s.label] for s in data.samples] == [
        "n01440764",
        "n02102040",
    ]


@pytest.mark.parametrize(
    ("labels", "classes", "mapped", "note"),
    [
        ("012", FRUIT, True, "indices of the model's classes .0: apple, 1: pear, 2: plum"),
        ("02", FRUIT, True, "indices of the model's classes .0: apple, 2: plum"),
        ("01", FRUIT, False, "names of classes of their own, not as indices"),
        ("39", FRUIT, False, "names of classes of their own"),
        ("01", Classes(("1", "0")), True, None),  # names come first
    ],
)
def test_numbers_are_indices_where_nothing_else_fits(root, labels, classes, mapped, note):
    rows = (f"{name}.png,{label}" for name, label in zip(("a", "b", "d"), labels, strict=False))
    data = open_data_set(manifest(root, "path,label", *rows), None, classes)
    assert data.mapped == mapped
    wanted = {"012": [0, 1, 2], "02": [0, 2]}.get(labels, [0, 1])
    assert sorted(s.label for s in data.samples) == wanted
    assert (len(data.notes) == 1) == bool(note)
    if note:
        assert re.search(note, data.notes[0])


def test_numbers_of_own_classes_are_in_their_order(root):
    path = manifest(root, "path,label", "a.png,10", "b.png,9")
    data = open_data_set(path, None, FRUIT)
    assert data.classes == ("9", "10") and listing(path) == [("b.png", 0), ("a.png", 1)]


def test_a_column_says_the_split(root):
    lines = ("a.png,pear,train", "b.png,plum,valid", "d.png,apple,test", "sub/c.png,apple,train")
    path = manifest(root, "path,label,split", *lines)
    data = open_data_set(path, None, FRUIT)
    assert data.split == "train"
    assert [tuple(s) for s in data.samples] == [("sub/c.png", 0), ("a.png", 1)]
    assert listing(path, "val") == listing(path, "valid") == [("b.png", 2)]
    found = validation_of(data, FRUIT)
    assert found.reason == "" and found.data_set.split == "valid"
    with pytest.raises(AftError, match="no split 'dev2'; there are train, valid, test"):
        open_data_set(path, "dev2", FRUIT)


def test_the_case_of_a_split_does_not_matter(root):
    lines = ("a.png,pear,Train", "b.png,pear,train", "sub/c.png,pear,TRAIN", "d.png,plum,Val")
    path = manifest(root, "path,label,split", *lines)
    assert [name for name, _ in listing(path)] == ["a.png", "b.png", "sub/c.png"]
    assert listing(path, "val") == listing(path, "VAL") == [("d.png", 2)]


def test_classes_are_those_of_all_splits(root):
    path = manifest(root, "path,label,split", "a.png,w,train", "b.png,v,val")
    assert open_data_set(path, "train", FRUIT).classes == ("v", "w")


def test_files_named_as_splits_are_splits(root):
    train = manifest(root, "path,label", "a.png,pear", name="train.csv")
    data = open_data_set(train, None, FRUIT)
    assert data.split == "train" and validation_of(data, FRUIT).data_set is None
    with pytest.raises(AftError, match="there is no file of the split 'val' beside it"):
        open_data_set(train, "val", FRUIT)
    val = manifest(root, "path,label", "b.png,plum", name="validation.csv")
    assert validation_of(data, FRUIT).data_set.root == val
    assert listing(train, "val") == listing(val) == [("b.png", 2)]
    assert listing(val, "train") == [("a.png", 1)]
    with pytest.raises(AftError, match="has no column split, so there is no split 'val'"):
        open_data_set(manifest(root, "path,label", "a.png,pear"), "val", FRUIT)


def test_boxes_are_regions_and_several_lines_a_picture_several_objects(root):
    path = manifest(
        root,
        "path,label,x,y,w,h",
        "a.png,pear,0,0,16,16",
        "a.png,plum,32,32,32,16",
        "a.png,pear,48,0,16,32",
        "b.png,apple,,,,",
    )
    data = open_data_set(path, None, FRUIT)
    # Two pears cover 16 x 16 + 16 x 32 pixels, the plum 32 x 16.
    assert [tuple(s) for s in data.samples] == [("b.png", 0), ("a.png", 1)]
    objects = Objects(data, Preprocessing(size=(64, 64), resize=64))
    assert objects.kinds == {"boxes"} and list(objects.files()) == [path]
    wanted = torch.zeros(64, 64, dtype=torch.bool)
    wanted[:16, :16] = wanted[:32, 48:] = True
    assert objects.regions(1, 1).boxes.equal(wanted)
    assert int(objects.regions(1, 2).boxes.sum()) == 32 * 16
    assert objects.regions(1, 0).boxes is None and objects.regions(0, 0).boxes is None


def test_all_labels_are_samples_where_that_is_asked_for(root):
    path = manifest(root, "path,label", "a.png,pear", "b.png,apple", "a.png,plum", "a.png,pear")
    data = open_data_set(path, None, FRUIT, reading=Reading(every=True))
    assert [tuple(s) for s in data.samples] == [("b.png", 0), ("a.png", 1), ("a.png", 2)]
    assert data.every


def test_a_parquet_file_is_read_as_a_csv_is(root):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    columns = {
        "path": ["b.png", "a.png"],
        "label": ["plum", "pear"],
        "split": ["train", "train"],
        "x": [1.0, None],
        "y": [2, None],
        "w": [8, None],
        "h": [4, float("nan")],
        "thumbnail": [b"1", b"2"],
    }
    path = root / "list.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert listing(path) == [("a.png", 1), ("b.png", 2)]
    data = open_data_set(path, None, FRUIT)
    assert data.format.annotations(data).marks(1, 2).boxes[0].box == (1, 2, 9, 6)
    columns["label"][1] = None
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(AftError, match="list.parquet: row 2: has no label"):
        open_data_set(path, None, FRUIT)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AftError, match="list.parquet: can't be read as a parquet file"):
        open_data_set(path, None, FRUIT)


def as_manifest(images, path):
    """The pictures of class folders as a manifest, in any order."""
    found = sorted(images.glob("*/*.png"), key=lambda p: p.name)
    lines = (f"{p.relative_to(path.parent)},{p.parent.name}" for p in found)
    return manifest(path.parent, "path,label", *lines, name=path.name)


def test_masks_are_those_of_class_folders(tmp_path):
    images = make_images(tmp_path / "fruit", each=2)
    generate(images, tmp_path / "one", ("gradcam",), Search((0.3, 0.6)))
    path = as_manifest(images, tmp_path / "labels.csv")
    generate(path, tmp_path / "two", ("gradcam",), Search((0.3, 0.6)))
    with (
        MaskStore(tmp_path / "one/masks/small-gradcam.h5") as one,
        MaskStore(tmp_path / "two/masks/small-gradcam.h5") as two,
    ):
        assert two.settings["data_set"] == str(path)
        for a, b in zip(one.rows(0, 6)._asdict().items(), two.rows(0, 6), strict=True):
            if a[0] != "path":
                assert a[1].tobytes() == b.tobytes(), a[0]
        assert [f"fruit/{r.path}" for r in one] == [r.path for r in two]


def test_what_is_no_manifest_is_refused(root):
    (root / "list.txt").write_text("a.png pear\n")
    result = aft("gen-masks", root / "list.txt", "--run", root / "run")
    assert result.code == 1 and "a file that ends in .csv" in result.err


def test_lines_are_counted_below_one_that_names_the_delimiter(root):
    path = manifest(root, "sep=;", "path;label", "a.png;pear", "b.png;")
    with pytest.raises(AftError, match="labels.csv: line 4: has no label"):
        listing(path)


def test_splits_of_one_meaning_are_said(root):
    lines = ("path,label,split", "a.png,pear,train", "b.png,pear,Training", "c.png,pear,training")
    pictures(root, "a.png", "b.png", "c.png")
    path = manifest(root, *lines)
    data = open_data_set(path, None, FRUIT)
    assert [s.name for s in data.samples] == ["a.png"]
    (note,) = data.notes
    assert "took the split 'train'; 2 lines of 'Training' are another one" in note
    assert [s.name for s in open_data_set(path, "training", FRUIT).samples] == [
        "b.png",
        "c.png",
    ]
