"""The kernels of subspace_conv2d in tiles small enough for many, and how tiles are chosen.

The interpreter runs the code that GPUs run, at sizes where all loops, splits and edges occur.
"""

import math
import sys

import pytest
import torch

pytest.importorskip("triton")

from landscape_fast.kernels import subspace_conv2d as images
from landscape_fast.kernels import subspace_conv2d_backward as backward
from landscape_fast.kernels import subspace_conv2d_boxes as boxes
from landscape_fast.kernels import subspace_conv2d_tiles as tiles
from landscape_fast.kernels._launch import INTERPRETED, Config
from landscape_fast.ops import _subspace_conv2d_kernels as registered
from landscape_fast.ops._subspace_conv2d_plan import Plan
from landscape_fast.ops.subspace_conv2d import subspace_conv2d, subspace_conv2d_reference
from landscape_fast.testing import assert_as_exact, check_op, check_registered, fenced

PAGE = sys.modules[subspace_conv2d.__module__]
M, K, B, H, W = 2, 2, 2, 5, 3


def inputs(I=5, O=18, kernel=(3, 3), shared=False, own=False, device="cpu"):
    """x, anchors, coeffs (None for own weights), bias."""
    x = torch.randn(*(() if shared else (M,)), B, H, W, I).movedim(-1, -3)
    rows = M if own else K
    weight = torch.randn(rows, O, I, *kernel) / (I * math.prod(kernel)) ** 0.5
    found = [x, weight, None if own else torch.randn(M, K), torch.randn(rows, O)]
    return [t if t is None else t.to(device) for t in found]


@pytest.fixture
def small(monkeypatch):
    """Every launch takes tiles of 16, so that there are several of each kind."""

    def config(arch, stage, kind, columns, summed, tma):
        column = "BLOCK_O" if stage == "weight" else "BLOCK_N"
        return Config({"BLOCK_P": 16, column: 16, "BLOCK_K": 16}, num_warps=4, num_stages=2)

    monkeypatch.setattr(tiles, "config", config)


CASES = [  # options, channels, whether the members share x, whether weights are their own
    ({"padding": 1}, (3, 18), False, True),
    ({"padding": 1}, (20, 5), True, True),
    ({"stride": 2, "padding": (1, 2)}, (20, 5), False, False),
    ({"stride": (3, 1), "dilation": (1, 2), "padding": (2, 1)}, (16, 16), True, False),
]


@pytest.mark.parametrize("options, channels, shared, own", CASES, ids=str)
def test_small_tiles(options, channels, shared, own, small, monkeypatch, device):
    """Ragged pixels and channels; few channels share a step, many are cut; NaN all around."""
    plan = Plan("triton", "triton", "triton", mix=not own)
    monkeypatch.setattr(PAGE, "plan_for", lambda *arguments: plan)
    kernel = (3, 3) if channels[0] < 16 else (2, 2)
    arguments = inputs(*channels, kernel, shared, own, device)
    check_op(subspace_conv2d, subspace_conv2d_reference, arguments, **options)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3)], ids=str)
def test_kernel_sizes_in_half_precision(kernel, small, device):
    arguments = inputs(kernel=kernel, own=True, device=device)
    options = {"backend": "triton", "dtype": torch.float16, "padding": "same"}
    check_op(subspace_conv2d, subspace_conv2d_reference, arguments, **options)


# Images of one box and of several, a batch that no box divides, channels of more than one tile.
SIZES = [  # B, I, O, pixels, kernel, padding, dilation; whether the members share x
    ((3, 16, 24, (5, 4), 3, 1, 1), False, torch.float32),
    ((3, 16, 8, (5, 4), 3, 1, 1), True, torch.float16),
    ((2, 40, 8, (4, 9), 1, 0, 1), False, torch.float16),
    ((3, 8, 16, (4, 4), 3, 2, 2), True, torch.float32),
]
BOX = Config({"BLOCK_P": 32, "BLOCK_N": 16, "BLOCK_K": 16}, 4, 2, True)
WEIGHT_BOX = Config({"BLOCK_O": 16, "BLOCK_I": 32, "BLOCK_P": 32}, 4, 2, True)


