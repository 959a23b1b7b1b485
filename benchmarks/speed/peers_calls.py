"""Calls that the benchmark peers times: each part runs in a process of its own.

    python -m benchmarks.speed.peers_calls PART '{"model": "resnet50", ...}'

All contestants explain one network at one layer, cut for ours and whole for the peers, in eval
mode, with the class given. The peers are called as their own documentation does; their hooks are
in place before the clock starts. What a part has found is printed as JSON, in the last line.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

from aftcli import attribution_map, explain, load_classifier, read_image, to_input
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import Classifier
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.settings import THRESHOLDS, Search
from aftcli.tft.search import fine_tune_threshold
from benchmarks.speed.peers import (
    CAMS,
    CAPTUM,
    ENGINES,
    GRAD_CAM,
    LOOP,
    QUICK,
    SHAPES,
    TORCHCAM,
    contestants,
    rotated,
)

PAUSE = 0.1  # seconds before each call: no thread of the contestant before is still spinning
QUICK_CALL = 1.0  # seconds; calls below are repeated
NEAR = 1e-4  # two RPI that differ by less are a tie that rounding decides
POOLED = 14  # cells a side of the maps that are compared
BATCH_RUNS = 5  # at most, of 16 images
BATCH = 16  # images, or masked images, in one pass of the plain loop

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "vgg16": torchvision.models.vgg16,
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}
LAYERS = {"resnet50": "layer4.2", "vgg16": "features.29", "efficientnet_lite0": "bn2"}

Call = Callable[[Tensor, Tensor], Tensor]
Timed = Callable[[int], float]


def load(name: str) -> Classifier:
    """Return our classifier, with the same weights at each call."""
    torch.manual_seed(0)
    return load_classifier(name, weights=name == "efficientnet_lite0")


def whole_network(name: str, f: Classifier) -> nn.Module:
    """Return the uncut network on the very weights of f, trainable as its library makes it."""
    with torch.device("meta"):
        whole = NETWORKS[name]()
    whole.load_state_dict(f.weights(), assign=True)
    return whole.eval()


def image_paths(f: Classifier, data: str, count: int) -> list[Path]:
    """Return paths of images, spread over the data set."""
    data_set = open_data_set(Path(data), None, f.classes).limited(count)
    return [data_set.picture(i).path for i in range(len(data_set.samples))]


def inputs(f: Classifier, data: str, count: int) -> Tensor:
    """Return real images, shape (count, 3, H, W)."""
    paths = image_paths(f, data, count)
    return torch.cat([to_input(read_image(path), f.preprocessing) for path in paths])


@torch.no_grad()
def predicted(f: Classifier, x: Tensor) -> Tensor:
    """Return the predicted classes, shape (N,); one by one, not to raise the peak of memory."""
    return torch.cat([f(x_n[None]).argmax(1) for x_n in x])


class Subject:
    """One network in all the forms that the contestants take, and images."""

    def __init__(self, name: str, data: str, count: int, batch: int = BATCH) -> None:
        self.batch, self.f = batch, load(name)
        self.x = inputs(self.f, data, count)
        self.c = predicted(self.f, self.x)
        self._fast: dict[str, Classifier] = {}
        self.whole = whole_network(name, self.f)  # shares the weights
        self.layer = self.whole.get_submodule(LAYERS[name])

    def ours(self, contestant: str) -> Classifier:
        """Return the classifier on the engine of one of ours."""
        if contestant not in self._fast:
            self._fast[contestant] = accelerated(self.f, ENGINES[contestant])
        return self._fast[contestant]


@contextmanager
def _aft(subject: Subject, contestant: str, method: str) -> Iterator[Call]:
    f = subject.ours(contestant)
    yield lambda x, c: attribution_map(f, x, c, method)


@contextmanager
def _pytorch_grad_cam(subject: Subject, contestant: str, method: str) -> Iterator[Call]:
    library = importlib.import_module("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    with getattr(library, CAMS[method][contestant])(subject.whole, [subject.layer]) as cam:
        cam.batch_size = subject.batch  # of Ablation-CAM and Score-CAM

        def call(x: Tensor, c: Tensor) -> Tensor:
            wanted = [targets.ClassifierOutputTarget(i) for i in c.tolist()]
            return torch.from_numpy(cam(input_tensor=x, targets=wanted))

        yield call


@contextmanager
def _torchcam(subject: Subject, contestant: str, method: str) -> Iterator[Call]:
    library = importlib.import_module("torchcam.methods")
    scoring = method == "scorecam"
    options = {"batch_size": subject.batch} if scoring else {}
    kind = getattr(library, CAMS[method][contestant])
    with kind(subject.whole, subject.layer, **options) as extractor:

        def call(x: Tensor, c: Tensor) -> Tensor:
            with torch.inference_mode(scoring):
                scores = subject.whole(x)
            (low,) = extractor(class_idx=c.tolist(), scores=scores)
            return _stretched(low, x)

        yield call


@contextmanager
def _captum(subject: Subject, contestant: str, method: str) -> Iterator[Call]:
    library = importlib.import_module("captum.attr")
    extractor = getattr(library, CAMS[method][contestant])(subject.whole, subject.layer)

    def call(x: Tensor, c: Tensor) -> Tensor:
        low = extractor.attribute(x, target=c, relu_attributions=True)
        return _stretched(low.detach().squeeze(1), x)

    yield call


def _stretched(low: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(low[:, None], x.shape[-2:], mode="bilinear").squeeze(1)


OPENERS: dict[str, Callable[[Subject, str, str], AbstractContextManager[Call]]] = {
    **dict.fromkeys(ENGINES, _aft),
    GRAD_CAM: _pytorch_grad_cam,
    TORCHCAM: _torchcam,
    CAPTUM: _captum,
}


def seconds_of(call: Callable[[], object]) -> float:
    """Measure the seconds of one call, after a pause."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(timed: Mapping[str, Timed], runs: int) -> dict[str, list[float]]:
    """Measure the seconds of each contestant in each run, another one first each time."""
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        timed[name](0)
    for run in range(runs):
        for name in rotated(names, run):
            seconds[name].append(timed[name](run))
    return seconds


