"""`aft explain` and `aft tft`: explain images; what is wrong with one does not stop the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aftcli.cli import setup
from aftcli.cli.images import Files, Found, Job, each_image, nothing
from aftcli.core.methods import named
from aftcli.errors import UsageError
from aftcli.options.groups import ComparedNetworks, LayeredNetwork, Run, TargetMaps, Thresholds
from aftcli.options.make import number, option
from aftcli.options.read import muting, outputs

if TYPE_CHECKING:
    from torch import Tensor

    from aftcli.core.classifier import Classifier
    from aftcli.engine.accelerate import Accelerate
    from aftcli.pictures.overlay import Subject
    from aftcli.report.compared import Grids
    from aftcli.report.explain import Report
    from aftcli.report.manifest import Manifest
    from aftcli.report.names import Setting

# Options that entries of a manifest have on their own, or that change no file.
ELSEWHERE = {"models", "checkpoints", "cam", "target", "top_k", "out", "save", "json"}


@dataclass(frozen=True)
class CutMaps(TargetMaps):
    """The maps, and where they are zero."""

    zero_level: Annotated[
        float,
        number(
            "--zero-level",
            "T",
            "zero_level",
            "Mute cells below T of the maximum.",
            show_default=False,
        ),
    ] = 0.0


@dataclass(frozen=True)
class ContrastedMaps(CutMaps):
    """The maps, and the class that they contrast others with."""

    contrast: Annotated[
        str | None, option("--contrast", "CLASS", "Explain why the class and not this one.")
    ] = None


@dataclass(frozen=True)
class GivenMap(TargetMaps):
    """Our maps, or another tool's."""

    map_: Annotated[
        Path | None,
        option(
            "--map",
            "FILE",
            "Map of any tool: .npy, .npz or grey picture, of the picture or of what the network "
            "sees, any size and scale. Default: our own.",
        ),
    ] = None
    absolute: Annotated[
        bool, option("--absolute", "", "Use the map's magnitudes; otherwise negatives become 0.")
    ] = False


@dataclass(frozen=True)
class WantedThresholds(Thresholds):
    """The search of thresholds, where one is wanted, or a fixed one."""

    tft: Annotated[bool, option("--tft", "", "Cut where the class's probability rises most.")] = (
        False
    )
    threshold: Annotated[
        float | None, number("--threshold", "T", "threshold", "Mute scores below T, in [0, 1].")
    ] = None
    mute: Annotated[
        float | None, number("--mute", "P", "mute", "Mute the lowest P percent of the map.")
    ] = None


def explain(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Files, folders or globs.", hidden=True)
    ],
    network: ComparedNetworks,
    maps: ContrastedMaps,
    thresholds: WantedThresholds,
    output: Files,
    run: Run,
) -> None:
    """Show where a model (efficientnet_lite0 by default) looked in a picture."""
    tft = thresholds.tft
    cut = muting(thresholds.threshold, thresholds.mute, tft)
    if maps.contrast is not None and maps.target_fn:
        raise UsageError("--contrast and --target-fn exclude each other: a target is no class")
    networks = network.each()
    kinds, accelerate, found = _begin(images, networks, maps, output, run, tft)
    settings = setup.at_fixed(thresholds.settings(), cut)
    loaded = setup.networks(networks, run.device, run.quiet, maps.fuse, maps.target_fn)
    # Layer-CAM has no sign, which is what a contrast is about.
    default = "layercam" if maps.contrast is None else "gradcam"

    from aftcli.pictures.colours import Look
    from aftcli.report import names
    from aftcli.report.compared import labels
    from aftcli.report.explain import shown_of, written
    from aftcli.tft import explain as explanation

    wanted = settings if tft or cut else None
    searched = names.of_search(settings, thresholds.thresholds) if tft else []
    look = Look(output.colormap, output.alpha)
    fixed = names.of_threshold(thresholds.threshold, thresholds.mute)
    changed = names.of_map(
        cells=maps.cells, zero_level=maps.zero_level, smooth=maps.smooth, target=maps.target_fn
    )
    of_cut = [*searched, *fixed, *names.of_look(look)]
    manifest = _manifest(kinds, network, maps, thresholds if wanted else None, output, run)
    grids = _grids(kinds, networks, maps, [*changed], of_cut, found, output, run, manifest)
    called = labels([(f.name, f.checkpoint) for f, *_ in loaded])
    advised: list[str] = []

    def job(one: LayeredNetwork, cuts: tuple[Classifier, ...], label: str) -> Job:
        f, *others = cuts
        with setup.naming(setup.title(one) if loaded[1:] else ""):
            methods = setup.methods(f, maps.cam, default, others, maps.smooth, run.quiet)
            targets = setup.targets(f, maps)
            contrast = None
            if maps.contrast is not None:
                methods, contrast = setup.contrast(f, maps.contrast, maps.cam, methods, targets)
        advised.extend(methods if tft else [])
        suffixes = names.suffixes([*_of_network(one, maps), *changed], of_cut)
        each = explanation.passes(f, methods, len(targets) or maps.top_k, wanted, maps.smooth)

        def explain_image(fast: Classifier, subject: Subject) -> list[Report]:
            asked = (targets, maps.top_k, wanted, maps.cells, bool(cut), maps.zero_level)
            x, layers = setup.input_of(f, subject), (fast, *others)
            explained = explanation.explain(
                layers, x, methods, *asked, smooth=maps.smooth, fuse=maps.fusion, contrast=contrast
            )
            if targets:
                setup.warn_of_chance(f, subject, explained, run.quiet)
            reports = written(f, subject, explained, kinds, output.out, suffixes, look, manifest)
            shown = [shown_of(f, subject, e, look) for e in explained]
            grids.add(shown, label if loaded[1:] else "")
            return reports

        ready = partial(_as_it_is if maps.target_fn else accelerate, f, len(found.paths) * each)
        return Job(ready, explain_image, setup.title(one) if loaded[1:] else "")

    jobs = [job(*each) for each in zip(networks, loaded, called, strict=True)]
    setup.advise(list(dict.fromkeys(advised)), thresholds.mode, maps.cells, run.quiet)
    each_image(jobs, found, settings, output, run, grids, manifest)


