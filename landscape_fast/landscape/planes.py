"""Loss, accuracy and agreement on planes in weight space, and where other models lie in them.

A plane is spanned in coefficient space, from the Gram matrix of the models that mark it out
(`landscape_fast.nn.geometry`), and measured on a rectangular grid, all points in one sweep. Nothing
is done to the model that is given: it supplies the architecture, the buffers and the device.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.landscape._points import rows_of, score_points
from landscape_fast.landscape.projection import check_plane, grid_around, nearest
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.nn.coefficients import filter_normalised
from landscape_fast.nn.flat import FlatLayout, Source
from landscape_fast.nn.geometry import Plane, pca_plane, plane, radial_plane
from landscape_fast.ops import gram
from landscape_fast.ops._checks import require


class PlaneMap(NamedTuple):
    """What was measured on the grid of a plane; on the CPU, float64. Row i of a map is at y[i].

    Attributes:
        x: [W] coordinates along the first axis, in units of weight space.
        y: [H] along the second.
        loss: [H, W], mean cross-entropy, nats.
        accuracy: [H, W], fraction.
        agreement: [A, H, W], the fraction of rows that get the same class as from the anchor that
            `agree_with` names; 1 - disagreement.
        anchors_at: [K, 2], where the anchors lie in the plane.
        plane: the axes, as coefficients of the anchors.
        coeffs: [H, W, K] of the grid's points: `combine(coeffs[i], anchors)` are their weights.
        logits: [H, W, N, C], or None where they were not kept.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    accuracy: Tensor
    agreement: Tensor
    anchors_at: Tensor
    plane: Plane
    coeffs: Tensor
    logits: Tensor | None = None

    @property
    def normalised_disagreement(self) -> Tensor:
        """[A, H, W], disagreement with an anchor by the error of the point; NaN where both are 0.

        Source: Fort et al. 2019 (arXiv:1912.02757), figure S1 (b).
        """
        return (1 - self.agreement) / (1 - self.accuracy)


def map_plane(
    model: nn.Module,
    anchors: Tensor | Sequence[Source],
    plane: Plane,
    x_values: Tensor,
    y_values: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    agree_with: Sequence[int] = (0, 1),
    keep_logits: bool = False,
    label: str = "plane",
    **options: Any,
) -> PlaneMap:
    """Scores every point of a rectangular grid on a plane.

    Args:
        model: the architecture, from rows [B, ...] to logits [B, C]; it is not changed.
        anchors: [K, P], the weights that the plane's coefficients belong to; or K networks, state
            dicts or vectors (see `FlatLayout.flatten`).
        plane: its origin and axes, [K] each: of `landscape_fast.nn.geometry.plane`, `radial_plane`,
            or any other.
        x_values: [W] coordinates of the grid along the first axis, `y_values` [H] along the second;
            finite numbers, in any order, as a tensor or a list.
        x: [N, ...] rows.
        y: [N] int64 classes.
        agree_with: A anchors whose classes are compared with those of every point; () for none.
        keep_logits: keep the logits of all points, H * W * N * C numbers.
        label: what the progress display calls it.
        options: statistics, calibration, batch_size, per_pass, checkpoint, resume and progress of
            `landscape_fast.methods.sweep`. Networks with batch norms need `calibration`, training
            rows on which the statistics of every point are taken anew, or another `statistics`.

    Returns:
        `PlaneMap`. The point at row i, column j is exactly (x_values[j], y_values[i]).

    Raises:
        ValueError: if shapes do not fit, or the plane is not finite (anchors on one line).
        SweepInterrupted: a KeyboardInterrupt; after Ctrl-C, when the checkpoint is written.

    Cost: H * W + A models on all rows; see `landscape_fast.methods.sweep`.

    Source: Garipov et al. 2018 (arXiv:1802.10026), Fort et al. 2019 (arXiv:1912.02757), figure 5.

    Example:
        >>> from landscape_fast.nn.geometry import radial_plane
        >>> nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> anchors = FlatLayout(nets[0]).flatten_many(nets)
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> axes = radial_plane(gram(anchors))
        >>> grid = torch.linspace(0, 1, 5), torch.linspace(0, 1, 4)
        >>> found = map_plane(nets[0], anchors, axes, *grid, rows, classes, progress=False)
        >>> found.loss.shape, found.agreement.shape
        (torch.Size([4, 5]), torch.Size([2, 4, 5]))
    """
    op = "map_plane"
    anchors = rows_of(op, "anchors", model, anchors)
    products = gram(anchors).cpu()
    plane = check_plane(op, plane, products, anchors.dtype)
    x_values, y_values = _axis(op, "x_values", "W", x_values), _axis(op, "y_values", "H", y_values)
    v, u = torch.meshgrid(y_values, x_values, indexing="ij")
    coeffs = plane.at(u, v)  # [H, W, K]
    H, W = v.shape
    found = score_points(
        op,
        model,
        anchors,
        coeffs.flatten(0, 1),
        x,
        y,
        agree_with=agree_with,
        keep_logits=keep_logits,
        label=label,
        **options,
    )
    at = nearest(plane, torch.eye(len(anchors), dtype=torch.float64), products)
    loss, accuracy = found.loss.view(H, W), found.accuracy.view(H, W)
    logits = found.logits.unflatten(0, (H, W)) if keep_logits else None
    agreement = found.agreement.view(len(agree_with), H, W)
    return PlaneMap(x_values, y_values, loss, accuracy, agreement, at, plane, coeffs, logits)


