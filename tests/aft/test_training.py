"""Equation 8, its training, and what must not change while it is trained (§4.2)."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aftcli import AftError
from aftcli.aft.loss import Batch, Outputs, Recipe, aft_loss
from aftcli.aft.training import Epoch, State, Training, shuffled
from aftcli.models.checkpoint import Tuner
from tests.helpers.compare import assert_near
from tests.helpers.small import CLASSES, KINDS, small
from tests.helpers.trained import Direct
from tests.reference import paper as reference


def data(kind="linear", seed=0, count=11):
    """A small network in float64 and images, labels and masks for it."""
    f = small(kind, seed).f
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, *f.preprocessing.size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    _, h, w = f.activation_shape
    masks = torch.rand(count, h, w, generator=generator) < 0.4
    return f, Direct(f, x, labels, masks)


def settings(**changed):
    chosen = {"lam": 0.3, "learning_rate": 1e-2, "epochs": 2, "batch": 4, "held_out": 0.0}
    return Recipe(**{**chosen, **changed})


def finish(training):
    return [event for event in training.run() if isinstance(event, Epoch)]


def weights(training):
    return {name: value.clone() for name, value in training.tail.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lam", [0.0, 0.7, 40.0])
def test_the_loss_is_the_literal_loop(seed, lam):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (6, 4)), rng.integers(0, 4, 6)
    tuned, mask = rng.normal(0, 1, (6, 3, 5)), rng.random((6, 3, 5)) < 0.5
    logits_, labels_, tuned_, mask_ = map(torch.as_tensor, (logits, labels, tuned, mask))
    batch = Batch((), labels_, (mask_,), labels_)
    found = aft_loss(Outputs(logits_, (tuned_,)), batch, Recipe(lam=lam))
    expected = reference.aft_loss(logits, labels, tuned, mask, lam)
    assert_near(torch.stack(list(found)), torch.tensor([*expected, 0]), 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_tuner_is_the_literal_loop(seed):
    tuner = Tuner(4, seed=seed).double()
    activation = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    w1, b1, w2, b2 = (p.detach().numpy() for p in tuner.parameters())
    expected = [reference.tuner(a, w1, b1, w2, b2) for a in activation.numpy()]
    assert_near(tuner(activation).detach(), np.array(expected), 1e-12)


def test_the_tuner_depends_on_its_seed_only():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = Tuner(4, seed=3), Tuner(4, seed=3), Tuner(4, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(one.state_dict(), two.state_dict())
    assert not torch.equal(one.reduce.weight, other.reduce.weight)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
def test_one_step_is_adam_on_the_gradient_of_the_literal_loss(seed, lam):
    """Gradients by central differences of the loops, then Adam's first step by its formula."""
    f, examples = data(seed=seed, count=4)
    training = Training(f, examples, settings(lam=lam, epochs=1), cam="gradcam")
    before = {name: value.numpy().copy() for name, value in weights(training).items()}
    features = f.stem(examples.x).detach().numpy()
    labels, masks = examples.labels.numpy(), examples.masks.numpy()

    def loss(values):
        return reference.aft_objective(features, labels, masks, values, lam)

    events = training.run()
    next(events)  # epoch 0
    next(events)
    rng = np.random.default_rng(seed)
    grads = {name: p.grad for name, p in training.tail.named_parameters()}
    assert set(grads) == {n for n in before if "running" not in n and "tracked" not in n}
    for name, grad in grads.items():
        for place in rng.choice(grad.numel(), min(4, grad.numel()), replace=False):
            index = np.unravel_index(place, grad.shape)
            difference = []
            for sign in (1, -1):
                moved = {**before, name: before[name].copy()}
                moved[name][index] += sign * 1e-6
                difference.append(loss(moved))
            expected = (difference[0] - difference[1]) / 2e-6
            assert float(grad[index]) == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        # Adam's first step: both running means, corrected for their start, are those of g alone.
        g = grad.numpy()
        step = before[name] - 1e-2 * g / (np.sqrt(g * g) + 1e-8)
        assert_near(training.tail.state_dict()[name], step, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.0, None])
