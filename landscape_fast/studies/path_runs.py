"""Training and measuring for `landscape-fast subspace|curve`: networks along paths."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from landscape_fast.landscape import path_plots
from landscape_fast.methods import train_deep_ensemble
from landscape_fast.methods.curves import straight_line, train_curve
from landscape_fast.methods.subspaces import cos2_penalty, train_subspace
from landscape_fast.methods.sweep import sweep
from landscape_fast.nn.coefficients import Bezier, Line, PolyChain, Simplex
from landscape_fast.nn.statistics import batch_norms
from landscape_fast.nn.subspace import Subspace
from landscape_fast.studies.presets import EVALUATION_ROWS
from landscape_fast.studies.subspace_runs import Found, Job, error_note, panels

KINDS = {"simplex": Simplex, "bezier": Bezier, "polychain": PolyChain}
CALIBRATION = 10_000  # training rows, at most, on which batch norms take their statistics
STEPS = 6  # of a side of the triangle; one more of them is measured outside


def run_subspace(job: Job) -> Found:
    """A line, curve or simplex of networks; the networks along it or in its triangle."""
    args, K = job.args, job.args.anchors
    coefficients = Line() if args.kind == "line" else KINDS[args.kind](K)
    settings = {"layerwise": args.layerwise, "beta": args.beta}
    subspace, histories = train_subspace(
        job.build, *job.rows(), job.config, coefficients=coefficients, **settings, **job.options()
    )
    ends = torch.cat([torch.eye(K), coefficients.midpoint()[None]])
    corners = measure(job, "anchors", subspace, ends)
    names = [*(f"anchor {k + 1}" for k in range(K)), "midpoint"]
    rows = [job.row(name, one[None]) for name, one in zip(names, corners, strict=True)]
    notes = [_angles(subspace), *_calibrated(job, subspace)]
    if args.kind == "bezier" and K > 2:
        rows.append(job.row("ensemble of the ends", corners[[0, K - 1]]))
        notes.append("the anchors between the ends of a Bezier curve do not lie on it")
    else:
        rows.append(job.row("ensemble of the anchors", corners[:K]))
    notes.insert(0, error_note(job, rows))
    found = Found({"kind": args.kind, "anchors": K, **settings}, rows, notes, histories)
    if args.kind != "simplex":
        _along_line(job, found, subspace)
    elif K == 3:
        _in_triangle(job, found, subspace)
    return found


def _along_line(job: Job, found: Found, subspace: Subspace) -> None:
    """Networks along the path, and pairs of them at mirrored positions."""
    t = torch.linspace(0, 1, job.args.points)
    logits = measure(job, "path", subspace, subspace.coefficients.at(t))
    single = [job.row(f"t = {at:.3g}", one[None]) for at, one in zip(t, logits, strict=True)]
    mirrored = zip(logits, logits.flip(0), strict=True)
    pairs = [job.row("pair", torch.stack(pair)) for pair in mirrored]
    found.tables["path"] = [
        {**row, "t": at, "pair_accuracy": pair["accuracy"], "pair_nll": pair["nll"]}
        for at, row, pair in zip(t.tolist(), single, pairs, strict=True)
    ]
    paths = {"one network": single, "ensemble of t and 1 - t": pairs}
    title = f"{job.dataset.name}: along the {job.args.kind}"
    found.figures["path"] = partial(path_plots.path_panels, panels(t, paths), title=title)


def _in_triangle(job: Job, found: Found, subspace: Subspace) -> None:
    """Networks of the plane of three anchors, in their triangle and around it."""
    places = range(-1, STEPS + 2)
    grid = [(i, j, STEPS - i - j) for i in places for j in places if STEPS - i - j in places]
    weights = torch.tensor(grid, dtype=torch.float64) / STEPS
    logits = measure(job, "triangle", subspace, weights.float())
    each = [job.row("point", one[None]) for one in logits]
    found.tables["triangle"] = [
        {**row, **{f"c{k + 1}": c for k, c in enumerate(point)}}
        for row, point in zip(each, weights.tolist(), strict=True)
    ]
    accuracy = [100 * row["accuracy"] for row in each]
    title = f"{job.dataset.name}: a simplex of three anchors"
    draw = partial(path_plots.simplex_heat_map, weights, accuracy, "test accuracy (%)", title)
    found.figures["triangle"] = draw
    inside = (weights > -1e-9).all(1)
    mean = torch.tensor(accuracy, dtype=torch.float64)
    found.notes.append(
        f"mean accuracy of {int(inside.sum())} networks in the triangle: {mean[inside].mean():.2f} "
        f"%, of {int((~inside).sum())} around it: {mean[~inside].mean():.2f} %"
    )


def run_curve(job: Job) -> Found:
    """Two networks, a curve between them, and the straight line."""
    args, config = job.args, job.config
    if config.optimizer not in ("sgd", "adam"):  # before the ends are trained
        got = f"got {config.optimizer}"
        args.usage_error(f"argument --optimizer: must be sgd or adam for a curve; {got}")
    options = job.options()
    ends = train_deep_ensemble(job.build, *job.rows(), config, members=2, **options)
    start, end = ends.model.members
    options.pop("device")
    settings = {"kind": args.kind, "bends": args.bends}
    epochs, lr = args.curve_epochs or config.epochs, args.curve_lr or config.lr
    bent = replace(config, epochs=epochs, lr=lr)
    train = [rows.to(job.device) for rows in job.rows()]
    trained = train_curve(start, end, *train, bent, **settings, **options)
    t = torch.linspace(0, 1, args.points)
    paths, logits = {}, {}
    for name, subspace in (
        (args.kind, trained.subspace),
        ("straight line", straight_line(start, end)),
    ):
        logits[name] = measure(job, name, subspace, subspace.coefficients.at(t))
        paths[name] = [
            job.row(f"{name}, t = {at:.3g}", one[None])
            for at, one in zip(t, logits[name], strict=True)
        ]
    curve, line = paths[args.kind], paths["straight line"]
    first = logits[args.kind][0]
    pairs = [job.row("pair", torch.stack([first, one])) for one in logits[args.kind]]
    rows = [
        {**curve[0], "name": "first network"},
        {**curve[-1], "name": "second network"},
        _worst(args.kind, curve),
        _worst("straight line", line),
        job.row("ensemble of both networks", torch.stack([first, logits[args.kind][-1]])),
        {**pairs[len(pairs) // 2], "name": f"ensemble of t = 0 and {t[len(t) // 2]:.3g}"},
    ]
    base = max(curve[0]["nll"], curve[-1]["nll"])
    barriers = {name: max(row["nll"] for row in path) - base for name, path in paths.items()}
    told = ", ".join(f"{name} {barrier:.4f}" for name, barrier in barriers.items())
    notes = [
        error_note(job, rows),
        f"barrier, the rise of the test NLL over the worse end: {told} nats",
        *_calibrated(job, trained.subspace),
    ]
    found = Found(
        {**settings, "curve_epochs": bent.epochs, "curve_lr": bent.lr},
        rows,
        notes,
        [*ends.histories, *trained.histories],
    )
    found.numbers["barriers"] = barriers
    found.tables["path"] = [
        {"path": name, "t": at, **{k: v for k, v in row.items() if k != "name"}}
        for name, path in [*paths.items(), (f"{args.kind}, with t = 0", pairs)]
        for at, row in zip(t.tolist(), path, strict=True)
    ]
    quantities = panels(t, {**paths, "ensemble of t = 0 and t": pairs})
    title = f"{job.dataset.name}: between two networks"
    found.figures["path"] = partial(path_plots.path_panels, quantities, title=title)
    return found


def measure(job: Job, name: str, subspace: Subspace, coeffs: Tensor) -> Tensor:
    """Logits [S, N, C] on the test rows of the networks at `coeffs` [S, K]; resumable by `name`."""
    subspace = subspace.to(job.device)
    coeffs = coeffs.to(job.device)
    network = subspace.network()
    normed = bool(batch_norms(network))
    # another device mixes other bits, which are another sweep
    file = f"sweep-{name.replace(' ', '-')}-{len(coeffs)}-{job.device}.pt"
    found = sweep(
        network,
        lambda start, stop: subspace.mix(coeffs[start:stop]).detach(),
        len(coeffs),
        job.dataset.test_x,
        job.dataset.test_y,
        statistics="recalibrate" if normed else "none",
        calibration=job.dataset.train_x[:CALIBRATION] if normed else None,
        batch_size=EVALUATION_ROWS.get(job.problem.model, 1000),
        keep_logits=True,
        checkpoint=job.checkpoints / file,
        resume=job.args.resume,
        progress=not job.args.quiet,
    )
    return found.logits


def _worst(name: str, path: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max(path, key=lambda row: row["nll"])
    return {**worst, "name": f"worst of the {name}"}


@torch.no_grad()
def _angles(subspace: Subspace) -> str:
    """How far the anchors are apart, by layer weights (no biases, no norms)."""
    pairs = itertools.combinations(range(len(subspace.order)), 2)
    worst = max(float(cos2_penalty(subspace, pair)) for pair in pairs)
    return f"largest absolute cosine of two anchors: {worst**0.5:.4f}"


def _calibrated(job: Job, subspace: Subspace) -> list[str]:
    if not batch_norms(subspace.model):
        return []
    rows = min(CALIBRATION, len(job.dataset.train_y))
    return [f"batch norms took their statistics anew at every point, on {rows:,} training rows"]
