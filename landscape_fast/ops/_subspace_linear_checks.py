"""What subspace_linear refuses."""

import torch
from torch import Tensor

from landscape_fast.ops import _checks
from landscape_fast.ops._checks import FLOATS, LOW, check_tensor, require

OP = "subspace_linear"
LAYOUTS = ("member_major", "batch_major", "folded")


def check_types(x, anchors, coeffs, bias, layout) -> None:
    """What must hold before anything is read off the tensors."""
    given = {"x": x, "anchors": anchors, "coeffs": coeffs, "bias": bias}
    _checks.check_types(OP, given, ("x", "anchors"))
    if layout not in LAYOUTS:
        require(False, OP, "layout", f"one of {LAYOUTS}", repr(layout))


def check(x, anchors, coeffs, bias, layout) -> int:
    """Holds all arguments against each other; returns M."""
    if not _fits(x, anchors, coeffs, bias, layout):
        _refuse_or_accept(x, anchors, coeffs, bias, layout)
    return anchors.shape[0] if coeffs is None else coeffs.shape[0]


def _fits(x, anchors, coeffs, bias, layout) -> bool:
    """Whether all is plainly in order, in a microsecond or two: no message is made up."""
    dtype, device = x.dtype, x.device
    if anchors.ndim != 3 or dtype not in FLOATS:
        return False
    K, O, I = anchors.shape
    M = K
    if coeffs is not None:
        if coeffs.ndim != 2 or coeffs.dtype != dtype or coeffs.device != device:
            return False
        M = coeffs.shape[0]
        dense = anchors.is_contiguous() and (bias is None or bias.is_contiguous())
        if coeffs.shape[1] != K or not dense:
            return False
    for t, shape in ((anchors, (K, O, I)), (bias, (K, O))):
        if t is not None and (t.dtype != dtype or t.device != device or t.shape != shape):
            return False
    if x.ndim == 2:
        fits = x.shape[0] % M == 0 if layout == "folded" and M else layout != "folded"
        return fits and x.shape[1] == I
    where = 0 if layout == "member_major" else 1
    return x.ndim == 3 and layout != "folded" and x.shape[where] == M and x.shape[2] == I


def _refuse_or_accept(x, anchors, coeffs, bias, layout) -> None:
    """All rules one by one: raises for the first that is broken."""
    check_tensor(OP, "anchors", anchors, "K, O, I", (None, None, None))
    K, O, I = anchors.shape
    M = K
    if coeffs is not None:
        dtypes = tuple(dict.fromkeys((anchors.dtype, torch.float32)))
        check_tensor(OP, "coeffs", coeffs, "M, K", (None, K), dtypes=dtypes)
        rule = f"on the device of anchors, {anchors.device}"
        require(coeffs.device == anchors.device, OP, "coeffs", rule, str(coeffs.device))
        _check_strides("anchors", anchors)
        M = coeffs.shape[0]
    if bias is not None:
        check_tensor(OP, "bias", bias, "K, O", (K, O), like=anchors, like_name="anchors")
        if coeffs is not None:
            _check_strides("bias", bias)
    shapes = {"member_major": "[M, B, I] or [B, I]", "batch_major": "[B, M, I] or [B, I]"}
    fits = x.ndim == 2 or (x.ndim == 3 and layout != "folded")
    require(fits, OP, "x", shapes.get(layout, "[M*B, I]"), list(x.shape))
    letters, sizes = ("M*B, I" if layout == "folded" else "B, I"), (None, I)
    if x.ndim == 3:
        batch_major = layout == "batch_major"
        letters = "B, M, I" if batch_major else "M, B, I"
        sizes = (None, M, I) if batch_major else (M, None, I)
    low = x.dtype in LOW and anchors.dtype == torch.float32
    like = {} if low else {"like": anchors, "like_name": "anchors"}
    check_tensor(OP, "x", x, letters, sizes, **like)
    rule = f"on the device of anchors, {anchors.device}"
    require(x.device == anchors.device, OP, "x", rule, str(x.device))
    if layout == "folded":
        fits = x.shape[0] % M == 0 if M else x.shape[0] == 0
        require(fits, OP, "x", f"[M*B, I] with rows divisible by M = {M}", list(x.shape))


def _check_strides(argument: str, t: Tensor) -> None:
    if t.is_contiguous() or not t.shape[0] or t[0].is_contiguous():
        return
    got, remedy = f"strides {tuple(t.stride())}", "call .contiguous() once, outside the loop"
    require(False, OP, argument, "contiguous within each anchor, to be mixed", got, remedy)


def alone(x, anchors, coeffs, bias, layout) -> Tensor | None:
    """The rows [B, I] of the one member that there is, where all is plain; else None.

    Whatever is not plain, or wrong, is for `check` to treat.
    """
    if coeffs is not None or not isinstance(anchors, Tensor) or not isinstance(x, Tensor):
        return None
    if anchors.ndim != 3 or anchors.shape[0] != 1 or x.dtype != anchors.dtype:
        return None
    if x.ndim == 3 and layout != "folded":
        dim = 1 if layout == "batch_major" else 0
        if x.shape[dim] != 1:
            return None
        x = x.squeeze(dim)
    known = x.ndim == 2 and layout in LAYOUTS and x.dtype in FLOATS
    if not known or x.shape[1] != anchors.shape[2] or x.device != anchors.device:
        return None
    if bias is None:
        return x
    plain = isinstance(bias, Tensor) and bias.shape == anchors.shape[:2]
    return x if plain and bias.dtype == x.dtype and bias.device == x.device else None
