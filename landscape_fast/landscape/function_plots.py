"""Figures of functions: how checkpoints differ, where they lie, how diverse they could be."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from landscape_fast.landscape._figure import (
    DARK,
    NO_VALUE,
    SERIES_COLOURS,
    SERIES_MARKERS,
    checked,
    method_name,
    new_figure,
    series_styles,
    short_number,
    styled,
    with_rows,
)
from landscape_fast.landscape.diversity import correlated_family
from landscape_fast.landscape.plots import draw_limits
from landscape_fast.ops._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SQUARES = ("s", "D", "P", "X")  # samples: squares first
_DASHES = ((0, (1, 2)), (0, (4, 2)), (0, (8, 2, 1, 2)), (0, (12, 3)), (0, (3, 1, 1, 1, 1, 1)))
_GREEN, _RED = "#009E73", "#D55E00"


@styled
def similarity_maps(
    cosine: Tensor,
    disagreement: Tensor,
    runs: Sequence[int],
    epochs: Sequence[float] | None = None,
    title: str = "",
) -> Figure:
    """Cosine similarity of weights and disagreement of labels between checkpoints.

    Args:
        cosine: [S, S] cosine of the angles between the weights of checkpoints.
        disagreement: [S, S], fraction of rows on which two checkpoints differ.
        runs: [S], the run of each checkpoint; those of one run in succession.
        epochs: [S], the epoch of each; ticks of a single run.
        title: heading of the figure.

    Returns:
        A Figure of two maps with a colour bar each and lines between the runs. The headings give
        the means within and across runs, without the diagonal. Cells without a number are grey;
        where a few are far above the others, the colours of disagreement end at 1.2 times the 90 %
        quantile, without the first checkpoint of every run.
        `rows`: i, j with i <= j, their runs and epochs, cosine, disagreement.

    Raises:
        ValueError: if shapes disagree or the checkpoints of a run are scattered.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 2a, 2b and 3.

    Example:
        >>> import torch
        >>> apart = 0.2 * (1 - torch.eye(2))
        >>> similarity_maps(torch.eye(2), apart, runs=[1, 2]).axes[1].get_title()
        'across: mean 20.0 %'
    """
    op = "similarity_maps"
    count = len(runs)
    require(count >= 1, op, "runs", "of at least one checkpoint", "none")
    runs = [int(run) for run in runs]
    starts = [s for s in range(count) if s == 0 or runs[s] != runs[s - 1]]
    rule = "in order: the checkpoints of one run in succession"
    require(len(starts) == len(set(runs)), op, "runs", rule, f"{len(starts)} changes of run")
    cosine = checked(cosine, op, "cosine", "S, S", count, count)
    disagreement = checked(disagreement, op, "disagreement", "S, S", count, count)
    if epochs is not None:
        epochs = checked(epochs, op, "epochs", "S", count)
    figure = new_figure(11.4, 4.9, title)
    axes = figure.subplots(1, 2)
    low = float(np.nanmin(cosine, initial=0.0))
    _square(axes[0], cosine, (low, 1.0), "Cosine similarity of the weights", "viridis")
    late = np.array([s not in starts for s in range(count)])
    off = 100 * disagreement[late[:, None] & late & ~np.eye(count, dtype=bool)]
    off = off[np.isfinite(off)]
    top = float(np.nanmax(100 * disagreement, initial=0.0)) or 1.0
    most = 1.2 * float(np.quantile(off, 0.9)) if len(off) else top
    top = most if 0 < most < 0.8 * top else top  # untrained networks would fill the scale
    _square(axes[1], 100 * disagreement, (0.0, top), "Disagreement (% of rows)", "cividis")
    for axis, value, unit in ((axes[0], cosine, ""), (axes[1], 100 * disagreement, " %")):
        _runs(axis, runs, starts, epochs)
        axis.set_title(_within_across(value, np.array(runs), unit), fontsize=10)
    cells = [(i, j) for i in range(count) for j in range(i, count)]
    at = [None] * count if epochs is None else epochs.tolist()
    return with_rows(figure, [
        {"i": i, "j": j, "run_i": runs[i], "run_j": runs[j], "epoch_i": at[i], "epoch_j": at[j],
         "cosine": float(cosine[i, j]), "disagreement": float(disagreement[i, j])}
        for i, j in cells])  # fmt: skip


@styled
def function_map(
    points: Tensor,
    runs: Sequence[int],
    epochs: Sequence[float] | None = None,
    samples: Mapping[str, tuple[Tensor, Sequence[int]]] | None = None,
    criterion: str = "",
    title: str = "",
) -> Figure:
    """Where functions lie in two dimensions: a path through the checkpoints of every run.

    Args:
        points: [S, 2] positions of the checkpoints, for instance of t-SNE.
        runs: [S], the run of each checkpoint.
        epochs: [S], the epoch of each; their order within the run if None. Later points are
            larger.
        samples: name of a way to sample a subspace to (positions [n, 2], run [n] around whose
            solution each was drawn); hollow marks in the colour of the run.
        criterion: printed below the figure: what distances say, which such a map does not keep.
        title: heading of the figure.

    Returns:
        A Figure; the number of a run stands beside its last point. `rows`: kind ("checkpoint" or
        the name of the samples), run, epoch, x, y.

    Raises:
        ValueError: if shapes disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 2c and 4.

    Example:
        >>> import torch
        >>> figure = function_map(torch.eye(3)[:, :2], runs=[1, 1, 2])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['run 1', 'run 2']
    """
    op, count = "function_map", len(runs)
    require(count >= 1, op, "runs", "of at least one checkpoint", "none")
    points = checked(points, op, "points", "S, 2", count, 2)
    runs = np.array([int(run) for run in runs])
    order = dict.fromkeys(runs.tolist())
    if epochs is None:
        when = np.array([int((runs[:s] == runs[s]).sum()) for s in range(count)], dtype=float)
    else:
        when = checked(epochs, op, "epochs", "S", count)
    clouds = {}
    for name, (where, around) in (samples or {}).items():
        around = np.array([int(run) for run in around])
        clouds[name] = checked(where, op, f"samples {name!r}", "n, 2", len(around), 2), around
        rule = f"of the runs {list(order)}"
        others = sorted(set(around.tolist()) - set(order))
        require(not others, op, f"runs of {name!r}", rule, others)

    below = textwrap.fill(criterion, 100)
    height = 5.6 + 0.16 * len(below.splitlines())
    figure = new_figure(8.0 if clouds else 6.9, height, title)
    axis = figure.subplots()
    span = max(float(np.ptp(when)), 1e-12)
    handles = []
    for place, run in enumerate(order):
        mine = np.flatnonzero(runs == run)
        mine = mine[np.argsort(when[mine], kind="stable")]
        colour = SERIES_COLOURS[place % 7]
        mark = SERIES_MARKERS[0]
        axis.plot(*points[mine].T, color=colour, lw=0.9, alpha=0.6, zorder=2)
        size = 10 + 70 * (when[mine] - when.min()) / span
        face = {"color": colour, "edgecolors": "white", "linewidths": 0.6}
        axis.scatter(*points[mine].T, s=size, marker=mark, zorder=4, label=f"run {run}", **face)
        for kind, (where, around) in enumerate(clouds.values()):
            style = {"s": 26, "marker": _SQUARES[kind % 4], "alpha": 0.75, "linewidths": 0.8}
            near = where[around == run]
            axis.scatter(*near.T, facecolors="none", edgecolors=colour, zorder=3, **style)
        axis.annotate(
            str(run), points[mine[-1]], xytext=(7, 5), textcoords="offset points", zorder=6,
            color=DARK,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": colour, "alpha": 0.85},
        )  # fmt: skip
        handles.append(_key(colour, mark, f"run {run}"))
    for kind, name in enumerate(clouds):
        handles.append(_key("none", _SQUARES[kind % 4], method_name(name)))
    axis.set(xlabel="first coordinate (no unit)", ylabel="second coordinate (no unit)")
    axis.set_aspect("equal", adjustable="datalim")
    axis.margins(0.08)
    axis.grid(True)
    figure.legend(handles=handles, loc="outside right center", fontsize=9)
    if below:
        figure.supxlabel(below, fontsize=9, color=DARK)
    rows = [("checkpoint", int(runs[s]), float(when[s]), *points[s].tolist()) for s in range(count)]
    for name, (where, around) in clouds.items():
        rows += [(name, int(r), None, *w.tolist()) for r, w in zip(around, where, strict=True)]
    keys = ("kind", "run", "epoch", "x", "y")
    return with_rows(figure, [dict(zip(keys, row, strict=True)) for row in rows])


@styled
def diversity_plane(
    points: Mapping[str, tuple[Tensor, Tensor]],
    reference_accuracy: float,
    classes: int,
    optima: tuple[Tensor, Tensor] | None = None,
    exponents: Sequence[float] = (),
    fit: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Functions in the plane of accuracy against normalised diversity d / (1 - a).

    Args:
        points: way to sample a subspace to (accuracy a [S], disagreement d [S] with the
            reference), fractions. The known names ("random", "dropout", "diagonal", "low_rank",
            ...) have colours of their own.
        reference_accuracy: accuracy of the reference, the star at diversity 0.
        classes: C, for limits and families.
        optima: (accuracy [R], disagreement [R] with the reference) of independent runs, drawn as
            stars.
        exponents: of the one-parameter families that are drawn, thin.
        fit: (exponent, root of the mean squared distance of the points to it), drawn thick.
        title: heading of the figure.

    Returns:
        A Figure with accuracy in percent, limits dashed and dotted. Points without a finite
        diversity are left out and counted in the legend. `rows`: way, accuracy, disagreement,
        normalised.

    Raises:
        ValueError: if there is no point, or shapes disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 6, 7 and S6.

    Example:
        >>> figure = diversity_plane({"random": ([0.5], [0.4])}, 0.7, 10, fit=(0.4, 0.01))
        >>> figure.rows[0]
        {'way': 'random', 'accuracy': 0.5, 'disagreement': 0.4, 'normalised': 0.8}
    """
    op = "diversity_plane"
    require(bool(points) or optima is not None, op, "points", "of at least one way", "none")
    ways = {name: _pair(op, name, found) for name, found in points.items()}
    stars = _pair(op, "optima", (torch.ones(0),) * 2 if optima is None else optima)
    everything = np.concatenate([pair[0] for pair in [*ways.values(), stars]])
    everything = np.append(everything, reference_accuracy)
    low, high = float(np.nanmin(everything)), float(np.nanmax(everything))
    margin = max(0.12 * (high - low), 0.05 * (1 - low), 0.002)
    left, right = max(0.0, low - margin), min(1.0, high + margin)
    figure = new_figure(8.4, 5.2, title)
    axis = figure.subplots()
    top = draw_limits(axis, left, right, reference_accuracy, classes)
    _families(axis, reference_accuracy, classes, exponents, fit)
    style = {"linewidths": 0.6, "edgecolors": "white", "zorder": 4}
    for name, look in series_styles(ways).items():
        style |= {"color": look["color"], "marker": look["marker"]}
        top = max(top, _cloud(axis, ways[name], method_name(name), s=42, alpha=0.85, **style))
    style = {"linewidths": 0.9, "edgecolors": DARK, "zorder": 5, "marker": "*", "color": _RED}
    if optima is not None:
        top = max(top, _cloud(axis, stars, "Independent runs", s=210, **style))
    style |= {"color": "white", "edgecolors": _GREEN, "linewidths": 2.0, "clip_on": False}
    axis.scatter(100 * reference_accuracy, 0, s=230, **style | {"zorder": 6}, label="reference")
    axis.set(xlim=(100 * left, 100 * right), ylim=(-0.04 * top, 1.08 * top))
    axis.set(
        xlabel="Accuracy (%)", ylabel="Diversity: disagreement with the reference / error rate"
    )
    axis.grid(True)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, labelspacing=0.7)
    rows = [
        {"way": name, "accuracy": float(a), "disagreement": float(d), "normalised": _ratio(a, d)}
        for name, pair in {
            **ways,
            "optimum": stars,
            "reference": ([reference_accuracy], [0.0]),
        }.items()
        for a, d in zip(*pair, strict=True)
    ]
    return with_rows(figure, rows)


