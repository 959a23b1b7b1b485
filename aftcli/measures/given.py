"""Arguments of measures by name, made of the maps of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from aftcli.core.cam import map_of
from aftcli.core.classifier import Classifier
from aftcli.core.outputs import class_score
from aftcli.data.objects import Regions
from aftcli.measures.registry import Measure
from aftcli.measures.values import Muting
from aftcli.tft.threshold import drop, mask_of, masked_image


@dataclass(frozen=True)
class Maps:
    """The maps of one method for a batch."""

    f: Classifier
    cam: str
    x: Tensor
    class_index: Tensor
    probability: Tensor
    index: Tensor
    attribution: Tensor
    regions: Sequence[Regions]

    def at(self, rows: Tensor) -> Maps:
        """Take the rows of some images."""
        tensors = (self.x, self.class_index, self.probability, self.index, self.attribution)
        x, class_index, probability, index, attribution = (t[rows.to(t.device)] for t in tensors)
        regions = [self.regions[int(i)] for i in rows]
        return Maps(self.f, self.cam, x, class_index, probability, index, attribution, regions)


class Given:
    """The arguments of measures by name (`Measure.needs`), of maps that are muted in one way.

    Attributes:
        x: inputs, shape (N, 3, H, W).
        y: y^c, shape (N,).
        attribution: I_tau, shape (N, H, W).
        mask: M_tau, shape (N, H, W), bool.
        seeds: one an image.
    """

    def __init__(self, maps: Maps, muting: Muting, cells: bool) -> None:
        self._maps, self._muting, self._cells = maps, muting, cells
        self.x, self.y, self.seeds = maps.x, maps.probability, maps.index.tolist()
        self.attribution = muting.of(maps.attribution)
        self.mask = mask_of(self.attribution)

    def probability_of(self, x: Tensor) -> Tensor:
        """Return y^c of other inputs, shape (N,)."""
        return class_score(
            self._maps.f.probabilities(self._maps.f(x).float()), self._maps.class_index
        )

    @property
    def inverse(self) -> Tensor:
        """1 - I_tau, shape (N, H, W)."""
        return 1 - self.attribution

    @property
    def product_map(self) -> Tensor:
        """I_tau of x * I_tau, shape (N, H, W)."""
        return self._product[0]

    @property
    def product_drop(self) -> Tensor:
        """Drop of x * I_tau, shape (N,)."""
        return self._product[1]

    @cached_property
    def _product(self) -> tuple[Tensor, Tensor]:
        f, c, cam = self._maps.f, self._maps.class_index, self._maps.cam
        x_hat = masked_image(self.x, self.attribution, torch.zeros_like(self.x))
        g, activation = f.at(x_hat)
        y_hat = class_score(f.probabilities(g.head(activation).float()), c)
        again = map_of(g, activation, c, x_hat, cam, self._cells)
        return self._muting.of(again), drop(y_hat, self.y)

    def on_objects(self, measure: Measure) -> Tensor:
        """Measure against objects, shape (N,); NaN where the class has none in the image."""
        formula, values = measure.load(), torch.full((len(self.x),), torch.nan)
        for n, region in enumerate(self._maps.regions):
            known = region._asdict()
            own = [known[a] if a in known else getattr(self, a)[n] for a in measure.needs]
            if all(each is not None for each in own):
                values[n] = formula(*(each[None].to(self.x.device) for each in own))[0]
        return values

    def by_quantus(self, name: str) -> Tensor:
        """Measure by a metric of Quantus, image by image, shape (N,); NaN where undefined."""
        from aftcli.measures.quantus import Image, find_metric, measure_image

        metric, maps, values = find_metric(name), self._maps, []
        for n, (regions, seed) in enumerate(zip(maps.regions, self.seeds, strict=True)):
            seen, counted = regions.segmentation, regions.counted
            seen = seen if seen is None or counted is None else seen & counted
            explain = partial(self._map_of, self._muting.tau[n])
            of_map = (int(maps.class_index[n]), self.attribution[n], seen, seed, explain)
            plain = maps.f.with_engine(None)
            values.append(measure_image(metric, plain, Image(self.x[n], *of_map)))
        return torch.tensor(values)

    def _map_of(self, tau: Tensor, f: Classifier, x: Tensor, class_index: Tensor) -> Tensor:
        """Return I_tau of any inputs and network, shape (N, H, W)."""
        maps = map_of(*f.at(x), class_index, x, self._maps.cam, self._cells)
        return Muting(tau.expand(len(x)), self._muting.mode).of(maps)
