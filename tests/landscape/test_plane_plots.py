"""Figures of planes, wedges, tunnels and curvature: what is drawn where, and the errors."""

import io

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.image import imread  # noqa: E402

from landscape_fast.landscape.plane_plots import plane_panels, wedge_panels  # noqa: E402
from landscape_fast.landscape.tunnel_plots import curvature_panel, tunnel_panels  # noqa: E402

X, Y = torch.linspace(-1, 4, 11), torch.linspace(-1, 3, 9)
LOSS = 0.5 + (X - 2) ** 2 / 10 + Y[:, None] ** 2 / 10  # [H, W], least at (2, 0)
ANCHORS = torch.tensor([[2.0, 0], [0, 2]])


def panels(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def bar(axis):
    (child,) = axis.child_axes
    return child


def levels(axis):
    return axis.collections[0].levels


def at(axis, x, y):
    """The colour of a panel at a place of its data, as drawn."""
    figure = axis.figure
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    file.seek(0)
    image = imread(file)[::-1, :, :3]
    column, row = axis.transData.transform((x, y))
    return image[int(row), int(column)]


class TestPlanePanels:
    def test_colours_follow_the_values_and_y_goes_up(self):
        figure = plane_panels(X, Y, {"Accuracy": Y[:, None] + 0 * X}, origin=None)
        (axis,) = panels(figure)
        assert axis.get_xlim() == (-1, 4) and axis.get_ylim() == (-1, 3)
        assert levels(axis)[0] == -1 and levels(axis)[-1] == 3
        low, high = at(axis, 3.1, -0.9), at(axis, 3.1, 2.9)
        assert high[:2].sum() > 1 > low[:2].sum()  # viridis: from dark violet to yellow
        assert axis.get_aspect() == 1 and bar(axis).get_ylim() == (-1, 3)

    def test_marks_are_where_they_were_given(self):
        path = torch.tensor([[1.0, 2], [1.5, 1], [2, 0]])
        cloud = torch.tensor([[2.1, 0.1], [1.9, -0.1]])
        figure = plane_panels(
            X, Y, {"Loss (nats)": LOSS, "Accuracy": -LOSS}, ANCHORS, None,
            {"run 1": path}, {"diagonal": cloud}, title="digits",
        )  # fmt: skip
        for axis in panels(figure):
            line = next(line for line in axis.lines if line.get_label() == "run 1")
            np.testing.assert_array_equal(line.get_xydata(), path)
            (dots,) = [c for c in axis.collections if c.get_label() == "Diagonal Gaussian"]
            np.testing.assert_allclose(dots.get_offsets(), cloud)
            named = {text.get_text(): tuple(text.xy) for text in axis.texts if text.get_text()}
            assert named == {"1": (2, 0), "2": (0, 2), "O": (0, 0)}
            arrows = [t for t in axis.texts if not t.get_text()]
            assert (tuple(arrows[-1].xyann), tuple(arrows[-1].xy)) == ((1.5, 1), (2, 0))
        assert [axis.get_title() for axis in panels(figure)] == ["Loss (nats)", "Accuracy"]
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["run 1", "Diagonal Gaussian"]

    def test_a_plane_may_lack_the_origin_and_name_its_corners(self):
        figure = plane_panels(
            X, Y, {"Loss": LOSS}, ANCHORS, ["start", "end"], origin=None, labels=("along", "across")
        )
        (axis,) = panels(figure)
        assert [t.get_text() for t in axis.texts] == ["start", "end"] and not figure.legends
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("along", "across")

    @pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2))])
    def test_every_column_and_row_has_its_label(self, count, shape):
        figure = plane_panels(X, Y, {f"f{i}": LOSS + i for i in range(count)})
        shown = panels(figure)
        assert len(shown) == count
        assert shown[0].get_subplotspec().get_gridspec().get_geometry() == shape
        assert all(axis.get_ylabel() for axis in shown[:: shape[1]])
        assert sum(bool(axis.get_xlabel()) for axis in shown) == min(count, shape[1])

    def test_values_far_apart_are_logarithmic_and_end_at_100_medians(self):
        loss = LOSS.clone()
        loss[0, 0] = 1e30
        axis = panels(plane_panels(X, Y, {"Loss (nats)": loss}))[0]
        ratio = levels(axis)[1:] / levels(axis)[:-1]
        np.testing.assert_allclose(ratio, ratio[0])
        assert levels(axis)[-1] == pytest.approx(100 * float(loss.median()))
        assert axis.collections[0].extend == "max"
        linear = panels(plane_panels(X, Y, {"Loss (nats)": LOSS}))[0]
        np.testing.assert_allclose(np.diff(levels(linear)), np.diff(levels(linear))[0])
        assert linear.collections[0].extend == "neither"

    def test_limits_are_kept_and_what_lies_beyond_is_said(self):
        figure = plane_panels(X, Y, {"a": LOSS}, limits={"a": (0.6, 1.0)})
        axis = panels(figure)[0]
        assert (levels(axis)[0], levels(axis)[-1]) == (0.6, 1.0)
        assert axis.collections[0].extend == "both"

    def test_cells_without_a_number_and_constant_fields(self):
        holes = LOSS.clone()
        holes[-3:, -3:] = torch.nan
        fields = {"holes": holes, "nothing": torch.nan * LOSS, "constant": 0 * LOSS + 2}
        figure = plane_panels(X, Y, fields, origin=None)
        first, second, third = panels(figure)
        np.testing.assert_allclose(at(first, 3.9, 2.9), [217 / 255] * 3, atol=0.01)
        assert [t.get_text() for t in second.texts] == ["no number"]
        assert levels(third)[0] < 2 < levels(third)[-1]

    def test_rows_are_the_grid(self):
        rows = plane_panels(X, Y, {"Loss": LOSS, "b": -LOSS}).rows
        assert len(rows) == 99 and rows[12]["x"] == X[1] and rows[12]["y"] == Y[1]
        assert rows[12]["Loss"] == pytest.approx(float(LOSS[1, 1])) == -rows[12]["b"]

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"fields": {}}, "fields must be of at least one quantity; got none"),
            ({"fields": {"a": LOSS.T}}, r"'a' must be \[H, W\] with H = 9, W = 11; got \[11, 9\]"),
            ({"x": X.flip(0)}, "x must be ascending, two values at least; got"),
            ({"y": Y[:1]}, r"y must be ascending, two values at least; got \[-1.0\]"),
            ({"anchors": torch.ones(2, 3)}, r"anchors must be \[A, 2\]; got \[2, 3\]"),
            ({"anchors": ANCHORS, "names": ["a"]}, r"names must be \[A\] with A = 2; got \[1\]"),
            ({"trajectories": {"r": torch.ones(3)}}, r"trajectory 'r' must be \[T, 2\]; got \[3\]"),
            ({"samples": {"s": torch.ones(3, 3)}}, r"samples 's' must be \[T, 2\]; got \[3, 3\]"),
        ],
    )
    def test_what_does_not_fit(self, change, match):
        with pytest.raises(ValueError, match=f"plane_panels: .*{match}"):
            plane_panels(**{"x": X, "y": Y, "fields": {"Loss": LOSS}} | change)


