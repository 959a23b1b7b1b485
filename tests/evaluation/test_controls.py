"""Controls of TFT and AFT: against loops; stored, resumed, shared, judged, and what stars mean."""

import math
from dataclasses import replace

import pytest
import torch

from aftcli.core.cam import scaled_map
from aftcli.data.images import read_image, to_input
from aftcli.evaluation import run as evaluate_run
from aftcli.evaluation.batch import measure_controls
from aftcli.evaluation.run import evaluate_study
from aftcli.evaluation.tables import Difference, Tables, differences, table3, table4
from aftcli.measures.controls import SHIFTS, Controlled
from aftcli.measures.registry import BASELINES, CONTROLLED, CONTROLS, SOURCES, TITLES
from aftcli.measures.values import Unit, Wanted, measure
from aftcli.pages.grids import Shown, grids
from aftcli.settings import MODES, Search
from aftcli.tft.judges import Judge
from aftcli.tft.masking import FILLS, MASKINGS
from tests.evaluation.test_run import PLAN, UNITS, Processes, run_all, same, study_of
from tests.helpers.stored import make_images
from tests.reference import controls as slow
from tests.reference import metrics
from tests.reference import paper as reference
from tests.tft.test_judges import (
    MIRROR,
    Case,
    close,
    judged_study,
    literal,
    nearly_same,
)

pytestmark = pytest.mark.slow

ASKED = replace(PLAN, extras=frozenset({BASELINES}), controls=True)


def literal_map(control, cells, size, value, share, tau, mode, seed):
    """One control of one image, by loops; cells and the map as lists of lines."""
    plain = slow.stretched(cells, size)
    if control == "shift":
        return slow.stretched(slow.shifted(cells, value), size)
    if control == "gamma":
        return [[v**value for v in line] for line in plain]
    if control == "permuted":
        return reference.thresholded(torch.tensor(plain).double().numpy(), tau, mode).tolist()
    if control == "random":
        return slow.random_cells((len(cells), len(cells[0])), size, share, seed)
    return slow.disc(size, share)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(("mode", "fill"), [*zip(MODES, FILLS, strict=False), ("value", "blur")])
def test_every_control_is_judged_as_the_loop_does(masking, mode, fill):
    case = Case(1, 4)
    keys = {judge.key(case.f): judge for judge in (MIRROR, Judge("other", case.g))}
    wanted = Wanted(Search((0.0, 0.5), mode=mode), frozenset(), fill, judges=keys)
    unit, nan = Unit("gradcam", masking), math.nan
    setting = {"tft": 0.234, "aft": 0.071}
    amount = {
        "tft": torch.tensor([0.3, 0.71, 1.0, 0.55, 9], dtype=torch.double),
        "aft": torch.tensor([0.8, nan, 0.0, 0.42, 9], dtype=torch.double),
    }
    tau = torch.tensor([0.4, 0.2, 0.7, nan, 9], dtype=torch.double)
    own = Controlled(setting, amount, tau)
    (values,) = measure_controls(case.f, case.whole(), [unit], wanted, {unit: own}).values()
    kind = "gamma" if masking == "soft" else "shift"
    assert set(values.views) == {
        f"tft {kind}", "tft permuted", "tft random", "tft disc",
        f"aft {kind}", "aft random", "aft disc",
    }  # fmt: skip
    assert len(values.views) == own.masks
    filled, size = FILLS[fill](case.f, case.x), case.x.shape[2:]
    with torch.no_grad():
        activation = case.f.activation(case.x)
    cells = scaled_map(case.f, activation, torch.tensor(case.c), case.x, "gradcam").tolist()
    compared = 0
    for n, c in enumerate(case.c):
        for view in values.views:
            row, control = view.split()
            share = float(amount[row][n])
            given = float(tau[n]) if control == "permuted" else share
            if math.isnan(given):
                assert math.isnan(float(values.views[view].y_hat[n]))
                assert math.isnan(float(measure(values, view, "average_increase")[n]))
                assert all(math.isnan(v.y_hat[view][n]) for v in values.judges.values())
                assert math.isnan(float(measure(values, view, "area")[n]))
                continue
            lines = literal_map(control, cells[n], size, setting[row], share, given, mode, n)
            shown = torch.tensor(lines, dtype=torch.double)
            weight = shown if masking == "soft" else (shown != 0).double()
            x_hat = case.x[n] * weight + filled[n] * (1 - weight)
            with torch.no_grad():
                y, y_hat = (
                    float(case.model(each[None]).softmax(1)[0, c]) for each in (case.x[n], x_hat)
                )
            close(float(values.views[view].y_hat[n]), y_hat)
            for key, judge in keys.items():
                close(float(values.judges[key].y_hat[view][n]), literal(case, judge, x_hat, c))
            for name, formula in (("average_drop", metrics.drop), ("average_gain", metrics.gain)):
                found = float(measure(values, view, name)[n])
                assert found == pytest.approx(formula(y_hat, y), abs=2e-5)
            area = sum(v != 0 for line in lines for v in line) / shown.numel()
            mean = sum(v for line in lines for v in line) / shown.numel()
            assert float(measure(values, view, "area")[n]) == pytest.approx(area, abs=1e-6)
            assert float(measure(values, view, "complexity")[n]) == pytest.approx(mean, abs=1e-6)
            if control in ("random", "disc"):
                # To the nearest pixel.
                assert abs(mean - share) <= 0.5 / shown.numel() + 1e-9
            compared += 1
    assert compared == 4 * 7 - 1 - 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("controls")
    make_images(folder / "data", each=4)
    return folder, run_all(judged_study(folder / "data"), folder / "whole", ASKED)


