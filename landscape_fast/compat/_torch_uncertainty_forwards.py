"""How folded rows meet their members, for our layers and for those of `torch_uncertainty`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape_fast.models._tabm_blocks import hooked
from landscape_fast.nn.functional import batch_ensemble_conv
from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear

# rows, members, device -> the member of each row, where M does not divide the rows
Rule = Callable[[int, int, torch.device], Tensor]


def linear_forward(self, inputs: Tensor, rule: Rule) -> Tensor:
    """BatchLinear: [N, ..., I] -> [N, ..., O]."""
    weight, r, s, bias = self.linear.weight, self.r_group, self.s_group, self.bias
    M, N = len(r), inputs.shape[0]
    rows = inputs.flatten(0, -2)
    index = None
    if N % M:
        index = rule(N, M, inputs.device).repeat_interleave(inputs.shape[1:-1].numel())
    y = batch_ensemble_linear(rows, weight, r, s, bias, layout="folded", index=index)
    return y.unflatten(0, inputs.shape[:-1])


def conv_forward(self, conv: nn.Module, inputs: Tensor, rule: Rule) -> Tensor:
    """BatchConv1d, BatchConv2d and BatchConvTranspose2d: [N, I, *pixels] -> [N, O, *pixels]."""
    r, s, bias = self.r_group, self.s_group, self.bias
    M, N = len(r), inputs.shape[0]
    transposed = isinstance(conv, nn.ConvTranspose2d)
    if N % M == 0:
        names = ["stride", "padding", "dilation", "groups", "padding_mode"]
        names += ["output_padding"] if transposed else []
        options = {name: getattr(conv, name) for name in names}
        options |= {"layout": "folded", "transposed": transposed}
        return batch_ensemble_conv(inputs, conv.weight, r, s, bias, **options)
    # One row of factors per image, by a product: its gradient is deterministic everywhere.
    which = F.one_hot(rule(N, M, inputs.device), M).to(r.dtype)
    tail = (1,) * (inputs.ndim - 2)
    r, s, bias = (None if t is None else (which @ t).view(N, -1, *tail) for t in (r, s, bias))
    y = conv(inputs * r) * s
    return y if bias is None else y + bias


def _peer_rule(rows: int, members: int, device: torch.device) -> Tensor:
    """That of torch_uncertainty: the rows left over start again with the first member."""
    per_member = rows // members
    n = torch.arange(rows, device=device)
    return torch.where(n < members * per_member, n, n - members * per_member) // per_member


def _watched(plain: nn.Module) -> bool:
    """Whether something would notice that the inner layer is not called."""
    usual = type(plain).forward in (
        nn.Linear.forward,
        nn.Conv1d.forward,
        nn.Conv2d.forward,
        nn.ConvTranspose2d.forward,
    )
    return not usual or hooked(plain)


def _linear(self, inputs: Tensor) -> Tensor:
    odd = inputs.ndim != 2 or inputs.shape[0] < self.num_estimators
    if odd or self.linear.bias is not None or _watched(self.linear):
        return self._peer.forward(self, inputs)
    return linear_forward(self, inputs, _peer_rule)


def _conv(self, inputs: Tensor) -> Tensor:
    conv = self.conv_transpose if hasattr(self, "conv_transpose") else self.conv
    odd = inputs.ndim != conv.weight.ndim or inputs.shape[0] < self.num_estimators
    if odd or conv.bias is not None or _watched(conv):
        return self._peer.forward(self, inputs)
    return conv_forward(self, conv, inputs, _peer_rule)


METHODS = {
    ("torch_uncertainty.layers.batch_ensemble", "BatchLinear"): {"forward": _linear},
    ("torch_uncertainty.layers.batch_ensemble", "BatchConv1d"): {"forward": _conv},
    ("torch_uncertainty.layers.batch_ensemble", "BatchConv2d"): {"forward": _conv},
    ("torch_uncertainty.layers.batch_ensemble", "BatchConvTranspose2d"): {"forward": _conv},
}
