"""The error and the warning of the package, and words for messages."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

MOST_NAMED = 5  # folders, pictures or labels in a message


class AftError(Exception):
    """Mistake that the user can put right; the message says what is wrong, where, what to do."""


class UsageError(AftError):
    """Mistake in how options stand together; commands end with 2 on it, as on an unknown option."""


class AftWarning(UserWarning):
    """News that the user should know, though nothing is wrong; the command line prints it."""


def nearest(word: str, known: Iterable[str], n: int = 5) -> str:
    """Name the known words nearest to a wrong one, for the end of an error message.

    Args:
        word: what was given.
        known: what would have been right.
        n: how many to name at the most.

    Returns:
        The nearest words, of equally near ones the first known first, or the first ones where
        none is near, joined by commas.

    >>> nearest("grad-cam", ["gradcam", "layercam", "eigencam"], n=1)
    'gradcam'
    """
    words = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), words, n=n, cutoff=0.5)
    close = sorted(
        (name for name in words if name in close),
        key=lambda name: -SequenceMatcher(None, name, word.lower()).ratio(),
    )
    return ", ".join(words[name] for name in close or list(words)[:n])


def squeezed(name: str) -> str:
    """Strip a name of its case, hyphens, underscores and spaces.

    >>> squeezed("EfficientNet-Lite 0")
    'efficientnetlite0'
    """
    return re.sub(r"[-_\s]+", "", name.lower())


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Check a name that a user gave; the error names the nearest known ones."""
    known = list(known)
    if name not in known:
        raise AftError(f"unknown {what} {name!r}; nearest: {nearest(name, known)}")


def first_line(error: Exception) -> str:
    """Return the first line of another library's error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
    """Say in one line why a file can't be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "pickle" in str(error):  # numpy's message tells how to run the file's code
        return "it holds no plain array of numbers"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return textwrap.shorten(text, 160, placeholder="...")


def listed(names: Sequence[str]) -> str:
    """Name the first of some folders, pictures or labels in a message.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def root_of(error: Exception) -> Exception:
    """Return the first of the errors that an error was raised from: torch's exporter hides it.

    >>> try:
    ...     try:
    ...         raise KeyError("first")
    ...     except KeyError as first:
    ...         raise ValueError("last") from first
    ... except ValueError as last:
    ...     print(repr(root_of(last)))
    KeyError('first')
    """
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


class Unfit(Exception):
    """Engine that can't run a classifier; the message says why."""
