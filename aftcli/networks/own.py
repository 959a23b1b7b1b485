"""Networks of a user's own code: `FILE.py:NAME` or `package.module:NAME`.

This runs the code, as Python runs a script. So only the user may name it. A name that only a file
(a card, a mask store) has is refused by `sources.refuse_unnamed` before it comes here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn

from aftcli.cutting.networks import copied, unwrapped
from aftcli.errors import AftError, first_line, nearest

IDENTIFIER = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"  # of Python, or several joined by dots

Made = TypeVar("Made")

CODE = re.compile(rf"(.+\.py|{IDENTIFIER}):({IDENTIFIER})")


def full_code_name(name: str) -> str:
    """Return the name of code with the file's whole path, as runs and cards keep it."""
    home, _, attribute = name.rpartition(":")
    return f"{Path(home).resolve()}:{attribute}" if home.endswith(".py") else name


def same_code(one: str, other: str) -> bool:
    """Tell if two full names are of the same code, whose file may have been moved."""
    files = [Path(home).name for home, _ in (_split(one), _split(other)) if home.endswith(".py")]
    return one == other or (
        len(files) == 2 and len(set(files)) == 1 and _split(one)[1] == _split(other)[1]
    )


def own_model(name: str, num_classes: int | None) -> nn.Module:
    """Build a network by the user's code, which is run.

    Args:
        name: `FILE.py:NAME` or `package.module:NAME`. NAME is a function or class that needs no
            arguments and makes an nn.Module, or an nn.Module itself.
        num_classes: passed to a function that has an argument of this name.

    Raises:
        AftError: the file, the module or the name is missing, the code raises, needs arguments,
            or makes no nn.Module.
    """
    home, attribute = _split(name)
    with _importable(home):
        found: object = _module(name, home)
        for part in attribute.split("."):
            if not hasattr(found, part):
                known = nearest(part, [n for n in vars(found) if not n.startswith("_")])
                raise AftError(f"{name}: {home} has no {attribute!r}; nearest: {known}")
            found = getattr(found, part)
        model = copied(found) if isinstance(found, nn.Module) else _called(name, found, num_classes)
    return unwrapped(model)


def _split(name: str) -> tuple[str, str]:
    home, _, attribute = name.rpartition(":")
    return home, attribute


def _module(name: str, home: str) -> ModuleType:
    if not home.endswith(".py"):
        try:
            return _guarded(name, lambda: importlib.import_module(home))
        except AftError as error:
            missing = getattr(error.__cause__, "name", None) or ""
            if isinstance(error.__cause__, ModuleNotFoundError) and f"{home}.".startswith(
                f"{missing}."
            ):
                raise AftError(
                    f"{name}: there is no module {missing!r}, here or installed; --model takes "
                    "package.module:NAME, FILE.py:NAME, timm:NAME, hf:NAME"
                ) from error.__cause__
            raise
    path = Path(home)
    if not path.is_file():
        raise AftError(f"{path}: there is no such file; --model takes FILE.py:NAME")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AftError(f"{path}: can't be read ({error.strerror}); make it readable") from error
    digest = hashlib.sha256(bytes(path) + content).hexdigest()[:10]
    own = f"aft_model_{digest}"  # changed code is another module
    if own in sys.modules:
        return sys.modules[own]
    return _guarded(name, lambda: run_file(path, own))


def run_file(path: Path, name: str) -> ModuleType:
    """Run a file of Python as a module of a name; one that fails leaves none behind."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _called(name: str, found: object, num_classes: int | None) -> nn.Module:
    if not callable(found):
        raise AftError(
            f"{name}: is a {type(found).__name__}; name a function that returns an nn.Module"
        )
    given = {}
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:  # of compiled code
        parameters = {}  # type: ignore[assignment]
    if "num_classes" in parameters and num_classes:
        given["num_classes"] = num_classes
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in open_ended and p.name not in given
    ]
    if needed:
        raise AftError(
            f"{name}: needs arguments ({', '.join(needed)}); give them defaults, or name a "
            "function without arguments that calls it"
        )
    made = _guarded(name, lambda: found(**given))
    if not isinstance(made, nn.Module):
        raise AftError(f"{name}: returns a {type(made).__name__}; it must return an nn.Module")
    if any(tensor.is_meta for tensor in made.state_dict().values()):
        raise AftError(f"{name}: returns a network without weights (device meta); load them")
    return made


def _guarded(name: str, run: Callable[[], Made]) -> Made:
    """Run the user's code, and turn what it raises into an AftError of one line.

    Its random numbers are the same each time, so that all processes of a run have equal networks.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return run()
    except AftError:
        raise
    except (Exception, SystemExit) as error:
        raise AftError(
            f"{name}: raises {type(error).__name__}: {first_line(error)[:200]}; run with --debug "  # type: ignore[arg-type]
            "to see where"
        ) from error


@contextmanager
def _importable(home: str) -> Iterator[None]:
    """Let code import modules beside its file; code of a package, those in the current folder."""
    own = str(Path(home).resolve().parent) if home.endswith(".py") else os.getcwd()
    added = own not in sys.path
    if added:
        sys.path.insert(0, own)
    try:
        yield
    finally:
        if added and own in sys.path:
            sys.path.remove(own)
            sys.path.append(own)  # for imports that its functions do later, behind all others
