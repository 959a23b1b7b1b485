"""Pictures of an evaluation: Figure 3, the distribution of tau*, RPI curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from aftcli.core.classifier import Classifier
from aftcli.data.images import read_image, to_input, view_of
from aftcli.data.parts import spread
from aftcli.errors import AftError, nearest
from aftcli.evaluation.run import Measured
from aftcli.evaluation.study import Study
from aftcli.files import durable, file_stem, make_folder
from aftcli.measures.values import Unit
from aftcli.pictures.figure import best, cam_title, draw_curve, number
from aftcli.pictures.overlay import Subject, seen_part, shaded
from aftcli.report.names import stems
from aftcli.settings import Shaping
from aftcli.tft.explain import Explanation, explain
from aftcli.tft.threshold import relative_probability_increase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CHOSEN = 3  # images of Figure 3 that are taken where none is named


class Picture(NamedTuple):
    """A picture and what it shows."""

    path: Path
    caption: str


def draw_all(
    measured: Sequence[Measured], folder: Path, images: list[str], maskings: Sequence[str]
) -> list[Picture]:
    """Draw all figures of the studies that were evaluated."""
    make_folder(folder)
    made = []
    for each in measured:
        study = each.study
        chosen = _chosen(study, images)
        made += list(_figure3(study, chosen, folder, maskings[0]))
        for what, draw, caption in (
            ("tau", _draw_taus, "How often each threshold is tau*"),
            ("rpi", _draw_curves, "RPI over tau: mean over images, with its standard error"),
        ):
            path = folder / f"{file_stem(study.f.name, study.data_name)}-{what}.png"
            figure = _new_figure(len(maskings), 1)
            axes = figure.subplots(1, len(maskings), squeeze=False)[0]
            for ax, masking in zip(axes, maskings, strict=True):
                draw(ax, each, masking)
            _save(figure, path)
            made.append(Picture(path, f"{caption} ({study.f.name}, {study.data_name})"))
    return made


def check_images(studies: Iterable[Study], names: Sequence[str]) -> None:
    """Check the images of Figure 3 before hours of work: each is in a data set and can be read.

    Args:
        studies: to be evaluated.
        names: parts of the images' names.

    Raises:
        AftError: an image is not there, or can't be read.
    """
    for study in studies:
        for i in _chosen(study, names) if names else ():
            read_image(study.data_set.picture(i))


def _chosen(study: Study, names: Sequence[str]) -> list[int]:
    """Find the places of the images of Figure 3 in a study's data set."""
    samples = study.data_set.samples
    if not names:
        return spread(len(samples), CHOSEN)
    found = []
    for name in names:
        fitting = [i for i, sample in enumerate(samples) if name in sample.name]
        if not fitting:
            known = nearest(name, [Path(sample.name).name for sample in samples])
            raise AftError(
                f"--image {name}: no image of {study.data_set.root} has this in its name; "
                f"nearest: {known}"
            )
        found.append(fitting[0])
    return found


def _figure3(study: Study, chosen: list[int], folder: Path, masking: str) -> Iterator[Picture]:
    """Draw one picture an image, with a row a method."""
    pictures = [study.data_set.picture(i) for i in chosen]
    paths = [Path(picture.name) for picture in pictures]
    names = stems(paths)
    tuned = {v.cams[0]: v.load() for v in study.variants if v.name == "aft"}
    search, shaping = study.searched(masking), Shaping(study.cells)
    for place, path, stored in zip(chosen, paths, pictures, strict=True):
        picture = read_image(stored)
        view = view_of(picture.size, study.f.preprocessing)
        subject = Subject(path, names[path], picture, view)
        across = 5 if tuned else 4
        figure = _new_figure(across, len(study.cams))
        grid = figure.subplots(len(study.cams), across, squeeze=False)
        x = to_input(picture, study.f.preprocessing).to(next(study.f.parameters()))
        label = study.data_set.samples[place].label
        targets = [label] if study.data_set.every else []
        for row, cam in zip(grid, study.cams, strict=True):
            (found,) = explain(study.f, x, [cam], targets, settings=search, shaping=shaping)
            own = None
            if cam in tuned:
                (own,) = explain(tuned[cam], x, [cam], targets, shaping=shaping)
            _draw_row(row, subject, study.f, found, own)
        # A picture of several labels may have several rows.
        stem = "-".join([subject.stem, *map(str, targets)])
        target = folder / f"{file_stem(study.f.name, study.data_name)}-{stem}.png"
        _save(figure, target)
        labelled = study.f.classes.name(label)
        caption = f"Figure 3: {path.name}, labelled {labelled} ({study.f.name}, {masking} masks)"
        yield Picture(target, caption)


