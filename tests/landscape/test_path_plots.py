"""Figures of paths, simplexes and cycles: what is drawn, and the errors."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from landscape_fast.landscape.path_plots import (  # noqa: E402
    cycle_panels,
    path_panels,
    simplex_heat_map,
)

T = torch.linspace(0, 1, 5)
ERROR, LOSS = "test error (%)", "test loss (nats)"


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_path_keeps_its_style_in_every_panel():
    paths = {"line": (T, 10 * T), "curve": (T, 5 * T)}
    figure = path_panels({ERROR: paths, LOSS: {"curve": (T, T)}}, title="digits")
    error, loss = figure.axes
    assert [error.get_ylabel(), loss.get_ylabel()] == [ERROR, LOSS]
    assert error.get_xlabel() == "position t" and legend(figure) == ["line", "curve"]
    line, curve = error.get_lines()
    assert np.allclose(curve.get_xdata(), T) and np.allclose(line.get_ydata(), 10 * T)
    (again,) = loss.get_lines()
    for style in ("color", "linestyle", "marker"):
        assert getattr(again, f"get_{style}")() == getattr(curve, f"get_{style}")()
        assert getattr(line, f"get_{style}")() != getattr(curve, f"get_{style}")()


def test_a_level_is_drawn_and_named():
    figure = path_panels({ERROR: {"line": (T, T)}}, levels={ERROR: 0.25}, level_name="alone")
    level = figure.axes[0].get_lines()[-1]
    assert list(level.get_ydata()) == [0.25, 0.25] and legend(figure) == ["line", "alone"]


def test_long_names_do_not_take_the_room_of_the_panels():
    def height(name):
        figure = path_panels({ERROR: {f"{name} {i}": (T, T) for i in range(9)}})
        figure.canvas.draw()
        return figure.axes[0].get_window_extent().height

    assert height("a path that has a long name, as some have") > 0.9 * height("a")


@pytest.mark.parametrize(
    ("panels", "match"),
    [
        ({}, "panels must be of at least one quantity; got none"),
        ({ERROR: {}}, "panels must be of at least one path; got none"),
        ({ERROR: {"line": (T, T[:2])}}, "path 'line' must be as many values as positions; got 2"),
    ],
)
def test_paths_that_do_not_fit(panels, match):
    with pytest.raises(ValueError, match=match):
        path_panels(panels)


def grid():
    points = [(i / 4, j / 4, 1 - i / 4 - j / 4) for i in range(-1, 6) for j in range(-1, 6 - i)]
    return torch.tensor(points)


def test_the_triangle_shows_where_the_best_point_is():
    weights = grid()
    values = 90 - 40 * ((weights - torch.tensor([0.5, 0.25, 0.25])) ** 2).sum(1)
    figure = simplex_heat_map(weights, values, "test accuracy (%)", corners=("a", "b", "c"))
    axis, bar = figure.axes
    assert bar.get_ylabel() == "test accuracy (%)" and axis.get_title() == "largest: 90, ringed"
    points, ring = (c.get_offsets() for c in axis.collections[-2:])
    assert len(points) == len(weights)
    assert np.allclose(ring, [[0.25 + 0.125, 0.25 * np.sqrt(0.75)]])  # .5 a + .25 b + .25 c
    assert [t.get_text() for t in axis.texts] == ["a", "b", "c"]
    a, b, c = (t.get_position() for t in axis.texts)
    assert a[0] < 0 < 1 < b[0] and c[1] > np.sqrt(0.75)


def test_the_triangle_leaves_out_what_is_not_finite():
    weights = grid()
    values = 90 - 40 * (weights**2).sum(1)
    worse = values.clone()
    worse[0], worse[-1] = torch.inf, torch.nan
    titles = {simplex_heat_map(weights, v, "NLL").axes[0].get_title() for v in (values, worse)}
    assert len(titles) == 1


@pytest.mark.parametrize(
    ("weights", "values", "match"),
    [
        (torch.ones(4, 2), T[:4], r"weights must be \[S, 3\]; got \[4, 2\]"),
        (grid(), T, r"values must be \[S\] with S = .*; got \[5\]"),
        (torch.ones(4, 3), T[:4], "rows that sum to 1; got one that misses it by 2"),
        (torch.eye(3)[:2], T[:2], "at least three points that are not on one line"),
        (torch.eye(3), [torch.nan] * 3, "values must be finite at one point at least; got none"),
    ],
)
def test_triangles_that_do_not_fit(weights, values, match):
    with pytest.raises(ValueError, match=match):
        simplex_heat_map(weights, values, "accuracy")


def test_cycles_show_rate_error_and_distance():
    epochs = torch.linspace(0, 4, 9)
    figure = cycle_panels(epochs, 0.1 + 0 * epochs, [1, 3], [9.0, 8.0], [9.0, 7.0], [2.5], "FGE")
    rate, errors, distances = figure.axes
    assert np.allclose(rate.get_lines()[0].get_xdata(), epochs)
    assert [list(line.get_xdata()) for line in rate.get_lines()[1:]] == [[1, 1], [3, 3]]
    alone, together = errors.get_lines()
    assert list(alone.get_ydata()) == [9, 8] and list(together.get_ydata()) == [9, 7]
    (apart,) = distances.get_lines()
    assert list(apart.get_xdata()) == [3] and list(apart.get_ydata()) == [2.5]
    assert distances.get_xlabel() == "epoch" and distances.get_ylim()[0] == 0


def test_cycles_that_do_not_fit():
    with pytest.raises(ValueError, match=r"distance must be \[1\]; got \[2\]"):
        cycle_panels(T, T, [1, 3], [9, 8], [9, 7], [2, 2])