def _timed_map(subject: Subject, method: str, count: int, contestant: str) -> Timed:
    def timed(_: int) -> float:
        with OPENERS[contestant](subject, contestant, method) as call:
            return seconds_of(lambda: call(subject.x[:count], subject.c[:count]))

    return timed


def cams(model: str, data: str, runs: int) -> dict[str, Any]:
    """Measure the seconds of every CAM that takes few passes, and how far the maps agree."""
    subject = Subject(model, data, max(SHAPES.values()))
    times: dict[str, dict[str, Any]] = {group: {} for group in SHAPES}
    for group, count in SHAPES.items():
        for method in QUICK:
            timed = {name: _timed_map(subject, method, count, name) for name in contestants(method)}
            times[group][method] = take_turns(timed, runs if count == 1 else min(runs, BATCH_RUNS))
    agreement = {method: _agreement(subject, method) for method in QUICK}
    return {"times": times, "agreement": agreement}


def _agreement(subject: Subject, method: str) -> dict[str, list[float]]:
    maps = {}
    for name in contestants(method):
        with OPENERS[name](subject, name, method) as call:
            maps[name] = call(subject.x, subject.c)
    own, *others = maps
    return {name: correlations(maps[own], maps[name]) for name in others}


def correlations(one: Tensor, two: Tensor) -> list[float]:
    """Return the correlation of each pair of maps, shape (N, H, W), but for constant maps."""
    rows = (torch.stack(pair).flatten(1) for pair in zip(one, two, strict=True))
    return [float(torch.corrcoef(row)[0, 1]) for row in rows if bool((row.std(1) > 0).all())]


