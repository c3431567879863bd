"""Curves of low loss between two trained networks: training, statistics, ensembles of pairs."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from landscape_fast.methods.anchor_optim import AnchorAdam, AnchorSGD
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.subspaces import TrainedSubspace
from landscape_fast.methods.trainer import Run
from landscape_fast.nn.coefficients import Bezier, Line, PolyChain, line
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops import combine
from landscape_fast.ops._checks import require, whole

KINDS = {"bezier": Bezier, "polychain": PolyChain}


def straight_line(start: nn.Module, end: nn.Module) -> Subspace:
    """The segment between two networks, to be measured like a curve.

    Args:
        start: the network at t = 0, `end` that at t = 1; copied.

    Example:
        >>> segment = straight_line(nn.Linear(2, 1), nn.Linear(2, 1))
        >>> segment.anchors.shape[0], segment.fixed.shape[0]
        (0, 2)
    """
    _check_alike("straight_line", start, end)
    return Subspace(start, [start, end], Line(), trained=[False, False])


def new_curve(
    start: nn.Module, end: nn.Module, *, kind: str = "bezier", bends: int = 1
) -> Subspace:
    """A curve between two networks before its training: its bends lie on the chord.

    Args:
        start: the network at t = 0, `end` that at t = 1; copied.
        kind: "bezier" or "polychain".
        bends: trained anchors between the ends, at equal distances.

    Raises:
        ValueError: for another kind, no bends, or networks that are not alike.

    Example:
        >>> curve = new_curve(nn.Linear(2, 1), nn.Linear(2, 1), bends=2)
        >>> curve.coefficients, curve.anchors.shape[0]
        (Bezier(anchors=4), 2)
    """
    op = "new_curve"
    require(kind in KINDS, op, "kind", f"one of {tuple(KINDS)}", repr(kind))
    require(whole(bends, 1), op, "bends", "an integer of at least 1", bends)
    layout = _check_alike(op, start, end)
    ends = layout.flatten_many([start, end])
    chord = line(torch.linspace(0, 1, bends + 2, dtype=torch.float64)[1:-1])
    middle = combine(chord.to(ends.device, torch.promote_types(ends.dtype, torch.float32)), ends)
    anchors = [ends[0], *middle, ends[1]]
    trained = [False, *[True] * bends, False]
    return Subspace(start, anchors, KINDS[kind](bends + 2), trained=trained)


def train_curve(
    start: nn.Module,
    end: nn.Module,
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    kind: str = "bezier",
    bends: int = 1,
    stream: int = 0,
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainedSubspace:
    r"""Connects two trained networks by a curve along which the loss is low.

    Every step draws t uniformly and goes down the loss of the network :math:`\phi(t)`, the mean
    cross-entropy of the batch and

    .. math:: \frac{\lambda}{2} \lVert \phi(t) \rVert^2

    in the bends of the curve; the ends stay where they are.

    Args:
        start: trained network at t = 0; copied.
        end: trained network at t = 1, of the same architecture and on the same device.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; `optimizer` "sgd" or "adam", `weight_decay` is :math:`\lambda`. The
            authors train VGG16 for 600 epochs with a rate of 0.015, residual networks for 200 with
            0.03, and schedule="hold_linear".
        kind: "bezier" or "polychain".
        bends: trained anchors between the ends.
        stream: which of the seed's random streams to use.
        directory: folder of the checkpoint curve-<kind>-<stream>.pt; None keeps none.
        resume: continue from the checkpoint found there.
        progress: show progress.
        on_step: called with the number of steps done, after each.

    Returns:
        `TrainedSubspace`, at t = 1/2. `subspace.coefficients.at(t)` are the coefficients of the
        position t; batch norms have no statistics of any point yet.

    Raises:
        TrainingInterrupted, ValueError, Diverged: see `landscape_fast.methods.fit`.

    Source: Garipov et al. 2018 (arXiv:1802.10026).
    """
    op = "train_curve"
    check_rows(op, x, y)
    rule = "'sgd' or 'adam'"
    known = config.optimizer in ("sgd", "adam")
    require(known, op, "config.optimizer", rule, repr(config.optimizer))
    curve = new_curve(start, end, kind=kind, bends=bends)
    device, label = curve.anchors.device, f"{kind} curve"
    path = None if directory is None else Path(directory) / f"curve-{kind}-{stream:03d}.pt"
    run = _CurveRun(curve, x.to(device), y.to(device), config, stream, label, path, on_step)
    ends = [float(end.double().norm()) for end in curve.fixed]
    run.identity |= {"method": "curve", "ends": str(ends)}
    history = run.execute(resume, progress)
    curve.move_to_(curve.coefficients.midpoint())
    return TrainedSubspace(curve, [history])


class _CurveRun(Run):
    """A run of a subspace: every step at a new point, the anchors moved by the fused optimiser."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer == "adam":
            return AnchorAdam(self.model, lr=config.lr, curve_l2=config.weight_decay)
        return AnchorSGD(
            self.model,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            curve_l2=config.weight_decay,
        )

    def _logits(self, x: Tensor) -> Tensor:
        # from the generator of the run, whose state is part of the checkpoint
        return self.model.draw_().model(x)


def _check_alike(op: str, start: nn.Module, end: nn.Module) -> FlatLayout:
    layout = FlatLayout(start)
    require(FlatLayout(end) == layout, op, "end", "a network like start", type(end).__name__)
    return layout
