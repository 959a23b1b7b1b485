"""Reports of fine-tuning: progress, tables, loss curves, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table

from aftcli.aft.examples import Cached, Note
from aftcli.aft.loss import OBJECTIVES, ZERO_LEVEL, situation_of
from aftcli.aft.run import Begun, Event, Tuned
from aftcli.aft.training import Epoch, Measured, Step
from aftcli.aft.zero_level import Chosen, Searching
from aftcli.files import durable
from aftcli.report.terminal import PlainColumn, cell, say, stdout_console
from aftcli.settings import JUDGES
from aftcli.tft.judges import judges_named

LINES = 20  # of epochs, about, after the first

FEWEST = 10  # images that one trains on


class _Watch:
    """A display of events as they come; without a terminal, lines of epochs."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.console = quiet, Console(stderr=True, highlight=False)
        self.bar = Progress(
            PlainColumn(),
            BarColumn(bar_width=8),  # a line of 80 columns has the losses too
            TimeRemainingColumn(),
            PlainColumn("{task.fields[losses]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.begun: Begun | None = None

    def show(self, event: Event) -> None:
        if isinstance(event, Cached):
            masked = " masked" if event.masked else ""
            what = f"{event.split or 'images'}{masked} behind w0 ({event.where})"
            count = f"{event.images}/{event.total}"
            self._update(what, event.images, event.total, count)
            if event.images >= event.total:
                self._close()
        elif isinstance(event, Begun):
            self._close()
            self.begun = event
            for line in _beginning(event):
                self._say(line)
            if event.train < FEWEST and event.settings.objective != ZERO_LEVEL:
                images = "1 image is" if event.train == 1 else f"{event.train} images are"
                self._say(f"aft: {images} no training set; what the network learns is these alone")
            for broken in event.broken[:20]:
                self._say(f"left out {broken.path}: {broken.reason}")
        elif isinstance(event, Step):
            assert self.begun
            done = (event.epoch - 1) * event.steps + event.step
            total = event.steps * self.begun.epochs
            self._update(f"epoch {event.epoch}", done, total, _losses(event.train))
        elif isinstance(event, Searching):
            if not event.images:
                self._close()  # the epochs' bar counts something else
            of_total = f"{event.images}/{event.total} images"
            self._update("zero level", event.images, event.total, of_total)
        elif isinstance(event, Chosen):
            self._close()
            self._say(_chosen_line(event))
        elif isinstance(event, Epoch):
            if (event.train or event.held_out) and self._is_told(event.number):
                self._say(_epoch_line(event))
        elif isinstance(event, Note):
            self._say(f"aft: {event.text}")
        else:
            self._close()

    def _is_told(self, epoch: int) -> bool:
        """Tell if an epoch gets a line: of very many, every so often one."""
        total = self.begun.epochs if self.begun else 0
        return epoch <= LINES // 2 or epoch == total or epoch % -(-total // LINES or 1) == 0

    def _update(self, what: str, done: int, total: int, losses: str) -> None:
        if self.task is None:
            # Started where training resumes, so that the time left is right.
            self.task = self.bar.add_task(what, total=total, completed=done, losses=losses)
        self.bar.update(self.task, description=what, completed=done, losses=losses)

    def _close(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = None

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(cell(text), soft_wrap=True)


def watch(events: Iterator[Event], quiet: bool) -> list[Tuned]:
    """Run to the end, showing epoch, losses by name, accuracy and the time left on stderr."""
    shown = _Watch(quiet)
    tuned = []
    with shown.bar:
        for event in events:
            shown.show(event)
            if isinstance(event, Tuned):
                tuned.append(event)
    return tuned


def _beginning(begun: Begun) -> tuple[str, str]:
    job = begun.job
    head = f" and a new head of {len(job.f.classes)} classes" if job.new_head else ""
    tuner = "" if job.masks is None else " and the tuner"
    resumed = f", resuming after epoch {begun.epoch}" if begun.epoch else ""
    recipe = f"{_recipe(begun)}; {begun.why}" if begun.why else _recipe(begun)
    asked = (job.made or {}).get(JUDGES)
    judged = f"; the search of the masks asked {judges_named(asked)}" if asked else ""
    if asked and begun.settings.objective == ZERO_LEVEL:
        judged += ", t asks the network alone"
    images = f"{begun.train} images, {begun.held_out} held out{resumed}{judged}"
    if begun.settings.objective == ZERO_LEVEL:
        first = f"{job.name}: learning the zero level at {job.f.layer_name} from {images}"
        return first, recipe
    layers = ", ".join([*(job.earlier.names if job.earlier else ()), job.f.layer_name])
    return (
        f"{job.name}: training {layers}{head}, what follows it{tuner} on {images}",
        recipe,
    )


def _recipe(begun: Begun) -> str:
    """Return the line that says what is minimised, and whose defaults that are."""
    own = begun.settings
    if own.objective == ZERO_LEVEL:
        asked = "Average Increase less Average Drop on training images chooses t"
        if own.gauge == "t":
            return f"{asked}, alone; no probability changes"
        how = f"v and t by Adam, learning rate {own.learning_rate:g}, {own.epochs} epochs"
        learned = f"cross-entropy of the map's support and the masks; {how}"
        return f"{learned}; then {asked} again; no probability changes"
    parts = ["cross-entropy" if own.classification == "labels" else "distillation"]
    if own.lam is not None:
        what = OBJECTIVES[own.objective].title
        parts.append(f"{own.lam:g} x distance of the {what} from the masks")
    if own.consistency:
        parts.append(f"{own.consistency:g} x cross-entropy on what the masks keep")
    blend = f", blend {own.blend:g}" if own.blend < 1 else ""
    return (
        f"{' + '.join(parts)}; learning rate {own.learning_rate:g}, at most {own.epochs} epochs"
        f"{blend} (defaults for {situation_of(begun.job, own.objective).title})"
    )


def _losses(m: Measured) -> str:
    mask = f", mask {m.mask:.3f}" if m.mask else ""
    masked = f", masked {m.consistency:.3f}" if m.consistency else ""
    return f"cross-entropy {m.cross_entropy:.4f}{mask}{masked}, accuracy {m.accuracy:.1%}"


def _epoch_line(epoch: Epoch) -> str:
    parts = [f"epoch {epoch.number}:"] if epoch.number else ["before:"]
    if epoch.train:
        parts.append(f"{_losses(epoch.train)};")
    if epoch.held_out:
        parts.append(f"held out: {_losses(epoch.held_out)}")
    return " ".join(parts).rstrip(";")


def _chosen_line(chosen: Chosen) -> str:
    before, after = chosen.before, chosen.after
    return (
        f"zero level {chosen.t:.3g} ({100 * after.share:.3g} % of the maps' mean maximum): "
        f"increase {before.increase:.3f} -> {after.increase:.3f}, "
        f"drop {before.drop:.3f} -> {after.drop:.3f} on {chosen.images} training images"
    )


def print_tuned(tuned: list[Tuned], exported: list[Path], json_: bool) -> None:
    """Print the results of finetune, before and after, and draw the loss curves."""
    results = []
    for each in tuned:
        curve = each.path.with_name(f"{each.path.stem}-loss.png")
        if not (each.before and curve.exists()):
            with durable(curve) as temporary:
                draw_losses(temporary, each.card)
        shown = {k: v for k, v in each.card.items() if k != "trained_contents"}  # a hash an image
        results.append({**shown, "path": str(each.path), "figure": str(curve)})
    if json_:
        for result, path in zip(results, exported, strict=False):
            result["onnx"] = str(path)
        print(json.dumps(results, indent=2), flush=True)
        return
    stdout_console(200).print(_table(results))
    for card in results:
        if (share := card.get("blend", 1)) < 1:
            name, epoch = card["cam"] or "control", card["metrics"]["epoch"]
            say(
                f"{name}: the row of epoch {epoch} is of the network as written, with {share:g} of "
                "the training's change in weights (blend); the lines of epochs are of all of it"
            )
    for each, result in zip(tuned, results, strict=True):
        done = "there already" if each.before else "wrote"
        say(f"{done} {result['path']}")
        say(f"{done} {result['figure']}")
    for path in exported:
        say(f"wrote {path}")


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "cam", "measured on"):
        table.add_column(name)
    for name in ("images", "epoch", "accuracy", "cross-entropy", "mask loss"):
        table.add_column(name, justify="right")
    for card in results:
        metrics = card["metrics"]
        for where, title in (("held_out", "train, held out"), ("val", "val")):
            for when, epoch in (("before", 0), ("after", metrics["epoch"])):
                m = metrics[when][where]
                if m is None:
                    continue
                # A tuner, or a head, that was not trained yet says nothing.
                new = when == "before" and card["new_head"]
                untrained = when == "before" and card.get("objective") != ZERO_LEVEL
                mask = where == "val" or card["cam"] is None or untrained
                table.add_row(
                    cell(card["model"]),
                    cell(card["cam"] or "control"),
                    title,
                    str(m["images"]),
                    str(epoch),
                    "-" if new else f"{m['accuracy']:.1%}",
                    "-" if new else f"{m['cross_entropy']:.4f}",
                    "-" if mask else f"{m['mask']:.3f}",
                )
    return table


def draw_losses(path: Path, card: dict[str, Any]) -> None:
    """Draw a checkpoint's cross-entropy, mask loss and accuracy over the epochs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = [Epoch.from_dict(e) for e in card["metrics"]["history"]]
    panels = ["cross_entropy", *(["mask"] if card["cam"] else []), "accuracy"]
    titles = {
        "cross_entropy": "cross-entropy",
        "mask": f"mask loss, {'mean' if card.get('objective') == ZERO_LEVEL else 'sum'} over cells",
        "accuracy": "accuracy",
    }
    figure = Figure(figsize=(3.6 * len(panels), 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    best = card["metrics"]["epoch"]
    for ax, what in zip(figure.subplots(1, len(panels)), panels, strict=True):
        # An untrained tuner or head would set the scale of its panel.
        untrained = what == "mask" and card.get("objective") != ZERO_LEVEL
        first = 1 if untrained or card["new_head"] else 0
        for name, colour in (("train", "tab:blue"), ("held_out", "tab:orange")):
            means = [(e.number, getattr(e, name)) for e in history[first:]]
            points = [(n, getattr(m, what)) for n, m in means if m]
            label = "training images" if name == "train" else "held-out training images"
            if points:
                ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=label)
        ax.axvline(best, color="grey", linestyle="--", linewidth=1, label=f"chosen: epoch {best}")
        ax.set_title(titles[what], fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=7)
    title = f"{card['model']}, {card['cam'] or 'control'}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, format="png")


def export(path: Path, model: str | None = None, quiet: bool = False) -> Path:
    """Write a checkpoint's network and plain map as one ONNX graph beside it."""
    from aftcli.engine.export import export_onnx

    target = path.with_suffix(".onnx")
    if not quiet:
        say(f"exporting {target}", aside=True)
    with durable(target) as temporary:
        export_onnx(path, temporary, model)
    return target
