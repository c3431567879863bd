"""The residual network against its definition written out, its published sizes, its members."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.networks import B, M, count, factories, normal_factories, with_statistics
from torch import nn

from landscape_fast.data import digits
from landscape_fast.models import ResNet, resnet20, wrn_28_10
from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    EnsembleBatchNorm2d,
    FoldedEnsemble,
    HyperBatchConv2d,
    HyperBatchLinear,
    HyperBatchNetwork,
    MemberLinear,
    convert_,
    ensemble_layers,
    extract_member,
    to_deep_ensemble,
)
from landscape_fast.testing import check_layer

IMAGE = (2, 8, 8)
VARIANTS = {
    "resnet": {},
    "pad": {"shortcut": "pad"},
    "keras": {"shortcut": "conv", "conv_bias": True},
    "wide": {"order": "pre", "shortcut": "conv"},
    "wide_norm": {"order": "pre", "shortcut": "conv_norm", "conv_bias": True},
    "wide_pad": {"order": "pre", "shortcut": "pad"},
    "preresnet": {"order": "pre", "shortcut": "conv_input"},
}


def small(variant, blocks=2, **options):
    return ResNet(IMAGE, classes=5, blocks=blocks, width=1, **VARIANTS[variant], **options)


def test_published_sizes():
    """He et al. with zero padding; with 1x1 shortcuts and their norms; the Keras example."""
    assert count(resnet20(shortcut="pad")) == 269_722
    assert count(resnet20()) == 272_474  # 272,464 in a public version whose head has no bias
    assert count(resnet20(shortcut="conv", conv_bias=True)) == 273_066
    assert count(wrn_28_10(device="meta")) == 36_479_194


def test_published_sizes_of_batch_ensembles():
    """torch-uncertainty's WRN-28-10 of 4 members has 36,597,932: a bias per member and channel.

    The recipe has no bias in the convolutions, which leaves the factors, M * (I + O) a layer, and
    (M - 1) * 10 biases of the head.
    """
    wide = partial(wrn_28_10, device="meta", **{
        "conv": partial(BatchEnsembleConv2d, members=4),
        "linear": partial(BatchEnsembleLinear, members=4),
    })  # fmt: skip
    assert count(wide(conv_bias=True)) == 36_597_932
    layers = ensemble_layers(wide()).values()
    sizes = [layer.weight.shape[0] + layer.weight.shape[1] for layer in layers]
    assert count(wide()) == 36_479_194 + 4 * sum(sizes) + 3 * 10 == 36_557_548


def conv(layer, x, stride=1):
    return F.conv2d(x, layer.weight, layer.bias, stride, layer.weight.shape[-1] // 2)


def norm(layer, x):
    mean, scale = layer.running_mean, (layer.running_var + 1e-5).rsqrt() * layer.weight
    return (x - mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]


def written_out(net, x, variant):
    options = VARIANTS[variant]
    pre, kind = options.get("order") == "pre", options.get("shortcut", "conv_norm")
    x = conv(net.stem, x)
    x = x if pre else norm(net.norm, x).clamp_min(0)
    for i, block in enumerate(net.blocks):
        stride, channels = 2 if i in (2, 4) else 1, block.conv2.weight.shape[0]
        if pre:
            active = norm(block.norm1, x).clamp_min(0)
            y = norm(block.norm2, conv(block.conv1, active, stride)).clamp_min(0)
            y = conv(block.conv2, y)
        else:
            active = x
            y = norm(block.norm1, conv(block.conv1, x, stride)).clamp_min(0)
            y = norm(block.norm2, conv(block.conv2, y))
        if stride == 1:
            y = y + x
        elif kind == "pad":
            y[:, : x.shape[1]] += x[:, :, ::2, ::2]
            assert y.shape[1] == channels == 2 * x.shape[1]
        else:
            shorter = conv(block.shortcut, x if kind == "conv_input" else active, stride)
            y = y + (norm(block.shortcut_norm, shorter) if kind == "conv_norm" else shorter)
        x = y if pre else y.clamp_min(0)
    x = norm(net.norm, x).clamp_min(0) if pre else x
    return F.linear(x.mean((2, 3)), net.head.weight, net.head.bias)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_is_its_definition(variant):
    net = with_statistics(small(variant, dtype=torch.float64))
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(net(x), written_out(net, x, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_member_is_a_plain_network(variant):
    """With the merged weights of every layer, for a shared batch and for one batch per member."""
    net = with_statistics(small(variant, **normal_factories(), dtype=torch.float64))
    own = torch.randn(M, B, *IMAGE, dtype=torch.float64)
    y_shared, y_own = net(own[0]), net(own)
    assert y_shared.shape == y_own.shape == (M, B, 5)
    for m in range(M):
        plain = with_statistics(small(variant, dtype=torch.float64))
        for name, layer in ensemble_layers(net).items():
            plain.set_submodule(name, layer.member(m))
        torch.testing.assert_close(y_shared[m], plain(own[0]))
        torch.testing.assert_close(y_own[m], plain(own[m]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_comes_from_its_factory(variant):
    """The shortcut, too: with a plain one, members would share a branch that is not theirs."""
    net = small(variant, **normal_factories())
    kinds = {name: type(layer) for name, layer in net.named_modules() if not layer._modules}
    assert nn.Conv2d not in kinds.values() and nn.Linear not in kinds.values()
    convs = [name for name, kind in kinds.items() if kind is BatchEnsembleConv2d]
    shortcuts = [name for name in convs if name.endswith("shortcut")]
    expected = 0 if VARIANTS[variant].get("shortcut") == "pad" else 2
    assert len(convs) == 1 + 12 + expected and len(shortcuts) == expected


@pytest.mark.parametrize("variant", ["resnet", "wide_norm"])
def test_with_norms_of_its_own_a_member_trains_as_a_plain_network(variant):
    """In training mode, too: nothing is shared but the weights."""
    members = normal_factories() | {"norm": partial(EnsembleBatchNorm2d, members=M)}
    net = small(variant, **members, dtype=torch.float64).train()
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    plain = [extract_member(net, m) for m in range(M)]
    y = net(x)
    for m in range(M):
        assert not ensemble_layers(plain[m]) and type(plain[m].norm) is nn.BatchNorm2d
        torch.testing.assert_close(y[m], plain[m](x))
        torch.testing.assert_close(net.norm.running_var[m], plain[m].norm.running_var)


@pytest.mark.parametrize("variant", ["pad", "wide"])
def test_it_comes_apart_into_a_deep_ensemble(variant):
    net = with_statistics(small(variant, **normal_factories(), dtype=torch.float64))
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(to_deep_ensemble(net)(x), net(x))


@pytest.mark.parametrize("variant", ["resnet", "wide"])
def test_hyper_batch_layers_fit_in_as_well(variant):
    """With no second weight they are those of a BatchEnsemble; with one, lambda changes them."""
    hyper = {"conv": partial(HyperBatchConv2d, members=M),
             "linear": partial(HyperBatchLinear, members=M)}  # fmt: skip
    net = with_statistics(small(variant, **hyper, dtype=torch.float64))
    model = HyperBatchNetwork(net, lower=0.1, upper=100.0).double()
    batch = with_statistics(small(variant, **normal_factories(), dtype=torch.float64))
    for name, layer in ensemble_layers(batch).items():
        values = {key: layer.state_dict()[key] for key in ("weight", "r", "s")}
        net.get_submodule(name).load_state_dict(values, strict=False)
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    low, high = (torch.full((M, B, len(model.hyperparameters)), v).double() for v in (0.1, 100.0))
    with_second = [model(x, low), model(x, high)]
    assert not torch.allclose(*with_second)
    for module in net.modules():
        if hasattr(module, "delta"):
            nn.init.zeros_(module.delta)
    torch.testing.assert_close(model(x, high), batch(x))


def test_a_shared_norm_sees_the_rows_of_all_members():
    net = small("resnet", **normal_factories(), dtype=torch.float64).train()
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    net(x)
    rows = net.stem(x).flatten(0, 1)
    torch.testing.assert_close(net.norm.running_mean, 0.1 * rows.mean((0, 2, 3)))


@pytest.mark.parametrize("variant", ["resnet", "pad", "wide"])
@pytest.mark.parametrize("members", [False, True])
def test_contract(variant, members, device):
    """Few blocks and signs keep the values near 1, as the tolerances of the contract assume."""
    torch.manual_seed(1)
    signs = factories(r_init="random_sign", s_init="random_sign")
    net = small(variant, blocks=1, **(signs if members else {}))
    check_layer(with_statistics(net).to(device), torch.randn(B, *IMAGE, device=device))


def test_the_first_layer_gets_the_shared_batch_itself():
    net = small("resnet", **normal_factories())
    seen = []
    net.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(B, *IMAGE)
    net(x)
    assert seen[0] is x


def test_between_the_layers_members_are_views():
    """What a layer with members returns is what the next one reads, unless a norm is between."""
    net = small("wide", **normal_factories()).eval()
    out, into = [], []
    net.stem.register_forward_hook(lambda _, inputs, y: out.append(y))
    net.blocks[0].norm1.register_forward_pre_hook(lambda _, inputs: into.append(inputs[0]))
    net.blocks[0].conv1.register_forward_pre_hook(lambda _, inputs: into.append(inputs[0]))
    net(torch.randn(B, *IMAGE))
    assert into[0].data_ptr() == out[0].data_ptr() and into[0].shape == (M * B, 16, 8, 8)
    assert into[1].shape == (M, B, 16, 8, 8) and into[1].is_contiguous()


@pytest.mark.parametrize("variant", ["resnet", "wide"])
def test_channels_last_is_kept(variant):
    net = small(variant, **normal_factories()).to(memory_format=torch.channels_last).eval()
    seen = []
    for layer in ensemble_layers(net).values():
        if isinstance(layer, BatchEnsembleConv2d):
            layer.register_forward_hook(lambda _, inputs, y: seen.append(y.flatten(0, 1)))
    net(torch.randn(B, *IMAGE).to(memory_format=torch.channels_last))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


@pytest.mark.parametrize("variant", ["resnet", "wide"])
def test_a_converted_network_is_the_one_from_factories(variant):
    """Folded, with the whole batch copied per member in front; and member by member, without."""
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    expected = with_statistics(small(variant, **normal_factories(), dtype=torch.float64))
    for layout in ("member_major", "folded"):
        net = convert_(small(variant, dtype=torch.float64), M, layout=layout)
        with_statistics(net).load_state_dict(expected.state_dict())
        net = FoldedEnsemble(net, M) if layout == "folded" else net
        torch.testing.assert_close(net(x), expected(x))


PARTS = [["head"], ["blocks.5.conv2", "head"], ["blocks.2.shortcut"], ["blocks.4.conv1"]]


@pytest.mark.parametrize("variant", ["resnet", "wide"])
@pytest.mark.parametrize("names", PARTS, ids="+".join)
def test_members_may_begin_anywhere(variant, names):
    """Also inside one branch of a block, whose other branch is then the same for all members."""
    plain = with_statistics(small(variant, dtype=torch.float64))
    x = torch.randn(B, *IMAGE, dtype=torch.float64)
    net = small(variant, dtype=torch.float64)
    net.load_state_dict(plain.state_dict())
    net = convert_(net.eval(), M, include=names, r_init="normal", s_init="normal")
    y = net(x)
    for m in range(M):
        for name in names:
            plain.set_submodule(name, net.get_submodule(name).member(m))
        torch.testing.assert_close(y[m], plain(x))


def test_it_starts_by_he_and_from_one_generator():
    one, two, other = (
        resnet20(generator=torch.Generator().manual_seed(seed), **normal_factories()).state_dict()
        for seed in (0, 0, 1)
    )
    drawn = [k for k in one if k.endswith((".weight", ".r", ".s")) and "norm" not in k]
    assert len(drawn) == 3 * 22
    for key in one:
        assert torch.equal(one[key], two[key])
        assert torch.equal(one[key], other[key]) is (key not in drawn)
    for name, layer in resnet20().named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4000:
            wanted = (2 / layer.weight[0].numel()) ** 0.5
            # the sample deviation of n values is off by 1 / sqrt(2 n), here at most 1.1 %; 4 of it
            assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=0.045), name
            # a normal would go past 2.3 deviations in one of 47 values
            assert float(layer.weight.detach().abs().max()) < 2.28 * wanted
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
    assert (resnet20().head.bias == 0).all()
    head = resnet20(linear=partial(MemberLinear, members=M)).head
    # 1920 numbers, so 4 times 1 / sqrt(2 * 1920)
    assert float(head.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.065)


@pytest.mark.parametrize("variant", ["resnet", "wide"])
def test_dropout_is_between_the_two_convolutions(variant):
    net = small(variant, dropout=0.5)
    assert sum(isinstance(layer, nn.Dropout) and layer.p == 0.5 for layer in net.modules()) == 7
    seen = []
    net.blocks[0].conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.randn(8, *IMAGE))
    assert 0.6 < float((seen[0] == 0).float().mean()) < 0.9  # ReLU and dropout


@pytest.mark.parametrize("variant", ["resnet", "wide"])
def test_members_learn_real_digits(variant):
    """30 steps take every member past 70 % on unseen digits (four seeds: 75 % or more)."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = digits()
    members = factories(r_init="random_sign", s_init="normal")
    net = ResNet((1, 8, 8), blocks=1, **VARIANTS[variant], **members)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(30):
        batch = slice(step * 64 % 1408, step * 64 % 1408 + 64)
        y = data.train_y[batch].repeat(M)
        optimiser.zero_grad()
        F.cross_entropy(net(data.train_x[batch]).flatten(0, 1), y).backward()
        optimiser.step()
    with torch.no_grad():
        labels = net.eval()(data.test_x).argmax(-1)
    assert ((labels == data.test_y).float().mean(1) > 0.7).all()
    assert not torch.equal(labels[0], labels[1])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: ResNet((8, 8)), r"ResNet: image must be the shape \(C, H, W\) of one image; got"),
        (lambda: ResNet(blocks=0), "ResNet: blocks must be an integer of at least 1; got 0"),
        (lambda: ResNet(width=1.5), "ResNet: width must be an integer of at least 1; got 1.5"),
        (lambda: ResNet(order="v2"), r"ResNet: order must be one of \('post', 'pre'\); got 'v2'"),
        (lambda: ResNet(shortcut="A"), r"ResNet: shortcut must be one of \('pad', .*; got 'A'"),
        (lambda: ResNet(dropout=1), r"ResNet: dropout must be a probability in \[0, 1\); got 1"),
        (lambda: ResNet(classes=0), "ResNet: the input shape and classes must be integers"),
        (
            lambda: small("resnet")(torch.zeros(2, 3, 8, 8)),
            r"ResNet: x must be \[B, 2, 8, 8\] or \[M, B, 2, 8, 8\]; got \[2, 3, 8, 8\]",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
