"""What tests of networks share: factories of layers with members, statistics, parameters."""

from functools import partial

import torch
from torch import nn

from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear

M, B = 3, 4


def factories(**options):
    """For `conv` and `linear`: BatchEnsemble layers of M members."""
    return {
        "conv": partial(BatchEnsembleConv2d, members=M, **options),
        "linear": partial(BatchEnsembleLinear, members=M, **options),
    }


def normal_factories():
    """Such layers, with factors that are no signs."""
    return factories(r_init="normal", s_init="normal")


def with_statistics(net):
    """`net` in evaluation mode, with norms that do something; like-named ones the same."""
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.running_var):
                values.copy_(1 + 0.5 * torch.rand(values.shape))
            for values in (layer.bias.data, layer.running_mean):
                values.copy_(0.3 * torch.randn(values.shape))
    return net.eval()


def count(net):
    return sum(p.numel() for p in net.parameters())
