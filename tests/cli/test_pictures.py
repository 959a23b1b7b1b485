"""Pictures of explanations: which pixels are dimmed and outlined, colours, captions, the curve."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from aftcli.data.images import View
from aftcli.pictures import overlay as overlaying
from aftcli.pictures.colours import Look, bar
from aftcli.pictures.figure import Shown, caption, figure, number
from aftcli.pictures.overlay import Subject, captioned, shaded, wrapped
from aftcli.settings import COLORMAPS
from aftcli.tft.explain import Explanation
from aftcli.tft.result import TftResult
from tests.helpers.command import objects
from tests.helpers.grids import grid

pytestmark = pytest.mark.usefixtures("picture", "f")

TAUS = (0.0, 0.25, 0.5, 0.75)


def subject_of(width=40, height=32, view=None, grey=200):
    picture = Image.new("RGB", (width, height), (grey, grey, grey))
    return Subject(
        Path("a.png"), "a", picture, view or View((width, height), (0, 0, width, height))
    )


def searched(y=0.6, curve=(0.6, 0.602, 0.5, 0.1), best=1, shape=(8, 10)):
    """An explanation whose map rises from left to right, kept at 0.5 or more."""
    values = torch.linspace(0, 1, shape[1]).expand(shape).contiguous()
    mask = values >= 0.5
    probabilities = torch.tensor([curve])
    rpi = ((probabilities - y) / y).clamp(min=0)
    tft = TftResult(
        *(torch.tensor([TAUS[best]]), rpi, probabilities, torch.tensor([best])),
        *(values[None] * mask, mask[None]),
    )
    return Explanation("layercam", 1, y, values, tft, TAUS, likeliest=((1, y), (0, 0.3), (2, 0.1)))


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("colormap", COLORMAPS)
@pytest.mark.parametrize("alpha", [0.25, 1])
def test_scores_0_and_1_have_the_ends_of_the_colours(colormap, alpha):
    """A score of 0 is painted like others, wherever it lies."""
    scores = torch.zeros(32, 40)
    scores[:, 20:] = 1
    subject = subject_of()
    look = Look(colormap, alpha)
    painted = pixels(shaded(subject.picture, subject.view, scores, look=look))
    for column, score in ((0, 0.0), (10, 0.0), (30, 1.0), (39, 1.0)):
        expected = (1 - alpha) * 200 + alpha * 255 * np.array(colormaps[colormap](score)[:3])
        assert abs(painted[:, column] - expected).max() <= 2
    ends = pixels(bar((50, 3), look))
    assert abs(ends[1, 0] - 255 * np.array(colormaps[colormap](0.0)[:3])).max() <= 1
    assert abs(ends[1, -1] - 255 * np.array(colormaps[colormap](1.0)[:3])).max() <= 1


def test_what_is_muted_is_dimmed_and_the_edge_of_what_is_kept_is_outlined():
    cells, side = 8, 12
    kept = torch.zeros(cells, cells, dtype=torch.bool)
    kept[2:5, 3:7] = True
    subject = subject_of(cells * side, cells * side)
    scores = torch.full((cells, cells), 0.7)
    found = pixels(shaded(subject.picture, subject.view, scores, kept))
    plain = pixels(shaded(subject.picture, subject.view, scores))
    # Edges between a kept cell and another one, or the border: centre, half height, half width.
    edges = []
    for i in range(cells):
        for j in range(cells):
            for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                a, b = i + di, j + dj
                inside = 0 <= a < cells and 0 <= b < cells
                if kept[i, j] and not (inside and kept[a, b]):
                    y, x = i * side + 6 * (1 + di), j * side + 6 * (1 + dj)
                    edges.append((y, x, 0 if di else 6, 0 if dj else 6))
    for row in range(cells * side):
        for column in range(cells * side):
            nearest = min(
                max(abs(row + 0.5 - y) - tall, abs(column + 0.5 - x) - wide, 0)
                for y, x, tall, wide in edges
            )
            colour = found[row, column]
            if nearest < 1:
                assert (colour == overlaying.LIGHT).all()
            elif nearest < 2:
                assert (colour == overlaying.DARK).all()
            elif nearest > side // 2 + 4:
                is_kept = kept[row // side, column // side]
                expected = plain[row, column] if is_kept else [0.45 * 200] * 3
                assert abs(colour - expected).max() <= (15 if nearest < 24 else 1)  # a smooth edge
    # Far inside and far outside.
    assert (found[3 * side + 6, 5 * side] == plain[3 * side + 6, 5 * side]).all()
    assert abs(found[7 * side, 3] - 90).max() <= 1


def test_pixels_that_touch_by_chance_have_no_outline():
    """As in maps of gradients cut at 0: half of the pixels, in clumps."""
    noise = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = torch.nn.functional.avg_pool2d(noise, 2, 1)[0, 0] > 0.5
    edges = int((kept[1:] != kept[:-1]).sum() + (kept[:, 1:] != kept[:, :-1]).sum())
    assert 0.4 * kept.numel() < edges < 1.5 * min(int(kept.sum()), int((~kept).sum()))
    subject = subject_of(63, 63)
    found = pixels(shaded(subject.picture, subject.view, torch.ones(63, 63), kept))
    assert not (found == overlaying.LIGHT).all(2).any()


def test_scattered_pixels_have_no_outline():
    kept = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    subject = subject_of(64, 64)
    found = pixels(shaded(subject.picture, subject.view, torch.ones(64, 64), kept))
    assert not (found == overlaying.LIGHT).all(2).any()
    kept[:] = False
    kept[10:50, 10:50] = True
    found = pixels(shaded(subject.picture, subject.view, torch.ones(64, 64), kept))
    assert (found == overlaying.LIGHT).all(2).any()


def test_what_the_network_does_not_see_is_grey_dim_and_framed():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 60, 3), dtype=np.uint8))
    view = View((60, 32), (14, 0, 46, 32))
    found = pixels(shaded(picture, view, torch.rand(32, 32)))
    luma = pixels(picture) @ [0.299, 0.587, 0.114]
    for columns in (slice(0, 14), slice(46, 60)):
        assert abs(found[:, columns] - 0.45 * luma[:, columns, None]).max() <= 1.5
    assert (found[:, [14, 45]] == overlaying.LIGHT).all()
    assert (found[[0, 31], 14:46] == overlaying.LIGHT).all()
    assert not (found[1:-1, 15:45] == overlaying.LIGHT).all(2).any()
    # Nothing is framed where all is seen; a line of a pixel is rounding.
    for all_of_it in (View((60, 32), (0, 0, 60, 32)), View((60, 32), (1, 0, 59, 32))):
        look = Look(alpha=0)
        assert (
            pixels(shaded(picture, all_of_it, torch.rand(32, 32), look=look)) == pixels(picture)
        ).all()


@pytest.mark.parametrize(("width", "has_caption"), [(159, False), (160, True), (640, True)])
def test_a_caption_stands_under_pictures_that_are_wide_enough(width, has_caption):
    subject = subject_of(width, 50)
    found = captioned(subject, torch.rand(50, width), None, ["tiger cat 0.371", "Layer-CAM"])
    assert found.width == width and (found.height > 50) == has_caption
    if has_caption:
        below = pixels(found)[50:]
        assert (below == 255).all(2).any(1).all()  # white at each side of each line
        dark = (below < 60).all(2)
        assert dark.any() and not dark[:, : width // 100].any() and not dark[:, -2:].any()


def test_lines_of_a_caption_fit_and_lose_no_part():
    parts = ["tiger cat 0.371", "Layer-CAM", "tau* = 0.5", "28.8% kept, alone 0.446"]
    font = overlaying._font(14)
    for width in (220, 300, 1000):
        lines = wrapped(parts, 14, width)
        assert " · ".join(lines) == " · ".join(parts)
        assert max(map(font.getlength, lines)) <= width
    [line] = wrapped([f"{'long ' * 300}0.371"], 14, 300)
    assert line.startswith("long") and "…" in line
    assert font.getlength(line) <= 300


def test_numbers_say_small_probabilities():
    assert [number(p) for p in (1.0, 0.0005, 0.0004, 0.0)] == ["1.000", "0.001", "4.0e-04", "0.000"]


def texts(drawn):
    return [each.get_text() for each in drawn.texts]


def test_a_figure_says_class_method_threshold_and_the_likeliest_classes():
    e = searched()
    shown = Shown(subject_of(), e, "pear", [("pear", 0.6), ("apple", 0.3), ("plum", 0.1)])
    assert caption(shown) == ["pear 0.600", "Layer-CAM", "tau* = 0.25", "50.0% kept, alone 0.602"]
    drawn = figure(shown)
    said = texts(drawn)
    assert said[:6] == [
        *("pear", "probability 0.600", "Layer-CAM", "plain map"),
        *("TFT, tau* = 0.25", "50.0% kept: probability 0.602"),
    ]
    assert said[6:12] == ["pear", "0.600", "apple", "0.300", "plum", "0.100"]
    assert "dimmed: muted" in said
    bars = [patch.get_width() * drawn.bbox.width for patch in drawn.artists]
    assert bars == pytest.approx([0.6 * 448, 0.3 * 448, 0.1 * 448])
    assert said[12:15] == ["0", "score", "1"]
    # Nothing is cut off, and no text lies over another one.
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.texts]
    boxes += [ax.get_tightbbox() for ax in drawn.axes if ax.get_xlabel()]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("y", [0.0, 1e-9, 0.002, 0.1, 0.6, 0.998])
def test_a_small_rise_looks_small_and_the_second_axis_is_the_rpi(y):
    curve = (y, min(y + 0.002, 1), y / 2, 0.0)
    drawn = figure(Shown(subject_of(), searched(y, curve), "pear"))
    [ax] = [ax for ax in drawn.axes if ax.get_ylabel() == "probability"]
    low, high = ax.get_ylim()
    assert low == 0 and high >= max(0.2, *curve) and high <= 1.05
    whole, tau, line, top = ax.lines
    assert set(whole.get_ydata()) == {y} and set(tau.get_xdata()) == {0.25}
    assert (line.get_xdata() == TAUS).all()
    np.testing.assert_allclose(line.get_ydata(), curve, rtol=1e-6)
    assert top.get_xydata().tolist() == [[0.25, pytest.approx(curve[1])]]
    seconds = [child for child in ax.child_axes if child.get_ylabel() == "RPI"]
    assert len(seconds) == (y > 1e-8)
    drawn.canvas.draw()
    for second in seconds:
        assert second.get_ylim() == pytest.approx(((low - y) / y, (high - y) / y))
        ticks = second.get_yticks()
        assert ticks[0] == 0 and (ticks >= 0).all()
        labels = [t.label2.get_window_extent() for t in second.yaxis.get_major_ticks()]
        assert not any(a.overlaps(b) for a, b in zip(labels, labels[1:], strict=False))


def test_colormap_and_alpha_reach_the_overlay():
    options = ("explain", "a.png", "--target", "pear", "--save", "overlay,map")
    [found] = objects(*options, "--colormap", "magma", "--alpha", "1")
    assert found["outputs"]["overlay"] == "aft-out/a-pear-layercam-magma-alpha1-overlay.png"
    scores = np.load(found["outputs"]["map"])
    top, left = np.unravel_index(scores.argmax(), scores.shape)
    painted = pixels(Image.open(found["outputs"]["overlay"]))
    last = 255 * np.array(colormaps["magma"](1.0)[:3])
    assert abs(painted - last).max(2).min() <= 12
    [half] = objects(*options)
    assert half["outputs"]["map"] == found["outputs"]["map"]
    assert half["outputs"]["overlay"] == "aft-out/a-pear-layercam-overlay.png"


def test_a_grid_has_a_row_a_class_and_a_column_a_method():
    subject = subject_of(448, 448, grey=100)
    shown = []
    for cam in ("gradcam", "layercam", "scorecam"):
        for index, name in ((1, "pear"), (0, "apple")):
            e = replace(searched(shape=(32, 32)), cam=cam, class_index=index, probability=0.3)
            shown.append(Shown(subject, e, name))
    drawn = grid(shown)
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    # By place: from the top, then from the left.
    order = sorted(range(len(boxes)), key=lambda i: (-round(boxes[i].y1 / 10), boxes[i].x0))
    lines = [texts(drawn)[i] for i in order]
    titles = ["Grad-CAM", "Layer-CAM", "Score-CAM"]
    cut = ["tau* = 0.25"] * 3 + ["50.0% kept, alone 0.602"] * 3
    assert lines == [*titles, *["pear 0.300"] * 3, *cut, *titles, *["apple 0.300"] * 3, *cut]
    # Rows of pictures alternate: plain, cut, plain, cut; only cut ones have dimmed pixels.
    rendered = np.asarray(drawn.canvas.buffer_rgba()).astype(int)[..., :3]
    dim = (abs(rendered - 45) <= 1).all(2).mean(1)
    rows = np.flatnonzero(np.diff((dim > 0.3).astype(int), prepend=0, append=0))
    assert len(rows) == 4 and rows[1] - rows[0] > 200 and rows[3] - rows[2] > 200


def test_one_call_for_several_methods_and_classes_writes_a_grid_too():
    options = ("explain", "a.png", "--cam", "gradcam", "--cam", "layercam", "--top-k", "3")
    *others, last = objects(*options)
    assert not any("grid" in found["outputs"] for found in others)
    path = last["outputs"]["grid"]
    assert path.startswith("aft-out/a-3x2-") and path.endswith("-grid.png")
    with Image.open(path) as image:
        assert image.size == (12 + 2 * 236, 12 + 3 * (224 + 2 * 20 + 12))
    # Other classes have a grid of their own; one picture, or none, has none.
    fewer = objects(*options[:-1], "2")[-1]["outputs"]["grid"]
    assert fewer != path and Path(path).is_file()
    assert "grid" not in objects("explain", "a.png")[0]["outputs"]
    assert all("grid" not in found["outputs"] for found in objects(*options, "--save", "map"))
