"""Options that several commands have, in groups: a dataclass holds one panel of the help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from aftcli.core.methods import check_device, spelled
from aftcli.errors import AftError, UsageError
from aftcli.options import complete
from aftcli.options.make import number, option, usage, words
from aftcli.options.read import asked_too
from aftcli.settings import (
    Fill,
    Fuse,
    Masking,
    Mode,
    Output,
    Search,
    SearchKind,
    Shaping,
    Smooth,
    read_thresholds,
)

# As in aftcli.engine.accelerate.
Engine = Literal["auto", "torch", "compile", "onnxruntime"]
Precision = Literal["no", "bf16", "fp16"]

NO_CHECKPOINT = "none"  # the published weights, beside checkpoints of the same model


def check_layers(names: list[str]) -> None:
    """Refuse a layer without a name, which would be the default one, and a layer twice."""
    if "" in names:
        raise AftError("a layer has a name; leave --layer out for the default one")
    if len(set(names)) < len(names):
        raise AftError(f"--layer names a layer twice: {', '.join(names)}")


def check_layer(names: list[str]) -> None:
    """Refuse several layers where one is cut."""
    check_layers(names)
    if len(names) > 1:
        raise AftError("give --layer once; aft explain and aft tft fuse the maps of several")


def check_model(names: list[str]) -> None:
    """Refuse several networks where one is read."""
    if len(names) > 1:
        raise AftError("give --model once; aft explain compares several networks")


def check_checkpoint(paths: list[Path]) -> None:
    """Refuse several checkpoints where one is read."""
    if len(paths) > 1:
        raise AftError("give --checkpoint once; aft explain compares several")


LowerPrecision = Annotated[Precision, words("--precision", Precision, "Faster, less exact")]


def layer_names(help: str, check: Callable[[list[str]], None] = check_layers) -> Any:  # noqa: ANN401 - typer's
    """Make the option of layers' names; a check may refuse several."""
    return option("--layer", "NAME", help, callback=usage(check), autocompletion=complete.layers)


def method_names(help: str) -> Any:  # noqa: ANN401 - typer's
    """Make the option of methods' names."""
    return option(
        "--cam --method",
        "METHOD",
        help,
        callback=usage(spelled),
        autocompletion=complete.methods,
    )


@dataclass(frozen=True)
class Weights:
    """The network."""

    PANEL: ClassVar[str] = "Network"

    models: Annotated[
        list[str] | None,
        option(
            "--model",
            "NAME",
            "Of torchvision, timm:NAME, hf:DIR or FILE.py:NAME (runs your code). "
            "Default: efficientnet_lite0.",
            callback=usage(check_model),
            autocompletion=complete.models,
        ),
    ] = None
    checkpoints: Annotated[
        list[Path] | None,
        option(
            "--checkpoint",
            "FILE",
            "Weights: of aft finetune, or a state dict.",
            callback=usage(check_checkpoint),
        ),
    ] = None
    classes: Annotated[
        Path | None,
        option("--classes", "FILE", "Class names, one a line."),
    ] = None
    output: Annotated[
        Output,
        words("--output", Output, "Last step"),
    ] = "auto"
    output_key: Annotated[
        str | None,
        option("--output-key", "KEY", "Name of the output that has the logits."),
    ] = None

    @property
    def model(self) -> str | None:
        """The first model; None for the default one."""
        return self.models[0] if self.models else None

    @property
    def checkpoint(self) -> Path | None:
        """The first checkpoint; None for the published weights."""
        return self.checkpoints[0] if self.checkpoints else None


@dataclass(frozen=True)
class Network(Weights):
    """The network and its layer."""

    layers: Annotated[
        list[str] | None, layer_names("Name or names, a+b. Default: automatic.", check_layer)
    ] = None

    @property
    def layer(self) -> str | None:
        """The first layer; None for the default one."""
        return self.layers[0] if self.layers else None


@dataclass(frozen=True)
class LayeredNetwork(Network):
    """The network as it explains images: the layers whose maps are fused, its precision."""

    layers: Annotated[
        list[str] | None, layer_names("Name or a+b; repeat to fuse. Default: automatic.")
    ] = None
    precision: Annotated[Precision, words("--precision", Precision, "Faster, less exact")] = "no"


@dataclass(frozen=True)
class ComparedNetworks(LayeredNetwork):
    """The networks that explain each image, and what they have in common."""

    models: Annotated[
        list[str] | None,
        option(
            "--model",
            "NAME",
            "NAME, timm:NAME, hf:DIR, FILE.py:NAME; repeatable.",
            autocompletion=complete.models,
        ),
    ] = None
    checkpoints: Annotated[
        list[Path] | None,
        option("--checkpoint", "FILE", "Tuned, or a state dict, or none; repeatable."),
    ] = None

    def each(self) -> list[LayeredNetwork]:
        """List the networks: one for each model, or for each checkpoint.

        Raises:
            UsageError: a network is named twice, or checkpoints are given for several models.
        """
        models, files = self.models or [], self.checkpoints or []
        for option_, given in (("--model", models), ("--checkpoint", files)):
            if twice := [each for i, each in enumerate(given) if each in given[:i]]:
                raise UsageError(f"{option_} names {twice[0]} twice; name each network once")
        if len(models) > 1 and files:
            raise UsageError(
                "--checkpoint belongs to one network: give --model once, or leave --checkpoint out"
            )
        shared = {each.name: getattr(self, each.name) for each in fields(self)}

        def one(model: list[str], file: Path | None = None) -> LayeredNetwork:
            own = [file] if file and str(file) != NO_CHECKPOINT else None
            return LayeredNetwork(**{**shared, "models": model, "checkpoints": own})

        if files:
            return [one(models, file) for file in files]
        return [one([model]) for model in models] or [one([])]


