"""Training and measuring for `landscape-fast fge|swag`, and what all such commands find."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from landscape_fast.data import Dataset
from landscape_fast.landscape import path_plots
from landscape_fast.methods import TrainConfig, predict
from landscape_fast.methods.averaging import train_swag
from landscape_fast.methods.cyclic import (
    cosine_learning_rate,
    fge_learning_rate,
    train_fge,
    train_snapshot,
)
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.ops import ensemble_summary
from landscape_fast.studies.compare import Problem
from landscape_fast.studies.presets import EVALUATION_ROWS
from landscape_fast.studies.report import accuracy_note

COLUMNS = (
    ("name", "network", "{}"),
    ("members", "members", "{}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("nll", "NLL (nats)", "{:.4f}"),
    ("brier", "Brier", "{:.4f}"),
    ("ece", "ECE", "{:.2%}"),
)
ERROR, LOSS = "test error (%)", "test NLL (nats)"  # labels of axes


class Job(NamedTuple):
    """One command: data, architecture, settings, and where checkpoints go."""

    problem: Problem
    dataset: Dataset
    config: TrainConfig
    device: str
    checkpoints: Path
    args: Namespace

    def build(self) -> nn.Module:
        """An untrained network."""
        return self.problem.network(self.dataset, ensemble=False)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Training rows and classes."""
        return self.dataset.train_x, self.dataset.train_y

    def options(self) -> dict[str, Any]:
        """What every method takes."""
        return {
            "device": self.device,
            "directory": self.checkpoints,
            "resume": self.args.resume,
            "progress": not self.args.quiet,
        }

    def logits(self, model: nn.Module) -> Tensor:
        """[M, N, C] on the test rows."""
        size = EVALUATION_ROWS.get(self.problem.model, 1000)
        return predict(model, self.dataset.test_x, batch_size=size)

    def row(self, name: str, logits: Tensor) -> dict[str, Any]:
        """A row of the table: the mean prediction of the members of `logits` [M, N, C]."""
        summary = ensemble_summary(logits, self.dataset.test_y.to(logits.device))
        values = {key: float(getattr(summary, key)) for key in ("accuracy", "nll", "brier", "ece")}
        return {"name": name, "members": logits.shape[0], **values}


