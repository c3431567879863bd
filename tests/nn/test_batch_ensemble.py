"""The layers against plain layers, one member at a time, with weights merged by loops here."""

import copy
import itertools

import pytest
import torch
from torch import nn

from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear, Normal
from landscape_fast.testing import assert_as_exact, check_layer

M, B, L, I, O = 3, 5, 2, 4, 6
RANDOM = {"r_init": "normal", "s_init": "normal", "dtype": torch.float64}


def test_layers_start_as_the_plain_ones():
    """The same seed gives the bits of nn.Linear and nn.Conv2d, and every member the same bias."""
    pairs = [
        (lambda: nn.Linear(I, O), lambda: BatchEnsembleLinear(I, O, M)),
        (lambda: nn.Conv2d(I, O, 3, groups=2), lambda: BatchEnsembleConv2d(I, O, 3, M, groups=2)),
    ]
    for make_plain, make in pairs:
        torch.manual_seed(7)
        plain = make_plain()
        torch.manual_seed(7)
        layer = make()
        assert torch.equal(layer.weight, plain.weight)
        assert torch.equal(layer.bias, plain.bias.expand(M, O))
        assert torch.equal(layer.r, torch.ones(M, I)) and torch.equal(layer.s, torch.ones(M, O))


def test_a_generator_decides_everything():
    """Two layers from one seed are equal, and torch's global generator is left alone."""
    before = torch.get_rng_state()
    for make in (
        lambda g: BatchEnsembleLinear(I, O, M, generator=g, r_init="normal", s_init="random_sign"),
        lambda g: BatchEnsembleConv2d(I, O, 3, M, generator=g, r_init="random_sign"),
    ):
        one, two = (make(torch.Generator().manual_seed(3)).state_dict() for _ in range(2))
        other = make(torch.Generator().manual_seed(4)).state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert not torch.equal(one["weight"], other["weight"])
        assert not torch.equal(one["r"], other["r"])
    assert torch.equal(before, torch.get_rng_state())


def merged(layer, m):
    """The weight of one member, entry by entry."""
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().clone()
    per_group = weight.shape[0] // groups
    for o, j in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        i = o // per_group * weight.shape[1] + j
        if layer.s is not None:
            weight[o, j] *= layer.s[m, o].item()
        if layer.r is not None:
            weight[o, j] *= layer.r[m, i].item()
    return weight


def bias_of(layer, m):
    if layer.bias is None:
        return None
    return (layer.bias[m] if layer.bias.ndim == 2 else layer.bias).detach()


def plain_linears(layer, x):
    """[M, ..., O] from one nn.functional.linear per member; x [M, ..., I]."""
    linear = nn.functional.linear
    return torch.stack([linear(x[m], merged(layer, m), bias_of(layer, m)) for m in range(M)])


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


def with_biases(layer):
    """Members get different biases, as training would give them."""
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.normal_()
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_is_one_plain_layer_per_member(options):
    layer = with_biases(BatchEnsembleLinear(I, O, M, **options, **RANDOM))
    x = torch.randn(M, B, L, I, dtype=torch.float64)
    want = plain_linears(layer, x)
    close = torch.testing.assert_close
    close(layer(x), want)
    close(layer(x[:, :, 0]), want[:, :, 0])
    close(layer(x[0, :, 0]), plain_linears(layer, x[:1, :, 0].expand(M, B, I)))

    layer.layout = "batch_major"
    close(layer(x[:, :, 0].transpose(0, 1)), want[:, :, 0].transpose(0, 1))
    close(layer(x.permute(1, 2, 0, 3)), want.permute(1, 2, 0, 3))
    shared = plain_linears(layer, x[:1, :, 0].expand(M, B, I))
    close(layer(x[0, :, 0]), shared.transpose(0, 1))

    layer.layout = "folded"
    close(layer(x[:, :, 0].flatten(0, 1)), want[:, :, 0].flatten(0, 1))
    close(layer(x.flatten(0, 1)), want.flatten(0, 1))


