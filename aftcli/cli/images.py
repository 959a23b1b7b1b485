"""The images of one command: each is explained; one that can't be read does not stop others."""

from __future__ import annotations

import glob
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import typer

from aftcli.cli.process import keep_freed_memory
from aftcli.cli.setup import naming, noting
from aftcli.data.picture import is_picture
from aftcli.errors import AftError
from aftcli.files import inside
from aftcli.options.groups import LayeredNetwork, Printed, Run, TargetMaps
from aftcli.options.make import number, option, usage, words
from aftcli.options.read import outputs
from aftcli.report.terminal import complain, say_traceback
from aftcli.settings import Colormap

if TYPE_CHECKING:
    from aftcli.core.classifier import Classifier
    from aftcli.pages.explained import Page
    from aftcli.pictures.colours import Look
    from aftcli.pictures.overlay import Subject
    from aftcli.report.compared import Grids
    from aftcli.report.explain import Report
    from aftcli.report.manifest import Manifest
    from aftcli.report.names import Setting, Suffixes
    from aftcli.settings import Search
    from aftcli.tft.explain import Explanation

    Explain = Callable[[Classifier, Subject], list[Report]]

Written = Callable[[Path], Container[str]]

Format = Literal["table", "json", "csv", "jsonl"]  # as in aftcli.pages.results


