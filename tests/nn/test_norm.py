"""Norms per member against one plain norm per member, in every layout and mode."""

import copy

import pytest
import torch
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    EnsembleBatchNorm3d,
    EnsembleLayerNorm,
    FoldedEnsemble,
)
from landscape_fast.ops import member_batch_norm
from landscape_fast.testing import check_layer

M, B, F = 3, 5, 4
LAYOUTS = ["member_major", "batch_major", "folded"]
BATCH_NORMS = [
    (EnsembleBatchNorm1d, nn.BatchNorm1d, ()),
    (EnsembleBatchNorm1d, nn.BatchNorm1d, (6,)),
    (EnsembleBatchNorm2d, nn.BatchNorm2d, (3, 4)),
    (EnsembleBatchNorm3d, nn.BatchNorm3d, (2, 3, 2)),
]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def placed(x, layout):
    """[M, B, ...] in the layout, as a tensor of its own."""
    if layout == "batch_major":
        return x.transpose(0, 1).contiguous()
    return x.flatten(0, 1) if layout == "folded" else x


def shifted(*pixels):
    """Every member's input has a mean and a deviation of its own."""
    x = torch.randn(M, B, F, *pixels, dtype=torch.float64)
    column = torch.arange(1.0, M + 1, dtype=torch.float64).view(M, 1, 1, *[1] * len(pixels))
    return x * column + 2 * column


def randomised(layer):
    """The affine is not at its trivial start."""
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, plain, pixels", BATCH_NORMS)
def test_batch_norm_is_one_plain_norm_per_member(kind, plain, pixels, layout, options):
    """Two steps of training with gradients and running statistics, then evaluation."""
    layer = randomised(kind(F, M, layout=layout, **options, dtype=torch.float64))
    plains = [layer.member(m) for m in range(M)]
    assert all(type(one) is plain for one in plains)
    for step in range(3):
        if step == 2:
            layer.eval()
            plains = [one.eval() for one in plains]
        x = shifted(*pixels).requires_grad_()
        incoming = torch.randn_like(x)
        want = torch.stack([one(x[m]) for m, one in enumerate(plains)])
        y = layer(placed(x, layout))
        torch.testing.assert_close(y, placed(want, layout))
        got = torch.autograd.grad(y, [x, *layer.parameters()], placed(incoming, layout))
        own = [p for name in ("weight", "bias") for one in plains
               if (p := getattr(one, name)) is not None]  # fmt: skip
        true = torch.autograd.grad(want, [x, *own], incoming)
        torch.testing.assert_close(got[0], true[0])
        for i, grad in enumerate(got[1:]):
            torch.testing.assert_close(grad, torch.stack(true[1 + i * M : 1 + (i + 1) * M]))
    for name in ("running_mean", "running_var"):
        if options.get("track_running_stats", True):
            want = torch.stack([getattr(one, name) for one in plains])
            torch.testing.assert_close(getattr(layer, name), want)
            assert not torch.allclose(want[0], want[1])
        else:
            assert getattr(layer, name) is None
    if options.get("track_running_stats", True):
        assert layer.num_batches_tracked == plains[0].num_batches_tracked == 2


@pytest.mark.parametrize("layout", ["member_major", "batch_major"])
@pytest.mark.parametrize("kind, plain, pixels", [BATCH_NORMS[0], *BATCH_NORMS[2:]])
def test_batch_norm_of_a_shared_batch(kind, plain, pixels, layout):
    layer = randomised(kind(F, M, layout=layout, dtype=torch.float64))
    x = shifted(*pixels)[0]
    want = torch.stack([layer.member(m)(x) for m in range(M)])
    torch.testing.assert_close(layer(x), placed(want, layout))


@pytest.mark.parametrize("layout", ["member_major", "folded"])
def test_batch_norm_keeps_channels_last(layout):
    layer = EnsembleBatchNorm2d(F, M, layout=layout)
    x = torch.randn(M * B, 3, 4, F).movedim(-1, 1)
    y = layer(x if layout == "folded" else x.unflatten(0, (M, B)))
    images = y if layout == "folded" else y.flatten(0, 1)
    assert images.data_ptr() == y.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_is_one_call_of_the_op(monkeypatch):
    """With what F.batch_norm would be given, in every layout; a shared batch is not copied."""
    calls = []

    def spy(x, *tensors, **options):
        calls.append((x, tensors, options))
        return member_batch_norm(x, *tensors, **options)

    monkeypatch.setattr("landscape_fast.nn.norm.member_batch_norm", spy)
    for layout in LAYOUTS:
        layer = EnsembleBatchNorm1d(F, M, layout=layout, momentum=0.3, eps=0.1)
        x = placed(torch.randn(M, B, F), layout)
        layer(x)
        given, tensors, options = calls.pop()
        own = layer.weight, layer.bias, layer.running_mean, layer.running_var
        assert given is x and all(a is b for a, b in zip(tensors, own, strict=True))
        want = {"training": True, "momentum": 0.3, "eps": 0.1, "layout": layout, "members": M}
        assert options == want
    x = torch.randn(B, F)
    EnsembleBatchNorm1d(F, M)(x)
    assert calls[0][0].data_ptr() == x.data_ptr() and calls[0][0].shape == (M, B, F)


