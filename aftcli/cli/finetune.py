"""`aft finetune`: networks whose plain maps are as good as fine-tuned ones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from aftcli.cli import setup
from aftcli.cli.process import keep_freed_memory
from aftcli.core.methods import named
from aftcli.errors import UsageError
from aftcli.options.data import Data, LabelsOption, ValShare
from aftcli.options.groups import Methods, Printed, StudyRun, Weights, layer_names, method_names
from aftcli.options.make import number, option, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from aftcli.aft.run import Options

# As in aftcli.aft, which imports torch.
Objective = Literal["tuner", "cam", "zero-level"]
Gauge = Literal["t", "v"]
Classification = Literal["labels", "distillation"]
Cache = Literal["auto", "memory", "disk", "off"]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class TunedNetwork(Weights):
    """The network and its layers, the last being the masks'."""

    layers: Annotated[
        list[str] | None, layer_names("Layers to tune, the masks' last. Default: that.")
    ] = None


@dataclass(frozen=True)
class TrainingData(Data):
    """The data set to train on."""

    no_masks: Annotated[
        bool,
        option(
            "--no-masks",
            "",
            "Train by labels alone, also other classes.",
        ),
    ] = False
    held_out: Annotated[
        float,
        number("--held-out", "SHARE", "held_out", "Share held out to choose the epoch."),
    ] = 0.1
    val_share: ValShare = None
    labels: LabelsOption = None
    augment: Annotated[bool, option("--augment", "", "Flip and crop at random; uses no cache.")] = (
        False
    )


@dataclass(frozen=True)
class Training:
    """The training; None is the default of the situation, see aftcli.aft.loss."""

    PANEL: ClassVar[str] = "Training"

    lam: Annotated[
        float | None,
        number("--lam", "L", "lam", "Weight of the mask loss: lambda of eq. 8."),
    ] = None
    objective: Annotated[
        Objective | None,
        words(
            "--objective",
            Objective,
            "Fit to the masks",
            default=False,
            more_help="Default: zero-level if the method has a sign, otherwise tuner (paper).",
        ),
    ] = None
    consistency: Annotated[
        float | None,
        number(
            "--consistency",
            "W",
            "consistency",
            "Weight of the masked images' loss; paper: 0.",
        ),
    ] = None
    classification: Annotated[
        Classification | None,
        words(
            "--classification",
            Classification,
            "Learn from",
            default=False,
            more_help="Paper: labels; distillation is from the untuned network.",
        ),
    ] = None
    blend: Annotated[
        float | None,
        number(
            "--blend",
            "SHARE",
            "blend",
            "Share of the change in weights to keep, in (0, 1]; less keeps more accuracy.",
        ),
    ] = None
    learning_rate: Annotated[
        float | None, number("--lr", "RATE", "learning_rate", "Learning rate of Adam.")
    ] = None
    epochs: Annotated[
        int | None, number("--epochs", "N", "epochs", "Number of epochs at most.")
    ] = None
    batch: Annotated[int, number("--batch-size", "N", "batch", "Images in each step.")] = 32
    patience: Annotated[
        int | None,
        number(
            "--patience",
            "N",
            "patience",
            "Stop after N epochs without a better loss; 0: never. Default: 3.",
        ),
    ] = None
    seed: Annotated[int, number("--seed", "N", "seed", "Seed of all randomness.")] = 0


@dataclass(frozen=True)
class TunedMaps(Methods):
    """The maps that are tuned."""

    cam: Annotated[list[str] | None, method_names("Of the masks; repeatable. Default: all.")] = None
    gauge: Annotated[
        Gauge,
        words("--gauge", Gauge, "Zero level by t, or v and t"),
    ] = "t"


@dataclass(frozen=True)
class TunedOutput(Printed):
    """Options of what is printed and written of tuned networks."""

    export: Annotated[
        Literal["onnx"] | None,
        option("--export", "onnx", "Also write network and map as one graph."),
    ] = None


@dataclass(frozen=True)
class TuneRun(StudyRun):
    """Options of how training runs."""

    precision: Annotated[
        MixedPrecision,
        words("--precision", MixedPrecision, "Mixed precision", more_help="auto: as launched."),
    ] = "auto"
    cache: Annotated[
        Cache,
        words("--cache", Cache, "Keep the frozen layers' outputs in"),
    ] = "auto"


def finetune(
    data: TrainingData,
    network: TunedNetwork,
    maps: TunedMaps,
    training: Training,
    output: TunedOutput,
    run: TuneRun,
) -> None:
    """Fine-tune the network so that its plain maps need no threshold search (AFT).

    Uses the masks in RUN/masks and writes RUN/tuned/MODEL-CAM.safetensors, which --checkpoint
    takes. Defaults depend on the data. If stopped, the same command resumes. torchrun and
    accelerate launch run it in several processes.
    """
    cams = named(maps.cam or [])
    _check(data, maps, training)
    setup.check(network, data)

    from aftcli.aft.jobs import control_jobs, mask_jobs
    from aftcli.aft.loss import in_situation
    from aftcli.aft.run import fine_tune
    from aftcli.data.parts import Reading
    from aftcli.engine.export import check_onnx
    from aftcli.report.tuned import export, print_tuned, watch

    if output.export:
        check_onnx()
    asked = {each.name: getattr(training, each.name) for each in fields(training)}
    settings = in_situation(held_out=data.held_out, gauge=maps.gauge, **asked)
    accelerator = setup.accelerator(run.device, run.precision)
    first = accelerator.process_index == 0
    data.fetch(run.quiet, first, accelerator.wait_for_everyone)
    note = setup.noting(run.quiet or not first)
    options = _options(run, data.augment, note)
    *earlier, last = network.layers or [""]
    source = setup.source(network, last, accelerator.device, note, tuple(earlier))
    keep_freed_memory()
    reading = Reading(data.data_format, data.labels and data.labels == "all")
    if data.no_masks:
        own = (data.dataset, data.split, data.limit, training.seed, reading, data.val_share)
        jobs = control_jobs(run.run, source, *own)
    else:
        jobs = mask_jobs(run.run, source, cams, data.dataset, data.limit, reading)
    events = fine_tune(jobs, run.run, settings, options, accelerator)
    tuned = watch(events, run.quiet or not first)
    if first:
        done = tuned if output.export else []
        exported = [export(each.path, network.model, run.quiet) for each in done]
        print_tuned(tuned, exported, output.json)


def _check(data: TrainingData, maps: Methods, training: Training) -> None:
    """Check that nothing is asked for that needs masks, or their images, where it does not fit."""
    if data.no_masks and maps.cam:
        raise UsageError("--no-masks and --cam exclude each other: a control has no CAM")
    if data.split and not data.no_masks:
        raise UsageError(
            "--split goes with --no-masks: masks know the images that they were made of"
        )
    for name in ("lam", "consistency", "classification"):
        if data.no_masks and getattr(training, name) is not None:
            raise UsageError(f"--{name} and --no-masks exclude each other: a control has no masks")


def _options(run: TuneRun, augment: bool, note: Callable[[str], None]) -> Options:
    from aftcli.aft.run import Options
    from aftcli.engine.accelerate import accelerated, fast_stem

    return Options(
        run.cache,
        augment,
        setup.workers(run.workers),
        run.overwrite,
        fast_stem=lambda f, stem, passes: fast_stem(f, stem, run.engine, passes, note),
        accelerate=lambda f, passes: accelerated(f, run.engine, passes, note),
    )
