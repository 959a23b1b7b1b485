"""A map's zero level moves and no prediction does: derivation, training, checkpoints, options."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aftcli import AftError, attribution_map, explain
from aftcli.aft.jobs import mask_job
from aftcli.aft.loss import ZERO_LEVEL, Recipe, in_situation
from aftcli.aft.run import Options, fine_tune
from aftcli.aft.training import Step, Training
from aftcli.aft.zero_level import SHARES, Chosen, Searching, ZeroLevelTraining
from aftcli.core.cam import normalise, scaled_map, stretch
from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.core.methods import METHODS
from aftcli.core.zero_level import (
    Learned,
    Levelled,
    give_zero_level,
    moved_by,
    pieces_of,
    signed_map,
    support,
    zero_level_loss,
)
from aftcli.data.parts import spread
from aftcli.evaluation.study import _check_pairs, _Made
from aftcli.files import write_tensors
from aftcli.masks.store import MaskStore
from aftcli.models.checkpoint import checkpoint_of, read_card, restore
from aftcli.settings import Search
from aftcli.tft.masking import FILLS
from aftcli.tft.threshold import Tried, best_of
from tests.aft.test_training import assert_equal, through_json
from tests.helpers.compare import assert_near
from tests.helpers.small import CLASSES, KINDS, POOL_LINEAR, small
from tests.helpers.stored import generate, small_float
from tests.helpers.trained import (
    Direct,
    epochs,
    make_colours,
    masks_of,
    train_together,
    tune,
    tuned,
)

pytestmark = pytest.mark.slow

SIGNED = [name for name, entry in METHODS.items() if entry.signed]
WITHOUT = [name for name in METHODS if name not in SIGNED]
CASES = [(k, m) for k in KINDS for m in SIGNED if m != "cam" or k in POOL_LINEAR]


def moved(kind, seed=0, t=0.3, with_v=True):
    """A small network, the same one with a zero level, and v."""
    s = small(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(s.f.activation_shape[0], generator=generator, dtype=torch.float64)
    g = copy.deepcopy(s.f)
    give_zero_level(g, torch.tensor(t, dtype=torch.float64), v if with_v else None)
    return s, g, v


# The derivation.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_v", [False, True])
def test_no_probability_changes(kind, with_v):
    for seed in range(3):
        s, g, v = moved(kind, seed, t=1.7, with_v=with_v)
        assert_near(g(s.x).softmax(1), s.f(s.x).softmax(1), 1e-12)
        rise = g(s.x) - s.f(s.x)
        shared = s.f.activation(s.x).mean((2, 3)) @ v if with_v else torch.zeros(3)
        assert_near(rise, shared.double()[:, None].expand(-1, CLASSES), 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_grad_cam_of_the_changed_network_is_the_shifted_sum(kind, seed):
    """Autograd through the changed network against sum_k (alpha_k + v_k / Z) A_k - t by loops."""
    t = 0.4
    s, g, v = moved(kind, seed, t)
    a = s.f.activation(s.x)
    inner, outer = a.clone().requires_grad_(), g.activation(s.x).requires_grad_()
    cells = a[0, 0].numel()
    for n, c in enumerate(s.class_index.tolist()):
        (before,) = torch.autograd.grad(s.f.head(inner)[n, c], inner)
        (after,) = torch.autograd.grad(g.head(outer)[n, c], outer)
        for i in range(a.shape[2]):
            for j in range(a.shape[3]):
                expected = -t
                for k in range(a.shape[1]):
                    alpha = float(before[n, k].sum()) / cells
                    expected += (alpha + float(v[k]) / cells) * float(a[n, k, i, j])
                found = sum(
                    float(after[n, k].mean()) * float(outer.detach()[n, k, i, j])
                    for k in range(outer.shape[1])
                )
                assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("kind", "cam"), CASES)
def test_each_method_of_the_changed_network_subtracts_the_level(kind, cam):
    s, g, v = moved(kind, 1)
    a, b = s.f.activation(s.x), g.activation(s.x)
    assert b.shape[1] == a.shape[1] + 1 and bool((b[:, -1] == 1).all())
    expected = signed_map(s.f, a, s.class_index, cam) + moved_by(v, a, cam) - 0.3
    assert_near(signed_map(g, b, s.class_index, cam), expected, 1e-12)
    shown = METHODS[cam].load()(g, b, s.class_index, s.x)
    assert_near(normalise(shown), normalise(expected.relu()), 1e-12)


@pytest.mark.parametrize(("kind", "cam"), CASES)
def test_the_map_before_the_relu_is_that_of_the_method(kind, cam):
    s = small(kind, 2)
    a = s.f.activation(s.x)
    signed = METHODS[cam].load_signed()(s.f, a, s.class_index, s.x)
    assert torch.equal(signed.relu(), METHODS[cam].load()(s.f, a, s.class_index, s.x))
    assert bool((signed < 0).any())


@pytest.mark.parametrize("kind", POOL_LINEAR)
def test_a_head_of_pooling_and_a_linear_layer_stays_one(kind):
    _, g, _ = moved(kind)
    assert g.linear_head is not None and g.linear_head.is_last and g.linear_head.is_mean
    assert g.activation_shape == (9, 5, 7)


def test_another_head_gets_a_layer_before_and_after_it():
    assert isinstance(moved("conv")[1].head, Levelled)


def test_a_zero_level_is_replaced_not_added():
    s, g, _ = moved("linear", t=0.3)
    give_zero_level(g, torch.tensor(0.1, dtype=torch.float64))
    assert set(g.weights()) == {*s.f.weights(), "zero_level.t"}
    a = s.f.activation(s.x)
    expected = signed_map(s.f, a, s.class_index, "gradcam") - 0.1
    assert_near(signed_map(g, g.activation(s.x), s.class_index, "gradcam"), expected, 1e-12)


@pytest.mark.parametrize("cam", ["lrp", "clrp", "relevancecam", "deeplift", "guidedbackprop"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_methods_that_take_the_network_apart_take_this_one(kind, cam):
    for module in METHODS[cam].needs:
        pytest.importorskip(module)
    s, g, _ = moved(kind, with_v=False)
    # t moves no logit: the network without it is taken apart.
    found = attribution_map(g, s.x, s.class_index, cam)
    assert_near(found, attribution_map(s.f, s.x, s.class_index, cam), 1e-9)


@pytest.mark.parametrize("cam", ["scorecam", "eigencam", "gradcam++", "layercam"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_methods_without_a_sign_keep_their_map(kind, cam):
    s, g, _ = moved(kind, with_v=False)
    found = scaled_map(g, g.activation(s.x), s.class_index, s.x, cam)
    expected = scaled_map(s.f, s.f.activation(s.x), s.class_index, s.x, cam)
    assert_near(found, expected, 1e-9)


# The support and the loss.


@pytest.mark.parametrize("size", [(20, 28), (30, 56), (112, 112), (33, 50), (21, 35)])
@pytest.mark.parametrize("seed", range(2))
def test_support_is_exactly_that_of_the_stretched_map(size, seed):
    """Each pixel's score, stretched, is above 0 just where its piece is."""
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randn(3, 7, 7, generator=generator, dtype=torch.float64) - 0.5
    shown = stretch(signed.relu(), size) > 0
    found, compared = support(signed) > 0, 0
    for n in range(3):
        for p in range(size[0]):
            for q in range(size[1]):
                row, column = ((i + 0.5) * 7 / s - 0.5 for i, s in zip((p, q), size, strict=True))
                if row == int(row) or column == int(column):
                    continue  # on a centre: no piece but a line
                piece = n, math.floor(row) + 1, math.floor(column) + 1
                assert bool(found[piece]) == bool(shown[n, p, q])
                compared += 1
    assert compared > size[0] * size[1]


