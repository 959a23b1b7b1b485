"""Engines change the time, not the results: each against the network as its authors wrote it."""

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import onnx
import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn

from aftcli.aft.tail import earlier_layers
from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import ahead, cut_classifier
from aftcli.core.inputs import at_once
from aftcli.engine import accelerate as engine
from aftcli.engine import onnx as engine_onnx
from aftcli.engine.accelerate import ENGINES, ENOUGH, accelerated, fast_stem
from aftcli.engine.folded import FoldedTorch, folded
from aftcli.engine.onnx import AT_ONCE, Graph, OnnxRuntime
from aftcli.errors import AftError
from aftcli.files import cache_folder
from aftcli.tft.masking import MASKINGS
from aftcli.tft.search import fine_tune_threshold
from tests.helpers.command import aft, usage_error
from tests.helpers.compare import assert_near
from tests.helpers.faulty import load_small
from tests.helpers.small import KINDS, SIZE, small_model

ROOT = Path(__file__).parents[2]
PHOTOS = sorted((ROOT / "docs/images").glob("c*.jpg"))[:2]
QUICK = [name for name in ENGINES if name != "compile"]  # which takes a minute a network
CLOSE = 1e-5  # of the largest value


def network(kind="linear", seed=0):
    """A small float32 classifier, and the network it was cut from."""
    model = small_model(kind, seed).float().eval()
    _, layer = KINDS[kind]
    return cut_classifier(model, layer, preprocessing=Preprocessing(size=SIZE)), model


def inputs(count=3):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(5))


