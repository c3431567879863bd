"""anchor_step as a registered op: the compiled kernel on the CPU, the Triton kernel on CUDA."""

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._anchor_step_rules import Rule, SGDRule
from landscape_fast.ops._library import define

MOST_ANCHORS = 16  # the most that kernels/anchor_step.py holds in registers
SGD, MOMENTUM, NESTEROV, ADAM, ADAMW = range(5)  # AnchorRule of csrc/api.h


def hyper_of(rule: Rule, curve_l2: float, beta: float) -> tuple[int, list[float]]:
    """(kind, [lr, two numbers of the rule, eps, weight decay, curve_l2, beta])."""
    lr = 0.0 if isinstance(rule.lr, Tensor) else rule.lr
    if isinstance(rule, SGDRule):
        kind = NESTEROV if rule.nesterov else MOMENTUM if rule.momentum else SGD
        own = [rule.momentum, rule.dampening, 0.0]
    else:
        kind = ADAMW if rule.decoupled else ADAM
        own = [*rule.betas, rule.eps]
    return kind, [lr, *own, rule.weight_decay, curve_l2, beta]


def _impl(
    grad, coeffs, anchors, fixed, first, second, step, lr, kind, hyper, sizes, selected, penalty,
    pair, gram, backend,
):  # fmt: skip
    out = _new_gram(coeffs, anchors, sizes, gram)
    if anchors.numel() == 0:
        out.zero_()
        step += 1
        return out
    selected, penalty = [None if t is None else t.contiguous() for t in (selected, penalty)]
    if backend == "cpp":
        run = _cpp
    else:
        from landscape_fast.kernels.anchor_step import anchor_step as run
    run(
        grad, coeffs, anchors, fixed, first, second, step, lr, kind, hyper, sizes, selected,
        penalty, pair, gram, out,
    )  # fmt: skip
    return out


def _cpp(
    grad, coeffs, anchors, fixed, first, second, step, lr, kind, hyper, sizes, selected, penalty,
    pair, gram, out,
):  # fmt: skip
    coeffs = coeffs.contiguous()  # M * L * S numbers at most
    every = (
        grad, coeffs, anchors, fixed, first, second, step, lr, selected, penalty, pair,
    )  # fmt: skip
    _extension.C.anchor_step(
        [0 if t is None else t.data_ptr() for t in (*every, out if gram else None)],
        [grad.stride(0), anchors.stride(0), 0 if fixed is None else fixed.stride(0)],
        [len(grad), len(anchors), 0 if fixed is None else len(fixed)],
        list(sizes),
        kind,
        hyper,
        [coeffs.ndim == 3, penalty is not None and penalty.ndim == 3, gram == "parts"],
        torch.get_num_threads(),
    )


def _fake(
    grad, coeffs, anchors, fixed, first, second, step, lr, kind, hyper, sizes, selected, penalty,
    pair, gram, backend,
):  # fmt: skip
    return _new_gram(coeffs, anchors, sizes, gram)


def _new_gram(coeffs, anchors, sizes, gram) -> Tensor:
    S, L = coeffs.shape[-1], len(sizes)
    shape = {"": (0,), "total": (S, S), "parts": (L, S, S)}[gram]
    return torch.empty(shape, dtype=torch.float64, device=anchors.device)


anchor_step_op = define(
    "anchor_step(Tensor grad, Tensor coeffs, Tensor(a!) anchors, Tensor? fixed, "
    "Tensor(b!)? first, Tensor(c!)? second, Tensor(d!) step, Tensor? lr, int kind, float[] hyper, "
    "SymInt[] sizes, Tensor? selected, Tensor? penalty, Tensor? pair, str gram, str backend) "
    "-> Tensor",
    _impl,
    _fake,
)
