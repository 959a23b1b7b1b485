"""torchcam's tests of files, pictures and the package: test_explain, test_utils, test_init."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

import aftcli
from aftcli import AftError, Classes, cut_classifier, explain, read_image
from aftcli.data.images import View
from aftcli.pictures.colours import LOOK
from aftcli.pictures.overlay import overlay
from aftcli.report import explain as report
from tests.helpers.command import aft
from tests.peers.networks import plain, tiny

KINDS = ("overlay", "map", "mask")


@pytest.fixture
def explained():
    f = cut_classifier(tiny().float(), preprocessing=plain(8, 8), classes=Classes(("a", "b", "c")))
    picture = Image.fromarray(np.arange(13 * 19 * 3, dtype=np.uint8).reshape(13, 19, 3))
    view = View((8, 8), (0, 0, 8, 8))
    (found,) = explain(f, torch.rand(1, 3, 8, 8), ["gradcam"])
    return f, report.Subject(Path("a.png"), "a", picture, view), found


def test_files_are_whole_and_the_same_each_time(explained, tmp_path):
    """torchcam: test_explain.py::test_save_writes_complete_deterministic_bundle"""
    f, subject, found = explained
    for folder in ("one", "two"):
        report.output_folder(tmp_path / folder)
        files = report.write_outputs(f, subject, found, KINDS, tmp_path / folder).outputs
    assert sorted(tmp_path.glob("two/*")) == sorted(files.values())
    stem = f"a-{f.classes.name(found.class_index)}-gradcam"
    assert [p.name for p in files.values()] == [
        f"{stem}-overlay.png",
        f"{stem}-map.npy",
        f"{stem}-mask.png",
    ]
    for path in files.values():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    stored = np.load(files["map"], allow_pickle=False)
    assert stored.dtype == np.float32 and np.array_equal(stored, found.attribution.numpy())
    assert Image.open(files["overlay"]).size == (19, 13)
    assert Image.open(files["mask"]).mode == "L"


def test_a_file_that_can_not_be_drawn_is_not_left(explained, tmp_path, monkeypatch):
    """torchcam: test_explain.py::test_save_writes_manifest_only_after_artifacts"""

    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError("no space left")

    f, subject, found = explained
    with monkeypatch.context() as patch:
        patch.setitem(report.OUTPUTS, "overlay", (".png", fail))
        with pytest.raises(AftError, match="can't be written"):
            report.write_outputs(f, subject, found, KINDS, tmp_path)
    assert not list(tmp_path.iterdir())
    report.write_outputs(f, subject, found, KINDS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_the_overlay_of_a_black_picture(shape):
    """torchcam: test_utils.py::test_overlay_mask"""
    picture = Image.fromarray(np.zeros(shape, dtype=np.uint8)).convert("RGB")
    view, whole = View((4, 4), (0, 0, 4, 4)), torch.ones(4, 4)
    found = np.asarray(overlay(picture, view, whole, whole > 0)).astype(int)
    red, green, blue = colormaps[LOOK.colormap](255)[:3]
    expected = np.array([red, green, blue]) * 255 * LOOK.alpha
    assert np.abs(found - expected).max() <= 1
    untouched = overlay(picture, view, whole, whole < 0)
    assert not np.asarray(untouched).any()


@pytest.mark.parametrize(("high", "wide"), [(7, 9), (5, 4)])
def test_the_overlay_equals_its_sum(high, wide):
    """torchcam: test_utils.py::test_overlay_mask_parity"""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)
    values, kept = torch.from_numpy(rng.random((high, wide))), rng.random((high, wide)) < 0.5
    values[0, 0] = 1
    view = View((wide, high), (0, 0, wide, high))
    found = overlay(Image.fromarray(pixels), view, values, torch.from_numpy(kept))
    for i in range(high):
        for j in range(wide):
            colour = np.array(colormaps[LOOK.colormap](round(255 * float(values[i, j])))[:3]) * 255
            share = LOOK.alpha * kept[i, j]
            expected = (1 - share) * pixels[i, j] + share * colour
            assert np.abs(np.asarray(found)[i, j] - expected).max() <= 2


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "CMYK", "1"])
def test_pictures_of_any_mode_become_rgb(mode, tmp_path):
    """torchcam: test_utils.py::test_overlay_mask_preserves_raw_band_modes"""
    values = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.fromarray(values).convert(mode).save(path)
    found = read_image(path)
    assert (found.mode, found.size) == ("RGB", (6, 5))
    if mode in ("P", "L", "1"):
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(path).convert("RGB")))


def test_what_is_no_picture_is_told(tmp_path):
    """torchcam: test_utils.py::test_overlay_mask_errors"""
    (tmp_path / "a.png").write_text("no picture")
    for path in ("a.png", "missing.png"):
        with pytest.raises(AftError, match=path):
            read_image(tmp_path / path)


def test_importing_the_package_imports_no_torch():
    """torchcam: test_init.py::test_lazy_imports_in_fresh_process"""
    script = (
        "import sys, aftcli; assert aftcli.__version__;"
        "assert not {'torch', 'matplotlib', 'aftcli.core.cam'} & set(sys.modules);"
        "assert {'explain', 'METHODS'} <= set(dir(aftcli))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["explain", "attribution_map", "MEASURES", "Search"])
def test_names_are_the_same_each_time(name):
    """torchcam: test_init.py::test_lazy_module_is_cached"""
    found = getattr(aftcli, name)
    assert found is getattr(aftcli, name) and name in aftcli.__all__


def test_the_version_is_said():
    """torchcam: test_init.py::test_package_version"""
    assert aftcli.__version__ in aft("--version").out


def test_a_name_that_is_not_there():
    """torchcam: test_init.py::test_unknown_attribute"""
    with pytest.raises(AttributeError, match="module 'aftcli' has no attribute 'missing'"):
        _ = aftcli.missing
