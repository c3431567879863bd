"""Figures of functions: what is drawn, in which colours and limits, and the errors."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402

from landscape_fast.landscape import _figure  # noqa: E402
from landscape_fast.landscape.diversity import correlated_family, lower_limit  # noqa: E402
from landscape_fast.landscape.function_plots import (  # noqa: E402
    diversity_plane,
    function_map,
    similarity_maps,
)

RUNS = [3, 3, 3, 7, 7]


def pairs():
    value = torch.tensor([[0.3 if a == b else 0.1 for a in RUNS] for b in RUNS])
    return 1 - value.fill_diagonal_(0), value


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


class TestSimilarityMaps:
    def test_shows_both_matrices_and_where_the_run_changes(self):
        cosine, disagreement = pairs()
        figure = similarity_maps(cosine, disagreement, RUNS, title="digits")
        left, right, *bars = figure.axes
        np.testing.assert_allclose(left.images[0].get_array(), cosine)
        np.testing.assert_allclose(right.images[0].get_array(), 100 * disagreement, rtol=1e-6)
        assert left.images[0].get_clim() == (0, 1)
        assert right.images[0].get_clim() == pytest.approx((0, 30))
        assert [bar.get_ylabel() for bar in bars] == [
            "Cosine similarity of the weights", "Disagreement (% of rows)"]  # fmt: skip
        for axis in (left, right):
            assert [line.get_ydata()[0] for line in axis.lines[::2]] == [2.5]
            assert [tick.get_text() for tick in axis.get_xticklabels()] == ["3", "7"]
            assert axis.get_xticks().tolist() == [1, 3.5]
        assert left.get_title() == "within a run: mean 0.70, across: mean 0.90"
        assert right.get_title() == "within a run: mean 30.0 %, across: mean 10.0 %"
        assert figure.get_suptitle() == "digits"

    def test_rows_are_the_pairs(self):
        cosine, disagreement = pairs()
        rows = similarity_maps(cosine, disagreement, RUNS, [0, 1, 2, 0, 1]).rows
        assert len(rows) == 15 and all(row["i"] <= row["j"] for row in rows)
        for row in rows:
            i, j = row["i"], row["j"]
            assert row["cosine"] == float(cosine[i, j])
            assert row["disagreement"] == float(disagreement[i, j])
            assert (row["run_i"], row["run_j"]) == (RUNS[i], RUNS[j])
            assert (row["epoch_i"], row["epoch_j"]) == (i % 3, j % 3)

    def test_a_single_run_has_epochs_and_no_lines(self):
        cosine, disagreement = pairs()
        figure = similarity_maps(cosine, disagreement, [1] * 5, [0, 5, 10, 15, 20])
        axis = figure.axes[0]
        assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "5", "10", "15", "20"]
        assert not axis.lines and axis.get_xlabel() == "checkpoint of run 1 (epoch)"
        assert "across" not in axis.get_title()
        one = similarity_maps(torch.ones(1, 1), torch.zeros(1, 1), [0])
        assert one.axes[0].get_title() == "one checkpoint"

    def test_a_few_untrained_networks_do_not_fill_the_colours(self):
        """90 % against 20 % of everything else; the colour bar says that there is more."""
        runs = [0] * 5 + [1] * 5  # every fifth checkpoint is one before training
        disagreement = torch.full((10, 10), 0.2).fill_diagonal_(0)
        disagreement[::5] = disagreement[:, ::5] = 0.9
        figure = similarity_maps(torch.eye(10), disagreement, runs)
        assert figure.axes[1].images[0].get_clim() == pytest.approx((0, 24))
        assert figure.axes[1].images[0].colorbar.extend == "max"
        assert figure.axes[0].images[0].colorbar.extend == "neither"

    def test_cells_without_a_number_are_grey(self):
        cosine, disagreement = pairs()
        cosine[0, 1] = disagreement[0, 1] = torch.nan
        axis = similarity_maps(cosine, disagreement, RUNS).axes[0]
        assert np.argwhere(axis.images[0].get_array().mask).tolist() == [[0, 1]]
        assert to_hex(axis.get_facecolor()).upper() == _figure.NO_VALUE
        assert axis.get_title() == "within a run: mean 0.70, across: mean 0.90"

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"runs": []}, "runs must be of at least one checkpoint; got none"),
            ({"runs": [0, 1, 0, 1, 1]}, "one run in succession; got 4 changes of run"),
            ({"cosine": torch.eye(4)}, r"cosine must be \[S, S\] with S = 5; got \[4, 4\]"),
            ({"disagreement": torch.ones(5)}, r"disagreement must be \[S, S\].*; got \[5\]"),
            ({"epochs": [1]}, r"epochs must be \[S\] with S = 5; got \[1\]"),
        ],
    )
    def test_what_does_not_fit(self, change, match):
        cosine, disagreement = pairs()
        arguments = {"cosine": cosine, "disagreement": disagreement, "runs": RUNS} | change
        with pytest.raises(ValueError, match=f"similarity_maps: .*{match}"):
            similarity_maps(**arguments)


class TestFunctionMap:
    POINTS = torch.tensor([[0.0, 0], [1, 1], [2, 1], [5, 5], [6, 4]])

    def test_a_path_goes_through_the_epochs_and_grows(self):
        figure = function_map(self.POINTS, RUNS, [2, 0, 1, 0, 1], criterion="ratio 1.9")
        axis = figure.axes[0]
        first, second = axis.lines
        assert first.get_xydata().tolist() == [[1, 1], [2, 1], [0, 0]]
        assert second.get_xydata().tolist() == [[5, 5], [6, 4]]
        assert first.get_color() != second.get_color()
        sizes = axis.collections[0].get_sizes()
        assert (np.diff(sizes) > 0).all() and axis.collections[1].get_sizes()[0] == sizes[0]
        assert [(t.get_text(), tuple(t.xy)) for t in axis.texts] == [("3", (0, 0)), ("7", (6, 4))]
        assert figure.get_supxlabel() == "ratio 1.9"
        assert labels(figure.legends[0]) == ["run 3", "run 7"]

    def test_samples_are_hollow_squares_in_the_colour_of_their_run(self):
        near = torch.tensor([[0.5, 0], [6.0, 5], [0.1, 0.2]])
        figure = function_map(self.POINTS, RUNS, None, {"random": (near, [3, 7, 3])})
        axis = figure.axes[0]
        own, squares, _, others = axis.collections
        np.testing.assert_allclose(squares.get_offsets(), near[[0, 2]])
        np.testing.assert_allclose(others.get_offsets(), near[[1]])
        assert (squares.get_edgecolors()[0][:3] == own.get_facecolors()[0][:3]).all()
        assert len(squares.get_facecolors()) == 0
        assert len(squares.get_paths()[0]) == 5  # four corners, closed
        assert labels(figure.legends[0])[-1] == "Random directions"

    def test_rows_are_the_points(self):
        near = torch.tensor([[0.5, 0.25]])
        rows = function_map(self.POINTS, RUNS, None, {"dropout": (near, [7])}).rows
        assert [row["epoch"] for row in rows] == [0, 1, 2, 0, 1, None]
        assert [row["run"] for row in rows] == [*RUNS, 7]
        assert rows[3] == {"kind": "checkpoint", "run": 7, "epoch": 0, "x": 5, "y": 5}
        assert rows[-1]["kind"] == "dropout" and (rows[-1]["x"], rows[-1]["y"]) == (0.5, 0.25)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"points": torch.ones(5, 3)}, r"points must be \[S, 2\] with S = 5.*; got \[5, 3\]"),
            ({"runs": []}, "runs must be of at least one checkpoint"),
            ({"epochs": [1, 2]}, r"epochs must be \[S\] with S = 5; got \[2\]"),
            ({"samples": {"a": (torch.ones(2, 2), [3])}}, r"samples 'a' must be \[n, 2\].*n = 1"),
            ({"samples": {"a": (torch.ones(1, 2), [4])}}, r"of the runs \[3, 7\]; got \[4\]"),
        ],
    )
    def test_what_does_not_fit(self, change, match):
        with pytest.raises(ValueError, match=f"function_map: .*{match}"):
            function_map(**{"points": self.POINTS, "runs": RUNS} | change)


class TestDiversityPlane:
    POINTS = {
        "random": (torch.tensor([0.6, 0.65]), torch.tensor([0.2, 0.1])),
        "mine": (torch.tensor([0.5]), torch.tensor([0.4])),
    }
    OPTIMA = (torch.tensor([0.7, 0.72]), torch.tensor([0.21, 0.2]))

    def test_points_are_accuracy_and_normalised_diversity(self):
        figure = diversity_plane(self.POINTS, 0.7, 10, self.OPTIMA)
        drawn = {c.get_label(): c.get_offsets() for c in figure.axes[0].collections}
        np.testing.assert_allclose(drawn["Random directions"], [[60, 0.5], [65, 0.1 / 0.35]], 1e-6)
        np.testing.assert_allclose(drawn["mine"], [[50, 0.8]])
        np.testing.assert_allclose(drawn["Independent runs"], [[70, 0.7], [72, 0.2 / 0.28]], 1e-6)
        np.testing.assert_allclose(drawn["reference"], [[70, 0]])
        low, high = figure.axes[0].get_xlim()
        assert low < 50 and high > 72 and figure.axes[0].get_ylim()[1] > 0.8

    def test_limits_families_and_fit_are_the_formulas(self):
        figure = diversity_plane(self.POINTS, 0.7, 10, None, (0.2, 1.0), (0.37, 0.0065))
        lines = {line.get_label().split("\n")[0]: line for line in figure.axes[0].lines}
        low = lines["lower limit: randomly replaced"]
        accuracy = torch.from_numpy(low.get_xdata() / 100)
        np.testing.assert_allclose(
            low.get_ydata(), lower_limit(accuracy, 0.7, 10) / (1 - accuracy), atol=1e-12
        )
        for exponent, name in ((0.2, "family, exponent 0.2"), (0.37, "fit: exponent 0.37")):
            line = lines[name]
            p = torch.tensor([0.0, *np.logspace(-6, 0, 400)]).double()
            a, d = correlated_family(p, exponent, 0.7, 10)
            np.testing.assert_allclose(line.get_xdata(), 100 * a, rtol=1e-5)
            np.testing.assert_allclose(line.get_ydata(), d / (1 - a), rtol=1e-4, atol=1e-9)
        fit, other = lines["fit: exponent 0.37"], lines["family, exponent 1"]
        assert fit.get_linewidth() > other.get_linewidth()
        dashes = {lines[f"family, exponent {e}"].get_linestyle() for e in (0.2, 1)}
        assert dashes == {"--"} and "rms distance 0.0065" in str(
            [line.get_label() for line in lines.values()]
        )

    def test_functions_without_errors_are_left_out_and_counted(self):
        points = {"a": (torch.tensor([1.0, 1.0, 0.9]), torch.tensor([0.1, 0.0, 0.1]))}
        figure = diversity_plane(points, 0.95, 10)
        cloud = figure.axes[0].collections[-2]
        np.testing.assert_allclose(cloud.get_offsets(), [[90, 1]], rtol=1e-6)
        assert cloud.get_label() == "a\n(2 without a diversity)"
        assert np.isfinite(figure.axes[0].get_ylim()).all()
        found = [row["normalised"] for row in figure.rows]
        assert found[0] == np.inf and np.isnan(found[1]) and found[2] == pytest.approx(1)

    def test_rows_are_the_points(self):
        rows = diversity_plane(self.POINTS, 0.7, 10, self.OPTIMA).rows
        ways = [row["way"] for row in rows]
        assert ways == ["random", "random", "mine", "optimum", "optimum", "reference"]
        assert rows[-1]["accuracy"] == 0.7 and rows[-1]["normalised"] == 0
        assert rows[2]["disagreement"] == pytest.approx(0.4)

    @pytest.mark.parametrize(
        ("points", "optima", "match"),
        [
            ({}, None, "points must be of at least one way; got none"),
            ({"a": (torch.ones(2), torch.ones(3))}, None,
             r"disagreement of 'a' must be \[S\] with S = 2; got \[3\]"),
            ({}, (torch.ones(2, 2), torch.ones(2)), r"accuracy of 'optima' must be \[S\]; got"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit(self, points, optima, match):
        with pytest.raises(ValueError, match=f"diversity_plane: {match}"):
            diversity_plane(points, 0.7, 10, optima)


def test_known_ways_keep_their_style_and_others_take_what_is_left():
    alone = _figure.series_styles(["diagonal"])["diagonal"]
    names = ["mine", "random", "diagonal", "yours"]
    styles = _figure.series_styles(names)
    assert list(styles) == names and styles["diagonal"] == alone
    assert len({style["color"] for style in styles.values()}) == 4
    many = _figure.series_styles([f"way {place}" for place in range(20)])
    looks = {tuple(style.values()) for style in many.values()}
    assert len(looks) == 20
    known = _figure.series_styles(_figure._WAYS)
    assert len({(s["linestyle"], s["marker"]) for s in known.values()}) == len(known)  # in grey
    mixed = _figure.series_styles([*_figure._WAYS, *many])
    assert len({(s["color"], s["marker"]) for s in mixed.values()}) == len(mixed)  # without lines


def test_a_long_title_takes_several_lines():
    figure = _figure.new_figure(4.4, 3)
    title = "digits: cycles of one run against independent runs of as many epochs"
    _figure.add_title(figure, title)
    lines = figure.get_suptitle().split("\n")
    assert " ".join(lines) == title and len(lines) > 1
    text = figure.texts[0].get_window_extent()
    assert text.width < figure.bbox.width


def test_a_short_logarithmic_axis_has_plain_numbers():
    figure = _figure.new_figure(4, 3)
    axis = figure.subplots()
    axis.plot([0.02, 0.7])
    _figure.scale_values(axis, np.array([0.02, 0.7, np.nan]))
    figure.canvas.draw()
    low, high = axis.get_ylim()
    shown = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert axis.get_yscale() == "log" and shown == ["0.02", "0.05", "0.1", "0.2", "0.5"]