def _families(axis: Axes, reference_accuracy: float, classes: int, exponents, fit) -> None:
    p = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 400, dtype=torch.float64)])
    drawn = [(e, f"family, exponent {e:g}", 1.0, "#757575") for e in exponents]
    if fit is not None:
        drawn.append(
            (fit[0], f"fit: exponent {fit[0]:.3g}\n(rms distance {fit[1]:.2g})", 1.7, DARK)
        )
    for place, (exponent, label, width, colour) in enumerate(drawn):
        accuracy, apart = correlated_family(p, exponent, reference_accuracy, classes)
        error = (1 - accuracy).clamp(min=1e-9)
        line = "-" if colour == DARK else _DASHES[place % len(_DASHES)]
        order = 4.5 if colour == DARK else 3  # the fit above the points that it goes through
        style = {"color": colour, "lw": width, "ls": line, "label": label, "zorder": order}
        axis.plot((100 * accuracy).numpy(), (apart / error).numpy(), **style)


def _cloud(axis: Axes, pair: tuple[np.ndarray, np.ndarray], label: str, **style) -> float:
    """Draws the points that have a finite diversity; returns the largest."""
    ratio = np.array([_ratio(a, d) for a, d in zip(*pair, strict=True)])
    shown = np.isfinite(ratio)
    if not shown.all():
        label += f"\n({int((~shown).sum())} without a diversity)"
    axis.scatter(100 * pair[0][shown], ratio[shown], label=label, **style)
    return float(ratio[shown].max(initial=0.0))


