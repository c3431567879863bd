"""The convolution kernels in tiles small enough for many, and how their configurations are chosen.

The interpreter runs the code that GPUs run, at sizes where all loops, splits and edges occur.
"""

import pytest
import torch
from ops.problem import assert_held

pytest.importorskip("triton")

from landscape_fast.kernels import batch_ensemble_conv2d as forward
from landscape_fast.kernels import batch_ensemble_conv2d_backward as backward
from landscape_fast.kernels import batch_ensemble_conv2d_tiles as tiles
from landscape_fast.kernels._launch import INTERPRETED, Config
from landscape_fast.ops._batch_ensemble_conv2d_fused import backward_op, forward_op
from landscape_fast.ops.batch_ensemble_conv2d import (
    batch_ensemble_conv2d,
    batch_ensemble_conv2d_reference,
)
from landscape_fast.testing import check_op, check_registered, fenced

M, B, I, O, H, W = 2, 2, 5, 18, 5, 4


def inputs(I=I, O=O, kernel=(3, 3), shared=False, device="cpu"):
    x = torch.randn(*(() if shared else (M,)), B, H, W, I).movedim(-1, -3)
    shapes = ((O, I, *kernel), (M, I), (M, O), (M, O))
    return [t.to(device) for t in (x, *[torch.randn(shape) for shape in shapes])]


@pytest.fixture
def small(monkeypatch):
    """Every launch takes tiles of 16, so that there are several of each kind."""

    def config(arch, stage, kind, columns, summed):
        column = "BLOCK_I" if stage == "x" else "BLOCK_O"
        return Config({"BLOCK_P": 16, column: 16, "BLOCK_K": 16}, num_warps=4, num_stages=2)

    monkeypatch.setattr(tiles, "config", config)


CASES = [  # options, channels, whether the members share x
    ({"padding": 1}, (3, 18), False),
    ({"padding": 1}, (20, 5), True),
    ({"stride": 2, "padding": (1, 2)}, (20, 5), False),
    ({"stride": (3, 1), "dilation": (1, 2), "padding": (2, 1)}, (16, 16), True),
]


@pytest.mark.parametrize("options, channels, shared", CASES, ids=str)
def test_small_tiles(options, channels, shared, small, device):
    """Ragged pixels and channels; few channels share a step, many are cut; NaN all around."""
    arguments = inputs(*channels, shared=shared, device=device)
    check_op(
        batch_ensemble_conv2d,
        batch_ensemble_conv2d_reference,
        arguments,
        backend="triton",
        **options,
    )


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (1, 5)], ids=str)
def test_kernel_sizes_in_half_precision(kernel, small, device):
    check_op(
        batch_ensemble_conv2d,
        batch_ensemble_conv2d_reference,
        inputs(kernel=kernel, device=device),
        backend="triton",
        dtype=torch.float16,
        padding="same",
    )


@pytest.mark.parametrize("stage", tiles.STAGES)
@pytest.mark.parametrize("width", ["thin", 16, 32, 64, 128])
def test_shipped_configurations(stage, width, device):
    """As on a GPU, in float16; their float32 kinds are the same code with other sizes."""
    config = tiles.SHIPPED[90, f"{stage} half {width}"]
    x, weight, r, s, bias = [t.half() for t in inputs(19, 21, device=device)]
    dy = torch.randn(M, B, 21, H, W, device=device).half()
    packed = weight.permute(0, 2, 3, 1).contiguous()
    options = ((1, 1), (1, 1), (1, 1))
    wide = [t.double().requires_grad_() for t in (x, weight, r, s, bias)]
    truth = batch_ensemble_conv2d_reference(*wide, padding=1)
    dx, dweight, dr, ds, db = torch.autograd.grad(truth, wide, dy.double())
    if stage == "fwd":
        y = torch.empty_like(dy)
        forward.batch_ensemble_conv2d_fwd(
            x, packed, r, s, bias, y, *options, False, False, config=config
        )
        torch.testing.assert_close(y.double(), truth, atol=0.2, rtol=0.01)  # 16-bit x * r
        return
    float32 = {"dtype": torch.float32, "device": device}
    shapes = ((21, 3, 3, 19), (M, 19), (M, 21), (M, 21))
    outputs = [torch.empty_like(x), *[torch.empty(shape, **float32) for shape in shapes]]
    wanted = [outputs[0], *[None] * 4] if stage == "x" else [None, *outputs[1:]]
    tensors = (fenced(dy), fenced(x), packed, r, s, *wanted)
    configs = {"x_config": config, "weight_config": config}
    backward.batch_ensemble_conv2d_bwd(*tensors, *options, False, **configs)
    if stage == "x":
        torch.testing.assert_close(outputs[0].double(), dx, atol=0.2, rtol=0.01)
        return
    expected = (dweight.permute(0, 2, 3, 1), dr, ds, db)
    for a, b in zip(outputs[1:], expected, strict=True):
        assert_held(a, b)


def backward_inputs(device, shared=False):
    x, weight, r, s, _ = inputs(shared=shared, device=device)
    x = x.unsqueeze(0) if shared else x
    dy = torch.randn(M, B, O, H, W, device=device)
    return (dy, x, weight.permute(0, 2, 3, 1).contiguous(), r, s)


def config(**blocks):
    return Config(blocks, num_warps=4, num_stages=2)


