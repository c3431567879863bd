"""What batch_ensemble_linear refuses, and how it learns the number of members."""

import os

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_ways import members_dim
from landscape_fast.ops._checks import FLOATS, check_tensor, message, names, require
from landscape_fast.ops._dispatch import transforming

OP = "batch_ensemble_linear"
LAYOUTS = ("member_major", "batch_major", "folded")
ACTIVATIONS = (None, "relu")


def check_types(x, weight, r, s, bias, layout, index, activation) -> None:
    """What must hold before anything is read off the tensors."""
    required = {"x": x, "weight": weight}
    for name, t in {**required, "r": r, "s": s, "bias": bias, "index": index}.items():
        if not isinstance(t, Tensor) and (t is not None or name in required):
            raise TypeError(message(OP, name, "a Tensor", type(t).__name__))
    require(layout in LAYOUTS, OP, "layout", f"one of {LAYOUTS}", repr(layout))
    known = activation in ACTIVATIONS
    require(known, OP, "activation", f"one of {ACTIVATIONS}", repr(activation))
    rule = "'folded' with an index"
    require(index is None or layout == "folded", OP, "layout", rule, repr(layout))


def check(x, weight, r, s, bias, layout, index) -> int:
    """Holds all arguments against each other; returns M."""
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
    if index is not None:
        check_index(index, x, M)
    elif layout == "folded":
        fits = x.shape[0] % M == 0 if M else x.shape[0] == 0
        require(fits, OP, "x", f"[M*B, I] with rows divisible by M = {M}", list(x.shape))
    return M


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
