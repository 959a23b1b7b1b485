"""Comparisons in one picture: networks, methods and classes of an image, and images of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aftcli.pictures.figure import Shown
from aftcli.pictures.grid import MOST, Row, Tile, drawn, tile
from aftcli.report.manifest import Manifest, writing
from aftcli.report.names import PLAIN, Setting, Suffixes, suffixes
from aftcli.report.terminal import plain

FEW = 8  # images that one grid shows at the most

PICTURES = {"overlay", "figure"}  # kinds of files beside which grids are written


def labels(networks: Sequence[tuple[str, str]]) -> list[str]:
    """Name networks, by their checkpoints too where several are of one model.

    Args:
        networks: model and checkpoint of each, "" for published weights.

    >>> labels([("vgg16", ""), ("resnet50", "a/one.pth"), ("resnet50", "")])
    ['vgg16', 'resnet50 one.pth', 'resnet50 published']
    """
    files = {model: {f for m, f in networks if m == model} for model, _ in networks}
    found = []
    for model, file in networks:
        names = [Path(each).name for each in files[model]]
        short = Path(file).name if names.count(Path(file).name) == 1 else file
        found.append(model if len(names) == 1 else f"{model} {short or 'published'}")
    return found


class Place(NamedTuple):
    """An explanation by one network, which is named where there are several."""

    shown: Shown
    network: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """The method and the class, after the network where there are several.

        The class of a contrast follows.
        """
        e = self.shown.explanation
        network = (self.network,) if self.network else ()
        other = () if e.contrast is None else (e.contrast,)
        return (*network, e.cam, e.class_index, *other)

    @property
    def made(self) -> dict[str, str]:
        """Entry of the manifest."""
        named = {"cam": self.shown.explanation.cam, "class_name": self.shown.title}
        return {"model": self.network, **named} if self.network else named


class Done(NamedTuple):
    """An image that is explained, as the grid of the images shows it."""

    stem: str
    path: Path
    tiles: list[Tile]
    keys: list[tuple[object, ...]]
    made: list[dict[str, str]]


class Grids:
    """The grids of one call: of each image with several explanations, and of the images.

    Args:
        out: the folder.
        kinds: of files; without pictures there is no grid.
        images: how many are explained.
        single: each network and method explains one class.
        settings: what the names say of them.
        manifest: lists the files.
        note: is told why there is no grid.
    """

    def __init__(
        self,
        out: Path,
        kinds: Sequence[str],
        images: int,
        single: bool = True,
        settings: Suffixes = PLAIN,
        manifest: Manifest | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.out, self.images, self.settings = out, images, settings
        self.manifest, self.note = manifest, note
        self.is_wanted = bool(PICTURES & set(kinds))
        self.is_over_images = self.is_wanted and single and images > 1
        self.columns: list[list[Place]] = []  # of the image at hand
        self.done: list[Done] = []
        self.has_told = False

    def add(self, shown: Sequence[Shown], network: str = "") -> None:
        """Take the explanations that one network gives the image at hand.

        Args:
            shown: method by method, of each the classes in the same order.
            network: its name, where there are several.
        """
        if self.is_wanted:
            for cam in dict.fromkeys(each.explanation.cam for each in shown):
                column = [Place(e, network) for e in shown if e.explanation.cam == cam]
                self.columns.append(column)

    def drop(self) -> None:
        """Forget the image at hand, which can't be explained."""
        self.columns = []

    def of_image(self) -> Path | None:
        """Write the grid of the image at hand if it has several explanations; end the image."""
        columns, self.columns = self.columns, []
        places = [place for column in columns for place in column]
        is_shown_again = self.is_over_images and self.images <= FEW
        if not places or not self._fits(len(places)):
            return None
        if len(places) == 1 and not is_shown_again:
            return None
        path, stem, *_ = places[0].shown.subject
        tiles = [[tile(*place) for place in column] for column in columns]
        keys, made = [place.key for place in places], [place.made for place in places]
        if is_shown_again:
            self.done.append(Done(stem, path, [column[0] for column in tiles], keys, made))
        if len(places) == 1:
            return None
        rows = max(map(len, columns))
        table = [Row("", [c[i] if i < len(c) else None for c in tiles]) for i in range(rows)]
        said = suffixes([Setting(f"{rows}x{len(columns)}", repr(keys))]).cut
        name = f"{stem}{said}{self.settings.cut}-grid.png"
        return self._write(name, table, {stem: path}, {"kind": "grid", "shows": made})

    def overview(self) -> Path | None:
        """Write the grid of the images, a row each, or side by side if each has one map."""
        done, self.done = self.done, []
        if self.is_over_images and self.images > FEW:
            self.note(f"{self.images} images: no grid of all, which shows {FEW} at the most")
        if len(done) < 2 or not self._fits(sum(len(each.tiles) for each in done)):
            return None
        names = [each.path.name for each in done]
        titles = [
            str(each.path if names.count(each.path.name) > 1 else each.path.name) for each in done
        ]
        table = [Row(plain(t), each.tiles) for t, each in zip(titles, done, strict=True)]
        columns = max(len(row.tiles) for row in table)
        if columns == 1:
            alone = [
                t._replace(lines=(row.title, *t.lines)) for row in table for t in row.tiles if t
            ]
            table = [Row("", alone)]
        of = repr([(self._identity(each), each.keys) for each in done])
        said = suffixes([Setting(f"{len(done)}x{columns}", of)]).cut
        name = f"images{said}{self.settings.cut}-overview.png"
        made = {"kind": "overview", "shows": [each.made for each in done]}
        return self._write(name, table, {each.stem: each.path for each in done}, made)

    def _fits(self, tiles: int) -> bool:
        if tiles > MOST and not self.has_told:
            self.note(f"{tiles} maps side by side: no grid, which shows {MOST} at the most")
            self.has_told = True
        return tiles <= MOST

    def _identity(self, done: Done) -> str:
        found = self.manifest.hash_of(done.stem, done.path) if self.manifest else ""
        return found or str(done.path.absolute())

    def _write(
        self, name: str, table: list[Row], images: Mapping[str, Path], made: Mapping[str, object]
    ) -> Path:
        path = self.out / name
        with writing(self.manifest, path, images, made) as temporary:
            drawn(table).savefig(temporary, format="png", pil_kwargs={"compress_level": 3})
        return path
