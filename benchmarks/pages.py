"""Make the pages of docs again from their figures (JSON) and templates (Markdown).

A template has {{part}} on a line of its own where figures belong. The JSON beside it has each part
as a list: lines of text, and tables by their cells. A benchmark writes its parts with `keep`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
# Each page of docs, and what its template's and its figures' names begin with.
PAGES = {
    "results/tables": "quality/results",
    "results/aft-study": "quality/aft_study",
    "results/synthetic": "quality/synthetic",
    "results/speed": "speed/benchmarks",
    "results/reliability": "trust/reliability",
    "results/judges": "quality/judges",
    "results/coverage": "coverage/coverage",
}
PART = re.compile(r"^\{\{(\w+)\}\}$", re.MULTILINE)


def template(page: str) -> str:
    """Return a page's text with {{part}} in the places of figures."""
    return (HERE / f"{PAGES[page]}_text.md").read_text("utf-8")


def figures(page: str) -> dict[str, list[Any]]:
    """Return a page's figures, part by part."""
    found: dict[str, list[Any]] = json.loads(_figures_of(page).read_text("utf-8"))
    return found


def made(page: str) -> str:
    """Return the page that its template and figures give."""
    parts = figures(page)
    return PART.sub(lambda found: rendered(parts[found[1]]), template(page))


def keep(page: str, part: str, markdown: str) -> None:
    """Store Markdown that a benchmark has made as one part of a page's figures."""
    parts = {**figures(page), part: taken_apart(markdown)}
    _figures_of(page).write_text(laid_out(parts) + "\n", "utf-8")


def taken_apart(markdown: str) -> list[Any]:
    r"""Return Markdown as lines of text, and tables as their cells.

    >>> taken_apart("two:\n\n| a | b |\n|---|--:|\n| | 0.10 |")
    ['two:', '', {'head': ['a', 'b'], 'rule': '|---|--:|', 'rows': [[None, '0.10']]}]
    """
    found: list[Any] = []
    lines = markdown.split("\n")
    while lines:
        line = lines.pop(0)
        if line.startswith("|") and lines and lines[0].startswith(("|---", "| ---")):
            table: dict[str, Any] = {"head": _cells(line), "rule": lines.pop(0), "rows": []}
            while lines and lines[0].startswith("|"):
                table["rows"].append(_cells(lines.pop(0)))
            found.append(table)
        else:
            found.append(line)
    return found


def rendered(blocks: Sequence[Any]) -> str:
    """Return what `taken_apart` took apart."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, str):
            lines.append(block)
        else:
            lines += [_line(block["head"]), block["rule"], *map(_line, block["rows"])]
    return "\n".join(lines)


def laid_out(value: Any, indent: int = 0) -> str:  # noqa: ANN401 - JSON
    """Return JSON with one row of a table on one line.

    >>> print(laid_out({"a": ["x", {"rows": [["1", None]]}]}))
    {
     "a": [
      "x",
      {
       "rows": [
        ["1", null]
       ]
      }
     ]
    }
    """
    if isinstance(value, dict):
        children = [f"{json.dumps(k)}: {laid_out(v, indent + 1)}" for k, v in value.items()]
        first, last = "{}"
    elif isinstance(value, list) and any(isinstance(v, list | dict) for v in value):
        children = [laid_out(v, indent + 1) for v in value]
        first, last = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    inner = ",\n".join(" " * (indent + 1) + child for child in children)
    return f"{first}\n{inner}\n{' ' * indent}{last}"


def main() -> None:
    """Write all pages, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help=f"of {', '.join(PAGES)}; default all")
    for page in parser.parse_args().pages or PAGES:
        (DOCS / f"{page}.md").write_text(made(page), "utf-8")
        print(f"docs/{page}.md")


def _figures_of(page: str) -> Path:
    return HERE / f"{PAGES[page]}.json"


def _cells(line: str) -> list[str | None]:
    """Return the cells of a row; None where a single space stands."""
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    return [None if cell == " " else cell[1:-1] for cell in cells]


def _line(cells: Sequence[str | None]) -> str:
    return f"|{'|'.join(' ' if cell is None else f' {cell} ' for cell in cells)}|"
