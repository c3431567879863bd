"""Inner products of K models: angles, distances, penalties and planes all follow from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._checks import FLOATS, check_tensor, message, names
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    declare,
    pick,
    reference_backward,
    transforming,
    wants_grad,
    wants_graph,
)
from landscape_fast.ops._library import define
from landscape_fast.ops.combine import combine

declare("gram", cpp=(torch.float32,), triton=KERNEL_DTYPES)
# Columns that the composition widens at a time: what a cache keeps, or enough for a launch.
WIDENED = {"cpu": 2**14, "cuda": 2**20}


def gram(
    anchors: Tensor | Sequence[Tensor],
    *,
    sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Inner products of K models, of the whole network or of each of its parts, in one pass.

    .. math:: G_{\ell k k'} = \sum_{p \in \ell} A_{kp} A_{k'p}

    Cosines, distances, the length of a polychain, the volume of a simplex, the basis of a plane and
    the principal components of snapshots need nothing else of the models.

    Args:
        anchors: [K, P], one flattened model per row, unit stride along P; or a list of L parameter
            tensors [K, ...], each contiguous within an anchor, of one dtype.
        sizes: the L parts of a flat P, in order; None for one part. None for a list.
        backend: "auto", "torch", "cpp" or "triton"; see `landscape_fast.show_config`.

    Returns:
        [K, K] for a flat tensor; with `sizes`, or for a list, [L, K, K]. In float64 whatever the
        dtype of `anchors`: products of float32 numbers are exact, and their sums run in float64, so
        that the distance of two models that are close keeps its digits. Exactly symmetric. The same
        bits for any number of threads. Autocast changes nothing here.

    Raises:
        TypeError: if an argument is not a tensor, or not a list of them.
        ValueError: if shapes, dtypes, devices or strides disagree, or the backend cannot run here.

    Cost: K * P elements read once (for up to some dozens of anchors) and K * K * P flops in
        float64. Differentiable to any order: the gradient is `combine` of the anchors.

    Source: the penalty on the cosine of Wortsman et al. 2021 (arXiv:2102.10472), the planes of
        Garipov et al. 2018 (arXiv:1802.10026) and Fort et al. 2019 (arXiv:1912.02757).

    Example:
        >>> import torch
        >>> from landscape_fast.ops.gram import gram
        >>> ends = torch.tensor([[3.0, 4.0, 1.0], [4.0, 3.0, 2.0]])
        >>> gram(ends)
        tensor([[26., 26.],
                [26., 29.]], dtype=torch.float64)
        >>> gram(ends, sizes=(2, 1))[0]
        tensor([[25., 24.],
                [24., 25.]], dtype=torch.float64)
    """
    flat = isinstance(anchors, Tensor)
    sizes = _check_flat(anchors, sizes) if flat else _check_list(anchors, sizes)
    tensors = (anchors,) if flat else tuple(anchors)
    if not tensors:
        return torch.zeros(0, 0, 0, dtype=torch.float64)
    if transforming():
        return gram_reference(anchors, sizes=sizes)
    _check_strides(tensors, flat)
    name = pick("gram", backend, tensors[0])
    if wants_grad(*tensors):
        found = _Gram.apply(sizes, name, *tensors)
    else:
        found = _run(tensors, sizes, name)
    return found[0] if flat and sizes is None else found


def gram_reference(
    anchors: Tensor | Sequence[Tensor], *, sizes: Sequence[int] | None = None
) -> Tensor:
    """The definition: every backend is tested against this."""
    flat = isinstance(anchors, Tensor)
    found = [_products(part) for part in _parts((anchors,) if flat else anchors, sizes)]
    return found[0] if flat and sizes is None else torch.stack(found)


def _products(rows: Tensor) -> Tensor:
    wide = rows.double()  # which autocast leaves alone
    return wide @ wide.T


def _run(tensors, sizes, backend) -> Tensor:
    """[L, K, K]"""
    if backend != "torch":
        return gram_op(list(tensors), sizes, backend)
    found = torch.stack([_in_pieces(part) for part in _parts(tensors, sizes)])
    return (found + found.mT) / 2  # a library may round (i, j) and (j, i) differently


def _parts(tensors, sizes) -> list[Tensor]:
    """The L parts, [K, P of the part] each."""
    if sizes is not None:
        return list(tensors[0].split(tuple(sizes), 1))
    return [t.flatten(1) if t.ndim > 1 else t.unsqueeze(1) for t in tensors]


