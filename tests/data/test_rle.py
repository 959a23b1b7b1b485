"""COCO's run-length encoding and polygons, against slow loops and against pycocotools."""

import numpy as np
import pytest

from aftcli.data.objects import from_rle, polygon_mask, to_rle


def masks():
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (3, 5), (40, 7), (64, 200)]:
        for share in (0, 0.05, 0.5, 1):
            yield rng.random((height, width)) < share
    blob = np.zeros((300, 400), bool)
    blob[50:250, 100:390] = True
    yield blob


def plain_runs(mask):
    """Lengths of runs down the columns, counted pixel by pixel."""
    runs, value = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != value:
                runs.append(0)
                value = not value
            runs[-1] += 1
    return runs


@pytest.mark.parametrize("mask", masks(), ids=lambda m: f"{m.shape}-{m.mean():.2f}")
def test_an_encoding_is_undone(mask):
    rle = to_rle(mask)
    assert rle["size"] == list(mask.shape) and rle["counts"].isascii()
    assert np.array_equal(from_rle(rle), mask)
    assert np.array_equal(from_rle({**rle, "counts": rle["counts"].encode()}), mask)
    assert np.array_equal(from_rle({**rle, "counts": plain_runs(mask)}), mask)


@pytest.mark.parametrize("mask", masks(), ids=lambda m: f"{m.shape}-{m.mean():.2f}")
def test_pycocotools_writes_the_same(mask):
    coco = pytest.importorskip("pycocotools.mask")
    rle = to_rle(mask)
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert theirs["counts"].decode() == rle["counts"] and theirs["size"] == rle["size"]
    assert np.array_equal(coco.decode(rle), mask)
    assert coco.area(rle) == mask.sum()


@pytest.mark.parametrize(
    ("size", "counts"), [((2, 2), [1, 2]), ((2, 2), [5, -1]), ((2, 2), "2"), ((0, 2), [0])]
)
def test_runs_that_do_not_fill_a_mask_are_refused(size, counts):
    with pytest.raises(ValueError, match="its runs do not fill"):
        from_rle({"size": size, "counts": counts})


def is_inside(x, y, corners):
    """Count the edges right of a point, one by one."""
    inside = False
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (y1 <= y) != (y2 <= y) and x > x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            inside = not inside
    return inside


def test_many_edges_are_looked_at_piece_by_piece(monkeypatch):
    corners = np.random.default_rng(9).uniform(-5, 40, (30, 2))
    whole = polygon_mask(corners, (30, 20))
    for edges in (1, 60, 140):
        monkeypatch.setattr("aftcli.data.objects.EDGES", edges)
        assert np.array_equal(polygon_mask(corners, (30, 20)), whole)


@pytest.mark.parametrize("seed", range(4))
def test_a_polygon_has_the_pixels_whose_centre_is_in_it(seed):
    # Corners beyond the picture too; none on the line of centres.
    corners = np.random.default_rng(seed).uniform(-10, 40, (3 + 2 * seed, 2)).round(2) + 0.003
    found = polygon_mask(corners, (30, 20))
    wanted = [[is_inside(x + 0.5, y + 0.5, corners) for x in range(30)] for y in range(20)]
    assert found.shape == (20, 30) and found.tolist() == wanted
    assert found.any()


def test_a_rectangle_has_its_area():
    corners = np.array([[2, 3], [10, 3], [10, 7], [2, 7]], float)
    found = polygon_mask(corners, (16, 12))
    assert found.sum() == 8 * 4 and found[3:7, 2:10].all()


def test_pycocotools_fills_the_same_but_for_the_edge():
    coco = pytest.importorskip("pycocotools.mask")
    corners = np.array([[10, 5], [50, 8], [55, 40], [30, 30], [8, 44]], float)
    (rle,) = coco.frPyObjects([corners.ravel().tolist()], 50, 60)
    theirs, own = coco.decode(rle).astype(bool), polygon_mask(corners, (60, 50))
    wider = np.pad(own, 1)
    near = [wider[1 + dy : 51 + dy, 1 + dx : 61 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    edge = np.any(near, axis=0) & ~np.all(near, axis=0)
    assert not ((theirs != own) & ~edge).any()
