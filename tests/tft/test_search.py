"""Threshold fine-tuning against Algorithm 1 in plain loops (§4.1)."""

import itertools
import math

import numpy as np
import pytest
import torch

from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Classes
from aftcli.errors import AftError
from aftcli.settings import MODES, THRESHOLDS, Search
from aftcli.tft.masking import FILLS, MASKINGS
from aftcli.tft.search import fine_tune_threshold, tune_batch
from tests.helpers.compare import assert_near
from tests.helpers.small import MEAN, SIZE, STD, small
from tests.helpers.stored import small_float
from tests.reference import paper as reference

SEEDS = (0, 1, 2)
SETTINGS = list(itertools.product(MASKINGS, FILLS, MODES))


class Counting:
    """A classifier that remembers every image it is asked about."""

    engine = None

    def __init__(self, f):
        self.f, self.preprocessing, self.classes = f, f.preprocessing, f.classes
        self.images = []

    def __call__(self, x):
        self.images += list(x.clone())
        return self.f(x)

    def probabilities(self, logits):
        return logits.softmax(1)


class Scripted:
    """A classifier of two classes; the probability of class 0 depends on the image's mean."""

    classes = Classes(("first", "second"))
    engine = None

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, x):
        p = self.probability(x.mean((1, 2, 3)))
        return torch.stack([p.log(), (1 - p).log()], 1)

    def probabilities(self, logits):
        return logits.softmax(1)


def kept_share(f_of_share):
    """A Scripted classifier and x of ones: the mean of a masked image is the share it keeps."""
    return Scripted(f_of_share), torch.ones(1, 3, 10, 10, dtype=torch.float64)


def ramp():
    """A map of a hundred different scores from 0 to 1."""
    return torch.linspace(0, 1, 100, dtype=torch.float64).view(1, 10, 10)


def stepped(attribution, steps):
    """The map rounded to few levels, so that several thresholds give the same mask."""
    return (attribution * steps).round() / steps


def literal(s, attribution, masking, fill, mode, thresholds=THRESHOLDS):
    """Algorithm 1 for each image."""
    return [
        reference.algorithm_1(
            s.model,
            s.x[n : n + 1],
            attribution[n].numpy(),
            int(c),
            thresholds,
            masking,
            fill,
            mode,
            MEAN,
            STD,
        )
        for n, c in enumerate(s.class_index)
    ]


def assert_same_increases(rpi, expected, tolerance=1e-6):
    """Relative to y_hat / y = 1 + RPI, of which an increase is the small difference."""
    error = (rpi.double() - torch.from_numpy(expected)).abs()
    assert (error <= tolerance * (1 + torch.from_numpy(expected))).all(), f"{error.max():g}"


def assert_same_search(found, expected):
    for n, search in enumerate(expected):
        assert found.tau[n].item() == search.tau
        assert_same_increases(found.rpi[n], search.rpi)
        assert_near(found.probabilities[n].double(), search.y_hat, 1e-6)
        assert found.probability[n].item() == pytest.approx(search.y, rel=1e-6)
        assert torch.equal(found.attribution[n], torch.from_numpy(search.attribution))
        assert torch.equal(found.mask[n], torch.from_numpy(search.mask))


def distinct(images):
    """Different images among arrays, up to rounding."""
    return {(np.round(np.asarray(image), 9) + 0.0).tobytes() for image in images}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["signed", "mlp"])
@pytest.mark.parametrize(("masking", "fill", "mode"), SETTINGS)
def test_search_equals_algorithm_1(masking, fill, mode, kind, seed):
    s = small(kind, seed)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
    if seed == 2:
        attribution = stepped(attribution, 4)
    found = fine_tune_threshold(
        s.f, s.x, attribution, s.class_index, masking=masking, fill=fill, mode=mode
    )
    expected = literal(s, attribution, masking, fill, mode)
    assert_same_search(found, expected)


def test_the_compared_searches_are_not_all_alike():
    # The test above would show little if no threshold ever helped, or always the same did.
    best = {masking: set() for masking in MASKINGS}
    for seed, kind, masking in itertools.product(SEEDS, ["signed", "mlp"], MASKINGS):
        s = small(kind, seed)
        attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
        best[masking] |= {
            search.tau for search in literal(s, attribution, masking, "mean", "value")
        }
    assert all(len(taus) > 3 for taus in best.values())