def _in_pieces(part: Tensor) -> Tensor:
    """`_products` without a copy of all of `part` in float64."""
    step = WIDENED.get(part.device.type, WIDENED["cuda"])
    if part.dtype == torch.float64 or part.shape[1] <= step or torch.compiler.is_compiling():
        return _products(part)
    return sum(_products(piece) for piece in part.split(step, 1))


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, backend, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.sizes = sizes
        return _run(tensors, sizes, backend)

    @staticmethod
    def backward(ctx, grad):
        tensors, (_, _, *needs) = ctx.saved_tensors, ctx.needs_input_grad
        if wants_graph():

            def definition(*tensors):
                given = tensors[0] if ctx.sizes is not None else tensors
                return gram_reference(given, sizes=ctx.sizes)

            return None, None, *reference_backward(definition, tensors, needs, grad)
        both = grad + grad.transpose(1, 2)  # [L, K, K], symmetric
        both = both.to(torch.promote_types(tensors[0].dtype, torch.float32))
        if ctx.sizes is not None:  # W[k] = sum over k' of both[l, k, k'] A[k']
            return None, None, combine(both.transpose(0, 1), tensors[0], sizes=ctx.sizes)
        wanted = [i for i, need in enumerate(needs) if need]
        # no list as an index: it would be copied to the device
        coeffs, found = torch.stack([both[i] for i in wanted], 1), [None] * len(tensors)
        for i, danchor in zip(wanted, combine(coeffs, [tensors[i] for i in wanted]), strict=True):
            found[i] = danchor
        return None, None, *found


def _impl(anchors, sizes, backend):
    out = _fake(anchors, sizes, backend)
    parts = _parts(anchors, sizes)
    rows = [(t.data_ptr(), t.stride(0), t.shape[1]) for t in parts]
    if backend == "cpp":
        if out.numel():
            _extension.C.gram(rows, out.shape[-1], out.data_ptr(), torch.get_num_threads())
        return out
    from landscape_fast.kernels import gram as kernels

    base = next((t for t in parts if t.shape[1]), None)
    if base is None or out.numel() == 0 or not all(P for _, _, P in rows):
        out.zero_()
    if base is not None and out.numel():
        start, size, several = base.data_ptr(), base.element_size(), out.shape[-1] > 1
        table = [
            (P, (address - start) // size, stride_k if several else 0, 0, 0, -1, 0, part)
            for part, (address, stride_k, P) in enumerate(rows)
            if P
        ]
        kernels.gram(base, out, tuple(table))
    return out


def _fake(anchors, sizes, backend):
    L, K = len(anchors) if sizes is None else len(sizes), anchors[0].shape[0]
    return anchors[0].new_empty((L, K, K), dtype=torch.float64)


gram_op = define("gram(Tensor[] anchors, SymInt[]? sizes, str backend) -> Tensor", _impl, _fake)


def _check_flat(anchors, sizes) -> tuple[int, ...] | None:
    check_tensor("gram", "anchors", anchors, "K, P", (None, None))
    if sizes is None:
        return None
    sizes, P = tuple(sizes), anchors.shape[1]
    if not (len(sizes) > 0 and min(sizes) >= 0 and sum(sizes) == P):
        _refuse("sizes", f"sizes of parts with sum P = {P}", sizes)
    return sizes


def _check_list(anchors, sizes) -> None:
    if not isinstance(anchors, (list, tuple)):
        rule = "a Tensor [K, P] or a list of Tensors [K, ...]"
        _refuse("anchors", rule, type(anchors).__name__, error=TypeError)
    if sizes is not None:
        _refuse("sizes", "None for a list, whose shapes tell", sizes)
    for i, a in enumerate(anchors):
        argument = f"anchors[{i}]"
        if not isinstance(a, Tensor):
            _refuse(argument, "a Tensor [K, ...]", type(a).__name__, error=TypeError)
        first = anchors[0]
        if a.ndim == 0 or a.shape[0] != first.shape[0]:
            K = first.shape[0] if first.ndim else "any"
            _refuse(argument, f"[K, ...] with K = {K}", list(a.shape))
        if a.dtype not in FLOATS:
            _refuse(argument, f"one of {names(FLOATS)}", a.dtype)
        if a.dtype != first.dtype:
            rule = f"of the dtype of anchors[0], {names([first.dtype])}"
            _refuse(argument, rule, names([a.dtype]), "make one call for each dtype")
        if a.device != first.device:
            _refuse(argument, f"on the device of anchors[0], {first.device}", a.device)


def _check_strides(tensors, flat: bool) -> None:
    for i, a in enumerate(tensors):
        if not (a.is_contiguous() or a[0].is_contiguous()):
            argument = "anchors" if flat else f"anchors[{i}]"
            rule = "of unit stride along P" if flat else "contiguous within each anchor"
            remedy = "call .contiguous() once, outside the loop"
            _refuse(argument, rule, f"strides {tuple(a.stride())}", remedy)


def _refuse(argument, rule, got, remedy=None, error=ValueError):
    raise error(message("gram", argument, rule, got, remedy))
