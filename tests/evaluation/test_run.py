"""Evaluation: a batch against literal loops; whole runs against interrupted and shared ones."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from aftcli.core.classifier import Classifier
from aftcli.core.methods import METHODS
from aftcli.data.blocks import Processes, content_hash
from aftcli.data.objects import Regions
from aftcli.data.sets import open_data_set
from aftcli.errors import AftError
from aftcli.evaluation import batch as engine
from aftcli.evaluation import run as evaluate_run
from aftcli.evaluation.batch import measure_batch
from aftcli.evaluation.measures import EXTRAS, MEASURES, VARIANTS, Measure, extras_of
from aftcli.evaluation.metrics import NOISE, ROAD_SHARES, STEPS, blurred, impute
from aftcli.evaluation.results import Images, Muting, Unit, Wanted, measure
from aftcli.evaluation.run import Measured, Plan, Step, evaluate_study
from aftcli.evaluation.study import Study, Variant
from aftcli.evaluation.tables import (
    TABLES,
    Sources,
    Table,
    Tables,
    differences,
    rows_of,
    table3,
    table4,
)
from aftcli.pages.grids import LOOKS, Cell, Grid, Shown
from aftcli.pages.printed import FORMATS
from aftcli.settings import MODES, Search
from aftcli.tft.threshold import MASKINGS, rises
from tests.helpers.compare import assert_near
from tests.helpers.small import GradientPasses
from tests.helpers.stored import NAMES, make_images, small_float
from tests.reference import metrics as slow
from tests.reference import paper as reference

CAMS = ("gradcam", "layercam", "xgradcam")
BY_GRADIENT = (*CAMS, "gradcam++", "hirescam")  # of the class's score
UNITS = [Unit(cam, masking) for masking in MASKINGS for cam in CAMS]
T = (0.0, 0.2, 0.4, 0.7, 1.0)
ALL = frozenset({*EXTRAS, "baselines"})


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_images(f, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, *f.preprocessing.size, generator=generator)
    boxes = torch.rand(count, *x.shape[2:], generator=generator) > 0.6
    seen = torch.rand(count, *x.shape[2:], generator=generator) > 0.7
    counted = torch.rand(count, *x.shape[2:], generator=generator) > 0.1

    def regions(index, class_index):
        return (
            Regions()
            if index == 11
            else Regions(boxes[index - 10], seen[index - 10], counted[index - 10])
        )

    return Images(x, torch.arange(count) % 3, torch.arange(count) + 10, regions)


class Slow:
    """Measure one image, pass by pass."""

    def __init__(self, f, images, n, mode):
        self.f, self.mode, self.images, self.n = f, mode, images, n
        self.x = images.x[n]
        probabilities = self.probabilities(self.x)
        self.c = max(range(3), key=probabilities.__getitem__)
        self.y = probabilities[self.c]
        self.known = {}

    def probabilities(self, x):
        return self.f(x[None])[0].softmax(0).tolist()

    def y_of(self, x):
        return self.probabilities(x)[self.c]

    def map(self, x, cam):
        from aftcli.attributions.maps import attribution_map

        return attribution_map(self.f, x[None], torch.tensor([self.c]), cam)[0]

    def muted(self, attribution, tau, mode):
        return torch.from_numpy(reference.thresholded(attribution.numpy(), tau, mode))

    def masked(self, shown, masking):
        return self.x * (shown if masking == "soft" else (shown != 0))

    def views(self, cam, masking):
        """tau and mode of each view, and what TFT's curve is."""
        attribution = self.map(self.x, cam)
        curve = [
            self.y_of(self.masked(self.muted(attribution, tau, self.mode), masking)) for tau in T
        ]
        tau = T[reference.first_maximum(curve, self.y)]
        found = {"original": (0.0, "value"), "tft": (tau, self.mode)}
        if METHODS[cam].muted is not None:
            found["fixed"] = (METHODS[cam].muted, "percentile")
        return found, curve

    def measures(self, cam, masking, tau, mode):
        shown = self.muted(self.map(self.x, cam), tau, mode)
        key = (cam, tau, mode)
        if key not in self.known:
            self.known[key] = self.of_map(cam, shown, tau, mode)
        found = {"y_hat": self.y_of(self.masked(shown, masking)), **self.known[key]}
        found["average_increase"] = slow.increase(found["y_hat"], self.y)
        found["average_drop"] = slow.drop(found["y_hat"], self.y)
        found["average_gain"] = slow.gain(found["y_hat"], self.y)
        return found

    def of_map(self, cam, shown, tau, mode):
        found = {"area": slow.complexity((shown != 0).float())}
        found["complexity"] = slow.complexity(shown)
        again = self.muted(self.map(self.x * shown, cam), tau, mode)
        found["coherency"] = (slow.pearson(shown, again) + 1) / 2
        drop = slow.drop(self.y_of(self.x * shown), self.y)
        found["adcc"] = slow.adcc(found["coherency"], found["complexity"], drop)
        start, black = blurred(self.x[None])[0], torch.zeros_like(self.x)
        found["insertion"] = slow.area(start, shown, self.x, self.y_of, STEPS)
        found["deletion"] = slow.area(self.x, shown, black, self.y_of, STEPS)
        for name, sorted_by in (("road", shown), ("road_last", 1 - shown)):
            values = []
            generator = torch.Generator().manual_seed(int(self.images.index[self.n]))
            noise = NOISE * torch.randn(self.x.shape, generator=generator)
            for share in ROAD_SHARES:
                missing = torch.zeros(shown.shape, dtype=torch.bool)
                for r, c in slow.in_order(sorted_by)[: round(share * shown.numel())]:
                    missing[r, c] = True
                values.append(self.y_of(impute(self.x, missing) + noise * missing))
            found[name] = sum(values) / len(values)
        parts = (found["coherency"], found["complexity"], found["road"], found["road_last"])
        found["arcc"] = slow.arcc(*parts)
        regions = self.images.regions(int(self.images.index[self.n]), self.c)
        if regions.boxes is not None:
            r, c = slow.in_order(shown)[0]
            every = torch.ones_like(regions.boxes)
            found["energy"] = slow.energy(shown, regions.boxes)
            found["pointing"] = float(regions.boxes[r, c])
            found["iou"] = slow.iou(shown != 0, regions.boxes, every)
            on = shown * regions.counted
            found["energy_segmentation"] = slow.energy(on, regions.segmentation)
            found["iou_segmentation"] = slow.iou(shown != 0, regions.segmentation, regions.counted)
        return found