class TestWedgePanels:
    ANGLE = torch.linspace(0, 1.2, 7)
    RADIUS = torch.linspace(0.2, 1.4, 5)[:, None] * (10 - torch.sin(ANGLE))
    LOSS = 1 + 0 * RADIUS + ANGLE

    def test_the_fan_ends_where_the_path_does(self):
        path = 10 - torch.sin(self.ANGLE)
        nodes = torch.stack([self.ANGLE[::3], path[::3]], 1)
        figure = wedge_panels(
            self.ANGLE, self.RADIUS, {"Loss": self.LOSS, "Accuracy": -self.LOSS}, nodes, path
        )
        for axis in panels(figure):
            assert axis.name == "polar" and axis.get_thetamin() == 0
            assert axis.get_thetamax() == pytest.approx(np.degrees(1.2))
            assert axis.get_rmin() == 0 and axis.get_rmax() == pytest.approx(14)
            drawn = [line.get_xydata() for line in axis.lines]
            np.testing.assert_allclose(drawn[1], torch.stack([self.ANGLE, path], 1))
            np.testing.assert_allclose(drawn[2], nodes)
            named = {text.get_text(): tuple(text.xy) for text in axis.texts}
            assert named["1"] == pytest.approx(nodes[0].tolist())
            assert named["2"] == pytest.approx(nodes[-1].tolist())
        assert bar(panels(figure)[0]).get_ylim() == pytest.approx((1, 2.2))

    def test_rows_are_the_grid(self):
        rows = wedge_panels(self.ANGLE, self.RADIUS, {"Loss": self.LOSS}).rows
        assert len(rows) == 35
        assert rows[8] == pytest.approx(
            {"angle": 0.2, "radius": float(self.RADIUS[1, 1]), "Loss": 1.2}
        )

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"fields": {}}, "fields must be of at least one quantity"),
            ({"radius": RADIUS.T}, r"radius must be \[R, S\] with S = 7; got \[7, 5\]"),
            ({"radius": RADIUS[:1]}, r"with both 2 at least; got \[1, 7\]"),
            ({"fields": {"a": ANGLE}}, r"'a' must be \[R, S\] with R = 5, S = 7; got \[7\]"),
            ({"path": ANGLE[:2]}, r"path must be \[S\] with S = 7; got \[2\]"),
            ({"nodes": ANGLE}, r"nodes must be \[T, 2\]; got \[7\]"),
        ],
    )
    def test_what_does_not_fit(self, change, match):
        given = {"angle": self.ANGLE, "radius": self.RADIUS, "fields": {"Loss": self.LOSS}}
        with pytest.raises(ValueError, match=f"wedge_panels: .*{match}"):
            wedge_panels(**given | change)


