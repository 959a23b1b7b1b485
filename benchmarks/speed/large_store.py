"""Time a store as large as ImageNet's: joined, opened, shown, sampled, checked by finetune.

    python -m benchmarks large_store [--rows 1300000] [--out FOLDER]

The columns are made up, as wide as those of efficientnet_lite0, and there are no images: a store's
own cost does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aftcli.aft.jobs import _kept as kept
from aftcli.core.classes import Preprocessing
from aftcli.data.blocks import spans_of
from aftcli.masks.hdf5 import Rows, split_float
from aftcli.masks.images import chunks_of
from aftcli.masks.parts import join_parts, write_part
from aftcli.masks.store import MaskStore
from aftcli.report.masks import show_store
from aftcli.settings import Search

CELLS = (7, 7)
CLASSES = 1000
SAMPLED = 1000


def rows_of(span: range, rng: np.random.Generator, thresholds: tuple[float, ...]) -> Rows:
    """Make up the columns of some images: maps with a few bright cells, as real ones have."""
    n, steps = len(span), len(thresholds)
    maps = rng.random((n, *CELLS), np.float32) ** 4
    half, correction = split_float(maps / maps.max((1, 2), keepdims=True))
    y_hat = rng.random((n, steps), np.float32)
    names = [b"train/n%08d/n%08d_%06d.JPEG" % (i % CLASSES, i % CLASSES, i) for i in span]
    classes = np.array([i % CLASSES for i in span], np.int32)
    return Rows(
        np.array(names, "S48"),
        classes,
        classes,
        rng.random(n, np.float32),
        y_hat,
        y_hat - 0.5,
        rng.choice(np.array(thresholds, np.float32), n),
        half,
        correction,
        maps > 0.3,
        np.zeros((n, 0), np.float32),
        rng.integers(-(2**62), 2**62, n),
        rng.integers(1, 2**40, (n, 2)),
    )


def settings_of(rows: int, search: Search) -> dict[str, object]:
    """Return the attributes of such a store."""
    return {
        "format_version": 2,
        "aft_version": "0",
        **{"model": "efficientnet_lite0", "weights": "", "checkpoint": "", "layer": "bn2"},
        **{"cam": "gradcam", "activation_shape": [1280, *CELLS]},
        "thresholds": list(search.thresholds),
        **{"masking": search.masking, "fill": search.fill, "threshold_mode": search.mode},
        "preprocessing": Preprocessing().as_dict(),
        **{"data_set": "/data/imagenet/train", "data_kind": "folders", "split": "train"},
        **{"labels": "data set", "classes": [f"n{i:08d}" for i in range(CLASSES)]},
        **{"images": rows, "images_hash": ""},
    }


@contextlib.contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Add the seconds of what it holds, and those of the CPU, which other work leaves alone."""
    start, worked = time.perf_counter(), time.process_time()
    yield
    found[name] = [
        round(end - begin, 2)
        for begin, end in ((start, time.perf_counter()), (worked, time.process_time()))
    ]


def main() -> None:
    """Print [seconds, of the CPU] of each step, bytes a row, and the most memory that was taken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--out", type=Path, help="an existing folder; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(args.rows, args.out or Path(temporary)), indent=2))


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Make a store of so many rows and time what commands do with it."""
    found: dict[str, Any] = {"rows": count}
    path, search, rng = folder / "large.h5", Search(), np.random.default_rng(0)
    settings = settings_of(count, search)
    spans = spans_of(count)
    parts = [folder / f"{span.start:09d}" for span in spans]
    with timed(found, "written in parts"):
        for span, part in zip(spans, parts, strict=True):
            write_part(part, rows_of(span, rng, search.thresholds), [], settings)
    with timed(found, "joined"):
        join_parts(path, parts, settings)
    for part in parts:
        part.unlink()
    with timed(found, "opened"), MaskStore(path) as store:
        assert len(store) == count
    with timed(found, "shown"), contextlib.redirect_stdout(io.StringIO()):
        show_store(path, json_=True)
    with MaskStore(path) as store:
        with timed(found, f"{SAMPLED} rows sampled"):
            for i in np.random.default_rng(1).integers(0, count, SAMPLED).tolist():
                store[i]
        with timed(found, f"{SAMPLED} masks of a DataLoader"):
            loader = torch.utils.data.DataLoader(
                store,
                sampler=torch.randperm(count)[:SAMPLED].tolist(),
                collate_fn=lambda records: records,
                batch_size=32,
                num_workers=2,
            )
            assert sum(map(len, loader)) == SAMPLED
        with timed(found, "verified"):
            store.verify()
        with timed(found, "read by finetune"):
            chunks = chunks_of(store)
            columns = list(zip(*map(kept, chunks), strict=True))
            names = [os.fsdecode(bytes(name)) for chunk in chunks for name in chunk.path]
            assert len(names) == count and len(columns) == 4
    found["bytes a row"] = round(path.stat().st_size / count)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["most memory, MB"] = round(most / 1024)
    return found


if __name__ == "__main__":
    main()
