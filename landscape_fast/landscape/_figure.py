"""The style that all figures share: colours, markers and names of methods, fonts, numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito colours, told apart by colour-blind readers; markers say the same without colour.
COLOURS = {"single": "#757575", "deep": "#0072B2", "batch": "#D55E00"}
MARKERS = {"single": "*", "deep": "o", "batch": "D"}
NAMES = {"single": "Single network", "deep": "Deep ensemble", "batch": "BatchEnsemble"}
_MORE_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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
    return NAMES.get(method, method)


def method_colour(method: str, place: int = 0) -> str:
    """Colour of a method in every figure; unknown ones take turns by their place."""
    return COLOURS.get(method, _MORE_COLOURS[place % len(_MORE_COLOURS)])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, drawn by Agg, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
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
