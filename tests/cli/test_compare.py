"""aft explain with several networks, and the grids of a call."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.core.classes import Preprocessing
from aftcli.errors import AftError
from aftcli.report import compared
from tests.helpers.command import aft, leftovers, quiet_objects, usage_error, without_chance
from tests.helpers.stored import draw, small_float

pytestmark = pytest.mark.usefixtures("folder")

SIDE, GAP, STEP = 224, 12, 20


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """The commands' classifiers by name: one of other weights that sees more of an image."""
    first, second = small_float(), small_float()
    with torch.no_grad():
        list(second.head.parameters())[0].mul_(-0.5)
    second.preprocessing = Preprocessing(size=(32, 32), resize=32)
    first.name, second.name = "efficientnet_lite0", "resnet50"
    by_name = {"efficientnet_lite0": first, "resnet50": second}

    def load(name, checkpoint, layer, **_):
        if name == "vgg16":
            raise AftError("no layer of that name")
        if checkpoint is None:
            return by_name[name or "efficientnet_lite0"]
        tuned = small_float()
        tuned.name, tuned.checkpoint = name or "resnet50", str(Path(checkpoint).absolute())
        return tuned

    monkeypatch.setattr("aftcli.models.load.load_classifier", load)
    return by_name


TORCH = ("--engine", "torch")  # whatever the number of images

BOTH = ("--model", "efficientnet_lite0", "--model", "resnet50")


def parts(found):
    """A result apart from its grids, which a call may have beside it."""
    own = {k: v for k, v in found["outputs"].items() if k not in ("grid", "overview")}
    return {**found, "outputs": {k: Path(v).name for k, v in own.items()}}


def test_what_one_network_cannot_explain_others_may(folder):
    draw("a.png")
    both = compared_objects("explain", "a.png", *BOTH, "--save", "none")
    mine, other = (found["class_name"] for found in both)
    assert mine != other
    options = ("--contrast", other, "--html", *TORCH)
    result = aft("explain", "a.png", *BOTH, *options, "--json")
    assert result.code == 1
    [found] = json.loads(result.out)
    assert (found["model"], found["class_name"]) == ("efficientnet_lite0", mine)
    written = [Path(found["outputs"]["overlay"]).name, "index.html"]
    assert leftovers(folder / "aft-out") == sorted(written)
    said = f"a.png: resnet50: {other} is the class explained; contrast it with another one"
    assert f"aft: {said}" in result.err.splitlines()
    assert said in Path("aft-out/index.html").read_text()


def compared_objects(*arguments):
    result = aft(*arguments, "--json")
    assert result.code == 0, result.err
    assert result.err.startswith("aft: 2 networks are in memory at once: ")
    assert without_chance(result.err).count("\n") == 1
    return json.loads(result.out)


def test_two_networks_find_and_write_what_each_finds_alone():
    draw("a.png"), draw("b.png", (50, 70), seed=1)
    images = ("explain", "a.png", "b.png")
    options = (*images, "--tft", "--cam", "gradcam,layercam", "--save", "overlay,map", *TORCH)
    together = compared_objects(*options, *BOTH, "--out", "both")
    one = quiet_objects(*options, "--out", "one")
    two = quiet_objects(*options, "--model", "resnet50", "--out", "two")
    assert [parts(found) for found in together] == [
        parts(found) for found in (*one[:2], *two[:2], *one[2:], *two[2:])
    ]
    assert {found["model"] for found in together} == {"efficientnet_lite0", "resnet50"}
    # The networks differ, and so do their files.
    assert one[0]["probability"] != two[0]["probability"]
    files = 0
    for alone in ("one", "two"):
        for path in Path(alone).iterdir():
            if path.name != "manifest.json" and path.stem.split("-")[-1] not in (
                "grid",
                "overview",
            ):
                assert (Path("both") / path.name).read_bytes() == path.read_bytes()
                files += 1
    assert files == 2 * 2 * 2 * 2  # networks, images, methods, kinds
    # Two grids of images, and one over them.
    assert len(leftovers(Path("both"))) == files + 3


