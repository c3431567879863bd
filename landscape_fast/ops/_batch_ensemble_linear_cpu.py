"""batch_ensemble_linear on the CPU in float32: the compiled kernels, and where they are quicker.

They hold the factors, bias and activation within the products, pack x * r where a library call
would write it to memory, and keep x alone for the backward: dweight, dr and ds come from tiles of
G_m = dy_m^T x_m that are used while they are in the cache.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from landscape_fast import _extension
from landscape_fast.ops._batch_ensemble_linear_plan import Needs, Plan, composed_plan, examples
from landscape_fast.ops._batch_ensemble_linear_ways import forward_fake
from landscape_fast.ops._library import define

CPP = Plan("cpp", "cpp")
FORWARD = Plan("cpp", "none")
FEW = 256  # rows up to which it is quicker to turn x than the weight

# (M, B, I, O): how many times longer the composition takes, in the forward alone and with the
# backward; batch_major, all gradients, one thread (by its CPU time) of an AMD EPYC with AVX-512.
MEASURED = {
    (32, 1, 512, 512): (1.10, 0.25),
    (32, 4, 512, 512): (1.02, 0.52),
    (32, 16, 512, 512): (1.09, 0.71),
    (32, 64, 512, 512): (1.21, 1.12),
    (32, 1, 64, 512): (0.92, 0.57),
    (32, 4, 64, 512): (1.01, 0.69),
    (32, 16, 64, 512): (1.21, 1.04),
    (32, 64, 64, 512): (1.50, 1.92),
    (32, 256, 64, 512): (1.74, 1.58),
    (32, 1, 8, 512): (0.79, 0.58),
    (32, 16, 8, 512): (1.04, 1.79),
    (32, 256, 8, 512): (2.01, 2.60),
    (32, 16, 512, 1): (0.44, 1.02),
    (32, 256, 512, 1): (0.84, 0.76),
    (4, 4, 512, 512): (0.68, 0.42),
    (4, 16, 512, 512): (1.02, 0.66),
    (4, 64, 512, 512): (0.94, 0.88),
    (4, 256, 512, 512): (1.05, 1.14),
    (4, 16, 128, 128): (0.88, 0.91),
    (4, 256, 128, 128): (1.06, 1.27),
    (16, 16, 128, 128): (0.84, 0.92),
    (16, 64, 128, 128): (1.03, 1.63),
    (16, 256, 128, 128): (1.17, 1.47),
    (32, 16, 128, 128): (1.05, 0.95),
    (32, 64, 128, 128): (1.12, 1.61),
    (32, 256, 128, 128): (1.32, 1.45),
    (4, 4, 1024, 1024): (0.81, 0.29),
    (4, 16, 1024, 1024): (1.30, 0.47),
    (4, 64, 1024, 1024): (1.09, 0.78),
    (2, 16, 256, 10): (0.91, 1.02),
    (2, 256, 256, 10): (1.03, 1.28),
}
# What follows from it. Below these sizes the cost of a call, of packing, or (with few examples per
# member) of using each tile of G, is more than what is saved.
LEAST_OUTPUTS = 8
MANY_ROWS = 512
FEW_ROWS, LARGE_WEIGHT = (32, 128), 512 * 512  # fewer rows, from and to, if the weight is large
LEAST_EXAMPLES = 64  # for the backward


def cpu_plan(x: Tensor, weight: Tensor, r: Tensor | None, sizes: tuple, needs: Needs) -> Plan:
    """What is expected to be quicker; sizes: (M, batch_major)."""
    (O, I), (members, batch_major) = weight.shape, sizes
    B = examples(x, batch_major)
    rows, (least, most) = members * B, FEW_ROWS
    quicker = O >= LEAST_OUTPUTS and (
        rows >= MANY_ROWS or (least <= rows <= most and I * O >= LARGE_WEIGHT)
    )
    if x.ndim == 2 and r is None:
        quicker = False  # one product serves all members
    if quicker and not any(needs):
        return FORWARD
    if quicker and rows >= MANY_ROWS and B >= LEAST_EXAMPLES:
        return CPP
    return composed_plan(x, B, I, needs, False)


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
    y = forward_fake(x, weight, r, s, bias, members, batch_major, relu)
    sizes = _sizes(x, weight, members, batch_major)
    r, s, bias = _dense(r), _dense(s), _dense(bias)  # held until the call returns
    few = sizes[0] * sizes[1] <= FEW and weight.stride(1) == 1
    _extension.C.batch_ensemble_linear(
        sizes, _rows(x, batch_major), (weight.data_ptr(), *weight.stride()),
        _factor(r), _factor(s), _factor(bias), relu, _rows(y, batch_major), few,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


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


def cpu_forward(x, weight, r, s, bias, members, batch_major, relu):
    """The registered op, or what it runs: the dispatcher's few microseconds count on few rows."""
    given = (x, weight, r, s, bias)
    run = _forward if all(type(t) in _PLAIN for t in given) and not _watched() else cpu_forward_op
    return run(*given, members, batch_major, relu)


def _watched() -> bool:
    """Whether somebody records or replaces what the dispatcher sees."""
    return torch.compiler.is_compiling() or _modes() > 0 or torch.jit.is_tracing() or _profiling()


_PLAIN = (Tensor, Parameter, type(None))
_modes = torch._C._len_torch_dispatch_stack
_profiling = torch.autograd._profiler_enabled


cpu_forward_op = define(
    "batch_ensemble_linear_cpu(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias,"
    " SymInt members, bool batch_major, bool relu) -> Tensor",
    _forward,
    forward_fake,
)
cpu_backward_op = define(
    "batch_ensemble_linear_cpu_backward(Tensor dy, Tensor? y, Tensor x, Tensor weight, Tensor? r,"
    " Tensor? s, bool[] needs, bool bias_shared, bool batch_major)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