def _ratio(accuracy: float, disagreement: float) -> float:
    if accuracy < 1:
        return float(disagreement / (1 - accuracy))
    return float("inf") if disagreement > 0 else float("nan")


def _pair(op: str, name: str, found) -> tuple[np.ndarray, np.ndarray]:
    accuracy = checked(found[0], op, f"accuracy of {name!r}", "S", None)
    return accuracy, checked(found[1], op, f"disagreement of {name!r}", "S", len(accuracy))


def _key(colour: str, marker: str, label: str):
    """An entry of a legend: a marker without a line; hollow without a colour."""
    from matplotlib.lines import Line2D

    face = {"markerfacecolor": colour, "markeredgecolor": DARK if colour == "none" else colour}
    return Line2D([], [], linestyle="none", marker=marker, markersize=7, label=label, **face)


def _square(axis: Axes, value: np.ndarray, limits: tuple, label: str, colours: str) -> None:
    axis.set_facecolor(NO_VALUE)
    shown = np.ma.masked_invalid(value)
    image = axis.imshow(shown, cmap=colours, vmin=limits[0], vmax=limits[1])
    extend = "max" if np.ma.max(shown) > limits[1] + 1e-6 else "neither"
    axis.figure.colorbar(image, ax=axis, label=label, shrink=0.9, extend=extend)