def picture_at(pixels, column, y):
    """A picture of a grid, which lies at a column and a height."""
    x = GAP + column * (SIDE + GAP)
    return pixels[y : y + SIDE, x : x + SIDE]


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("cut", [(), ("--tft", "--save", "overlay")])
def test_a_grid_of_two_networks_holds_the_pictures_of_each_alone(cut):
    draw("a.png", (60, 60))
    options = ("explain", "a.png", "--cam", "gradcam", "--cam", "layercam", "--target", "pear")
    together = read(compared_objects(*options, *cut, *BOTH)[-1]["outputs"]["grid"])
    alone = [
        read(quiet_objects(*options, *cut, "--model", name)[-1]["outputs"]["grid"])
        for name in ("efficientnet_lite0", "resnet50")
    ]
    assert together.shape[1] == GAP + 4 * (SIDE + GAP)
    # A line more over each plain picture names the network.
    assert together.shape[0] == alone[0].shape[0] + STEP
    for column in range(4):
        grid, place = alone[column // 2], column % 2
        top = GAP + 2 * STEP
        expected = picture_at(grid, place, top)
        assert (picture_at(together, column, top + STEP) == expected).all()
        assert expected.std() > 5
        if cut:
            below = top + SIDE + GAP + 2 * STEP
            expected = picture_at(grid, place, below)
            assert (picture_at(together, column, below + STEP) == expected).all()
    assert not (alone[0] == alone[1]).all()


def test_an_overview_holds_the_rows_of_the_images():
    for seed, name in enumerate("abc"):
        draw(f"{name}.png", seed=seed)
    options = ("explain", "--cam", "gradcam,layercam", "--tft", "--save", "overlay", *TORCH)
    *others, last = quiet_objects(*options, "a.png", "b.png", "c.png", "--out", "all")
    assert not any("overview" in found["outputs"] for found in others)
    overview = read(last["outputs"]["overview"])
    assert Path(last["outputs"]["overview"]).name.startswith("images-3x2-")
    down = GAP + STEP + 2 * (2 * STEP + SIDE + GAP)
    assert overview.shape[:2] == (3 * down, GAP + 2 * (SIDE + GAP))
    for row, name in enumerate("abc"):
        single = read(quiet_objects(*options, f"{name}.png", "--out", name)[-1]["outputs"]["grid"])
        for column in range(2):
            for y in (GAP + 2 * STEP, 2 * GAP + 4 * STEP + SIDE):
                at = row * down + STEP + y
                assert (picture_at(overview, column, at) == picture_at(single, column, y)).all()


def test_images_of_one_map_each_stand_side_by_side():
    for seed, name in enumerate("ab"):
        draw(f"{name}.png", seed=seed)
    first, last = quiet_objects("explain", "a.png", "b.png")
    assert list(first["outputs"]) == ["overlay"]
    assert list(last["outputs"]) == ["overlay", "overview"]
    size = (GAP + 2 * (SIDE + GAP), GAP + 3 * STEP + SIDE + GAP)
    with Image.open(last["outputs"]["overview"]) as image:
        assert image.size == size
    # The same images and options write the same file, and others another one.
    assert quiet_objects("explain", "a.png", "b.png")[1]["outputs"] == last["outputs"]
    for options in (("b.png", "a.png"), ("a.png", "b.png", "--tft"), ("a.png", "c.png")):
        draw("c.png", seed=3)
        other = quiet_objects("explain", *options)[1]["outputs"]["overview"]
        assert other != last["outputs"]["overview"]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ((), 9),
        (("--top-k", "2"), 3),
        (("--target", "pear", "--target", "plum"), 3),
        (("--save", "map"), 3),
    ],
)
def test_many_images_or_classes_have_no_overview(options, count, monkeypatch):
    painted, tile = [], compared.tile
    monkeypatch.setattr(compared, "tile", lambda *place: painted.append(place) or tile(*place))
    for seed in range(count):
        draw(f"in/{seed}.png", seed=seed)
    result = aft("explain", "in", *options)
    note = "aft: 9 images: no grid of all, which shows 8 at the most\n" if count == 9 else ""
    assert (result.code, without_chance(result.err)) == (0, note)
    # Nothing is kept of images that no grid shows: a folder may hold very many.
    assert len(painted) == (2 * count if {"--top-k", "--target"} & set(options) else 0)
    assert aft("explain", "in", *options, "--quiet").err == ""
    assert not [name for name in leftovers(Path("aft-out")) if "overview" in name]


