"""The training runs and measurements of the study of Garipov et al. 2018: one repeat at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.data import Dataset, cifar10, digits
from landscape_fast.methods import TrainConfig, Trained, predict, train_deep_ensemble
from landscape_fast.methods.curves import (
    curve_statistics,
    pair_ensemble,
    straight_line,
    train_curve,
)
from landscape_fast.methods.cyclic import train_fge, train_snapshot
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.methods.splits import stratified_split
from landscape_fast.models import MLP, MediumCNN, SmallCNN, cresnet20
from landscape_fast.nn.statistics import recalibrate_
from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops import ensemble_summary

NETWORKS = {
    "mlp": lambda image, classes: MLP(image, (32,), classes),
    "small_cnn": SmallCNN,
    "medium_cnn": MediumCNN,
    "cresnet20": cresnet20,
}
PATHS = ("line", "bezier", "polychain")


@dataclass(frozen=True)
class Settings:
    """One size of the study.

    Attributes:
        data: "digits", or "cifar10", which needs its folder.
        repeats: how many times everything is trained, each time from other random streams, on
            digits with other rows.
        train_part: of digits, fraction of the rows that are trained on; the others are tested.
        rows: of digits, so many of the rows; None for all.
        ends: network whose optima are connected, `ends_training` how they are trained.
        curve_training: of the bends.
        points: positions on each path.
        member: network of the ensembles, `budget` how one is trained at the budget 1B.
        budgets: multiples of that budget.
        cycle: epochs of a cycle of FGE, which begins after four fifths of the epochs.
        high: of the rates of FGE, as a part of the learning rate; `low` likewise.
        snapshots: networks of a Snapshot Ensemble at 1B.
        barrier: nats by which the straight line has to rise for the curves to have a meaning.
        gain: by which the ensemble of both ends has to be better than one of them, for the pairs
            along the curve to have a meaning; a fraction of the rows.
        workers: processes; None for one per CPU. With a GPU there is one.
    """

    data: str = "digits"
    repeats: int = 5
    train_part: float = 0.1
    rows: int | None = None
    ends: str = "small_cnn"
    ends_training: TrainConfig = TrainConfig(epochs=80, batch_size=32, lr=3e-3)
    curve_training: TrainConfig = TrainConfig(epochs=120, batch_size=32, lr=3e-3)
    points: int = 61
    member: str = "small_cnn"
    budget: TrainConfig = TrainConfig(
        epochs=100,
        batch_size=32,
        optimizer="sgd",
        lr=0.05,
        weight_decay=5e-4,
        schedule="hold_linear",
    )
    budgets: int = 3
    cycle: int = 4
    high: float = 0.5
    low: float = 0.1
    snapshots: int = 5
    barrier: float = 0.8
    gain: float = 0.005
    workers: int | None = None


class Lab(NamedTuple):
    """What all repeats share; it is sent to the processes that run them."""

    settings: Settings
    seed: int
    root: str | Path | None
    device: str
    out: Path | None
    progress: bool


def one_repeat(lab: Lab, repeat: int) -> tuple:
    """(runs, paths, points, rows trained on, rows tested) of one repeat."""
    threads = torch.get_num_threads()
    if lab.device == "cpu":
        torch.set_num_threads(1)
    try:
        dataset = _dataset(lab, repeat).to(lab.device)
        paths, points = _connect(lab, repeat, dataset)
        runs = _ensembles(lab, repeat, dataset)
        return runs, paths, points, len(dataset.train_y), len(dataset.test_y)
    finally:
        torch.set_num_threads(threads)


def _options(lab: Lab, repeat: int, part: str) -> dict[str, Any]:
    """What every training takes: where its checkpoints are, and how it tells its progress."""
    if lab.out is None:
        return {"progress": lab.progress}
    folder = Path(lab.out) / "checkpoints" / f"repeat-{repeat}" / part
    return {"progress": lab.progress, "directory": folder, "resume": True}


def _dataset(lab: Lab, repeat: int) -> Dataset:
    settings = lab.settings
    if settings.data == "cifar10":
        return cifar10(lab.root).standardized()
    given = digits()
    x = torch.cat([given.train_x, given.test_x])[: settings.rows]
    y = torch.cat([given.train_y, given.test_y])[: settings.rows]
    seed = stream_seed(lab.seed + repeat, 0, "split")
    others, chosen = stratified_split(y, settings.train_part, seed)
    parts = (x[chosen], y[chosen], x[others], y[others])
    return Dataset(*parts, given.classes, "digits").standardized()


def _connect(lab: Lab, repeat: int, dataset: Dataset):
    """The paths between two optima, and their points."""
    settings, rows = lab.settings, (dataset.train_x, dataset.train_y)
    build = _builder(settings.ends, dataset)
    config = replace(settings.ends_training, seed=lab.seed + repeat)
    options = {"members": 2, "device": lab.device, **_options(lab, repeat, "ends")}
    start, end = train_deep_ensemble(build, *rows, config, **options).model.members
    config, options = replace(settings.curve_training, seed=config.seed), _options(lab, repeat, "")
    paths, points = [], []
    for kind in PATHS:
        if kind == "line":
            path, seconds = straight_line(start, end), 0.0
        else:
            bent = train_curve(start, end, *rows, config, kind=kind, **options)
            path, seconds = bent.subspace, sum(bent.seconds)
        row, own = _measure_path(lab, path, dataset)
        paths.append({"path": kind, **row, "seconds": seconds})
        points += [{"path": kind, **point} for point in own]
    return paths, points


def _measure_path(lab: Lab, path: Subspace, dataset: Dataset):
    S, calibration = lab.settings.points, dataset.train_x
    common = {"points": S, "calibration": calibration, "progress": lab.progress}
    train = curve_statistics(path, dataset.train_x, dataset.train_y, **common)
    rows = (dataset.test_x, dataset.test_y)
    test = curve_statistics(path, *rows, keep_logits=True, **common)
    pair = pair_ensemble(test.logits, dataset.test_y)
    labels = test.logits.argmax(-1)
    loss, error = train.along("loss"), test.along("error")
    first, last, middle = labels[0], labels[-1], labels[S // 2]
    row = {
        "length": float(test.length[-1]),
        "train_loss_end": max(loss.start, loss.end),
        "train_loss_max": loss.maximum,
        "train_loss_integral": loss.integral,
        "barrier": loss.barrier,
        "error_end": max(error.start, error.end),
        "error_max": error.maximum,
        "error_integral": error.integral,
        "agreement_ends": _agreement(first, last),
        "agreement_middle": max(_agreement(first, middle), _agreement(last, middle)),
    }
    for t in (0.05, 0.5, 1.0):
        row[f"gain_{t:g}"] = error.start - float(pair.error[round(t * (S - 1))])
    columns = {
        "t": test.t,
        "length": test.length,
        "train_loss": train.loss,
        "test_loss": test.loss,
        "test_error": test.error,
        "pair_error": pair.error,
        "pair_loss": pair.loss,
    }
    names = tuple(columns)
    listed = zip(*(column.tolist() for column in columns.values()), strict=True)
    return row, [dict(zip(names, values, strict=True)) for values in listed]


def _agreement(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


def _ensembles(lab: Lab, repeat: int, dataset: Dataset) -> list[dict]:
    """The three methods at every multiple of the budget."""
    settings, rows = lab.settings, (dataset.train_x, dataset.train_y)
    build, B = _builder(settings.member, dataset), settings.budgets
    config = replace(settings.budget, seed=lab.seed + repeat)
    cosine = replace(config, schedule="cosine")
    rates = {"a1": settings.high * config.lr, "a2": settings.low * config.lr}
    common = {"device": lab.device, **_options(lab, repeat, "ensembles")}
    every = {
        "Ind": train_deep_ensemble(build, *rows, config, members=B, **common),
        "SSE": train_snapshot(build, *rows, cosine, cycles=settings.snapshots, runs=B, **common),
        "FGE": train_fge(build, *rows, config, cycle=settings.cycle, **rates, runs=B, **common),
    }
    for network in every["Ind"].model.members:  # as the two others do it with theirs
        recalibrate_(network, dataset.train_x)
    runs = []
    for method, trained in every.items():
        logits = predict(trained.model, dataset.test_x, batch_size=500)
        for budget in range(1, B + 1):
            runs.append({"method": method, **_at(budget, B, trained, logits, dataset.test_y)})
    return runs


def _at(budget: int, budgets: int, trained: Trained, logits: Tensor, y: Tensor) -> dict[str, Any]:
    """The ensemble of the first runs, as many as the budget pays for."""
    members = len(logits) // budgets * budget
    summary = ensemble_summary(logits[:members], y)
    return {
        "budget": budget,
        "members": members,
        "error": 1 - float(summary.accuracy),
        "nll": float(summary.nll),
        "brier": float(summary.brier),
        "ece": float(summary.ece),
        "member_error": 1 - float(summary.member_accuracy.mean()),
        "seconds": sum(trained.seconds[:budget]),
    }


def _builder(name: str, dataset: Dataset) -> Callable[[], nn.Module]:
    return lambda: NETWORKS[name](dataset.image, len(dataset.classes))
