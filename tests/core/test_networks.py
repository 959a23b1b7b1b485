"""Networks as users bring them: wrapped, not made to be copied, in half precision or inference."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from aftcli.aft.jobs import mask_job
from aftcli.aft.loss import in_situation
from aftcli.aft.run import Options, Tuned, fine_tune
from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.errors import AftError
from aftcli.masks.generate import generate_masks
from aftcli.masks.store import MaskStore
from aftcli.models.load import load_classifier
from aftcli.settings import Search
from aftcli.tft.explain import explain
from aftcli.tft.search import fine_tune_threshold
from tests.helpers.compare import assert_near
from tests.helpers.stored import NAMES, small_float
from tests.helpers.trained import SETTINGS, make_colours

PREPROCESSING = Preprocessing(size=(32, 32), resize=36)


class Plain(nn.Module):
    """Two convolutions and a linear layer, in a module of the user's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU())
        self.conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
        with torch.no_grad():
            self.last[2].weight.mul_(10)

    def forward(self, x):
        return self.last(self.relu(self.conv(self.first(x))))


class Storing(Plain):
    """The same; it remembers what it has seen, in lists and dicts too."""

    def forward(self, x):
        self.activation = self.relu(self.conv(self.first(x)))
        logits = self.last(self.activation)
        self.seen = [{"logits": logits}, (self.activation,)]
        return logits


def of_conv(change):
    """A network whose middle convolution is changed and which has been run, with gradients."""
    model = Plain()
    change(model.conv)
    model(torch.ones(2, 3, 32, 32))
    return model


def stored():
    model = Storing()
    model(torch.ones(2, 3, 32, 32))
    return model


def with_scripted_part():
    model = Plain()
    model.first = torch.jit.script(model.first)
    return model


UNUSUAL = {
    "weight norm": lambda: of_conv(nn.utils.weight_norm),
    "weight norm, parametrized": lambda: of_conv(parametrizations.weight_norm),
    "spectral norm": lambda: of_conv(nn.utils.spectral_norm),
    "spectral norm, parametrized": lambda: of_conv(parametrizations.spectral_norm),
    "pruned": lambda: of_conv(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
    "stored activations": stored,
    "a scripted part": with_scripted_part,
    "DataParallel": lambda: nn.DataParallel(Plain()),
    "compiled": lambda: torch.compile(Plain()),
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(Plain())),
}


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0, 2])


def counterpart(model):
    """A plain network whose convolution has the weights that the unusual one computes."""
    inner = getattr(model, "module", model)
    inner = getattr(inner, "_orig_mod", inner).eval()
    inner(inputs()[0])
    plain = Plain().eval()
    with torch.no_grad():
        plain.conv.weight.copy_(inner.conv.weight)
    return plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_network_is_explained_like_a_plain_one_with_its_weights(name):
    x, c = inputs()
    f = cut_classifier(UNUSUAL[name](), preprocessing=PREPROCESSING)
    plain = cut_classifier(counterpart(UNUSUAL[name]()), preprocessing=PREPROCESSING)
    assert f.layer_name == plain.layer_name == "conv+relu"
    assert_near(f(x), plain(x), 1e-5)
    for method in ("gradcam", "ablationcam", "scorecam"):
        expected = attribution_map(plain, x, c, method)
        assert expected.any()
        assert_near(attribution_map(f, x, c, method), expected, 1e-4)
    fast = accelerated(f, "torch", note=pytest.fail)
    with torch.no_grad():
        assert_near(fast(x), plain(x), 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in UNUSUAL if "script" not in name])
def test_rules_of_layers_see_the_weights_that_an_unusual_network_computes(name):
    x, c = inputs()
    f = cut_classifier(UNUSUAL[name](), preprocessing=PREPROCESSING)
    plain = cut_classifier(counterpart(UNUSUAL[name]()), preprocessing=PREPROCESSING)
    before, hashed = f(x), f.weights_hash()
    for method in ("lrp", "guidedbackprop", "deeplift"):
        expected = attribution_map(plain, x, c, method)
        assert expected.any()
        assert_near(attribution_map(f, x, c, method), expected, 1e-4)
    assert torch.equal(f(x), before) and f.weights_hash() == hashed


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.slow
def test_the_users_network_stays_as_it_was(name):
    model = UNUSUAL[name]().train()
    x, c = inputs()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    f = cut_classifier(model, preprocessing=PREPROCESSING)
    attribution_map(f, x, c, "gradcam")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_scripted_network_is_refused_with_what_to_pass_instead():
    scripted = torch.jit.script(Plain().eval())
    traced = torch.jit.trace(Plain().eval(), inputs()[0])
    for model in (scripted, traced, nn.DataParallel(scripted)):
        with pytest.raises(AftError, match="scripted or traced .* pass the nn.Module that it was"):
            cut_classifier(model, preprocessing=PREPROCESSING)


