"""Curves between optima, and Fast Geometric Ensembling, as in Garipov et al. 2018.

Between two networks trained apart: the straight line, a Bezier curve and a polygonal chain of one
bend each; the loss, the error, and the ensemble of phi(0) and phi(t) along them. At equal budgets
of training: independent networks (Ind), Snapshot Ensembles (SSE) and Fast Geometric Ensembling
(FGE). What the paper claims is put as criteria, each of them decided in every repeat.

On digits few rows are for training and many for testing: that leaves errors to be compared.

Source: Garipov et al. 2018 (arXiv:1802.10026).
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from landscape_fast.methods import TrainConfig
from landscape_fast.ops._checks import require
from landscape_fast.studies._garipov2018_runs import Lab, Settings, one_repeat
from landscape_fast.studies._garipov2018_tables import describe, judge, summarise, write

__all__ = ["SIZES", "Settings", "describe", "run"]

SMALL = Settings()
SHORT = TrainConfig(epochs=4, batch_size=32, lr=5e-3)
SIZES = {
    "tiny": replace(
        SMALL,
        repeats=2,
        rows=400,
        train_part=0.2,
        ends="mlp",
        ends_training=SHORT,
        curve_training=SHORT,
        points=5,
        member="mlp",
        budget=replace(SMALL.budget, epochs=5, batch_size=20),
        budgets=2,
        cycle=1,
        workers=1,
    ),
    "small": SMALL,
    "full": Settings(
        data="cifar10",
        repeats=2,
        ends="medium_cnn",
        ends_training=TrainConfig(
            epochs=20, batch_size=128, lr=1.6e-3, schedule="step", step_epochs=5
        ),
        curve_training=TrainConfig(
            epochs=8, batch_size=128, lr=1.6e-3, schedule="step", step_epochs=2
        ),
        member="cresnet20",
        budget=TrainConfig(
            epochs=30,
            batch_size=128,
            optimizer="sgd",
            lr=0.1,
            weight_decay=1e-4,
            schedule="hold_linear",
            augment="crop_flip",
        ),
        budgets=1,
        cycle=2,
        gain=0.008,
        workers=1,
    ),
}


def run(
    size: str = "small",
    out: Path | None = None,
    seed: int = 0,
    *,
    root: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and measures everything, in every repeat.

    Args:
        size: "tiny", "small" (minutes on a CPU; digits) or "full" (CIFAR-10, for a GPU).
        out: folder for results.json, results.csv (methods at their budgets), paths.csv (curves),
            points.csv (every point of them), criteria.csv, runs.csv (every repeat), results.md,
            paths.png where matplotlib is installed, and checkpoints, from which a run that was
            interrupted goes on; None writes nothing.
        seed: of the repeats; repeat r trains with seed + r.
        root: folder of the CIFAR-10 files, for size "full".
        device: where to train; None for a GPU where there is one and the data are images of
            CIFAR-10, else the CPU.
        progress: show progress.

    Returns:
        A document: rows (methods, means over the repeats with standard errors), paths, points,
        criteria, runs, notes, settings. `describe` makes text of it.

    Raises:
        ValueError: for an unknown size, or without a folder where one is needed.
        ImportError: without scikit-learn, for digits.
    """
    op, known = "garipov2018.run", tuple(SIZES)
    require(size in known, op, "size", f"one of {known}", repr(size))
    settings = SIZES[size]
    needs = settings.data == "cifar10"
    rule, remedy = "the folder of the CIFAR-10 files", f"size {size!r} trains on CIFAR-10"
    require(not needs or root is not None, op, "root", rule, root, remedy)
    fast = needs and torch.cuda.is_available()
    lab = Lab(settings, seed, root, device or ("cuda" if fast else "cpu"), out, progress)
    each = _repeats(lab)
    runs, paths, points = (
        [{"repeat": r, **row} for r, parts in enumerate(each) for row in parts[part]]
        for part in range(3)
    )
    document = {
        "study": "garipov2018",
        "size": size,
        "seed": seed,
        "settings": asdict(settings),
        "rows": summarise(runs),
        "paths": paths,
        "points": points,
        "criteria": judge(settings, runs, paths),
        "runs": runs,
        "notes": _notes(settings, each),
        "versions": {"torch": torch.__version__, "device": lab.device},
    }
    if out is not None:
        write(Path(out), document)
    return document


def _repeats(lab: Lab) -> list[tuple]:
    settings = lab.settings
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = min(settings.workers or cpus, settings.repeats) if lab.device == "cpu" else 1
    repeats = range(settings.repeats)
    if workers == 1:
        return [one_repeat(lab, repeat) for repeat in repeats]
    # a child that is forked from a process with threads may hang, so it is spawned
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        return list(pool.map(one_repeat, [lab._replace(progress=False)] * len(repeats), repeats))
    finally:
        pool.shutdown(cancel_futures=True)


def _notes(settings: Settings, each: list[tuple]) -> list[str]:
    training, budget = settings.ends_training, settings.budget
    return [
        f"{settings.data}: {each[0][3]:,} rows to train and {each[0][4]:,} to test, in each of "
        f"{settings.repeats} repeats",
        f"paths: between two {settings.ends} of {training.epochs} epochs; the bends trained for "
        f"{settings.curve_training.epochs}; {settings.points} positions each",
        f"methods: {settings.member}; 1B is {budget.epochs} epochs for all of them; FGE has its "
        f"last fifth in cycles of {settings.cycle} epochs, SSE {settings.snapshots} cycles",
        "a criterion passes if it holds in every repeat that can tell, fails if in none, and is "
        "inconclusive otherwise",
    ]
