"""Completion by the shell, and names as people write them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torchvision.models

from aftcli.core.classes import Classes
from aftcli.core.methods import CAMS, FAMILIES, METHODS, named, spelled
from aftcli.errors import AftError
from aftcli.networks import names
from aftcli.networks.sources import full_name, imagenet_classes
from aftcli.options import complete


def completed(line):
    """Complete the last word of a line as bash asks for it."""
    words = line.split(" ")
    asked = {"_AFT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": len(words) - 1}
    environment = {**os.environ, **{k: str(v) for k, v in asked.items()}}
    command = [sys.executable, "-c", "from aftcli.cli.app import main; main()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return run.stdout.split()


def test_the_shell_completes_methods_and_words():
    assert completed("aft explain --cam layercam,gradcam") == [
        "layercam,gradcam",
        "layercam,gradcam++",
    ]
    assert completed("aft explain --fill b") == ["black", "blur"]
    assert completed("aft gen-masks --model resnet1") == ["resnet101", "resnet152", "resnet18"]


def test_methods_and_families_are_completed():
    assert complete.methods("") == [*METHODS, *FAMILIES, "all"]
    assert complete.methods("lrp-e") == ["lrp-epsilon"]


def test_layers_of_the_network_that_is_named_are_completed():
    network = torchvision.models.resnet18()
    expected = [name for name, _ in network.named_modules() if name.startswith("layer4.1")]
    context = SimpleNamespace(params={"models": ["vgg16", "ResNet-18"]})
    assert complete.layers(context, "layer4.1") == expected
    # No user's code is run at a press of a key; a model that is not there has no layers.
    for name in ("net.py:build", "hf:folder", "nonsense"):
        assert complete.layers(SimpleNamespace(params={"models": name}), "") == []


def test_classes_are_completed(tmp_path):
    imagenet = complete.classes(SimpleNamespace(params={}), "tiger c")
    known = imagenet_classes()
    assert imagenet == [known.name(i) for i in range(1000) if known.name(i).startswith("tiger c")]
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    own = SimpleNamespace(params={"classes": tmp_path / "names.txt"})
    assert complete.classes(own, "c") == ["cat", "cow"]
    assert complete.classes(SimpleNamespace(params={"classes": tmp_path / "none"}), "c") == []


@pytest.mark.parametrize(
    ("library", "listed"),
    [
        ("torchvision", lambda: torchvision.models.list_models(module=torchvision.models)),
        ("timm", timm.list_models),
    ],
)
def test_the_names_of_a_library_are_found_without_importing_it(library, listed):
    assert names.registered(library) == tuple(sorted(listed()))


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_a_name_is_itself(name):
    assert full_name(name) == name
    assert full_name(name.upper()) in (name, name.upper())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ResNet50", "resnet50"),
        ("ResNet-50", "resnet50"),
        ("EfficientNet-Lite0", "efficientnet_lite0"),
        ("ViT_B_16", "vit_b_16"),
        ("timm:ViT_Tiny_Patch16_224", "timm:vit_tiny_patch16_224"),
        # Two of torchvision's would be the same, 1.6 and 16 billion.
        ("RegNet-Y-16GF", "RegNet-Y-16GF"),
    ],
)
def test_a_network_is_found_as_people_write_it(written, meant):
    assert full_name(written) == meant


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_as_people_write_it(name):
    assert spelled([name]) == spelled([name.upper()]) == spelled([name.replace("-", " ")]) == [name]
    assert spelled([f"{name}, ALL"]) == [name, "all"]
    title = METHODS[name].title.split(" (")[0]
    if "," not in title and name != "guidedbackprop":  # called Guided Backpropagation
        assert spelled([title]) == spelled([title.replace(" ", "-")]) == [name]


def test_methods_may_be_listed_in_one_word():
    assert named(["GradCAM,layer_cam", "grad-cam++"]) == ["gradcam", "layercam", "gradcam++"]
    assert named(["Grad-CAM plus plus"]) == ["gradcam++"]
    assert named(["All"]) == list(CAMS)
    with pytest.raises(AftError, match="unknown method ''"):
        named(["gradcam,"])


def test_an_unknown_class_names_first_those_that_contain_the_word():
    classes = Classes(("golden retriever", "terrier", "cat", "cathedral", "wild cat"))
    with pytest.raises(AftError, match="nearest: golden retriever$"):
        classes.index("retrieve")
    with pytest.raises(AftError, match=r"unknown class 'wild'; nearest: wild cat$"):
        classes.index("wild")
