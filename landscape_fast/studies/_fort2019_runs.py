"""What the study of Fort et al. 2019 trains: the runs, and the experiments beside them."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landscape_fast.data import Dataset
from landscape_fast.landscape import (
    Origins,
    PathScores,
    WedgeMap,
    along_path,
    cycle_diversity,
    init_or_shuffle,
    wedge_map,
)
from landscape_fast.methods import TrainConfig, find_tunnel, predict, train_deep_ensemble
from landscape_fast.methods.cyclic import train_csgmcmc
from landscape_fast.studies.compare import Problem
from landscape_fast.studies.presets import EVALUATION_ROWS
from landscape_fast.studies.run_folder import RunFolder, describe_training, described, open_run


@dataclass(frozen=True)
class OriginSettings:
    """Initialisation against shuffling (figure S4).

    Attributes:
        model: the architecture.
        training: of every run; its `lr` is each of `lrs` in turn.
        lrs: learning rates.
        repeats: of the 2x2, with seeds of their own.
        rows: of the training rows, the first ones; None for all.
    """

    model: str
    training: TrainConfig
    lrs: tuple[float, ...]
    repeats: int = 2
    rows: int | None = None


@dataclass(frozen=True)
class CycleSettings:
    """Cycles of cSG-MCMC against independent runs (figure S5).

    Attributes:
        model: the architecture.
        training: of every run, over all its cycles.
        cycles: of a run.
        runs: of a repeat.
        repeats: of the comparison.
        explore: part of a cycle without noise.
        rows: of the training rows, the first ones; None for all.
    """

    model: str
    training: TrainConfig
    cycles: int = 3
    runs: int = 2
    repeats: int = 4
    explore: float = 0.8
    rows: int | None = None


@dataclass(frozen=True)
class TunnelSettings:
    """The tunnel between the first two runs, and its wedge (figures S2 and S3).

    Attributes:
        training: of every node.
        nodes: between the two networks.
        constrain: see `landscape_fast.methods.find_tunnel`.
        steps: positions in each segment.
        rows: so many training rows and test rows for the measurements, the first ones.
        scales: radii of the wedge, as multiples of the tunnel's.
    """

    training: TrainConfig
    nodes: int = 9
    constrain: str | None = "hyperplane"
    steps: int = 2
    rows: int = 2000
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)


class Lab(NamedTuple):
    """Where and how everything is trained."""

    out: Path
    seed: int
    root: str | None
    device: str
    progress: bool

    def problem(self, data: str, model: str, members: int = 1, rows: int | None = None) -> Problem:
        return Problem(data=data, root=self.root, model=model, members=members, train_rows=rows)

    def options(self, part: str) -> dict[str, Any]:
        """What every training takes."""
        folder = self.out / "checkpoints" / part
        return {"directory": folder, "resume": True, "progress": self.progress}


class TunnelScores(NamedTuple):
    """Measured on the straight line and on the tunnel between two networks.

    Attributes:
        line: on training rows; `line_test` on test rows.
        tunnel: likewise; `tunnel_test`.
        wedge: of the tunnel, on test rows.
    """

    line: PathScores
    tunnel: PathScores
    line_test: PathScores
    tunnel_test: PathScores
    wedge: WedgeMap


def train_runs(lab: Lab, problem: Problem, config: TrainConfig, keep_every: int) -> RunFolder:
    """The networks that are looked at, in a folder as `landscape-fast train` leaves it."""
    folder, dataset = lab.out / "run", problem.load()
    document = describe_training(problem, dataset, config, "deep", keep_every, lab.device)
    with described(folder, document):
        train_deep_ensemble(
            partial(problem.network, dataset, ensemble=False),
            dataset.train_x,
            dataset.train_y,
            config,
            members=problem.members,
            keep_every=keep_every,
            device=lab.device,
            directory=folder / "checkpoints",
            resume=True,
            progress=lab.progress,
        )
    return open_run(folder, device=lab.device)


def compare_origins(lab: Lab, data: str, settings: OriginSettings) -> Origins:
    """The 2x2 at every learning rate."""
    build, dataset = _task(lab, data, settings.model, settings.rows)
    config = replace(settings.training, seed=lab.seed)
    return init_or_shuffle(
        build,
        dataset.train_x,
        dataset.train_y,
        dataset.test_x,
        dataset.test_y,
        config,
        lrs=settings.lrs,
        repeats=settings.repeats,
        device=lab.device,
        **lab.options("origins"),
    )


def compare_cycles(lab: Lab, data: str, settings: CycleSettings) -> dict[str, Tensor]:
    """Mean disagreement of every repeat, [repeats] each, and the networks' mean accuracy."""
    build, dataset = _task(lab, data, settings.model, settings.rows)
    found: dict[str, list[Tensor]] = {"independent runs": [], "cycles of one run": []}
    accuracy = []
    for repeat in range(settings.repeats):
        trained = train_csgmcmc(
            build,
            dataset.train_x,
            dataset.train_y,
            replace(settings.training, seed=lab.seed + repeat),
            cycles=settings.cycles,
            samples=1,
            explore=settings.explore,
            runs=settings.runs,
            device=lab.device,
            **lab.options(f"cycles/repeat-{repeat}"),
        )
        rows = EVALUATION_ROWS.get(settings.model, 1000)
        logits = predict(trained.model, dataset.test_x, batch_size=rows).cpu()
        apart = cycle_diversity(logits.unflatten(0, (settings.runs, settings.cycles)))
        found["independent runs"].append(apart.between_runs.mean())
        found["cycles of one run"].append(apart.between_cycles.mean())
        accuracy.append((logits.argmax(-1) == dataset.test_y).double().mean())
    return {name: torch.stack(values) for name, values in found.items()} | {
        "accuracy": torch.stack(accuracy)
    }


def dig_tunnel(lab: Lab, run: RunFolder, settings: TunnelSettings) -> TunnelScores:
    """From the first network to the second."""
    start, end = run.networks[:2]
    data = run.dataset
    config = replace(settings.training, seed=lab.seed)
    tunnel = find_tunnel(
        start,
        end,
        data.train_x,
        data.train_y,
        config,
        nodes=settings.nodes,
        constrain=settings.constrain,
        **lab.options("tunnel"),
    )
    n, segments = settings.rows, len(tunnel.weights) - 1
    train = data.train_x[:n], data.train_y[:n]
    test = data.test_x[:n], data.test_y[:n]
    options: dict[str, Any] = {"progress": lab.progress, "calibration": train[0]}

    def measured(rows):
        line = along_path(
            start, run.weights[:2], *rows, per_segment=segments * settings.steps, **options
        )
        return line, along_path(start, tunnel.weights, *rows, per_segment=settings.steps, **options)

    scales = torch.tensor(settings.scales)
    wedge = wedge_map(
        start, tunnel.weights, *test, per_segment=settings.steps, scales=scales, **options
    )
    (line, path), (line_test, path_test) = measured(train), measured(test)
    return TunnelScores(line, path, line_test, path_test, wedge)


def _task(lab: Lab, data: str, model: str, rows: int | None) -> tuple[Any, Dataset]:
    problem = lab.problem(data, model, rows=rows)
    dataset = problem.load()
    return partial(problem.network, dataset, ensemble=False), dataset
