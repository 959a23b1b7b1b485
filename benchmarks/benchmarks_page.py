"""Put docs/benchmarks.md together from what peers.py, growth.py and search.py have written.

Run `python benchmarks/benchmarks_page.py peers.md growth.md search.json > docs/benchmarks.md`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from search import page

HEAD = Path(__file__).with_name("benchmarks_text.md")


def main() -> None:
    """Print the page: the text, the parts, the fast search's table in its place."""
    peers, growth, search = map(Path, sys.argv[1:])
    found = json.loads(search.read_text())
    text = HEAD.read_text().format(
        peers=peers.read_text().strip(),
        growth=growth.read_text().strip(),
        search=page(found["rows"]).strip(),
        searched=found["images"],
    )
    print(text, end="")


if __name__ == "__main__":
    main()
