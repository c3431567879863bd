"""Options and shapes of the BatchEnsemble convolutions, in one to three dimensions."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._checks import (
    FLOATS,
    LOW,
    check_tensor,
    message,
    names,
    require,
    whole,
)

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
LAYOUTS = ("member_major", "folded")
ACTIVATIONS = (None, "relu")
PIXELS = {1: "W", 2: "H, W", 3: "D, H, W"}
KERNEL = {1: "k", 2: "kh, kw", 3: "kd, kh, kw"}
COUNTS = {1: "one", 2: "two", 3: "three"}


class Conv(NamedTuple):
    """How to convolve: all that is neither a tensor nor a size."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # of the convolution itself, zeros on both sides
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0,)
    before: tuple[int, ...] = ()  # amounts of `F.pad`, last dimension first, if anything
    mode: str = "constant"  # of that padding


def check_count(op: str, argument: str, value: int) -> None:
    """An int of at least 1; a bool is not a count."""
    if not whole(value, 1):  # torch.compile cannot trace the repr of a dynamic size
        raise ValueError(message(op, argument, "an integer of at least 1", repr(value)))


def pair(op: str, argument: str, value, least: int, dims: int = 2) -> tuple[int, ...]:
    """An int or `dims` ints, each at least `least`, as `dims` ints."""
    found = (value,) * dims if isinstance(value, int) else value
    ok = isinstance(found, (tuple, list)) and len(found) == dims
    ok = ok and all(whole(v, least) for v in found)
    if not ok:
        many = f"an integer or {COUNTS[dims]}" if dims > 1 else "an integer"
        raise ValueError(message(op, argument, f"{many}, at least {least}", repr(value)))
    return tuple(found)


def conv_options(
    op: str, stride, padding, dilation, groups: int, padding_mode: str, dims: int = 2
) -> tuple:
    """Checks the options of a convolution; returns stride, padding (or its name) and dilation."""
    stride, dilation = pair(op, "stride", stride, 1, dims), pair(op, "dilation", dilation, 1, dims)
    if isinstance(padding, str):
        rule = "'same', 'valid' or numbers"
        require(padding in ("same", "valid"), op, "padding", rule, repr(padding))
        strided = padding == "same" and stride != (1,) * dims
        require(not strided, op, "stride", "1 with padding 'same'", stride)
    else:
        padding = pair(op, "padding", padding, 0, dims)
    check_count(op, "groups", groups)
    rule = "one of " + ", ".join(map(repr, PADDING_MODES))
    require(padding_mode in PADDING_MODES, op, "padding_mode", rule, repr(padding_mode))
    return stride, padding, dilation


def geometry(
    op: str, kernel, stride, padding, dilation, groups, padding_mode, output_padding, transposed
) -> Conv:
    """Checks all options, and brings every kind of padding into one form."""
    dims = len(kernel)
    options = (op, stride, padding, dilation, groups, padding_mode, dims)
    stride, padding, dilation = conv_options(*options)
    if transposed:
        output_padding = pair(op, "output_padding", output_padding, 0, dims)
        rule = "numbers for a transposed convolution"
        require(not isinstance(padding, str), op, "padding", rule, repr(padding))
        rule = "'zeros' for a transposed convolution"
        require(padding_mode == "zeros", op, "padding_mode", rule, repr(padding_mode))
        small = all(o < max(a, b) for o, a, b in zip(output_padding, stride, dilation, strict=True))
        rule = "smaller than stride or dilation"
        require(small, op, "output_padding", rule, output_padding)
        return Conv(stride, padding, dilation, groups, True, output_padding)
    none = (0,) * dims
    if output_padding not in (0, none):
        raise ValueError(message(op, "output_padding", "0", repr(output_padding)))
    if isinstance(padding, str):
        same = padding == "same"
        total = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in padding]
    plain = all(a == b for a, b in sides)
    if padding_mode == "zeros" and plain:
        return Conv(stride, tuple(a for a, _ in sides), dilation, groups, output_padding=none)
    before = tuple(n for side in reversed(sides) for n in side)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return Conv(stride, none, dilation, groups, False, none, before if any(before) else (), mode)


