"""Images of several classes: a row for each, from masks to tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli import AftError, MaskStore, read_image, to_input
from aftcli.aft import jobs
from aftcli.core.classes import Classes
from aftcli.data.objects import Objects
from aftcli.data.parts import Reading
from aftcli.data.sets import open_data_set
from aftcli.evaluation import sanity
from aftcli.evaluation.run import Measured, Plan, evaluate_study
from aftcli.evaluation.study import Study, Variant
from aftcli.evaluation.tables import table2, table3, table4
from aftcli.formats.voc import VOC_CLASSES
from aftcli.masks.generate import generate_masks
from aftcli.measures.values import Values, classified
from aftcli.pages import figures
from aftcli.settings import Search
from aftcli.tft.search import tune_batch
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import NAMES, small_float
from tests.helpers.voc import annotation, make_voc

EVERY = Reading(every=True)


def slow_precision(scores, shown):
    """Mean over classes of the mean, over its images, of the precision down to this image."""
    of_classes = []
    for c in range(scores.shape[1]):
        positives = [i for i in range(len(scores)) if shown[i, c]]
        precisions = []
        for i in positives:
            ranked = [j for j in range(len(scores)) if scores[j, c] >= scores[i, c]]
            precisions.append(sum(bool(shown[j, c]) for j in ranked) / len(ranked))
        if positives:
            of_classes.append(sum(precisions) / len(positives))
    return sum(of_classes) / len(of_classes)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_and_accuracy_of_images_with_several_labels(seed):
    generator = torch.Generator().manual_seed(seed)
    shown = torch.rand(12, 5, generator=generator) < 0.35
    shown[:, 4] = False  # a class that does not occur
    shown[~shown.any(1), 1] = True
    scores = torch.rand(12, 5, generator=generator)
    image, label = shown.nonzero().T
    order = torch.randperm(len(image), generator=generator)
    image, label = image[order], label[order]
    names = [f"{int(i)}.png" for i in image]
    index, c = torch.arange(len(image)), label.clone()
    values = Values(index, label, c, scores[image, label], {}, scores=scores[image])
    right, precision = classified(values, names)
    assert precision == pytest.approx(slow_precision(scores, shown), abs=1e-6)
    wanted = [bool(shown[i, scores[i].argmax()]) for i in range(12)]
    assert len(right) == 12 and float(right.sum()) == sum(wanted)


def test_voc_has_a_sample_for_each_class_that_is_shown(tmp_path):
    boxes = {
        "a": [("cat", 1, 1, 20, 20), ("dog", 30, 30, 60, 60), ("cat", 40, 1, 50, 9)],
        "b": [("bird", 1, 1, 20, 20)],
    }
    root = make_voc(tmp_path, {k: annotation(v, (64, 64)) for k, v in boxes.items()})
    classes = Classes(VOC_CLASSES)
    data = open_data_set(root, "val", classes, reading=EVERY)
    names = [(s.name, VOC_CLASSES[s.label]) for s in data.samples]
    assert names == [
        ("JPEGImages/a.jpg", "cat"),
        ("JPEGImages/a.jpg", "dog"),
        ("JPEGImages/b.jpg", "bird"),
    ]
    assert data.every and data.notes == ()
    assert [s.label for s in open_data_set(root, "val", classes).samples] == [11, 2]


@pytest.fixture
def listed(tmp_path):
    """Pictures of one or two bright squares, with the box of each, in a manifest."""
    rng = np.random.default_rng(0)
    lines = ["path,label,split,x,y,w,h"]
    for split in ("train", "val"):
        for i in range(4):
            pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8)
            name = f"{split}{i}.png"
            for k, label in enumerate(NAMES[: 1 + i % 2] if i < 3 else NAMES[2:]):
                left = 2 + 20 * k
                pixels[10:24, left : left + 14] += 110
                lines.append(f"{name},{label},{split},{left},10,14,14")
            Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path / "labels.csv"


def test_masks_explain_each_label(listed, tmp_path):
    f = small_float()
    data = open_data_set(listed, None, f.classes, reading=EVERY)
    assert [s.name[5] for s in data.samples] == list("01213")
    list(generate_masks(f, data, ["gradcam"], tmp_path / "run", Search((0.3, 0.6)), block=3))
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert store.settings["every"] == 1
        for i, record in enumerate(store):
            assert record.class_index == record.label == data.samples[i].label
            x = to_input(read_image(listed.parent / record.path), f.preprocessing)
            (alone,) = tune_batch(
                f, x, ["gradcam"], Search((0.3, 0.6)), torch.tensor([record.label])
            )
            assert float(alone.tft.tau) == record.tau
            torch.testing.assert_close(alone.attribution[0], record.attribution)
            probability = f(x).softmax(1)[0, record.label]
            assert record.probability == pytest.approx(float(probability), rel=1e-5)


def test_labels_that_are_no_classes_can_not_be_explained(listed, tmp_path):
    f = small_float()
    data = open_data_set(listed, None, Classes(("x", "y", "z")), reading=EVERY)
    with pytest.raises(AftError, match="--labels all explains the class of each label"):
        list(generate_masks(f, data, ["gradcam"], tmp_path / "run", Search((0.5,))))


def test_tables_have_a_row_for_each_label(listed, tmp_path):
    f = small_float()
    data = open_data_set(listed, "val", f.classes, reading=EVERY)
    variant = Variant("original", f.weights_hash(), ("gradcam",), lambda: f)
    study = Study(f, data, ("gradcam",), (variant,), Search((0.3, 0.6)), None)
    plan = Plan(("binary",), frozenset({"boxes"}), workers=0, batch=2)
    *_, measured = evaluate_study(study, tmp_path, plan)
    assert isinstance(measured, Measured)
    (result,) = measured.results.values()
    values = result.values
    assert len(values.index) == 5 and values.class_index.equal(values.label)
    x = {}
    for sample in data.samples:
        picture = read_image(listed.parent / sample.name)
        x[sample.name] = f(to_input(picture, f.preprocessing)).softmax(1)[0].detach()
    for row, i in enumerate(values.index.tolist()):
        sample = data.samples[i]
        torch.testing.assert_close(values.scores[row], x[sample.name], rtol=1e-4, atol=1e-5)
        assert float(values.probability[row]) == float(values.scores[row, sample.label])
    labels = {name: [s.label for s in data.samples if s.name == name] for name in x}
    (row,) = table4(measured)
    shown = torch.tensor([[c in labels[name] for c in range(3)] for name in x])
    scores = torch.stack([x[name] for name in x])
    right = [bool(s[int(p.argmax())]) for s, p in zip(shown, scores, strict=True)]
    assert row.n == 4 and row.accuracy == sum(right) / 4
    assert row.precision == pytest.approx(slow_precision(scores, shown), abs=1e-6)
    assert table2([study])[0].test == 4
    # Localisation is against the objects of each label.
    objects = Objects(data, f.preprocessing)
    energy = values.views["original"].measures["energy"]
    for position, i in enumerate(values.index.tolist()):
        region = objects.regions(i, data.samples[i].label).boxes
        assert region is not None and not energy[position].isnan()
    (of_energy, *_) = table3(measured, ("energy",), ("original",))
    assert of_energy.n == 5


NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )
    model.preprocessing = {"size": [32, 32], "resize": 36}
    model.class_names = ["apple", "pear", "plum"]
    return model
"""


