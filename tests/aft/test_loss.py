"""Losses of fine-tuning beyond equation 8, and what it trains beyond one layer."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aftcli import AftError
from aftcli import settings as finetune_defaults
from aftcli.aft.jobs import kept_image, mask_job
from aftcli.aft.loss import (
    OBJECTIVES,
    Batch,
    Compared,
    Objective,
    Outputs,
    Recipe,
    aft_loss,
    in_situation,
    situation_of,
)
from aftcli.aft.run import Begun
from aftcli.aft.tail import Tail, earlier_layers
from aftcli.aft.training import Epoch, Measured, Training
from aftcli.core.cam import scaled_map, upsample
from aftcli.core.methods import METHODS
from aftcli.report.tuned import _recipe, watch
from aftcli.settings import OBJECTIVES as choices
from aftcli.tft.masking import FILLS
from aftcli.tft.search import fine_tune_threshold
from aftcli.tft.threshold import masked_image
from tests.aft.test_training import (
    assert_equal,
    assert_goes_on_from_any_step,
    finish,
    settings,
    weights,
)
from tests.helpers.compare import assert_near
from tests.helpers.small import CLASSES, KINDS, small
from tests.helpers.stored import small_float
from tests.helpers.trained import Direct, make_colours, masks_of, tune, tuned
from tests.reference import paper as reference

TRAINABLE = [name for name, entry in METHODS.items() if entry.trainable]


def examples_of(kind="linear", seed=0, count=11):
    """A small network and images, labels, masks, their classes and what they keep."""
    f = small(kind, seed).f
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, *f.preprocessing.size, generator=generator, dtype=torch.float64)
    labels, explained = torch.randint(0, CLASSES, (2, count), generator=generator)
    _, h, w = f.activation_shape
    masks = torch.rand(count, h, w, generator=generator) < 0.4
    hidden = upsample(masks.double(), x)[:, None] * x
    return f, Direct(f, x, labels, masks, explained, hidden)


def log_softmax(scores):
    largest = max(scores)
    log_sum = largest + math.log(sum(math.exp(s - largest) for s in scores))
    return [s - log_sum for s in scores]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("teacher", [False, True])
def test_the_terms_are_literal_loops(seed, teacher):
    rng = np.random.default_rng(seed)
    logits, masked, before = rng.normal(0, 3, (3, 6, 4))
    labels, explained = rng.integers(0, 4, (2, 6))
    tuned_, mask = rng.normal(0, 1, (2, 6, 3, 5)), rng.random((2, 6, 3, 5)) < 0.5
    out = Outputs(
        torch.tensor(logits),
        tuple(torch.tensor(t) for t in tuned_),
        torch.tensor(masked),
        torch.tensor(before) if teacher else None,
    )
    masks = tuple(torch.tensor(m) for m in mask)
    batch = Batch((), torch.tensor(labels), masks, torch.tensor(explained))
    found = aft_loss(out, batch, Recipe(lam=0.3, consistency=0.7))
    clean = consistency = 0.0
    for n in range(6):
        own, target = log_softmax(logits[n]), (explained if teacher else labels)[n]
        if teacher:
            taught = log_softmax(before[n])
            clean += sum(math.exp(t) * (t - o) for t, o in zip(taught, own, strict=True)) / 6
        else:
            clean -= own[labels[n]] / 6
        consistency -= log_softmax(masked[n])[target] / 6
    distance = ((tuned_ - mask) ** 2).sum() / 6
    expected = clean + 0.3 * distance + 0.7 * consistency
    assert float(found.total) == pytest.approx(expected, rel=1e-12)
    assert float(found.mask) == pytest.approx(distance, rel=1e-12)
    assert float(found.consistency) == pytest.approx(consistency, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cam", TRAINABLE)
def test_the_map_that_is_trained_is_the_map_that_is_explained(kind, cam):
    if cam == "cam" and kind not in ("linear", "signed"):
        pytest.skip("cam needs another head")
    f, examples = examples_of(kind)
    tail = Tail(f, settings(objective="cam"), cam, None)
    activation = f.activation(examples.x)
    out = tail((f.stem(examples.x),), examples.explained)
    expected = scaled_map(f, activation, examples.explained, examples.x, cam)
    assert_near(out.tuned[0].detach(), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mlp", "mixing", "conv"])
@pytest.mark.parametrize("cam", TRAINABLE)
def test_the_gradient_of_the_map_is_that_of_the_literal_loop(kind, cam):
    """Central differences of slow maps of the uncut network."""
    if cam == "cam" and kind != "linear":
        pytest.skip("cam needs another head")
    f, examples = examples_of(kind, count=2)
    model, layer = small(kind).model, small(kind).layer
    tail = Tail(f, settings(objective="cam"), cam, None)
    own = settings(lam=1.0, objective="cam")
    (batch,) = examples.batches([[0, 1]], 1)
    batch = batch._replace(masked=None)
    out = tail(batch.features, batch.class_index)
    aft_loss(out, batch, own).mask.backward()
    parameters = dict(tail.layer.named_parameters()) | dict(tail.head.named_parameters())

    def distance(network):
        total = 0.0
        for n in range(2):
            x, c = examples.x[n : n + 1], int(examples.explained[n])
            shown = low_map(network, layer, x, c, cam)
            total += ((shown - examples.masks[n].numpy()) ** 2).sum() / 2
        return total

    rng = np.random.default_rng(0)
    for name, parameter in parameters.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        index = tuple(int(rng.integers(n)) for n in parameter.shape)
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                dict(moved.named_parameters())[name][index] += sign * 1e-6
            sides.append(distance(moved))
        expected = (sides[0] - sides[1]) / 2e-6
        assert float(grad[index]) == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def low_map(model, layer, x, c, cam):
    names = {"gradcam++": "gradcam_plus_plus"}
    found = getattr(reference, names.get(cam, cam))(model, layer, x, c)
    return reference.scale(found)


@pytest.mark.parametrize("cam", [n for n in METHODS if n not in TRAINABLE])
def test_a_map_that_cannot_be_trained_is_refused(cam):
    f, examples = examples_of()
    with pytest.raises(AftError, match=f"the map of {cam} can't be trained itself"):
        Training(f, examples, settings(objective="cam"), cam=cam)
    Training(f, examples, settings(), cam=cam)


def test_distillation_alone_changes_nothing():
    """At the start the network is its own teacher: no loss, no gradient, no step."""
    f, examples = examples_of()
    # Not Adam: it divides a rounding error by itself.
    chosen = settings(lam=0.0, classification="distillation", optimizer="sgd")
    training = Training(f, examples, chosen, cam="gradcam")
    before = weights(training)
    history = finish(training)
    after = weights(training)
    own = [name for name in before if not name.startswith("tuner")]
    for name in own:
        assert_near(after[name], before[name], 1e-9)
    assert abs(history[-1].train.total) < 1e-12


@pytest.mark.slow
def test_mask_consistency_teaches_what_is_kept_to_be_recognised():
    f, examples = examples_of()
    losses = {}
    for weight in (0.0, 3.0):
        training = Training(
            f, examples, settings(consistency=weight, lam=0.0, epochs=80), cam="gradcam"
        )
        losses[weight] = [e.train.consistency for e in finish(training)[1:]]
    assert losses[3.0][-1] < 0.5 * losses[0.0][-1]


RECIPES = [
    {"objective": "cam"},
    {"consistency": 1.0},
    {"consistency": 1.0, "classification": "distillation", "lam": 0.0},
    {"optimizer": "sgd"},
    {"optimizer": "adamw", "trained": "w1"},
    {"tuner": "relu"},
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_goes_on_from_any_step(recipe):
    f, examples = examples_of()
    assert_goes_on_from_any_step(f, examples, settings(epochs=2, held_out=0.3, **recipe))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_lowers_what_it_minimises(recipe):
    f, examples = examples_of()
    training = Training(f, examples, settings(epochs=25, **recipe), cam="gradcam")
    history = finish(training)
    assert history[-1].train.total < 0.9 * history[1].train.total


def test_w1_alone_leaves_the_head():
    f, examples = examples_of("mlp")
    training = Training(f, examples, settings(trained="w1"), cam="gradcam")
    before = weights(training)
    finish(training)
    moved = {n for n, v in weights(training).items() if not torch.equal(v, before[n])}
    assert moved and not any(name.startswith("head.") for name in moved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "cams"}, "unknown objective 'cams'; nearest: cam"),
        ({"classification": "label"}, "unknown classification term 'label'; nearest: labels"),
        ({"tuner": "tanh"}, "unknown tuner 'tanh'"),
        ({"optimizer": "lbfgs"}, "unknown optimizer"),
        ({"trained": "w2"}, "unknown choice of what is trained"),
        ({"blend": 0.0}, r"the blend must lie in \(0, 1\], got 0"),
        ({"blend": 1.5}, "the blend must lie in"),
        ({"consistency": -1.0}, "consistency must be 0 or more, got -1"),
        ({"consistency": float("inf")}, "consistency must be 0 or more"),
    ],
)
def test_unknown_names_and_values_out_of_range_are_refused(changed, message):
    f, examples = examples_of()
    with pytest.raises(AftError, match=message):
        Training(f, examples, settings(**changed))


@pytest.mark.parametrize("blend", [0.25, 1.0])
def test_a_blend_is_so_far_from_the_start_to_the_best(blend):
    f, examples = examples_of("mlp")
    chosen = settings(held_out=0.3, blend=blend, epochs=4)
    training = Training(f, examples, chosen, cam="gradcam")
    start = weights(training)
    finish(training)
    best = {name: value.clone() for name, value in training.best.items()}
    training.use_best()
    found = weights(training)
    for name, value in found.items():
        share = 1.0 if name.startswith("tuner") or "num_batches" in name else blend
        expected = start[name] + share * (best[name] - start[name])
        assert_near(value.double(), expected.double(), 1e-12)
    assert any(not torch.equal(found[name], start[name]) for name in found)
    # Twice is once.
    training.use_best()
    assert_equal(weights(training), found)


class Scaled(torch.nn.Module):
    """One number, by which the mean of the channels is multiplied."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, activation):
        return self.scale * activation.mean(1)


