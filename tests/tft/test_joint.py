"""Thresholds that several judges choose, against a literal loop in float64."""

import math

import pytest
import torch

from aftcli.attributions.maps import attribution_map
from aftcli.core.classes import Classes
from aftcli.errors import AftError
from aftcli.settings import MASKINGS
from aftcli.tft.judges import Judge
from aftcli.tft.search import fine_tune_threshold
from aftcli.tft.threshold import (
    first_for_all,
    first_maximum,
    least_increase,
    log_odds_increase,
    relative_probability_increase,
)
from tests.helpers.small import MEAN, STD
from tests.reference import paper as reference
from tests.tft.test_judges import MIRROR, Case, literal
from tests.tft.test_search import Scripted, kept_share, ramp

T = tuple(i / 8 for i in range(9))


def asked(case):
    return (MIRROR, Judge("other", case.g))


def by_loop(case, n, attribution, judges, masking, fill, mode):
    """Algorithm 1 of the network, and what each judge says: y_hat of each threshold, y."""
    found = reference.algorithm_1(
        case.model,
        case.x[n : n + 1],
        attribution[n].numpy(),
        case.c[n],
        T,
        masking,
        fill,
        mode,
        MEAN,
        STD,
    )
    images = [torch.from_numpy(image) for image in found.x_hat]
    y_hats, ys = [found.y_hat.tolist()], [found.y]
    for judge in judges:
        ys.append(literal(case, judge, case.x[n], case.c[n]))
        y_hats.append([literal(case, judge, image, case.c[n]) for image in images])
    return found, y_hats, ys


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize(("fill", "mode"), [("mean", "value"), ("blur", "percentile")])
def test_a_search_that_asks_judges_equals_the_loop(masking, fill, mode, seed):
    case = Case(seed, 5)
    judges, c = asked(case), torch.tensor(case.c)
    maps = attribution_map(case.f, case.x, c, "gradcam")
    found = fine_tune_threshold(case.f, case.x, maps, c, T, masking, fill, mode, judges=judges)
    lacking = 0
    for n in range(len(case.x)):
        alone, y_hats, ys = by_loop(case, n, maps, judges, masking, fill, mode)
        best, _ = reference.first_for_all(y_hats, ys)
        assert int(found.best[n]) == best and found.tau[n].item() == T[best]
        shown = reference.thresholded(maps[n].numpy(), T[best], mode)
        assert torch.equal(found.attribution[n], torch.from_numpy(shown))
        assert torch.equal(found.mask[n], torch.from_numpy(shown != 0))
        # RPI stays the network's own.
        assert found.rpi[n].tolist() == pytest.approx(alone.rpi.tolist(), abs=2e-5)
        assert found.probabilities[n].tolist() == pytest.approx(y_hats[0], abs=2e-6)
        for j, (y_hat, y) in enumerate(zip(y_hats, ys, strict=True)):
            rise = float(found.increases[n, j])
            if y is None:
                lacking += 1
                assert math.isnan(rise) and found.judged[n, j - 1].isnan().all()
                continue
            wanted = reference.log_odds(y_hat[best]) - reference.log_odds(y)
            assert rise == pytest.approx(wanted, abs=1e-4)
            if j:
                assert found.judged[n, j - 1].tolist() == pytest.approx(y_hat, abs=2e-6)
    assert 0 < lacking < len(case.x)  # both kinds of images are compared


def test_judges_change_what_is_chosen():
    """Otherwise the comparison above would say nothing."""
    changed = 0
    for seed in range(2):
        case = Case(seed, 5)
        c = torch.tensor(case.c)
        maps = attribution_map(case.f, case.x, c, "gradcam")
        own, all_ = (
            fine_tune_threshold(case.f, case.x, maps, c, T, judges=judges)
            for judges in ((), asked(case))
        )
        changed += int((own.tau != all_.tau).sum())
        assert own.judged.shape[1] == 0 and own.increases.shape == (5, 1)
    assert changed > 1


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_equals_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    y_hat = torch.rand(6, 3, 7, generator=generator, dtype=torch.float64)
    y = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    y_hat[0], y[0, 1] = y_hat[0] / 1e3, torch.nan
    y_hat[0, 1] = torch.nan
    y[1] = 0.99  # hardly anything helps
    y_hat[2] = 1 - y_hat[2] * 1e-5  # beyond what float32 tells apart
    found, least = first_for_all(y_hat, y), least_increase(y_hat, y)
    for n in range(len(y)):
        known = [None if math.isnan(v) else v for v in y[n].tolist()]
        best, rises = reference.first_for_all(y_hat[n].tolist(), known)
        assert found[n] == best
        assert least[n].tolist() == pytest.approx(rises, abs=1e-6)


def test_of_one_judge_the_rule_is_algorithm_1():
    generator = torch.Generator().manual_seed(0)
    y_hat, y = torch.rand(200, 1, 9, generator=generator), torch.rand(200, 1, generator=generator)
    y_hat[:20] *= y[:20, :, None]  # where nothing helps
    rpi = relative_probability_increase(y_hat[:, 0], y)
    assert torch.equal(first_for_all(y_hat, y), first_maximum(rpi, y[:, 0]))
    assert not first_for_all(y_hat, y)[:20].any()
    # Judges who do not know the class change nothing.
    unknown = torch.full((200, 1), torch.nan)
    more = torch.cat([y_hat, unknown[..., None].expand(-1, -1, 9)], 1)
    assert torch.equal(first_for_all(more, torch.cat([y, unknown], 1)), first_for_all(y_hat, y))


