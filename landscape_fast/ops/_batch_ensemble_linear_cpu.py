"""batch_ensemble_linear on the CPU in float32: the compiled kernels, and where they are quicker.

They hold the factors, bias and activation within the products, pack x * r where a library call
would write it to memory, and keep x alone for the backward: dweight, dr and ds come from tiles of
G_m = dy_m^T x_m that are used while they are in the cache.
"""

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._batch_ensemble_linear_plan import Needs, Plan, composed_plan, examples
from landscape_fast.ops._library import define

CPP = Plan("cpp", "cpp")
FEW = 256  # rows up to which it is quicker to turn x than the weight


def cpu_plan(x: Tensor, weight: Tensor, r: Tensor | None, sizes: tuple, needs: Needs) -> Plan:
    """The kernels, but for what they would compute again; sizes: (M, batch_major)."""
    members, batch_major = sizes
    B = examples(x, batch_major)
    if x.ndim == 2 and r is None and members > 1:
        return composed_plan(x, B, x.shape[-1], needs, False)  # one product serves all members
    return CPP


def _rows(t: Tensor | None, batch_major: bool) -> tuple[int, int, int, int]:
    """MemberRows of csrc/api.h: address, strides of members, examples, features."""
    if t is None:
        return 0, 0, 0, 0
    if t.ndim == 2:
        return t.data_ptr(), 0, *t.stride()
    m, b, f = t.stride()
    return (t.data_ptr(), b, m, f) if batch_major else (t.data_ptr(), m, b, f)


def _factor(t: Tensor | None) -> tuple[int, int]:
    """MemberFactor of csrc/api.h; `t` has unit stride along features."""
    if t is None:
        return 0, 0
    return t.data_ptr(), t.stride(0) if t.ndim == 2 else 0


def _dense(t: Tensor | None) -> Tensor | None:
    """A factor with unit stride along features."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _sizes(x: Tensor, weight: Tensor, members: int, batch_major: bool) -> tuple:
    O, I = weight.shape
    return members, examples(x, batch_major), I, O


def _forward(x, weight, r, s, bias, members, batch_major, relu):
    y = _forward_fake(x, weight, r, s, bias, members, batch_major, relu)
    sizes = _sizes(x, weight, members, batch_major)
    r, s, bias = _dense(r), _dense(s), _dense(bias)  # held until the call returns
    few = sizes[0] * sizes[1] <= FEW and weight.stride(1) == 1
    _extension.C.batch_ensemble_linear(
        sizes, _rows(x, batch_major), (weight.data_ptr(), *weight.stride()),
        _factor(r), _factor(s), _factor(bias), relu, _rows(y, batch_major), few,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _forward_fake(x, weight, r, s, bias, members, batch_major, relu):
    B = examples(x, batch_major)
    rows = (B, members) if batch_major else (members, B)
    return x.new_empty(*rows, weight.shape[0])


def _backward(dy, y, x, weight, r, s, needs, bias_shared, batch_major):
    found = _backward_fake(dy, y, x, weight, r, s, needs, bias_shared, batch_major)
    dx, *others = found
    members = dy.shape[1 if batch_major else 0]
    r, s = _dense(r), _dense(s)
    _extension.C.batch_ensemble_linear_backward(
        _sizes(x, weight, members, batch_major), _rows(x, batch_major),
        (weight.data_ptr(), *weight.stride()), _factor(r), _factor(s), y is not None,
        _rows(dy, batch_major), _rows(y, batch_major),
        _rows(dx, batch_major)[:3] if needs[0] else (0, 0, 0),
        *[t.data_ptr() if need else 0 for t, need in zip(others, needs[1:], strict=True)],
        bias_shared, torch.get_num_threads(),
    )  # fmt: skip
    return found


def _backward_fake(dy, y, x, weight, r, s, needs, bias_shared, batch_major):
    M, O = dy.shape[1 if batch_major else 0], weight.shape[0]
    bias = (O,) if bias_shared else (M, O)
    shapes = (x.shape, weight.shape, (M, x.shape[-1]), (M, O), bias)
    return tuple(
        x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


cpu_forward_op = define(
    "batch_ensemble_linear_cpu(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias,"
    " SymInt members, bool batch_major, bool relu) -> Tensor",
    _forward,
    _forward_fake,
)
cpu_backward_op = define(
    "batch_ensemble_linear_cpu_backward(Tensor dy, Tensor? y, Tensor x, Tensor weight, Tensor? r,"
    " Tensor? s, bool[] needs, bool bias_shared, bool batch_major)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
