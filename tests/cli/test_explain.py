"""The commands explain and tft: what they print, what they write, how they end."""

import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

import aftcli
from aftcli.core.methods import CAMS
from aftcli.data.images import View, read_image, to_input, view_of
from aftcli.data.maps import fit_map
from aftcli.errors import AftError
from aftcli.pictures import overlay as overlaying
from aftcli.report import explain as report
from aftcli.report import names
from aftcli.settings import THRESHOLDS, Search
from aftcli.tft import explain as engine
from aftcli.tft.explain import Explanation
from aftcli.tft.result import TftResult
from tests.helpers.command import aft, leftovers, quiet_objects, usage_error
from tests.helpers.stored import NAMES, draw, small_float

pytestmark = pytest.mark.usefixtures("folder")

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs/images"
CHELSEA = IMAGES / "chelsea.jpg"
MAP = np.exp(-((np.mgrid[:32, :32] - 14.0) ** 2).sum(0) / 50)


@pytest.fixture
def real(monkeypatch, lite0):
    """The commands' classifier: the embedded one, loaded once for all tests."""
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: lite0)
    return lite0


def done(result):
    """The result of a command that has nothing to complain about."""
    assert (result.code, result.err) == (0, "")
    return result.out


def close(expected):
    return pytest.approx(expected, rel=1e-5)


def expected_of(f, path, methods, settings=None, **options):
    return engine.explain(
        f, to_input(read_image(path), f.preprocessing), methods, settings=settings, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["binary", "soft"])
def test_explain_tft_says_and_writes_what_the_engine_finds(real, folder, masking):
    settings = Search(THRESHOLDS, masking, "mean", "percentile")
    [expected] = expected_of(real, CHELSEA, ["layercam"], settings)
    options = ("--masking", masking, "--threshold-mode", "percentile", "--out", "o")
    [found] = quiet_objects(
        "explain", CHELSEA, "--tft", "--save", "overlay,figure,map,mask", *options
    )
    outputs = found.pop("outputs")
    tft = found.pop("tft")
    assert found == {
        "image": str(CHELSEA),
        "model": "efficientnet_lite0",
        "layer": "conv_head+bn2",
        "cam": "layercam",
        "class_index": 282,
        "class_name": "tiger cat",
        "probability": close(expected.probability),
    }
    best = int(expected.tft.best)
    assert tft == {
        "thresholds": list(THRESHOLDS),
        "probabilities": close(expected.tft.probabilities[0].tolist()),
        "rpi": pytest.approx(expected.tft.rpi[0].tolist(), rel=1e-3, abs=1e-5),
        "tau": THRESHOLDS[best],
        "probability": close(expected.tft.probabilities[0, best].item()),
        "area": close(expected.tft.mask.double().mean().item()),
        "masking": masking,
        "fill": "mean",
        "threshold_mode": "percentile",
        "search": "exact",
    }
    said = "tft-percentile" if masking == "binary" else "tft-soft-percentile"
    assert outputs == {
        "overlay": f"o/chelsea-tiger_cat-layercam-{said}-overlay.png",
        "figure": f"o/chelsea-tiger_cat-layercam-{said}-figure.png",
        "map": "o/chelsea-tiger_cat-layercam-map.npy",
        "mask": f"o/chelsea-tiger_cat-layercam-{said}-mask.png",
    }
    assert leftovers(folder) == sorted(outputs.values())
    values = np.load(outputs["map"])
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected.attribution, atol=1e-5)
    mask = np.asarray(Image.open(outputs["mask"]))
    assert set(np.unique(mask)) == {0, 255}
    assert (mask.astype(bool) != expected.tft.mask[0].numpy()).mean() < 1e-3


def test_the_figure_shows_image_map_and_fine_tuned_map(real, folder):
    with Image.open(CHELSEA) as image:
        image.convert("L").save("grey.png")
    [found] = quiet_objects("explain", "grey.png", "--tft", "--target", "tabby", "--save", "figure")
    # On a grey picture colour is the map's.
    shown = panels(found["outputs"]["figure"], 3)
    coloured = [np.ptp(panel, axis=2) > 15 for panel in shown]
    area = found["tft"]["area"]
    assert 0.05 < area < 0.9
    shares = [panel.mean() for panel in coloured]
    assert shares == [0, pytest.approx(1, abs=0.06), pytest.approx(area, abs=0.03)]
    picture = read_image(Path("grey.png"))
    box = view_of(picture.size, real.preprocessing).box(picture.size)
    seen = picture.resize(shown[0].shape[1::-1], Image.Resampling.BICUBIC, box=box)
    assert np.abs(np.asarray(seen).astype(int) - shown[0]).mean() < 8