def cells_of(study, cam):
    """The cells of the plain map of each image, as lists of lines."""
    found = []
    for n in range(len(study.data_set.samples)):
        x = to_input(read_image(study.data_set.picture(n)), study.f.preprocessing)
        with torch.no_grad():
            a = study.f.activation(x)
            c = study.f.head(a).argmax(1)
        found.append(scaled_map(study.f, a, c, x, cam)[0].double().tolist())
    return found


def test_each_claim_has_its_controls(base):
    _, whole = base
    for unit in UNITS:
        kind = "gamma" if unit.masking == "soft" else "shift"
        views = set(whole.results[CONTROLS, unit].values.views)
        own = {f"tft {c}" for c in (kind, "permuted", "random", "disc")}
        # One method has a tuned network.
        own |= {f"aft {c}" for c in (kind, "random", "disc")} if unit.cam == "gradcam" else set()
        assert views == own
    rows = table3(whole, ("average_drop", "area"), tuple(TITLES))
    assert {r.variant for r in rows} == set(TITLES)
    assert {(r.measure, r.judge) for r in rows if r.variant == "tft disc"} == {
        ("area", "self"), ("average_drop", "self"),
        ("average_drop", "mirror"), ("average_drop", "another"),
    }  # fmt: skip
    assert {r.variant for r in table4(whole)} == {"original", "aft", "control"}


@pytest.mark.parametrize("unit", [Unit("gradcam", "binary"), Unit("layercam", "binary")])
def test_the_shift_keeps_the_area_of_the_row(base, unit):
    _, whole = base
    size = whole.study.f.preprocessing.size
    cells = cells_of(whole.study, unit.cam)

    def area(t):
        kept = [
            v != 0 for c in cells for line in slow.stretched(slow.shifted(c, t), size) for v in line
        ]
        return sum(kept) / len(kept)

    own = {
        row: float(measure(whole.results[source, unit].values, view, "area").double().mean())
        for row in CONTROLLED
        for source, view in [SOURCES[row]]
        if (source, unit) in whole.results
    }
    areas = [area(t) for t in SHIFTS]
    values = whole.results[CONTROLS, unit].values
    for row, goal in own.items():
        found = measure(values, f"{row} shift", "area").double().mean()
        nearest = min(abs(a - goal) for a in areas)
        assert abs(float(found) - goal) == pytest.approx(nearest, abs=1e-6)
        # Image by image, not only on average.
        each = measure(whole.results[SOURCES[row][0], unit].values, SOURCES[row][1], "area")
        for control in ("random", "disc"):
            torch.testing.assert_close(measure(values, f"{row} {control}", "area"), each)


