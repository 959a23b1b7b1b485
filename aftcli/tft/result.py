"""The result of a search for thresholds, and its look in a notebook."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from aftcli.tft.threshold import first_for_all, first_maximum, log_odds_increase, raised

MOST_SHOWN = 8  # images in a notebook


def html_image(image: Image.Image, kind: str = "PNG") -> str:
    """Return a picture as an element of HTML that holds it."""
    held = io.BytesIO()
    image.save(held, kind, quality=90)
    coded = base64.b64encode(held.getvalue()).decode()
    return f'<img src="data:image/{kind.lower()};base64,{coded}" style="max-width: 100%">'


class TftResult(NamedTuple):
    """Result of Algorithm 1 for N images.

    Attributes:
        tau: tau*, the first threshold with the largest RPI (`first_maximum`), shape (N,); where
            judges were asked, the first that raises the log-odds of all most (`first_for_all`).
        rpi: RPI of each threshold, shape (N, |T|).
        probabilities: y_hat^c of each threshold, shape (N, |T|).
        probability: y^c of the whole image, shape (N,).
        attribution: I_tau*, shape (N, H, W), in [0, 1].
        mask: M_tau*, shape (N, H, W), bool.
        judged: y_hat^c of each threshold by each judge, shape (N, J, |T|).
        judged_whole: y^c of the whole image by each judge, shape (N, J); NaN where it does not
            know the class.

    `rpi`, `probabilities` and `judged` are NaN at thresholds that a fast search left out.
    """

    tau: Tensor
    rpi: Tensor
    probabilities: Tensor
    probability: Tensor
    attribution: Tensor
    mask: Tensor
    judged: Tensor = torch.empty(0)
    judged_whole: Tensor = torch.empty(0)

    @property
    def best(self) -> Tensor:
        """Return the index of tau* in T, shape (N,)."""
        if not self.judged.numel():
            return first_maximum(self.rpi, self.probability)
        return first_for_all(*self._of_everybody())

    @property
    def increases(self) -> Tensor:
        """Return each judge's increase of log-odds at tau*, the network's own first, (N, 1 + J)."""
        y_hat, y = self._of_everybody()
        at = self.best[:, None, None].expand(-1, y.shape[1], -1)
        return log_odds_increase(y_hat.gather(2, at)[..., 0], y)

    def _of_everybody(self) -> tuple[Tensor, Tensor]:
        """Return y_hat^c and y^c of the network and its judges, (N, 1 + J, |T|) and (N, 1 + J)."""
        y_hat, y = self.probabilities[:, None], self.probability[:, None]
        if not self.judged.numel():
            return y_hat, y
        return torch.cat([y_hat, self.judged], 1), torch.cat([y, self.judged_whole], 1)

    def rows(self, part: slice) -> TftResult:
        """Take the results of some images."""
        return TftResult(*(field[part] for field in self))

    def __str__(self) -> str:
        """Return a line of numbers for each image."""
        kept = self.mask.flatten(1).float().mean(1)
        columns = (self.tau, self.best, self.probability, kept)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return "\n".join(
            f"tau* = {tau:g}: RPI {float(self.rpi[n, best]):.3f}, probability {y:.3f} → "
            f"{float(self.probabilities[n, best]):.3f}, {area:.1%} kept"
            for n, (tau, best, y, area) in enumerate(rows)
        )

    def _repr_html_(self) -> str:
        """Return the cut maps in grey and the numbers, for notebooks; MOST_SHOWN images at most."""
        rows = []
        lines = str(self).splitlines()
        for attribution, line in zip(self.attribution[:MOST_SHOWN], lines, strict=False):
            grey = attribution.detach().float().mul(255).round().byte().cpu().numpy()
            rows.append(f"<div>{html_image(Image.fromarray(grey))}<br>{line}</div>")
        left = len(lines) - len(rows)
        return "\n".join([*rows, *([f"<div>… and {left} more</div>"] if left else [])])

    @property
    def helps(self) -> Tensor:
        """Tell where a threshold raises the probability by more than rounding, (N,), bool.

        Where judges were asked, tau* must.
        """
        found = raised(self.rpi, self.probability)
        return found.gather(1, self.best[:, None])[:, 0] if self.judged.numel() else found.any(1)
