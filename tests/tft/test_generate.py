"""gen-masks: whatever stops it, whoever shares it, the content is the same."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from aftcli import AftError, MaskStore
from aftcli.data.blocks import Loaded, batches, spans_of
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.settings import Search
from aftcli.tft.generate import generate_masks, store_settings, tune_batch
from aftcli.tft.hdf5 import Rows
from tests.conftest import ROOT
from tests.helpers.faulty import aft
from tests.helpers.stored import (
    full_disk,
    generate,
    generate_and_exit,
    generate_as_one_of,
    hold,
    make_images,
    small_float,
)

METHODS = ("gradcam", "layercam")

near = partial(np.allclose, rtol=0, atol=1e-5, equal_nan=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "fruit")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, images):
    """Content of the stores of one run in one go, with one thread as the others have."""
    run, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    torch.set_num_threads(1)
    generate(images, run)
    torch.set_num_threads(threads)
    return content(run)


def content(run):
    stores = {}
    for method in METHODS:
        with MaskStore(run / f"masks/small-{method}.h5") as store:
            store.verify()
            stores[method] = store.rows(0, len(store)), store.settings, store.broken
    return stores


def assert_same(found, expected):
    for method in METHODS:
        for name, a, b in zip(Rows._fields, found[method][0], expected[method][0], strict=True):
            assert np.array_equal(a, b), (method, name)
        assert found[method][1:] == expected[method][1:]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(images, uninterrupted, processes, tmp_path):
    rng, kills, rounds = random.Random(0), 0, 0
    for timed in ("first", "second"):
        start = time.monotonic()
        process = processes.Process(target=generate_and_exit, args=(images, tmp_path / timed))
        process.start()
        process.join()
        assert process.exitcode == 0
        duration = time.monotonic() - start
    while kills < 20:
        rounds += 1
        run = tmp_path / f"run{rounds}"
        while True:
            arguments = (images, run, rounds % 2)
            process = processes.Process(target=generate_and_exit, args=arguments)
            process.start()
            process.join(rng.uniform(0, 0.8 * duration))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            if process.exitcode == 0:
                break
        assert_same(content(run), uninterrupted)
        assert not list((run / "masks").glob("*.parts"))


@pytest.mark.slow
def test_a_torn_part_is_made_again(images, uninterrupted, tmp_path):
    torch.set_num_threads(1)
    rng = random.Random(4)
    for trial in range(5):
        run = tmp_path / str(trial)
        stop_after(images, run, steps=12)
        parts = sorted((run / "masks").glob(".*.parts/0*"))
        assert len(parts) >= 4
        for part in rng.sample(parts, 3):
            whole = part.read_bytes()
            part.write_bytes(whole[: rng.randrange(len(whole))])
        generate(images, run)
        assert_same(content(run), uninterrupted)


def stop_after(images, run, steps):
    """Leave a run in the middle, as an exception would."""

    f = small_float()
    data = open_data_set(images, None, f.classes)
    going = generate_masks(f, data, METHODS, run, Search(), block=2, batch=2, workers=0)
    for _ in range(steps):
        next(going)
    going.close()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.slow
def test_several_processes_make_the_same_store_as_one(
    images, uninterrupted, processes, tmp_path, count
):
    barrier = processes.Barrier(count)
    shared = [
        processes.Process(target=generate_as_one_of, args=(i, count, barrier, images, tmp_path))
        for i in range(count)
    ]
    for process in shared:
        process.start()
    for process in shared:
        process.join()
    assert [process.exitcode for process in shared] == [0] * count
    assert_same(content(tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_run_of_several_processes_is_finished_by_one(images, uninterrupted, tmp_path):
    torch.set_num_threads(1)
    stop_after(images, tmp_path, steps=9)
    generate(images, tmp_path, workers=2)
    assert_same(content(tmp_path), uninterrupted)


def test_one_cam_is_added_without_touching_the_other(images, uninterrupted, tmp_path):
    torch.set_num_threads(1)
    generate(images, tmp_path, ("gradcam",))
    before = (tmp_path / "masks/small-gradcam.h5").stat().st_mtime_ns
    generate(images, tmp_path)
    assert (tmp_path / "masks/small-gradcam.h5").stat().st_mtime_ns == before
    # Alone, a method's masks share passes with others than beside the other's: rounding differs.
    found = content(tmp_path)
    for method in METHODS:
        rows = found[method][0], uninterrupted[method][0]
        for name, a, b in zip(Rows._fields, *rows, strict=True):
            assert near(a, b) if a.dtype.kind == "f" else np.array_equal(a, b), (method, name)
        own, whole = found[method][1], uninterrupted[method][1]
        assert {name for name in whole if own[name] != whole[name]} <= {"digest", "seal"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"settings": Search(masking="soft")}, "masking is binary, asked for soft"),
        ({"settings": Search(search="fast")}, "settings: search is exact, asked for fast; use"),
        ({"settings": Search(thresholds=(0.0, 0.5))}, "thresholds is"),
        ({"limit": 4}, "images is 15, asked for 4"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_named(images, tmp_path, options, difference, finished):
    if finished:
        generate(images, tmp_path, ("gradcam",))
    else:
        stop_after(images, tmp_path, steps=5)
    with pytest.raises(AftError, match=difference):
        generate(images, tmp_path, ("gradcam",), **options)
    generate(images, tmp_path, ("gradcam",), overwrite=True, **options)


def test_other_weights_are_refused(images, tmp_path, monkeypatch):
    generate(images, tmp_path, ("gradcam",))
    monkeypatch.setattr("aftcli.core.classifier.Classifier.weights_hash", lambda self: "other")
    with pytest.raises(AftError, match="weights is .*, asked for other"):
        generate(images, tmp_path, ("gradcam",))


def test_a_second_process_on_a_store_is_refused(images, processes, tmp_path):
    (tmp_path / "masks").mkdir()
    held, release = processes.Event(), processes.Event()
    lock = tmp_path / "masks/small-gradcam.h5"
    other = processes.Process(target=hold, args=(lock, held, release))
    other.start()
    held.wait()
    with pytest.raises(AftError, match="another process"):
        generate(images, tmp_path, ("gradcam",))
    release.set()
    other.join()
    generate(images, tmp_path, ("gradcam",))


def test_broken_images_are_recorded_and_left_out(tmp_path):
    root = make_images(tmp_path / "fruit")
    (root / "apple/0.png").write_bytes(b"")
    (root / "apple/1.png").write_text("no picture")
    whole = (root / "pear/2.png").read_bytes()
    (root / "pear/2.png").write_bytes(whole[: len(whole) // 2])
    generate(root, tmp_path / "run")
    with MaskStore(tmp_path / "run/masks/small-gradcam.h5") as store:
        assert [b.path for b in store.broken] == ["apple/0.png", "apple/1.png", "pear/2.png"]
        assert all(b.reason for b in store.broken)
        assert len(store) == 12
        assert "apple/0.png" not in {record.path for record in store}
    with pytest.raises(AftError, match=r"apple/0\.png.*--strict"):
        generate(root, tmp_path / "strict", strict=True)


def test_a_full_disk_is_an_error_and_the_run_goes_on_later(images, uninterrupted, tmp_path):
    torch.set_num_threads(1)
    with full_disk(4000), pytest.raises(AftError, match="can't be written"):
        generate(images, tmp_path)
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []
    generate(images, tmp_path)
    assert_same(content(tmp_path), uninterrupted)


def test_a_full_disk_while_joining_leaves_the_parts(images, uninterrupted, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    from aftcli.tft import generate as module

    def full(*_):
        with full_disk(9000):
            real(*_)

    real = module.join_parts
    monkeypatch.setattr(module, "join_parts", full)
    with pytest.raises(AftError, match="can't be written"):
        generate(images, tmp_path)
    assert not list(tmp_path.rglob("*.h5"))
    monkeypatch.setattr(module, "join_parts", real)
    generate(images, tmp_path)
    assert_same(content(tmp_path), uninterrupted)


@pytest.mark.parametrize(("name", "threads"), [("onnxruntime", 1), ("torch", 3)])
def test_torch_leaves_the_processors_to_the_engine(name, threads, images, tmp_path):
    class Engine:
        """One that takes nothing, so that the network itself runs."""

        precision = "no"

        def takes(self, x):
            return False

    f, seen = small_float(), []
    data = open_data_set(images, None, f.classes).limited(2)
    f.engine, f.watch = Engine(), lambda count: seen.append(torch.get_num_threads())
    f.engine.name = name
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in generate_masks(f, data, ["gradcam"], tmp_path, Search(), workers=0):
            pass
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {threads}


def test_methods_together_equal_each_alone():
    f = small_float()
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    methods = ("gradcam", "layercam", "cam", "ablationcam", "gradcam++")
    together = tune_batch(f, x, methods, Search())
    for method, shared in zip(methods, together, strict=True):
        (alone,) = tune_batch(f, x, [method], Search())
        assert torch.equal(shared.tft.tau, alone.tft.tau)
        torch.testing.assert_close(shared.tft.probabilities, alone.tft.probabilities)
        assert torch.equal(shared.mask, alone.mask)


def test_equal_masks_of_several_methods_are_scored_once(monkeypatch):
    f = small_float()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    passed = []
    forward = type(f).forward
    monkeypatch.setattr(
        type(f), "forward", lambda self, x: passed.append(len(x)) or forward(self, x)
    )
    tune_batch(f, x, ["layercam"], Search())
    alone = sum(passed)
    passed.clear()
    tune_batch(f, x, ["layercam", "layercam"], Search())
    assert sum(passed) == alone


def test_blocks_cover_all_images_once():
    for count in (1, 31, 32, 33, 5000, 1_281_167):
        spans = spans_of(count)
        assert [i for span in (spans[0], spans[-1]) for i in (span.start, span.stop)][0] == 0
        assert spans[-1].stop == count
        assert all(a.stop == b.start for a, b in zip(spans, spans[1:], strict=False))
        assert len(spans) <= 4000 or count < 128_000


@pytest.mark.slow
def test_torchrun_with_two_processes_gives_the_store_of_one(images, processes, tmp_path):
    command = ["gen-masks", str(images), "--thresholds", "0.5", "--quiet", "--val-share", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two = subprocess.run(
        [*launch, "-m", "--", "tests.helpers.faulty", *command, "--run", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert two.returncode == 0, two.stderr.decode()
    one = aft(processes, tmp_path, *command, "--run", "one")
    assert one.code == 0, one.err
    with (
        MaskStore(tmp_path / "one/masks/small-gradcam.h5") as a,
        MaskStore(tmp_path / "two/masks/small-gradcam.h5") as b,
    ):
        assert a.settings == b.settings and len(a) == len(b) == 15
        for name, left, right in zip(Rows._fields, a.rows(0, 15), b.rows(0, 15), strict=True):
            assert np.array_equal(left, right), name


@pytest.mark.parametrize(("count", "size"), [(0, 4), (3, 4), (4, 4), (9, 4), (9, 1)])
def test_batches_of_a_block_are_its_images_in_order(count, size):
    x = np.random.default_rng(0).normal(size=(count, 3, 5, 5)).astype(np.float32)
    none = np.zeros(0, np.int64)
    loaded = Loaded(0, x, list(range(count)), [], none, none)
    parts = list(batches(loaded, size, torch.empty(0)))
    assert [len(part) for part in parts] == [min(size, count - i) for i in range(0, count, size)]
    assert np.array_equal(np.concatenate([np.empty((0, 3, 5, 5)), *parts]), x)


def test_what_a_store_was_made_with_is_named_where_it_is_not_usual(images):
    f = small_float()
    data = open_data_set(images, None, f.classes)
    usual = store_settings(f, data, Search())
    assert not {"search", "precision"} & set(usual)
    lower = accelerated(f, "torch", precision="bf16")
    named = store_settings(lower, data, Search(search="fast"))
    assert named == {**usual, "search": "fast", "precision": "bf16"}
