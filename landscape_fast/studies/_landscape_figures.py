"""The figures of a landscape report, drawn from what was measured."""

from collections.abc import Callable
from typing import Any

from landscape_fast.landscape import (
    OodReport,
    SizeCurve,
    curvature_panel,
    diversity_plane,
    function_map,
    ood_bars,
    path_panels,
    plane_panels,
    shift_panels,
    similarity_maps,
    size_curve_panels,
)
from landscape_fast.studies._landscape_claims import mean_elsewhere
from landscape_fast.studies._landscape_measure import Diversity, Likeness, clusters
from landscape_fast.studies._landscape_shift import SINGLE, Shift, mean_over_runs
from landscape_fast.studies._landscape_space import Curvature, Radial, Starts

EXPONENTS = (0.1, 0.5, 1.0)  # of the families drawn beside the fit


def likeness_figures(found: Likeness, name: str) -> dict[str, Callable[[], Any]]:
    """Matrices of weights and of functions, and the map of functions."""

    def matrices():
        title = f"{name}: how alike checkpoints are"
        return similarity_maps(
            found.cosine, found.disagreement, found.runs, found.epochs, title=title
        )

    def functions():
        title = f"{name}: t-SNE of what checkpoints predict"
        return function_map(
            found.points, found.runs, found.epochs, criterion=_distances(found), title=title
        )

    drawn = {"similarity": matrices}
    return drawn | ({} if found.points is None else {"functions": functions})


def _distances(found: Likeness) -> str:
    across, within = clusters(found)
    if not across == across or not within == within:  # NaN: one run, or no trajectory
        return ""
    return (
        f"Distances of all probabilities, second half of training: at least {across:.3g} across "
        f"runs, at most {within:.3g} within one (ratio {across / within:.3g})"
    )


def sample_map(found: Likeness, places, name: str):
    """Checkpoints and samples in one map."""
    points, samples = places
    title = f"{name}: t-SNE of checkpoints and samples around the solutions"
    return function_map(points, found.runs, found.epochs, samples, _distances(found), title=title)


def diversity_figure(found: Diversity, classes: int, name: str):
    """The plane around one run."""
    fit = None if found.fit is None else (found.fit.exponent, found.fit.rmse)
    points = {way: (accuracy, away) for way, (_, accuracy, away) in found.points.items()}
    optima = found.optima if len(found.optima[0]) else None
    title = f"{name}: diversity around the solution of run {found.run}"
    return diversity_plane(
        points, found.accuracy, classes, optima, exponents=EXPONENTS, fit=fit, title=title
    )


def size_figure(found: dict[str, SizeCurve], name: str):
    """Scores by ensemble size."""
    panels = {
        label: {
            way: (c.sizes, factor * getattr(c, key), factor * getattr(c, f"{key}_std"))
            for way, c in found.items()
        }
        for label, key, factor in (
            ("Test accuracy (%)", "accuracy", 100.0),
            ("Brier score", "brier", 1.0),
            ("NLL (nats)", "nll", 1.0),
        )
    }
    return size_curve_panels(panels, f"{name}: ensembles of every size")


def shift_figure(found: Shift, name: str):
    """Scores by severity."""
    curves, levels = mean_over_runs(found.curves.curves), found.curves.severity
    panels = {
        label: {
            way: (levels, factor * scores[key])
            for way, scores in curves.items()
            if way != SINGLE or key != "js"
        }
        for label, key, factor in (
            ("Accuracy (%)", "accuracy", 100.0),
            ("Brier score", "brier", 1.0),
            ("Jensen-Shannon divergence (nats)", "js", 1.0),
        )
    }
    count = len(found.corruptions)
    title = f"{name}: mean over {count} corruptions, {found.curves.members} networks each"
    return shift_panels(panels, title)


def ood_figure(found: OodReport, name: str):
    """Divergence and detection by set of images."""
    js = mean_elsewhere(found, "js")
    sets = list(next(iter(js.values())))
    auroc = mean_auroc(found)
    panels = {
        "Jensen-Shannon divergence (nats)": {s: {w: v[s] for w, v in js.items()} for s in sets},
        "AUROC of the entropy": {s: {w: v[s] for w, v in auroc.items()} for s in sets},
    }
    return ood_bars(panels, f"{name}: images from elsewhere, {found.members} networks each")


def mean_auroc(found: OodReport, kind: str = "entropy") -> dict[str, dict[str, float]]:
    """Way to set of images to the area under the ROC curve, mean over runs."""
    means: dict[str, dict[str, list[float]]] = {}
    for group, sets in found.unknown.items():
        way = means.setdefault(group.partition("/")[0], {})
        for s, scores in sets.items():
            way.setdefault(s, []).append(float(scores.detection[kind].auroc))
    return {w: {s: sum(v) / len(v) for s, v in sets.items()} for w, sets in means.items()}


def radial_figure(found: Radial, name: str):
    """Loss, accuracy, and agreement and diversity with both solutions over the radial plane."""
    plane = found.map
    fields = {
        "Test NLL (nats)": plane.loss,
        "Test accuracy (%)": 100 * plane.accuracy,
        "Agreement with solution 1 (%)": 100 * plane.agreement[0],
        "Agreement with solution 2 (%)": 100 * plane.agreement[1],
    }
    limits = {label: (0.0, 100.0) for label in fields if "%" in label}
    for k, apart in enumerate(plane.normalised_disagreement, 1):
        label = f"Disagreement with solution {k} / error rate"
        fields[label], limits[label] = apart, (0.0, 1.5)  # near 1 where both are mostly wrong
    return plane_panels(
        plane.x,
        plane.y,
        fields,
        anchors=plane.anchors_at,
        trajectories={f"run {r}": at for r, at in found.trajectories.items()} or None,
        samples=None if found.samples is None else {"diagonal": found.samples},
        limits=limits,
        title=f"{name}: the plane through the origin and two solutions",
    )


def start_figure(found: Starts, name: str):
    """Loss along the lines from the first weights to the last."""
    t = found.t.tolist()
    lines = [(f"run {r}", r) for r in range(len(found.loss))]
    panels = {
        "training NLL (nats)": {run: (t, found.loss[r].tolist()) for run, r in lines},
        "training accuracy (%)": {run: (t, (100 * found.accuracy[r]).tolist()) for run, r in lines},
    }
    xlabel = "position from the first weights (0) to the last (1)"
    return path_panels(panels, xlabel, f"{name}: the straight line from start to solution")


def curvature_figure(found: Curvature, line: str, name: str):
    """Largest eigenvalue and trace along one line."""
    return curvature_panel(
        found.t, found.top[line][:, None], found.trace[line], found.trace_se[line],
        xlabel=f"position, {line}", title=f"{name}: curvature of the training loss",
    )  # fmt: skip