def test_gamma_keeps_the_mean_of_the_row(base):
    _, whole = base
    for unit in UNITS:
        if unit.masking == "soft":
            values = whole.results[CONTROLS, unit].values
            for row in ("tft", "aft"):
                if f"{row} gamma" in values.views:
                    source, view = SOURCES[row]
                    own = measure(whole.results[source, unit].values, view, "complexity")
                    found = measure(values, f"{row} gamma", "complexity")
                    assert float(found.mean()) == pytest.approx(float(own.mean()), abs=1e-3)
                    for control in ("random", "disc"):
                        area = measure(values, f"{row} {control}", "area")
                        assert (area - own).abs().max() <= 0.5 / 32**2 + 1e-6


def test_permuted_thresholds_are_those_of_other_images(base):
    _, whole = base
    unit = Unit("gradcam", "binary")
    values = whole.results["original", unit].values
    size = whole.study.f.preprocessing.size
    cells = cells_of(whole.study, "gradcam")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    found = measure(whole.results[CONTROLS, unit].values, "tft permuted", "area")
    for place, image in enumerate(order):
        giver = order[place - 1]
        assert giver != image
        plain = torch.tensor(slow.stretched(cells[image], size)).double().numpy()
        shown = reference.thresholded(plain, float(values.tau[giver]), "value")
        assert float(found[image]) == pytest.approx(float((shown != 0).mean()), abs=2 / 32**2)


def test_a_second_call_finds_the_controls_and_one_without_needs_none(base, tmp_path, monkeypatch):
    folder, whole = base
    study, run = judged_study(folder / "data"), tmp_path / "run"
    plain = run_all(study, run, replace(ASKED, controls=False))
    assert not any(name == CONTROLS for name, _ in plain.results)
    added = run_all(study, run, ASKED)
    assert not added.reused
    nearly_same(whole, added)
    for key, result in plain.results.items():
        for name, values in result.columns.items():
            assert torch.equal(values.nan_to_num(7), added.results[key].columns[name].nan_to_num(7))
    monkeypatch.setattr(evaluate_run, "measure_controls", None)
    again = run_all(study, run, ASKED)
    assert again.reused
    same(added, again)
    assert run_all(study, run, replace(ASKED, controls=False)).reused
    monkeypatch.undo()
    # Another search has other rows, and so other controls.
    other = run_all(replace(study, search=Search((0.0, 0.5))), run, ASKED)
    key = CONTROLS, Unit("gradcam", "binary")
    assert not other.reused and other.results[key].identity != whole.results[key].identity
    assert not list((run / "results").glob(".*.parts"))


def test_results_are_named_by_all_that_decides_controls(base, tmp_path):
    study, unit = base[1].study, Unit("gradcam", "binary")
    own = Controlled({"tft": 0.2}, {"tft": torch.tensor([0.1, 0.2])}, torch.tensor([0.3, 0.4]))
    others = [
        own,
        own._replace(setting={"tft": 0.21}),
        own._replace(amount={"tft": torch.tensor([0.1, 0.3])}),
        own._replace(tau=torch.tensor([0.4, 0.3])),
        own._replace(tau=None),
    ]
    variant = study.variants[0]._replace(name=CONTROLS)
    keys = set()
    for each in others:
        files = evaluate_run._files(study, variant, tmp_path, ASKED, "", {unit: each})
        assert list(files) == [unit]
        keys.add(files[unit].key)
    by_rank = replace(study, search=replace(study.search, mode="percentile"))
    files = evaluate_run._files(by_rank, variant, tmp_path, ASKED, "", {unit: own})
    assert len(keys | {files[unit].key}) == len(others) + 1


@pytest.mark.parametrize("steps", [31, 34, 39])
def test_interrupted_controls_resume(base, tmp_path, steps):
    folder, whole = base
    begun = evaluate_study(judged_study(folder / "data"), tmp_path / "run", ASKED)
    for _ in range(steps):
        next(begun)
    begun.close()
    same(whole, run_all(judged_study(folder / "data"), tmp_path / "run", ASKED))
    assert not list((tmp_path / "run/results").glob(".*.parts"))


