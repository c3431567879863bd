"""Where the runs of a landscape report lie in weight space: plane, ray, line from the start."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.landscape import PlaneMap, curvature_along, project, radial_map
from landscape_fast.landscape._points import Points, score_points
from landscape_fast.methods.sweep import exact_accuracy
from landscape_fast.nn.geometry import Plane, radial_plane
from landscape_fast.ops import gram
from landscape_fast.studies._landscape_bench import Bench, Rows
from landscape_fast.studies._landscape_measure import Samples

ANGLES = 19  # of the arc at the radius of the optima, every five degrees


class Radial(NamedTuple):
    """The plane through the origin and the solutions of the first two runs.

    Attributes:
        map: on the grid.
        trajectories: run to [T, 2], its checkpoints in the plane.
        samples: [S, 2], samples of the diagonal Gaussians around both solutions; or None.
        angle: [A] degrees, from the first solution to the second, of points at their radius.
        arc: scores of these A points.
        end: the angle of the second solution.
        disagreement: of the two solutions, on the rows of the plane.
    """

    map: PlaneMap
    trajectories: dict[int, Tensor]
    samples: Tensor | None
    angle: Tensor
    arc: Points
    end: float
    disagreement: float


def measure_radial(bench: Bench, samples: dict[str, Samples]) -> Radial:
    """The radial plane of runs 0 and 1; needs two runs."""
    optima, rows = bench.weights[:2], bench.test.first(bench.settings.map_rows)
    axes = radial_plane(gram(optima).cpu())
    trajectories = {}
    if bench.run.trajectories is not None:
        for r in (0, 1):
            trajectories[r] = project(bench.checkpoints[r].to(bench.device), optima, axes).at
    cloud = None
    if "diagonal" in samples:
        cloud = project(samples["diagonal"].weights[:2].flatten(0, 1), optima, axes).at
    around = torch.cat([*trajectories.values(), *([] if cloud is None else [cloud])] or [
        torch.zeros(1, 2, dtype=torch.float64)
    ])  # fmt: skip
    found = bench.kept("radial plane", lambda **given: radial_map(
        bench.model, optima, rows.x, rows.y, points=bench.settings.plane_points, around=around,
        **given,
    ))  # fmt: skip
    first, second = found.anchors_at
    end = math.degrees(math.atan2(float(second[1]), float(second[0])))
    angle = torch.linspace(0, end, ANGLES, dtype=torch.float64)
    arc = _arc(bench, optima, axes, angle, end, rows)
    labels = bench.logits(optima, rows, "optima of the plane").argmax(-1)
    apart = float((labels[0] != labels[1]).double().mean())
    return Radial(found, trajectories, cloud, angle, arc, end, apart)


def _arc(bench: Bench, optima: Tensor, axes: Plane, angle: Tensor, end: float, rows: Rows):
    """`Points` whose radius goes from that of the first solution to that of the second."""
    norms = optima.double().norm(dim=1).cpu()
    radius = norms[0] + (norms[1] - norms[0]) * angle / end
    angle = angle.deg2rad()
    coeffs = axes.at(radius * angle.cos(), radius * angle.sin())
    about = ("landscape", bench.model, optima, coeffs, rows.x, rows.y)
    return bench.kept(
        "arc of the plane", lambda **given: score_points(*about, agree_with=(0, 1), **given)
    )


class Starts(NamedTuple):
    """The straight lines from the first weights of every run to its last.

    Attributes:
        t: [S], 0 at the first weights.
        loss: [R, S], mean cross-entropy on training rows, nats.
        accuracy: [R, S].
    """

    t: Tensor
    loss: Tensor
    accuracy: Tensor


def measure_starts(bench: Bench) -> Starts:
    """Losses on training rows; needs the weights before training."""
    count = bench.settings.path_points
    t, losses, accuracies = torch.linspace(0, 1, count, dtype=torch.float64), [], []
    for r in range(bench.R):
        found = bench.sweep(line_of(bench, r, t), count, bench.train, f"line from start {r}")
        losses.append(found.loss.double())
        accuracies.append(exact_accuracy(found.accuracy, len(bench.train.y)))
    return Starts(t, torch.stack(losses), torch.stack(accuracies))


def line_of(bench: Bench, r: int, t: Tensor):
    """Weights along the line from the start of run r to its solution, as `sweep` takes them."""
    return between(bench.checkpoints[r, 0].to(bench.device), bench.weights[r], t)


def between(start: Tensor, end: Tensor, t: Tensor):
    """Weights along a straight line, as `sweep` takes them."""
    t = t.to(start)[:, None]
    return lambda a, b: torch.lerp(start[None], end[None], t[a:b])


class Curvature(NamedTuple):
    """Hessians of the training loss along lines.

    Attributes:
        t: [S].
        top: name of a line to [S], the largest eigenvalue.
        trace: name of a line to [S].
        trace_se: name of a line to [S], standard errors.
    """

    t: Tensor
    top: dict[str, Tensor]
    trace: dict[str, Tensor]
    trace_se: dict[str, Tensor]


def measure_curvature(bench: Bench) -> Curvature:
    """From the start of run 0 to its solution, and from there to that of run 1."""
    count = bench.settings.curvature_points
    t = torch.linspace(0, 1, count, dtype=torch.float64)
    lines = {}
    if bench.run.trajectories is not None and bench.epochs[0] == 0:
        lines["start to optimum"] = line_of(bench, 0, t)
    if bench.R > 1:
        lines["optimum to optimum"] = between(bench.weights[0], bench.weights[1], t)
    top, trace, errors = {}, {}, {}
    for name, line in lines.items():
        found = curvature_along(
            bench.model, line, count, bench.train.x, bench.train.y, k=1, samples=10,
            seed=bench.settings.seed, label=f"curvature, {name}", progress=False,
            **bench.options,
        )  # fmt: skip
        top[name], trace[name], errors[name] = found.eigenvalues[:, 0], found.trace, found.trace_se
    return Curvature(t, top, trace, errors)