def test_linear_gradients_are_those_of_the_merged_layers():
    """Chain rule by hand: G = gradient of the merged weight W * s r^T of each member."""
    layer = with_biases(BatchEnsembleLinear(I, O, M, **RANDOM))
    x = torch.randn(M, B, I, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(M, B, O, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), [x, *layer.parameters()], incoming)
    G = [incoming[m].T @ x[m].detach() for m in range(M)]
    weight, r, s = layer.weight.detach(), layer.r.detach(), layer.s.detach()
    want = [
        torch.stack([incoming[m] @ merged(layer, m) for m in range(M)]),
        sum(torch.outer(s[m], r[m]) * G[m] for m in range(M)),
        torch.stack([(weight * G[m] * s[m][:, None]).sum(0) for m in range(M)]),
        torch.stack([(weight * G[m] * r[m]).sum(1) for m in range(M)]),
        incoming.sum(1),
    ]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


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
def test_conv_is_one_plain_layer_per_member(conv, options):
    layer = with_biases(BatchEnsembleConv2d(I, O, members=M, **conv, **options, **RANDOM))
    x = torch.randn(M, B, I, 7, 6, dtype=torch.float64)

    def plain(x):
        bias = {"bias": layer.bias is not None, "dtype": torch.float64}
        one = nn.Conv2d(I, O, **conv, **bias).requires_grad_(False)
        ys = []
        for m in range(M):
            one.weight.copy_(merged(layer, m))
            if layer.bias is not None:
                one.bias.copy_(bias_of(layer, m))
            ys.append(one(x[m]))
        return torch.stack(ys)

    close = torch.testing.assert_close
    close(layer(x), plain(x))
    close(layer(x[0]), plain(x[:1].expand_as(x)))
    layer.layout = "folded"
    close(layer(x.flatten(0, 1)), plain(x).flatten(0, 1))


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


@pytest.mark.parametrize(
    "layer, x",
    [
        (BatchEnsembleLinear(I, O, M, **RANDOM), torch.randn(M, B, I, dtype=torch.float64)),
        (BatchEnsembleConv2d(I, O, 3, M, **RANDOM), torch.randn(M, B, I, 5, 5).double()),
    ],
    ids=["linear", "conv"],
)
def test_permuting_members_permutes_outputs(layer, x):
    order = torch.tensor([2, 0, 1])
    other = copy.deepcopy(with_biases(layer))
    with torch.no_grad():
        for name in ("r", "s", "bias"):
            getattr(other, name).copy_(getattr(layer, name)[order])
    torch.testing.assert_close(other(x[order]), layer(x)[order])


LAYERS = [
    (BatchEnsembleLinear, (I, O, M), {}, (B, I)),
    (BatchEnsembleLinear, (I, O, M), {"s": False, "bias": "shared"}, (M, B, I)),
    (BatchEnsembleLinear, (I, O, M), {"layout": "batch_major", "bias": False}, (B, M, I)),
    (BatchEnsembleLinear, (I, O, M), {"layout": "folded", "r": False}, (M * B, L, I)),
    (BatchEnsembleConv2d, (I, O, 3, M), {"padding": 1}, (B, I, 6, 6)),
    (BatchEnsembleConv2d, (I, O, 3, M), {"r": False, "groups": 2}, (M, B, I, 6, 6)),
    (
        BatchEnsembleConv2d,
        (I, O, 3, M),
        {"layout": "folded", "padding": "same", "padding_mode": "reflect", "s": False},
        (M * B, I, 6, 6),
    ),
]


@pytest.mark.parametrize("kind, sizes, options, shape", LAYERS, ids=lambda v: str(v))
def test_contract(kind, sizes, options, shape, device):
    layer = kind(*sizes, r_init="normal", s_init="normal", device=device, **options)
    check_layer(with_biases(layer), torch.randn(*shape, device=device))


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


