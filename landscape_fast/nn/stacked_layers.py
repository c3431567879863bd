"""Plain layers with a parameter tensor per member, [M, ...], on folded rows [M*B, ...].

Each is made from a plain layer and keeps the names of its parameters and buffers; `stand_in` says
which, and what has no layer here runs member by member.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from landscape_fast.nn import norm as norms
from landscape_fast.nn._stacked_loop import (
    DROPOUTS,
    LoopedModule,
    LoopedNorm,
    MemberStreams,
    adopt,
    follow,
)
from landscape_fast.nn.convert import _HOOKS
from landscape_fast.nn.functional import split_members
from landscape_fast.ops.subspace_conv2d import subspace_conv2d
from landscape_fast.ops.subspace_linear import subspace_linear


class StackedLayer(nn.Module):
    """A layer of M members that share nothing; maps folded rows to folded rows.

    Args:
        plain: the layer of one member, which may be on the meta device.
        members: M.
        table: the tensors [M, ...] by the id of those of `plain`.
    """

    def __init__(self, plain: nn.Module, members: int, table: dict[int, Tensor]):
        super().__init__()
        adopt(self, plain, table)
        self.members = members
        self._described = f"members={members}, {plain.extra_repr()}"

    def extra_repr(self) -> str:
        return self._described

    def _affine(self, y: Tensor, *, last: bool = False) -> Tensor:
        """y [M*B, ...] times the weight of its member, plus its bias.

        Their dimensions are those of y right behind the rows or, with `last`, its last ones.
        """
        y = split_members(y, self.members)
        for name, change in (("weight", torch.mul), ("bias", torch.add)):
            own = getattr(self, name, None)
            if own is not None:
                shape, ones = own.shape[1:], (1,) * (y.ndim - own.ndim - 1)
                shape = (*ones, *shape) if last else (*shape, *ones)
                y = change(y, own.view(own.shape[0], 1, *shape))
        return y.flatten(0, 1)


class StackedLinear(StackedLayer):
    """`nn.Linear` of M members: `weight` [M, O, I], `bias` [M, O] or None."""

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, ..., I] -> [M*B, ..., O]."""
        rows = split_members(x, self.members)
        y = subspace_linear(rows.flatten(1, -2), self.weight, None, self.bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class StackedConv(StackedLayer):
    """`nn.Conv1d` or `nn.Conv2d` of M members: `weight` [M, O, I / groups, *kernel], `bias`."""

    def __init__(self, plain: nn.Module, members: int, table: dict[int, Tensor]):
        super().__init__(plain, members, table)
        self._pads = None  # before the convolution, where that cannot pad itself
        if plain.padding_mode != "zeros" or isinstance(plain.padding, str):
            self._pads = tuple(plain._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, I, *pixels] -> [M*B, O, *pixels]."""
        padding = self.padding
        if self._pads is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._pads, mode), (0,) * len(self.stride)
        options = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
        weight, row = self.weight, self.weight.ndim == 4
        if row:  # an image of one row
            x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
            rest = {"stride": 1, "padding": 0, "dilation": 1}
            options = {name: (rest[name], *value) for name, value in options.items()}
        options |= {"groups": self.groups, "layout": "folded"}
        y = subspace_conv2d(x, weight, None, self.bias, **options)
        return y.squeeze(-2) if row else y


class StackedEmbedding(StackedLayer):
    """`nn.Embedding` of M members: `weight` [M, V, D]."""

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, ...] indices -> [M*B, ..., D]."""
        rows = split_members(x, self.members)
        first = torch.arange(self.members, device=x.device) * self.num_embeddings
        y = F.embedding(rows + first.view(-1, *[1] * (rows.ndim - 1)), self.weight.flatten(0, 1))
        if self.padding_idx is not None:  # its row gets no gradient
            y = torch.where((rows == self.padding_idx).unsqueeze(-1), y.detach(), y)
        return y.flatten(0, 1)


class StackedGroupNorm(StackedLayer):
    """`nn.GroupNorm` of M members: `weight` and `bias` [M, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, C, ...] -> the same shape."""
        return self._affine(F.group_norm(x, self.num_groups, eps=self.eps))


class StackedRMSNorm(StackedLayer):
    """`nn.RMSNorm` of M members: `weight` [M, *normalized_shape]."""

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, ..., *normalized_shape] -> the same shape."""
        return self._affine(F.rms_norm(x, self.normalized_shape, eps=self.eps), last=True)


class StackedPReLU(StackedLayer):
    """`nn.PReLU` of M members: `weight` [M, 1] or [M, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, C, ...] -> the same shape."""
        return torch.where(x > 0, x, self._affine(x) if x.ndim > 1 else self._rows(x))

    def _rows(self, x: Tensor) -> Tensor:  # one number per row
        return (split_members(x, self.members) * self.weight).flatten()


class StackedDropout(LoopedModule):
    """Dropout of M members. With a stream for each, a member's mask is that of a run of its own.

    On a CPU it is drawn member by member, and has the numbers that the plain layer draws from a
    generator in the state of the stream. On a GPU, where a launch per member would cost more than
    the mask, one mask for the rows of all members comes from torch's global generator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[M*B, ...] -> the same shape."""
        if self.training and self.streams.seeds and x.device.type == "cpu":
            return super().forward(x)
        plain = self.loop.plain
        follow(plain, self)
        return plain(x)


_NORMS = {
    nn.BatchNorm1d: norms.EnsembleBatchNorm1d.from_batchnorm,
    nn.BatchNorm2d: norms.EnsembleBatchNorm2d.from_batchnorm,
    nn.BatchNorm3d: norms.EnsembleBatchNorm3d.from_batchnorm,
    nn.LayerNorm: norms.EnsembleLayerNorm.from_layernorm,
}
_LAYERS = {
    nn.Linear: StackedLinear,
    nn.Conv1d: StackedConv,
    nn.Conv2d: StackedConv,
    nn.Embedding: StackedEmbedding,
    nn.GroupNorm: StackedGroupNorm,
    nn.RMSNorm: StackedRMSNorm,
    nn.PReLU: StackedPReLU,
}


def stand_in(
    plain: nn.Module,
    members: int,
    table: dict[int, Tensor],
    made: dict[int, nn.Module],
    streams: MemberStreams,
) -> nn.Module | None:
    """What does for M members on folded rows what `plain` does for one; None: `plain` itself.

    None is for modules without tensors of their own, which see the rows of all members as one
    batch; those inside of it may need a layer. Arguments as for `LoopedModule`.
    """
    kind = type(plain)
    batch_norm = isinstance(plain, nn.modules.batchnorm._BatchNorm)
    looped = LoopedNorm if batch_norm else LoopedModule
    tensors = any(t is not None for t in (*plain._parameters.values(), *plain._buffers.values()))
    hooked = any(getattr(plain, name, None) for name in _HOOKS)
    if hooked or parametrize.is_parametrized(plain) or "forward" in vars(plain):
        return looped(plain, members, table, made, streams)
    if isinstance(plain, (*DROPOUTS, nn.RReLU)):
        return StackedDropout(plain, members, table, made, streams)
    if kind in _NORMS and getattr(plain, "momentum", 0.0) is not None:
        layer = _NORMS[kind](plain, members, layout="folded")
        adopt(layer, plain, table)
        return layer
    special = getattr(plain, "max_norm", None) is not None
    special = special or getattr(plain, "sparse", False)
    special = special or getattr(plain, "scale_grad_by_freq", False)
    if kind in _LAYERS and not special:
        return _LAYERS[kind](plain, members, table)
    return looped(plain, members, table, made, streams) if tensors or batch_norm else None
