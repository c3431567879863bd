"""Layers whose members share nothing: M linear layers in one product, and a scale per member."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn import init
from landscape_fast.nn._rank_one import check_member
from landscape_fast.nn.functional import check_count
from landscape_fast.ops._checks import FLOATS, check_tensor, message, names, require
from landscape_fast.ops._dispatch import (
    autocast,
    reference_backward,
    transforming,
    wants_grad,
    wants_graph,
)

LAYOUTS = ("member_major", "batch_major")
# Up to this many outputs the transposed products are quicker on a CPU: with M = 32, B = 256,
# I = 512, O = 10 the forward takes 2.6 ms for 6.4 and dweight 3.1 ms for 19.8; at O = 64 they are
# equal (one thread of a Xeon at 2.8 GHz, torch 2.13, MKL).
FEW_OUTPUTS = 32


def member_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, layout: str = "member_major"
) -> Tensor:
    """M linear layers that share nothing: `y[m] = x[m] @ weight[m] + bias[m]`.

    Args:
        x: [M, B, I], or [B, I] read by all members; in layout "batch_major" [B, M, I] or [B, I].
        weight: [M, I, O], of the dtype of `x` unless autocast is on.
        bias: [M, O] or None.
        layout: "member_major" or "batch_major".

    Returns:
        [M, B, O], or [B, M, O] as a view of it, in the dtype of `x`, or of autocast where it is on.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or the layout disagree.

    Cost: 2 * M * B * I * O flops, and twice as many for the gradients; keeps x and weight for the
    backward. Differentiable to any order.
    """
    op = "member_linear"
    for name, given in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(given, Tensor) and not (given is None and name == "bias"):
            raise TypeError(message(op, name, "a Tensor", type(given).__name__))
    x, weight, bias = autocast(x, weight, bias)
    require(layout in LAYOUTS, op, "layout", f"one of {LAYOUTS}", repr(layout))
    if x.dtype not in FLOATS:
        require(False, op, "x", f"one of {names(FLOATS)}", x.dtype)
    like = {"like": x, "like_name": "x"}
    check_tensor(op, "weight", weight, "M, I, O", (None, x.shape[-1], None), **like)
    (M, I, O), batch_major = weight.shape, layout == "batch_major"
    letters = "B, M, I" if batch_major else "M, B, I"
    sizes = (None, M, I) if batch_major else (M, None, I)
    shared = x.ndim == 2
    check_tensor(op, "x", x, "B, I" if shared else letters, (None, I) if shared else sizes)
    if bias is not None:
        check_tensor(op, "bias", bias, "M, O", (M, O), **like)
    if shared:
        x = x.unsqueeze(1 if batch_major else 0)
        x = x.expand(-1, M, -1) if batch_major else x.expand(M, -1, -1)
    few = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and O <= FEW_OUTPUTS
    direct = not few or transforming() or torch.compiler.is_compiling() or x.numel() * O == 0
    if direct:
        return _plain(x, weight, bias, batch_major)
    if wants_grad(x, weight, bias):
        return _FewOutputs.apply(x, weight, bias, batch_major)
    return _few_outputs(x, weight, bias, batch_major)


def _plain(x, weight, bias, batch_major):
    """The definition, in library calls that every transform understands."""
    rows = x.transpose(0, 1) if batch_major else x
    y = rows @ weight if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return y.transpose(0, 1) if batch_major else y


def _few_outputs(x, weight, bias, batch_major):
    rows = x.transpose(0, 1) if batch_major else x  # [M, B, I]
    product = torch.bmm(weight.transpose(1, 2), rows.transpose(1, 2)).transpose(1, 2)
    y = torch.empty(product.shape, dtype=x.dtype)  # with the strides that _plain returns
    y.copy_(product) if bias is None else torch.add(product, bias.unsqueeze(1), out=y)
    return y.transpose(0, 1) if batch_major else y


class _FewOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, batch_major):
        ctx.save_for_backward(x, weight, bias)
        ctx.batch_major = batch_major
        return _few_outputs(x, weight, bias, batch_major)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        needs, batch_major = ctx.needs_input_grad[:3], ctx.batch_major
        if wants_graph():

            def definition(*tensors):
                return _plain(*tensors, batch_major)

            return *reference_backward(definition, (x, weight, bias), needs, dy), None
        rows, d = (t.transpose(0, 1) if batch_major else t for t in (x, dy))  # [M, B, .]
        dx = dweight = dbias = None
        if needs[0]:
            dx = torch.empty_like(x)  # in the order of x, which is what comes before reads
            torch.bmm(d, weight.transpose(1, 2), out=dx.transpose(0, 1) if batch_major else dx)
        if needs[1]:
            dweight = torch.bmm(d.transpose(1, 2), rows).transpose(1, 2).contiguous()
        if needs[2]:
            dbias = d.sum(1)
        return dx, dweight, dbias, None


class MemberLinear(nn.Module):
    """M linear layers that share nothing, in one batched product.

    Parameters: `weight` [M, I, O] and `bias` [M, O], every member drawn by itself, uniform within
    1 / sqrt(I).

    Args:
        in_features: I.
        out_features: O.
        members: M.
        bias: False leaves it out.
        layout: "member_major": [M, B, I] -> [M, B, O]; "batch_major": [B, M, I] -> [B, M, O]. In
            both, x [B, I] is read by all members.
        generator: draws the initial values; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: the heads of TabM (Gorishniy et al. 2024, arXiv:2410.24210), and its "packed" form.

    Example:
        >>> MemberLinear(8, 3, members=4)(torch.zeros(16, 8)).shape  # a batch shared by all
        torch.Size([4, 16, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        members: int,
        bias: bool = True,
        *,
        layout: str = "member_major",
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = type(self).__name__
        sizes = {"in_features": in_features, "out_features": out_features, "members": members}
        for name, value in sizes.items():
            check_count(op, name, value)
        require(layout in LAYOUTS, op, "layout", f"one of {LAYOUTS}", repr(layout))
        self.layout = layout
        factory = {"device": device, "dtype": dtype}
        self.weight = Parameter(torch.empty(members, in_features, out_features, **factory))
        self.register_parameter(
            "bias", Parameter(torch.empty(members, out_features, **factory)) if bias else None
        )
        self.reset_parameters(generator)

    in_features = property(lambda self: self.weight.shape[1], doc="I.")
    out_features = property(lambda self: self.weight.shape[2], doc="O.")
    members = property(lambda self: self.weight.shape[0], doc="M.")

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New weights and biases, each member's own."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                init.uniform_(parameter, bound, generator)

    def member(self, i: int) -> nn.Linear:
        """Member i as a plain layer."""
        check_member(type(self).__name__, i, self.members)
        bias, dtype = self.bias is not None, self.weight.dtype
        plain = nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=dtype)
        for name, source in (("weight", self.weight), ("bias", self.bias)):
            if source is not None:
                value = source.detach()[i].T if name == "weight" else source.detach()[i]
                copy = value.clone(memory_format=torch.contiguous_format)
                setattr(plain, name, Parameter(copy, requires_grad=source.requires_grad))
        return plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[M, B, I] or shared [B, I] -> [M, B, O]; or batch-major, see above."""
        return member_linear(x, self.weight, self.bias, layout=self.layout)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        more = f"members={self.members}, bias={self.bias is not None}, layout={self.layout!r}"
        return f"{sizes}, {more}"


class MemberScale(nn.Module):
    """`x * weight + bias` with a weight per member, [M, ...], broadcast over what is in front.

    Args:
        shape: of `weight`, and of `bias`, for instance (M, I).
        bias: True for an additive parameter of the same shape, zero at first.
        device: of the parameters; `dtype` likewise.

    The weight starts at one. Source: the only parameters that the members of TabM-mini do not
    share in the backbone (Gorishniy et al. 2024, arXiv:2410.24210).

    Example:
        >>> MemberScale((4, 8))(torch.zeros(16, 1, 8)).shape
        torch.Size([16, 4, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.weight = Parameter(torch.ones(tuple(shape), **factory))
        offset = Parameter(torch.zeros(tuple(shape), **factory)) if bias else None
        self.register_parameter("bias", offset)

    members = property(lambda self: self.weight.shape[0], doc="M.")

    def member(self, i: int) -> "MemberScale":
        """The scale of member i alone, of shape [...]."""
        check_member(type(self).__name__, i, self.members)
        one = MemberScale(self.weight.shape[1:], self.bias is not None, device="meta")
        for name, source in self.named_parameters(recurse=False):
            value = source.detach()[i].clone()
            setattr(one, name, Parameter(value, requires_grad=source.requires_grad))
        return one.train(self.training)

    def fast_parameters(self) -> list[Parameter]:
        """The scale, for `landscape_fast.methods.param_groups`."""
        return [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        """[..., M, *] -> [..., M, *]; size-1 dimensions of x are read by all members."""
        if self.bias is None:
            return x * self.weight
        return torch.addcmul(self.bias, self.weight, x)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"
