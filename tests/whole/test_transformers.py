"""A vision transformer, Swin and a Lightning checkpoint from masks to tables."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision

# Imported here: it takes load_classifier when it is first imported.
import aftcli.engine.export  # noqa: F401
from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Preprocessing
from aftcli.data.images import read_image, to_input
from aftcli.masks.store import MaskStore
from aftcli.models.load import load_classifier
from aftcli.networks.sources import Network
from tests.helpers.command import aft
from tests.helpers.trained import make_colours

SIZE = Preprocessing(size=(32, 32), resize=36)
QUICK = ("--workers", "0", "--engine", "torch")
ORDER = ("plum", "apple", "pear")


def vit(count):
    own = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, **own, num_classes=count
    )


def swin(count):
    own = {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, **own, num_classes=count
    )


def resnet(count):
    return torchvision.models.resnet18(num_classes=count)


# Network, the layer that is chosen, and the names that its weights have in a file.
NETWORKS = {
    "vit": (vit, "blocks.1.norm1", ""),
    "swin": (swin, "norm", ""),
    # Its last stage has one cell here.
    "lightning": (resnet, "layer3.1", "model."),
}


@pytest.fixture(params=NETWORKS)
def case(request, monkeypatch, tmp_path):
    """A folder to be in, with a data set and a network's weights; the network, its layer."""
    build, layer, prefix = NETWORKS[request.param]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "aftcli.models.load.find_source",
        lambda name: lambda name, weights, count: Network(build(count or 5), SIZE, None),
    )
    make_colours(tmp_path / "data", each=3)
    Path("names.txt").write_text("\n".join(ORDER))
    torch.manual_seed(7)
    model = build(3).eval()
    last = list(model.parameters())[-2]
    with torch.no_grad():
        last.copy_(torch.randn(last.shape) * 2)
    weights = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    file = (
        {"state_dict": weights, "epoch": 3, "hyper_parameters": {"lr": 0.1}} if prefix else weights
    )
    torch.save(file, "own.ckpt" if prefix else "own.pth")
    return model, layer, "own.ckpt" if prefix else "own.pth"


def done(*arguments):
    """A command that must succeed."""
    found = aft(*arguments)
    assert found.code in (0, None), found.err
    return found


def p_of(model, x):
    """Probabilities of one image, by the plain network."""
    with torch.no_grad():
        y = model(x)[0].double().exp()
    return y / y.sum()


def same_in_one_graph(tuned, x):
    """Compare what `--export onnx` wrote with the checkpoint, for other counts than it was made."""
    f = load_classifier(checkpoint=tuned)
    session = onnxruntime.InferenceSession(tuned.with_suffix(".onnx"))
    for images in (x[:1], x):
        logits, attribution = session.run(None, {"x": images.numpy()})
        with torch.no_grad():
            y = f(images)
        maps = attribution_map(f, images, y.argmax(1), "gradcam")
        assert np.abs(logits - y.numpy()).max() < 1e-4 * max(1, float(y.abs().max()))
        assert np.abs(attribution - maps.numpy()).max() < 1e-4 and attribution.max() > 0.5


@pytest.mark.slow
def test_from_a_picture_to_tables(case):
    model, layer, file = case
    own = ("--model", "net", "--checkpoint", file, "--classes", "names.txt")
    picture = next(Path("data/val").rglob("*.png"))
    (found,) = json.loads(done("explain", picture, *own, "--cam", "gradcam", "--tft", "--json").out)
    p = p_of(model, to_input(read_image(picture), SIZE))
    assert found["class_name"] == ORDER[int(p.argmax())]
    assert found["probability"] == pytest.approx(float(p.max()), abs=1e-5)

    done("gen-masks", "data", *own, "--cam", "gradcam", *QUICK)
    store = MaskStore("aft-run/masks/net-gradcam.h5")
    assert (store.settings["layer"], store.settings["class_names"]) == (layer, list(ORDER))
    for i, record in enumerate(store):
        x = to_input(read_image(Path("data/train") / record.path), SIZE)
        p = p_of(model, x)
        assert record.class_index == int(p.argmax())
        assert record.probability == pytest.approx(float(p.max()), abs=1e-5)
        masked = p_of(model, x * store.full_mask(i))[record.class_index]
        rise = max(float(masked / p.max() - 1), 0)
        assert float(record.rpi.max()) == pytest.approx(rise, abs=1e-4)

    done("finetune", *QUICK)
    tuned = Path("aft-run/tuned/net-gradcam.safetensors")
    f = load_classifier(checkpoint=tuned)
    assert (f.layer_name, f.classes.names) == (layer, ORDER)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        # A zero level moves all logits alike.
        assert (f(x).softmax(1) - model(x).softmax(1)).abs().max() < 1e-5

    for objective in ("cam", "tuner"):
        how = ("--objective", objective, "--epochs", "1", "--overwrite", "--export", "onnx")
        done("finetune", *how, *QUICK)
        same_in_one_graph(tuned, x)
    report = json.loads(done("evaluate", "--masking", "binary", "--json", *QUICK).out)
    rows = [row for row in report["table3"] if row["judge"] == "self"]
    assert {row["variant"] for row in rows} == {"original", "tft", "aft"}
    assert np.isfinite([row["value"] for row in rows]).all()
