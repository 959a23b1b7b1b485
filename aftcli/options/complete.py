"""Values that the shell completes; torch is imported for the layers of a network alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from aftcli.core.methods import FAMILIES, METHODS
from aftcli.data.names import FORMATS
from aftcli.errors import AftError


def methods(incomplete: str) -> list[str]:
    """Complete the last of several methods joined by commas.

    >>> methods("layercam,gradcam+")
    ['layercam,gradcam++']
    """
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning((*METHODS, *FAMILIES, "all"), last)]


def formats(incomplete: str) -> list[str]:
    """Complete names of formats of data sets.

    >>> formats("s")
    ['shards']
    """
    return _beginning(FORMATS, incomplete)


def models(incomplete: str) -> list[str]:
    """Complete names of torchvision's networks, and of timm's behind `timm:`."""
    from aftcli.networks.names import INSTALLED, registered

    if incomplete.startswith("timm:"):
        return _beginning((f"timm:{name}" for name in registered("timm")), incomplete)
    return _beginning((*INSTALLED, *registered("torchvision"), "timm:", "hf:"), incomplete)


def layers(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete the modules of the network that the command line names; no user's code is run."""
    from aftcli.networks import own, sources

    name = _last(ctx.params.get("models")) or sources.DEFAULT_MODEL
    if own.CODE.fullmatch(name) or name.startswith("hf:"):
        return []
    try:
        name = sources.full_name(name)
        network = sources.find_source(name)(name, False, None).model
    except AftError:
        return []
    return _beginning((n for n, _ in network.named_modules() if n), incomplete)


def classes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete names of --classes FILE, otherwise of ImageNet's classes."""
    from aftcli.core.classes import read_classes
    from aftcli.networks.sources import imagenet_classes

    file = ctx.params.get("classes")
    try:
        names: Iterable[str] = read_classes(Path(file)) if file else ()
    except AftError:
        return []
    known = imagenet_classes()
    return _beginning(names or (known.name(i) for i in range(len(known))), incomplete)


def _last(value: Any) -> str:  # noqa: ANN401 - one name, or those of a repeated option
    values = value if isinstance(value, list | tuple) else [value]
    return str(values[-1]) if values and values[-1] else ""


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.lower().startswith(incomplete.lower())]