def test_equal_up_to_rounding_the_first_counts():
    y = torch.tensor([[0.5, 0.5]])
    # The least rises by 1e-5 less, and by 1e-3 less, than the best.
    odds = torch.tensor([0.1, 1.0 - 1e-3, 1.0 - 1e-5, 1.0, 0.3], dtype=torch.float64)
    y_hat = torch.stack([odds.sigmoid(), torch.full((5,), 0.9, dtype=torch.float64)])[None]
    assert first_for_all(y_hat, y).tolist() == [2]
    # A probability of almost 1 has few bits left.
    near = 1 - torch.tensor([8e-7, 6e-7, 3e-3, 5e-7], dtype=torch.float64)
    y_hat = torch.stack([near, torch.full((4,), 1.0, dtype=torch.float64)])[None]
    assert first_for_all(y_hat, y).tolist() == [0]
    # What was not tried is not chosen.
    y_hat[..., 0] = torch.nan
    assert first_for_all(y_hat, y).tolist() == [1]


def test_no_increase_is_infinite():
    ends = torch.tensor([0.0, 1.0, 1 - 2.0**-24, 1e-45, 0.5])
    found = log_odds_increase(ends[:, None], ends[None])
    assert found.isfinite().all()
    assert found[1, 2] == 0  # both are 1 up to rounding
    assert torch.equal(found, -found.T)


def peak(at, width=0.2):
    """A judge that knows best at one share of the image."""
    return Scripted(lambda share: 0.3 + 0.6 * torch.exp(-(((share - at) / width) ** 2)))


class Told:
    """A judge that says what a function of the image's mean says."""

    def __init__(self, f, name="told"):
        self.f, self.name = f, name

    def check(self, f, option="judge"):
        pass

    def matching(self, f):
        return torch.arange(2)

    def probabilities(self, f, x):
        return self.f(x).softmax(1)


@pytest.mark.parametrize("search", ["exact", "fast"])
def test_the_threshold_lies_between_two_peaks(search):
    """One keeps 70 % gladly, the other 30 %: both gain at half of the image."""
    f, x = kept_share(peak(0.7).probability)
    T = tuple(i / 50 for i in range(51))
    own = fine_tune_threshold(f, x, ramp(), 0, T)
    found = fine_tune_threshold(f, x, ramp(), 0, T, judges=[Told(peak(0.3))], search=search)
    assert own.tau.item() == pytest.approx(0.3, abs=0.03)
    assert found.tau.item() == pytest.approx(0.5, abs=0.03)
    assert (found.increases > 0).all()
    if search == "fast":
        untried = found.rpi.isnan()
        assert untried.any() and torch.equal(found.judged[:, 0].isnan(), untried)


def test_where_no_threshold_helps_all_it_is_the_first():
    f, x = kept_share(lambda share: 0.9 - 0.5 * share)  # the less the better
    alone = fine_tune_threshold(f, x, ramp(), 0)
    never = Told(Scripted(lambda share: 0.2 + 0.5 * share))
    found = fine_tune_threshold(f, x, ramp(), 0, judges=[never])
    assert alone.tau > 0.8 and found.tau == 0
    assert found.rpi.max() > 0  # the network's own is as it was


def test_maps_that_share_an_input_are_judged_as_alone():
    case = Case(1, 4)
    judges, c = asked(case), torch.tensor(case.c)
    methods = ("gradcam", "xgradcam")
    maps = torch.cat([attribution_map(case.f, case.x, c, method) for method in methods])
    owner = torch.arange(4).repeat(2)
    together = fine_tune_threshold(case.f, case.x, maps, c.repeat(2), T, owner=owner, judges=judges)
    for n in range(8):
        image = int(owner[n])
        one = slice(image, image + 1)
        alone = fine_tune_threshold(case.f, case.x[one], maps[n : n + 1], c[one], T, judges=judges)
        assert alone.tau == together.tau[n]
        part = together.rows(slice(n, n + 1))
        assert part.best == alone.best and torch.equal(part.mask, alone.mask)
        torch.testing.assert_close(
            part.increases, alone.increases, atol=1e-4, rtol=0, equal_nan=True
        )


def test_judges_that_can_not_be_asked_are_refused():
    case = Case(0, 5)
    c = torch.tensor(case.c)
    maps = attribution_map(case.f, case.x, c, "gradcam")
    case.g.classes = Classes(("v", "w", "x", "y", "z"))
    with pytest.raises(AftError, match="judge other: has none of the 5 classes"):
        fine_tune_threshold(case.f, case.x, maps, c, judges=[Judge("other", case.g)])
    f, x = kept_share(peak(0.7).probability)
    wild = Told(peak(0.7), "wild")
    wild.probabilities = lambda f, x: torch.full((len(x), 2), 3.0)
    with pytest.raises(AftError, match=r"scores in \[0, 1\], and wild gives 3"):
        fine_tune_threshold(f, x, ramp(), 0, judges=[wild])


def test_a_result_says_what_its_own_network_gains():
    case = Case(1, 4)
    c = torch.tensor(case.c)
    maps = attribution_map(case.f, case.x, c, "gradcam")
    found = fine_tune_threshold(case.f, case.x, maps, c, T, judges=asked(case))
    for n, line in enumerate(str(found).splitlines()):
        best = int(found.best[n])
        assert f"tau* = {T[best]:g}: RPI {float(found.rpi[n, best]):.3f}" in line
        assert f"{float(found.probabilities[n, best]):.3f}, " in line
