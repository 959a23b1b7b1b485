"""The images of one command: each is explained; one that can't be read does not stop others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import typer

from aftcli.cli.process import keep_freed_memory
from aftcli.errors import AftError
from aftcli.options.groups import Printed, Run
from aftcli.options.make import number, option, usage, words
from aftcli.options.read import outputs
from aftcli.report.terminal import complain, say_traceback
from aftcli.settings import Colormap

if TYPE_CHECKING:
    from aftcli.core.classifier import Classifier
    from aftcli.pages.explained import Page
    from aftcli.pictures.overlay import Subject
    from aftcli.report.explain import Report
    from aftcli.settings import Search

    Explain = Callable[[Classifier, Subject], list[Report]]

Format = Literal["table", "json", "csv", "jsonl"]  # as in aftcli.report.results


@dataclass(frozen=True)
class Files(Printed):
    """Options of what is printed and written."""

    PANEL: ClassVar[str] = Run.PANEL
    PANELS: ClassVar[dict[str, str]] = {"colormap": "Map", "alpha": "Map"}

    json: Annotated[bool, option("--json", "", "Print the result as JSON.", hidden=True)] = False
    format_: Annotated[Format, words("--format", Format, "--json is json.")] = "table"
    html: Annotated[bool, option("--html", "", "Write OUT/index.html, a page of all.")] = False
    out: Annotated[Path, option("--out", "DIR", "Where files go.")] = Path("aft-out")
    save: Annotated[
        str | None,
        option(
            "--save",
            "LIST",
            "Of overlay, figure, map, mask; or none alone.",
            callback=usage(outputs),
        ),
    ] = None
    colormap: Annotated[Colormap, words("--colormap", Colormap, "")] = "viridis"
    alpha: Annotated[float, number("--alpha", "A", "alpha", "Opacity of the map.")] = 0.5

    @property
    def words(self) -> Format:
        """The format of what is printed."""
        return "json" if self.json else self.format_


class Found(NamedTuple):
    """Images to explain, and what is wrong with what else was asked for."""

    paths: list[Path]
    problems: list[str]


def each_image(
    ready: Callable[[], Classifier],
    found: Found,
    explain_image: Explain,
    settings: Search,
    output: Files,
    run: Run,
) -> None:
    """Explain every image that can be read; say of each other one what is wrong with it."""
    from aftcli.data.images import read_image, view_of
    from aftcli.pictures.overlay import Subject
    from aftcli.report import explain as report
    from aftcli.report.names import stems
    from aftcli.report.results import FORMATS, STREAMED
    from aftcli.report.terminal import progress

    keep_freed_memory()
    called, count = stems(found.paths), len(found.paths)
    report.output_folder(output.out)
    f = ready()
    # Lines on a terminal show progress themselves.
    quiet = run.quiet or (output.words in STREAMED and sys.stdout.isatty())
    with ExitStack() as stack:
        stack.callback(_complain, found.problems)
        page = _page(output, found.problems, stack)
        add = stack.enter_context(FORMATS[output.words](output.out, count))
        for path in progress(found.paths, "explaining", count, quiet):
            try:
                picture = read_image(path)
                view = view_of(picture.size, f.preprocessing)
                subject = Subject(path, called[path], picture, view)
                reports = explain_image(f, subject)
                # Numbers instead of the maps: a folder may hold very many images.
                results = [report.as_dict(f, each, settings) for each in reports]
            except AftError as error:
                found.problems.append(str(error))
                if run.debug:
                    say_traceback(*sys.exc_info())
            else:
                add(results)
                if page:
                    page.add(subject, reports, results)
    _end(found)


def _page(output: Files, problems: list[str], stack: ExitStack) -> Page | None:
    """Begin the page of the results, if one is wanted; it is written when all have been printed."""
    if not output.html:
        return None
    from aftcli.pages.explained import page
    from aftcli.pictures.colours import Look

    look = Look(output.colormap, output.alpha)
    return stack.enter_context(page(output.out, look, problems, output.words != "table"))


def nothing(found: Found, output: Files) -> None:
    """Print that there are no results, and why."""
    from aftcli.report.results import FORMATS

    with ExitStack() as stack:
        stack.callback(_complain, found.problems)
        stack.enter_context(FORMATS[output.words](output.out, 0))
    _end(found)


def _complain(problems: list[str]) -> None:
    for problem in problems:
        complain(problem)


def _end(found: Found) -> None:
    """Exit with code 1 if there were problems."""
    if found.problems:
        raise typer.Exit(1)
