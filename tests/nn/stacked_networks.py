"""Networks for the tests of StackedEnsemble, and M separate ones to hold it against."""

import copy

import torch
from torch import nn

from landscape_fast.models import MLP, VGG, LeNet, MediumCNN, ResNet, SmallCNN
from landscape_fast.nn import ReLUDropout

M, B = 3, 4
SEEDS = [11, 12, 13]


class Own(nn.Module):
    """A parameter of its own in forward, beside layers that have rules."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.last(self.first(x).tanh() * self.scale)


class Part(nn.Module):
    """Such a module as a part of a network: it alone runs member by member."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), Own(), nn.Linear(3, 2))

    def forward(self, x):
        return self.layers(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Tied(nn.Module):
    """One weight under two names, and a module in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.again = self.a.weight, self.c

    def forward(self, x):
        return self.again(self.b(self.c(self.a(x)).tanh()))


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(11, 8), encoder, nn.Flatten(), nn.Linear(40, 3))


def sequence():
    """One of each layer on sequences."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.PReLU(4),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose1d(4, 4, 2, stride=2),
        nn.Conv1d(4, 6, 3, groups=2, stride=2, dilation=2),
        nn.BatchNorm1d(6, momentum=None),
        nn.RMSNorm([6, 6]),
        nn.Dropout1d(0.3),
        nn.LayerNorm(6),
        nn.PReLU(),
        nn.AlphaDropout(0.2),
        nn.InstanceNorm1d(6, affine=True),
        nn.BatchNorm1d(6, affine=False, track_running_stats=False),
    )


def volume():
    """Three dimensions, and what is left of the layers on images."""
    return nn.Sequential(
        nn.Conv3d(2, 3, 3, padding=1),
        nn.BatchNorm3d(3),
        nn.Dropout3d(0.4),
        nn.ReLU(),
        nn.Flatten(1, 2),
        nn.Conv2d(9, 4, 3, padding="same", bias=False),
        nn.Dropout2d(0.3),
        nn.FeatureAlphaDropout(0.2),
        nn.Flatten(),
        ReLUDropout(0.3),
        nn.RReLU(),
        nn.Linear(36, 3, bias=False),
    )


def words():
    return nn.Sequential(nn.Embedding(7, 5, padding_idx=2), nn.Flatten(), nn.Linear(20, 3))


def image(*shape):
    return torch.randn(B, *shape, dtype=torch.float64)


# name -> (how to build, rows)
NETWORKS = {
    "mlp": (lambda: MLP(6, (8, 5), 3, dropout=0.3), lambda: image(6)),
    "smallcnn": (lambda: SmallCNN((1, 8, 8)), lambda: image(1, 8, 8)),
    "smallcnn pool": (lambda: SmallCNN((1, 8, 8), head="pool"), lambda: image(1, 8, 8)),
    "mediumcnn": (lambda: MediumCNN((1, 4, 4)), lambda: image(1, 4, 4)),
    "lenet": (lambda: LeNet((1, 16, 16), dropout=0.2), lambda: image(1, 16, 16)),
    "resnet": (lambda: ResNet((1, 6, 6), blocks=1, dropout=0.2), lambda: image(1, 6, 6)),
    "resnet pad": (lambda: ResNet((1, 4, 4), blocks=1, shortcut="pad"), lambda: image(1, 4, 4)),
    "wide": (
        lambda: ResNet((1, 4, 4), blocks=1, width=2, order="pre", shortcut="conv", conv_bias=True),
        lambda: image(1, 4, 4),
    ),
    "vgg": (
        lambda: VGG((1, 8, 8), stages=((4, 4), (8,)), hidden=(8, 8), norm=nn.BatchNorm2d),
        lambda: image(1, 8, 8),
    ),
    "transformer": (transformer, lambda: torch.randint(11, (B, 5))),
    "own parameter": (Own, lambda: image(6)),
    "part": (Part, lambda: image(6)),
    "lstm": (Recurrent, lambda: image(7, 6)),
    "tied": (Tied, lambda: image(6)),
    "sequence": (sequence, lambda: image(2, 8)),
    "volume": (volume, lambda: image(2, 3, 3, 3)),
    "words": (words, lambda: torch.randint(7, (B, 4))),
}


def networks(build, train, dtype=torch.float64):
    """M networks whose norms have statistics and affine of their own, too."""
    found = [build().to(dtype).train(train) for _ in range(M)]
    with torch.no_grad():
        for network in found:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer))
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def separately(found, x, own=False):
    """Copies of the networks after a run by themselves, and their results [M, B, ...]."""
    found = copy.deepcopy(found)
    results = []
    for m, network in enumerate(found):
        torch.manual_seed(SEEDS[m])
        results.append(network(x[m] if own else x))
    return found, torch.stack(results)
