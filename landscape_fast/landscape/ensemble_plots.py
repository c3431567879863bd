"""Figures of ensembles: their size, shifted and foreign data, and what makes members differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from landscape_fast.landscape._figure import (
    DARK,
    checked,
    label_axes,
    legend_below,
    legend_height,
    method_name,
    new_figure,
    numbers,
    series_styles,
    short_number,
    styled,
    with_rows,
)
from landscape_fast.ops._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[Sequence[float] | Tensor, ...]  # positions, values and, if known, their spread
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "+++", "---", "**")


@styled
def size_curve_panels(panels: Mapping[str, Mapping[str, Series]], title: str = "") -> Figure:
    """Quantities against the number of members, one panel for each quantity.

    Args:
        panels: label of a quantity, with its unit, to {variant: (sizes [K], values [K]) or (sizes,
            values, spread [K])}; the spread is drawn as error bars. A variant keeps colour, line
            and marker in all panels; the known names ("original", "weight_average", "diagonal",
            "low_rank", "random", "random_low_rank") keep them in all figures.
        title: heading of the figure.

    Returns:
        A Figure with the panels side by side and one legend. `rows`: quantity, variant, size,
        value, spread.

    Raises:
        ValueError: without a panel or variant, or if lengths disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure 8.

    Example:
        >>> figure = size_curve_panels({"Accuracy (%)": {"original": ([1, 2], [68.2, 70.0])}})
        >>> figure.axes[0].get_xlabel()
        'Ensemble size (networks)'
    """
    return _series_panels("size_curve_panels", panels, "Ensemble size (networks)", "size", title)


@styled
def shift_panels(
    panels: Mapping[str, Mapping[str, Series]],
    title: str = "",
    xlabel: str = "Severity of the corruption (0: none)",
) -> Figure:
    """Quantities against the severity of a shift of the data, one panel for each quantity.

    Args:
        panels: label of a quantity, with its unit, to {method: (severities [V], values [V]) or
            (severities, values, spread [V])}, as of `size_curve_panels`. A method may be in some
            of the panels only.
        title: heading of the figure.
        xlabel: label of the severities.

    Returns:
        A Figure with the panels side by side and one legend. `rows`: quantity, variant, severity,
        value, spread.

    Raises:
        ValueError: without a panel or method, or if lengths disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 9 and 10.

    Example:
        >>> figure = shift_panels({"Brier score": {"independent": ([0, 5], [0.42, 0.78])}})
        >>> figure.axes[0].get_ylabel()
        'Brier score'
    """
    return _series_panels("shift_panels", panels, xlabel, "severity", title)


@styled
def ood_bars(
    panels: Mapping[str, Mapping[str, Mapping[str, float | tuple[float, float]]]], title: str = ""
) -> Figure:
    """Quantities on several sets of foreign data: groups of bars, one bar for each method.

    Args:
        panels: label of a quantity, with its unit, to {data set: {method: value or (value,
            spread)}}. Methods have colour and hatching; a method that a data set lacks leaves
            its place empty.
        title: heading of the figure.

    Returns:
        A Figure of one panel under another with the values above the bars, which may be far
        apart. `rows`: quantity, data, method, value, spread.

    Raises:
        ValueError: without a panel, data set or method.

    Source: Fort et al. 2019 (arXiv:1912.02757), section 5.

    Example:
        >>> js = {"SVHN": {"independent": 0.384, "diagonal": 0.034}}
        >>> figure = ood_bars({"Jensen-Shannon divergence (nats)": js})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.38', '0.034']
    """
    op = "ood_bars"
    require(len(panels) >= 1, op, "panels", "of at least one quantity", "none")
    sets = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    methods = dict.fromkeys(m for groups in panels.values() for g in groups.values() for m in g)
    require(len(methods) >= 1, op, "panels", "of at least one method", "none")
    shown = {
        label: {m: _bar_values(groups, sets, m) for m in methods}
        for label, groups in panels.items()
    }
    return with_rows(_grouped_bars(shown, sets, "", title), [
        {"quantity": label, "data": name, "method": method, "value": value,
         "spread": spread if np.isfinite(spread) else None}
        for label, series in shown.items() for method, bars in series.items()
        for name, (value, spread) in zip(sets, bars, strict=True) if np.isfinite(value)
    ])  # fmt: skip


@styled
def init_shuffle_bars(
    rates: Sequence[float], disagreement: Mapping[str, Tensor], title: str = ""
) -> Figure:
    """How far apart two runs end that share the start, the order of the data, both or nothing.

    Args:
        rates: [L] learning rates.
        disagreement: setting (for instance "same start, same order") to [L] or [L, n] fractions
            of rows, n repeats.
        title: heading of the figure.

    Returns:
        A Figure: bars of the means in percent with their standard deviation and a dot for each
        repeat. A bar of height 0 is marked, as runs that share everything must have. `rows`:
        rate, setting, repeat, disagreement.

    Raises:
        ValueError: without a rate, setting or repeat, or if shapes disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure S4.

    Example:
        >>> figure = init_shuffle_bars([0.1], {"same start, other order": [[0.18, 0.2]]})
        >>> [row["disagreement"] for row in figure.rows]
        [0.18, 0.2]
    """
    op, count = "init_shuffle_bars", len(rates)
    require(count >= 1, op, "rates", "of at least one learning rate", "none")
    require(len(disagreement) >= 1, op, "disagreement", "of at least one setting", "none")
    found = {}
    for name, value in disagreement.items():
        value = numbers(value)
        value = value[:, None] if value.ndim == 1 else value
        found[name] = checked(value, op, f"disagreement of {name!r}", "L, n", count, None)
        some = found[name].shape[1] >= 1
        require(some, op, f"disagreement of {name!r}", "of at least one repeat", "none")
    label = "Disagreement (% of rows)"
    bars = {name: 100 * value for name, value in found.items()}
    names = [f"{float(rate):g}" for rate in rates]
    figure = _grouped_bars({label: bars}, names, "Learning rate", title)
    return with_rows(figure, [
        {"rate": float(rate), "setting": name, "repeat": n, "disagreement": float(d)}
        for name, value in found.items() for rate, row in zip(rates, value, strict=True)
        for n, d in enumerate(row)])  # fmt: skip


@styled
def cycle_comparison(
    disagreement: Mapping[str, Mapping[str, Tensor]],
    title: str = "",
) -> Figure:
    """Disagreement between independent runs beside that between the cycles of one run.

    Args:
        disagreement: name of a panel, for instance the data set, to {group: [n] fractions of
            rows}, one for each repeat of the experiment; groups of a panel have the same repeats.
        title: heading of the figure.

    Returns:
        A Figure: means with one standard deviation to both sides, and one thin line for each
        repeat from group to group. `rows`: panel, group, repeat, disagreement.

    Raises:
        ValueError: without a panel, group or repeat, or if the numbers of repeats disagree.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure S5.

    Example:
        >>> groups = {"independent": [0.08, 0.1], "cycles": [0.06, 0.06]}
        >>> figure = cycle_comparison({"CIFAR-10": groups})
        >>> [tick.get_text().split("\\n")[1] for tick in figure.axes[0].get_xticklabels()]
        ['9.00 ± 1.4 %', '6.00 ± 0 %']
    """
    op = "cycle_comparison"
    require(len(disagreement) >= 1, op, "disagreement", "of at least one panel", "none")
    rows, panels = [], {}
    for panel, groups in disagreement.items():
        require(len(groups) >= 1, op, f"panel {panel!r}", "of at least one group", "none")
        repeats = len(next(iter(groups.values())))
        require(repeats >= 1, op, f"panel {panel!r}", "of at least one repeat", "none")
        panels[panel] = {
            name: checked(value, op, f"group {name!r}", "n", repeats)
            for name, value in groups.items()
        }
        rows += [
            {"panel": panel, "group": name, "repeat": n, "disagreement": float(d)}
            for name, value in panels[panel].items()
            for n, d in enumerate(value)
        ]
    figure = new_figure(1.4 + 3.6 * len(panels), 3.9, title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    styles = series_styles(name for groups in panels.values() for name in groups)
    for axis, (panel, groups) in zip(axes, panels.items(), strict=True):
        _groups(axis, groups, styles)
        axis.set_title(panel)
    axes[0].set_ylabel("Disagreement (% of rows)")
    return with_rows(figure, rows)


def _series_panels(op: str, panels, xlabel: str, position: str, title: str) -> Figure:
    require(len(panels) >= 1, op, "panels", "of at least one quantity", "none")
    styles = series_styles(name for series in panels.values() for name in series)
    require(len(styles) >= 1, op, "panels", "of at least one variant", "none")
    rows, handles = [], {}
    width = max(4.2 * len(panels), 5.6)
    height = 3.5 + legend_height([method_name(name) for name in styles], width)
    figure = new_figure(width, height, title)
    figure.get_layout_engine().set(w_pad=0.08)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (quantity, series) in zip(axes, panels.items(), strict=True):
        for name, given in series.items():
            x = checked(given[0], op, f"positions of {name!r}", "K", None)
            y = checked(given[1], op, f"values of {name!r}", "K", len(x))
            spread = None
            if len(given) > 2 and given[2] is not None:
                spread = checked(given[2], op, f"spread of {name!r}", "K", len(x))
            handles[name] = axis.errorbar(
                x, y, spread, **styles[name], markersize=5, lw=1.5, capsize=2.5, elinewidth=0.9,
                label=method_name(name),
            )  # fmt: skip
            spreads = [None] * len(x) if spread is None else spread.tolist()
            rows += [
                {"quantity": quantity, "variant": name, position: a, "value": b, "spread": c}
                for a, b, c in zip(x.tolist(), y.tolist(), spreads, strict=True)
            ]
        label_axes(axis, xlabel, quantity)
        places = sorted({row[position] for row in rows if row["quantity"] == quantity})
        if len(places) <= 12:
            axis.set_xticks(places, [f"{place:g}" for place in places])
    legend_below(figure, [handles[name] for name in styles])
    return with_rows(figure, rows)


def _bar_values(groups: Mapping, sets: Sequence[str], method: str) -> list[tuple]:
    """(value, spread) of a method in each set; nan for what is not known."""
    given = (groups.get(name, {}).get(method, np.nan) for name in sets)
    pairs = (pair if isinstance(pair, tuple | list) else (pair, None) for pair in given)
    return [(float(v), np.nan if spread is None else float(spread)) for v, spread in pairs]


def _grouped_bars(panels, groups: Sequence[str], xlabel: str, title: str) -> Figure:
    """Panels of {series: one entry per group}: (value, spread or nan), or an array of repeats."""
    styles = series_styles(name for series in panels.values() for name in series)
    wide = max(6.0, 1.4 + 0.5 * len(styles) * len(groups))
    wide, crowded = min(wide, 14.0), len(styles) * len(groups) > 12
    tall = 3.2 * len(panels) + legend_height([method_name(name) for name in styles], wide)
    figure = new_figure(wide, tall, title)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    width = 0.84 / len(styles)
    handles = {}
    for axis, (label, series) in zip(axes, panels.items(), strict=True):
        for place, (name, style) in enumerate(styles.items()):
            at = np.arange(len(groups)) + width * (place - (len(styles) - 1) / 2)
            means, spreads, dots = _summary(series[name])
            handles[name] = axis.bar(
                at, means, 0.9 * width, color=style["color"], edgecolor="white", linewidth=0,
                hatch=_HATCHES[place % len(_HATCHES)], label=method_name(name),
            )  # fmt: skip
            line = {"fmt": "none", "ecolor": DARK, "elinewidth": 1.0, "capsize": 3}
            axis.errorbar(at, means, spreads, **line)
            for x, mean, spread, repeats in zip(at, means, spreads, dots, strict=True):
                if len(repeats) > 1:
                    nudge = 0.25 * width * np.linspace(-1, 1, len(repeats))
                    axis.plot(x + nudge, repeats, "o", color="white", mec=DARK, ms=3.5, mew=0.8)
                if np.isfinite(mean):
                    high = max([mean + np.nan_to_num(spread), *repeats])
                    text = "0" if mean == 0 else short_number(mean)
                    axis.annotate(
                        text, (x, high), xytext=(0, 5), textcoords="offset points", ha="center",
                        fontsize=8, rotation=90 if crowded else 0,
                    )  # fmt: skip
        axis.set_xticks(range(len(groups)), groups)
        axis.margins(y=0.2 if crowded else 0.12)
        axis.set_ylim(bottom=0)
        label_axes(axis, xlabel if axis is axes[-1] else "", label, "y")
        axis.tick_params(axis="x", length=0)
    legend_below(figure, handles.values())
    return figure


def _summary(entries) -> tuple[list[float], list[float], list]:
    """Mean, spread (nan where unknown) and repeats of each entry."""
    means, spreads, dots = [], [], []
    for entry in entries:
        if isinstance(entry, tuple):
            means.append(entry[0])
            spreads.append(entry[1])
            dots.append([])
        else:
            means.append(float(np.mean(entry)))
            spreads.append(float(np.std(entry, ddof=1)) if len(entry) > 1 else float("nan"))
            dots.append(entry.tolist())
    return means, spreads, dots


def _groups(axis: Axes, groups: Mapping[str, np.ndarray], styles: Mapping) -> None:
    values = 100 * np.stack(list(groups.values()))  # [groups, n]
    places, labels = np.arange(len(groups)), []
    for repeat in values.T:
        axis.plot(places, repeat, "-", color="#9A9A9A", lw=0.9, marker=".", ms=4, zorder=2)
    for place, (name, value) in enumerate(zip(groups, values, strict=True)):
        spread = float(np.std(value, ddof=1)) if len(value) > 1 else float("nan")
        style = {"color": styles[name]["color"], "fmt": styles[name]["marker"], "zorder": 3}
        axis.errorbar(place, value.mean(), spread, **style, ms=9, capsize=6, lw=1.8, mec="white")
        text = short_number(float(value.mean())) + ("" if len(value) < 2 else f" ± {spread:.2g}")
        labels.append(f"{method_name(name)}\n{text} %")
    axis.set_xticks(places, labels)
    axis.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, 1.12 * np.nanmax(values, initial=0) or 1))
    axis.tick_params(axis="x", length=0)
    axis.grid(True, axis="y")
