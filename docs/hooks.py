"""Two changes that the site needs: the changelog as a page, links that show titles."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
LINK = re.compile(r"\[[\w./-]+\.md\]\(([^)\s#]+\.md)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CHANGELOG.md, which lies beside docs and names pages by their paths from there."""
    text = CHANGELOG.read_text("utf-8").replace("](docs/", "](../")
    files.append(File.generated(config, "project/changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the title of a page where a link shows the name of its file."""
    folder = PurePosixPath(page.file.src_uri).parent

    def titled(link: re.Match[str]) -> str:
        found = files.get_file_from_path(normpath(folder / link[1]))
        title = found and re.match(r"# (.+)", found.content_string)
        return f"[{title[1]}]({link[1]}{link[2] or ''})" if title else link[0]

    return LINK.sub(titled, markdown)
