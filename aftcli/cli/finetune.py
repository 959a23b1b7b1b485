"""`aft finetune`: networks whose plain maps are as good as fine-tuned ones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from aftcli.cli import setup
from aftcli.cli.options import Data, Methods, Printed, StudyRun, Weights, option, words
from aftcli.cli.process import keep_freed_memory
from aftcli.core.methods import named
from aftcli.errors import AftError

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
        list[str] | None,
        option(
            "--layer",
            "NAME",
            "Default: the masks'. Repeated, all are tuned: the masks' last, earlier ones before.",
        ),
    ] = None


@dataclass(frozen=True)
class TrainingData(Data):
    """The data set to train on."""

    no_masks: Annotated[
        bool,
        option(
            "--no-masks",
            "",
            "The control: plain cross-entropy on the masks' images. A DATASET of other classes "
            "gets a new last layer.",
        ),
    ] = False
    held_out: Annotated[
        float,
        option("--held-out", "SHARE", "Share of the images that only chooses the epoch."),
    ] = 0.1
    augment: Annotated[
        bool, option("--augment", "", "Flip and crop at random; nothing is cached.")
    ] = False


@dataclass(frozen=True)
class Training:
    """The training; None is the default of the situation, see aftcli.aft.recipes."""

    PANEL: ClassVar[str] = "Training"

    lam: Annotated[
        float | None, option("--lam", "L", "lambda of eq. 8, for a sum over the mask's cells.")
    ] = None
    objective: Annotated[
        Objective,
        words(
            "--objective",
            Objective,
            "the tuner's output (paper), the CAM, or only where it is zero learns.",
        ),
    ] = "tuner"
    consistency: Annotated[
        float | None,
        option("--consistency", "W", "Weight of the loss on masked images; 0 is the paper."),
    ] = None
    classification: Annotated[
        Classification | None,
        words(
            "--classification",
            Classification,
            "learn the labels (paper), or the probabilities before.",
            default=False,
        ),
    ] = None
    blend: Annotated[
        float | None,
        option(
            "--blend",
            "SHARE",
            "How far to go to the trained weights, above 0 to 1; less keeps more accuracy.",
        ),
    ] = None
    learning_rate: Annotated[float | None, option("--lr", "RATE", "Learning rate of Adam.")] = None
    epochs: Annotated[int | None, option("--epochs", "N", "Epochs at the most.", min=1)] = None
    batch: Annotated[int, option("--batch-size", "N", "Images in a step of training.", min=1)] = 32
    patience: Annotated[
        int,
        option(
            "--patience", "N", "Stop after N epochs without a better held-out loss; 0 never.", min=0
        ),
    ] = 3
    seed: Annotated[int, option("--seed", "N", "Seed of all randomness.", min=0)] = 0


@dataclass(frozen=True)
class TunedMaps(Methods):
    """The maps that are tuned."""

    gauge: Annotated[
        Gauge,
        words("--gauge", Gauge, "what --objective zero-level learns: one number, or weights too."),
    ] = "t"


@dataclass(frozen=True)
class TunedOutput(Printed):
    """Options of what is printed and written of tuned networks."""

    export: Annotated[
        Literal["onnx"] | None,
        option("--export", "onnx", "Also write network and map as one graph, for other runtimes."),
    ] = None


@dataclass(frozen=True)
class TuneRun(StudyRun):
    """Options of how training runs."""

    precision: Annotated[
        MixedPrecision,
        words("--precision", MixedPrecision, "auto is accelerate launch's."),
    ] = "auto"
    cache: Annotated[
        Cache,
        words("--cache", Cache, "of the frozen layers' outputs."),
    ] = "auto"


def finetune(
    data: TrainingData,
    network: TunedNetwork,
    maps: TunedMaps,
    training: Training,
    output: TunedOutput,
    run: TuneRun,
) -> None:
    """Fine-tune the network so that its plain maps are as good as fine-tuned ones (AFT).

    Takes the masks of aft gen-masks in RUN/masks and writes RUN/tuned/MODEL-CAM.safetensors, which
    --checkpoint takes. Settings of training without a default here follow the number of images;
    finetune prints them. Stopped at any point, the same command resumes. Runs on several processes
    under torchrun or accelerate launch.
    """
    cams = named(maps.cam or [])
    _check(data, maps, training)
    setup.check(network, data.dataset)

    from aftcli.aft import jobs as finetune_jobs
    from aftcli.aft import run as tuning
    from aftcli.aft.recipes import in_situation
    from aftcli.engine.export import check_onnx
    from aftcli.report import tuned as report_tuned

    if output.export:
        check_onnx()
    asked = {each.name: getattr(training, each.name) for each in fields(training)}
    settings = in_situation(held_out=data.held_out, gauge=maps.gauge, **asked)
    accelerator = setup.accelerator(run.device, run.precision)
    first = accelerator.process_index == 0
    note = setup.noting(run.quiet or not first)
    options = _options(run, data.augment, note)
    *earlier, last = network.layers or [""]
    source = setup.source(network, last, accelerator.device, note, tuple(earlier))
    keep_freed_memory()
    if data.no_masks:
        own = (data.dataset, data.split, data.limit, training.seed)
        jobs = finetune_jobs.control_jobs(run.run, source, *own)
    else:
        jobs = finetune_jobs.mask_jobs(run.run, source, cams, data.dataset, data.limit)
    events = tuning.fine_tune(jobs, run.run, settings, options, accelerator)
    tuned = report_tuned.watch(events, run.quiet or not first)
    if first:
        exported = [report_tuned.export(t.path) for t in tuned] if output.export else []
        report_tuned.print_tuned(tuned, exported, output.json)


def _check(data: TrainingData, maps: Methods, training: Training) -> None:
    """Check that nothing is asked for that needs masks, or their images, where it does not fit.

    Raises:
        AftError: something is.
    """
    if data.no_masks and maps.cam:
        raise AftError("--no-masks and --cam exclude each other: a control has no CAM")
    if data.split and not data.no_masks:
        raise AftError("--split goes with --no-masks: masks know the images that they were made of")
    for name in ("lam", "consistency", "classification"):
        if data.no_masks and getattr(training, name) is not None:
            raise AftError(f"--{name} and --no-masks exclude each other: a control has no masks")


def _options(run: TuneRun, augment: bool, note: Callable[[str], None]) -> Options:
    from aftcli.aft.run import Options
    from aftcli.engine.accelerate import fast_stem

    return Options(
        run.cache,
        augment,
        setup.workers(run.workers),
        run.overwrite,
        fast_stem=lambda f, stem, passes: fast_stem(f, stem, run.engine, passes, note),
    )
