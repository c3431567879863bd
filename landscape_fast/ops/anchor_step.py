"""One step of an optimiser for all anchors of a subspace, from the gradient of mixed weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_fast.ops._anchor_step_checks import OP, check, check_penalty
from landscape_fast.ops._anchor_step_rules import AdamRule, AnchorState, Cos2, Rule, SGDRule
from landscape_fast.ops._anchor_step_ways import MOST_ANCHORS, anchor_step_op, hyper_of
from landscape_fast.ops._checks import require
from landscape_fast.ops._dispatch import KERNEL_DTYPES, declare, pick, transforming

__all__ = ["AdamRule", "AnchorState", "Cos2", "SGDRule", "anchor_step", "anchor_step_reference"]

declare(OP, cpp=(torch.float32,), triton=KERNEL_DTYPES)


def anchor_step(
    grad: Tensor,
    coeffs: Tensor,
    anchors: Tensor,
    rule: Rule,
    state: AnchorState,
    *,
    fixed: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    selected: Tensor | None = None,
    penalty: Tensor | Cos2 | None = None,
    curve_l2: float = 0.0,
    gram: str | None = "total",
    backend: str = "auto",
) -> Tensor | None:
    r"""One step of SGD or Adam for T anchors in one pass; gradients of anchors are never stored.

    .. math::
        G_k = \sum_m c_{mk} \big(g_m + \lambda \textstyle\sum_j c_{mj} A_j\big) + \sum_j Q_{kj} A_j,
        \quad A_k \leftarrow A_k - \mathrm{rule}(G_k)

    Every penalty on scalar products of anchors has a gradient Q A with a matrix Q of S x S numbers;
    the middle term is that of the L2 penalty of the mixed weights, lambda / 2 * ||w_m||^2.

    Args:
        grad: [M, P], the gradient of the loss for the mixed weights of M points; M at least 1.
        coeffs: [M, S] or [M, L, S], how the points were mixed from S = T + F anchors, the trained
            ones first; float32 or the dtype of `anchors`, any strides.
        anchors: [T, P], written in place; T at least 1. Unit stride along P, as for `grad` and
            `fixed`; nothing of this size is ever copied.
        rule: `SGDRule` or `AdamRule`; every field means what it means in `torch.optim`, with
            G_k as the gradient of anchor k.
        state: of the same rule, from `AnchorState.zeros`, written in place.
        fixed: [F, P], anchors that are not trained, or None.
        sizes: the L parts of P, in order; needed with coeffs [M, L, S], `selected`, a penalty
            [L, S, S] and gram="parts".
        selected: [L] bool, the parts that a penalty [S, S] or `Cos2` and the Gram matrix "total"
            are about; None for all.
        penalty: Q, [S, S] or [L, S, S] in float64, or a `Cos2`, whose matrix the kernel works out.
        curve_l2: lambda.
        gram: "total", "parts" or None: what to return.
        backend: "auto", "torch", "cpp" or "triton"; see `landscape_fast.show_config`.

    Returns:
        The scalar products of all S anchors after the step, in float64: [S, S] over the selected
        parts for "total", [L, S, S] for "parts"; None for None.
        Sums over members and anchors run in float32 (float64 for float64 anchors), those of the
        Gram matrix in float64 in a fixed order; what is stored is rounded once.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if shapes, dtypes, devices or strides disagree, an argument that goes with
            `sizes` comes without them, or the backend cannot run here.

    Cost: M * P + (2 + 2 * kept) * T * P + F * P elements moved, with kept the vectors of the rule
        (0, 1 or 2); one launch, and a second one that adds up the Gram matrix and counts the step.
        No host synchronisation: with `lr` as a tensor, a CUDA graph can hold many steps.
        Triton takes up to 16 anchors; with more of them "auto" means plain PyTorch.

    Source: the gradient of Wortsman et al. 2021 (arXiv:2102.10472) and Garipov et al. 2018
        (arXiv:1802.10026) is of rank one in the anchors; SGD and Adam(W) as in torch.optim.

    Example:
        >>> import torch
        >>> from landscape_fast.ops.anchor_step import AnchorState, SGDRule, anchor_step
        >>> ends = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
        >>> rule = SGDRule(lr=1.0)
        >>> grad, coeffs = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.75, 0.25]])
        >>> anchor_step(grad, coeffs, ends, rule, AnchorState.zeros(rule, ends))
        tensor([[ 0.8125, -0.0625],
                [-0.0625, 44.3125]], dtype=torch.float64)
        >>> ends
        tensor([[-0.7500,  0.5000],
                [ 3.7500,  5.5000]])
    """
    sizes = check(grad, coeffs, anchors, rule, state, fixed, sizes)
    check_penalty(coeffs, anchors, sizes, selected, penalty, gram)
    name = pick(OP, backend, anchors)
    if name == "triton" and coeffs.shape[-1] > MOST_ANCHORS:
        few = f"'torch' for more than {MOST_ANCHORS} anchors"
        require(backend == "auto", OP, "backend", few, repr(backend))
        name = "torch"
    options = {"fixed": fixed, "sizes": sizes, "selected": selected, "penalty": penalty}
    with torch.no_grad():
        if name == "torch" or transforming():
            return anchor_step_reference(
                grad, coeffs, anchors, rule, state, **options, curve_l2=curve_l2, gram=gram
            )
        pair, beta = None, 0.0
        if isinstance(penalty, Cos2):
            penalty, pair, beta = penalty
        lr = rule.lr if isinstance(rule.lr, Tensor) else None
        found = anchor_step_op(
            grad, coeffs, anchors, fixed, state.first, state.second, state.step, lr,
            *hyper_of(rule, curve_l2, beta), sizes or [anchors.shape[1]], selected,
            penalty, pair, gram or "", name,
        )  # fmt: skip
        torch.autograd.graph.increment_version(anchors)
        return None if gram is None else found


@torch.no_grad()
def anchor_step_reference(
    grad: Tensor,
    coeffs: Tensor,
    anchors: Tensor,
    rule: Rule,
    state: AnchorState,
    *,
    fixed: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    selected: Tensor | None = None,
    penalty: Tensor | Cos2 | None = None,
    curve_l2: float = 0.0,
    gram: str | None = "total",
) -> Tensor | None:
    """The definition: every backend is tested against this, run in float64."""
    T, dtype = anchors.shape[0], torch.promote_types(anchors.dtype, torch.float32)
    every = anchors if fixed is None else torch.cat([anchors, fixed])
    every, sizes = every.to(dtype), tuple(sizes or [anchors.shape[1]])
    matrix = penalty.matrix() if isinstance(penalty, Cos2) else penalty
    directions = []
    parts = zip(grad.to(dtype).split(sizes, 1), every.split(sizes, 1), strict=True)
    for part, (g, a) in enumerate(parts):
        c = (coeffs if coeffs.ndim == 2 else coeffs[:, part]).to(dtype)
        if curve_l2:
            g = g + curve_l2 * (c @ a)
        direction = c.T @ g
        if matrix is not None:
            q = matrix if matrix.ndim == 2 else matrix[part]
            if selected is not None and matrix.ndim == 2:
                q = torch.where(selected[part], q, 0.0)
            direction = direction + q.to(dtype) @ a
        directions.append(direction[:T])
    _apply(rule, state, anchors, every[:T], torch.cat(directions, 1))
    state.step.add_(1)
    if gram is None:
        return None
    every = (anchors if fixed is None else torch.cat([anchors, fixed])).double()
    products = torch.stack([a @ a.T for a in every.split(sizes, 1)])
    if gram == "parts":
        return products
    if selected is not None:
        products = torch.where(selected[:, None, None], products, 0.0)
    return products.sum(0)


def _apply(rule: Rule, state: AnchorState, anchors: Tensor, a: Tensor, d: Tensor) -> None:
    """Moves the anchors, whose values are `a`, along the gradient `d`, as torch.optim does."""
    if isinstance(rule, SGDRule):
        d = d + rule.weight_decay * a
        if rule.momentum:
            share = 1 - rule.dampening * (state.step > 0).to(d)
            kept = rule.momentum * state.first.to(d) + share * d
            state.first.copy_(kept)
            d = d + rule.momentum * kept if rule.nesterov else kept
        anchors.copy_(a - rule.lr * d)
        return
    if rule.decoupled:
        a = a * (1 - rule.lr * rule.weight_decay)
    else:
        d = d + rule.weight_decay * a
    first, second = state.first.to(d), state.second.to(d)
    first = first + (1 - rule.betas[0]) * (d - first)
    second = rule.betas[1] * second + (1 - rule.betas[1]) * d * d
    state.first.copy_(first)
    state.second.copy_(second)
    steps = state.step.double() + 1
    biases = [1 - beta**steps for beta in rule.betas]
    scale = (rule.lr / biases[0]).to(d)
    anchors.copy_(a - scale * (first / (second.sqrt() / biases[1].sqrt().to(d) + rule.eps)))
