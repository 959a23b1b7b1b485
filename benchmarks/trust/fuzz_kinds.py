"""Files that the benchmark fuzz damages, and the commands that meet them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from aftcli.models import load as models
from aftcli.networks.sources import imagenet_classes
from tests.helpers import mutants as m

ROOT = Path(__file__).parents[2]
NOT_COMPARED = {"path", "seconds", "images_per_second", "bytes_per_image", "figure", "outputs"}
PHOTOS = {"n02123159": "chelsea", "n07920052": "coffee", "n03773504": "rocket"}
STORE = "run/masks/efficientnet_lite0-gradcam.h5"
TUNED = "run/tuned/efficientnet_lite0-gradcam.safetensors"
STATE = "run/tuned/.efficientnet_lite0-gradcam.state"
FINETUNE = (
    *("finetune", "--run", "run", "--objective", "tuner", "--epochs", "2", "--batch-size", "4"),
    *("--workers", "0", "--quiet"),
)
EVALUATE = ("evaluate", "--run", "run", "--table", "3", "--masking", "binary", "--workers", "0")
# What is in the names of the kinds that need whole runs, which take half a minute to make.
RUNS = "runs --show gen-masks finetune evaluate, store parts state results tuned --checkpoint"
IN_FOLDER = 6  # mutants among good pictures


@dataclass
class Case:
    """Mutants and the command that meets them.

    Attributes:
        arguments: of `aft`, in the folder of the files.
        files: contents, by path below the folder.
        change: what was damaged, separated by commas.
        base: a folder whose files are there too.
        expected: the result if it is one, without what differs between runs; None for any.
    """

    arguments: tuple[str, ...]
    files: dict[str, bytes]
    change: str
    base: Path | None = None
    expected: Any = None

    def lay_out(self, work: Path) -> None:
        """Write all files into a folder."""
        if self.base:
            shutil.copytree(self.base, work, dirs_exist_ok=True)
        for name, content in self.files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)


@dataclass
class Kind:
    """One way to meet mutants.

    Attributes:
        name: of the kind.
        share: of all mutants.
        case: makes a case.
        usual: seconds that the command takes without damage, beyond those of all.
        one_line: an error is one line; of a folder it is one line a mutant.
    """

    name: str
    share: int
    case: Callable[[random.Random], Case]
    usual: float = 0.0
    one_line: bool = field(default=True)


def plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a result without what differs between runs."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in NOT_COMPARED}
    return [plain(v) for v in value] if isinstance(value, list) else value


def forked(work: Callable[[], object]) -> None:
    """Do something in a process of its own: this one must stay without threads."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"a real file could not be made: {work}")


def command(arguments: tuple[str, ...], folder: Path) -> tuple[Any, float]:
    """Return the result of an undamaged command, and its seconds."""
    from aftcli.cli import app as cli

    def run() -> None:
        os.chdir(folder)
        sys.argv = ["aft", *arguments]
        with (folder / "stdout").open("w") as file, contextlib.redirect_stdout(file):
            cli.main()

    start = time.monotonic()
    forked(run)
    out = folder / "stdout"
    text = out.read_text()
    out.unlink()
    return json.loads(text) if text else None, time.monotonic() - start


def loaded_once() -> None:
    """Let commands find the embedded network loaded."""
    real = models.load_classifier
    f = real()
    for parameter in f.parameters():
        parameter.data = parameter.data.clone()

    def load(name=None, checkpoint=None, layer=None, **options):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN003, ANN202
        own = name in (None, f.name) and checkpoint is None and layer in (None, f.layer_name)
        if own and not options.get("classes") and options.get("weights", True):
            return f
        return real(name, checkpoint, layer, **options)

    from aftcli.evaluation import study
    from aftcli.models import source

    for module in (models, source, study):
        module.load_classifier = load  # type: ignore[attr-defined]


def imported() -> None:
    """Import what the commands import, once."""
    import typer._adapters  # noqa: F401

    from aftcli.aft import run as finetune  # noqa: F401
    from aftcli.cli import app as cli  # noqa: F401
    from aftcli.engine import onnx as engine_onnx  # noqa: F401
    from aftcli.masks import generate  # noqa: F401
    from aftcli.pages import evaluated, printed  # noqa: F401
    from aftcli.report import masks as report_masks  # noqa: F401
    from aftcli.report import tuned as report_tuned  # noqa: F401

    Image.init()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        # Draws one figure: the first takes matplotlib a second.
        sys.argv = ["aft", "tft", str(ROOT / "docs/images/rocket.jpg"), "--out", out]
        with contextlib.suppress(SystemExit):
            cli.main()