@dataclass(frozen=True)
class Methods:
    """Options of the maps."""

    PANEL: ClassVar[str] = "Map"

    cam: Annotated[list[str] | None, method_names("Method or family, see below; repeatable.")] = (
        None
    )


@dataclass(frozen=True)
class Maps(Methods):
    """The maps that are compared."""

    cells: Annotated[
        bool,
        option("--cells", "", "Average pixel maps over the layer's cells."),
    ] = False


@dataclass(frozen=True)
class TargetMaps(Maps):
    """The maps, and the classes that they explain."""

    # Of the layers that are named there.
    PANELS: ClassVar[dict[str, str]] = {"fuse": Weights.PANEL}

    target: Annotated[
        list[str] | None,
        option(
            "--target",
            "CLASS",
            "Name or index; repeatable. Default: predicted.",
            autocompletion=complete.classes,
        ),
    ] = None
    target_fn: Annotated[
        str | None,
        option("--target-fn", "FN", "Explain your score: runs FILE.py:NAME."),
    ] = None
    top_k: Annotated[int, number("--top-k", "N", "top_k", "Explain the N likeliest classes.")] = 1
    smooth: Annotated[Smooth, words("--smooth", Smooth, "Smooth")] = "none"
    fuse: Annotated[Fuse | None, words("--fuse", Fuse, "Combine layers by")] = None

    @property
    def fusion(self) -> Fuse:
        """Way to combine the maps of several layers."""
        return self.fuse or "max"

    @property
    def shaping(self) -> Shaping:
        """Steps that change a method's map."""
        return Shaping(self.cells, 0.0, self.smooth, self.fusion)


@dataclass(frozen=True)
class Thresholds:
    """The search of thresholds."""

    PANEL: ClassVar[str] = "Threshold search"

    thresholds: Annotated[
        str,
        option("--thresholds", "LIST", "0:1:0.1 or 0,0.2,0.5.", callback=usage(read_thresholds)),
    ] = "0:1:0.1"
    masking: Annotated[
        Masking,
        words("--masking", Masking, "Masks"),
    ] = "binary"
    fill: Annotated[
        Fill,
        words("--fill", Fill, "Muted pixels"),
    ] = "mean"
    mode: Annotated[
        Mode,
        words("--threshold-mode", Mode, "Cut scores by"),
    ] = "value"
    search: Annotated[
        SearchKind,
        words("--search", SearchKind, "Try all or few"),
    ] = "exact"

    def settings(self) -> Search:
        """Read the settings.

        Raises:
            AftError: the thresholds can't be read.
        """
        values = read_thresholds(self.thresholds)
        return Search(values, self.masking, self.fill, self.mode, self.search)


@dataclass(frozen=True)
class JudgedThresholds(Thresholds):
    """The search of thresholds, and who else it asks."""

    judges: Annotated[
        list[str] | None,
        option(
            "--tft-judges",
            "NAME",
            "Ask mirror or a network too; repeatable.",
            callback=usage(asked_too),
            autocompletion=complete.models,
        ),
    ] = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the judges that are asked beside the network."""
        return asked_too(self.judges or ())


@dataclass(frozen=True)
class Printed:
    """Options of what is printed."""

    PANEL: ClassVar[str] = "Output"

    json: Annotated[bool, option("--json", "", "Print the result as JSON instead of a table.")] = (
        False
    )


@dataclass(frozen=True)
class Run:
    """Options of how the command runs."""

    PANEL: ClassVar[str] = "Run"

    device: Annotated[
        str,
        option(
            "--device",
            "NAME",
            "auto (default), cpu, cuda, cuda:N or mps.",
            show_default=False,
            callback=usage(check_device),
            envvar="AFT_DEVICE",
            show_envvar=False,
        ),
    ] = "auto"
    engine: Annotated[
        Engine,
        words(
            "--engine",
            Engine,
            "",
            envvar="AFT_ENGINE",
            show_envvar=False,
        ),
    ] = "auto"
    quiet: Annotated[bool, option("--quiet", "", "No progress, no notes.")] = False
    debug: Annotated[bool, option("--debug", "", "Show the traceback of an error.")] = False


@dataclass(frozen=True)
class StudyRun(Run):
    """Options of how a command of a study runs."""

    run: Annotated[
        Path,
        option("--run", "DIR", "Has masks/, tuned/, results/."),
    ] = Path("aft-run")
    overwrite: Annotated[bool, option("--overwrite", "", "Start again instead of resuming.")] = (
        False
    )
    workers: Annotated[
        int | None,
        number(
            "--workers",
            "N",
            "workers",
            "Processes that decode images. Default: half the cores, at most 8.",
        ),
    ] = None


@dataclass(frozen=True)
class EvaluateRun(StudyRun):
    """Options of how an evaluation runs."""

    batch: Annotated[int, number("--batch-size", "N", "batch", "Images in one pass.")] = 16
