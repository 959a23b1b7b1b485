"""Each command-line option, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aftcli.cli.values import SAVE
from aftcli.core.methods import FAMILIES, METHODS
from aftcli.engine.accelerate import CHOICES, TOLERANCES
from aftcli.evaluation.measures import MEASURES

FAMILY_HELP = "; ".join(
    f"{family}: {', '.join(n for n, e in METHODS.items() if e.family == family)}"
    for family in FAMILIES
)

ImagesArgument = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or globs.")
]

ImageArgument = Annotated[str, typer.Argument(metavar="IMAGE", help="A picture.")]

MapOption = Annotated[
    Path | None,
    typer.Option(
        "--map",
        metavar="FILE",
        help="Attribution map of any tool: .npy, .npz or a grey picture, of what the network sees "
        "or of the whole picture, any size, any finite scale. Default: our own, of --cam.",
    ),
]

AbsoluteOption = Annotated[
    bool,
    typer.Option("--absolute", help="Take the map's magnitudes; else negatives become zero."),
]

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="efficientnet_lite0 (weights installed, works offline), a torchvision CNN "
        "(resnet50, vgg16, ...) or timm:NAME. Default: that of a tuned --checkpoint or of the "
        "masks, else efficientnet_lite0.",
    ),
]

CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="What aft finetune wrote (it knows its model, layer, classes and CAM), or a state "
        "dict for the model (.safetensors, .pth, .pt). Default: published weights.",
    ),
]

ClassesOption = Annotated[
    Path | None,
    typer.Option("--classes", metavar="FILE", help="Class names, one a line, literal."),
]

LayerOption = Annotated[
    str | None,
    typer.Option(
        "--layer",
        metavar="NAME",
        help="Layer l by its module name; consecutive ones joined by +. Default: the last "
        "convolutional one.",
    ),
]

LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="NAME",
        help="Layer l by its module name; consecutive ones joined by +. Default: that of the "
        "masks. Repeated, all are tuned together: the masks' last, before it earlier ones.",
    ),
]

CamsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cam",
        "--method",
        metavar="METHOD",
        help=f"{FAMILY_HELP}. Repeatable; all is every CAM, and activation, gradient, "
        "decomposition and perturbation are those of a family. Default: that of a tuned "
        "--checkpoint, else layercam to explain and gradcam elsewhere; finetune and evaluate "
        "take all masks.",
    ),
]

CellsOption = Annotated[
    bool,
    typer.Option(
        "--cells",
        help="Average maps of pixels (of gradients, relevance, ...) over the layer's cells, so "
        "that thresholds cut regions. CAMs are of cells anyway.",
    ),
]

TftOption = Annotated[
    bool, typer.Option("--tft", help="Find the threshold that explains this image best.")
]

TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="CLASS",
        help="Class to explain, by name or index; repeatable. Default: the predicted one.",
    ),
]

TopKOption = Annotated[
    int, typer.Option("--top-k", metavar="N", min=1, help="Explain the N likeliest classes.")
]

ThresholdOption = Annotated[
    float | None,
    typer.Option("--threshold", metavar="T", help="Mute scores below T, in [0, 1]."),
]

MuteOption = Annotated[
    float | None,
    typer.Option("--mute", metavar="PERCENT", help="Mute the lowest PERCENT of the map."),
]

ThresholdsOption = Annotated[
    str,
    typer.Option("--thresholds", metavar="LIST", help="Thresholds to try: 0:1:0.1 or 0,0.2,0.5."),
]

MaskingOption = Annotated[
    str,
    typer.Option(
        "--masking",
        metavar="binary|soft",
        help="Multiply the image by the mask (the paper's text) or by the muted map (the "
        "authors' code).",
    ),
]

FillOption = Annotated[
    str, typer.Option("--fill", metavar="mean|black|blur", help="What muted pixels show.")
]

ThresholdModeOption = Annotated[
    str,
    typer.Option(
        "--threshold-mode",
        metavar="value|percentile",
        help="Thresholds cut scores, or ranks of scores.",
    ),
]

SearchOption = Annotated[
    str,
    typer.Option(
        "--search",
        metavar="exact|fast",
        help="Try all thresholds (Algorithm 1), or some, coarse to fine: for fine grids.",
    ),
]

DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
]

EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="|".join(CHOICES),
        envvar="AFT_ENGINE",
        help="What runs the network; results are the same up to rounding. auto: onnxruntime for "
        "many images on a CPU, torch on a GPU, else the network as it is.",
    ),
]

LowerOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="|".join(TOLERANCES),
        help="Run the network in lower precision, for speed on GPUs; results then differ.",
    ),
]

OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Where the files go; made if missing.")
]

SaveOption = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar=",".join(SAVE),
        help="What to write: the picture with the map on it, the paper's Figure 3 row, I as "
        ".npy, the mask as .png. Default: overlay; with --tft figure too.",
    ),
]

DatasetArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DATASET]",
        help="A folder of class folders, one with train/ and val/ of such (ImageNet; other "
        "usual names do, too), or a VOCdevkit. finetune and evaluate know it from the masks.",
        show_default=False,
    ),
]

SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help="Part of the data set. Default: train, of evaluate val, where it has parts.",
    ),
]

LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Take N images, spread over the classes."),
]

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew instead of going on.")
]

StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at an image that can't be read.")
]

ShowOption = Annotated[
    Path | None,
    typer.Option("--show", metavar="FILE", help="Print what a mask file holds, and check it."),
]

RunOption = Annotated[
    Path,
    typer.Option("--run", metavar="DIR", help="Where a study lives: masks/, tuned/, results/."),
]

BatchSizeOption = Annotated[
    int,
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        help="Images in one pass of the stem; of finetune, in one step of training.",
    ),
]

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=0,
        help="Processes that decode images. Default: half the cores, at most 8.",
    ),
]

NoMasksOption = Annotated[
    bool,
    typer.Option(
        "--no-masks",
        help="Plain cross-entropy on the same weights and the images of RUN's masks: the control; "
        "with a DATASET of other classes than the model's it makes a new last layer for them.",
    ),
]

LamOption = Annotated[
    float | None,
    typer.Option(
        "--lam",
        metavar="L",
        help="lambda of eq. 8, for a sum over the mask's cells. Default: by the situation, which "
        "finetune names.",
    ),
]

ObjectiveOption = Annotated[
    str,
    typer.Option(
        "--objective",
        metavar="tuner|cam",
        help="What is held against the masks: the tuner's output (the paper), or the CAM itself.",
    ),
]

ConsistencyOption = Annotated[
    float | None,
    typer.Option(
        "--consistency",
        metavar="W",
        help="Weight of the classification loss on what the masks keep of the images; 0 is the "
        "paper. Default: by the situation.",
    ),
]

ClassificationOption = Annotated[
    str | None,
    typer.Option(
        "--classification",
        metavar="labels|distillation",
        help="What teaches the classes of whole images: labels (the paper), or the network's own "
        "probabilities before. Default: by the situation.",
    ),
]

LearningRateOption = Annotated[
    float | None,
    typer.Option(
        "--lr",
        metavar="RATE",
        help="Learning rate of Adam. Default: by the situation.",
    ),
]

EpochsOption = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        min=1,
        help="Epochs at the most. Default: by the situation.",
    ),
]

PatienceOption = Annotated[
    int,
    typer.Option(
        "--patience",
        metavar="N",
        min=0,
        help="Stop after N epochs without a better loss on held-out training images; 0 never.",
    ),
]

HeldOutOption = Annotated[
    float,
    typer.Option(
        "--held-out",
        metavar="SHARE",
        help="Share of the training images that choose the epoch instead of being trained on.",
    ),
]

SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of all randomness.")]

CacheOption = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="auto|memory|disk|off",
        help="Where the outputs of the frozen layers are kept; auto takes the first with room.",
    ),
]

AugmentOption = Annotated[
    bool, typer.Option("--augment", help="Flip and crop the images at random; nothing is cached.")
]

PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|no|bf16|fp16",
        help="Mixed precision; auto is what accelerate launch says, else no.",
    ),
]

BlendOption = Annotated[
    float | None,
    typer.Option(
        "--blend",
        metavar="SHARE",
        help="Go so far from the weights before to the trained ones, above 0 to 1; less keeps more "
        "of the accuracy. Default: by the situation.",
    ),
]

ExportOption = Annotated[
    str | None,
    typer.Option(
        "--export",
        metavar="onnx",
        help="Also write the network and its map as one graph for other runtimes.",
    ),
]

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON instead of a table.")
]

QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.")]

TableOption = Annotated[
    str | None,
    typer.Option(
        "--table",
        metavar="[1|2|3|4|5|all]",
        help="Which of the paper's tables: 3 measures of maps, 4 accuracies, 5 seconds a map; 1 "
        "published cut-offs, 2 data sets. Alone: 3, 4 and 5. Default: 3 and 4.",
    ),
]

FormatOption = Annotated[
    str,
    typer.Option(
        "--format", metavar="table|json|csv|markdown|latex", help="How the tables are printed."
    ),
]

PaperOption = Annotated[
    bool, typer.Option("--paper", help="Show the published figures beside ours.")
]

BaselinesOption = Annotated[
    bool,
    typer.Option("--baselines", help="Also a column of the fixed cut-offs of Table 1."),
]

CiOption = Annotated[
    bool,
    typer.Option(
        "--ci", help="Show bootstrap 95 % intervals, and the paired differences of the columns."
    ),
]

MetricsOption = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="LIST",
        help=f"Measures of Table 3, separated by commas: {', '.join(MEASURES)}; or all. Default: "
        "the paper's two.",
    ),
]

ReadingsOption = Annotated[
    str,
    typer.Option(
        "--masking",
        metavar="both|binary|soft",
        help="Multiply the image by the mask (the paper's text), by the muted map (the authors' "
        "code), or give a table of each.",
    ),
]

SanityOption = Annotated[
    bool,
    typer.Option(
        "--sanity", help="Also compare the maps with those of networks with random weights."
    ),
]

FiguresOption = Annotated[
    bool,
    typer.Option(
        "--figures",
        help="Also draw Figure 3, the distribution of tau* and RPI curves, and write one HTML "
        "page of all, to RUN/results.",
    ),
]

FigureImageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="NAME",
        help="An image of Figure 3, by a part of its name; repeatable. Default: 3, spread.",
    ),
]

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
