"""The figure of an explanation: image, plain map, cut map, probability over tau (Figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aftcli.core.classes import Classes
from aftcli.core.methods import METHODS
from aftcli.core.outputs import has_chance
from aftcli.pictures.colours import LOOK, Look, bar
from aftcli.pictures.overlay import Subject, captioned, seen_part, shaded, shortened
from aftcli.settings import SOFTMAX
from aftcli.tft.explain import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


DPI = 100  # pictures stand in a figure pixel for pixel

FLIP = Image.Transpose.FLIP_TOP_BOTTOM

LETTERS = 24  # pixels, so that a figure of four panels can be read at 800

STEP = 34  # pixels from line to line

GAP = 28  # pixels between panels

ABOVE, BELOW = 2 * STEP + 18, 3 * STEP + 24  # pixels over and under the pictures

SCALE = 80, 112  # pixels, what the curve's axes have at its left and right

MOST = 1e6  # RPI; more is a probability of nearly 0 that it is taken of

LOWEST = 0.2  # the least that the axis of probabilities spans: a rise of .002 is to look small


class Shown(NamedTuple):
    """An explanation and what pictures say of it.

    Attributes:
        subject: the picture.
        explanation: of it.
        name: of the class explained.
        likeliest: names and probabilities of the likeliest classes.
        is_score: a target is explained; its score is no probability.
        look: colours of the map.
        other: name of the class that the one explained is contrasted with; "" without.
        classes: how many there are; 0 where the class's probability says nothing of that.
    """

    subject: Subject
    explanation: Explanation
    name: str
    likeliest: Sequence[tuple[str, float]] = ()
    is_score: bool = False
    look: Look = LOOK
    other: str = ""
    classes: int = 0

    @property
    def title(self) -> str:
        """The class explained, and the one that it is contrasted with."""
        return f"{self.name}, not {self.other}" if self.other else self.name

    @property
    def named(self) -> list[str]:
        """The class explained with its probability, and the one that it is contrasted with."""
        named = f"{self.name} {number(self.explanation.probability)}"
        return [named, f"not {self.other}"] if self.other else [named]

    @property
    def notes(self) -> list[str]:
        """Remarks for readers of the map: chance makes the class explained as likely."""
        if self.explanation.probability * self.classes >= 1 or not self.classes:
            return []
        return [f"less likely than chance, 1/{self.classes}"]

    @property
    def painted(self) -> tuple[Tensor, Look]:
        """The map that is shown plain, and its look.

        It is the signed one of methods that attribute with signs, and of a contrast.
        """
        e = self.explanation
        shown = e.contrast is not None or (e.cam in METHODS and METHODS[e.cam].of_signed)
        if e.signed is None or not shown:
            return self.plain, self.look
        return e.signed.cpu(), self.look._replace(signed=True)

    @property
    def plain(self) -> Tensor:
        """The plain map I, shape (H, W)."""
        return self.explanation.attribution.cpu()

    @property
    def kept(self) -> Tensor | None:
        """The pixels that are not muted, shape (H, W), bool; None where nothing cuts the map."""
        cut = self.explanation.cut
        if not cut or (
            not self.explanation.tft and torch.equal(cut.attribution[0].cpu(), self.plain)
        ):
            return None
        return (cut.attribution[0] != 0).cpu()


def shown_as(
    classes: Classes,
    is_score: bool,
    subject: Subject,
    explanation: Explanation,
    look: Look = LOOK,
    output: str = SOFTMAX,
) -> Shown:
    """Return an explanation with what pictures say of it.

    Args:
        classes: of the network.
        is_score: a target is explained.
        subject: the picture.
        explanation: of it.
        look: colours of the map.
        output: how the network's logits become probabilities.
    """
    other = "" if explanation.contrast is None else classes.name(explanation.contrast)
    name = classes.name(explanation.class_index)
    if is_score:
        return Shown(subject, explanation, name, (), True, look, other)
    likeliest = [(classes.name(i), y) for i, y in explanation.likeliest]
    count = len(classes) if has_chance(output, len(classes)) else 0
    return Shown(subject, explanation, name, likeliest, False, look, other, count)


def overlaid(shown: Shown) -> Image.Image:
    """Return the picture under the map, plain or cut, with a caption."""
    attribution, look = shown.painted if shown.kept is None else (shown.plain, shown.look)
    said = [*caption(shown), *shown.notes]
    return captioned(shown.subject, attribution, shown.kept, said, look)


def cam_title(cam: str) -> str:
    """Return a method's name for people; maps of another tool have one name."""
    return METHODS[cam].title if cam in METHODS else "given map"


