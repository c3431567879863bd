"""The residual networks of Wortsman et al. and Garipov et al.: their sizes, and bottlenecks."""

import pytest
import torch
import torch.nn.functional as F
from models.networks import B, M, count, normal_factories, with_statistics
from torch import nn

from landscape_fast.models import ResNet, cresnet20, preresnet, resnet20, resnet50_v2
from landscape_fast.nn import ensemble_layers
from landscape_fast.testing import check_layer

IMAGE = (2, 8, 8)
ORDERS = {
    "pre": {"order": "pre", "shortcut": "conv_input"},
    "post": {"order": "post", "shortcut": "conv_norm"},
}


def small(order, blocks=2, **options):
    options = {"block": "bottleneck", "blocks": blocks, **ORDERS[order], **options}
    return ResNet(IMAGE, 5, width=1, **options)


def bottleneck(inputs, inner):
    """Parameters of a block with its norms, one per channel that a convolution reads."""
    return inputs * inner + 9 * inner**2 + 4 * inner**2 + 2 * (inputs + inner + inner)


def test_published_sizes():
    """[W] has 64 tensors; [G]'s networks of 9 n + 2 layers are written out as sums here."""
    net = cresnet20()
    assert count(net) == 272_464 and len(list(net.parameters())) == 64
    assert sum(p.numel() for p in net.parameters() if p.ndim > 1) == 270_896
    assert count(resnet20()) - count(net) == 10 and net.head.bias is None
    assert count(cresnet20(classes=100)) == 272_464 + 64 * 90
    assert count(preresnet(20)) == 272_282
    for depth, published in ((110, 1_146_842), (164, 1_703_258)):
        blocks, total, channels = (depth - 2) // 9, 3 * 16 * 9, 16
        for inner in (16, 32, 64):
            total += channels * 4 * inner + bottleneck(channels, inner)  # with its shortcut
            channels = 4 * inner
            total += (blocks - 1) * bottleneck(channels, inner)
        total += 2 * 256 + 256 * 10 + 10
        assert count(preresnet(depth, device="meta")) == total == published
    layers = [m for m in preresnet(164, device="meta").modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 164 - 1 + 3  # all but the head, and three shortcuts


def conv(layer, x, stride=1):
    return F.conv2d(x, layer.weight, None, stride, layer.weight.shape[-1] // 2)


def norm(layer, x):
    mean, scale = layer.running_mean, (layer.running_var + 1e-5).rsqrt() * layer.weight
    return (x - mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]


def written_out(net, x, pre):
    """[G]'s order for "pre"; He et al.'s bottleneck for "post"."""
    x = conv(net.stem, x)
    x = x if pre else norm(net.norm, x).relu()
    for i, block in enumerate(net.blocks):
        stride, y = 2 if i in (2, 4) else 1, x
        layers = (
            (block.conv1, block.norm1),
            (block.conv2, block.norm2),
            (block.conv3, block.norm3),
        )
        for j, (layer, its_norm) in enumerate(layers):
            own = stride if j == 1 else 1  # the 3x3 convolution halves the image
            if pre:
                y = conv(layer, norm(its_norm, y).relu(), own)
            else:
                y = norm(its_norm, conv(layer, y, own))
                y = y.relu() if j < 2 else y
        if block.shortcut is not None:
            x = conv(block.shortcut, x, stride)
            x = x if pre else norm(block.shortcut_norm, x)
        x = x + y if pre else (x + y).relu()
    x = norm(net.norm, x).relu() if pre else x
    return F.linear(x.mean((2, 3)), net.head.weight, net.head.bias)


@pytest.mark.parametrize("order", ORDERS)
def test_bottlenecks_are_their_definition(order):
    net = with_statistics(small(order, dtype=torch.float64))
    assert [b.shortcut is not None for b in net.blocks] == [True, False] * 3
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(net(x), written_out(net, x, order == "pre"))


def test_large_stems_and_own_stages_are_their_definition():
    """The pattern of ResNet-50 v2 with one and two blocks: its shortcut reads the first ReLU."""
    sizes = {"blocks": (1, 2), "width": 2, "block": "bottleneck", "stem": "large"}
    net = ResNet((3, 32, 32), 5, order="pre", shortcut="conv", **sizes, dtype=torch.float64)
    net = with_statistics(net)
    x = images = torch.randn(B, 3, 32, 32, dtype=torch.float64)
    x = F.max_pool2d(F.conv2d(x, net.stem.weight, None, 2, 3), 3, 2, 1)
    assert x.shape == (B, 64, 8, 8)
    for block, stride in zip(net.blocks, (1, 2, 1), strict=True):
        first = norm(block.norm1, x).relu()
        y = norm(block.norm2, conv(block.conv1, first)).relu()
        y = norm(block.norm3, conv(block.conv2, y, stride)).relu()
        x = conv(block.shortcut, first, stride) if block.shortcut is not None else x
        x = x + conv(block.conv3, y)
    features = norm(net.norm, x).relu().mean((2, 3))
    assert features.shape == (B, 4 * 64)
    torch.testing.assert_close(net(images), F.linear(features, net.head.weight, net.head.bias))


def test_resnet50_v2_is_the_size_of_its_layers():
    net, total, channels = resnet50_v2(device="meta"), 7 * 7 * 3 * 64, 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        total += channels * 4 * inner + bottleneck(channels, inner)
        channels = 4 * inner
        total += (blocks - 1) * bottleneck(channels, inner)
    assert count(net) == total + 2 * 2048 + 2048 * 1000 + 1000 == 25_549_352
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 50 - 1 + 4


@pytest.mark.parametrize("order", ORDERS)
def test_each_member_is_a_plain_network(order):
    factories = normal_factories()
    net = with_statistics(small(order, **factories, dtype=torch.float64, head_bias=False))
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    y = net(x)
    for m in range(M):
        plain = with_statistics(small(order, dtype=torch.float64, head_bias=False))
        for name, layer in ensemble_layers(net).items():
            plain.set_submodule(name, layer.member(m))
        torch.testing.assert_close(y[m], plain(x))


def test_dropout_is_before_the_last_convolution():
    net = small("pre", dropout=0.5)
    seen = []
    net.blocks[0].conv3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.blocks[0].conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.randn(8, *IMAGE))
    before_conv2, before_conv3 = ((t == 0).float().mean() for t in seen)
    assert before_conv2 < 0.6 < before_conv3 < 0.9  # ReLU alone, and with dropout


@pytest.mark.parametrize("order", ORDERS)
def test_contract(order, device):
    torch.manual_seed(1)
    net = with_statistics(small(order, blocks=1))
    check_layer(net.to(device), torch.randn(B, *IMAGE, device=device))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: ResNet(block="wide"), r"ResNet: block must be one of \('basic', .*; got 'wide'"),
        (
            lambda: preresnet(21),
            "preresnet: depth must be 6 n \\+ 2 below 44, or 9 n \\+ 2 .*; got 21",
        ),
        (lambda: ResNet(blocks=()), "blocks must be a number, or one for each stage; got"),
        (lambda: ResNet(stem="wide"), r"stem must be one of \('small', 'large'\); got 'wide'"),
        (lambda: preresnet(44 + 9 + 1), "preresnet: depth must be .*; got 54"),
        (lambda: preresnet(2), "preresnet: depth must be .*; got 2"),
        (lambda: preresnet(20.0), "preresnet: depth must be .*; got 20.0"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
