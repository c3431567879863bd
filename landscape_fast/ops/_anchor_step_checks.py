"""What `anchor_step` asks of its arguments."""

import torch
from torch import Tensor

from landscape_fast.ops._anchor_step_rules import AdamRule, AnchorState, Cos2, SGDRule
from landscape_fast.ops._checks import check_tensor, message, names, require

OP = "anchor_step"
GRAMS = ("total", "parts", None)


def check(grad, coeffs, anchors, rule, state, fixed, sizes) -> tuple[int, ...] | None:
    """Everything but the penalty; returns `sizes` as a tuple."""
    check_tensor(OP, "anchors", anchors, "T, P", (None, None))
    T, P = anchors.shape
    require(T >= 1, OP, "anchors", "[T, P] with T of at least 1", list(anchors.shape))
    alike = {"like": anchors, "like_name": "anchors"}
    check_tensor(OP, "grad", grad, "M, P", (None, P), **alike)
    require(len(grad) >= 1, OP, "grad", "[M, P] with M of at least 1", list(grad.shape))
    if fixed is not None:
        check_tensor(OP, "fixed", fixed, "F, P", (None, P), **alike)
    for name, t in (("anchors", anchors), ("grad", grad), ("fixed", fixed)):
        if t is not None and P > 1 and t.stride(1) != 1:
            remedy = "call .contiguous() once, outside the loop"
            got = f"strides {tuple(t.stride())}"
            raise ValueError(message(OP, name, "of unit stride along P", got, remedy))
    if sizes is not None:
        sizes = tuple(sizes)
        fits = len(sizes) > 0 and min(sizes) >= 0 and sum(sizes) == P
        require(fits, OP, "sizes", f"sizes of parts with sum P = {P}", sizes)
    _check_coeffs(coeffs, len(grad), T + (0 if fixed is None else len(fixed)), sizes, anchors)
    _check_rule(rule, state, anchors)
    return sizes


def _check_coeffs(coeffs, M, S, sizes, anchors) -> None:
    if not isinstance(coeffs, Tensor):
        rule = "a Tensor [M, S] or [M, L, S]"
        raise TypeError(message(OP, "coeffs", rule, type(coeffs).__name__))
    dtypes = tuple({anchors.dtype: 0, torch.float32: 0})
    if coeffs.ndim == 3:
        _needs_sizes("with coeffs [M, L, S]", sizes)
        check_tensor(OP, "coeffs", coeffs, "M, L, S", (M, len(sizes), S), dtypes=dtypes)
    else:
        check_tensor(OP, "coeffs", coeffs, "M, S", (M, S), dtypes=dtypes)
    _check_device("coeffs", coeffs, anchors)


def _check_rule(rule, state, anchors) -> None:
    if not isinstance(rule, SGDRule | AdamRule):
        raise TypeError(message(OP, "rule", "an SGDRule or an AdamRule", type(rule).__name__))
    if isinstance(rule.lr, Tensor):
        good = rule.lr.dtype == torch.float32
        require(good, OP, "rule.lr", "a number or a float32 tensor", rule.lr.dtype)
        _check_device("rule.lr", rule.lr, anchors)
    if not isinstance(state, AnchorState):
        raise TypeError(message(OP, "state", "an AnchorState", type(state).__name__))
    remedy = "take AnchorState.zeros(rule, anchors)"
    kept = [t for t in (state.first, state.second) if t is not None]
    known = f"{len(kept)} vectors"
    require(len(kept) == rule.states, OP, "state", f"of the rule, {rule.states}", known, remedy)
    for name in ("first", "second")[: rule.states]:
        shape = tuple(anchors.shape)
        t = getattr(state, name)
        check_tensor(OP, f"state.{name}", t, "T, P", shape, like=anchors, like_name="anchors")
        require(t.is_contiguous(), OP, f"state.{name}", "contiguous", t.stride(), remedy)
    _check_scalar("state.step", state.step, torch.float32, anchors)


def check_penalty(coeffs, anchors, sizes, selected, penalty, gram) -> None:
    """Penalty, selected parts and what is asked of the Gram matrix."""
    S = coeffs.shape[-1]
    require(gram in GRAMS, OP, "gram", f"one of {GRAMS}", repr(gram))
    if gram == "parts":
        _needs_sizes("with gram='parts'", sizes)
    if selected is not None:
        _needs_sizes("with selected [L]", sizes)
        check_tensor(OP, "selected", selected, "L", (len(sizes),), dtypes=(torch.bool,))
        _check_device("selected", selected, anchors)
    if isinstance(penalty, Cos2):
        double = (torch.float64,)
        check_tensor(OP, "penalty.gram", penalty.gram, "S, S", (S, S), dtypes=double)
        _check_scalar("penalty.pair", penalty.pair, torch.int64, anchors)
        require(S >= 2, OP, "penalty", "None where S = 1: there is no pair", "a Cos2")
        _check_device("penalty.gram", penalty.gram, anchors)
    elif penalty is not None:
        if isinstance(penalty, Tensor) and penalty.ndim == 3:
            _needs_sizes("with a penalty [L, S, S]", sizes)
            letters, shape = "L, S, S", (len(sizes), S, S)
        else:
            letters, shape = "S, S", (S, S)
        check_tensor(OP, "penalty", penalty, letters, shape, dtypes=(torch.float64,))
        _check_device("penalty", penalty, anchors)


def _needs_sizes(when: str, sizes) -> None:
    remedy = "sizes=(P,) makes one part"
    require(sizes is not None, OP, "sizes", f"given {when}", sizes, remedy)


def _check_scalar(name: str, t: Tensor, dtype: torch.dtype, anchors: Tensor) -> None:
    rule = f"a 0-dim {names([dtype])} tensor"
    if not isinstance(t, Tensor):
        raise TypeError(message(OP, name, rule, type(t).__name__))
    require(t.ndim == 0 and t.dtype == dtype, OP, name, rule, f"{names([t.dtype])} {[*t.shape]}")
    _check_device(name, t, anchors)


def _check_device(name: str, t: Tensor, anchors: Tensor) -> None:
    rule = f"on the device of anchors, {anchors.device}"
    require(t.device == anchors.device, OP, name, rule, t.device)