@dataclass(frozen=True)
class Files(Printed):
    """Options of what is printed and written."""

    PANEL: ClassVar[str] = Run.PANEL
    PANELS: ClassVar[dict[str, str]] = {"colormap": "Map", "alpha": "Map"}

    json: Annotated[bool, option("--json", "", "Print the result as JSON.", hidden=True)] = False
    format_: Annotated[Format, words("--format", Format, "Print")] = "table"
    html: Annotated[bool, option("--html", "", "Write OUT/index.html, all results in a page.")] = (
        False
    )
    out: Annotated[Path, option("--out", "DIR", "Where files go.")] = Path("aft-out")
    save: Annotated[
        str | None,
        option(
            "--save",
            "LIST",
            "Write overlay, figure, map, mask; or none.",
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
    """Images to explain, and what is wrong with them or with what else was asked for."""

    paths: list[Path]
    problems: list[str]

    def gather(self, refused: Mapping[str, list[str]], count: int) -> None:
        """Say once what is wrong with every image, as with a method that does not fit.

        Args:
            refused: problems of images, by their text without the image.
            count: of the images that were read.
        """
        for problems in refused.values():
            if 1 < len(problems) == count:
                first = self.problems.index(problems[0])
                self.problems[first] += f" (the same for all {count} images)"
                others = set(problems[1:])
                self.problems[:] = [each for each in self.problems if each not in others]


def find_images(
    arguments: Iterable[str],
    out: Path | None = None,
    written: Written = lambda folder: (),
) -> tuple[list[Path], list[str]]:
    """Turn files, folders and globs into image files.

    Args:
        arguments: names as the user gave them.
        out: where results go; a folder that holds it does not give them back as images.
        written: gives the names of results in a folder; folders do not give them back either.

    Returns:
        The files, each once, those of a folder sorted; and what was wrong with arguments.
    """
    found: dict[Path, None] = {}
    problems = []
    for argument in arguments:
        names = [argument] if os.path.lexists(argument) else glob.glob(argument, recursive=True)
        images, leading_out = [], []
        unread: list[str] = []
        for path in sorted(map(Path, names)):
            if not path.is_dir():
                images.append(path)
                continue
            for image in _images_in(path, out, written, unread):
                try:
                    images.append(inside(path, str(image.relative_to(path))))
                except AftError as error:
                    leading_out.append(str(error))
        if leading_out[1:]:
            leading_out[0] += f" ({len(leading_out) - 1} more pictures there are such links)"
        problems += leading_out[:1] + unread
        if not images and not leading_out and not unread:
            problems.append(f"{argument or repr(argument)}: {_missing(names)}")
        found.update(dict.fromkeys(images))
    return list(found), problems


def _missing(names: Sequence[str]) -> str:
    """Say what is missing where names of folders, or none, have led to no image."""
    if any(_images_in(Path(name), None, lambda folder: ()) for name in names):
        return "holds only pictures that aft has written; name your own"
    return f"there is no {'image in this folder' if names else 'such file or folder'}"


def _images_in(
    folder: Path, out: Path | None, written: Written, unread: list[str] | None = None
) -> list[Path]:
    """List the images below a folder, sorted; none that is hidden, below `out` or a result.

    Folders that can't be read are told to `unread`.
    """
    results, found = None, []
    written = cache(written)
    if out and folder.resolve() in out.resolve().parents:
        results = folder / out.resolve().relative_to(folder.resolve())

    def refuse(error: OSError) -> None:
        if unread is not None:
            unread.append(f"{error.filename}: can't be read ({error.strerror})")

    for where, folders, files in os.walk(folder, onerror=refuse):
        here = Path(where)
        folders[:] = [
            name for name in folders if not name.startswith(".") and here / name != results
        ]
        names = [name for name in files if is_picture(name) and not name.startswith(".")]
        found += [here / name for name in names if name not in written(here)]
    return sorted(found)


class Results(NamedTuple):
    """Places and forms of a command's results.

    Attributes:
        kinds: the files of each explanation.
        out: their folder.
        look: colours of the map.
        of_map: settings that decide the plain map, of all networks.
        of_cut: settings that decide the other files.
        manifest: lists the files; None where there are none.
        grids: draws grids.
    """

    kinds: tuple[str, ...]
    out: Path
    look: Look
    of_map: list[Setting]
    of_cut: list[Setting]
    manifest: Manifest | None
    grids: Grids

    def write(
        self,
        f: Classifier,
        subject: Subject,
        explained: Sequence[Explanation],
        settings: Suffixes,
        label: str,
    ) -> list[Report]:
        """Write what shows the explanations of a picture, and keep them for grids."""
        from aftcli.report.explain import shown_of, written

        asked = (self.kinds, self.out, settings, self.look, self.manifest)
        reports = written(f, subject, explained, *asked)
        self.grids.add([shown_of(f, subject, e, self.look) for e in explained], label)
        return reports


def results_of(
    kinds: tuple[str, ...],
    networks: Sequence[LayeredNetwork],
    maps: TargetMaps,
    of_map: list[Setting],
    of_threshold: list[Setting],
    found: Found,
    output: Files,
    run: Run,
    manifest: Manifest | None,
) -> Results:
    """Make where results go; the names of grids say the settings that all networks share."""
    from aftcli.pictures.colours import Look
    from aftcli.report import names
    from aftcli.report.compared import Grids

    look = Look(output.colormap, output.alpha)
    of_cut = [*of_threshold, *names.of_look(look)]
    shared = replace(networks[0], models=None, checkpoints=None) if networks[1:] else networks[0]
    called = names.suffixes([*of_network(shared, maps), *of_map], of_cut)
    single = maps.top_k == 1 and len(maps.target or ()) <= 1
    asked = (output.out, kinds, len(found.paths), single)
    grids = Grids(*asked, called, manifest, noting(run.quiet))
    return Results(kinds, output.out, look, of_map, of_cut, manifest, grids)


def of_network(network: LayeredNetwork, maps: TargetMaps) -> list[Setting]:
    """List settings of a network and its layers, for the names of files."""
    from aftcli.report import names

    layers = tuple(network.layers or ())
    files = (network.model, network.checkpoint, network.classes)
    return names.of_network(*files, layers, network.precision, network.output, maps.fusion)


class Job(NamedTuple):
    """A network that explains each image.

    Attributes:
        ready: makes it fast.
        explain: explains an image by it.
        called: its name in errors; "" where it is the only one.
    """

    ready: Callable[[], Classifier]
    explain: Explain
    called: str = ""


def each_image(
    jobs: Sequence[Job],
    found: Found,
    settings: Search,
    output: Files,
    run: Run,
    results: Results,
) -> None:
    """Explain every image that can be read; say of each other one what is wrong with it."""
    from aftcli.data.images import read_image, view_of
    from aftcli.pages.results import FORMATS, MOST, STREAMED
    from aftcli.pictures.overlay import Subject
    from aftcli.report import explain as report
    from aftcli.report.names import stems
    from aftcli.report.terminal import progress, say

    keep_freed_memory()
    grids, manifest = results.grids, results.manifest
    called, count = stems(found.paths), len(found.paths)
    if manifest or output.html or (output.words == "table" and count > MOST):
        report.output_folder(output.out)
    streamed = output.words in STREAMED
    # Lines on a terminal show progress themselves.
    quiet = run.quiet or (streamed and sys.stdout.isatty())
    with ExitStack() as ending:
        ending.callback(_complain, found.problems)
        if manifest:
            called = manifest.names(called)
            ending.enter_context(_closed(manifest, found, run))
        page = _page(output, found.problems, manifest, ending)
        add = ending.enter_context(FORMATS[output.words](output.out, count, manifest))
        ready = [(job.ready(), job) for job in jobs]
        last: list[dict[str, Any]] = []
        refused: dict[str, list[str]] = defaultdict(list)
        read = 0
        for path in progress(found.paths, "explaining", count, quiet):
            numbers: list[dict[str, Any]] = []
            with _told(found, run):
                picture, made = read_image(path), []
                read += 1
                for f, job in ready:
                    # What one network can't explain, others may.
                    with _told(found, run), _noted(refused, path), _naming(path, job.called):
                        view = view_of(picture.size, f.preprocessing)
                        subject = Subject(path, called[path], picture, view)
                        made += [(f, subject, each) for each in job.explain(f, subject)]
                if (grid := grids.of_image()) and made:
                    made[-1][2].outputs["grid"] = grid
                # Numbers instead of the maps: a folder may hold very many images.
                numbers = [report.as_dict(f, each, settings) for f, _, each in made]
            grids.drop()
            if numbers:
                add(numbers)
                last = numbers
            if page and numbers:
                page.add([(subject, each) for _, subject, each in made], numbers)
        found.gather(refused, read)
        with _told(found, run):
            if (overview := grids.overview()) and last:
                # A list of results is printed at the end only.
                last[-1]["outputs"]["overview"] = str(overview)
                if page:
                    page.overview = str(overview)
                if streamed:
                    say(f"wrote {overview}", aside=True)
    _end(found)


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
def _noted(refused: dict[str, list[str]], path: Path) -> Iterator[None]:
    """Note an error by its text without the image."""
    try:
        yield
    except AftError as error:
        refused[str(error).removeprefix(f"{path}: ")].append(str(error))
        raise


@contextmanager
def _naming(path: Path, called: str) -> Iterator[None]:
    """Name the image and the network in errors; a file that can't be written names itself."""
    try:
        yield
    except AftError as error:
        if isinstance(error.__cause__, OSError):
            raise
        with naming(str(path)), naming(called):
            raise


@contextmanager
def _closed(manifest: Manifest, found: Found, run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        with _told(found, run):
            manifest.close()


def _page(
    output: Files, problems: list[str], manifest: Manifest | None, ending: ExitStack
) -> Page | None:
    """Begin the page of the results, if one is wanted; it is written when all have been printed."""
    if not output.html:
        return None
    from aftcli.pages.explained import page
    from aftcli.pictures.colours import Look

    look, aside = Look(output.colormap, output.alpha), output.words != "table"
    return ending.enter_context(page(output.out, look, problems, manifest, aside))


def nothing(found: Found, output: Files) -> None:
    """Print that there are no results, and why."""
    from aftcli.pages.results import FORMATS

    with ExitStack() as ending:
        ending.callback(_complain, found.problems)
        ending.enter_context(FORMATS[output.words](output.out, 0, None))
    _end(found)


def _complain(problems: list[str]) -> None:
    for problem in problems:
        complain(problem)


def _end(found: Found) -> None:
    """Exit with code 1 if there were problems."""
    if found.problems:
        raise typer.Exit(1)