def test_a_network_that_holds_a_lock_can_be_cut_itself():
    model = Plain().eval()
    model.lock = threading.Lock()
    with pytest.raises(AftError, match=r"Plain can't be copied \(.*lock.*\); remove .* own=True"):
        cut_classifier(model, preprocessing=PREPROCESSING)
    f = cut_classifier(model, "conv+relu", preprocessing=PREPROCESSING, own=True)
    x, c = inputs()
    plain = cut_classifier(Plain(), "conv+relu", preprocessing=PREPROCESSING)
    assert torch.equal(attribution_map(f, x, c, "gradcam"), attribution_map(plain, x, c, "gradcam"))


# Inference mode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "kernelshap"])
def test_maps_in_inference_mode_are_those_outside(method):
    f = small_float()
    x, c = inputs()
    expected = attribution_map(f, x[:1], c[:1], method)
    assert expected.any() and not expected.requires_grad
    with torch.inference_mode():
        made = x[:1].clone()
        assert made.is_inference()
        assert_near(attribution_map(f, made, c[:1].clone(), method), expected, 1e-6)
    # What was made there may be used outside.
    assert_near(attribution_map(f, made, c[:1], method), expected, 1e-6)


def test_a_network_made_and_explained_in_inference_mode_gives_the_map_it_gives_outside():
    x, c = inputs()
    settings = Search((0.2, 0.5, 0.8))

    def results():
        f = cut_classifier(Plain(), preprocessing=PREPROCESSING)
        attribution = attribution_map(f, x, c, "layercam")
        (found,) = explain(f, x[:1], ["gradcam"], settings=settings)
        tuned = fine_tune_threshold(f, x, attribution, c, settings.thresholds)
        loaded = load_classifier(weights=False)
        assert not any(p.is_inference() for p in loaded.parameters())
        return attribution, found.attribution, found.tft.rpi, tuned.rpi

    expected = results()
    with torch.inference_mode():
        found = results()
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, 1e-6)
    with torch.inference_mode():
        model = Plain()
    with pytest.raises(AftError, match="Plain was made in torch.inference_mode"):
        cut_classifier(model, preprocessing=PREPROCESSING, own=True)


@pytest.mark.slow
def test_a_whole_run_in_inference_mode_gives_what_it_gives_outside(tmp_path):
    root = make_colours(tmp_path / "data", each=4)

    def run(folder):
        f = small_float()
        data = open_data_set(root, None, f.classes)
        list(generate_masks(f, data, ["gradcam"], folder, Search((0.3,)), workers=0))
        job = mask_job(MaskStore(folder / "masks/small-gradcam.h5"), f)
        options = Options(workers=0, save_every=0)
        settings = in_situation(**{**SETTINGS, "objective": "tuner", "epochs": 1})
        *_, last = fine_tune([job], folder, settings, options)
        assert isinstance(last, Tuned)
        return load_file(last.path)

    expected = run(tmp_path / "outside")
    with torch.inference_mode():
        found = run(tmp_path / "inside")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, 1e-5)
    assert any((expected[k] != v).any() for k, v in small_float().weights().items())


def test_gradients_stay_off_where_the_caller_has_switched_them_off():
    f = small_float()
    x, c = inputs()
    seen = []
    f.watch = lambda count: seen.append(torch.is_grad_enabled())
    with torch.no_grad():
        attribution_map(f, x, c, "gradcam")
        fine_tune_threshold(f, x, torch.rand(2, 32, 32), c)
    assert seen and not any(seen)


# Half precision

# They go by which of two values is the larger, step after step, so rounding leads elsewhere.
STEPWISE = ("omcam", "xrai", "kernelshap")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_network_in_half_precision_gives_the_map_of_its_weights(method, dtype):
    f = small_float()
    low = copy.deepcopy(f).to(dtype)
    # The same weights, rounded, in float64.
    high = copy.deepcopy(low).double()
    x, c = inputs()
    x = x[:1].to(dtype)
    found = attribution_map(low, x, c[:1], method).double().flatten()
    assert found.any()
    if method in STEPWISE:
        return
    expected = attribution_map(high, x.double(), c[:1], method).flatten()
    assert expected.any()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_wide_enough_for_eigencam(dtype):
    """The projection of large activations would leave the range of float16."""
    model = Plain()
    with torch.no_grad():
        model.conv.weight.mul_(2e4)
    names = Classes(NAMES)
    f = cut_classifier(model.to(dtype), preprocessing=PREPROCESSING, classes=names)
    x, c = inputs()
    with torch.no_grad():
        a = f.activation(x.to(dtype)).double()
    assert 5e3 < a.max() < 6.5e4
    cells = a.flatten(2).mT
    # The first singular vector as that of the Gram matrix, by another routine.
    vector = torch.linalg.eigh(cells @ cells.mT).eigenvectors[:, :, -1]
    vector = vector * vector.sum(1, keepdim=True).sign()
    expected = vector.relu().view(2, *a.shape[2:])
    expected = (expected - expected.amin((1, 2), True)) / (
        expected.amax((1, 2), True) - expected.amin((1, 2), True)
    )
    expected = nn.functional.interpolate(expected[:, None], (32, 32), mode="bilinear")[:, 0]
    found = attribution_map(f, x.to(dtype), c, "eigencam")
    assert_near(found.double(), expected, 1e-4)