def best(explanation: Explanation) -> float:
    """Return the class's probability when only what is kept is shown."""
    assert explanation.cut
    return float(explanation.cut.probabilities[0, explanation.cut.best])


def number(value: float) -> str:
    """Write a probability or score with three digits.

    >>> number(0.37084), number(0.00002), number(0.0)
    ('0.371', '2.0e-05', '0.000')
    """
    return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"


def caption(shown: Shown) -> list[str]:
    """Return the parts of a caption: class, probability, method, threshold, what is kept."""
    explanation = shown.explanation
    said = [", ".join(shown.named), cam_title(explanation.cam)]
    if explanation.cut:
        said += [_tau(explanation), f"{_area(explanation)} kept, alone {number(best(explanation))}"]
    return said


def _tau(explanation: Explanation) -> str:
    assert explanation.cut
    word = "tau*" if explanation.tft else "tau"
    return f"{word} = {explanation.thresholds[int(explanation.cut.best)]:g}"


def _area(explanation: Explanation) -> str:
    assert explanation.cut
    return f"{float(explanation.cut.mask.float().mean()):.1%}"


def figure(shown: Shown) -> Figure:
    """Draw the paper's Figure 3 row: image, plain map, TFT map, probability over tau."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    explanation, plain, kept = shown.explanation, shown.plain, shown.kept
    painted, look = shown.painted
    seen, view = seen_part(shown.subject, plain.shape)
    pictures = [seen, shaded(seen, view, painted, look=look)]
    if kept is not None:
        pictures.append(shaded(seen, view, plain, kept, shown.look))
    wide, high = seen.size
    width = GAP + len(pictures) * (wide + GAP)
    width += sum(SCALE) + wide if explanation.tft else 0
    height = ABOVE + high + BELOW
    drawn = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(drawn)

    def put(picture: Image.Image, x: int, y: int) -> None:
        pixels = np.asarray(picture.transpose(FLIP))
        drawn.figimage(pixels, x, height - y - picture.height, origin="lower")

    def say(x: float, y: int, text: str, **more: object) -> None:
        text = shortened(text, LETTERS, wide)
        drawn.text(
            x / width,
            1 - y / height,
            text,
            fontsize=LETTERS * 72 / DPI,
            verticalalignment="top",
            parse_math=False,
            **more,  # type: ignore[arg-type]
        )

    for i, picture in enumerate(pictures):
        x = GAP + i * (wide + GAP)
        put(picture, x, ABOVE)
        for row, text in enumerate(_titles(shown)[i]):
            say(x, 12 + row * STEP, text)
    under = ABOVE + high + 14
    for row, (name, y) in enumerate(shown.likeliest):
        low = height - under - (row + 1) * STEP + 4
        size = min(max(y, 0), 1) * wide / width, (STEP - 4) / height
        colour = "#a9cbe8" if name == shown.name else "#e4e4e4"
        drawn.add_artist(Rectangle((GAP / width, low / height), *size, color=colour))
        say(GAP + 6, under + row * STEP + 1, shortened(name, LETTERS, wide - 110))
        say(GAP + wide - 4, under + row * STEP + 1, number(y), horizontalalignment="right")

    def scale(x: int, attribution: Tensor, look: Look) -> None:
        put(bar((wide, LETTERS), look), x, under)
        first, last = look.ends(attribution)
        middle = "0" if look.signed else "score"
        for part, text, side in ((0, first, "left"), (0.5, middle, "center"), (1, last, "right")):
            say(x + part * wide, under + LETTERS + 4, text, horizontalalignment=side)

    scale(2 * GAP + wide, painted, look)
    if kept is not None:
        x, y = 3 * GAP + 2 * wide, under
        if look.signed:
            scale(x, plain, shown.look)
            y += 2 * STEP
        say(x, y, "dimmed: muted")
    if explanation.tft:
        x = GAP + len(pictures) * (wide + GAP) + SCALE[0]
        box = (x / width, BELOW / height, wide / width, high / height)
        of = f"probability of {shown.name}" if shown.other else "probability"
        said = shortened(of, LETTERS, high)
        draw_curve(drawn.add_axes(box), explanation, LETTERS * 72 / DPI, said)
    return drawn


def _titles(shown: Shown) -> list[list[str]]:
    """Return two lines over each picture."""
    explanation = shown.explanation
    word = "score" if shown.is_score else "probability"
    chance = ["below chance"] if shown.notes else []
    titles = [
        [shown.title, ", ".join([f"{word} {number(explanation.probability)}", *chance])],
        [cam_title(explanation.cam), "plain map"],
    ]
    if explanation.cut:
        how = "TFT" if explanation.tft else "fixed threshold"
        kept = f"{_area(explanation)} kept: {word} {number(best(explanation))}"
        titles.append([f"{how}, {_tau(explanation)}", kept])
    return titles


def draw_curve(
    ax: Axes, explanation: Explanation, letters: float = 10, label: str = "probability"
) -> None:
    """Draw the class's probability over tau, tau* marked; a second axis has the RPI.

    Args:
        ax: where.
        explanation: with a search of thresholds.
        letters: size of the letters, points.
        label: of the axis of probabilities.
    """
    from matplotlib.ticker import MaxNLocator

    tft, y = explanation.tft, explanation.probability
    assert tft
    probabilities = tft.probabilities[0].cpu().numpy()
    tried = ~np.isnan(probabilities)
    taus = np.array(explanation.thresholds)
    tau, top = explanation.thresholds[int(tft.best)], best(explanation)
    colour = "#c23b22"
    ax.axhline(y, color="0.35", linestyle="--", linewidth=1.5, label="whole input")
    ax.axvline(tau, color=colour, linestyle=":", linewidth=1.5)
    ax.plot(
        taus[tried], probabilities[tried], "o-", color="#1f5f99", markersize=5, label="what is kept"
    )
    ax.plot(tau, top, "o", color=colour, markersize=10, label="tau*")
    rpi = float(tft.rpi[0, tft.best])
    title = f"tau* = {tau:g}"
    ax.set_title(f"{title}: RPI {rpi:.3f}" if rpi < MOST else title, fontsize=letters)
    ax.set_xlabel("threshold tau", fontsize=letters)
    ax.set_ylabel(label, fontsize=letters, parse_math=False)
    high = max(LOWEST, 1.15 * max(y, float(np.nanmax(probabilities))))
    ax.set_ylim(0, 1.03 if high > 1 else high)
    ax.tick_params(labelsize=0.85 * letters)
    if y > 0 and rpi < MOST:
        second = ax.secondary_yaxis("right", functions=(_increase(y), _decrease(y)))
        second.set_ylabel("RPI", fontsize=letters)
        second.tick_params(labelsize=0.85 * letters)
        # The RPI is never negative; its axis is only as long as there is room above y^c.
        end = (ax.get_ylim()[1] - y) / y
        room = int(8 * (1 - y / ax.get_ylim()[1]))
        ticks = MaxNLocator(room).tick_values(0, end) if room else ()
        second.set_yticks([0, *(t for t in ticks if 0 < t <= end)])
    ax.legend(fontsize=0.8 * letters, loc="best", framealpha=0.8)


def _increase(y: float) -> Callable[[ArrayLike], ArrayLike]:
    return lambda probability: np.asarray(probability) / y - 1


def _decrease(y: float) -> Callable[[ArrayLike], ArrayLike]:
    return lambda increase: (np.asarray(increase) + 1) * y
