"""Statistics of batch normalisation: exact moments, recalibration, and a guard against stale ones.

The running statistics of a network belong to one point of weight space. At any other point (inside
a subspace, along a curve, after averaging) they are wrong, and interpolating them is wrong too. So
a network whose weights are moved about carries a guard: evaluating it with statistics of another
point is an error that names the three ways out, `MODES`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from landscape_fast.nn._moments import BatchMoments, over_ranks
from landscape_fast.ops._checks import require, whole

MODES = ("recalibrate", "shared", "batch")
_GUARD = "_statistics_guard"  # the attribute by which the norms of one model share a guard
_KEPT = 32  # batches whose moments wait for being merged, so that a batch costs two small copies


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of `model` with running statistics: nn.BatchNorm*, EnsembleBatchNorm* and kin."""
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [layer for layer in found if layer.running_mean is not None]


@torch.no_grad()
def recalibrate_(
    model: nn.Module,
    batches_or_rows: Tensor | Iterable,
    *,
    batch_size: int = 1000,
    subset: int | Tensor | None = None,
    group: Any = None,
    call: Callable[[Tensor], Any] | None = None,
) -> nn.Module:
    """Takes the running statistics of all batch norms anew, at the weights the model has now.

    One pass over the rows, without gradients. Each layer normalises by the batch, as in training,
    and its running statistics become the mean and the unbiased variance of all that it was given:
    batches count by their sizes, and the spread between their means is part of the variance. (With
    `swa_utils.update_bn` every batch counts the same, and that spread is lost.) All modules but the
    norms are in evaluation mode: no dropout. Pass rows without augmentation. For M members all
    statistics come from the same pass.

    Args:
        model: with any nn.BatchNorm* or EnsembleBatchNorm*; without, nothing is run. Modes of its
            modules are as before afterwards, and a model under `statistics_mode_` may be evaluated.
        batches_or_rows: [N, ...] rows, on any device; or an iterable of batches, tensors or tuples
            that begin with one, taken as they are.
        batch_size: the most rows in one pass; N rows are cut into batches of nearly equal sizes.
        subset: how many of the N rows to use, the same ones every time, or an int64 tensor of their
            positions; None for all.
        group: processes that each have a share of the rows, for instance
            `torch.distributed.group.WORLD`: all get the statistics of all rows, the same bits
            (`num_batches_tracked` counts their own batches). None for this one alone.
        call: runs the model on a batch; `model` itself if None.

    Returns:
        `model`.

    Raises:
        ValueError: if there are no rows, or fewer than two numbers per channel. Statistics are then
            as before.

    Cost: one forward pass; float64 on [F] tensors besides.

    Source: the exact merge of Chan, Golub and LeVeque 1983; recalibration as in Izmailov et
        al. 2018 (arXiv:1803.05407) and Garipov et al. 2018 (arXiv:1802.10026).

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> rows = torch.tensor([[1.0], [2.0], [4.0], [6.0], [7.0]])
        >>> recalibrate_(norm, rows, batch_size=3).running_mean, norm.running_var
        (tensor([4.]), tensor([6.5000]))
    """
    layers = batch_norms(model)
    if layers:
        batches = _batches(batches_or_rows, batch_size, subset)
        device = layers[0].running_mean.device
        with _Collector(model, layers) as collector:
            for batch in batches:
                batch = batch[0] if isinstance(batch, (list, tuple)) else batch
                (call or model)(batch.to(device))
            collector.finish(group)
    for guard in _guards(layers):
        guard.stale = False
    return model


