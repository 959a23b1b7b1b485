"""`aft explain` and `aft tft`: explain images; what is wrong with one does not stop the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from aftcli.cli import setup
from aftcli.cli.images import (
    Files,
    Found,
    Job,
    Results,
    each_image,
    find_images,
    nothing,
    of_network,
    results_of,
)
from aftcli.core.methods import named
from aftcli.errors import UsageError
from aftcli.options.groups import (
    ComparedNetworks,
    JudgedThresholds,
    LayeredNetwork,
    Run,
    TargetMaps,
)
from aftcli.options.make import number, option
from aftcli.options.read import muting, outputs
from aftcli.settings import Shaping

if TYPE_CHECKING:
    from torch import Tensor

    from aftcli.core.classifier import Classifier
    from aftcli.engine.accelerate import Accelerate
    from aftcli.pictures.overlay import Subject
    from aftcli.report.explain import Report
    from aftcli.report.manifest import Manifest
    from aftcli.settings import Search
    from aftcli.tft.explain import Explanation
    from aftcli.tft.judges import Judge

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

    @property
    def shaping(self) -> Shaping:
        """Steps that change a method's map."""
        return super().shaping._replace(zero_level=self.zero_level)


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
class WantedThresholds(JudgedThresholds):
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
    judges = setup.judges(thresholds.asked, [f for f, *_ in loaded], run.device, run.quiet)

    from aftcli.report import names
    from aftcli.report.compared import labels

    wanted = settings if tft or cut else None
    searched = names.of_search(settings, thresholds.thresholds, thresholds.asked) if tft else []
    fixed = names.of_threshold(thresholds.threshold, thresholds.mute)
    of_map = names.of_map(maps.shaping, maps.target_fn)
    manifest = _manifest(kinds, network, maps, thresholds if wanted else None, output, run)
    of_cut = [*searched, *fixed]
    results = results_of(kinds, networks, maps, of_map, of_cut, found, output, run, manifest)
    called = [setup.title(one) if loaded[1:] else "" for one in networks]
    asked = [_question(maps, *each, run.quiet) for each in zip(loaded, called, strict=True)]
    if tft:
        methods = dict.fromkeys(method for question in asked for method in question.methods)
        setup.advise(list(methods), thresholds.mode, maps.cells, run.quiet)
    shown = labels([(f.name, f.checkpoint) for f, *_ in loaded]) if loaded[1:] else [""]
    masked = len(found.paths) * len(loaded) * len(settings.thresholds)
    judges = setup.fast_judges(judges, accelerate, masked)
    of_run = (accelerate, len(found.paths), results, run.quiet)
    task = Task(maps, wanted, bool(cut), *of_run, judges=judges)
    each = zip(networks, loaded, asked, called, shown, strict=True)
    jobs = [task.job(*one) for one in each]
    each_image(jobs, found, settings, output, run, results)


def tft(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture.")],
    network: LayeredNetwork,
    maps: GivenMap,
    thresholds: JudgedThresholds,
    output: Files,
    run: Run,
) -> None:
    """Find the best threshold of an attribution map, made here or by any other tool."""
    kinds, accelerate, found = _begin([image], [network], maps, output, run, True)
    settings = thresholds.settings()

    from aftcli.data.maps import read_map
    from aftcli.report import names

    of_map = names.of_map(maps.shaping, maps.target_fn, maps.map_, maps.absolute)
    searched = names.of_search(settings, thresholds.thresholds, thresholds.asked)
    values = read_map(maps.map_) if maps.map_ else None
    cuts = setup.classifiers(network, run.device, run.quiet, maps.fuse, maps.target_fn)
    judges = setup.judges(thresholds.asked, cuts[:1], run.device, run.quiet)
    judges = setup.fast_judges(judges, accelerate, len(settings.thresholds))
    targets = setup.targets(cuts[0], maps)
    methods = ["map"]
    if not maps.map_:
        methods = setup.methods(cuts[0], maps.cam, "gradcam", cuts[1:], maps.smooth, run.quiet)
    setup.advise(methods, thresholds.mode, maps.cells, run.quiet)
    manifest = _manifest(kinds, network, maps, thresholds, output, run)
    results = results_of(kinds, [network], maps, of_map, searched, found, output, run, manifest)
    of_run = (accelerate, len(found.paths), results, run.quiet)
    task = Task(maps, settings, False, *of_run, values, judges)
    job = task.job(network, cuts, Question(methods, targets))
    each_image([job], found, settings, output, run, results)


class Question(NamedTuple):
    """Question that a network answers about each picture.

    Attributes:
        methods: keys of METHODS, or "map" for another tool's map.
        targets: the classes to explain; none for the predicted ones.
        contrast: the class that they are contrasted with.
    """

    methods: list[str]
    targets: list[int]
    contrast: int | None = None