def test_an_objective_from_outside_is_one_object_in_the_registry(monkeypatch):
    def build(f, cam, settings):
        scaled = Scaled()
        return Compared(lambda flow, class_index: scaled(flow[0]), scaled)

    monkeypatch.setitem(OBJECTIVES, "scaled", Objective("scaled mean", build))
    f, examples = examples_of()
    own = settings(objective="scaled", lam=0.3, batch=11, epochs=1, optimizer="sgd")
    training = Training(f, examples, own, cam="gradcam")
    activation = f.activation(examples.x).detach()
    mean, mask = activation.mean(1), examples.masks.double()
    finish(training)
    # One step down the gradient of 0.3 ||s mean(A) - M||^2, by hand.
    gradient = 0.3 * (2 * mean * (mean - mask)).sum((1, 2)).mean()
    assert_near(training.tail.tuner.scale.detach(), 1 - own.learning_rate * gradient, 1e-12)
    distance = (mean - mask).square().sum((1, 2)).mean()
    assert training.history[1].train.mask == pytest.approx(float(distance), rel=1e-12)
    job = job_with(11, 2)
    job.f = f
    begun = Begun(job, 0, 1, 11, 0, [], own)
    assert "0.3 x distance of the scaled mean from the masks" in _recipe(begun)


def test_the_command_line_offers_the_objectives_of_the_registry():
    assert list(choices) == list(OBJECTIVES)