def test_the_chain_keeps_the_labels(listed):
    root = listed.parent
    (root / "net.py").write_text(NETWORK)
    (root / "names.txt").write_text("\n".join(NAMES))
    own = ("--model", f"{root}/net.py:network", "--classes", root / "names.txt")
    own += ("--run", root / "run", "--workers", "0")
    masks = aft("gen-masks", listed, "--labels", "all", "--thresholds", "0.3", *own, "--json")
    assert masks.code in (0, None), masks.err
    assert json.loads(masks.out)["stores"][0]["images"] == 5
    tuned = aft("finetune", *own, "--objective", "tuner", "--epochs", "1", "--json")
    assert tuned.code in (0, None), tuned.err
    found = aft("evaluate", *own, "--table", "4", "--json")
    assert found.code in (0, None), found.err
    original, after = json.loads(found.out)["table4"]
    assert 0 < original["precision"] <= 1 and after["variant"] == "aft" and "precision" in after
    shown = aft("evaluate", *own, "--table", "4")
    assert "Table 4: accuracy, mean average precision" in shown.out
    assert f"{original['accuracy']:.3f}, {original['precision']:.3f}" in shown.out
    lines = aft("evaluate", *own, "--table", "4", "--format", "csv").out
    assert ",precision," in lines
    # The largest alone, where that is asked for.
    largest = aft("evaluate", *own, "--table", "4", "--labels", "largest", "--json")
    assert "precision" not in json.loads(largest.out)["table4"][0]