def tft(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture.")],
    network: LayeredNetwork,
    maps: GivenMap,
    thresholds: Thresholds,
    output: Files,
    run: Run,
) -> None:
    """Find the best threshold of an attribution map, made here or by any other tool."""
    kinds, accelerate, found = _begin([image], [network], maps, output, run, True)
    settings = thresholds.settings()

    from aftcli.data.maps import read_map
    from aftcli.pictures.colours import Look
    from aftcli.report import names
    from aftcli.report.explain import shown_of, written
    from aftcli.tft import explain as explanation

    of_map = names.of_map(maps.map_, maps.absolute, maps.cells, 0.0, maps.smooth, maps.target_fn)
    searched = names.of_search(settings, thresholds.thresholds)
    look = Look(output.colormap, output.alpha)
    of_cut = [*searched, *names.of_look(look)]
    called = names.suffixes([*_of_network(network, maps), *of_map], of_cut)
    values = read_map(maps.map_) if maps.map_ else None
    f, *others = setup.classifiers(network, run.device, run.quiet, maps.fuse, maps.target_fn)
    targets = setup.targets(f, maps)
    methods = ["map"]
    if values is None:
        methods = setup.methods(f, maps.cam, "gradcam", others, maps.smooth, run.quiet)
    setup.advise(methods, thresholds.mode, maps.cells, run.quiet)
    each = explanation.passes(f, methods, len(targets) or maps.top_k, settings, maps.smooth)
    manifest = _manifest(kinds, network, maps, thresholds, output, run)
    grids = _grids(kinds, [network], maps, of_map, of_cut, found, output, run, manifest)

    def explain_image(fast: Classifier, subject: Subject) -> list[Report]:
        x, asked = setup.input_of(f, subject), (targets, maps.top_k, settings)
        if values is None:
            layers = (fast, *others)
            explained = explanation.explain(
                layers, x, methods, *asked, maps.cells, smooth=maps.smooth, fuse=maps.fusion
            )
        else:
            attribution = _fitted(values, maps, f, x, subject, run.quiet)
            explained = explanation.explain_map(fast, x, attribution, *asked)
        if targets:
            setup.warn_of_chance(f, subject, explained, run.quiet)
        grids.add([shown_of(f, subject, e, look) for e in explained])
        return written(f, subject, explained, kinds, output.out, called, look, manifest)

    ready = partial(_as_it_is if maps.target_fn else accelerate, f, len(found.paths) * each)
    each_image([Job(ready, explain_image)], found, settings, output, run, grids, manifest)


