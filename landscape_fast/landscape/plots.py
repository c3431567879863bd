"""Figures of an ensemble. Each function returns a matplotlib Figure and never opens a window.

matplotlib is imported on first use (extra `plot`). Figures are made without pyplot: they need no
display, belong to no global state, and are freed like any other object.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from landscape_fast.landscape._figure import (
    MARKERS,
    add_title,
    method_colour,
    method_name,
    new_figure,
    short_number,
    styled,
    text_colour,
)
from landscape_fast.landscape.diversity import (
    DiversityPoints,
    lower_limit,
    upper_limit,
)
from landscape_fast.metrics.diversity import off_diagonal_mean
from landscape_fast.metrics.reliability import ReliabilityBins
from landscape_fast.ops._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST_ANNOTATED = 12
_FEW_ROWS = 10


@styled
def heat_maps(matrices: Mapping[str, Mapping[str, Tensor]], title: str = "") -> Figure:
    """Pairwise disagreement and Jensen-Shannon divergence of every method, one row per method.

    Args:
        matrices: method to {"disagreement": [M, M] fractions, "js": [M, M] nats}. All maps of one
            kind share one colour scale, so methods can be compared by eye.
        title: heading of the figure.

    Returns:
        A Figure with two maps per row and a colour bar per column; values are written into the
        cells for M up to 12. The diagonal, always 0, is left grey.
    """
    require(len(matrices) >= 1, "heat_maps", "matrices", "of at least one method", "none")
    kinds = (
        ("disagreement", "Disagreement (% of test rows)", "%", 100.0),
        ("js", "Jensen–Shannon divergence (10⁻³ nats)", "×10⁻³ nats", 1000.0),
    )
    members = max(pair["js"].shape[0] for pair in matrices.values())
    side = max(3.0, min(7.0, 0.6 * members + 0.8))
    figure = new_figure(2 * side + 2.6, (side + 0.5) * len(matrices) + (0.5 if title else 0))
    axes = figure.subplots(len(matrices), 2, squeeze=False)
    for column, (kind, name, unit, scale) in enumerate(kinds):
        values = {m: pair[kind].detach().double().cpu() * scale for m, pair in matrices.items()}
        top = max(float(value.max()) for value in values.values()) or 1.0
        for axis, (method, value) in zip(axes[:, column], values.items(), strict=True):
            image = _heat_map(axis, value, top)
            axis.set_title(f"{method_name(method)}: {_headline(value, unit)}")
        figure.colorbar(image, ax=axes[:, column], label=name, shrink=0.95, aspect=30)
    add_title(figure, title)
    return figure


@styled
def reliability_diagram(curves: Mapping[str, ReliabilityBins], title: str = "") -> Figure:
    """Accuracy against confidence of every method, above the number of rows in each bin.

    Args:
        curves: method to the bins of its (mean) prediction.
        title: heading of the figure.

    Returns:
        A Figure with one column per method: bars of accuracy, the gap to the mean confidence,
        the diagonal of perfect calibration and the ECE; below, counts on a logarithmic scale.
        Bins of fewer than 10 rows, whose accuracy says little, are pale.
    """
    require(len(curves) >= 1, "reliability_diagram", "curves", "of at least one method", "none")
    figure = new_figure(0.8 + 3.3 * len(curves), 5.2 + (0.3 if title else 0))
    axes = figure.subplots(
        2, len(curves), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1.1]
    )
    for column, (method, curve) in enumerate(curves.items()):
        _calibration(axes[0, column], curve, method)
        _counts(axes[1, column], curve, method)
        axes[0, column].set_title(f"{method_name(method)}   ECE {float(curve.ece):.2%}")
        axes[1, column].set_xlabel("Confidence (largest probability)")
    axes[0, 0].set_ylabel("Accuracy (fraction right)")
    axes[1, 0].set_ylabel("Test rows")
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(color="#757575", label=f"accuracy (pale: fewer than {_FEW_ROWS} rows)"),
            Patch(
                facecolor="none", edgecolor="#222222", hatch="/////", label="gap to mean confidence"
            ),
            *axes[0, 0].get_lines(),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
    add_title(figure, title)
    return figure


@styled
def accuracy_diversity(
    points: Mapping[str, DiversityPoints],
    classes: int,
    title: str = "",
    limits_of: str | None = None,
) -> Figure:
    """Members in the plane of accuracy against normalised disagreement with their base.

    Args:
        points: method to its members' points, without the base itself.
        classes: C, for the limits.
        title: heading of the figure.
        limits_of: the method whose base the two limits are drawn for; the first one if None.

    Returns:
        A Figure: one marker per member ("×2" where two coincide), an open star per base at
        diversity 0, and the upper (independent errors) and lower (replaced labels) limits, of
        which a base at chance has the upper one only.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure 6.
    """
    require(len(points) >= 1, "accuracy_diversity", "points", "of at least one method", "none")
    limits_of = next(iter(points)) if limits_of is None else limits_of
    figure = new_figure(7.4, 5.0)
    axis = figure.subplots()
    everything = (
        torch.cat([torch.cat([p.accuracy, p.base_accuracy[None]]) for p in points.values()])
        .double()
        .cpu()
    )
    low, high = float(everything.min()), float(everything.max())
    margin = max(0.35 * (high - low), 0.15 * (1 - low), 0.002)
    left, right = max(0.0, low - margin), min(1.0, high + margin)
    top = draw_limits(axis, left, right, float(points[limits_of].base_accuracy), classes)
    for place, (method, point) in enumerate(points.items()):
        _members(axis, point, method, place)
    finite = torch.cat([p.normalised for p in points.values()]).cpu()
    finite = finite[finite.isfinite()]
    top = max(top, float(finite.max()) if len(finite) else 0.0)
    axis.set(
        xlim=(100 * left, 100 * right),
        ylim=(-0.04 * top, 1.12 * top),
        xlabel="Test accuracy of the member (%)",
        ylabel="Diversity: disagreement with the base / error of the member",
        title=title or "Accuracy against diversity",
    )
    axis.grid(True)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, labelspacing=0.9)
    return figure


def _members(axis: Axes, point: DiversityPoints, method: str, place: int) -> None:
    # Smaller from place to place and counted on alternate sides, so that methods which coincide
    # stay visible.
    colour, size, side = method_colour(method, place), (1 + place) ** -1.7, (9, -9)[place % 2]
    places = Counter(zip((100 * point.accuracy).tolist(), point.normalised.tolist(), strict=True))
    x, y = zip(*places, strict=True) if places else ((), ())
    axis.scatter(
        100 * float(point.base_accuracy),
        0,
        s=420 * size,
        marker="*",
        facecolors="white",
        edgecolors=colour,
        linewidths=1.5,
        zorder=3,
        clip_on=False,
        label=f"{method_name(method)}: first member (base)",
    )
    axis.scatter(
        x,
        y,
        s=190 * size,
        marker=MARKERS.get(method, "s"),
        color=colour,
        edgecolors="white",
        linewidths=0.9,
        zorder=4,
        label=f"{method_name(method)}: other members",
    )
    for (a, d), count in places.items():
        if count > 1 and math.isfinite(d):
            axis.annotate(
                f"×{count}",
                (a, d),
                xytext=(side, 5),
                ha="left" if side > 0 else "right",
                textcoords="offset points",
                color=colour,
                fontsize=9,
                fontweight="bold",
            )


def draw_limits(axis: Axes, left: float, right: float, base: float, classes: int) -> float:
    """Draws both limits over [left, right]; returns the largest value of the upper one."""
    grid = torch.linspace(left, min(right, 1 - 1e-4), 400, dtype=torch.float64)
    upper = upper_limit(grid, base, classes) / (1 - grid)
    near = grid <= base + 0.5 * (right - base)  # beyond, the division by the error runs away
    axis.plot(
        (100 * grid[near]).numpy(),
        upper[near].numpy(),
        "--",
        color="#222222",
        lw=1.3,
        label=f"upper limit: independent errors\n(base {100 * base:.1f}%)",
    )
    below = grid[grid <= base]
    if classes * base > 1:  # at chance or below, replaced labels are no worse
        lower = lower_limit(below, base, classes) / (1 - below)
        axis.plot(
            (100 * below).numpy(),
            lower.numpy(),
            ":",
            color="#222222",
            lw=1.6,
            label="lower limit: randomly replaced\nlabels of the base",
        )
        axis.fill_between(
            (100 * below).numpy(),
            lower.numpy(),
            upper[: len(below)].numpy(),
            color="#0072B2",
            alpha=0.05,
            lw=0,
        )
    return float(upper[grid <= base].max())


def _heat_map(axis: Axes, value: Tensor, top: float):
    members = value.shape[0]
    shown = np.ma.masked_array(value.numpy(), np.eye(members, dtype=bool))
    axis.set_facecolor("#EDEDED")  # shows where the diagonal is masked
    image = axis.imshow(shown, cmap="YlGnBu", vmin=0.0, vmax=top)
    axis.set(xlabel="Member", ylabel="Member")
    if members <= _LARGEST_ANNOTATED:
        axis.set_xticks(range(members), [str(m + 1) for m in range(members)])
        axis.set_yticks(range(members), [str(m + 1) for m in range(members)])
        for i in range(members):
            for j in range(members):
                if i != j:
                    cell = float(value[i, j])
                    axis.text(
                        j,
                        i,
                        short_number(cell),
                        ha="center",
                        va="center",
                        color=text_colour(image.cmap(image.norm(cell))),
                    )
    inner = [m - 0.5 for m in range(1, members)]
    axis.set_xticks(inner, minor=True)
    axis.set_yticks(inner, minor=True)
    axis.grid(True, which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    return image


def _headline(value: Tensor, unit: str) -> str:
    if value.shape[0] < 2:
        return "one member"
    mean = short_number(float(off_diagonal_mean(value)))
    return f"mean {mean}{'' if unit == '%' else ' '}{unit}"


def _calibration(axis: Axes, curve: ReliabilityBins, method: str) -> None:
    centre, width, counts = _bins(curve)
    used = counts > 0
    accuracy, confidence = curve.accuracy.cpu().numpy()[used], curve.confidence.cpu().numpy()[used]
    bars = axis.bar(centre[used], accuracy, 0.92 * width, color=method_colour(method, 0))
    gaps = axis.bar(
        centre[used],
        confidence - accuracy,
        0.92 * width,
        bottom=accuracy,
        facecolor="none",
        edgecolor="#222222",
        hatch="/////",
        linewidth=0.8,
    )
    for bar, gap, count in zip(bars, gaps, counts[used], strict=True):
        if count < _FEW_ROWS:
            bar.set_alpha(0.25)
            gap.set_edgecolor("#9A9A9A")
    axis.plot([0, 1], [0, 1], "--", color="#222222", lw=1.2, label="perfect calibration")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(True, axis="y")


def _bins(curve: ReliabilityBins) -> tuple[np.ndarray, float, np.ndarray]:
    edges = curve.edges.cpu().numpy()
    return (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0], curve.counts.cpu().numpy()


def _counts(axis: Axes, curve: ReliabilityBins, method: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    centre, width, counts = _bins(curve)
    axis.bar(centre, counts, 0.94 * width, color=method_colour(method, 0), alpha=0.55)
    axis.set_yscale("log")
    axis.set_ylim(0.7, 6.0 * float(counts.max()))
    axis.yaxis.set_major_locator(LogLocator(numticks=7))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_locator(NullLocator())
    for x, count in zip(centre.tolist(), counts.tolist(), strict=True):
        if count:
            axis.text(x, count * 1.15, str(count), ha="center", va="bottom", fontsize=7)
    axis.grid(True, axis="y")
