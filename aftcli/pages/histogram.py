"""Histograms as SVG inside a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aftcli.report.terminal import html

BINS = 10

WIDTH, HEIGHT = 30, 110  # pixels, of a bar and its room, and of the highest bar


class Bar(NamedTuple):
    """A bar of a histogram: what stands below it, and how many it counts."""

    label: str
    height: int


def of_values(values: Sequence[float], ends: tuple[float, float] | None = None) -> list[Bar]:
    """Count values in BINS intervals of one length, each with its lower end, the last with both.

    Args:
        values: finite numbers, one or more.
        ends: of the first and the last interval; None for the least and the greatest value.
    """
    low, high = ends or (min(values), max(values))
    step = (high - low) / BINS or 1.0
    counts = [0] * BINS
    for value in values:
        counts[min(max(int((value - low) / step), 0), BINS - 1)] += 1
    return [Bar(f"{low + i * step:.3g}", count) for i, count in enumerate(counts)]


def histogram(title: str, bars: Sequence[Bar]) -> str:
    """Return a histogram as a figure; the script of the page has no part in it."""
    most = max(max(bar.height for bar in bars), 1)
    width, base = WIDTH * len(bars), HEIGHT + 18
    said = html(f"{title}: {', '.join(f'{bar.label} {bar.height}' for bar in bars)}")
    parts = [
        f'<figure class="histogram"><svg role="img" aria-label="{said}" width="{width}" '
        f'height="{base + 20}" viewBox="0 0 {width} {base + 20}">'
    ]
    for i, bar in enumerate(bars):
        high = round(HEIGHT * bar.height / most, 1)
        x, middle = WIDTH * i, WIDTH * i + WIDTH // 2
        parts.append(
            f'<rect x="{x + 2}" y="{base - high}" width="{WIDTH - 4}" height="{high}"></rect>'
        )
        if bar.height:
            parts.append(f'<text x="{middle}" y="{base - high - 4}">{bar.height}</text>')
        parts.append(f'<text x="{middle}" y="{base + 15}">{html(bar.label)}</text>')
    parts.append(f'<line x1="0" y1="{base}" x2="{width}" y2="{base}"></line></svg>')
    parts.append(f"<figcaption>{html(title)}</figcaption></figure>")
    return "".join(parts)
