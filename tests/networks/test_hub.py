"""Image classifiers of transformers from a local folder, their processors and class names."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli.attributions.maps import attribution_map
from aftcli.core.classifier import cut_classifier
from aftcli.core.inputs import find_preprocessing
from aftcli.data.images import to_input
from aftcli.errors import AftError
from aftcli.models.load import load_classifier
from aftcli.networks.sources import find_source, full_name, imagenet_classes
from tests.helpers.command import aft
from tests.helpers.compare import assert_near

transformers = pytest.importorskip("transformers")

from aftcli.networks.hub import hub_classes, read_processor  # noqa: E402

CHELSEA = Path(__file__).parents[2] / "docs/images/chelsea.jpg"

NAMES = {0: "cat", 1: "dog, hound", 2: "fox"}

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.2],
}


def classifier(kind):
    torch.manual_seed(0)
    named = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            **named,
        )
        return transformers.ViTForImageClassification(config).eval()
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **named
    )
    return transformers.ResNetForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ViT and a ResNet of random weights, as save_pretrained writes them."""
    home = tmp_path_factory.mktemp("hub")
    for kind in ("vit", "resnet"):
        classifier(kind).save_pretrained(home / kind)
        (home / kind / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return home


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_folder_is_the_network_its_preprocessing_and_its_classes(folders, kind):
    network = find_source("hf:x")(f"hf:{folders / kind}", True, None)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = network.model.eval()(x).logits
        assert torch.equal(found, classifier(kind)(x).logits)
    assert network.classes.names == tuple(NAMES.values()) and network.notes == ()
    p = network.preprocessing
    assert (p.size, p.resize, p.interpolation) == ((32, 32), None, "bicubic")
    assert (p.mean, p.std) == ((0.5, 0.4, 0.3), (0.25, 0.5, 0.2))


def test_a_resnet_is_explained_from_the_command_line(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    command = ("explain", CHELSEA, "--model", "hf:resnet", "--tft", "--json", "--out", tmp_path)
    done = aft(*command, "--cam", "gradcam")
    assert done.code in (0, None), done.err
    assert done.err == ""  # no progress bars of transformers, no guesses
    (found,) = json.loads(done.out)
    assert found["model"] == f"hf:{folders}/resnet" and found["class_name"] in NAMES.values()
    model = classifier("resnet")
    pixels = torch.from_numpy(np.array(Image.open(CHELSEA).resize((32, 32), Image.BICUBIC)))
    x = pixels.permute(2, 0, 1) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    x = (x / torch.tensor([0.25, 0.5, 0.2])[:, None, None])[None]
    with torch.no_grad():
        p = model(x).logits.softmax(1)[0]
    assert abs(found["probability"] - float(p.max())) < 1e-4
    assert NAMES[int(p.argmax())] == found["class_name"]


def test_a_vit_is_explained_from_the_command_line(folders, tmp_path):
    command = ("explain", CHELSEA, "--model", f"hf:{folders / 'vit'}", "--tft", "--json")
    done = aft(*command, "--cam", "gradcam", "--out", tmp_path)
    assert done.code in (0, None), done.err
    (found,) = json.loads(done.out)
    assert found["layer"] == "vit.layers.1.layernorm_before"
    assert found["class_name"] in NAMES.values() and found["tft"]["tau"] is not None


SMALL = {
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "Segformer": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4},
    "Beit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    | {"intermediate_size": 32, "image_size": 32},
}


@pytest.mark.parametrize("kind", SMALL)
def test_networks_whose_parts_return_structures_are_cut(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL[kind], num_labels=3)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    f = cut_classifier(model, note=lambda _: None)
    x = torch.randn(2, *f.preprocessing.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(f(x), model(x).logits)
    assert attribution_map(f, x, [0, 1], "gradcam").any()


def test_its_map_is_that_of_a_loop_over_channels(folders):
    """Grad-CAM at the last stage, by hooks that see the uncut network."""
    f, model = load_classifier(f"hf:{folders / 'resnet'}", note=pytest.fail), classifier("resnet")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kept = {}
    stage = model.resnet.encoder.stages[-1]
    stage.register_forward_hook(lambda m, i, o: kept.update(a=o))
    y = model(x).logits[0, 1]
    (gradient,) = torch.autograd.grad(y, kept["a"])
    expected = sum(
        float(gradient[0, k].mean()) * kept["a"][0, k].detach() for k in range(len(gradient[0]))
    ).clamp(min=0)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    found = attribution_map(f, x, [1], "gradcam")
    high = torch.nn.functional.interpolate(expected[None, None], (32, 32), mode="bilinear")[0]
    assert found.any()
    assert_near(found, high, 1e-4)


def test_a_new_head_and_a_state_dict(folders, tmp_path):
    source = find_source("hf:x")
    assert source(f"hf:{folders / 'resnet'}", False, 5).model.config.num_labels == 5
    weights = {f"model.{k}": v for k, v in classifier("resnet").state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "own.ckpt")
    f = load_classifier(f"hf:{folders / 'resnet'}", tmp_path / "own.ckpt", note=lambda _: None)
    assert f.weights_hash() == load_classifier(f"hf:{folders / 'resnet'}").weights_hash()


def test_nothing_of_a_folder_is_run(folders, tmp_path):
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('ran')")
    config = json.loads((folders / "vit/config.json").read_text())
    own = {"AutoConfig": "modeling_own.C", "AutoModelForImageClassification": "modeling_own.M"}
    config |= {"auto_map": own, "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AftError, match="can't be loaded as an image classifier of transformers"):
        load_classifier(f"hf:{tmp_path}")
    # Weights of pickle are not read, not even by weights_only.
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((folders / "vit/config.json").read_text())
    (old / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(AftError, match="can't be loaded .*model.safetensors"):
        load_classifier(f"hf:{old}")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(AftError, match="hf:.* can't be loaded as an image classifier"):
        load_classifier(f"hf:{tmp_path}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AftError, match=r"hf:x needs transformers; install it: pip install 'aftcl"):
        load_classifier("hf:x")


def test_without_a_processor_the_size_is_the_configurations_and_said(folders, tmp_path):
    classifier("resnet").save_pretrained(tmp_path)
    notes = []
    f = load_classifier(f"hf:{tmp_path}", note=notes.append)
    assert f.preprocessing.size == (224, 224) and "records no preprocessing" in notes[0]
    assert find_preprocessing(classifier("vit"), None, notes.append).size == (32, 32)
    assert "guessed: 3 x 32 x 32 values" in notes[1]


def test_a_folder_is_named_by_its_whole_path_and_a_name_as_it_is(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert full_name("hf:vit") == full_name("hf:./vit") == f"hf:{folders}/vit"
    assert full_name("hf:google/vit") == "hf:google/vit"


# Processors


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("ViTImageProcessor", {"size": 48}),
        ("DeiTImageProcessor", {"size": {"height": 56, "width": 56}, "do_center_crop": False}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "resample": 2}),
        ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 48}),
        ("BitImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64}),
        ("LevitImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 56}),
        ("PoolFormerImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 56}),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}),
        (
            "EfficientNetImageProcessor",
            {"size": {"height": 64, "width": 48}, "rescale_offset": True, "include_top": False},
        ),
        ("ViTImageProcessor", {"size": 48, "do_normalize": False, "rescale_factor": 1 / 127.5}),
        ("ViTImageProcessor", {"size": 48, "do_rescale": False, "image_mean": [100, 110, 120]}),
    ],
)
def test_a_picture_becomes_what_the_processor_makes_of_it(kind, given):
    processor = getattr(transformers, kind)(**given)
    preprocessing, notes = read_processor("hf:x", processor.to_dict())
    assert notes == ()
    picture = Image.open(CHELSEA).convert("RGB")
    expected = processor(picture, return_tensors="pt")["pixel_values"].double()
    found = to_input(picture, preprocessing).double()
    assert found.shape == expected.shape
    # The processors scale with torchvision, to_input with Pillow: some values round to others.
    unit = 1 / (255 * min(preprocessing.std))
    assert (found - expected).abs().mean() < 0.5 * unit
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9999


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"do_flip_channel_order": True}, "it swaps red and blue"),
        ({"resample": 1}, "it scales by another interpolation"),
        (
            {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}},
            "it squashes pictures",
        ),
        ({"size": {"shortest_edge": 40}}, "it keeps the whole picture"),
        ({"do_resize": False}, "it does not scale pictures"),
    ],
)
def test_what_a_preprocessing_can_not_hold_is_said(given, said):
    _, (note,) = read_processor("hf:x", PROCESSOR | given)
    assert note.startswith("hf:x: aft can't follow all of its processor: ") and said in note


# Class names


def test_names_that_nobody_gave_are_none():
    model = torch.nn.Identity()
    for labels, expected in (
        ({0: "LABEL_0", 1: "LABEL_1"}, None),
        ({1: "b", 0: "a"}, ("a", "b")),
        (dict(enumerate(imagenet_classes().names)), imagenet_classes().names),
    ):
        model.config = transformers.PretrainedConfig(id2label=labels)
        found = hub_classes(model, imagenet_classes())
        assert (found and found.names) == expected
    assert found.wnids == imagenet_classes().wnids
