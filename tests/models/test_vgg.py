"""VGG against its definition written out, its published size, its members."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.networks import B, M, count, normal_factories
from torch import nn

from landscape_fast.models import VGG, vgg16, vgg19
from landscape_fast.nn import EnsembleBatchNorm2d, ensemble_layers, extract_member
from landscape_fast.testing import check_layer

IMAGE = (2, 7, 8)  # an odd side


def small(**options):
    return VGG(IMAGE, 5, stages=((6, 4), (8,)), hidden=(16, 12), **options)


def test_published_sizes():
    assert count(vgg16(device="meta")) == 15_245_130
    assert count(vgg16(classes=100, device="meta")) == 15_245_130 + 90 * 513
    normed = vgg16(device="meta", norm=nn.BatchNorm2d)
    assert count(normed) == 15_245_130 + 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)
    assert count(vgg19(device="meta")) == 20_554_826
    layers = [m for m in vgg19(device="meta").modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 19
    pair = vgg16(device="meta")
    assert [tuple(layer.weight.shape) for layer in pair.layers] == [(512, 512)] * 2 + [(10, 512)]


@pytest.mark.parametrize("normed", [False, True])
def test_the_network_is_its_definition(normed):
    net = small(dtype=torch.float64, norm=nn.BatchNorm2d if normed else None).eval()
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    y = x
    for stage in net.stages:
        for layer in stage:
            if isinstance(layer, nn.Conv2d):
                y = F.conv2d(y, layer.weight, layer.bias, padding=1)
                y = y if normed else y.relu()
            elif isinstance(layer, nn.BatchNorm2d):
                y = (y / (1 + layer.eps) ** 0.5).relu()  # its first statistics: mean 0, variance 1
        y = F.max_pool2d(F.pad(y, (0, 0, 0, y.shape[2] % 2), value=-torch.inf), 2)
    assert y.shape == (B, 8, 2, 2)
    first, second, head = net.layers
    y = F.linear(y.flatten(1), first.weight, first.bias).relu()
    y = F.linear(F.linear(y, second.weight, second.bias).relu(), head.weight, head.bias)
    torch.testing.assert_close(net(x), y)


def test_each_member_is_a_plain_network():
    net = small(**normal_factories(), dtype=torch.float64).eval()
    own = torch.randn(M, B, *IMAGE, dtype=torch.float64)
    y_shared, y_own = net(own[0]), net(own)
    for m in range(M):
        plain = small(dtype=torch.float64).eval()
        for name, layer in ensemble_layers(net).items():
            plain.set_submodule(name, layer.member(m))
        torch.testing.assert_close(y_shared[m], plain(own[0]))
        torch.testing.assert_close(y_own[m], plain(own[m]))


def test_norms_of_members_are_their_own():
    norm = partial(EnsembleBatchNorm2d, members=M)
    net = small(**normal_factories(), norm=norm, dropout=0.0, dtype=torch.float64).train()
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    plain = [extract_member(net, m) for m in range(M)]
    y = net(x)
    for m in range(M):
        assert not ensemble_layers(plain[m])
        torch.testing.assert_close(y[m], plain[m](x))


def test_dropout_is_before_each_hidden_layer():
    net = small(dropout=0.5)
    seen = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.randn(64, *IMAGE))
    zeros = [float((t == 0).float().mean()) for t in seen]
    assert zeros[0] > 0.4 and zeros[1] > 0.6 > zeros[2]  # ReLU alone halves the last


def test_it_starts_by_he_and_from_one_generator():
    nets = [small(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    one, two, other = (net.state_dict() for net in nets)
    for key, value in one.items():
        assert torch.equal(value, two[key])
        assert torch.equal(value, other[key]) is key.endswith("bias")
    weight = VGG((1, 2, 2), stages=((64, 64),), hidden=(8,)).stages[0][2].weight.detach()
    # the sample deviation of n = 36,864 values is off by 1 / sqrt(2 n), 0.4 %; 4 of it
    assert float(weight.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.015)


@pytest.mark.parametrize("normed", [False, True])
def test_contract(normed, device):
    torch.manual_seed(1)
    net = small(norm=nn.BatchNorm2d if normed else None).eval()
    check_layer(net.to(device), torch.randn(B, *IMAGE, device=device))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: VGG((8, 8)), r"VGG: image must be the shape \(C, H, W\) of one image; got"),
        (lambda: VGG(stages=()), r"VGG: stages must be tuples of channels; got \(\)"),
        (lambda: VGG(stages=((8,), ())), "VGG: stages must be tuples of channels; got"),
        (lambda: VGG(hidden=(0,)), "VGG: a number of channels must be an integer of at least 1; g"),
        (lambda: VGG(dropout=1.0), r"VGG: dropout must be a probability in \[0, 1\); got 1.0"),
        (lambda: small()(torch.zeros(2, 3, 7, 8)), r"VGG: x must be \[B, 2, 7, 8\] or"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
