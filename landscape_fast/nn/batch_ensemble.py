"""`nn.Linear` and `nn.Conv2d` for M members that share one weight (BatchEnsemble).

Member m has the weight `weight[o, i] * s[m, o] * r[m, i]`, so M networks take little more memory
than one, and one pass runs them all. Parameters:

=========  ======================  =============================================================
`weight`   [O, I], [O, I, kh, kw]  shared; drawn as in `nn.Linear` and `nn.Conv2d`
`r`        [M, I], or None         scales the input features of each member
`s`        [M, O], or None         scales its output features
`bias`     [M, O], [O], or None    one draw copied to all members (`bias=True`), or one for all
=========  ======================  =============================================================

A state dict of the plain layer loads with `strict=False`: its bias goes to every member, and r and
s stay as they are.
"""

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn._rank_one import RankOneLayer
from landscape_fast.nn.functional import batch_ensemble_conv2d, check_count, conv_options, pair
from landscape_fast.nn.init import Initialiser
from landscape_fast.ops._checks import require
from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear


class BatchEnsembleLinear(RankOneLayer):
    """M linear layers with one weight: `y[m] = ((x[m] * r[m]) @ weight.T) * s[m] + bias[m]`.

    Args:
        in_features: I.
        out_features: O.
        members: M.
        bias: True for one bias per member, all equal at first; "shared" for one bias; False.
        layout: where the members are. "member_major": x [M, B, I] -> [M, B, O]; "batch_major", as
            in TabM: [B, M, I] -> [B, M, O]; "folded": [M*B, I] -> [M*B, O], the rows of a member
            together. In the first two, x [B, I] is shared by all members and read without a copy.
            Further dimensions between batch and features are kept: [M, B, L, I], [B, L, M, I] and
            [M*B, L, I], flattened to a view (to a copy only where strides allow none).
        r: False leaves the factor out; `s` likewise.
        r_init: "ones", "random_sign", "normal" or a callable, see `landscape_fast.nn.init`;
            `s_init` likewise.
        generator: draws all initial values; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Wen et al. 2020 (arXiv:2002.06715); batch_major and the copied bias: TabM
    (arXiv:2410.24210).

    Example:
        >>> layer = BatchEnsembleLinear(8, 3, members=4, r_init="random_sign")
        >>> layer(torch.zeros(16, 8)).shape  # a batch shared by the members
        torch.Size([4, 16, 3])
        >>> layer.member(2)
        Linear(in_features=8, out_features=3, bias=True)
    """

    _plain = nn.Linear
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
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count("BatchEnsembleLinear", "in_features", in_features)
        check_count("BatchEnsembleLinear", "out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        shape, features = (out_features, in_features), (in_features, out_features)
        factory = {"device": device, "dtype": dtype}
        self._make(shape, features, members, bias, layout, (r, s), (r_init, s_init), factory)
        self.reset_parameters(generator)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        members: int,
        *,
        bias: bool | str = True,
        generator: Generator | None = None,
        tie: bool = False,
        **options,
    ) -> "BatchEnsembleLinear":
        """`members` times `layer`: its weight, bias, dtype, device, requires_grad and mode.

        Args:
            layer: the source; a subclass counts as the nn.Linear it is.
            members: M.
            bias: True or "shared", where `layer` has a bias; where it has none, nothing.
            generator: draws r and s.
            tie: keep the Parameter objects of `layer` instead of copies (a bias per member is
                always new).
            options: `layout`, `r`, `s`, `r_init`, `s_init` of the constructor.
        """
        return cls._from(layer, members, bias, generator, tie, options)

    @staticmethod
    def _arguments(layer):
        return {"in_features": layer.in_features, "out_features": layer.out_features}

    def member(self, i: int) -> nn.Linear:
        """Member i as a plain layer with its own, merged weight."""
        meta = {"device": "meta", "dtype": self.weight.dtype}
        bias = self.bias is not None
        return self._member(nn.Linear(self.in_features, self.out_features, bias, **meta), i)

    def forward(self, x: Tensor) -> Tensor:
        """[M, B, I] or shared [B, I] -> [M, B, O]; other layouts as described above."""
        rule = f"[..., I] with I = {self.in_features} and at least 2 dimensions"
        fits = x.ndim >= 2 and x.shape[-1] == self.in_features
        require(fits, "BatchEnsembleLinear", "x", rule, list(x.shape))
        rows = x
        if x.ndim > (2 if self.layout == "folded" else 3):
            # What lies between the members (or the start) and the features is all rows.
            spans = {"member_major": (1, -2), "batch_major": (0, -3), "folded": (0, -2)}
            rows = x.flatten(*spans[self.layout])
        scales = (self.r, self.s, self.bias)
        y = batch_ensemble_linear(rows, self.weight, *scales, layout=self.layout)
        return y if rows is x else y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._options_repr()}"


class BatchEnsembleConv2d(RankOneLayer):
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
        r: `r`, `s`, `r_init`, `s_init`, `generator`, `device` and `dtype` are as in
            `BatchEnsembleLinear`.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> layer = BatchEnsembleConv2d(3, 6, kernel_size=3, members=4, padding="same")
        >>> layer(torch.zeros(2, 3, 8, 8)).shape  # two images, shared by the members
        torch.Size([4, 2, 6, 8, 8])
    """

    _plain = nn.Conv2d
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
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = "BatchEnsembleConv2d"
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_count(op, name, count)
        options = conv_options(op, stride, padding, dilation, groups, padding_mode)
        rule = f"a divisor of in_channels = {in_channels} and out_channels = {out_channels}"
        fits = in_channels % groups == 0 and out_channels % groups == 0
        require(fits, op, "groups", rule, groups)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = pair(op, "kernel_size", kernel_size, 1)
        self.stride, self.padding, self.dilation = options
        self.groups, self.padding_mode = groups, padding_mode
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        features, factory = (in_channels, out_channels), {"device": device, "dtype": dtype}
        self._make(shape, features, members, bias, layout, (r, s), (r_init, s_init), factory)
        self.reset_parameters(generator)

    @classmethod
    def from_conv2d(
        cls,
        layer: nn.Conv2d,
        members: int,
        *,
        bias: bool | str = True,
        generator: Generator | None = None,
        tie: bool = False,
        **options,
    ) -> "BatchEnsembleConv2d":
        """`members` times `layer`, with all its options; see `BatchEnsembleLinear.from_linear`."""
        return cls._from(layer, members, bias, generator, tie, options)

    @staticmethod
    def _arguments(layer):
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
        return {name: getattr(layer, name) for name in names.split()}

    def member(self, i: int) -> nn.Conv2d:
        """Member i as a plain layer with its own, merged weight."""
        options = self._arguments(self) | {"bias": self.bias is not None}
        return self._member(nn.Conv2d(**options, device="meta", dtype=self.weight.dtype), i)

    def forward(self, x: Tensor) -> Tensor:
        """[M, B, I, H, W] or shared [B, I, H, W] -> [M, B, O, H', W']; or folded, see above."""
        return batch_ensemble_conv2d(
            x,
            self.weight,
            self.r,
            self.s,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        usual = {
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "padding_mode": "zeros",
        }
        for name, value in usual.items():
            if getattr(self, name) != value:
                text += f", {name}={getattr(self, name)!r}"
        return f"{text}, {self._options_repr()}"