def test_lambda_zero_is_plain_cross_entropy_bit_for_bit(kind, lam):
    """Against a loop over the uncut network that knows nothing of tuners."""
    f, examples = data(kind)
    training = Training(f, examples, settings(lam=lam), cam="gradcam")
    finish(training)
    network = copy.deepcopy(small(kind).model).eval()
    own = dict(training.tail.layer.named_parameters()) | dict(training.tail.head.named_parameters())
    parameters = [p for name, p in network.named_parameters() if name in own]
    assert len(parameters) == len(own)
    optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=True)
    for epoch in (1, 2):
        for batch in torch.tensor(shuffled(range(11), 0, epoch)).split(4):
            optimizer.zero_grad()
            F.cross_entropy(network(examples.x[batch]), examples.labels[batch]).backward()
            optimizer.step()
    for name, value in network.named_parameters():
        if name in own:
            assert torch.equal(value, own[name]), name
            assert not torch.equal(value, dict(small(kind).model.named_parameters())[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_w0_and_all_statistics_stay(kind):
    f, examples = data(kind)
    before = {name: value.clone() for name, value in f.state_dict().items()}
    training = Training(f, examples, settings(), cam="gradcam")
    start = weights(training)
    finish(training)
    training.use_best()
    g = training.classifier("gradcam")
    # Neither the classifier that was given nor the tuned one has another w0.
    assert_equal(dict(f.state_dict()), before)
    assert_equal(
        dict(g.stem.state_dict()), {k[5:]: v for k, v in before.items() if k.startswith("stem.")}
    )
    assert all(p.grad is None for p in f.parameters())
    after = weights(training)
    buffers = {name for name, _ in training.tail.named_buffers()}
    for name in after:
        assert torch.equal(after[name], start[name]) == (name in buffers), name
    assert not any(p.requires_grad for p in g.parameters()) and g.cam == "gradcam"
    # A copy: training on does not reach into it.
    logits = g(examples.x)
    with torch.no_grad():
        for p in training.tail.parameters():
            p.add_(1)
    assert torch.equal(g(examples.x), logits)


def test_weights_shared_across_the_cut_are_refused():
    f, examples = data()
    f.head.get_submodule("fc").weight = torch.nn.Parameter(torch.zeros(CLASSES, 8).double())
    f.stem.register_parameter("tied", f.head.get_submodule("fc").weight)
    with pytest.raises(AftError, match="shares weights with layers before it"):
        Training(f, examples, settings(), cam="gradcam")


def through_json(state):
    """A state as it comes back from a file."""
    tensors = {name: value.clone() for name, value in state.tensors.items()}
    return State(tensors, json.loads(json.dumps(state.values)))


def assert_goes_on_from_any_step(f, examples, chosen):
    """Stop a training after each of its events and go on; the number of events."""
    whole = Training(f, examples, chosen, cam="gradcam")
    steps = len(list(whole.run()))
    for stop in range(1, steps + 1):
        first = Training(f, examples, chosen, cam="gradcam")
        events = first.run()
        for _ in range(stop):
            next(events)
        second = Training(f, examples, chosen, cam="gradcam")
        second.restore(through_json(first.state()))
        finish(second)
        assert second.history == whole.history
        assert_equal(weights(second), weights(whole))
        assert_equal(second.best, whole.best)
    return steps


@pytest.mark.parametrize("lam", [0.3, None])
def test_going_on_from_any_step_equals_never_stopping(lam):
    f, examples = data()
    chosen = settings(lam=lam, epochs=3, held_out=0.3)
    assert assert_goes_on_from_any_step(f, examples, chosen) == 3 * 2 + 4


def test_the_best_epoch_is_that_of_the_lowest_held_out_loss():
    f, examples = data()
    training = Training(
        f, examples, settings(learning_rate=0.1, epochs=12, held_out=0.3), cam="gradcam"
    )
    kept = {}
    for event in training.run():
        if isinstance(event, Epoch):
            kept[event.number] = weights(training)
    losses = [e.held_out.total for e in training.history[1:]]
    assert training.best_epoch == 1 + int(np.argmin(losses))
    assert training.best_epoch < training.history[-1].number
    assert len(losses) == min(12, training.best_epoch + 3)  # patience
    training.use_best()
    assert_equal(weights(training), kept[training.best_epoch])


def test_held_out_images_are_never_trained_on():
    f, examples = data()
    training = Training(f, examples, settings(held_out=0.3), cam="gradcam")
    finish(training)
    trained = {i for epoch, batch in examples.seen if epoch is not None for i in batch}
    measured = {i for epoch, batch in examples.seen if epoch is None for i in batch}
    assert trained == set(training.train) and measured == set(training.held_out)
    assert not trained & measured and len(trained | measured) == 11


def test_orders_are_permutations_that_differ_by_epoch_and_seed():
    orders = [shuffled(range(50), seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled(range(50), 1, 2) == orders[3]


def test_history_survives_json():
    f, examples = data()
    training = Training(f, examples, settings(held_out=0.3), cam="gradcam")
    for epoch in finish(training):
        assert Epoch.from_dict(json.loads(json.dumps(epoch.as_dict()))) == epoch


def test_measures_are_means_over_the_images():
    f, examples = data()
    training = Training(f, examples, settings(), cam="gradcam")
    found = training.measure(examples, range(11))
    with torch.no_grad():
        activation = training.tail.layer(f.stem(examples.x))
        logits, tuned = training.tail.head(activation), training.tail.tuner(activation)
    labels, masks = examples.labels.numpy(), examples.masks.numpy()
    expected = reference.aft_loss(logits.numpy(), labels, tuned.numpy(), masks, 0.3)
    assert found[:3] == pytest.approx(expected, rel=1e-12)
    right = sum(
        int(np.argmax(row)) == label for row, label in zip(logits.numpy(), labels, strict=True)
    )
    assert found.accuracy == pytest.approx(right / 11, rel=1e-6) and found.images == 11


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lam": -1.0}, "lambda must be 0 or more, got -1"),
        ({"lam": float("nan")}, "lambda"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"held_out": 1.0}, "held-out share"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"batch": 0}, "batch size"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    with pytest.raises(AftError, match=message):
        Training(*data(), settings(**changed), cam="gradcam")


def test_a_loss_that_is_not_finite_stops_the_training():
    f, examples = data()
    with pytest.raises(AftError, match="no longer finite in epoch 1; lower the learning rate"):
        finish(Training(f, examples, settings(learning_rate=1e300), cam="gradcam"))
