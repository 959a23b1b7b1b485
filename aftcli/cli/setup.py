"""From options to what the commands work with: classifiers, devices, processes."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from aftcli.cli.process import kept_from_collector
from aftcli.core.methods import METHODS, spelled
from aftcli.data.names import check_data_set
from aftcli.errors import AftError, UsageError
from aftcli.files import check_checkpoint
from aftcli.options.data import Data
from aftcli.options.groups import Network, TargetMaps, Weights
from aftcli.report.terminal import complain

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from aftcli.core.classifier import Classifier
    from aftcli.data.blocks import Processes
    from aftcli.engine.accelerate import Accelerate
    from aftcli.models.source import Source
    from aftcli.pictures.overlay import Subject
    from aftcli.settings import Search
    from aftcli.tft.explain import Explanation
    from aftcli.tft.judges import Judge


def check(network: Weights, data: Data | None = None) -> None:
    """Check at once what can be told without torch."""
    if network.checkpoint:
        check_checkpoint(network.checkpoint)
    if data and data.dataset and not data.download:
        check_data_set(data.dataset)
    names(network.classes)


def device(name: str) -> torch.device:
    """Find the device of a name (`find_device`). On a GPU convolutions keep the bits of float32.

    TensorFloat32, torch's default there, moves activations by 5e-3 and probabilities by .1
    or more; --precision is the way to ask for less.
    """
    import torch

    from aftcli.models.load import find_device

    torch.backends.cudnn.allow_tf32 = False
    return find_device(name)


def workers(wanted: int | None) -> int:
    """Choose how many processes decode images: half the cores, at most 8."""
    return min(max((os.cpu_count() or 2) // 2, 1), 8) if wanted is None else wanted


def processes(device: str) -> tuple[Processes, str]:
    """Return the processes that torchrun or accelerate launch started, and this one's device."""
    from aftcli.data.blocks import Processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    own = str(state.device) if device == "auto" else device
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone), own


def accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate's view of this process: its device, the precision, the other processes."""
    from aftcli.models.load import find_device

    where = find_device(device)
    if precision == "fp16" and where.type == "cpu":
        # There it would run without scaling the loss, and small gradients would become 0.
        raise AftError("--precision fp16 can't be used on a CPU; use bf16 or no")

    from accelerate import Accelerator

    if device not in ("auto", "cpu"):
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", device)
    try:
        return Accelerator(
            cpu=where.type == "cpu", mixed_precision=None if precision == "auto" else precision
        )
    except ValueError as error:
        raise AftError(f"--precision {precision} can't be used here ({error})") from error


def at_fixed(settings: Search, cut: tuple[float, str] | None) -> Search:
    """Put a fixed threshold, (tau, mode), in place of those searched."""
    return replace(settings, thresholds=cut[:1], mode=cut[1], search="exact") if cut else settings


def classifier(network: Network, device: str, quiet: bool) -> Classifier:
    """Load the classifier that was asked for, on its device."""
    return classifiers(network, device, quiet)[0]


@kept_from_collector()
def classifiers(
    network: Network,
    device: str,
    quiet: bool,
    fuse: str | None = None,
    target: str | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Classifier, ...]:
    """Load the network once for each layer that was asked for, cut there, on its device.

    A target, FILE.py:NAME, becomes its only class.

    Raises:
        UsageError: maps are to be fused, and only one layer is named.
        AftError: see `load_classifier`.
    """
    from aftcli.core.inputs import check_images
    from aftcli.models.load import find_device, load_classifier

    layers: Sequence[str | None] = network.layers or (None,)
    if fuse and len(layers) < 2:
        raise UsageError(f"--fuse {fuse} takes the maps of two layers or more: repeat --layer")
    where, note = find_device(device), note or noting(quiet)
    from aftcli.models.targets import load_target, with_target

    files, own = (network.model, network.checkpoint), names(network.classes)
    read = partial(load_classifier, output=network.output, output_key=network.output_key)
    score = load_target(target) if target else None
    found = [read(*files, layer, classes=own, device=where, note=note) for layer in layers]
    check_images(found[0])
    return tuple(with_target(f, score) if score else f for f in found)