def panels(path, count):
    """The pictures of a figure, cut out along the white around them."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    ink = (pixels != 255).any(2)
    columns = runs(ink[60:420].mean(0) > 0.9)
    assert len(columns) == count
    [rows] = runs(ink[:, columns[0]].mean(1) > 0.9)
    return [pixels[rows, c] for c in columns]


def runs(flags):
    """Find where at least 200 flags in a row are set."""
    steps = np.diff(flags.astype(int), prepend=0, append=0)
    edges = zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True)
    return [slice(start, end) for start, end in edges if end - start > 200]


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(CHELSEA) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return path


def test_the_overlay_is_the_picture_with_the_map_where_the_model_looked(f, folder):
    tall = draw(folder / "tall.png", (44, 90))
    for path in (CHELSEA, rotated(folder / "rotated.png"), tall):
        [found] = quiet_objects("explain", path, "--save", "overlay,map")
        original = read_image(path)
        painted = np.asarray(Image.open(found["outputs"]["overlay"])).astype(int)
        assert painted.shape[1:] == (original.width, 3)
        # A caption follows under pictures that are wide enough.
        assert (painted.shape[0] > original.height) == (original.width >= 160)
        painted = painted[: original.height]
        view = view_of(original.size, f.preprocessing)
        left, top, right, bottom = (round(edge) for edge in view.box(original.size))
        inside = np.zeros(painted.shape[:2], bool)
        inside[top:bottom, left:right] = True
        grey = np.asarray(original.convert("L")).astype(float)
        original = np.asarray(original).astype(int)
        # What the network does not see is grey and dim.
        for channel in range(3):
            dim = painted[..., channel][~inside] - 0.45 * grey[~inside]
            assert abs(dim).max() <= 1
        assert (painted[inside] != original[inside]).any(1).mean() > 0.7
        # Half picture, half colour map: what is left is the colour of the map's score, but for
        # the line around what is seen.
        colour = (2 * painted - original)[top:bottom, left:right][1:-1, 1:-1]
        values = Image.fromarray(np.load(found["outputs"]["map"])).resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR
        )
        expected = 255 * colormaps["viridis"](np.asarray(values))[1:-1, 1:-1, :3]
        assert abs(colour - expected).mean() < 3


def test_the_overlay_of_an_empty_and_a_full_mask():
    picture = Image.new("RGB", (100, 60), "#336699")
    view = view_of(picture.size, small_float().preprocessing)
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    nothing = overlaying.overlay(picture, view, ramp, torch.zeros(32, 32, dtype=torch.bool))
    assert nothing.tobytes() == picture.tobytes()
    everything = np.asarray(
        overlaying.overlay(picture, view, ramp, torch.ones(32, 32, dtype=torch.bool))
    )
    left, top, right, bottom = (round(edge) for edge in view.box(picture.size))
    # Viridis runs from dark violet to yellow.
    first, last = everything[30, left].astype(int), everything[30, right - 1].astype(int)
    np.testing.assert_allclose(first, (np.array([0x33, 0x66, 0x99]) + [68, 1, 84]) / 2, atol=3)
    np.testing.assert_allclose(last, (np.array([0x33, 0x66, 0x99]) + [253, 231, 37]) / 2, atol=3)
    assert (everything[: top - 1] == (0x33, 0x66, 0x99)).all()
    assert (everything[bottom + 1 :] == (0x33, 0x66, 0x99)).all()


def test_colours_of_an_overlay_reach_beyond_a_few_bright_pixels():
    picture = Image.new("RGB", (64, 64))
    view = View(picture.size, (0, 0, 64, 64))
    values = torch.linspace(0, 0.2, 64 * 64).view(64, 64)
    everywhere = values >= 0
    bright = values.clone()
    bright[5, 7:9] = 1
    told = (values / 0.2).clamp(max=1)
    told[5, 7:9] = 1
    shown = np.asarray(overlaying.overlay(picture, view, bright, everywhere)).astype(int)
    expected = np.asarray(overlaying.overlay(picture, view, told, everywhere)).astype(int)
    assert abs(shown - expected).max() <= 3
    # A map with many high scores is shown as it is.
    bright[:10] = 1
    assert (
        np.asarray(overlaying.overlay(picture, view, bright, everywhere))[-1] != shown[-1]
    ).any()


def test_strips_of_a_tall_overlay_meet(monkeypatch):
    picture, ramp = Image.new("RGB", (70, 70)), torch.rand(32, 32)
    view = view_of(picture.size, small_float().preprocessing)
    whole = overlaying.overlay(picture, view, ramp, ramp > 0.5).tobytes()
    monkeypatch.setattr(overlaying, "STRIP", 9)
    assert overlaying.overlay(picture, view, ramp, ramp > 0.5).tobytes() == whole


def test_the_table(f, folder):
    draw("a.png")
    [e] = expected_of(f, Path("a.png"), ["layercam"], Search())
    name = NAMES[e.class_index]
    lines = done(aft("explain", "a.png", "--tft")).splitlines()
    assert lines[0].split() == ["image", "cam", "class", "prob.", "tau*", "RPI", "masked", "kept"]
    best = int(e.tft.best)
    assert lines[1].split() == [
        *("a.png", "layercam", name, f"({e.class_index})", f"{e.probability:.4f}"),
        *(f"{THRESHOLDS[best]:g}", f"{float(e.tft.rpi[0, best]):.3f}"),
        *(f"{float(e.tft.probabilities[0, best]):.4f}", f"{float(e.tft.mask.double().mean()):.1%}"),
    ]
    files = [f"aft-out/a-{name}-layercam-tft-{kind}.png" for kind in ("overlay", "figure")]
    assert lines[2:] == [f"wrote {file}" for file in files]
    assert leftovers(folder) == ["a.png", *sorted(files)]
    assert done(aft("explain", "a.png")).splitlines()[0].split() == [
        "image",
        "cam",
        "class",
        "prob.",
    ]


def test_all_methods_by_name(f):
    draw("a.png")
    every = quiet_objects("explain", "a.png", "--cam", "all", "--save", "map")
    assert [found["cam"] for found in every] == list(CAMS)
    expected = expected_of(f, Path("a.png"), list(CAMS))
    for found, e in zip(every, expected, strict=True):
        np.testing.assert_allclose(np.load(found["outputs"]["map"]), e.attribution, atol=1e-5)
    some = quiet_objects(
        "explain", "a.png", "--cam", "xgradcam", "--cam", "cam", "--cam", "xgradcam"
    )
    assert [found["cam"] for found in some] == ["xgradcam", "cam"]


@pytest.mark.parametrize(
    ("target", "index"),
    [
        *(("tiger cat", 282), ("TABBY", 281), ("tabby_cat", 281), ("282", 282)),
        *(("n02123159", 282), ("N02123159", 282), ("Egyptian  Cat", 285)),
    ],
)
def test_targets(real, target, index):
    [found] = quiet_objects("explain", CHELSEA, "--target", target, "--save", "none")
    assert (found["class_index"], found["outputs"]) == (index, {})
    with torch.no_grad():
        y = real(to_input(read_image(CHELSEA), real.preprocessing)).softmax(1)[0]
    assert found["probability"] == close(y[index].item())


UNLIKELY = (("plum", "6.8e-04"), ("apple", "5.3e-04"))


def test_several_targets_and_the_likeliest(f):
    draw("a.png")
    result = aft(
        *("explain", "a.png", "--json", "--target", "plum", "--target", "0", "--target", "PLUM")
    )
    # Both are unlikely here, which is said; nothing else is.
    chance = "less than chance (1/3); its map says little"
    said = [f"aft: a.png: {n} has a probability of {p}, {chance}" for n, p in UNLIKELY]
    assert (result.code, result.err.splitlines()) == (0, said)
    named = json.loads(result.out)
    assert [found["class_name"] for found in named] == ["plum", "apple"]
    likeliest = quiet_objects("explain", "a.png", "--top-k", "3")
    probabilities = [found["probability"] for found in likeliest]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == close(1)
    assert {found["class_name"] for found in likeliest} == set(NAMES)
    by_name = {found["class_name"]: found["probability"] for found in likeliest}
    assert [by_name[found["class_name"]] for found in named] == [f["probability"] for f in named]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "share"),
    [(("--mute", "60"), 0.4), (("--mute", "0"), 1), (("--mute", "100"), 0), ((), 1)],
)
def test_mute_keeps_a_share_of_the_map(real, options, share):
    [found] = quiet_objects("explain", CHELSEA, *options, "--save", "mask,figure")
    mask = np.asarray(Image.open(found["outputs"]["mask"])) > 0
    assert mask.mean() == pytest.approx(share, abs=0.006)
    panels(found["outputs"]["figure"], 2 if share == 1 else 3)


@pytest.mark.parametrize("threshold", [0, 0.3, 1])
def test_threshold_mutes_scores_below(f, threshold):
    draw("a.png")
    [found] = quiet_objects("explain", "a.png", "--threshold", threshold, "--save", "mask,map")
    scores = np.load(found["outputs"]["map"])
    mask = np.asarray(Image.open(found["outputs"]["mask"])) > 0
    np.testing.assert_array_equal(mask, (scores >= np.float32(threshold)) & (scores > 0))


@pytest.mark.parametrize("absolute", [False, True])
def test_tft_of_a_map_of_another_tool(f, absolute):
    picture = read_image(draw("a.png"))
    values = np.where(np.arange(32) < 16, MAP, -2 * MAP)
    np.save("m.npy", values * 1e300)
    flags = ["--absolute"] if absolute else []
    kinds = ("--save", "map,mask", "--target", "pear")
    [found] = quiet_objects("tft", "a.png", "--map", "m.npy", *flags, *kinds)
    x = to_input(picture, f.preprocessing)
    view = view_of(picture.size, f.preprocessing)
    attribution = fit_map(torch.from_numpy(values), x, picture.size, view, absolute)
    [e] = engine.explain_map(f, x, attribution, [1], settings=Search())
    assert found["cam"] == "map"
    assert found["probability"] == close(e.probability)
    assert found["tft"]["probabilities"] == close(e.tft.probabilities[0].tolist())
    assert found["tft"]["area"] == close(e.tft.mask.double().mean().item())
    np.testing.assert_allclose(np.load(found["outputs"]["map"]), attribution[0], atol=1e-6)
    right_half_wins = np.load(found["outputs"]["map"])[:, 16:].max() == 1
    assert right_half_wins == absolute


def test_tft_without_a_map_is_explain_with_tft(f):
    draw("a.png")
    ours = quiet_objects("tft", "a.png", "--fill", "blur")
    theirs = quiet_objects("explain", "a.png", "--tft", "--cam", "gradcam", "--fill", "blur")
    assert ours == theirs
    assert list(ours[0]["outputs"]) == ["overlay", "figure"]


NAMED = [
    *("[red]x[-red].png", "[bold]y.png", ":smile:.png", "ünï cödé 猫.png", "quo'te\"s.png"),
    *("-dash.png", "new\nline.png", "esc\x1b[31m.png", "[red]x[/red].png"),
]
SHOWN = {"new\nline.png": "new\\nline.png", "esc\x1b[31m.png": "esc\\x1b[31m.png"}


@pytest.mark.parametrize("name", NAMED)
def test_any_name_is_printed_as_it_is(f, folder, name):
    draw(folder / "in" / name)
    shown = SHOWN.get(name, name).rpartition("/")[2]
    lines = done(aft("explain", "in", "--target", "pear")).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"{shown}  layercam  pear (1)")
    stem = shown.removesuffix(".png")
    assert lines[2] == f"wrote aft-out/{stem}-pear-layercam-overlay.png"
    [found] = quiet_objects("explain", "in")
    assert found["image"] == f"in/{name}"
    assert Path(found["outputs"]["overlay"]).is_file()


def test_a_name_that_is_no_text(f, folder):
    raw = os.fsdecode(b"bad\xff.png")
    draw(folder / "in" / raw)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert (
        aft("explain", "in", "ü.png", stdout=stdout).err
        == "aft: ü.png: there is no such file or folder\n"
    )
    stdout.flush()
    assert b"bad\\udcff.png" in stdout.buffer.getvalue()
    assert len(leftovers(folder / "aft-out")) == 1


@pytest.mark.slow
def test_class_names_are_printed_as_they_are(f, folder, monkeypatch):
    odd = ("[red]x[/red]", "a $\\foo$ b", "猫")
    object.__setattr__(f.classes, "names", odd)
    draw("a.png")
    out = done(aft("explain", "a.png", "--top-k", "3", "--tft", "--save", "figure"))
    for name in odd:
        assert f"  {name} (" in out
    assert len(leftovers(folder / "aft-out")) == 3 + 1  # the grid of all


def test_classes_of_one_spelling_do_not_overwrite_each_other(f, folder):
    object.__setattr__(f.classes, "names", ("猫", "犬", "x" * 300))
    draw("a.png")
    results = quiet_objects("explain", "a.png", "--top-k", "3")
    assert len({found["outputs"]["overlay"] for found in results}) == 3
    assert len(leftovers(folder / "aft-out")) == 3 + 1  # the grid of all


def test_images_of_one_name_are_told_apart(f, folder):
    paths = ["a/x.png", "b/x.png", "b/x.bmp", "c/b/x.png", "d/c/b/x.png", "b-x.png"]
    for seed, path in enumerate(paths):
        draw(path, seed=seed)
    out = done(aft("explain", *paths, "--target", "pear", "--save", "map"))
    for path in paths:
        assert (
            out.count(
                f"\n{path if path[-5:] == 'x.png' and path != 'b-x.png' else Path(path).name} "
            )
            == 1
        )
    results = quiet_objects("explain", *paths, "--target", "pear", "--save", "map")
    files = [found["outputs"]["map"] for found in results]
    assert files[0] == "aft-out/x-pear-layercam-map.npy"
    assert len({file.lower() for file in files}) == len(paths)
    for path, file in zip(paths, files, strict=True):
        [e] = expected_of(f, Path(path), ["layercam"], targets=[1])
        np.testing.assert_allclose(np.load(file), e.attribution, atol=1e-5)


def test_stems_of_many_and_of_long_names(folder):
    paths = [Path(f"{'long ' * 60}{i}.png") for i in range(300)]
    paths += [Path(f"a/{'猫' * 80}.png"), Path(f"b/{'猫' * 80}.png")]
    stems = names.stems(paths)
    assert len({stem.lower() for stem in stems.values()}) == len(paths)
    assert max(len(os.fsencode(stem)) for stem in stems.values()) < 128


def test_a_name_of_the_greatest_length(f, folder):
    draw(f"{'n' * 251}.png")
    [found] = quiet_objects("explain", f"{'n' * 251}.png")
    assert Path(found["outputs"]["overlay"]).is_file()


def test_folders_globs_and_dashes(f, folder, monkeypatch):
    for name in ("in/b.png", "in/deep/er/a.JPG", "in/-c.png", "other/d.png"):
        draw(name)
    Path("in/notes.txt").write_text("no picture")

    def images(*arguments):
        out = done(aft("explain", "--json", "--save", "none", "--", *arguments))
        return [found["image"] for found in json.loads(out)]

    assert images("in") == ["in/-c.png", "in/b.png", "in/deep/er/a.JPG"]
    assert images("*/?.png", "in/b.png") == ["in/b.png", "other/d.png"]
    assert images("**/a.*", "oth*") == ["in/deep/er/a.JPG", "other/d.png"]
    monkeypatch.chdir("in")
    assert images("-c.png") == ["-c.png"]


def test_own_results_are_not_explained_again(f, folder):
    draw("a.png")
    for _ in range(2):
        assert [found["image"] for found in quiet_objects("explain", ".")] == ["a.png"]
    for out in (".", ".", "other", "aft-out/in"):
        [found] = quiet_objects("explain", ".", "--out", out)
        assert found["image"] == "a.png"
    # One that is named is explained, and so is what no manifest lists.
    [overlay] = Path().glob("*-overlay.png")
    assert [found["image"] for found in quiet_objects("explain", overlay)] == [str(overlay)]
    for folder in (".", "other", "aft-out", "aft-out/in"):
        Path(folder, "manifest.json").write_text("garbage")
    found = quiet_objects("explain", ".", "--out", "new", "--save", "none")
    assert sum(each["image"].endswith("-overlay.png") for each in found) > 3


def test_good_images_are_done_and_broken_ones_named(f, folder):
    for name in ("in/a.png", "in/c.png"):
        draw(name)
    whole = draw("whole.png").read_bytes()
    Path("in/b.png").write_bytes(whole[: len(whole) // 2])
    Path("in/zero.png").touch()
    result = aft("explain", "in", "gone.png", "--target", "pear")
    assert result.code == 1
    assert [line.split()[0] for line in result.out.splitlines()[1:3]] == ["a.png", "c.png"]
    first, second, third = result.err.splitlines()
    assert first == "aft: gone.png: there is no such file or folder"
    assert second.startswith("aft: in/b.png: can't be read as a picture")
    assert third == "aft: in/zero.png: the file is empty"
    [overview] = Path("aft-out").glob("images-2x1-*-overview.png")
    written = [*(f"{n}-pear-layercam-overlay.png" for n in "ac"), overview.name]
    assert leftovers(folder / "aft-out") == written
    again = aft("explain", "in", "gone.png", "--json", "--save", "none")
    assert (again.code, again.err) == (1, result.err)
    assert [found["image"] for found in json.loads(again.out)] == ["in/a.png", "in/c.png"]


def test_json_is_a_list_even_of_nothing(f):
    result = aft("explain", "gone.png", "--json")
    assert (result.code, json.loads(result.out)) == (1, [])
    assert result.err == "aft: gone.png: there is no such file or folder\n"


def test_json_and_figure_of_an_infinite_rpi(f, folder):
    """RPI is infinite where y^c underflows, which JSON can't say."""
    x_hat = torch.tensor([[0.0, 1e-9]])
    rpi = torch.tensor([[0.0, float("inf")]])
    map_ = torch.linspace(0, 1, 1024).view(32, 32)
    tft = TftResult(
        *(torch.tensor([0.5]), rpi, x_hat, torch.tensor([0.0])),
        *(map_[None] * (map_ >= 0.5), map_[None] >= 0.5),
    )
    e = Explanation("layercam", 1, 0.0, map_, tft, (0.0, 0.5))
    picture = read_image(draw("a.png"))
    subject = report.Subject(Path("a.png"), "a", picture, view_of(picture.size, f.preprocessing))
    written = report.write_outputs(f, subject, e, ("figure", "overlay"), folder)
    found = report.as_dict(f, written, Search((0.0, 0.5)))
    found = json.loads(json.dumps(found, allow_nan=False))
    assert (found["tft"]["tau"], found["tft"]["area"]) == (0.5, 0.5)
    assert found["tft"]["rpi"][1] > 1e38


