"""The convolutions against plain ones, one member at a time, with weights merged by loops here."""

import copy
import itertools

import pytest
import torch
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleConv1d,
    BatchEnsembleConv2d,
    BatchEnsembleConv3d,
    BatchEnsembleConvTranspose1d,
    BatchEnsembleConvTranspose2d,
    BatchEnsembleConvTranspose3d,
)
from landscape_fast.testing import assert_as_exact, check_layer

M, B, I, O = 3, 2, 4, 6
RANDOM = {"r_init": "normal", "s_init": "normal", "dtype": torch.float64}
PLAIN = {
    BatchEnsembleConv1d: nn.Conv1d,
    BatchEnsembleConv2d: nn.Conv2d,
    BatchEnsembleConv3d: nn.Conv3d,
    BatchEnsembleConvTranspose1d: nn.ConvTranspose1d,
    BatchEnsembleConvTranspose2d: nn.ConvTranspose2d,
    BatchEnsembleConvTranspose3d: nn.ConvTranspose3d,
}
OPTIONS = [
    {},
    {"bias": "shared"},
    {"bias": False},
    {"r": False},
    {"s": False},
    {"r": False, "bias": "shared"},
    {"s": False, "bias": False},
    {"r": False, "s": False},
]


def dims(kind):
    return int(kind.__name__[-2])


def with_biases(layer):
    """Members get different biases, as training would give them."""
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.normal_()
    return layer


def merged(layer, m):
    """The weight of one member, entry by entry."""
    weight, groups = layer.weight.detach().clone(), layer.groups
    transposed = isinstance(layer, tuple(kind for kind in PLAIN if "Transpose" in kind.__name__))
    per_group, others = weight.shape[0] // groups, weight.shape[1]
    for a, b in itertools.product(range(weight.shape[0]), range(others)):
        second = a // per_group * others + b
        o, i = (second, a) if transposed else (a, second)
        if layer.s is not None:
            weight[a, b] *= layer.s[m, o].item()
        if layer.r is not None:
            weight[a, b] *= layer.r[m, i].item()
    return weight


def plain(layer, x, options):
    """[M, B, O, ...] from one plain convolution per member; x [M, B, I, ...]."""
    bias = {"bias": layer.bias is not None, "dtype": torch.float64}
    one = PLAIN[type(layer)](I, O, **options, **bias).requires_grad_(False)
    ys = []
    for m in range(M):
        one.weight.copy_(merged(layer, m))
        if layer.bias is not None:
            one.bias.copy_(layer.bias[m] if layer.bias.ndim == 2 else layer.bias)
        ys.append(one(x[m]))
    return torch.stack(ys)


def check_all_layouts(layer, x, options):
    close = torch.testing.assert_close
    want = plain(layer, x, options)
    close(layer(x), want)
    close(layer(x[0]), plain(layer, x[:1].expand_as(x), options))
    layer.layout = "folded"
    close(layer(x.flatten(0, 1)), want.flatten(0, 1))


CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (4, 2), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate", "groups": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_images(conv, options):
    layer = with_biases(BatchEnsembleConv2d(I, O, members=M, **conv, **options, **RANDOM))
    x = torch.randn(M, B, I, 7, 6, dtype=torch.float64)
    check_all_layouts(layer, x, conv)


def test_conv_gradients():
    """Of the input, the weight, both factors and the bias, by finite differences."""
    layer = with_biases(BatchEnsembleConv2d(2, 4, 2, M, groups=2, **RANDOM))
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    shared = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (shared, *values))
    assert torch.autograd.gradgradcheck(function, (shared, *values))


@pytest.mark.parametrize("layout", ["member_major", "folded", "shared"])
def test_conv_keeps_channels_last(layout):
    shape = {"member_major": (M, B), "folded": (M * B,), "shared": (B,)}[layout]
    x = torch.randn(*shape, 7, 6, I).movedim(-1, -3)
    options = {"padding": 1, "r_init": "normal", "s_init": "normal"}
    options["layout"] = "folded" if layout == "folded" else "member_major"
    layer = BatchEnsembleConv2d(I, O, 3, M, **options)
    y = layer(x)
    images = y if layout == "folded" else y.flatten(0, 1)
    assert images.data_ptr() == y.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)
    again = with_biases(BatchEnsembleConv2d(O, O, 3, M, layout=options["layout"]))(y)
    images = again if layout == "folded" else again.flatten(0, 1)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_shared_image_without_r_is_convolved_once(monkeypatch):
    seen = []
    conv2d = nn.functional.conv2d

    def spy(x, *args):
        seen.append(len(x))
        return conv2d(x, *args)

    monkeypatch.setattr(nn.functional, "conv2d", spy)
    layer = BatchEnsembleConv2d(I, O, 3, M, r=False)
    assert layer(torch.randn(B, I, 5, 5)).shape[:2] == (M, B) and seen == [B]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    """Not worse than plain layers of that dtype with the merged weight in float64 as the truth."""
    layer = with_biases(BatchEnsembleConv2d(I, O, 3, M, r_init="normal", s_init="normal"))
    layer = layer.to(dtype)
    x = torch.randn(M, B, I, 6, 6).to(dtype)
    exact = copy.deepcopy(layer).double()
    truth = torch.stack([exact.member(m)(x[m].double()) for m in range(M)])
    plain = torch.stack([layer.member(m)(x[m]) for m in range(M)])
    assert_as_exact(f"conv in {dtype}", layer(x), plain, truth)


