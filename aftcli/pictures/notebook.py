"""Explanations that carry their picture: from Python, and as notebooks show them."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from aftcli.attributions.maps import Layers, cuts, takes_target
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS, spelled
from aftcli.data.images import View, read_image, to_input, to_rgb, view_of
from aftcli.errors import AftError, check_name, first_line
from aftcli.models.targets import Target, Targeted, with_target
from aftcli.pictures import figure as figures
from aftcli.pictures import grid as grids
from aftcli.pictures.colours import LOOK, Look
from aftcli.pictures.overlay import Subject, shaded
from aftcli.settings import COLORMAPS, RANGES, SOFTMAX, Search, Shaping
from aftcli.tft import explain as explaining
from aftcli.tft.explain import Explanation
from aftcli.tft.judges import Judge
from aftcli.tft.result import MOST_SHOWN, html_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = Tensor | str | PathLike[str] | Image.Image

SMALLEST = 224  # pixels, the larger side of a picture made of an input

LARGEST = 640  # pixels, the larger side of a picture in a notebook


@dataclass(frozen=True, repr=False)
class Pictured(Explanation):
    """An explanation with its picture; a notebook shows both.

    Attributes:
        subject: the picture; None of an input that is no picture, such as a video.
        classes: of the network.
        is_score: a target is explained.
        model: the network's name.
        output: how the network's logits become probabilities.
    """

    subject: Subject | None = None
    classes: Classes = Classes(())
    is_score: bool = False
    model: str = ""
    output: str = SOFTMAX

    def shown(self, look: Look = LOOK) -> figures.Shown:
        """Return what pictures say of it.

        Raises:
            AftError: there is no picture.
        """
        if self.subject is None:
            raise AftError(
                "this explanation has no picture, since its input is none of 1 or 3 channels; "
                "its attribution is the map"
            )
        about = (self.classes, self.is_score, self.subject, self)
        return figures.shown_as(*about, look, self.output)

    def __repr__(self) -> str:
        """Return one line of numbers."""
        nothing = Subject(Path(), "", Image.new("RGB", (1, 1)), View((1, 1), (0, 0, 1, 1)))
        shown = figures.shown_as(self.classes, self.is_score, self.subject or nothing, self)
        return " · ".join([*figures.caption(shown), *shown.notes])

    def _repr_html_(self) -> str:
        """Return the picture under its map, and one line of numbers."""
        line = html.escape(repr(self))
        if self.subject is None:
            return f"<div>{line}</div>"
        shown = self.shown()
        picture = shown.subject.picture.copy()
        picture.thumbnail((LARGEST, LARGEST))
        attribution, look = shown.painted if shown.kept is None else (shown.plain, shown.look)
        painted = shaded(picture, shown.subject.view, attribution, shown.kept, look)
        return f"<div>{html_image(painted, 'JPEG')}<br>{line}</div>"


class Explanations(list[Pictured]):
    """A list of explanations, which a notebook shows side by side."""

    def _repr_html_(self) -> str:
        """Return the first explanations; the rest is counted."""
        first = "".join(each._repr_html_() for each in self[:MOST_SHOWN])
        left = len(self) - MOST_SHOWN
        more = f"<div>… and {left} more</div>" if left > 0 else ""
        style = "display: flex; flex-wrap: wrap; gap: 12px"
        return f'<div style="{style}">{first}{more}</div>'


def explain(
    f: Layers,
    x: Picture | Sequence[Picture],
    methods: Sequence[str] | str = (),
    targets: Sequence[int | str] | int | str = (),
    top_k: int = 1,
    settings: Search | None = None,
    cells: bool = False,
    fixed: bool = False,
    zero_level: float = 0.0,
    *,
    smooth: str = "none",
    fuse: str = "max",
    target: Target | None = None,
    contrast: int | str | None = None,
    tft: bool = False,
    judges: Sequence[Judge] = (),
) -> Explanations:
    """Explain pictures by several methods and for several classes.

    Args:
        f: the classifier; several that are cut at different layers of one network give one map,
            and the first gives the probabilities.
        x: a picture: a file's name, an image of Pillow's, or an input, shape (1, C, H, W); or
            several of them.
        methods: one or several of METHODS, a family, or "all" for the CAMs that fit; default the
            checkpoint's, otherwise layercam, or gradcam for a contrast.
        targets: classes to explain, by index or name; default the predicted ones.
        top_k: how many predicted classes.
        settings: search thresholds with these; None for plain maps.
        cells: average maps of pixels over the activation's cells.
        fixed: cut maps at the one threshold of the settings, as other tools do.
        zero_level: subtract this share of the maximum from maps of cells first, in [0, 1).
        smooth: see `attribution_map`.
        fuse: see `attribution_map`.
        target: a score of the network's output, explained in place of classes; a threshold search
            needs scores in [0, 1].
        contrast: a class B, by index or name: maps of y^A - y^B show why each class A explained and
            not B; thresholds are still searched by the probability of A.
        tft: search thresholds, by the default settings where none are given.
        judges: who else a search asks, see `fine_tune_threshold`.

    Returns:
        One explanation for each picture, method and class, picture by picture, method by method.

    Raises:
        AftError: a file is no picture, a class is unknown or contrasted with itself, a method does
            not fit, or see `attribution_map` and `fine_tune_threshold`.
    """
    layers = cuts(f)
    first = layers[0]
    several = isinstance(x, Sequence) and not isinstance(x, str | bytes)
    asked = (
        _methods(layers, target, methods, contrast is not None, smooth),
        _classes(first, targets),
        *(top_k, settings or (Search() if tft else None)),
        Shaping(cells, zero_level, smooth, fuse),
    )
    against = first.classes.index(contrast) if isinstance(contrast, str) else contrast
    score = target is not None or isinstance(first, Targeted)
    classes = first.classes if target is None else with_target(first, target).classes
    found = Explanations()
    for each in x if several else (x,):  # type: ignore[union-attr]
        of_picture, subject = _read(first, each)  # type: ignore[arg-type]
        explained = explaining.explain(
            f,
            of_picture,
            *asked,
            fixed=fixed,
            target=target,
            contrast=against,
            judges=judges,
        )
        of = partial(Pictured, subject=subject, classes=classes, is_score=score)
        of = partial(of, model=first.name, output=first.output)
        found += (of(**vars(e)) for e in explained)
    return found


def _methods(
    layers: Sequence[Classifier],
    target: Target | None,
    words: Sequence[str] | str,
    is_contrast: bool,
    smooth: str,
) -> list[str]:
    """Return the methods that words stand for; words for several leave out what does not fit."""
    if target is not None:
        layers = [with_target(each, target) for each in layers]
    asked = spelled([words] if isinstance(words, str) else words)
    default = "gradcam" if is_contrast else "layercam"
    found, _ = explaining.choose_methods(layers, asked, default, smooth)
    if not is_contrast:
        return found
    # By its own name a method must fit.
    kept = [name for name in found if takes_target(name) or name in asked or not asked]
    if not kept:
        raise AftError(
            f"no method of {', '.join(asked)} can explain a difference of classes; take one of "
            f"{', '.join(filter(takes_target, METHODS))}"
        )
    return kept


def _classes(f: Classifier, targets: Sequence[int | str] | int | str) -> Sequence[int] | int:
    if isinstance(targets, str):
        return f.classes.index(targets)
    if isinstance(targets, int) or getattr(targets, "ndim", 1) == 0:
        return targets  # type: ignore[return-value]
    return [f.classes.index(t) if isinstance(t, str) else t for t in targets]


def _read(f: Classifier, given: Picture) -> tuple[Tensor, Subject | None]:
    """Make the input of a picture, or the picture of an input."""
    if isinstance(given, Tensor):
        return given, _subject(given, f.preprocessing)
    if isinstance(given, Image.Image):
        path = Path(getattr(given, "filename", "") or "picture")
        try:
            picture = to_rgb(given)
        except (OSError, ValueError) as error:  # Pillow reads the pixels only now, if it is open
            raise AftError(f"{path}: can't be read as a picture ({first_line(error)})") from error
    elif isinstance(given, str | PathLike):
        path = Path(given)
        picture = read_image(path)
    else:
        raise AftError(
            f"x is a {type(given).__name__}; give a file's name, an image of Pillow's, or an "
            "input, a tensor of shape (1, C, H, W)"
        )
    if 0 in picture.size:
        raise AftError(f"{path}: has no pixels ({picture.width} x {picture.height})")
    view = view_of(picture.size, f.preprocessing)
    x = to_input(picture, f.preprocessing).to(next(f.parameters()))
    return x, Subject(path, path.stem, picture, view)


def _subject(x: Tensor, preprocessing: Preprocessing) -> Subject | None:
    """Return the picture of an input x, shape (1, C, H, W); None where it is none."""
    if x.dim() != 4 or len(x) != 1 or x.shape[1] not in (1, 3):
        return None
    if x.shape[1] != len(preprocessing.mean):
        return None
    pixels = x[0].detach().float().cpu()
    mean, std = preprocessing.channels(pixels)
    values = (pixels * std + mean).nan_to_num().clamp(0, 1).mul(255).round().byte()
    picture = Image.fromarray(values.permute(1, 2, 0).expand(-1, -1, 3).numpy())
    scale = max(1, -(-SMALLEST // max(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    return Subject(Path("input"), "input", picture, View(size, (0, 0, *size)))


def overlay(
    explanation: Pictured | Sequence[Pictured],
    colormap: str = LOOK.colormap,
    alpha: float = LOOK.alpha,
) -> Image.Image:
    """Return the picture under its map, with a caption.

    Args:
        explanation: one, or a list of one, from `explain`.
        colormap: of COLORMAPS; maps with signs have colours of their own.
        alpha: opacity of the colours, in [0, 1].

    Raises:
        AftError: there are several explanations, or there is no picture.
    """
    return figures.overlaid(_one(explanation).shown(_look(colormap, alpha)))


def figure(
    explanation: Pictured | Sequence[Pictured],
    colormap: str = LOOK.colormap,
    alpha: float = LOOK.alpha,
) -> Figure:
    """Return a figure of the picture, the plain map, the cut map and the search of thresholds.

    Arguments and errors are those of `overlay`.
    """
    return _placed(figures.figure(_one(explanation).shown(_look(colormap, alpha))))


def grid(
    explanations: Pictured | Sequence[Pictured],
    colormap: str = LOOK.colormap,
    alpha: float = LOOK.alpha,
) -> Figure:
    """Return a figure of several explanations: plain maps above cut ones.

    A column is a method of a network, a row a picture or one of its classes.

    Args:
        explanations: their order is that of columns and rows; or a single one.
        colormap: see `overlay`.
        alpha: see `overlay`.

    Raises:
        AftError: there is none or there are more than fit, or one has no picture.
    """
    look = _look(colormap, alpha)
    explanations = [explanations] if isinstance(explanations, Pictured) else explanations
    if not 0 < len(_all_pictured(explanations)) <= grids.MOST:
        raise AftError(f"a grid shows 1 to {grids.MOST} explanations, got {len(explanations)}")
    columns = list(dict.fromkeys((each.model, each.cam) for each in explanations))
    several = len({model for model, _ in columns}) > 1
    pictures: dict[tuple[Path, int], list[dict[tuple[str, str], grids.Tile]]] = {}
    for each in explanations:
        shown = each.shown(look)
        path, _, picture, _ = shown.subject
        rows = pictures.setdefault((path, hash(picture.tobytes())), [])
        column = (each.model, each.cam)
        if all(column in row for row in rows):
            rows.append({})
        free = next(row for row in rows if column not in row)
        free[column] = grids.tile(shown, each.model if several else "")
    table = [
        grids.Row(path.name if len(pictures) > 1 else "", [row.get(c) for c in columns])
        for (path, _), rows in pictures.items()
        for row in rows
    ]
    return _placed(grids.drawn(table))


def _one(given: Pictured | Sequence[Pictured]) -> Pictured:
    found = _all_pictured([given] if isinstance(given, Explanation) else given)
    if len(found) != 1:
        raise AftError(
            f"one explanation can be drawn, got {len(found)}; take one of the list, or aftcli.grid"
        )
    return found[0]


def _all_pictured(given: Sequence[object]) -> Sequence[Pictured]:
    for each in given:
        if not isinstance(each, Pictured):
            raise AftError(
                f"{type(each).__name__} does not know its picture; take what aftcli.explain returns"
            )
    return given  # type: ignore[return-value]


def _look(colormap: str, alpha: float) -> Look:
    check_name("colormap", colormap, COLORMAPS)
    RANGES["alpha"].check(alpha)
    return Look(colormap, alpha)


def _placed(drawn: Figure) -> Figure:
    """Place pictures relative to the figure, so that they move and scale with its letters.

    They lie pixel for pixel at the figure's own resolution only; notebooks cut figures, and users
    save them at others.
    """
    from matplotlib.image import BboxImage, FigureImage
    from matplotlib.transforms import Bbox, TransformedBbox

    width, height = drawn.get_size_inches() * drawn.dpi
    for i, image in enumerate(drawn.images):
        if isinstance(image, FigureImage):
            pixels = np.asarray(image.get_array())
            rows, columns = pixels.shape[:2]
            box = Bbox.from_bounds(
                image.ox / width, image.oy / height, columns / width, rows / height
            )
            at = TransformedBbox(box, drawn.transSubfigure)
            placed = BboxImage(at, interpolation="antialiased", origin="lower")
            placed.set_data(pixels)
            placed.set_figure(drawn)
            drawn.images[i] = placed
    # Notebooks show figures by themselves only after they have imported pyplot.
    drawn._repr_png_ = partial(_png, drawn)  # type: ignore[attr-defined]
    return drawn


def _png(drawn: Figure) -> bytes:
    held = io.BytesIO()
    drawn.savefig(held, format="png")
    return held.getvalue()
