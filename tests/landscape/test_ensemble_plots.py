"""Figures of ensembles: lines, bars and marks are the numbers that were given."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402

from landscape_fast.landscape.ensemble_plots import (  # noqa: E402
    cycle_comparison,
    init_shuffle_bars,
    ood_bars,
    shift_panels,
    size_curve_panels,
)

SIZES = torch.tensor([1, 2, 4])
ACCURACY, BRIER = "Accuracy (%)", "Brier score"


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(axis):
    return [text.get_text() for text in axis.texts]


@pytest.mark.parametrize(
    ("plot", "position", "xlabel"),
    [
        (size_curve_panels, "size", "Ensemble size (networks)"),
        (shift_panels, "severity", "Severity of the corruption (0: none)"),
    ],
)
def test_panels_show_values_with_their_spread(plot, position, xlabel):
    panels = {
        ACCURACY: {"random": (SIZES, [68.0, 69, 70], [0.5, 0.25, 0]), "mine": (SIZES, SIZES)},
        BRIER: {"mine": (SIZES[:2], SIZES[:2] / 10)},
    }
    figure = plot(panels, "digits")
    left, right = figure.axes
    random, mine = left.containers
    np.testing.assert_allclose(random[0].get_xydata(), [[1, 68], [2, 69], [4, 70]])
    bars = random[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[67.5, 68.5], [68.75, 69.25], [70, 70]]
    assert mine[2] == () and mine[0].get_ydata().tolist() == [1, 2, 4]
    (again,) = right.containers
    for style in ("color", "linestyle", "marker"):
        assert getattr(again[0], f"get_{style}")() == getattr(mine[0], f"get_{style}")()
    assert mine[0].get_color() != random[0].get_color()
    assert mine[0].get_marker() != random[0].get_marker()
    assert [axis.get_ylabel() for axis in figure.axes] == [ACCURACY, BRIER]
    assert {axis.get_xlabel() for axis in figure.axes} == {xlabel}
    assert left.get_xticks().tolist() == [1, 2, 4] and right.get_xticks().tolist() == [1, 2]
    assert legend(figure) == ["Random directions", "mine"] and figure.get_suptitle() == "digits"
    first = {"quantity": ACCURACY, "variant": "random", position: 1, "value": 68, "spread": 0.5}
    assert figure.rows[0] == first
    assert len(figure.rows) == 8 and figure.rows[3]["spread"] is None


@pytest.mark.parametrize(
    ("panels", "match"),
    [
        ({}, "panels must be of at least one quantity; got none"),
        ({ACCURACY: {}}, "panels must be of at least one variant; got none"),
        ({BRIER: {"a": (SIZES, SIZES[:2])}}, r"values of 'a' must be \[K\] with K = 3; got \[2\]"),
        ({BRIER: {"a": (SIZES, SIZES, [1])}}, r"spread of 'a' must be \[K\] with K = 3; got \[1\]"),
    ],
)
def test_panels_that_do_not_fit(panels, match):
    with pytest.raises(ValueError, match=f"size_curve_panels: {match}"):
        size_curve_panels(panels)


def heights(axis):
    """Heights of the bars by series, in the order of the groups."""
    bars = [c for c in axis.containers if hasattr(c, "patches")]
    return [[bar.get_height() for bar in series] for series in bars]


class TestOodBars:
    PANELS = {
        "JS (nats)": {
            "SVHN": {"independent": 0.384, "random": (0.155, 0.01), "diagonal": 0.034},
            "noise": {"independent": 0.5, "random": 0.2},
        },
        "AUROC": {"noise": {"independent": 0.9, "random": float("nan")}},
    }

    def test_every_method_has_its_bar_in_every_group(self):
        figure = ood_bars(self.PANELS, "foreign")
        js, auroc = figure.axes
        np.testing.assert_array_equal(heights(js), [[0.384, 0.5], [0.155, 0.2], [0.034, np.nan]])
        np.testing.assert_array_equal(heights(auroc)[:2], [[np.nan, 0.9], [np.nan, np.nan]])
        assert [t.get_text() for t in js.get_xticklabels()] == ["SVHN", "noise"]
        assert js.get_ylim()[0] == 0 and js.get_ylim()[1] > 0.5
        assert texts(js) == ["0.38", "0.50", "0.15", "0.20", "0.034"] and texts(auroc) == ["0.90"]
        names = ["Independent runs", "Random directions", "Diagonal Gaussian"]
        assert legend(figure) == names

    def test_bars_of_a_group_stand_side_by_side_and_differ_without_colour(self):
        bars = [c for c in ood_bars(self.PANELS).axes[0].containers if hasattr(c, "patches")]
        ends = [(c[0].get_x(), c[0].get_x() + c[0].get_width()) for c in bars]
        assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))
        assert len({c[0].get_hatch() for c in bars}) == len(bars) == 3
        assert to_hex(bars[0][0].get_facecolor()).upper() == "#D55E00"

    def test_rows_leave_out_what_has_no_value(self):
        rows = ood_bars(self.PANELS).rows
        assert len(rows) == 6 and rows[2] == {
            "quantity": "JS (nats)", "data": "SVHN", "method": "random", "value": 0.155,
            "spread": 0.01}  # fmt: skip
        assert rows[0]["spread"] is None  # an empty cell of the CSV

    @pytest.mark.parametrize(
        ("panels", "match"),
        [({}, "of at least one quantity"), ({"JS": {"SVHN": {}}}, "of at least one method")],
    )
    def test_what_does_not_fit(self, panels, match):
        with pytest.raises(ValueError, match=f"ood_bars: panels must be {match}; got none"):
            ood_bars(panels)


class TestInitShuffleBars:
    FOUND = {
        "same start, same order": torch.zeros(2, 2),
        "same start, other order": torch.tensor([[0.15, 0.17], [0.18, 0.2]]),
    }

    def test_bars_are_means_and_dots_are_repeats(self):
        figure = init_shuffle_bars([0.01, 0.1], self.FOUND)
        (axis,) = figure.axes
        np.testing.assert_allclose(heights(axis), [[0, 0], [16, 19]], rtol=1e-6)
        assert texts(axis) == ["0", "0", "16.0", "19.0"]
        dots = [line.get_ydata() for line in axis.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(dots, [[0, 0], [0, 0], [15, 17], [18, 20]], rtol=1e-6)
        spread = [c[2][0].get_segments() for c in axis.containers if not hasattr(c, "patches")]
        assert np.ptp(spread[1][0][:, 1]) == pytest.approx(2 * np.std([15, 17], ddof=1), rel=1e-5)
        assert [t.get_text() for t in axis.get_xticklabels()] == ["0.01", "0.1"]
        assert axis.get_xlabel() == "Learning rate"

    def test_rows_are_the_repeats(self):
        rows = init_shuffle_bars([0.01, 0.1], self.FOUND).rows
        assert len(rows) == 8 and [row["rate"] for row in rows[4:]] == [0.01, 0.01, 0.1, 0.1]
        assert [row["disagreement"] for row in rows[4:]] == pytest.approx([0.15, 0.17, 0.18, 0.2])

    def test_one_repeat_has_no_spread(self):
        figure = init_shuffle_bars([0.1], {"both": torch.tensor([0.25])})
        assert heights(figure.axes[0]) == [[25]] and len(figure.rows) == 1
        assert not [line for line in figure.axes[0].lines if line.get_marker() == "o"]

    @pytest.mark.parametrize(
        ("rates", "found", "match"),
        [
            ([], {"a": torch.ones(0)}, "rates must be of at least one learning rate; got none"),
            ([1], {}, "disagreement must be of at least one setting; got none"),
            ([1], {"a": torch.ones(2)}, r"of 'a' must be \[L, n\] with L = 1; got \[2, 1\]"),
            ([1], {"a": torch.ones(1, 0)}, r"of 'a' must be of at least one repeat; got none"),
        ],
    )
    def test_what_does_not_fit(self, rates, found, match):
        with pytest.raises(ValueError, match=f"init_shuffle_bars: .*{match}"):
            init_shuffle_bars(rates, found)


class TestCycleComparison:
    FOUND = {
        "digits": {"independent": torch.tensor([0.1, 0.12]), "cycles": torch.tensor([0.06, 0.1])},
        "other": {"cycles": torch.tensor([0.2])},
    }

    def test_means_spread_and_repeats(self):
        figure = cycle_comparison(self.FOUND, "S5")
        digits, other = figure.axes
        repeats = [line.get_ydata().tolist() for line in digits.lines if line.get_marker() == "."]
        np.testing.assert_allclose(repeats, [[10, 6], [12, 10]], rtol=1e-6)
        means = [c[0].get_ydata()[0] for c in digits.containers]
        assert means == pytest.approx([11, 8])
        bar = digits.containers[1][2][0].get_segments()[0][:, 1]
        assert bar == pytest.approx([8 - 8**0.5, 8 + 8**0.5])
        assert [t.get_text() for t in digits.get_xticklabels()] == [
            "Independent runs\n11.0 ± 1.4 %", "cycles\n8.00 ± 2.8 %"]  # fmt: skip
        assert [t.get_text() for t in other.get_xticklabels()] == ["cycles\n20.0 %"]
        assert digits.get_ylim()[0] == 0 and digits.get_ylim()[1] > 12
        assert [axis.get_title() for axis in figure.axes] == ["digits", "other"]
        colours = [c[0].get_color() for c in (digits.containers[1], other.containers[0])]
        assert colours[0] == colours[1]

    def test_rows_are_the_repeats(self):
        rows = cycle_comparison(self.FOUND).rows
        assert len(rows) == 5 and rows[-1]["panel"] == "other"
        assert [row["disagreement"] for row in rows] == pytest.approx([0.1, 0.12, 0.06, 0.1, 0.2])

    @pytest.mark.parametrize(
        ("found", "match"),
        [
            ({}, "disagreement must be of at least one panel; got none"),
            ({"a": {}}, "panel 'a' must be of at least one group; got none"),
            ({"a": {"b": torch.ones(0)}}, "panel 'a' must be of at least one repeat; got none"),
            ({"a": {"b": torch.ones(2), "c": torch.ones(3)}},
             r"group 'c' must be \[n\] with n = 2; got \[3\]"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit(self, found, match):
        with pytest.raises(ValueError, match=f"cycle_comparison: {match}"):
            cycle_comparison(found)
