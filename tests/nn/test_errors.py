"""What the layers and their functions say about bad options and bad input."""

import pytest
import torch
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    batch_ensemble_conv2d,
    split_members,
    tile_members,
)


def linear(*args, **options):
    return lambda: BatchEnsembleLinear(*args, **options)


def conv(*args, **options):
    return lambda: BatchEnsembleConv2d(*args, **options)


@pytest.mark.parametrize(
    "make, text",
    [
        (linear(4, 2, 0), "BatchEnsembleLinear: members must be an integer of at least 1; got 0"),
        (linear(4, 2, True), "members must be an integer of at least 1; got True"),
        (linear(0, 2, 3), "BatchEnsembleLinear: in_features must be an integer of at least 1"),
        (linear(4, 2.0, 3), "out_features must be an integer of at least 1; got 2.0"),
        (linear(4, 2, 3, None), r"bias must be True \(one per member\), 'shared' or False; got No"),
        (linear(4, 2, 3, "both"), "bias must be True .* got 'both'"),
        (linear(4, 2, 3, r=1), "BatchEnsembleLinear: r must be True or False; got 1"),
        (
            linear(4, 2, 3, "shared", r=False, s=False),
            "r, s or bias must be True, per member; got r=False, s=False, bias='shared'; use",
        ),
        (linear(4, 2, 3, layout="tabm"), "layout must be 'member_major' or 'batch_major' or"),
        (conv(4, 2, 3, 3, layout="batch_major"), "layout must be 'member_major' or 'folded'; got"),
        (conv(4, 2, 3, -1), "BatchEnsembleConv2d: members must be an integer of at least 1"),
        (conv(0, 2, 3, 3), "BatchEnsembleConv2d: in_channels must be an integer of at least 1"),
        (conv(4, 2, (3, 3, 3), 3), "kernel_size must be an integer or two, at least 1; got"),
        (conv(4, 2, 3, 3, stride=0), "stride must be an integer or two, at least 1; got 0"),
        (conv(4, 2, 3, 3, padding=-1), "padding must be an integer or two, at least 0; got -1"),
        (
            conv(4, 2, 3, 3, padding="full"),
            "padding must be 'same', 'valid' or numbers; got 'full'",
        ),
        (
            conv(4, 2, 3, 3, stride=2, padding="same"),
            r"stride must be 1 with padding 'same'; got \(2, 2\)",
        ),
        (conv(4, 2, 3, 3, dilation=(1, 0)), "dilation must be an integer or two, at least 1"),
        (
            conv(4, 6, 3, 3, groups=3),
            "groups must be a divisor of in_channels = 4 and out_channels",
        ),
        (conv(4, 2, 3, 3, groups=0), "groups must be an integer of at least 1; got 0"),
        (conv(4, 2, 3, 3, padding_mode="same"), "padding_mode must be one of 'zeros', 'reflect'"),
    ],
)
def test_bad_options(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    "convert, layer, options, error, text",
    [
        (
            BatchEnsembleLinear.from_linear,
            nn.Conv2d(1, 1, 1),
            {},
            TypeError,
            "layer must be an nn.L",
        ),
        (
            BatchEnsembleConv2d.from_conv2d,
            nn.Linear(1, 1),
            {},
            TypeError,
            "layer must be an nn.Conv",
        ),
        (
            BatchEnsembleLinear.from_linear,
            nn.LazyLinear(3),
            {},
            ValueError,
            "layer must be initialised; got LazyLinear; run one batch through it first",
        ),
        (
            BatchEnsembleLinear.from_linear,
            nn.Linear(2, 3),
            {"bias": False},
            ValueError,
            "BatchEnsembleLinear: bias must be True or 'shared'; got False",
        ),
        (
            BatchEnsembleLinear.from_linear,
            nn.Linear(2, 3, bias=False),
            {"r": False, "s": False},
            ValueError,
            "r, s or bias must be True, per member",
        ),
    ],
)
def test_bad_sources(convert, layer, options, error, text):
    with pytest.raises(error, match=text):
        convert(layer, 2, **options)


@pytest.mark.parametrize("i", [-1, 3, 1.0])
def test_bad_member(i):
    for layer in (BatchEnsembleLinear(4, 2, 3), BatchEnsembleConv2d(4, 2, 1, 3)):
        with pytest.raises(ValueError, match="member: i must be an integer from 0 to 2; got"):
            layer.member(i)