def output_size(size: tuple[int, ...], kernel: tuple[int, ...], conv: Conv) -> tuple[int, ...]:
    """Pixels of the output."""
    found = []
    for d, (n, k) in enumerate(zip(size, kernel, strict=True)):
        reach = conv.dilation[d] * (k - 1)
        if conv.transposed:
            out = (n - 1) * conv.stride[d] - 2 * conv.padding[d] + reach
            found.append(out + conv.output_padding[d] + 1)
            continue
        if conv.before:
            at = 2 * (len(kernel) - 1 - d)
            n = n + conv.before[at] + conv.before[at + 1]
        found.append((n + 2 * conv.padding[d] - reach - 1) // conv.stride[d] + 1)
    return tuple(found)


def check(op, x, weight, r, s, bias, conv: Conv, layout: str, activation) -> int:
    """Raises for tensors that do not fit together; returns M."""
    dims, groups = weight.ndim - 2, conv.groups
    require(layout in LAYOUTS, op, "layout", "'member_major' or 'folded'", repr(layout))
    require(activation in ACTIVATIONS, op, "activation", "None or 'relu'", repr(activation))
    first, second = weight.shape[:2]
    if conv.transposed:
        I, O = first, second * groups
        require(I % groups == 0, op, "groups", f"a divisor of I = {I}", groups)
        weight_letters = f"I, O / groups, {KERNEL[dims]}"
    else:
        O, I = first, second * groups
        require(O % groups == 0, op, "groups", f"a divisor of O = {O}", groups)
        weight_letters = f"O, I / groups, {KERNEL[dims]}"
    require(weight.dtype in FLOATS, op, "weight", f"one of {names(FLOATS)}", weight.dtype)
    rule = f"[{weight_letters}] with no empty dimension"
    require(all(weight.shape), op, "weight", rule, list(weight.shape))

    told = [t.shape[0] for t in (r, s, bias) if t is not None and t.ndim == 2]
    if x.ndim == dims + 3 and layout == "member_major":
        told.append(x.shape[0])
    rule = "a tensor with a row per member where x has no member dimension"
    require(len(told) > 0, op, "r, s or bias", rule, f"x {list(x.shape)}")
    M = told[0]
    require(M >= 1, op, "r, s, bias or x", "of at least one member", M)
    if layout == "folded":
        letters, sizes = "M*B, I", (None, I)
    elif x.ndim == dims + 2:
        letters, sizes = "B, I", (None, I)
    else:
        letters, sizes = "M, B, I", (M, None, I)
    mixed = x.dtype in LOW and weight.dtype == torch.float32
    like = {} if mixed else {"like": weight, "like_name": "weight"}
    check_tensor(op, "x", x, f"{letters}, {PIXELS[dims]}", (*sizes, *[None] * dims), **like)
    like = {"like": x, "like_name": "x", "or_float32": True}
    check_tensor(op, "weight", weight, weight_letters, (None,) * weight.ndim, **like)
    if layout == "folded":
        rule = f"[M*B, I, {PIXELS[dims]}] with a multiple of M = {M} rows"
        require(x.shape[0] % M == 0, op, "x", rule, list(x.shape), "drop or pad the last rows")
    for name, factor, letter, size in (("r", r, "I", I), ("s", s, "O", O)):
        if factor is not None:
            check_tensor(op, name, factor, f"M, {letter}", (M, size), **like)
    if bias is not None and bias.ndim == 1:
        check_tensor(op, "bias", bias, "O", (O,), **like)
    elif bias is not None:
        check_tensor(op, "bias", bias, "M, O", (M, O), **like)
    check_pixels(op, x, weight, conv)
    return M


def check_pixels(op: str, x: Tensor, weight: Tensor, conv: Conv) -> None:
    """Raises where padding has no pixel to copy, or no output pixel is left."""
    kernel, dims = tuple(weight.shape[2:]), weight.ndim - 2
    pixels = tuple(x.shape[-dims:])
    if conv.before and conv.mode != "constant":
        # a pixel that is reflected, or met again on the way round, must be there
        most = [n - int(conv.mode == "reflect") for n in pixels]
        wide = [max(conv.before[2 * d : 2 * d + 2]) for d in reversed(range(dims))]
        fits = conv.mode == "replicate" or all(p <= n for p, n in zip(wide, most, strict=True))
        rule = f"at most {most} with padding_mode '{conv.mode}' on pixels {list(pixels)}"
        require(fits, op, "padding", rule, wide)
    fits = all(n >= 1 for n in (*pixels, *output_size(pixels, kernel, conv)))
    rule = f"of at least one output pixel for a kernel {list(kernel)}"
    require(fits, op, "x", rule, list(x.shape))
