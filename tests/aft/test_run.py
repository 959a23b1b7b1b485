"""finetune: whatever stops it, whoever shares it, wherever w0's outputs are kept."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from aftcli import AftError, MaskStore
from aftcli import settings as finetune_defaults
from aftcli.aft.examples import CachedExamples, Crop, crop, random_crop
from aftcli.aft.features import Cache, Masks, choose_cache, stem_output
from aftcli.aft.jobs import control_job, mask_job
from aftcli.aft.loss import in_situation
from aftcli.aft.run import Begun, Cached, Options, fine_tune
from aftcli.aft.training import Step, shuffled
from aftcli.core.classes import Classes
from aftcli.data.sets import open_data_set
from aftcli.masks.stores import find_stores
from tests.conftest import ROOT
from tests.helpers.stored import NAMES, full_disk, small_float
from tests.helpers.trained import (
    PAPER,
    SETTINGS,
    epochs,
    make_colours,
    masks_of,
    train_together,
    tune,
    tune_and_exit,
    tuned,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="module")
def masks(tmp_path_factory, images):
    """A run with masks, to be copied."""
    run = tmp_path_factory.mktemp("masks")
    masks_of(images, run).close()
    return run


@pytest.fixture
def run(tmp_path, masks):
    """A fresh run with masks."""
    return new_run(tmp_path / "run", masks)


def new_run(path, masks):
    (path / "masks").mkdir(parents=True)
    name = "masks/small-gradcam.h5"
    (path / name).write_bytes((masks / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, images, masks):
    """The checkpoint of one run in one go, with one thread as the others have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = new_run(tmp_path_factory.mktemp("run") / "run", masks)
    path = tuned(tune(images, run)).path
    torch.set_num_threads(threads)
    return path


def content(path):
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["aft"])["card"]
    return load_file(path), card


