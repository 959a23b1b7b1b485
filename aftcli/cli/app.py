"""The commands: parse, call, render. Torch is imported by the commands that need it."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

import aftcli
from aftcli.cli import options as o
from aftcli.cli import setup
from aftcli.cli import values as v
from aftcli.cli.idle import Command
from aftcli.cli.images import each_image, find
from aftcli.cli.process import INTERRUPTED, Stopping, flush, what_is_wrong
from aftcli.errors import AftError, AftWarning
from aftcli.evaluation.measures import measures
from aftcli.report.terminal import complain, say_traceback

if TYPE_CHECKING:
    from aftcli.core.classifier import Classifier
    from aftcli.report.explain import Report
    from aftcli.report.pictures import Subject


app = typer.Typer(
    name="aft",
    help="See what a convolutional image classifier looked at: CAMs with fine-tuned thresholds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"aft {aftcli.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """See what a convolutional image classifier looked at: CAMs with fine-tuned thresholds."""


@app.command(cls=Command)
def explain(
    images: o.ImagesArgument,
    model: o.ModelOption = None,
    checkpoint: o.CheckpointOption = None,
    classes: o.ClassesOption = None,
    layer: o.LayerOption = None,
    cam: o.CamsOption = None,
    cells: o.CellsOption = False,
    tft: o.TftOption = False,
    target: o.TargetOption = None,
    top_k: o.TopKOption = 1,
    threshold: o.ThresholdOption = None,
    mute: o.MuteOption = None,
    thresholds: o.ThresholdsOption = "0:1:0.1",
    masking: o.MaskingOption = "binary",
    fill: o.FillOption = "mean",
    threshold_mode: o.ThresholdModeOption = "value",
    search: o.SearchOption = "exact",
    device: o.DeviceOption = "auto",
    engine: o.EngineOption = "auto",
    precision: o.LowerOption = "no",
    out: o.OutOption = Path("aft-out"),
    save: o.SaveOption = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Show where the model looked for its prediction, or for any class.

    With --tft the map's threshold is the one, of --thresholds, at which the image masked by the
    map raises the class's probability most.
    """
    cut = v.muting(threshold, mute, tft)
    kinds = v.outputs(save, tft)
    v.methods(cam)
    v.targets(target, top_k)
    setup.check(device, checkpoint, classes)
    accelerate = setup.engine(engine, precision, quiet)
    found = find(images, out, json)
    settings = setup.settings(thresholds, masking, fill, threshold_mode, search)
    f = setup.classifier(model, checkpoint, classes, layer, device, quiet)
    methods = setup.methods(f, cam, "layercam")
    targets = setup.targets(f, target, top_k)
    setup.advise(methods if tft else [], threshold_mode, cells, quiet)

    from aftcli.report import names
    from aftcli.report.explain import write_outputs
    from aftcli.tft import explain as explanation

    settings = setup.at_fixed(settings, cut)
    wanted = settings if tft or cut else None
    of_network = names.of_network(model, checkpoint, classes, layer, precision)
    searched = names.of_search(settings, thresholds) if tft else []
    called = names.suffixes(
        [*of_network, *names.of_map(cells=cells)], [*searched, *names.of_threshold(threshold, mute)]
    )

    def ready(count: int) -> Classifier:
        each = explanation.passes(f, methods, len(targets) or top_k, wanted)
        return accelerate(f, count * each)

    def explain_image(fast: Classifier, subject: Subject) -> list[Report]:
        x = setup.input_of(f, subject)
        asked = (targets, top_k, wanted, cells, bool(cut))
        explained = explanation.explain(fast, x, methods, *asked)
        return [write_outputs(f, subject, e, kinds, out, called) for e in explained]

    each_image(ready, *found, explain_image, settings, out, json, quiet, debug)


