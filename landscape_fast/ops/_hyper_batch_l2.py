"""The L2 penalty of hyper-batch layers, without a weight per member and example."""

import torch
from torch import Tensor

from landscape_fast.ops._checks import FLOATS, check_tensor, check_types, message, names, require
from landscape_fast.ops._dispatch import declare, without_autocast

OP = "hyper_batch_l2"
NAMES = ("weight", "delta", "e", "h", "r", "s", "u", "v", "bias", "delta_bias", "e_bias", "h_bias")

declare(OP)


def hyper_batch_l2(
    weight: Tensor,
    delta: Tensor,
    e: Tensor,
    h: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    delta_bias: Tensor | None = None,
    e_bias: Tensor | None = None,
    h_bias: Tensor | None = None,
) -> Tensor:
    r"""Mean over members and examples of h times the squared norm of the weight each of them has.

    .. math:: \frac{1}{MB} \sum_{mb} h_{mb} \lVert W \circ s_m r_m^T
        + (\Delta \circ v_m u_m^T) \circ e_{mb} \rVert^2
        + h^b_{mb} \lVert b_m + d^b_m \circ e^b_{mb} \rVert^2

    h is the L2 hyperparameter that example b of member m was given, and e what the layer made of
    it: see `hyper_batch_linear`. The squares are expanded, so that members and examples only meet
    sums over input features: (r^2) W^2, (r u) (W delta) and (u^2) delta^2.

    Args:
        weight: [O, I], or [O, I / groups, kh, kw] of a convolution.
        delta: shaped as `weight`.
        e: [M, B, O], per member, example and output feature.
        h: [M, B], at least 0.
        r: [M, I]; None for ones. Leave out all four factors to penalise `weight` + `delta` * e
            alone, as in the published training recipe.
        s: [M, O]; None for ones.
        u: [M, I]; None for r.
        v: [M, O]; None for s.
        bias: [M, O] or [O], penalised too where it is given.
        delta_bias: [M, O] or [O]; given together with e_bias, which needs no bias.
        e_bias: shaped as e.
        h_bias: [M, B], the hyperparameter of the bias; None for h.

    Returns:
        A scalar: float64 for a float64 weight, otherwise float32, in which all is computed, under
        autocast too.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes or devices disagree, or a dtype is not of real numbers; dtypes may
            differ.

    Cost: 3 passes over `weight` and `delta`, 6 * M * O * I flops, one pass over e. Differentiable
        to any order.

    Source: the objective of Wenzel et al. 2020 (arXiv:2006.13570).

    Example:
        >>> import torch
        >>> weight, delta = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> e, h = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[1.0, 0.5]])
        >>> hyper_batch_l2(weight, delta, e, h)  # (1 * (9 + 16) + 0.5 * (16 + 16)) / 2
        tensor(20.5000)
    """
    given = (weight, delta, e, h, r, s, u, v, bias, delta_bias, e_bias, h_bias)
    _check(dict(zip(NAMES, given, strict=True)))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with without_autocast(weight.device.type):
        weight, delta, e, h, r, s, u, v, bias, delta_bias, e_bias, h_bias = (
            None if t is None else t.to(dtype) for t in given
        )
        u, v = r if u is None else u, s if v is None else v
        parts = (
            (_times(s, s), _rows(weight * weight, _times(r, r))),
            (_times(s, v), _rows(weight * delta, _times(r, u))),
            (_times(v, v), _rows(delta * delta, _times(u, u))),
        )
        products = [rows if outer is None else rows * outer for outer, rows in parts]
        total = _expanded(*products, h, e)
        if bias is None and delta_bias is None:
            return total
        bias = torch.zeros_like(delta_bias) if bias is None else bias
        h_bias = h if h_bias is None else h_bias
        if delta_bias is None:
            return total + (h_bias.mean(1, keepdim=True) * bias**2).sum(1).mean()
        products = (bias**2, bias * delta_bias, delta_bias**2)
        return total + _expanded(*products, h_bias, e_bias)


