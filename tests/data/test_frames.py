"""Boxes and segmentations of pictures that EXIF turns: they lie on the picture as it is shown."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from aftcli.core.classes import Preprocessing
from aftcli.data.images import read_image, to_input
from aftcli.data.objects import Objects
from aftcli.data.sets import open_data_set
from aftcli.errors import AftError
from aftcli.formats.voc import VOC_CLASSES
from tests.helpers.stored import small_float
from tests.helpers.voc import annotation, make_voc

# Resized to the shorter side of the pictures below: what the network sees are their own pixels.
PREP = Preprocessing((32, 32), 40, "nearest")
CAT = VOC_CLASSES.index("cat")
SIDEWAYS = (5, 6, 7, 8)


def stored_picture(path, orientation, size=(60, 40), kind="PNG"):
    """A black picture with a white box, stored so that it is shown as `size`.

    Returns:
        The pixels as stored and as shown.
    """
    shown = Image.new("RGB", size)
    shown.paste("white", (16, 6, 28, 22))
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Of the eight ways to store it, the one that Pillow turns into `shown`.
    for method in (None, *Image.Transpose):
        stored = shown if method is None else shown.transpose(method)
        stored.save(path, kind, exif=exif)
        with Image.open(path) as image:
            if np.array_equal(ImageOps.exif_transpose(image), shown):
                return np.asarray(stored), np.asarray(shown)
    raise AssertionError(orientation)


def white_box(pixels):
    """The first and last columns and rows of what is white: left, top, right, bottom."""
    rows, columns = np.nonzero(pixels[..., 0])
    return columns.min(), rows.min(), columns.max(), rows.max()


def seen_white(path):
    """Return where the network sees white: the pixels themselves say where the object is."""
    return to_input(read_image(path), PREP)[0, 0] > 0


def one_of(pair, frame):
    return pair[("stored", "shown").index(frame)]


# Where the size fits both ways, boxes are those of the stored pixels.
CASES = [(o, f) for o in range(1, 9) for f in ("stored", "shown") if f == "stored" or o in SIDEWAYS]


@pytest.mark.parametrize(("orientation", "frame"), CASES)
def test_voc_lies_on_the_shown_picture(tmp_path, orientation, frame):
    root = make_voc(tmp_path / "VOC2012", {"one": ""})
    picture = root / "JPEGImages/one.jpg"
    pixels = one_of(stored_picture(picture, orientation), frame)
    left, top, right, bottom = white_box(pixels)
    box = ("cat", left + 1, top + 1, right + 1, bottom + 1)
    (root / "Annotations/one.xml").write_text(annotation([box], pixels.shape[1::-1]))
    labels = np.where(pixels[..., 0] > 0, 1 + CAT, 0).astype(np.uint8)
    Image.fromarray(labels).save(root / "SegmentationClass/one.png")
    said = []
    objects = Objects(open_data_set(root, "val", small_float().classes), PREP, said.append)
    found = objects.regions(0, CAT)
    expected = seen_white(picture)
    assert 0 < expected.sum() < expected.numel() / 2
    assert torch.equal(found.boxes, expected)
    assert torch.equal(found.segmentation, expected)
    assert len(said) == (2 if orientation in (2, 3, 4) else 0)
    assert all("fits both ways and taken as of its stored pixels" in s for s in said)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("given", [True, False], ids=["size given", "no size"])
@pytest.mark.parametrize(("orientation", "frame"), CASES)
def test_listed_boxes_lie_on_the_shown_picture(tmp_path, orientation, frame, given, kind):
    folder = tmp_path / "data/val/apple"
    folder.mkdir(parents=True)
    picture = folder / f"a.{kind[:3].lower()}"
    both = stored_picture(picture, orientation, kind=kind)
    pixels = one_of(both, frame if given else "stored")
    sides = (",width,height", ",{1},{0}".format(*pixels.shape)) if given else ("", "")
    box = ",".join(map(str, white_box(pixels)))
    (tmp_path / "data/val_boxes.csv").write_text(
        f"file,x1,y1,x2,y2{sides[0]}\napple/{picture.name},{box}{sides[1]}\n"
    )
    said = []
    data = open_data_set(tmp_path / "data", "val", small_float().classes)
    found = Objects(data, PREP, said.append).regions(0, data.samples[0].label)
    assert torch.equal(found.boxes, seen_white(picture))
    assert bool(said) == (orientation != 1 and (not given or orientation in (2, 3, 4)))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_of_a_turned_square_are_those_of_its_stored_pixels(tmp_path, orientation):
    root = make_voc(tmp_path / "VOC2012", {"one": ""})
    picture = root / "JPEGImages/one.jpg"
    stored, _ = stored_picture(picture, orientation, (40, 40))
    left, top, right, bottom = white_box(stored)
    box = ("cat", left + 1, top + 1, right + 1, bottom + 1)
    (root / "Annotations/one.xml").write_text(annotation([box, box], (40, 40)))
    said = []
    objects = Objects(open_data_set(root, "val", small_float().classes), PREP, said.append)
    assert torch.equal(objects.regions(0, CAT).boxes, seen_white(picture))
    objects.regions(0, CAT)
    assert len(said) == 1 and "one.jpg, which EXIF turns, are of a size that fits both" in said[0]


def test_annotations_of_neither_the_stored_nor_the_shown_picture_are_refused(tmp_path):
    root = make_voc(tmp_path / "VOC2012", {"one": annotation([("cat", 1, 1, 9, 9)], (50, 40))})
    stored_picture(root / "JPEGImages/one.jpg", 6)
    objects = Objects(open_data_set(root, "val", small_float().classes), PREP)
    with pytest.raises(AftError, match=r"one\.xml: its boxes are of 50 x 40.*40 x 60.*60 x 40"):
        objects.regions(0, CAT)
    (root / "Annotations/one.xml").write_text(annotation([("cat", 1, 1, 9, 9)], (40, 60)))
    Image.new("L", (30, 30), 1 + CAT).save(root / "SegmentationClass/one.png")
    with pytest.raises(AftError, match=r"one\.png: its segmentation is of 30 x 30"):
        objects.regions(0, CAT)
