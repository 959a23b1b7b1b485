"""Users' networks: what a forward does besides calling layers, and weights that are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from benchmarks.coverage.checking import network
from benchmarks.coverage.users.cnn import LAST, C, Net, conv, features


@network(*LAST)
def branch_on_shape():
    """Larger inputs are halved first."""

    class Sized(Net):
        def forward(self, x):
            if x.shape[-1] > 16:
                x = F.avg_pool2d(x, 2)
            return super().forward(x)

    return Sized()


@network(*LAST)
def assert_on_shape():
    """The input's channels and sides are asserted."""

    class Careful(Net):
        def forward(self, x):
            n, c, h, w = x.shape
            assert c == 3, f"3 channels are needed, got {c}"
            assert h == w and h % 8 == 0
            return super().forward(x).view(n, -1)

    return Careful()


@network(*LAST)
def branch_on_values():
    """Inputs that are too large, told by their largest value, are scaled."""

    class Scaled(Net):
        def forward(self, x):
            if x.max() > 1:
                x = x / x.max()
            return super().forward(x)

    return Scaled()


@network(*LAST)
def number_of_a_tensor():
    """A statistic of the input becomes a Python number."""

    class Standardised(Net):
        def forward(self, x):
            return super().forward(x / max(x.std().item(), 1e-3))

    return Standardised()


@network(*LAST)
def index_writes():
    """Channels are normalised by writes into a copy."""

    class Written(Net):
        def forward(self, x):
            x = x.clone()
            for i, (mean, std) in enumerate([(0.1, 1.1), (0.2, 0.9), (0.0, 1.2)]):
                x[:, i] = (x[:, i] - mean) / std
            return super().forward(x)

    return Written()


@network(*LAST)
def index_writes_into_features():
    """Weak cells of the last features are set to zero by a mask."""

    class Muted(Net):
        def forward(self, x):
            x = self.features(x)
            y = x.clone()
            y[y < 0.1] = 0
            return self.head(y)

    return Muted()


@network(*LAST)
def star_args():
    """Forward takes *args and **kwargs."""

    class Open(Net):
        def forward(self, *args, **kwargs):
            return super().forward(args[0])

    return Open()


@network(*LAST)
def optional_arguments():
    """Forward has flags and a mask."""

    class Flags(Net):
        def forward(self, x, mask=None, return_features=False, *, scale=1.0):
            x = self.features(x)
            if mask is not None:
                x = x * mask
            y = self.head(x) * scale
            return (y, x) if return_features else y

    return Flags()


@network(*LAST)
def training_branch():
    """Forward does more in training."""

    class Noisy(Net):
        def forward(self, x):
            if self.training:
                x = x + torch.randn_like(x)
            x = F.dropout(self.features(x), 0.5, self.training)
            return self.head(x)

    return Noisy()


@network(*LAST)
def loop_over_batch():
    """The head runs image by image."""

    class OneByOne(Net):
        def forward(self, x):
            return torch.cat([self.head(each[None]) for each in self.features(x)])

    return OneByOne()


@network(*LAST)
def kept_features():
    """Forward keeps the features as an attribute."""

    class Keeping(Net):
        def forward(self, x):
            self.last = self.features(x)
            return self.head(self.last)

    model = Keeping()
    model(torch.randn(1, 3, 32, 32))
    return model


@network(*LAST)
def no_grad_backbone():
    """The backbone is frozen and runs in torch.no_grad()."""

    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.features.requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                x = self.features(x)
            return self.head(x)

    return Frozen()


def _copied(model):
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    return plain


@network(*LAST, plain=_copied)
def made_in_inference_mode():
    """The network was made in torch.inference_mode()."""
    with torch.inference_mode():
        return Net()


@network(*LAST)
def checkpointed():
    """Features are computed again in the backward pass."""

    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(self.features[:3], x, use_reentrant=False)
            return self.head(checkpoint(self.features[3:], x, use_reentrant=False))

    return Checkpointed()