def _runs(axis: Axes, runs: list[int], starts: list[int], epochs: np.ndarray | None) -> None:
    """White lines where the run changes, and ticks: runs, or the epochs of a single one."""
    count, ends = len(runs), [*starts[1:], len(runs)]
    for start in starts[1:]:
        axis.axhline(start - 0.5, color="white", lw=1.4)
        axis.axvline(start - 0.5, color="white", lw=1.4)
    if len(starts) > 1:
        at = [(s + e - 1) / 2 for s, e in zip(starts, ends, strict=True)]
        names, label = [str(runs[s]) for s in starts], "run"
    else:
        at = list(range(0, count, max(1, -(-count // 10))))
        names = [f"{s if epochs is None else epochs[s]:g}" for s in at]
        label = f"checkpoint of run {runs[0]}" + ("" if epochs is None else " (epoch)")
    axis.set_xticks(at, names)
    axis.set_yticks(at, names)
    axis.tick_params(length=0)
    axis.set(xlabel=label, ylabel=label)
    axis.spines[:].set_visible(False)


def _within_across(value: np.ndarray, runs: np.ndarray, unit: str) -> str:
    same = runs[:, None] == runs[None, :]
    parts = []
    for name, where in (("within a run", same & ~np.eye(len(runs), dtype=bool)), ("across", ~same)):
        found = value[where & np.isfinite(value)]
        if len(found):
            mean = float(found.mean())
            sign = "−" if mean < 0 else ""
            parts.append(f"{name}: mean {sign}{short_number(abs(mean))}{unit}")
    return ", ".join(parts) or "one checkpoint"
