"""The layers against plain layers, one member at a time, with weights merged by loops here."""

import copy
import itertools

import pytest
import torch
from torch import nn

from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear, Normal
from landscape_fast.testing import check_layer

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


@pytest.mark.parametrize("layout", ["member_major", "batch_major", "folded"])
def test_rank_k_adds_up_k_outer_products(layout):
    """Against one plain layer per member, whose weight is merged here; also in `member`."""
    layer = with_biases(BatchEnsembleLinear(I, O, M, rank=2, layout=layout, **RANDOM))
    nn.init.normal_(layer.s)
    assert layer.r.shape == (2, M, I) and layer.s.shape == (2, M, O)
    x = torch.randn(M, B, I, dtype=torch.float64)
    want = []
    for m in range(M):
        outer = sum(torch.outer(layer.s[k, m], layer.r[k, m]) for k in range(2))
        want.append(nn.functional.linear(x[m], layer.weight * outer, layer.bias[m]))
        torch.testing.assert_close(layer.member(m)(x[m]), want[m])
    want = torch.stack(want)
    placed = {
        "member_major": lambda t: t,
        "batch_major": lambda t: t.transpose(0, 1),
        "folded": lambda t: t.flatten(0, 1),
    }[layout]
    torch.testing.assert_close(layer(placed(x)), placed(want))
    check_layer(layer.float(), placed(x).float())


def test_rank_k_starts_as_rank_one():
    """All of r is drawn, the first s set; the others wait at zero."""
    one = BatchEnsembleLinear(I, O, M, r_init="normal", s_init="random_sign")
    layer = BatchEnsembleLinear(I, O, M, rank=3, r_init="normal", s_init="random_sign")
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(one, name).copy_(getattr(layer, name))
        one.r.copy_(layer.r[0])
        one.s.copy_(layer.s[0])
    assert not torch.equal(layer.r[0], layer.r[1]) and not layer.s[1:].any()
    x = torch.randn(B, I)
    torch.testing.assert_close(layer(x), one(x))
    assert layer.fast_parameters() == [layer.r, layer.s]


@pytest.mark.parametrize("rank", [1, 2])
def test_the_activation_comes_last_and_once(rank):
    """After the bias and the sum over k; `member` has it, too."""
    layer = BatchEnsembleLinear(I, O, M, rank=rank, activation="relu", **RANDOM)
    with_biases(layer)
    x = torch.randn(M, B, I, dtype=torch.float64)
    y = layer(x)
    layer.activation = None
    torch.testing.assert_close(y, layer(x).relu())
    assert (layer(x) < 0).any()
    layer.activation = "relu"
    for m in range(M):
        assert isinstance(layer.member(m)[1], nn.ReLU)
        torch.testing.assert_close(layer.member(m)(x[m]), y[m])


@pytest.mark.parametrize("options", [*OPTIONS, {"rank": 2}, {"activation": "relu"}], ids=str)
def test_rows_choose_their_members(options):
    """In any order and number; a row with further dimensions is one row."""
    layer = with_biases(BatchEnsembleLinear(I, O, M, layout="folded", **options, **RANDOM))
    index = torch.tensor([2, 0, 0, 2, 2, 0, 2])  # member 1 has none, and M divides not
    for shape in ((7, I), (7, L, I)):
        x = torch.randn(shape, dtype=torch.float64)
        want = torch.stack([layer.member(m)(row) for m, row in zip(index.tolist(), x, strict=True)])
        torch.testing.assert_close(layer(x, index), want)


def test_gradients_reach_the_chosen_members_only():
    layer = BatchEnsembleLinear(I, O, M, layout="folded", **RANDOM)
    index = torch.tensor([2, 0, 0])
    x = torch.randn(3, I, dtype=torch.float64)
    layer(x, index).square().sum().backward()
    got = [p.grad.clone() for p in (layer.weight, layer.r, layer.s, layer.bias)]
    assert not any(g[1].any() for g in got[1:])
    layer.zero_grad()
    rows = torch.stack([x[1], x[2], *[torch.zeros(I).double()] * 2, x[0], torch.zeros(I).double()])
    y = layer(rows)  # two rows per member, of which the zeros are not in the loss
    y[[0, 1, 4]].square().sum().backward()
    for a, p in zip(got, (layer.weight, layer.r, layer.s, layer.bias), strict=True):
        torch.testing.assert_close(a, p.grad)
