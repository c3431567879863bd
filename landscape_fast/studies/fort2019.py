"""Deep ensembles in weight space and function space, as in Fort, Hu and Lakshminarayanan 2019.

Several networks are trained from independent starts, and their weights are kept after every epoch;
`landscape_report` then looks at them as `landscape-fast landscape` does: similarity, t-SNE, samples
of subspaces, the plane of accuracy against diversity, ensembles of every size, corrupted and
foreign images, the radial plane. Beside these the study trains what one ensemble cannot tell:
initialisation against shuffling, the low-loss tunnel between two of the networks and its wedge, and
cycles of cSG-MCMC against independent runs. Every claim is put as a criterion, and decided.

Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757); settings that the paper does not
print are those of the authors' notebook.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from landscape_fast.methods import TrainConfig
from landscape_fast.ops._checks import require
from landscape_fast.studies._fort2019_parts import cycles_part, origins_part, tunnel_part
from landscape_fast.studies._fort2019_runs import (
    CycleSettings,
    Lab,
    OriginSettings,
    TunnelSettings,
    compare_cycles,
    compare_origins,
    dig_tunnel,
    train_runs,
)
from landscape_fast.studies.landscape_report import ReportSettings, describe, report, settings_of
from landscape_fast.studies.presets import TRAINING

__all__ = ["PAPER", "SIZES", "Settings", "describe", "run"]


@dataclass(frozen=True)
class Settings:
    """One size of the study.

    Attributes:
        data: of `landscape_fast.studies.presets.DATA`.
        model: the architecture of the networks that are looked at.
        training: how they are trained.
        runs: how many.
        report: sizes of the measurements.
        origins: initialisation against shuffling; `tunnel` and `cycles` likewise. None leaves an
            experiment out.
        pixels: scale of the input.
        train_rows: so many training rows, the first ones; None for all.
        keep_every: epochs from one kept checkpoint to the next.
    """

    data: str
    model: str
    training: TrainConfig
    runs: int
    report: ReportSettings
    origins: OriginSettings | None = None
    tunnel: TunnelSettings | None = None
    cycles: CycleSettings | None = None
    pixels: str = "standardized"
    train_rows: int | None = None
    keep_every: int = 1


def _adam(epochs: int, drop: int, **changes: Any) -> TrainConfig:
    """Adam with the authors' rate, halved after every `drop` epochs."""
    options = {"lr": 1.6e-3, "batch_size": 128, **changes}
    return TrainConfig(epochs=epochs, schedule="step", step_epochs=drop, **options)


def _langevin(epochs: int, **changes: Any) -> TrainConfig:
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64, **changes}
    return TrainConfig(epochs=epochs, optimizer="sgd", schedule="cosine", **options)


_RATES = (4e-4, 1.6e-3, 6.4e-3)
_MEDIUM = Settings(
    data="cifar10",
    model="medium_cnn",
    training=_adam(20, 5),
    runs=5,
    report=settings_of("small"),
    origins=OriginSettings("small_cnn", _adam(10, 3), _RATES),
    tunnel=TunnelSettings(_adam(2, 1), rows=5000),
    cycles=CycleSettings("resnet20", _langevin(24, lr=0.1, batch_size=128)),
)
_DIGITS = _adam(16, 8, lr=3e-3, batch_size=16)
SIZES = {
    "smoke": Settings(
        data="digits",
        model="mlp",
        training=_DIGITS,
        runs=4,
        report=settings_of("smoke"),
        origins=OriginSettings("mlp", _DIGITS, (1e-3, 4e-3), rows=200),
        tunnel=TunnelSettings(replace(_DIGITS, epochs=4), nodes=5, rows=200),
        cycles=CycleSettings("mlp", _langevin(30, batch_size=16), repeats=3, rows=200),
        train_rows=200,
    ),
    "cpu": replace(
        _MEDIUM,
        model="small_cnn",
        training=_adam(16, 4),
        train_rows=25_000,
        report=settings_of("small", rows=3000, validation_rows=1000, plane_points=25, map_rows=1000,
                           shift_rows=1000),
        origins=OriginSettings("small_cnn", _adam(8, 2), _RATES, rows=5000),
        tunnel=TunnelSettings(_adam(1, 1, lr=8e-4), rows=2000),
        cycles=CycleSettings("small_cnn", _langevin(18), rows=5000),
    ),
    "small": _MEDIUM,
}  # fmt: skip
# What the authors trained on each data set. Of CIFAR-100 and ImageNet the paper shows the plane of
# accuracy against diversity and the ensembles of every size.
PAPER = {
    "cifar10": replace(
        _MEDIUM,
        training=_adam(40, 10),
        pixels="raw",
        report=settings_of("paper"),
        origins=OriginSettings("small_cnn", _adam(40, 10), _RATES, repeats=3),
        tunnel=TunnelSettings(_adam(2, 1), rows=10_000),
        cycles=CycleSettings(
            "resnet20",
            _langevin(150, lr=0.5, momentum=0.0),
            runs=3,
            repeats=4,
        ),
    ),
    "cifar100": Settings(
        data="cifar100",
        model="resnet20",
        training=TrainConfig(**TRAINING["cifar100"]),
        runs=5,
        report=settings_of("paper"),
        keep_every=5,
    ),
    "imagenet": Settings(
        data="imagenet",
        model="resnet50_v2",
        training=TrainConfig(**TRAINING["imagenet"]),
        runs=4,
        report=settings_of("paper"),
        keep_every=10,
    ),
}
SIZES["paper"] = PAPER["cifar10"]


