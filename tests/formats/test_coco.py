"""COCO: labels by the largest area, boxes, polygons, run-length encodings, crowds, damage."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli import AftError, MaskStore
from aftcli.core.classes import Classes, Preprocessing
from aftcli.data.objects import Objects, to_rle
from aftcli.data.parts import Reading
from aftcli.data.sets import data_name, open_data_set, validation_of
from aftcli.settings import Search
from tests.helpers.stored import NAMES, generate, make_images

FRUIT = Classes(NAMES)
CATEGORIES = [{"id": 7 + i, "name": name} for i, name in enumerate(NAMES)]
WHOLE = Preprocessing(size=(64, 64), resize=64)


def rectangle(label, x, y, w, h, crowd=False, **more):
    """An annotation whose outline is its box."""
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    outline = [corners]
    if crowd:
        mask = np.zeros((64, 64), bool)
        mask[y : y + h, x : x + w] = True
        outline = to_rle(mask)
    return {
        "category_id": 7 + NAMES.index(label),
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": int(crowd),
        "segmentation": outline,
        **more,
    }


def coco(root, split="val2017", **pictures):
    """A data set with these pictures, of 64 x 64, and their annotations."""
    images, annotations = [], []
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number, (stem, objects) in enumerate(pictures.items()):
        name = f"{stem}.png"
        Image.new("RGB", (64, 64), "grey").save(root / split / name)
        images.append({"id": number, "file_name": name, "width": 64, "height": 64})
        annotations += [{"id": len(annotations), "image_id": number, **o} for o in objects]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path = root / f"annotations/instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def path(tmp_path):
    return coco(
        tmp_path / "coco",
        a=[rectangle("pear", 0, 0, 8, 8), rectangle("plum", 10, 10, 9, 9)],
        b=[rectangle("pear", 0, 0, 16, 8), rectangle("pear", 32, 32, 8, 8)],
        c=[rectangle("plum", 0, 0, 64, 60, crowd=True), rectangle("apple", 2, 2, 4, 4)],
        d=[],
        e=[rectangle("plum", 0, 0, 64, 60, crowd=True)],
    )


def test_labels_are_those_of_the_largest_area(path):
    data = open_data_set(path, None, FRUIT)
    assert (data.kind, data.root, data.split, data.mapped) == ("coco", path, "val", True)
    assert [tuple(s) for s in data.samples] == [
        ("val2017/c.png", 0),
        ("val2017/b.png", 1),
        ("val2017/a.png", 2),
    ]
    assert data.notes == (f"{path}: skipped 2 pictures without an object of a class",)
    assert data.picture(0).path == path.parent.parent / "val2017/c.png"
    assert data_name(path, "coco", "val2017") == "coco"


def test_all_labels_are_samples_where_that_is_asked_for(path):
    data = open_data_set(path, None, FRUIT, reading=Reading(every=True))
    assert [(s.name[8], s.label) for s in data.samples] == [
        ("c", 0),
        ("a", 1),
        ("b", 1),
        ("a", 2),
    ]


def test_areas_of_several_objects_add_up(tmp_path):
    two = [rectangle("pear", 0, 8 * i, 6, 6) for i in range(2)]
    path = coco(tmp_path / "coco", a=[rectangle("plum", 20, 20, 8, 8), *two])
    assert open_data_set(path, None, FRUIT).samples[0].label == 1
    content = json.loads(path.read_text())
    for each in content["annotations"]:
        each["area"] /= 1 if each["category_id"] == 9 else 2  # as outlines inside the boxes have
    path.write_text(json.dumps(content))
    assert open_data_set(path, None, FRUIT).samples[0].label == 2


def test_a_folder_is_recognised_and_has_its_splits(path):
    root = path.parent.parent
    assert open_data_set(root, "val", FRUIT).samples == open_data_set(path, None, FRUIT).samples
    with pytest.raises(AftError, match="has no split 'train'; there are instances_val2017.json"):
        open_data_set(root, None, FRUIT)
    coco(root, "train2017", x=[rectangle("pear", 0, 0, 8, 8)])
    train = open_data_set(root, None, FRUIT)
    assert train.split == "train" and validation_of(train, FRUIT).data_set.root == path
    found = open_data_set(train.root, "val", FRUIT)
    assert found.root == path and found.split == "val"
    assert open_data_set(root, "val2017", FRUIT).samples == found.samples
    coco(root, "val2014", y=[rectangle("pear", 0, 0, 8, 8)])
    with pytest.raises(AftError, match="several files of the split 'val'; there are .*2014.json"):
        open_data_set(root, "val", FRUIT)
    assert open_data_set(root, "val2014", FRUIT).samples[0].name == "val2014/y.png"


def test_a_train_split_has_its_val(path):
    root = path.parent.parent
    coco(root, "train", x=[rectangle("pear", 0, 0, 8, 8)])
    (root / "annotations/instances_val.json").write_bytes(path.read_bytes())
    path.unlink()
    found = validation_of(open_data_set(root, None, FRUIT), FRUIT)
    assert found.reason == f"{root}/annotations/instances_val.json: none of its pictures is in " + (
        ", ".join(f"{root}{place}" for place in ("/val", "/images/val", "/images", ""))
        + "; put them there"
    )
    (root / "val2017").rename(root / "val")
    assert validation_of(open_data_set(root, None, FRUIT), FRUIT).data_set.split == "val"


def test_regions_are_boxes_and_outlines_and_crowds_are_void(tmp_path):
    path = coco(
        tmp_path / "coco",
        a=[
            rectangle("pear", 4, 6, 10, 20),
            rectangle("plum", 30, 30, 20, 20),
            rectangle("pear", 0, 0, 40, 16, crowd=True),
        ],
    )
    data = open_data_set(path, None, FRUIT)
    objects = Objects(data, WHOLE)
    assert objects.kinds == {"boxes", "segmentation"} and list(objects.files()) == [path]
    own = torch.zeros(64, 64, dtype=torch.bool)
    own[6:26, 4:14] = True
    crowd = torch.zeros(64, 64, dtype=torch.bool)
    crowd[:16, :40] = True
    regions = objects.regions(0, 1)
    assert regions.boxes.equal(own) and regions.segmentation.equal(own)
    assert regions.counted.equal(~crowd | own)
    plum = objects.regions(0, 2)
    assert plum.counted.all() and int(plum.segmentation.sum()) == 400
    assert objects.regions(0, 0) == (None, None, None)


def test_every_form_of_an_outline_is_the_same_region(tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[6:26, 4:14] = True
    rle, flat = to_rle(mask), mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    outlines = [rle, {"size": [64, 64], "counts": runs}, [[4, 6, 14, 6, 14, 16, 4, 16]] * 1]
    outlines[2] = [[4, 6, 14, 6, 14, 16, 4, 16], [4, 16, 14, 16, 14, 26, 4, 26]]
    box = rectangle("pear", 4, 6, 10, 20)
    pictures = {f"p{i}": [{**box, "segmentation": o}] for i, o in enumerate(outlines)}
    data = open_data_set(coco(tmp_path / "coco", **pictures), None, FRUIT)
    for i in range(3):
        region = Objects(data, WHOLE).regions(i, 1).segmentation
        assert region.equal(torch.from_numpy(mask))


def test_an_object_without_outline_leaves_boxes_alone(tmp_path):
    path = coco(tmp_path / "coco", a=[rectangle("pear", 4, 6, 10, 20, segmentation=[])])
    objects = Objects(open_data_set(path, None, FRUIT), WHOLE)
    assert objects.kinds == {"boxes"}
    regions = objects.regions(0, 1)
    assert int(regions.boxes.sum()) == 200 and regions.segmentation is None


def test_other_categories_count_for_nothing_or_are_classes(path):
    data = open_data_set(path, None, Classes(("pear", "quince")))
    assert data.mapped and [tuple(s) for s in data.samples] == [
        ("val2017/a.png", 0),
        ("val2017/b.png", 0),
    ]
    assert "2 of 3 categories are not classes of the model and count for nothing" in data.notes[0]
    own = open_data_set(path, None, Classes(("x", "y")))
    assert own.classes == NAMES and not own.mapped


def broken(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "no list": (lambda c: c.pop("images"), "has no lists images, annotations, categories"),
    "no name": (lambda c: c["images"][1].pop("file_name"), r"images\[1\] has no file_name"),
    "no label": (lambda c: c["annotations"][1].pop("category_id"), "has no category_id"),
    "unknown class": (
        lambda c: c["annotations"][1].update(category_id=99),
        r"annotations\[1\] is of a category or image that is not listed",
    ),
    "twice": (
        lambda c: c["images"][1].update(file_name="a.png"),
        r"images\[1\] has the file_name 'a.png', as another has",
    ),
    "outside": (
        lambda c: c["images"][1].update(file_name="../b.png"),
        r"images\[1\]: '../b.png' is not a path below",
    ),
    "box": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]),
        r"annotations\[0\] has the box",
    ),
    "size": (
        lambda c: c["images"][1].update(width=10**9),
        r"images\[1\] is of 1000000000 x 64 pixels",
    ),
    "twice, spelled otherwise": (
        lambda c: c["images"][1].update(file_name="./a.png"),
        r"images\[1\] has the file_name 'a.png', as another has \(images\[0\]\)",
    ),
    "one id for two pictures": (
        lambda c: c["images"][1].update(id=0),
        r"images\[1\] has the id 0, as another has \(images\[0\]\)",
    ),
    "one id for two categories": (
        lambda c: c["categories"][2].update(id=7),
        r"categories\[2\] has the id 7, as another has \(categories\[0\]\)",
    ),
    "box of a text": (
        lambda c: c["annotations"][0].update(bbox={"x": 1}),
        r"annotations\[0\] has the box {'x': 1}",
    ),
    "box beyond floats": (
        lambda c: c["annotations"][0].update(bbox=[10**400, 0, 1, 1]),
        r"annotations\[0\] has the box \[1000",
    ),
    "area": (lambda c: c["annotations"][0].update(area="x"), r"annotations\[0\] has the area x"),
    "area beyond floats": (
        lambda c: c["annotations"][0].update(area=10**400),
        r"annotations\[0\] has the area 1000",
    ),
    "infinite size": (lambda c: c["images"][1].update(width=float("inf")), r"images\[1\]: "),
    "size of a text": (lambda c: c["images"][1].update(width="wide"), r"images\[1\]: .*'wide'"),
    "no object": (lambda c: c["annotations"].insert(0, 5), r"annotations\[0\] has no category_id"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_said_with_its_place(path, damage):
    change, wrong = DAMAGES[damage]
    broken(path, change)
    with pytest.raises(AftError, match=f"instances_val2017.json: can't be read as .*{wrong}"):
        open_data_set(path, None, FRUIT)


def test_text_that_is_no_json_is_refused(path):
    path.write_text(path.read_text()[:-5])
    with pytest.raises(AftError, match="can't be read as COCO's instances"):
        open_data_set(path, None, FRUIT)


@pytest.mark.parametrize(
    ("outline", "wrong"),
    [
        ({"size": [64, 64], "counts": [3]}, "its runs do not fill 64 x 64"),
        ({"size": [32, 64], "counts": [2048]}, "it is of 64 x 32 pixels"),
        ([[1, 2, 3, 4, 5]], "cannot reshape"),
        ([[1, 2, 3, float("inf"), 5, 6]], "it has corners that are not finite"),
        ({"counts": [3]}, "'size'"),
        (["abc"], "could not convert"),
    ],
)
def test_a_damaged_outline_is_an_error_where_it_is_needed(tmp_path, outline, wrong):
    bad = rectangle("pear", 4, 6, 10, 20, segmentation=outline)
    data = open_data_set(coco(tmp_path / "coco", a=[bad]), None, FRUIT)
    with pytest.raises(AftError, match=rf"annotations\[0\]: its segmentation is damaged: {wrong}"):
        Objects(data, WHOLE).regions(0, 1)


def test_missing_pictures_are_skipped_and_said(path):
    (path.parent.parent / "val2017/b.png").unlink()
    data = open_data_set(path, None, FRUIT)
    assert [s.name for s in data.samples] == ["val2017/c.png", "val2017/a.png"]
    assert "skipped entries whose picture is missing: val2017/b.png (annotations[2])" in "".join(
        data.notes
    )


def test_masks_are_those_of_class_folders(tmp_path):
    images = make_images(tmp_path / "fruit", each=2)
    generate(images, tmp_path / "one", ("gradcam",), Search((0.3, 0.6)))
    found = sorted(images.glob("*/*.png"), key=lambda p: p.name)
    content = {
        "images": [
            {"id": i, "file_name": str(p.relative_to(images)), "width": 52, "height": 40}
            for i, p in enumerate(found)
        ],
        "annotations": [
            {"image_id": i, **rectangle(p.parent.name, 0, 0, 9, 9)} for i, p in enumerate(found)
        ],
        "categories": CATEGORIES,
    }
    (images / "fruit.json").write_text(json.dumps(content))
    generate(images / "fruit.json", tmp_path / "two", ("gradcam",), Search((0.3, 0.6)))
    with (
        MaskStore(tmp_path / "one/masks/small-gradcam.h5") as one,
        MaskStore(tmp_path / "two/masks/small-gradcam.h5") as two,
    ):
        for a, b in zip(one.rows(0, 6), two.rows(0, 6), strict=True):
            assert a.tobytes() == b.tobytes()
