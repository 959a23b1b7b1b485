"""Fixtures that several files share."""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import pytest
from compare import uncut

from aftcli.core.models import load_classifier
from aftcli.data import read_image, to_input

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared():
    """The folder of real images beside the repository, which users do not have."""
    path = Path(os.environ.get("AFT_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"{path}: no shared data here; set AFT_SHARED")
    return path


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
    context.set_forkserver_preload(["stored", "trained"])
    # Python 3.11's server looks for what it preloads on its own path only.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__))
        forkserver.ensure_running()
    return context
