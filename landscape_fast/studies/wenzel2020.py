"""Hyper-deep and hyper-batch ensembles against what they extend, on the digits of scikit-learn.

The rows are dealt into folds, the same share of every class in each. Each fold in turn is for
testing; of the others, a part is held out for what looks at it: the search, its selections, and the
tuning steps. All methods train on the rows that are left, with the same network and, where they do
not search them, the same settings. What is compared:

single           one network
single, tuned    the best network of the search by the loss on the rows held out
deep             4 networks (deep ensemble)
deep, tuned      4 networks of that best network's settings
batch            BatchEnsemble of 4
hyper-batch      4 members at their mean penalties; and at draws from their distributions, too
hyper-deep       at most 4 networks of the search; and with retrained ones among them

Source: Wenzel et al. 2020 (arXiv:2006.13570).
"""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.data import Dataset, digits
from landscape_fast.methods import (
    DeepEnsemble,
    LogUniform,
    TrainConfig,
    Trained,
    Tuning,
    Uniform,
    load_network,
    predict,
    train_batch_ensemble,
    train_deep_ensemble,
    train_hyper_batch,
    train_hyper_deep,
)
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.methods.splits import hold_out
from landscape_fast.metrics.diversity import diagnose, pair_diversity
from landscape_fast.models import MLP
from landscape_fast.nn import BatchEnsembleLinear
from landscape_fast.nn.hyper_batch import HyperBatchLinear, HyperBatchNetwork
from landscape_fast.nn.init import Normal
from landscape_fast.ops import ensemble_summary
from landscape_fast.ops._checks import require
from landscape_fast.studies._folds import describe, make_notes, summarise, write

__all__ = ["SIZES", "Settings", "describe", "make_folds", "run"]


@dataclass(frozen=True)
class Settings:
    """One size of the study.

    Attributes:
        folds: how many times everything is trained, each time with other rows for testing.
        rows: of the data set; None for all.
        width: of the two hidden layers.
        members: of the ensembles.
        trials: networks of the search; each selected setting is then trained `members` times more.
        held_out: fraction of the rows not for testing.
        draws: penalties per member at which a hyper-batch ensemble also answers.
        training: of every network, where the search does not change it.
        fast_lr_mult: of BatchEnsemble and hyper-batch, as published.
        tuning: of hyper-batch; the range of its penalties is `penalties`.
        workers: processes; None for one per CPU.
    """

    folds: int = 10
    rows: int | None = None
    width: int = 128
    members: int = 4
    trials: int = 12
    held_out: float = 0.2
    draws: int = 4
    training: TrainConfig = TrainConfig(epochs=25, batch_size=64, lr=5e-3)
    fast_lr_mult: float = 0.5
    penalties: tuple[float, float] = (1e-3, 1.0)
    tuning: Tuning = Tuning(lr=0.02, width=0.5)
    workers: int | None = None


SMALL = Settings()
TINY_TRAINING = TrainConfig(epochs=3, batch_size=32, lr=5e-3)
SIZES = {
    "tiny": Settings(
        folds=2, rows=300, width=16, members=2, trials=3, draws=1, training=TINY_TRAINING, workers=1
    ),
    "small": SMALL,
    "full": replace(SMALL, trials=50, training=replace(SMALL.training, epochs=40)),
}
SPACE = {
    "weight_decay": LogUniform(1e-6, 1e-2),
    "label_smoothing": LogUniform(1e-4, 0.2),
    "lr": LogUniform(1e-3, 1e-2),
    "dropout": Uniform(0.0, 0.5),
}
# (a, b): what the notes say about a, against b
VERDICTS = (
    ("deep", "single"),
    ("batch", "single"),
    ("batch", "deep"),
    ("hyper-batch", "batch"),
    ("hyper-batch", "deep"),
    ("hyper-deep", "single, tuned"),
    ("hyper-deep", "deep"),
    ("hyper-deep", "deep, tuned"),
)


