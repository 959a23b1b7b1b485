"""A small data set, a small network and whole runs on them, for tests that kill processes.

Kept free of timm and torchvision, so that a process that runs it starts quickly.
"""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.data.blocks import Processes
from aftcli.data.sets import open_data_set
from aftcli.locks import locked
from aftcli.masks.generate import generate_masks
from aftcli.settings import Search

NAMES = ("apple", "pear", "plum")


def make_images(root, each=5, seed=0):
    """Class folders of pictures with a bright square somewhere."""
    rng = np.random.default_rng(seed)
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (40, 52, 3), dtype=np.uint8)
            top, left = rng.integers(0, 24, 2)
            pixels[top : top + 14, left : left + 14] += 110
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def draw(path, size=(60, 44), seed=0):
    """A picture with a bright square."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    pixels[8:28, 20:40] += 100
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return Path(path)


def small_float():
    """A cut network in float32 with three classes."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    with torch.no_grad():
        model[6].weight.mul_(40)
    preprocessing = Preprocessing(size=(32, 32), resize=36)
    return cut_classifier(
        model, "2+3", name="small", preprocessing=preprocessing, classes=Classes(NAMES)
    )


def generate(root, run, methods=("gradcam", "layercam"), settings=None, **options):
    """Run to the end; options as `generate_masks` takes them."""
    f = small_float()
    data = open_data_set(Path(root), None, f.classes).limited(options.pop("limit", None))
    settings = settings or Search()
    steps = generate_masks(f, data, methods, Path(run), settings, block=2, batch=2, **options)
    return list(steps)


def generate_and_exit(root, run, workers=0):
    """Make masks in a process that will be killed."""
    torch.set_num_threads(1)
    generate(root, run, workers=workers)


def generate_as_one_of(index, count, barrier, root, run):
    """One of several processes on a run."""
    torch.set_num_threads(1)
    generate(root, run, processes=Processes(index, count, barrier.wait), workers=0)


@contextmanager
def full_disk(size):
    """No file may become larger than that many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hold(path, held, release):
    """Hold a store's lock until told to let go."""
    with locked(path):
        held.set()
        release.wait()
