"""Run one benchmark, list all, or make the pages of docs again from their figures.

    python -m benchmarks                 lists them
    python -m benchmarks NAME [DATA] …   runs one; --help names its options
    python -m benchmarks pages           writes the pages of docs from JSON and templates

Each module of speed, quality, trust and coverage that has a function `main` is a benchmark. None is
imported to be listed.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDERS = ("speed", "quality", "trust", "coverage")


def benchmarks() -> dict[str, Path]:
    """Return the file of each benchmark by its name, folder by folder."""
    files = [path for folder in FOLDERS for path in sorted((HERE / folder).glob("*.py"))]
    return {path.stem: path for path in files if "\ndef main(" in path.read_text("utf-8")}


def summary(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return docstring.partition("\n")[0]


def listing() -> str:
    """Return one line for each benchmark, below the name of its folder."""
    found = {**benchmarks(), "pages": HERE / "pages.py"}
    wide = max(map(len, found))
    lines, folder = [], ""
    for name, path in found.items():
        if path.parent.name != folder:
            folder = path.parent.name
            lines.append(f"{folder}:" if path.parent != HERE else "docs:")
        lines.append(f"  {name:{wide}}  {summary(path)}")
    return "\n".join(lines)


def main() -> object:
    """Run what the first word names; list all benchmarks where there is none."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    name = words[0]
    if name == "pages":
        module = "benchmarks.pages"
    elif path := benchmarks().get(name):
        module = f"benchmarks.{path.parent.name}.{name}"
    else:
        print(f"{name}: no benchmark has this name; choose one of these", file=sys.stderr)
        print(listing(), file=sys.stderr)
        return 2
    # What argparse and the records of benchmarks call the command.
    sys.argv = [f"python -m benchmarks {name}", *words[1:]]
    return importlib.import_module(module).main()


if __name__ == "__main__":
    sys.exit(main())