@app.command(cls=Command)
def tft(
    image: o.ImageArgument,
    map_: o.MapOption = None,
    absolute: o.AbsoluteOption = False,
    model: o.ModelOption = None,
    checkpoint: o.CheckpointOption = None,
    classes: o.ClassesOption = None,
    layer: o.LayerOption = None,
    cam: o.CamsOption = None,
    cells: o.CellsOption = False,
    target: o.TargetOption = None,
    top_k: o.TopKOption = 1,
    thresholds: o.ThresholdsOption = "0:1:0.1",
    masking: o.MaskingOption = "binary",
    fill: o.FillOption = "mean",
    threshold_mode: o.ThresholdModeOption = "value",
    search: o.SearchOption = "exact",
    device: o.DeviceOption = "auto",
    engine: o.EngineOption = "auto",
    precision: o.LowerOption = "no",
    out: o.OutOption = Path("aft-out"),
    save: o.SaveOption = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Fine-tune the threshold of an attribution map, our own or any other tool's."""
    kinds = v.outputs(save, True)
    v.methods(cam)
    v.targets(target, top_k)
    setup.check(device, checkpoint, classes)
    accelerate = setup.engine(engine, precision, quiet)
    found = find([image], out, json)
    settings = setup.settings(thresholds, masking, fill, threshold_mode, search)

    from aftcli.data.images import read_turn
    from aftcli.data.maps import fit_map, read_map
    from aftcli.report import names
    from aftcli.report.explain import write_outputs
    from aftcli.tft import explain as explanation

    of_network = names.of_network(model, checkpoint, classes, layer, precision)
    called = names.suffixes(
        [*of_network, *names.of_map(map_, absolute, cells)], names.of_search(settings, thresholds)
    )

    values = read_map(map_) if map_ else None
    f = setup.classifier(model, checkpoint, classes, layer, device, quiet)
    targets = setup.targets(f, target, top_k)
    methods = setup.methods(f, cam, "gradcam") if values is None else ["map"]
    setup.advise(methods, threshold_mode, cells, quiet)

    def ready(count: int) -> Classifier:
        each = explanation.passes(f, methods, len(targets) or top_k, settings)
        return accelerate(f, count * each)

    def explain_image(fast: Classifier, subject: Subject) -> list[Report]:
        x = setup.input_of(f, subject)
        if values is None:
            explained = explanation.explain(fast, x, methods, targets, top_k, settings, cells)
        else:
            turn = read_turn(subject.path)
            setup.tell_place(values, map_, f, subject.path, turn, quiet)
            size, view = subject.picture.size, subject.view
            attribution = fit_map(values, x, size, view, absolute, turn)
            explained = explanation.explain_map(fast, x, attribution, targets, top_k, settings)
        return [write_outputs(f, subject, e, kinds, out, called) for e in explained]

    each_image(ready, *found, explain_image, settings, out, json, quiet, debug)


@app.command(cls=Command)
def gen_masks(
    dataset: o.DatasetArgument = None,
    split: o.SplitOption = None,
    model: o.ModelOption = None,
    checkpoint: o.CheckpointOption = None,
    classes: o.ClassesOption = None,
    layer: o.LayerOption = None,
    cam: o.CamsOption = None,
    limit: o.LimitOption = None,
    thresholds: o.ThresholdsOption = "0:1:0.1",
    masking: o.MaskingOption = "binary",
    fill: o.FillOption = "mean",
    threshold_mode: o.ThresholdModeOption = "value",
    search: o.SearchOption = "exact",
    run: o.RunOption = Path("aft-run"),
    overwrite: o.OverwriteOption = False,
    strict: o.StrictOption = False,
    show: o.ShowOption = None,
    device: o.DeviceOption = "auto",
    engine: o.EngineOption = "auto",
    precision: o.LowerOption = "no",
    batch_size: o.BatchSizeOption = 16,
    workers: o.WorkersOption = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Find the best masks of a whole data set: the auxiliary data of AFT.

    Writes RUN/masks/MODEL-CAM.h5. Stopped at any point, the same command goes on. Runs on
    several processes or machines under torchrun or accelerate launch.
    """
    if show or dataset is None:
        return _show(show, json)
    v.methods(cam)
    setup.check(device, checkpoint, classes, dataset)
    settings = setup.settings(thresholds, masking, fill, threshold_mode, search)
    processes, device = setup.processes(device)
    accelerate = setup.engine(engine, precision, quiet or processes.index > 0)
    f = setup.classifier(model, checkpoint, classes, layer, device, quiet or processes.index > 0)

    from aftcli.cli.memory import keep_freed_memory
    from aftcli.data.sets import open_data_set
    from aftcli.report import masks as report_masks
    from aftcli.tft import generate
    from aftcli.tft.explain import passes

    keep_freed_memory()
    data = open_data_set(dataset, split, f.classes).limited(limit)
    for text in data.notes:
        setup.noting(quiet or processes.index > 0)(text)
    methods = setup.methods(f, cam, "gradcam")
    # Of all processes, so that their number changes no result.
    f = accelerate(f, len(data.samples) * passes(f, methods, 1, settings))
    watched = report_masks.watch(
        generate.generate_masks(
            f,
            data,
            methods,
            run,
            settings,
            workers=setup.workers(workers),
            batch=batch_size,
            strict=strict,
            overwrite=overwrite,
            processes=processes,
        ),
        len(data.samples),
        processes,
        quiet,
    )
    if processes.index == 0:
        paths = [generate.store_path(run, f.name, m) for m in methods]
        report_masks.print_stores(paths, watched, json)


@app.command(cls=Command)
def finetune(
    dataset: o.DatasetArgument = None,
    split: o.SplitOption = None,
    no_masks: o.NoMasksOption = False,
    model: o.ModelOption = None,
    checkpoint: o.CheckpointOption = None,
    classes: o.ClassesOption = None,
    layer: o.LayersOption = None,
    cam: o.CamsOption = None,
    lam: o.LamOption = None,
    objective: o.ObjectiveOption = "tuner",
    consistency: o.ConsistencyOption = None,
    classification: o.ClassificationOption = None,
    blend: o.BlendOption = None,
    lr: o.LearningRateOption = None,
    epochs: o.EpochsOption = None,
    batch_size: o.BatchSizeOption = 32,
    patience: o.PatienceOption = 3,
    held_out: o.HeldOutOption = 0.1,
    limit: o.LimitOption = None,
    augment: o.AugmentOption = False,
    seed: o.SeedOption = 0,
    precision: o.PrecisionOption = "auto",
    cache: o.CacheOption = "auto",
    run: o.RunOption = Path("aft-run"),
    overwrite: o.OverwriteOption = False,
    export: o.ExportOption = None,
    device: o.DeviceOption = "auto",
    engine: o.EngineOption = "auto",
    workers: o.WorkersOption = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Fine-tune the network so that its plain maps are as good as fine-tuned ones (AFT).

    Takes the masks of aft gen-masks in RUN/masks and writes RUN/tuned/MODEL-CAM.safetensors, which
    --checkpoint takes. Stopped at any point, the same command goes on. Runs on several processes
    under torchrun or accelerate launch.
    """
    cams, wanted = v.methods(cam), v.export(export)
    if no_masks and cam:
        raise AftError("--no-masks and --cam exclude each other: a control has no CAM")
    if split and not no_masks:
        raise AftError("--split goes with --no-masks: masks know the images that they were made of")
    v.without_masks(no_masks, lam=lam, consistency=consistency, classification=classification)
    v.precision(precision)
    setup.check(device, checkpoint, classes, dataset)

    from aftcli.aft import jobs as finetune_jobs
    from aftcli.aft import run as tuning
    from aftcli.aft.recipes import in_situation
    from aftcli.cli.memory import keep_freed_memory
    from aftcli.engine.accelerate import check_engine, fast_stem
    from aftcli.engine.export import check_onnx
    from aftcli.report import tuned as report_tuned

    if wanted:
        check_onnx()
    settings = in_situation(
        lam=lam,
        learning_rate=lr,
        epochs=epochs,
        batch=batch_size,
        patience=patience,
        held_out=held_out,
        seed=seed,
        objective=objective,
        consistency=consistency,
        classification=classification,
        blend=blend,
    )
    check_engine(engine)
    accelerator = setup.accelerator(device, precision)
    note = setup.noting(quiet or accelerator.process_index > 0)
    options = tuning.Options(
        cache,
        augment,
        setup.workers(workers),
        overwrite,
        fast_stem=lambda f, stem, passes: fast_stem(f, stem, engine, passes, note),
    )
    from aftcli.tft.stores import Source

    *earlier, last = layer or [""]
    names = setup.names(classes)
    source = Source(
        model, checkpoint, last or None, names, accelerator.device, tuple(earlier), note=note
    )
    keep_freed_memory()
    if no_masks:
        jobs = finetune_jobs.control_jobs(run, source, dataset, split, limit, seed)
    else:
        jobs = finetune_jobs.mask_jobs(run, source, cams, dataset, limit)
    events = tuning.fine_tune(jobs, run, settings, options, accelerator)
    tuned = report_tuned.watch(events, quiet or accelerator.process_index > 0)
    if accelerator.process_index == 0:
        exported = [report_tuned.export(t.path) for t in tuned] if wanted else []
        report_tuned.print_tuned(tuned, exported, json)


@app.command(cls=Command)
def evaluate(
    dataset: o.DatasetArgument = None,
    split: o.SplitOption = None,
    table: o.TableOption = None,
    format_: o.FormatOption = "table",
    paper: o.PaperOption = False,
    baselines: o.BaselinesOption = False,
    metrics: o.MetricsOption = None,
    ci: o.CiOption = False,
    sanity: o.SanityOption = False,
    figures: o.FiguresOption = False,
    image: o.FigureImageOption = None,
    model: o.ModelOption = None,
    checkpoint: o.CheckpointOption = None,
    classes: o.ClassesOption = None,
    layer: o.LayerOption = None,
    cam: o.CamsOption = None,
    cells: o.CellsOption = False,
    limit: o.LimitOption = None,
    thresholds: o.ThresholdsOption = "",
    masking: o.ReadingsOption = "both",
    fill: o.FillOption = "",
    threshold_mode: o.ThresholdModeOption = "",
    run: o.RunOption = Path("aft-run"),
    overwrite: o.OverwriteOption = False,
    device: o.DeviceOption = "auto",
    engine: o.EngineOption = "auto",
    batch_size: o.BatchSizeOption = 16,
    workers: o.WorkersOption = None,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Measure maps without and with TFT, and those of tuned networks: the paper's tables.

    Takes all masks and tuned networks of RUN and the val split of their data set. Results are
    kept in RUN/results: a second call finds them, an interrupted one goes on. TFT's settings are
    those of the masks. Runs on several processes under torchrun or accelerate launch.
    """
    words = v.chosen("json" if json else format_, v.FORMATS, "--format")
    tables, columns, maskings = v.tables(table), measures(metrics), v.maskings(masking)
    cams = v.methods(cam)
    setup.check(device, checkpoint, classes, dataset)
    settings = setup.settings(
        thresholds or "0:1:0.1", "binary", fill or "mean", threshold_mode or "value"
    )

    from aftcli.cli import study as report_study
    from aftcli.cli.memory import keep_freed_memory
    from aftcli.evaluation.study import Asked
    from aftcli.report import formats as report_evaluate
    from aftcli.report.grids import Shown
    from aftcli.tft.stores import Source

    wanted = report_study.Wanted(tables, columns, maskings, baselines, sanity, figures)
    processes, device = setup.processes(device)
    note = setup.noting(quiet or processes.index > 0)
    names, where = setup.names(classes), setup.device(device)
    source = Source(model, checkpoint, layer, names, where, note=note)
    asked = Asked(
        source,
        cams,
        dataset,
        split,
        limit,
        settings.thresholds if thresholds else None,
        fill or None,
        threshold_mode or None,
        cells,
    )
    keep_freed_memory()
    accelerate = setup.engine(engine, "no", quiet or processes.index > 0)
    note = setup.noting(quiet)
    how = report_study.How(setup.workers(workers), batch_size, overwrite, quiet, accelerate, note)
    found = report_study.evaluate(run, asked, wanted, how, processes)
    if processes.index == 0:
        shown = Shown(ci, paper)
        report_evaluate.FORMATS[words](found.tables, shown)
        if figures:
            report_study.write_figures(found, run, shown, image or [], words == "table")


def _show(show: Path | None, json: bool) -> None:
    if show is None:
        raise AftError("name a DATASET to make masks of, or --show FILE to see what a file holds")

    from aftcli.report import masks as report_masks

    report_masks.show_store(show, json)


def main() -> None:
    """Run the command line; every error ends here."""
    if "--debug" not in sys.argv:
        _silence_libraries()
    else:
        sys.excepthook = say_traceback
    _say_warnings()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with Stopping() as stopping:
        try:
            code = _run(stopping)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if stopping.signal or code == INTERRUPTED:
            code = stopping.tell(sys.argv[1:])
    sys.exit(code)


def _run(stopping: Stopping) -> str | int | None:
    """Run the command; its exit code."""
    debug = "--debug" in sys.argv
    try:
        try:
            app(v.with_table(sys.argv[1:]), prog_name="aft")
        except SystemExit as end:
            flush()
            return end.code
    except BrokenPipeError:
        sys.stderr.close()
    except Exception as error:
        # A signal amid a library's work may come out as an error of its own.
        if stopping.signal:
            return INTERRUPTED
        if debug:
            raise
        complain(what_is_wrong(error))
        with contextlib.suppress(OSError, AftError):
            flush()
    return 1


def _say_warnings() -> None:
    """Say our own warnings as everything else is said, once each."""
    usual, said = warnings.showwarning, set[str]()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, AftWarning):
            if str(message) not in said:
                complain(str(message))
            said.add(str(message))
        else:
            usual(message, category, filename, lineno, file, line)

    # Not "default": libraries that change filters let it forget what was said.
    warnings.simplefilter("always", AftWarning)
    warnings.showwarning = show


def _silence_libraries() -> None:
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # Pillow tells of damaged files in its own words
