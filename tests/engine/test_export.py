"""The ONNX graph: the same logits and maps as torch's, at any batch size, without torch."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from aftcli import (
    AftError,
    Preprocessing,
    attribution_map,
    cut_classifier,
    load_classifier,
    read_image,
    to_input,
)
from aftcli.engine.export import TRACED, traced
from tests.conftest import ROOT
from tests.helpers.command import aft
from tests.helpers.small import KINDS, small

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
PHOTOS = [ROOT / f"docs/images/{name}.jpg" for name in ("chelsea", "coffee", "rocket")]


@pytest.fixture(scope="module")
def exported(tuned):
    from aftcli.report.tuned import export

    return export(tuned)


def session_of(model):
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_the_graph_equals_torch_on_real_images(exported, tuned):
    f = load_classifier(checkpoint=tuned)
    session = session_of(exported)
    inputs = [to_input(read_image(path), f.preprocessing) for path in PHOTOS]
    for batch in (inputs[:1], inputs, inputs * 3):
        images = torch.cat(batch)
        logits, attribution = session.run(None, {"x": images.numpy()})
        with torch.no_grad():
            expected = f(images)
        maps = attribution_map(f, images, expected.argmax(1), "gradcam")
        assert np.abs(logits - expected.numpy()).max() < 1e-4
        assert np.abs(attribution - maps.numpy()).max() < 1e-4
        assert attribution.max() > 0.9 and attribution.shape == (len(images), 224, 224)


def test_the_graph_says_what_it_is(exported):
    session = session_of(exported)
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("x", [3, 224, 224])]
    assert not isinstance(session.get_inputs()[0].shape[0], int)
    assert [o.name for o in session.get_outputs()] == ["logits", "attribution"]
    card = json.loads(session.get_modelmeta().custom_metadata_map["aft"])
    assert (card["model"], card["cam"]) == ("efficientnet_lite0", "gradcam")
    assert card["output"] == "softmax"
    assert len(card["classes"]["names"]) == 1000 and card["preprocessing"]["size"] == [224, 224]
    onnx.checker.check_model(onnx.load(exported), full_check=True)


def test_the_example_of_the_docs_runs_without_torch(exported, tuned, tmp_path):
    page = (ROOT / "docs/guides/serving.md").read_text("utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(example.splitlines()) <= 16
    blocked = "import sys\nsys.modules.update(torch=None, aftcli=None)\n"
    check = "\nnp.save(sys.argv[3], attribution)\n"
    for photo in PHOTOS:
        arguments = [str(exported), str(photo), str(tmp_path / "map.npy")]
        done = subprocess.run(
            [sys.executable, "-c", blocked + example + check, *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        f = load_classifier(checkpoint=tuned)
        image = to_input(read_image(photo), f.preprocessing)
        c = f(image).argmax(1)
        assert done.stdout.strip() == f"{f.classes.names[int(c)]} (1, 224, 224)"
        expected = attribution_map(f, image, c, "gradcam").numpy()
        assert np.abs(np.load(tmp_path / "map.npy") - expected).max() < 1e-4


def graph_of(f, method):
    """A session of a network in float32."""
    import io

    program = torch.onnx.export(
        traced(f, method),
        (torch.zeros(TRACED, 3, *f.preprocessing.size),),
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    file = io.BytesIO()
    onnx.save(program.model_proto, file)
    return session_of(file.getvalue())


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "gradcam") for kind in KINDS), ("mlp", "layercam")]
)
def test_the_gradient_of_every_kind_of_head_is_in_the_graph(kind, method):
    f = small(kind, seed=3).f.float()
    session = graph_of(f, method)
    for count in (1, 4):
        images = torch.randn(count, 3, *f.preprocessing.size)
        logits, attribution = session.run(None, {"x": images.numpy()})
        with torch.no_grad():
            expected = f(images)
        maps = attribution_map(f, images, expected.argmax(1), method)
        assert np.abs(logits - expected.numpy()).max() < 1e-4
        assert np.abs(attribution - maps.numpy()).max() < 1e-4


@pytest.mark.parametrize("method", ["gradcam++", "cam", "ablationcam"])
def test_other_methods_of_a_linear_head(method):
    f = small("linear", seed=1).f.float()
    session = graph_of(f, method)
    images = torch.randn(3, 3, *f.preprocessing.size)
    attribution = session.run(None, {"x": images.numpy()})[1]
    maps = attribution_map(f, images, f(images).argmax(1), method)
    assert np.abs(attribution - maps.numpy()).max() < 1e-4


def transformers():
    """A tiny ViT and a tiny Swin."""
    vit, swin = timm.models.VisionTransformer, timm.models.SwinTransformer
    size = {"img_size": 32, "num_classes": 5, "patch_size": 4, "embed_dim": 12}
    return {
        "vit": lambda: vit(**size, depth=2, num_heads=2),
        "swin": lambda: swin(**size, window_size=4, depths=(1, 1), num_heads=(2, 2)),
    }


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
@pytest.mark.parametrize("kind", transformers())
def test_attention_is_in_the_graph(kind, method):
    torch.manual_seed(2)
    model = transformers()[kind]()
    model.get_submodule("head" if kind == "vit" else "head.fc").weight.data.mul_(50)
    f = cut_classifier(model, preprocessing=Preprocessing(size=(32, 32)))
    session = graph_of(f, method)
    for count in (1, 3):
        images = torch.randn(count, 3, 32, 32)
        logits, attribution = session.run(None, {"x": images.numpy()})
        with torch.no_grad():
            expected = f(images)
        maps = attribution_map(f, images, expected.argmax(1), method)
        assert expected.abs().max() > 0.1 and attribution.max() > 0.5
        assert np.abs(logits - expected.numpy()).max() < 1e-4
        assert np.abs(attribution - maps.numpy()).max() < 1e-4


def test_a_method_without_a_fixed_graph_is_an_error():
    for kind, method in (("linear", "scorecam"), ("mlp", "ablationcam")):
        with pytest.raises(AftError, match=f"{method} of .*can't be written as one ONNX graph"):
            traced(small(kind).f.float(), method)


def test_what_is_missing_is_named(tuned, monkeypatch):
    from aftcli.report.tuned import export

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        AftError, match=r"needs onnxscript; install it with: pip install onnxscript"
    ):
        export(tuned)
    # Before anything is trained.
    done = aft("finetune", "--run", tuned.parents[1] / "none", "--export", "onnx")
    assert done.code == 1 and "needs onnxscript; install it with" in done.err
