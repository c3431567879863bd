"""A network whose logits are its parameters: they tell at which weights it was evaluated."""

import torch
from torch import nn

from landscape_fast.nn import FlatLayout

SIZE = 6
ROWS = torch.zeros(4, 1, dtype=torch.float64)
CLASSES = torch.arange(4)


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 2))
        self.second = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.cat([self.first.flatten(), self.second]).expand(len(x), SIZE)


def probes(count):
    """A network, and weights [count, P] for it."""
    networks = [Probe().double() for _ in range(count)]
    return networks[0], FlatLayout(networks[0]).flatten_many(networks)


def parameters(weights):
    """[..., SIZE] without the pads, in the order in which the network shows them."""
    views = FlatLayout(Probe().double()).views(weights)
    return torch.cat([views["first"].flatten(-2), views["second"]], -1)


def seen(logits):
    """[..., SIZE] of logits [..., N, SIZE], whose rows are all the same."""
    assert bool((logits == logits[..., :1, :]).all())
    return logits[..., 0, :]