@torch.no_grad()
def best_batch(model: str, data: str) -> dict[str, Any]:
    """Return the batch size in which the uncut network passes most images a second."""
    subject = Subject(model, data, 1)
    speed = {}
    for size in (16, 32, 64):
        x = subject.x.repeat(size, 1, 1, 1)
        subject.whole(x)
        speed[size] = size / min(seconds_of(lambda x=x: subject.whole(x)) for _ in range(2))
    return {"batch": max(speed, key=lambda size: speed[size])}


def once(
    model: str, data: str, contestant: str, method: str, count: int, batch: int, runs: int
) -> dict[str, Any]:
    """Measure the seconds of a call by one contestant alone; one call where that takes long."""
    subject = Subject(model, data, count, batch)
    with OPENERS[contestant](subject, contestant, method) as call:
        if method not in QUICK:  # else the call itself is the best way of warming up
            network = subject.ours(contestant) if contestant in ENGINES else subject.whole
            with torch.no_grad():
                network(subject.x[:1].repeat(batch, 1, 1, 1))
        maps: list[Tensor] = []
        again = partial(seconds_of, lambda: maps.append(call(subject.x, subject.c)))
        seconds = [again()]
        if seconds[0] < QUICK_CALL and runs > 1:
            seconds = [again() for _ in range(runs)]
    pooled = F.adaptive_avg_pool2d(maps[0][:1], POOLED).flatten().tolist()
    return {"seconds": seconds, "map": pooled}


@torch.no_grad()
def serial_search(network: nn.Module, x: Tensor, attribution: Tensor, c: Tensor) -> list[float]:
    """Return the RPI of each threshold by Algorithm 1 as a loop over single masked images."""
    y = network(x).softmax(1)[0, c]
    rpi = []
    for tau in THRESHOLDS:
        muted = torch.where(attribution >= tau, attribution, 0)
        y_hat = network(x * (muted != 0)).softmax(1)[0, c]
        rpi.append(float((y_hat - y).clamp(min=0) / y))
    return rpi


def _map_and_search(subject: Subject, contestant: str) -> Callable[[int], object]:
    x, c = subject.x.split(1), subject.c.split(1)
    if contestant != LOOP:
        f, settings = subject.ours(contestant), Search()
        return lambda i: explain(f, x[i], ["gradcam"], c[i].tolist(), settings=settings)

    def loop(i: int) -> list[float]:
        with _pytorch_grad_cam(subject, GRAD_CAM, "gradcam") as call:
            attribution = call(x[i], c[i])
        return serial_search(subject.whole, x[i], attribution, c[i])

    return loop


def _search(subject: Subject, contestant: str, maps: Sequence[Tensor]) -> Callable[[int], Any]:
    x, c = subject.x.split(1), subject.c.split(1)
    if contestant == LOOP:
        return lambda i: serial_search(subject.whole, x[i], maps[i], c[i])
    f = subject.ours(contestant)
    return lambda i: fine_tune_threshold(f, x[i], maps[i], c[i])


def tft(model: str, data: str, runs: int, images: int) -> dict[str, Any]:
    """Measure the seconds of TFT of one image, images in turn, and count the same tau*."""
    subject = Subject(model, data, images)
    pairs = zip(subject.x.split(1), subject.c.split(1), strict=True)
    maps = [attribution_map(subject.f, *pair, "gradcam") for pair in pairs]
    names = [*ENGINES, LOOP]
    calls = {
        "search": {name: _search(subject, name, maps) for name in names},
        "map and search": {name: _map_and_search(subject, name) for name in names},
    }

    def timed(call: Callable[[int], object]) -> Timed:
        return lambda run: seconds_of(lambda: call(run % images))

    times = {
        group: {"gradcam": take_turns({n: timed(call) for n, call in parts.items()}, runs)}
        for group, parts in calls.items()
    }
    search = calls["search"]
    same = {name: _same_tau(search[name], search[LOOP], images) for name in ENGINES}
    return {"times": times, "same tau": same, "images": images}


