"""Metrics of Quantus: what reaches the library, against direct calls and our own formulas."""

import math
import random
from importlib import import_module

import numpy as np
import pytest
import torch

from aftcli.attributions.maps import attribution_map
from aftcli.data.blocks import Processes
from aftcli.data.objects import Regions
from aftcli.errors import AftError
from aftcli.evaluation.batch import measure_batch
from aftcli.evaluation.run import Measured, Plan, evaluate_study
from aftcli.evaluation.tables import differences, table3
from aftcli.measures import quantus as ours
from aftcli.measures.registry import GROUPS, MEASURES, extras_of, measures
from aftcli.measures.values import Images, Unit, Wanted
from aftcli.settings import Search
from tests.evaluation.test_run import study_of
from tests.helpers.stored import make_images, small_float

pytestmark = pytest.mark.slow

quantus = import_module("quantus")

UNIT = Unit("gradcam", "binary")
CHEAP = ("Sparseness", "Complexity", "EffectiveComplexity")
QUIET = {"return_aggregate": False, "disable_warnings": True, "display_progressbar": False}


def some_images(f, count=3):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, *f.preprocessing.size, generator=generator)
    seen = torch.rand(count, *f.preprocessing.size, generator=generator) > 0.7
    void = torch.rand(count, *f.preprocessing.size, generator=generator) > 0.1

    def regions(index, class_index):
        return Regions() if index == 6 else Regions(None, seen[index - 5], void[index - 5])

    return Images(x, torch.zeros(count), torch.arange(count) + 5, regions), seen & void


def values_of(f, images, *names, view="tft"):
    wanted = Wanted(Search((0.0, 0.3, 0.6)), frozenset(f"quantus:{name}" for name in names))
    found = measure_batch(f, images, [UNIT], wanted)[UNIT]
    shown = attribution_map(f, images.x, found.class_index, "gradcam")
    if view == "tft":
        shown = torch.where(shown >= found.tau[:, None, None], shown, 0)
    return {n: found.views[view].measures[f"quantus:{n}"] for n in names}, shown, found


def gini(scores):
    """The Gini index of a list, by all pairs."""
    pairs = sum(abs(a - b) for a in scores for b in scores)
    return pairs / (2 * len(scores) * sum(scores))


def entropy(scores):
    shares = [s / sum(scores) for s in scores]
    return -sum(s * math.log(s) for s in shares if s > 0)


def test_cheap_metrics_equal_direct_calls_and_formulas():
    f = small_float()
    images, _ = some_images(f)
    for view in ("original", "tft"):
        found, shown, _ = values_of(f, images, *CHEAP, view=view)
        for name in CHEAP:
            direct = getattr(quantus, name)(**QUIET)(
                model=f,
                x_batch=images.x.numpy(),
                y_batch=np.zeros(3, dtype=int),
                a_batch=shown[:, None].numpy(),
            )
            assert found[name].tolist() == pytest.approx([float(v) for v in direct], rel=1e-5)
        for n in range(3):
            scores = shown[n].flatten().double().tolist()
            # Quantus' sum has a term that vanishes with the number of pixels.
            assert float(found["Sparseness"][n]) == pytest.approx(gini(scores), abs=2 / len(scores))
            assert float(found["Complexity"][n]) == pytest.approx(entropy(scores), abs=1e-3)


def test_localisation_has_the_segmentation_without_its_border():
    f = small_float()
    images, seen = some_images(f)
    found, shown, _ = values_of(f, images, "RelevanceMassAccuracy")
    (values,) = found.values()
    for n in (0, 2):
        share = float((shown[n] * seen[n]).sum() / shown[n].sum())
        assert float(values[n]) == pytest.approx(share, rel=1e-4)
    assert values[1].isnan()  # no object of the class


def test_robustness_explains_with_the_threshold_of_the_image():
    """Random Logit compares the map with that of another class, which is drawn as it draws it."""
    f = small_float()
    images, _ = some_images(f)
    found, shown, measured = values_of(f, images, "RandomLogit")
    assert measured.tau.max() > 0
    for n in range(3):
        c = int(measured.class_index[n])
        np.random.seed(42)
        other = [k for k in range(3) if k != c][np.random.randint(0, 2)]
        maps = attribution_map(f, images.x[n : n + 1], other, "gradcam")
        muted = torch.where(maps >= measured.tau[n], maps, 0)
        pair = [m.numpy().flatten() / float(m.max()) for m in (shown[n], muted)]
        assert float(found["RandomLogit"][n]) == pytest.approx(quantus.ssim(*pair), abs=1e-5)


