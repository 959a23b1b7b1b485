"""Studies of a run: classifiers with masks or tuned, and the images to evaluate them on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.data.blocks import pack, unpack
from aftcli.data.parts import AS_FOUND, Reading
from aftcli.data.sets import (
    DataSet,
    data_name,
    format_of,
    not_its_classes,
    open_data_set,
    refuse_one_class,
)
from aftcli.errors import AftError
from aftcli.evaluation.results import with_kept_names
from aftcli.masks.images import reread, stored_contents
from aftcli.masks.store import MaskStore
from aftcli.masks.stores import check_made_for, open_stores
from aftcli.models.checkpoint import read_card, trained_otherwise
from aftcli.models.load import advice, load_classifier
from aftcli.models.source import Source
from aftcli.settings import SOFTMAX, Search
from aftcli.tft.judges import Judge, judges_named, judges_of, load_judges


class Variant(NamedTuple):
    """A classifier of a study.

    Attributes:
        name: a key of `aftcli.measures.registry.VARIANTS`: original, aft or control.
        weights: a hash of them.
        cams: methods to measure it with.
        load: gives the classifier.
        path: of the checkpoint; None for the one that the masks were made with.
        trained: contents of the files that it has learned from (`content_of`); None if unknown.
    """

    name: str
    weights: str
    cams: tuple[str, ...]
    load: Callable[[], Classifier]
    path: Path | None = None
    trained: frozenset[int] | None = None


@dataclass(frozen=True)
class Study:
    """One model, the data set that it is evaluated on, and its variants.

    Attributes:
        f: the classifier that masks were made with.
        data_set: the images, labelled by f's classes.
        cams: methods with masks or a tuned classifier, in the registry's order.
        variants: f itself, its control and those tuned for a method.
        search: settings of TFT, but for the masking.
        train: the data set that it was tuned on, by name, split and size; None if unknown.
        cells: maps of pixels are averaged over the activation's cells.
        judges: say, beside each variant itself, what its masks keep.
        asked: judges that the search of the masks asked, as stores record them; TFT asks none.
    """

    f: Classifier
    data_set: DataSet
    cams: tuple[str, ...]
    variants: tuple[Variant, ...]
    search: Search
    train: tuple[str, str, int] | None
    cells: bool = False
    judges: tuple[Judge, ...] = ()
    asked: Sequence[Mapping[str, str]] = ()

    @cached_property
    def judge_keys(self) -> dict[str, str]:
        """The keys of the judges in results, by name."""
        return {judge.name: judge.key(self.f) for judge in self.judges}

    @cached_property
    def data_name(self) -> str:
        """The name of the data set in tables."""
        return data_name(self.data_set.root, self.data_set.kind, self.data_set.split)

    def searched(self, masking: str) -> Search:
        """Return the settings of TFT with a masking.

        Evaluation always scores all thresholds, also where masks were made by a fast search.
        """
        return replace(self.search, masking=masking, search="exact")


class Asked(NamedTuple):
    """The wishes of a user; None, or nothing, takes what the run says.

    Attributes:
        source: of the classifiers.
        cams: methods.
        data: the data set.
        split: part of it.
        limit: take so many images, spread over the classes.
        thresholds: T.
        fill: what muted pixels show.
        mode: what thresholds cut.
        cells: average maps of pixels over the activation's cells.
        judges: names of judges beside the networks themselves (`load_judges`).
        reading: of `data`.
    """

    source: Source = Source()
    cams: Sequence[str] = ()
    data: Path | None = None
    split: str | None = None
    limit: int | None = None
    thresholds: tuple[float, ...] | None = None
    fill: str | None = None
    mode: str | None = None
    cells: bool = False
    judges: Sequence[str] = ()
    reading: Reading = AS_FOUND


class _Made(NamedTuple):
    """A tuned checkpoint of a run."""

    path: Path
    card: dict[str, Any]


def find_studies(run: str | Path, asked: Asked | None = None) -> list[Study]:
    """Find the studies that a run has to evaluate.

    Args:
        run: where it lives.
        asked: what to take of it; default all.

    Raises:
        AftError: there are neither masks nor tuned classifiers, they do not belong together,
            there are no images with labels among the classes, or a judge knows none of these.
    """
    studies = _studies(Path(run), asked := asked or Asked())
    loaded = load_judges(asked.judges, asked.source.device, asked.source.note)
    found = []
    for study in studies:
        judges = tuple(judge.named_by(study.f, asked.source.note) for judge in loaded)
        for judge in judges:
            judge.check(study.f)
        found.append(replace(study, judges=judges))
    return found


def _studies(run: Path, asked: Asked) -> list[Study]:
    stores, tuned = open_stores(run, asked.source.model, asked.cams), _tuned(run, asked)
    made = (*run.glob("masks/*.h5"), *run.glob("tuned/*.safetensors"))
    if not made and asked.data is not None and asked.cams:
        return [_study_of_a_network(run, asked)]
    if not stores and not tuned:
        whose = f" of {asked.source.model}" if asked.source.model else ""
        which = f" by {', '.join(asked.cams)}" if asked.cams else ""
        raise AftError(
            f"{run}: there is nothing to evaluate: neither masks nor tuned classifiers{whose}"
            f"{which}; make masks with aft gen-masks DATASET, pass the --run that has them, or "
            "name a DATASET, a --cam and a new --run to measure without them"
        )
    models = [s.settings["model"] for s in stores] + [m.card["model"] for m in tuned]
    studies = []
    for model in dict.fromkeys(models):
        own = [s for s in stores if s.settings["model"] == model]
        studies.append(_study(run, own, [m for m in tuned if m.card["model"] == model], asked))
    return studies


def _study_of_a_network(run: Path, asked: Asked) -> Study:
    """Return a study of plain maps and TFT, which need no masks."""
    f = with_kept_names(asked.source.load(), run)
    cams = tuple(cam for cam in METHODS if cam in asked.cams)
    of = _data_set(f, {}, asked), cams, tuple(_variants(f, cams, [], asked))
    return Study(f, *of, _search(run, [], [], asked), None, asked.cells)


def _tuned(run: Path, asked: Asked) -> list[_Made]:
    found = []
    for path in sorted((run / "tuned").glob("*.safetensors")):
        if path.name.startswith("."):
            continue
        card = read_card(path)
        if card is None:
            raise AftError(
                f"{path}: is damaged, or not of aft finetune; move it away or tune again"
            )
        is_asked = card["cam"] is None or not asked.cams or card["cam"] in asked.cams
        if is_asked and asked.source.takes(card["model"]):
            found.append(_Made(path, card))
    return found


def _study(run: Path, stores: list[MaskStore], tuned: list[_Made], asked: Asked) -> Study:
    known = {s.settings["cam"] for s in stores} | {m.card["cam"] for m in tuned if m.card["cam"]}
    missing = [cam for cam in asked.cams if cam not in known]
    if missing or not known:
        raise AftError(
            f"{run}: there are no masks and no tuned classifier for "
            f"{', '.join(missing) or 'any CAM'}; make masks with aft gen-masks DATASET --cam METHOD"
        )
    f = _start(stores, tuned, asked)
    _check_pairs(f, tuned)
    made = _made_of(run, stores, tuned, asked)
    cams = tuple(cam for cam in METHODS if cam in known)
    of = _data_set(f, made, asked, *stores), cams, tuple(_variants(f, cams, tuned, asked))
    searched = _search(run, stores, tuned, asked)
    return Study(
        f, *of, searched, _trained_on(made), asked.cells, asked=_judges(run, stores, tuned, asked)
    )


def _start(stores: list[MaskStore], tuned: list[_Made], asked: Asked) -> Classifier:
    """Load the classifier that masks were made with, or that was tuned."""
    source = asked.source.named_by([s.settings for s in stores], [card for _, card in tuned])
    if stores:
        f = source.of_masks(stores[0].settings).load()
        for store in stores:
            check_made_for(store, f)
    else:
        path, card = tuned[0]
        f = source._replace(layer=None).of_model(card["model"], path).of_masks(card).load()
    weights = f.weights_hash()
    for path, card in tuned:
        other = card["start"] != weights and not _is_start(path, f) and card["cam"]
        if other or card.get("output", SOFTMAX) != f.output:
            raise AftError(
                f"{path}: was tuned from other weights, or with another --output, than the masks "
                "or --checkpoint; tune it again with aft finetune --overwrite, or pass the "
                "--checkpoint and --output that it was tuned from"
            )
    return f


def _is_start(path: Path, f: Classifier) -> bool:
    return bool(f.checkpoint) and Path(f.checkpoint) == path.resolve()


def _check_pairs(f: Classifier, tuned: list[_Made]) -> None:
    """Check that the control has seen what the classifiers tuned with masks have."""
    controls = [m for m in tuned if _is_control(m, f)]  # a zero level needs none
    others = [m for m in tuned if m.card["cam"] and m.card.get("objective") != "zero-level"]
    for control, one in product(controls, others):
        if other := trained_otherwise(control.card, one.card):
            raise AftError(
                f"{control.path}: is no control of {one.path.name}, which was trained with other "
                f"settings: {'; '.join(other)}; train it again with aft finetune --no-masks "
                "--overwrite and the other's options, or move it away"
            )


def _is_control(made: _Made, f: Classifier) -> bool:
    """Tell a control by its card; one of other weights is where this run began."""
    own = made.card["cam"] is None and made.card["start"] == f.weights_hash()
    return own and not _is_start(made.path, f)


class _Data(NamedTuple):
    """The data set of a mask store or of a tuned classifier."""

    path: Path
    made: dict[str, Any]
    contents: str | None

    @property
    def place(self) -> tuple[str, ...]:
        return tuple(str(self.made[key]) for key in ("data_set", "data_kind", "split"))

    def equals(self, other: _Data) -> bool:
        """Tell if both are of one data set, which may have been moved."""
        if self.place == other.place:
            return True
        same = self.made["images_hash"] == other.made["images_hash"]
        return same and (None in (self.contents, other.contents) or self.contents == other.contents)


def _made_of(
    run: Path, stores: list[MaskStore], tuned: list[_Made], asked: Asked
) -> dict[str, Any]:
    """Return the attributes of the masks, or rebuild them from a tuned classifier's card."""
    found = [_Data(s.path, s.settings, pack(stored_contents(s))) for s in stores]
    digests = {s.settings["digest"] for s in stores}
    # A classifier tuned with masks of this run has their images, wherever these are now.
    found += [
        _Data(path, {**card, "labels": "model"}, card.get("trained_contents"))
        for path, card in tuned
        if card["cam"] and card["masks"]["digest"] not in digests
    ]
    first = found[0]
    for other in found[1:]:
        if asked.data is None and not first.equals(other):
            named = [
                f"{d.path.name} of {data_name(Path(d.place[0]), *d.place[1:])}"
                + (f", {d.place[2]}" if d.place[2] else "")
                for d in (first, other)
            ]
            raise AftError(
                f"{run}: its masks and networks are of different data sets ({'; '.join(named)}); "
                "name the one to evaluate on: aft evaluate DATASET, or choose with --cam"
            )
    return first.made