def hyper_batch_l2_reference(
    weight: Tensor,
    delta: Tensor,
    e: Tensor,
    h: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    delta_bias: Tensor | None = None,
    e_bias: Tensor | None = None,
    h_bias: Tensor | None = None,
) -> Tensor:
    """The definition: a weight for every member and example, squared and summed."""
    (M, B, O), tail = e.shape, (1,) * (weight.ndim - 2)
    u, v = r if u is None else u, s if v is None else v

    def scaled(kernel, inner, outer):
        kernel = kernel.expand(M, *kernel.shape)
        if inner is not None:  # input feature j of group g is feature g * I / groups + j
            per_group = inner.view(M, -1, kernel.shape[2])
            inner = per_group.repeat_interleave(O // per_group.shape[1], 1)
            kernel = kernel * inner.view(*kernel.shape[:3], *tail)
        return kernel if outer is None else kernel * outer.view(M, O, 1, *tail)

    response = scaled(delta, u, v).unsqueeze(1) * e.view(M, B, O, 1, *tail)
    kernels = scaled(weight, r, s).unsqueeze(1) + response  # [M, B, O, I / groups, ...]
    total = (h * kernels.square().flatten(2).sum(2)).mean()
    if bias is None and delta_bias is None:
        return total
    biases = 0 if bias is None else bias.unsqueeze(-2)
    biases = biases if delta_bias is None else biases + delta_bias.unsqueeze(-2) * e_bias
    return total + ((h if h_bias is None else h_bias) * biases.square().sum(-1)).mean()


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a * b, with None for ones."""
    return b if a is None else a if b is None else a * b


def _rows(kernel: Tensor, factor: Tensor | None) -> Tensor:
    """Sums over the inputs of each output, [O]; weighted by `factor` [M, I], [M, O]."""
    kernel = kernel.flatten(2).sum(2) if kernel.ndim > 2 else kernel
    if factor is None:
        return kernel.sum(1)
    O, I = kernel.shape
    if factor.shape[1] == I:
        return factor @ kernel.T
    groups = factor.shape[1] // I
    grouped = torch.einsum(
        "mgi,goi->mgo", factor.unflatten(1, (groups, I)), kernel.view(groups, -1, I)
    )
    return grouped.flatten(1)


def _expanded(a: Tensor, b: Tensor, c: Tensor, h: Tensor, e: Tensor) -> Tensor:
    """The mean over m, b of h * sum_o (a + 2 b e + c e^2), with a, b, c [O] or [M, O]."""
    he = h.unsqueeze(2) * e
    p, q, t = h.mean(1, keepdim=True), he.mean(1), (he * e).mean(1)
    return (a * p + 2 * b * q + c * t).sum(1).mean()


def _check(given: dict[str, Tensor | None]) -> None:
    check_types(OP, given, NAMES[:4])
    weight, e = given["weight"], given["e"]
    require(weight.dtype in FLOATS, OP, "weight", f"one of {names(FLOATS)}", weight.dtype)
    require(weight.ndim >= 2, OP, "weight", "[O, I] or [O, I / groups, ...]", list(weight.shape))
    check_tensor(OP, "delta", given["delta"], _letters(weight), weight.shape)
    check_tensor(OP, "e", e, "M, B, O", (None, None, weight.shape[0]))
    M, B, O = e.shape
    for name in ("h", "h_bias"):
        if given[name] is not None:
            check_tensor(OP, name, given[name], "M, B", (M, B))
    for name in ("r", "u"):
        if given[name] is not None:
            r, features = given[name], weight.shape[1]
            check_tensor(OP, name, r, "M, I", (M, None))
            grouped = features and r.shape[1] % features == 0 and r.shape[1] > 0
            groups = r.shape[1] // features if grouped else 1
            fits = r.shape[1] == features or (weight.ndim > 2 and grouped and O % groups == 0)
            require(fits, OP, name, f"[M, I] with I = {features} per group", list(r.shape))
    for name in ("s", "v"):
        if given[name] is not None:
            check_tensor(OP, name, given[name], "M, O", (M, O))
    for name in ("bias", "delta_bias"):
        t = given[name]
        if t is not None and t.ndim == 1:
            check_tensor(OP, name, t, "O", (O,))
        elif t is not None:
            check_tensor(OP, name, t, "M, O", (M, O))
    if given["e_bias"] is not None:
        check_tensor(OP, "e_bias", given["e_bias"], "M, B, O", (M, B, O))
    for name, other in (("e_bias", "delta_bias"), ("delta_bias", "e_bias")):
        if given[other] is not None and given[name] is None:
            raise ValueError(message(OP, name, f"given where {other} is", None))
    for name, t in given.items():
        if t is not None:
            require(
                t.device == weight.device,
                OP,
                name,
                f"on the device of weight, {weight.device}",
                str(t.device),
            )


def _letters(weight: Tensor) -> str:
    return ", ".join(["O", "I", *(f"k{i}" for i in range(weight.ndim - 2))])
