"""The Triton kernels of subspace_linear as registered ops.

`x` is [M, B, I] with any strides, or [B, I] where the members share it. Results are [M, B, .] in
memory of that order or, `batch_major`, views of [B, M, .].
"""

from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_plan import tf32_allowed
from landscape_fast.ops._library import define


def product(x, weight, coeffs, bias, members, batch_major, turned=False) -> Tensor:
    """y of own or mixed weights; `turned`, the product with the weights' transposes, as for dx."""
    y = product_op(x, weight, coeffs, bias, members, batch_major, turned)
    return y.transpose(0, 1) if batch_major else y


def _product_fake(x, weight, coeffs, bias, members, batch_major, turned):
    rows = (x.shape[-2], members) if batch_major else (members, x.shape[-2])
    return x.new_empty(*rows, weight.shape[2 if turned else 1])


def _product_impl(x, weight, coeffs, bias, members, batch_major, turned):
    from landscape_fast.kernels.subspace_linear import subspace_linear_product

    y = _product_fake(x, weight, coeffs, bias, members, batch_major, turned)
    to = y.transpose(0, 1) if batch_major else y
    subspace_linear_product(x, weight, coeffs, bias, to, tf32_allowed(), turned)
    return y


def _weight_gradient_fake(dy, x, dtype, need_bias):
    M, _, O = dy.shape
    bias = (M, O) if need_bias else (0,)
    return x.new_empty((M, O, x.shape[-1]), dtype=dtype), x.new_empty(bias, dtype=dtype)


def _weight_gradient_impl(dy, x, dtype, need_bias):
    from landscape_fast.kernels.subspace_linear_backward import subspace_linear_bwd_weight

    dweight, dbias = _weight_gradient_fake(dy, x, dtype, need_bias)
    wanted = dbias if need_bias else None
    subspace_linear_bwd_weight(dy, x, dweight, wanted, tf32_allowed())
    return dweight, dbias


product_op = define(
    "subspace_linear(Tensor x, Tensor weight, Tensor? coeffs, Tensor? bias, SymInt members,"
    " bool batch_major, bool turned) -> Tensor",
    _product_impl,
    _product_fake,
)
weight_gradient_op = define(
    "subspace_linear_weight_gradient(Tensor dy, Tensor x, ScalarType dtype, bool need_bias)"
    " -> (Tensor, Tensor)",
    _weight_gradient_impl,
    _weight_gradient_fake,
)