def only(images, n):
    """One image of a batch."""
    one = slice(n, n + 1)
    return Images(images.x[one], images.label[one], images.index[one], images.regions)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_measure_of_every_view_equals_the_loop(mode):
    f = small_float()
    images = some_images(f, 3)
    wanted = Wanted(Search(T, mode=mode), ALL)
    raised = 0
    for n in range(len(images.x)):
        literal = Slow(f, images, n, mode)
        found = measure_batch(f, only(images, n), UNITS, wanted)
        assert list(found) == UNITS
        for unit in UNITS:
            measured = found[unit]
            views, curve = literal.views(*unit)
            assert set(measured.views) == set(views)
            assert int(measured.class_index[0]) == literal.c
            assert measured.index[0] == 10 + n and measured.label[0] == n % 3
            assert float(measured.probability[0]) == pytest.approx(literal.y, abs=1e-6)
            assert measured.curve[0].tolist() == pytest.approx(curve, abs=1e-6)
            assert float(measured.tau[0]) == pytest.approx(views["tft"][0])
            raised += views["tft"][0] > 0
            for view, (tau, own) in views.items():
                values = literal.measures(*unit, tau, own)
                for name in MEASURES:
                    value = float(measure(measured, view, name)[0])
                    if name in values:
                        assert value == pytest.approx(values[name], abs=2e-5), (unit, view, name)
                    else:
                        assert n == 1 and value != value, (unit, view, name)
    assert raised >= 3  # thresholds that are not the first are compared too


