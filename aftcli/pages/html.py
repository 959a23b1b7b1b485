"""Parts of pages of HTML: head and style, tables, settings, pictures and histograms."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from PIL import Image

from aftcli.pictures.overlay import WHITE
from aftcli.report.terminal import html

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 96rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
.wide { overflow: auto; background: linear-gradient(to right, #fff 40%, transparent) local,
  linear-gradient(to left, #fff 40%, transparent) right local,
  linear-gradient(to right, #0004, transparent), linear-gradient(to left, #0004, transparent) right;
  background-repeat: no-repeat; background-size: 40px 100%, 40px 100%, 10px 100%, 10px 100%; }
.long { max-height: 40rem; border-bottom: 1px solid #bbb; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.6rem; text-align: right; }
th { border-bottom: 2px solid #444; vertical-align: bottom; } td { border-bottom: 1px solid #ddd; }
.dense table { font-size: 0.8rem; } .dense th, .dense td { padding: 0.25rem 0.35rem; }
.interval { white-space: nowrap; font-size: 0.85em; }
.long td.text { white-space: nowrap; }
.long th { position: sticky; top: 0; background: #fff; }
.text { text-align: left; } p.note, .note { color: #555; font-size: 0.85rem; }
.settings th { border-bottom: 1px solid #ddd; font-weight: normal; color: #555; }
.settings td { text-align: left; overflow-wrap: anywhere; } .settings { max-width: 100%; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figcaption { color: #555; font-size: 0.85rem; }
summary { cursor: pointer; margin: 0.5rem 0; }
.thumb { max-width: 112px; max-height: 84px; vertical-align: middle; }
details .thumb { max-height: 60px; } summary h2 { display: inline; }
"""

MANY = 10  # columns; tables of more have smaller letters

BINS = 10

WIDTH, HEIGHT = 30, 110  # pixels, of a bar and its room, and of the highest bar

THUMB = 128  # pixels, the longer side of a picture in a table


def head(title: str, style: str = "", script: str | None = None) -> Iterator[str]:
    """Begin a page.

    Args:
        title: of the page, plain text.
        style: rules beside STYLE.
        script: the only one that the page may run, and it loads nothing; None for a page without.
    """
    style = STYLE + style
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    if script is not None:
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
            f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
        )
        yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{html(title)}</title><style>{style}</style></head><body>"
    yield f"<h1>{html(title)}</h1>"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, long: bool = False
) -> Iterator[str]:
    """Yield a table that scrolls inside itself where it is wider than the page.

    Args:
        header: of the columns, plain text.
        rows: cells, HTML.
        left: how many columns are text.
        long: scroll downwards too, below the header.
    """

    def tag(i: int, name: str, text: str) -> str:
        kind = ' class="text"' if i < left else ""
        return f"<{name}{kind}>{text}</{name}>"

    dense = len(header) > MANY
    yield f'<div class="wide{" long" * long}{" dense" * dense}"><table>'
    heads = (tag(i, "th", html(name)) for i, name in enumerate(header))
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for row in rows:
        yield f"<tr>{''.join(tag(i, 'td', text) for i, text in enumerate(row))}</tr>"
    yield "</tbody></table></div>"


def settings_table(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of settings, plain values that may be nested."""
    yield '<table class="settings"><tbody>'
    for name, value in flat(settings):
        yield f'<tr><th class="text">{html(name)}</th><td>{html(value)}</td></tr>'
    yield "</tbody></table>"


def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values of nested settings, as text.

    >>> list(flat({"a": [0.0, 0.5], "b": {"c": True, "d": None}, "e": [{"f": 1}]}))
    [('a', '0, 0.5'), ('b: c', 'yes'), ('e 1: f', '1')]
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            word = str(key).replace("_", " ")
            yield from flat(each, f"{name}: {word}" if name else word)
    elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        for i, each in enumerate(value, 1):
            yield from flat(each, f"{name} {i}")
    elif text := text_of(value):
        yield name, text


def text_of(value: object) -> str:
    """Write a plain value, or a list of some, for people; nothing for None."""
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def thumb_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size at which a picture stands in a table, never more than its own."""
    scale = min(THUMB / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def thumb(picture: Image.Image) -> Image.Image:
    """Return a picture small enough for a table, on white."""
    size = thumb_size(picture.size)
    small = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if small.mode == "RGB":
        return small
    white = Image.new("RGBA", size, (*WHITE, 255))
    return Image.alpha_composite(white, small.convert("RGBA")).convert("RGB")


def jpeg(picture: Image.Image) -> str:
    """Return a picture as the address of an image inside the page."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


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
