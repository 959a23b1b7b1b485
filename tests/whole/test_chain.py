"""The three commands without a further argument: masks, the zero level, tables of two judges."""

import json
import re
from pathlib import Path

import pytest
import torch

# Imported here: it takes load_classifier when it is first imported.
import aftcli.engine.export  # noqa: F401
from aftcli.models.checkpoint import read_card
from aftcli.settings import SITUATIONS
from tests.helpers import faulty
from tests.helpers.command import aft
from tests.helpers.stored import small_float
from tests.helpers.trained import make_colours

pytestmark = pytest.mark.slow

BOTH = ("gradcam", "layercam")

QUICK = ("--epochs", "1", "--workers", "0", "--engine", "torch")

CHECKPOINT = Path("aft-run/tuned/small-gradcam.safetensors")


@pytest.fixture
def colours(monkeypatch, tmp_path):
    """A folder to be in with a data set; the commands take a small network."""
    make_colours(tmp_path / "data")
    for module in ("models.load", "models.source", "evaluation.study"):
        monkeypatch.setattr(f"aftcli.{module}.load_classifier", faulty.load_small)
    monkeypatch.chdir(tmp_path)


def done(*arguments):
    """A command that must succeed."""
    found = aft(*arguments)
    assert found.code in (0, None), found.err
    return found


def test_the_chain_without_a_further_argument_learns_the_zero_level(colours):
    done("gen-masks", "data")
    learned = done("finetune")
    first, second, *_ = learned.err.splitlines()
    assert first.startswith("small-gradcam: learning the zero level at 2+3 from ")
    assert second.endswith("no probability changes; chosen as the masks' method has a sign")
    card = read_card(CHECKPOINT)
    assert (card["objective"], card["gauge"], card["lam"]) == ("zero-level", "t", None)

    table = done("evaluate", "--table").out
    (accuracy,) = re.findall(r"Table 4: accuracy\n.*\n.* Grad-CAM +(\S+) +(\S+)\n", table)
    assert accuracy[0] == accuracy[1]
    rows = json.loads(done("evaluate", "--table", "--json").out)
    for variant in ("original", "tft", "aft"):
        judges = {row["judge"] for row in rows["table3"] if row["variant"] == variant}
        assert judges == {"self", "mirror"}
    measured = {row["variant"]: row["accuracy"] for row in rows["table4"]}
    assert set(measured) == {"original", "aft"} and measured["original"] == measured["aft"]

    # Not rounded: the same probabilities of random images.
    before, after = small_float(), faulty.load_small(checkpoint=CHECKPOINT)
    x = torch.rand(20, 3, *before.preprocessing.size)
    with torch.no_grad():
        moved = before(x).softmax(1) - after(x).softmax(1)
    assert after.zero_level is not None and moved.abs().max() <= 1e-5


def test_a_method_without_a_sign_is_trained_and_the_reason_said(colours):
    done("gen-masks", "data", "--cam", "gradcam", "--cam", "layercam")
    said = [line for line in done("finetune", *QUICK).err.splitlines() if line[:4] == "aft:"]
    reason = "the masks' method has no sign"
    assert said == [
        "aft: small-gradcam: --epochs without effect: the default learns one number, the zero "
        "level; --objective tuner trains the network",
        f"aft: small-layercam: {reason}; the default is mask consistency, "
        "see docs/method/zero-level.md",
    ]
    cards = {cam: read_card(Path(f"aft-run/tuned/small-{cam}.safetensors")) for cam in BOTH}
    assert [cards[cam]["objective"] for cam in BOTH] == ["zero-level", "tuner"]
    few = SITUATIONS["few"]
    trained = cards["layercam"]
    assert {key: trained[key] for key in few.settings} == {**few.settings, "epochs": 1}
    assert trained["situation"] == few.title
    # Both are there already: the same command chooses the same again.
    again = done("finetune", *QUICK)
    assert again.out.count("there already") == 4 and "training" not in again.err


def test_options_of_the_training_choose_it(colours):
    done("gen-masks", "data")
    for given in (("--lam", "0.2", "--blend", "0.5"), ("--augment",), ("--patience", "1")):
        learned = done("finetune", *given, *QUICK, "--overwrite")
        first, second, *_ = learned.err.splitlines()
        assert first.startswith("small-gradcam: training 2+3, what follows it and the tuner on ")
        assert second.endswith(f"; chosen by {', '.join(word for word in given if '-' in word)}")
        assert read_card(CHECKPOINT)["objective"] == "tuner" and "aft:" not in learned.err
    options = ("--layer", "0", "--layer", "2+3", *QUICK, "--overwrite")
    assert "; chosen by --layer\n" in done("finetune", *options).err


def test_a_checkpoint_of_the_default_before_is_refused_with_what_to_do(colours):
    """A checkpoint from before the zero level was the default stays as it is."""
    done("gen-masks", "data")
    explicit = ("finetune", "--objective", "tuner", "--workers", "0")
    done(*explicit)
    before = CHECKPOINT.read_bytes()
    refused = aft("finetune")
    (line,) = refused.err.splitlines()
    assert refused.code == 1 and line.startswith(
        f"aft: {CHECKPOINT}: was begun with other settings"
    )
    assert "objective is tuner, asked for zero-level" in line
    assert line.endswith("use the same ones, another --run, or --overwrite")
    assert CHECKPOINT.read_bytes() == before
    # The identity that an explicit objective has found is the same as before.
    card = read_card(CHECKPOINT)
    assert "gauge" not in card and card["patience"] == 3 and card["seed"] == 0
    assert "there already" in done(*explicit).out
    done("finetune", "--overwrite")
    assert read_card(CHECKPOINT)["objective"] == "zero-level"
