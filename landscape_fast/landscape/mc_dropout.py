"""Monte Carlo dropout, which drops activations where `WeightDropout` drops weights."""

import copy

import torch
from torch import Tensor, nn

from landscape_fast.methods.seeds import isolated_rng, stream_seed
from landscape_fast.nn.dropout import ReLUDropout
from landscape_fast.ops._checks import require, whole

_DROPOUTS = (nn.modules.dropout._DropoutNd, ReLUDropout)


@torch.no_grad()
def mc_dropout(
    model: nn.Module, x: Tensor, count: int, *, seed: int = 0, batch_size: int = 1000
) -> Tensor:
    """What a network with dropout predicts in `count` passes with its dropout left on.

    Every row of every pass has masks of its own, so that a pass is no function that could be asked
    again: samples of `WeightDropout` are, and are what the landscape is drawn with. All other
    layers are in evaluation mode.

    Args:
        model: from rows [B, ...] to logits [B, C], with dropout modules of probability above 0
            (`nn.Dropout` and its kin, `ReLUDropout`; dropout that is called as a function cannot
            be found). It is copied.
        x: [N, ...] rows, moved to the device of the model.
        count: S, how many passes.
        seed: of the masks; those of pass i depend on it, on i and on `batch_size` alone.
        batch_size: the most rows in one forward pass.

    Returns:
        [S, N, C] on the device of the model.

    Raises:
        ValueError: if the model drops nothing, or another argument breaks its rule.

    Cost: S passes over x.

    Source: Gal and Ghahramani 2016 (arXiv:1506.02142), the name that Fort et al. 2019
        (arXiv:1912.02757) give to their dropout subspace, whose code drops weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> mc_dropout(model, torch.randn(10, 4), 5).shape
        torch.Size([5, 10, 3])
    """
    op = "mc_dropout"
    require(whole(count, 1), op, "count", "an integer of at least 1", repr(count))
    require(whole(seed, 0), op, "seed", "an integer of at least 0", repr(seed))
    require(whole(batch_size, 1), op, "batch_size", "an integer of at least 1", repr(batch_size))
    require(x.ndim >= 2 and len(x) >= 1, op, "x", "[N, ...] with N at least 1", list(x.shape))
    network = copy.deepcopy(model).eval().requires_grad_(False)
    active = [m for m in network.modules() if isinstance(m, _DROPOUTS) and m.p > 0]
    remedy = "`WeightDropout` samples around any network"
    rule = "a network with dropout modules of probability above 0"
    require(len(active) > 0, op, "model", rule, "one without", remedy)
    for module in active:
        module.train()
    device = next(network.parameters()).device
    parts = x.to(device).split(batch_size)
    passes = []
    for i in range(count):
        with isolated_rng(stream_seed(seed, i, "noise"), device):
            passes.append(torch.cat([network(part) for part in parts]))
    return torch.stack(passes)