def _draw_row(
    row: Sequence[Axes],
    subject: Subject,
    f: Classifier,
    found: Explanation,
    own: Explanation | None,
) -> None:
    """Draw the image, its plain map, TFT's, the tuned network's plain map, the curve."""
    assert found.tft
    attribution = found.attribution.cpu()
    seen, view = seen_part(subject, attribution.shape)
    name = f.classes.name(found.class_index)
    kept = found.tft.mask[0].cpu()
    shown = [
        (f"{name} {number(found.probability)}", seen),
        (cam_title(found.cam), shaded(seen, view, attribution)),
        (
            f"TFT: tau* {float(found.tft.tau):g}, alone {number(best(found))}",
            shaded(seen, view, attribution, kept),
        ),
    ]
    if own:
        title = f"AFT: {f.classes.name(own.class_index)} {number(own.probability)}"
        shown.append((title, shaded(seen, view, own.attribution.cpu())))
    for ax, (title, picture) in zip(row, shown, strict=False):
        ax.imshow(np.asarray(picture))
        ax.set_title(title, fontsize=9, parse_math=False)
        ax.axis("off")
    for ax in row[len(shown) : -1]:
        ax.axis("off")
    draw_curve(row[-1], found)


def _new_figure(across: int, down: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A page shows 11 inches without making letters smaller; titles and labels have one a row.
    side = min(3.2, 11 / across - 0.1)
    figure = Figure(
        figsize=((side + 0.1) * across, (side + 0.6) * down), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with durable(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_taus(ax: Axes, measured: Measured, masking: str) -> None:
    thresholds = measured.study.search.thresholds
    width = 0.8 / len(measured.study.cams)
    for i, cam in enumerate(measured.study.cams):
        values = measured.results["original", Unit(cam, masking)].values
        assert values and values.tau is not None
        taus = torch.tensor(thresholds)
        nearest_one = (values.tau[:, None] - taus).abs().argmin(1).tolist()
        count = Counter(nearest_one)
        shares = [count[t] / max(len(nearest_one), 1) for t in range(len(thresholds))]
        places = np.arange(len(thresholds)) + (i - (len(measured.study.cams) - 1) / 2) * width
        ax.bar(places, shares, width, label=cam_title(cam))
    ax.set_xticks(range(len(thresholds)), [f"{t:g}" for t in thresholds], fontsize=7)
    ax.set_xlabel("tau*")
    ax.set_ylabel("share of images")
    ax.set_title(f"{masking} masks", fontsize=10)
    ax.legend(fontsize=7)


def _draw_curves(ax: Axes, measured: Measured, masking: str) -> None:
    thresholds = np.array(measured.study.search.thresholds)
    for cam in measured.study.cams:
        values = measured.results["original", Unit(cam, masking)].values
        assert values and values.curve is not None
        y = values.probability[:, None]
        # A handful of images with a tiny y^c would set the scale.
        rpi = relative_probability_increase(values.curve, y).clamp(max=1).numpy()
        mean, error = rpi.mean(0), rpi.std(0) / max(len(rpi), 1) ** 0.5
        (line,) = ax.plot(thresholds, mean, "o-", markersize=3, label=cam_title(cam))
        ax.fill_between(thresholds, mean - error, mean + error, alpha=0.2, color=line.get_color())
    ax.set_xlabel("tau")
    ax.set_ylabel("mean RPI (single ones cut at 1)")
    ax.set_ylim(bottom=0)
    ax.set_title(f"{masking} masks", fontsize=10)
    ax.legend(fontsize=7)
