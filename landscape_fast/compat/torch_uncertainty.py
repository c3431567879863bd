"""The BatchEnsemble layers of `torch_uncertainty` on the ops of this library.

Names, arguments, attributes (`linear`, `conv` or `conv_transpose` without a bias, `r_group` [M, I],
`s_group` [M, O], `bias` [M, O]), state-dict keys and initial values are those of torch-uncertainty
0.13. Rows are [M*B, ...], those of a member together. Deliberate differences: `from_*` keep the
weights and `padding_mode`; linear layers take dimensions in between, [M*B, L, I]; a number of rows
that M does not divide is spread evenly (row n of N belongs to member n * M // N), also with fewer
rows than members.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.compat._torch_uncertainty_forwards import conv_forward, linear_forward
from landscape_fast.nn import init
from landscape_fast.nn._rank_one import check_member
from landscape_fast.nn.functional import check_count, merged_weight
from landscape_fast.ops._checks import require

__all__ = ["BatchConv1d", "BatchConv2d", "BatchConvTranspose2d", "BatchLinear"]


class _Layer(nn.Module):
    """A plain layer under the name `_inner`, and what its M members do not share."""

    _inner: str

    def _make(self, plain: nn.Module, features: tuple[int, int], M: int, bias: bool) -> None:
        check_count(type(self).__name__, "num_estimators", M)
        self.num_estimators = M
        setattr(self, self._inner, plain)
        like = plain.weight
        self.r_group = Parameter(torch.empty(M, features[0], dtype=like.dtype, device=like.device))
        self.s_group = Parameter(torch.empty(M, features[1], dtype=like.dtype, device=like.device))
        kept = Parameter(torch.empty_like(self.s_group)) if bias else None
        self.register_parameter("bias", kept)
        self.reset_parameters()

    @property
    def _plain(self) -> nn.Module:
        return getattr(self, self._inner)

    members = property(lambda self: self.num_estimators, doc="M.")

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New factors from N(1, 0.5), and biases within 1 / sqrt(fan_in), each member's own."""
        for factor in (self.r_group, self.s_group):
            init.Normal(1.0, 0.5)(factor, generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(self._plain.weight[0].numel())
            init.uniform_(self.bias, bound, generator)

    @torch.no_grad()
    def _take(self, source: nn.Module) -> None:
        """The weight and bias of `source`, for all members."""
        self._plain.weight.copy_(source.weight)
        if source.bias is not None:
            self.bias.copy_(source.bias)

    def fast_parameters(self) -> list[Parameter]:
        """The factors, for `landscape_fast.methods.param_groups`."""
        return [self.r_group, self.s_group]

    @torch.no_grad()
    def member(self, i: int) -> nn.Module:
        """Member i as a plain layer with its own, merged weight."""
        check_member(type(self).__name__, i, self.num_estimators)
        r, s = self.r_group[i], self.s_group[i]
        pair = (s, r) if isinstance(self._plain, nn.ConvTranspose2d) else (r, s)
        merged = merged_weight(self._plain.weight, *pair, getattr(self._plain, "groups", 1))
        bias = None if self.bias is None else Parameter(self.bias[i].clone())
        return _rebuilt(self._plain, Parameter(merged), bias).train(self.training)


def _rebuilt(plain: nn.Module, weight: Parameter, bias: Parameter | None) -> nn.Module:
    """A plain layer with the options of `plain` and these parameters."""
    if isinstance(plain, nn.Linear):
        new = nn.Linear(plain.in_features, plain.out_features, bias is not None, device="meta")
    else:
        new = type(plain)(**_options(plain), bias=bias is not None, device="meta")
    new.weight, new.bias = weight, bias
    return new


def _options(conv: nn.Module) -> dict:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode"]
    names += ["output_padding"] if isinstance(conv, nn.ConvTranspose2d) else []
    return {name: getattr(conv, name) for name in names}


class BatchLinear(_Layer):
    """M linear layers that share a weight up to rank-one factors, for rows [M*B, ..., I].

    Args:
        in_features: I.
        out_features: O.
        num_estimators: M.
        bias: False leaves it out.
        device: of the parameters; `dtype` likewise.

    Example:
        >>> BatchLinear(20, 30, 3)(torch.zeros(8, 20)).shape
        torch.Size([8, 30])
    """

    _inner = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_estimators: int,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._make(linear, (in_features, out_features), num_estimators, bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_estimators: int) -> "BatchLinear":
        """M times `linear`, with its weight and bias; the factors are drawn."""
        bias, like = linear.bias is not None, linear.weight
        options = {"bias": bias, "device": like.device, "dtype": like.dtype}
        layer = cls(linear.in_features, linear.out_features, num_estimators, **options)
        layer._take(linear)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        """[M*B, ..., I] -> [M*B, ..., O]."""
        fits = inputs.ndim >= 2 and inputs.shape[-1] == self.in_features
        rule = f"[M*B, ..., I] with I = {self.in_features}"
        require(fits, "BatchLinear", "inputs", rule, list(inputs.shape))
        return linear_forward(self, inputs, even)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, num_estimators={self.num_estimators}, bias={self.bias is not None}"


class _Conv(_Layer):
    _inner = "conv"
    _kind: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        num_estimators: int,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        sizes = (in_channels, out_channels, kernel_size, stride, padding)
        options = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        conv = self._kind(*sizes, dilation=dilation, groups=groups, bias=False, **options)
        self._make_conv(conv, num_estimators, bias)

    def _make_conv(self, conv: nn.Module, num_estimators: int, bias: bool) -> None:
        for name, value in _options(conv).items():
            setattr(self, name, value)
        self._make(conv, (conv.in_channels, conv.out_channels), num_estimators, bias)

    @classmethod
    def _from(cls, source: nn.Module, num_estimators: int):
        like, bias = source.weight, source.bias is not None
        options = _options(source) | {"device": like.device, "dtype": like.dtype}
        layer = cls(**options, num_estimators=num_estimators, bias=bias)
        layer._take(source)
        return layer

    def forward(self, inputs: Tensor) -> Tensor:
        """[M*B, I, *pixels] -> [M*B, O, *pixels]."""
        fits = inputs.ndim == self._plain.weight.ndim and inputs.shape[1] == self.in_channels
        rule = f"[M*B, I, *pixels] with I = {self.in_channels}"
        require(fits, type(self).__name__, "inputs", rule, list(inputs.shape))
        return conv_forward(self, self._plain, inputs, even)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{text}, num_estimators={self.num_estimators}, stride={self.stride}"


class BatchConv1d(_Conv):
    """M convolutions of sequences that share a weight; arguments as `nn.Conv1d`, and M.

    Example:
        >>> BatchConv1d(3, 32, 3, num_estimators=4)(torch.zeros(8, 3, 16)).shape
        torch.Size([8, 32, 14])
    """

    _kind = nn.Conv1d

    @classmethod
    def from_conv1d(cls, conv1d: nn.Conv1d, num_estimators: int) -> "BatchConv1d":
        """M times `conv1d`, with its weight, bias and options; the factors are drawn."""
        return cls._from(conv1d, num_estimators)


class BatchConv2d(_Conv):
    """M convolutions of images that share a weight; arguments as `nn.Conv2d`, and M.

    Example:
        >>> BatchConv2d(3, 32, 3, num_estimators=4)(torch.zeros(8, 3, 16, 16)).shape
        torch.Size([8, 32, 14, 14])
    """

    _kind = nn.Conv2d

    @classmethod
    def from_conv2d(cls, conv2d: nn.Conv2d, num_estimators: int) -> "BatchConv2d":
        """M times `conv2d`, with its weight, bias and options; the factors are drawn."""
        return cls._from(conv2d, num_estimators)


class BatchConvTranspose2d(_Conv):
    """M transposed convolutions that share a weight; arguments as `nn.ConvTranspose2d`, and M.

    Example:
        >>> BatchConvTranspose2d(3, 8, 3, num_estimators=2)(torch.zeros(4, 3, 16, 16)).shape
        torch.Size([4, 8, 18, 18])
    """

    _inner = "conv_transpose"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        num_estimators: int,
        stride=1,
        padding=0,
        output_padding=0,
        groups: int = 1,
        bias: bool = True,
        dilation=1,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)
        sizes = (in_channels, out_channels, kernel_size, stride, padding, output_padding, groups)
        factory = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        conv = nn.ConvTranspose2d(*sizes, bias=False, dilation=dilation, **factory)
        self._make_conv(conv, num_estimators, bias)

    @classmethod
    def from_conv_transpose2d(
        cls, conv_transpose2d: nn.ConvTranspose2d, num_estimators: int
    ) -> "BatchConvTranspose2d":
        """M times `conv_transpose2d`, with weight, bias and options; the factors are drawn."""
        return cls._from(conv_transpose2d, num_estimators)


def even(rows: int, members: int, device: torch.device) -> Tensor:
    """The member of each of `rows` rows, spread evenly."""
    return torch.arange(rows, device=device) * members // max(rows, 1)