@pytest.mark.parametrize(
    "layer, shape, text",
    [
        (BatchEnsembleLinear(4, 2, 3), (4,), r"x must be \[..., I\] with I = 4 and at least 2 dim"),
        (BatchEnsembleLinear(4, 2, 3), (5, 3), r"BatchEnsembleLinear: x must be .* got \[5, 3\]"),
        (BatchEnsembleLinear(4, 2, 3), (2, 5, 4), "batch_ensemble_linear: "),
        (BatchEnsembleLinear(4, 2, 3, layout="batch_major"), (5, 2, 4), "batch_ensemble_linear: "),
        (BatchEnsembleLinear(4, 2, 3, layout="folded"), (5, 4), "batch_ensemble_linear: "),
        (BatchEnsembleConv2d(4, 2, 3, 3), (4, 5, 5), r"x must be \[M, B, I, H, W\] with M = 3, I"),
        (
            BatchEnsembleConv2d(4, 2, 3, 3),
            (6, 3, 5, 5),
            r"x must be \[B, I, H, W\] with I = 4; got",
        ),
        (
            BatchEnsembleConv2d(4, 2, 3, 3),
            (2, 6, 4, 5, 5),
            r"with M = 3, I = 4; got \[2, 6, 4, 5, 5\]",
        ),
        (
            BatchEnsembleConv2d(4, 2, 3, 3, layout="folded"),
            (8, 4, 5, 5),
            r"with a multiple of M = 3 rows; got \[8, 4, 5, 5\]; drop or pad the last rows",
        ),
        (
            BatchEnsembleConv2d(4, 2, 3, 3, layout="folded"),
            (3, 2, 4, 5, 5),
            r"x must be \[M\*B, I, H, W\] with I = 4; got",
        ),
    ],
)
def test_bad_input(layer, shape, text):
    with pytest.raises(ValueError, match=text):
        layer(torch.randn(shape))


def test_bad_dtype_and_type():
    layer = BatchEnsembleConv2d(4, 2, 3, 3)
    with pytest.raises(ValueError, match="x must be of the dtype of weight, float32; got float64"):
        layer(torch.randn(2, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="batch_ensemble_conv2d: x must be a Tensor; got list"):
        layer([[1.0]])
    with pytest.raises(TypeError, match="batch_ensemble_conv2d: weight must be a Tensor; got None"):
        batch_ensemble_conv2d(torch.zeros(1, 1, 2, 2), None)
    with pytest.raises(ValueError, match="x must be on the device of weight, cpu; got meta"):
        layer(torch.empty(2, 4, 5, 5, device="meta"))


def test_the_function_must_be_told_the_members():
    x, weight = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
    text = r"r, s or bias must be a tensor with a row per member where x has no .* \[2, 4, 5, 5\]"
    with pytest.raises(ValueError, match=text):
        batch_ensemble_conv2d(x, weight, bias=torch.zeros(6))
    assert batch_ensemble_conv2d(x[None], weight).shape == (1, 2, 6, 3, 3)
    with pytest.raises(ValueError, match="r, s, bias or x must be of at least one member; got 0"):
        batch_ensemble_conv2d(x, weight, r=torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"s must be \[M, O\] with M = 3, O = 6; got \[2, 6\]"):
        batch_ensemble_conv2d(x, weight, r=torch.zeros(3, 4), s=torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"bias must be \[O\] with O = 6; got \[5\]"):
        batch_ensemble_conv2d(x, weight, r=torch.zeros(3, 4), bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"bias must be \[M, O\] with M = 3, O = 6; got \[3, 1\]"):
        batch_ensemble_conv2d(x, weight, r=torch.zeros(3, 4), bias=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="groups must be a divisor of O = 6; got 4"):
        batch_ensemble_conv2d(torch.zeros(2, 16, 5, 5), weight, r=torch.zeros(3, 16), groups=4)


def test_tiling_and_splitting_are_inverse():
    x = torch.randn(2, 3, 4)
    tiled = tile_members(x, 5)
    assert torch.equal(split_members(tiled, 5), x.expand(5, 2, 3, 4))
    assert split_members(torch.empty(0, 7), 3).shape == (3, 0, 7)
    with pytest.raises(ValueError, match=r"split_members: y must be \[M\*B, ...\] with M = 3; got"):
        split_members(tiled, 3)
    with pytest.raises(ValueError, match="tile_members: members must be an integer of at least 1"):
        tile_members(x, 0)
    with pytest.raises(ValueError, match=r"tile_members: x must be \[B, ...\]; got \[\]"):
        tile_members(torch.tensor(1.0), 2)
