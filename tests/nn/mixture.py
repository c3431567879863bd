"""A small network with one of everything, and subspaces of it."""

import torch
from torch import nn

from landscape_fast.nn import Subspace


class Mixture(nn.Module):
    """One of everything: embedding tied to the output, convolution, norms, bias, a scalar."""

    def __init__(self, batch_norm=True):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.GroupNorm(2, 6)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def reset_parameters(self):
        nn.init.normal_(self.scale)

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2)))
        return self.out(self.body(x.tanh().mean(2)) * self.scale)


def token_rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(7, (6, 5), generator=generator), torch.arange(6) % 7


def make(net, coefficients, **options):
    options = {"generator": torch.Generator().manual_seed(2), **options}
    return Subspace(net, coefficients.anchors, coefficients, **options)


def in_order(subspace, values, dim=0):
    """From the order of the subspace to that of the user."""
    back = torch.tensor([subspace.order.index(k) for k in range(len(subspace.order))])
    return values.index_select(dim, back)


def all_anchors(subspace):
    parts = [subspace.anchors.detach()] + ([] if subspace.fixed is None else [subspace.fixed])
    return in_order(subspace, torch.cat(parts))
