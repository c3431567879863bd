"""Options and shapes of subspace_conv2d."""

import functools

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv_checks import (
    KERNEL,
    LAYOUTS,
    PIXELS,
    Conv,
    geometry,
    output_size,
)
from landscape_fast.ops._checks import FLOATS, LOW, check_tensor, check_types, names, require
from landscape_fast.ops._dispatch import autocast_input

NAMES = ("x", "anchors", "coeffs", "bias")


def _conv(op: str, kernel, stride, padding, dilation, groups) -> Conv:
    return geometry(op, kernel, stride, padding, dilation, groups, "zeros", 0, False)


_remembered = functools.lru_cache(maxsize=1024)(_conv)


def options(op: str, kernel, stride, padding, dilation, groups) -> Conv:
    """Checks how to convolve; a network has few layers, which all come again at every step."""
    given = (stride, padding, dilation, groups)
    sizes = [n for g in given for n in (g if type(g) is tuple else (g,))]
    # True and 1.0 equal 1, but are no sizes; a list cannot be looked up
    known = all(type(n) in (int, str) for n in sizes) and not torch.compiler.is_compiling()
    return (_remembered if known else _conv)(op, kernel, *given)


def prepare(op: str, tensors: tuple, given: tuple, layout: str) -> tuple[tuple, int, Conv]:
    """Checks everything; returns the tensors with x as [M or 1, B, I, H, W], M, and the options.

    Args:
        tensors: x, anchors, coeffs, bias.
        given: stride, padding, dilation, groups.
    """
    check_types(op, dict(zip(NAMES, tensors, strict=True)), NAMES[:2])
    x, anchors, coeffs, bias = autocast_input(*tensors)
    letters = f"K, O, I / groups, {KERNEL[2]}"
    require(anchors.ndim == 5, op, "anchors", f"[{letters}]", list(anchors.shape))
    conv = options(op, tuple(anchors.shape[3:]), *given)
    members = _members(op, x, anchors, coeffs, bias, conv, layout)
    if layout == "folded":
        x = x.unflatten(0, (members, x.shape[0] // members))
    elif x.ndim == 4:
        x = x.unsqueeze(0)
    return (x, anchors, coeffs, bias), members, conv


def _members(op, x, anchors, coeffs, bias, conv: Conv, layout: str) -> int:
    """Raises for tensors that do not fit together; returns M."""
    require(layout in LAYOUTS, op, "layout", "'member_major' or 'folded'", repr(layout))
    K, O, per_group, *kernel = anchors.shape
    letters = f"K, O, I / groups, {KERNEL[2]}"
    rule = f"[{letters}] with no empty dimension"
    require(all(anchors.shape), op, "anchors", rule, list(anchors.shape))
    require(anchors.dtype in FLOATS, op, "anchors", f"one of {names(FLOATS)}", anchors.dtype)
    require(O % conv.groups == 0, op, "groups", f"a divisor of O = {O}", conv.groups)
    M, I = K, per_group * conv.groups
    if coeffs is not None:
        check_tensor(op, "coeffs", coeffs, "M, K", (None, K), dtypes=_with_float32(anchors))
        M = coeffs.shape[0]
        rule = "[M, K] of at least one member"
        require(M > 0, op, "coeffs", rule, list(coeffs.shape))
        rule = f"on the device of anchors, {anchors.device}"
        require(coeffs.device == anchors.device, op, "coeffs", rule, str(coeffs.device))
    if bias is not None:
        check_tensor(op, "bias", bias, "K, O", (K, O), like=anchors, like_name="anchors")
    if layout == "folded":
        letters, sizes = "M*B, I", (None, I)
    elif x.ndim == 4:
        letters, sizes = "B, I", (None, I)
    else:
        letters, sizes = "M, B, I", (M, None, I)
    mixed = x.dtype in LOW and anchors.dtype == torch.float32
    like = {} if mixed else {"like": anchors, "like_name": "anchors"}
    check_tensor(op, "x", x, f"{letters}, {PIXELS[2]}", (*sizes, None, None), **like)
    rule = f"on the device of anchors, {anchors.device}"
    require(x.device == anchors.device, op, "x", rule, str(x.device))
    if layout == "folded":
        rule = f"[M*B, I, {PIXELS[2]}] with a multiple of M = {M} rows"
        require(x.shape[0] % M == 0, op, "x", rule, list(x.shape), "drop or pad the last rows")
    pixels = tuple(x.shape[-2:])
    fits = all(n >= 1 for n in (*pixels, *output_size(pixels, tuple(kernel), conv)))
    if not fits:
        rule = f"of at least one output pixel for a kernel {list(kernel)}"
        require(fits, op, "x", rule, list(x.shape))
    return M


def _with_float32(anchors: Tensor) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys((anchors.dtype, torch.float32)))


def alone(tensors: tuple, layout: str, groups: int) -> Tensor | None:
    """The images [B, I, H, W] of the one member that there is, where all is plain; else None.

    Whatever is not plain, or wrong, is for `prepare` to treat.
    """
    x, anchors, coeffs, bias = tensors
    if coeffs is not None or not isinstance(anchors, Tensor) or not isinstance(x, Tensor):
        return None
    if anchors.ndim != 5 or anchors.shape[0] != 1 or x.dtype != anchors.dtype:
        return None
    if x.ndim == 5 and x.shape[0] == 1 and layout == "member_major":
        x = x[0]
    if x.ndim != 4 or layout not in LAYOUTS or x.device != anchors.device:
        return None
    if x.dtype not in FLOATS:
        return None
    if not isinstance(groups, int) or x.shape[1] != anchors.shape[2] * groups:
        return None
    if bias is None:
        return x
    plain = isinstance(bias, Tensor) and bias.shape == anchors.shape[:2]
    return x if plain and bias.dtype == x.dtype and bias.device == x.device else None