def _data_set(f: Classifier, made: dict[str, Any], asked: Asked, *stores: MaskStore) -> DataSet:
    path, split = asked.data, asked.split
    reading = reread(path, asked.reading, made, f.classes, stores)
    if path is None:
        path = format_of(made["data_kind"]).above(Path(made["data_set"]), made["split"])
        if not format_of(made["data_kind"]).is_there(path):
            raise AftError(
                f"{path}: the data set of the masks is no longer there; say where it is: aft "
                "evaluate DATASET"
            )
        if not made["split"] and split is None and reading.held is None:
            raise AftError(
                f"{path}: the data set of the masks has no split to evaluate on; name one that "
                "was not trained on: aft evaluate DATASET"
            )
        split = split or "val"  # of train.csv this is val.csv, which is taken if it is asked for
    data_set = open_data_set(path, split, f.classes, default="val", reading=reading)
    refuse_one_class(data_set)
    if not data_set.mapped:
        raise AftError(f"{not_its_classes(data_set, f.classes, f.name)}{advice(f)}")
    return data_set.limited(asked.limit)


def _variants(
    f: Classifier, cams: tuple[str, ...], tuned: list[_Made], asked: Asked
) -> list[Variant]:
    start, own = (read_card(Path(f.checkpoint)) if f.checkpoint else None) or {}, f.classes.own
    found = [Variant("original", f.weights_hash(), cams, lambda: f, None, _trained(start))]
    for path, card in tuned:
        cam = card["cam"]
        if cam is None and not _is_control(_Made(path, card), f):
            continue
        name, methods = ("aft", (cam,)) if cam else ("control", cams)
        model, device = asked.source.model, asked.source.device
        load = partial(load_classifier, model, path, classes=own or None, device=device)
        found.append(Variant(name, card["digest"], methods, load, path, _trained(card)))
    return found


