"""Users' networks: kinds of heads behind the last convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage.checking import network
from benchmarks.coverage.users.cnn import LAST, C, Net, features


@network(*LAST)
def max_pooling():
    """Global maximum pooling."""
    model = Net()
    model.pool = nn.AdaptiveMaxPool2d(1)
    return model


@network(*LAST)
def gem_pooling():
    """Generalised mean pooling, its exponent learnt."""

    class GeM(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1) * 3)

        def forward(self, x):
            return x.clamp(min=1e-6).pow(self.p).mean((2, 3), keepdim=True).pow(1 / self.p)

    model = Net()
    model.pool = GeM()
    return model


@network(*LAST)
def attention_pooling():
    """Cells are weighted by a softmax over scores of their own."""

    class Attentive(Net):
        def __init__(self):
            super().__init__()
            self.score = nn.Conv2d(12, 1, 1)

        def forward(self, x):
            x = self.features(x)
            weights = self.score(x).flatten(2).softmax(2)
            return self.fc((x.flatten(2) * weights).sum(2))

    return Attentive()


@network("se", *LAST)
def squeeze_and_excitation():
    """Channels are scaled by gates after the last convolution."""

    class SE(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 4), nn.Linear(4, 12)

        def forward(self, x):
            b, c, _, _ = x.size()
            gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
            return x * gate.view(b, c, 1, 1).expand_as(x)

    class Squeezed(Net):
        def __init__(self):
            super().__init__()
            self.se = SE()

        def forward(self, x):
            return self.head(self.se(self.features(x)))

    return Squeezed()


@network("cbam")
def spatial_attention():
    """Cells are scaled by a map that a convolution makes of their mean and maximum."""

    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 7, padding=3)

        def forward(self, x):
            pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
            return x * self.conv(pooled).sigmoid()

    class Attended(Net):
        def __init__(self):
            super().__init__()
            self.cbam = Spatial()

        def forward(self, x):
            return self.head(self.cbam(self.features(x)))

    return Attended()


@network(*LAST)
def pyramid_pooling():
    """Pooled to 1, 2 and 4 cells a side, concatenated."""

    class Pyramid(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12 * 21, C)

        def forward(self, x):
            x = self.features(x)
            return self.fc(
                torch.cat([F.adaptive_avg_pool2d(x, n).flatten(1) for n in (1, 2, 4)], 1)
            )

    return Pyramid()


@network(*LAST, "classifier")
def fully_convolutional():
    """A 1x1 convolution to classes, then pooling."""

    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.classifier = features(), nn.Conv2d(12, C, 1)

        def forward(self, x):
            return self.classifier(self.features(x)).mean([-2, -1])

    return Convolutional()


@network(*LAST, "features")
def vgg_like():
    """All cells are flattened into an MLP."""
    model = nn.Sequential()
    model.add_module("features", features())
    model.add_module("flatten", nn.Flatten())
    model.add_module("mlp", nn.Sequential(nn.Linear(12 * 64, 16), nn.ReLU(True), nn.Linear(16, C)))
    return model


@network(*LAST)
def convolution_over_sequence():
    """Cells in a row pass a Conv1d."""

    class Sequence(Net):
        def __init__(self):
            super().__init__()
            self.along = nn.Conv1d(12, 12, 3, padding=1)

        def forward(self, x):
            return self.fc(F.relu(self.along(self.features(x).flatten(2))).mean(2))

    return Sequence()


@network(*LAST)
def lstm_head():
    """Columns of cells pass an LSTM, its last state a linear layer."""

    class Columns(Net):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(12 * 8, 12, batch_first=True)

        def forward(self, x):
            x = self.features(x).permute(0, 3, 1, 2).flatten(2)
            x, _ = self.lstm(x)
            return self.fc(x[:, -1])

    return Columns()


@network(*LAST)
def attention_head():
    """A learnt query attends over the cells."""

    class Query(Net):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 1, 12))
            self.attend = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x):
            cells = self.features(x).flatten(2).transpose(1, 2)
            pooled, _ = self.attend(self.query.expand(len(x), -1, -1), cells, cells)
            return self.fc(pooled[:, 0])

    return Query()


@network(*LAST)
def bilinear_pooling():
    """Products of all pairs of channels, summed over cells."""

    class Pairs(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(144, C)

        def forward(self, x):
            x = self.features(x).flatten(2)
            pairs = torch.einsum("nip,njp->nij", x, x).flatten(1) / 64
            return self.fc(F.normalize(pairs.sign() * (pairs.abs() + 1e-6).sqrt()))

    return Pairs()


@network(*LAST)
def cosine_classifier():
    """Cosines between features and classes, as in ArcFace."""

    class Cosine(Net):
        def __init__(self):
            super().__init__()
            self.classes = nn.Parameter(torch.randn(C, 12))

        def forward(self, x):
            x = torch.flatten(self.pool(self.features(x)), 1)
            return 8 * F.linear(F.normalize(x), F.normalize(self.classes))

    return Cosine()


@network(*LAST)
def several_heads():
    """The logits are the mean of three heads in a list."""

    class Heads(Net):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(12, C) for _ in range(3))

        def forward(self, x):
            x = self.pool(self.features(x)).flatten(1)
            return torch.stack([head(x) for head in self.heads]).mean(0)

    return Heads()


@network(*LAST)
def dropout_head():
    """Dropout, norm and a hidden layer before the logits."""
    model = Net()
    model.fc = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, C)
    )
    return model
