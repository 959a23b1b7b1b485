"""Fixtures that several files share."""

import json
import multiprocessing
import os
import sys
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path

# Read when torch is imported: threads that wait for others on a busy machine leave it to them,
# instead of spinning, which takes tests several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests that run side by side (pytest -n) have a core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Networks of tests stay on the CPU, also on a machine with a GPU; tests of a GPU name it.
os.environ.setdefault("AFT_DEVICE", "cpu")

import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from aftcli.data.images import (
    read_image,  # noqa: E402
    to_input,  # noqa: E402
)
from aftcli.models.load import load_classifier  # noqa: E402
from aftcli.settings import SITUATIONS  # noqa: E402
from tests.helpers.command import aft  # noqa: E402
from tests.helpers.compare import uncut  # noqa: E402
from tests.helpers.preloaded import keep_from_collector  # noqa: E402
from tests.helpers.stored import draw, small_float  # noqa: E402

ROOT = Path(__file__).parent.parent
# By their wnids: tiger cat, espresso, missile.
PHOTOS = {"n02123159": "chelsea", "n07920052": "coffee", "n03773504": "rocket"}


class Kept:
    """Modules that the tests have imported, kept out of searches for reference cycles."""

    def __init__(self):
        self.modules = 0

    def keep(self):
        keep_from_collector()
        self.modules = len(sys.modules)

    def pytest_collection_finish(self):
        self.keep()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self):
        yield
        if len(sys.modules) > self.modules + 100:
            self.keep()


def pytest_configure(config):
    config.pluginmanager.register(Kept())


@pytest.fixture(scope="session")
def shared():
    """The folder of real images beside the repository, which users do not have."""
    path = Path(os.environ.get("AFT_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"{path}: no shared data here; set AFT_SHARED")
    return path


@pytest.fixture(scope="session", autouse=True)
def exported(tmp_path_factory):
    """Keep what engines export out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFT_CACHE", str(tmp_path_factory.mktemp("exported")))
        yield


@pytest.fixture(scope="session")
def lite0():
    """The embedded classifier with its real weights."""
    return load_classifier("efficientnet_lite0")


@pytest.fixture(scope="session")
def uncut_lite0(lite0):
    """The same network as its authors wrote it, for the independent path."""
    import timm

    return uncut(lite0, timm.create_model("tf_efficientnet_lite0"))


@pytest.fixture(scope="session")
def chelsea(lite0):
    """A photograph of a cat as lite0's input, shape (1, 3, 224, 224)."""
    return to_input(read_image(ROOT / "docs/images/chelsea.jpg"), lite0.preprocessing)


@pytest.fixture(scope="session")
def processes():
    """Processes that start quickly, forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    helpers = [f"tests.helpers.{name}" for name in ("stored", "trained", "faulty", "preloaded")]
    reports = ["aftcli.report.masks", "aftcli.report.tuned", "aftcli.pages.printed"]
    data = ["aftcli.formats.voc", "aftcli.evaluation.metrics"]
    # Those of others that are imported late; what is not there is left out.
    late = ["timm", "typer._adapters", "matplotlib.backends.backend_agg"]
    context.set_forkserver_preload([*late, *data, *reports, *helpers])
    # Python 3.11's server looks for what it preloads on its own path only.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def picture(folder):
    """A folder to be in, with a picture."""
    draw("a.png")
    return folder


@pytest.fixture
def f(monkeypatch):
    """The commands' classifier: a small one, the same every time."""
    # First imported while the name is replaced, the module would keep what replaces it.
    import_module("aftcli.engine.export")
    small = small_float()
    monkeypatch.setattr("aftcli.models.load.load_classifier", lambda *_, **__: small)
    return small


@pytest.fixture
def accelerate_anew():
    """Let Accelerate forget the precision that it was asked for, before and after the test."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """gen-masks and finetune on a small data set of ImageNet classes, by the real commands."""
    folder = tmp_path_factory.mktemp("study")
    for name, photo in PHOTOS.items():
        with Image.open(ROOT / f"docs/images/{photo}.jpg") as image:
            width, height = image.size
            for split, count in (("train", 4), ("val", 1)):
                (folder / "data" / split / name).mkdir(parents=True)
                for i in range(count):
                    cut = 12 * i + (6 if split == "val" else 0)
                    part = image.crop((cut, cut, width - cut, height - cut))
                    part.save(folder / "data" / split / name / f"{i}.png")
    done = aft("gen-masks", folder / "data", "--run", folder / "run", "--thresholds", "0.3")
    assert done.code in (0, None), done.err
    return folder


@pytest.fixture(scope="session")
def tuned(study):
    """The path of a tuned checkpoint, made by `aft finetune --objective tuner`."""
    options = ("--objective", "tuner", "--epochs", "2", "--batch-size", "4", "--held-out", "0.2")
    done = aft("finetune", "--run", study / "run", *options, "--json")
    assert done.code in (0, None), done.err
    (result,) = json.loads(done.out)
    assert result["path"] == str(study / "run/tuned/efficientnet_lite0-gradcam.safetensors")
    assert Image.open(result["figure"]).format == "PNG"
    metrics = result["metrics"]
    assert metrics["before"]["val"]["images"] == metrics["after"]["val"]["images"] == 3
    assert [e["number"] for e in metrics["history"]] == [0, 1, 2]
    assert metrics["after"]["held_out"]["mask"] < metrics["before"]["held_out"]["mask"]
    few = SITUATIONS["few"]
    found = {key: result[key] for key in few.settings}
    assert result["trained_on"] == 10 and found == {**few.settings, "epochs": 2}
    assert "epoch 2: cross-entropy" in done.err and "mask" in done.err
    assert f"(defaults for {few.title}); chosen by --objective tuner" in done.err
    return study / "run/tuned/efficientnet_lite0-gradcam.safetensors"
