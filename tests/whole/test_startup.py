"""Commands import what they need and nothing else: imports are most of a short command's time."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import get_args

import pytest
import torch

from aftcli import settings
from aftcli.aft import features, loss
from aftcli.cli import evaluate, finetune
from aftcli.cli.process import kept_from_collector
from aftcli.engine import accelerate
from aftcli.errors import AftError
from aftcli.evaluation import tables
from aftcli.measures import registry as measures
from aftcli.models.load import find_device
from aftcli.networks.sources import imagenet_classes
from aftcli.options import groups, read
from aftcli.pages.printed import FORMATS
from aftcli.report import explain as report
from aftcli.tft import masking, search
from tests.helpers.command import Result, usage_error
from tests.helpers.preloaded import keep_from_collector

PHOTO = str(Path(__file__).parents[2] / "docs/images/chelsea.jpg")
# What other commands are for: masks, training, tables, export.
OTHERS = ("h5py", "accelerate", "torchmetrics", "scipy", "onnx", "sklearn", "pandas")
# Runs a command, then says on stderr's last line which packages it has imported.
COMMAND = """
import json, sys
from aftcli.cli.app import main
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


@pytest.mark.slow
def test_a_model_of_torchvision_needs_no_timm(tmp_path, squeezenet):
    options = ("--model", "squeezenet1_1", "--checkpoint", squeezenet, "--save", "map,mask")
    code, said, packages = run(tmp_path, "explain", PHOTO, *options)
    assert (code, said) == (0, "")
    assert not packages & {"timm", "huggingface_hub", "matplotlib", *OTHERS}
    # The test sees what is imported.
    assert {"torch", "torchvision", "PIL"} <= packages


@pytest.mark.slow
@pytest.mark.parametrize("command", [("explain", "--tft"), ("tft",)], ids="-".join)
def test_explanations_import_nothing_of_other_commands(tmp_path, command):
    code, said, packages = run(tmp_path, *command, PHOTO, "--thresholds", "0.5")
    assert (code, said) == (0, "")
    # The default network is plain torch: these two take as long as all the rest together.
    assert not packages & {"timm", "torchvision", "huggingface_hub", *OTHERS}
    assert {"torch", "matplotlib", "PIL"} <= packages


WRONG = {
    "explain gone.jpg": "gone.jpg: there is no such file or folder",
    "explain gone.jpg --json": "gone.jpg: there is no such file or folder",
    "explain {photo} --checkpoint gone.pth": "gone.pth: there is no such checkpoint file",
    "explain {photo} --classes gone.txt": "gone.txt: can't be read as class names",
    "tft gone.jpg": "gone.jpg: there is no such file or folder",
    "gen-masks gone": "gone: there is no such folder",
    "finetune gone": "gone: there is no such folder",
    "evaluate gone": "gone: there is no such folder",
}
# Exit code 2, as of every wrong usage.
WORDS = {
    "explain {photo} --target cat --top-k 2": "--target-fn and --top-k exclude each other",
    "explain . --cam nonsense": "unknown method 'nonsense'",
    "explain {photo} --masking nonsense": "'nonsense' is not one of 'binary', 'soft'",
    "explain {photo} --fill nonsense": "'nonsense' is not one of 'mean', 'black', 'blur'",
    "explain {photo} --threshold-mode nonsense": "'nonsense' is not one of 'value', 'percentile'",
    "explain {photo} --device nonsense": "unknown device 'nonsense'",
    "gen-masks . --cam nonsense": "unknown method 'nonsense'",
    "finetune --precision nonsense": "'nonsense' is not one of 'auto', 'no', 'bf16', 'fp16'",
    "finetune --objective nonsense": "'nonsense' is not one of 'tuner', 'cam'",
    "finetune --classification nonsense": "'nonsense' is not one of 'labels', 'distillation'",
    "finetune --cache nonsense": "'nonsense' is not one of 'auto', 'memory', 'disk', 'off'",
    "finetune --export nonsense": "'nonsense' is not",
    "evaluate --table 9": "there is no table '9'",
    "evaluate --metrics nonsense": "'nonsense'",
    "evaluate --format nonsense": "'nonsense' is not one of 'table', 'json', 'csv', 'markdown'",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", [*WRONG, *WORDS])
def test_wrong_usage_is_told_without_torch(tmp_path, command):
    code, said, packages = run(tmp_path, *command.format(photo=PHOTO).split())
    if command in WRONG:
        assert code == 1
        assert said.startswith("aft: ") and WRONG[command] in said
    else:
        assert WORDS[command] in usage_error(Result(code, "", said))
    assert not packages & {"torch", "torchvision", "timm", "numpy", "matplotlib", "h5py"}


def test_names_known_without_torch_are_those_of_the_registries():
    assert settings.MASKINGS == tuple(masking.MASKINGS)
    assert settings.FILLS == tuple(masking.FILLS)
    assert get_args(settings.Mode) == settings.MODES
    assert settings.SEARCHES == tuple(search.SEARCHES)
    assert get_args(evaluate.Format) == tuple(FORMATS)
    assert get_args(evaluate.Readings) == ("both", *settings.MASKINGS)
    assert read.OUTPUTS == tuple(report.OUTPUTS)
    asked = set().union(*(table.asked for table in tables.TABLES.values()))
    assert asked == {*map(str, measures.TABLES), "sanity"}
    assert get_args(groups.Engine) == accelerate.CHOICES
    assert get_args(groups.Precision) == tuple(accelerate.TOLERANCES)
    assert get_args(finetune.Objective) == tuple(loss.OBJECTIVES) == tuple(settings.OBJECTIVES)
    assert get_args(finetune.Classification) == loss.CLASSIFICATIONS
    assert get_args(finetune.Cache) == features.CACHES
    with pytest.raises(AftError, match="unknown device 'meta'"):
        find_device("meta")


def test_the_classes_of_imagenet_are_those_of_timm():
    from timm.data.imagenet_info import ImageNetInfo

    info, classes = ImageNetInfo("imagenet-1k"), imagenet_classes()
    assert list(classes.wnids) == info.label_names()
    assert list(classes.names) == info.label_descriptions()


def test_garbage_is_collected_again_afterwards():
    class Node:
        pass

    # The tests keep their own imports from it as well.
    gc.unfreeze()
    assert not gc.get_freeze_count()
    try:
        with kept_from_collector():
            assert not gc.isenabled()
            kept = Node()
        assert gc.isenabled() and gc.get_freeze_count()
        assert not any(found is kept for found in gc.get_objects())
        later = Node()
        later.itself, gone = later, weakref.ref(later)
        del later
        gc.collect()
        assert gone() is None
    finally:
        keep_from_collector()
