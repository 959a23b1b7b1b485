"""The same pictures in every format give the same masks, tau* and tables, but for names."""

import json
import os
import signal
import time
from contextlib import suppress
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from aftcli import MaskStore
from aftcli.data.sets import open_data_set
from tests.helpers import faulty
from tests.helpers.archives import PACKED
from tests.helpers.faulty import At, aft
from tests.helpers.stored import (
    NAMES,
    generate,
    generate_and_exit,
    generate_as_one_of,
    small_float,
)
from tests.helpers.trained import make_colours

EACH = 6  # of a class in train; two more are in val: 24 pictures


class Packed(NamedTuple):
    """One format's data set."""

    name: str
    path: object


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("colours") / "colours", each=EACH)


@pytest.fixture(params=PACKED)
def packed(request, colours, tmp_path_factory, monkeypatch):
    if request.param in ("parquet", "saved"):
        pytest.importorskip("pyarrow")
    folder = colours.parent / request.param
    monkeypatch.setenv("AFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    path = folder.with_suffix(".csv") if request.param == "manifest" else folder
    return Packed(request.param, path if path.exists() else PACKED[request.param](colours, folder))


def columns(run, cam="gradcam"):
    """The columns of a store as bytes, but for names and times."""
    with MaskStore(run / f"masks/small-{cam}.h5") as store:
        rows = store.rows(0, len(store))._asdict()
        assert len(store) == 3 * EACH and not store.broken
    return {k: v.tobytes() for k, v in rows.items() if k not in ("path", "stamp")}


@pytest.fixture(scope="module")
def expected(colours, tmp_path_factory):
    run = tmp_path_factory.mktemp("expected")
    generate(colours, run, ("gradcam", "layercam"))
    return {cam: columns(run, cam) for cam in ("gradcam", "layercam")}


def test_masks_are_the_same(packed, expected, tmp_path):
    data = open_data_set(packed.path, None, small_float().classes)
    assert (data.mapped, data.classes, len(data.samples)) == (True, NAMES, 3 * EACH)
    generate(packed.path, tmp_path, ("gradcam", "layercam"), workers=2)
    assert {cam: columns(tmp_path, cam) for cam in expected} == expected


def test_a_kill_and_a_second_process_change_nothing(packed, expected, processes, tmp_path):
    """Killed, gone on with by two processes, one of which is killed, and finished by one."""
    parts = tmp_path / "masks/.small-gradcam.parts"

    def killed_after(count, target, *arguments):
        process = processes.Process(target=target, args=arguments)
        process.start()
        while process.is_alive() and sum(1 for _ in parts.glob("[!.]*")) < count:
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()

    killed_after(2, generate_and_exit, packed.path, tmp_path, 1)
    barrier = processes.Barrier(2)
    second = processes.Process(
        target=generate_as_one_of, args=(1, 2, barrier, packed.path, tmp_path)
    )
    second.start()
    killed_after(5, generate_as_one_of, 0, 2, barrier, packed.path, tmp_path)
    second.kill()
    second.join()
    generate(packed.path, tmp_path, workers=1)
    assert {cam: columns(tmp_path, cam) for cam in expected} == expected


def tables(folder):
    """Results of a chain: columns of masks, weights, tables without names and places."""
    weights = load_file(folder / "run/tuned/small-gradcam.safetensors")
    found = json.loads((folder / "out").read_text())

    def plain(value):
        if isinstance(value, dict):
            return {
                k: plain(v) for k, v in value.items() if k not in ("dataset", "train", "seconds")
            }
        return [plain(v) for v in value] if isinstance(value, list) else value

    rows = {key: plain(value) for key, value in found.items() if key.startswith("table")}
    assert {"table3", "table4"} <= set(rows)
    return columns(folder / "run"), weights, rows


def measured(found, plain):
    """Figures measured in both: COCO's boxes give some that class folders lack."""
    if isinstance(plain, dict):
        return {k: measured(found[k], v) for k, v in plain.items() if v is not None}
    if isinstance(plain, list):
        return [measured(*each) for each in zip(found, plain, strict=True)]
    return found


def chain(processes, folder, data, killed=False):
    """Masks, a tuned network and tables; each command is killed once and called again."""
    folder.mkdir()
    for command in ("gen-masks", "finetune", "evaluate"):
        words = faulty.arguments(command, data)
        if command == "finetune":
            words = (*words, "--held-out", "0")  # which images these are turns on their names
        if command == "evaluate":
            words = (*words, "--table", "3,4")
        if killed:
            aft(processes, folder, *words, act=faulty.kill, at=At("pass", 5))
        ended = aft(processes, folder, *words)
        assert (ended.code, ended.err) == (0, ""), ended
    return tables(folder)


@pytest.mark.slow
def test_tables_are_the_same(packed, colours, processes, tmp_path):
    masks, weights, rows = chain(processes, tmp_path / "plain", colours)
    for killed in (False, True):
        own = chain(processes, tmp_path / f"packed-{killed}", packed.path, killed)
        assert own[0] == masks and measured(own[2], rows) == measured(rows, rows)
        assert own[2] == rows or packed.name == "coco"
        assert set(own[1]) == set(weights)
        assert all(torch.equal(own[1][name], weights[name]) for name in weights)