@pytest.mark.parametrize("sizes, shared, dtype", SIZES, ids=str)
def test_boxes(sizes, shared, dtype, device):
    """Tiles through descriptors: y, dx and dweight, channels last, zeros outside the images."""
    if device == "cuda" and boxes.arch(torch.empty(0, device=device)) < 90:
        pytest.skip("tensor descriptors need sm_90")
    B, I, O, size, kernel, pad, dilation = sizes
    last = [torch.randn(n, B, *size, I) for n in (1 if shared else M, M)]
    x, weight = last[0].permute(0, 1, 4, 2, 3), torch.randn(M, O, I, kernel, kernel)
    weight /= (I * kernel**2) ** 0.5
    low = [t.to(device, dtype) for t in (x, weight, torch.randn(M, O))]
    options = {"padding": pad, "dilation": dilation}

    def reference(dtype):
        x, weight, bias = [t.to(dtype).requires_grad_() for t in low]
        y = subspace_conv2d_reference(x[0] if shared else x, weight, None, bias, **options)
        return [y, *torch.autograd.grad(y, (x, weight), dy.to(dtype))]

    shape = subspace_conv2d_reference(low[0][0] if shared else low[0], low[1], **options).shape
    dy = torch.randn(*shape[:2], *shape[3:], O).to(device, dtype).permute(0, 1, 4, 2, 3)
    truth, plain = reference(torch.float64), reference(dtype)
    x, weight, bias = low
    y, dx = (fenced(torch.full_like(t, float("nan"))) for t in (dy, x))
    packed = weight.permute(0, 1, 3, 4, 2).contiguous()
    how = ((1, 1), (pad, pad), (dilation, dilation), False)
    images.subspace_conv2d_fwd(fenced(x), packed, None, bias, y, *how, config=BOX)
    assert_as_exact("y", y, plain[0], truth[0])
    if not shared:
        images.subspace_conv2d_bwd_x(fenced(dy), packed, None, dx, *how, config=BOX)
        assert_as_exact("dx", dx, plain[1], truth[1])
    for splits in (1, 2):
        found = packed.new_full(packed.shape, float("nan"), dtype=torch.float32)
        how_split = {"config": WEIGHT_BOX, "splits": splits}
        backward.subspace_conv2d_bwd_weight(dy, x, found, *how, **how_split)
        found = found.permute(0, 1, 4, 2, 3)
        assert_as_exact("dweight", found, plain[2].float(), truth[2])