KINDS = [
    (BatchEnsembleConv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    (BatchEnsembleConv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    (BatchEnsembleConv3d, {"kernel_size": (3, 2, 1), "stride": (2, 1, 1), "padding": (1, 0, 1)}),
    (BatchEnsembleConv3d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
    (BatchEnsembleConvTranspose1d, {"kernel_size": 3, "stride": 3, "output_padding": 2}),
    (BatchEnsembleConvTranspose2d, {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}),
    (BatchEnsembleConvTranspose2d, {"kernel_size": 3, "dilation": 2, "output_padding": (1, 0)}),
    (BatchEnsembleConvTranspose3d, {"kernel_size": 2, "stride": (1, 2, 2)}),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind, conv", KINDS, ids=str)
def test_every_kind(kind, conv, groups, options):
    conv = {**conv, "groups": groups}
    layer = with_biases(kind(I, O, members=M, **conv, **options, **RANDOM))
    x = torch.randn(M, B, I, *(5, 6, 4)[: dims(kind)], dtype=torch.float64)
    check_all_layouts(layer, x, conv)
    layer.layout = "member_major"
    for m in range(M):
        torch.testing.assert_close(layer.member(m)(x[m]), layer(x)[m])


@pytest.mark.parametrize("kind", PLAIN)
def test_depthwise(kind):
    layer = kind(I, 2 * I, 3, M, groups=I, **RANDOM)
    x = torch.randn(M, B, I, *(5, 6, 4)[: dims(kind)], dtype=torch.float64)
    for m in range(M):
        torch.testing.assert_close(layer(x)[m], layer.member(m)(x[m]))


@pytest.mark.parametrize("kind", PLAIN)
def test_the_start_is_the_plain_one(kind):
    """The same seed gives the same bits, and every member the same bias."""
    torch.manual_seed(7)
    one = PLAIN[kind](I, O, 3, groups=2)
    torch.manual_seed(7)
    layer = kind(I, O, 3, M, groups=2)
    assert torch.equal(layer.weight, one.weight)
    assert torch.equal(layer.bias, one.bias.expand(M, O))


@pytest.mark.parametrize("kind", PLAIN)
def test_from_a_plain_layer_and_its_state_dict(kind):
    one = PLAIN[kind](I, O, 3, stride=2, padding=1, dilation=2, groups=2).double().eval()
    name = {1: "1d", 2: "2d", 3: "3d"}[dims(kind)]
    stem = "from_conv_transpose" if "Transpose" in kind.__name__ else "from_conv"
    layer = getattr(kind, stem + name)(one, M, bias="shared")
    x = torch.randn(B, I, *(7, 8, 6)[: dims(kind)], dtype=torch.float64)
    want = one(x)
    torch.testing.assert_close(layer(x), want.expand(M, *want.shape))
    assert not layer.training and layer.weight is not one.weight
    other = kind(I, O, 3, M, stride=2, padding=1, dilation=2, groups=2, dtype=torch.float64)
    missing, unexpected = other.load_state_dict(one.state_dict(), strict=False)
    assert (missing, unexpected) == (["r", "s"], [])
    torch.testing.assert_close(other(x), want.expand(M, *want.shape))


@pytest.mark.parametrize("kind, size", [(BatchEnsembleConvTranspose2d, 9),
                                        (BatchEnsembleConvTranspose1d, 10)])  # fmt: skip
def test_a_transposed_convolution_takes_the_wanted_size(kind, size):
    one = PLAIN[kind](I, O, 3, stride=3, padding=1).double()
    stem = "from_conv_transpose" + kind.__name__[-2:]
    layer = getattr(kind, stem)(one, M)
    x = torch.randn(B, I, *(4,) * dims(kind), dtype=torch.float64)
    wanted = (size + 2,) * dims(kind)
    want = one(x, output_size=wanted)
    torch.testing.assert_close(layer(x, wanted), want.expand(M, *want.shape))
    with pytest.raises(ValueError, match=r"output_size must be from \[10.*\] to \[12.*; got \[99"):
        layer(x, (99,) * dims(kind))


@pytest.mark.parametrize("kind", PLAIN)
def test_rank_and_activation(kind):
    layer = with_biases(kind(I, O, 3, M, groups=2, rank=2, activation="relu", **RANDOM))
    nn.init.normal_(layer.s)
    x = torch.randn(M, B, I, *(5, 6, 4)[: dims(kind)], dtype=torch.float64)
    y = layer(x)
    layer.activation = None
    total = layer.bias.view(M, 1, O, *(1,) * dims(kind))
    for k in range(2):
        single = kind(I, O, 3, M, groups=2, bias=False, dtype=torch.float64)
        single.weight = layer.weight
        with torch.no_grad():
            single.r.copy_(layer.r[k])
            single.s.copy_(layer.s[k])
        total = total + single(x)
    torch.testing.assert_close(layer(x), total)
    torch.testing.assert_close(y, total.relu())
    layer.activation = "relu"
    torch.testing.assert_close(layer.member(1)(x[1]), y[1])


LAYERS = [
    (BatchEnsembleConv1d, {"groups": 2}, (B, I, 7)),
    (BatchEnsembleConv3d, {"s": False}, (M, B, I, 4, 5, 4)),
    (BatchEnsembleConvTranspose1d, {"layout": "folded", "stride": 2}, (M * B, I, 7)),
    (BatchEnsembleConvTranspose2d, {"r": False, "bias": "shared"}, (B, I, 5, 6)),
    (BatchEnsembleConvTranspose3d, {"groups": 2}, (M, B, I, 3, 4, 3)),
    (BatchEnsembleConv2d, {"activation": "relu", "rank": 2}, (B, I, 6, 6)),
]


@pytest.mark.parametrize("kind, options, shape", LAYERS, ids=str)
def test_contract(kind, options, shape, device):
    layer = kind(I, O, 3, M, r_init="normal", s_init="normal", device=device, **options)
    check_layer(with_biases(layer), torch.randn(*shape, device=device))


ERRORS = [
    (lambda: BatchEnsembleConv1d(4, 2, (3, 3), 3), "Conv1d: kernel_size must be an integer, at le"),
    (lambda: BatchEnsembleConv3d(4, 2, 3, 3, stride=(1, 2)), "stride must be an integer or three"),
    (
        lambda: BatchEnsembleConvTranspose2d(4, 2, 3, 3, padding_mode="reflect"),
        "padding_mode must be 'zeros', the only one for a transposed convolution; got 'reflect'",
    ),
    (
        lambda: BatchEnsembleConvTranspose2d(4, 2, 3, 3, padding="same"),
        "padding must be numbers for a transposed convolution; got 'same'",
    ),
    (
        lambda: BatchEnsembleConvTranspose1d(4, 2, 3, 3, stride=2, output_padding=2),
        r"output_padding must be smaller than stride or dilation; got \(2,\)",
    ),
    (
        lambda: BatchEnsembleConv2d(4, 2, 3, 3, rank=2, r=False),
        "rank must be 1 where r or s is left out; got 2",
    ),
    (lambda: BatchEnsembleConv2d(4, 2, 3, 3, activation="tanh"), "activation must be None or 'r"),
    (
        lambda: BatchEnsembleConv1d(4, 2, 3, 3)(torch.zeros(2, 3, 9)),
        "batch_ensemble_conv.*: x must",
    ),
    (
        lambda: BatchEnsembleConvTranspose2d(4, 2, 3, 3, layout="folded")(torch.zeros(4, 4, 5, 5)),
        "with a multiple of M = 3 rows; got",
    ),
]


@pytest.mark.parametrize("call, text", ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_repr_says_what_it_is():
    layer = BatchEnsembleConvTranspose2d(4, 6, 3, 2, stride=2, output_padding=1, rank=2)
    assert repr(layer) == (
        "BatchEnsembleConvTranspose2d(4, 6, kernel_size=(3, 3), stride=(2, 2), "
        "output_padding=(1, 1), members=2, bias=True, layout='member_major', r_init=Ones(), "
        "s_init=Ones(), rank=2)"
    )
