"""An evaluation as a page of HTML that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from aftcli.evaluation.tables import Tables
from aftcli.files import durable
from aftcli.pages.figures import Picture, draw_all
from aftcli.pages.grids import Grid, Shown, grids
from aftcli.report.terminal import html, say

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 96rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #444; } td { border-bottom: 1px solid #ddd; }
.text { text-align: left; } p.note { color: #555; font-size: 0.85rem; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figcaption { color: #555; font-size: 0.85rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
"""


def write_figures(tables: Tables, run: Path, shown: Shown, images: list[str], aside: bool) -> None:
    """Draw the figures and write the page of all, in `<run>/results`.

    Args:
        tables: of the evaluation, with its measures.
        run: where it lives.
        shown: how tables are shown.
        images: of Figure 3, by a part of their names; empty for some, spread.
        aside: say what was written on stderr: stdout is the tables'.
    """
    results = run / "results"
    pictures = draw_all(tables.measured, results / "figures", images, tables.settings["maskings"])
    page = write_page(results / "report.html", tables, shown, pictures)
    for path in (*(p.path for p in pictures), page):
        say(f"wrote {path}", aside=aside)


def write_page(path: Path, tables: Tables, shown: Shown, pictures: Sequence[Picture]) -> Path:
    """Write the page; it needs no other file and no network."""
    with durable(path) as temporary:
        temporary.write_text("\n".join(_page(tables, shown, pictures)), encoding="utf-8")
    return path


def _page(tables: Tables, shown: Shown, pictures: Sequence[Picture]) -> Iterator[str]:
    studies = tables.settings.get("studies", [])
    title = "aft: " + ", ".join(f"{s['model']} on {s['dataset']}" for s in studies)
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{html(title)}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{html(title)}</h1>"
    yield f"<p>Made by <code>{html(tables.settings.get('command', 'aft evaluate'))}</code></p>"
    for grid in grids(tables, shown):
        yield from _table(grid)
    if pictures:
        yield "<h2>Figures</h2>"
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode()
        caption = html(picture.caption)
        yield f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        yield f"<figcaption>{caption}</figcaption></figure>"
    yield "<h2>Settings</h2>"
    # JSON has no line breaks but its own.
    settings = "\n".join(map(html, json.dumps(tables.settings, indent=2).splitlines()))
    yield f"<pre>{settings}</pre>"
    yield "</body></html>"


def _table(grid: Grid) -> Iterator[str]:
    def tag(i: int, name: str, text: str) -> str:
        kind = ' class="text"' if i < grid.left else ""
        return f"<{name}{kind}>{text}</{name}>"

    yield f'<h2>{html(grid.title)}</h2><div class="wide"><table>'
    heads = (tag(i, "th", html(name)) for i, name in enumerate(grid.header))
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for row in grid.rows:
        cells = (
            tag(i, "td", f"<b>{html(c.text)}</b>" if c.bold else html(c.text))
            for i, c in enumerate(row)
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if grid.note:
        yield f'<p class="note">{html(grid.note)}</p>'