def _trained(card: dict[str, Any]) -> frozenset[int] | None:
    return unpack(card["trained_contents"]) if "trained_contents" in card else None


def _search(run: Path, stores: list[MaskStore], tuned: list[_Made], asked: Asked) -> Search:
    """Take the settings that are asked for, otherwise those of the masks, otherwise defaults."""
    default = (Search().thresholds, Search().fill, Search().mode)
    wanted = {"thresholds": asked.thresholds, "fill": asked.fill, "threshold_mode": asked.mode}
    made = [s.settings for s in stores] or [m.card["masks"] for m in tuned if m.card["cam"]]
    made = made or [dict(zip(wanted, default, strict=True))]
    values: list[Any] = []
    for key, value in wanted.items():
        different = {str(each[key]) for each in made}
        if value is None and len(different) > 1:
            option = "--" + key.replace("_", "-")
            raise AftError(
                f"{run}: the masks were made with different {key.replace('_', ' ')} "
                f"({'; '.join(sorted(different))}); choose one with {option}"
            )
        values.append(made[0][key] if value is None else value)
    return Search(tuple(values[0]), "binary", values[1], values[2])


def _judges(
    run: Path, stores: list[MaskStore], tuned: list[_Made], asked: Asked
) -> list[dict[str, str]]:
    """Return the judges that the search of all masks asked, and say that TFT does not ask them."""
    made = [*(s.settings for s in stores), *(m.card["masks"] for m in tuned if m.card["cam"])]
    if found := judges_of(run, made):
        asked.source.note(
            f"{run}: the search of its masks asked {judges_named(found)}; TFT in the tables asks "
            "the network alone"
        )
    return found


def _trained_on(made: dict[str, Any]) -> tuple[str, str, int] | None:
    with contextlib.suppress(KeyError):
        name = data_name(Path(made["data_set"]), made["data_kind"], made["split"])
        return name, made["split"], int(made["images"])
    return None