@pytest.mark.parametrize("size", [(20, 28), (30, 56), (33, 50), (21, 35)])
def test_pieces_are_means_of_their_pixels(size):
    mask = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) < 0.4
    kept, area = pieces_of(mask, (5, 7))
    sums, counts = np.zeros((2, 6, 8)), np.zeros((6, 8))
    for p in range(size[0]):
        for q in range(size[1]):
            i = math.floor((2 * p + 1) * 5 / (2 * size[0]) + 0.5)
            j = math.floor((2 * q + 1) * 7 / (2 * size[1]) + 0.5)
            counts[i, j] += 1
            sums[:, i, j] += mask[:, p, q].numpy()
    assert_near(kept.double(), torch.tensor(sums / counts), 1e-6)
    assert_near(area.double(), torch.tensor(counts / counts.sum()), 1e-6)
    assert float(area.sum()) == pytest.approx(1)


def learned_at_random(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randn(count, 5, 7, generator=generator, dtype=torch.float64)
    signed[0] = -signed[0].abs()  # an image without a cell above 0
    masks = torch.rand(count, 20, 28, generator=generator) < 0.6
    kept, area = pieces_of(masks, (5, 7))
    return Learned(signed, signed.amax((1, 2)), kept.double(), area.double())


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_literal_sum_over_pieces(seed):
    of = learned_at_random(seed)
    now = of.signed - 0.2
    found = zero_level_loss(now, of)
    assert float(found[0]) == 0
    for n in range(1, len(now)):
        expected = 0.0
        for i in range(6):
            for j in range(8):
                rows, columns = (
                    range(max(i - 1, 0), min(i + 1, 5)),
                    range(max(j - 1, 0), min(j + 1, 7)),
                )
                level = max(float(now[n, a, b]) for a in rows for b in columns)
                p = 1 / (1 + math.exp(-20 * level / float(of.maximum[n])))
                m = float(of.kept[n, i, j])
                entropy = -m * math.log(max(p, 1e-300)) - (1 - m) * math.log(max(1 - p, 1e-16))
                expected += float(of.area[i, j]) * entropy
        assert float(found[n]) == pytest.approx(expected, rel=1e-5)


# Training.


def training_of(kind="linear", cam="gradcam", count=14, **recipe):
    f = small(kind).f
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, *f.preprocessing.size, generator=generator, dtype=torch.float64)
    labels, explained = torch.randint(0, CLASSES, (2, count), generator=generator)
    full = torch.rand(count, *f.preprocessing.size, generator=generator) < 0.5
    low = torch.ones(count, *f.activation_shape[1:], dtype=torch.bool)
    chosen = {"epochs": 3, "batch": 4, "held_out": 0.2, "learning_rate": 2e-3, "lam": None}
    settings = Recipe(**{**chosen, "objective": ZERO_LEVEL, **recipe})
    examples = Direct(f, x, labels, low, explained)
    return ZeroLevelTraining(f, examples, full.__getitem__, settings, cam=cam)


