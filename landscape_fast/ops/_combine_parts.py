"""How the kernels of combine see a network: one buffer, cut into parts; and the registered ops."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._compiled import DTYPE_CODES, call_cuda
from landscape_fast.ops._library import define

ALIGNMENT = 64  # elements; the parts of a buffer start at its multiples, so that stores are wide


class _Blocks(NamedTuple):
    """The blocks [rows, ...] of one buffer, for tensors [K, ...]."""

    counts: tuple[int, ...]  # elements of one row
    starts: tuple[int, ...]
    cuts: tuple[tuple, ...]  # arguments of as_strided
    end: int


def _lay_out(rows: int, shapes: tuple[torch.Size, ...]) -> _Blocks:
    counts, starts, cuts, end = [], [], [], 0
    for _, *shape in shapes:
        strides = [math.prod(shape[i:]) for i in range(len(shape) + 1)]
        counts.append(strides[0])
        starts.append(end + -end % ALIGNMENT)
        cuts.append(((rows, *shape), tuple(strides), starts[-1]))
        end = starts[-1] + rows * strides[0]
    return _Blocks(tuple(counts), tuple(starts), tuple(cuts), end)


_remembered = functools.lru_cache(maxsize=256)(_lay_out)


def _blocks(rows: int, tensors: Sequence[Tensor]) -> _Blocks:
    shapes = tuple([t.shape for t in tensors])
    if torch.compiler.is_compiling():
        return _lay_out(rows, shapes)
    try:  # a network has hundreds of tensors, and the same ones at every step
        return _remembered(rows, shapes)
    except TypeError:  # symbolic sizes cannot be looked up
        return _lay_out(rows, shapes)


def _new_buffer(rows: int, tensors: Sequence[Tensor]) -> Tensor:
    """Room for [rows, ...] in place of each [K, ...]; a single one has its shape already."""
    if len(tensors) == 1:
        return tensors[0].new_empty((rows, *tensors[0].shape[1:]))
    return tensors[0].new_empty((_blocks(rows, tensors).end,))


def views(buffer: Tensor, rows: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The blocks [rows, ...] of the buffer that the registered ops return for `tensors`."""
    if len(tensors) < 2:
        return [buffer] * len(tensors)
    return [buffer.as_strided(*cut) for cut in _blocks(rows, tensors).cuts]


def _rows(anchors, counts, sizes, parts, weights, danchors) -> tuple[tuple[int, ...], ...]:
    """One tuple for each part with elements: the fields of CombinePart in csrc/api.h.

    Args:
        counts: the elements of one anchor of each tensor.
        parts: the place in the coefficients of each tensor, or of the first of its `sizes`.
        weights: for each tensor where its weights start and how far apart members are.
        danchors: for each tensor where its gradient goes, -1 for none.
    """
    base, itemsize = _first(anchors).data_ptr(), anchors[0].element_size()
    several = anchors[0].shape[0] > 1  # without a second anchor, the distance to it means nothing
    rows = []
    for a, P, part, (weight, stride_m), danchor in zip(
        anchors, counts, parts, weights, danchors, strict=True
    ):
        stride_k = a.stride(0) if several else 0
        to_stride_k = P if several and danchor >= 0 else 0
        there = (a.data_ptr() - base) // itemsize
        for size in (P,) if sizes is None else sizes:
            if size:
                rows.append((size, there, stride_k, weight, stride_m, danchor, to_stride_k, part))
            there, weight, part = there + size, weight + size, part + 1
            danchor += size if danchor >= 0 else 0
    return tuple(rows)


def _first(tensors: Sequence[Tensor]) -> Tensor:
    """What the offsets of `_rows` count from: an empty tensor has no address."""
    return next((t for t in tensors if math.prod(t.shape[1:])), tensors[0])


def _fwd_impl(coeffs, anchors, sizes, backend):
    return _fwd_into(_new_buffer(coeffs.shape[0], anchors), coeffs, anchors, sizes, backend)


def _out_impl(coeffs, anchors, sizes, out, backend):
    _fwd_into(out, coeffs, [anchors], sizes, backend)


def _fwd_into(weights, coeffs, anchors, sizes, backend):
    M = coeffs.shape[0]
    counts, starts, _, _ = _blocks(M, anchors)
    places = zip(starts, counts if M > 1 else [0] * len(counts), strict=True)
    rows = _rows(anchors, counts, sizes, range(len(counts)), places, [-1] * len(counts))
    if not rows or coeffs.numel() == 0:
        return weights.zero_()
    base = _first(anchors)
    if backend == "cuda":
        call_cuda("combine_cuda", base, rows, *_described(coeffs, base), weights.data_ptr())
    else:
        from landscape_fast.kernels import combine as kernels

        kernels.combine_fwd(coeffs, base, weights, rows)
    return weights


def _bwd_impl(coeffs, anchors, dweights, sizes, parts, need_coeffs, need_anchors, backend):
    M, K = coeffs.shape[0], coeffs.shape[-1]
    wanted = [a for a, need in zip(anchors, need_anchors, strict=True) if need]
    danchors = _new_buffer(K, wanted) if wanted else None
    starts = iter(_blocks(K, wanted).starts)
    to = [next(starts) if need else -1 for need in need_anchors]
    base, dbase = _first(anchors), _first(dweights)
    places = [
        ((g.data_ptr() - dbase.data_ptr()) // g.element_size(), g.stride(0) if M > 1 else 0)
        for g in dweights
    ]
    rows = _rows(anchors, _blocks(K, anchors).counts, sizes, parts, places, to)
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
        size = _extension.C.combine_backward_cuda_workspace(rows, DTYPE_CODES[base.dtype], M, K)
        workspace = base.new_empty(size, dtype=torch.uint8)
        call_cuda(
            "combine_backward_cuda", base, rows, *_described(coeffs, base), dbase.data_ptr(),
            workspace.data_ptr(), 0 if danchors is None else danchors.data_ptr(),
            0 if dcoeffs is None else dcoeffs.data_ptr(),
            coeffs.shape[1] if coeffs.ndim == 3 else 1,
        )  # fmt: skip
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
        DTYPE_CODES[anchors.dtype],
        coeffs.data_ptr(),
        DTYPE_CODES[coeffs.dtype],
        coeffs.shape[0],
        coeffs.shape[-1],
        stride_m,
        *(stride_l or [0]),
        stride_k,
        anchors.data_ptr(),
    )


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
combine_out_op = define(
    "combine_out(Tensor coeffs, Tensor anchors, SymInt[]? sizes, Tensor(a!) out, str backend) "
    "-> ()",
    _out_impl,
    lambda coeffs, anchors, sizes, out, backend: None,
)
combine_backward_op = define(
    "combine_backward(Tensor coeffs, Tensor[] anchors, Tensor[] dweights, SymInt[]? sizes, "
    "int[] parts, bool need_coeffs, bool[] need_anchors, str backend) -> (Tensor, Tensor)",
    _bwd_impl,
    _bwd_fake,
)