LAYER_NORMS = [{}, {"eps": 0.1}, {"bias": False}, {"elementwise_affine": False}]


@pytest.mark.parametrize("options", LAYER_NORMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, between", [((F,), ()), ((F,), (6,)), ((3, F), (6,)), ((3, F), ())])
def test_layer_norm_is_one_plain_norm_per_member(shape, between, layout, options):
    layer = randomised(EnsembleLayerNorm(shape, M, layout=layout, **options, dtype=torch.float64))
    x = torch.randn(M, B, *between, *shape, dtype=torch.float64) * 3 + 1
    want = torch.stack([layer.member(m)(x[m]) for m in range(M)])
    move = placed
    if layout == "batch_major":

        def move(t, _):
            return t.movedim(0, -1 - len(shape))

    torch.testing.assert_close(layer(move(x, layout)), move(want, layout))
    if layout != "folded" and not between:
        want = torch.stack([layer.member(m)(x[0]) for m in range(M)])
        torch.testing.assert_close(layer(x[0]), move(want, layout))
    assert len(list(layer.parameters())) == len(list(layer.member(0).parameters()))


def sources():
    for kind, plain, pixels in BATCH_NORMS:
        yield plain(F, eps=0.01, momentum=0.2), kind.from_batchnorm, (B, F, *pixels)
        yield plain(F, affine=False), kind.from_batchnorm, (B, F, *pixels)
        yield plain(F, track_running_stats=False), kind.from_batchnorm, (B, F, *pixels)
    yield nn.LayerNorm(F), EnsembleLayerNorm.from_layernorm, (B, F)
    yield nn.LayerNorm((3, F), bias=False), EnsembleLayerNorm.from_layernorm, (B, 3, F)
    yield nn.LayerNorm(F, elementwise_affine=False), EnsembleLayerNorm.from_layernorm, (B, F)


@pytest.mark.parametrize("layout", ["member_major", "folded"])
@pytest.mark.parametrize("plain, convert, shape", list(sources()), ids=lambda v: str(v))
def test_from_a_plain_norm_and_its_state_dict(plain, convert, shape, layout):
    """Options, affine, statistics, dtype, requires_grad and mode; members start equal to it."""
    plain = randomised(plain).double()
    plain(torch.randn(shape, dtype=torch.float64) + 3)
    plain.eval().requires_grad_(False)
    layer = convert(plain, M, layout=layout)
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(shape, dtype=torch.float64)
    want = plain(x)
    every = want.expand(M, *want.shape)
    y = layer(x.expand(M, *shape) if layout == "member_major" else x.repeat(M, *[1] * x.dim())
              .flatten(0, 1))  # fmt: skip
    torch.testing.assert_close(y, every if layout == "member_major" else every.flatten(0, 1))
    torch.testing.assert_close(layer.member(1)(x), want)

    other = convert(type(plain)(**layer._arguments(plain)), M, layout=layout).double().eval()
    for name in ("weight", "bias"):
        if getattr(plain, name) is None:
            setattr(other, name, None)
    given = plain.state_dict()
    shapes = {key: value.shape for key, value in given.items()}
    other.load_state_dict(given)
    assert {key: value.shape for key, value in given.items()} == shapes
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


def test_shared_and_per_member_statistics_differ_as_documented():
    """Under FoldedEnsemble a plain norm pools the rows of all members."""
    conv = BatchEnsembleConv2d(2, F, 1, M, layout="folded", s_init="normal")
    x = torch.randn(B, 2, 4, 4)
    images = conv(x.repeat(M, 1, 1, 1)).unflatten(0, (M, B))
    pooled = FoldedEnsemble(nn.Sequential(conv, nn.BatchNorm2d(F)), M)(x)
    each = FoldedEnsemble(nn.Sequential(conv, EnsembleBatchNorm2d(F, M, layout="folded")), M)(x)
    mean, var = images.mean((0, 1, 3, 4)), images.var((0, 1, 3, 4), correction=0)
    want = (images - mean.view(-1, 1, 1)) * (var + 1e-5).rsqrt().view(-1, 1, 1)
    torch.testing.assert_close(pooled, want)
    mean = images.mean((1, 3, 4), keepdim=True)
    var = images.var((1, 3, 4), correction=0, keepdim=True)
    torch.testing.assert_close(each, (images - mean) * (var + 1e-5).rsqrt())
    assert not torch.allclose(pooled, each, atol=0.1)


def test_update_bn_recomputes_every_member():
    """torch.optim.swa_utils knows the layers: statistics of averaged weights are recomputed."""
    model = nn.Sequential(BatchEnsembleLinear(2, F, M, s_init="normal"), EnsembleBatchNorm1d(F, M))
    data = [torch.randn(B, 2) for _ in range(4)]
    model[1].running_mean.fill_(7)
    torch.optim.swa_utils.update_bn(data, model)
    with torch.no_grad():
        want = torch.stack([model[0](x).mean(1) for x in data]).mean(0)
    torch.testing.assert_close(model[1].running_mean, want)


CONTRACTS = [
    # torch.func does not allow a layer to write its running statistics, of plain norms neither
    (EnsembleBatchNorm1d(F, M, track_running_stats=False), (B, 2)),
    (EnsembleBatchNorm1d(F, M, layout="batch_major").eval(), (B, 2)),
    (EnsembleLayerNorm(F, M), (B, 2)),
    (EnsembleLayerNorm(F, M, layout="folded", bias=False), (M * B, 6, 2)),
    (EnsembleBatchNorm2d(F, M, layout="folded").eval(), (M * B, 2, 4, 4)),
    (EnsembleBatchNorm2d(F, M, affine=False, track_running_stats=False), (B, 2, 4, 4)),
]


@pytest.mark.parametrize("norm, shape", CONTRACTS, ids=str)
def test_contract(norm, shape, device):
    """Behind a layer, as norms are: under autocast they get the low type from it."""
    norm = randomised(copy.deepcopy(norm))
    if isinstance(norm, EnsembleBatchNorm2d):
        first = BatchEnsembleConv2d(2, F, 3, M, layout=norm.layout, bias=False)
    else:
        first = BatchEnsembleLinear(2, F, M, layout=norm.layout, bias=False)
    for p in first.parameters():
        nn.init.normal_(p)
    model = nn.Sequential(first, norm).train(norm.training).to(device)
    check_layer(model, torch.randn(shape, device=device))


ERRORS = [
    (lambda: EnsembleBatchNorm1d(F, 0), "EnsembleBatchNorm1d: members must be an integer of at le"),
    (lambda: EnsembleBatchNorm1d(0, M), "EnsembleBatchNorm1d: num_features must be an integer of"),
    (lambda: EnsembleLayerNorm((3, 0), M), "EnsembleLayerNorm: normalized_shape must be an integ"),
    (lambda: EnsembleLayerNorm(F, M, layout="tabm"), "layout must be 'member_major' or 'batch_maj"),
    (lambda: EnsembleLayerNorm(F, M).member(3), "EnsembleLayerNorm.member: i must be an integer"),
    (lambda: EnsembleBatchNorm2d(F, M).member(-1), "EnsembleBatchNorm2d.member: i must be an int"),
    (
        lambda: EnsembleBatchNorm2d(F, M)(torch.zeros(2, B, F, 3, 3)),
        r"x must be \[M, B, F, H, W\] or \[B, F, H, W\] with M = 3, F = 4; got \[2, 5, 4, 3, 3\]",
    ),
    (
        lambda: EnsembleBatchNorm1d(F, M, layout="batch_major")(torch.zeros(B, 2, F)),
        r"x must be \[B, M, F\] or \[B, M, F, L\] or \[B, F\] with M = 3, F = 4; got \[5, 2, 4\]",
    ),
    (
        lambda: EnsembleBatchNorm2d(F, M, layout="folded")(torch.zeros(4, F, 3, 3)),
        r"EnsembleBatchNorm2d: x must be \[M\*B, F, H, W\] with M = 3, F = 4; got \[4, 4, 3, 3\]",
    ),
    (
        lambda: EnsembleLayerNorm(F, M, layout="folded")(torch.zeros(4, F)),
        r"EnsembleLayerNorm: x must be \[M\*B, ..., 4\] with M = 3; got \[4, 4\]",
    ),
    (
        lambda: EnsembleLayerNorm((3, F), M)(torch.zeros(M, B, F, 3)),
        r"x must be \[M, B, ..., 3, 4\] with M = 3; got \[3, 5, 4, 3\]",
    ),
]


@pytest.mark.parametrize("call, text", ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_bad_sources():
    with pytest.raises(
        TypeError, match="EnsembleBatchNorm1d: layer must be an nn.BatchNorm1d; got"
    ):
        EnsembleBatchNorm1d.from_batchnorm(nn.BatchNorm2d(F), M)
    with pytest.raises(TypeError, match="EnsembleLayerNorm: layer must be an nn.LayerNorm; got"):
        EnsembleLayerNorm.from_layernorm(nn.GroupNorm(2, 4), M)