# Several layers


@pytest.mark.parametrize("names", [["conv1"], ["relu1"], ["conv1+bn1+relu1"], ["relu1", "conv1"]])
def test_the_parts_of_earlier_layers_are_the_stem(names):
    f, examples = examples_of("mlp")
    earlier = earlier_layers(f, names)
    x = earlier.stem(examples.x)
    for part in earlier.parts:
        x = part(x)
    assert torch.equal(x, f.stem(examples.x))
    assert len(earlier.names) == len(earlier.taken) == len(earlier.shapes) == len(names)
    if len(names) > 1:
        assert earlier.names == ("conv1", "relu1")
    assert all(shape == (6, 10, 14) for shape in earlier.shapes)


def test_layers_that_are_not_before_are_refused():
    f, _ = examples_of("mlp")
    for name in ("conv2", "fc1", "nothing"):
        with pytest.raises(AftError, match=rf"layer '{name}' can't be tuned with conv2"):
            earlier_layers(f, [name])


class Deeper(Direct):
    """Examples behind an earlier stem, with masks of its layer too."""

    def batches(self, wanted, epoch):
        for indices, batch in zip(wanted, super().batches(wanted, epoch), strict=True):
            rows = torch.tensor(list(indices))
            with torch.no_grad():
                features, masked = self.stem(self.x[rows]), self.stem(self.hidden[rows])
            large = upsample(batch.masks[0].double(), torch.empty(1, 1, 10, 14)) >= 0.5
            yield batch._replace(
                features=(features,), masked=(masked,), masks=(large, *batch.masks)
            )


