"""Figures of paths, simplexes and cyclic training; each function returns a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from landscape_fast.landscape._figure import (
    DARK,
    SERIES_COLOURS,
    SERIES_MARKERS,
    label_axes,
    legend_below,
    legend_height,
    new_figure,
    numbers,
    place_style,
    styled,
)
from landscape_fast.ops._checks import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 30  # points of a curve that get a marker each


@styled
def path_panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    xlabel: str = "position t",
    title: str = "",
    levels: Mapping[str, float] | None = None,
    level_name: str = "reference network",
) -> Figure:
    """Quantities along paths in weight space, one panel for each quantity.

    Args:
        panels: label of a quantity, with its unit, to {name of a path: (positions, values)}. A
            path keeps its colour, line and marker in all panels. Values that are not finite leave
            a gap.
        xlabel: label of the positions.
        title: heading of the figure.
        levels: panel to a value drawn as a thin horizontal line: what a reference network has.
        level_name: what the legend calls these lines.

    Returns:
        A Figure with the panels side by side and one legend.

    Raises:
        ValueError: without a panel or path, or if positions and values differ in number.

    Source: Wortsman et al. 2021 (arXiv:2102.10472), figure 3; Garipov et al. 2018
        (arXiv:1802.10026), figure 2.
    """
    require(len(panels) >= 1, "path_panels", "panels", "of at least one quantity", "none")
    names = list(dict.fromkeys(name for paths in panels.values() for name in paths))
    require(len(names) >= 1, "path_panels", "panels", "of at least one path", "none")
    width = max(4.4 * len(panels), 5.6)
    entries = [*names, level_name] if levels else names
    figure = new_figure(width, 3.5 + legend_height(entries, width), title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles = {}
    for axis, (quantity, paths) in zip(axes, panels.items(), strict=True):
        for name, (positions, values) in paths.items():
            x, y = _numbers(positions), _numbers(values)
            rule = "as many values as positions"
            require(len(x) == len(y) >= 1, "path_panels", f"path {name!r}", rule, len(y))
            style = {"markersize": 4, "markevery": max(1, len(x) // _FEW), "lw": 1.6}
            style |= place_style(names.index(name))
            (handles[name],) = axis.plot(x, y, label=name, **style)
        if levels is not None and quantity in levels:
            style = {"color": DARK, "lw": 1.1, "ls": (0, (1, 2)), "zorder": 1}
            handles[level_name] = axis.axhline(levels[quantity], label=level_name, **style)
        label_axes(axis, xlabel, quantity)
    legend_below(figure, handles.values())
    return figure


@styled
def simplex_heat_map(
    weights: Tensor,
    values: Tensor | Sequence[float],
    quantity: str,
    title: str = "",
    corners: Sequence[str] = ("1", "2", "3"),
) -> Figure:
    """A quantity over the plane of three anchors, inside their triangle and around it.

    Args:
        weights: [S, 3], the coefficients of each point; they sum to 1 and may be negative outside
            of the triangle. At least three points that are not on one line.
        values: [S]. Those that are not finite have no part in the contours.
        quantity: label of the values, with its unit.
        title: heading of the figure.
        corners: names of the three anchors.

    Returns:
        A Figure: filled contours of the interpolated values, the points they come from (a ring
        around that of the largest value) and the triangle.

    Raises:
        ValueError: if shapes disagree, the coefficients of a point do not sum to 1, all points are
            on one line, or no value is finite.

    Source: Wortsman et al. 2021 (arXiv:2102.10472), figure 2.
    """
    op, shape = "simplex_heat_map", list(weights.shape)
    require(weights.ndim == 2 and shape[1] == 3, op, "weights", "[S, 3]", shape)
    weights = weights.detach().double().cpu()
    values = _numbers(values)
    rule = f"[S] with S = {shape[0]}"
    require(len(values) == shape[0], op, "values", rule, [len(values)])
    worst = float((weights.sum(1) - 1).abs().max()) if len(weights) else math.nan
    require(worst < 1e-4, op, "weights", "rows that sum to 1", f"one that misses it by {worst:.2g}")
    plane = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    spread = torch.linalg.matrix_rank(weights - weights.mean(0), atol=1e-6)
    rule = "at least three points that are not on one line"
    require(int(spread) == 2, op, "weights", rule, f"{shape[0]} points of rank {int(spread)}")
    x, y = (weights @ plane).numpy().T
    finite = np.isfinite(values)
    require(finite.any(), op, "values", "finite at one point at least", "none that is")

    figure = new_figure(6.2, 5.0, title)
    axis = figure.subplots()
    low, high = float(values[finite].min()), float(values[finite].max())
    levels = np.linspace(low, high if high > low else low + 1e-9, 21)
    filled = axis.tricontourf(x[finite], y[finite], values[finite], levels, cmap="viridis")
    figure.colorbar(filled, ax=axis, label=quantity, format="%.4g")
    axis.scatter(x, y, s=9, color="white", edgecolors=DARK, linewidths=0.5, zorder=3)
    best = int(np.where(finite, values, -np.inf).argmax())
    axis.scatter(x[best], y[best], s=90, facecolors="none", edgecolors="#D55E00", lw=1.8, zorder=4)
    closed = torch.cat([plane, plane[:1]]).numpy()
    axis.plot(*closed.T, color="white", lw=2.6, zorder=2)
    axis.plot(*closed.T, color=DARK, lw=1.3, zorder=2)
    middle = plane.mean(0)
    for corner, name in zip(plane, corners, strict=True):
        at = corner + 0.09 * (corner - middle) / (corner - middle).norm()
        axis.text(
            *at.tolist(), name, ha="center", va="center", fontweight="bold", zorder=5,
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip
    axis.set_aspect("equal")
    axis.axis("off")
    axis.set_title(f"largest: {values[best]:.4g}, ringed", fontsize=9)
    return figure


@styled
def cycle_panels(
    epochs: Sequence[float],
    lr: Sequence[float],
    collected: Sequence[float],
    error: Sequence[float],
    ensemble_error: Sequence[float],
    distance: Sequence[float],
    title: str = "",
) -> Figure:
    """Cyclic training: learning rate, error of what it collected, and how far that lies apart.

    Args:
        epochs: [T] positions at which the rate is given.
        lr: [T] learning rate.
        collected: [S] epochs at which networks were collected.
        error: [S] error of each in percent of the test rows.
        ensemble_error: [S] error of the ensemble of the first 1, 2, ... of them, in percent.
        distance: [S - 1] Euclidean distance in weight space of each from the one before.
        title: heading of the figure.

    Returns:
        A Figure of three panels above one another with a common axis of epochs.

    Raises:
        ValueError: if lengths disagree.

    Source: Garipov et al. 2018 (arXiv:1802.10026), figure 3.
    """
    epochs, lr, collected = _numbers(epochs), _numbers(lr), _numbers(collected)
    error, ensemble, apart = _numbers(error), _numbers(ensemble_error), _numbers(distance)
    for argument, found, wanted in (
        ("lr", len(lr), len(epochs)),
        ("error", len(error), len(collected)),
        ("ensemble_error", len(ensemble), len(collected)),
        ("distance", len(apart), len(collected) - 1),
    ):
        require(found == wanted, "cycle_panels", argument, f"[{wanted}]", [found])
    figure = new_figure(7.0, 6.6, title)
    rate, errors, distances = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1.4, 1])
    rate.plot(epochs, lr, color=SERIES_COLOURS[0], lw=1.3)
    for at in collected:
        rate.axvline(at, color="#BBBBBB", lw=0.7, zorder=1)
    rate.set_ylabel("learning rate")
    # hollow and large, so that it is seen around the others
    style = {"color": SERIES_COLOURS[0], "markersize": 9, "markerfacecolor": "none"}
    errors.plot(collected, error, SERIES_MARKERS[0], label="collected network", **style)
    style = {"color": SERIES_COLOURS[1], "label": "ensemble so far"}
    errors.plot(collected, ensemble, f"{SERIES_MARKERS[1]}-", **style)
    errors.set_ylabel("test error (%)")
    errors.legend(loc="best", fontsize=9)
    distances.plot(collected[1:], apart, f"{SERIES_MARKERS[2]}-", color=SERIES_COLOURS[2])
    top = 1.15 * float(apart.max()) if len(apart) and apart.max() > 0 else 1.0
    distances.set(ylabel="distance from\nthe one before", xlabel="epoch", ylim=(0, top))
    for axis in (rate, errors, distances):
        axis.grid(True, axis="y")
    return figure


def _numbers(values: Tensor | Sequence[float]) -> np.ndarray:
    return numbers(values).reshape(-1)