def silent(text):
    raise AssertionError(f"a note where there is nothing to say: {text}")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Kept(NamedTuple):
    """Graphs of one kind of network with different weights: names of their files and contents."""

    names: list
    graphs: list

    def put(self, cache, count):
        """Put the first ones into a cache, as earlier calls would have done."""
        cache.mkdir()
        paths = [cache / name for name in self.names[:count]]
        for path, graph in zip(paths, self.graphs, strict=False):
            path.write_bytes(graph)
        return paths


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    cache, names = tmp_path_factory.mktemp("kept"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFT_CACHE", str(cache))
        for seed in range(3):
            accelerated(network(seed=seed)[0], "onnxruntime", note=lambda text: None)
            (new,) = {path.name for path in cache.iterdir()} - set(names)
            names.append(new)
    return Kept(names, [(cache / name).read_bytes() for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUICK)
def test_activations_and_logits_are_those_of_the_network(name, kind):
    f, model = network(kind)
    fast = accelerated(f, name, note=lambda text: None)
    assert fast.engine.name == name
    for count in (1, 2, 5, 17):
        x = inputs(count)
        with torch.no_grad():
            assert_near(fast(x), model(x), CLOSE)
            assert_near(fast.activation(x), f.activation(x), CLOSE)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_the_engine_runs_and_not_the_network(name, monkeypatch):
    f, _ = network()
    fast = accelerated(f, name, note=lambda text: None)
    monkeypatch.setattr(f.stem, "forward", None)
    with torch.no_grad():
        assert fast(inputs()).isfinite().all()


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_the_network_stays_as_it_was(name, empty_cache):
    f, _ = network()
    before, weights = f(inputs()), f.weights_hash()
    fast = accelerated(f, name, note=lambda text: None)
    assert f.engine is None and fast is not f
    assert torch.equal(f(inputs()), before) and f.weights_hash() == weights
    assert not any(module.training for module in f.modules())


@pytest.mark.parametrize("name", QUICK)
def test_with_gradients_the_network_itself_runs(name):
    f, _ = network()
    fast = accelerated(f, name, note=lambda text: None)
    x = inputs().requires_grad_()
    (given,) = torch.autograd.grad(fast(x).sum(), x)
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
@pytest.mark.slow
def test_inputs_of_another_size_run_all_the_same(name):
    f, model = network()
    x = torch.randn(2, 3, 36, 24)
    assert_near(accelerated(f, name, note=lambda text: None)(x), model(x), CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", QUICK)
def test_tau_and_rpi_stay_the_same(name, masking, seed):
    f, _ = network("mlp", seed)
    fast = accelerated(f, name, note=lambda text: None)
    c = torch.tensor([0, 1, 2])
    maps = attribution_map(f, inputs(), c, "gradcam")
    assert_near(attribution_map(fast, inputs(), c, "gradcam"), maps, 1e-4)
    found, expected = (
        fine_tune_threshold(g, inputs(), maps, c, masking=masking) for g in (fast, f)
    )
    assert torch.equal(found.tau, expected.tau)
    assert_near(found.probabilities, expected.probabilities, CLOSE)
    assert (found.rpi - expected.rpi).abs().max() < 1e-4


@pytest.fixture(scope="module")
def explained(lite0, chelsea):
    """Maps and searches of a photograph by the network itself, by method."""
    with torch.no_grad():
        c = lite0(chelsea).argmax(1)
    found = {}
    for method in ("gradcam", "layercam", "ablationcam"):
        maps = attribution_map(lite0, chelsea, c, method)
        found[method] = c, maps, fine_tune_threshold(lite0, chelsea, maps, c)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_tau_of_photographs_stays_the_same(name, lite0, chelsea, explained):
    fast = accelerated(lite0, name, note=lambda text: None)
    for method, (c, maps, expected) in explained.items():
        assert_near(attribution_map(fast, chelsea, c, method), maps, 1e-4)
        found = fine_tune_threshold(fast, chelsea, maps, c)
        assert torch.equal(found.tau, expected.tau)
        assert_near(found.rpi, expected.rpi, 1e-3)


# Folding


def test_a_gpu_gets_few_sizes_of_passes(monkeypatch):
    f, model = network()
    fast = accelerated(f, "torch", note=silent)
    seen, run = [], fast.engine.whole
    fast.engine.whole = lambda x: (seen.append(len(x)), run(x))[1]
    monkeypatch.setattr(fast.engine, "device", torch.device("cuda"))
    for count in (1, 2, 3, 4, 5, 8, 9):
        x = inputs(count)
        with torch.no_grad():
            assert_near(fast(x), model(x), CLOSE)
    assert seen == [1, 2, 4, 4, 8, 8, 16]


@pytest.mark.parametrize(
    ("size", "count"), [(224, 64), (448, 16), (112, 256), (600, 16), (260, 32), (2000, 16)]
)
def test_a_pass_of_a_gpu_has_as_many_images_as_pixels_allow(size, count):
    x = torch.empty(1, 3, size, size, device="meta")
    assert at_once(None, x, 16) == at_once("an engine", x, 16) == count


def test_weights_are_rounded_once():
    f, _ = network()
    fast = accelerated(f, "torch", note=silent, precision="bf16")
    kinds = {m.weight.dtype for m in fast.engine.whole.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in f.parameters()} == {torch.float32}


def test_weights_that_a_convolution_computes_are_not_rounded_before():
    layers = ScaledStdConv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    f = cut_classifier(model.eval(), "2", preprocessing=Preprocessing(size=SIZE))
    fast = accelerated(f, "torch", note=silent, precision="bf16")
    found = {type(m): m.weight.dtype for m in fast.engine.whole.modules() if hasattr(m, "weight")}
    assert found[ScaledStdConv2d] == torch.float32 and found[nn.Conv2d] == torch.bfloat16


def test_batch_norms_are_folded_into_convolutions():
    f, _ = network()
    norms = [m for m in folded(f.stem).modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms and any(isinstance(m, nn.BatchNorm2d) for m in f.stem.modules())


def test_all_batch_norms_of_lite0_are_folded(lite0):
    parts = [folded(part) for part in (lite0.stem, lite0.layer)]
    assert not [m for part in parts for m in part.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_batch_norm_that_follows_two_convolutions_is_left():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            a = self.one(x)
            return self.norm(a) + self.norm(self.two(x)) + a

    part = Shared().eval()
    part.norm.running_mean.normal_()
    assert_near(folded(part)(inputs()), part(inputs()), CLOSE)


def test_what_cannot_be_traced_is_run_as_it_is():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert isinstance(folded(Branching()), Branching)


def test_lower_precision_is_close_but_not_the_same(lite0, chelsea, monkeypatch):
    monkeypatch.setattr(engine, "has_bf16", lambda: True)
    lower = accelerated(lite0, "torch", note=silent, precision="bf16")
    with torch.no_grad():
        given, expected = lower(chelsea), lite0(chelsea)
    assert given.dtype == torch.float32
    assert not torch.allclose(given, expected, atol=1e-4)
    assert_near(given, expected, 0.1)


@pytest.mark.parametrize(("known", "said"), [({"avx512_bf16": False}, 1), ({"x_bf16": True}, 0)])
def test_a_cpu_without_bf16_is_named(known, said, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    notes = []
    accelerated(network()[0], "torch", note=notes.append, precision="bf16")
    assert len(notes) == said and all("no bf16 instructions" in note for note in notes)


# What is chosen, and what happens where it can't be used


@pytest.mark.parametrize(
    ("passes", "kind"),
    [
        (1, None),
        (ENOUGH - 1, None),
        (ENOUGH, OnnxRuntime),
        (None, OnnxRuntime),
    ],
)
def test_auto_chooses_by_the_number_of_passes(passes, kind):
    f, _ = network()
    fast = accelerated(f, "auto", passes, note=lambda text: None)
    assert fast is f if kind is None else type(fast.engine) is kind


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"engine": "onnx"}, "onnxruntime"),
        ({"precision": "fp8"}, "bf16"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "--engine torch"),
    ],
)
def test_unknown_engines_are_an_error(wrong, word):
    with pytest.raises(AftError, match=word):
        accelerated(network()[0], **wrong)


class Wrong(FoldedTorch):
    """An engine that is a little off."""

    def logits(self, x):
        return super().logits(x) * (1 + 3e-4)


def test_an_engine_with_other_results_is_not_used(monkeypatch):
    monkeypatch.setattr("aftcli.engine.folded.FoldedTorch", Wrong)
    f, _ = network()
    notes = []
    assert accelerated(f, "torch", note=notes.append) is f
    assert "differ by 3.0e-04" in notes[0] and "plain torch runs it" in notes[0]


def test_an_engine_that_fails_is_not_used(monkeypatch):
    def fail(self, x):
        raise RuntimeError("no compiler found\nat all")

    monkeypatch.setattr(FoldedTorch, "logits", fail)
    f, _ = network()
    notes = []
    assert accelerated(f, "torch", note=notes.append) is f
    assert "(no compiler found)" in notes[-1]


def test_double_precision_runs_by_torch():
    f, _ = network()
    notes = []
    assert accelerated(f.double(), "onnxruntime", note=notes.append) is f
    assert "not float32" in notes[0]


def test_what_cannot_be_exported_runs_by_torch(monkeypatch, empty_cache):
    def fail(*_, **__):
        raise ValueError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    f, _ = network()
    notes = []
    assert accelerated(f, "onnxruntime", note=notes.append) is f
    assert notes[0].startswith("exporting") and notes[1].count("no such operator") == 1
    assert "and more" not in notes[1]
    assert not list(empty_cache.rglob("*"))


def test_without_onnxruntime_torch_runs_and_the_note_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    f, _ = network()
    notes = []
    assert accelerated(f, "onnxruntime", note=notes.append) is f
    assert "pip install onnxruntime" in notes[-1]


# The cache of exported networks


@pytest.mark.slow
def test_a_network_is_exported_once(empty_cache, capsys):
    notes = []
    accelerated(network()[0], "onnxruntime", note=notes.append)
    (file,) = empty_cache.iterdir()
    assert len(notes) == 1 and file.suffix == ".onnx"
    accelerated(network()[0], "onnxruntime", note=silent)
    assert list(empty_cache.iterdir()) == [file]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "structure", "size"])
