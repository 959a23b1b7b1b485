"""Output of `aft explain` and `aft tft`: pictures and other files, a table, JSON."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.data.images import View
from aftcli.errors import AftError
from aftcli.files import replacing
from aftcli.models.targets import Targeted
from aftcli.report.names import PLAIN, Suffixes
from aftcli.report.terminal import cell, say, stdout_console
from aftcli.settings import Search
from aftcli.tft.explain import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = "turbo"

OPACITY = 0.5

OUTSHINING = 0.001  # share of pixels that colours need not tell apart

PANEL = 448  # pixels, the side of a figure's picture

STRIP = 512  # pixels, rows that are coloured at a time: a large picture is large in memory


class Subject(NamedTuple):
    """The picture that is explained, and the part that the model sees."""

    path: Path
    stem: str
    picture: Image.Image
    view: View


def overlay(picture: Image.Image, view: View, attribution: Tensor, kept: Tensor) -> Image.Image:
    """Lay a map on the picture where the model looked; muted cells show the picture.

    Args:
        picture: RGB, any size.
        view: what of it the model saw.
        attribution: I, shape (H, W), in [0, 1].
        kept: what is not muted, shape (H, W), bool.
    """
    left, top, right, bottom = (round(edge) for edge in view.box(picture.size))
    left, right = max(left, 0), min(max(right, left + 1), picture.width)
    top, bottom = max(top, 0), min(max(bottom, top + 1), picture.height)
    size = (right - left, bottom - top)
    values = (attribution / _end_of_colours(attribution)).clamp(max=1).mul(255).round()
    heat = Image.fromarray(values.to(torch.uint8).numpy()).resize(size, Image.Resampling.BILINEAR)
    heat.putpalette(_palette())
    opacity = Image.fromarray(kept.to(torch.uint8).mul(round(255 * OPACITY)).numpy()).resize(size)
    painted = picture.copy()
    for y in range(0, size[1], STRIP):
        strip = (0, y, size[0], min(y + STRIP, size[1]))
        painted.paste(heat.crop(strip).convert("RGB"), (left, top + y), opacity.crop(strip))
    return painted


def _end_of_colours(attribution: Tensor) -> float:
    """Return 1, or less where few pixels would take most colours, as in maps of gradients."""
    high = float(np.quantile(attribution.numpy(), 1 - OUTSHINING))
    return high if 0 < high < 0.5 else 1.0


def _palette() -> bytes:
    from matplotlib import colormaps

    return bytes((colormaps[COLOURS](np.arange(256))[:, :3] * 255).round().astype(np.uint8))


def seen_part(subject: Subject, shape: tuple[int, ...]) -> tuple[Image.Image, View]:
    """Cut out what the model sees of the picture, at a resolution for the eye."""
    high, wide = shape
    size = (round(PANEL * wide / max(shape)), round(PANEL * high / max(shape)))
    left, top, right, bottom = subject.view.box(subject.picture.size)
    box = (
        max(left, 0),
        max(top, 0),
        min(right, subject.picture.width),
        min(bottom, subject.picture.height),
    )
    seen = subject.picture.resize(size, Image.Resampling.BICUBIC, box=box)
    return seen, View(size, (0, 0, *size))


def cam_title(cam: str) -> str:
    """Return a method's name for people; maps of another tool have one name."""
    return METHODS[cam].title if cam in METHODS else "given map"


def _best(explanation: Explanation) -> float:
    assert explanation.cut
    return float(explanation.cut.probabilities[0, explanation.cut.best])


def draw_rpi(ax: Axes, explanation: Explanation, colour: str = "tab:red") -> None:
    """Draw the RPI curve of an explanation with tau* marked."""
    assert explanation.tft
    rpi = explanation.tft.rpi[0].cpu().numpy()
    tried = ~np.isnan(rpi)
    best = int(explanation.tft.best)
    tau, top = explanation.thresholds[best], rpi[best]
    ax.plot(np.array(explanation.thresholds)[tried], rpi[tried], "o-", markersize=4)
    ax.axvline(tau, color=colour, linestyle="--", linewidth=1)
    ax.plot(tau, top, "o", color=colour, markersize=8)
    ax.set_title(f"RPI {top:.3f} at tau* = {tau:g}", fontsize=10)
    ax.set_xlabel("tau")
    ax.set_ylim(bottom=0, top=None if explanation.tft.helps.item() else 1)