def run(size: str = "small", out: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Trains and measures all methods on all folds.

    Args:
        size: "tiny", "small" (minutes on a CPU) or "full".
        out: folder for results.json, results.csv (means), runs.csv (every fold), trials.csv (every
            network of the searches) and results.md (the table); None writes nothing.
        seed: of the folds; fold f trains with seed + f.

    Returns:
        A document: rows (means over the folds, with standard errors), runs (one per fold and
        method), trials, notes, settings. `describe` makes text of it.

    Raises:
        ValueError: for an unknown size.
        ImportError: without scikit-learn.
    """
    known = tuple(SIZES)
    require(size in known, "wenzel2020.run", "size", f"one of {known}", repr(size))
    settings = SIZES[size]
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    workers = settings.workers or (len(affinity(0)) if affinity else os.cpu_count() or 1)
    # a child that is forked from a process with threads may hang, so it is spawned
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    runs, trials, lines = [], [], []
    try:
        for fold in range(settings.folds):
            with tempfile.TemporaryDirectory() as folder:
                parts = _one_fold(settings, seed, fold, Path(folder), pool)
            runs, trials, lines = runs + parts[0], trials + parts[1], lines or parts[2]
    except KeyboardInterrupt:
        where = f"fold {fold + 1} of {settings.folds}"
        raise KeyboardInterrupt(f"wenzel2020 stopped in {where}; nothing was saved") from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    rows = summarise(runs)
    document = {
        "study": "wenzel2020",
        "size": size,
        "seed": seed,
        "settings": asdict(settings),
        "rows": rows,
        "runs": runs,
        "trials": trials,
        "notes": make_notes(runs, VERDICTS) + lines,
        "versions": {"torch": torch.__version__, "threads": 1, "workers": workers},
    }
    if out is not None:
        write(Path(out), document)
    return document


def make_folds(settings: Settings, seed: int, fold: int) -> Dataset:
    """All rows of digits, one fold for testing, standardised by the others."""
    given = digits()
    x = torch.cat([given.train_x, given.test_x])[: settings.rows]
    y = torch.cat([given.train_y, given.test_y])[: settings.rows]
    generator = torch.Generator().manual_seed(stream_seed(seed, 0, "split", settings.folds))
    order = torch.randperm(len(y), generator=generator)
    order = order[y[order].argsort(stable=True)]  # class after class: dealt, each gets its share
    test = torch.zeros(len(y), dtype=torch.bool)
    test[order[fold :: settings.folds]] = True
    return Dataset(x[~test], y[~test], x[test], y[test], given.classes, "digits").standardized()


def plain(width: int, dropout: float = 0.0) -> nn.Module:
    """The network of all methods."""
    return MLP((1, 8, 8), (width, width), dropout=dropout)


def batch(width: int, members: int) -> nn.Module:
    """The same as a BatchEnsemble, with the factors' published start."""
    start = Normal(1.0, 0.5)
    linear = partial(BatchEnsembleLinear, members=members, r_init=start, s_init=start)
    return MLP((1, 8, 8), (width, width), linear=linear)


def hyper_batch(width: int, members: int, penalties: tuple[float, float]) -> nn.Module:
    """The same as a hyper-batch ensemble, with the factors' published start."""
    start = Normal(1.0, 0.75)
    linear = partial(HyperBatchLinear, members=members, r_init=start, s_init=start)
    network = MLP((1, 8, 8), (width, width), linear=linear)
    return HyperBatchNetwork(network, *penalties, body=(8,), std=0.1)


def _train(kind: str, settings: Settings, seed: int, fold: int) -> dict[str, dict[str, Any]]:
    """One method of those that do not search, on one fold: name to logits and costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset, rows, held = _rows(settings, seed, fold)
        config = replace(settings.training, seed=seed + fold)
        fast = replace(config, fast_lr_mult=settings.fast_lr_mult)
        sizes = (settings.width, settings.members)
        if kind == "deep":
            build = partial(plain, settings.width)
            members = settings.members
            trained = train_deep_ensemble(build, *rows, config, members=members, progress=False)
            first = Trained(trained.model.members[0], trained.histories[:1])
            return {"single": _answer(first, dataset), "deep": _answer(trained, dataset)}
        if kind == "batch":
            build = partial(batch, *sizes)
            trained = train_batch_ensemble(build, *rows, fast, progress=False, report=False)
            return {"batch": _answer(trained, dataset)}
        build = partial(hyper_batch, *sizes, settings.penalties)
        options = {"validation": held, "tuning": settings.tuning, "progress": False}
        options["report"] = False
        trained = train_hyper_batch(build, *rows, fast, **options)
        drawn = Trained(trained.model.with_samples(settings.draws), trained.histories)
        name = f"hyper-batch, {settings.draws} draws"
        return {"hyper-batch": _answer(trained, dataset), name: _answer(drawn, dataset)}
    finally:
        torch.set_num_threads(threads)


def _rows(settings: Settings, seed: int, fold: int):
    dataset = make_folds(settings, seed, fold)
    parts = hold_out("wenzel2020", dataset.train_x, dataset.train_y, settings.held_out, seed + fold)
    return dataset, parts[:2], parts[2:]


def _answer(trained: Trained, dataset: Dataset, weights: Sequence[int] | None = None):
    logits = predict(trained.model, dataset.test_x)
    return {
        "logits": logits,
        "weights": weights or [1] * len(logits),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "seconds": sum(trained.seconds),
    }


def _search(settings: Settings, seed: int, fold: int, folder: Path, pool: Executor | None):
    """The methods that search, on one fold, and the table of their networks."""
    dataset, rows, held = _rows(settings, seed, fold)
    build, K = partial(plain, settings.width), settings.members
    found = train_hyper_deep(
        build,
        *rows,
        replace(settings.training, seed=seed + fold),
        space=SPACE,
        trials=settings.trials,
        members=K,
        validation=held,
        executor=pool,
        directory=folder,
        progress=False,
    )
    seconds = [row["seconds"] for row in found.table]
    best = found.search.picks[0]
    again = [
        position
        for position, row in enumerate(found.table)
        if row["trial"] == found.table[best]["trial"] and row["restart"]
    ]
    searching = sum(seconds[: settings.trials])
    answers = {}
    for name, members, weights, cost in (
        ("single, tuned", [best], [1], searching),
        ("deep, tuned", again, [1] * K, searching + sum(seconds[n] for n in again)),
        ("hyper-deep, no restarts", found.search.members, found.search.weights, searching),
        ("hyper-deep", found.selection.members, found.selection.weights, sum(seconds)),
    ):
        networks = [load_network(build, found.table[position]) for position in members]
        history = [[{"seconds": cost}]]
        answers[name] = _answer(Trained(DeepEnsemble(networks), history), dataset, weights)
    drop = ("file", "settings")
    table = [
        {"fold": fold, **{k: v for k, v in row.items() if k not in drop}}
        | {name: row["settings"].get(name) for name in SPACE}
        for row in found.table
    ]
    return answers, table


def _one_fold(settings: Settings, seed: int, fold: int, folder: Path, pool: Executor | None):
    """(runs, trials, lines on diversity) of one fold."""
    kinds, common = ("deep", "batch", "hyper-batch"), (settings, seed, fold)
    if pool is None:
        parts = [_train(kind, *common) for kind in kinds]
    else:
        parts = [pool.submit(_train, kind, *common) for kind in kinds]
    searched, trials = _search(*common, folder, pool)
    parts = parts if pool is None else [part.result() for part in parts]
    answers = {name: answer for part in parts for name, answer in part.items()} | searched
    y = make_folds(settings, seed, fold).test_y
    runs, lines = [], []
    for name in _order(answers):
        runs.append({"fold": fold, "method": name, **_measure(answers[name], y)})
        logits = answers[name]["logits"]
        if fold == 0 and name in ("deep", "batch", "hyper-batch", "hyper-deep") and len(logits) > 1:
            lines += [f"{name}, first fold: {line}" for line in diagnose(logits, y).lines]
    return runs, trials, lines


def _order(answers: dict[str, Any]) -> list[str]:
    first = ("single", "deep", "batch", "hyper-batch", "hyper-deep")
    return sorted(answers, key=lambda name: (first.index(name.split(",")[0]), len(name)))


def _measure(answer: dict[str, Any], y: Tensor) -> dict[str, Any]:
    logits = answer["logits"]
    counted = logits.repeat_interleave(torch.tensor(answer["weights"]), 0)
    summary = ensemble_summary(counted, y)
    several = len(logits) > 1
    return {
        "members": len(logits),
        "weights": " ".join(map(str, answer["weights"])),
        "accuracy": float(summary.accuracy),
        "nll": float(summary.nll),
        "brier": float(summary.brier),
        "ece": float(summary.ece),
        "member_nll": float(summary.member_nll.mean()),
        "disagreement": float(pair_diversity(logits).mean_disagreement) if several else None,
        "parameters": answer["parameters"],
        "seconds": answer["seconds"],
    }
