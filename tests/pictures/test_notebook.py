"""Explanations with their picture: what they take, what they hold, what notebooks show."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import aftcli
from aftcli.core.classes import Classes
from aftcli.data.images import read_image, to_input, view_of
from aftcli.errors import AftError
from aftcli.models.targets import output_target, with_target
from aftcli.pictures.notebook import Explanations
from aftcli.settings import Search
from aftcli.tft.explain import Explanation
from aftcli.tft.explain import explain as plainly
from tests.helpers.compare import assert_near
from tests.helpers.small import CLASSES, SIZE, small
from tests.helpers.stored import NAMES, small_float


@pytest.fixture
def photo(tmp_path):
    """A picture in a file."""
    pixels = np.random.default_rng(0).integers(0, 120, (44, 60, 3), dtype=np.uint8)
    pixels[8:28, 20:40] += 100
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def pixels_of(image):
    return np.asarray(image.convert("RGB")).astype(int)


def png(drawn, **how):
    held = io.BytesIO()
    drawn.savefig(held, format="png", **how)
    return pixels_of(Image.open(held))


def same(one, two):
    """Check that explanations have the same numbers, and maps up to rounding."""
    assert (one.cam, one.class_index, one.thresholds) == (two.cam, two.class_index, two.thresholds)
    assert one.probability == pytest.approx(two.probability)
    assert_near(one.attribution, two.attribution, 1e-5)


def test_a_path_an_image_and_an_input_are_explained_alike(photo):
    f = small_float()
    x = to_input(read_image(photo), f.preprocessing)
    expected = plainly(f, x, ["gradcam", "layercam"], [2, 0], settings=Search())
    forms = (str(photo), photo, Image.open(photo), Image.open(photo).convert("RGBA"), x)
    for given in forms:
        found = aftcli.explain(f, given, ["gradcam", "layercam"], [NAMES[2], 0], tft=True)
        assert isinstance(found, list) and all(isinstance(e, aftcli.Explanation) for e in found)
        for one, two in zip(found, expected, strict=True):
            same(one, two)
            assert torch.equal(one.tft.mask, two.tft.mask)
    assert found[0].subject.picture.size == (224, 224)  # an input of 32 x 32, enlarged
    # Several pictures, one after the other; each has its own.
    both = aftcli.explain(f, [photo, x], "gradcam")
    assert [e.subject.stem for e in both] == ["a", "input"]
    assert both[0].subject.picture.size == (60, 44)
    same(both[0], both[1])


def test_names_stand_for_classes_methods_and_defaults(photo):
    f = small_float()
    [e] = aftcli.explain(f, photo)
    [predicted] = plainly(f, to_input(read_image(photo), f.preprocessing), ["layercam"])
    same(e, predicted)
    assert e.tft is None
    others = [n for n in range(3) if n != e.class_index]
    [e] = aftcli.explain(f, photo, contrast=NAMES[others[0]])
    assert (e.cam, e.contrast, e.signed is not None) == ("gradcam", others[0], True)
    [e] = aftcli.explain(f, photo, "hirescam", NAMES[1], contrast=2)
    assert (e.cam, e.class_index, e.contrast) == ("hirescam", 1, 2)
    cams = [e.cam for e in aftcli.explain(f, photo, "all", 0)]
    assert "cam" in cams and "finercam" in cams
    cams = [e.cam for e in aftcli.explain(f, photo, "all", 0, contrast=1)]
    assert "gradcam" in cams and "cam" not in cams and "finercam" not in cams
    assert aftcli.explain(f, photo, settings=Search((0.5,)), fixed=True)[0].fixed is not None
    [e] = aftcli.explain(f, photo, "gradcam", target=output_target(2))
    assert repr(e).startswith("output 2 ") and "chance" not in repr(e)


@pytest.mark.parametrize("smooth", ["noise", "eigen"])
def test_words_for_several_methods_leave_out_what_can_not_be_smoothed(photo, smooth):
    f = small_float()
    cams = [e.cam for e in aftcli.explain(f, photo, "all", 0, smooth=smooth)]
    assert "gradcam" in cams and "eigencam" not in cams
    assert ("scorecam" in cams) == (smooth == "eigen")
    with pytest.raises(AftError, match="^Eigen-CAM "):
        aftcli.explain(f, photo, ["all", "eigencam"], 0, smooth=smooth)


@pytest.mark.parametrize("word", ["cam", "CAM", "gradcam, Cam"])
def test_a_method_that_is_named_must_fit_however_it_is_spelled(photo, word):
    f = small("mixing").f
    with pytest.raises(AftError, match="cam needs a head of global average pooling"):
        aftcli.explain(f, photo, word)


def test_words_of_which_no_method_fits_are_refused(photo):
    f = small_float()
    pytest.importorskip("zennit")
    with pytest.raises(AftError, match="^no method of decomposition can explain a difference"):
        aftcli.explain(f, photo, "decomposition", 0, contrast=1)
    with pytest.raises(AftError, match="^no method of gradient fits .*: --smooth noise takes"):
        aftcli.explain(f, photo, "gradient", 0, smooth="noise")


def test_the_picture_of_an_input_is_the_input_without_its_normalisation():
    s = small("linear", 0)
    pixels = torch.rand(3, *SIZE, dtype=torch.float64)
    x = torch.empty(1, 3, *SIZE, dtype=torch.float64)
    for c in range(3):
        x[0, c] = (pixels[c] - s.f.preprocessing.mean[c]) / s.f.preprocessing.std[c]
    [e] = aftcli.explain(s.f, x, "gradcam", 0)
    scale = 8  # 28 columns, enlarged to 224
    found = pixels_of(e.subject.picture)
    assert found.shape == (SIZE[0] * scale, SIZE[1] * scale, 3)
    for i in range(SIZE[0]):
        for j in range(SIZE[1]):
            expected = 255 * pixels[:, i, j].numpy()
            assert abs(found[i * scale : (i + 1) * scale, j * scale] - expected).max() <= 0.51
    assert e.subject.view == view_of(e.subject.picture.size, s.f.preprocessing)._replace(
        scaled=(224, 160), crop=(0, 0, 224, 160)
    )


def sources(text):
    """Return the pictures that HTML holds."""
    coded = re.findall(r'src="data:image/\w+;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in coded]


def test_a_notebook_shows_the_picture_and_a_line_of_numbers(photo):
    f = small_float()
    f.classes = Classes(("<b>apple</b>", "pear", "plum"))
    plain, found = (
        aftcli.explain(f, photo, "gradcam", 0),
        aftcli.explain(f, photo, top_k=2, tft=True),
    )
    text = plain[0]._repr_html_()
    assert "&lt;b&gt;apple&lt;/b&gt; 0." in text and "<b>" not in text and "Grad-CAM" in text
    [picture] = sources(text)
    assert picture.size == (60, 44)
    assert repr(found[0]).split(" · ")[-1].endswith(f"alone {found[0].cut.probabilities.max():.3f}")
    assert len(sources(found._repr_html_())) == 2
    many = Explanations(found * 5)
    assert len(sources(many._repr_html_())) == 8 and "… and 2 more" in many._repr_html_()
    # Large pictures are made smaller.
    large = aftcli.explain(f, Image.new("RGB", (2000, 1000)), "gradcam")
    assert sources(large[0]._repr_html_())[0].size == (640, 320)


def test_a_search_shows_its_cut_map_and_numbers(photo):
    [e] = aftcli.explain(small_float(), photo, tft=True)
    line = str(e.tft)
    kept, best = float(e.tft.mask.float().mean()), int(e.tft.best)
    assert line == (
        f"tau* = {e.thresholds[best]:g}: RPI {e.tft.rpi[0, best]:.3f}, probability "
        f"{e.probability:.3f} → {e.tft.probabilities[0, best]:.3f}, {kept:.1%} kept"
    )
    text = e.tft._repr_html_()
    [picture] = sources(text)
    assert line in text
    assert abs(np.asarray(picture) - 255 * e.tft.attribution[0].numpy()).max() <= 0.51


def test_pictures_from_python_are_those_of_the_command_line(photo, monkeypatch):
    from tests.helpers.command import aft

    f = small_float()
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: f)
    monkeypatch.chdir(photo.parent)
    options = ("--cam", "gradcam", "--cam", "layercam", "--tft", "--save", "overlay,figure")
    assert aft("explain", "a.png", *options, "--colormap", "magma", "--alpha", "0.7").code == 0
    look = ("magma", 0.7)
    found = aftcli.explain(f, "a.png", ["gradcam", "layercam"], tft=True)
    for e in found:
        [written] = (photo.parent / "aft-out").glob(f"*{e.cam}-*overlay.png")
        assert (pixels_of(aftcli.overlay(e, *look)) == pixels_of(Image.open(written))).all()
        [written] = (photo.parent / "aft-out").glob(f"*{e.cam}-*figure.png")
        assert abs(png(aftcli.figure([e], *look)) - pixels_of(Image.open(written))).max() <= 1
    [written] = (photo.parent / "aft-out").glob("*grid.png")
    assert abs(png(aftcli.grid(found, *look)) - pixels_of(Image.open(written))).max() <= 1


def test_figures_keep_their_places_at_other_resolutions_and_when_they_are_cut(photo):
    found = aftcli.explain(small_float(), photo, ["gradcam", "layercam"], tft=True)
    for drawn in (aftcli.figure(found[0]), aftcli.grid(found)):
        full = png(drawn)
        assert (pixels_of(Image.open(io.BytesIO(drawn._repr_png_()))) == full).all()
        high, wide = full.shape[0] // 2, full.shape[1] // 2
        half = np.asarray(Image.fromarray(full.astype(np.uint8)).resize((wide, high)))
        other = png(drawn, dpi=50)[:high, :wide]
        assert abs(other - half.astype(int)).mean() < 6
        # Cut as notebooks do: the same pixels, moved.
        cut = png(drawn, bbox_inches="tight", pad_inches=0)
        edge = drawn.get_tightbbox()
        left, top = round(edge.x0 * drawn.dpi), full.shape[0] - round(edge.y1 * drawn.dpi)
        padded = np.pad(full, ((2, 2), (2, 2), (0, 0)), constant_values=255)
        assert (
            min(
                abs(padded[y : y + len(cut), x : x + cut.shape[1]] - cut).mean()
                for y in range(top + 1, top + 4)
                for x in range(left + 1, left + 4)
            )
            < 6
        )


def test_a_grid_has_a_row_a_picture_or_class_and_a_column_a_method_of_a_network(photo):
    one, other = small_float(), small_float()
    other.name = "other"
    dark = Image.new("RGB", (60, 44), (20, 40, 60))
    both = aftcli.explain(one, [photo, dark], ["gradcam", "layercam"], "pear")
    said = [each.get_text() for each in aftcli.grid(both).texts]
    line = {e.subject.path.name: f"pear {e.probability:.3f}" for e in both}
    assert said == [
        *("a.png", "Grad-CAM", line["a.png"], "Layer-CAM", line["a.png"]),
        *("picture", "Grad-CAM", line["picture"], "Layer-CAM", line["picture"]),
    ]
    # Of two networks each is named; a class of which one has no map leaves its place empty.
    found = aftcli.explain(one, photo, "gradcam", ["pear", "plum"])
    found += aftcli.explain(other, photo, "gradcam", "pear")
    drawn = aftcli.grid(found)
    said = [each.get_text() for each in drawn.texts]
    assert (len(drawn.images), len(said)) == (3, 9)
    assert (said[::3], drawn.bbox.height) == (["small", "other", "small"], 12 + 2 * (224 + 60 + 12))


def test_a_grid_of_one_explanation_and_a_picture_that_is_cut_off(photo):
    f = small_float()
    [e] = found = aftcli.explain(f, photo)
    assert (png(aftcli.grid(e)) == png(aftcli.grid(found))).all()
    photo.write_bytes(photo.read_bytes()[:3000])
    for given in (photo, Image.open(photo)):
        with pytest.raises(AftError, match=r"a\.png: can't be read as a picture \("):
            aftcli.explain(f, given)


def test_what_has_no_picture_is_refused_but_explained():
    s = small("linear", 0)
    [plain] = plainly(s.f, s.x[:1], ["gradcam"], 0)
    for draw in (aftcli.overlay, aftcli.figure):
        with pytest.raises(AftError, match="Explanation does not know its picture"):
            draw(plain)
    found = aftcli.explain(s.f, s.x[:1], ["gradcam", "layercam"], 0)
    with pytest.raises(AftError, match="one explanation can be drawn, got 2"):
        aftcli.figure(found)
    with pytest.raises(AftError, match="a grid shows 1 to 120 explanations, got 0"):
        aftcli.grid([])
    with pytest.raises(AftError, match="unknown colormap 'virdis'; nearest: viridis"):
        aftcli.overlay(found[0], "virdis")
    with pytest.raises(AftError, match="the opacity"):
        aftcli.overlay(found[0], alpha=2)
    with pytest.raises(AftError, match="x is a int"):
        aftcli.explain(s.f, 3)
    with pytest.raises(AftError, match="unknown class 'nothing'"):
        aftcli.explain(s.f, s.x[:1], targets="nothing")
    assert isinstance(plain, Explanation) and CLASSES == 5
    bare = found[0].__class__(**{**vars(found[0]), "subject": None})
    assert bare._repr_html_() == f"<div>{bare!r}</div>"
    with pytest.raises(AftError, match="has no picture"):
        aftcli.overlay(bare)


def test_images_without_pixels_are_refused(photo):
    f = small_float()
    closed = Image.open(photo)
    closed.close()
    with pytest.raises(AftError, match=r"a\.png: can't be read as a picture \(.*closed image"):
        aftcli.explain(f, closed)
    for size in ((0, 0), (4, 0)):
        with pytest.raises(AftError, match="^picture: has no pixels"):
            aftcli.explain(f, Image.new("RGB", size))
    with pytest.raises(AftError, match="x is a bytes"):
        aftcli.explain(f, photo.read_bytes())


def test_a_network_with_a_target_is_explained_by_its_score(photo):
    g = with_target(small_float(), output_target(1), "pears")
    [e] = aftcli.explain(g, photo, "gradcam")
    assert e.is_score and repr(e).startswith("pears ")
    assert aftcli.overlay(e).size[0] == 60
