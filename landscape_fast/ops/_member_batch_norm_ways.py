"""What computes `member_batch_norm`: Triton kernels, or the library's batch norm for each member.

The library's runs member by member into one result: its statistics, its application and its
backward are those of `F.batch_norm`, without the copy that putting M results together would take.
"""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from landscape_fast.ops._checks import LOW
from landscape_fast.ops._library import define

aten = torch.ops.aten


@cache
def _kernels(name: str):
    """The Triton module, imported when it first runs."""
    return import_module(f"landscape_fast.kernels.{name}")


def as_members(x: Tensor, members: int, layout: str) -> Tensor:
    """A view [M, B, F, ...] of x in any layout."""
    if layout == "folded":
        return x.unflatten(0, (members, x.shape[0] // members))
    return x.transpose(0, 1) if layout == "batch_major" else x


def from_members(y: Tensor, layout: str) -> Tensor:
    """The inverse of `as_members`."""
    if layout == "folded":
        return y.flatten(0, 1)
    return y.transpose(0, 1) if layout == "batch_major" else y


def _like(x: Tensor, layout: str) -> Tensor:
    """New memory for a result of the shape of x [M, B, F, ...]: dense, in the order of x.

    Members come first, or rows in the batch-major layout; channels-last where x is.
    """
    first = (x.shape[1], x.shape[0]) if layout == "batch_major" else x.shape[:2]
    features, pixels = x.shape[2], x.shape[3:]
    if pixels.numel() > 1 and features > 1 and x.stride(2) == 1:
        y = x.new_empty((*first, *pixels, features)).movedim(-1, 2)
    else:
        y = x.new_empty((*first, features, *pixels))
    return y.transpose(0, 1) if layout == "batch_major" else y


def rows_of(tensors, count: int) -> list:
    """The `count` rows of every tensor, Nones for None."""
    return [[None] * count if t is None else t.unbind(0) for t in tensors]


def widened(tensors, x: Tensor) -> list[Tensor | None]:
    """Tensors [M, F], in float32 beside 16-bit x: the library mixes no dtypes among them."""
    return [t.float() if t is not None and x.dtype in LOW else t for t in tensors]


# -- statistics ------------------------------------------------------------------------------------


def _stats(x, running_mean, running_var, momentum, backend):
    mean, var = _stats_fake(x, running_mean, running_var, momentum, backend)
    if backend == "triton":
        run = _kernels("member_batch_norm").member_batch_norm_stats
        run(_flat(x), running_mean, running_var, mean, var, momentum)
        return mean, var
    moved = widened((running_mean, running_var), x)
    for one, *targets in zip(x.unbind(0), *rows_of((mean, var, *moved), len(x)), strict=True):
        found = _update(one, *targets[2:], momentum)
        for own, values in zip(targets[:2], found, strict=True):
            own.copy_(values)
    for own, values in zip((running_mean, running_var), moved, strict=True):
        if own is not None and own is not values:
            own.copy_(values)
    return mean, var


def _update(x, running_mean, running_var, momentum):
    """(mean, biased variance) of x [B, F, ...]; the library moves the running ones."""
    if running_mean is None and x.dtype in LOW:  # it takes the dtype of the results from them
        running_mean, running_var = x.new_zeros((2, x.shape[1]), dtype=torch.float32)
    return aten.batch_norm_update_stats(x, running_mean, running_var, momentum)


def _stats_fake(x, running_mean, running_var, momentum, backend):
    dtype = torch.float32 if x.dtype in LOW else x.dtype
    shape = (x.shape[0], x.shape[2])
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


stats_op = define(
    "member_batch_norm_stats(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " float momentum, str backend) -> (Tensor, Tensor)",
    _stats,
    _stats_fake,
)


# -- application -----------------------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    """x [M, B, F, ...] as [M, B, F, S], a copy only where no stride leads through the pixels."""
    return x.unsqueeze(-1) if x.ndim == 3 else x.flatten(3)


def _norm(weight, bias, mean, var, eps):
    """What the Triton kernels normalise with: rows without gaps."""
    weight, bias = [None if t is None else t.contiguous() for t in (weight, bias)]
    return _kernels("member_batch_norm").Norm(weight, bias, mean, var, eps)


@torch.no_grad()  # an exported program calls it with parameters, which `out=` refuses
def _apply(x, weight, bias, mean, var, layout, eps, relu, backend):
    y = _like(x, layout)
    if backend == "triton":
        run = _kernels("member_batch_norm").member_batch_norm_fwd
        run(_flat(x), _norm(weight, bias, mean, var, eps), relu, _flat(y))
        return y
    given = widened((weight, bias, mean, var), x)
    nothing = given[2].new_empty(0)
    outs = {"save_mean": nothing, "save_invstd": nothing}
    for one, own, *row in zip(x.unbind(0), y.unbind(0), *rows_of(given, len(x)), strict=True):
        aten.native_batch_norm.out(one, *row, False, 0.0, eps, out=own, **outs)
    return y.relu_() if relu else y


def _apply_fake(x, weight, bias, mean, var, layout, eps, relu, backend):
    return _like(x, layout)


apply_op = define(
    "member_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, str layout,"
    " float eps, bool relu, str backend) -> Tensor",
    _apply,
    _apply_fake,
)


# -- backward --------------------------------------------------------------------------------------


def _backward(dy, x, weight, bias, mean, var, layout, eps, training, relu, need_x, need_p, backend):
    dx, dweight, dbias = _backward_fake(
        dy, x, weight, bias, mean, var, layout, eps, training, relu, need_x, need_p, backend
    )
    if backend == "triton":
        norm = _norm(weight, bias, mean, var, eps)
        run = _kernels("member_batch_norm_backward").member_batch_norm_bwd
        outputs = [t if t.numel() else None for t in (dx, dweight, dbias)]
        flat = None if outputs[0] is None else _flat(dx)
        run(_flat(dy), _flat(x), norm, training, relu, flat, *outputs[1:])
        return dx, dweight, dbias
    if relu:
        y = _apply(x, weight, bias, mean, var, layout, eps, True, backend)
        dy = aten.threshold_backward(dy, y, 0)
    weight, mean, var = widened((weight, mean, var), x)
    rstd = (var.double() + eps).rsqrt().to(var.dtype)  # rounded once, as the library does
    mask = [need_x, need_p and weight is not None, need_p]
    options = (training, eps, mask)
    outputs = [t if t.numel() else None for t in (dx, dweight, dbias)]
    M = len(x)
    rows = rows_of((dy, x, weight, mean, var, mean, rstd), M)
    for own, *row in zip(zip(*rows_of(outputs, M), strict=True), *rows, strict=True):
        _take(own, aten.native_batch_norm_backward(*row, *options))
    return dx, dweight, dbias


def _take(outputs, found) -> None:
    for own, values in zip(outputs, found, strict=True):
        if own is not None:
            own.copy_(values)


def _backward_fake(
    dy, x, weight, bias, mean, var, layout, eps, training, relu, need_x, need_p, backend
):
    """Empty where nothing is wanted."""
    dx = _like(x, layout) if need_x else x.new_empty(0)
    params = [t if t is not None and need_p else None for t in (weight, bias)]
    return dx, *[x.new_empty(0) if t is None else t.new_empty(mean.shape) for t in params]


backward_op = define(
    "member_batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor var, str layout, float eps, bool training, bool relu, bool need_x, bool need_p,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