def networks(
    each: Sequence[Network],
    device: str,
    quiet: bool,
    fuse: str | None = None,
    target: str | None = None,
) -> list[tuple[Classifier, ...]]:
    """Load several networks, each as `classifiers` does; notes and errors name theirs.

    Raises:
        AftError: see `classifiers`.
    """
    if len(each) == 1:
        return [classifiers(each[0], device, quiet, fuse, target)]
    found = [_one_of(network, device, quiet, fuse, target) for network in each]
    same = Counter((f.name, f.checkpoint) for f, *_ in found)
    if twice := [name for (name, _), count in same.items() if count > 1]:
        raise AftError(f"{twice[0]} is named twice; name each network once")
    weights = {id(p): p.nbytes for cuts in found for f in cuts for p in f.parameters()}
    megabytes = sum(weights.values()) / 1e6
    noting(quiet)(f"{len(found)} networks are in memory at once: {megabytes:.0f} MB of weights")
    return found


def _one_of(
    network: Network, device: str, quiet: bool, fuse: str | None, target: str | None
) -> tuple[Classifier, ...]:
    called = title(network)

    def note(text: str) -> None:
        noting(quiet)(text if called in text else f"{called}: {text}")

    with naming(called):
        return classifiers(network, device, quiet, fuse, target, note)


def title(network: Weights) -> str:
    """Name a network for messages, as its options do."""
    from aftcli.networks.sources import DEFAULT_MODEL

    model = network.model or ("" if network.checkpoint else DEFAULT_MODEL)
    return " ".join(filter(None, [model, str(network.checkpoint or "")]))


@contextmanager
def naming(called: str) -> Iterator[None]:
    """Name the network in errors, where there are several; "" for one."""
    try:
        yield
    except AftError as error:
        if called in str(error):
            raise
        raise AftError(f"{called}: {error}") from error


def source(
    network: Weights,
    layer: str | None,
    device: torch.device,
    note: Callable[[str], None],
    earlier: tuple[str, ...] = (),
) -> Source:
    """Say where the classifiers of a run come from."""
    from aftcli.models.source import Source

    own = names(network.classes)
    files = (network.model, network.checkpoint, layer or None)
    read = partial(Source, output=network.output, output_key=network.output_key)
    return read(*files, own, device, earlier, note=note)


def engine(name: str, precision: str, quiet: bool) -> Accelerate:
    """Return a function that makes classifiers fast; names are checked before one is loaded."""
    from aftcli.engine.accelerate import accelerated, check_engine

    check_engine(name, precision)

    def accelerate(f: Classifier, passes: int | None) -> Classifier:
        from aftcli.report.terminal import PASSED

        fast = accelerated(f, name, passes, noting(quiet), precision)
        fast.watch = PASSED.add
        return fast

    return accelerate


