"""Measures of maps against literal loops, other libraries and their limits."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from aftcli.errors import AftError
from aftcli.measures import metrics
from aftcli.measures.metrics import Average, impute, road
from aftcli.measures.registry import EXTRAS, GROUPS, MEASURES, PAPER, by_group, extras_of, measures
from tests.reference import metrics as slow

SEEDS = (0, 1, 2)


def some_maps(seed, count=3, size=(9, 7)):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(count, *size, generator=generator)
    return (maps - maps.amin((1, 2), True)) / (maps.amax((1, 2), True) - maps.amin((1, 2), True))


def some_inputs(seed, count=3, size=(9, 7)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(100 + seed))


def tiny_network():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 12), nn.Flatten(), nn.Linear(5, 4)
    ).eval()


class Probability:
    """A function of images that depends on every pixel and is not linear."""

    def __init__(self, seed, size=(9, 7)):
        generator = torch.Generator().manual_seed(1000 + seed)
        self.weight = torch.randn(3, *size, generator=generator)
        self.passes = 0

    def __call__(self, x):
        self.passes += len(x)
        return torch.sigmoid((self.weight * x).flatten(1).sum(1) / 4)

    def of_one(self, image):
        return float(self(image[None])[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_measures_of_probabilities_equal_the_loop(seed):
    y, y_hat = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed))
    y_hat[:5] = y[:5]
    for fast, literal in (
        (metrics.increase, slow.increase),
        (metrics.drop, slow.drop),
        (metrics.gain, slow.gain),
    ):
        wanted = [literal(float(a), float(b)) for a, b in zip(y_hat, y, strict=True)]
        assert fast(y_hat, y).tolist() == pytest.approx(wanted, abs=1e-6)


def test_probabilities_that_underflow_give_numbers():
    y = torch.tensor([0.0, 1.0, 0.0])
    y_hat = torch.tensor([0.0, 1.0, 0.5])
    assert metrics.drop(y_hat, y).tolist() == [0, 0, 0]
    assert metrics.gain(y_hat, y).tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("seed", SEEDS)
def test_adcc_and_its_parts_equal_the_loop_and_its_authors_definition(seed):
    maps, others = some_maps(seed), some_maps(seed + 50)
    drop = torch.tensor([0.0, 0.3, 0.8])
    coherency = metrics.coherency(maps, others)
    complexity = metrics.complexity(maps)
    adcc = metrics.adcc(coherency, complexity, drop)
    for n in range(len(maps)):
        # The authors call scipy's pearsonr.
        r = stats.pearsonr(maps[n].flatten().double(), others[n].flatten().double()).statistic
        assert float(coherency[n]) == pytest.approx((r + 1) / 2, abs=1e-6)
        assert float(coherency[n]) == pytest.approx((slow.pearson(maps[n], others[n]) + 1) / 2)
        assert float(complexity[n]) == pytest.approx(slow.complexity(maps[n]))
        wanted = slow.adcc(float(coherency[n]), float(complexity[n]), float(drop[n]))
        assert float(adcc[n]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, 1 / 3])
def test_constant_maps_are_not_coherent(value):
    flat = torch.full((1, 9, 7), value)
    assert float(metrics.coherency(flat, some_maps(0, 1))) == 0
    assert float(metrics.coherency(some_maps(0, 1), flat)) == 0


def test_limits_of_a_map_of_ones():
    """Drop 0, increase 0; but ADCC 0, and of its energy the object's share lies on the object."""
    ones = torch.ones(1, 8, 8)
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[:, :4, :4] = True
    y = torch.tensor([0.4])
    assert float(metrics.drop(y, y)) == float(metrics.increase(y, y)) == 0
    assert float(metrics.complexity(ones)) == 1
    assert float(metrics.adcc(torch.ones(1), metrics.complexity(ones), torch.zeros(1))) == 0
    assert float(metrics.energy(ones, region)) == 0.25
    assert float(metrics.iou(ones != 0, region)) == 0.25


def test_limits_of_a_perfect_map():
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[:, 2:5, 3:6] = True
    attribution = region.float()
    assert float(metrics.energy(attribution, region)) == 1
    assert float(metrics.pointing(attribution, region)) == 1
    assert float(metrics.iou(attribution != 0, region)) == 1
    # The class is seen from its first pixels on: insertion near 1, deletion near 0.
    x = torch.ones(1, 3, 8, 8)

    def seen(images):
        return (images[:, 0] * region).flatten(1).sum(1).gt(8.99 if images is x else 4).float()

    assert float(metrics.insertion(x * region[:, None], attribution, seen)) > 0.9
    assert float(metrics.deletion(x, attribution, seen)) < 0.11