def run(
    size: str = "small",
    out: Path | None = None,
    seed: int = 0,
    *,
    root: str | Path | None = None,
    data: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the networks and everything beside them, measures, judges, and writes the report.

    Args:
        size: "smoke" (digits, a minute or two), "cpu" (CIFAR-10, cut to about an hour of two CPU
            cores), "small" (CIFAR-10, for a GPU) or "paper" (as the authors ran it).
        out: folder of the report (see `landscape_report.report`), of `run`, which
            `landscape-fast landscape` reads, too, and of checkpoints, from which a study that was
            interrupted goes on; None for a folder that is deleted.
        seed: of all random numbers.
        root: folder of the data files, for all sizes but "smoke".
        data: of size "paper", one of `PAPER`; None for "cifar10".
        device: where to train; None for a GPU where there is one and the data are not digits, else
            the CPU.
        progress: show progress.

    Returns:
        The document of results.json, with `study`, `size` and `seed`. `describe` makes text of it.

    Raises:
        ValueError: for an unknown size or data set, or without a folder where one is needed.
        ImportError: without scikit-learn, for digits.
    """
    op = "fort2019.run"
    require(size in SIZES, op, "size", f"one of {tuple(SIZES)}", repr(size))
    known = tuple(PAPER) if size == "paper" else (None,)
    rule = f"one of {known}" if size == "paper" else "None where the size has no choice"
    data = data or ("cifar10" if size == "paper" else None)
    require(data in known, op, "data", rule, repr(data))
    settings = PAPER[data] if size == "paper" else SIZES[size]
    reads = settings.data != "digits"
    remedy = f"size {size!r} trains on {settings.data}"
    require(not reads or root is not None, op, "root", "the folder of the files", root, remedy)
    automatic = "cuda" if reads and torch.cuda.is_available() else "cpu"
    where = {"root": None if root is None else str(root), "device": device or automatic}
    threads = torch.get_num_threads()
    if not reads:
        torch.set_num_threads(1)  # networks this small gain nothing from more
    try:
        if out is not None:
            return _study(settings, size, Lab(Path(out), seed, progress=progress, **where))
        with tempfile.TemporaryDirectory() as folder:
            return _study(settings, size, Lab(Path(folder), seed, progress=progress, **where))
    finally:
        torch.set_num_threads(threads)


def _study(settings: Settings, size: str, lab: Lab) -> dict[str, Any]:
    problem = lab.problem(settings.data, settings.model, settings.runs, settings.train_rows)
    problem = replace(problem, pixels=settings.pixels)
    config = replace(settings.training, seed=lab.seed)
    networks = train_runs(lab, problem, config, settings.keep_every)
    name, more = networks.dataset.name, []
    if settings.origins is not None:
        found = compare_origins(lab, settings.data, settings.origins)
        more.append(origins_part(found, settings.origins, name))
    if settings.tunnel is not None:
        found = dig_tunnel(lab, networks, settings.tunnel)
        more.append(tunnel_part(found, settings.tunnel, name))
    if settings.cycles is not None:
        found = compare_cycles(lab, settings.data, settings.cycles)
        more.append(cycles_part(found, settings.cycles, name))
    about = {"study": "fort2019", "size": size, "seed": lab.seed}
    report_settings = replace(settings.report, seed=lab.seed)
    return report(networks, report_settings, lab.out, more=more, about=about, progress=lab.progress)