def make_data(folder: Path) -> None:
    """Make a small data set of ImageNet classes."""
    for name, photo in PHOTOS.items():
        with Image.open(ROOT / f"docs/images/{photo}.jpg") as image:
            small = image.convert("RGB").resize((300, 240))
        for split, count in (("train", 4), ("val", 1)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                cut = 8 * i + (4 if split == "val" else 0)
                part = small.crop((cut, cut, 300 - cut, 240 - cut))
                part.save(folder / split / name / f"{i}.png")


def picture(rng: random.Random, name: str, arguments: tuple[str, ...], original: bytes) -> Case:
    """Return a mutant as what `aft explain` or `aft tft` explains."""
    data, change = m.mutate(original, name, rng)
    kinds = rng.choice(("overlay", "overlay", "map,mask", "overlay,figure"))
    extra = ("--save", kinds, *(("--mute", "40") if arguments[0] == "explain" else ()))
    return Case((*arguments, name, "--json", "--out", "out", *extra), {name: data}, change)


def given_map(rng: random.Random, originals: dict[str, bytes], photo: bytes) -> Case:
    """Return a mutant as the map of `aft tft --map`."""
    name = rng.choice(sorted(originals))
    data, change = m.mutate(originals[name], name, rng)
    arguments = ("tft", "photo.jpg", "--map", name, "--json", "--out", "out", "--save", "map")
    return Case(arguments, {name: data, "photo.jpg": photo}, change)


def in_folder(rng: random.Random, originals: dict[str, bytes], photo: bytes) -> Case:
    """Return mutants among good pictures of a data set."""
    files = {"data/cat/good.jpg": photo, "data/dog/good.jpg": photo}
    changes = []
    for i in range(IN_FOLDER):
        name = rng.choice([n for n in sorted(originals) if n[-4:] not in (".jp2", "avif")])
        data, change = m.mutate(originals[name], name, rng)
        files[f"data/{rng.choice(('cat', 'dog'))}/{i}-{name}"] = data
        changes.append(change)
    arguments = ("gen-masks", "data", "--run", "run", "--thresholds", "0.3", "--workers", "0")
    return Case((*arguments, "--json"), files, ",".join(changes))


def within(
    rng: random.Random, base: Path, names: list[str], arguments: tuple[str, ...], expected: object
) -> Case:
    """Return a case with one file of a run damaged."""
    name = rng.choice(names)
    suffix = ".safetensors" if name.endswith(".state") else Path(name).suffix
    data, change = m.mutate((base / name).read_bytes(), f"x{suffix}", rng)
    return Case((*arguments, "--json"), {name: data}, change, base, expected)


def checkpoint(
    rng: random.Random, name: str, original: bytes, photo: bytes, expected: object
) -> Case:
    """Return a damaged checkpoint."""
    data, change = m.mutate(original, name, rng)
    arguments = ("explain", "photo.jpg", "--checkpoint", name, "--json", "--save", "")
    return Case(arguments, {name: data, "photo.jpg": photo}, change, None, expected)


def class_names(rng: random.Random, original: bytes, photo: bytes) -> Case:
    """Return damaged class names."""
    data, change = m.mutate(original, "names.txt", rng)
    arguments = ("explain", "photo.jpg", "--classes", "names.txt", "--json", "--save", "")
    return Case(arguments, {"names.txt": data, "photo.jpg": photo}, change)


def killed_before(target: str, arguments: tuple[str, ...], folder: Path) -> None:
    """Run a command that dies where it would call `target`."""
    from aftcli.cli import app as cli

    def run() -> None:
        os.chdir(folder)
        sys.argv = ["aft", *arguments]
        with mock.patch(target, side_effect=lambda *_, **__: os._exit(0)):
            cli.main()

    with contextlib.redirect_stdout(None):
        forked(run)


def usual(folder: Path, wanted: set[str]) -> list[Kind]:
    """Return all kinds, or those wanted, with their real files made in a folder."""
    loaded_once()
    imported()
    photo = (ROOT / "docs/images/rocket.jpg").read_bytes()
    pictures = {name: make() for name, make in m.PICTURES.items()}
    maps = {name: make() for name, make in m.MAPS.items()}
    kinds = []
    for name, data in pictures.items():
        kinds.append(Kind(f"explain {name}", 7, partial(_explained, name=name, data=data)))
    kinds.append(Kind("tft --map", 26, partial(given_map, originals=maps, photo=photo)))
    folders = partial(in_folder, originals=pictures, photo=photo)
    kinds.append(Kind("gen-masks FOLDER", 30, folders, 5.0, one_line=False))
    kinds.append(Kind("--classes", 3, partial(class_names, original=_imagenet(), photo=photo)))
    kinds += _state_dicts(photo)
    if not wanted or any(w in RUNS for w in wanted):
        kinds += _runs(folder, photo)
    return [k for k in kinds if not wanted or any(w in k.name for w in wanted)]


def _explained(rng: random.Random, name: str, data: bytes) -> Case:
    return picture(rng, name, rng.choice((("explain",), ("explain",), ("tft",))), data)


def _imagenet() -> bytes:
    return "\n".join(imagenet_classes().names).encode()


def _state_dicts(photo: bytes) -> Iterator[Kind]:
    import timm
    from safetensors.torch import save

    weights = timm.create_model("tf_efficientnet_lite0", num_classes=4).state_dict()
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    for name, data in (("x.safetensors", save(weights)), ("x.pth", buffer.getvalue())):
        case = partial(checkpoint, name=name, original=data, photo=photo, expected=None)
        yield Kind(f"--checkpoint {name}", 4, case, 2.0)


def _runs(folder: Path, photo: bytes) -> Iterator[Kind]:
    """Return the kinds of stores, parts, states and checkpoints of runs."""
    from aftcli.data import blocks

    blocks.BLOCK = 4
    data, made, tuned, cut, torn = (folder / n for n in ("data", "made", "tuned", "cut", "torn"))
    make_data(data)
    for each in (made, cut):
        each.mkdir()
    masks = ("gen-masks", str(data), "--run", "run", "--thresholds", "0.3,0.6", "--workers", "0")
    fresh, generating = command((*masks, "--json"), made)
    shown, _ = command(("gen-masks", "--show", STORE, "--json"), made)
    for each in (tuned, torn):
        shutil.copytree(made, each)
    best, tuning = command((*FINETUNE, "--json"), tuned)
    whole = tuned / "copy"
    shutil.copytree(made, whole)
    table, evaluating = command((*EVALUATE, "--json"), whole)
    explained, _ = command(("explain", str(ROOT / "docs/images/rocket.jpg"), *_SAVED), tuned)
    killed_before("aftcli.masks.generate.join_parts", masks, cut)
    killed_before("aftcli.aft.run.checkpoint_of", FINETUNE, torn)
    parts = [str(p.relative_to(cut)) for p in (cut / "run/masks").glob(".*.parts/*")]
    assert len(parts) == 3 and (torn / STATE).exists()
    results = [
        str(p.relative_to(whole))
        for p in (whole / "run/results").iterdir()
        if p.is_file() and p.stat().st_size
    ]

    def kind(
        name: str,
        share: int,
        base: Path,
        names: list[str],
        arguments: tuple[str, ...],
        expected: object,
        seconds: float,
    ) -> Kind:
        case = partial(
            within, base=base, names=names, arguments=arguments, expected=plain(expected)
        )
        return Kind(name, share, case, seconds)

    yield kind("runs --show STORE", 26, made, [STORE], ("gen-masks", "--show", STORE), shown, 0.0)
    yield kind("runs gen-masks, store", 4, made, [STORE], masks, fresh, generating)
    yield kind("runs gen-masks, parts", 6, cut, parts, masks, fresh, generating)
    yield kind("runs finetune, store", 6, made, [STORE], FINETUNE, best, tuning)
    yield kind("runs finetune, state", 3, torn, [STATE], FINETUNE, best, tuning)
    yield kind("runs finetune, tuned", 3, tuned, [TUNED], FINETUNE, best, tuning)
    yield kind("runs evaluate, store", 3, made, [STORE], EVALUATE, table, evaluating)
    yield kind("runs evaluate, results", 3, whole, results, EVALUATE, table, evaluating)
    original = (tuned / TUNED).read_bytes()
    case = partial(
        checkpoint,
        name="x.safetensors",
        original=original,
        photo=photo,
        expected=[{**plain(explained[0]), "image": "photo.jpg"}],
    )
    yield Kind("tuned --checkpoint", 5, case, 2.0)


_SAVED = ("--checkpoint", TUNED, "--json", "--save", "")


def large(folder: Path, wanted: set[str]) -> list[Kind]:
    """Return pictures of 100 megapixels and decompression bombs, each once."""
    from tests.helpers import bombs

    loaded_once()
    imported()
    kinds = []
    for name, make in {**bombs.LARGE, **bombs.BOMBS}.items():
        if not wanted or any(w in name for w in wanted):
            path = folder / name
            forked(partial(make, path))
            arguments = ("explain", str(path), "--json", "--out", "out")
            if path.suffix in (".npy", ".npz"):
                photo = str(ROOT / "docs/images/rocket.jpg")
                arguments = ("tft", photo, "--map", str(path), "--json", "--out", "out")
            case = Case(arguments, {}, name)
            kinds.append(Kind(name, 1, lambda _, case=case: case, 110.0))  # type: ignore[misc]
    return kinds