@pytest.mark.parametrize("objective", ["tuner", "cam"])
def test_earlier_layers_are_trained_and_land_in_the_classifier(objective):
    f, examples = examples_of("mlp")
    earlier = earlier_layers(f, ["conv1+bn1+relu1"])
    deeper = Deeper(
        f, examples.x, examples.labels, examples.masks, examples.explained, examples.hidden
    )
    deeper.stem = earlier.stem
    start = {name: value.clone() for name, value in f.weights().items()}
    own = settings(objective=objective, consistency=0.5, epochs=3)
    training = Training(f, deeper, own, cam="layercam", earlier=earlier)
    history = finish(training)
    g = training.classifier("layercam")
    assert_equal(f.weights(), start)  # the given one stays
    changed = {n for n, v in g.weights().items() if not torch.equal(v, start[n])}
    assert {"conv1.weight", "bn1.weight", "conv2.weight", "fc1.weight", "fc2.bias"} <= changed
    assert not any("running" in name for name in changed)
    with torch.no_grad():
        found = training.tail((earlier.stem(examples.x),), examples.explained)
    assert torch.equal(g(examples.x), found.logits)
    assert [tuple(t.shape[1:]) for t in found.tuned] == [(10, 14), (5, 7)]
    assert history[-1].train.total < history[1].train.total
    if objective == "cam":
        shown = scaled_map(g, g.activation(examples.x), examples.explained, examples.x, "layercam")
        assert_near(found.tuned[1], shown, 1e-12)


# What the masks keep, and the files


def test_what_is_kept_is_what_tft_saw(tmp_path):
    """x_hat_tau* of a store is the masked image of Algorithm 1 with tau*, softly."""
    root = make_colours(tmp_path / "colours")
    store = masks_of(root, tmp_path / "run", "layercam")
    f = small_float()
    job = mask_job(store, f)
    from aftcli import attribution_map, read_image, to_input

    for i in (0, 7, 17):
        x = to_input(read_image(job.data_set.picture(i)), f.preprocessing)
        c = torch.tensor([store[i].class_index])
        assert int(job.masks.class_index[i]) == int(c)
        result = fine_tune_threshold(f, x, attribution_map(f, x, c, "layercam"), c)
        expected = masked_image(x, result.attribution, FILLS["mean"](f, x))
        assert_near(job.masks.hide(x, [i]), expected, 1e-5)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("mode", ["value", "percentile"])
