"""Normalisation with statistics and affine per member.

A plain `nn.BatchNorm2d` under `FoldedEnsemble` works too, and is what BatchEnsemble's authors
train with: one set of statistics over the rows of all members, one scale and shift. Here each
member has its own, as M separate networks would: an ensemble made of M equal networks gives the
same outputs either way, and one whose members have drifted apart does not.

A state dict of the plain layer loads: every member gets its values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn._rank_one import check_member
from landscape_fast.nn.functional import check_count
from landscape_fast.ops._checks import message, require
from landscape_fast.ops.member_batch_norm import member_batch_norm

LAYOUTS = ("member_major", "batch_major", "folded")


class _PerMember:
    """Construction from a plain layer, single members and state dicts, for both kinds of norm."""

    _plain: type[nn.Module]

    def _start(self, members: int, layout: str) -> None:
        op = type(self).__name__
        check_count(op, "members", members)
        layouts = " or ".join(map(repr, LAYOUTS))
        require(layout in LAYOUTS, op, "layout", layouts, repr(layout))
        self.members, self.layout = members, layout

    @staticmethod
    def _arguments(layer: nn.Module) -> dict:
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def _from(cls, layer: nn.Module, members: int, layout: str):
        if not isinstance(layer, cls._plain):
            rule = f"an nn.{cls._plain.__name__}"
            raise TypeError(message(cls.__name__, "layer", rule, type(layer).__name__))
        like = next((t for t in _tensors(layer).values() if t.is_floating_point()), None)
        factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
        new = cls(**cls._arguments(layer), members=members, layout=layout, **factory)
        _match(new, layer)
        for name, values in _tensors(layer).items():
            own = getattr(new, name)
            own.copy_(values)
            own.requires_grad_(values.requires_grad)
        return new.train(layer.training)

    @torch.no_grad()
    def member(self, i: int) -> nn.Module:
        """Member i as a plain layer with its own copies."""
        check_member(type(self).__name__, i, self.members)
        own = _tensors(self)
        like = next((t for t in own.values() if t.is_floating_point()), None)
        factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
        plain = self._plain(**self._arguments(self), **factory)
        _match(plain, self)
        for name, values in own.items():
            mine = getattr(plain, name)
            mine.copy_(values[i] if values.ndim > mine.ndim else values)
            mine.requires_grad_(values.requires_grad)
        return plain.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also takes the entries of a plain layer, for every member."""
        for name, own in _tensors(self).items():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape == own.shape[1:] and own.ndim:
                state_dict[prefix + name] = given.expand(own.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _options_repr(self) -> str:
        return f"members={self.members}, layout={self.layout!r}"


def _match(new: nn.Module, layer: nn.Module) -> None:
    """A scale without a shift, or a shift without a scale, is so in both."""
    for name in ("weight", "bias"):
        if getattr(layer, name) is None:
            setattr(new, name, None)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the layer itself."""
    own = {**layer._parameters, **layer._buffers}
    return {name: t for name, t in own.items() if t is not None}


class _EnsembleBatchNorm(_PerMember, nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of M members. Its base class makes `torch.optim.swa_utils` know it."""

    _pixels: tuple[int, ...]  # how many dimensions may follow the features

    def __init__(
        self,
        num_features: int,
        members: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str = "member_major",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count(type(self).__name__, "num_features", num_features)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._start(members, layout)
        for name, values in _tensors(self).items():
            if values.ndim == 1:
                every = values.detach().repeat(members, 1)
                setattr(self, name, Parameter(every) if isinstance(values, Parameter) else every)

    @classmethod
    def from_batchnorm(cls, layer: nn.Module, members: int, *, layout: str = "member_major"):
        """`members` times `layer`: its statistics, affine, dtype, device and mode, as copies."""
        return cls._from(layer, members, layout)

    @staticmethod
    def _arguments(layer):
        names = "num_features eps momentum affine track_running_stats"
        return {name: getattr(layer, name) for name in names.split()}

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as described above."""
        M, batch_major = self.members, self.layout == "batch_major"
        self._check(x)
        if self.layout != "folded" and x.ndim == self._pixels[0] + 2:
            x = x.unsqueeze(1 if batch_major else 0)
            x = x.expand(-1, M, *x.shape[2:]) if batch_major else x.expand(M, *x.shape[1:])
        values, options = self._settings()
        return member_batch_norm(x, *values, **options, layout=self.layout, members=M)

    def _settings(self) -> tuple[tuple, dict]:
        """Affine and statistics [M, F], and the options of the op, as in nn.BatchNorm2d."""
        step = self.momentum or 0.0
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                step = 1.0 / float(self.num_batches_tracked)
        fixed = not self.training and self.running_mean is not None
        stats = (self.running_mean, self.running_var) if fixed or tracks else (None, None)
        options = {"training": not fixed, "momentum": step, "eps": self.eps}
        return (self.weight, self.bias, *stats), options

    def _check(self, x: Tensor) -> None:
        M, n, folded = self.members, self.num_features, self.layout == "folded"
        pixels = {0: "", 1: ", L", 2: ", H, W", 3: ", D, H, W"}
        front = {"member_major": "M, B, F", "batch_major": "B, M, F", "folded": "M*B, F"}
        shapes = [f"[{front[self.layout]}{pixels[p]}]" for p in self._pixels]
        p = x.ndim - (2 if folded else 3)
        fits = p in self._pixels and x.shape[-p - 1] == n
        if folded:
            fits = fits and x.shape[0] % M == 0
        else:
            shapes.append(f"[B, F{pixels[self._pixels[0]]}]")
            fits = fits and x.shape[0 if self.layout == "member_major" else 1] == M
            fits = fits or (x.ndim == self._pixels[0] + 2 and x.shape[1] == n)
        rule = f"{' or '.join(shapes)} with M = {M}, F = {n}"
        require(fits, type(self).__name__, "x", rule, list(x.shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._options_repr()}"


class EnsembleBatchNorm1d(_EnsembleBatchNorm):
    """`nn.BatchNorm1d` of M members; see `EnsembleBatchNorm2d`.

    x is [M, B, F] or [M, B, F, L], or [B, F] shared by all members; [B, M, F] or [B, M, F, L] for
    layout "batch_major"; [M*B, F] or [M*B, F, L] for "folded". One pass without L.

    Example:
        >>> norm = EnsembleBatchNorm1d(3, members=4, layout="batch_major")
        >>> norm(torch.randn(5, 4, 3)).shape
        torch.Size([5, 4, 3])
    """

    _plain, _pixels = nn.BatchNorm1d, (0, 1)


class EnsembleBatchNorm2d(_EnsembleBatchNorm):
    """`nn.BatchNorm2d` of M members: statistics, scale and shift of each, [M, F].

    Args:
        num_features: F.
        members: M.
        eps: as in `nn.BatchNorm2d`, and so `momentum`, `affine` and `track_running_stats`.
        layout: "member_major": x [M, B, F, H, W], or [B, F, H, W] shared by all members ->
            [M, B, F, H, W]; "batch_major": [B, M, F, H, W]; "folded": [M*B, F, H, W].
            Channels-last memory stays.
        device: of the parameters; `dtype` likewise.

    `nn.SyncBatchNorm.convert_sync_batchnorm` does not apply; `swa_utils.update_bn` does.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167); per member: `ensemble_batchnorm` of edward2.

    Example:
        >>> norm = EnsembleBatchNorm2d.from_batchnorm(nn.BatchNorm2d(3), members=4, layout="folded")
        >>> norm(torch.randn(8, 3, 5, 5)).shape, norm.running_mean.shape
        (torch.Size([8, 3, 5, 5]), torch.Size([4, 3]))
    """

    _plain, _pixels = nn.BatchNorm2d, (2,)


class EnsembleBatchNorm3d(_EnsembleBatchNorm):
    """`nn.BatchNorm3d` of M members; see `EnsembleBatchNorm2d`, with pixels D, H, W.

    Example:
        >>> norm = EnsembleBatchNorm3d(3, members=4)
        >>> norm(torch.randn(4, 2, 3, 5, 5, 5)).shape
        torch.Size([4, 2, 3, 5, 5, 5])
    """

    _plain, _pixels = nn.BatchNorm3d, (3,)


class EnsembleLayerNorm(_PerMember, nn.Module):
    """`nn.LayerNorm` with a scale and a shift per member, [M, *normalized_shape].

    Args:
        normalized_shape: the last dimensions, as in `nn.LayerNorm`, and so `eps`,
            `elementwise_affine` and `bias`.
        members: M.
        layout: "member_major": x [M, B, ..., *normalized_shape], or [B, *normalized_shape] shared
            by all members -> [M, B, ...]; "batch_major": [B, ..., M, *normalized_shape]; "folded":
            [M*B, ..., *normalized_shape].
        device: of the parameters; `dtype` likewise.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Ba et al. 2016 (arXiv:1607.06450).

    Example:
        >>> norm = EnsembleLayerNorm(3, members=4, layout="folded")
        >>> norm(torch.randn(8, 7, 3)).shape  # M*B = 8 sequences of 7
        torch.Size([8, 7, 3])
    """

    _plain = nn.LayerNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        members: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        layout: str = "member_major",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        several = not isinstance(normalized_shape, int)
        shape = tuple(normalized_shape) if several else (normalized_shape,)
        for size in shape:
            check_count("EnsembleLayerNorm", "normalized_shape", size)
        self.normalized_shape, self.eps = shape, eps
        self.elementwise_affine = elementwise_affine
        self._start(members, layout)
        factory = {"device": device, "dtype": dtype}
        weight = torch.ones(members, *shape, **factory) if elementwise_affine else None
        shift = None if weight is None or not bias else torch.zeros_like(weight)
        self.register_parameter("weight", None if weight is None else Parameter(weight))
        self.register_parameter("bias", None if shift is None else Parameter(shift))

    @classmethod
    def from_layernorm(
        cls, layer: nn.LayerNorm, members: int, *, layout: str = "member_major"
    ) -> "EnsembleLayerNorm":
        """`members` times `layer`: its affine, dtype, device and mode, as copies."""
        return cls._from(layer, members, layout)

    @staticmethod
    def _arguments(layer):
        names = "normalized_shape eps elementwise_affine"
        return {name: getattr(layer, name) for name in names.split()}

    def reset_parameters(self) -> None:
        """Ones and zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as described above."""
        M, shape, n = self.members, self.normalized_shape, len(self.normalized_shape)
        batch_major, shared = self.layout == "batch_major", x.ndim == n + 1
        fits = x.ndim > n and tuple(x.shape[-n:]) == shape
        if self.layout == "folded":
            front, fits = "M*B, ...", fits and x.shape[0] % M == 0
        else:
            front = "B, ..., M" if batch_major else "M, B, ..."
            fits = fits and (shared or x.shape[-n - 1 if batch_major else 0] == M)
        rule = f"[{front}, {', '.join(map(str, shape))}] with M = {M}"
        require(fits, "EnsembleLayerNorm", "x", rule, list(x.shape))
        y = F.layer_norm(x, shape, eps=self.eps)
        if self.layout == "folded":
            return self._affine(y.unflatten(0, (M, x.shape[0] // M))).flatten(0, 1)
        if shared:
            y = y.unsqueeze(1) if batch_major else y.unsqueeze(0)
            y = y.expand(-1, M, *shape) if batch_major else y.expand(M, *x.shape)
        return self._affine(y)

    def _affine(self, y: Tensor) -> Tensor:
        if self.weight is None:
            return y
        last = () if self.layout == "batch_major" else (1,) * (y.ndim - self.weight.ndim)
        view = (self.members, *last, *self.normalized_shape)
        weight = self.weight.view(view)
        scaled = y * weight if self.bias is None else torch.addcmul(self.bias.view(view), y, weight)
        return scaled.to(y.dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.normalized_shape}, eps={self.eps}"
        affine = f"elementwise_affine={self.elementwise_affine}"
        return f"{sizes}, {affine}, {self._options_repr()}"