@pytest.mark.parametrize(
    "arguments",
    [
        *(("explain",), ("tft",), ("explain", "a.png", "--nonsense"), ("nonsense",)),
        *(("explain", "a.png", "--top-k", "0"), ("explain", "a.png", "--mute", "much")),
        *(("tft", "a.png", "b.png"), ("explain", "a.png", "--out"), ()),
    ],
)
def test_usage_errors(f, folder, arguments):
    result = aft(*arguments)
    assert result.code == 2
    assert "Usage: aft" in result.err + result.out or "Error" in result.err
    assert leftovers(folder) == []


def test_version_and_help():
    assert done(aft("--version")) == f"aft {aftcli.__version__}\n"
    assert "explain" in done(aft("--help"))
    help_ = done(aft("explain", "-h"))
    assert all(option in help_ for option in ("--cam", "--tft", "--target", "--mute", "--format"))


def test_debug_shows_the_traceback(f):
    refused = aft("explain", "a.png", "--mute", "50", "--tft", "--debug")
    assert "exclude each other" in usage_error(refused)
    draw("a.png")
    with pytest.raises(AftError, match="unknown class 'cat'"):
        aft("explain", "a.png", "--target", "cat", "--debug")
    assert "unknown method" in usage_error(aft("explain", "a.png", "--cam", "nonsense", "--debug"))
    result = aft("explain", "gone.png", str(CHELSEA.parent.parent / "gone"), "--debug", "--json")
    assert result.code == 1
    Path("zero.png").touch()
    result = aft("explain", "zero.png", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1] == "aft: zero.png: the file is empty"


