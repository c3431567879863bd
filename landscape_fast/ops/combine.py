"""Weights of M models as combinations of K anchors: lines, simplexes, curves, Gaussians."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_fast.ops._checks import FLOATS, check_tensor, message, names
from landscape_fast.ops._combine_parts import combine_backward_op, combine_op, combine_out_op, views
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    declare,
    pick,
    reference_backward,
    transforming,
    wants_grad,
    wants_graph,
    without_autocast,
)

declare("combine", cuda=KERNEL_DTYPES, triton=KERNEL_DTYPES)
# Where that order comes from; `python bench/run.py combine` measures it.
PREFERENCE = "estimate, no GPU timing: equal traffic, and CUDA launches carry a list's addresses"
CUDA_ANCHORS = 12288  # the most that csrc/cuda/combine.cu takes


def combine(
    coeffs: Tensor,
    anchors: Tensor | Sequence[Tensor],
    *,
    sizes: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    r"""Weights of M models as linear combinations of K anchors, the whole network in one launch.

    .. math:: W_{mp} = \sum_k c_{m \ell(p) k} A_{kp}, \quad \ell(p) \text{ the part that holds } p

    Args:
        coeffs: [M, K], the coordinates of each model, or [M, L, K], those of each of L parts
            (layers). Any real numbers, any strides; float32 or the dtype of `anchors`.
        anchors: [K, P], one flattened model per row, unit stride along P; or a list of L parameter
            tensors [K, ...], each contiguous within an anchor, of one dtype.
        sizes: the L parts of a flat P, in order; needed with coeffs [M, L, K]. None for a list.
        out: [M, P] contiguous, of the dtype of flat anchors, to be overwritten with the result and
            returned; where no gradient is recorded. It must not overlap an input.
        backend: "auto", "torch", "triton" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        [M, P], or for a list the list of [M, ...], contiguous, in the dtype of `anchors`. Sums run
        in float32 (float64 for float64 anchors) and are rounded once. The tensors of a list may
        share one allocation, and those that carry a gradient then refuse changes in place.
        NaN and infinities propagate as in a matmul. Parameters are not activations: autocast
        changes nothing here.

    Raises:
        TypeError: if an argument is not a tensor, or not a list of them.
        ValueError: if shapes, dtypes, devices or strides disagree, or the backend cannot run here.
            Anchors are never copied to make up for a stride.

    Cost: (K + M) * P elements moved and 2 * M * K * P flops; both gradients together move
        (2 * K + M) * P and take 4 * M * K * P, in one pass for up to 8 anchors. Differentiable to
        any order. Accesses are widest where P and the sizes are multiples of 8. A flat tensor is
        quickest: for a list, Python spends some microseconds per tensor, and on the Triton path a
        table of addresses is uploaded when they change.

    Source: subspaces of Wortsman et al. 2021 (arXiv:2102.10472), curves of Garipov et al. 2018
        (arXiv:1802.10026), planes and low-rank Gaussians of Fort et al. 2019 (arXiv:1912.02757).

    Example:
        >>> import torch
        >>> from landscape_fast.ops.combine import combine
        >>> ends = torch.tensor([[0.0, 2.0, 8.0], [4.0, 6.0, 0.0]])
        >>> combine(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), ends)
        tensor([[2., 4., 4.],
                [0., 2., 8.]])
        >>> layerwise = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
        >>> combine(layerwise, ends, sizes=(2, 1))
        tensor([[2., 4., 0.]])
        >>> combine(torch.tensor([[0.25, 0.75]]), [ends[:, :2], ends[:, 2]])
        [tensor([[3., 5.]]), tensor([2.])]
    """
    flat = isinstance(anchors, Tensor)
    sizes = _check_flat(coeffs, anchors, sizes) if flat else _check_list(coeffs, anchors, sizes)
    tensors = (anchors,) if flat else tuple(anchors)
    if not tensors:
        return []
    composite = transforming()
    if not composite:  # a vmapped tensor has strides of its own
        _check_strides(tensors, flat)
    if out is not None:
        _check_out(out, coeffs, anchors, flat)
    name = pick("combine", backend, tensors[0])
    if name == "cuda" and coeffs.shape[-1] > CUDA_ANCHORS:
        name = _without_cuda(backend, tensors[0])
    if composite or name == "torch":
        if out is not None:
            return _into(out, coeffs, anchors, sizes)
        return _composite(coeffs, anchors, sizes)
    if out is not None:
        combine_out_op(coeffs, anchors, sizes, out, name)
        torch.autograd.graph.increment_version(out)
        return out
    if wants_grad(coeffs, *tensors):
        weights = _Combine.apply(coeffs, sizes, name, *tensors)
    else:
        weights = views(combine_op(coeffs, tensors, sizes, name), coeffs.shape[0], tensors)
    return weights[0] if flat else list(weights)


def _without_cuda(backend, anchors):
    rule = f"'triton' or 'torch' for more than {CUDA_ANCHORS} anchors"
    if backend != "auto":
        _refuse("backend", rule, repr(backend))
    return pick("combine", "triton", anchors)


def combine_reference(
    coeffs: Tensor, anchors: Tensor | Sequence[Tensor], *, sizes: Sequence[int] | None = None
) -> Tensor | list[Tensor]:
    """The definition: every backend is tested against this, run in float64."""
    if isinstance(anchors, Tensor):
        if coeffs.ndim == 2:
            return _mix(coeffs, anchors)
        return torch.cat(combine_reference(coeffs, anchors.split(tuple(sizes), 1)), 1)
    each = coeffs.unbind(1) if coeffs.ndim == 3 else [coeffs] * len(anchors)
    return [_mix(c, a) for c, a in zip(each, anchors, strict=True)]


def _mix(coeffs: Tensor, anchors: Tensor) -> Tensor:
    """[M, K], [K, ...] -> [M, ...]"""
    dtype = torch.promote_types(coeffs.dtype, anchors.dtype)
    return torch.tensordot(coeffs.to(dtype), anchors.to(dtype), 1).to(anchors.dtype)


def _composite(coeffs, anchors, sizes):
    """The reference, kept from autocast, which would round the parameters."""
    with without_autocast(coeffs.device.type):
        return combine_reference(coeffs, anchors, sizes=sizes)


def _into(out, coeffs, anchors, sizes):
    """The reference for `out`: in one dtype, nothing as large as the parameters is made besides."""
    parts = [slice(None)]
    if coeffs.ndim == 3:
        ends = list(itertools.accumulate(sizes))
        parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    each = coeffs.unbind(1) if coeffs.ndim == 3 else [coeffs]
    exact = coeffs.dtype == anchors.dtype and not transforming()
    for c, part in zip(each, parts, strict=True):
        if exact:
            torch.mm(c, anchors[:, part], out=out[:, part])
        else:
            out[:, part] = _composite(c, anchors[:, part], None)
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coeffs, sizes, backend, *anchors):
        ctx.set_materialize_grads(False)  # a part that nobody used costs nothing in the backward
        ctx.save_for_backward(coeffs, *anchors)
        ctx.sizes, ctx.backend = sizes, backend
        return tuple(views(combine_op(coeffs, anchors, sizes, backend), coeffs.shape[0], anchors))

    @staticmethod
    def backward(ctx, *grads):
        coeffs, *anchors = ctx.saved_tensors
        need_coeffs, _, _, *needs = ctx.needs_input_grad
        if wants_graph():
            found = reference_backward(
                _listed(ctx.sizes), (coeffs, *anchors), (need_coeffs, *needs), grads
            )
            return found[0], None, None, *found[1:]
        dcoeffs, danchors = None, [None] * len(anchors)
        used = [i for i, g in enumerate(grads) if g is not None and (need_coeffs or needs[i])]
        if used:
            given, wanted = [anchors[i] for i in used], [needs[i] for i in used]
            dweights = [_dense(grads[i]) for i in used]
            dcoeffs, buffer = combine_backward_op(
                coeffs, given, dweights, ctx.sizes, used, need_coeffs, wanted, ctx.backend
            )
            places = [i for i in used if needs[i]]
            found = views(buffer, coeffs.shape[-1], [anchors[i] for i in places])
            for i, danchor in zip(places, found, strict=True):
                danchors[i] = danchor
        return dcoeffs if need_coeffs else None, None, None, *danchors


def _listed(sizes):
    """The reference with one argument per anchor tensor and a tuple of results."""

    def reference(coeffs, *anchors):
        if sizes is None:
            return tuple(_composite(coeffs, anchors, None))
        return (_composite(coeffs, anchors[0], sizes),)

    return reference


def _dense(grad: Tensor) -> Tensor:
    """`grad` with every member contiguous; autograd may hand over expanded or transposed ones."""
    return grad if _contiguous_within(grad) else grad.contiguous()


def _contiguous_within(t: Tensor) -> bool:
    return t.is_contiguous() or t[0].is_contiguous()


def _check_flat(coeffs, anchors, sizes) -> tuple[int, ...] | None:
    """`sizes` where they matter: None where all of P shares its coefficients."""
    _check_coeffs(coeffs)
    check_tensor("combine", "anchors", anchors, "K, P", (coeffs.shape[-1], None))
    _check_alike(coeffs, anchors)
    if sizes is None:
        if coeffs.ndim == 3:
            rule, remedy = "given with coeffs [M, L, K]", "sizes=(P,) makes one part"
            _refuse("sizes", rule, None, remedy)
        return None
    sizes, P = tuple(sizes), anchors.shape[1]
    L = coeffs.shape[1] if coeffs.ndim == 3 else len(sizes)
    if not (len(sizes) == L > 0 and min(sizes) >= 0 and sum(sizes) == P):
        _refuse("sizes", f"L = {max(L, 1)} sizes of parts with sum P = {P}", sizes)
    return sizes if coeffs.ndim == 3 else None


def _check_list(coeffs, anchors, sizes) -> None:
    _check_coeffs(coeffs)
    if not isinstance(anchors, (list, tuple)):
        rule = "a Tensor [K, P] or a list of Tensors [K, ...]"
        _refuse("anchors", rule, type(anchors).__name__, error=TypeError)
    if sizes is not None:
        _refuse("sizes", "None for a list, whose shapes tell", sizes)
    if coeffs.ndim == 3 and coeffs.shape[1] != len(anchors):
        rule = f"[M, L, K] with L = {len(anchors)}, the number of anchor tensors"
        _refuse("coeffs", rule, list(coeffs.shape))
    K = coeffs.shape[-1]
    for i, a in enumerate(anchors):
        if not isinstance(a, Tensor):
            _refuse(f"anchors[{i}]", "a Tensor [K, ...]", type(a).__name__, error=TypeError)
        if a.ndim == 0 or a.shape[0] != K:
            _refuse(f"anchors[{i}]", f"[K, ...] with K = {K}", list(a.shape))
        if a.dtype != anchors[0].dtype:
            rule = f"of the dtype of anchors[0], {names([anchors[0].dtype])}"
            _refuse(f"anchors[{i}]", rule, names([a.dtype]), "make one call for each dtype")
        if a.device != anchors[0].device:
            rule = f"on the device of anchors[0], {anchors[0].device}"
            _refuse(f"anchors[{i}]", rule, a.device)
    if len(anchors):
        if anchors[0].dtype not in FLOATS:
            _refuse("anchors", f"one of {names(FLOATS)}", names([anchors[0].dtype]))
        _check_alike(coeffs, anchors[0])


def _check_out(out, coeffs, anchors, flat: bool) -> None:
    rule = "None for a list, or where a gradient is recorded"
    if not flat:
        _refuse("out", rule, type(out).__name__)
    sizes = coeffs.shape[0], anchors.shape[1]
    check_tensor("combine", "out", out, "M, P", sizes, like=anchors, like_name="anchors")
    if wants_grad(coeffs, anchors, out):
        _refuse("out", rule, type(out).__name__)
    if not out.is_contiguous():
        _refuse("out", "contiguous", f"strides {tuple(out.stride())}")


def _check_coeffs(coeffs) -> None:
    if not isinstance(coeffs, Tensor):
        _refuse("coeffs", "a Tensor [M, K] or [M, L, K]", type(coeffs).__name__, error=TypeError)
    if coeffs.ndim not in (2, 3):
        _refuse("coeffs", "[M, K] or [M, L, K]", list(coeffs.shape))


def _check_alike(coeffs, anchors) -> None:
    if coeffs.dtype not in (anchors.dtype, torch.float32):
        rule = f"float32 or of the dtype of anchors, {names([anchors.dtype])}"
        _refuse("coeffs", rule, names([coeffs.dtype]))
    if coeffs.device != anchors.device:
        _refuse("coeffs", f"on the device of anchors, {anchors.device}", coeffs.device)


def _check_strides(tensors, flat: bool) -> None:
    for i, a in enumerate(tensors):
        if not _contiguous_within(a):
            argument = "anchors" if flat else f"anchors[{i}]"
            rule = "of unit stride along P" if flat else "contiguous within each anchor"
            remedy = "call .contiguous() once, outside the loop"
            _refuse(argument, rule, f"strides {tuple(a.stride())}", remedy)


def _refuse(argument, rule, got, remedy=None, error=ValueError):
    raise error(message("combine", argument, rule, got, remedy))
