"""Options of data sets: which one, its format and split, and what is taken of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from aftcli.data.names import check_format
from aftcli.options import complete
from aftcli.options.make import number, option, usage, words

ValShare = Annotated[
    float | None,
    number("--val-share", "SHARE", "val_share", "Share for val if there is none. Default: 0.2."),
]


Labels = Literal["largest", "all"]

LabelsOption = Annotated[
    Labels | None,
    words("--labels", Labels, "Classes of an image", default=False),
]


@dataclass(frozen=True)
class Data:
    """The data set."""

    PANEL: ClassVar[str] = "Data"

    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATASET]",
            help="Class folders, VOCdevkit, COCO, CSV, *.tar, *.parquet or torchvision:NAME=DIR. "
            "Default: the masks'.",
            show_default=False,
        ),
    ] = None
    split: Annotated[
        str | None,
        option(
            "--split",
            "NAME",
            "Split to use. Default: train; val to evaluate.",
        ),
    ] = None
    data_format: Annotated[
        str | None,
        option(
            "--data-format",
            "NAME",
            "Name of its format. Default: by its content.",
            callback=usage(check_format),
            autocompletion=complete.formats,
        ),
    ] = None
    download: Annotated[
        bool, option("--download", "", "Let torchvision download its data set to DIR.")
    ] = False
    limit: Annotated[
        int | None,
        number("--limit", "N", "limit", "Take N images, spread over the classes."),
    ] = None

    def fetch(self, quiet: bool, first: bool, wait: Callable[[], None]) -> None:
        """Download the data set if that is asked for: one process does, and others wait for it."""
        if not self.download or self.dataset is None:
            return
        if first:
            from aftcli.formats.builtin import download

            download(self.dataset, quiet)
        wait()
