"""Curves of low loss between two trained networks: training, statistics, ensembles of pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.anchor_optim import AnchorAdam, AnchorSGD
from landscape_fast.methods.checkpoint import describe_rows
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.subspaces import TrainedSubspace
from landscape_fast.methods.sweep import sweep
from landscape_fast.methods.trainer import Run
from landscape_fast.nn.coefficients import Bezier, Line, PolyChain, line
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.geometry import arc_length, lengths
from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops import combine, gram
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
    check_alike("straight_line", start, end)
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
    layout = check_alike(op, start, end)
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
    shared = config.member_batches == "shared"
    require(shared, op, "config.member_batches", "'shared'", repr(config.member_batches))
    curve = new_curve(start, end, kind=kind, bends=bends)
    device, label = curve.anchors.device, f"{kind} curve"
    path = None if directory is None else Path(directory) / f"curve-{kind}-{stream:03d}.pt"
    run = _CurveRun(curve, x.to(device), y.to(device), config, stream, label, path, on_step)
    ends = describe_rows(curve.fixed.double(), torch.empty(0))
    run.identity |= {"method": "curve", "ends": ends}
    history = run.execute(resume, progress)
    curve.move_to_(curve.coefficients.midpoint())
    return TrainedSubspace(curve, [history])


class Along(NamedTuple):
    """What a quantity is along a curve.

    Attributes:
        start: at t = 0, `end` at t = 1.
        minimum: over the points, `maximum` and `mean` likewise.
        integral: over the length of the curve, by the trapezoidal rule, divided by that length.
        barrier: the most by which it exceeds the straight line between its values at the ends.
    """

    start: float
    end: float
    minimum: float
    maximum: float
    mean: float
    integral: float
    barrier: float

    @classmethod
    def of(cls, values: Tensor, t: Tensor, length: Tensor) -> "Along":
        """Of `values` [S] at positions t [S] and lengths [S] from the start.

        Example:
            >>> t = torch.tensor([0.0, 1.0])
            >>> Along.of(torch.tensor([1.0, 3.0]), t, 5 * t)
            Along(start=1.0, end=3.0, minimum=1.0, maximum=3.0, mean=2.0, integral=2.0, barrier=0.0)
        """
        values, t, length = (each.detach().double().cpu() for each in (values, t, length))
        span = length[-1] - length[0]
        integral = torch.trapezoid(values, length) / span if span > 0 else values.mean()
        part = (t - t[0]) / (t[-1] - t[0])
        over = values - torch.lerp(values[0], values[-1], part)
        numbers = (values[0], values[-1], values.min(), values.max(), values.mean(), integral)
        return cls(*map(float, (*numbers, over.max())))


class CurveStatistics(NamedTuple):
    """Networks along a curve; see `curve_statistics`.

    Attributes:
        t: [S] positions.
        length: [S], of the curve from its start to each point, in weight space.
        norm: [S], of the weights.
        loss: [S], mean cross-entropy, nats.
        penalized: [S], the loss and l2 / 2 times the squared norm: what `train_curve` lowers.
        error: [S], fraction of the rows.
        logits: [S, N, C], or None.
    """

    t: Tensor
    length: Tensor
    norm: Tensor
    loss: Tensor
    penalized: Tensor
    error: Tensor
    logits: Tensor | None

    def along(self, quantity: str = "loss") -> Along:
        """Summary of "loss", "penalized" or "error"."""
        known = ("loss", "penalized", "error")
        rule = f"one of {known}"
        require(quantity in known, "CurveStatistics.along", "quantity", rule, repr(quantity))
        return Along.of(getattr(self, quantity), self.t, self.length)


def curve_statistics(
    curve: Subspace,
    x: Tensor,
    y: Tensor,
    *,
    points: int = 61,
    l2: float = 0.0,
    calibration: Tensor | None = None,
    statistics: str = "recalibrate",
    keep_logits: bool = False,
    **options: Any,
) -> CurveStatistics:
    """Evaluates networks at equal steps of t along a curve, many per pass over the rows.

    Args:
        curve: of `train_curve`, `straight_line` or any subspace whose coefficients have `at(t)`.
        x: [N, ...] rows.
        y: [N] int64 classes.
        points: S, at least 2; the authors have 61.
        l2: of the penalized loss: the `weight_decay` of the training.
        calibration: training rows, on which the batch norm statistics of every point are taken
            anew; needed where there are batch norms.
        statistics: of batch norms; see `landscape_fast.methods.sweep.sweep`.
        keep_logits: keep the logits of all points, for `pair_ensemble`.
        options: batch_size, per_pass, label, checkpoint, resume and progress of `sweep`.

    Returns:
        `CurveStatistics`, on the CPU. Norms and lengths are from the Gram matrix of the anchors, in
        float64.

    Source: Garipov et al. 2018 (arXiv:1802.10026), section 3 and the authors' evaluation.
    """
    rule = "an integer of at least 2"
    require(whole(points, 2), "curve_statistics", "points", rule, points)
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    coeffs = curve.coefficients.at(t)
    found = sweep(
        curve.network(),
        lambda first, last: curve.mix(coeffs[first:last]).detach(),
        points,
        x,
        y,
        statistics=statistics,
        calibration=calibration,
        keep_logits=keep_logits,
        **options,
    )
    K = coeffs.shape[1]
    with torch.no_grad():
        products = gram(curve.mix(torch.eye(K))).cpu()
    norm, loss = lengths(coeffs, products), found.loss.double()
    return CurveStatistics(
        t,
        arc_length(coeffs, products),
        norm,
        loss,
        loss + 0.5 * l2 * norm.square(),
        1 - found.accuracy.double(),
        found.logits,
    )


class PairEnsemble(NamedTuple):
    """Ensembles of the first network of a curve and each of the others.

    Attributes:
        error: [S], fraction of the rows.
        loss: [S], nats, of the mean probabilities.
    """

    error: Tensor
    loss: Tensor


def pair_ensemble(logits: Tensor, y: Tensor) -> PairEnsemble:
    r"""The ensembles of :math:`\phi(0)` and :math:`\phi(t)` along a curve.

    Args:
        logits: [S, N, C] of the networks along the curve, the first at t = 0; see
            `curve_statistics`.
        y: [N] int64 classes.

    Source: Garipov et al. 2018 (arXiv:1802.10026), section 4: how far along a curve a network has
        to be for an ensemble with the first to be worth it.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 9.0]]])
        >>> pair_ensemble(logits, torch.tensor([1])).error
        tensor([1., 0.], dtype=torch.float64)
    """
    require(logits.ndim == 3, "pair_ensemble", "logits", "[S, N, C]", list(logits.shape))
    rule = f"[N] with N = {logits.shape[1]}"
    require(y.shape == logits.shape[1:2], "pair_ensemble", "y", rule, list(y.shape))
    y, error, loss = y.to(logits.device), [], []
    first = logits[0].double().softmax(-1)
    for each in logits:  # one point at a time: all in float64 would be large
        both = (first + each.double().softmax(-1)) / 2
        error.append((both.argmax(-1) != y).double().mean())
        loss.append(-both.gather(-1, y[:, None]).log().mean())
    return PairEnsemble(torch.stack(error).cpu(), torch.stack(loss).cpu())


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


def check_alike(op: str, start: nn.Module, end: nn.Module) -> FlatLayout:
    """The layout that two networks have in common; an error for networks that have none."""
    layout = FlatLayout(start)
    require(FlatLayout(end) == layout, op, "end", "a network like start", type(end).__name__)
    return layout
