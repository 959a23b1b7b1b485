"""Changes that the site needs: README and changelog as pages, links that show titles."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages by their files, which lie beside docs and name others by their paths from there.
BESIDE = {
    "index.md": "README.md",
    "project/changelog.md": "CHANGELOG.md",
    "project/LICENSE.txt": "LICENSE",
}
LINK = re.compile(r"\[[\w./-]+\.md\]\(([^)\s#]+\.md)(#[^)\s]*)?\)")

CODE = re.compile(r"\[([^\]]+)\]\([^)\s]+\.py\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs, with links as seen from their place in the site."""
    for page, name in BESIDE.items():
        text = (ROOT / name).read_text("utf-8")
        places = {"docs/": "", **{f"{other})": f"{path})" for path, other in BESIDE.items()}}
        for old, new in places.items():
            text = text.replace(f"]({old}", f"]({'../' * page.count('/')}{new}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the title of a page where a link shows the name of its file; code has no page."""
    folder = PurePosixPath(page.file.src_uri).parent

    def titled(link: re.Match[str]) -> str:
        found = files.get_file_from_path(normpath(folder / link[1]))
        title = found and re.match(r"# (.+)", found.content_string)
        return f"[{title[1]}]({link[1]}{link[2] or ''})" if title else link[0]

    return CODE.sub(r"\1", LINK.sub(titled, markdown))
