"""Properties of every method beyond CAMs: the contract, the command line, masks, tables."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import Progress

from aftcli import AftError, Search, attribution_map
from aftcli.cli import setup as cli_setup
from aftcli.core import methods as registry
from aftcli.core.cam import normalise, scaled_map, to_cells
from aftcli.core.methods import CAMS, FAMILIES, METHODS
from aftcli.engine.export import traced
from aftcli.report import terminal as report_progress
from aftcli.settings import THRESHOLDS, Shaping
from aftcli.tft.explain import explain, passes
from aftcli.tft.search import tune_batch
from tests.helpers.command import aft
from tests.helpers.compare import assert_near
from tests.helpers.small import small
from tests.reference import paper as reference

BEYOND = [name for name in METHODS if name not in CAMS]
CHELSEA = Path(__file__).parents[2] / "docs" / "images" / "chelsea.jpg"
every_method = pytest.mark.parametrize("method", BEYOND)
extra = pytest.mark.skipif(
    any(registry.find_spec(m) is None for name in BEYOND for m in METHODS[name].needs),
    reason="without the extra `attributions`",
)


def state_of(f):
    """All that a method could leave behind in a network."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [len(getattr(m, kind)) for m in f.modules() for kind in kinds]
    modules = [(id(m), m.training, "forward" in vars(m)) for m in f.modules()]
    return hooks, modules, [(p.requires_grad, p.grad) for p in f.parameters()], f.weights_hash()


@pytest.mark.slow
@extra
@every_method
def test_a_map_is_pure(method):
    """In [0, 1] at the input's size, each image's own, and nothing is left behind."""
    s = small("linear")
    before = state_of(s.f)
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    maps = attribution_map(s.f, s.x, s.class_index, method)
    assert state_of(s.f) == before
    assert torch.equal(torch.get_rng_state(), random[0])
    assert (np.random.get_state()[1] == random[1]).all()
    assert maps.shape == (3, *s.x.shape[2:]) and maps.dtype == s.x.dtype
    assert maps.min() == 0
    # Nothing supports the third image's class, its unlikeliest, in some maps.
    assert (maps[:2].amax((1, 2)) > 0.8).all()
    torch.manual_seed(99)
    np.random.seed(99)
    alone = [
        attribution_map(s.f, s.x[n : n + 1], s.class_index[n : n + 1], method) for n in (2, 0, 1)
    ]
    assert_near(torch.cat(alone), maps[[2, 0, 1]], 1e-6)


@extra
@every_method
def test_a_map_is_of_its_class(method):
    s = small("linear")
    one, other = (attribution_map(s.f, s.x[:1], torch.tensor([c]), method) for c in (0, 3))
    assert (one - other).abs().max() > 0.05


