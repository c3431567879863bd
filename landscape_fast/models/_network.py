"""What the networks share: input checks, initial values, layers with members on folded rows."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from landscape_fast.nn.members import MemberLinear
from landscape_fast.ops._checks import require

Factory = Callable[..., nn.Module]


class Network(nn.Module):
    """Input checks and initial values, common to the networks of this package."""

    def __init__(self, shape: tuple[int, ...], classes: int, dropout: float):
        super().__init__()
        op = type(self).__name__
        sizes = all(isinstance(n, int) and n >= 1 for n in (*shape, classes))
        got = f"shape {shape}, {classes} classes"
        require(sizes, op, "the input shape and classes", "integers of at least 1", got)
        require(0 <= dropout < 1, op, "dropout", "a probability in [0, 1)", dropout)
        self.shape, self.classes = shape, classes
        self.dropout = nn.Dropout(dropout)

    def _check(self, x: Tensor) -> None:
        """x is [B, *shape] or [M, B, *shape]."""
        last = ", ".join(map(str, self.shape))
        n = len(self.shape)
        fits = x.ndim in (n + 1, n + 2) and tuple(x.shape[-n:]) == self.shape
        rule = f"[B, {last}] or [M, B, {last}]"
        require(fits, type(self).__name__, "x", rule, list(x.shape))

    def _start(self, initialise: Callable, generator: Generator | None) -> None:
        """New weights and biases by `initialise`, and new factors where a layer has some."""
        for layer in self.modules():
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            norm = hasattr(layer, "eps")  # with members, its weight is a matrix, too
            if isinstance(layer, MemberLinear):
                for i in range(layer.members):  # [M, I, O], every member drawn by itself
                    own = None if bias is None else bias.detach()[i]
                    initialise(weight.detach()[i].T, own, generator)
            elif isinstance(weight, Tensor) and weight.ndim > 1 and not norm:
                initialise(weight, bias, generator)
            if hasattr(layer, "reset_factors"):
                layer.reset_factors(generator)


def through(layer: nn.Module, x: Tensor, members: int) -> tuple[Tensor, int]:
    """Runs `layer` on x [B, ...] (members 0) or folded [M*B, ...]; returns (y, members) alike.

    A layer with members, in the layout "member_major", sees [M, B, ...], or a batch that has no
    members yet and which it then shares. Any other layer sees the rows of all members as one batch.
    The changes of shape are views.
    """
    if getattr(layer, "layout", None) != "member_major":
        return layer(x), members
    y = layer(x.unflatten(0, (members, x.shape[0] // members)) if members else x)
    return y.flatten(0, 1), y.shape[0]


def halved(x: Tensor) -> Tensor:
    """Max pooling 2x2 on [..., C, H, W]; an odd last row or column is pooled alone ("same")."""
    if x.ndim == 4:
        return F.max_pool2d(x, 2, ceil_mode=True)
    y = F.max_pool2d(x.flatten(0, 1), 2, ceil_mode=True)
    return y.unflatten(0, x.shape[:2])