@pytest.mark.parametrize("split", [(2, 16, 3), (1, 16, 6), (2, 48, 1)], ids=str)
def test_any_split_gives_the_same_sums(split, device):
    tensors = backward_inputs(device)
    outputs = [t.new_empty(t.shape) for t in tensors[2:]] + [tensors[0].new_empty(M, O)]
    backward.batch_ensemble_conv2d_bwd(
        *tensors, None, *outputs, (1, 1), (1, 1), (1, 1), False,
        weight_config=config(BLOCK_K=16, BLOCK_O=16, BLOCK_P=16), split=tiles.Split(*split),
    )  # fmt: skip
    dy, x, weight, r, s = (t.double() for t in tensors)
    wide = [weight.permute(0, 3, 1, 2), r, s, torch.zeros_like(s)]
    wide = [t.requires_grad_() for t in wide]
    truth = batch_ensemble_conv2d_reference(x, *wide, padding=1)
    dweight, *rest = torch.autograd.grad(truth, wide, dy)
    expected = (dweight.permute(0, 2, 3, 1), *rest)
    for a, b in zip(outputs, expected, strict=True):
        assert_held(a, b)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no sparse files")
@pytest.mark.parametrize("stride", [(2**29 + 8, 2, 1), (4, 2**30 + 4, 1)], ids=["channels", "rows"])
def test_offsets_beyond_32_bits(stride, tmp_path):
    """Images whose channels or rows lie 2**31 elements apart, read and written."""
    size = (1, 1, 5, 2, 2) if stride[0] > 4 else (1, 1, 1, 3, 2)
    C, far = size[2], []
    for name in ("x", "dy", "y", "dx"):  # pages of the files come on demand
        big = torch.from_file(str(tmp_path / name), shared=True, size=2**31 + 200)
        far.append(big.as_strided(size, (0, 0, *stride)).copy_(torch.randn(size)))
    near = [t.contiguous() for t in far]
    weight, r, s = torch.randn(C, 3, 3, C), torch.randn(1, C), torch.randn(1, C)
    options = ((1, 1), (1, 1), (1, 1))
    found = []
    for x, dy, y, dx in (far, near):
        forward.batch_ensemble_conv2d_fwd(x, weight, r, s, None, y, *options, False, False)
        outputs = [t.new_empty(t.shape) for t in (weight, r, s)]
        wanted = (dx, *outputs, None)
        backward.batch_ensemble_conv2d_bwd(dy, x, weight, r, s, *wanted, *options, False)
        found.append([y, dx, *outputs])
    assert all(map(torch.equal, *found))


def test_launches_only_what_is_wanted(monkeypatch, device):
    launched = []
    for name in ("_input_gradient", "_weight_gradient"):
        original = getattr(backward, name)

        def spy(*arguments, name=name, original=original):
            launched.append(name)
            return original(*arguments)

        monkeypatch.setattr(backward, name, spy)
    tensors = backward_inputs(device)
    dy, x, weight, r, s = tensors
    every = [t.new_empty(t.shape) for t in (x, weight, r, s)] + [dy.new_empty(O)]
    for chosen in ("0", "1", "4", "04", "234"):
        wanted = [str(i) in chosen for i in range(5)]
        launched.clear()
        outputs = [t.fill_(float("nan")) if w else None for t, w in zip(every, wanted, strict=True)]
        options = ((1, 1), (1, 1), (1, 1), False)
        backward.batch_ensemble_conv2d_bwd(*tensors, *outputs, *options)
        names = ["_input_gradient"] * wanted[0] + ["_weight_gradient"] * any(wanted[1:4])
        assert launched == names
        assert all(t is None or t.isfinite().all() for t in outputs)
        if wanted[4]:
            torch.testing.assert_close(every[4], dy.sum((0, 1, 3, 4)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_registered_ops(shared, last, device):
    x, weight, r, s, bias = inputs(4, 6, shared=shared, device=device)
    x = x.unsqueeze(0) if shared else x
    x = x if last else x.contiguous()
    options = ([2, 2], [1, 1, 2, 1], [1, 1])
    arguments = (x, weight, r, s, bias, M, *options)
    check_registered(forward_op, (*arguments, True))
    y = forward_op(*arguments, False)
    check_registered(forward_op, (x, weight, None, s, None, M, *options, False))
    dy = torch.randn_like(y)
    check_registered(backward_op, (dy, x, weight, r, s, bias, [True] * 5, *options))
    some = [False, True, False, True, False]
    check_registered(backward_op, (dy, x, weight, None, s, bias[0], some, *options))


@pytest.mark.parametrize(
    "stage, columns, summed, expected",
    [
        ("fwd", 16, 16, "fwd half 16"),
        ("fwd", 20, 16, "fwd half 32"),
        ("fwd", 64, 256, "fwd half 64"),
        ("fwd", 1000, 256, "fwd half 128"),
        ("fwd", 64, 3, "fwd half thin"),
        ("x", 3, 64, "x half 16"),
        ("weight", 32, 32, "weight half 32"),
        ("weight", 16, 1, "weight half thin"),
    ],
)
def test_table(stage, columns, summed, expected):
    assert tiles.config(90, stage, "half", columns, summed) == tiles.SHIPPED[90, expected]


def test_depth_of_a_step():
    """(BLOCK_K, BLOCK_C): whole taps of few channels, a part of many, no more than there is."""
    found = tiles.SHIPPED[90, "fwd half 64"]
    assert found.tiles["BLOCK_K"] == 64
    assert tiles.depth(found, 9, 16) == (64, 16)  # four taps
    assert tiles.depth(found, 9, 64) == (64, 64)
    assert tiles.depth(found, 9, 320) == (64, 64)
    assert tiles.depth(found, 1, 16) == (16, 16)
    assert tiles.depth(found, 9, 3) == (64, 4)
    assert tiles.depth(found, 1, 1) == (16, 1)


def test_too_many_pixels():
    call = forward.checked_pixels
    assert call("op", 2, 2**29, 1) == 2**30
    with pytest.raises(ValueError, match="op: images must have at most 2147418112 pixels per mem"):
        call("op", 2, 2**15, 2**15)