@pytest.fixture
def chain(listed, tmp_path):
    """Options of commands on a network of its own."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    own = ("--model", f"{tmp_path}/net.py:network", "--classes", tmp_path / "names.txt")
    return (*own, "--run", tmp_path / "run", "--workers", "0", "--quiet")


def test_figures_and_the_sanity_check_explain_the_label(listed, chain, tmp_path, monkeypatch):
    masks = aft("gen-masks", listed, "--labels", "all", "--thresholds", "0.3", *chain)
    assert masks.code in (0, None), masks.err
    drawn, compared = [], []
    draw, compare = figures._draw_row, sanity.sanity

    def drawing(row, subject, f, found, own):
        drawn.append((Path(subject.path).name, found.class_index))
        draw(row, subject, f, found, own)

    def comparing(f, x, cam, search, seed, cells, labels):
        compared.append((len(x), labels))
        found = compare(f, x, cam, search, seed, cells, labels)
        rows = [
            compare(f, x[i : i + 1], cam, search, seed, cells, labels[i : i + 1])
            for i in range(len(x))
        ]
        for key, values in found.items():
            torch.testing.assert_close(values, torch.cat([r[key] for r in rows]))
        predicted = f(x).argmax(1)
        assert not predicted.equal(labels)
        other = compare(f, x, cam, search, seed, cells)
        assert any(not values.equal(other[key]) for key, values in found.items())
        return found

    monkeypatch.setattr(figures, "_draw_row", drawing)
    monkeypatch.setattr(sanity, "sanity", comparing)
    options = ("--table", "4", "--sanity", "--figures", "--masking", "binary")
    done = aft("evaluate", *options, *chain, "--image", "val3", "--json")
    assert done.code in (0, None), done.err
    samples = open_data_set(listed, "val", Classes(NAMES), reading=EVERY).samples
    assert next(s.label for s in samples if s.name == "val3.png") == 2
    assert drawn == [("val3.png", 2)]
    (_, labels), *_ = compared
    assert labels.tolist() == [s.label for s in samples]
    names = {path.name for path in (tmp_path / "run/results/figures").glob("*val3*")}
    assert names == {f"net.py_network-{tmp_path.name}-val3-2.png"}


def test_a_control_learns_each_label(listed, chain, monkeypatch):
    seen = []
    real = jobs.control_job

    def watched(*given, **named):
        seen.append(real(*given, **named).data_set)
        return real(*given, **named)

    monkeypatch.setattr(jobs, "control_job", watched)
    learn = ("finetune", listed, "--no-masks", "--epochs", "1", "--held-out", "0", *chain)
    done = aft(*learn, "--labels", "all")
    assert done.code in (0, None), done.err
    assert [s.label for s in seen[0].samples] == [0, 0, 0, 1, 2] and seen[0].every
    refused = aft(*learn)
    assert refused.code == 1 and "settings" in refused.err
    said = usage_error(aft("finetune", "--labels", "all", *chain))
    assert said.endswith("--labels has no effect without --no-masks")