def values_of(training):
    return {"v": training.v.detach(), "t": training.t.detach()}


@pytest.mark.parametrize("gauge", ["t", "v"])
@pytest.mark.parametrize(("kind", "cam"), CASES)
def test_training_lowers_its_loss_and_changes_no_prediction(kind, cam, gauge):
    training = training_of(kind, cam, gauge=gauge, epochs=8)
    plain = training.measure(training.examples, training.train)
    history, learned = [], None
    for event in training.run():
        if isinstance(event, Searching) and learned is None:  # masks have taught all they do
            learned = training.measure(training.examples, training.train)
        history += [event] if hasattr(event, "held_out") else []
    after = training.measure(training.examples, training.train)
    if gauge == "t":
        assert learned == plain
    # Steps on a few random images promise no lower loss.
    elif cam == "gradcam":
        assert learned.mask < plain.mask
    before, chosen = training.chosen["before"], training.chosen["after"]
    if gauge == "t":
        score = chosen["increase"] - chosen["drop"]
        assert score >= before["increase"] - before["drop"] - 1e-6
    assert after.accuracy == plain.accuracy
    assert after.cross_entropy == pytest.approx(plain.cross_entropy, abs=1e-6)
    assert [e.number for e in history] == list(range(9 if gauge == "v" else 2))
    f, g = training.f, training.classifier(cam)
    assert g.cam == cam
    x = training.examples.x
    assert_near(g(x).softmax(1), f(x).softmax(1), 1e-6)
    # What was learned is what the method of the new network shows.
    t = float(training.t.detach()) * training.unit
    a, c = f.activation(x), training.examples.explained
    expected = signed_map(f, a, c, cam) + moved_by(training.v.detach(), a, cam) - t
    shown = METHODS[cam].load()(g, g.activation(x), c, x)
    assert_near(normalise(shown), normalise(expected.relu()), 1e-5)
    assert (gauge == "t") == (not training.v.detach().any())


