"""A training step of layers captured in a CUDA graph."""

import copy

import pytest
import torch
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    BatchEnsembleMultiheadAttention,
    EnsembleBatchNorm2d,
    EnsembleLayerNorm,
)

pytestmark = pytest.mark.gpu
M, B = 4, 16
RANDOM = {"members": M, "r_init": "normal", "s_init": "normal"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        made = {**RANDOM, "batch_first": True}
        self.attention = BatchEnsembleMultiheadAttention(64, 4, **made)
        self.norm = EnsembleLayerNorm(64, M, layout="folded")

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


def linears():
    first = BatchEnsembleLinear(64, 128, activation="relu", **RANDOM)
    return nn.Sequential(first, BatchEnsembleLinear(128, 64, rank=2, **RANDOM)), (M, B, 64)


def convolutions():
    options = {**RANDOM, "layout": "folded", "bias": False}
    layers = [BatchEnsembleConv2d(3, 16, kernel_size=3, padding=1, **options)]
    layers += [EnsembleBatchNorm2d(16, M, layout="folded"), nn.ReLU()]
    layers += [BatchEnsembleConv2d(16, 16, kernel_size=3, stride=2, **options)]
    return nn.Sequential(*layers), (M * B, 3, 16, 16)


def attentions():
    return Attention(), (M * B, 8, 64)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("make", [linears, convolutions, attentions])
def test_a_captured_step_trains_as_an_eager_one(make, amp):
    """Forward, backward and SGD in one graph; three replays with new data do what three eager steps
    do, since nothing in a step depends on the host."""
    torch.manual_seed(0)
    net, shape = make()
    net = net.cuda()
    batches = [torch.randn(shape, device="cuda") for _ in range(3)]
    static = batches[0].clone()

    def train(model, optimizer, x):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()

    def optimizer_of(model):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    start = copy.deepcopy(net.state_dict())
    optimizer = optimizer_of(net)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            train(net, optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.zero_grad(set_to_none=False)
        train(net, optimizer, static)

    net.load_state_dict(start)
    eager = copy.deepcopy(net)
    other = optimizer_of(eager)
    for x in batches:
        static.copy_(x)
        graph.replay()
        other.zero_grad(set_to_none=False)
        train(eager, other, x)
    torch.cuda.synchronize()
    for (key, a), b in zip(net.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")
