"""Small trainings, for the tests of fine-tuning and the processes that they kill."""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aftcli.aft.jobs import control_job, mask_job
from aftcli.aft.loss import ZERO_LEVEL, Batch, in_situation
from aftcli.aft.run import Options, Tuned, fine_tune
from aftcli.aft.training import Epoch
from aftcli.masks.store import MaskStore
from tests.helpers.stored import NAMES, generate, small_float


class Direct:
    """Examples that pass the stem batch by batch."""

    def __init__(self, f, x, labels, masks=None, explained=None, hidden=None):
        self.f, self.x, self.labels, self.masks = f, x, labels, masks
        self.explained = labels if explained is None else explained
        self.hidden = hidden
        self.names = [f"image {i}" for i in range(len(x))]
        self.usable = range(len(x))
        self.seen = []

    def inputs(self, spans, todo):
        for block in todo:
            yield self.x[list(spans[block])]

    def batches(self, wanted, epoch):
        for indices in wanted:
            rows = torch.tensor(list(indices))
            self.seen.append((epoch, tuple(indices)))
            with torch.no_grad():
                features = self.f.stem(self.x[rows])
            batch = Batch((features,), self.labels[rows])
            if self.masks is not None:
                batch = batch._replace(masks=(self.masks[rows],), class_index=self.explained[rows])
            if self.hidden is not None:
                with torch.no_grad():
                    batch = batch._replace(masked=(self.f.stem(self.hidden[rows]),))
            yield batch


def make_colours(root, each=6, seed=0):
    """Class folders that can be told apart, in train/ and val/."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", each), ("val", 2)):
        for c, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (40, 52, 3), dtype=np.uint8)
                top, left = rng.integers(0, 24, 2)
                pixels[top : top + 14, left : left + 14, c] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


# Equation 8 as it is printed; without it the settings are those of few images a class.
PAPER = {"consistency": 0.0, "classification": "labels", "blend": 1.0}
SETTINGS = {"epochs": 3, "batch": 5, "held_out": 0.2, "learning_rate": 1e-3}


def masks_of(root, run, cam="gradcam"):
    """Make the masks of a data set's train split once; the store."""
    generate(root, run, (cam,))
    return MaskStore(Path(run) / f"masks/small-{cam}.h5")


def tune(root, run, lam=0.5, options=None, accelerator=None, settings=None, cam="gradcam"):
    """Fine-tune the small network on a run's masks, or without where lam is None; the events."""
    f = small_float()
    if lam is None:
        job = control_job(f, Path(root), None, None)
    else:
        job = mask_job(MaskStore(Path(run) / f"masks/small-{cam}.h5"), f)
    chosen = in_situation(lam=lam, **{**SETTINGS, **(settings or {})})
    options = options or Options(workers=0, save_every=0)
    return list(fine_tune([job], Path(run), chosen, options, accelerator))


def tuned(events):
    """The checkpoint that a run of `tune` has written."""
    (found,) = (e for e in events if isinstance(e, Tuned))
    return found


def epochs(events):
    return [e for e in events if isinstance(e, Epoch)]


def tune_and_exit(root, run, cache="memory"):
    """Tune in a process that will be killed."""
    torch.set_num_threads(1)
    tune(root, run, options=Options(cache, workers=0, save_every=0))


def main():
    """One of several processes of torchrun: -m tests.helpers.trained ROOT RUN CACHE [GAUGE]."""
    torch.set_num_threads(1)
    root, run, cache, *gauge = sys.argv[1:]
    settings = {"objective": ZERO_LEVEL, "gauge": gauge[0]} if gauge else None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    options = Options(cache, workers=0)
    tune(root, run, options=options, accelerator=accelerator, settings=settings)


def main_as_one_of(index, count, port, arguments):
    """Be one of several processes that torchrun has started, without its seconds of imports."""
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.argv[1:] = map(str, arguments)
    main()


def train_together(processes, count, *arguments):
    """Run `main` in so many processes to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [
        processes.Process(target=main_as_one_of, args=(i, count, port, arguments))
        for i in range(count)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * count


if __name__ == "__main__":
    main()
