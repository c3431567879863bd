"""BatchEnsemble convolution as a function, and the moves between member layouts."""

import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops._checks import check_tensor, message, require
from landscape_fast.ops._dispatch import autocast

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def batch_ensemble_conv2d(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "member_major",
) -> Tensor:
    r"""M convolutions that share one weight and differ by a rank-1 factor each.

    .. math:: y_m = s_m \circ \mathrm{conv}(x_m \circ r_m, W) + b_m

    Both factors scale whole channels, so this equals a convolution with the weight
    `weight * s[m, o] * r[m, i]` for every stride, padding, dilation and number of groups.

    Args:
        x: [M, B, I, H, W], or [B, I, H, W] shared by all members; [M*B, I, H, W] with members in
            consecutive rows for the folded layout. Channels-last memory is kept.
        weight: [O, I / groups, kh, kw].
        r: [M, I] or None.
        s: [M, O] or None.
        bias: [M, O], or [O] shared by all members, or None.
        stride, dilation, groups: as in `torch.nn.functional.conv2d`.
        padding: numbers, "same" (stride 1 only) or "valid".
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        layout: "member_major" or "folded".

    Returns:
        [M, B, O, H', W'], or [M*B, O, H', W'] for the folded layout, in the dtype of `x` (of
        autocast where it is on).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or options disagree, or nothing tells M.

    Cost: one convolution of M*B images, and one pass over its input and output for the factors. A
    shared `x` without `r` is convolved once, for all members. Differentiable to any order.

    Source: Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> import torch
        >>> x = torch.ones(1, 1, 2, 2)  # one image, shared by two members
        >>> s = torch.tensor([[1.0], [-2.0]])
        >>> batch_ensemble_conv2d(x, torch.ones(1, 1, 2, 2), s=s).flatten()
        tensor([ 4., -8.])
    """
    op = "batch_ensemble_conv2d"
    for name, given in (("x", x), ("weight", weight), ("r", r), ("s", s), ("bias", bias)):
        if not (isinstance(given, Tensor) or given is None and name not in ("x", "weight")):
            raise TypeError(message(op, name, "a Tensor", type(given).__name__))
    # Before the checks: under autocast x comes in the low type and the parameters do not.
    x, weight, r, s, bias = autocast(x, weight, r, s, bias)
    stride, padding, dilation = conv_options(op, stride, padding, dilation, groups, padding_mode)
    members = _check(op, x, weight, r, s, bias, groups, layout)
    before, padding = _paddings(padding, padding_mode, weight.shape[2:], dilation)

    if layout == "folded":
        x = x.unflatten(0, (members, x.shape[0] // members))
    elif x.ndim == 4:
        x = x.unsqueeze(0)  # [1, B, I, H, W]: r, s or bias broadcast it to the members
    if r is not None:
        x = x * r[:, None, :, None, None]
    shape = x.shape[:2]
    images = x.flatten(0, 1)
    if before is not None:
        images = F.pad(images, before, mode=padding_mode)
    inner = bias if s is None and bias is not None and bias.ndim == 1 else None
    y = F.conv2d(images, weight, inner, stride, padding, dilation, groups).unflatten(0, shape)
    if s is not None:
        y = y * s[:, None, :, None, None]
    if bias is not None and inner is None:
        y = y + (bias[:, None, :, None, None] if bias.ndim == 2 else bias[:, None, None])
    y = y if y.shape[0] == members else y.expand(members, *y.shape[1:])
    return y.flatten(0, 1) if layout == "folded" else y


def tile_members(x: Tensor, members: int) -> Tensor:
    """[B, ...] -> [M*B, ...]: every member gets the whole batch, members in consecutive rows."""
    check_count("tile_members", "members", members)
    require(x.ndim > 0, "tile_members", "x", "[B, ...]", list(x.shape))
    return x.expand(members, *x.shape).flatten(0, 1)


def split_members(y: Tensor, members: int) -> Tensor:
    """[M*B, ...] -> [M, B, ...], a view: the inverse of folding members into rows."""
    check_count("split_members", "members", members)
    ok = y.ndim > 0 and y.shape[0] % members == 0
    require(ok, "split_members", "y", f"[M*B, ...] with M = {members}", list(y.shape))
    return y.unflatten(0, (members, y.shape[0] // members))


def check_count(op: str, argument: str, value: int) -> None:
    """An int of at least 1; a bool is not a count."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(ok, op, argument, "an integer of at least 1", repr(value))


def pair(op: str, argument: str, value, least: int) -> tuple[int, int]:
    """An int or two ints, each at least `least`, as two ints."""
    both = (value, value) if isinstance(value, int) else value
    ok = isinstance(both, tuple | list) and len(both) == 2
    ok = ok and all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in both)
    require(ok, op, argument, f"an integer or two, at least {least}", repr(value))
    return tuple(both)


def conv_options(op: str, stride, padding, dilation, groups: int, padding_mode: str) -> tuple:
    """Checks the options of a convolution; returns stride, padding (or its name) and dilation."""
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        rule = "'same', 'valid' or numbers"
        require(padding in ("same", "valid"), op, "padding", rule, repr(padding))
        strided = padding == "same" and stride != (1, 1)
        require(not strided, op, "stride", "1 with padding 'same'", stride)
    else:
        padding = pair(op, "padding", padding, 0)
    check_count(op, "groups", groups)
    rule = "one of " + ", ".join(map(repr, PADDING_MODES))
    require(padding_mode in PADDING_MODES, op, "padding_mode", rule, repr(padding_mode))
    return stride, padding, dilation


def _check(op, x, weight, r, s, bias, groups, layout) -> int:
    """Raises for tensors that do not fit together; returns M."""
    layouts = ("member_major", "folded")
    require(layout in layouts, op, "layout", "'member_major' or 'folded'", repr(layout))
    check_tensor(op, "weight", weight, "O, I / groups, kh, kw", (None,) * 4)
    O, I = weight.shape[0], weight.shape[1] * groups
    require(O % groups == 0, op, "groups", f"a divisor of O = {O}", groups)

    told = [t.shape[0] for t in (r, s, bias) if t is not None and t.ndim == 2]
    if x.ndim == 5 and layout == "member_major":
        told.append(x.shape[0])
    rule = "a tensor with a row per member where x has no member dimension"
    require(bool(told), op, "r, s or bias", rule, f"x {list(x.shape)}")
    M = told[0]
    require(M >= 1, op, "r, s, bias or x", "of at least one member", M)
    like = {"like": weight, "like_name": "weight"}
    if layout == "folded":
        check_tensor(op, "x", x, "M*B, I, H, W", (None, I, None, None), **like)
        rule = f"[M*B, I, H, W] with a multiple of M = {M} rows"
        require(x.shape[0] % M == 0, op, "x", rule, list(x.shape), "drop or pad the last rows")
    elif x.ndim == 4:
        check_tensor(op, "x", x, "B, I, H, W", (None, I, None, None), **like)
    else:
        check_tensor(op, "x", x, "M, B, I, H, W", (M, None, I, None, None), **like)
    for name, factor, letter, size in (("r", r, "I", I), ("s", s, "O", O)):
        if factor is not None:
            check_tensor(op, name, factor, f"M, {letter}", (M, size), **like)
    if bias is not None and bias.ndim == 1:
        check_tensor(op, "bias", bias, "O", (O,), **like)
    elif bias is not None:
        check_tensor(op, "bias", bias, "M, O", (M, O), **like)
    return M


def _paddings(padding, mode, kernel, dilation):
    """(amounts for F.pad or None, padding of F.conv2d): a mode other than zeros pads before."""
    if mode == "zeros":
        return None, padding
    if isinstance(padding, str):
        same = padding == "same"
        total = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
        (top, bottom), (left, right) = [(t // 2, t - t // 2) for t in total]
    else:
        (top, bottom), (left, right) = [(p, p) for p in padding]
    return (left, right, top, bottom), 0


def merged_weight(weight: Tensor, r: Tensor | None, s: Tensor | None, groups: int = 1) -> Tensor:
    """The weight of one member, `weight * s[o] * r[i]`: r [I] or None, s [O] or None."""
    merged = weight.clone()
    tail = (1,) * (weight.ndim - 2)
    if s is not None:
        merged *= s.view(-1, 1, *tail)
    if r is not None:
        # Input channel j of group g is feature g * I / groups + j.
        per_output = r.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        merged *= per_output.view(*per_output.shape, *tail)
    return merged
