"""Drawn images: only the object tells the class; what compares maps with it is computed again."""

import json

import numpy as np
import pytest
import torch

from benchmarks import pages
from benchmarks.quality import synthetic, synthetic_data, synthetic_tables
from benchmarks.quality.synthetic_data import TEXTURES, images, scene


@pytest.mark.parametrize("number", range(24))
def test_images_of_two_classes_differ_on_the_object_only(number):
    scenes = [scene("test", number, label) for label in range(len(TEXTURES))]
    for other in scenes[1:]:
        assert np.array_equal(scenes[0].truth, other.truth)
        assert np.array_equal(scenes[0].distractor, other.distractor)
        assert np.array_equal(scenes[0].image[~other.truth], other.image[~other.truth])
    shown = {s.image[s.truth].tobytes() for s in scenes}
    assert len(shown) == len(TEXTURES)


def test_each_class_is_drawn_as_often_and_no_object_fills_or_leaves_the_image():
    drawn = images("val", 80)
    assert torch.bincount(drawn.label).tolist() == [10] * len(TEXTURES)
    share = drawn.truth.flatten(1).double().mean(1)
    assert 0.02 < share.min() and share.max() < 0.3
    assert not (drawn.truth & drawn.distractor).any()
    some = drawn.distractor.flatten(1).any(1)
    assert 20 < some.sum() < 60
    edge = torch.ones(synthetic_data.SIDE, synthetic_data.SIDE, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    assert drawn.truth[:, edge].double().mean() < 0.01


def test_images_are_the_same_each_time_and_others_in_each_split():
    one, two = images("val", 8), images("val", 8)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.x, images("test", 8).x)
    assert torch.equal(one.x, images("val", 16).x[:8])


@pytest.mark.parametrize("seed", range(3))
def test_auroc_counts_pairs_of_pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    maps = (torch.rand(4, 6, 6, generator=generator) * 5).round() / 5
    truth = torch.rand(4, 6, 6, generator=generator) < 0.3
    truth[:, 0, 0], truth[:, 0, 1] = True, False
    for found, scores, inside in zip(synthetic.auroc(maps, truth), maps, truth, strict=True):
        wins = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a in scores[inside].tolist()
            for b in scores[~inside].tolist()
        ]
        assert float(found) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


def ranks(values):
    """Mean rank of each value, from 1."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_ranks(seed):
    rng = np.random.default_rng(seed)
    one, two = np.round(rng.uniform(size=(2, 5, 9)), 1)

    def slow(a, b):
        return np.corrcoef(ranks(list(a)), ranks(list(b)))[0, 1]

    means = slow(one.mean(1), two.mean(1))
    assert synthetic_tables.over_rows(one, two) == pytest.approx(means, abs=1e-12)
    images_ = np.mean([slow(one[row], two[row]) for row in range(5)])
    assert synthetic_tables.over_images(one, two) == pytest.approx(images_, abs=1e-12)
    within = np.mean([slow(one[:, n], two[:, n]) for n in range(9)])
    assert synthetic_tables.within_images(one, two) == pytest.approx(within, abs=1e-12)


def test_a_constant_row_has_no_correlation():
    assert np.isnan(synthetic_tables.spearman(np.ones(4), np.arange(4.0)))


@pytest.fixture(scope="module")
def few():
    """A network that has learned nothing, and eight images."""
    return synthetic_data.network().eval(), images("val", 8)


def test_views_are_the_map_cut_in_two_ways(few):
    model, drawn = few
    f, c = synthetic_data.classifier(model), drawn.label
    way = synthetic.WAYS["gradcam"]
    found, tau = synthetic.views(f, drawn.x, c, way)
    assert f.activation_shape[1:] == (8, 8)
    for plain, cut, each in zip(found["plain"], found["tft"], tau.tolist(), strict=True):
        for row in range(0, 64, 7):
            for column in range(0, 64, 7):
                score = float(plain[row, column])
                if abs(score - each) > 1e-4:
                    assert float(cut[row, column]) == (score if score > each else 0)
    # The shift keeps no pixel that the plain map has not.
    assert ((found["shift"] > 0) <= (found["plain"] > 0)).all()
    again, _ = synthetic.views(f, drawn.x, c, way, tau)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_values_survive_being_kept(few, monkeypatch):
    model, drawn = few
    monkeypatch.setattr(synthetic, "ROAD_IMAGES", 2)
    threads = torch.get_num_threads()
    values = synthetic.one_method("gradcam", model, drawn)
    torch.set_num_threads(threads)
    control = synthetic.controls(synthetic_data.classifier(model), drawn)
    references = synthetic.references(model, drawn)
    table = synthetic_tables.Table({"gradcam": values}, references, control, {"all": 1.0})
    assert float(references["the truth"]["iou"].min()) == 1
    assert float(references["the truth"]["auroc"].min()) == 1
    again = synthetic_tables.Table.from_json(json.loads(json.dumps(table.as_json())))
    for lines in (synthetic_tables.map_lines, synthetic_tables.control_lines):
        assert list(lines(again)) == list(lines(table))
    assert int(values["plain"]["ROAD"].isnan().sum()) == len(drawn.x) - 2


def stored(part):
    """The rows of a table of docs/results/synthetic.md."""
    blocks = pages.figures("results/synthetic")[part]
    tables = [block for block in blocks if isinstance(block, dict)]
    return {row[0]: row[1:] for row in tables[0]["rows"]}


def test_the_page_is_of_a_network_that_sees_the_object_only():
    found = {name: float(cells[0].split()[0]) for name, cells in stored("control").items()}
    assert found["the whole image"] >= 0.97
    assert found["the object alone, the rest hidden"] >= found["the whole image"] - 0.02
    assert found["the object hidden"] == pytest.approx(1 / len(TEXTURES), abs=0.03)


@pytest.mark.slow
def test_a_network_learns_the_object_and_nothing_else():
    model = synthetic_data.trained(images("train", 4000), 10)
    found = synthetic.controls(synthetic_data.classifier(model), images("val", 800))
    means = {name: float(values.mean()) for name, values in found.items()}
    assert means["the whole image"] >= 0.96
    assert means["the object alone, the rest hidden"] >= means["the whole image"] - 0.03
    assert means["the object hidden"] == pytest.approx(1 / len(TEXTURES), abs=0.05)