@dataclass
class Found:
    """What a command writes.

    Attributes:
        settings: those of the method.
        rows: of the table.
        notes: what to know when reading it.
        histories: of the training runs.
        numbers: further ones, for the JSON document.
        tables: name of a CSV file to its rows.
        figures: name to a function that draws it.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str]
    histories: list[list[dict[str, Any]]]
    numbers: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, Callable] = field(default_factory=dict)


def run_fge(job: Job) -> Found:
    """Fast geometric or snapshot ensembles."""
    args, config = job.args, job.config
    steps = -(-len(job.dataset.train_y) // config.batch_size)
    if args.kind == "fge":
        cycle, high, low = args.cycle_epochs or 2, args.lr_high, args.lr_low
        high, low = high or config.lr / 2, low or config.lr / 100
        last = args.cycles * cycle - cycle // 2  # the network of a cycle is kept in its middle
        first = config.epochs - last
        if first < 0:
            args.usage_error(
                f"argument --epochs: must be at least {last}, the epochs of {args.cycles} cycles; "
                f"got {config.epochs}"
            )
        settings = {"cycle": cycle, "a1": high, "a2": low, "fge_epochs": last}
        trained = train_fge(job.build, *job.rows(), config, **settings, **job.options())
        at = [first + cycle * n + cycle / 2 for n in range(args.cycles)]

        def rate(step: int) -> float:
            if step < first * steps:
                return config.lr * config.lr_factor(step, steps)
            return fge_learning_rate(step - first * steps + 1, cycle * steps, high, low)
    else:
        settings = {"cycles": args.cycles}
        trained = train_snapshot(job.build, *job.rows(), config, **settings, **job.options())
        length = config.epochs // args.cycles
        at = [length * (n + 1) for n in range(args.cycles)]

        def rate(step: int) -> float:
            return cosine_learning_rate(step + 1, length * steps, config.lr)

    logits = job.logits(trained.model)
    each = [job.row(f"epoch {epoch:g}", one[None]) for epoch, one in zip(at, logits, strict=True)]
    growing = [job.row(f"first {k}", logits[:k]) for k in range(1, len(logits) + 1)]
    networks = trained.model.members
    vectors = FlatLayout(networks[0]).flatten_many(networks).double()
    apart = (vectors[1:] - vectors[:-1]).norm(dim=1)
    collected = [
        {**row, "epoch": epoch, "ensemble_accuracy": so_far["accuracy"], "distance": gap}
        for row, epoch, so_far, gap in zip(each, at, growing, [None, *apart.tolist()], strict=True)
    ]
    epochs = [step / steps for step in range(config.epochs * steps)]

    def draw():
        return path_plots.cycle_panels(
            epochs,
            [rate(step) for step in range(len(epochs))],
            at,
            [100 * (1 - row["accuracy"]) for row in each],
            [100 * (1 - row["accuracy"]) for row in growing],
            apart,
            f"{job.dataset.name}: {'FGE' if args.kind == 'fge' else 'snapshot ensemble'}",
        )

    rows = [*each, {**growing[-1], "name": "ensemble"}]
    notes = [error_note(job, rows)]
    settings = {"kind": args.kind, **settings}
    tables = {"collected": collected}
    return Found(settings, rows, notes, trained.histories, tables=tables, figures={"cycles": draw})


def run_swag(job: Job) -> Found:
    """The mean of a run's end, and samples of the Gaussian around it."""
    args, config = job.args, job.config
    settings = {
        "swa_lr": args.swa_lr or config.lr / 2,
        "collect": args.collect,
        "rank": args.rank,
        "samples": args.samples,
        "scale": args.scale,
    }
    trained = train_swag(job.build, *job.rows(), config, **settings, **job.options())
    (swag,) = trained.swags
    train_x = job.dataset.train_x.to(job.device)
    mean = job.logits(swag.network(swag.mean, train_x))
    logits = job.logits(trained.model)
    sizes = sorted({1, 2, 3, 5, 10, 20, 50, 100, len(logits)} & set(range(1, len(logits) + 1)))
    growing = [job.row(f"first {k}", logits[:k]) for k in sizes]
    rows = [
        job.row("mean (SWA)", mean),
        job.row("first sample", logits[:1]),
        job.row("samples (SWAG)", logits),
    ]
    notes = [
        error_note(job, rows),
        f"the Gaussian holds {swag.held} deviations of {swag.count} networks",
    ]

    def draw():
        quantities = panels(sizes, {"samples (SWAG)": growing})
        levels = {ERROR: 100 * (1 - rows[0]["accuracy"]), LOSS: rows[0]["nll"]}
        title = f"{job.dataset.name}: SWAG, scale {args.scale:g}"
        return path_plots.path_panels(quantities, "samples", title, levels, "mean (SWA)")

    return Found(
        settings, rows, notes, trained.histories, tables={"samples": growing},
        figures={"samples": draw},
    )  # fmt: skip


def panels(positions: Sequence[float], paths: Mapping[str, Sequence[dict[str, Any]]]) -> dict:
    """Test error and NLL of the rows of each path at the positions, for `path_panels`."""
    return {
        ERROR: {
            name: (positions, [100 * (1 - row["accuracy"]) for row in rows])
            for name, rows in paths.items()
        },
        LOSS: {name: (positions, [row["nll"] for row in rows]) for name, rows in paths.items()},
    }


def error_note(job: Job, rows: Sequence[dict[str, Any]]) -> str:
    """`accuracy_note` of the best of the rows."""
    return accuracy_note(len(job.dataset.test_y), max(row["accuracy"] for row in rows))
