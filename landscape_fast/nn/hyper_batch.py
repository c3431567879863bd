"""`nn.Linear` and `nn.Conv2d` for M members whose weights follow hyperparameters (hyper-batch).

Member m has, at the response e of an example to its hyperparameters, the weight
`weight[o, i] * s[m, o] * r[m, i] + delta[o, i] * v[m, o] * u[m, i] * e[o]`. Parameters:

==============  ======================  ========================================================
`weight`        [O, I], [O, I, kh, kw]  shared by members and hyperparameters; as in the plain layer
`delta`         as `weight`             what responds; drawn in the same way
`r`, `s`        [M, I], [M, O] or None  scale the input and output features of each member
`u`, `v`        as r, s, or None        the same for `delta`; with `tie_factors` they are r and s
`bias`          [M, O], [O] or None     one draw copied to all members, or one for all
`delta_bias`    as `bias`               the bias that responds; zeros
==============  ======================  ========================================================

The response comes from a `HyperEmbedding`, one for all layers of a `HyperBatchNetwork`. Self-tuning
networks are one member without factors: `members=1, r=False, s=False`.
"""

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn._hyper_embedding import HyperEmbedding, LambdaDistribution
from landscape_fast.nn._hyper_layer import HyperBatchLayer
from landscape_fast.nn._hyper_network import HyperBatchNetwork
from landscape_fast.nn.functional import check_count, conv_options, pair
from landscape_fast.nn.init import Initialiser
from landscape_fast.ops._checks import require
from landscape_fast.ops.hyper_batch_conv2d import hyper_batch_conv2d
from landscape_fast.ops.hyper_batch_linear import hyper_batch_linear

__all__ = [
    "HyperBatchConv2d",
    "HyperBatchLinear",
    "HyperBatchNetwork",
    "HyperEmbedding",
    "LambdaDistribution",
]


