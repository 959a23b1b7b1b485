"""Values of options, read from their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aftcli.errors import AftError, UsageError
from aftcli.measures.registry import EVALUATED, MEASURED, MOST_JUDGES, TABLES
from aftcli.settings import MIRROR, SELF

OUTPUTS = ("overlay", "figure", "map", "mask")  # as in aftcli.report.explain


def outputs(text: str | None, tft: bool = False) -> tuple[str, ...]:
    """Read what to write.

    Raises:
        AftError: a kind of output is unknown, or none is named.

    >>> outputs("map,mask"), outputs("none")
    (('map', 'mask'), ())
    """
    if text is None:
        return ("overlay", "figure") if tft else ("overlay",)
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if kinds == ("none",):
        return ()
    unknown = [kind for kind in kinds if kind not in OUTPUTS]
    if unknown or not kinds:
        what = f"unknown output {unknown[0]!r}" if unknown else "no output"
        raise AftError(f"{what} in --save; there are {', '.join(OUTPUTS)}, or none alone")
    return kinds


def undrawn(given: Mapping[str, Any]) -> bool:
    """Check that the options' values, by their spelling, ask for no picture of a map."""
    return not given["--html"] and not {"overlay", "figure"} & set(outputs(given["--save"]))


def muting(threshold: float | None, mute: float | None, tft: bool) -> tuple[float, str] | None:
    """Read a fixed cut-off: (tau, mode) as `muted` takes it, or None.

    Raises:
        UsageError: more than one way of muting is asked for.
    """
    if (threshold is not None) + (mute is not None) + tft > 1:
        raise UsageError("--threshold, --mute and --tft exclude each other: give one")
    if threshold is not None:
        return threshold, "value"
    return (mute / 100, "percentile") if mute is not None else None


def asked_too(names: Sequence[str]) -> tuple[str, ...]:
    """Read names of judges that a search asks beside the network itself.

    Raises:
        AftError: one is nobody, or they are too many.

    >>> asked_too(["mirror", "self", "resnet50", "mirror"])
    ('mirror', 'resnet50')
    """
    found = tuple(dict.fromkeys(name for name in names if name != SELF))
    if not {"", "none"}.isdisjoint(found):
        raise AftError(f"name a judge: {MIRROR}, a model, a checkpoint or MODEL=FILE")
    if len(found) > MOST_JUDGES:
        raise AftError(f"{len(found)} judges; at most {MOST_JUDGES} are asked in one call")
    return found


def tables(text: str | None) -> tuple[int, ...]:
    """Read which tables to print.

    Raises:
        AftError: there is no such table.

    >>> tables("all"), tables("1,all")
    ((3, 4, 5), (1, 3, 4, 5))
    """
    if text is None:
        return MEASURED
    names, known = [part.strip() for part in text.split(",")], [*map(str, TABLES), "all"]
    for name in names:
        if name not in known:
            raise AftError(f"there is no table {name!r}; --table takes {', '.join(known)}")
    numbers = {int(name) for name in names if name != "all"}
    return tuple(sorted(numbers | set(EVALUATED) if "all" in names else numbers))