def evaluate_as_one_of(index, count, barrier, root, run):
    torch.set_num_threads(1)
    run_all(judged_study(root), run, ASKED, Processes(index, count, barrier.wait))


def test_two_processes_find_what_one_finds(base, tmp_path, processes):
    folder, whole = base
    barrier = processes.Barrier(2)
    both = [
        processes.Process(
            target=evaluate_as_one_of, args=(i, 2, barrier, folder / "data", tmp_path / "shared")
        )
        for i in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    shared = run_all(judged_study(folder / "data"), tmp_path / "shared", ASKED)
    assert shared.reused
    same(whole, shared)


def test_a_control_passes_network_and_judge_once(base, tmp_path):
    folder, _ = base
    study = replace(judged_study(folder / "data"), variants=study_of(folder / "data").variants[:1])
    run_all(study, tmp_path / "run", replace(ASKED, controls=False, maskings=("binary",)))
    passed = {}

    def accelerate(f, count):
        fast = f.with_engine(None)
        at = f.preprocessing.size, len(passed)
        passed[at] = [0, count]
        fast.watch = lambda images: passed[at].__setitem__(0, passed[at][0] + images)
        return fast

    run_all(study, tmp_path / "run", replace(ASKED, maskings=("binary",), accelerate=accelerate))
    # The network again, for what shifts keep; then of the controls the whole image and 4 masks of
    # each of 3 methods, by the network also mirrored, and by the other judge.
    counts = [count for _, count in passed.values()]
    assert len(counts) == 3 and counts[1:] == [12 * 2 * (1 + 3 * 4), 12 * (1 + 3 * 4)]
    assert all(0 < seen <= count for seen, count in passed.values())


def some_differences(beyond):
    """A clear gain over the plain map, and the difference to the control of equal area."""
    where = ("data", "net", "gradcam", "binary", "average_increase")
    return [
        Difference(*where, "tft", "original", 0.3, (0.2, 0.4), 50),
        Difference(*where, "tft", "tft shift", sum(beyond) / 2, beyond, 50),
    ]


def cells_of_grid(rows):
    (grid,) = grids(Tables({"differences": rows}), Shown(ci=True))
    return grid, [cell.text.endswith("*") for cell in grid.rows[0][grid.left :]]


def test_a_star_is_of_a_gain_beyond_the_control_of_equal_area():
    clear = some_differences((0.05, 0.15))
    assert cells_of_grid(clear)[1] == [True, True]
    assert cells_of_grid(some_differences((-0.05, 0.15)))[1] == [False, False]
    # Worse than the shift: that difference is clear, the gain is not.
    assert cells_of_grid(some_differences((-0.15, -0.05)))[1] == [False, True]
    # A measure that controls do not have.
    adcc = replace(clear[0], measure="adcc")
    (grid,) = grids(Tables({"differences": [*clear, adcc]}), Shown(ci=True))
    assert [[c.text.endswith("*") for c in line[grid.left :]] for line in grid.rows] == [
        [True, True],
        [False, False],
    ]
    grid, stars = cells_of_grid(clear[:1])
    assert stars == [True] and "Kept area was not controlled" in grid.note
    assert "its equal shift" in cells_of_grid(clear)[0].note
    # A loss is one, whatever controls say.
    lost = [replace(clear[0], difference=-0.3, ci=(-0.4, -0.2)), clear[1]]
    assert cells_of_grid(lost)[1] == [True, True]


def test_differences_pair_a_row_with_its_own_controls(base):
    _, whole = base
    rows = differences(whole, ("average_drop",), tuple(TITLES))
    pairs = {(r.variant, r.against) for r in rows if r.masking == "binary" and r.cam == "gradcam"}
    own = {(row, name) for row, names in CONTROLLED.items() for name in names}
    assert own & pairs == {pair for pair in own if "gamma" not in pair[1]}
    row = next(r for r in rows if (r.variant, r.against, r.judge) == ("aft", "aft shift", "self"))
    unit = Unit(row.cam, row.masking)
    one = measure(whole.results["aft", unit].values, "original", "average_drop")
    two = measure(whole.results[CONTROLS, unit].values, "aft shift", "average_drop")
    assert row.difference == pytest.approx(float((one - two).double().mean())) and row.n == 12
