"""Options that have no effect beside others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aftcli.core.methods import METHODS, named
from aftcli.data.names import BUILTIN
from aftcli.errors import AftError
from aftcli.evaluation.measures import EVALUATED, MEASURED, MEASURES, measures
from aftcli.options.read import tables, undrawn

Values = Mapping[str, Any]  # of a command's options, by their first spelling


# Options of finetune that only a training of the network takes.
ONLY_TRAINED = ("--lam", "--consistency", "--classification", "--blend", "--patience", "--augment")


class When(NamedTuple):
    """A condition: in words, as they follow "has no effect", and of the values given."""

    words: str
    holds: Callable[[Values], bool]


class Idle(NamedTuple):
    """Options that have no effect under a condition.

    Attributes:
        options: their first spellings.
        when: the condition.
        refused: they can't be meant; otherwise what they ask for is so already, and a note says it.
    """

    options: tuple[str, ...]
    when: When
    refused: bool = True


def _without(*others: str) -> When:
    *most, last = others
    words = f"without {', '.join(most)} or {last}" if most else f"without {last}"
    return When(words, lambda given: not any(_is_set(given[other]) for other in others))


def _with(other: str) -> When:
    return When(f"with {other}", lambda given: _is_set(given[other]))


def _zero_level(words: str, holds: Callable[[Values], bool]) -> When:
    """Return a condition of a training that only learns a zero level."""
    return When(words, lambda given: given["--objective"] == "zero-level" and holds(given))


def _trained(given: Values) -> bool:
    """Check that the network is trained, whatever the masks' methods are."""
    if given["--objective"] is not None:
        return bool(given["--objective"] != "zero-level")
    several = len(given["--layer"] or ()) > 1
    return several or any(_is_set(given[option]) for option in ONLY_TRAINED)


def _is_set(value: object) -> bool:
    """Check that an option says something: 0 is a value, a flag that is off is none."""
    return value is not None and value is not False and value != []


def _cells(only_named: bool = False) -> Idle:
    """Tell of --cells on CAMs; without --cam the methods are CAMs, or not known yet."""

    def of_cams(given: Values) -> bool:
        methods = named(given["--cam"] or [])
        known = bool(methods) or not only_named
        return known and all(METHODS[name].family == "cam" for name in methods)

    return Idle(("--cells",), When("on CAMs, which are of cells anyway", of_cams), refused=False)


def _without_tables(*numbers: int, parts: tuple[str, ...] = ()) -> When:
    """Return the condition that no table of these numbers is asked for, and no further part."""
    *most, last = map(str, numbers)
    words = f"without table {', '.join(most)} or {last}" if most else f"without table {last}"

    def holds(given: Values) -> bool:
        wanted = set(numbers) & set(tables(given["--table"]))
        return not wanted and not any(_is_set(given[part]) for part in parts)

    return When(f"{words}, or {', '.join(parts)}" if parts else words, holds)


def _of_own_files(given: Values) -> bool:
    """Check that the data set is none that torchvision downloads."""
    return not str(given["DATASET"] or "").startswith(BUILTIN)


DOWNLOAD = Idle(("--download",), When(f"without {BUILTIN}NAME=DIR", _of_own_files))


def _in_long_form(given: Values) -> bool:
    """Check that JSON or CSV is printed, which hold all there is, and no page is written."""
    return (given["--json"] or given["--format"] in ("json", "csv")) and not given["--figures"]


def _without_published(given: Values) -> bool:
    """Check that no table has published numbers; JSON and CSV list them in any case."""
    return not set(EVALUATED) & set(tables(given["--table"])) and not (
        given["--json"] or given["--format"] in ("json", "csv")
    )


def _without_probabilities(given: Values) -> bool:
    """Check that no measure of Table 3 is one that judges differ in."""
    return not any(MEASURES[name].of_probabilities for name in measures(given["--metrics"]))


