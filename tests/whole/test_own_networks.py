"""Networks of one's own from masks to tables: class names travel, outputs keep their meaning."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

# Imported here: it takes load_classifier when it is first imported.
import aftcli.engine.export  # noqa: F401
from aftcli.core.classes import Classes, Preprocessing
from aftcli.data.images import read_image, to_input
from aftcli.evaluation.study import Asked, find_studies
from aftcli.files import write_tensors
from aftcli.masks.store import MaskStore
from aftcli.models.checkpoint import checkpoint_of, read_card
from aftcli.models.load import load_classifier
from aftcli.networks.sources import Network
from tests.helpers.command import aft
from tests.helpers.trained import make_colours

OWN = ("--model", "tiny", "--checkpoint", "own.pth")
QUICK = ("--workers", "0", "--engine", "torch")
TUNED = Path("aft-run/tuned/tiny-gradcam.safetensors")
ORDER = ("plum", "apple", "pear")  # of the outputs, another than that of the folders

SIZE = Preprocessing(size=(32, 32), resize=36)


def tiny(count):
    """An uncut network in float32 with so many outputs."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, count),
    )


def saved(count):
    """The same with weights, in own.pth, as its user has it."""
    torch.manual_seed(3)
    model = tiny(count).eval()
    with torch.no_grad():
        model[6].weight.mul_(40)
    torch.save(model.state_dict(), "own.pth")
    return model


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder to be in with a data set; --model tiny is a name like any other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "aftcli.models.load.find_source",
        lambda name: lambda name, weights, count: Network(tiny(count or 5), SIZE, None),
    )
    make_colours(tmp_path / "data")
    Path("names.txt").write_text("\n".join(ORDER))


def done(*arguments):
    """A command that must succeed."""
    found = aft(*arguments)
    assert found.code in (0, None), found.err
    return found


def refused(*arguments):
    """The message of a command that must fail."""
    found = aft(*arguments)
    assert found.code == 1, found.err
    return found.err


def val_images():
    for path in sorted(Path("data/val").rglob("*.png")):
        yield path.parent.name, to_input(read_image(path), SIZE)


def evaluated(*more):
    rows = json.loads(done("evaluate", *more, *QUICK, "--judge", "none", "--json").out)
    return rows, {row["variant"]: row["accuracy"] for row in rows["table4"]}


def test_class_names_are_given_once(folder):
    model = saved(3)
    with torch.no_grad():
        right = [ORDER[int(model(x).argmax())] == name for name, x in val_images()]
    done("gen-masks", "data", *OWN, "--classes", "names.txt", *QUICK)
    named = done("gen-masks", "data", *OWN, "--cam", "eigencam", *QUICK).err
    names = "class names are taken from its masks or checkpoints: plum, apple, pear"
    assert f"aft: aft-run: {names}" in named
    for cam in ("gradcam", "eigencam"):
        made = MaskStore(f"aft-run/masks/tiny-{cam}.h5").settings
        assert (made["class_names"], made["labels"]) == (list(ORDER), "model")
        assert "output" not in made  # softmax, as in stores of earlier versions

    tuned = done("finetune", "--epochs", "1", "--objective", "tuner", *QUICK)
    assert "replaced" not in tuned.err and "val is not measured" not in tuned.err
    card = read_card(TUNED)
    assert (tuple(card["classes"]["names"]), card["new_head"]) == (ORDER, False)
    assert card["metrics"]["before"]["val"]["accuracy"] == pytest.approx(np.mean(right))

    rows, accuracy = evaluated("--masking", "binary")
    assert accuracy["original"] == pytest.approx(np.mean(right))
    assert {row["variant"] for row in rows["table3"]} == {"original", "tft", "aft"}


def test_a_control_on_other_images_keeps_the_last_layer_of_a_named_network(folder):
    saved(3)
    done("gen-masks", "data", *OWN, "--classes", "names.txt", *QUICK)
    make_colours(Path("other"), seed=5)
    for path in list(Path("other").rglob("*.png")):
        path.rename(path.with_name(f"another {path.name}"))
    done("finetune", "other", "--no-masks", "--epochs", "1", *OWN, "--run", "new", *QUICK)
    assert read_card(Path("new/tuned/tiny-control.safetensors"))["new_head"]  # nobody named them
    said = refused("finetune", "other", "--no-masks", "--epochs", "1", *OWN, *QUICK)
    assert "does not hold the images of" in said and "replaced" not in said


def test_results_alone_name_the_classes(folder):
    saved(3)
    asked = ("data", *OWN, "--cam", "gradcam", "--masking", "binary")
    rows, _ = evaluated(*asked, "--classes", "names.txt")
    again, _ = evaluated(*asked)
    assert again["table3"] == rows["table3"] and again["table4"] == rows["table4"]
    assert "no names" in refused("evaluate", *asked, "--run", "new", *QUICK)


def test_a_network_tuned_before_it_was_named_has_the_names_of_the_masks(folder):
    saved(3)
    done("gen-masks", "data", *OWN, "--classes", "names.txt", *QUICK)
    done("finetune", "--epochs", "1", "--objective", "tuner", *QUICK)
    tuned = load_classifier(checkpoint=TUNED)
    tuned.classes = Classes.numbered(3)
    write_tensors(TUNED, *checkpoint_of(tuned, None, read_card(TUNED)))
    (study,) = find_studies(Path("aft-run"), Asked(split="val"))
    (own,) = (variant for variant in study.variants if variant.name == "aft")
    assert load_classifier(checkpoint=TUNED).classes == Classes.numbered(3)
    assert own.load().classes.names == ORDER


