"""How a new last layer should begin: initial scale and learning rate, by held-out images.

    python benchmarks/new_head.py DATA/voc

Trains efficientnet_lite0 without masks on the train split, a fifth of it held out; no image of the
val split is read. Prints means over the seeds of the held-out cross-entropy and accuracy at the
chosen epoch.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from statistics import mean
from unittest import mock

import torch

from aftcli import load_classifier
from aftcli.aft.examples import CachedExamples
from aftcli.aft.features import Cache
from aftcli.aft.jobs import control_job
from aftcli.aft.loss import Recipe
from aftcli.aft.training import Training
from aftcli.cli.process import keep_freed_memory
from aftcli.core import models


def main() -> None:
    """Train every combination and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a data set of other classes than ImageNet's")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    keep_freed_memory()
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}")
    f = load_classifier()
    cache = None
    print("| initial scale | learning rate | cross-entropy | accuracy | epochs chosen |")
    print("|---|---|---|---|---|")
    for scale in (1.0, 0.01):
        with mock.patch.object(models, "NEW_HEAD_SCALE", scale):
            job = control_job(f, args.data, None, None)
        if cache is None:
            cache = Cache(job.f, job.data_set, "memory", Path())
            list(cache.fill())
            cache.share_out(lambda t: t, lambda: None)
        for rate in (1e-4, 3e-4, 1e-3):
            best, epochs = [], []
            for seed in range(args.seeds):
                settings = Recipe(None, rate, 30, held_out=0.2, seed=seed)
                training = Training(job.f, CachedExamples(cache, None), settings)
                for _ in training.run():
                    pass
                epochs.append(training.best_epoch)
                best.append(training.history[training.best_epoch].held_out)
            ce, accuracy = mean(m.cross_entropy for m in best), mean(m.accuracy for m in best)
            chosen = ", ".join(map(str, epochs))
            print(f"| {scale:g} | {rate:g} | {ce:.3f} | {accuracy:.1%} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