def test_results_repeat_whatever_was_drawn_before_and_leave_the_generators():
    f, names = small_float(), ("FaithfulnessCorrelation", "MPRT")
    images, _ = some_images(f)
    weights = {k: v.clone() for k, v in f.state_dict().items()}
    first, *_ = values_of(f, images, *names)
    for generator in (random, np.random):
        generator.seed(11)
    torch.manual_seed(11)
    second, *_ = values_of(f, images, *names)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(11), np.random.seed(11), torch.manual_seed(11)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))
    one = Images(images.x[1:2], images.label[1:2], images.index[1:2], images.regions)
    alone, *_ = values_of(f, one, *names)
    for name in names:
        assert torch.equal(first[name], second[name]) and first[name].isfinite().all()
        assert float(alone[name][0]) == pytest.approx(float(first[name][1]), abs=1e-4)
    assert all(torch.equal(v, weights[k]) for k, v in f.state_dict().items())


def test_curves_and_layers_are_averaged():
    assert ours._mean([[1.0, 2.0, 6.0]]) == 3
    assert ours._mean([True]) == 1
    layers = {"original": [1.0], "head": [0.5], "stem": [0.25]}
    assert ours._mean(layers) == 0.375


def test_constant_maps_have_no_value():
    f = small_float()
    image = ours.Image(torch.zeros(3, 32, 32), 0, torch.zeros(32, 32), None, 0, None)
    assert math.isnan(ours.measure_image(ours.find_metric("Sparseness"), f, image))
    # Maps of random networks are often so, which Quantus refuses.
    image = image._replace(
        attribution=torch.rand(32, 32), explain=lambda f, x, c: torch.zeros(len(x), 32, 32)
    )
    assert math.isnan(ours.measure_image(ours.find_metric("MPRT"), f, image))


def test_names_and_groups_are_those_of_quantus():
    names = [n for kinds in quantus.AVAILABLE_METRICS.values() for n in kinds.values()]
    known = [kind.__name__ for kind in names if kind.__name__ not in ours.NO_VALUE]
    asked = measures(",".join(f"quantus:{name}" for name in known))
    assert len(asked) == len(known) == 33
    for name, kind in zip(asked, known, strict=True):
        own, kind = MEASURES[name], getattr(quantus, kind)
        assert own.group in GROUPS and own.group == kind.evaluation_category.value.lower()
        assert own.better == {"higher": 1, "lower": -1}[kind.score_direction.value]
        assert quantus.__version__ in own.source
    assert measures("all,quantus:AUC") == (*MEASURES, "quantus:AUC")
    assert extras_of(["quantus:AUC", "road"], False) == {"quantus:AUC", "road"}
    with pytest.raises(AftError, match="no metric 'Sparsenes'; nearest: Sparseness"):
        measures("quantus:Sparsenes")
    with pytest.raises(AftError, match="quantus:Consistency compares images with one another"):
        measures("road,quantus:Consistency")
    with pytest.raises(AftError, match="unknown measure 'Sparseness'"):
        measures("Sparseness")
    with pytest.raises(KeyError):
        MEASURES["nothing"]


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(AftError, match=r"needs quantus.*pip install 'aftcli\[quantus\]'"):
        measures("quantus:Sparseness")


def test_what_fails_in_the_library_is_told():
    f = small_float()
    images, _ = some_images(f)
    with pytest.raises(AftError, match=r"quantus:IROF fails in Quantus .*leave it out"):
        values_of(f, images, "IROF")


def run_all(study, run, *names):
    plan = Plan(("binary",), extras_of(names, False), batch=4)
    *_, measured = evaluate_study(study, run, plan, Processes())
    assert isinstance(measured, Measured)
    return measured


def test_results_are_kept_by_the_version_of_the_library(tmp_path, monkeypatch):
    make_images(tmp_path / "data", 2)
    study = study_of(tmp_path / "data", ("gradcam",))
    names = ("average_drop", "quantus:Sparseness")
    measured = run_all(study, tmp_path / "run", *names)
    assert not measured.reused and run_all(study, tmp_path / "run", *names).reused
    rows = table3(measured, names, ("original", "tft", "aft"))
    assert {row.variant for row in rows if row.measure == names[1]} == {"original", "tft", "aft"}
    assert {d.measure for d in differences(measured, names, ("original", "tft"))} == set(names)
    # Others are added, and another version measures again.
    more = run_all(study, tmp_path / "run", "quantus:Complexity", *names)
    assert not more.reused
    columns = more.results["original", UNIT].columns
    assert {"tft/quantus:Complexity", "tft/quantus:Sparseness"} <= set(columns)
    for result in more.results.values():
        assert result.identity["quantus"] == f"Quantus {quantus.__version__}"
    monkeypatch.setattr(quantus, "__version__", "0.6.9")
    assert not run_all(study, tmp_path / "run", *names).reused


def test_segmentations_that_are_not_there_are_told_before_anything_is_measured(tmp_path):
    make_images(tmp_path / "data", 2)
    study = study_of(tmp_path / "data", ("gradcam",))
    with pytest.raises(AftError, match=r"has no segmentations, which --metrics quantus:AUC needs"):
        run_all(study, tmp_path / "run", "quantus:AUC")