class TestTunnelPanels:
    T = torch.linspace(0, 1, 5)

    def test_paths_nodes_and_ends(self):
        paths = {"straight line": (self.T, 1 + self.T), "tunnel": (self.T, 2 - self.T)}
        panels = {"Loss (nats)": paths, "Accuracy (%)": {"tunnel": paths["tunnel"]}}
        figure = tunnel_panels(panels, [0.25, 0.5, 0.75], title="digits")
        loss, accuracy = figure.axes
        line, tunnel = loss.lines[:2]
        np.testing.assert_allclose(line.get_xydata(), torch.stack([self.T, 1 + self.T], 1))
        np.testing.assert_allclose(tunnel.get_ydata(), 2 - self.T)
        assert line.get_linestyle() != tunnel.get_linestyle()
        assert accuracy.lines[0].get_color() == tunnel.get_color()
        assert [end.get_xdata()[0] for end in loss.lines[2:4]] == [0, 1]
        assert [text.get_text() for text in loss.texts] == ["1", "2"]
        assert (
            list(loss.lines[-1].get_xdata()) == [0.25, 0.5, 0.75] and loss.get_yscale() == "linear"
        )
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["straight line", "tunnel", "optimised nodes"]
        assert len(figure.rows) == 15
        second = {"path": "straight line", "position": 0.25, "value": 1.25}
        assert figure.rows[1] == {"quantity": "Loss (nats)"} | second

    def test_values_far_apart_have_a_logarithmic_axis(self):
        figure = tunnel_panels({"Loss": {"line": (self.T, 10.0 ** (4 * self.T))}})
        assert figure.axes[0].get_yscale() == "log"

    @pytest.mark.parametrize(
        ("panels", "match"),
        [
            ({}, "panels must be of at least one quantity; got none"),
            ({"a": {}}, r"panels\['a'\] must be of at least one path; got none"),
            ({"a": {"b": (T, T)}, "c": {}}, r"panels\['c'\] must be of at least one path"),
            ({"a": {"b": ([], [])}}, "positions of 'b' must be of at least one point; got none"),
            ({"a": {"b": (T, T[:2])}}, r"values of 'b' must be \[S\] with S = 5; got \[2\]"),
        ],
    )
    def test_what_does_not_fit(self, panels, match):
        with pytest.raises(ValueError, match=f"tunnel_panels: {match}"):
            tunnel_panels(panels)


class TestCurvaturePanel:
    T = torch.linspace(0, 1, 3)
    VALUES = torch.tensor([[1.0, 3], [2, 1], [4, 5]])

    def test_eigenvalues_are_sorted_and_the_trace_has_its_error(self):
        figure = curvature_panel(self.T, self.VALUES, 10 + self.T, 0 * self.T + 2, title="path")
        values, trace = figure.axes
        drawn = [line.get_ydata().tolist() for line in values.lines]
        assert drawn == [[3, 2, 5], [1, 1, 4]]
        assert trace.lines[0].get_ydata().tolist() == [10, 10.5, 11]
        band = trace.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == 8 and band.max() == 13
        assert values.get_yscale() == trace.get_yscale() == "linear"
        second = {"position": 0.5, "eigenvalue_1": 2, "eigenvalue_2": 1, "trace": 10.5}
        assert figure.rows[1] == second | {"trace_error": 2}

    @pytest.mark.parametrize(
        ("values", "scale"),
        [([1.0, 2, 3], "linear"), ([1.0, 2, 90], "log"), ([-1.0, 2, 900], "symlog"),
         ([-1.0, 2, 3], "linear"), ([0.0, 2, 900], "linear")],
    )  # fmt: skip
    def test_scales(self, values, scale):
        figure = curvature_panel(self.T, torch.tensor(values)[:, None])
        (axis,) = figure.axes
        assert axis.get_yscale() == scale and figure.rows[0]["trace"] is None

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"positions": []}, "positions must be of at least one point; got none"),
            ({"eigenvalues": T}, r"eigenvalues must be \[S, k\] with S = 3; got \[3\]"),
            ({"trace": T[:2]}, r"trace must be \[S\] with S = 3; got \[2\]"),
            ({"trace_error": T}, "trace must be given with trace_error; got none"),
        ],
    )
    def test_what_does_not_fit(self, change, match):
        with pytest.raises(ValueError, match=f"curvature_panel: {match}"):
            curvature_panel(**{"positions": self.T, "eigenvalues": self.VALUES} | change)
