"""All measures of a batch of images: plain maps, fixed cut-offs and TFT (§5.2).

Three views of a map: `original`, the map itself, which is tau = 0; `fixed`, the share of Table 1
muted; `tft`, the map with tau* found for this image. AFT and the control are other classifiers,
of which there is only the original view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aftcli.core.cam import scaled_map, upsample
from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.core.outputs import class_score
from aftcli.measures.controls import Control, Controlled, gamma_means, shifted_areas
from aftcli.measures.given import Given, Maps
from aftcli.measures.registry import BASELINES, CONTROLS, MEASURES, OBJECTS, QUANTUS
from aftcli.measures.values import Images, Muting, Unit, Values, Verdict, View, Wanted
from aftcli.settings import Search
from aftcli.tft.judges import Judge, judged
from aftcli.tft.masking import cut_off
from aftcli.tft.scoring import judged_masks, masked_probabilities
from aftcli.tft.threshold import first_maximum, relative_probability_increase


def passes(wanted: Wanted, units: int) -> int:
    """Count the images that pass the network, at the most, to measure the maps of one."""
    curve = len(wanted.search.thresholds) + 1 if wanted.search else 1
    views = 2 if wanted.search else 1
    extras = sum(m.passes for m in MEASURES.values() if m.extra in ("", *wanted.extras))
    mirrors = sum(judge.classifier is None for judge in wanted.judges.values())
    return 1 + units * (curve + views * extras) + mirrors * wanted.asked(units)


@torch.no_grad()
def measure_batch(
    f: Classifier, images: Images, units: Sequence[Unit], wanted: Wanted
) -> dict[Unit, Values]:
    """Measure the maps of the predicted classes, with one pass of the stem for all units.

    Args:
        f: the classifier.
        images: the batch.
        units: methods and maskings.
        wanted: what is measured.

    Returns:
        The values of each unit, on the CPU.
    """
    maps, cells, common, y, scores = _made(f, images, units, wanted)
    known: dict[str, list[tuple[Muting, dict[str, Tensor]]]] = {cam: [] for cam in maps}
    found: dict[Unit, Values] = {}
    for masking in dict.fromkeys(unit.masking for unit in units):
        own = [unit.cam for unit in units if unit.masking == masking]
        by_cam = _scores(maps, own, masking, wanted)
        verdicts = _verdicts(maps, by_cam, masking, wanted, y)
        for cam, scored in by_cam.items():
            views = {}
            for view, (muting, y_hat) in scored.views.items():
                of_map = _of_maps(maps[cam], muting, wanted, known[cam])
                views[view] = View(y_hat.cpu(), {name: v.cpu() for name, v in of_map.items()})
            tau, curve = (None if v is None else v.cpu() for v in (scored.tau, scored.curve))
            amounts = None
            if CONTROLS in wanted.extras:
                full, soft = maps[cam].attribution, masking == "soft"
                kept = gamma_means(full) if soft else shifted_areas(cells[cam], full.shape[1:])
                amounts = kept.cpu()
            values = Values(*common, views, tau, curve, amounts, verdicts[cam], scores)
            found[Unit(cam, masking)] = values
    return found


class _Made(NamedTuple):
    """Maps, their cells before they are stretched, columns that all results share, and scores.

    `y` is each judge's p(c | x), by its key.
    """

    maps: dict[str, Maps]
    cells: dict[str, Tensor]
    common: tuple[Tensor, Tensor, Tensor, Tensor]
    y: dict[str, Tensor]
    scores: Tensor | None


def _made(f: Classifier, images: Images, units: Sequence[Unit], wanted: Wanted) -> _Made:
    """Explain the predicted classes, or all labels, with one pass of the stem for all methods."""
    x, index = images.x, images.index
    g, activation = f.at(x)
    p = f.probabilities(g.head(activation).float())
    c = images.label.to(p.device) if images.every else p.max(1).indices
    y = class_score(p, c)
    regions = [images.regions(int(i), int(own)) for i, own in zip(index, c, strict=True)]
    cams = dict.fromkeys(unit.cam for unit in units)
    g = g.sharing(activation, c)
    cells = {cam: scaled_map(g, activation, c, x, cam, wanted.cells) for cam in cams}
    maps = {
        cam: Maps(f, cam, x, c, y, index, upsample(own, x), regions) for cam, own in cells.items()
    }
    common = (index, images.label, c.cpu(), y.cpu())
    asked = {key: judged(judge, f, x, c) for key, judge in wanted.judges.items()}
    return _Made(maps, cells, common, asked, p.cpu() if images.every else None)


class _Masked(NamedTuple):
    """N images, masked by M maps each, shape (M * N, H, W), cut at thresholds, (M * N, |T|)."""

    images: Maps
    attribution: Tensor
    cut: Tensor
    search: Search

    def ask(self, y: Tensor, judge: Judge | None = None) -> Tensor:
        """Return p(c | x_hat), shape (M * N, |T|); y is p(c | x), shape (N,)."""
        f, x, c = self.images.f, self.images.x, self.images.class_index
        count = len(self.attribution) // len(x)
        owner = torch.arange(len(x), device=x.device)
        c, y, owner = (each.repeat(count) for each in (c, y, owner))
        score = partial(judged_masks, judge) if judge else masked_probabilities
        return score(f, x, self.attribution, self.cut, c, y, owner, self.search)


@torch.no_grad()
def measure_controls(
    f: Classifier,
    images: Images,
    units: Sequence[Unit],
    wanted: Wanted,
    controlled: Mapping[Unit, Controlled],
) -> dict[Unit, Values]:
    """Measure the controls of maps; arguments and values as of `measure_batch`.

    Measures that cost passes are not taken. The network and each judge pass a control once.
    """
    maps, cells, common, y, _ = _made(f, images, units, wanted)
    mode = wanted.search.mode if wanted.search else "value"
    found = {}
    for unit in units:
        own = maps[unit.cam]
        plain, at = own.attribution, images.index

        def muted(tau: Tensor, plain: Tensor = plain, mode: str = mode) -> Tensor:
            return Muting(tau.to(plain), mode).of(plain)

        shown = controlled[unit].maps(cells[unit.cam], plain, at, unit.masking, muted)
        attribution = torch.cat([control.maps for control in shown.values()])
        uncut = attribution.new_zeros(len(attribution), 1)
        masked = _Masked(own, attribution, uncut, _search(wanted, unit.masking))

        def by_view(y_hat: Tensor, shown: Mapping[str, Control] = shown) -> dict[str, Tensor]:
            parts = zip(shown.items(), y_hat[:, 0].cpu().split(len(images.x)), strict=True)
            return {view: torch.where(control.known, v, torch.nan) for (view, control), v in parts}

        y_hat = by_view(masked.ask(own.probability))
        views = {}
        for view, control in shown.items():
            nothing = Muting(torch.zeros_like(own.probability), "value")
            given_map = Given(replace(own, attribution=control.maps), nothing, wanted.cells)
            of_map = {
                name: torch.where(control.known, v.cpu(), torch.nan)
                for name, v in _of_map(given_map, frozenset()).items()
                if not (control.flat and name == "pointing")
            }
            views[view] = View(y_hat[view], of_map)
        verdicts = {
            key: Verdict(y[key].cpu(), by_view(masked.ask(y[key], judge)))
            for key, judge in wanted.judges.items()
        }
        found[unit] = Values(*common, views, judges=verdicts)
    return found


class _Scored(NamedTuple):
    """Views with the probabilities of their masked images, and the search."""

    views: dict[str, tuple[Muting, Tensor]]
    tau: Tensor | None = None
    curve: Tensor | None = None


def _search(wanted: Wanted, masking: str) -> Search:
    return replace(wanted.search or Search(), masking=masking, fill=wanted.fill)


def _scores(
    maps: dict[str, Maps], cams: Sequence[str], masking: str, wanted: Wanted
) -> dict[str, _Scored]:
    """Mask the images in all views, with one search for all methods."""
    some = maps[cams[0]]
    count = len(some.x)
    attribution = torch.cat([maps[cam].attribution for cam in cams])
    thresholds = wanted.search.thresholds if wanted.search else ()
    mode = wanted.search.mode if wanted.search else "value"
    nothing = attribution.new_zeros(count)
    fixed = {cam: Muting(nothing + (METHODS[cam].muted or 0), "percentile") for cam in cams}
    cut = torch.cat(
        [
            cut_off(attribution, attribution.new_tensor(thresholds), mode),
            nothing.repeat(len(cams))[:, None],
            torch.cat(
                [cut_off(maps[c].attribution, m.tau[:, None], m.mode) for c, m in fixed.items()]
            ),
        ],
        1,
    )
    baselines = BASELINES in wanted.extras
    cut = cut if baselines else cut[:, :-1]
    y_hat = _Masked(some, attribution, cut, _search(wanted, masking)).ask(some.probability)
    found = {}
    for i, cam in enumerate(cams):
        own = y_hat[i * count : (i + 1) * count]
        views = {"original": (Muting(nothing, "value"), own[:, len(thresholds)])}
        if baselines and METHODS[cam].muted is not None:
            views["fixed"] = (fixed[cam], own[:, -1])
        found[cam] = _Scored(views)
        if wanted.search:
            curve = own[:, : len(thresholds)]
            rpi = relative_probability_increase(curve, some.probability[:, None])
            best = first_maximum(rpi, some.probability)
            tau = attribution.new_tensor(thresholds)[best]
            views["tft"] = (Muting(tau, mode), curve.gather(1, best[:, None])[:, 0])
            found[cam] = _Scored(views, tau, curve)
    return found


def _verdicts(
    maps: dict[str, Maps],
    scored: dict[str, _Scored],
    masking: str,
    wanted: Wanted,
    y: Mapping[str, Tensor],
) -> dict[str, dict[str, Verdict]]:
    """Ask the judges about the views of all methods; y is what they say of the whole images."""
    found: dict[str, dict[str, Verdict]] = {cam: {} for cam in scored}
    if not wanted.judges:
        return found
    some = maps[next(iter(scored))]
    names = list(dict.fromkeys(name for each in scored.values() for name in each.views))
    attribution, cuts = [maps[cam].attribution for cam in scored], []
    for own, each in zip(attribution, scored.values(), strict=True):
        # A view that this method lacks costs nothing as the plain one.
        mutings = [each.views.get(name, each.views["original"])[0] for name in names]
        cuts.append(torch.cat([cut_off(own, m.tau[:, None], m.mode) for m in mutings], 1))
    masked = _Masked(some, torch.cat(attribution), torch.cat(cuts), _search(wanted, masking))
    for key, judge in wanted.judges.items():
        y_hat = masked.ask(y[key], judge).cpu()
        for (cam, each), own in zip(scored.items(), y_hat.split(len(some.x)), strict=True):
            of_view = dict(zip(names, own.T.contiguous(), strict=True))
            found[cam][key] = Verdict(y[key].cpu(), {name: of_view[name] for name in each.views})
    return found


def _of_maps(
    maps: Maps, muting: Muting, wanted: Wanted, known: list[tuple[Muting, dict[str, Tensor]]]
) -> dict[str, Tensor]:
    """Take the measures that do not depend on the masking; those of equal mutings are reused."""
    left = torch.ones_like(muting.tau, dtype=torch.bool)
    found: dict[str, Tensor] = {}
    for other, measured in known:
        same = muting.equals(other) & left
        for name, values in measured.items():
            found[name] = torch.where(same.to(values.device), values, found.get(name, values))
        left &= ~same
    rows = left.nonzero()[:, 0].cpu()
    if len(rows):
        given = Given(maps.at(rows), Muting(muting.tau[left], muting.mode), wanted.cells)
        for name, values in _of_map(given, wanted.extras).items():
            found[name] = found.get(name, values.new_zeros(len(left))).clone()
            found[name][rows.to(values.device)] = values
    known.append((muting, found))
    return found


def _of_map(given: Given, extras: frozenset[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, each in MEASURES.items():
        if each.extra in OBJECTS:
            found[name] = given.on_objects(each)
        elif not each.of_probabilities and each.extra in ("", *extras):
            own = [found[a] if a in found else getattr(given, a) for a in each.needs]
            found[name] = each.load()(*own)
    for name in sorted(extras):
        if name.startswith(QUANTUS):
            found[name] = given.by_quantus(name.removeprefix(QUANTUS))
    return found
