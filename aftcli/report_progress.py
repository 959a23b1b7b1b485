"""Progress on stderr, also of one map that takes thousands of passes of the network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from aftcli.foreign import cell

T = TypeVar("T")
SLOW = 2.0  # seconds after which the passes of what is in work are shown


class Passed:
    """How many images have passed the network."""

    def __init__(self) -> None:
        self.images = 0

    def add(self, images: int) -> None:
        """Count those of one pass; a classifier's `watch`."""
        self.images += images


PASSED = Passed()


class PassesColumn(ProgressColumn):
    """How many images, masked ones too, have passed the network since the bar was made."""

    def __init__(self) -> None:
        super().__init__()
        self.before = PASSED.images

    def render(self, task: Task) -> Text:
        """Nothing while it is little, or after a moment."""
        count = PASSED.images - self.before
        slow = task.elapsed is not None and task.elapsed > SLOW
        return Text(f"{count:,} passes" if count and slow else "", "dim")


class PlainColumn(TextColumn):
    """A column of text from elsewhere: the task's description, or another format of the task."""

    def __init__(self, text_format: str = "{task.description}") -> None:
        super().__init__(text_format)

    def render(self, task: Task) -> Text:
        """Show it as it is, without markup and control characters."""
        return cell(self.text_format.format(task=task))


def progress(items: Iterable[T], what: str, total: int, quiet: bool) -> Iterable[T]:
    """Show progress on stderr while the items are worked on; nothing without a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        PlainColumn(),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        PassesColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        yield from bar.track(items, total, description=what)