def test_another_network_is_exported_anew(change, empty_cache, kept):
    f, _ = network()
    kept.put(empty_cache, 1)
    accelerated(f, "onnxruntime", note=silent)
    model = small_model("linear", 1 if change == "weights" else 0).float().eval()
    if change == "structure":
        model.relu1 = nn.LeakyReLU(0.3)
    size = (24, 28) if change == "size" else SIZE
    g = cut_classifier(model, f.layer_name, preprocessing=Preprocessing(size=size))
    fast = accelerated(g, "onnxruntime", note=lambda text: None)
    assert len(list(empty_cache.iterdir())) == 2
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert_near(fast(x), model(x), CLOSE)


def written_in(file):
    """Operations and weights of an exported file; it also names code by a number that grows."""
    graph = onnx.load_from_string(file).graph
    operations = [(node.op_type, *node.input, *node.output) for node in graph.node]
    return operations, {weight.name: weight.raw_data for weight in graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"", b"not a graph", None])
def test_a_damaged_file_is_exported_anew(damage, empty_cache, kept):
    (file,) = kept.put(empty_cache, 1)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    notes = []
    fast = accelerated(network()[0], "onnxruntime", note=notes.append)
    assert fast.engine and len(notes) == 1
    assert written_in(file.read_bytes()) == written_in(whole)