@pytest.mark.parametrize("gauge", ["t", "v"])
def test_training_resumes_at_any_step(gauge):
    whole = training_of(gauge=gauge)
    states = [through_json(whole.state())]
    states += [through_json(whole.state()) for _ in whole.run()]
    assert len(states) > (10 if gauge == "v" else 2)
    for state in states:
        second = training_of(gauge=gauge)
        second.restore(state)
        list(second.run())
        assert_equal(values_of(second), values_of(whole))
        assert second.history == whole.history
        assert second.chosen == whole.chosen is not None


def test_v_is_folded_where_there_is_a_place_for_it():
    for kind, has_place in (("linear", True), ("conv", False), ("mlp", False)):
        training = training_of(kind, gauge="v")
        list(training.run())
        f, g = training.f, training.classifier("gradcam")
        assert ("zero_level.v" in g.weights()) != has_place
        changed = [k for k, v in f.weights().items() if not torch.equal(v, g.weights()[k])]
        assert changed == (["fc.weight"] if has_place else [])


# The choice of t.


def asked_by_hand(training):
    """Average Increase and Drop of each t, image by image: of the map that the network shows."""
    f, cam, indices = training.f, training.cam, training.train
    v = training.v.detach() if training.settings.gauge == "v" else None
    maxima, ys = [], {}
    for n in indices:
        x, c = training.examples.x[n : n + 1], training.examples.explained[n : n + 1]
        ys[n] = float(f(x).softmax(1)[0, int(c)])
        signed = signed_map(f, f.activation(x), c, cam)
        if v is not None:
            signed = signed + moved_by(v, f.activation(x), cam)
        maxima.append(max(float(signed.max()), 0))
    mean = sum(maxima) / len(maxima)
    rows = []
    for share in SHARES:
        g = copy.deepcopy(f)
        give_zero_level(g, torch.tensor(share * mean, dtype=torch.float64), v)
        increase = drop = 0.0
        for n in indices:
            x, c, y = training.examples.x[n : n + 1], int(training.examples.explained[n]), ys[n]
            shown = attribution_map(g, x, c, cam)[0] > 0
            y_hat = float(f(torch.where(shown, x, torch.zeros_like(x))).softmax(1)[0, c])
            increase += y_hat > y * (1 + 1e-4 * (1 - y) + 4 * 2.0**-23)
            drop += max(y - y_hat, 0) / y
        rows.append((share, increase / len(indices), drop / len(indices)))
    return mean, rows


ASKING = [(k, m, g) for k, m in CASES if m != "xgradcam" for g in ("t", "v")]
FEW = 11  # images, of which nine are in two blocks


@pytest.mark.parametrize(("kind", "cam", "gauge"), ASKING)
def test_each_t_is_measured_as_image_by_image(kind, cam, gauge, monkeypatch):
    monkeypatch.setattr("aftcli.aft.zero_level.BLOCK", 5)
    training = training_of(kind, cam, count=FEW, gauge=gauge)
    (chosen,) = (e for e in training.run() if isinstance(e, Chosen))
    mean, expected = asked_by_hand(training)
    assert chosen.images == len(training.train) == 9
    assert [tried.share for tried in chosen.tried] == list(SHARES)
    for found, (_, increase, drop) in zip(chosen.tried, expected, strict=True):
        assert found.increase == pytest.approx(increase, abs=1e-9)
        assert found.drop == pytest.approx(drop, abs=1e-6)
    scores = [increase - drop for _, increase, drop in expected]
    first = next(i for i, score in enumerate(scores) if score >= max(scores) - 1e-6)
    assert chosen.after == chosen.tried[first]
    assert chosen.t == pytest.approx(SHARES[first] * mean, rel=1e-6)
    assert float(training.t.detach()) * training.unit == pytest.approx(chosen.t, rel=1e-6)
    assert training.chosen == chosen.as_dict()
    # The plain map is that of t = 0, and of no v.
    plain = training_of(kind, cam, count=FEW)
    list(plain.run())
    for what in ("increase", "drop"):
        at_zero = plain.chosen["tried"][0][what]
        assert training.chosen["before"][what] == pytest.approx(at_zero, abs=1e-6)


