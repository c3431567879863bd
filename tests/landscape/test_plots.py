"""Figures are checked by what is drawn: values, positions, colours and words."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch

from landscape_fast.landscape.diversity import diversity_points, lower_limit, upper_limit
from landscape_fast.metrics.reliability import reliability_bins

pytest.importorskip("matplotlib")
from landscape_fast.landscape import _figure, plots  # noqa: E402


def matrix(members, scale):
    found = scale * (1 + torch.arange(members * members).reshape(members, members) / members**2)
    found = (found + found.T) / 2
    return found.fill_diagonal_(0)


def texts(figure):
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def png(figure):
    """The figure as pixels [height, width, 3]; drawing must not fail."""
    from matplotlib.image import imread

    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return imread(file)[..., :3]


@pytest.fixture
def maps():
    return {
        "deep": {"disagreement": matrix(4, 0.05), "js": matrix(4, 0.02)},
        "batch": {"disagreement": matrix(4, 0.005), "js": matrix(4, 0.0002)},
    }


def test_heat_maps_show_the_matrices_in_percent_and_millinats(maps):
    figure = plots.heat_maps(maps, "digits: pairs")
    axes, bars = figure.axes[:4], figure.axes[4:]
    assert len(bars) == 2
    shown = [axis.images[0].get_array() for axis in axes]
    order = [
        ("deep", "disagreement", 100),
        ("deep", "js", 1000),
        ("batch", "disagreement", 100),
        ("batch", "js", 1000),
    ]
    for array, (method, kind, scale) in zip(shown, order, strict=True):
        assert np.array_equal(array.mask, np.eye(4, dtype=bool))
        np.testing.assert_allclose(array.filled(0), maps[method][kind].double() * scale)
    # one scale per kind, from 0 to the largest value of any method
    for column, (kind, scale) in enumerate((("disagreement", 100), ("js", 1000))):
        limits = {axis.images[0].get_clim() for axis in axes[column::2]}
        assert limits == {(0.0, float(maps["deep"][kind].double().max() * scale))}
    assert [bar.get_ylabel() for bar in bars] == [
        "Disagreement (% of test rows)",
        "Jensen–Shannon divergence (10⁻³ nats)",
    ]
    assert "digits: pairs" in texts(figure)
    assert axes[0].get_title().startswith("Deep ensemble: mean ")
    assert axes[0].get_title().endswith("%") and axes[3].get_title().endswith("×10⁻³ nats")
    assert axes[2].get_title().startswith("BatchEnsemble")


def test_small_maps_are_annotated_and_large_ones_are_not(maps):
    small = plots.heat_maps(maps).axes[0]
    cells = {t.get_position(): t.get_text() for t in small.texts}
    assert len(cells) == 12
    expected = 100 * maps["deep"]["disagreement"]
    assert all(
        float(text) == pytest.approx(float(expected[i, j]), rel=0.01)
        for (j, i), text in cells.items()
    )
    large = {"deep": {"disagreement": matrix(13, 0.1), "js": matrix(13, 0.1)}}
    assert not plots.heat_maps(large).axes[0].texts


def test_annotations_stand_out_from_their_cells(maps):
    """Text and cell differ in luminance by more than 4:1 (WCAG asks 3:1 of large text)."""

    def luminance(colour):
        parts = np.array(colour[:3])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    from matplotlib.colors import to_rgb

    image = plots.heat_maps(maps).axes[0].images[0]
    for value in np.linspace(0, image.norm.vmax, 50):
        cell = luminance(image.cmap(image.norm(value)))
        text = luminance(to_rgb(_figure.text_colour(image.cmap(image.norm(value)))))
        light, dark = max(cell, text) + 0.05, min(cell, text) + 0.05
        assert light / dark > 4, value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123, "0.012"),
        (0.5, "0.50"),
        (9.994, "9.99"),
        (15, "15.0"),
        (123.4, "123"),
        (1e-5, "1e-05"),
    ],
)
def test_numbers_in_cells(value, text):
    assert _figure.short_number(value) == text


def test_equal_members_and_one_member_can_be_drawn():
    zero = {"disagreement": torch.zeros(3, 3), "js": torch.zeros(3, 3)}
    figure = plots.heat_maps({"batch": zero})
    assert figure.axes[0].get_title() == "BatchEnsemble: mean 0%"
    one = {"disagreement": torch.zeros(1, 1), "js": torch.zeros(1, 1)}
    assert "one member" in plots.heat_maps({"other": one}).axes[0].get_title()
    assert png(figure).std() > 0.01


@pytest.fixture
def curves():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(5, (400,), generator=generator)
    found = {}
    for method, sharpness in (("single", 3.0), ("deep", 1.5)):
        logits = torch.randn(400, 5, generator=generator)
        logits[torch.arange(400), y] += 2
        found[method] = reliability_bins((sharpness * logits).softmax(-1), y)
    return found


def test_reliability_bars_are_the_bins(curves):
    figure = plots.reliability_diagram(curves, "calibration")
    assert len(figure.axes) == 4
    for column, (method, curve) in enumerate(curves.items()):
        top, bottom = figure.axes[column], figure.axes[2 + column]
        used = curve.counts > 0
        bars, gaps = top.containers
        assert [b.get_height() for b in bars] == pytest.approx(curve.accuracy[used].tolist())
        ends = [g.get_y() + g.get_height() for g in gaps]
        assert ends == pytest.approx(curve.confidence[used].tolist())
        centres = (curve.edges[:-1] + curve.edges[1:]) / 2
        middle = [b.get_x() + b.get_width() / 2 for b in bars]
        assert middle == pytest.approx(centres[used].tolist())
        pale = [b.get_alpha() is not None for b in bars]
        assert pale == (curve.counts[used] < 10).tolist() and any(pale)
        (diagonal,) = top.get_lines()
        assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
        heights = [b.get_height() for b in bottom.containers[0]]
        assert heights == curve.counts.tolist() and bottom.get_yscale() == "log"
        assert [int(t.get_text()) for t in bottom.texts] == curve.counts[used].tolist()
        assert top.get_title() == f"{_figure.NAMES[method]}   ECE {float(curve.ece):.2%}"
    words = texts(figure)
    assert {
        "calibration",
        "Accuracy (fraction right)",
        "Test rows",
        "perfect calibration",
        "accuracy (pale: fewer than 10 rows)",
        "gap to mean confidence",
    } <= set(words)


def test_a_method_has_one_colour_in_all_figures(curves):
    from matplotlib.colors import to_hex

    figure = plots.reliability_diagram(curves)
    assert (
        to_hex(figure.axes[1].containers[0][0].get_facecolor()).upper() == _figure.COLOURS["deep"]
    )
    plane = plots.accuracy_diversity(plane_points(), 10)
    assert _figure.COLOURS["deep"] in [
        to_hex(c).upper() for s in plane.axes[0].collections for c in s.get_facecolor()
    ]


def plane_points():
    targets = torch.arange(200) % 10
    base = targets.clone()
    base[:8] = (base[:8] + 1) % 10  # 96 % right
    members = base.repeat(3, 1)
    members[0, 4:12] = (targets[4:12] + 3) % 10
    members[1, :3] = targets[:3]
    members[2, :3] = targets[:3]
    return {
        "deep": diversity_points(members, base, targets),
        "batch": diversity_points(base[None], base, targets),
    }


def test_the_plane_has_members_bases_and_limits():
    points = plane_points()
    figure = plots.accuracy_diversity(points, 10, "plane")
    axis = figure.axes[0]
    scatters = {
        s.get_label(): s.get_offsets().tolist()
        for s in axis.collections
        if not s.get_label().startswith("_")
    }
    deep = points["deep"]
    pairs = set(zip((100 * deep.accuracy).tolist(), deep.normalised.tolist(), strict=True))
    assert {tuple(p) for p in scatters["Deep ensemble: other members"]} == pairs
    assert scatters["Deep ensemble: first member (base)"] == [[pytest.approx(96.0), 0.0]]
    assert scatters["BatchEnsemble: other members"] == [[pytest.approx(96.0), 0.0]]
    assert [t.get_text() for t in axis.texts] == ["×2"]  # two members coincide
    upper, lower = axis.get_lines()
    for line, limit in ((upper, upper_limit), (lower, lower_limit)):
        x, y = (torch.tensor(np.array(v)) for v in line.get_data())
        torch.testing.assert_close(y, limit(x / 100, 0.96, 10) / (1 - x / 100))
    assert lower.get_xdata().max() <= 96.0
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    for x, y in pairs | {(96.0, 0.0)}:
        assert left < x < right and bottom < y < top
    assert axis.get_title() == "plane" and "accuracy" in axis.get_xlabel()


def test_the_plane_leaves_out_what_has_no_place():
    """A member without errors has no normalised disagreement."""
    targets = torch.arange(50) % 5
    base = targets.clone()
    base[0] = 1
    points = {"deep": diversity_points(targets[None], base, targets)}
    figure = plots.accuracy_diversity(points, 5)
    assert np.isfinite(figure.axes[0].get_ylim()).all()
    assert png(figure).std() > 0.01


def test_a_base_at_chance_has_no_lower_limit():
    """Replaced labels are no worse than those of a base that is right on 1 row in 20."""
    targets = torch.arange(200) % 10
    base = (targets + 1) % 10
    base[:10] = targets[:10]
    points = {"batch": diversity_points(base.roll(1)[None], base, targets)}
    figure = plots.accuracy_diversity(points, 10)
    (line,) = figure.axes[0].get_lines()
    assert line.get_label().startswith("upper limit")
    assert png(figure).std() > 0.01


@pytest.mark.parametrize(
    "plot",
    [
        plots.heat_maps,
        plots.reliability_diagram,
        lambda methods: plots.accuracy_diversity(methods, 10),
    ],
)
def test_nothing_to_draw_is_refused(plot):
    with pytest.raises(ValueError, match="must be of at least one method; got none"):
        plot({})


def test_plots_need_no_display_and_no_pyplot(tmp_path):
    code = (
        "import sys, torch; from landscape_fast.landscape import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "m = torch.zeros(2, 2)\n"
        "plots.heat_maps({'deep': {'disagreement': m, 'js': m}}).savefig('a.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, maps):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"heat_maps: matplotlib must be installed; .*\[plot\]"):
        plots.heat_maps(maps)
