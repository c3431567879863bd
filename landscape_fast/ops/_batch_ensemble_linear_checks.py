"""What batch_ensemble_linear refuses, and how it learns the number of members."""

import os

import torch
from torch import Tensor

from landscape_fast.ops import _checks
from landscape_fast.ops._batch_ensemble_linear_ways import members_dim
from landscape_fast.ops._checks import FLOATS, LOW, check_tensor, message, names, require
from landscape_fast.ops._dispatch import transforming

OP = "batch_ensemble_linear"
LAYOUTS = ("member_major", "batch_major", "folded")
ACTIVATIONS = (None, "relu")


def check_types(x, weight, r, s, bias, layout, index, activation) -> None:
    """What must hold before anything is read off the tensors."""
    given = {"x": x, "weight": weight, "r": r, "s": s, "bias": bias, "index": index}
    _checks.check_types(OP, given, ("x", "weight"))
    if layout not in LAYOUTS:
        require(False, OP, "layout", f"one of {LAYOUTS}", repr(layout))
    if activation not in ACTIVATIONS:
        require(False, OP, "activation", f"one of {ACTIVATIONS}", repr(activation))
    if index is not None and layout != "folded":
        require(False, OP, "layout", "'folded' with an index", repr(layout))


def check(x, weight, r, s, bias, layout, index) -> int:
    """Holds all arguments against each other; returns M."""
    M = members_of(x, r, s, bias, layout) if x.ndim in (2, 3) else None
    if M is None or not _fits(x, weight, r, s, bias, layout, index, M):
        _refuse_or_accept(x, weight, r, s, bias, layout, index)
    if index is not None:
        check_index(index, x, M)
    return M


def _fits(x, weight, r, s, bias, layout, index, M) -> bool:
    """Whether all is in order, in a microsecond or two: no message is made up."""
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS or weight.ndim != 2 or (x.ndim == 3 and layout == "folded"):
        return False
    O, I = weight.shape
    if x.shape[-1] != I or (layout == "folded" and index is None and (not M or x.shape[0] % M)):
        return False
    or_this = torch.float32 if dtype in LOW else dtype
    of_bias = (O,) if bias is not None and bias.ndim == 1 else (M, O)
    for t, shape in ((weight, (O, I)), (r, (M, I)), (s, (M, O)), (bias, of_bias)):
        if t is not None:
            given = t.dtype
            if t.shape != shape or t.device != device or (given != dtype and given != or_this):
                return False
    return True


def _refuse_or_accept(x, weight, r, s, bias, layout, index) -> None:
    """All rules one by one: raises for the first that is broken."""
    shapes = {"member_major": "[M, B, I] or [B, I]", "batch_major": "[B, M, I] or [B, I]"}
    folded = "[M*B, I]" if index is None else "[N, I]"
    fits = x.ndim == 2 or (x.ndim == 3 and layout != "folded")
    require(fits, OP, "x", shapes.get(layout, folded), list(x.shape))
    require(x.dtype in FLOATS, OP, "x", f"one of {names(FLOATS)}", x.dtype)
    like = {"like": x, "like_name": "x", "or_float32": True}
    check_tensor(OP, "weight", weight, "O, I", (None, x.shape[-1]), **like)
    (O, I), M = weight.shape, members_of(x, r, s, bias, layout)
    rule = "[M, B, I]" if layout == "member_major" else "[B, M, I]"
    rule += " where neither r, s nor a bias [M, O] gives the number of members"
    require(M is not None, OP, "x", rule, list(x.shape))
    if r is not None:
        check_tensor(OP, "r", r, "M, I", (M, I), **like)
    if s is not None:
        check_tensor(OP, "s", s, "M, O", (M, O), **like)
    if bias is not None and bias.ndim == 1:
        check_tensor(OP, "bias", bias, "O", (O,), **like)
    elif bias is not None:
        check_tensor(OP, "bias", bias, "M, O", (M, O), **like)
    if layout == "folded" and index is None:
        fits = x.shape[0] % M == 0 if M else x.shape[0] == 0
        require(fits, OP, "x", f"[M*B, I] with rows divisible by M = {M}", list(x.shape))


def members_of(x, r, s, bias, layout) -> int | None:
    """M, from x or else from the first factor that has it; folded rows without factors are one."""
    if x.ndim == 3:
        return x.shape[members_dim(layout == "batch_major")]
    for t in (r, s, bias):
        if t is not None and t.ndim == 2:
            return t.shape[0]
    return 1 if layout == "folded" else None


def check_index(index: Tensor, x: Tensor, M: int) -> None:
    """Shape, dtype, device; and the values, where reading them does not wait for a device."""
    check_tensor(OP, "index", index, "N", (x.shape[0],), dtypes=(torch.int64,))
    rule = f"on the device of x, {x.device}"
    require(index.device == x.device, OP, "index", rule, str(index.device))
    debug = os.environ.get("LANDSCAPE_FAST_DEBUG") == "1"
    readable = index.device.type == "cpu" or (debug and index.device.type == "cuda")
    plain = type(index) is Tensor and not transforming() and not torch.compiler.is_compiling()
    if readable and plain:
        bad = (index < 0) | (index >= M)
        if bad.any():
            n = int(bad.nonzero()[0, 0])
            rule = f"members in [0, M) with M = {M}"
            raise IndexError(message(OP, "index", rule, f"{int(index[n])} for row {n}"))