@pytest.mark.parametrize("splits", [2, 7])
def test_any_split_gives_the_same_sums(splits, device):
    x, weight, _, _ = inputs(own=True, device=device)
    dy = torch.randn(M, B, 18, H, W, device=device)
    found = torch.full((M, 18, 3, 3, 5), float("nan"), device=device)
    config = Config({"BLOCK_K": 16, "BLOCK_O": 16, "BLOCK_P": 16}, 4, 2)
    backward.subspace_conv2d_bwd_weight(
        dy, x, found, (1, 1), (1, 1), (1, 1), False, config=config, splits=splits
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        w = weight.to(dtype).requires_grad_()
        y = subspace_conv2d_reference(x.to(dtype), w, padding=1)
        results += torch.autograd.grad(y, w, dy.to(dtype))
    assert_as_exact("dweight", found.permute(0, 1, 4, 2, 3), *results)


def test_weights_that_are_rounded_on_the_way(device):
    """Anchors of float32 are mixed before they are rounded to the dtype of x."""
    x, anchors, coeffs, bias = inputs(device=device)
    packed = anchors.permute(0, 1, 3, 4, 2).contiguous()
    y = torch.empty(M, B, 18, H, W, dtype=torch.float16, device=device)
    how = ((1, 1), (1, 1), (1, 1), False)
    images.subspace_conv2d_fwd(x.half(), packed, coeffs, bias, y, *how)
    found = []
    for dtype in (torch.float16, torch.float64):
        weight = torch.tensordot(coeffs, anchors, 1).half().to(dtype)
        shift = torch.tensordot(coeffs, bias, 1).half().to(dtype)
        found.append(subspace_conv2d_reference(x.half().to(dtype), weight, None, shift, padding=1))
    assert_as_exact("y", y, *found)


def test_registered_ops(device):
    """Fakes agree with what is computed, down to strides."""
    x, weight, coeffs, bias = inputs(I=4, O=7, kernel=(2, 2), device=device)
    how = ([1, 1], [1, 1, 0, 0], [1, 1], "triton")
    dy = torch.randn(M, B, 7, H, W, device=device)
    check_registered(registered.forward_op, (x, weight, coeffs, bias, *how))
    check_registered(registered.input_gradient_op, (dy, x, weight, coeffs, *how))
    check_registered(registered.weight_gradient_op, (dy, x, [2, 2], *how))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no sparse files")
@pytest.mark.parametrize("stride", [(2**29 + 8, 2, 1), (4, 2**30 + 4, 1)], ids=["channels", "rows"])
def test_offsets_beyond_32_bits(stride, tmp_path):
    """Images whose channels or rows lie 2**31 elements apart, read and written."""
    size = (1, 1, 5, 2, 2) if stride[0] > 4 else (1, 1, 1, 3, 2)
    C, far = size[2], []
    for name in ("x", "dy", "y", "dx"):  # pages of the files come on demand
        big = torch.from_file(str(tmp_path / name), shared=True, size=2**31 + 200)
        far.append(big.as_strided(size, (0, 0, *stride)).copy_(torch.randn(size)))
    x, dy, y, dx = far
    weight = torch.randn(1, C, C, 3, 3)
    packed, dweight = weight.permute(0, 1, 3, 4, 2).contiguous(), torch.empty(1, C, 3, 3, C)
    how = ((1, 1), (1, 1), (1, 1), False)
    images.subspace_conv2d_fwd(x, packed, None, None, y, *how)
    images.subspace_conv2d_bwd_x(dy, packed, None, dx, *how)
    backward.subspace_conv2d_bwd_weight(dy, x, dweight, *how)
    near = [t.contiguous().requires_grad_() for t in (x, weight)]
    truth = subspace_conv2d_reference(*near, padding=1)
    expected = torch.autograd.grad(truth, near, dy.contiguous())
    found = (y.contiguous(), dx.contiguous(), dweight.permute(0, 1, 4, 2, 3))
    for a, b in zip(found, (truth, *expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_shape_has_tiles(arch):
    """Whatever the kind and the channels; the narrowest tile that holds them, if one does."""
    for stage in tiles.STAGES:
        for kind in ("half", "tf32", "ieee"):
            for tma in (False, True) if arch > 80 and kind != "ieee" else (False,):
                column = "BLOCK_N" if stage != "weight" else "BLOCK_I" if tma else "BLOCK_O"
                for columns in (1, 16, 33, 64, 700):
                    chosen = tiles.config(arch, stage, kind, columns, 64, tma)
                    found = [c.tiles[column] for c in tiles.candidates(arch, stage, kind, tma)]
                    assert chosen.tma == tma
                    fitting = [n for n in found if n >= columns]
                    assert chosen.tiles[column] == (min(fitting) if fitting else max(found))
            if stage != "weight":
                tiles.config(arch, stage, f"{kind} mixed", 700, 3, False)


def test_boxes_cover_images_without_overhang_where_they_can():
    """28, 14 and 7 pixels have few factors of two: images make up the rest."""
    for B, side in ((128, 32), (128, 16), (128, 8), (64, 28), (64, 14), (128, 7)):
        tb, th, tw = boxes.box(B, side, side, 128)
        assert tb * th * tw == 128 and B % tb == side % th == side % tw == 0
    assert boxes.box(128, 32, 32, 128)[0] == 1, "one image, whose taps share pixels"
    assert math.prod(boxes.box(1, 1, 1, 64)) == 64


def test_what_boxes_cannot_fetch(monkeypatch):
    """Strides, a few channels, channels that are not last; images or weights not aligned."""
    monkeypatch.setattr(boxes, "arch", lambda t: 90)
    whole = (1, 1, 1, 1, 1, 1)

    def fit(C=32, O=32, last=True, options=whole, kind="half", cut=0, weight=None):
        x = torch.empty(2, 2, 8, 8, C + cut, dtype=torch.float16)[..., :C].permute(0, 1, 4, 2, 3)
        y = torch.empty(2, 2, 8, 8, O, dtype=torch.float16).permute(0, 1, 4, 2, 3)
        return boxes.fit(x if last else x.contiguous(), y, options, kind, weight)

    w = torch.empty(2 * 32 * 32 + 1, dtype=torch.float16)
    assert fit(weight=w[:-1].view(2, 32, 1, 1, 32))
    assert not fit(weight=w[1:].view(2, 32, 1, 1, 32)), "not at a multiple of 16 bytes"
    assert fit(C=36, cut=4) and not fit(C=36, cut=4, weight=w[:1152].view(1, 32, 1, 1, 36))
    boxes._described(w[:36].view(1, 1, 1, 1, 36), 1, 1, 1, 1, 64)  # no row follows on the first
    assert fit() and fit(C=40, O=64) and fit(cut=8)
    assert not fit(C=36) and not fit(cut=4) and not fit(O=16) and not fit(last=False)
    assert not fit(options=(2, 1, 1, 1, 1, 1)) and not fit(kind="ieee")
    monkeypatch.setattr(boxes, "arch", lambda t: 80)
    assert not fit()
