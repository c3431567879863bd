"""How the kernels of combine see a network: one buffer, cut into parts; and the registered ops."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._library import define

ALIGNMENT = 64  # elements; the parts of a buffer start at its multiples, so that stores are wide
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype of csrc/api.h


def size_of(t: Tensor) -> int:
    """Elements of one anchor, or of one member."""
    return math.prod(t.shape[1:])


def _layout(rows: int, tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where the blocks [rows, ...] of a buffer for `tensors` start, and where the last one ends."""
    starts, end = [], 0
    for t in tensors:
        starts.append(end + -end % ALIGNMENT)
        end = starts[-1] + rows * size_of(t)
    return starts, end


def _new_buffer(rows: int, tensors: Sequence[Tensor]) -> Tensor:
    """Room for [rows, ...] in place of each [K, ...]; a single one has its shape already."""
    if len(tensors) == 1:
        return tensors[0].new_empty((rows, *tensors[0].shape[1:]))
    return tensors[0].new_empty((_layout(rows, tensors)[1],))


def views(buffer: Tensor, rows: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The blocks [rows, ...] of the buffer that the registered ops return for `tensors`."""
    if len(tensors) < 2:
        return [buffer] * len(tensors)
    lengths, end = [], 0
    for start, t in zip(_layout(rows, tensors)[0], tensors, strict=True):
        lengths += [start - end, rows * size_of(t)]
        end = start + lengths[-1]
    blocks = buffer.split(lengths)[1::2]  # one call, for a list of hundreds
    return [b.view(rows, *t.shape[1:]) for b, t in zip(blocks, tensors, strict=True)]


def _rows(anchors, sizes, parts, weights, danchors) -> list[tuple[int, ...]]:
    """One tuple for each part with elements: the fields of CombinePart in csrc/api.h.

    Args:
        parts: the place in the coefficients of each tensor, or of the first of its `sizes`.
        weights: for each tensor where its weights start and how far apart members are.
        danchors: for each tensor where its gradient goes, -1 for none.
    """
    rows, base, itemsize = [], None, anchors[0].element_size()
    for a, part, (weight, stride_m), danchor in zip(anchors, parts, weights, danchors, strict=True):
        P = size_of(a)
        if P == 0:
            continue
        base = a.data_ptr() if base is None else base
        there, done, several = (a.data_ptr() - base) // itemsize, 0, a.shape[0] > 1
        stride_k = a.stride(0) if several else 0  # without a second anchor, distance means nothing
        to_stride_k = P if several and danchor >= 0 else 0
        for size in (P,) if sizes is None else sizes:
            to = danchor + done if danchor >= 0 else -1
            row = (size, there + done, stride_k, weight + done, stride_m, to, to_stride_k, part)
            if size:
                rows.append(row)
            part, done = part + 1, done + size
    return rows


def _first(tensors: Sequence[Tensor]) -> Tensor:
    """What the offsets of `_rows` count from."""
    return next((t for t in tensors if size_of(t)), tensors[0])


def _fwd_impl(coeffs, anchors, sizes, backend):
    M = coeffs.shape[0]
    weights = _new_buffer(M, anchors)
    starts, _ = _layout(M, anchors)
    places = [(s, size_of(a) if M > 1 else 0) for s, a in zip(starts, anchors, strict=True)]
    rows = _rows(anchors, sizes, range(len(anchors)), places, [-1] * len(anchors))
    if not rows or coeffs.numel() == 0:
        return weights.zero_()
    if backend == "cuda":
        base = _first(anchors)
        _call("combine_cuda", base, rows, *_described(coeffs, base), weights.data_ptr())
    else:
        from landscape_fast.kernels import combine as kernels

        kernels.combine_fwd(coeffs, _first(anchors), weights, rows)
    return weights


def _bwd_impl(coeffs, anchors, dweights, sizes, parts, need_coeffs, need_anchors, backend):
    M, K = coeffs.shape[0], coeffs.shape[-1]
    wanted = [a for a, need in zip(anchors, need_anchors, strict=True) if need]
    danchors = _new_buffer(K, wanted) if wanted else None
    starts = iter(_layout(K, wanted)[0])
    base, dbase = _first(anchors), _first(dweights)
    places = [
        ((g.data_ptr() - dbase.data_ptr()) // g.element_size(), g.stride(0) if M > 1 else 0)
        for g in dweights
    ]
    to = [next(starts) if need else -1 for need in need_anchors]
    rows = _rows(anchors, sizes, parts, places, to)
    dcoeffs = None
    if need_coeffs:
        every = rows and (coeffs.ndim == 2 or len(rows) == coeffs.shape[1])
        dcoeffs = coeffs.new_empty(coeffs.shape) if every else coeffs.new_zeros(coeffs.shape)
    if not rows or coeffs.numel() == 0:
        if danchors is not None:
            danchors.zero_()
    elif backend == "cuda":
        if coeffs.ndim == 3 and coeffs.stride(1) == 0:  # there, a stride of 0 means a shared [M, K]
            coeffs = coeffs.contiguous()
        size = _extension.C.combine_backward_cuda_workspace(
            rows, _CODES[base.dtype], *coeffs.shape[::2]
        )
        _call(
            "combine_backward_cuda", base, rows, *_described(coeffs, base), dbase.data_ptr(),
            base.new_empty(size, dtype=torch.uint8).data_ptr(),
            0 if danchors is None else danchors.data_ptr(),
            0 if dcoeffs is None else dcoeffs.data_ptr(),
            coeffs.shape[1] if coeffs.ndim == 3 else 1,
        )
    else:
        from landscape_fast.kernels import combine as kernels

        kernels.combine_bwd(coeffs, base, dbase, danchors, dcoeffs, rows)
    return (
        coeffs.new_empty(0) if dcoeffs is None else dcoeffs,
        base.new_empty(0) if danchors is None else danchors,
    )


def _described(coeffs: Tensor, anchors: Tensor) -> tuple[int, ...]:
    stride_m, *stride_l, stride_k = coeffs.stride()
    return (
        _CODES[anchors.dtype], coeffs.data_ptr(), _CODES[coeffs.dtype], coeffs.shape[0],
        coeffs.shape[-1], stride_m, *(stride_l or [0]), stride_k, anchors.data_ptr(),
    )


def _call(entry: str, like: Tensor, *args) -> None:
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_extension.C, entry)(*args, stream)


def _fwd_fake(coeffs, anchors, sizes, backend):
    return _new_buffer(coeffs.shape[0], anchors)


def _bwd_fake(coeffs, anchors, dweights, sizes, parts, need_coeffs, need_anchors, backend):
    wanted = [a for a, need in zip(anchors, need_anchors, strict=True) if need]
    return (
        coeffs.new_empty(coeffs.shape if need_coeffs else (0,)),
        _new_buffer(coeffs.shape[-1], wanted) if wanted else anchors[0].new_empty(0),
    )


combine_op = define(
    "combine(Tensor coeffs, Tensor[] anchors, SymInt[]? sizes, str backend) -> Tensor",
    _fwd_impl,
    _fwd_fake,
)
combine_backward_op = define(
    "combine_backward(Tensor coeffs, Tensor[] anchors, Tensor[] dweights, SymInt[]? sizes, "
    "int[] parts, bool need_coeffs, bool[] need_anchors, str backend) -> (Tensor, Tensor)",
    _bwd_impl,
    _bwd_fake,
)