def test_autocast_takes_activations_in_the_low_type():
    """The second layer gets bfloat16 from the first while its parameters are float32."""
    conv = [BatchEnsembleConv2d(I, I, 3, M) for _ in range(2)]
    linear = [BatchEnsembleLinear(I, I, M) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv[1](conv[0](torch.randn(B, I, 7, 7)))
        z = linear[1](linear[0](torch.randn(B, I)))
    assert y.dtype == z.dtype == torch.bfloat16
    assert y.float().std() > 0 and z.float().std() > 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_member_is_a_plain_layer(options):
    for layer, x in (
        (BatchEnsembleLinear(I, O, M, **options, **RANDOM), torch.randn(M, B, I)),
        (
            BatchEnsembleConv2d(I, O, 3, M, 2, 1, groups=2, **options, **RANDOM),
            torch.randn(M, B, I, 5, 5),
        ),
    ):
        with_biases(layer).eval()
        layer.weight.requires_grad_(False)
        x = x.double()
        y = layer(x)
        for m in range(M):
            one = layer.member(m)
            assert type(one) in (nn.Linear, nn.Conv2d)
            assert not one.training and not one.weight.requires_grad
            torch.testing.assert_close(one(x[m]), y[m])
            with torch.no_grad():
                for p in one.parameters():
                    p.zero_()
        assert torch.equal(layer(x), y)  # the members were copies


def sources():
    reflect = {"padding": 1, "padding_mode": "reflect", "groups": 2, "stride": 2}
    yield nn.Linear(I, O), BatchEnsembleLinear.from_linear, (B, I)
    yield nn.Linear(I, O, bias=False), BatchEnsembleLinear.from_linear, (B, I)
    yield nn.Conv2d(I, O, 3, **reflect), BatchEnsembleConv2d.from_conv2d, (B, I, 6, 6)
    yield nn.Conv2d(I, O, 3, bias=False), BatchEnsembleConv2d.from_conv2d, (B, I, 6, 6)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bias", [True, "shared"])
def test_from_a_plain_layer_keeps_what_it_is(bias, tie):
    for plain, convert, shape in sources():
        plain = plain.to(torch.float64).eval()
        plain.weight.requires_grad_(False)
        before = torch.get_rng_state()
        layer = convert(plain, M, bias=bias, tie=tie)
        assert torch.equal(before, torch.get_rng_state())  # ones need no random numbers
        assert not layer.training and not layer.weight.requires_grad and layer.r.requires_grad
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        assert (layer.bias is None) == (plain.bias is None)
        assert (layer.weight is plain.weight) == tie
        x = torch.randn(*shape, dtype=torch.float64)
        want = plain(x)
        torch.testing.assert_close(layer(x), want.expand(M, *want.shape))
        with torch.no_grad():
            layer.weight.zero_()
        assert torch.equal(plain(x), want) != tie


def test_a_plain_state_dict_loads():
    """As a pretrained start: its bias for all members, the factors as they are."""
    for plain, convert, shape in sources():
        layer = convert(copy.deepcopy(plain), M, r_init=Normal())
        nn.init.zeros_(layer.weight)
        r = layer.r.clone()
        given = plain.state_dict()
        keys = list(given)
        missing, unexpected = layer.load_state_dict(given, strict=False)
        assert (missing, unexpected) == (["r", "s"], [])
        assert keys == list(given) and all(
            given[k].shape == plain.state_dict()[k].shape for k in given
        )
        nn.init.ones_(layer.r)
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x)[1], plain(x))
        assert r.std() > 0
        with pytest.raises(RuntimeError, match='Missing key.*"r", "s"'):
            layer.load_state_dict(given)


def test_meta_device_then_real():
    for make, shape in (
        (lambda **d: BatchEnsembleLinear(I, O, M, s_init="random_sign", **d), (B, I)),
        (lambda **d: BatchEnsembleConv2d(I, O, 3, M, s_init="random_sign", **d), (B, I, 5, 5)),
    ):
        before = torch.get_rng_state()
        layer = make(device="meta")
        assert torch.equal(before, torch.get_rng_state())
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters(torch.Generator().manual_seed(1))
        real = make(generator=torch.Generator().manual_seed(1))
        x = torch.randn(shape)
        assert torch.equal(layer(x), real(x))


def test_repr_says_what_it_is():
    assert repr(BatchEnsembleLinear(4, 6, 3, "shared", s=False, r_init="random_sign")) == (
        "BatchEnsembleLinear(in_features=4, out_features=6, members=3, bias='shared', "
        "layout='member_major', r_init=RandomSign(p=0.5, chunks=None), s=False)"
    )
    assert repr(BatchEnsembleConv2d(4, 6, 3, 2, padding=1, padding_mode="circular")) == (
        "BatchEnsembleConv2d(4, 6, kernel_size=(3, 3), padding=(1, 1), padding_mode='circular', "
        "members=2, bias=True, layout='member_major', r_init=Ones(), s_init=Ones())"
    )