@pytest.mark.slow
@extra
def test_methods_explain_lite0_from_the_command_line(tmp_path):
    """Run those that are quick; the others differ in nothing but the name."""
    quick = ["relevancecam", "layercam-fusion", "guidedbackprop", "deeplift"]
    words = [word for name in (*quick, "decomposition") for word in ("--cam", name)]
    done = aft("explain", CHELSEA, *words, "--tft", "--json", "--save", "map", "--out", tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    members = [name for name in METHODS if METHODS[name].family == "decomposition"]
    assert [each["cam"] for each in found] == quick + members
    for each in found:
        assert each["class_name"] == "tiger cat"
        assert each["tft"]["tau"] == THRESHOLDS[int(np.argmax(each["tft"]["rpi"]))]
        values = np.load(each["outputs"]["map"])
        assert values.min() >= 0 and 0.9 < values.max() <= 1


@pytest.mark.slow
@extra
@every_method
def test_masks_of_a_store_are_of_the_map_that_it_keeps(method):
    """I by cells, of a map of pixels their means: what is searched, cut and kept."""
    s = small("linear")
    for mode in ("value", "percentile") if method in ("lrp", "layercam-fusion") else ("value",):
        (tuned,) = tune_batch(s.f, s.x, [method], Search(mode=mode))
        c = s.model(s.x).argmax(1)
        own = scaled_map(s.f, s.f.activation(s.x), c, s.x, method)
        cells = to_cells(own, s.f.activation(s.x))
        assert_near(tuned.attribution, cells, 1e-6)
        for n in range(len(s.x)):
            stretched = reference.upsample(cells[n].double().numpy(), s.x.shape[2:])
            curve = []
            for tau in THRESHOLDS:
                kept = torch.from_numpy(reference.thresholded(stretched, tau, mode) != 0)
                curve.append(s.model(s.x[n : n + 1] * kept).softmax(1)[0, c[n]])
            assert_near(tuned.tft.probabilities[n], torch.stack(curve).float(), 1e-5)
            tau = round(float(tuned.tft.tau[n]), 1)
            cut = tau if mode == "value" else np.quantile(stretched, tau)
            assert torch.equal(tuned.mask[n], (cells[n] >= cut - 2**-20) & (cells[n] != 0))


def test_cells_are_means_of_what_they_cover():
    maps, activation = torch.rand(2, 20, 28), torch.zeros(2, 3, 5, 7)
    means = maps.view(2, 5, 4, 7, 4).mean((2, 4))
    assert_near(to_cells(maps, activation), normalise(means), 1e-6)
    assert to_cells(means, activation) is means


@pytest.mark.slow
@extra
def test_cells_are_asked_for_on_the_command_line(tmp_path):
    given = ("explain", CHELSEA, "--cam", "deeplift", "--json", "--save", "map", "--out", tmp_path)
    (pixels,) = json.loads(aft(*given).out)
    values = torch.from_numpy(np.load(pixels["outputs"]["map"]))
    (cells,) = json.loads(aft(*given, "--cells").out)
    means = normalise(values.view(1, 7, 32, 7, 32).mean((2, 4)))
    expected = F.interpolate(means[:, None], (224, 224), mode="bilinear")[0, 0]
    assert_near(np.load(cells["outputs"]["map"]), expected, 1e-5)
    assert cells["cells"] and "cells" not in pixels


@pytest.mark.slow
@extra
def test_a_threshold_of_a_map_of_pixels_comes_with_advice(tmp_path, capsys):
    done = aft("tft", CHELSEA, "--method", "deeplift", "--method", "gradcam", "--out", tmp_path)
    assert "aft: deeplift: a threshold of values leaves single pixels of such a map" in done.err
    pixels = ["rap", "lrp", "occlusion"]
    cli_setup.advise(pixels, "value", cells=False, quiet=False)
    assert capsys.readouterr().err.startswith("aft: lrp, rap: a threshold")
    cli_setup.advise(pixels, "percentile", cells=False, quiet=False)
    cli_setup.advise(pixels, "value", cells=True, quiet=False)
    cli_setup.advise(pixels, "value", cells=False, quiet=True)
    cli_setup.advise(["map", "rise", *CAMS], "value", cells=False, quiet=False)
    assert not capsys.readouterr().err


def test_passes_count_what_methods_need():
    f = small("linear").f
    settings = Search((0.0, 0.5))
    assert passes(f, ["rise"], 1, None) == 1 + METHODS["rise"].passes
    assert passes(f, ["scorecam"], 2, settings) == 1 + 2 * (2 + f.activation_shape[0])
    assert passes(f, ["map"], 1, settings) == 1 + 2


@extra
@pytest.mark.parametrize("method", [name for name in BEYOND if METHODS[name].passes])
def test_stated_passes_are_what_a_map_takes(method):
    f = small("linear").f
    seen = []
    f.watch = lambda images: None if torch.is_grad_enabled() else seen.append(images)
    x = torch.randn(1, 3, *f.preprocessing.size, dtype=torch.float64)
    attribution_map(f, x, torch.tensor([0]), method)
    assert 0 < sum(seen) <= METHODS[method].passes
    assert max(seen) <= 64
    f.watch = None


@every_method
def test_a_missing_extra_says_what_to_install(method, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    if METHODS[method].needs:
        with pytest.raises(AftError, match=r"pip install 'aftcli\[attributions\]'"):
            registry.named([method])
        with pytest.raises(AftError, match=re.escape(METHODS[method].needs[0])):
            METHODS[method].load()
    else:
        assert registry.named([method]) == [method]


def test_the_command_line_says_which_extra_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    for command in ("explain", "gen-masks", "finetune", "evaluate"):
        named = CHELSEA if command == "explain" else tmp_path
        done = aft(command, named, "--method", "gradient")
        assert done.code == 1 and not done.out
        assert "Guided Backpropagation needs zennit, which this installation lacks" in done.err
        assert "pip install 'aftcli[attributions]'" in done.err


@pytest.mark.slow
def test_bars_show_passes_of_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(report_progress, "SLOW", 0)
    bar = Progress(report_progress.PassesColumn())
    bar.add_task("explaining", total=1)
    before = report_progress.PASSED.images
    assert aft("explain", CHELSEA, "--tft", "--out", tmp_path).code == 0
    masked = report_progress.PASSED.images - before
    # Of eleven masks some are equal, whole or empty.
    assert 8 <= masked <= 11
    assert bar.columns[0].render(bar.tasks[0]).plain == f"{masked} passes"


def test_words_stand_for_methods():
    assert registry.named(["all"]) == list(CAMS)
    for family in FAMILIES:
        if family not in METHODS:
            members = [name for name, entry in METHODS.items() if entry.family == family]
            assert members and registry.named([family, members[0]]) == members
    assert {entry.family for entry in METHODS.values()} == set(FAMILIES)
    with pytest.raises(AftError, match="unknown method 'lpr'; nearest: lrp"):
        registry.named(["lpr"])
    with pytest.raises(AftError, match="unknown method 'gradiant'; nearest: gradient,"):
        registry.named(["gradiant"])


def test_method_is_another_name_of_cam(tmp_path):
    written = [
        aft("explain", CHELSEA, option, "gradcam", "--json", "--out", tmp_path).out
        for option in ("--cam", "--method")
    ]
    assert written[0] == written[1] and '"gradcam"' in written[0]


def test_only_cams_are_exported():
    with pytest.raises(AftError, match="layercam-fusion of .* can't be written as one ONNX graph"):
        traced(small("linear").f, "layercam-fusion")


@pytest.mark.slow
@extra
def test_masks_and_tables_of_a_method(tmp_path):
    """gen-masks and evaluate on a data set of two pictures."""
    for split in ("train", "val"):
        folder = tmp_path / "set" / split / "n02123159"
        folder.mkdir(parents=True)
        Image.open(CHELSEA).save(folder / "a.png")
        Image.open(CHELSEA).crop((50, 30, 400, 290)).save(folder / "b.png")
    run = tmp_path / "run"
    made = aft(
        "gen-masks", tmp_path / "set", "--cam", "lrp", "--cam", "layercam-fusion", "--run", run
    )
    assert made.code == 0, made.err
    with h5py.File(run / "masks" / "efficientnet_lite0-lrp.h5") as store:
        assert store["mask"].shape[0] == 2 and store.attrs["cam"] == "lrp"
    done = aft("evaluate", "--run", run, "--table", "3", "--format", "json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["table3"]
    assert {row["cam"] for row in rows} == {"lrp", "layercam-fusion"}
    expected = [explain_picture(tmp_path / "set" / "val" / "n02123159" / f"{n}.png") for n in "ab"]
    of_tft = [r for r in rows if (r["cam"], r["masking"], r["variant"]) == ("lrp", "binary", "tft")]
    drop = next(r["value"] for r in of_tft if r["measure"] == "average_drop")
    assert drop == pytest.approx(np.mean(expected), abs=1e-5)
    # A network is measured without masks too, where data and methods are named.
    bare = tmp_path / "bare"
    done = aft("evaluate", tmp_path / "set", "--cam", "lrp", "--run", bare, "--format", "json")
    assert done.code == 0, done.err
    alone = json.loads(done.out)["table3"]
    together = [dict(row) for row in rows if row["cam"] == "lrp"]
    assert len(alone) == len(together)
    for one, two in zip(alone, together, strict=True):
        # Other methods' images pass in the same batches.
        numbers = [(row.pop("value"), *(row.pop("ci") or ())) for row in (one, two)]
        # The mirror's passes round otherwise than those that made the maps.
        most = 1e-6 if one["judge"] == "self" else 1e-5
        assert one == two and numbers[0] == pytest.approx(numbers[1], abs=most)
    done = aft(
        *("evaluate", tmp_path / "set", "--cells", "--masking", "soft", "--table", "3"),
        *("--cam", "lrp", "--run", bare, "--format", "json"),
    )
    expected = [
        explain_picture(tmp_path / "set" / "val" / "n02123159" / f"{n}.png", True) for n in "ab"
    ]
    own = [r for r in json.loads(done.out)["table3"] if r["judge"] == "self"]
    values = {(r["variant"], r["measure"]): r["value"] for r in own}
    assert values["tft", "average_drop"] == pytest.approx(np.mean(expected), abs=1e-5)
    of_pixels = {
        (r["cam"], r["masking"], r["variant"], r["measure"]): r["value"]
        for r in rows
        if r["judge"] == "self"
    }
    assert values["tft", "average_drop"] < of_pixels["lrp", "soft", "tft", "average_drop"] - 0.1
    # A run that has masks may be of another network than the default one.
    for words in (("--run", bare / "none"), ("--run", run, "--cam", "gradcam")):
        refused = aft("evaluate", tmp_path / "set", *words)
        assert refused.code == 1 and "name a DATASET, a --cam and a new --run" in refused.err


def explain_picture(path, cells=False):
    """The drop of LRP with TFT, by the functions of Python."""
    from aftcli.data.images import read_image, to_input
    from aftcli.models.load import load_classifier

    f = load_classifier("efficientnet_lite0")
    x = to_input(read_image(path), f.preprocessing)
    settings = Search(masking="soft" if cells else "binary")
    (found,) = explain(f, x, ["lrp"], settings=settings, shaping=Shaping(cells))
    y_hat = float(found.tft.probabilities[0, found.tft.best])
    return max(found.probability - y_hat, 0) / found.probability
