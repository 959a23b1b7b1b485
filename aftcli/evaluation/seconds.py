"""Seconds a map, without and with TFT (Table 5)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aftcli.attributions.maps import attribution_map
from aftcli.core.classifier import Classifier
from aftcli.engine.accelerate import Accelerate, as_it_is
from aftcli.evaluation.results import ResultFile
from aftcli.evaluation.sanity import some_of
from aftcli.evaluation.study import Study
from aftcli.files import durable, file_stem, make_folder
from aftcli.models.load import device_name
from aftcli.settings import Search
from aftcli.tft.search import search_threshold
from aftcli.version import __version__

TIMED = 8  # images that take turns

RUNS = 20  # timed, of each

WARM_UP = 2

BUDGET = 20.0  # seconds a method: fewer runs are made of one that takes longer

LEAST = 3  # runs that are timed however long they take


@dataclass(frozen=True)
class Table5Row:
    """Seconds a map of one image: medians of `runs`.

    Attributes:
        without: of a plain map.
        with_tft: of a map and the search of its threshold.
        masking: of the search.
        device: where it was measured.
        runs: how many of each were timed.
    """

    model: str
    cam: str
    without: float
    with_tft: float
    masking: str
    device: str
    runs: int

    @property
    def delta(self) -> float:
        """Seconds that TFT takes."""
        return self.with_tft - self.without

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON holds it."""
        seconds = {"without": self.without, "with": self.with_tft, "delta": self.delta}
        how = {"device": self.device, "masking": self.masking, "runs": self.runs}
        return {"model": self.model, "cam": self.cam, **seconds, **how}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _seconds(run: Callable[[int], object], image: int, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run(image)
    _synchronise(device)
    return time.perf_counter() - start


def time_map(
    f: Classifier, inputs: list[Tensor], cam: str, search: Search, runs: int = RUNS
) -> Table5Row:
    """Time a method on single inputs, shape (1, 3, H, W) each, from the input to the map.

    Plain maps and maps with TFT are timed in turns, so that a machine that slows down slows both.
    """
    classes = [f(x).argmax(1) for x in inputs]

    def plain(i: int) -> Tensor:
        return attribution_map(f, inputs[i], classes[i], cam)

    def with_tft(i: int) -> object:
        return search_threshold(f, inputs[i], plain(i), classes[i], search)

    for i in range(WARM_UP):
        with_tft(i % len(inputs))
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for i in range(runs):
        if i >= LEAST and time.perf_counter() - begun > BUDGET:
            break
        for kept, run in zip(times, (plain, with_tft), strict=True):
            kept.append(_seconds(run, i % len(inputs), f.device))
    medians = [statistics.median(each) for each in times]
    where = (search.masking, device_name(f.device), len(times[0]))
    return Table5Row(f.name, cam, medians[0], medians[1], *where)


def table5(
    study: Study,
    run: Path,
    masking: str,
    overwrite: bool = False,
    accelerate: Accelerate = as_it_is,
) -> Iterator[Table5Row]:
    """Time each method of a study on its first images, or reuse the figures of an earlier call."""
    f, folder = accelerate(study.f, None), make_folder(run / "results")
    search = study.searched(masking)
    inputs: list[Tensor] = []
    for cam in study.cams:
        identity = {
            "table": 5,
            "aft": __version__,
            "torch": torch.__version__,
            "weights": study.variants[0].weights,
            "device": device_name(f.device),
            "engine": f.engine.name if f.engine else "",
            "cam": cam,
            **asdict(search),
        }
        # Only its name is used: figures of other settings are in another file.
        stem = f"{file_stem(f.name, cam)}-seconds"
        path = ResultFile(folder, stem, identity, frozenset()).path.with_suffix(".json")
        row = None if overwrite else _known(path)
        if row is None:
            inputs = inputs or list(some_of(study, TIMED).x.split(1))
            row = time_map(f, inputs, cam, search)
            with durable(path) as temporary:
                temporary.write_text(json.dumps(asdict(row)), encoding="utf-8")
        yield row


def _known(path: Path) -> Table5Row | None:
    try:
        return Table5Row(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
