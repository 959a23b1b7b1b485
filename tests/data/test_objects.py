"""Boxes, segmentations and lists of data sets: right, or one line that says what is wrong."""

import pytest
from PIL import Image

from aftcli.core.classes import Preprocessing
from aftcli.data.objects import Objects
from aftcli.data.sets import open_data_set
from aftcli.errors import AftError
from aftcli.formats.voc import VOC_CLASSES, read_xml
from tests.helpers import bombs, mutants
from tests.helpers.stored import make_images, small_float

LAUGHS = (
    '<!DOCTYPE a [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))
    + "]><annotation><object><name>&a9;</name></object></annotation>"
)
BOX = (
    "<annotation><size><width>{w}</width><height>64</height></size><object><name>cat</name>"
    "<bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>32</xmax><ymax>64</ymax></bndbox></object>"
    "</annotation>"
)
ANNOTATIONS = {
    "laughs": (LAUGHS.encode(), "DOCTYPE"),
    "laughs in UTF-16": (LAUGHS.encode("utf-16"), "DOCTYPE"),
    "outside": (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "DOCTYPE"),
    "cut": (BOX.format(w=64, x=1).encode()[:-20], "is not XML"),
    "bytes": (b"\xff\xfe\x00\x01", "is not XML"),
    "empty": (b"", "is not XML"),
    "encoding": (b'<?xml version="1.0" encoding="nothing"?><a/>', "is not XML"),
    "nan": (BOX.format(w=64, x="nan").encode(), "xmin is nan"),
    "infinite": (BOX.format(w="inf", x=1).encode(), "width is inf"),
    "text": (BOX.format(w=64, x="left").encode(), "could not convert"),
    "backwards": (BOX.format(w=64, x=40).encode(), "ends before it begins"),
}


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("one\n")
    Image.new("RGB", (64, 64)).save(root / "JPEGImages/one.jpg")
    (root / "Annotations/one.xml").write_text(BOX.format(w=64, x=1))
    return root


def opened(root):
    return open_data_set(root, "val", small_float().classes)


def test_the_annotations_below_are_right_but_for_one_thing(voc):
    data = opened(voc)
    areas = dict(zip(VOC_CLASSES, data.areas(0), strict=True))
    assert areas.pop("cat") == 31 * 63 / 64**2 and not any(areas.values())
    assert data.samples[0].label == VOC_CLASSES.index("cat")
    assert Objects(data, Preprocessing((32, 32), 36)).regions(0, 7).boxes.any()


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_damaged_annotations(voc, name):
    content, reason = ANNOTATIONS[name]
    data = opened(voc)
    (voc / "Annotations/one.xml").write_bytes(content)
    with pytest.raises(AftError, match=f"one has neither .* readable boxes.*{reason}"):
        opened(voc)
    if name not in ("infinite", "backwards"):
        with pytest.raises(AftError, match=r"one\.jpg: its boxes can't be read"):
            Objects(data, Preprocessing((32, 32), 36)).regions(0, 7)


def test_large_annotations_are_refused(voc, monkeypatch):
    monkeypatch.setattr("aftcli.files.LARGEST_TEXT", 99)
    with pytest.raises(ValueError, match="larger than 99 bytes"):
        read_xml(voc / "Annotations/one.xml")


SEGMENTATIONS = {
    "colours": (lambda p: Image.new("RGB", (64, 64)).save(p), "a class a pixel, this is RGB"),
    "numbers": (lambda p: Image.new("I;16", (64, 64)).save(p), "a class a pixel, this is I;16"),
    "bits": (lambda p: Image.new("1", (64, 64)).save(p), "a class a pixel, this is 1"),
    "bomb": (bombs.png_claim, "is too large"),
    "eps": (lambda p: p.write_bytes(bombs.EPS), "is not a picture"),
    "cut": (lambda p: p.write_bytes(mutants.PICTURES["palette.png"]()[:2000]), "may be damaged"),
}


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_damaged_segmentations(voc, name):
    write, reason = SEGMENTATIONS[name]
    data = opened(voc)
    write(voc / "SegmentationClass/one.png")
    with pytest.raises(AftError, match=reason):
        opened(voc)
    with pytest.raises(AftError, match=reason):
        Objects(data, Preprocessing((32, 32), 36)).regions(0, 7)


@pytest.mark.parametrize(
    "content", [b"one\n\xff\n", b"a/b\n", b"a\0b\n", b"n" * 9999], ids=["bytes", "/", "0", "long"]
)
def test_damaged_lists(voc, content):
    path = voc / "ImageSets/Segmentation/val.txt"
    path.write_bytes(content)
    with pytest.raises(AftError) as error:
        opened(voc)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 400


BOXES = {
    "nan": "file,x1,y1,x2,y2\na,nan,1,2,3\n",
    "infinite": "file,x1,y1,x2,y2\na,1,1,inf,3\n",
    "short": "file,x1,y1,x2,y2\na,1,1\n",
    "field": "file,x1,y1,x2,y2\n" + "a" * 200_000 + ",1,1,2,3\n",
    "bytes": "file,x1,y1,x2,y2\n\udcff,1,1,2,3\n",
    "binary": "\0" * 999,
}


@pytest.mark.parametrize("name", BOXES)
def test_damaged_tables_of_boxes(tmp_path, name):
    make_images(tmp_path / "data/val", each=1)
    (tmp_path / "data/val_boxes.csv").write_text(BOXES[name], errors="surrogateescape")
    data = open_data_set(tmp_path / "data", "val", small_float().classes)
    with pytest.raises(AftError, match="can't be read as boxes") as error:
        Objects(data, Preprocessing((32, 32), 36))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
