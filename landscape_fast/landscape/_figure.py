"""The style that all figures share: colours, markers and names of methods, fonts, numbers."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from landscape_fast.ops._checks import require, shape_rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours, told apart by colour-blind readers; markers say the same without colour.
COLOURS = {"single": "#757575", "deep": "#0072B2", "batch": "#D55E00"}
MARKERS = {"single": "*", "deep": "o", "batch": "D"}
NAMES = {"single": "Single network", "deep": "Deep ensemble", "batch": "BatchEnsemble"}
_MORE_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# The series of a figure take turns in these; line styles and markers say the same without colour.
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#757575", "#E69F00", "#56B4E9")
SERIES_LINES = ("-", "--", "-.", ":")
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DARK = "#222222"
# Ways to get several functions: name, colour, line and marker, the same in all figures.
_WAYS = {
    "original": ("Original", "#757575", "-", "o"),
    "independent": ("Independent runs", "#D55E00", "-", "s"),
    "random": ("Random directions", "#0072B2", "--", "o"),
    "dropout": ("Weight dropout", "#E69F00", "-.", "P"),
    "diagonal": ("Diagonal Gaussian", "#CC79A7", ":", "D"),
    "low_rank": ("Low-rank Gaussian", "#56B4E9", "-.", "^"),
    "random_low_rank": ("Low-rank of random samples", DARK, "--", "X"),
    "weight_average": ("Weight average", "#009E73", "-", "v"),
    "trajectory": ("One trajectory", "#757575", ":", "X"),
}
NO_VALUE = "#D9D9D9"  # the ground of a map where it has no value
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 100,
}
_Plot = TypeVar("_Plot", bound=Callable)


def styled(plot: _Plot) -> _Plot:
    """Runs a plotting function under this module's style, with a clear error without matplotlib."""

    @functools.wraps(plot)
    def run(*args, **kwargs):
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(
                f"{plot.__name__}: matplotlib must be installed; got no such module; "
                "pip install 'landscape-fast[plot]'"
            ) from error
        with matplotlib.rc_context(_STYLE):
            return plot(*args, **kwargs)

    return run


def method_name(method: str) -> str:
    """Heading of a method; an unknown one is its own name."""
    return NAMES.get(method, _WAYS.get(method, (method,))[0])


def method_colour(method: str, place: int = 0) -> str:
    """Colour of a method in every figure; unknown ones take turns by their place."""
    return COLOURS.get(method, _MORE_COLOURS[place % len(_MORE_COLOURS)])


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A figure of this size in inches under its title, drawn by Agg, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + (0.3 if title else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    add_title(figure, title)
    return figure


def text_colour(cell: Sequence[float]) -> str:
    """White or near-black, whichever stands out more from the cell's colour (red, green, blue)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in cell[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if luminance < 0.2 else "#1A1A1A"  # equal contrast (WCAG) at 0.2


def short_number(value: float) -> str:
    """Two decimals, or three significant digits where that is more or less."""
    if value == 0:
        return "0"
    if 0.095 <= value < 100:
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"{value:.2g}" if value < 1 else f"{value:.0f}"


def place_style(place: int) -> dict[str, Any]:
    """Colour, line and marker of the series at a place; 49 places have pairs of their own."""
    return {
        "color": SERIES_COLOURS[place % 7],
        "linestyle": SERIES_LINES[place % 4],
        "marker": SERIES_MARKERS[(place + place // 7) % 7],
    }


def series_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name to its style: the known ways their own, the others what those leave, in order."""
    names = list(dict.fromkeys(names))
    known = {name: dict(zip(("color", "linestyle", "marker"), _WAYS[name][1:], strict=True))
             for name in names if name in _WAYS}  # fmt: skip
    used = {style["color"] for style in known.values()}
    taken = {(style["color"], style["marker"]) for style in known.values()}
    styles = [place_style(place) for place in range(7 + 2 * len(names))]
    styles = [style for style in styles if (style["color"], style["marker"]) not in taken]
    styles.sort(key=lambda style: style["color"] in used)  # free colours first
    free = iter(styles)
    return {name: known.get(name) or next(free) for name in names}


def numbers(values: Tensor | Sequence[float]) -> np.ndarray:
    """The values in float64, in their own shape."""
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    return np.array(values, dtype=np.float64)


def checked(values, op: str, argument: str, letters: str, *sizes: int | None) -> np.ndarray:
    """The values as numbers of the shape `letters`, whose sizes are given where they are known."""
    found = numbers(values)
    ok = found.ndim == len(sizes)
    ok = ok and all(s is None or s == f for s, f in zip(sizes, found.shape, strict=True))
    require(ok, op, argument, shape_rule(letters, sizes), list(found.shape))
    return found


def add_title(figure: Figure, title: str) -> None:
    """The heading of a figure, if it has one, in as many lines as it needs."""
    if title:
        lines = textwrap.fill(title, int(8.4 * figure.get_figwidth()))  # letters of bold 13 points
        figure.suptitle(lines, fontsize=13, fontweight="bold")


def legend_below(figure: Figure, handles: Sequence) -> None:
    """One legend for all panels, outside of them."""
    handles = list(handles)
    columns = _columns([handle.get_label() for handle in handles], figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def legend_height(labels: Sequence[str], width: float) -> float:
    """Inches that `legend_below` takes for these labels in a figure of this width."""
    return 0.15 + 0.2 * math.ceil(len(labels) / _columns(labels, width))


def _columns(labels: Sequence[str], width: float) -> int:
    widest = 0.65 + 0.08 * max(map(len, labels), default=0)  # inches of an entry at 9 points
    return max(1, min(3, len(labels), int(width / widest)))


def with_rows(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure with what it shows as rows of a table, in its attribute `rows`."""
    figure.rows = [dict(row) for row in rows]
    return figure


def log_worthwhile(values: np.ndarray, ratio: float = 30.0) -> bool:
    """Whether only a logarithmic scale shows them: all positive, and far apart."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > ratio * finite.min())


def scale_values(axis: Axes, values: np.ndarray) -> None:
    """A logarithmic scale for values where only that shows them, with plain numbers beside it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not log_worthwhile(values):
        return
    axis.set_yscale("log")
    finite = values[np.isfinite(values)]
    if finite.max() < 3e3 * finite.min():
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def label_axes(axis: Axes, xlabel: str, ylabel: str, grid: str = "both") -> None:
    """Labels, and grid lines along "x", "y" or "both"."""
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(True, axis=grid)
