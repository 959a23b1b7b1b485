"""What is given to command-line options, read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable

from aftcli.core.methods import named
from aftcli.errors import AftError, check_name

SAVE = ("overlay", "figure", "map", "mask")

# The keys of the registries in aftcli.tft.threshold and aftcli.report.formats, which import torch.
MASKINGS = ("binary", "soft")

FILLS = ("mean", "black", "blur")

MODES = ("value", "percentile")

SEARCHES = ("exact", "fast")

FORMATS = ("table", "json", "csv", "markdown", "latex")

PRECISIONS = ("auto", "no", "bf16", "fp16")

TABLES = ("1", "2", "3", "4", "5", "all")


def methods(names: list[str] | None) -> list[str]:
    """The methods that are asked for; None for none.

    Raises:
        AftError: a name is unknown, or a method's extra is not installed.
    """
    return named(names or [])


def thresholds(text: str) -> tuple[float, ...]:
    """Read thresholds, `start:stop:step` (stop included) or a list.

    Raises:
        AftError: the text is neither, or the values do not increase within [0, 1].

    >>> thresholds("0:1:0.25")
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    form = "write 0:1:0.1 or 0,0.2,0.5"
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if not (step > 0 and 0 <= start <= stop <= 1):
                raise AftError(f"thresholds {text!r} must increase within [0, 1]; {form}")
            if step < 1e-4:
                raise AftError(f"thresholds {text!r}: the step is below 0.0001; {form}")
            # Decimal thresholds, not sums of steps: 0.3, not 0.30000000000000004.
            count = int((stop - start) / step + 1e-6) + 1
            return tuple(min(round(start + i * step, 10), stop) for i in range(count))
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise AftError(f"thresholds {text!r} can't be read; {form}") from None
    if not all(0 <= value <= 1 for value in values):
        raise AftError(f"thresholds {text!r} must lie in [0, 1]; {form}")
    if any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise AftError(f"thresholds {text!r} must increase; {form}")
    return values


def search(masking: str, fill: str, mode: str, search: str) -> None:
    """Check the names of how thresholds are searched.

    Raises:
        AftError: one is unknown.
    """
    for what, name, known in (
        ("masking", masking, MASKINGS),
        ("fill", fill, FILLS),
        ("threshold mode", mode, MODES),
        ("search", search, SEARCHES),
    ):
        check_name(what, name, known)


def targets(names: list[str] | None, top_k: int) -> None:
    """Check that classes are not asked for in two ways.

    Raises:
        AftError: they are.
    """
    if names and top_k > 1:
        raise AftError("--target and --top-k exclude each other: give one")


def precision(name: str) -> None:
    """Check the name of a precision.

    Raises:
        AftError: it is unknown.
    """
    if name not in PRECISIONS:
        raise AftError(f"unknown precision {name!r}; there are auto, no, bf16 and fp16")


def outputs(text: str | None, tft: bool) -> tuple[str, ...]:
    """Read what to write.

    Raises:
        AftError: a kind of output is unknown.
    """
    if text is None:
        return ("overlay", "figure") if tft else ("overlay",)
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for kind in kinds:
        if kind not in SAVE:
            raise AftError(f"unknown output {kind!r} in --save; there are {', '.join(SAVE)}")
    return kinds


def export(format_: str | None) -> bool:
    """Whether to export the tuned networks.

    Raises:
        AftError: the format is unknown.
    """
    if format_ not in (None, "onnx"):
        raise AftError(f"unknown format {format_!r} in --export; there is onnx")
    return format_ is not None


def without_masks(no_masks: bool, **asked: object) -> None:
    """Check that nothing is asked for that needs masks, where there are none.

    Raises:
        AftError: something is.
    """
    for name, value in asked.items():
        if no_masks and value is not None:
            raise AftError(f"--{name} and --no-masks exclude each other: a control has no masks")


def muting(threshold: float | None, mute: float | None, tft: bool) -> tuple[float, str] | None:
    """Read a fixed cut-off: (tau, mode) as `muted` takes it, or None.

    Raises:
        AftError: more than one way of muting is asked for, or a value is out of range.
    """
    if (threshold is not None) + (mute is not None) + tft > 1:
        raise AftError("--threshold, --mute and --tft exclude each other: give one")
    if threshold is not None and not 0 <= threshold <= 1:
        raise AftError(f"--threshold {threshold:g} must lie in [0, 1]")
    if mute is not None and not 0 <= mute <= 100:
        raise AftError(f"--mute {mute:g} must lie in [0, 100] percent")
    if threshold is not None:
        return threshold, "value"
    return (mute / 100, "percentile") if mute is not None else None


def with_table(arguments: list[str]) -> list[str]:
    """Give a bare `--table` its value: typer's options have one always.

    >>> with_table(["evaluate", "--table", "--ci"])
    ['evaluate', '--table', 'all', '--ci']
    """
    found = []
    for i, argument in enumerate(arguments):
        found.append(argument)
        if argument == "--table" and not _is_value(arguments[i + 1 : i + 2]):
            found.append("all")
    return found


def _is_value(following: list[str]) -> bool:
    """Whether what follows `--table` is its value: not the end, an option, or the data set."""
    if not following or following[0].startswith("-"):
        return False
    return following[0] in TABLES or not os.path.lexists(following[0])


def tables(text: str | None) -> tuple[int, ...]:
    """Read which tables to print.

    Raises:
        AftError: there is no such table.

    >>> tables("all")
    (3, 4, 5)
    """
    if text is None:
        return (3, 4)
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in TABLES:
            raise AftError(f"there is no table {name!r}; --table takes {', '.join(TABLES)}")
    return (3, 4, 5) if "all" in names else tuple(sorted({int(name) for name in names}))


def maskings(text: str) -> tuple[str, ...]:
    """Read which readings of the paper to evaluate.

    Raises:
        AftError: there is no such reading.
    """
    if text not in ("both", "binary", "soft"):
        raise AftError(f"unknown masking {text!r}; there are both, binary and soft")
    return ("binary", "soft") if text == "both" else (text,)


def chosen(text: str, known: Iterable[str], option: str) -> str:
    """Check the value of an option that takes one of several words.

    Raises:
        AftError: it is none of them.
    """
    if text not in known:
        raise AftError(f"unknown value {text!r} of {option}; there are {', '.join(known)}")
    return text