def radial_map(
    model: nn.Module,
    optima: Tensor | Sequence[Source],
    x: Tensor,
    y: Tensor,
    *,
    points: int | tuple[int, int] = 41,
    margin: float = 0.2,
    around: Tensor | None = None,
    **options: Any,
) -> PlaneMap:
    """The plane through two optima and the origin of weight space, which is at (0, 0).

    The first optimum lies on the x axis, at its norm. Independent networks are nearly orthogonal,
    so that the second is near the y axis.

    Args:
        model: the architecture; it is not changed.
        optima: [2, P], or two networks, state dicts or vectors.
        x: [N, ...] rows.
        y: [N] int64 classes.
        points: of the grid along each axis, or (W, H).
        margin: how far the grid reaches beyond all that it covers, as a fraction of the width and
            height of that.
        around: [T, 2] further points that the grid must cover, for instance a trajectory that
            `project` found; its optima and axes are those of `radial_plane`.
        options: agree_with, keep_logits, label and all of `map_plane`.

    Returns:
        `PlaneMap`; its agreements are with the two optima.

    Raises:
        ValueError: as `map_plane`, or if the optima are parallel.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757), figures 5 and S1.

    Example:
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> both = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> found = radial_map(both[0], both, rows, classes, points=5, progress=False)
        >>> found.accuracy.shape
        torch.Size([5, 5])
    """
    op = "radial_map"
    anchors = rows_of(op, "optima", model, optima)
    require(len(anchors) == 2, op, "optima", "two of them", len(anchors))
    return _around(op, model, anchors, radial_plane, x, y, points, margin, around, options)


def triangle_map(
    model: nn.Module,
    models: Tensor | Sequence[Source],
    x: Tensor,
    y: Tensor,
    *,
    points: int | tuple[int, int] = 41,
    margin: float = 0.2,
    around: Tensor | None = None,
    **options: Any,
) -> PlaneMap:
    """The plane through any three models: the first at (0, 0), the second on the x axis.

    Args:
        model: the architecture; it is not changed.
        models: [3, P], or three networks, state dicts or vectors, such as checkpoints of a run.
        x: [N, ...] rows.
        y: [N] int64 classes.
        points: of the grid along each axis, or (W, H).
        margin: how far the grid reaches beyond all that it covers, as a fraction of the width and
            height of that.
        around: [T, 2] further points that the grid must cover; see `project`.
        options: agree_with ((0, 1, 2) unless given), keep_logits, label and all of `map_plane`.

    Returns:
        `PlaneMap`; its agreements are with the three models.

    Raises:
        ValueError: as `map_plane`, or if the models are on one line.

    Source: Garipov et al. 2018 (arXiv:1802.10026), the figures of planes.

    Example:
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> nets = [nn.Linear(4, 3) for _ in range(3)]
        >>> found = triangle_map(nets[0], nets, rows, classes, points=5, progress=False)
        >>> found.agreement.shape
        torch.Size([3, 5, 5])
    """
    op = "triangle_map"
    anchors = rows_of(op, "models", model, models)
    require(len(anchors) == 3, op, "models", "three of them", len(anchors))
    options = {"agree_with": (0, 1, 2)} | options
    return _around(op, model, anchors, plane, x, y, points, margin, around, options)


