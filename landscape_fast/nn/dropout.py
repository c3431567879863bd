"""ReLU and dropout that keep one activation for the backward instead of two."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape_fast.ops._checks import require
from landscape_fast.ops._dispatch import transforming


def relu_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`F.dropout(F.relu(x), p, training)`: the same numbers from the same random state.

    The result z tells all that the backward needs: it is positive exactly where x is and where the
    unit was kept, so dx = dz / (1 - p) there and 0 elsewhere. Only z is saved, which the next
    layer saves as its input anyway; the composition also saves the output of the ReLU and the
    mask of the dropout.

    Args:
        x: any shape.
        p: probability of zeroing a unit, in [0, 1).
        training: False leaves the ReLU alone.

    Raises:
        ValueError: if `p` is not a probability below 1.

    Example:
        >>> import torch
        >>> relu_dropout(torch.tensor([-1.0, 2.0]), 0.5, training=False)
        tensor([0., 2.])
    """
    require(0 <= p < 1, "relu_dropout", "p", "a probability in [0, 1)", p)
    if not training or p == 0:
        return F.relu(x)
    if transforming() or not (torch.is_grad_enabled() and x.requires_grad):
        return F.dropout(F.relu(x), p)
    return _ReLUDropout.apply(x, p)


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        z = F.dropout(F.relu(x), p)
        ctx.save_for_backward(z)
        ctx.scale = 1 / (1 - p)
        return z

    @staticmethod
    def backward(ctx, dz):
        # Of library calls alone, so that it can be differentiated again.
        (z,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(dz, z, 0) * ctx.scale, None


class ReLUDropout(nn.Module):
    """ReLU, then dropout of probability `p` in training mode; see `relu_dropout`.

    Args:
        p: probability of zeroing a unit, in [0, 1).

    Example:
        >>> ReLUDropout(0.1)
        ReLUDropout(p=0.1)
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        require(0 <= p < 1, "ReLUDropout", "p", "a probability in [0, 1)", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return relu_dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
