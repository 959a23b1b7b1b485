"""The images of one command: each is explained; one that can't be read does not stop others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

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
    from aftcli.pictures.overlay import Subject
    from aftcli.report.compared import Grids
    from aftcli.report.explain import Report
    from aftcli.report.manifest import Manifest
    from aftcli.settings import Search

    Explain = Callable[[Classifier, Subject], list[Report]]


@dataclass(frozen=True)
class Files(Printed):
    """Options of what is printed and written."""

    PANEL: ClassVar[str] = Run.PANEL

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


class Found(NamedTuple):
    """Images to explain, and what is wrong with what else was asked for."""

    paths: list[Path]
    problems: list[str]


class Job(NamedTuple):
    """A network that explains each image."""

    ready: Callable[[], Classifier]
    explain: Explain


def each_image(
    jobs: Sequence[Job],
    found: Found,
    settings: Search,
    output: Files,
    run: Run,
    grids: Grids,
    manifest: Manifest | None,
) -> None:
    """Explain every image that can be read; say of each other one what is wrong with it."""
    from aftcli.data.images import read_image, view_of
    from aftcli.pictures.overlay import Subject
    from aftcli.report import explain as report
    from aftcli.report.names import stems
    from aftcli.report.terminal import progress

    keep_freed_memory()
    report.output_folder(output.out)
    called = stems(found.paths)
    results: list[dict[str, Any]] = []
    with ExitStack() as ending:
        if manifest:
            called = manifest.names(called)
            ending.enter_context(_closed(manifest, found, run))
        ready = [(job.ready(), job.explain) for job in jobs]
        for path in progress(found.paths, "explaining", len(found.paths), run.quiet):
            with _told(found, run):
                picture = read_image(path)
                reports = []
                for f, explain in ready:
                    view = view_of(picture.size, f.preprocessing)
                    explained = explain(f, Subject(path, called[path], picture, view))
                    reports += [(f, each) for each in explained]
                if (grid := grids.of_image()) and reports:
                    reports[-1][1].outputs["grid"] = grid
                # Numbers instead of the maps: a folder may hold very many images.
                results += [report.as_dict(f, each, settings) for f, each in reports]
            grids.drop()
        with _told(found, run):
            if (overview := grids.overview()) and results:
                results[-1]["outputs"]["overview"] = str(overview)
    finish(results, found.problems, output.json)


@contextmanager
def _told(found: Found, run: Run) -> Iterator[None]:
    """Keep what is wrong for the end, so that it stops nothing else."""
    try:
        yield
    except AftError as error:
        found.problems.append(str(error))
        if run.debug:
            say_traceback(*sys.exc_info())


@contextmanager
def _closed(manifest: Manifest, found: Found, run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        with _told(found, run):
            manifest.close()


def finish(results: list[dict[str, Any]], problems: list[str], json: bool) -> None:
    """Print the results, then what is wrong; any problem makes the exit code 1."""
    try:
        if results:
            from aftcli.report import explain as report

            (report.print_json if json else report.print_table)(results)
        elif json:
            print("[]", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AftError(f"the result can't be printed ({error.strerror})") from error
    finally:
        for problem in problems:
            complain(problem)
    if problems:
        raise typer.Exit(1)
