"""`compat.torch_uncertainty` against the package's own layers, and against plain loops."""

import pytest
import torch
from compat import peers
from torch import nn

from landscape_fast.compat import torch_uncertainty as ours
from landscape_fast.methods import param_groups
from landscape_fast.nn import FoldedEnsemble, extract_member
from landscape_fast.testing import check_layer

M = 2
F64 = {"dtype": torch.float64}
LAYERS = [
    ("BatchLinear", (5, 7, M), {}, (3 * M, 5)),
    ("BatchLinear", (5, 7, M), {"bias": False}, (3 * M, 5)),
    ("BatchConv1d", (4, 6, 3, M), {"stride": 2, "padding": "valid", "groups": 2}, (2 * M, 4, 9)),
    ("BatchConv2d", (4, 6, 3, M), {"stride": 2, "padding": 1, "dilation": 2}, (2 * M, 4, 9, 8)),
    ("BatchConv2d", (4, 4, (3, 1), M), {"groups": 4, "bias": False}, (2 * M, 4, 9, 8)),
    ("BatchConv2d", (4, 6, 3, M), {"padding": "same"}, (2 * M, 4, 5, 6)),
    (
        "BatchConvTranspose2d",
        (4, 6, 3, M),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        (2 * M, 4, 5, 6),
    ),
]
every_layer = pytest.mark.parametrize("name, arguments, options, shape", LAYERS)


@every_layer
def test_layers_are_those_of_the_package(name, arguments, options, shape):
    """Same names, same values from the same random state, same function and gradients."""
    made = []
    for module in (peers.torch_uncertainty_layers(), ours):
        torch.manual_seed(7)
        made.append(getattr(module, name)(*arguments, **options, **F64))
    one, two = made
    states = one.state_dict(), two.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    peers.assert_equal_runs(one, two, torch.randn(*shape, **F64))


@every_layer
def test_every_row_meets_its_member(name, arguments, options, shape):
    """Whatever the number of rows: spread evenly, also where there are fewer rows than members.

    The package gives rows left over to the first member, and fails with fewer rows than members
    (where there is one row, it returns none).
    """
    layer = getattr(ours, name)(*arguments, **options, **F64)
    members = [layer.member(m) for m in range(M)]
    for rows in (2 * M, 2 * M + 1, 1):
        x = torch.randn(rows, *shape[1:], **F64)
        expected = torch.cat([members[n * M // rows](x[n : n + 1]) for n in range(rows)])
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)
    peer = getattr(peers.torch_uncertainty_layers(), name)(*arguments, **options, **F64)
    peer.load_state_dict(layer.state_dict())
    assert len(peer(torch.randn(1, *shape[1:], **F64))) == 0


@every_layer
def test_contract(name, arguments, options, shape):
    check_layer(getattr(ours, name)(*arguments, **options), torch.randn(*shape))


def test_linear_layers_take_sequences():
    """The package fails for [M*B, L, I]."""
    layer = ours.BatchLinear(5, 7, M)
    x = torch.randn(3 * M, 4, 5)
    expected = torch.stack([layer(x[:, position]) for position in range(4)], 1)
    torch.testing.assert_close(layer(x), expected)
    odd = torch.randn(2 * M + 1, 4, 5)
    expected = torch.stack([layer(odd[:, position]) for position in range(4)], 1)
    torch.testing.assert_close(layer(odd), expected)
    with pytest.raises(RuntimeError):
        peers.torch_uncertainty_layers().BatchLinear(5, 7, M)(x)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_conversion_keeps_weights_and_options(mode):
    """The package draws new weights and pads with zeros."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode)
    sources = [
        (ours.BatchLinear.from_linear, nn.Linear(5, 7), (3 * M, 5)),
        (ours.BatchConv1d.from_conv1d, nn.Conv1d(4, 6, 3, padding=1, padding_mode=mode), (4, 4, 9)),
        (ours.BatchConv2d.from_conv2d, conv, (4, 4, 9, 8)),
        (
            ours.BatchConvTranspose2d.from_conv_transpose2d,
            nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False),
            (4, 4, 5, 6),
        ),
    ]
    for convert, source, shape in sources:
        layer = convert(source, num_estimators=M)
        with torch.no_grad():
            layer.r_group.fill_(1)
            layer.s_group.fill_(1)
        x = torch.randn(*shape)
        torch.testing.assert_close(layer(x), source(x))
        assert (layer.bias is None) == (source.bias is None)


class TestTheChecksOfThePackage:
    """What its tests of these layers assert, on ours."""

    @pytest.mark.parametrize("members", [1, 2])
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear(self, members, bias):
        layer = ours.BatchLinear(6, 2, num_estimators=members, bias=bias)
        assert "num_estimators" in repr(layer)
        assert layer(torch.rand(4, 6)).shape == (4, 2)

    @pytest.mark.parametrize("members", [1, 2])
    @pytest.mark.parametrize("bias", [True, False])
    def test_convolutions(self, members, bias):
        options = {"num_estimators": members, "kernel_size": 1, "bias": bias}
        assert ours.BatchConv1d(6, 2, **options)(torch.rand(5, 6, 3)).shape == (5, 2, 3)
        image = torch.rand(5, 6, 3, 3)  # five rows, two members
        assert ours.BatchConv2d(6, 2, **options)(image).shape == (5, 2, 3, 3)
        assert ours.BatchConvTranspose2d(6, 2, **options)(image).shape == (5, 2, 3, 3)

    def test_attributes_of_converted_layers(self):
        linear = ours.BatchLinear.from_linear(nn.Linear(6, 2), num_estimators=2)
        assert linear.linear.weight.shape == (2, 6) and linear.linear.bias is None
        conv = ours.BatchConv2d.from_conv2d(nn.Conv2d(6, 2, 1), num_estimators=2)
        assert conv.conv.weight.shape == (2, 6, 1, 1) and conv.conv.bias is None
        transposed = nn.ConvTranspose2d(6, 2, 1)
        turned = ours.BatchConvTranspose2d.from_conv_transpose2d(transposed, num_estimators=2)
        assert turned.conv_transpose.weight.shape == (6, 2, 1, 1)
        for layer in (linear, conv, turned):
            assert layer.num_estimators == 2
            assert layer.r_group.shape == (2, 6) and layer.s_group.shape == (2, 2)
            assert layer.bias.shape == (2, 2)


def test_our_tools_know_the_layers():
    model = nn.Sequential(
        ours.BatchConv2d(3, 4, 3, M), nn.ReLU(), nn.Flatten(), ours.BatchLinear(64, 5, M)
    )
    ensemble, x = FoldedEnsemble(model, M), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(extract_member(ensemble, 1)(x), ensemble(x)[1])
    groups = param_groups(model, lr=0.1, weight_decay=1e-3, fast_lr_mult=0.5)
    assert {id(p) for p in groups[1]["params"]} == {
        id(p) for layer in (model[0], model[3]) for p in (layer.r_group, layer.s_group)
    }


def test_errors():
    with pytest.raises(ValueError, match="num_estimators must be an integer of at least 1; got 0"):
        ours.BatchLinear(2, 3, 0)
    with pytest.raises(ValueError, match=r"inputs must be \[M\*B, ..., I\] with I = 2"):
        ours.BatchLinear(2, 3, M)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"inputs must be \[M\*B, I, \*pixels\] with I = 2"):
        ours.BatchConv2d(2, 3, 1, M)(torch.zeros(4, 3, 1, 1))
    with pytest.raises(ValueError, match="i must be an integer from 0 to 1"):
        ours.BatchLinear(2, 3, M).member(2)
