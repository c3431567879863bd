"""Subspaces of networks trained in one run: lines, simplexes, curves, and ensembles inside them."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.anchor_optim import AnchorAdam, AnchorAdamW, AnchorSGD
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.optim import make_optimizer
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.trainer import History, Run, training_seconds
from landscape_fast.nn.coefficients import Line
from landscape_fast.nn.ensemble import DeepEnsemble
from landscape_fast.nn.statistics import recalibrate_, statistics_mode_
from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops._checks import require, whole
from landscape_fast.ops.gram import gram

AVERAGES = ("probabilities", "logits")


class TrainedSubspace(NamedTuple):
    """What `train_subspace` and `train_curve` return.

    Attributes:
        subspace: in evaluation mode, at its midpoint. Batch norms have no statistics of that point
            yet: call `subspace.recalibrate_(rows)`, or take networks from `subspace_ensemble`.
        histories: one list, of the one run.
    """

    subspace: Subspace
    histories: list[History]

    @property
    def seconds(self) -> list[float]:
        """Seconds of training."""
        return training_seconds(self.histories)


def train_subspace(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    coefficients: Any = Line(),  # noqa: B008, a frozen value
    layerwise: bool = False,
    beta: float = 1.0,
    points: int = 1,
    stream: int = 0,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainedSubspace:
    r"""Trains a whole line, simplex or curve of networks at the cost of little more than one.

    Every step draws one network of the subspace and takes the gradient of its loss, which reaches
    all K anchors by their coefficients. To keep the anchors from collapsing into one, the loss has
    a penalty on one random pair of them,

    .. math:: \beta \cos^2(A_i, A_j),

    over the weights of all layers, without biases and norms.

    Args:
        build: makes an untrained network that maps [B, ...] to [B, C]. It is called K times: anchor
            0 starts as the single network of this seed and stream, the others from random streams
            of their own.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; weight decay is that of every anchor.
        coefficients: `Line()`, `Simplex(K)`, `Bezier(K)` or `PolyChain(K)`.
        layerwise: draw the coefficients of each module by themselves.
        beta: weight of the penalty; 0 for none.
        points: networks that are drawn at each step, for the same rows; the loss is their mean.
            More than one takes the plain path of autograd, with a gradient for each anchor.
        stream: which of the seed's random streams to use.
        device: where to train.
        directory: folder of the checkpoint subspace-<stream>.pt; None keeps none.
        resume: continue from the checkpoint found there.
        progress: show progress.
        on_step: called with the number of steps done, after each.

    Returns:
        `TrainedSubspace`.

    Raises:
        TrainingInterrupted, ValueError, Diverged: see `landscape_fast.methods.fit`.

    Source: Wortsman et al. 2021 (arXiv:2102.10472). Their recipe: SGD with rate 0.1, momentum 0.9
        and weight decay 1e-4, 5 epochs of warm-up and then a cosine, 160 epochs of CIFAR-10 in
        batches of 128, beta 1.
    """
    op = "train_subspace"
    check_rows(op, x, y)
    require(whole(points, 1), op, "points", "an integer of at least 1", points)
    require(beta >= 0, op, "beta", "at least 0", beta)
    shared = config.member_batches == "shared"
    require(shared, op, "config.member_batches", "'shared'", repr(config.member_batches))
    networks = [build_member(build, config, stream, device, k) for k in range(coefficients.anchors)]
    subspace = Subspace(networks[0], networks, coefficients, layerwise=layerwise)
    path = None if directory is None else Path(directory) / f"subspace-{stream:03d}.pt"
    rows, label = (x.to(device), y.to(device)), f"{coefficients}{' layer-wise' * layerwise}"
    run = _SubspaceRun(beta, points, subspace, *rows, config, stream, label, path, on_step)
    run.identity |= {"method": "subspace", "beta": beta, "points": points}
    history = run.execute(resume, progress)
    subspace.move_to_(coefficients.midpoint())
    return TrainedSubspace(subspace, [history])


class _SubspaceRun(Run):
    """Every step at new points of the subspace."""

    def __init__(self, beta: float, points: int, subspace: Subspace, *arguments) -> None:
        K = len(subspace.order)
        self.beta, self.points = beta if K > 1 else 0.0, points
        super().__init__(subspace, *arguments)

    def make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if self.points > 1:
            return make_optimizer(self.model, config)
        shared = {"lr": config.lr, "weight_decay": config.weight_decay, "cos2": self.beta}
        if config.optimizer == "sgd":
            nesterov = config.momentum > 0
            return AnchorSGD(self.model, momentum=config.momentum, nesterov=nesterov, **shared)
        kind = AnchorAdamW if config.optimizer == "adamw" else AnchorAdam
        return kind(self.model, **shared)

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        if self.points == 1:  # the penalty is part of the optimiser's step
            self._descend(self.model.draw_().model(x), y)
            return
        logits = self.model(x, points=self.points)
        penalty = self.beta * cos2_penalty(self.model) if self.beta else 0.0
        self._descend(logits, y, penalty)


def cos2_penalty(subspace: Subspace, pair: tuple[int, int] | None = None) -> Tensor:
    """The squared cosine of two anchors, for a loss: differentiable in the trained ones.

    Over the parameter tensors of more than one dimension together.

    Args:
        subspace: of two anchors or more.
        pair: which two, in the order of `subspace.order`; None draws them from torch's global
            generator, if there are more than two.

    Raises:
        ValueError: if there is only one anchor.

    Source: Wortsman et al. 2021 (arXiv:2102.10472). `AnchorSGD(cos2=...)` does it in its step.
    """
    K = len(subspace.order)
    require(K >= 2, "cos2_penalty", "subspace", "one of at least 2 anchors", f"one of {K}")
    if pair is None:
        pair = (0, 1) if K == 2 else tuple(torch.randperm(K)[:2].tolist())
    fixed, anchors = subspace.fixed, subspace.anchors
    rows = anchors if fixed is None else torch.cat([anchors, fixed])
    each = gram(rows[list(pair)], sizes=subspace.layout.sizes)
    chosen = subspace.layout.select(lambda name, shape: len(shape) > 1).to(each.device)
    total = each[chosen].sum(0)
    return (total[0, 1] ** 2 / (total[0, 0] * total[1, 1])).to(anchors.dtype)


def subspace_ensemble(
    subspace: Subspace,
    coeffs: Tensor,
    calibration: Tensor | Iterable | None = None,
    *,
    statistics: str = "recalibrate",
    batch_size: int = 1000,
) -> DeepEnsemble:
    """M networks of a subspace, at one or several of its points, as one ensemble.

    Args:
        subspace: trained; it stays where it is.
        coeffs: [M, K] or layer-wise [M, L, K], for instance `Line().at(torch.tensor([0.2, 0.8]))`,
            the pair that Wortsman et al. average.
        calibration: [N, ...] rows, or batches, for the statistics of batch norms: training rows,
            without augmentation. Needed with statistics="recalibrate" if there are batch norms.
        statistics: see `landscape_fast.nn.statistics_mode_`.
        batch_size: rows at a time of the calibration.

    Returns:
        Plain networks that share nothing with the subspace, in evaluation mode: [B, ...] to
        [M, B, C]. `average_prediction` makes one prediction of theirs.

    Raises:
        ValueError: if coefficients do not fit.
    """
    require(coeffs.ndim > 1, "subspace_ensemble", "coeffs", "[M, K] or [M, L, K]", [*coeffs.shape])
    if isinstance(calibration, Iterator):  # every network needs all of them
        calibration = list(calibration)
    networks = [subspace.network(row) for row in coeffs]
    for network in networks:
        statistics_mode_(network.eval(), statistics)
        if statistics == "recalibrate" and calibration is not None:
            recalibrate_(network, calibration, batch_size=batch_size)
    return DeepEnsemble(networks).eval()


def average_prediction(logits: Tensor, average: str = "probabilities") -> Tensor:
    """One prediction of M members, as log-probabilities [N, C].

    Args:
        logits: [M, N, C].
        average: "probabilities" (an equal mixture), or "logits" (as the code of Wortsman et al.).

    Example:
        >>> both = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]).log_softmax(-1)
        >>> average_prediction(both).exp()
        tensor([[0.6904, 0.3096]])
        >>> average_prediction(both, "logits").exp()
        tensor([[0.7311, 0.2689]])
    """
    require(logits.ndim == 3, "average_prediction", "logits", "[M, N, C]", [*logits.shape])
    rule = f"one of {AVERAGES}"
    require(average in AVERAGES, "average_prediction", "average", rule, repr(average))
    if average == "logits":
        return logits.mean(0).log_softmax(-1)
    return logits.log_softmax(-1).logsumexp(0) - math.log(logits.shape[0])
