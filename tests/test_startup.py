"""Commands import what they need and nothing else: imports are most of a short command's time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aftcli.core.models import imagenet_classes

PHOTO = str(Path(__file__).parent.parent / "docs/images/chelsea.jpg")
# What other commands are for: masks, training, tables, export.
OTHERS = ("h5py", "accelerate", "torchmetrics", "scipy", "onnx", "sklearn", "pandas")
# Runs a command, then says on stderr's last line which packages it has imported.
COMMAND = """
import json, sys
from aftcli.cli import main
try:
    main()
finally:
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps(packages), file=sys.stderr)
"""


def run(folder, *arguments):
    """Run `aft`; give its exit code, what it says, and the packages that it has imported."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    *said, packages = done.stderr.splitlines()
    return done.returncode, "\n".join(said), set(json.loads(packages))


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A state dict of torchvision's with random weights."""
    from torchvision.models import squeezenet1_1

    path = tmp_path_factory.mktemp("checkpoint") / "squeezenet1_1.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), path)
    return path


def test_a_model_of_torchvision_needs_no_timm(tmp_path, squeezenet):
    options = ("--model", "squeezenet1_1", "--checkpoint", squeezenet, "--save", "map,mask")
    code, said, packages = run(tmp_path, "explain", PHOTO, *options)
    assert (code, said) == (0, "")
    assert not packages & {"timm", "huggingface_hub", "matplotlib", *OTHERS}
    # The test sees what is imported.
    assert {"torch", "torchvision", "PIL"} <= packages


@pytest.mark.parametrize("command", ["explain", "tft"])
def test_explanations_import_nothing_of_other_commands(tmp_path, command):
    code, said, packages = run(tmp_path, command, PHOTO, "--thresholds", "0.5")
    assert (code, said) == (0, "")
    assert not packages & set(OTHERS)
    assert {"torch", "timm", "matplotlib"} <= packages


def test_the_classes_of_imagenet_are_those_of_timm():
    from timm.data.imagenet_info import ImageNetInfo

    info, classes = ImageNetInfo("imagenet-1k"), imagenet_classes()
    assert list(classes.wnids) == info.label_names()
    assert list(classes.names) == info.label_descriptions()
