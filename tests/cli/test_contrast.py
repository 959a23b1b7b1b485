"""--contrast, pictures of maps with signs, and classes that are less likely than chance."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aftcli
from aftcli.core.outputs import has_chance
from aftcli.pictures.colours import DIVERGING, Look, bar, heat, palette
from aftcli.pictures.figure import Shown, caption, figure
from aftcli.report.explain import shown_of
from aftcli.tft.explain import explain as explained
from tests.cli.test_pictures import pixels, searched, subject_of, texts
from tests.helpers.command import aft, objects, usage_error, without_chance
from tests.helpers.grids import grid
from tests.helpers.stored import NAMES, draw

pytestmark = pytest.mark.usefixtures("picture", "f")

A, B = NAMES[1], NAMES[2]
COLOURS = np.frombuffer(palette(DIVERGING), np.uint8).reshape(-1, 3).astype(int)


def test_scores_have_the_colours_of_their_sign():
    """Zero is white, and a score and its negative lie as far from it."""
    look = Look(alpha=1, signed=True)
    scores = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    found = pixels(heat(scores, (5, 1), look).convert("RGB"))[0]
    for colour, place in zip(found, (0, 64, 128, 191, 255), strict=True):
        assert abs(colour - COLOURS[place]).max() <= 3
    assert found[2].min() > 240
    assert found[4][0] > found[4][2] and found[0][0] < found[0][2]
    ends = pixels(bar((256, 2), look))[0]
    assert abs(ends - COLOURS).max() == 0
    assert look.ends(scores) == ("-1", "1")
    # Few pixels that outshine the others, of either sign, do not set the scale.
    faint = torch.full((100, 100), 0.1)
    faint[0, 0] = -1
    faint[1:, :50] *= -1
    assert look.ends(faint) == ("≤ -0.1", "≥ 0.1")
    found = pixels(heat(faint, (100, 100), look).convert("RGB"))
    assert (found[50, 99] == COLOURS[255]).all() and (found[50, 10] == COLOURS[0]).all()


def with_sign(cam="gradcam", contrast=2):
    """An explanation whose signed map falls from left to right."""
    e = searched()
    return Shown(
        subject_of(),
        e.__class__(
            **{
                **vars(e),
                "cam": cam,
                "signed": torch.linspace(1, -1, 10).expand(8, 10),
                "contrast": contrast,
            }
        ),
        "pear",
        other="plum" if contrast else "",
    )


def test_a_contrast_and_methods_with_signs_are_shown_signed_where_plain():
    for shown, is_signed in (
        (with_sign(), True),
        (with_sign("integratedgradients", None), True),
        (with_sign("lrp-gamma", None), True),
        (with_sign("gradcam", None), False),
        (with_sign("layercam", None), False),
    ):
        painted, look = shown.painted
        assert look.signed == is_signed
        assert torch.equal(painted, shown.explanation.signed if is_signed else shown.plain)
    assert caption(with_sign())[0] == "pear 0.600, not plum"
    drawn = figure(with_sign())
    said = texts(drawn)
    assert said[:2] == ["pear, not plum", "probability 0.600"]
    # What thresholds are searched by.
    assert drawn.axes[0].get_ylabel() == "probability of pear"
    assert said.index("-1") < said.index("1")
    pictures = [pixels(np.asarray(each.get_array()))[::-1] for each in drawn.images]
    plain, cut = pictures[1], pictures[2]
    assert plain[200, 5, 0] > plain[200, 5, 2] and plain[200, -5, 0] < plain[200, -5, 2]
    # The cut map keeps its colours, and has a bar of its own.
    assert said.count("score") == 1 and "dimmed: muted" in said
    assert cut[200, -5, 0] > cut[200, -5, 2]
    said = texts(grid([with_sign(), with_sign("hirescam")]))
    assert said[:5] == ["Grad-CAM", "pear 0.600", "not plum", "tau* = 0.25", said[4]]


def test_a_contrast_is_named_in_table_json_and_files(f):
    options = ("explain", "a.png", "--target", A, "--contrast", B)
    [found] = objects(*options, "--save", "overlay,figure,map,mask")
    assert found["cam"] == "gradcam"
    assert (found["class_name"], found["contrast"]["class_name"]) == (A, B)
    assert found["contrast"]["class_index"] == 2
    names = {Path(path).name for path in found["outputs"].values()}
    assert f"a-{A}-not-{B}-gradcam-map.npy" in names and len(names) == 4
    from aftcli.data.images import read_image, to_input

    x = to_input(read_image("a.png"), f.preprocessing).to(next(f.parameters()))
    [e] = explained(f, x, ["gradcam"], 1, contrast=2)
    saved = np.load(found["outputs"]["map"])
    assert saved.min() >= 0 and abs(saved - e.attribution.numpy()).max() < 1e-5
    with Image.open(found["outputs"]["mask"]) as mask:
        assert (np.asarray(mask) == 255 * (saved != 0)).all()
    [plain] = objects("explain", "a.png", "--target", A, "--cam", "gradcam")
    assert "contrast" not in plain and plain["outputs"]["overlay"] not in map(str, names)
    result = aft(*options, "--save", "none")
    assert f"{A} (1), not {B} (2)" in result.out


def test_the_grid_of_a_contrast_has_a_name_of_its_own():
    options = ("explain", "a.png", "--cam", "all", "--target", A)
    found = objects(*options, "--contrast", B)
    cams = {each["cam"] for each in found}
    assert "gradcam" in cams and not cams & {"cam", "finercam"}
    other = objects(*options, "--contrast", NAMES[0])
    assert found[-1]["outputs"]["grid"] != other[-1]["outputs"]["grid"]
    assert not {"cam", "finercam"} & {each["cam"] for each in other}


REFUSED = [
    (("--target", A, "--contrast", A), f"--contrast {A}: it is the class explained"),
    (("--contrast", "nothing"), "unknown class 'nothing'"),
    (("--contrast", A, "--target", B, "--cam", "cam"), "cam can't explain a difference"),
    (("--contrast", A, "--target", B, "--cam", "CAM,gradcam"), "cam can't explain a difference"),
    (("--contrast", A, "--top-k", "3"), f"{A} is the class explained; contrast it with another"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_contrasted_is_refused(options, message):
    result = aft("explain", "a.png", *options)
    assert result.code == 1 and message in result.err
    assert not list(Path().glob("aft-out/*.png"))


def test_a_contrast_with_a_target_is_a_usage_error():
    said = usage_error(aft("explain", "a.png", "--target-fn", "t.py:score", "--contrast", A))
    assert "--contrast and --target-fn exclude" in said
    assert not list(Path().glob("aft-out/*.png"))


def test_an_image_that_cannot_be_contrasted_is_named_and_others_are_explained(folder):
    predicted = {n: objects("explain", n)[0]["class_name"] for n in map(draw_seed, range(6))}
    contrast = predicted["0.png"]
    others = [name for name, found in predicted.items() if found != contrast]
    assert 0 < len(others) < len(predicted) - 1
    result = aft("explain", *predicted, "--contrast", contrast, "--json")
    assert result.code == 1
    assert [found["image"] for found in json.loads(result.out)] == others
    assert without_chance(result.err).splitlines() == [
        f"aft: {name}: {contrast} is the class explained; contrast it with another one"
        for name in predicted
        if name not in others
    ]


def draw_seed(seed):
    draw(f"{seed}.png", seed=seed)
    if seed in (1, 2):
        pixels = np.array(Image.open(f"{seed}.png"))
        pixels[..., 0] = 255 - pixels[..., 0]
        Image.fromarray(pixels).save(f"{seed}.png")
    return f"{seed}.png"


def test_a_class_less_likely_than_chance_is_said():
    found = objects("explain", "a.png", "--top-k", "3", "--save", "none")
    likeliest, *_, least = sorted(found, key=lambda each: -each["probability"])
    assert least["probability"] < 1 / 3 - 0.01 < 1 / 3 + 0.01 < likeliest["probability"]
    for each in (likeliest, least):
        result = aft("explain", "a.png", "--target", each["class_name"])
        assert ("less than chance (1/3)" in result.err) == (each is least)
        assert result.err.count(each["class_name"]) == (each is least)
    assert aft("explain", "a.png", "--target", least["class_name"], "--quiet").err == ""


def test_labels_that_do_not_exclude_each_other_have_no_chance(f):
    with torch.no_grad():
        list(f.head.parameters())[-1].sub_(5)
    options = ("explain", "a.png", "--target", A, "--target", B)
    for output, is_said in (("softmax", True), ("sigmoid", False)):
        f.output = output
        assert ("less than chance (1/3)" in aft(*options, "--save", "none").err) == is_said
        shown = shown_of(f, subject_of(), searched(y=0.01), Look())
        assert shown.notes == ["less likely than chance, 1/3"] * is_said
        [e, _] = aftcli.explain(f, "a.png", targets=[A, B])
        assert replace(e, probability=0.01).shown().notes == shown.notes
    assert has_chance("sigmoid", 2) and has_chance("none", 3)


def test_aft_tft_says_it_too():
    probabilities = {n: objects("tft", "a.png", "--target", n)[0]["probability"] for n in NAMES}
    for name, probability in probabilities.items():
        result = aft("tft", "a.png", "--target", name, "--save", "none")
        assert ("less than chance (1/3)" in result.err) == (probability < 1 / 3)


def test_pictures_say_that_a_class_is_less_likely_than_chance():
    shown = Shown(subject_of(), searched(y=0.3), "pear", classes=3)
    assert shown.notes == ["less likely than chance, 1/3"]
    assert texts(figure(shown))[1] == "probability 0.300, below chance"
    for other in (shown._replace(classes=4), shown._replace(classes=0)):
        assert other.notes == []
        assert texts(figure(other))[1] == "probability 0.300"