def test_what_is_kept_follows_fill_and_mode(fill, mode):
    f = small("linear").f
    x = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    low = torch.rand(1, 5, 7, dtype=torch.float64)
    found = kept_image(f, x, low, torch.tensor([0.4], dtype=torch.float64), fill, mode)
    full = reference.upsample(low[0].numpy(), (20, 28))
    muted = reference.thresholded(full, 0.4, mode)
    from tests.helpers.small import MEAN, STD

    shown = reference.fill_of(x[0].numpy(), fill, MEAN, STD)
    expected = muted * x[0].numpy() + (1 - muted) * shown
    assert_near(found[0], expected, 1e-6)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Images and a run with their masks."""
    folder = tmp_path_factory.mktemp("objectives")
    root = make_colours(folder / "colours")
    masks_of(root, folder / "run")
    return root, folder / "run"


def copy_of(run, folder):
    (folder / "masks").mkdir(parents=True)
    for path in (run / "masks").glob("*.h5"):
        (folder / "masks" / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "disk", "off"])
def test_masked_images_are_cached_like_whole_ones(colours, tmp_path, cache):
    from aftcli.aft.run import Options

    torch.set_num_threads(1)
    root, run = colours
    whole = tuned(tune(root, copy_of(run, tmp_path / "a"))).path
    options = Options(cache, workers=0, save_every=0)
    events = tune(root, copy_of(run, tmp_path / "b"), options=options)
    from safetensors.torch import load_file

    a, b = load_file(whole), load_file(tuned(events).path)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert not list((tmp_path / "b").glob("cache/*"))


def test_a_card_says_what_was_minimised(colours, tmp_path):
    root, run = colours
    events = tune(root, copy_of(run, tmp_path / "run"), settings={"objective": "cam"})
    card = tuned(events).card
    assert card["objective"] == "cam" and card["consistency"] > 0
    assert card["situation"] == finetune_defaults.SITUATIONS["few"].title
    assert card["earlier_layers"] == []


def test_a_relu_tuner_comes_back_from_its_file(colours, tmp_path):
    from safetensors.torch import load_file

    from aftcli.models.checkpoint import restore

    root, run = colours
    events = tune(root, copy_of(run, tmp_path / "run"), settings={"tuner": "relu"})
    f = small_float()
    found = restore(f, tuned(events).path, tuned(events).card)
    a = torch.randn(1, *f.activation_shape)
    stored = load_file(tuned(events).path)
    hidden = torch.einsum("ok,nkhw->nohw", stored["aft_tuner.reduce.weight"][:, :, 0, 0], a)
    hidden = (hidden + stored["aft_tuner.reduce.bias"][:, None, None]).relu()
    out = torch.einsum("ok,nkhw->nohw", stored["aft_tuner.combine.weight"][:, :, 0, 0], hidden)
    assert_near(found(a), out[:, 0] + stored["aft_tuner.combine.bias"], 1e-5)


# Which recipe


def job_with(images, classes, masks=True, new_head=False, why_not="", earlier=None):
    class Data:
        samples = [type("S", (), {"label": i % classes})() for i in range(images)]

    return type(
        "J",
        (),
        {
            "data_set": Data,
            "masks": object() if masks else None,
            "new_head": new_head,
            "no_zero_level": why_not,
            "earlier": earlier,
        },
    )()


def test_the_recipe_is_that_of_the_situation():
    many, few, new = (finetune_defaults.SITUATIONS[k] for k in ("many", "few", "new"))
    enough = 5 * finetune_defaults.MANY
    assert situation_of(job_with(enough, 5)) is many
    assert situation_of(job_with(enough - 1, 5)) is few
    assert situation_of(job_with(enough, 5, False, True)) is new
    found = in_situation(lam=0.5)(job_with(49, 5))
    assert found.classification == "distillation" and found.lam == 0.5
    assert found.consistency == few.settings["consistency"]
    # A control has no masks, but as much training as what it is held against.
    control = in_situation(seed=3)(job_with(49, 5, masks=False))
    assert (control.lam, control.consistency, control.classification) == (None, 0.0, "labels")
    assert (control.seed, control.blend) == (3, 1.0)
    assert control.learning_rate == few.settings["learning_rate"]
    assert control.epochs == found.epochs
    with pytest.raises(AftError, match="lambda must be 0 or more"):
        in_situation(lam=-1.0)


@pytest.mark.slow
def test_small_data_sets_get_as_many_steps():
    few = finetune_defaults.SITUATIONS["few"].settings
    # 90 images are trained on in 3 steps of 32 an epoch.
    tuner = in_situation(objective="tuner")
    assert tuner(job_with(100, 50)).epochs == finetune_defaults.STEPS / 3
    nine = in_situation(objective="tuner", batch=9)
    assert nine(job_with(100, 50)).epochs == finetune_defaults.STEPS / 10
    assert tuner(job_with(100_000, 50_000)).epochs == few["epochs"]
    assert in_situation(objective="tuner", epochs=4)(job_with(100, 50)).epochs == 4
    # A new head is no matter of steps.
    new = finetune_defaults.SITUATIONS["new"].settings
    assert in_situation()(job_with(100, 50, False, True)).epochs == new["epochs"]


ONLY_TRAINED = {
    "lam": ("--lam", 0.5),
    "consistency": ("--consistency", 2.0),
    "classification": ("--classification", "labels"),
    "blend": ("--blend", 0.5),
    "patience": ("--patience", 4),
    "optimizer": ("optimizer", "sgd"),
}


def test_the_zero_level_is_the_default_where_masks_allow_it():
    zero = finetune_defaults.SITUATIONS["zero-level"].settings
    found = in_situation(gauge="v", seed=3, batch=7, held_out=0.3)(job_with(100, 50))
    asked = {"gauge": "v", "seed": 3, "batch": 7, "held_out": 0.3}
    assert found == Recipe(**{**zero, **asked, "objective": "zero-level"})
    # As printed where nothing is chosen.
    assert Recipe().objective == "tuner"
    assert in_situation().choose(job_with(100, 50)) == (
        "zero-level",
        "chosen as the masks' method has a sign",
        "",
    )
    without = in_situation(epochs=3)
    job = job_with(100, 50, why_not="the masks' method has no sign")
    few = finetune_defaults.SITUATIONS["few"].settings
    assert without(job) == Recipe(**{**few, "epochs": 3})
    assert without.choose(job).note == (
        "the masks' method has no sign; the default is mask consistency, "
        "see docs/method/zero-level.md"
    )


@pytest.mark.parametrize("name", ONLY_TRAINED)
def test_what_only_the_training_has_chooses_it(name):
    spelled, value = ONLY_TRAINED[name]
    chosen = in_situation(**{name: value}, gauge="t")
    found = chosen(job_with(100, 50))
    assert found.objective == "tuner" and getattr(found, name) == value
    assert chosen.choose(job_with(100, 50)) == ("tuner", f"chosen by {spelled}", "")
    # An objective that is asked for comes first.
    zero = in_situation(**{name: value}, objective="zero-level")(job_with(100, 50))
    assert zero.objective == "zero-level" and zero == in_situation()(job_with(100, 50))


def test_several_layers_and_augmented_images_choose_the_training():
    several = job_with(100, 50, earlier=object())
    assert in_situation().choose(several) == ("tuner", "chosen by --layer", "")
    augmented = replace(in_situation(), augment=True)
    assert augmented.choose(job_with(100, 50)) == ("tuner", "chosen by --augment", "")
    assert augmented.choose(several)[1] == "chosen by --augment, --layer"
    # A control has neither masks nor a choice.
    assert augmented.choose(job_with(100, 50, masks=False)) == ("tuner", "", "")
    assert in_situation(objective="cam").choose(several)[1] == "chosen by --objective cam"


def test_settings_that_a_zero_level_has_no_use_for_are_named():
    asked = in_situation(epochs=3, learning_rate=0.1)
    assert asked(job_with(100, 50)).objective == "zero-level"
    note = asked.choose(job_with(100, 50)).note
    assert sorted(note.split(" without effect")[0].split(" and ")) == ["--epochs", "--lr"]
    assert in_situation(epochs=3, gauge="v").choose(job_with(100, 50)).note == ""


def test_nothing_is_said_of_epoch_0_where_nothing_was_measured(capsys):
    measured = Measured(1.5, 1.25, 0.5, 0.75, 4)
    watch(iter([Epoch(0, None, None), Epoch(1, measured, None)]), quiet=False)
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line == "epoch 1: cross-entropy 1.2500, mask 0.500, accuracy 75.0%"
    watch(iter([Epoch(0, None, measured)]), quiet=False)
    assert capsys.readouterr().err.startswith("before: held out: cross-entropy 1.2500")


def begun(train, epochs, **settings):
    job = SimpleNamespace(
        f=SimpleNamespace(layer_name="l", classes=["a", "b"]),
        made=None,
        name="small-gradcam",
        new_head=False,
        masks=object(),
        earlier=None,
        data_set=SimpleNamespace(samples=[SimpleNamespace(label=i % 2) for i in range(train)]),
    )
    return Begun(job, 0, epochs, train, 0, [], Recipe(**settings))


def lines_of(capsys, events):
    watch(iter(events), quiet=False)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("epochs", "lines"), [(3, 3), (20, 20), (40, 25), (300, 30)])
def test_very_many_epochs_get_few_lines(capsys, epochs, lines):
    measured = Measured(1.5, 1.25, 0.5, 0.75, 4)
    all_of_them = [Epoch(i, measured, None) for i in range(1, epochs + 1)]
    said = lines_of(capsys, [begun(100, epochs), *all_of_them])[2:]
    numbers = [int(line.split(":")[0].removeprefix("epoch ")) for line in said]
    assert len(numbers) == lines and numbers[0] == 1 and numbers[-1] == epochs
    assert numbers == sorted(set(numbers))


def test_a_handful_of_images_is_said_to_be_no_training_set(capsys):
    few = "no training set; what the network learns is these alone"
    assert lines_of(capsys, [begun(2, 1)])[-1] == f"aft: 2 images are {few}"
    assert lines_of(capsys, [begun(1, 1)])[-1] == f"aft: 1 image is {few}"
    assert few not in " ".join(lines_of(capsys, [begun(10, 1)]))
    # A zero level is one number: it takes few images.
    assert few not in " ".join(lines_of(capsys, [begun(2, 1, objective="zero-level")]))