def test_images_that_can_not_be_read_are_left_out_of_the_overview():
    draw("a.png"), draw("c.png", seed=2)
    Path("b.png").write_bytes(b"nonsense")
    result = aft("explain", "a.png", "b.png", "c.png", "--json")
    found = json.loads(result.out)
    assert result.code == 1 and [each["image"] for each in found] == ["a.png", "c.png"]
    with Image.open(found[-1]["outputs"]["overview"]) as image:
        assert image.width == GAP + 2 * (SIDE + GAP)
    alone = json.loads(aft("explain", "b.png", "c.png", "--json").out)
    assert [list(each["outputs"]) for each in alone] == [["overlay"]]


def test_too_many_maps_have_no_grid(monkeypatch):
    monkeypatch.setattr(compared, "MOST", 3)
    draw("a.png")
    draw("b.png", seed=1)
    options = ("explain", "a.png", "b.png", "--cam", "gradcam", "--cam", "layercam", "--top-k", "2")
    result = aft(*options, "--json")
    note = "aft: 4 maps side by side: no grid, which shows 3 at the most\n"
    assert (result.code, result.err) == (0, note)
    assert all(list(each["outputs"]) == ["overlay"] for each in json.loads(result.out))


def test_networks_that_predict_other_classes_share_rows(networks, monkeypatch):
    rows = []
    drawn = compared.drawn
    monkeypatch.setattr(compared, "drawn", lambda table: rows.extend(table) or drawn(table))
    draw("a.png")
    found = compared_objects("explain", "a.png", "--top-k", "2", *BOTH)
    classes = [each["class_name"] for each in found]
    assert classes[:2] != classes[2:]
    assert len(rows) == 2
    for i, row in enumerate(rows):
        names = [tile.lines[2].split()[0] for tile in row.tiles]
        assert names == [classes[i], classes[2 + i]]
        assert [tile.lines[0] for tile in row.tiles] == ["efficientnet_lite0", "resnet50"]


def test_a_tuned_network_is_compared_with_the_published_one():
    draw("a.png")
    Path("tuned.pth").write_bytes(b"-")
    asked = ("--model", "resnet50", "--checkpoint", "none", "--checkpoint", "tuned.pth")
    plain, tuned = compared_objects("explain", "a.png", *asked)
    assert "checkpoint" not in plain and tuned["checkpoint"] == str(Path("tuned.pth").absolute())
    assert plain["outputs"]["overlay"] != tuned["outputs"]["overlay"]
    lines = aft("explain", "a.png", *asked).out.splitlines()
    assert lines[0].split()[:3] == ["image", "network", "cam"]
    assert [" ".join(line.split()[1:3]) for line in lines[1:3]] == [
        "resnet50 published",
        "resnet50 tuned.pth",
    ]
    [only] = quiet_objects("explain", "a.png", "--model", "resnet50", "--checkpoint", "tuned.pth")
    assert parts(only) == parts(tuned)
    # A file of the published network alone has nothing to do with the checkpoint beside it.
    Path("tuned.pth").write_bytes(b"+")
    [only] = quiet_objects("explain", "a.png", "--model", "resnet50")
    assert parts(only) == parts(plain)