OF_IMAGES = (
    Idle(("--engine",), _with("--target-fn")),
    Idle(("--colormap", "--alpha"), When("without pictures in --save, or --html", undrawn)),
    Idle(("--format",), _with("--json")),
    _cells(),
)

# By command. Options that exclude each other are not here.
IDLE: dict[str, tuple[Idle, ...]] = {
    "explain": (
        Idle(("--thresholds", "--threshold-mode", "--search", "--tft-judges"), _without("--tft")),
        Idle(("--masking", "--fill"), _without("--tft", "--threshold", "--mute")),
        *OF_IMAGES,
    ),
    "tft": (
        Idle(("--absolute",), _without("--map")),
        Idle(("--layer", "--cam", "--cells", "--smooth"), _with("--map")),
        *OF_IMAGES,
    ),
    "gen-masks": (
        DOWNLOAD,
        Idle(("--format",), _without("--show")),
        Idle(("--format",), _with("--json")),
        Idle(
            (
                *("DATASET", "--split", "--model", "--checkpoint", "--classes", "--layer"),
                *(
                    "--cam",
                    "--data-format",
                    "--download",
                    "--limit",
                    "--thresholds",
                    "--masking",
                    "--fill",
                    "--threshold-mode",
                ),
                *("--tft-judges", "--labels", "--val-share", "--seed"),
                *("--search", "--run", "--overwrite", "--strict", "--device", "--engine"),
                *("--precision", "--batch-size", "--workers", "--output", "--output-key"),
            ),
            _with("--show"),
        ),
    ),
    "finetune": (
        DOWNLOAD,
        Idle(("--val-share", "--labels"), _without("--no-masks")),
        Idle(("--objective", "--gauge"), _with("--no-masks")),
        Idle(
            ("--lam", "--consistency", "--classification", "--blend", "--patience"),
            _zero_level("with --objective zero-level", lambda given: True),
        ),
        Idle(
            ("--lr", "--epochs"),
            _zero_level("with --gauge t", lambda given: given["--gauge"] == "t"),
        ),
        Idle(
            ("--gauge",),
            When("without --objective zero-level", _trained),
        ),
        Idle(
            ("--patience",),
            When("with --held-out 0", lambda given: given["--held-out"] == 0),
        ),
    ),
    "evaluate": (
        DOWNLOAD,
        Idle(("--image",), _without("--figures")),
        Idle(("--format",), _with("--json")),
        Idle(("--metrics", "--baselines", "--judge"), _without_tables(3)),
        Idle(("--judge",), When("on --metrics without probabilities", _without_probabilities)),
        Idle(("--masking",), _without_tables(3, 5, parts=("--sanity", "--figures"))),
        Idle(("--overwrite",), _without_tables(*EVALUATED, parts=("--sanity", "--figures"))),
        Idle(("--ci",), _without_tables(*MEASURED, parts=("--sanity",))),
        Idle(
            ("--ci",),
            When("on JSON and CSV, which always hold the intervals", _in_long_form),
            refused=False,
        ),
        Idle(("--paper",), When("without table 3, 4 or 5", _without_published)),
        _cells(only_named=True),
    ),
}


def idle(command: str, values: Values, given: set[str]) -> tuple[list[str], list[str]]:
    """Say which of the options given have no effect.

    Args:
        command: its name.
        values: of all its options.
        given: the spellings of those on the command line.

    Returns:
        Sentences, each option in one at the most: those that refuse the command, and notes.
    """
    refusals: list[str] = []
    notes: list[str] = []
    left = set(given)
    for options, when, refused in IDLE.get(command, ()):
        named = [option for option in options if option in left]
        if named and _holds(when, values):
            left -= set(named)
            verb = "has" if len(named) == 1 else "have"
            said = refusals if refused else notes
            said.append(f"{', '.join(named)} {verb} no effect {when.words}")
    return refusals, notes


def _holds(when: When, values: Values) -> bool:
    try:
        return when.holds(values)
    except AftError:  # of a value that the command refuses itself
        return False