def _begin(
    images: list[str],
    networks: Sequence[LayeredNetwork],
    maps: TargetMaps,
    output: Files,
    run: Run,
    tft: bool,
) -> tuple[tuple[str, ...], Accelerate, Found]:
    """Check what can be checked without torch, and find the images; without one it ends here."""
    kinds = outputs(output.save, tft)
    named(maps.cam or [])
    if (maps.target is not None) + (maps.top_k > 1) + (maps.target_fn is not None) > 1:
        raise UsageError("--target, --target-fn and --top-k exclude each other: give one")
    precision = networks[0].precision
    if maps.target_fn and precision != "no":
        raise UsageError("--target-fn runs in full precision: leave --precision out")
    for network in networks:
        setup.check(network)
    accelerate = setup.engine(run.engine, precision, run.quiet)

    from aftcli.data.text import find_images
    from aftcli.report.manifest import written_in

    found = Found(*find_images(images, output.out, written_in))
    if not found.paths:
        nothing(found, output)
    return kinds, accelerate, found


def _manifest(
    kinds: tuple[str, ...],
    network: LayeredNetwork,
    maps: TargetMaps,
    thresholds: Thresholds | None,
    output: Files,
    run: Run,
) -> Manifest | None:
    """Make the list of what made each file; nothing is written before images have their names."""
    from aftcli.report.manifest import Manifest

    if not kinds:
        return None
    groups = (network, maps, thresholds, output)
    given = {k: v for group in groups if group for k, v in vars(group).items()}
    settings = {
        name.strip("_"): [str(v) for v in value] if isinstance(value, list) else value
        for name, value in given.items()
        if name not in ELSEWHERE and value is not None and value is not False and value != []
    }
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    call = {"settings": plain, "command": shlex.join(["aft", *sys.argv[1:]])}
    code = [name.rpartition(":")[0] for name in [*(network.models or ()), maps.target_fn or ""]]
    named = [*(network.checkpoints or ()), network.classes, getattr(maps, "map_", None)]
    files = [*map(Path, filter(None, code)), *filter(None, named)]
    inputs = [path for path in files if path.is_file()]
    return Manifest(output.out, call, setup.noting(run.quiet), inputs)


def _grids(
    kinds: tuple[str, ...],
    networks: Sequence[LayeredNetwork],
    maps: TargetMaps,
    of_map: list[Setting],
    of_cut: list[Setting],
    found: Found,
    output: Files,
    run: Run,
    manifest: Manifest | None,
) -> Grids:
    """Make what draws grids; names say the settings that all networks share."""
    from aftcli.report.compared import Grids
    from aftcli.report.names import suffixes

    shared = replace(networks[0], models=None, checkpoints=None) if networks[1:] else networks[0]
    called = suffixes([*_of_network(shared, maps), *of_map], of_cut)
    single = maps.top_k == 1 and len(maps.target or ()) <= 1
    asked = (output.out, kinds, len(found.paths), single)
    return Grids(*asked, called, manifest, setup.noting(run.quiet))


def _as_it_is(f: Classifier, passes: int | None) -> Classifier:
    """Keep a network whose head ends in the user's code on torch."""
    from aftcli.report.terminal import PASSED

    f.watch = PASSED.add
    return f


def _of_network(network: LayeredNetwork, maps: TargetMaps) -> list[Setting]:
    from aftcli.report.names import of_network

    layers = tuple(network.layers or ())
    files = (network.model, network.checkpoint, network.classes)
    return of_network(*files, layers, network.precision, network.output, maps.fusion)


def _fitted(
    values: Tensor, maps: GivenMap, f: Classifier, x: Tensor, subject: Subject, quiet: bool
) -> Tensor:
    """Fit another tool's map to an image; say what it is taken to cover where that is assumed."""
    from aftcli.data.images import read_turn
    from aftcli.data.maps import already_scaled, assumed, fit_map, place_of

    turn = read_turn(subject.path)
    size, (high, wide) = (values.shape[1], values.shape[0]), f.preprocessing.size
    place = place_of(size, (wide, high), turn)
    said = [assumed(size, place, turn)]
    if place.frame == "view" and size == (wide, high) and already_scaled(values):
        said.append("its scores are scaled already, as --save map writes them, and are kept")
    if any(said):
        setup.noting(quiet)(f"{maps.map_}: for {subject.path}, {'; '.join(filter(None, said))}")
    return fit_map(values, x, subject.picture.size, subject.view, maps.absolute, turn)