def test_a_fault_of_ours_is_one_line(f, monkeypatch):
    draw("a.png")
    monkeypatch.setattr(engine, "explain", lambda *_, **__: [][0])
    result = aft("explain", "a.png")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("aft: IndexError: list index out of range; this is a fault of aft")
    assert result.err.count("\n") == 1
    with pytest.raises(IndexError):
        aft("explain", "a.png", "--debug")


def test_interrupted_between_images(f, folder, monkeypatch):
    for name in ("in/a.png", "in/b.png"):
        draw(name)
    save = Image.Image.save

    def interrupted(self, path, *arguments, **options):
        save(self, path, *arguments, **options)
        if "b-pear" in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    result = aft("explain", "in", "--target", "pear")
    assert result == (130, "", "aft: interrupted\n")
    assert leftovers(folder / "aft-out") == ["a-pear-layercam-overlay.png"]


@pytest.mark.parametrize("kind", ["overlay", "figure", "map", "mask"])
def test_a_full_disk_leaves_nothing_half_written(real, folder, kind):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        result = aft("explain", CHELSEA, "--save", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"aft: aft-out/chelsea-tiger_cat-layercam-{kind}.")
    assert "can't be written (" in result.err
    assert result.err.count("\n") == 1
    assert leftovers(folder) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_result_that_can_not_be_printed(f, flags):
    draw("a.png")
    with open("/dev/full", "w") as full:  # whose end is silent: what can't be printed is dropped
        result = aft("explain", "a.png", "gone.png", *flags, stdout=full)
    first, second = result.err.splitlines()
    assert result.code == 1
    assert first == "aft: gone.png: there is no such file or folder"
    assert second == "aft: the result can't be printed (No space left on device)"