def test_the_compared_choices_are_not_all_alike():
    # The test above would show little if no t ever helped, or always the same did.
    best = set()
    for kind in KINDS:
        training = training_of(kind, count=FEW)
        list(training.run())
        best.add(training.chosen["after"]["share"])
    assert len(best) > 2


def test_of_equal_scores_the_smaller_t_is_taken():
    rows = [Tried(0.0, 0.5, 0.1), Tried(0.1, 0.5 + 9e-7, 0.1), Tried(0.2, 0.4, 0.0)]
    assert best_of(rows) == rows[0]
    assert best_of([Tried(0.0, 0.5, 0.2), *rows]) == rows[0]


def test_nothing_is_muted_where_muting_only_harms():
    """Muting never helps if each cell speaks for the class and none against it."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 4, 4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    ).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.abs() * (parameter.dim() > 1))
        network[-1].weight[1] = 0
    f = cut_classifier(network, "0", preprocessing=Preprocessing(size=(32, 32)))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    x = x.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat(1, 3, 1, 1)
    examples = Direct(f, x, torch.zeros(8, dtype=torch.long), torch.ones(8, 8, 8).bool())
    settings = Recipe(objective=ZERO_LEVEL, lam=None, held_out=0.0)
    training = ZeroLevelTraining(f, examples, lambda i: torch.ones(32, 32).bool(), settings)
    list(training.run())
    assert training.chosen["after"]["share"] == training.chosen["t"] == training.t.item() == 0
    drops = [each["drop"] for each in training.chosen["tried"]]
    assert drops[0] < drops[-1] and not any(e["increase"] for e in training.chosen["tried"])


def test_no_more_than_some_images_are_asked_about(monkeypatch):
    monkeypatch.setattr("aftcli.aft.zero_level.ASKED", 9)
    training = training_of(count=23)
    monkeypatch.setattr("aftcli.aft.zero_level.BLOCK", 4)
    seen = []
    inputs = training.examples.inputs
    training.examples.inputs = lambda spans, todo: seen.extend(spans) or inputs(spans, todo)
    events = [e for e in training.run() if isinstance(e, Searching)]
    assert [i for block in seen for i in block] == [training.train[i] for i in spread(19, 9)]
    assert events == [Searching(n, 9) for n in (0, 4, 8, 9)]
    assert training.chosen["images"] == 9


def test_masked_images_pass_the_engine_and_equal_ones_once():
    asked, passed = [], []

    def accelerate(f, passes):
        asked.append(passes)
        fast = copy.copy(f)
        fast.watch = passed.append
        return fast

    training = training_of(count=23)
    training.accelerate = accelerate
    list(training.run())
    assert asked == [19 * 15]
    masks = set()
    for n in training.train:
        x, c = training.examples.x[n : n + 1], training.examples.explained[n : n + 1]
        signed = signed_map(training.f, training.f.activation(x), c, "gradcam")
        for share in SHARES:
            level = (signed - share * training.unit).relu()
            mask = stretch(normalise(level), x.shape[2:]) > 0
            if not mask.all():
                masks.add((n if mask.any() else None, mask.numpy().tobytes()))
    # The empty mask of all images is one image in each of the two blocks.
    assert len(masks) <= sum(passed) - 19 <= len(masks) + 1


@pytest.mark.parametrize("fill", ["mean", "black", "blur"])
def test_muted_pixels_show_the_fill(fill):
    training = training_of(count=8, held_out=0.0)
    training.fill = fill
    list(training.run())
    f, x, classes = training.f, training.examples.x, training.examples.explained
    filled = FILLS[fill](f, x)
    for share, found in zip(SHARES, training.chosen["tried"], strict=True):
        signed = signed_map(f, f.activation(x), classes, "gradcam")
        shown = stretch(normalise((signed - share * training.unit).relu()), x.shape[2:]) > 0
        y, y_hat = (
            f(image).softmax(1)[range(8), classes]
            for image in (x, torch.where(shown[:, None], x, filled))
        )
        fall = ((y - y_hat).clamp(min=0) / y).mean()
        assert found["drop"] == pytest.approx(float(fall), abs=1e-6)


@pytest.mark.parametrize(("count", "cache", "gauge"), [(2, "memory", "t"), (3, "off", "v")])
def test_processes_share_the_passes_and_change_nothing(processes, tmp_path, count, cache, gauge):
    make_colours(tmp_path / "data", each=14)
    masks_of(tmp_path / "data", tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / str(count))
    files = []
    for several in (1, count):
        run = tmp_path / str(several)
        train_together(processes, several, tmp_path / "data", run, cache, gauge)
        files.append((run / "tuned/small-gradcam.safetensors").read_bytes())
    assert files[0] == files[1]


# Checkpoints.


@pytest.mark.parametrize("kind", ["linear", "conv", "mlp"])
def test_a_checkpoint_comes_back(kind, tmp_path):
    training = training_of(kind, gauge="v")
    list(training.run())
    g = training.classifier("gradcam")
    tensors, metadata = checkpoint_of(g, None, {})
    path = tmp_path / "level.safetensors"
    write_tensors(path, tensors, metadata)
    again = copy.deepcopy(training.f)
    for _ in range(2):  # also into what has one
        restore(again, path, read_card(path))
        x = training.examples.x
        assert torch.equal(again(x), g(x)) and torch.equal(again.activation(x), g.activation(x))
        assert again.weights_hash() == g.weights_hash() and again.cam == "gradcam"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the small network with masks, and its zero level."""
    root = tmp_path_factory.mktemp("zero level")
    make_colours(root / "data")
    masks_of(root / "data", root / "run")
    return root


