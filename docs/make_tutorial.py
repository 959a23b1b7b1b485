"""Run the notebook of the tutorial and write it as a page of the site.

    python docs/make_tutorial.py

The page is docs/get-started/tutorial.md, its pictures are docs/images/tutorial/*.jpg.
"""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/get-started/tutorial.ipynb"
PAGE = NOTEBOOK.with_suffix(".md")
PICTURES = ROOT / "docs/images/tutorial"
WIDEST = 900  # pixels of a picture
# An explanation as notebooks show it: its picture and its line of numbers.
SHOWN = re.compile(r'<img[^>]*src="data:image/\w+;base64,([^"]+)"[^>]*><br>([^<]*)')


def page(cells: list[Any]) -> tuple[str, list[Image.Image]]:
    """Return a page of a notebook's cells, with what they show below them, and its pictures.

    Args:
        cells: of nbformat, version 4, with their outputs.
    """
    parts: list[str] = []
    pictures: list[Image.Image] = []

    def place(encoded: str, alt: str) -> str:
        pictures.append(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
        pictures[-1].thumbnail((WIDEST, WIDEST))
        return f"![{alt}](../images/tutorial/{len(pictures)}.jpg)"

    about = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            if len(parts) == 1:
                parts.append(f"To run it yourself: [{NOTEBOOK.name}]({NOTEBOOK.name}).")
            about = ([about, *re.findall(r"^#+ (.+)$", cell.source, re.M)])[-1]
            continue
        parts += ["<!-- not run: part of tutorial.ipynb -->", f"```python\n{cell.source}\n```"]
        for output in cell.outputs:
            if output.get("name") == "stdout":
                parts.append(f"```text\n{output.text.strip()}\n```")
            elif "image/png" in output.get("data", {}):
                parts.append(place(output.data["image/png"], about))
            else:
                found = SHOWN.findall(output.get("data", {}).get("text/html", ""))
                shown = [place(picture, html.unescape(line)) for picture, line in found]
                lines = [html.unescape(line) for _, line in found]
                if len(shown) > 1:
                    shown = ['<div class="row" markdown>', *shown, "</div>"]
                if found:
                    parts.append("\n".join(shown))
                    parts.append("\n".join(["```text", *lines, "```"]))
    return "\n\n".join(parts) + "\n", pictures


if __name__ == "__main__":
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": NOTEBOOK.parent}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=where).execute()
    text, drawn = page(notebook.cells)
    PAGE.write_text(text, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for number, picture in enumerate(drawn, 1):
        picture.save(PICTURES / f"{number}.jpg", quality=82, optimize=True)
        print((PICTURES / f"{number}.jpg").relative_to(ROOT))
