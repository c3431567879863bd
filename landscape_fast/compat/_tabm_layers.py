"""The layers of `tabm`: [B, k, D] in, [B, k, D] out."""

import warnings
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from landscape_fast.models._tabm_start import Scaling, init_scaling_, reset_batch_ensemble_
from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.members import MemberLinear, MemberScale, member_linear
from landscape_fast.ops._checks import require
from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear


def ensemble_view(x: Tensor, k: int, training: bool) -> Tensor:
    """`EnsembleView` as a function."""
    require(x.ndim in (2, 3), "ensemble_view", "x", "[B, D] or [B, k, D]", list(x.shape))
    if x.ndim == 2:
        return x.unsqueeze(1).expand(-1, k, -1)
    require(x.shape[1] == k, "ensemble_view", "x", f"[B, k, D] with k = {k}", list(x.shape))
    if not training:
        warnings.warn(
            f"ensemble_view: x is {list(x.shape)}, one batch per member, in evaluation mode; "
            "there a batch [B, D] for all members is usual",
            stacklevel=2,
        )
    return x


class EnsembleView(nn.Module):
    """[B, D] -> [B, k, D] without a copy; [B, k, D] passes.

    Args:
        k: the number of members.

    Example:
        >>> EnsembleView(k=2)(torch.zeros(3, 4)).shape
        torch.Size([3, 2, 4])
    """

    def __init__(self, *, k: int):
        super().__init__()
        self._k = k

    k = property(lambda self: self._k, doc="The number of members.")

    def forward(self, x: Tensor) -> Tensor:
        return ensemble_view(x, self.k, self.training)


class ElementwiseAffine(MemberScale):
    """`x * weight + bias` over the last dimensions.

    Args:
        shape: of the weight, and of the last dimensions of the input.
        bias: True for an additive parameter, zero at first.
        scaling_init: start of the weight: "ones", "random-signs" or "normal".
        scaling_init_chunks: sizes of the parts of the last dimension that start with one value.
        dtype: of the parameters; `device` likewise.

    Example:
        >>> layer = ElementwiseAffine((3, 4), bias=True, scaling_init="normal")
        >>> layer(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        bias: bool,
        scaling_init: str,
        scaling_init_chunks: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(shape, bias, device=device, dtype=dtype)
        self._start = (scaling_init, scaling_init_chunks)
        self.reset_parameters()

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """A new weight; zero for the bias."""
        init_scaling_(self.weight, *self._start, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[*, *shape] -> [*, *shape]."""
        shape = self.weight.shape
        fits = x.ndim >= len(shape) and x.shape[x.ndim - len(shape) :] == shape
        rule = f"[..., {', '.join(map(str, shape))}]"
        require(fits, "ElementwiseAffine", "x", rule, list(x.shape))
        return super().forward(x)


