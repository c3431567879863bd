"""The CUDA kernels as a way of the member convolution (`_subspace_conv2d_kernels`).

For 3 by 3 weights of 16 or 32 channels, which a kernel of nine separate taps reads too often: see
csrc/cuda/subspace_conv2d.cu. They do not mix anchors themselves.
"""

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._batch_ensemble_conv2d_fused import tf32_allowed
from landscape_fast.ops._compiled import DTYPE_CODES, call_cuda

CHANNELS = (16, 32)
BLOCKS = 0  # of a launch; 0 leaves it to the kernels
_SAME = ((1, 1), (1, 1, 1, 1), (1, 1))  # stride, pads, dilation


def obstacle(weight, options) -> str:
    """Why they cannot do this convolution; empty where they can."""
    if weight[3:] != (3, 3) or options != _SAME:
        return "kernel must be 3 by 3 with stride 1, padding 1 and dilation 1"
    if weight[1] not in CHANNELS or weight[2] not in CHANNELS:
        return f"channels must be one of {CHANNELS}"
    return ""


def forward(x: Tensor, weight: Tensor, coeffs: None, bias, y: Tensor, options) -> None:
    if bias is not None:
        bias = bias.to(x.dtype).float().contiguous()
    _convolve(_pixels(x), weight, bias, False, y)


def input_gradient(dy: Tensor, weight: Tensor, coeffs: None, dx: Tensor, options) -> None:
    members = weight.shape[0]
    if dx.shape[0] == members:
        _convolve(_pixels(dy), weight, None, True, dx)
        return
    each = dx.new_empty(members, *_last(dx).shape[1:])  # of every member, to be added up
    _convolve(_pixels(dy), weight, None, True, each.permute(0, 1, 4, 2, 3))
    _last(dx).copy_(each.sum(0, keepdim=True))


def weight_gradient(dy: Tensor, x: Tensor, dweight: Tensor, options) -> None:
    dy, x, members = _pixels(dy), _pixels(x), dy.shape[0]
    about = _about(members, x, x.shape[-1], dy.shape[-1])
    count = _extension.C.subspace_conv2d_weight_cuda_parts(about)
    parts = x.new_empty(count, *dweight.shape, dtype=torch.float32)
    places = (_place(x, members), _place(dy, members))
    call_cuda("subspace_conv2d_weight_cuda", x, about, *places, parts.data_ptr())
    torch.sum(parts, 0, out=dweight)


def _convolve(x: Tensor, weight: Tensor, bias, turned: bool, y: Tensor) -> None:
    """x [.., H, W, channels], weight [M, O, 3, 3, I]; `turned` for the gradient of the input."""
    members, O, _, _, I = weight.shape
    target = _last(y)
    if not target.is_contiguous():
        target = target.new_empty(target.shape)
    address = 0 if bias is None else bias.data_ptr()
    call_cuda(
        "subspace_conv2d_cuda", x, _about(members, x, I, O), _place(x, members), weight.data_ptr(),
        address, turned, target.data_ptr(),
    )  # fmt: skip
    if target.data_ptr() != y.data_ptr():
        _last(y).copy_(target)


def _about(members: int, x: Tensor, I: int, O: int) -> tuple[int, ...]:
    """SubspaceConv2d of csrc/api.h."""
    _, B, H, W, _ = x.shape
    return members, B, H, W, I, O, DTYPE_CODES[x.dtype], int(not tf32_allowed()), BLOCKS


def _place(x: Tensor, members: int) -> tuple[int, ...]:
    """MemberImages of csrc/api.h."""
    strides = x.stride()[:4]
    return x.data_ptr(), strides[0] if x.shape[0] == members else 0, *strides[1:]


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2)


def _pixels(x: Tensor) -> Tensor:
    """[.., H, W, channels], channels of unit stride and every pixel at a multiple of 16 bytes."""
    last = _last(x)
    wide = 16 // x.element_size()
    aligned = all(s % wide == 0 for s in last.stride()[:4]) and x.data_ptr() % 16 == 0
    if last.stride(4) == 1 and aligned:
        return last
    return last.clone(memory_format=torch.contiguous_format)