@network(*LAST)
def with_hooks():
    """Hooks are on it already: one keeps features, one scales them."""
    model = Net()
    kept = []
    model.features[2].register_forward_hook(lambda _m, _i, out: kept.append(out.shape))
    model.features[3].register_forward_hook(lambda _m, _i, out: out * 2)
    return model


@network(*LAST, tolerance=0.02)
def autocast():
    """Forward runs in bfloat16 by autocast."""

    class Auto(Net):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    return Auto()


@network(*LAST)
def own_input_normalisation():
    """Mean and deviation are buffers of the network."""

    class Normalised(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))

        def forward(self, x):
            return super().forward((x - self.mean) / 0.9)

    return Normalised()


@network("block")
def stochastic_depth():
    """A residual branch is left out at random in training."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, padding=1)

        def forward(self, x):
            if self.training and torch.rand(1).item() < 0.5:
                return x
            return x + self.conv(x)

    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.block = Dropped()

        def forward(self, x):
            return self.head(self.block(self.features(x)))

    return Deep()


@network(*LAST)
def old_weight_norm():
    """Weight norm by hooks, as before torch 2."""
    model = Net()
    for layer in (model.features[3], model.fc):
        torch.nn.utils.weight_norm(layer)
    return model


@network(*LAST)
def new_weight_norm():
    """Weight norm as a parametrization."""
    model = Net()
    parametrizations.weight_norm(model.features[3])
    return model


@network(*LAST)
def spectral_norm():
    """Spectral norm of the convolutions and of the linear layer."""
    model = Net()
    for layer in (model.features[0], model.features[3]):
        parametrizations.spectral_norm(layer)
    torch.nn.utils.spectral_norm(model.fc)
    model(torch.randn(2, 3, 32, 32))
    return model


@network(*LAST)
def pruned():
    """Half of the weights are pruned."""
    model = Net()
    prune.l1_unstructured(model.features[3], "weight", 0.5)
    prune.ln_structured(model.fc, "weight", 0.5, n=2, dim=1)
    return model


@network(*LAST)
def parametrized():
    """A weight is a function of another."""

    class Centred(nn.Module):
        def forward(self, w):
            return w - w.mean()

    model = Net()
    parametrize.register_parametrization(model.features[3], "weight", Centred())
    return model


@network(*LAST)
def lazy_and_run():
    """Lazy layers that have seen an input."""
    model = Net()
    model.features[3], model.fc = nn.LazyConv2d(12, 3, 2, 1), nn.LazyLinear(C)
    model(torch.randn(2, 3, 32, 32))
    return model


@network(*LAST, may_refuse=True)
def lazy():
    """Lazy layers that have not seen an input yet."""
    model = Net()
    model.features[3], model.fc = nn.LazyConv2d(12, 3, 2, 1), nn.LazyLinear(C)
    return model


@network("features", *LAST)
def quantisation_stubs():
    """Prepared for quantisation, not converted."""

    class Stubbed(Net):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch.ao.quantization.QuantStub(), nn.Identity()

        def forward(self, x):
            return self.dequant(super().forward(self.quant(x)))

    return Stubbed()


@network(*LAST)
def channels_last():
    """Weights and input in the channels-last memory format."""

    class Last(Net):
        def forward(self, x):
            return super().forward(x.contiguous(memory_format=torch.channels_last))

    return Last().to(memory_format=torch.channels_last)


@network("features.1", "features.1.0", "features.1.1", "features.1.2")
def nested_sequential():
    """Sequentials within sequentials, and nothing else."""
    stages = nn.Sequential(nn.Sequential(*conv(3, 8, 2)), nn.Sequential(*conv(8, 12, 2)))
    model = nn.Sequential()
    model.add_module("features", stages)
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, C)))
    return model


@network(*LAST)
def stages_by_name():
    """Layers are found by getattr and run from a list of names."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.pool, self.fc = (
                features(),
                nn.AdaptiveAvgPool2d(1),
                nn.Linear(12, C),
            )
            self.order = ["features", "pool", "flat", "fc"]

        def flat(self, x):
            return x.reshape(x.shape[0], -1)

        def forward(self, x):
            for name in self.order:
                x = getattr(self, name)(x)
            return x

    return Listed()