def _batches(given: Tensor | Iterable, batch_size: int, subset: int | Tensor | None) -> Iterable:
    op = "recalibrate_"
    require(whole(batch_size, 1), op, "batch_size", "an integer of at least 1", batch_size)
    if not isinstance(given, Tensor):
        rule = "None unless rows are given as one tensor"
        require(subset is None, op, "subset", rule, subset)
        return given
    N = given.shape[0] if given.ndim else 0
    require(N >= 1, op, "batches_or_rows", "[N, ...] with at least one row", list(given.shape))
    if subset is not None:
        if not isinstance(subset, Tensor):
            rule = f"an integer from 1 to N = {N}, or positions"
            require(whole(subset, 1) and subset <= N, op, "subset", rule, subset)
            subset = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:subset]
            subset = subset.sort().values
        given = given[subset.to(given.device)]
    return given.tensor_split(-(-given.shape[0] // batch_size))


class _Collector:
    """While open: norms run in training mode and leave the moments of each batch here."""

    def __init__(self, model: nn.Module, layers: list[_BatchNorm]) -> None:
        self.model, self.layers = model, layers

    def __enter__(self) -> "_Collector":
        self.training = [(m, m.training) for m in self.model.modules()]
        self.momentum = [layer.momentum for layer in self.layers]
        self.before = [
            [None if b is None else b.clone() for b in _buffers(layer)] for layer in self.layers
        ]
        self.seen: list[list[BatchMoments]] = [[] for _ in self.layers]
        self.done = False
        self.model.eval()
        self.hooks = []
        for layer, seen in zip(self.layers, self.seen, strict=True):
            layer.train()
            layer.reset_running_stats()
            layer.momentum = 1.0  # running statistics are then those of the last batch
            self.hooks.append(layer.register_forward_hook(_note(seen)))
        return self

    def finish(self, group: Any) -> None:
        """Merges all batches, of all processes, and sets the statistics."""
        totals = []
        for layer, seen in zip(self.layers, self.seen, strict=True):
            zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
            totals.append(
                BatchMoments.merge([BatchMoments(zeros.new_zeros(()), zeros, zeros), *seen])
            )
        totals = totals if group is None else over_ranks(totals, group)
        counts = torch.stack([total.count for total in totals]).tolist()  # waits for the device
        rule = "rows that give each channel two numbers or more"
        fits = max(counts) > 0 and 1 not in counts
        require(fits, "recalibrate_", "batches_or_rows", rule, int(min(counts)))
        for layer, n, total, before in zip(self.layers, counts, totals, self.before, strict=True):
            if n:
                layer.running_mean.copy_(total.mean)
                layer.running_var.copy_(total.variance())
            else:  # a layer that the model does not use
                _restore(layer, before)
        self.done = True

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, mode in self.training:
            module.training = mode
        for layer, momentum, before in zip(self.layers, self.momentum, self.before, strict=True):
            layer.momentum = momentum
            if not self.done:
                _restore(layer, before)


def _note(seen: list[BatchMoments]) -> Callable:
    def hook(layer: _BatchNorm, arguments: tuple, y: Tensor) -> None:
        mean = layer.running_mean
        n = y.numel() // mean.numel()
        if isinstance(layer, nn.SyncBatchNorm):  # its running statistics are of all ranks already
            x = arguments[0]
            seen.append(BatchMoments.of(x, (0, *range(2, x.ndim))))
        elif n:
            mean, m2 = mean.double(), layer.running_var.double() * (n - 1)
            seen.append(BatchMoments(mean.new_tensor(float(n)), mean.clone(), m2))
        if len(seen) > _KEPT:
            seen[:] = [BatchMoments.merge(seen)]

    return hook


def _buffers(layer: _BatchNorm) -> tuple[Tensor | None, ...]:
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


def _restore(layer: _BatchNorm, before: list[Tensor | None]) -> None:
    for buffer, values in zip(_buffers(layer), before, strict=True):
        if buffer is not None:
            buffer.copy_(values)


class StatisticsGuard:
    """What the batch norms of a model, which share it, may do when they are evaluated.

    Attributes:
        mode: one of `MODES`; see `statistics_mode_`.
        stale: whether the weights have moved since the statistics were taken. Whoever moves them
            sets it; `recalibrate_` clears it.
    """

    def __init__(self, mode: str) -> None:
        self.mode, self.stale = mode, True


def statistics_mode_(model: nn.Module, mode: str) -> StatisticsGuard:
    """Says which statistics the batch norms of `model` use in evaluation mode.

    Args:
        model: with any nn.BatchNorm* or EnsembleBatchNorm*, which get one guard together.
        mode: "recalibrate": the running statistics, if they were taken by `recalibrate_` since the
            weights last moved; to run the model otherwise is an error. "shared": the running
            statistics, whatever they are: those that training left, at whichever points it was.
            "batch": the mean and variance of the batch that is evaluated, which then matters;
            running statistics are neither read nor changed.

    Returns:
        The guard. A new one is stale; whoever moves the weights says `guard.stale = True`. Copies
        of the model have a guard of their own. Training mode is not affected.

    Raises:
        ValueError: if `mode` is none of the three.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> guard = statistics_mode_(model, "recalibrate")
        >>> model(torch.zeros(1, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        RuntimeError: BatchNorm1d: running statistics must be of the weights that are evaluated; ...
        >>> recalibrate_(model, torch.randn(8, 2))(torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """
    require(mode in MODES, "statistics_mode_", "mode", f"one of {MODES}", repr(mode))
    layers = batch_norms(model)
    guard = next(iter(_guards(layers)), None) or StatisticsGuard(mode)
    guard.mode = mode
    for layer in layers:
        if not hasattr(layer, _GUARD):
            layer.register_forward_pre_hook(_before_forward)
            layer.register_forward_hook(_after_forward, always_call=True)
        setattr(layer, _GUARD, guard)
    return guard


def guard_like_(model: nn.Module, networks: Sequence[nn.Module]) -> None:
    """A guard for `model` like that of `networks`, if they have one; stale if that of any is."""
    found = _guards([layer for network in networks for layer in batch_norms(network)])
    if found:
        stale = any(guard.stale for guard in found)
        statistics_mode_(model, found[0].mode).stale = stale


def unguard_(model: nn.Module) -> nn.Module:
    """Takes the guard, and its hooks, off the batch norms of `model`; returns it."""
    ours = _before_forward, _after_forward
    for layer in batch_norms(model):
        vars(layer).pop(_GUARD, None)
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
    return model


def _guards(layers: list[_BatchNorm]) -> list[StatisticsGuard]:
    found = [getattr(layer, _GUARD, None) for layer in layers]
    return [guard for guard in dict.fromkeys(found) if guard is not None]


def _before_forward(layer: _BatchNorm, arguments: tuple) -> None:
    guard = getattr(layer, _GUARD)
    if layer.training:
        return
    if guard.mode == "batch":  # without running statistics, a norm takes those of the batch
        layer._hidden_statistics = layer.running_mean, layer.running_var
        layer.running_mean = layer.running_var = None
    elif guard.mode == "recalibrate" and guard.stale:
        rule = "running statistics must be of the weights that are evaluated"
        remedy = (
            "take them here (mode 'recalibrate': recalibrate_(model, rows)), or choose "
            "statistics_mode_(model, 'shared') for those of training or 'batch' for each batch's"
        )
        got = "those of other weights"
        raise RuntimeError(f"{type(layer).__name__}: {rule}; got {got}; {remedy}")


def _after_forward(layer: _BatchNorm, arguments: tuple, y: Any) -> None:
    hidden = getattr(layer, "_hidden_statistics", None)
    if hidden is not None:
        layer.running_mean, layer.running_var = hidden
        layer._hidden_statistics = None
