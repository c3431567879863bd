"""The halo kernels of subspace_conv2d on the CPU, from the public function down to the source."""

import sys

import pytest
import torch
from cuda_on_cpu.calls import DTYPES

from landscape_fast.ops import _subspace_conv2d_cuda as way
from landscape_fast.ops import subspace_conv2d as op
from landscape_fast.ops import subspace_conv2d_reference as reference
from landscape_fast.testing import check_op

PAGE = sys.modules[op.__module__]


class Extension:
    """What module.cpp offers for subspace_conv2d, on the CPU."""

    def __init__(self, kernels):
        self.kernels = kernels

    def subspace_conv2d_weight_cuda_parts(self, about):
        about = torch.tensor(about)
        return self.kernels.subspace_conv2d_weight_parts(about.data_ptr())

    def launch(self, entry, like, *arguments):
        tables = [torch.tensor(a) if isinstance(a, tuple) else a for a in arguments]
        given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in tables]
        getattr(self.kernels, entry.removesuffix("_cuda"))(*given)


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_cpu(kernels, monkeypatch):
    extension = Extension(kernels)
    monkeypatch.setattr(way._extension, "C", extension)
    monkeypatch.setattr(way, "call_cuda", extension.launch)
    monkeypatch.setattr(PAGE, "pick", lambda op, backend, tensor: backend)


def inputs(M, B, I, O, H, W, *, shared=False, bias=True):
    """x (channels last), weights of M members, bias; outputs are of order one."""
    x = torch.randn(*(() if shared else (M,)), B, H, W, I).movedim(-1, -3)
    weight = torch.randn(M, O, I, 3, 3) / (9 * I) ** 0.5
    return x, weight, None, torch.randn(M, O) if bias else None


def check(*sizes, dtype=torch.float32, **options):
    check_op(op, reference, inputs(*sizes, **options), dtype=dtype, backend="cuda", padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("I, O", [(16, 16), (16, 32), (32, 16), (32, 32)])
def test_all_channels(I, O, dtype):
    check(2, 1, I, O, 3, 5, dtype=dtype)


# one pixel, a tile, less in one direction, tiles and a bit in both, several images
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("B, H, W", [(1, 1, 1), (1, 8, 16), (2, 3, 18), (1, 9, 17)])
def test_all_sizes(B, H, W, dtype):
    check(2, B, 16, 16, H, W, dtype=dtype, bias=False)


@pytest.mark.parametrize("M", [1, 3])
def test_a_shared_input(M):
    check(M, 1, 16, 32, 2, 3, shared=True, dtype=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_block_takes_several_tiles(dtype, monkeypatch):
    monkeypatch.setattr(way, "BLOCKS", 4)
    check(2, 3, 16, 16, 3, 17, dtype=dtype)


def test_strides_and_memory_formats():
    x, weight, _, bias = inputs(2, 1, 16, 16, 4, 4)
    truth = op(x, weight, None, bias, padding=1, backend="cuda")
    wide = torch.full((2, 1, 5, 6, 24), torch.nan)[:, :, 1:, 1:5, 8:]
    wide.copy_(x.movedim(-3, -1))
    shifted = torch.empty(x.numel() + 1)[1:].view(2, 1, 4, 4, 16).copy_(x.movedim(-3, -1))
    first = x.contiguous()
    assert not first.movedim(-3, -1).is_contiguous() and shifted.data_ptr() % 16
    last = weight.movedim(2, -1).contiguous().movedim(-1, 2)
    for images in (wide.movedim(-1, -3), shifted.movedim(-1, -3), first):
        for w in (weight, last):
            assert torch.equal(op(images, w, None, bias, padding=1, backend="cuda"), truth)


def test_the_order_of_blocks_and_threads_changes_nothing(kernels, monkeypatch):
    monkeypatch.setattr(way, "BLOCKS", 1)
    for dtype in DTYPES[:2]:
        x, weight, _, bias = inputs(1, 2, 16, 16, 2, 3)
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        results = []
        for order in kernels.orders:
            with kernels.order(*order):
                y = op(*leaves[:2], None, leaves[2], padding=1, backend="cuda")
                results.append([y, *torch.autograd.grad(y.float().sin().sum(), leaves)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_tf32_rounds_factors_and_nothing_else(monkeypatch):
    monkeypatch.setattr(way, "tf32_allowed", lambda: True)
    x, weight = inputs(2, 1, 16, 16, 3, 4, bias=False)[:2]

    def rounded(t):  # to 10 bits behind the leading one, ties away from zero
        return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    check_op(
        lambda *a, **o: op(x, weight, **o), lambda *a, **o: reference(*a, **o),
        [rounded(x), rounded(weight)], gradients=False, backend="cuda", padding=1,
    )  # fmt: skip


def test_weights_held_in_float32():
    x, weight, _, bias = inputs(2, 1, 16, 16, 3, 4)
    x = x.bfloat16()
    leaves = [t.requires_grad_() for t in (weight, bias)]
    found = []
    for function, options in ((op, {"backend": "cuda"}), (reference, {})):
        y = function(x, weight, None, bias, padding=1, **options)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert found[0][1].dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps  # y enters the gradients, rounded one way or the other
    for a, b in zip(*found, strict=True):
        assert (a.float() - b.float()).abs().max() <= 2 * eps * b.float().abs().max()


@pytest.mark.parametrize(
    "sizes, options, text",
    [
        ((2, 1, 16, 24, 4, 4), {"padding": 1}, r"channels must be one of \(16, 32\)"),
        ((2, 1, 16, 16, 4, 4), {"padding": 1, "stride": 2}, "kernel must be 3 by 3 with stride 1"),
        ((2, 1, 16, 16, 4, 4), {}, "kernel must be 3 by 3 with stride 1, padding 1"),
    ],
)
def test_what_they_cannot_do(sizes, options, text):
    with pytest.raises(ValueError, match=text):
        op(*inputs(*sizes), backend="cuda", **options)