@pytest.mark.slow
def test_a_batch_equals_its_images_one_by_one():
    f = small_float()
    images = some_images(f, 5)
    wanted = Wanted(Search(T), ALL)
    found = measure_batch(f, images, UNITS, wanted)
    for n in range(5):
        for unit in UNITS:
            (values,) = measure_batch(f, only(images, n), [unit], wanted).values()
            alone, together = values.columns(), found[unit].columns()
            assert set(alone) == set(together)
            for name, values in alone.items():
                torch.testing.assert_close(
                    values[0], together[name][n], rtol=0, atol=1e-6, equal_nan=True
                )


@pytest.mark.parametrize("extras", [(), ("adcc",)])
def test_plain_maps_share_their_gradient(monkeypatch, extras):
    f = small_float()
    f.head = GradientPasses(f.head)
    images = some_images(f, 3)
    units = [Unit(cam, "binary") for cam in BY_GRADIENT]
    wanted = Wanted(None, frozenset(extras))
    shared, passes = measure_batch(f, images, units, wanted), f.head.count
    monkeypatch.setattr(Classifier, "sharing", lambda self, *_: self)
    alone = measure_batch(f, images, units, wanted)
    # For ADCC each method explains x * I too, an input of its own.
    own = len(units) * len(extras)
    assert (passes, f.head.count - passes) == (1 + own, len(units) + own)
    for unit, values in alone.items():
        expected, found = values.columns(), shared[unit].columns()
        assert set(found) == set(expected)
        for name, column in expected.items():
            torch.testing.assert_close(found[name], column, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("seed", range(5))
def test_tft_never_lowers_a_probability_below_the_plain_maps(masking, seed):
    """So Average Drop can't be worse, nor Average Increase: by construction, as 0 is in T."""
    f = small_float()
    units = [Unit(cam, masking) for cam in CAMS]
    found = measure_batch(f, some_images(f, 16, seed), units, Wanted(Search(T)))
    for measured in found.values():
        tft, original = measured.views["tft"].y_hat, measured.views["original"].y_hat
        y = measured.probability
        assert ((tft >= original) | (tft >= y)).all()
        for name, better in (("average_drop", -1), ("average_increase", 1), ("average_gain", 1)):
            values = [measure(measured, view, name).double().mean() for view in ("tft", "original")]
            assert (values[0] - values[1]) * better >= 0
        helped = rises(measured.curve.amax(1), y)
        assert torch.equal(tft[~helped], original[~helped])


def test_thresholds_without_zero_do_not_move_the_plain_map():
    f = small_float()
    images = some_images(f)
    unit = Unit("gradcam", "soft")
    one = measure_batch(f, images, [unit], Wanted(Search((0.5, 0.9))))[unit]
    two = measure_batch(f, images, [unit], Wanted(None))[unit]
    assert_near(one.views["original"].y_hat, two.views["original"].y_hat, 1e-5)
    assert "tft" not in two.views and two.tau is None
    assert "tft/y_hat" not in two.columns() and "tau" not in two.columns()


def test_equal_mutings():
    taus = torch.tensor([0.0, 0.5, 0.5])
    value, percentile = Muting(taus, "value"), Muting(taus, "percentile")
    assert value.equals(Muting(torch.tensor([0.0, 0.5, 0.6]), "value")).tolist() == [
        True,
        True,
        False,
    ]
    assert value.equals(percentile).tolist() == [True, False, False]


def study_of(root, cams=CAMS, limit=None):
    """A study of the small network, with one that was tuned for the first method."""
    f = small_float()
    data = open_data_set(Path(root), None, f.classes).limited(limit)
    other = small_float()
    with torch.no_grad():
        next(iter(other.layer.parameters())).mul_(1.3)
    variants = (
        Variant("original", f.weights_hash(), cams, lambda: f),
        Variant("aft", other.weights_hash(), cams[:1], lambda: other),
        Variant("control", other.weights_hash() + "!", cams, lambda: other),
    )
    return Study(f, data, cams, variants, Search(T), None)


PLAN = Plan(workers=0, batch=2, block=4, extras=frozenset({"adcc", "baselines"}))


def run_all(study, run, plan=PLAN, processes=None):
    *_, measured = evaluate_study(study, Path(run), plan, processes)
    return measured


def same(one, two):
    assert list(one.results) == list(two.results)
    for key, result in one.results.items():
        other = two.results[key]
        assert result.broken == other.broken and list(result.columns) == list(other.columns)
        for name, values in result.columns.items():
            assert torch.equal(values.nan_to_num(7), other.columns[name].nan_to_num(7)), (key, name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_images(folder / "data", each=4)
    return folder, run_all(study_of(folder / "data"), folder / "whole")


@pytest.fixture
def data(base, tmp_path):
    return Path(shutil.copytree(base[0] / "data", tmp_path / "data"))


@pytest.fixture
def whole(base, tmp_path):
    """The results, in the folder `whole`; data that moved is the same data."""
    shutil.copytree(base[0] / "whole", tmp_path / "whole")
    return base[1]


def counted(monkeypatch):
    """Count the images that are measured."""
    seen = []

    def measure(f, images, units, wanted):
        seen.extend((int(i), unit) for i in images.index for unit in units)
        return measure_batch(f, images, units, wanted)

    monkeypatch.setattr(evaluate_run, "measure_batch", measure)
    return seen


def test_results_are_those_of_the_images_one_by_one(whole, data):
    from aftcli.data.images import read_image, to_input

    study = study_of(data)
    f, (unit, *_) = study.f, UNITS
    columns = whole.results["original", unit].columns
    assert columns["index"].tolist() == list(range(12))
    for n in range(12):
        x = to_input(read_image(study.data_set.picture(n)), f.preprocessing)
        images = Images(x, torch.tensor([n // 4]), torch.tensor([n]), lambda i, c: Regions())
        alone = measure_batch(f, images, [unit], Wanted(study.search, PLAN.extras))[unit]
        for name, values in alone.columns().items():
            torch.testing.assert_close(
                values[0], columns[name][n], atol=1e-6, rtol=0, equal_nan=True
            )


def test_a_second_call_finds_the_results(whole, data, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    again = run_all(study_of(data), tmp_path / "whole")
    assert again.reused and not seen and not whole.reused
    same(whole, again)


@pytest.mark.slow
def test_a_result_with_more_measures_will_do_and_one_with_fewer_is_made_again(
    whole, data, tmp_path, monkeypatch
):
    seen = counted(monkeypatch)
    run = tmp_path / "whole"
    assert run_all(study_of(data), run, replace(PLAN, extras=frozenset())).reused and not seen
    more = run_all(study_of(data), run, replace(PLAN, extras=ALL))
    assert not more.reused and len(seen) == 12 * 2 * (3 + 1 + 3)
    assert "original/road" in more.results["original", UNITS[0]].columns


@pytest.mark.slow
def test_measures_that_were_computed_are_kept_and_found_again(whole, data, tmp_path, monkeypatch):
    run, study = tmp_path / "run", study_of(data)
    adcc, road = frozenset({"adcc"}), frozenset({"road"})
    first = run_all(study, run, replace(PLAN, extras=adcc))
    begun = evaluate_study(study, run, replace(PLAN, extras=road))
    for _ in range(5):
        next(begun)
    begun.close()
    seen = counted(monkeypatch)
    assert run_all(study, run, replace(PLAN, extras=adcc)).reused
    assert not run_all(study, run, replace(PLAN, extras=road)).reused
    assert 0 < len(seen) < 12 * 2 * 7
    seen.clear()
    both = run_all(study, run, replace(PLAN, extras=adcc | road))
    assert both.reused and not seen
    alone = run_all(study, tmp_path / "alone", replace(PLAN, extras=adcc | road))
    same(both, alone)
    for key, result in first.results.items():
        for name, values in result.columns.items():
            assert torch.equal(values.nan_to_num(7), both.results[key].columns[name].nan_to_num(7))
    # Fixed cut-offs have all measures too, in whichever order they are asked for.
    fixed = run_all(study, run, replace(PLAN, extras=frozenset({"baselines"})))
    every = adcc | road | {"baselines"}
    assert not fixed.reused and run_all(study, run, replace(PLAN, extras=every)).reused
    more = run_all(study, tmp_path / "whole", replace(PLAN, extras=road))
    assert "fixed/road" in more.results["original", UNITS[0]].columns
    assert run_all(study, tmp_path / "whole", replace(PLAN, extras=every)).reused
    for key, result in more.results.items():
        assert set(result.columns) == set(fixed.results[key].columns)
    assert not list(tmp_path.glob("*/results/.*.parts"))


@pytest.mark.slow
def test_measures_made_of_others_are_added_to_results_that_have_those(data, tmp_path):
    study, wanted = study_of(data), extras_of(["arcc"], False)
    assert wanted == {"arcc", "adcc", "road"}
    run_all(study, tmp_path / "run", replace(PLAN, extras=frozenset({"adcc", "road"})))
    more = run_all(study, tmp_path / "run", replace(PLAN, extras=wanted))
    alone = run_all(study, tmp_path / "alone", replace(PLAN, extras=wanted))
    assert not more.reused
    for key, result in more.results.items():
        assert set(result.columns) == set(alone.results[key].columns)
        for name, values in alone.results[key].columns.items():
            torch.testing.assert_close(result.columns[name], values, equal_nan=True)
    assert "tft/arcc" in more.results["original", UNITS[0]].columns


def flips(attribution, probability_of, x):
    """The probability of the image turned left to right, weighted: a measure from outside."""
    return probability_of(x.flip(3)) * attribution.mean((1, 2))


def test_a_measure_is_a_formula_and_one_line(whole, data, tmp_path, monkeypatch):
    needs = ("attribution", "probability_of", "x")
    entry = Measure("Flips", "robustness", 1, "flips", "this test", f"{__name__}:flips", needs, 1)
    monkeypatch.setitem(MEASURES, "flips", entry)
    study, extras = study_of(data), extras_of(["flips"], True)
    assert extras == {"flips", "baselines"}
    before = engine.passes(Wanted(study.search, frozenset()), 1)
    assert engine.passes(Wanted(study.search, extras), 1) == before + 2
    # Results without it are measured again, those with it are found.
    measured = run_all(study, tmp_path / "whole", replace(PLAN, extras=extras))
    assert not measured.reused
    assert run_all(study, tmp_path / "whole", replace(PLAN, extras=extras)).reused
    rows = table3(measured, ("flips", "adcc"), tuple(VARIANTS))
    assert {row.variant for row in rows if row.measure == "flips"} == set(VARIANTS)
    assert {row.measure for row in rows} == {"flips", "adcc"}
    literal = whole.results["original", UNITS[0]].columns
    found = measured.results["original", UNITS[0]]
    assert set(found.columns) - set(literal) == {f"{v}/flips" for v in ("original", "fixed", "tft")}
    from aftcli.data.images import read_image, to_input

    x = to_input(read_image(study.data_set.picture(3)), study.f.preprocessing)
    one = Slow(study.f, Images(x, None, None, None), 0, "value")
    value = one.y_of(x[0].flip(2)) * float(one.map(x[0], "gradcam").mean())
    assert float(measure(found.values, "original", "flips")[3]) == pytest.approx(value)


def test_what_changes_is_made_again(whole, data, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    run, study = tmp_path / "whole", study_of(data)
    assert run_all(replace(study, search=Search((0.0, 0.5))), run).reused is False
    # Tuned networks and the control know no search.
    assert len(seen) == 12 * 6 and not run_all(study, run).results == {}
    seen.clear()
    path = data / NAMES[0] / "0.png"
    path.touch()
    assert run_all(study, run).reused and not seen
    Image.new("RGB", (40, 52), "red").save(path)
    changed = run_all(study, run)
    assert not changed.reused and len(seen) == 12 * 2 * 7
    value = [m.results["original", UNITS[0]].columns["probability"] for m in (changed, whole)]
    assert (value[0] != value[1]).nonzero().tolist() == [[0]]
    seen.clear()
    other = study.variants[1]._replace(weights="0")
    assert not run_all(replace(study, variants=(study.variants[0], other)), run).reused
    assert len(seen) == 12 * 2


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 5, 11, 17, 23])
def test_an_interrupted_evaluation_goes_on(whole, data, tmp_path, monkeypatch, steps):
    seen = counted(monkeypatch)
    begun = evaluate_study(study_of(data), tmp_path / "run", PLAN)
    for _ in range(steps):
        next(begun)
    begun.close()
    before = len(seen)
    again = run_all(study_of(data), tmp_path / "run")
    same(whole, again)
    # At most one block of one classifier was measured twice.
    assert len(seen) - 12 * 2 * 7 <= 4 * 6 and before <= len(seen)
    assert not list((tmp_path / "run/results").glob(".*.parts"))


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign"])
def test_damaged_results_are_made_again(whole, data, tmp_path, monkeypatch, damage):
    (path,) = (tmp_path / "whole/results").glob("small-gradcam-original-soft-*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[-9] ^= 4
    else:
        other = next(
            (tmp_path / "whole/results").glob("small-gradcam-original-binary-*.safetensors")
        )
        content = other.read_bytes()
    path.write_bytes(content)
    seen = counted(monkeypatch)
    again = run_all(study_of(data), tmp_path / "whole")
    same(whole, again)
    assert {unit for _, unit in seen} >= {Unit("gradcam", "soft")}
    assert all(unit.masking == "soft" for _, unit in seen)


def evaluate_as_one_of(index, count, barrier, root, run):
    torch.set_num_threads(1)
    run_all(study_of(root), run, processes=Processes(index, count, barrier.wait))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_find_what_one_finds(whole, data, tmp_path, processes, count):
    barrier = processes.Barrier(count)
    several = [
        processes.Process(
            target=evaluate_as_one_of, args=(i, count, barrier, data, tmp_path / "shared")
        )
        for i in range(count)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
        assert process.exitcode == 0
    shared = run_all(study_of(data), tmp_path / "shared")
    assert shared.reused
    for key, result in whole.results.items():
        for name, values in result.columns.items():
            other = shared.results[key].columns[name]
            torch.testing.assert_close(values, other, atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.slow
def test_the_size_of_batches_changes_nothing(whole, data, tmp_path):
    other = run_all(study_of(data), tmp_path / "other", replace(PLAN, batch=3, block=5, workers=1))
    for key, result in whole.results.items():
        for name, values in result.columns.items():
            torch.testing.assert_close(
                values, other.results[key].columns[name], atol=1e-6, rtol=0, equal_nan=True
            )


def test_broken_images_are_left_out_and_named(data, tmp_path):
    (data / NAMES[1] / "1.png").write_bytes(b"no picture")
    measured = run_all(study_of(data), tmp_path / "run")
    for result in measured.results.values():
        assert len(result.columns["index"]) == 11 and 5 not in result.columns["index"]
        assert [b.path for b in result.broken] == [f"{NAMES[1]}/1.png"]
    assert {row.n for row in table3(measured, ("average_drop",), ("original",))} == {11}


def test_all_images_broken(data, tmp_path):
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    measured = run_all(study_of(data), tmp_path / "run")
    assert all(len(r.broken) == 12 and not r.columns for r in measured.results.values())
    assert table3(measured, ("average_drop",), tuple(VARIANTS)) == table4(measured) == []


def test_another_process_on_the_same_results_is_refused(data, tmp_path, processes):
    from tests.helpers.stored import hold

    study = study_of(data)
    (folder := tmp_path / "run/results").mkdir(parents=True)
    files = evaluate_run._files(study, study.variants[0], folder, PLAN, _content(study, folder))
    held, release = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(files[UNITS[0]].path, held, release))
    other.start()
    held.wait(60)
    with pytest.raises(AftError, match="another process"):
        run_all(study, tmp_path / "run")
    release.set()
    other.join()


def _content(study, folder):
    paths = [study.data_set.picture(i) for i in range(len(study.data_set.samples))]
    return content_hash(paths, folder / ".contents-0.json")


def test_tables_equal_the_loop(whole):
    rows = table3(whole, ("average_increase", "average_drop", "adcc"), tuple(VARIANTS))
    # Grad-CAM and Layer-CAM have a published cut-off, XGrad-CAM has none.
    assert len(rows) == 2 * 3 * (5 + 4 + 3)
    sources = {"original": "original", "fixed": "original", "tft": "original"}
    for row in rows:
        result = whole.results[sources.get(row.variant, row.variant), Unit(row.cam, row.masking)]
        view = row.variant if row.variant in sources else "original"
        pairs = zip(
            result.columns[f"{view}/y_hat"].tolist(),
            result.columns["probability"].tolist(),
            strict=True,
        )
        if row.measure == "adcc":
            values = result.columns[f"{view}/adcc"].tolist()
        else:
            literal = slow.increase if row.measure == "average_increase" else slow.drop
            values = [literal(y_hat, y) for y_hat, y in pairs]
        assert row.value == pytest.approx(sum(values) / 12, abs=1e-6) and row.n == 12
        assert row.ci[0] <= row.value <= row.ci[1]
    (original, *_) = table4(whole)
    columns = whole.results["original", UNITS[0]].columns
    right = [int(c) == n // 4 for n, c in enumerate(columns["class_index"])]
    assert original.accuracy == sum(right) / 12 and (original.variant, original.cam) == (
        "original",
        None,
    )
    assert [(r.variant, r.cam) for r in table4(whole)] == [
        ("original", None),
        ("aft", "gradcam"),
        ("control", None),
    ]


@dataclass(frozen=True)
class Doubt:
    """A row of a table from outside."""

    dataset: str
    doubt: float
    n: int


def doubts(sources):
    """One minus the mean probability of the predicted classes."""
    for m in sources.measured:
        y = m.results["original", UNITS[0]].values.probability
        yield Doubt(m.study.data_name, 1 - float(y.mean()), len(y))


def test_a_table_is_its_rows_and_its_look(whole, data, tmp_path, monkeypatch, capsys):
    def look(tables, shown):
        for row in tables.rows["doubts"]:
            yield Grid("Doubts", ["data set", "doubt"], [[Cell("d"), Cell(f"{row.doubt:.3f}")]], 1)

    entry = Table(
        frozenset({"6"}), doubts, numbers=lambda r: [{"measure": "doubt", "value": r["doubt"]}]
    )
    monkeypatch.setitem(TABLES, "doubts", entry)
    monkeypatch.setitem(LOOKS, "doubts", look)
    sources = Sources(tmp_path, [whole.study], [whole])
    assert set(rows_of(["4"], sources)) == {"table4", "seen"}
    tables = Tables(rows_of(["4", "6"], sources))
    y = whole.results["original", UNITS[0]].columns["probability"]
    (row,) = tables.rows["doubts"]
    assert row.doubt == pytest.approx(1 - sum(y.tolist()) / 12) and row.n == 12
    printed = {}
    for name, show in FORMATS.items():
        show(tables, Shown())
        printed[name] = capsys.readouterr().out
    (record,) = json.loads(printed["json"])["doubts"]
    assert record == {"dataset": row.dataset, "doubt": row.doubt, "n": 12}
    assert f"doubts,{row.dataset},,,,,,doubt,{row.doubt},,,12," in printed["csv"].splitlines()
    assert all("accuracy" in text for text in printed.values())
    for name in ("table", "markdown", "latex"):
        assert "Doubts" in printed[name] and f"{row.doubt:.3f}" in printed[name]


def test_differences_are_paired(whole):
    (row,) = [
        d
        for d in differences(whole, ("average_drop",), tuple(VARIANTS))
        if (d.variant, d.against, d.cam, d.masking) == ("aft", "original", "gradcam", "soft")
    ]
    columns = [whole.results[v, Unit("gradcam", "soft")].columns for v in ("aft", "original")]
    values = [
        [
            slow.drop(a, b)
            for a, b in zip(c["original/y_hat"].tolist(), c["probability"].tolist(), strict=True)
        ]
        for c in columns
    ]
    wanted = sum(a - b for a, b in zip(*values, strict=True)) / 12
    assert row.difference == pytest.approx(wanted, abs=1e-6) and row.n == 12
    # Pairs are narrower than two intervals side by side would be.
    assert row.ci[1] - row.ci[0] < 2 * (max(values[0]) - min(values[0]))


def test_differences_leave_out_an_image_that_one_of_them_lacks(whole):
    key = ("aft", Unit("gradcam", "soft"))
    result = whole.results[key]
    fewer = result._replace(columns={k: v[2:] for k, v in result.columns.items()})
    cut = whole._replace(results={**whole.results, key: fewer})
    rows = differences(cut, ("average_drop",), ("aft", "original"))
    (row,) = [r for r in rows if r.masking == "soft"]
    assert row.n == 10
    assert not replace(row, n=9, ci=(0.1, 0.2)).is_clear and replace(row, ci=(0.1, 0.2)).is_clear


def test_contents_are_read_again_only_if_they_changed(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    first = content_hash(paths, tmp_path / "known")
    assert content_hash(paths, tmp_path / "known") == first
    assert json.loads((tmp_path / "known").read_text())
    (tmp_path / "known").write_text("[")
    assert content_hash(paths, tmp_path / "known") == first
    assert content_hash(paths[::-1], tmp_path / "known") != first
    paths[1].write_bytes(b"B")
    assert content_hash(paths, tmp_path / "known") != first
    paths[1].unlink()
    assert content_hash(paths, tmp_path / "known") != first


def test_steps_tell_what_is_done(data, tmp_path):
    events = list(evaluate_study(study_of(data), tmp_path / "run", PLAN))
    assert isinstance(events[-1], Measured)
    steps = [e for e in events if isinstance(e, Step)]
    done = {}
    for step in steps:
        done[step.what] = done.get(step.what, 0) + step.images
        assert step.total == 12
    assert set(done.values()) == {12} and len(done) == 3


def test_overwriting_computes_anew(whole, data, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    again = run_all(study_of(data), tmp_path / "whole", replace(PLAN, overwrite=True))
    assert len(seen) == 12 * 2 * 7
    same(whole, again)


def test_evaluation_scores_all_thresholds(data):
    study = replace(study_of(data), search=Search(T, search="fast"))
    assert study.searched("soft") == Search(T, "soft")


def test_a_table_of_several_groups_names_them(whole):
    names = ("complexity", "average_drop", "adcc", "coherency", "average_increase")
    rows = {
        "table3": table3(whole, names, ("original", "tft")),
        "differences": differences(whole, names, ("original", "tft")),
    }
    grids = {grid.title: grid for look in rows for grid in LOOKS[look](Tables(rows), Shown(True))}
    assert len(grids) == 4
    wanted = [
        ["faithfulness", "Average Drop"],
        ["faithfulness", "ADCC"],
        ["faithfulness", "Average Increase"],
        ["complexity", "Complexity"],
        ["robustness", "Coherency"],
    ]
    for grid in grids.values():
        last = grid.header.index("measure")
        assert grid.header[last - 1] == "group" and grid.left == last + 1
        named = [[cell.text for cell in row[last - 2 : last + 1]] for row in grid.rows]
        assert named == [
            [METHODS[cam].title, *one]
            for cam in ("gradcam", "layercam", "xgradcam")
            for one in wanted
        ]
    alone = {"table3": [row for row in rows["table3"] if row.measure.startswith("average")]}
    assert not any("group" in grid.header for grid in LOOKS["table3"](Tables(alone), Shown()))