@pytest.mark.slow
def test_an_exchanged_file_is_found_out(empty_cache, kept):
    """Another network's graph under this one's name gives other results, so it is not used."""
    file, other = kept.put(empty_cache, 2)
    file.write_bytes(other.read_bytes())
    f, _ = network("linear", 0)
    notes = []
    assert accelerated(f, "onnxruntime", note=notes.append) is f
    assert "differ" in notes[0]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AFT_CACHE", str(tmp_path / "file"))
    f, _ = network()
    notes = []
    assert accelerated(f, "onnxruntime", note=notes.append) is f
    assert "AFT_CACHE" in notes[-1]
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.slow
def test_what_was_not_used_for_longest_leaves_the_cache(empty_cache, kept, monkeypatch):
    for age, file in zip((300, 200, 100), kept.put(empty_cache, 3), strict=True):
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    # The first is used again, so the second is the oldest.
    accelerated(network(seed=0)[0], "onnxruntime", note=silent)
    # A file names code by a number that grows, so it may be some digits longer than the one before.
    size = sum(f.stat().st_size for f in empty_cache.iterdir()) + 200
    monkeypatch.setattr(engine_onnx, "KEPT", size)
    accelerated(network(seed=3)[0], "onnxruntime", note=lambda text: None)
    for seed in (0, 2, 3):
        accelerated(network(seed=seed)[0], "onnxruntime", note=silent)
    assert len(list(empty_cache.iterdir())) == 3


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"AFT_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c", "AFT_CACHE": ""}, "/c/aft"),
        ({"HOME": "/home/me", "AFT_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/aft"),
    ],
)
def test_the_cache_is_where_users_expect_it(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_a_wrapper_in_training_mode_is_refused():
    """Exporting one would leave the whole network in training mode."""
    with pytest.raises(engine.Unfit, match="training"):
        Graph(nn.Sequential(nn.Conv2d(3, 1, 1)).train(), SIZE, ("y",), "it", silent)


# The frozen layers of fine-tuning


def test_a_fast_stem_gives_what_the_stem_gives():
    f, _ = network()
    run = fast_stem(f, f.stem, "onnxruntime", note=lambda text: None)
    assert run is not f.stem
    with torch.no_grad():
        (given,) = run(inputs(4))
        assert_near(given, f.stem(inputs(4)), CLOSE)


def test_a_stem_with_several_outputs(empty_cache):
    class Crossing(nn.Module):
        """A stem whose input goes round the first convolution."""

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.first(x), x[:, :1] + 1

    f, _ = network()
    stem = Crossing().eval()
    run = fast_stem(f, stem, "onnxruntime", note=lambda text: None)
    with torch.no_grad():
        for given, expected in zip(run(inputs()), stem(inputs()), strict=True):
            assert_near(given, expected, CLOSE)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, [1]), (2, [1, 1]), (11, [2, 3, 3, 3]), (16, [4] * 4), (17, [2, *[3] * 5])],
)
def test_each_thread_passes_a_few_images(count, sizes, kept, empty_cache, monkeypatch):
    kept.put(empty_cache, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    engine = accelerated(network()[0], "onnxruntime", note=silent).engine
    x, seen, run = inputs(count), [], engine_onnx._pass
    alone = torch.cat([engine.logits(each) for each in x.split(1)])
    monkeypatch.setattr(
        engine_onnx,
        "_pass",
        lambda session, names, x: seen.append(len(x)) or run(session, names, x),
    )
    assert_near(engine.logits(x), alone, CLOSE)
    assert sorted(seen) == sorted(sizes)


@pytest.mark.parametrize(("name", "meanwhile"), [("onnxruntime", True), ("torch", False)])
def test_inputs_are_made_while_onnxruntime_runs(name, meanwhile):
    f, made = network()[0], threading.Event()
    f.engine = SimpleNamespace(name=name)
    own, seen = threading.get_ident(), []

    def inputs_of(count):
        for i in range(count):
            if i == 1:
                made.set()
            yield torch.tensor(float(i))

    def run(x):
        # The first pass ends when the second input is made, where that does not wait for it.
        seen.append((threading.get_ident() != own, meanwhile and made.wait(60)))
        return 2 * x

    found = [float(each) for each in ahead(f, run, inputs_of(5))]
    assert found == [0, 2, 4, 6, 8]
    assert seen == [(meanwhile, meanwhile)] * 5
    assert [*ahead(f, run, inputs_of(0))] == []


def test_a_pass_that_fails_in_its_thread_fails_here():
    f = network()[0]
    f.engine = SimpleNamespace(name="onnxruntime")
    with pytest.raises(ZeroDivisionError):
        [*ahead(f, lambda x: 1 // 0, iter(inputs(2)))]


def test_a_tensor_of_no_image_stays_as_it_is(empty_cache):
    class WithTable(nn.Module):
        """A stem that also gives a tensor of shape (1, 2), whatever the images are."""

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.tensor([[2.0, 3.0]]))

        def forward(self, x):
            return x + 1, self.table * 2

    f, _ = network()
    run = fast_stem(f, WithTable().eval(), "onnxruntime", note=lambda text: None)
    x = inputs(AT_ONCE + 1)
    with torch.no_grad():
        given, table = run(x)
    assert_near(given, x + 1, CLOSE)
    assert table.tolist() == [[4, 6]]


@pytest.mark.parametrize(("name", "passes"), [("torch", None), ("auto", ENOUGH - 1)])
def test_otherwise_the_stem_runs_as_it_is(name, passes):
    f, _ = network()
    assert fast_stem(f, f.stem, name, passes, silent) is f.stem


@pytest.mark.slow
def test_an_earlier_stem():
    f, _ = network()
    earlier = earlier_layers(f, ("relu1",))
    run = fast_stem(f, earlier.stem, "onnxruntime", note=lambda text: None)
    assert run is not earlier.stem
    with torch.no_grad():
        (given,) = run(inputs())
        assert given.min() < 0
        assert_near(given, earlier.stem(inputs()), CLOSE)


# The commands


def said(*options):
    """Output of explain for two photographs."""
    methods = ("--cam", "gradcam", "--cam", "layercam")
    arguments = ("--tft", "--json", *methods, "--save", "none", "--device", "cpu")
    done = aft("explain", *PHOTOS, *arguments, *options)
    assert done.code in (0, None), done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def plain():
    return said()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_explain_says_the_same_on_each_engine(name, plain):
    fast = said("--engine", name)
    assert len(plain) == 4
    for one, other in zip(plain, fast, strict=True):
        assert one["tft"]["tau"] == other["tft"]["tau"]
        for tau, a, b in zip(
            one["tft"]["thresholds"], one["tft"]["rpi"], other["tft"]["rpi"], strict=True
        ):
            # Layer-CAM of chelsea has a pixel at this threshold to six digits
            # (docs/method/decisions/search.md).
            at_pixel = ("chelsea" in one["image"], one["cam"], tau) == (True, "layercam", 0.5)
            near = {"abs": 0.05} if at_pixel else {"rel": 1e-3, "abs": 1e-4}
            assert a == pytest.approx(b, **near), tau


@pytest.mark.slow
def test_a_note_goes_to_stderr_unless_it_is_quiet(tmp_path, empty_cache, monkeypatch):
    monkeypatch.setattr("aftcli.models.load.load_classifier", load_small)
    arguments = ("explain", PHOTOS[0], "--engine", "onnxruntime", "--json", "--out", tmp_path / "o")
    first = aft(*arguments)
    assert "aft: exporting small for ONNX Runtime" in first.err
    json.loads(first.out)
    (file,) = empty_cache.iterdir()
    file.unlink()
    assert "exporting" not in aft(*arguments, "--quiet").err


@pytest.mark.parametrize("command", ["explain", "tft", "gen-masks", "finetune", "evaluate"])
def test_an_unknown_engine_is_refused(command, tmp_path):
    target = [PHOTOS[0]] if command in ("explain", "tft") else [tmp_path]
    done = aft(command, *target, "--engine", "tensorrt")
    known = "'auto', 'torch', 'compile', 'onnxruntime'"
    assert f"'tensorrt' is not one of {known}" in usage_error(done)


def test_tensors_of_five_axes_are_no_obstacle():
    class Shifted(nn.Module):
        """A table of five axes, as the masks of Swin are."""

        def __init__(self):
            super().__init__()
            self.network = small_model("linear", 0).float()
            self.register_buffer("table", torch.rand(1, 2, 1, 3, 1))

        def forward(self, x):
            return self.network(x) + self.table.sum()

    model = Shifted().eval()
    f = cut_classifier(model, "network.conv2", preprocessing=Preprocessing(size=SIZE))
    fast = accelerated(f, "torch", note=pytest.fail)
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert_near(fast(x), model(x), 1e-5)