def trajectory_map(
    model: nn.Module,
    snapshots: Tensor | Sequence[Source],
    x: Tensor,
    y: Tensor,
    *,
    points: int | tuple[int, int] = 41,
    margin: float = 0.2,
    around: Tensor | None = None,
    **options: Any,
) -> PlaneMap:
    """The plane that shows most of a run: through its end, along its two principal directions.

    Args:
        model: the architecture; it is not changed.
        snapshots: [T, P] of one run, T at least 3, the last at (0, 0); or T networks, state dicts
            or vectors.
        x: [N, ...] rows.
        y: [N] int64 classes.
        points: of the grid along each axis, or (W, H).
        margin: how far the grid reaches beyond all that it covers, as a fraction of the width and
            height of that.
        around: [T', 2] further points that the grid must cover; see `project`.
        options: agree_with ((T - 1,) unless given: the end), keep_logits, label and all of
            `map_plane`.

    Returns:
        `PlaneMap`; its `anchors_at` is the trajectory. `project` tells how far it is from the
        plane.

    Raises:
        ValueError: as `map_plane`, or if the snapshots are on one line.

    Source: Li et al. 2018 (arXiv:1712.09913), section 7.

    Example:
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> run = [nn.Linear(4, 3) for _ in range(5)]
        >>> found = trajectory_map(run[0], run, rows, classes, points=4, progress=False)
        >>> found.anchors_at.shape, found.agreement.shape
        (torch.Size([5, 2]), torch.Size([1, 4, 4]))
    """
    op = "trajectory_map"
    anchors = rows_of(op, "snapshots", model, snapshots)
    T = len(anchors)
    require(T >= 3, op, "snapshots", "three of them or more", T)
    options = {"agree_with": (T - 1,)} | options
    return _around(op, model, anchors, pca_plane, x, y, points, margin, around, options)


def _around(op, model, anchors, spanned, x, y, points, margin, around, options):
    """The map of a grid that covers the anchors, the plane's (0, 0), and other points."""
    products = gram(anchors).cpu()
    axes = check_plane(op, spanned(products), products, anchors.dtype)
    at = nearest(axes, torch.eye(len(anchors), dtype=torch.float64), products)
    cover = [at, torch.zeros(1, 2, dtype=torch.float64)]
    if around is not None:
        fits = around.ndim == 2 and around.shape[1] == 2 and bool(around.isfinite().all())
        require(fits, op, "around", "finite numbers [T, 2]", around)
        cover.append(around.double().cpu())
    grid = grid_around(torch.cat(cover), points, margin)
    return map_plane(model, anchors, axes, *grid, x, y, **({"label": op} | options))


def filter_normalised_map(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    weights: Source | None = None,
    points: int | tuple[int, int] = 51,
    span: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> PlaneMap:
    """The neighbourhood of one model along two random directions with filters as long as its own.

    Args:
        model: the network in the middle of the map; it is not changed.
        x: [N, ...] rows.
        y: [N] int64 classes.
        weights: other weights to look around, [P], a network or a state dict.
        points: of the grid along each axis, or (W, H); odd for one in the middle.
        span: the grid reaches from -span to span along both directions.
        seed: of the two directions, the same on every device.
        options: agree_with ((0,) unless given: the model in the middle), keep_logits, label and all
            of `map_plane`.

    Returns:
        `PlaneMap` in units of the directions, which are as long as the model's weights without
        biases and norms, and nearly but not exactly at right angles, as the authors have them.

    Raises:
        ValueError: as `map_plane`.

    Source: Li et al. 2018 (arXiv:1712.09913).

    Example:
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> net = nn.Linear(4, 3)
        >>> found = filter_normalised_map(net, rows, classes, points=3, progress=False)
        >>> loss = nn.functional.cross_entropy(net(rows), classes)
        >>> torch.allclose(found.loss[1, 1].float(), loss)
        True
    """
    op = "filter_normalised_map"
    require(0 < span < math.inf, op, "span", "a finite number above 0", span)
    layout, device = FlatLayout(model), next(model.parameters()).device
    centre = layout.flatten(model if weights is None else weights).to(device)
    seeds = (stream_seed(seed, 0, "probe", index) for index in range(2))
    random = [torch.randn(layout.P, generator=torch.Generator().manual_seed(s)) for s in seeds]
    # a pad counts for no filter, so that what is drawn there is of no consequence
    noise = torch.stack(random).to(device, layout.dtype)
    anchors = torch.cat([centre[None], filter_normalised(noise, centre, layout)])
    axes = Plane(*torch.eye(3, dtype=torch.float64))
    corners = torch.tensor([[-span, -span], [span, span]], dtype=torch.float64)
    grid = grid_around(corners, points, 0.0)
    options = {"label": op, "agree_with": (0,)} | options
    return map_plane(model, anchors, axes, *grid, x, y, **options)


def _axis(op: str, name: str, letter: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    fits = values.ndim == 1 and len(values) > 0 and bool(values.isfinite().all())
    require(fits, op, name, f"finite numbers [{letter}]", values)
    return values