def _same_tau(ours: Callable[[int], Any], loop: Callable[[int], Any], images: int) -> int:
    """Count the images with the same tau*; the others must be ties but for rounding."""
    same = 0
    for i in range(images):
        step, rpi = int(ours(i).rpi.argmax()), loop(i)
        assert max(rpi) - rpi[step] < NEAR, (i, step, rpi)
        same += rpi.index(max(rpi)) == step
    return same


def tft_once(model: str, data: str, contestant: str) -> dict[str, Any]:
    """Run one map and search by one contestant alone, for its memory."""
    subject = Subject(model, data, 1)
    _map_and_search(subject, contestant)(0)
    return {}


def masks_ours(model: str, data: str, limit: int, contestant: str) -> dict[str, Any]:
    """Measure the seconds of gen-masks, and of its floor: the passes alone, at their best."""
    from aftcli.cli.process import keep_freed_memory
    from benchmarks.speed.gen_masks import best_forward, measure

    keep_freed_memory()  # as the command does; the floor gains from it as well
    f = accelerated(load(model), ENGINES[contestant])
    data_set = open_data_set(Path(data), None, f.classes).limited(limit)
    measure(f, data_set.limited(8), 1)
    before = best_forward(f, 2)
    seconds, passes = measure(f, data_set, 1)
    forward = (before[0] + best_forward(f, 2)[0]) / 2  # the machine's speed drifts
    return {"seconds": seconds, "floor": passes * forward * limit, "passes": passes}


def masks_loop(model: str, data: str, limit: int) -> dict[str, Any]:
    """Measure a plain loop over batches: decode, Grad-CAM, all masked images, argmax."""
    f = load(model)
    whole = whole_network(model, f)
    layer, to_x = whole.get_submodule(LAYERS[model]), _transform(f.preprocessing)
    paths = image_paths(f, data, limit)
    batches = [paths[i : i + BATCH] for i in range(0, limit, BATCH)]
    library = importlib.import_module("pytorch_grad_cam")

    def tune(batch: list[Path]) -> Tensor:
        x = torch.stack([to_x(Image.open(path).convert("RGB")) for path in batch])
        with library.GradCAM(whole, [layer]) as cam:
            attribution = torch.from_numpy(cam(input_tensor=x, targets=None))
            y, c = cam.outputs.detach().softmax(1).max(1)
        return _tau_of_batch(whole, x, attribution, y, c)

    tune(batches[0])
    return {"seconds": seconds_of(lambda: [tune(batch) for batch in batches])}


@torch.no_grad()
def _tau_of_batch(whole: nn.Module, x: Tensor, attribution: Tensor, y: Tensor, c: Tensor) -> Tensor:
    taus = torch.tensor(THRESHOLDS)
    kept = (attribution[:, None] >= taus[:, None, None]) & (attribution[:, None] != 0)
    x_hat = (x[:, None] * kept[:, :, None]).flatten(0, 1)
    y_hat = torch.cat([whole(part) for part in x_hat.split(BATCH)]).softmax(1)
    y_hat = y_hat.view(len(x), len(taus), -1)[torch.arange(len(x)), :, c]
    return taus[((y_hat - y[:, None]).clamp(min=0) / y[:, None]).argmax(1)]


def _transform(p: Preprocessing) -> Callable[[Image.Image], Tensor]:
    t = torchvision.transforms
    mode = t.InterpolationMode(p.interpolation)
    steps = [t.Resize(p.resize, mode), t.CenterCrop(p.size), t.ToTensor()]
    return t.Compose([*steps, t.Normalize(p.mean, p.std)])


PARTS = (cams, best_batch, once, tft, tft_once, masks_ours, masks_loop)


if __name__ == "__main__":
    by_name: dict[str, Callable[..., dict[str, Any]]] = {part.__name__: part for part in PARTS}
    print(json.dumps(by_name[sys.argv[1]](**json.loads(sys.argv[2]))))