def test_limits_of_a_map_of_zeros():
    nothing = torch.zeros(1, 8, 8)
    region = torch.ones(1, 8, 8, dtype=torch.bool)
    assert float(metrics.energy(nothing, region)) == 0
    assert float(metrics.pointing(nothing, region)) == 0
    assert float(metrics.iou(nothing != 0, ~region)) == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps", [1, 10, 63])
def test_insertion_and_deletion_equal_the_loop(seed, steps):
    maps, x, probability = some_maps(seed), some_inputs(seed), Probability(seed)
    maps[2] = maps[2].round()  # many equal scores
    start = metrics.blurred(x)
    insertion = metrics.insertion(x, maps, probability, steps)
    deletion = metrics.deletion(x, maps, probability, steps)
    assert probability.passes == 2 * (steps + 1) * len(x)
    for n in range(len(x)):
        wanted = slow.area(start[n], maps[n], x[n], probability.of_one, steps)
        assert float(insertion[n]) == pytest.approx(wanted, abs=1e-5)
        black = torch.zeros_like(x[n])
        wanted = slow.area(x[n], maps[n], black, probability.of_one, steps)
        assert float(deletion[n]) == pytest.approx(wanted, abs=1e-5)


def test_blurring_is_a_gaussian_of_eleven_pixels():
    x = torch.zeros(1, 3, 31, 31)
    x[:, :, 15, 15] = 1
    weights = np.exp(-((np.arange(11) - 5) ** 2) / 50)
    weights /= weights.sum()
    wanted = np.outer(weights, weights)
    assert metrics.blurred(x)[0, 0, 10:21, 10:21].numpy() == pytest.approx(wanted, abs=1e-6)
    assert metrics.blurred(torch.randn(1, 3, 7, 9)).shape == (1, 3, 7, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_localisation_equals_the_loop(seed):
    maps = some_maps(seed)
    region, counted = (
        torch.rand(2, *maps.shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    )
    mask = maps > 0.5
    energy, iou = metrics.energy(maps, region), metrics.iou(mask, region, counted)
    pointing = metrics.pointing(maps, region)
    for n in range(len(maps)):
        assert float(energy[n]) == pytest.approx(slow.energy(maps[n], region[n]))
        assert float(iou[n]) == pytest.approx(slow.iou(mask[n], region[n], counted[n]))
        r, c = slow.in_order(maps[n])[0]
        assert float(pointing[n]) == float(region[n, r, c])


@pytest.mark.parametrize("seed", SEEDS)
def test_localisation_equals_quantus(seed):
    quantus = pytest.importorskip("quantus")
    maps = some_maps(seed, 4, (12, 12))
    region = torch.rand(maps.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    arguments = {
        "model": None,
        "x_batch": np.zeros((4, 3, 12, 12), np.float32),
        "y_batch": np.zeros(4, int),
        "a_batch": maps[:, None].numpy(),
        "s_batch": region[:, None].numpy(),
    }
    options = {"disable_warnings": True, "normalise": False, "abs": False}
    mass = quantus.RelevanceMassAccuracy(**options)(**arguments)
    game = quantus.PointingGame(**options)(**arguments)
    assert metrics.energy(maps, region).tolist() == pytest.approx(mass, abs=1e-6)
    assert metrics.pointing(maps, region).tolist() == [float(hit) for hit in game]


def test_increase_and_drop_equal_pytorch_grad_cam():
    """Whose drop is absolute, not relative to y; its masks are soft."""
    from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    f, x, maps = tiny_network(), some_inputs(0, 8, (12, 12)), some_maps(0, 8, (12, 12))
    with torch.no_grad():
        y, c = f(x).softmax(1).max(1)
        y_hat = f(x * maps[:, None]).softmax(1).gather(1, c[:, None])[:, 0]
    targets = [ClassifierOutputSoftmaxTarget(int(k)) for k in c]
    dropped = DropInConfidence()(x, maps.numpy(), targets, f)
    raised = IncreaseInConfidence()(x, maps.numpy(), targets, f)
    assert 0 < raised.sum() < 8
    assert (metrics.drop(y_hat, y) * y).tolist() == pytest.approx(dropped.tolist(), abs=1e-5)
    assert metrics.increase(y_hat, y).tolist() == raised.tolist()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_imputation_equals_its_authors(share):
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    x, maps = some_inputs(0, 1, (21, 17)), some_maps(0, 1, (21, 17))
    missing = metrics.ranks_of(maps)[0] < round(share * 21 * 17)
    wanted = NoisyLinearImputer(noise=0)(x[0], (~missing).float())
    assert impute(x[0], missing).numpy() == pytest.approx(wanted.numpy(), abs=1e-5)
    # What its equation says: each missing pixel is the weighted mean of its neighbours.
    filled = impute(x[0].double(), missing)
    r, c = (int(v) for v in missing.nonzero()[len(missing.nonzero()) // 2])
    around, total = torch.zeros(3).double(), 0.0
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            if (i or j) and 0 <= r + i < 21 and 0 <= c + j < 17:
                weight = 1 / 12 if i and j else 1 / 6
                around, total = around + weight * filled[:, r + i, c + j], total + weight
    assert filled[:, r, c].tolist() == pytest.approx((around / total).tolist(), abs=1e-9)


def test_nothing_missing_changes_nothing():
    x = some_inputs(0, 1)[0]
    assert impute(x, torch.zeros(9, 7, dtype=torch.bool)) is x


def test_road_is_the_mean_over_its_shares():
    x, maps, probability = some_inputs(1), some_maps(1), Probability(1)
    wanted = []
    for n in range(len(x)):
        noise = 0.01 * torch.randn(3, 9, 7, generator=torch.Generator().manual_seed(10 + n))
        values = []
        for share in (0.25, 0.5):
            missing = torch.zeros(9, 7, dtype=torch.bool)
            for r, c in slow.in_order(maps[n])[: round(share * 63)]:
                missing[r, c] = True
            values.append(probability.of_one(impute(x[n], missing) + noise * missing))
        wanted.append(sum(values) / 2)
    found = road(x, maps, probability, [10, 11, 12], shares=(0.25, 0.5))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    # An image's noise is its own, whatever the batch.
    one = road(x[1:2], maps[1:2], probability, [11], shares=(0.25, 0.5))
    assert float(one) == pytest.approx(float(found[1]), abs=1e-6)


def arcc_of(seed):
    """Maps, those of masked images, inputs, and ARCC without noise of a network they explain."""
    maps, others = some_maps(seed), some_maps(seed + 50)
    x, weight = some_inputs(seed) / 10 + maps[:, None], maps[:, None] / 10
    weight[2] *= -1  # explains the opposite: ROAD is below 0

    def probability_of(images):
        return torch.sigmoid((weight.to(images) * (images - x)).flatten(1).sum(1))

    first, last = (road(x, m, probability_of, range(3), noise=0) for m in (maps, 1 - maps))
    parts = (metrics.coherency(maps, others), metrics.complexity(maps), first, last)
    return maps, others, x, probability_of, metrics.arcc(*parts)


@pytest.mark.parametrize("seed", SEEDS)
def test_arcc_equals_the_loop(seed):
    maps, others, x, probability_of, found = arcc_of(seed)
    y = []
    for orders in (maps, 1 - maps):
        sums = torch.zeros(3, dtype=torch.double)
        for share in (0.2, 0.4, 0.6, 0.8):
            filled = x.double()
            for n in range(3):
                missing = torch.zeros(9, 7, dtype=torch.bool)
                for r, c in slow.in_order(orders[n])[: round(share * 63)]:
                    missing[r, c] = True
                filled[n] = impute(x[n].double(), missing)
            sums += probability_of(filled)
        y.append((sums / 4).tolist())
    for n in range(3):
        coherency = (slow.pearson(maps[n], others[n]) + 1) / 2
        wanted = slow.arcc(coherency, slow.complexity(maps[n]), y[0][n], y[1][n])
        assert float(found[n]) == pytest.approx(wanted, rel=1e-4)
        assert y[1][n] < y[0][n] - 0.05 if n == 2 else wanted > 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_arcc_equals_its_authors_code(seed, monkeypatch):
    from pytorch_grad_cam.metrics import road as theirs
    from pytorch_grad_cam.metrics.arcc import ARCC

    maps, others, x, probability_of, found = arcc_of(seed)
    monkeypatch.setattr(theirs.NoisyLinearImputer.__init__, "__defaults__", (0.0, None))
    measure = ARCC(base_method=lambda input_tensor, targets: others.numpy())
    targets = [lambda y: y] * 3
    given = measure(x, maps.numpy(), targets, lambda images: probability_of(images))
    assert found.tolist() == pytest.approx(given.tolist(), rel=1e-4, abs=1e-6)


def test_deletion_equals_quantus():
    quantus = pytest.importorskip("quantus")
    f, x = tiny_network(), some_inputs(3, 1, (12, 12))
    maps = some_maps(3, 1, (12, 12))
    c, steps = int(f(x).argmax()), 12
    flipping = quantus.PixelFlipping(
        features_in_step=3 * 144 // steps,  # of which each pixel has three
        perturb_baseline=0.0,
        normalise=False,
        abs=False,
        disable_warnings=True,
    )
    curve = flipping(
        model=f,
        x_batch=x.numpy(),
        y_batch=np.array([c]),
        a_batch=maps[:, None].numpy(),
        softmax=True,
        channel_first=True,
    )
    with torch.no_grad():
        y = [float(f(x).softmax(1)[0, c]), *np.asarray(curve).ravel().tolist()]
        found = float(metrics.deletion(x, maps, lambda x: f(x).softmax(1)[:, c], steps))
    assert len(y) == steps + 1
    assert found == pytest.approx(np.trapezoid(y, dx=1 / steps), abs=1e-5)


def test_averages_do_not_depend_on_the_batches():
    y, y_hat = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    whole, parts = Average(metrics.drop), Average(metrics.drop)
    whole.update(y_hat, y)
    for part in range(0, 40, 7):
        parts.update(y_hat[part : part + 7], y[part : part + 7])
    assert float(whole.compute()) == pytest.approx(float(parts.compute()), abs=1e-12)
    assert float(whole.compute()) == pytest.approx(float(metrics.drop(y_hat, y).double().mean()))


def test_averages_leave_out_what_is_undefined():
    average = Average()
    average.update(torch.tensor([1.0, torch.nan, 3.0]))
    average.update(torch.tensor([torch.nan]))
    assert float(average.compute()) == 2


def average_as_one_of(index, port, found):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2
    )
    average = Average(metrics.increase)
    y = torch.full((3 + index,), 0.5)
    average.update(y + (0.1 if index else -0.1), y)
    found.put(float(average.compute()))


@pytest.mark.slow
def test_averages_are_over_all_processes(processes):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = processes.Queue()
    both = [processes.Process(target=average_as_one_of, args=(i, port, found)) for i in (0, 1)]
    for process in both:
        process.start()
    values = [found.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    assert values == [pytest.approx(4 / 7)] * 2


@pytest.mark.parametrize("name", MEASURES)
def test_measures_run_as_many_passes_as_their_lines_say(name):
    measure = MEASURES[name]
    formula = measure.load()
    if "probability_of" in measure.needs:
        x, maps, probability_of = some_inputs(0), some_maps(0), Probability(0)
        given = {"x": x, "attribution": maps, "probability_of": probability_of, "seeds": (0, 1, 2)}
        given["inverse"] = 1 - maps
        assert formula(*(given[need] for need in measure.needs)).shape == (3,)
        assert probability_of.passes == 3 * measure.passes
    else:
        # One pass gives the map of the masked image, and its drop.
        assert measure.passes == ("product_map" in measure.needs)


def test_names_of_measures():
    assert measures(None) == PAPER
    assert measures("all") == tuple(MEASURES)
    assert measures(" adcc , road,adcc") == ("adcc", "road")
    with pytest.raises(AftError, match="unknown measure 'adc'.*adcc"):
        measures("adc")
    with pytest.raises(AftError, match="unknown measure"):
        measures(" , ")
    assert extras_of(MEASURES, True) == {*EXTRAS, "baselines"}
    assert extras_of(PAPER, False) == frozenset()


def test_groups_are_those_of_quantus():
    import quantus

    assert sorted(GROUPS) == sorted(name.lower() for name in quantus.AVAILABLE_METRICS)
    assert {measure.group for measure in MEASURES.values()} <= set(GROUPS)
    assert sorted(name for _, names in by_group() for name in names) == sorted(MEASURES)
    # What Quantus has too stands where it stands there.
    for ours, theirs in (("pointing", "Pointing Game"), ("road", "ROAD"), ("complexity",) * 2):
        own = quantus.AVAILABLE_METRICS[MEASURES[ours].group.capitalize()]
        assert theirs in own or theirs.capitalize() in own