@pytest.mark.parametrize("thresholds", [(0.25, 0.5, 0.55), (0.3,), (0.05, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("mode", MODES)
def test_thresholds_may_be_any_increasing_ones(mode, thresholds):
    s = small("signed", 3)
    attribution = attribution_map(s.f, s.x, s.class_index, "layercam")
    found = fine_tune_threshold(s.f, s.x, attribution, s.class_index, thresholds, mode=mode)
    assert found.rpi.shape == (3, len(thresholds))
    assert_same_search(found, literal(s, attribution, "binary", "mean", mode, thresholds))


@pytest.mark.parametrize(
    "thresholds", [(), (0.5, 0.5), (0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"),)]
)
def test_thresholds_out_of_range_or_order_are_an_error(thresholds):
    s = small("linear")
    with pytest.raises(AftError, match="thresholds must"):
        fine_tune_threshold(s.f, s.x, torch.rand(3, *SIZE), s.class_index, thresholds)
    with pytest.raises(AftError, match="thresholds must"):
        Search(thresholds)


@pytest.mark.parametrize(
    "wrong", [{"masking": "hard"}, {"fill": "grey"}, {"mode": "rank"}, {"search": "x"}]
)
def test_unknown_settings_are_an_error(wrong):
    s = small("linear")
    (name,) = wrong.values()
    with pytest.raises(AftError, match=f"unknown .*'{name}'; nearest: "):
        fine_tune_threshold(s.f, s.x, torch.rand(3, *SIZE), s.class_index, **wrong)
    with pytest.raises(AftError, match=f"unknown .*'{name}'; nearest: "):
        Search(**wrong)


@pytest.mark.parametrize(
    ("map_shape", "classes"),
    [((3, SIZE[1], SIZE[0]), 3), ((2, *SIZE), 3), ((3, *SIZE), 2), ((3, 5, 7), 3)],
)
def test_shapes_that_disagree_are_an_error(map_shape, classes):
    s = small("linear")
    with pytest.raises(AftError, match="must have shape"):
        fine_tune_threshold(s.f, s.x, torch.rand(map_shape), s.class_index[:classes])


# The choice of tau*


def test_of_equal_maxima_the_first_counts():
    # The class wins where between 35 and 75 % of the image is kept: tau = 0.3 to 0.6.
    f, x = kept_share(lambda share: torch.where((share > 0.35) & (share < 0.75), 0.8, 0.5))
    found = fine_tune_threshold(f, x, ramp(), torch.tensor([0]))
    assert_near(found.rpi[0], [0, 0, 0, 0.6, 0.6, 0.6, 0.6, 0, 0, 0, 0], 1e-6)
    assert found.tau.item() == pytest.approx(0.3)


def test_the_largest_increase_counts_not_the_last():
    f, x = kept_share(lambda share: 0.3 + 0.6 * share * (1 - share))
    found = fine_tune_threshold(f, x, ramp(), torch.tensor([0]))
    assert found.tau.item() == 0.5
    assert found.mask.sum() == 50
    # The other class falls where this one rises.
    other = fine_tune_threshold(f, x, ramp(), torch.tensor([1]))
    assert other.tau.item() == 0


@pytest.mark.parametrize("thresholds", [THRESHOLDS, (0.4, 0.7)])
def test_where_no_threshold_helps_it_is_the_first(thresholds):
    f, x = kept_share(lambda share: 0.1 + 0.8 * share)
    found = fine_tune_threshold(f, x, ramp(), torch.tensor([0]), thresholds)
    assert torch.equal(found.rpi, torch.zeros_like(found.rpi))
    assert found.tau.item() == thresholds[0]
    kept = torch.where(ramp() >= thresholds[0], ramp(), 0)
    assert torch.equal(found.attribution, kept)


@pytest.mark.parametrize(("masking", "fill", "mode"), SETTINGS)
def test_a_zero_map_keeps_nothing_at_any_threshold(masking, fill, mode):
    s = small("mlp", 1)
    attribution = torch.zeros(3, *SIZE, dtype=torch.float64)
    found = fine_tune_threshold(
        s.f, s.x, attribution, s.class_index, masking=masking, fill=fill, mode=mode
    )
    assert_same_search(found, literal(s, attribution, masking, fill, mode))
    assert torch.equal(found.tau, torch.zeros(3, dtype=torch.float64))
    assert not found.mask.any()


def test_a_known_probability_is_taken_instead_of_a_pass():
    s = small("linear", 2)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
    found = fine_tune_threshold(
        s.f, s.x, attribution, s.class_index, probability=torch.full((3,), 0.125)
    )
    assert_near(found.rpi, (found.probabilities - 0.125).clamp(min=0) / 0.125, 1e-6)


# The fast search


FINE = tuple(i / 40 for i in range(41))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11, 41, 101])
@pytest.mark.parametrize("peak", [0.0, 0.13, 0.4, 0.5, 0.77, 1.0])
def test_a_fast_search_finds_the_one_peak(peak, count):
    thresholds = tuple(i / max(count - 1, 1) for i in range(count))
    kept = 1 - peak
    f, x = kept_share(lambda share: 0.9 - 0.8 * (share - kept).abs().clamp(max=1))
    y = torch.tensor([0.05], dtype=torch.float64)
    known = {"probability": y, "thresholds": thresholds}
    exact = fine_tune_threshold(f, x, ramp(), torch.tensor([0]), **known)
    fast = fine_tune_threshold(f, x, ramp(), torch.tensor([0]), **known, search="fast")
    tried = ~fast.rpi.isnan()
    # The map has a hundred scores: neighbouring thresholds may be equally good.
    assert fast.rpi[tried].max() == exact.rpi.max()
    assert torch.equal(fast.rpi[tried], exact.rpi[tried])
    assert torch.equal(tried, ~fast.probabilities.isnan())
    if count > 5:
        assert tried.sum() <= 8 + 2 * math.log2(count)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masking", MASKINGS)
def test_a_fast_search_is_the_best_of_what_it_tried(masking, seed):
    s = small("mlp", seed)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
    exact, fast = (
        fine_tune_threshold(s.f, s.x, attribution, s.class_index, FINE, masking, search=search)
        for search in ("exact", "fast")
    )
    tried = ~fast.rpi.isnan()
    assert tried[:, ::8].all() and 9 <= tried.sum(1).min() <= tried.sum(1).max() <= 14
    assert_near(fast.rpi[tried], exact.rpi[tried])
    for n in range(3):
        own = [t for t in range(41) if tried[n, t]]
        best = max(own, key=lambda t: (exact.rpi[n, t].item(), -t))
        assert fast.tau[n].item() == pytest.approx(FINE[best])
        cut = torch.where(attribution[n] >= fast.tau[n], attribution[n], 0)
        assert torch.equal(fast.attribution[n], cut)


def test_a_fast_search_passes_the_network_less_often():
    s = small("mlp", 0)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
    counted = {}
    for search in ("exact", "fast"):
        counting = Counting(s.f)
        fine_tune_threshold(
            counting,
            s.x,
            attribution,
            s.class_index,
            FINE,
            probability=torch.ones(3),
            search=search,
        )
        counted[search] = len(counting.images)
    assert counted["fast"] < counted["exact"] and counted["fast"] <= 3 * 14


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masking", MASKINGS)
def test_batch_equals_its_images_one_by_one(masking, seed):
    s = small("mlp", seed)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
    attribution[1] = 0
    together = fine_tune_threshold(s.f, s.x, attribution, s.class_index, masking=masking)
    for n in range(3):
        alone = fine_tune_threshold(
            s.f,
            s.x[n : n + 1],
            attribution[n : n + 1],
            s.class_index[n : n + 1],
            masking=masking,
        )
        assert alone.tau[0] == together.tau[n]
        assert_near(alone.rpi[0], together.rpi[n], 1e-6)
        assert torch.equal(alone.attribution[0], together.attribution[n])


# How often the network runs


@pytest.mark.parametrize("levels", [1, 4, 7, None])
@pytest.mark.parametrize(("masking", "fill", "mode"), SETTINGS)
def test_each_distinct_masked_image_passes_the_network_once(masking, fill, mode, levels):
    s = small("signed", 4)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam")
    if levels:
        attribution = stepped(attribution, levels)
    attribution[1] *= 0.45
    expected = literal(s, attribution, masking, fill, mode)
    f = Counting(s.f)
    y = torch.tensor([search.y for search in expected])
    found = fine_tune_threshold(
        f, s.x, attribution, s.class_index, masking=masking, fill=fill, mode=mode, probability=y
    )
    wanted = distinct(image for search in expected for image in search.x_hat)
    # A mask that keeps everything leaves x itself, whose probability is known.
    wanted -= distinct(s.x)
    assert len(f.images) == len(wanted)
    assert distinct(f.images) == wanted
    for n, search in enumerate(expected):
        assert_same_increases(found.rpi[n], search.rpi)


@pytest.mark.parametrize(("masking", "fill", "mode"), SETTINGS)
def test_equal_masks_of_several_maps_of_an_image_pass_the_network_once(masking, fill, mode):
    # Two methods and two classes: some maps equal, some with equal masks, some not.
    s = small("mlp", 6)
    owner = torch.tensor([0, 0, 2, 0, 2, 0])
    plain = stepped(attribution_map(s.f, s.x, s.class_index, "layercam"), 5)
    sharp = torch.where(plain > 0.5, plain**2, plain)
    maps = torch.stack([plain[0], plain[0], plain[2], sharp[0], sharp[2], plain[1]])
    class_index = torch.tensor([0, 3, 1, 0, 1, 2])
    f = Counting(s.f)
    settings = {"masking": masking, "fill": fill, "mode": mode}
    y = torch.tensor(
        [
            reference.probability(s.model, s.x[n : n + 1], int(c))
            for n, c in zip(owner, class_index, strict=True)
        ]
    )
    found = fine_tune_threshold(f, s.x, maps, class_index, **settings, probability=y, owner=owner)
    seen = []
    for i, (n, c) in enumerate(zip(owner, class_index, strict=True)):
        search = reference.algorithm_1(
            s.model,
            s.x[n : n + 1],
            maps[i].numpy(),
            int(c),
            THRESHOLDS,
            *settings.values(),
            MEAN,
            STD,
        )
        assert found.tau[i].item() == search.tau
        assert_same_increases(found.rpi[i], search.rpi)
        seen += search.x_hat
    wanted = distinct(seen) - distinct(s.x)
    assert len(f.images) == len(wanted)
    assert distinct(f.images) == wanted


def test_passes_on_a_cpu_are_small(monkeypatch):
    s, sizes = small("mlp"), []
    attribution = torch.rand(1, *SIZE, dtype=torch.float64)
    whole = fine_tune_threshold(s.f, s.x[:1], attribution, s.class_index[:1])
    monkeypatch.setattr("aftcli.core.inputs.A_THREAD", 2 * s.x[0].numel())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(s.f, "watch", sizes.append)
    parts = fine_tune_threshold(s.f, s.x[:1], attribution, s.class_index[:1])
    assert sizes == [1, 4, 4, 2]  # the mask of tau = 0 is whole
    for name in ("probabilities", "rpi", "tau"):
        assert_near(getattr(parts, name), getattr(whole, name), 1e-12)


def test_without_a_known_probability_each_image_passes_once_more():
    s = small("mlp", 6)
    f = Counting(s.f)
    whole = torch.ones(3, *SIZE, dtype=torch.float64)
    fine_tune_threshold(f, s.x, whole, s.class_index)
    assert torch.equal(torch.stack(f.images), s.x)


def test_a_mask_that_keeps_everything_has_exactly_the_images_own_probability():
    # Rounding of another batch size must not count as an increase.
    s = small("mlp", 6)
    attribution = attribution_map(s.f, s.x, s.class_index, "gradcam") * 0.9 + 0.1
    found = fine_tune_threshold(s.f, s.x, attribution, s.class_index)
    assert torch.equal(found.probabilities[:, 0], found.probability)
    assert torch.equal(found.rpi[:, 0], torch.zeros(3))


def test_many_masked_images_are_run_in_several_passes():
    # More than one pass of the network; the scores must come back in order.
    s = small("mlp", 5)
    x, c = s.x.repeat(5, 1, 1, 1), s.class_index.repeat(5)
    attribution = torch.rand(15, *SIZE, dtype=torch.float64)
    f = Counting(s.f)
    found = fine_tune_threshold(f, x, attribution, c)
    assert len(f.images) > 150
    for n in range(15):
        search = reference.algorithm_1(
            s.model,
            x[n : n + 1],
            attribution[n].numpy(),
            int(c[n]),
            THRESHOLDS,
            "binary",
            "mean",
            "value",
        )
        assert_near(found.probabilities[n].double(), search.y_hat, 1e-6)


# Properties


@pytest.mark.parametrize(("masking", "fill", "mode"), SETTINGS)
def test_no_increase_is_negative(masking, fill, mode):
    s = small("mlp", 7)
    attribution = torch.rand(3, *SIZE, dtype=torch.float64)
    found = fine_tune_threshold(
        s.f, s.x, attribution, s.class_index, masking=masking, fill=fill, mode=mode
    )
    assert (found.rpi >= 0).all()
    assert (found.rpi == 0).any()
    assert (found.probabilities < found.probability[:, None]).any()


# Several methods at once


def test_methods_together_equal_each_alone():
    f = small_float()
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    methods = ("gradcam", "layercam", "cam", "ablationcam", "gradcam++")
    together = tune_batch(f, x, methods, Search())
    for method, shared in zip(methods, together, strict=True):
        (alone,) = tune_batch(f, x, [method], Search())
        assert torch.equal(shared.tft.tau, alone.tft.tau)
        torch.testing.assert_close(shared.tft.probabilities, alone.tft.probabilities)
        assert torch.equal(shared.mask, alone.mask)


def test_equal_masks_of_several_methods_are_scored_once(monkeypatch):
    f = small_float()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    passed = []
    forward = type(f).forward
    monkeypatch.setattr(
        type(f), "forward", lambda self, x: passed.append(len(x)) or forward(self, x)
    )
    tune_batch(f, x, ["layercam"], Search())
    alone = sum(passed)
    passed.clear()
    tune_batch(f, x, ["layercam", "layercam"], Search())
    assert sum(passed) == alone


# Real images (float32)


@pytest.fixture(scope="module")
def real(shared, lite0):
    """Twenty validation images, their predicted classes and Grad-CAM maps."""
    from aftcli.data.images import read_image, to_input

    paths = sorted((shared / "data/imagenet/val").rglob("*.JPEG"))[::22]
    assert len(paths) == 20
    x = torch.cat([to_input(read_image(path), lite0.preprocessing) for path in paths])
    with torch.no_grad():
        class_index = lite0(x).argmax(1)
    return x, class_index, attribution_map(lite0, x, class_index, "gradcam")


@pytest.mark.slow
def test_maps_of_real_images_equal_the_definition_and_one_by_one(real, lite0, uncut_lite0):
    x, class_index, maps = real
    for n in range(0, 20, 5):
        c = int(class_index[n])
        expected = reference.attribution_map(uncut_lite0, "bn2", x[n : n + 1], c, "gradcam")
        assert_near(maps[n].double(), expected, 1e-5)
    for n in range(20):
        alone = attribution_map(lite0, x[n : n + 1], class_index[n : n + 1], "gradcam")
        assert_near(alone[0], maps[n], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masking", MASKINGS)
def test_search_of_real_images_equals_algorithm_1_and_one_by_one(masking, real, lite0, uncut_lite0):
    x, class_index, maps = real
    together = fine_tune_threshold(lite0, x, maps, class_index, masking=masking)
    for n in range(20):
        one = slice(n, n + 1)
        search = reference.algorithm_1(
            uncut_lite0,
            x[one],
            maps[n].numpy(),
            int(class_index[n]),
            THRESHOLDS,
            masking,
            "mean",
            "value",
        )
        searches = [(together.tau[n], together.rpi[n])]
        if n % 4 == 0:
            alone = fine_tune_threshold(lite0, x[one], maps[one], class_index[one], masking=masking)
            searches.append((alone.tau[0], alone.rpi[0]))
        for tau, rpi in searches:
            assert (rpi.double() - torch.from_numpy(search.rpi)).abs().max() <= 1e-4
            chosen = THRESHOLDS.index(round(tau.item(), 1))
            wanted = THRESHOLDS.index(search.tau)
            # In float32 thresholds whose increases differ by rounding may swap places: then the
            # two increases, not the two thresholds, must agree.
            if chosen != wanted:
                assert search.rpi[chosen] == pytest.approx(search.rpi[wanted], rel=1e-5, abs=1e-6)