REFUSED = [
    (("--model", "vgg16", "--model", "resnet50"), "vgg16: no layer of that name"),
    ((*BOTH, "--model", "ResNet-50"), "resnet50 is named twice"),
    (("--checkpoint", "a.pth", "--checkpoint", "gone.pth"), "gone.pth: there is no such"),
    ((*BOTH, "--target", "cat"), "efficientnet_lite0: unknown class 'cat'"),
]
MISUSED = [
    ((*BOTH, "--model", "resnet50"), "--model names resnet50 twice"),
    ((*BOTH, "--checkpoint", "a.pth"), "--checkpoint belongs to one network"),
    (("--checkpoint", "a.pth", "--checkpoint", "a.pth"), "--checkpoint names a.pth twice"),
]


@pytest.mark.parametrize(("options", "wrong"), REFUSED, ids=lambda each: str(each)[:40])
def test_networks_that_can_not_be_meant_are_refused(networks, options, wrong):
    networks["ResNet-50"] = networks["resnet50"]
    draw("a.png"), Path("a.pth").touch()
    result = aft("explain", "a.png", *options)
    assert result.code == 1 and not Path("aft-out").exists()
    assert result.err.splitlines()[-1].startswith(f"aft: {wrong}")


@pytest.mark.parametrize(("options", "wrong"), MISUSED, ids=lambda each: str(each)[:40])
def test_networks_named_against_each_other_are_a_usage_error(networks, options, wrong):
    draw("a.png"), Path("a.pth").touch()
    assert usage_error(aft("explain", "a.png", *options)).startswith(f"Error {wrong}")
    assert not Path("aft-out").exists()


@pytest.mark.parametrize("command", ["tft", "gen-masks", "finetune", "evaluate"])
def test_other_commands_take_one_network(command):
    draw("a.png")
    given = ("a.png",) if command == "tft" else ()
    assert "give --model once" in usage_error(aft(command, *given, *BOTH))
    files = ("--checkpoint", "a.pth", "--checkpoint", "b.pth")
    assert "give --checkpoint once" in usage_error(aft(command, *given, *files))


def test_an_image_of_the_same_name_in_another_call_has_a_name_of_its_own():
    for where, seed in (("a", 1), ("b", 2), ("c", 1)):
        draw(f"{where}/photo.png", seed=seed)
    options = ("--target", "pear", "--save", "overlay,map")
    [first] = quiet_objects("explain", "a/photo.png", *options)
    before = {name: (Path("aft-out") / name).read_bytes() for name in leftovers(Path("aft-out"))}
    assert set(first["outputs"].values()) == {f"aft-out/{name}" for name in before}
    result = aft("explain", "b/photo.png", *options, "--json")
    [second] = json.loads(result.out)
    name = Path(second["outputs"]["map"]).name.removesuffix("-pear-layercam-map.npy")
    assert name.startswith("photo-") and len(name) == len("photo-") + 6
    said = "aft-out: has files of another image named photo; those of b/photo.png are named"
    assert result.err == f"aft: {said} {name}\n"
    for file, content in before.items():
        assert (Path("aft-out") / file).read_bytes() == content
    # Both again, by calls in any order, and a copy of the first: no name more.
    files = leftovers(Path("aft-out"))
    for path, expected in (("b", second), ("a", first), ("c", first), ("b", second)):
        found = json.loads(aft("explain", f"{path}/photo.png", *options, "--json").out)
        assert [each["outputs"] for each in found] == [expected["outputs"]]
    assert leftovers(Path("aft-out")) == files
    # An image that is edited is another one.
    shutil.copyfile("b/photo.png", "a/photo.png")
    found = json.loads(aft("explain", "a/photo.png", *options, "--json").out)
    assert found[0]["outputs"] == second["outputs"]
