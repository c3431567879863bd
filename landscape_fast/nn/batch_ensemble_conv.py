"""Convolutions, and transposed ones, of M members that share one weight (BatchEnsemble).

Both factors scale whole channels, so member m is the plain layer with the weight
`weight[o, i] * s[m, o] * r[m, i]`, for every stride, padding, dilation and number of groups
(`groups=in_channels` makes it depthwise). Parameters:

=========  ==============================  =====================================================
`weight`   [O, I / groups, ...]            shared; drawn as in the plain layer
           transposed: [I, O / groups, ...]
`r`        [M, I], [K, M, I] or None       scales the input channels of each member
`s`        [M, O], [K, M, O] or None       scales its output channels
`bias`     [M, O], [O] or None             one draw copied to all members, or one for all
=========  ==============================  =====================================================

State dicts of plain layers load as described in `landscape_fast.nn.batch_ensemble`.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn._rank_one import RankOneLayer
from landscape_fast.nn.functional import (
    batch_ensemble_conv,
    check_count,
    conv_options,
    merged_weight,
    pair,
)
from landscape_fast.nn.init import Initialiser
from landscape_fast.ops._checks import require

Size = int | Sequence[int]


class _BatchEnsembleConv(RankOneLayer):
    """What the convolutions share; a subclass says the plain layer and its number of dimensions."""

    _layouts = ("member_major", "folded")
    _dims: int
    _transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        members: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool | str = True,
        padding_mode: str = "zeros",
        *,
        layout: str = "member_major",
        r: bool = True,
        s: bool = True,
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        rank: int = 1,
        activation: str | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = type(self).__name__
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_count(op, name, count)
        options = (stride, padding, dilation, groups, padding_mode, self._dims)
        self.stride, self.padding, self.dilation = conv_options(op, *options)
        rule = f"a divisor of in_channels = {in_channels} and out_channels = {out_channels}"
        fits = in_channels % groups == 0 and out_channels % groups == 0
        require(fits, op, "groups", rule, groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = pair(op, "kernel_size", kernel_size, 1, self._dims)
        self.groups, self.padding_mode = groups, padding_mode
        first, second = in_channels, out_channels
        if not self._transposed:
            first, second = second, first
        shape = (first, second // groups, *self.kernel_size)
        features, factory = (in_channels, out_channels), {"device": device, "dtype": dtype}
        factors = ((r, s), (r_init, s_init), rank)
        self._make(shape, features, members, bias, layout, *factors, activation, factory)
        self.reset_parameters(generator)

    @staticmethod
    def _arguments(layer):
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
        return {name: getattr(layer, name) for name in names.split()}

    def member(self, i: int) -> nn.Module:
        """Member i as a plain layer with its own, merged weight; a ReLU follows if this has one."""
        options = self._arguments(self) | {"bias": self.bias is not None}
        return self._member(self._plain(**options, device="meta", dtype=self.weight.dtype), i)

    def forward(self, x: Tensor) -> Tensor:
        """[M, B, I, ...] or shared [B, I, ...] -> [M, B, O, ...]; or folded, see above."""
        return self._convolve(x, 0)

    def _convolve(self, x: Tensor, output_padding: Size) -> Tensor:
        def call(r, s, bias, activation):
            return batch_ensemble_conv(
                x,
                self.weight,
                r,
                s,
                bias,
                stride=self.stride,
                padding=self.padding,
                output_padding=output_padding,
                dilation=self.dilation,
                groups=self.groups,
                padding_mode=self.padding_mode,
                layout=self.layout,
                transposed=self._transposed,
                activation=activation,
            )

        return self._summed(call)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        one, zero = (1,) * self._dims, (0,) * self._dims
        usual = {
            "stride": one,
            "padding": zero,
            "output_padding": zero,
            "dilation": one,
            "groups": 1,
            "padding_mode": "zeros",
        }
        for name, value in usual.items():
            if getattr(self, name, value) != value:
                text += f", {name}={getattr(self, name)!r}"
        return f"{text}, {self._options_repr()}"


class BatchEnsembleConv1d(_BatchEnsembleConv):
    """M convolutions of sequences with one weight; see `BatchEnsembleConv2d`.

    x is [M, B, I, L], or [B, I, L] shared by all members -> [M, B, O, L']; for layout "folded"
    [M*B, I, L] -> [M*B, O, L'].

    Example:
        >>> layer = BatchEnsembleConv1d(3, 6, kernel_size=5, members=4, groups=3)
        >>> layer(torch.zeros(2, 3, 20)).shape
        torch.Size([4, 2, 6, 16])
    """

    _plain, _dims = nn.Conv1d, 1

    @classmethod
    def from_conv1d(cls, layer: nn.Conv1d, members: int, **options) -> "BatchEnsembleConv1d":
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, **options)


class BatchEnsembleConv2d(_BatchEnsembleConv):
    """M convolutions with one weight; r scales the input channels, s the output channels.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: as in `nn.Conv2d`, and so `stride`, `padding` (numbers, "same", "valid"),
            `dilation`, `groups` and `padding_mode`.
        members: M.
        bias: True for one bias per member, all equal at first; "shared" for one bias; False.
        layout: "member_major": x [M, B, I, H, W], or [B, I, H, W] shared by all members ->
            [M, B, O, H', W']; "folded": [M*B, I, H, W] -> [M*B, O, H', W'], the images of a member
            together. Channels-last memory is kept.
        r: `r`, `s`, `r_init`, `s_init`, `rank`, `activation`, `generator`, `device` and `dtype` are
            as in `BatchEnsembleLinear`.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> layer = BatchEnsembleConv2d(3, 6, kernel_size=3, members=4, padding="same")
        >>> layer(torch.zeros(2, 3, 8, 8)).shape  # two images, shared by the members
        torch.Size([4, 2, 6, 8, 8])
    """

    _plain, _dims = nn.Conv2d, 2

    @classmethod
    def from_conv2d(cls, layer: nn.Conv2d, members: int, **options) -> "BatchEnsembleConv2d":
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, **options)


class BatchEnsembleConv3d(_BatchEnsembleConv):
    """M convolutions of volumes with one weight; see `BatchEnsembleConv2d`.

    x is [M, B, I, D, H, W], or [B, I, D, H, W] shared by all members -> [M, B, O, D', H', W']; for
    layout "folded" [M*B, I, D, H, W] -> [M*B, O, D', H', W'].

    Example:
        >>> layer = BatchEnsembleConv3d(3, 6, kernel_size=3, members=4, padding=1)
        >>> layer(torch.zeros(2, 3, 4, 4, 4)).shape
        torch.Size([4, 2, 6, 4, 4, 4])
    """

    _plain, _dims = nn.Conv3d, 3

    @classmethod
    def from_conv3d(cls, layer: nn.Conv3d, members: int, **options) -> "BatchEnsembleConv3d":
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, **options)


class _BatchEnsembleConvTranspose(_BatchEnsembleConv):
    """What transposed convolutions add: `output_padding`, and a weight with the input first."""

    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        members: int,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool | str = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        **options,
    ):
        op = type(self).__name__
        rule = "'zeros', the only one for a transposed convolution"
        require(padding_mode == "zeros", op, "padding_mode", rule, repr(padding_mode))
        rule = "numbers for a transposed convolution"
        require(not isinstance(padding, str), op, "padding", rule, repr(padding))
        sizes = (in_channels, out_channels, kernel_size, members)
        super().__init__(*sizes, stride, padding, dilation, groups, bias, **options)
        self.output_padding = pair(op, "output_padding", output_padding, 0, self._dims)
        limits = map(max, self.stride, self.dilation)
        fits = all(p < limit for p, limit in zip(self.output_padding, limits, strict=True))
        rule = "smaller than stride or dilation"
        require(fits, op, "output_padding", rule, self.output_padding)

    @staticmethod
    def _arguments(layer):
        more = {"output_padding": layer.output_padding}
        return _BatchEnsembleConv._arguments(layer) | more

    def _merged(self, r, s):
        return merged_weight(self.weight, s, r, self.groups)  # the input comes first in this weight

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """[M, B, I, ...] or shared [B, I, ...] -> [M, B, O, ...]; or folded, see above.

        Args:
            x: the input.
            output_size: the wanted sizes H', W' of the output, where `stride` leaves a choice;
                `output_padding` is then not used.
        """
        if output_size is None:
            return self._convolve(x, self.output_padding)
        op, n = type(self).__name__, self._dims
        least, most = [], []
        for d, size in enumerate(x.shape[-n:]):
            reach = self.dilation[d] * (self.kernel_size[d] - 1)
            least.append((size - 1) * self.stride[d] - 2 * self.padding[d] + reach + 1)
            most.append(least[d] + max(self.stride[d], self.dilation[d]) - 1)
        wanted = list(output_size)
        fits = len(wanted) == n and all(map(int.__le__, least, wanted))
        fits = fits and all(map(int.__le__, wanted, most))
        require(fits, op, "output_size", f"from {least} to {most}", wanted)
        return self._convolve(x, tuple(map(int.__sub__, wanted, least)))


class BatchEnsembleConvTranspose1d(_BatchEnsembleConvTranspose):
    """M transposed convolutions of sequences; see `BatchEnsembleConvTranspose2d`.

    Example:
        >>> layer = BatchEnsembleConvTranspose1d(3, 6, kernel_size=2, members=4, stride=2)
        >>> layer(torch.zeros(2, 3, 10)).shape
        torch.Size([4, 2, 6, 20])
    """

    _plain, _dims = nn.ConvTranspose1d, 1

    @classmethod
    def from_conv_transpose1d(cls, layer: nn.ConvTranspose1d, members: int, **options):
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, **options)


class BatchEnsembleConvTranspose2d(_BatchEnsembleConvTranspose):
    """M transposed convolutions with one weight; r scales the input channels, s the output's.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: as in `nn.ConvTranspose2d`, and so `stride`, `padding`, `output_padding`,
            `groups` and `dilation`.
        members: M.
        bias: True for one bias per member, all equal at first; "shared" for one bias; False.
        padding_mode: "zeros".
        options: `layout`, `r`, `s`, `r_init`, `s_init`, `rank`, `activation`, `generator`, `device`
            and `dtype`, as in `BatchEnsembleConv2d`.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> layer = BatchEnsembleConvTranspose2d(3, 6, kernel_size=2, members=4, stride=2)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([4, 2, 6, 16, 16])
    """

    _plain, _dims = nn.ConvTranspose2d, 2

    @classmethod
    def from_conv_transpose2d(cls, layer: nn.ConvTranspose2d, members: int, **options):
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, **options)


class BatchEnsembleConvTranspose3d(_BatchEnsembleConvTranspose):
    """M transposed convolutions of volumes; see `BatchEnsembleConvTranspose2d`.

    Example:
        >>> layer = BatchEnsembleConvTranspose3d(3, 6, kernel_size=2, members=4, stride=2)
        >>> layer(torch.zeros(2, 3, 4, 4, 4)).shape
        torch.Size([4, 2, 6, 8, 8, 8])
    """

    _plain, _dims = nn.ConvTranspose3d, 3

    @classmethod
    def from_conv_transpose3d(cls, layer: nn.ConvTranspose3d, members: int, **options):
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, **options)
