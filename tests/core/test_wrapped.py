"""Networks inside others: of several processes, compiled, of Lightning, of which only one runs."""

import pytest
import torch
from torch import distributed, nn

from aftcli.core.classes import Preprocessing
from aftcli.core.classifier import cut_classifier
from aftcli.errors import AftError

PREPROCESSING = Preprocessing(size=(32, 32), resize=36)


def plain():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Detached:
    """Lightning's properties that raise where no trainer is attached, by a look-alike."""

    @property
    def trainer(self):
        raise RuntimeError("is not attached to a Trainer")


class LightningModule(Detached, nn.Module):
    """A network in a module whose forward only calls it, with what training needs beside it."""

    def __init__(self, model, attribute):
        super().__init__()
        setattr(self, attribute, model)
        self.attribute = attribute
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
        self._hparams, self._trainer = {"lr": 0.1}, None

    def forward(self, x):
        return getattr(self, self.attribute)(x)

    def training_step(self, batch, index):
        x, labels = batch
        return self.criterion(self(x), labels)


def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attribute", ["model", "net", "backbone"])
def test_a_module_of_lightning_is_cut_as_it_is(attribute):
    module = LightningModule(plain(), attribute)
    f = cut_classifier(module, preprocessing=PREPROCESSING)
    assert f.layer_name == f"{attribute}.0+{attribute}.1"
    assert torch.equal(f(x()), plain()(x()))
    assert f.linear_head and f.linear_head.is_last


def test_a_network_of_several_processes_is_the_one_inside():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(plain()))
        f = cut_classifier(wrapped, preprocessing=PREPROCESSING)
    finally:
        distributed.destroy_process_group()
    assert f.layer_name == "0+1" and f.name == "Sequential"
    assert torch.equal(f(x()), plain()(x()))


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "FSDPModule"])
def test_shards_of_a_network_are_refused(name):
    """FSDP needs processes and accelerators; its classes are known by their names."""
    sharded = type(name, (nn.Sequential,), {})
    for model in (sharded(plain()), nn.Sequential(sharded(*plain()[:2]), *plain()[2:])):
        with pytest.raises(
            AftError, match=r"several processes \(FSDP\).* gather them .*full_state"
        ):
            cut_classifier(model, preprocessing=PREPROCESSING)
