"""Figures of what lies along paths between solutions: tunnels and curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from landscape_fast.landscape._figure import (
    DARK,
    SERIES_COLOURS,
    checked,
    label_axes,
    legend_below,
    legend_height,
    method_name,
    new_figure,
    place_style,
    scale_values,
    series_styles,
    styled,
    with_rows,
)
from landscape_fast.ops._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def tunnel_panels(
    panels: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    nodes: Sequence[float] | None = None,
    xlabel: str = "Position between the two solutions",
    title: str = "",
) -> Figure:
    """Quantities along the straight line between two solutions and along a tunnel.

    Args:
        panels: label of a quantity, with its unit, to {name of a path: (positions [S], values
            [S])}. A path keeps colour and line in all panels. Positive values far apart get a
            logarithmic axis.
        nodes: positions of the nodes that were optimised, as short lines above the axis.
        xlabel: label of the positions.
        title: heading of the figure.

    Returns:
        A Figure with the panels side by side, one legend, and vertical lines at the ends of the
        first path, the solutions 1 and 2. `rows`: quantity, path, position, value.

    Raises:
        ValueError: without a panel, path or point, or if lengths disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure S2.

    Example:
        >>> paths = {"straight line": ([0, 0.5, 1], [0.9, 2.2, 0.9])}
        >>> figure = tunnel_panels({"Loss (nats)": paths})
        >>> figure.rows[1]
        {'quantity': 'Loss (nats)', 'path': 'straight line', 'position': 0.5, 'value': 2.2}
    """
    op = "tunnel_panels"
    require(len(panels) >= 1, op, "panels", "of at least one quantity", "none")
    for quantity, paths in panels.items():
        require(len(paths) >= 1, op, f"panels[{quantity!r}]", "of at least one path", "none")
    styles = series_styles(name for paths in panels.values() for name in paths)
    nodes = [] if nodes is None else checked(nodes, op, "nodes", "T", None).tolist()
    width = max(4.4 * len(panels), 5.6)
    height = 3.6 + legend_height([*styles, "nodes"], width)
    figure = new_figure(width, height, title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles, rows = {}, []
    for axis, (quantity, paths) in zip(axes, panels.items(), strict=True):
        for name, (positions, values) in paths.items():
            at = checked(positions, op, f"positions of {name!r}", "S", None)
            require(len(at) >= 1, op, f"positions of {name!r}", "of at least one point", "none")
            value = checked(values, op, f"values of {name!r}", "S", len(at))
            step = max(1, len(at) // 20)
            style = {**styles[name], "markersize": 4, "markevery": step, "lw": 1.6}
            (handles[name],) = axis.plot(at, value, label=method_name(name), **style)
            rows += [
                {"quantity": quantity, "path": name, "position": a, "value": b}
                for a, b in zip(at.tolist(), value.tolist(), strict=True)
            ]
        mine = [row for row in rows if row["quantity"] == quantity]
        first = [row["position"] for row in mine if row["path"] == mine[0]["path"]]
        scale_values(axis, np.array([row["value"] for row in mine]))
        for place, name in ((first[0], "1"), (first[-1], "2")):
            axis.axvline(place, color="#9A9A9A", lw=0.8, zorder=1)
            axis.annotate(name, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                          textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        if nodes:
            style = {"color": DARK, "ms": 9, "mew": 1.2, "label": "optimised nodes"}
            foot = axis.get_xaxis_transform()
            (handles["nodes"],) = axis.plot(
                nodes, [0.02] * len(nodes), "|", transform=foot, **style
            )
        label_axes(axis, xlabel, quantity)
    legend_below(figure, [handles[name] for name in [*styles, *(["nodes"] if nodes else [])]])
    return with_rows(figure, rows)


@styled
def curvature_panel(
    positions: Tensor,
    eigenvalues: Tensor,
    trace: Tensor | None = None,
    trace_error: Tensor | None = None,
    xlabel: str = "Position along the path",
    title: str = "",
) -> Figure:
    """The largest eigenvalues of the Hessian of the loss along a path, and its trace.

    Args:
        positions: [S].
        eigenvalues: [S, k], in any order; the largest of each position is drawn first.
        trace: [S], if it is known.
        trace_error: [S], the standard error of the trace, a band around it.
        xlabel: label of the positions.
        title: heading of the figure.

    Returns:
        A Figure of one or two panels. Axes are logarithmic where all values are positive and far
        apart, and logarithmic on both sides of zero where some are negative and the magnitudes far
        apart. `rows`: position, eigenvalue_1 to eigenvalue_k, trace, trace_error.

    Raises:
        ValueError: if shapes disagree.

    Example:
        >>> figure = curvature_panel([0, 1], [[3.0, 1.0], [90.0, 2.0]], [10, 100])
        >>> [axis.get_yscale() for axis in figure.axes]
        ['log', 'linear']
    """
    op = "curvature_panel"
    positions = checked(positions, op, "positions", "S", None)
    count = len(positions)
    require(count >= 1, op, "positions", "of at least one point", "none")
    eigenvalues = checked(eigenvalues, op, "eigenvalues", "S, k", count, None)
    eigenvalues = -np.sort(-eigenvalues, axis=1)
    trace = None if trace is None else checked(trace, op, "trace", "S", count)
    error = None if trace_error is None else checked(trace_error, op, "trace_error", "S", count)
    require(error is None or trace is not None, op, "trace", "given with trace_error", "none")
    panels = 1 if trace is None else 2
    figure = new_figure(1.0 + 5.2 * panels, 3.9, title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for k, values in enumerate(eigenvalues.T):
        style = place_style(k) if k < 7 else {"color": "#BDBDBD", "linestyle": "-", "marker": ""}
        axes[0].plot(positions, values, label=f"{k + 1}", markersize=4, lw=1.5, **style)
    _scale(axes[0], eigenvalues)
    label_axes(axes[0], xlabel, "Largest eigenvalues of the Hessian (nats)")
    axes[0].legend(title="eigenvalue", fontsize=8, ncols=2, title_fontsize=9)
    if trace is not None:
        axes[1].plot(positions, trace, "o-", color=DARK, ms=4, lw=1.5, label="trace")
        _scale(axes[1], trace)
        if error is not None:
            band = {"color": SERIES_COLOURS[0], "alpha": 0.25, "lw": 0}
            axes[1].fill_between(
                positions, trace - error, trace + error, **band, label="± its error"
            )
            axes[1].legend(fontsize=9)
        label_axes(axes[1], xlabel, "Trace of the Hessian (nats)")
    rows = []
    for s in range(count):
        row = {"position": float(positions[s])}
        row |= {f"eigenvalue_{k + 1}": float(v) for k, v in enumerate(eigenvalues[s])}
        row["trace"] = None if trace is None else float(trace[s])
        rows.append(row | {"trace_error": None if error is None else float(error[s])})
    return with_rows(figure, rows)


def _scale(axis: Axes, values: np.ndarray) -> None:
    finite = np.abs(values[np.isfinite(values)])
    scale_values(axis, values)
    if len(finite) and (values < 0).any() and finite.max() > 100 * max(np.median(finite), 1e-12):
        power = math.ceil(math.log10(max(float(np.median(finite)), 1e-12)))
        axis.set_yscale("symlog", linthresh=10.0**power)
