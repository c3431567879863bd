"""Weights of M models around given ones: Gaussian noise and dropout that a seed determines."""

import torch
from torch import Tensor

from landscape_fast.ops import _noise
from landscape_fast.ops._checks import check_tensor, message, require, whole
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    declare,
    pick,
    reference_backward,
    transforming,
    wants_grad,
    wants_graph,
)
from landscape_fast.ops._perturb_parts import perturb_backward_op, perturb_op

declare("perturb", cpp=(torch.float32,), cuda=KERNEL_DTYPES, triton=KERNEL_DTYPES)


def perturb(
    weights: Tensor,
    seed: int | Tensor,
    *,
    members: int | None = None,
    first_member: int = 0,
    scale: float | Tensor = 1.0,
    sigma: Tensor | None = None,
    dropout: float | Tensor = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Noise and dropout on the weights of M models, drawn from (seed, member, element) alone.

    .. math:: y_{mp} = (w_{mp} + s_m \sigma_{mp} \epsilon_{mp}) \, b_{mp} / (1 - d_m), \quad
        \epsilon \sim \mathcal N(0, 1), \quad b \sim \mathrm{Bernoulli}(1 - d_m)

    Args:
        weights: [M, P], one flattened model per row, unit stride along P; or [P] or [1, P], the
            same model for all `members`, read in place.
        seed: an integer in [0, 2^64); or a 0-dim int64 tensor on the device of `weights`, which
            torch.compile and CUDA graphs see as an input rather than a constant.
        members: M where `weights` holds one model; None is 1.
        first_member: what the first row counts as: row m of this call is row 0 of a call with
            `first_member` + m. The numbers of members stay below 2^32.
        scale: s, a number or [M]; the number 0 draws no Gaussian numbers. Of the dtype of
            `weights`, or float32 where that is bfloat16 or float16, as every tensor here.
        sigma: [P], [1, P] or [M, P], standard deviations before `scale`; None is 1 everywhere.
            Unit stride along P.
        dropout: d, the chance that an element becomes 0: a number in [0, 1) or [M]. The number 0
            draws no masks.
        backend: "auto", "torch", "cpp", "triton" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        [M, P], contiguous, in the dtype of `weights`; computed in float32 (float64 for float64
        weights) and rounded once. The integers behind the numbers are the same for every backend,
        dtype, P and number of members; Gaussian numbers agree up to rounding and stay below 6.77.
        NaN and infinities propagate. Parameters are not activations: autocast changes nothing.

    Raises:
        TypeError: if `weights`, `sigma`, `scale` or `dropout` is of another type.
        ValueError: if shapes, dtypes, devices or strides disagree, a number is out of range or no
            integer, or the backend cannot run here. The values of tensors are not looked at.

    Cost: weights and sigma read and the result written once per member; no random number is stored:
        the backward draws them again. Differentiable to any order in `weights`, `sigma` and a
        tensor `scale`; `dropout` has no gradient.

    Source: Gaussian and dropout subspaces of Fort et al. 2019 (arXiv:1912.02757), the diagonal of
        SWAG, Maddox et al. 2019 (arXiv:1902.02476); Philox4x32-10 of Salmon et al. 2011
        (doi:10.1145/2063384.2063405).

    Example:
        >>> import torch
        >>> from landscape_fast.ops.perturb import perturb
        >>> noise = perturb(torch.zeros(3), seed=2, members=2)
        >>> noise
        tensor([[-1.3072,  0.0223, -0.1819],
                [ 0.1938, -0.5777,  0.7639]])
        >>> torch.equal(noise[1:], perturb(torch.zeros(3), seed=2, first_member=1))
        True
        >>> perturb(torch.ones(6), seed=2, scale=0.0, dropout=0.5)
        tensor([[0., 2., 2., 0., 0., 2.]])
    """
    M = _check_weights(weights, members)
    _check_seed(seed, weights)
    good = whole(first_member, 0) and first_member + M <= 2**32
    _require(good, "first_member", f"an integer in [0, 2^32 - {M}]", first_member)
    for argument, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, Tensor):
            _check_like(argument, value, "M", (M,), weights)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            kind = type(value).__name__
            raise TypeError(message("perturb", argument, "a number or a Tensor [M]", kind))
    good = isinstance(dropout, Tensor) or 0 <= dropout < 1
    _require(good, "dropout", "in [0, 1)", dropout)
    _check_sigma(sigma, M, weights)
    composite = transforming()
    if not composite:  # a vmapped tensor has strides of its own
        _check_stride("weights", weights)
        _check_stride("sigma", sigma)
    name = pick("perturb", backend, weights)
    if composite or name == "torch":
        return _define(weights, sigma, scale, dropout, seed, M, first_member)
    tensors = [t if isinstance(t, Tensor) else None for t in (scale, dropout, seed)]
    numbers = [1 if isinstance(n, Tensor) else n for n in (scale, dropout, _signed(seed))]
    numbers = (*numbers, M, first_member, name)
    if wants_grad(weights, sigma, tensors[0]):
        return _Perturb.apply(weights, sigma, *tensors, numbers)
    return perturb_op(weights, sigma, *tensors, *numbers)


def perturb_reference(
    weights: Tensor,
    seed: int | Tensor,
    *,
    members: int | None = None,
    first_member: int = 0,
    scale: float | Tensor = 1.0,
    sigma: Tensor | None = None,
    dropout: float | Tensor = 0.0,
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    return _define(weights, sigma, scale, dropout, seed, _rows(weights, members), first_member)


def _define(weights, sigma, scale, dropout, seed, M, first_member):
    P, device = weights.shape[-1], weights.device
    dtype = torch.promote_types(weights.dtype, torch.float32)
    if not isinstance(seed, Tensor):
        seed = torch.full((), _signed(seed), dtype=torch.int64, device=device)
    y = weights.to(dtype).expand(M, P)
    if isinstance(scale, Tensor) or scale != 0:
        noise = _noise.normals(seed, first_member, M, P, dtype)
        if sigma is not None:
            noise = sigma.to(dtype) * noise
        y = y + (scale.to(dtype)[:, None] if isinstance(scale, Tensor) else scale) * noise
    if isinstance(dropout, Tensor) or dropout != 0:
        if not isinstance(dropout, Tensor):
            dropout = torch.full((M,), dropout, dtype=dtype, device=device)
        dropout = dropout.detach()
        stays = _noise.kept(seed, first_member, dropout, P)
        y = y * torch.where(stays, 1 / (1 - dropout.to(dtype))[:, None], 0.0)
    return y.to(weights.dtype, copy=True, memory_format=torch.contiguous_format)


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, sigma, scales, dropouts, seeds, numbers):
        ctx.save_for_backward(weights, sigma, scales, dropouts, seeds)
        ctx.numbers = numbers
        return perturb_op(weights, sigma, scales, dropouts, seeds, *numbers)

    @staticmethod
    def backward(ctx, dy):
        weights, sigma, scales, dropouts, seeds = ctx.saved_tensors
        scale, dropout, seed, M, first_member, _ = ctx.numbers
        needs = list(ctx.needs_input_grad[:3])
        if wants_graph():
            rest = (dropout if dropouts is None else dropouts, seed if seeds is None else seeds)

            def reference(w, sigma, s):
                return _define(w, sigma, scale if s is None else s, *rest, M, first_member)

            found = reference_backward(reference, (weights, sigma, scales), needs, dy)
            return *found, None, None, None
        if dy.shape[1] > 1 and dy.stride(1) != 1:  # autograd may hand over an expanded one
            dy = dy.contiguous()
        passed = needs[0] and dropouts is None and dropout == 0 and weights.shape == dy.shape
        found = [None] * 3
        if needs[1] or needs[2] or (needs[0] and not passed):
            wanted = [needs[0] and not passed, *needs[1:]]
            tensors = (weights, sigma, scales, dropouts, seeds)
            grads = perturb_backward_op(dy, *tensors, *ctx.numbers, wanted)
            found = [g if want else None for g, want in zip(grads, wanted, strict=True)]
        return dy if passed else found[0], *found[1:], None, None, None


def _require(ok, argument, rule, got, remedy=None) -> None:
    require(ok, "perturb", argument, rule, got, remedy)


def _rows(weights, members) -> int:
    """M."""
    if members is not None:
        return members
    return 1 if weights.ndim == 1 else weights.shape[0]


def _check_weights(weights, members) -> int:
    """M."""
    if not isinstance(weights, Tensor):
        rule = "a Tensor [M, P] or [P]"
        raise TypeError(message("perturb", "weights", rule, type(weights).__name__))
    _require(weights.ndim in (1, 2), "weights", "[M, P] or [P]", list(weights.shape))
    check_tensor("perturb", "weights", weights, "M, P", (None, None)[: weights.ndim])
    if members is not None:
        rows = weights.shape[0] if weights.ndim == 2 else 1
        rule = "an integer of at least 0" if rows == 1 else f"None or M = {rows}, as weights has it"
        _require(whole(members, 0) and rows in (1, members), "members", rule, members)
    return _rows(weights, members)


def _check_like(argument, value, letters, sizes, weights) -> None:
    about = {"like": weights, "like_name": "weights", "or_float32": True}
    check_tensor("perturb", argument, value, letters, sizes, **about)


def _check_sigma(sigma, M, weights) -> None:
    if sigma is None:
        return
    P = weights.shape[-1]
    if isinstance(sigma, Tensor) and sigma.ndim == 1:
        _check_like("sigma", sigma, "P", (P,), weights)
    else:
        one = isinstance(sigma, Tensor) and sigma.shape[0:1] == (1,)
        _check_like("sigma", sigma, "M, P", (1 if one else M, P), weights)


def _check_stride(argument, value) -> None:
    if value is not None and value.shape[-1] > 1 and value.stride(-1) != 1:
        remedy = "call .contiguous() once, outside the loop"
        _require(False, argument, "of unit stride along P", f"strides {value.stride()}", remedy)


def _signed(seed):
    """The int64 with the bits of an integer in [0, 2^64)."""
    return seed - 2**64 if isinstance(seed, int) and seed >= 2**63 else seed


def _check_seed(seed, weights) -> None:
    if isinstance(seed, Tensor):
        rule = f"an integer in [0, 2^64) or a 0-dim int64 Tensor on {weights.device}"
        good = seed.ndim == 0 and seed.dtype == torch.int64 and seed.device == weights.device
        _require(good, "seed", rule, f"{seed.dtype} {list(seed.shape)} on {seed.device}")
    else:
        _require(whole(seed, 0) and seed < 2**64, "seed", "an integer in [0, 2^64)", seed)