class LinearEnsemble(MemberLinear):
    """k linear layers that share nothing: weight [k, I, O], bias [k, O].

    Args:
        in_features: I.
        out_features: O.
        bias: False leaves it out.
        k: the number of members.
        dtype: of the parameters; `device` likewise.

    Example:
        >>> LinearEnsemble(2, 3, k=4)(torch.zeros(5, 4, 2)).shape
        torch.Size([5, 4, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        options = {"layout": "batch_major", "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, k, bias, **options)

    @classmethod
    def from_linear(cls, module: nn.Linear, **options) -> "LinearEnsemble":
        """k layers like `module`, each with weights of its own, drawn anew.

        Members that share nothing and start equal would stay equal, so the weights are not taken.
        """
        return cls(**_like_linear(module, options))

    k = property(lambda self: self.members, doc="The number of members.")

    def forward(self, x: Tensor) -> Tensor:
        """[B, k, I] -> [B, k, O]."""
        return linear_ensemble(x, self.weight, self.bias)


class LinearBatchEnsemble(BatchEnsembleLinear):
    """k linear layers that share a weight up to rank-one factors: `((x * r) W^T) * s + bias`.

    Args:
        in_features: I.
        out_features: O.
        bias: True for a bias [k, O], equal for all members at first.
        k: the number of members.
        scaling_init: start of r and s, or a pair: "ones", "random-signs" or "normal" (0, 1).
        first_scaling_init_chunks: sizes of the parts of I in which r starts with one value.
        dtype: of the parameters; `device` likewise.

    Example:
        >>> layer = LinearBatchEnsemble(4, 5, k=3, scaling_init="random-signs")
        >>> layer(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 5])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int,
        scaling_init: str | tuple[str, str],
        first_scaling_init_chunks: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        both = isinstance(scaling_init, tuple)
        first, second = scaling_init if both else (scaling_init, scaling_init)
        chunks = first_scaling_init_chunks and tuple(first_scaling_init_chunks)
        starts = {"r_init": Scaling(first, chunks), "s_init": Scaling(second)}
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            in_features, out_features, k, bool(bias), layout="batch_major", **starts, **factory
        )

    @classmethod
    def from_linear(cls, module: nn.Linear, **options) -> "LinearBatchEnsemble":
        """k times `module`: its weight, and its bias for every member, are kept."""
        layer = cls(**_like_linear(module, options))
        with torch.no_grad():
            layer.weight.copy_(module.weight)
            if layer.bias is not None and module.bias is not None:
                layer.bias.copy_(module.bias)
        return layer

    k = property(lambda self: self.members, doc="The number of members.")

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New weight, r, s and bias, in this order."""
        reset_batch_ensemble_(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, k, I] -> [B, k, O]; [B, 1, I] and [B, I] are read by all members."""
        return with_activation(self, x)

    def with_activation(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The forward, and "relu" in the same pass; after it in a subclass with another forward."""
        if type(self).forward is LinearBatchEnsemble.forward:
            return with_activation(self, x, activation)
        return self(x) if activation is None else self(x).relu()


def with_activation(layer, x: Tensor, activation: str | None = None) -> Tensor:
    """The forward of `LinearBatchEnsemble`, also for layers of `tabm` itself."""
    weight, r = layer.weight, layer.r
    fits = x.ndim == 2 or x.ndim == 3 and x.shape[1] in (1, len(r))
    if not fits or x.shape[-1] != weight.shape[1]:
        rule = f"[B, k, I] with k = {len(r)}, I = {weight.shape[1]}"
        require(False, "LinearBatchEnsemble", "x", rule, list(x.shape))
    if x.ndim == 3 and _one_for_all(x, r.shape[0]):
        x = x[:, 0]
    x = _as_computed(x, weight)
    options = {"layout": "batch_major", "activation": activation}
    return batch_ensemble_linear(x, weight, r, layer.s, layer.bias, **options)


def linear_ensemble(x, weight, bias) -> Tensor:
    """The forward of `LinearEnsemble`, also for layers of `tabm` itself."""
    if x.ndim != 3 or x.shape[1:] != weight.shape[:2]:
        rule = f"[B, k, I] with k = {weight.shape[0]}, I = {weight.shape[1]}"
        require(False, "LinearEnsemble", "x", rule, list(x.shape))
    return member_linear(_as_computed(x, weight), weight, bias, layout="batch_major")


def _one_for_all(x: Tensor, k: int) -> bool:
    """Whether the members read the same memory, so that one copy of the rows is enough.

    Where x needs a gradient, that of an expanded x itself must keep its shape.
    """
    return x.shape[1] == 1 or (x.shape[1] == k and x.stride(1) == 0 and not x.requires_grad)


def _as_computed(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type that plain PyTorch would compute in: one-hot columns alone are integers."""
    if x.dtype == weight.dtype:
        return x
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x if x.is_floating_point() else x.to(weight.dtype)
    return x.to(torch.promote_types(x.dtype, weight.dtype))


def _like_linear(module: nn.Linear, options: dict) -> dict:
    sizes = {"in_features": module.in_features, "out_features": module.out_features}
    own = {"dtype": module.weight.dtype, "device": module.weight.device}
    return {**sizes, "bias": module.bias is not None, **own, **options}
