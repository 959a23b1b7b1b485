"""The terminal: progress, and foreign text escaped so that it stays text."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from aftcli.errors import AftError

if TYPE_CHECKING:
    from aftcli.data.blocks import Broken

# Also what reverses the direction of text: a terminal would show another name.
REVERSING = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"

CONTROL = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{REVERSING}]")

# Also wide ones, which some spreadsheets read, and behind spaces, which some leave out.
FORMULA = re.compile("[\t\r]|\\s*[-=+@\uff1d\uff0b\uff0d\uff20]")

MARKDOWN = re.compile(r"[\\|*_`<&~$#]|\](?=[(\[:])")

LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    # The default encoding has other characters in these places.
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def plain(text: str) -> str:
    r"""Write control characters as escapes: a file's name may hold any, a terminal obeys them.

    >>> print(plain("a\nb"))
    a\nb
    """
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, aside: bool = False) -> None:
    """Print a line on stdout, or aside, on stderr."""
    print(plain(text), file=sys.stderr if aside else sys.stdout)


def complain(problem: str) -> None:
    """Print a problem or a note on stderr."""
    # With stderr closed, print would go to stdout.
    if sys.stderr is not None:
        print(f"aft: {plain(problem)}", file=sys.stderr)


def say_left_out(images: Iterable[Broken]) -> None:
    """Say on stderr which images could not be read, each once, at most twenty."""
    broken = {each.path: each for each in images}
    for path, each in list(broken.items())[:20]:
        complain(f"left out {path}: {each.reason}")
    if len(broken) > 20:
        complain(f"left out {len(broken) - 20} more")


def say_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback on stderr; `sys.excepthook` with `--debug`."""
    text = "".join(traceback.format_exception(kind, error, trace))
    each: BaseException | None = error
    while each is not None:
        # Others' messages have lines of their own.
        if isinstance(each, AftError):
            text = text.replace(str(each), plain(str(each)))
        each = each.__cause__ or each.__context__
    if sys.stderr is not None:
        print(*map(plain, text.removesuffix("\n").split("\n")), sep="\n", file=sys.stderr)


def cell(text: object, style: str = "") -> Text:
    """Make text for rich, in a table or alone: no markup, no emoji, no control characters."""
    from rich.text import Text

    return Text(plain(str(text)), style)


def html(text: str) -> str:
    """Escape a line for HTML, attributes too.

    >>> html("<b>")
    '&lt;b&gt;'
    """
    from html import escape

    return escape(plain(text))


def markdown(text: str) -> str:
    r"""Escape a line for Markdown, tables too.

    >>> print(markdown("a_b | `[c](d)`"))
    a\_b \| \`[c\](d)\`
    """
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", plain(text))


def latex(text: str) -> str:
    r"""Escape a line for LaTeX, cells of tables too.

    >>> print(latex("50 % of {a_b}"))
    50 \% of \{a\_b\}
    """
    escaped = "".join(LATEX.get(c, c) for c in plain(text))
    # After the end of a row these would be its arguments.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped


def csv_cell(value: Any) -> Any:  # noqa: ANN401 - numbers stay what they are
    """Write text so that no spreadsheet runs it as a formula; numbers stay numbers.

    >>> csv_cell("=1+1"), csv_cell(-1.5)
    ("'=1+1", -1.5)
    """
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if FORMULA.match(value) else plain(value)


T = TypeVar("T")

SLOW = 2.0  # seconds after which the passes of what is in work are shown


class Passed:
    """A counter of images that have passed the network."""

    def __init__(self) -> None:
        self.images = 0

    def add(self, images: int) -> None:
        """Count those of one pass; a classifier's `watch`."""
        self.images += images


PASSED = Passed()


class PassesColumn(ProgressColumn):
    """A column that counts images, masked ones too, passed since the bar was made."""

    def __init__(self) -> None:
        super().__init__()
        self.before = PASSED.images

    def render(self, task: Task) -> Text:
        """Show the count once some seconds have passed."""
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


def stdout_console(width: int) -> Console:
    """Make the console of tables; without a terminal lines have so many columns at the most."""
    console = Console(emoji=False, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = width
    return console


def progress_bar(*columns: ProgressColumn, quiet: bool) -> Progress:
    """Make a bar on stderr that leaves nothing behind, and shows nothing without a terminal."""
    console = Console(stderr=True)
    disable = quiet or not console.is_terminal
    return Progress(
        PlainColumn(), *columns, PassesColumn(), console=console, transient=True, disable=disable
    )


def progress(items: Iterable[T], what: str, total: int, quiet: bool) -> Iterable[T]:
    """Show progress on stderr while the items are worked on; nothing without a terminal."""
    count = TextColumn("{task.completed:.0f}/{task.total:.0f}")
    with progress_bar(BarColumn(), count, TimeRemainingColumn(), quiet=quiet) as bar:
        yield from bar.track(items, total, description=what)
