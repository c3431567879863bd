"""Straight paths, polylines and tunnels through weight space, and the wedges to the origin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.landscape._points import rows_of, score_points
from landscape_fast.methods.curves import Along
from landscape_fast.nn.coefficients import segment
from landscape_fast.nn.flat import Source
from landscape_fast.nn.geometry import arc_length, cosines, lengths
from landscape_fast.ops import gram
from landscape_fast.ops._checks import require, whole

QUANTITIES = ("loss", "accuracy")


class PathScores(NamedTuple):
    """What was measured at S points of a path; on the CPU, float64.

    Attributes:
        t: [S] positions in [0, 1], the same share of it for every segment.
        length: [S], of the path from its start to each point, in weight space.
        along: [S], how far each point is along the straight line between the ends, as a fraction of
            it: paths between the same ends are drawn over this. NaN where the ends coincide.
        away: [S], the distance of each point from that line.
        norm: [S], of the weights.
        loss: [S], mean cross-entropy, nats.
        accuracy: [S], fraction.
        agreement: [2, S], the fraction of rows that get the same class as from the start and the
            end.
        logits: [S, N, C], or None.
    """

    t: Tensor
    length: Tensor
    along: Tensor
    away: Tensor
    norm: Tensor
    loss: Tensor
    accuracy: Tensor
    agreement: Tensor
    logits: Tensor | None = None

    def summary(self, quantity: str = "loss") -> Along:
        """Ends, extremes, mean, integral and barrier of "loss" or "accuracy" along the path."""
        rule = f"one of {QUANTITIES}"
        require(quantity in QUANTITIES, "PathScores.summary", "quantity", rule, repr(quantity))
        return Along.of(getattr(self, quantity), self.t, self.length)


def along_path(
    model: nn.Module,
    nodes: Tensor | Sequence[Source],
    x: Tensor,
    y: Tensor,
    *,
    per_segment: int | Sequence[int] = 4,
    keep_logits: bool = False,
    label: str = "path",
    **options: Any,
) -> PathScores:
    """Scores the networks along straight segments from node to node, each node among them.

    Of two nodes it is the linear path between two networks; of the nodes of a tunnel, the tunnel.

    Args:
        model: the architecture, from rows [B, ...] to logits [B, C]; it is not changed.
        nodes: [T, P] weights, T at least 2, or T networks, state dicts or vectors.
        x: [N, ...] rows.
        y: [N] int64 classes.
        per_segment: steps in each segment, or the steps of each of the T - 1.
        keep_logits: keep the logits of all points, S * N * C numbers.
        label: what the progress display calls it.
        options: statistics, calibration, batch_size, per_pass, checkpoint, resume and progress of
            `landscape_fast.methods.sweep`. Networks with batch norms need `calibration`, training
            rows on which the statistics of every point are taken anew, or another `statistics`.

    Returns:
        `PathScores` of S = 1 + (T - 1) * per_segment points.

    Raises:
        ValueError: if shapes do not fit.
        SweepInterrupted: a KeyboardInterrupt; after Ctrl-C, when the checkpoint is written.

    Cost: S + 2 models on all rows; see `landscape_fast.methods.sweep`.

    Source: Goodfellow, Vinyals and Saxe 2015 (arXiv:1412.6544); Fort and Jastrzebski 2019
        (arXiv:1906.04724); Fort et al. 2019 (arXiv:1912.02757), figure S2.

    Example:
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> ends = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> line = along_path(ends[0], ends, rows, classes, per_segment=20, progress=False)
        >>> line.loss.shape, bool(line.agreement[0, 0] == 1)
        (torch.Size([21]), True)
        >>> line.summary().barrier <= 1e-6  # the loss of a linear model is convex
        True
    """
    op = "along_path"
    nodes, t, coeffs = _points(op, model, nodes, per_segment)
    last = len(nodes) - 1
    found = score_points(
        op,
        model,
        nodes,
        coeffs,
        x,
        y,
        agree_with=(0, last),
        keep_logits=keep_logits,
        label=label,
        **options,
    )
    products = gram(nodes).cpu()
    along, away = _from_chord(coeffs, products)
    where = (t, arc_length(coeffs, products), along, away, lengths(coeffs, products))
    return PathScores(*where, *found)


class WedgeMap(NamedTuple):
    """What was measured on the wedges of a path, in polar coordinates; on the CPU, float64.

    Each segment of the path spans a triangle with the origin of weight space. Laid side by side
    they make a fan: the point r * ((1 - s) w_i + s w_{i+1}) is at the angle of its direction, added
    up from the first node, and at the radius of its norm. The layout keeps the shape of every
    triangle.

    Attributes:
        angle: [S], radians from the first node.
        radius: [R, S], norms of the weights.
        scale: [R], the multiples r of the path.
        path: [S], the norm of the path itself, where the scale is 1.
        nodes: [T, 2], angle and radius of the nodes.
        loss: [R, S], mean cross-entropy, nats.
        accuracy: [R, S], fraction.
        agreement: [2, R, S], the fraction of rows that get the same class as from the first and
            from the last node.
        logits: [R, S, N, C], or None.
    """

    angle: Tensor
    radius: Tensor
    scale: Tensor
    path: Tensor
    nodes: Tensor
    loss: Tensor
    accuracy: Tensor
    agreement: Tensor
    logits: Tensor | None = None


def wedge_map(
    model: nn.Module,
    nodes: Tensor | Sequence[Source],
    x: Tensor,
    y: Tensor,
    *,
    per_segment: int | Sequence[int] = 4,
    scales: Tensor | Sequence[float] | None = None,
    keep_logits: bool = False,
    label: str = "wedge",
    **options: Any,
) -> WedgeMap:
    """Scores the triangles that the segments of a path span with the origin of weight space.

    Args:
        model: the architecture, from rows [B, ...] to logits [B, C]; it is not changed.
        nodes: [T, P] weights, T at least 2, such as those of a tunnel, or T networks, state dicts
            or vectors.
        x: [N, ...] rows.
        y: [N] int64 classes.
        per_segment: steps in each segment, or the steps of each of the T - 1.
        scales: [R] multiples of the path's points; None for 25 from 0.05 to 1.25.
        keep_logits: keep the logits of all points, R * S * N * C numbers.
        label: what the progress display calls it.
        options: statistics, calibration, batch_size, per_pass, checkpoint, resume and progress of
            `landscape_fast.methods.sweep`; see `along_path`.

    Returns:
        `WedgeMap` of S = 1 + (T - 1) * per_segment angles.

    Raises:
        ValueError: if shapes do not fit, or if a node is at the origin.
        SweepInterrupted: a KeyboardInterrupt; after Ctrl-C, when the checkpoint is written.

    Cost: R * S + 2 models on all rows; see `landscape_fast.methods.sweep`.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757), figure S3.

    Example:
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> nets = [nn.Linear(4, 3) for _ in range(3)]
        >>> fan = wedge_map(nets[0], nets, rows, classes, scales=[0.5, 1.0], progress=False)
        >>> fan.angle.shape, fan.loss.shape
        (torch.Size([9]), torch.Size([2, 9]))
    """
    op = "wedge_map"
    nodes, t, path = _points(op, model, nodes, per_segment)
    scale = torch.arange(1, 26, dtype=torch.float64) / 20 if scales is None else scales
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu()
    fits = scale.ndim == 1 and len(scale) >= 1 and bool(((scale >= 0) & scale.isfinite()).all())
    require(fits, op, "scales", "[R] finite numbers of at least 0", scale)
    products, T = gram(nodes).cpu(), len(nodes)
    require(bool((products.diagonal() > 0).all()), op, "nodes", "away from the origin", "one at it")
    coeffs = scale[:, None, None] * path
    R, S = coeffs.shape[:2]
    found = score_points(
        op,
        model,
        nodes,
        coeffs.flatten(0, 1),
        x,
        y,
        agree_with=(0, T - 1),
        keep_logits=keep_logits,
        label=label,
        **options,
    )
    between = cosines(products).diagonal(1).arccos()  # nodes that follow each other
    turns = nn.functional.pad(between.cumsum(0), (1, 0))
    norm = lengths(path, products)
    return WedgeMap(
        _angles(t, turns, products),
        scale[:, None] * norm,
        scale,
        norm,
        torch.stack([turns, products.diagonal().sqrt()], 1),
        found.loss.view(R, S),
        found.accuracy.view(R, S),
        found.agreement.view(2, R, S),
        found.logits.unflatten(0, (R, S)) if keep_logits else None,
    )


def _angles(t: Tensor, turns: Tensor, products: Tensor) -> Tensor:
    """[S], directions of the points at `t` where the nodes are at the angles `turns` [T]."""
    norms, T = products.diagonal().sqrt(), len(products)
    place = (t * (T - 1)).clamp(max=T - 1)
    i = place.floor().long().clamp(max=T - 2)
    s, between = place - i, turns[i + 1] - turns[i]
    # in the plane of the two nodes, the first of which lies along the x axis
    ahead = (1 - s) * norms[i] + s * norms[i + 1] * between.cos()
    return turns[i] + torch.atan2(s * norms[i + 1] * between.sin(), ahead)


def _from_chord(coeffs: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [S] of the straight line from the first to the last node, and distances from it."""
    chord, from_start = coeffs[-1] - coeffs[0], coeffs - coeffs[0]
    along = (from_start @ products @ chord) / (chord @ products @ chord)
    nearest = torch.where(along.isfinite(), along, 0)[:, None] * chord
    return along, lengths(from_start - nearest, products)


def _points(op, model, nodes, per_segment) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, P]; positions [S], every segment's share of [0, 1] the same; coefficients."""
    nodes = rows_of(op, "nodes", model, nodes)
    T = len(nodes)
    require(T >= 2, op, "nodes", "T of at least 2", T)
    steps = [per_segment] * (T - 1) if isinstance(per_segment, int) else list(per_segment)
    fits = len(steps) == T - 1 and all(whole(n, 1) for n in steps)
    rule = f"an integer of at least 1, or T - 1 = {T - 1} of them"
    require(fits, op, "per_segment", rule, per_segment)
    parts = [torch.arange(n, dtype=torch.float64) / n for n in steps]
    coeffs = [segment(part, i, T) for i, part in enumerate(parts)]  # a node's are exactly 0 and 1
    coeffs = torch.cat([*coeffs, torch.eye(T, dtype=torch.float64)[-1:]])
    return nodes, coeffs @ torch.arange(T, dtype=torch.float64) / (T - 1), coeffs
