"""Each device against the CPU; one that is not there is skipped."""

from functools import partial

import numpy as np
import pytest
import torch

from aftcli import MaskStore, explain
from aftcli.cli.setup import device
from aftcli.core.methods import DEVICES
from aftcli.data.sets import open_data_set
from aftcli.engine.accelerate import accelerated
from aftcli.settings import Search
from aftcli.tft.generate import generate_masks
from tests.helpers.compare import assert_near
from tests.helpers.stored import make_images, small_float

METHODS = ("gradcam", "gradcam++", "layercam", "ablationcam", "scorecam", "integratedgradients")
CLOSE = 1e-4  # of float32 sums in another order


@pytest.fixture(params=DEVICES)
def there(request):
    """A device of this machine."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not present[request.param]:
        pytest.skip(f"this machine has no {request.param}")
    allowed = torch.backends.cudnn.allow_tf32
    yield device(request.param)
    torch.backends.cudnn.allow_tf32 = allowed


def image(seed):
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("engine", ["as it is", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_maps_and_searches_are_those_of_the_cpu(method, engine, there):
    f = small_float().to(there)
    fast = f if engine == "as it is" else accelerated(f, engine, note=pytest.fail)
    for seed in range(2):
        (expected,) = explain(small_float(), image(seed), [method], 1, settings=Search())
        (found,) = explain(fast, image(seed).to(there), [method], 1, settings=Search())
        assert_near(found.attribution.cpu(), expected.attribution, CLOSE)
        # A pixel at a threshold may fall on either side of it: 1 of 1024 in a mask.
        assert_near(found.tft.probabilities.cpu(), expected.tft.probabilities, 0.02)
        assert found.probability == pytest.approx(expected.probability, abs=CLOSE)


def test_bf16_is_close(there, monkeypatch):
    monkeypatch.setattr("aftcli.engine.accelerate.has_bf16", lambda: True)
    f = small_float().to(there)
    lower = accelerated(f, "torch", note=pytest.fail, precision="bf16")
    with torch.no_grad():
        given, expected = lower(image(0).to(there)), small_float()(image(0))
    assert given.dtype == torch.float32
    assert not torch.equal(given.cpu(), expected)
    assert_near(given.cpu(), expected, 0.1)


def test_masks_begun_on_the_cpu_are_finished_on_the_device(there, tmp_path):
    data = open_data_set(make_images(tmp_path / "fruit"), None, small_float().classes)
    run = partial(generate_masks, settings=Search(), block=2, batch=2, workers=0)
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    list(run(small_float(), data, ("gradcam",), whole))
    begun = run(small_float(), data, ("gradcam",), shared)
    for _ in range(4):
        next(begun)
    begun.close()
    first, *_ = run(small_float().to(there), data, ("gradcam",), shared)
    assert 0 < first.images < len(data.samples)
    stores = [MaskStore(run / "masks/small-gradcam.h5") for run in (whole, shared)]
    expected, found = (store.rows(0, len(store)) for store in stores)
    settings = [{**store.settings} for store in stores]
    if there.type != "cpu":
        for own in settings:
            del own["digest"], own["seal"]  # of probabilities, which differ by rounding
    assert settings[1] == settings[0]
    assert np.array_equal(found.label, expected.label)
    assert np.allclose(found.probability, expected.probability, atol=CLOSE)
    for store in stores:
        store.verify()
        store.close()
