"""Figures of planes and wedges in weight space, and of what lies in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from landscape_fast.landscape._figure import (
    DARK,
    NO_VALUE,
    checked,
    legend_below,
    legend_height,
    log_worthwhile,
    method_name,
    new_figure,
    place_style,
    styled,
    with_rows,
)
from landscape_fast.ops._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEVELS = 21
_PINK = "#F4B6D2"  # light: it stands out from both ends of viridis and cividis under a dark rim


@styled
def plane_panels(
    x: Tensor,
    y: Tensor,
    fields: Mapping[str, Tensor],
    anchors: Tensor | None = None,
    names: Sequence[str] | None = None,
    trajectories: Mapping[str, Tensor] | None = None,
    samples: Mapping[str, Tensor] | None = None,
    origin: Sequence[float] | None = (0.0, 0.0),
    limits: Mapping[str, tuple[float, float]] | None = None,
    labels: tuple[str, str] = ("Along the first axis", "Along the second axis"),
    title: str = "",
) -> Figure:
    """Quantities over a plane of weight space, with what was found and drawn in it.

    Args:
        x: [W] coordinates along the first axis, in units of weight space, ascending.
        y: [H] along the second.
        fields: label of a quantity, with its unit, to its values [H, W]. Cells without a number
            stay grey; positive values far apart get a logarithmic colour scale, which ends at 100
            times the median (an arrow on the colour bar says so).
        anchors: [A, 2], where solutions lie; numbered crosses.
        names: [A] of the anchors; "1", "2", ... if None.
        trajectories: name to positions [T, 2] in the order of training, with arrows; at most
            seven are told apart by colour.
        samples: name to positions [n, 2]; light points of one marker for each name.
        origin: where the origin of weight space lies; None in a plane that does not hold it.
        limits: label to (low, high) of its colours; the range of its values without any.
        labels: of the two axes.
        title: heading of the figure.

    Returns:
        A Figure, at most three panels in a row, each with a colour bar; all share their axes.
        `rows`: x, y and one column for each field.

    Raises:
        ValueError: if shapes disagree, or without a field.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 5 and S1.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 5)
        >>> figure = plane_panels(x, x, {"Loss (nats)": x**2 + x[:, None] ** 2})
        >>> figure.rows[0]
        {'x': -1.0, 'y': -1.0, 'Loss (nats)': 2.0}
    """
    op = "plane_panels"
    require(len(fields) >= 1, op, "fields", "of at least one quantity", "none")
    x, y = checked(x, op, "x", "W", None), checked(y, op, "y", "H", None)
    for name, axis in (("x", x), ("y", y)):
        ascending = len(axis) > 1 and bool((np.diff(axis) > 0).all())
        require(ascending, op, name, "ascending, two values at least", axis.tolist()[:5])
    maps = {
        label: checked(value, op, f"field {label!r}", "H, W", len(y), len(x))
        for label, value in fields.items()
    }
    anchors = checked(
        np.zeros((0, 2)) if anchors is None else anchors, op, "anchors", "A, 2", None, 2
    )
    names = [str(a + 1) for a in range(len(anchors))] if names is None else list(names)
    require(len(names) == len(anchors), op, "names", f"[A] with A = {len(anchors)}", [len(names)])
    paths = _positions(op, "trajectory", trajectories)
    clouds = _positions(op, "samples", samples)

    columns = min(3, len(maps)) if len(maps) != 4 else 2
    lines = math.ceil(len(maps) / columns)
    shape = min(1.6, max(0.25, float(np.ptp(y) / np.ptp(x))))
    entries = [method_name(name) for name in (*paths, *clouds)]
    width = 4.4 * columns if columns > 1 else 5.6
    height = lines * (3.2 * shape + 0.8) + legend_height(entries, width) * bool(entries)
    figure = new_figure(width, height, title)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, (label, value) in zip(axes.flat, maps.items(), strict=False):
        _filled(axis, (x, y), value, label, (limits or {}).get(label))
        handles = _marks(axis, paths, clouds)
        _points(axis, anchors, names, origin)
        axis.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
        axis.set_title(label, fontsize=10)
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for place, axis in enumerate(list(axes.flat)[: len(maps)]):
        if place + columns >= len(maps):  # none below it
            axis.set_xlabel(labels[0])
            axis.tick_params(labelbottom=True)
        if place % columns == 0:
            axis.set_ylabel(labels[1])
    if handles:
        legend_below(figure, handles)
    return with_rows(figure, [
        {"x": float(x[j]), "y": float(y[i])} | {k: float(v[i, j]) for k, v in maps.items()}
        for i in range(len(y)) for j in range(len(x))])  # fmt: skip


@styled
def wedge_panels(
    angle: Tensor,
    radius: Tensor,
    fields: Mapping[str, Tensor],
    nodes: Tensor | None = None,
    path: Tensor | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
) -> Figure:
    """Quantities over the wedges that a path spans with the origin, in polar coordinates.

    Args:
        angle: [S] radians from the start of the path.
        radius: [R, S], norms of the weights.
        fields: label of a quantity, with its unit, to its values [R, S].
        nodes: [T, 2], angle and radius of the nodes of the path; its ends are marked 1 and 2.
        path: [S], the norm along the path itself.
        limits: label to (low, high) of its colours; the range of its values without any.
        title: heading of the figure.

    Returns:
        A Figure of fans side by side, at most two in a row, each with a colour bar. `rows`: angle,
        radius and one column for each field.

    Raises:
        ValueError: if shapes disagree, or without a field.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure S3.

    Example:
        >>> import torch
        >>> angle, scale = torch.linspace(0, 1.5, 4), torch.tensor([[0.5], [1.0]])
        >>> figure = wedge_panels(angle, 8 * scale.expand(2, 4), {"Loss (nats)": scale + angle})
        >>> figure.axes[0].get_title()
        'Loss (nats)'
    """
    op = "wedge_panels"
    require(len(fields) >= 1, op, "fields", "of at least one quantity", "none")
    angle = checked(angle, op, "angle", "S", None)
    radius = checked(radius, op, "radius", "R, S", None, len(angle))
    enough = min(radius.shape) > 1
    require(enough, op, "radius", "[R, S] with both 2 at least", list(radius.shape))
    maps = {
        label: checked(value, op, f"field {label!r}", "R, S", *radius.shape)
        for label, value in fields.items()
    }
    nodes = None if nodes is None else checked(nodes, op, "nodes", "T, 2", None, 2)
    path = None if path is None else checked(path, op, "path", "S", len(angle))
    columns = min(2, len(maps))
    lines = math.ceil(len(maps) / columns)
    figure = new_figure(5.6 * columns, 4.4 * lines, title)
    figure.get_layout_engine().set(w_pad=0.12)
    polar = {"projection": "polar"}
    axes = figure.subplots(lines, columns, squeeze=False, subplot_kw=polar)
    grid = np.broadcast_to(angle, radius.shape)
    step = next((d for d in (1, 5, 15, 30) if 8 * d > math.degrees(float(np.ptp(angle)))), 45)
    for axis, (label, value) in zip(axes.flat, maps.items(), strict=False):
        _filled(axis, (grid, radius), value, label, (limits or {}).get(label))
        if path is not None:
            axis.plot(angle, path, color="white", lw=3.0)
            axis.plot(angle, path, color=DARK, lw=1.4)
        if nodes is not None:
            axis.plot(*nodes.T, "o", color="white", mec=DARK, ms=4.5, clip_on=False)
            for place, name in ((0, "1"), (-1, "2")):
                _named(axis, nodes[place], name, (10, 8))
        axis.set_thetamin(math.degrees(min(0.0, float(angle.min()))))
        axis.set_thetamax(math.degrees(float(angle.max())))
        axis.set_thetagrids(np.arange(0.0, math.degrees(float(angle.max())) + 0.1, step))
        axis.set_rlim(0, float(radius.max()))
        axis.set_title(label, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(True, color=DARK, lw=0.3, alpha=0.4)
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    figure.supxlabel("Angle from the first node (degrees); radius: norm of the weights", fontsize=9)
    return with_rows(figure, [
        {"angle": float(angle[s]), "radius": float(radius[r, s])}
        | {label: float(value[r, s]) for label, value in maps.items()}
        for r in range(radius.shape[0]) for s in range(len(angle))])  # fmt: skip


def _positions(op: str, kind: str, given: Mapping | None) -> dict[str, np.ndarray]:
    return {
        name: checked(value, op, f"{kind} {name!r}", "T, 2", None, 2)
        for name, value in (given or {}).items()
    }


def _filled(axis: Axes, at: tuple, value: np.ndarray, label: str, limits: tuple | None) -> None:
    """Filled contours with thin lines between them, and their colour bar."""
    from matplotlib.colors import LogNorm

    axis.set_facecolor(NO_VALUE)
    finite = value[np.isfinite(value)]
    low, high = limits or (finite.min(initial=np.inf), finite.max(initial=-np.inf))
    options, space = {}, np.linspace
    if low > 0 and log_worthwhile(np.array([low, high])):
        space = np.geomspace
        high = high if limits else min(high, max(100 * float(np.median(finite)), 2 * low))
        options["norm"] = LogNorm(low, high)
    if low > high:  # no number at all
        axis.text(0.5, 0.5, "no number", transform=axis.transAxes, ha="center")
    low, high = (low, high) if low < high else (low - 0.5, low + 0.5) if low == high else (0, 1)
    levels = space(low, high, _LEVELS)
    below, above = bool((finite < low).any()), bool((finite > high).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    low_is_good = any(word in label.lower() for word in ("loss", "nll", "error"))
    colours = "cividis_r" if low_is_good else "viridis"
    shown = np.ma.masked_invalid(value)
    filled = axis.contourf(*at, shown, levels, cmap=colours, extend=extend, **options)
    axis.contour(*at, shown, levels[2:-1:3], colors="white", linewidths=0.5, alpha=0.7)
    beside = axis.inset_axes([1.14 if axis.name == "polar" else 1.03, 0.0, 0.05, 1.0])
    bar = axis.figure.colorbar(filled, cax=beside)
    ticks = levels[:: (_LEVELS - 1) // 5]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()


def _marks(axis: Axes, paths: Mapping, clouds: Mapping) -> list:
    """Trajectories with arrows and samples in a panel; their entries for the legend."""
    handles = []
    for place, (name, at) in enumerate(clouds.items()):
        style = {"marker": ("o", "^", "s", "D", "v", "P", "X")[place % 7], "s": 17, "zorder": 4}
        handles.append(axis.scatter(*at.T, color=_PINK, edgecolors=DARK, linewidths=0.5,
                                    label=method_name(name), **style))  # fmt: skip
    for place, (name, at) in enumerate(paths.items()):
        look = place_style(place)
        axis.plot(*at.T, color="white", lw=3.2, zorder=5)
        (line,) = axis.plot(*at.T, **look, ms=2.5, lw=1.5, zorder=6, label=method_name(name))
        handles.insert(place, line)
        ends = np.flatnonzero(np.abs(np.diff(at, axis=0)).sum(1) > 0) + 1
        for end in ends[:: max(1, len(ends) // 3)][-3:]:
            arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 15}
            arrow |= {"facecolor": look["color"], "edgecolor": "white", "lw": 0.7}
            axis.annotate("", at[end], at[end - 1], arrowprops=arrow, zorder=7)
    return handles


def _points(axis: Axes, anchors: np.ndarray, names: Sequence[str], origin) -> None:
    for at, name in zip(anchors, names, strict=True):
        axis.plot(*at, "X", color="white", mec=DARK, mew=1.1, ms=9, zorder=8)
        _named(axis, at, name, (9, 7))
    if origin is not None:
        axis.plot(*origin, "+", color="white", ms=12, mew=4, zorder=8)
        axis.plot(*origin, "+", color=DARK, ms=11, mew=1.8, zorder=8)
        _named(axis, origin, "O", (9, 7))


def _named(axis: Axes, at: Sequence[float], name: str, offset: tuple[int, int]) -> None:
    box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.85}
    axis.annotate(name, at, xytext=offset, textcoords="offset points", fontsize=9, ha="center",
                  va="center", bbox=box, zorder=9, color=DARK)  # fmt: skip
