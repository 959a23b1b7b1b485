"""Options of typer's, made from dataclasses: a dataclass holds what one panel of the help shows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from aftcli.errors import AftError
from aftcli.settings import RANGES


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of the dataclasses that it takes."""
    groups: dict[str, Any] = {}
    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(
                parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
            )
            continue
        group = groups[name] = hints[name]
        types = get_type_hints(group, include_extras=True)
        for field in fields(group):
            (info,) = types[field.name].__metadata__
            if isinstance(info, OptionInfo):
                info.rich_help_panel = getattr(group, "PANELS", {}).get(field.name, group.PANEL)
            of = {"default": field.default, "annotation": types[field.name]}
            parameters.append(inspect.Parameter(field.name, parameter.KEYWORD_ONLY, **of))

    @functools.wraps(command)
    def called(**given: Any) -> None:  # noqa: ANN401 - what the options hold
        built = {n: g(**{f.name: given.pop(f.name) for f in fields(g)}) for n, g in groups.items()}
        command(**given, **built)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def usage(read: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Make a callback to which what a reader refuses is a usage error; it reads no None."""

    def checked(value: Any) -> Any:  # noqa: ANN401 - of any option
        try:
            if value is not None:
                read(value)
        except AftError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return checked


def option(names: str, metavar: str, help: str, **more: Any) -> Any:  # noqa: ANN401
    """Make an option of typer's; metavar is empty for a flag."""
    return typer.Option(*names.split(), metavar=metavar, help=help, **more)


def number(names: str, metavar: str, field: str, help: str, **more: Any) -> Any:  # noqa: ANN401
    """Make an option of a number; RANGES names its field."""
    return option(names, metavar, help, callback=usage(RANGES[field].check), **more)


def words(
    names: str,
    of: Any,  # noqa: ANN401
    help: str,
    default: bool = True,
    more_help: str = "",
    **more: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Make an option that takes a word of a Literal type, whose first may be the default.

    The words stand behind the help, and before more of it. Words that say enough need none.
    """
    first, *rest = get_args(of)
    listed = ", ".join([f"{first} (default)" if default else first, *rest])
    text = f"{help}: {listed}." if help else f"{listed}."
    return option(names, "WORD", f"{text} {more_help}".strip(), show_default=False, **more)