def noting(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints notes to stderr."""
    return lambda text: None if quiet else complain(text)


def names(classes: Path | None) -> tuple[str, ...] | None:
    """Class names of a file; None without one."""
    from aftcli.core.classes import read_classes

    return read_classes(classes) if classes else None


def methods(
    f: Classifier,
    asked: list[str] | None,
    default: str,
    others: Sequence[Classifier] = (),
    smooth: str = "none",
    quiet: bool = False,
) -> list[str]:
    """Find the methods: `all` and families are those that fit the model at each layer.

    Those that do not fit are named on stderr. A method that is asked for by name must fit.

    Raises:
        AftError: no method of a family fits, or one can't be smoothed in this way.
    """
    from aftcli.tft.explain import choose_methods

    found, reasons = choose_methods((f, *others), asked or (), default, smooth, "--cam")
    refused: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        refused[reason].append(name)
    for reason, names in refused.items():
        noting(quiet)(f"skipped {', '.join(names)}: {reason}")
    return found


def judges(
    names: Sequence[str], networks: Sequence[Classifier], device: str, quiet: bool
) -> tuple[Judge, ...]:
    """Load judges of a search, and check that they know classes of each network."""
    if not names:
        return ()
    from aftcli.models.load import find_device
    from aftcli.tft.judges import load_judges

    option, note = "--tft-judges", noting(quiet)
    found = load_judges(names, find_device(device), note, option)
    for f in networks:
        found = tuple(judge.named_by(f, note, option) for judge in found)
    for judge, f in product(found, networks):
        judge.check(f, option)
    return found


def fast_judges(
    judges: Sequence[Judge], accelerate: Accelerate, passes: int | None
) -> tuple[Judge, ...]:
    """Make judges fast, but for the network itself, which is already."""
    return tuple(
        replace(each, classifier=accelerate(each.classifier, passes)) if each.classifier else each
        for each in judges
    )


def mirrors(judges: Sequence[Judge]) -> int:
    """Count the judges that are the network itself."""
    return sum(judge.classifier is None for judge in judges)


def say_not_asked(
    judges: Sequence[Judge],
    f: Classifier,
    subject: Subject,
    explained: Sequence[Explanation],
    quiet: bool,
) -> None:
    """Say which judges do not know a class explained, so that the search did not ask them."""
    for judge, c in product(judges, dict.fromkeys(each.class_index for each in explained)):
        if judge.matching(f)[c] < 0:
            noting(quiet)(
                f"{subject.path}: {judge.name} does not know {f.classes.name(c)}, so the search "
                "did not ask it"
            )


def advise(methods: list[str], mode: str, cells: bool, quiet: bool) -> None:
    """Say what a threshold leaves of maps of pixels, before it is searched."""
    of_pixels = [name for name, entry in METHODS.items() if name in methods and entry.of_pixels]
    if of_pixels and mode == "value" and not cells:
        noting(quiet)(
            f"{', '.join(of_pixels)}: a threshold of values leaves single pixels of such a map, "
            "which networks hardly recognise; --threshold-mode percentile cuts by rank, --cells "
            "averages the map over the layer's cells first"
        )


def targets(f: Classifier, maps: TargetMaps) -> list[int]:
    """Find the classes to explain; empty for the predicted ones."""
    from aftcli.core.inputs import check_classes

    check_classes(f)
    if maps.top_k > len(f.classes):
        raise AftError(f"--top-k {maps.top_k}: {f.name} has {len(f.classes)} classes")
    return list(dict.fromkeys(f.classes.index(name) for name in maps.target or []))


def contrast(
    f: Classifier,
    other: str,
    asked: list[str] | None,
    methods: list[str],
    targets: Sequence[int],
) -> tuple[list[str], int]:
    """Find the class of --contrast, and the methods that can contrast: of `--cam all` those.

    Raises:
        AftError: the class is unknown, is explained itself, or a method named can't contrast.
    """
    from aftcli.attributions.maps import takes_target

    found = f.classes.index(other)
    if found in targets:
        raise AftError(f"--contrast {other}: it is the class explained; give another one")
    fitting, words = [name for name in methods if takes_target(name)], spelled(asked or [])
    refused = [name for name in methods if name not in fitting and name in words]
    if refused or not fitting:
        raise AftError(
            f"--contrast: {', '.join(refused or methods)} can't explain a difference of classes; "
            f"take one of {', '.join(name for name in METHODS if takes_target(name))}"
        )
    return fitting, found


def warn_of_chance(
    f: Classifier, subject: Subject, explained: Sequence[Explanation], quiet: bool
) -> None:
    """Say which classes explained are less likely than chance; labels and targets have none."""
    from aftcli.core.outputs import has_chance
    from aftcli.models.targets import Targeted

    if isinstance(f, Targeted) or not has_chance(f.output, len(f.classes)):
        return
    chance = 1 / len(f.classes)
    unlikely = {e.class_index: e.probability for e in explained if e.probability < chance}
    for index, probability in unlikely.items():
        noting(quiet)(
            f"{subject.path}: {f.classes.name(index)} has a probability of {probability:.1e}, less "
            f"than chance (1/{len(f.classes)}); its map says little"
        )


def input_of(f: Classifier, subject: Subject) -> Tensor:
    """Make the model's input of a picture, shape (1, C, H, W)."""
    from aftcli.data.images import to_input

    return to_input(subject.picture, f.preprocessing).to(next(f.parameters()))