def assert_same(a, b, tolerance=0.0):
    (tensors_a, card_a), (tensors_b, card_b) = content(a), content(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name in tensors_a:
        assert torch.allclose(tensors_a[name], tensors_b[name], rtol=0, atol=tolerance), name
    if not tolerance:
        assert card_a == card_b


def leftovers(run):
    return sorted(
        p.name
        for p in (run / "tuned").iterdir()
        if p.suffix not in (".safetensors", ".lock", ".png")
    )


def test_twenty_kills_at_random_moments_change_nothing(
    images, masks, uninterrupted, processes, tmp_path
):
    rng, kills, rounds = random.Random(0), 0, 0
    for timed in ("first", "second"):
        run = new_run(tmp_path / timed, masks)
        start = time.monotonic()
        process = processes.Process(target=tune_and_exit, args=(images, run))
        process.start()
        process.join()
        assert process.exitcode == 0
        duration = time.monotonic() - start
    assert_same(run / "tuned/small-gradcam.safetensors", uninterrupted)
    while kills < 20:
        rounds += 1
        run = new_run(tmp_path / f"run{rounds}", masks)
        while True:
            cache = ("memory", "disk")[rounds % 2]
            process = processes.Process(target=tune_and_exit, args=(images, run, cache))
            process.start()
            process.join(rng.uniform(0, 0.9 * duration))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            if process.exitcode == 0:
                break
        assert_same(run / "tuned/small-gradcam.safetensors", uninterrupted)
        assert leftovers(run) == []
        assert not list((run / "cache").glob("*"))


def torchrun(count, *arguments):
    """Run `trained.main` under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    program = ["-m", "--", "tests.helpers.trained", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.parametrize(("count", "cache"), [(2, "memory"), (3, "disk"), (2, "off")])
def test_several_processes_give_the_weights_of_one(
    images, masks, uninterrupted, processes, tmp_path, count, cache
):
    run = new_run(tmp_path / "run", masks)
    if cache == "memory":
        torchrun(count, images, run, cache)
    else:
        train_together(processes, count, images, run, cache)
    path = run / "tuned/small-gradcam.safetensors"
    assert_same(path, uninterrupted, tolerance=1e-5)
    (_, one), (_, several) = content(uninterrupted), content(path)
    for a, b in zip(one["metrics"]["history"], several["metrics"]["history"], strict=True):
        for part in ("train", "held_out"):
            if a[part]:
                assert b[part] == pytest.approx(a[part], abs=1e-5)


def test_the_same_command_again_finds_it_done(images, run):
    first = tuned(tune(images, run))
    before = first.path.stat().st_mtime_ns
    events = tune(images, run)
    assert tuned(events).before and not first.before
    assert len(events) == 1 and first.path.stat().st_mtime_ns == before
    assert tuned(events).card == first.card


@pytest.mark.parametrize(
    ("settings", "lam", "difference"),
    [
        ({"learning_rate": 0.5}, 0.5, "learning_rate is 0.001, asked for 0.5"),
        ({"epochs": 4}, 0.5, "epochs is 3, asked for 4"),
        ({}, 2.0, "lam is 0.5, asked for 2.0"),
        ({"seed": 1}, 0.5, "seed is 0, asked for 1"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_named(images, run, settings, lam, difference, finished):
    if finished:
        tune(images, run)
    else:
        stop_after(images, run, 8)
    with pytest.raises(AftError, match=difference):
        tune(images, run, lam, settings=settings)
    options = Options(workers=0, overwrite=True)
    assert not tuned(tune(images, run, lam, options, settings=settings)).before


def stop_after(images, run, count, accelerator=None):
    """Leave a run in the middle, as an exception would."""
    job = mask_job(MaskStore(run / "masks/small-gradcam.h5"), small_float())
    chosen = in_situation(lam=0.5, **SETTINGS)
    events = fine_tune([job], run, chosen, Options(workers=0, save_every=0), accelerator)
    for _ in range(count):
        next(events)
    events.close()


def test_a_damaged_state_begins_anew(images, masks, uninterrupted, tmp_path):
    torch.set_num_threads(1)
    for trial, damage in enumerate(
        (
            lambda b: b[: len(b) // 2],
            lambda b: b"",
            lambda b: b[:9],
            lambda b: b[:-40] + bytes([b[-40] ^ 64]) + b[-39:],
            lambda b: b.replace(b"loss", b"lozs", 1),
        )
    ):
        run = new_run(tmp_path / str(trial), masks)
        stop_after(images, run, 9)
        state = run / "tuned/.small-gradcam.state"
        state.write_bytes(damage(state.read_bytes()))
        assert_same(tuned(tune(images, run)).path, uninterrupted)


def test_going_on_says_so_and_repeats_no_epoch(images, run):
    stop_after(images, run, 6 + 1 + 1 + 3 + 1 + 1)
    events = tune(images, run)
    (begun,) = (e for e in events if isinstance(e, Begun))
    assert begun.epoch >= 1
    assert [e.number for e in epochs(events)] == list(range(begun.epoch + 1, 4))


def test_a_full_disk_is_an_error_and_the_run_goes_on_later(images, run, uninterrupted):
    torch.set_num_threads(1)
    with full_disk(3000), pytest.raises(AftError, match="can't be written"):
        tune(images, run)
    assert leftovers(run) == []
    assert_same(tuned(tune(images, run)).path, uninterrupted)


def test_training_learns(images, run):
    events = tune(
        images, run, settings={**PAPER, "learning_rate": 1e-2, "epochs": 60, "patience": 0}
    )
    first, *_, last = epochs(events)
    assert last.held_out.mask < 0.5 * first.held_out.mask
    assert last.train.cross_entropy < 0.1
    metrics = tuned(events).card["metrics"]
    assert metrics["after"]["val"]["accuracy"] == 1.0 > metrics["before"]["val"]["accuracy"]
    assert metrics["after"]["val"]["images"] == 6


def test_lambda_zero_equals_the_control_bit_for_bit(images, masks, tmp_path):
    torch.set_num_threads(1)
    zero = tuned(tune(images, new_run(tmp_path / "zero", masks), 0.0, settings=PAPER)).path
    control = tuned(tune(images, new_run(tmp_path / "control", masks), None)).path
    assert control.name == "small-control.safetensors"
    (a, card_a), (b, card_b) = content(zero), content(control)
    assert a.keys() - b.keys() == {f"aft_tuner.{n}" for n in _tuner_names()}
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert (card_a["cam"], card_b["cam"], card_b["masks"]) == ("gradcam", None, None)


def _tuner_names():
    return ("reduce.weight", "reduce.bias", "combine.weight", "combine.bias")


def test_the_val_split_decides_nothing(images, masks, uninterrupted, tmp_path):
    """With other val images the weights are the same."""
    torch.set_num_threads(1)
    copy = tmp_path / "colours"
    for path in images.rglob("*.png"):
        target = copy / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        other = images / "val" / NAMES[0] / "0.png" if "val" in path.parts else path
        target.write_bytes(other.read_bytes())
    run = new_run(tmp_path / "run", masks)
    job = mask_job(MaskStore(run / "masks/small-gradcam.h5"), small_float(), copy)
    from aftcli.aft.loss import in_situation
    from aftcli.aft.run import fine_tune

    events = fine_tune([job], run, in_situation(lam=0.5, **SETTINGS))
    path = tuned(list(events)).path
    (a, card_a), (b, card_b) = content(path), content(uninterrupted)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert card_a["metrics"]["after"]["val"] != card_b["metrics"]["after"]["val"]


def test_masks_of_another_classifier_are_refused_and_the_difference_named(images, run):
    store = MaskStore(run / "masks/small-gradcam.h5")
    other = small_float()
    with torch.no_grad():
        other.head.get_submodule("6").bias.add_(1)
    with pytest.raises(AftError, match=f"weights is {store.settings['weights'][:8]}.*asked for"):
        mask_job(store, other)
    other = small_float()
    other.layer_name = "2"
    with pytest.raises(AftError, match=r"layer is 2\+3, asked for 2"):
        mask_job(store, other)


def test_a_damaged_store_is_refused(run):
    path = run / "masks/small-gradcam.h5"
    whole = path.read_bytes()
    intact = mask_job(MaskStore(path), small_float())
    rng = random.Random(1)
    refused = 0
    for trial in range(60):
        # HDF5 would take a file that it has open already.
        path = path.with_name(f"{trial}.h5")
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            job = mask_job(MaskStore(path), small_float())
            assert job.data_set.samples == intact.data_set.samples
            assert torch.equal(job.masks.low, intact.masks.low) and job.made == intact.made
        except AftError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 5
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AftError, match="can't be read as a mask store"):
        find_stores(run, None, [])


def test_labels_of_other_classes_ask_for_a_new_head(tmp_path):
    images = make_colours(tmp_path / "colours")
    for own, other in zip(NAMES, ("fig", "lime", "quince"), strict=True):
        (images / "train" / own).rename(images / "train" / other)
    run = tmp_path / "run"
    store = masks_of(images, run)
    with pytest.raises(AftError, match="--no-masks, then run aft gen-masks and aft finetune with"):
        mask_job(store, small_float())


def test_missing_masks_are_named(run):
    with pytest.raises(AftError, match="no masks.*by layercam .there is small-gradcam.h5."):
        find_stores(run, None, ["gradcam", "layercam"])
    with pytest.raises(AftError, match="no masks of resnet50"):
        find_stores(run, "resnet50", [])
    with pytest.raises(AftError, match="there is nothing.; make them with aft gen-masks"):
        find_stores(run / "elsewhere", None, [])


def test_a_moved_data_set_is_named_and_found(tmp_path, images):
    copy = make_colours(tmp_path / "copy")
    store = masks_of(copy, tmp_path / "run")
    copy.rename(tmp_path / "moved")
    with pytest.raises(AftError, match="no longer there; say where it is"):
        mask_job(store, small_float())
    job = mask_job(store, small_float(), tmp_path / "moved")
    assert job.data_set.root == tmp_path / "moved/train"


def test_limit_takes_images_spread_over_the_store_with_their_masks(run):
    store = MaskStore(run / "masks/small-gradcam.h5")
    job = mask_job(store, small_float(), limit=6)
    assert [s.label for s in job.data_set.samples] == [0, 0, 1, 1, 2, 2]
    by_name = {record.path: record for record in store}
    for i, sample in enumerate(job.data_set.samples):
        record = by_name[sample.name]
        assert torch.equal(job.masks.low[i], record.mask) and sample.label == record.label
        assert torch.equal(job.masks.full(i), store.full_mask(list(by_name).index(sample.name)))


def test_an_image_of_the_masks_that_is_gone_is_an_error(tmp_path):
    images = make_colours(tmp_path / "colours")
    masks_of(images, tmp_path / "run").close()
    (images / "train/pear/3.png").unlink()
    said = r"pear/3\.png: .*needed for training: restore it, or make the masks again without it"
    with pytest.raises(AftError, match=said):
        tune(images, tmp_path / "run")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_control_leaves_broken_images_out_and_says_so(tmp_path, cache):
    images = make_colours(tmp_path / "colours")
    (images / "train/pear/3.png").write_bytes(b"no picture")
    options = Options(cache, workers=0, save_every=0)
    events = tune(images, tmp_path / "run", None, options)
    (begun,) = (e for e in events if isinstance(e, Begun))
    assert [b.path for b in begun.broken] == ["pear/3.png"]
    assert "not a picture" in begun.broken[0].reason
    assert begun.train + begun.held_out == 17
    with pytest.raises(AftError, match=r"pear/3\.png"):
        tune(images, tmp_path / "other", None, Options("off", workers=0))


# w0's outputs


def cache_of(images, folder, how, f=None, **options):
    f = f or small_float()
    data = open_data_set(images, "train", f.classes)
    cache = Cache(f, data, how, folder, workers=0, **options)
    assert sum(cache.fill()) == (0 if how == "off" else 18)
    cache.share_out(lambda t: t, lambda: None)
    return cache


def test_all_caches_give_what_the_stem_gives(images, tmp_path):
    f = small_float()
    wanted = [[3, 1, 17], [0], [16, 2, 2]]
    found = {}
    for how in ("memory", "disk", "off"):
        cache = cache_of(images, tmp_path, how, f)
        found[how] = [features for (features,) in cache.batches(wanted, lambda x, i: x)]
    from aftcli import read_image, to_input

    data = open_data_set(images, "train", f.classes)
    for n, indices in enumerate(wanted):
        x = torch.cat([to_input(read_image(data.picture(i)), f.preprocessing) for i in indices])
        (expected,) = stem_output(f.stem, x)
        assert torch.equal(found["memory"][n], found["disk"][n])
        for how in found:
            torch.testing.assert_close(found[how][n], expected)


def test_a_disk_cache_goes_on_and_makes_damaged_blocks_again(tmp_path):
    images = make_colours(tmp_path / "colours", each=25)
    data = open_data_set(images, "train", small_float().classes)
    cache = Cache(small_float(), data, "disk", tmp_path, workers=0)
    going = cache.fill()
    next(going), next(going)
    going.close()
    first, *others = sorted(cache.folder.iterdir())
    assert not others
    again = Cache(small_float(), data, "disk", tmp_path, workers=0)
    assert list(again.fill()) == [32, 32, 11]
    first.write_bytes(first.read_bytes()[:100])
    third = Cache(small_float(), data, "disk", tmp_path, workers=0)
    assert list(third.fill()) == [43, 32]
    # Of other images, or another stem, it is another cache.
    (images / "train/pear/3.png").touch()
    assert Cache(small_float(), data, "disk", tmp_path).key != cache.key
    cache.remove()
    assert not cache.folder.exists()


def test_the_head_does_not_change_a_cache_but_the_stem_does(images, tmp_path):
    f = small_float()
    data = open_data_set(images, "train", f.classes)
    key = Cache(f, data, "memory", tmp_path).key
    with torch.no_grad():
        f.head.get_submodule("6").bias.add_(1)
    assert Cache(f, data, "memory", tmp_path).key == key
    with torch.no_grad():
        f.stem.get_submodule("0").bias.add_(1)
    assert Cache(f, data, "memory", tmp_path).key != key


def test_caches_are_chosen_by_what_is_free(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    import psutil

    f = small_float()
    size = 8 * 8 * 8 * 4  # bytes of one image's features
    memory = namedtuple("memory", "available")
    disk = namedtuple("disk", "free")

    def chosen(memory_free, disk_free, processes=1):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(memory_free))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(disk_free))
        return choose_cache("auto", f, 100, tmp_path, processes, False)

    assert chosen(200 * size, 0) == "memory"
    assert chosen(200 * size - 1, 200 * size) == "disk"
    assert chosen(200 * size, 200 * size, processes=2) == "disk"
    assert chosen(200 * size - 1, 200 * size - 1) == "off"
    assert choose_cache("auto", f, 100, tmp_path, 1, True) == "off"
    with pytest.raises(AftError, match="nothing can be cached"):
        choose_cache("disk", f, 100, tmp_path, 1, True)
    with pytest.raises(AftError, match="unknown cache 'ram'; nearest"):
        choose_cache("ram", f, 100, tmp_path, 1, False)


# Augmentation


def test_crops_depend_on_name_seed_and_epoch_only():
    assert random_crop("a", 0, 1) == random_crop("a", 0, 1)
    others = {random_crop("a", 0, 2), random_crop("a", 1, 1), random_crop("b", 0, 1)}
    assert len(others | {random_crop("a", 0, 1)}) == 4
    for epoch in range(300):
        view = random_crop("a", 0, epoch)
        assert 0.6 <= view.side**2 <= 1
        assert 0 <= view.top <= 1 - view.side and 0 <= view.left <= 1 - view.side


def test_a_crop_is_the_part_that_it_names():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    whole, half = Crop(0, 0, 1, False), Crop(0.25, 0.5, 0.5, True)
    assert torch.equal(crop(x, [whole, whole], (8, 8)), x)
    found = crop(x, [whole._replace(mirrored=True), half], (4, 4))
    small = F.interpolate(x[:1], (4, 4), mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(found[:1], small.flip(3))
    assert torch.equal(found[1], x[1, :, 2:6, 4:8].flip(2))


def test_masks_are_augmented_with_their_images(images, tmp_path):
    """An input that is its own mask still is, cropped and mirrored."""
    f = small_float()
    cache = cache_of(images, tmp_path, "off", f)
    full = torch.zeros(18, 32, 32, dtype=torch.bool)
    for i in range(18):
        full[i, i : i + 12, 4 : 20 - i // 2] = True
    low = F.interpolate(full[:, None].float(), (4, 4), mode="area")[:, 0] >= 0.5
    seen = []

    def stem(x):
        seen.append(x)
        return x[:, :1]

    f.stem.forward = stem
    examples = CachedExamples(
        cache,
        Masks(low, full.__getitem__, torch.zeros(len(low)).long(), lambda x, i: x, ""),
        augment=True,
    )

    class Own:
        """A cache that gives the masks for inputs."""

        data_set, usable, f = cache.data_set, cache.usable, cache.f

        def batches(self, wanted, change):
            for indices in wanted:
                x = full[torch.tensor(indices)][:, None].float().expand(-1, 3, -1, -1)
                yield (change(x, indices)[:, :1],)

    examples.cache = Own()
    changed = 0
    for epoch in range(1, 6):
        for batch in examples.batches([[0, 5, 9], [17]], epoch):
            (x,) = batch.features
            at_low = F.interpolate(x, (4, 4), mode="area")[:, 0]
            # Off the edge of coverage one half, where rounding decides.
            sure = (at_low - 0.5).abs() > 0.2
            assert torch.equal(batch.masks[0][sure], (at_low >= 0.5)[sure])
            changed += int((batch.masks[0] != low[torch.tensor([0, 5, 9])[: len(x)]]).any())
    assert changed >= 5
    (plain,) = examples.batches([[0, 5, 9]], None)
    assert torch.equal(plain.masks[0], low[[0, 5, 9]])


def test_augmented_training_is_its_own_and_resumes(images, masks, tmp_path, uninterrupted):
    torch.set_num_threads(1)
    options = Options(augment=True, workers=0, save_every=0)
    path = tuned(tune(images, new_run(tmp_path / "a", masks), options=options)).path
    again = tuned(tune(images, new_run(tmp_path / "b", masks), options=options)).path
    assert_same(path, again)
    plain, augmented = content(uninterrupted)[0], content(path)[0]
    assert not torch.equal(plain["2.weight"], augmented["2.weight"])


@pytest.mark.parametrize("lam", [0.5, 2.0])
@pytest.mark.parametrize("count", [0, 9])
def test_overwriting_keeps_the_old_checkpoint_until_the_new_one_is_there(images, run, lam, count):
    old = tuned(tune(images, run)).path
    before = old.read_bytes()
    anew = Options(workers=0, save_every=0, overwrite=True)
    job = mask_job(MaskStore(run / "masks/small-gradcam.h5"), small_float())
    events = fine_tune([job], run, in_situation(lam=lam, **SETTINGS), anew)
    for _ in range(count + 1):
        next(events)
    events.close()
    assert old.read_bytes() == before
    with pytest.raises(AftError, match="lam is"):
        tune(images, run, 3.0)
    assert old.read_bytes() == before
    # As a stopped command says: without --overwrite it goes on.
    done = tuned(tune(images, run, lam))
    assert not done.before and done.card["lam"] == lam
    assert tuned(tune(images, run, lam)).before
    assert (old.read_bytes() == before) == (lam == 0.5)
    assert leftovers(run) == []


def test_progress_tells_all_images_and_steps(images, run):
    events = tune(images, run)
    cached = [e for e in events if isinstance(e, Cached)]
    assert {(e.where, e.split) for e in cached} == {("memory", "train"), ("memory", "val")}
    done = [(e.images, e.masked) for e in cached]
    whole, masked = [(0, False), (18, False)], [(0, True), (18, True)]
    assert done == [*whole, *masked, (0, False), (6, False)]
    steps = [e for e in events if isinstance(e, Step)]
    assert [(e.epoch, e.step) for e in steps] == [(e, s) for e in (1, 2, 3) for s in (1, 2, 3)]
    assert {e.steps for e in steps} == {3} and steps[2].train.images == 15
    assert len(shuffled(range(15), 0, 1)) == 15


def test_a_new_head_has_the_data_sets_classes(tmp_path):
    from aftcli.models.load import load_classifier, with_new_head

    f = load_classifier("squeezenet1_0", weights=False)
    new, again = (with_new_head(f, ("a", "b", "c"), seed) for seed in (0, 0))
    other = with_new_head(f, ("a", "b", "c"), 1)
    x = torch.randn(2, 3, 224, 224)
    assert new(x).shape == (2, 3) and new.classes == Classes(("a", "b", "c"))
    assert torch.equal(new.activation(x), f.activation(x)) and torch.equal(new(x), again(x))
    assert new.layer_name == f.layer_name and new.preprocessing == f.preprocessing
    weight = dict(new.head.named_parameters())["classifier.1.weight"]
    assert 0 < weight.abs().max() < 0.01
    assert not torch.equal(weight, dict(other.head.named_parameters())["classifier.1.weight"])
    # Other classes of the same number are other classes.
    renamed = with_new_head(new, ("d", "e", "f"), 2)
    assert not torch.equal(dict(renamed.head.named_parameters())["classifier.1.weight"], weight)


def test_a_control_of_other_classes_gets_a_new_head_by_itself(tmp_path, monkeypatch):
    images = make_colours(tmp_path / "colours")
    (images / "train/apple").rename(images / "train/quince")
    from aftcli.models.load import load_classifier

    f = load_classifier("squeezenet1_0", weights=False)
    job = control_job(f, images, None, None)
    assert job.new_head and job.f.classes.names == ("pear", "plum", "quince")
    assert job.data_set.mapped and {s.label for s in job.data_set.samples} == {0, 1, 2}
    new = finetune_defaults.SITUATIONS["new"].settings
    assert in_situation()(job).learning_rate == new["learning_rate"]


def test_mixed_precision_trains_nearly_the_same_and_resumes(
    images, masks, tmp_path, uninterrupted, accelerate_anew
):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    half = Accelerator(cpu=True, mixed_precision="bf16")
    path = tuned(tune(images, new_run(tmp_path / "a", masks), accelerator=half)).path
    (_, card), (_, exact) = content(path), content(uninterrupted)
    assert (card["precision"], exact["precision"]) == ("bf16", "no")
    found, expected = (c["metrics"]["after"]["held_out"]["total"] for c in (card, exact))
    assert found != expected and found == pytest.approx(expected, rel=0.02)
    run = new_run(tmp_path / "b", masks)
    stop_after(images, run, 9, half)
    assert (run / "tuned/.small-gradcam.state").exists()
    assert_same(tuned(tune(images, run, accelerator=half)).path, path)
    with pytest.raises(AftError, match="precision is bf16, asked for no"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        tune(images, run)