def learn(run, gauge="t", **more):
    settings = {"objective": ZERO_LEVEL, "gauge": gauge, "epochs": 2, **more}
    return tune(run / "data", run / "run", settings=settings, lam=0.5)


def test_a_run_writes_a_checkpoint_and_knows_it_again(run):
    events = learn(run)
    done = tuned(events)
    assert not done.before and [e.number for e in epochs(events)] == [0, 1]
    assert done.card["objective"] == ZERO_LEVEL and done.card["gauge"] == "t"
    assert done.card["lam"] is None and done.card["situation"] == "the zero level"
    found = done.card["zero_level"]
    assert found["images"] == done.card["trained_on"]
    assert found["after"] in found["tried"] and found["before"] == found["tried"][0]
    before, after = (done.card["metrics"][when] for when in ("before", "after"))
    assert after["val"]["accuracy"] == before["val"]["accuracy"]
    plain, tensors = small_float(), load_file(done.path)
    assert set(tensors) == {*plain.weights(), "zero_level.t"}
    assert float(tensors["zero_level.t"]) == pytest.approx(found["t"], rel=1e-6)
    for name, value in plain.weights().items():
        assert torch.equal(tensors[name], value)
    assert tuned(learn(run)).before
    with pytest.raises(AftError, match="gauge is t, asked for v"):
        learn(run, "v")


@pytest.mark.parametrize(
    ("gauge", "kind", "stop"),
    [("v", Step, 1), ("v", Step, 2), ("v", Step, 4), ("v", Searching, 2), ("t", Searching, 2)],
)
def test_a_stopped_run_resumes_to_the_same_file(run, tmp_path, gauge, kind, stop):
    settings = in_situation(objective=ZERO_LEVEL, gauge=gauge, epochs=2, batch=5, held_out=0.2)
    files = []
    for name, stops in (("whole", ()), ("stopped", (stop,))):
        masks_of(run / "data", tmp_path / name)
        job = mask_job(MaskStore(tmp_path / name / "masks/small-gradcam.h5"), small_float())
        options = Options(workers=0, save_every=0)
        for count in stops:
            events = fine_tune([job], tmp_path / name, settings, options)
            done = 0
            while done < count:
                done += isinstance(next(events), kind)
            events.close()
        *_, last = fine_tune([job], tmp_path / name, settings, options)
        files.append(last.path.read_bytes())
    assert files[0] == files[1]


def test_old_cards_name_no_gauge():
    assert "gauge" not in Recipe().as_dict()
    assert Recipe(objective=ZERO_LEVEL).as_dict()["gauge"] == "t"