class Report(NamedTuple):
    """An explanation with the files that show it."""

    image: Path
    explanation: Explanation
    outputs: dict[str, Path]


def output_folder(path: Path) -> Path:
    """Make a folder for outputs."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise AftError(
            f"{path}: can't write there ({error.strerror or error}); give another --out"
        ) from error
    return path


def write_outputs(
    f: Classifier,
    subject: Subject,
    explanation: Explanation,
    kinds: Iterable[str],
    out: Path,
    settings: Suffixes = PLAIN,
) -> Report:
    """Write the files that show an explanation.

    Args:
        f: the classifier.
        subject: the picture.
        explanation: of it.
        kinds: keys of OUTPUTS.
        out: the folder.
        settings: what the names say of them.
    """
    if not (math.isfinite(explanation.probability) and explanation.attribution.isfinite().all()):
        raise AftError(
            f"{subject.path}: {f.name} gives NaN or infinite numbers for it; its weights may be "
            "damaged"
        )
    name = class_name(f, explanation)
    slug = _slug(name)
    if [_slug(f.classes.name(i)) for i in range(len(f.classes))].count(slug) > 1:
        slug += f"_{explanation.class_index}"
    cut = explanation.cut
    shown = (cut.attribution[0] if cut else explanation.attribution).cpu()
    files = {}
    for kind in kinds:
        ending, write = OUTPUTS[kind]
        said = settings.uncut if kind == "map" else settings.cut
        path = out / f"{subject.stem}-{slug}-{explanation.cam}{said}-{kind}{ending}"
        try:
            with replacing(path) as temporary:
                write(temporary, subject, explanation, shown, name)
        except OSError as error:
            raise AftError(f"{path}: can't be written ({error.strerror or error})") from error
        files[kind] = path
    return Report(subject.path, explanation, files)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40] or "class"


def class_name(f: Classifier, explanation: Explanation) -> str:
    """Return the name of the class explained."""
    return f.classes.name(explanation.class_index)


def _write_overlay(
    path: Path, subject: Subject, explanation: Explanation, shown: Tensor, name: str
) -> None:
    painted = overlay(subject.picture, subject.view, explanation.attribution.cpu(), shown != 0)
    painted.save(path, format="PNG", compress_level=3)


def _write_map(
    path: Path, subject: Subject, explanation: Explanation, shown: Tensor, name: str
) -> None:
    with path.open("wb") as file:
        np.save(file, explanation.attribution.cpu().numpy().astype(np.float32))


def _write_mask(
    path: Path, subject: Subject, explanation: Explanation, shown: Tensor, name: str
) -> None:
    Image.fromarray((shown != 0).to(torch.uint8).mul(255).numpy()).save(path, format="PNG")


def _write_figure(
    path: Path, subject: Subject, explanation: Explanation, shown: Tensor, name: str
) -> None:
    """Draw the paper's Figure 3 row: image, plain map, TFT map, RPI curve with tau* marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain = explanation.attribution.cpu()
    seen, view = seen_part(subject, plain.shape)
    panels: list[tuple[str, Image.Image]] = [
        (f"{name} {explanation.probability:.3f}", seen),
        (f"{cam_title(explanation.cam)}", overlay(seen, view, plain, plain != 0)),
    ]
    tft = explanation.tft
    if tft:
        title = f"TFT: tau* = {float(tft.tau):g}, p = {_best(explanation):.3f}"
        panels.append((title, overlay(seen, view, plain, shown != 0)))
    elif not torch.equal(shown, plain):
        panels.append(("fixed threshold", overlay(seen, view, plain, shown != 0)))
    count = len(panels) + bool(tft)
    figure = Figure(figsize=(3.1 * count, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for ax, (title, picture) in zip(axes, panels, strict=False):
        ax.imshow(np.asarray(picture))
        ax.set_title(title, fontsize=10, parse_math=False)
        ax.axis("off")
    if tft:
        draw_rpi(axes[-1], explanation)
    figure.savefig(path, format="png")


Writer = Callable[[Path, Subject, Explanation, Tensor, str], None]

OUTPUTS: dict[str, tuple[str, Writer]] = {
    "overlay": (".png", _write_overlay),
    "figure": (".png", _write_figure),
    "map": (".npy", _write_map),
    "mask": (".png", _write_mask),
}


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Print what `as_dict` gives as a table, then the files written."""
    tft = any("tft" in result for result in results)
    fixed = any("fixed" in result for result in results)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("image", "cam", "class"):
        table.add_column(column, overflow="fold")
    zero = ("zero",) if any("zero_level" in result for result in results) else ()
    searched, cut = ("tau*", "RPI") if tft else (), ("masked", "kept") if tft or fixed else ()
    for column in ("prob.", *zero, *searched, *cut):
        table.add_column(column, justify="right")
    sharing = Counter(Path(image).name for image in {result["image"] for result in results})
    for result in results:
        name = Path(result["image"]).name
        image = name if sharing[name] == 1 else result["image"]
        named = f"{result['class_name']} ({result['class_index']})"
        cells = [image, result["cam"], named, f"{result['probability']:.4f}"]
        if "zero_level" in result:
            cells.append(f"{result['zero_level']:g}")
        if found := result.get("tft"):
            best = found["thresholds"].index(found["tau"])
            cells += [f"{found['tau']:g}", f"{found['rpi'][best]:.3f}"]
        if found := result.get("tft") or result.get("fixed"):
            cells += [f"{found['probability']:.4f}", f"{found['area']:.1%}"]
        table.add_row(*map(cell, cells))
    stdout_console(1000).print(table)
    for result in results:
        for path in result["outputs"].values():
            say(f"wrote {path}")
    print(end="", flush=True)


def print_json(results: Sequence[dict[str, Any]]) -> None:
    """Print what `as_dict` gives as JSON, one object per image, method and class."""
    print(json.dumps(results, indent=2), flush=True)


def as_dict(f: Classifier, report: Report, settings: Search) -> dict[str, Any]:
    """Return an explanation as plain values (docs/cli.md)."""
    e = report.explanation
    result: dict[str, Any] = {
        "image": str(report.image),
        "model": f.name,
        "layer": f.layer_name,
        "cam": e.cam,
        "class_index": e.class_index,
        "class_name": class_name(f, e),
        "probability": e.probability,
        "outputs": {kind: str(path) for kind, path in report.outputs.items()},
    }
    if e.cells:
        result["cells"] = True
    if e.zero_level:
        result["zero_level"] = e.zero_level
    if isinstance(f, Targeted):
        result["target"] = f.classes.name(0)
    if e.smooth != "none":
        result["smooth"] = e.smooth
    if e.layers:
        result |= {"layers": list(e.layers), "fuse": e.fuse}
    if e.tft:
        result["tft"] = {
            "thresholds": list(e.thresholds),
            "probabilities": _plain_list(e.tft.probabilities[0]),
            "rpi": _plain_list(e.tft.rpi[0]),
            "tau": e.thresholds[int(e.tft.best)],
            "probability": _best(e),
            "area": float(e.tft.mask.float().mean()),
            "masking": settings.masking,
            "fill": settings.fill,
            "threshold_mode": settings.mode,
            "search": settings.search,
        }
    if e.fixed:
        result["fixed"] = {
            "threshold": e.thresholds[0],
            "probability": _best(e),
            "area": float(e.fixed.mask.float().mean()),
            "masking": settings.masking,
            "fill": settings.fill,
            "threshold_mode": settings.mode,
        }
    return result


def _plain_list(values: Tensor) -> list[float | None]:
    """List values for JSON, without NaN (thresholds not tried) and infinity (RPI where y^c = 0)."""
    finite = values.clamp(max=torch.finfo(values.dtype).max)
    return [None if math.isnan(value) else value for value in finite.tolist()]
