"""A data set that changes between runs: nothing that was made of the old files is kept."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from aftcli import AftError, MaskStore
from aftcli.aft.jobs import mask_job
from aftcli.data.blocks import GONE, changed, content_of, stamp_of
from aftcli.evaluation.run import evaluate_study
from tests.evaluation.test_run import PLAN, run_all, same, study_of
from tests.helpers.stored import generate, make_images, small_float
from tests.helpers.trained import make_colours, masks_of, tune
from tests.masks.test_generate import assert_same, content, stop_after

pytestmark = pytest.mark.slow


def repaint(path, seed=7):
    """Another picture of the same size in pixels and, for PNG of noise, nearly in bytes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_only_what_holds_something_else_has_changed(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    for path in paths:
        path.write_bytes(path.name.encode())
    contents = np.array([content_of(path) for path in paths])
    stamps = np.array([stamp_of(path) for path in paths])
    assert len({*contents.tolist(), GONE}) == 6
    os.utime(paths[1], (1, 1))  # copied: the same bytes at another time
    paths[2].write_bytes(b"C")
    os.utime(paths[3], ns=(1, 1))
    paths[3].write_bytes(b"longer")
    paths[4].unlink()
    assert list(changed(paths, contents, stamps)) == [2, 3]


@pytest.mark.parametrize("clock", ["now", "earlier", "later"])
def test_blocks_of_changed_images_are_made_again(tmp_path, clock):
    torch.set_num_threads(1)
    images = make_images(tmp_path / "fruit")
    run = tmp_path / "run"
    stop_after(images, run, steps=12)
    repaint(images / "apple/1.png")
    (images / "apple/3.png").write_bytes(b"damaged")
    if clock != "now":
        at = {"earlier": 10**9, "later": 4 * 10**9}[clock]
        os.utime(images / "apple/1.png", (at, at))
    generate(images, run)
    generate(images, tmp_path / "anew")
    assert_same(content(run), content(tmp_path / "anew"))


def test_an_image_that_is_mended_between_runs_is_no_longer_broken(tmp_path):
    images = make_images(tmp_path / "fruit")
    whole = (images / "apple/1.png").read_bytes()
    (images / "apple/1.png").write_bytes(whole[:99])
    run = tmp_path / "run"
    stop_after(images, run, steps=12)
    (images / "apple/1.png").write_bytes(whole)
    generate(images, run)
    with MaskStore(run / "masks/small-gradcam.h5") as store:
        assert not store.broken and store[1].path == "apple/1.png"


def test_a_finished_store_of_changed_images_is_refused(tmp_path):
    images = make_images(tmp_path / "fruit")
    run = tmp_path / "run"
    generate(images, run)
    shutil.copytree(images, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (9, 9))
    generate(tmp_path / "copy", run)  # the same bytes
    repaint(images / "pear/2.png")
    with pytest.raises(AftError, match=r"1 images have changed.*first: pear/2\.png.*--overwrite"):
        generate(images, run)
    generate(images, run, overwrite=True)
    generate(images, run)


def test_masks_of_changed_images_are_not_tuned_with(tmp_path):
    images = make_colours(tmp_path / "colours")
    store = masks_of(images, tmp_path / "run")
    mask_job(store, small_float())
    repaint(images / "train/pear/2.png")
    with pytest.raises(AftError, match=r"1 images have changed since the masks.*pear/2\.png"):
        mask_job(store, small_float())
    # Those that are left out play no part.
    mask_job(store, small_float(), limit=3)


def test_a_control_of_changed_images_is_another_one(tmp_path):
    images = make_colours(tmp_path / "colours")
    tune(images, tmp_path / "run", lam=None)
    for path in images.rglob("*.png"):
        os.utime(path, (9, 9))
    assert tune(images, tmp_path / "run", lam=None)[-1].before
    repaint(images / "train/pear/2.png")
    said = "other settings: contents of images differ; use .*overwrite"
    with pytest.raises(AftError, match=said):
        tune(images, tmp_path / "run", lam=None)


def test_images_that_change_while_they_are_evaluated(tmp_path):
    images = make_images(tmp_path / "fruit")
    study = study_of(images)
    steps = evaluate_study(study, tmp_path / "run", PLAN)
    next(steps)
    next(steps)
    repaint(images / "pear/2.png")
    with pytest.raises(AftError, match="changed while they were evaluated.*run the same command"):
        list(steps)
    assert not list((tmp_path / "run/results").glob("small*"))
    same(run_all(study, tmp_path / "run"), run_all(study, tmp_path / "anew"))
