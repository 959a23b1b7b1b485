"""Explain images one after the other; what is wrong with one does not stop the others."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from aftcli.errors import AftError
from aftcli.report.terminal import complain, say_traceback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from aftcli.core.classifier import Classifier
    from aftcli.report.explain import Report
    from aftcli.report.pictures import Subject
    from aftcli.settings import Search


def find(arguments: list[str], out: Path, json: bool) -> tuple[list[Path], list[str]]:
    """The images, and what is wrong with arguments; without an image the command ends here."""
    from aftcli.data.text import find_images

    paths, problems = find_images(arguments, out)
    if not paths:
        _finish([], problems, json)
    return paths, problems


def each_image(
    ready: Callable[[int], Classifier],
    paths: list[Path],
    problems: list[str],
    explain_image: Callable[[Classifier, Subject], list[Report]],
    settings: Search,
    out: Path,
    json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Explain every image that can be read; say of each other one what is wrong with it.

    Args:
        ready: gives the classifier for so many images.
        paths: of the images.
        problems: with what else was asked for; they are said at the end.
        explain_image: explains one and writes its files.
        settings: of the search.
        out: where files go.
        json: print JSON instead of a table.
        quiet: no progress.
        debug: show tracebacks.

    Raises:
        typer.Exit: some could not be explained.
        AftError: the result can't be printed.
    """
    from aftcli.cli.memory import keep_freed_memory
    from aftcli.data.images import read_image, view_of
    from aftcli.report import explain as report
    from aftcli.report.names import stems
    from aftcli.report.pictures import Subject
    from aftcli.report.terminal import progress

    keep_freed_memory()
    called = stems(paths)
    results: list[dict[str, Any]] = []
    report.output_folder(out)
    f = ready(len(paths))
    for path in progress(paths, "explaining", len(paths), quiet):
        try:
            picture = read_image(path)
            view = view_of(picture.size, f.preprocessing)
            reports = explain_image(f, Subject(path, called[path], picture, view))
            # Numbers instead of the maps: a folder may hold very many images.
            results += [report.as_dict(f, each, settings) for each in reports]
        except AftError as error:
            problems.append(str(error))
            if debug:
                say_traceback(*sys.exc_info())
    _finish(results, problems, json)


def _finish(results: list[dict[str, Any]], problems: list[str], json: bool) -> None:
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