def test_a_network_with_a_zero_level_is_not_tuned_further(run):
    f = small_float()
    give_zero_level(f, torch.tensor(0.1))
    examples = Direct(f, torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    with pytest.raises(AftError, match="has a zero level"):
        Training(f, examples, Recipe(lam=None))


# What is refused.


@pytest.mark.parametrize("cam", WITHOUT)
def test_a_map_without_a_sign_is_refused(cam):
    with pytest.raises(AftError, match="no sign, so it has no zero level to learn.*--zero-level T"):
        training_of(cam=cam)


def test_what_does_not_fit_is_refused(run, tmp_path):
    generate(run / "data", tmp_path, ("gradcam",), Search(masking="soft"))
    settings = {"objective": ZERO_LEVEL}
    with pytest.raises(AftError, match="these are soft.*--masking binary"):
        tune(run / "data", tmp_path, settings=settings)
    with pytest.raises(AftError, match="leave --augment out"):
        tune(run / "data", run / "run", options=Options(augment=True), settings=settings)
    with pytest.raises(AftError, match="unknown gauge 'w'"):
        in_situation(gauge="w")
    assert not list((tmp_path / "tuned").glob("*.safetensors"))


# A shift without training.


@pytest.mark.parametrize("cam", [n for n in METHODS if METHODS[n].family == "cam"])
def test_a_share_of_the_maximum_becomes_zero(cam):
    s = small("linear", 3)
    a = s.f.activation(s.x)
    plain = METHODS[cam].load()(s.f, a, s.class_index, s.x)
    found = attribution_map(s.f, s.x, s.class_index, cam, zero_level=0.3)
    for n in range(3):
        cells = plain[n].numpy()
        shifted = np.maximum(cells - 0.3 * cells.max(), 0)
        scaled = (shifted - shifted.min()) / ((shifted.max() - shifted.min()) or 1)
        expected = stretch(torch.tensor(scaled)[None], s.x.shape[2:])[0]
        assert_near(found[n], expected, 1e-12)
    assert torch.equal(
        attribution_map(s.f, s.x, s.class_index, cam, zero_level=0.0),
        attribution_map(s.f, s.x, s.class_index, cam),
    )


def test_a_map_of_pixels_needs_cells():
    pytest.importorskip("captum")
    s = small("linear", 3)
    with pytest.raises(AftError, match="a zero level needs a map of cells.*--cells"):
        attribution_map(s.f, s.x, s.class_index, "integratedgradients", zero_level=0.2)
    kept = attribution_map(s.f, s.x, s.class_index, "integratedgradients", True, zero_level=0.2)
    whole = attribution_map(s.f, s.x, s.class_index, "integratedgradients", True)
    assert (kept > 0).sum() < (whole > 0).sum()


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    s = small("linear")
    with pytest.raises(AftError, match=r"zero level must lie in \[0, 1\)"):
        explain(s.f, s.x[:1], ["gradcam"], zero_level=share)


def test_a_control_of_another_training_stands_beside_it(run, tmp_path):
    """A zero level trains no weight, so a control's recipe can't differ from its own."""
    shutil.copytree(run / "run/masks", tmp_path / "masks")
    for lam in (0.5, None):
        settings = {} if lam is None else {"objective": ZERO_LEVEL}
        tune(run / "data", tmp_path, settings=settings, lam=lam)
    f = small_float()
    made = [_Made(path, read_card(path)) for path in sorted((tmp_path / "tuned").glob("*.safe*"))]
    assert [m.card["cam"] for m in made] == [None, "gradcam"]
    _check_pairs(f, made)
    made[1].card["objective"] = "tuner"
    with pytest.raises(AftError, match="is no control of"):
        _check_pairs(f, made)


@pytest.mark.parametrize("kind", ["linear", "conv", "mlp"])
@pytest.mark.parametrize("cam", ["gradcam", "hirescam"])
def test_network_and_map_are_one_graph(kind, cam):
    from aftcli.engine.export import traced

    s, g, _ = moved(kind, 4, t=0.05)
    logits, attribution = traced(g, cam)(s.x)
    assert_near(logits, g(s.x), 1e-9)
    expected = attribution_map(g, s.x, logits.argmax(1), cam)
    assert_near(attribution, expected, 1e-9)
