"""What makes fine-tuning improve maps: one recipe changed at a time, measured on held-out images.

    aft gen-masks DATA --cam gradcam --run few
    aft gen-masks DATA --cam gradcam --run few-soft --masking soft --limit 1000
    python benchmarks/aft_study.py few few-soft --base few --out study/few.jsonl
    python benchmarks/aft_study_page.py study > docs/aft-study.md

Every row tunes a classifier from the same start on the same training images, and measures it on
other training images: a fifth of them, which no training sees. The val split is not read. A row
that is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fast_stem import use_fast_stem
from torch import Tensor, nn

from aftcli.aft.features import stem_output
from aftcli.aft.jobs import mask_job
from aftcli.aft.loss import Batch, Recipe
from aftcli.aft.recipes import SITUATIONS
from aftcli.aft.tail import earlier_layers
from aftcli.aft.training import Training, choose_held_out
from aftcli.cli.process import keep_freed_memory
from aftcli.core.cam import attribution_map, upsample
from aftcli.core.classifier import Classifier
from aftcli.data.images import read_image, to_input
from aftcli.data.objects import Regions
from aftcli.data.sets import spread
from aftcli.evaluation import metrics
from aftcli.evaluation.batch import Images, Unit, Wanted, measure, measure_batch
from aftcli.tft.hdf5 import join_float
from aftcli.tft.masks import MaskStore
from aftcli.tft.stores import Source
from aftcli.tft.threshold import MASKINGS, mask_of, threshold_map

HELD_OUT = 0.2  # of the training images, for measuring rows
PAPER = {"objective": "tuner", "consistency": 0.0, "classification": "labels"}


class Row(NamedTuple):
    """A recipe: settings that differ from the base, and which data it is given.

    Attributes:
        group: the question that it belongs to.
        name: of the row.
        settings: fields of Recipe.
        data: how the data differ: see `Data.examples`.
    """

    group: str
    name: str
    settings: dict[str, Any]
    data: dict[str, Any] = {}


def rows() -> list[Row]:
    """All rows."""
    plain = {**PAPER, "lam": 1.0}
    found = [
        Row("parts", "control: no masks", {**PAPER, "lam": None}),
        Row("parts", "eq. 8 as printed, lambda 1", plain),
        Row("parts", "distillation alone", {**PAPER, "lam": 0.0, "classification": "distillation"}),
        Row("parts", "CAM objective alone", {"objective": "cam", "consistency": 0.0}),
        Row("parts", "consistency alone", {"lam": 0.0, "objective": "tuner"}),
        Row("parts", "CAM objective + consistency", {"objective": "cam"}),
        Row("parts", "the default", {}),
        Row("cause", "masks of other images", {}, {"masks": "others"}),
        Row("cause", "the whole image shown in place of what the mask keeps", {}, {"shown": "all"}),
        Row("cause", "tau* = 0: the map without a search", {}, {"tau": 0.0}),
        Row("masks", "from soft TFT", {}, {"store": "soft"}),
        Row("masks", "consistency on the binary x_hat", {}, {"shown": "binary"}),
        Row("masks", "only images with RPI > 0", {}, {"rpi": True}),
        Row("layers", "w1 only", {"trained": "w1"}),
        Row("layers", "the block before as well", {}, {"earlier": True}),
        Row("layers", "the block before as well, eq. 8", plain, {"earlier": True}),
        Row("classification", "labels", {"classification": "labels"}),
        Row("classification", "distillation", {"classification": "distillation"}),
        Row("tuner", "eq. 8, linear tuner", plain),
        Row("tuner", "eq. 8, ReLU in the tuner", {**plain, "tuner": "relu"}),
    ]
    found += [Row("eq. 8: lambda", f"{v:g}", {**plain, "lam": v}) for v in (0.0, 0.01, 0.1, 1, 10)]
    found += [Row("lambda", f"{v:g}", {"lam": v}) for v in (0.0, 0.03, 0.1, 0.3, 1.0)]
    found += [Row("consistency", f"{v:g}", {"consistency": v}) for v in (0.0, 0.25, 1.0, 4.0, 16.0)]
    found += [Row("blend", f"{v:g}", {"blend": v}) for v in (0.25, 0.5, 0.75, 1.0)]
    found += [Row("learning rate", f"{v:g}", {"learning_rate": v}) for v in (1e-4, 3e-4, 1e-3)]
    found += [
        Row("optimizer", "adam", {}),
        Row("optimizer", "adamw", {"optimizer": "adamw"}),
        Row("optimizer", "sgd", {"optimizer": "sgd", "learning_rate": 3e-3}),
    ]
    found += [Row("epochs", str(v), {"epochs": v, "patience": 0}) for v in (1, 2, 4, 8, 16)]
    found += [Row("n_AFT", str(v), {}, {"images": v}) for v in (50, 100, 200, 400, 800)]
    found += [
        Row("|T|", str(len(v)), {}, {"thresholds": v})
        for v in (
            (0.0,),
            (0.0, 0.5),
            (0.0, 0.3, 0.6, 0.9),
            (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        )
    ]
    found.append(Row("|T|", "11", {}))
    return found


class Kept:
    """Training pairs out of memory: `aftcli.aft.training.Examples`."""

    def __init__(self, names, labels, features, masks, class_index, masked) -> None:  # noqa: ANN001
        self.names, self.labels, self.features = names, labels, features
        self.masks, self.class_index, self.masked = masks, class_index, masked
        self.usable: Sequence[int] = range(len(names))

    def at(self, rows: Tensor) -> Kept:
        """Those of some images."""
        return Kept(
            [self.names[i] for i in rows],
            self.labels[rows],
            tuple(t[rows] for t in self.features),
            [mask[rows] for mask in self.masks],
            self.class_index[rows],
            tuple(t[rows] for t in self.masked),
        )

    def batches(self, wanted: Sequence[Sequence[int]], epoch: int | None) -> Iterator[Batch]:
        """See `Examples`."""
        for indices in wanted:
            rows = torch.tensor(list(indices))
            yield Batch(
                tuple(t[rows] for t in self.features),
                self.labels[rows],
                tuple(mask[rows] for mask in self.masks),
                self.class_index[rows],
                tuple(t[rows] for t in self.masked),
            )


class Data:
    """The training images of a run, their masks, and what the stem makes of them."""

    def __init__(self, run: Path, soft: Path | None, layer: str) -> None:
        store = MaskStore(next((run / "masks").glob("*-gradcam.h5")))
        self.f = use_fast_stem(Source().of_masks(store.settings).load())
        job = mask_job(store, self.f)
        kept = {"binary": _columns(store)}
        samples, root = list(job.data_set.samples), job.data_set.root
        if soft:
            other = MaskStore(next((soft / "masks").glob("*-gradcam.h5")))
            place = {sample.name: i for i, sample in enumerate(samples)}
            samples = list(mask_job(other, self.f).data_set.samples)
            rows = torch.tensor([place[sample.name] for sample in samples])
            kept["binary"] = {k: v[rows] for k, v in kept["binary"].items()}
            kept["soft"] = _columns(other)
        self.kept, self.thresholds = kept, torch.tensor(store.settings["thresholds"])
        self.names = [sample.name for sample in samples]
        self.labels = torch.tensor([sample.label for sample in samples])
        self.train, self.measured = choose_held_out(self.names, self.labels.tolist(), HELD_OUT, 0)
        paths = (root / name for name in self.names)
        x = [to_input(read_image(path), self.f.preprocessing).half() for path in paths]
        self.x = torch.cat(x)
        self.earlier = earlier_layers(self.f, [layer])
        self.outputs: dict[str, tuple[Tensor, ...]] = {}

    def behind(
        self, stem: nn.Module, key: str, weight: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """What a stem makes of all images times a weight at the map's size, made once a key."""
        if key not in self.outputs:
            parts = []
            for i in torch.arange(len(self.x)).split(32):
                x = self.x[i].float()
                x_hat = x if weight is None else x * weight(i, x)[:, None]
                parts.append(stem_output(stem, x_hat))
            self.outputs[key] = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return self.outputs[key]

    def examples(
        self,
        seed: int,
        store: str = "binary",
        masks: str = "own",
        shown: str = "soft",
        tau: float | None = None,
        rpi: bool = False,
        earlier: bool = False,
        images: int | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> Kept:
        """The images to train on, but for the measured ones.

        Args:
            seed: of what is random.
            store: masks of the binary or of the soft search.
            masks: "own", or those of "others": of other images at random.
            shown: x_hat is I_tau* x ("soft"), M_tau* x ("binary"), or x ("all").
            tau: in place of tau*.
            rpi: only images whose probability some threshold raises.
            earlier: also the block before l.
            images: take so many, spread over the classes.
            thresholds: T, a part of the store's.
        """
        c = self.kept[store]
        rpis = c["rpi"]
        if thresholds is not None:
            places = [int((self.thresholds - t).abs().argmin()) for t in thresholds]
            best = self.thresholds[torch.tensor(places)][rpis[:, places].argmax(1)]
        else:
            best = c["tau"] if tau is None else torch.full_like(c["tau"], tau)
        rows = torch.tensor(self.train)
        if rpi:
            rows = rows[rpis[rows].amax(1) > 0]
        if images is not None:
            rows = rows[torch.tensor(spread(len(rows), images))]
        owner = torch.arange(len(self.names))
        if masks == "others":
            generator = torch.Generator().manual_seed(seed)
            owner = owner[torch.randperm(len(owner), generator=generator)]

        def weight(i: Tensor, x: Tensor) -> Tensor:
            muted = threshold_map(upsample(c["attribution"][owner[i]], x), best[owner[i]])
            return MASKINGS[shown](muted) if shown != "all" else torch.ones_like(muted)

        stem, which = (self.earlier.stem, "earlier") if earlier else (self.f.stem, "")
        kind = f"{which} {store} {masks} {shown} {tau} {thresholds} {seed if masks != 'own' else 0}"
        features = self.behind(stem, which)
        masked = self.behind(stem, kind, weight)
        low = [mask_of(threshold_map(c["attribution"][owner], best[owner]))]
        if earlier:
            size = self.earlier.shapes[0][1:]
            stretched = F.interpolate(
                c["attribution"][owner][:, None], size, mode="bilinear", align_corners=False
            )
            low.insert(0, mask_of(threshold_map(stretched[:, 0], best[owner])))
        return Kept(self.names, self.labels, features, low, c["class_index"], masked).at(rows)

    @torch.no_grad()
    def measure(self, f: Classifier, guards: bool) -> dict[str, list[float]]:
        """One value an image, of the measured images.

        `judged_*` let the start's network look at the images that f's maps mask: an increase
        that f alone sees is no better map. Guards that take many passes are of 50 images.
        """
        found: dict[str, list[float]] = {}
        for place, i in enumerate(torch.tensor(self.measured).split(25)):
            own = ("coherency", "adcc", "insertion", "deletion") if guards and place < 2 else ()
            extras = frozenset({"adcc", "insertion"} if own else ())
            x = self.x[i].float()
            y, c = f(x).softmax(1).max(1)
            shown = attribution_map(f, x, c, "gradcam")
            before, c_before = self.f(x).softmax(1).max(1)
            judged = self.f(x * shown[:, None]).softmax(1)
            judged = judged.gather(1, c_before[:, None])[:, 0]
            units = [Unit("gradcam", "soft"), Unit("gradcam", "binary")]
            batch = Images(x, self.labels[i], i, lambda *_: Regions())
            measured = measure_batch(f, batch, units, Wanted(None, extras))
            columns = {
                "accuracy": (c == self.labels[i]).float(),
                "probability": y,
                "average_increase": measure(measured[units[0]], "original", "average_increase"),
                "average_drop": measure(measured[units[0]], "original", "average_drop"),
                "binary_increase": measure(measured[units[1]], "original", "average_increase"),
                "binary_drop": measure(measured[units[1]], "original", "average_drop"),
                "judged_increase": metrics.increase(judged, before),
                "judged_drop": metrics.drop(judged, before),
                "mean_map": shown.mean((1, 2)),
                "complexity": measure(measured[units[0]], "original", "complexity"),
            }
            for name in own:
                columns[name] = measure(measured[units[0]], "original", name)
            for name, values in columns.items():
                found.setdefault(name, []).extend(values.tolist())
        return found


def _columns(store: MaskStore) -> dict[str, Tensor]:
    kept = store.rows(0, len(store))
    return {
        "attribution": torch.from_numpy(join_float(kept.attribution, kept.correction)),
        "tau": torch.from_numpy(kept.tau),
        "rpi": torch.from_numpy(kept.rpi),
        "class_index": torch.from_numpy(kept.class_index).long(),
    }


def run_row(data: Data, row: Row, base: dict[str, Any], seed: int) -> dict[str, Any]:
    """Tune by a recipe and measure."""
    start = time.monotonic()
    settings = Recipe(**{**base, **row.settings, "seed": seed})
    cam = None if settings.lam is None else "gradcam"
    examples = data.examples(seed, **row.data)
    earlier = data.earlier if row.data.get("earlier") else None
    training = Training(data.f, examples, settings, None, cam, earlier)
    for _ in training.run():
        pass
    training.use_best()
    trained = time.monotonic() - start
    values = data.measure(training.classifier(), seed == 0 and row.group in ("parts", "cause"))
    about = {"seed": seed, "epoch": training.best_epoch, "images": len(examples.names)}
    return {**about, "seconds": round(trained, 1), "values": values}


def main() -> None:
    """Run all rows that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="has masks/MODEL-gradcam.h5")
    parser.add_argument("soft", type=Path, nargs="?", help="has those of --masking soft")
    parser.add_argument("--base", choices=["many", "few"], required=True)
    parser.add_argument("--earlier", default="blocks.6", help="the layer before l")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", nargs="*", help="only these questions")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    base = SITUATIONS[args.base].settings
    data = Data(args.run, args.soft, args.earlier)
    done = set()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.exists():
        found = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(r["key"], r["seed"]) for r in found}
    with args.out.open("a") as file:

        def write(result: dict[str, Any]) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        if ("original", 0) not in done:
            about = {"torch": torch.__version__, "machine": platform.machine(), "base": base}
            about |= {"model": data.f.name, "train": len(data.train), "cores": os.cpu_count()}
            values = data.measure(data.f, True)
            write(
                {
                    "key": "original",
                    "seed": 0,
                    "group": "",
                    "name": "original",
                    "about": about,
                    "values": values,
                }
            )
        for seed in range(args.seeds):
            for row in rows():
                settings = {**base, **row.settings}
                key = json.dumps([settings, row.data], sort_keys=True)
                if (key, seed) in done or (args.groups and row.group not in args.groups):
                    continue
                if "soft" in row.data.values() and not args.soft:
                    continue
                result = run_row(data, row, base, seed)
                done.add((key, seed))
                write({"key": key, "group": row.group, "name": row.name, **result})
                means = {k: sum(v) / len(v) for k, v in result["values"].items()}
                print(
                    seed,
                    row.group,
                    "|",
                    row.name,
                    {k: round(v, 3) for k, v in means.items()},
                    result["seconds"],
                    flush=True,
                )


if __name__ == "__main__":
    main()