class HyperBatchLinear(HyperBatchLayer):
    """M linear layers whose weights are functions of hyperparameters that differ by example.

    Args:
        in_features: I.
        out_features: O.
        members: M.
        bias: True for one bias per member, all equal at first; "shared" for one bias; False.
        layout: "member_major": x [M, B, I] -> [M, B, O]; "batch_major": [B, M, I] -> [B, M, O]; in
            both x [B, I] is shared by all members. "folded": [M*B, I] -> [M*B, O].
        r: False leaves the factors r and u out; `s` likewise, and v.
        tie_factors: u = r and v = s, as published; False gives `delta` factors of its own.
        r_init: "ones", "random_sign", "normal" or a callable, see `landscape_fast.nn.init`;
            `s_init` likewise. The published recipe is `Normal(1, 0.75)` for both.
        generator: draws all initial values; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Wenzel et al. 2020 (arXiv:2006.13570).

    Example:
        >>> layer = HyperBatchLinear(8, 3, members=4)
        >>> x, e = torch.zeros(16, 8), torch.zeros(4, 16, 6)  # e: for the weight, then the bias
        >>> layer(x, e).shape
        torch.Size([4, 16, 3])
        >>> layer.member(2, e[2, 0])  # what member 2 is for the hyperparameters of one example
        Linear(in_features=8, out_features=3, bias=True)
    """

    _layouts = ("member_major", "batch_major", "folded")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        members: int,
        bias: bool | str = True,
        *,
        layout: str = "member_major",
        r: bool = True,
        s: bool = True,
        tie_factors: bool = True,
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, count in (("in_features", in_features), ("out_features", out_features)):
            check_count("HyperBatchLinear", name, count)
        self.in_features, self.out_features = in_features, out_features
        features, factory = (in_features, out_features), {"device": device, "dtype": dtype}
        factors = ((r, s), tie_factors, (r_init, s_init))
        self._make(features[::-1], features, members, bias, layout, *factors, factory)
        self.reset_parameters(generator)

    def member(self, i: int, e: Tensor) -> nn.Linear:
        """Member i at the response e [2 * O] (or [O], without a bias), as a plain layer."""
        meta = {"device": "meta", "dtype": self.weight.dtype}
        bias = self.bias is not None
        return self._at(nn.Linear(self.in_features, self.out_features, bias, **meta), i, e)

    def forward(self, x: Tensor, e: Tensor | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[M, B, I] or shared [B, I] -> [M, B, O]; other layouts as described above.

        e is [M, B, 2 * O] (rows and layout as in the result; O without a bias), or its two halves;
        None takes that of the `HyperBatchNetwork` around.
        """
        e, e_bias = self._halves(e)
        factors = (self.r, self.s, self.u, self.v, self.bias, self.delta_bias)
        return hyper_batch_linear(
            x, self.weight, self.delta, e, *factors, e_bias, layout=self.layout
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._options_repr()}"


class HyperBatchConv2d(HyperBatchLayer):
    """M convolutions whose weights are functions of hyperparameters that differ by example.

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        members: M.
        stride, padding, dilation, groups, padding_mode: as in `nn.Conv2d`.
        bias: True, "shared" or False, as in `HyperBatchLinear`, and so the arguments that follow.
        layout: "member_major": x [M, B, I, H, W], or [B, I, H, W] shared by the members, to
            [M, B, O, H', W']; "folded": [M*B, I, H, W] to [M*B, O, H', W'].

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Wenzel et al. 2020 (arXiv:2006.13570).

    Example:
        >>> layer = HyperBatchConv2d(3, 8, 3, members=4, padding=1, bias=False)
        >>> layer(torch.zeros(2, 3, 6, 6), torch.zeros(4, 2, 8)).shape
        torch.Size([4, 2, 8, 6, 6])
    """

    _layouts = ("member_major", "folded")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        members: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool | str = True,
        padding_mode: str = "zeros",
        *,
        layout: str = "member_major",
        r: bool = True,
        s: bool = True,
        tie_factors: bool = True,
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = "HyperBatchConv2d"
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_count(op, name, count)
        options = conv_options(op, stride, padding, dilation, groups, padding_mode)
        self.stride, self.padding, self.dilation = options
        rule = f"a divisor of in_channels = {in_channels} and out_channels = {out_channels}"
        fits = in_channels % groups == 0 and out_channels % groups == 0
        require(fits, op, "groups", rule, groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = pair(op, "kernel_size", kernel_size, 1)
        self.groups, self.padding_mode = groups, padding_mode
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        features, factory = (in_channels, out_channels), {"device": device, "dtype": dtype}
        factors = ((r, s), tie_factors, (r_init, s_init))
        self._make(shape, features, members, bias, layout, *factors, factory)
        self.reset_parameters(generator)

    def _options(self) -> dict:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        return {name: getattr(self, name) for name in names}

    def member(self, i: int, e: Tensor) -> nn.Conv2d:
        """Member i at the response e [2 * O] (or [O], without a bias), as a plain layer."""
        options = self._options() | {"device": "meta", "dtype": self.weight.dtype}
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        return self._at(nn.Conv2d(*sizes, bias=self.bias is not None, **options), i, e)

    def forward(self, x: Tensor, e: Tensor | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[M, B, I, H, W] or shared [B, I, H, W] -> [M, B, O, H', W']; or folded, see above.

        e is [M, B, 2 * O] ([M*B, 2 * O] folded; O without a bias), or its two halves; None takes
        that of the `HyperBatchNetwork` around.
        """
        e, e_bias = self._halves(e)
        factors = (self.r, self.s, self.u, self.v, self.bias, self.delta_bias)
        tensors = (x, self.weight, self.delta, e, *factors, e_bias)
        return hyper_batch_conv2d(*tensors, **self._options(), layout=self.layout)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        for name, value in (usual | {"padding_mode": "zeros"}).items():
            if getattr(self, name) != value:
                text += f", {name}={getattr(self, name)!r}"
        return f"{text}, {self._options_repr()}"