def _question(
    maps: ContrastedMaps, cuts: Sequence[Classifier], called: str, quiet: bool
) -> Question:
    """Find the methods that fit a network, and its classes; errors name it."""
    f, *others = cuts
    # Layer-CAM has no sign, which is what a contrast is about.
    default = "layercam" if maps.contrast is None else "gradcam"
    with setup.naming(called):
        methods = setup.methods(f, maps.cam, default, others, maps.smooth, quiet)
        targets = setup.targets(f, maps)
        if maps.contrast is None:
            return Question(methods, targets)
        methods, contrast = setup.contrast(f, maps.contrast, maps.cam, methods, targets)
        return Question(methods, targets, contrast)


@dataclass(frozen=True)
class Task:
    """Work that a command does with each network.

    Attributes:
        maps: the maps and classes.
        search: of thresholds; None for plain maps.
        fixed: the search is of one fixed threshold.
        accelerate: makes networks fast.
        count: of images.
        results: where they go.
        quiet: notes are not printed.
        given: another tool's map, shape (H, W).
        judges: who else the search asks.
    """

    maps: TargetMaps
    search: Search | None
    fixed: bool
    accelerate: Accelerate
    count: int
    results: Results
    quiet: bool
    given: Tensor | None = None
    judges: Sequence[Judge] = ()

    def job(
        self,
        network: LayeredNetwork,
        cuts: Sequence[Classifier],
        question: Question,
        called: str = "",
        label: str = "",
    ) -> Job:
        """Make the job of a network.

        Args:
            network: its options.
            cuts: the network, cut at each layer.
            question: what it is asked.
            called: its name in errors.
            label: its name in grids.
        """
        from aftcli.report.names import suffixes
        from aftcli.tft.explain import passes

        f, maps = cuts[0], self.maps
        of_map = [*of_network(network, maps), *self.results.of_map]
        settings = suffixes(of_map, self.results.of_cut)
        classes = len(question.targets) or maps.top_k
        mirrors = setup.mirrors(self.judges)
        each = passes(f, question.methods, classes, self.search, maps.smooth, mirrors)

        def explain_image(fast: Classifier, subject: Subject) -> list[Report]:
            explained = self._explained((fast, *cuts[1:]), f, subject, question)
            setup.say_not_asked(self.judges, f, subject, explained, self.quiet)
            if question.targets:
                setup.warn_of_chance(f, subject, explained, self.quiet)
            return self.results.write(f, subject, explained, settings, label)

        accelerate = _as_it_is if maps.target_fn else self.accelerate
        return Job(partial(accelerate, f, self.count * each), explain_image, called)

    def _explained(
        self, layers: Sequence[Classifier], f: Classifier, subject: Subject, question: Question
    ) -> list[Explanation]:
        """Explain a picture by a network, fast at its first layer, or by another tool's map."""
        from aftcli.tft.explain import explain, explain_map

        x, maps = setup.input_of(f, subject), self.maps
        asked = (question.targets, maps.top_k, self.search)
        if self.given is not None and isinstance(maps, GivenMap):
            attribution = _fitted(self.given, maps, f, x, subject, self.quiet)
            return explain_map(layers[0], x, attribution, *asked, self.judges)
        known = (question.methods, *asked, maps.shaping)
        return explain(
            layers,
            x,
            *known,
            fixed=self.fixed,
            contrast=question.contrast,
            judges=self.judges,
        )


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

    from aftcli.report.manifest import written_in

    found = Found(*find_images(images, output.out, written_in))
    if not found.paths:
        nothing(found, output)
    return kinds, accelerate, found


def _manifest(
    kinds: tuple[str, ...],
    network: LayeredNetwork,
    maps: TargetMaps,
    thresholds: JudgedThresholds | None,
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
    judges = thresholds.asked if thresholds else ()
    named += [Path(name.rpartition("=")[2]) for name in judges]
    files = [*map(Path, filter(None, code)), *filter(None, named)]
    inputs = [path for path in files if path.is_file()]
    return Manifest(output.out, call, setup.noting(run.quiet), inputs)


def _as_it_is(f: Classifier, passes: int | None) -> Classifier:
    """Keep a network whose head ends in the user's code on torch."""
    from aftcli.report.terminal import PASSED

    f.watch = PASSED.add
    return f


def _fitted(
    values: Tensor, maps: GivenMap, f: Classifier, x: Tensor, subject: Subject, quiet: bool
) -> Tensor:
    """Fit another tool's map to an image; say what it is taken to cover where that is assumed."""
    from aftcli.data.images import read_turn
    from aftcli.data.maps import already_scaled, assumed, fit_map, nothing_in, place_of

    turn = read_turn(subject.path)
    size, (high, wide) = (values.shape[1], values.shape[0]), f.preprocessing.size
    place = place_of(size, (wide, high), turn)
    said = [assumed(size, place, turn)]
    if place.frame == "view" and size == (wide, high) and already_scaled(values):
        said.append("its scores are scaled already, as --save map writes them, and are kept")
    found = fit_map(values, x, subject.picture.size, subject.view, maps.absolute, turn)
    said.append(nothing_in(found, values, maps.absolute))
    if any(said):
        setup.noting(quiet)(f"{maps.map_}: for {subject.path}, {'; '.join(filter(None, said))}")
    return found
