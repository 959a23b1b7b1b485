"""The zero level on a real network: equal predictions, plain timm, engines, ONNX, commands."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aftcli import accelerated, attribution_map, load_classifier, read_image, to_input
from aftcli.aft.tail import with_parts
from aftcli.core.zero_level import fold, give_zero_level
from aftcli.data.sets import open_data_set
from aftcli.files import write_tensors
from aftcli.models.checkpoint import checkpoint_of
from tests.conftest import ROOT
from tests.helpers.command import aft, usage_error
from tests.helpers.stored import small_float
from tests.helpers.trained import make_colours, masks_of

pytestmark = pytest.mark.slow

LEVEL = 0.11


@pytest.fixture(scope="module")
def levelled(lite0, tmp_path_factory):
    """A checkpoint of lite0 with v folded into its last layer, and t."""
    g = with_parts(
        lite0, lite0.stem, *copy.deepcopy((lite0.layer, lite0.head)), lite0.activation_shape
    )
    generator = torch.Generator().manual_seed(0)
    assert fold(g, 0.03 * torch.randn(1280, generator=generator))
    give_zero_level(g, torch.tensor(LEVEL))
    g.cam = "gradcam"
    tensors, metadata = checkpoint_of(g, None, {})
    path = tmp_path_factory.mktemp("level") / "level.safetensors"
    write_tensors(path, tensors, metadata)
    return path


def inputs(f, count):
    """Images that the network knows, where they are, otherwise noise; and their labels."""
    shared = Path(os.environ.get("AFT_SHARED", ROOT.parent / "shared")) / "data/imagenet"
    if not shared.is_dir():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, 3, 224, 224, generator=generator)
        return x, torch.randint(0, 1000, (count,), generator=generator)
    found = open_data_set(shared, "val", f.classes).limited(count)
    images = [read_image(found.picture(i)) for i in range(count)]
    x = torch.cat([to_input(image, f.preprocessing) for image in images])
    return x, torch.tensor([sample.label for sample in found.samples])


@torch.no_grad()
def test_200_images_keep_their_probabilities(lite0, levelled):
    g = load_classifier(checkpoint=levelled)
    x, labels = inputs(lite0, 200)
    right = [0, 0]
    assert all(torch.equal(v, g.stem.state_dict()[k]) for k, v in lite0.stem.state_dict().items())
    for part, y in zip(x.split(20), labels.split(20), strict=True):
        features = lite0.stem(part)  # w0 is the same
        both = [f.head(f.layer(features)).softmax(1) for f in (lite0, g)]
        assert (both[0] - both[1]).abs().max() <= 1e-5
        right = [r + int((p.argmax(1) == y).sum()) for r, p in zip(right, both, strict=True)]
    assert right[0] == right[1]


@torch.no_grad()
def test_plain_timm_takes_the_tensors_without_the_level(levelled, chelsea):
    import timm

    tensors = load_file(levelled)
    assert float(tensors.pop("zero_level.t")) == pytest.approx(LEVEL)
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(tensors)
    expected = load_classifier(checkpoint=levelled)(chelsea)
    assert (network.eval()(chelsea) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_engines_know_it(levelled, chelsea, engine):
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    g = load_classifier(checkpoint=levelled)
    fast = accelerated(g, engine, note=lambda text: None)
    assert fast.engine is not None
    found, expected = fast.activation(chelsea), g.activation(chelsea)
    assert bool((found[:, -1] == 1).all()) and (found - expected).abs().max() < 1e-3
    assert (fast(chelsea) - g(chelsea)).abs().max() < 1e-3


def test_the_onnx_export_has_the_same_map(levelled, chelsea, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from aftcli.engine.export import export_onnx

    export_onnx(levelled, tmp_path / "level.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "level.onnx", providers=["CPUExecutionProvider"]
    )
    logits, attribution = map(torch.tensor, session.run(None, {"x": chelsea.numpy()}))
    g = load_classifier(checkpoint=levelled)
    c = int(logits.argmax())
    expected = attribution_map(g, chelsea, c, "gradcam")
    with torch.no_grad():
        assert (logits - g(chelsea)).abs().max() < 1e-3
    assert (attribution - expected).abs().max() < 1e-3
    plain = attribution_map(load_classifier(), chelsea, c, "gradcam")
    assert (expected > 0).sum() < (plain > 0).sum()


def test_explain_takes_the_checkpoint(levelled, tmp_path):
    photo = ROOT / "docs/images/chelsea.jpg"
    done = aft("explain", photo, "--checkpoint", levelled, "--out", tmp_path, "--json")
    assert done.code in (0, None), done.err
    (result,) = json.loads(done.out)
    assert result["cam"] == "gradcam"


@pytest.fixture
def small_commands(monkeypatch, tmp_path):
    """A folder to be in with a small network's masks; the commands take this network."""
    make_colours(tmp_path / "data")
    masks_of(tmp_path / "data", tmp_path / "aft-run")
    for module in ("models.load", "models.source"):
        monkeypatch.setattr(f"aftcli.{module}.load_classifier", lambda *_, **__: small_float())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("gauge", ["t", "v"])
def test_finetune_says_what_it_learns(small_commands, gauge):
    options = ("--objective", "zero-level", "--gauge", gauge, "--workers", "0")
    refused = usage_error(aft("finetune", *options, "--lam", "1"))
    assert refused.endswith("--lam has no effect with --objective zero-level")
    done = aft("finetune", *options, "--json")
    assert done.code in (0, None), done.err
    (card,) = json.loads(done.out)
    assert (card["objective"], card["gauge"], card["patience"]) == ("zero-level", gauge, 0)
    assert "learning the zero level at 2+3" in done.err
    assert ("chooses t, alone" in done.err) == (gauge == "t")
    assert ("chooses t again" in done.err) == (gauge == "v")
    (line,) = (line for line in done.err.splitlines() if line.startswith("zero level "))
    found = card["zero_level"]
    before, after = found["before"], found["after"]
    assert line == (
        f"zero level {found['t']:.3g} ({100 * after['share']:.3g} % of the maps' mean maximum): "
        f"increase {before['increase']:.3f} -> {after['increase']:.3f}, "
        f"drop {before['drop']:.3f} -> {after['drop']:.3f} on {found['images']} training images"
    )
    rows = [line.split() for line in aft("finetune", *options).out.splitlines()]
    before, after = (row for row in rows if row[2:5] == ["train,", "held", "out"])
    # The held-out image may have no cell above 0: then its loss is 0, but it is one.
    assert float(before[-1]) >= 0 and before[-3] == after[-3]


def test_explain_says_the_zero_level(small_commands):
    photo = next(Path("data/train").rglob("*.png"))
    options = ("--cam", "gradcam", "--zero-level", "0.3")
    (result,) = json.loads(aft("explain", photo, *options, "--json").out)
    assert result["zero_level"] == 0.3 and "-zero0.3-" in result["outputs"]["overlay"]
    table = aft("explain", photo, *options).out.splitlines()
    assert re.search(r"prob\. +zero$", table[0]) and table[1].endswith(" 0.3")
    (plain,) = json.loads(aft("explain", photo, "--cam", "gradcam", "--json").out)
    assert "zero_level" not in plain
    wrong = aft("explain", photo, "--zero-level", "1")
    assert wrong.code == 2 and "the zero level must lie in [0, 1)" in wrong.err