@pytest.fixture
def two_colours(folder):
    """The data set of a binary classifier."""
    for split in ("train", "val"):
        for path in (Path("data") / split / "pear").iterdir():
            path.unlink()
        (Path("data") / split / "pear").rmdir()
        (Path("data") / split / "apple").rename(Path("data") / split / "not plum")


def test_one_logit_goes_from_masks_to_tables(two_colours):
    model = saved(1)
    Path("names.txt").write_text("plum\n")
    with torch.no_grad():
        right = [(model(x).item() > 0) == (name == "plum") for name, x in val_images()]
    made = done("gen-masks", "data", *OWN, "--classes", "names.txt", *QUICK)
    assert "tiny: its only output is taken for the logit of class 1" in made.err
    store = MaskStore("aft-run/masks/tiny-gradcam.h5")
    assert (store.settings["output"], store.settings["class_names"]) == (
        "sigmoid",
        ["not plum", "plum"],
    )
    for record in store:
        x = to_input(read_image(Path("data/train") / record.path), SIZE)
        with torch.no_grad():
            p = 1 / (1 + math.exp(-model(x).item()))
        assert record.class_index == (p > 0.5)
        assert record.probability == pytest.approx(max(p, 1 - p), abs=1e-5)

    assert "--output none needs probabilities" in refused("finetune", "--output", "none", *QUICK)
    learned = done("finetune", "--epochs", "1", *QUICK)
    assert "the network's output is sigmoid, and only softmax does not see" in learned.err
    assert "can have no zero level" in refused(
        "finetune", "--objective", "zero-level", "--overwrite", *QUICK
    )
    card = read_card(TUNED)
    assert (card["objective"], card["output"], card["outputs"]) == ("tuner", "sigmoid", 1)
    assert card["classes"]["names"] == ["not plum", "plum"]
    rows, accuracy = evaluated("--masking", "binary")
    assert accuracy["original"] == pytest.approx(np.mean(right))
    assert {row["variant"] for row in rows["table3"]} == {"original", "tft", "aft"}
    f = load_classifier(checkpoint=TUNED)
    assert (f.output, f.single, f.classes.names) == ("sigmoid", True, ("not plum", "plum"))


def test_a_new_last_layer_of_one_logit_has_an_output_for_each_class(folder):
    saved(1)
    done("finetune", "data", "--no-masks", "--epochs", "1", *OWN, *QUICK)
    card = read_card(Path("aft-run/tuned/tiny-control.safetensors"))
    assert (card["output"], card["classes"]["names"]) == ("softmax", ["apple", "pear", "plum"])
    assert "outputs" not in card and card["new_head"]


def test_both_classes_of_one_logit_are_explained(folder):
    model = saved(1)
    picture = next(Path("data/val").rglob("*.png"))
    options = (*OWN, "--classes", "names.txt", "--save", "map", "--json")
    Path("names.txt").write_text("plum\n")
    found = [
        json.loads(done("explain", picture, "--target", name, *options, "--out", name).out)[0]
        for name in ("not plum", "plum")
    ]
    with torch.no_grad():
        y = model(to_input(read_image(picture), SIZE)).item()
    p = 1 / (1 + math.exp(-y))
    assert [each["probability"] for each in found] == pytest.approx([1 - p, p], abs=1e-6)
    maps = [np.load(each["outputs"]["map"]) for each in found]
    assert np.abs(maps[0] - maps[1]).max() > 0.1


def test_a_multi_label_network_goes_from_masks_to_tables(folder):
    model = saved(3)
    asked = (*OWN, "--output", "sigmoid")
    done("gen-masks", "data", *asked, "--classes", "names.txt", *QUICK)
    store = MaskStore("aft-run/masks/tiny-gradcam.h5")
    assert store.settings["output"] == "sigmoid"
    for record in store:
        x = to_input(read_image(Path("data/train") / record.path), SIZE)
        with torch.no_grad():
            p = [1 / (1 + math.exp(-y)) for y in model(x)[0].tolist()]
        assert record.probability == pytest.approx(max(p), abs=1e-5)
    other = refused("gen-masks", "data", *OWN, "--classes", "names.txt", *QUICK)
    assert "output is sigmoid, asked for softmax" in other
    done("finetune", "--epochs", "1", *QUICK)
    assert read_card(TUNED)["output"] == "sigmoid" and "outputs" not in read_card(TUNED)
    rows, _ = evaluated("--masking", "binary")
    assert {row["variant"] for row in rows["table3"]} == {"original", "tft", "aft"}
    tuned = ("explain", next(Path("data").rglob("*.png")), "--checkpoint", TUNED)
    assert "was tuned for --output sigmoid" in refused(*tuned, "--output", "softmax")
    # Results of another output are other results.
    names = {path.name for path in Path("aft-run/results").glob("*original*")}
    done("evaluate", "data", *OWN, "--classes", "names.txt", "--cam", "gradcam", "--run", "other",
         "--masking", "binary", "--judge", "none", *QUICK)  # fmt: skip
    assert not names & {path.name for path in Path("other/results").glob("*original*")}