@pytest.mark.slow
def test_a_process_whose_reader_leaves(folder):
    """All of it: the embedded classifier, the output of a process without a terminal."""
    draw("a.png")
    command = [sys.executable, "-m", "aftcli", "explain", "a.png", "gone.png", "--save", "map"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert set(errors.splitlines()) <= {"aft: gone.png: there is no such file or folder"}
    assert len(leftovers(folder / "aft-out")) == 1


# A process with the small classifier: half of the imports.
SMALL = """
import sys
sys.path.insert(0, {root!r})
from tests.helpers import stored
from aftcli.cli import app
from aftcli.models import load as models
models.load_classifier = lambda *_, **__: stored.small_float()
app.main()
"""
SMALL = SMALL.format(root=str(ROOT))
AFT = [sys.executable, "-c", SMALL]
# It is interrupted after its fourth picture, whatever else the machine does.
INTERRUPTED = SMALL.replace(
    "app.main()",
    """
import os, signal
replace, written = os.replace, []
def counted(*paths):
    replace(*paths)
    written.extend(path for path in paths[1:] if path.suffix == ".png")
    if len(written) == 4:
        os.kill(os.getpid(), signal.SIGINT)
os.replace = counted
app.main()
""",
)


@pytest.mark.slow
def test_a_process_without_stderr_says_nothing_else_on_stdout(folder):
    draw("a.png")
    command = shlex.join([*AFT, "explain", "a.png", "gone.png", "--json"])
    silent = subprocess.run(f"{command} 2>&-", shell=True, stdout=subprocess.PIPE, text=True)
    assert silent.returncode == 1
    assert [found["image"] for found in json.loads(silent.stdout)] == ["a.png"]


@pytest.mark.slow
def test_interrupted_by_a_signal(folder):
    for i in range(40):
        draw(f"in/{i}.png")
    pipe = subprocess.PIPE
    # A shell's background jobs, as this test may be part of one, ignore interrupts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", INTERRUPTED, "explain", "in", "--tft"]
    done = subprocess.run(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "aft: interrupted\n")
    assert 4 <= len(list(Path("aft-out").iterdir())) < 40
    assert leftovers(folder / "aft-out")
    for path in Path("aft-out").iterdir():
        assert not path.name.startswith(".")
        if path.name == "manifest.json":
            continue
        with Image.open(path) as image:
            image.load()
