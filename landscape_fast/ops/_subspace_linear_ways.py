"""The member product by library calls: y_m = x_m W_m^T + b_m, with a weight for each member.

`x` is [M, B, I] with any strides, or [B, I] where the members share it; `weight` is [M, O, I], and
y is [M, B, O]. Ways, of which y, dx and dweight take one each:

wide: where the members share x, one product with the outputs of all side by side.
bmm: where each has its own, a batched product.
few: of y, the same transposed, for few outputs on a CPU.
outer: of dweight, for one example: no product at all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_ways import wide_product
from landscape_fast.ops._dispatch import as_rounded


def definition(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The member product in plain PyTorch, for every transform."""
    dtype = x.dtype
    x, weight, bias = as_rounded(x, weight, bias)
    y = x @ weight.transpose(1, 2)
    return (y if bias is None else y + bias.unsqueeze(1)).to(dtype)


def forward(x, weight, bias, batch_major: bool, way: str) -> Tensor:
    """y by library calls; all in one dtype."""
    M, O, _ = weight.shape
    if way == "wide":
        y = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return y.unflatten(1, (M, O)).transpose(0, 1)
    if way == "few":
        y = torch.bmm(weight, x.transpose(1, 2)).transpose(1, 2)
        if batch_major:  # rows of all members in the order of y
            return _into(y, bias, (1, 0, 2))
        return _into(y, bias, (0, 1, 2))
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _into(y: Tensor, bias: Tensor | None, order: tuple[int, ...]) -> Tensor:
    """y plus the bias, in memory of dimensions in that order."""
    out = y.new_empty([y.shape[d] for d in order]).permute(order)
    if bias is not None and torch.compiler.is_compiling():  # a traced out= has the order of y
        y, bias = y + bias.unsqueeze(1), None
    return out.copy_(y) if bias is None else torch.add(y, bias.unsqueeze(1), out=out)


def input_gradient(dy, weight, way: str) -> Tensor:
    """dx, shaped as x."""
    if way == "wide":
        rows = dy.transpose(0, 1).flatten(1, 2)  # [B, M * O]
        return rows @ weight.flatten(0, 1)
    return torch.bmm(dy, weight)


def weight_gradient(dy, x, dtype: torch.dtype, way: str) -> Tensor:
    """dweight [M, O, I] in `dtype`; float32 from 16 bits has products of exact values."""
    M, _, O = dy.shape
    if way == "outer":
        return dy.transpose(1, 2).to(dtype) * x.to(dtype)
    if way == "wide":
        rows = dy.transpose(0, 1).flatten(1, 2)  # [B, M * O]
        return _product(rows.T.unsqueeze(0), x.unsqueeze(0), dtype)[0].unflatten(0, (M, O))
    return _product(dy.transpose(1, 2), x, dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(a, b) if a.dtype == b.dtype == dtype else wide_product(a, b, dtype)
