"""Rows, networks and samples of a run: what all measurements of a landscape report draw on."""

import copy
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from landscape_fast.landscape import (
    Accepted,
    DiagonalGaussian,
    LowRankGaussian,
    RandomDirections,
    SubspaceSampler,
    WeightDropout,
    sample_accepted,
    scale_for_accuracy,
)
from landscape_fast.methods import predict, sweep
from landscape_fast.methods.checkpoint import describe_model
from landscape_fast.methods.splits import stratified_split
from landscape_fast.methods.sweep import Sweep, exact_accuracy
from landscape_fast.nn import StackedEnsemble, recalibrate_
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.statistics import batch_norms
from landscape_fast.studies.landscape_settings import ReportSettings
from landscape_fast.studies.presets import EVALUATION_ROWS
from landscape_fast.studies.run_folder import RunFolder

DECIDED = 1 / 3  # of the test rows of every class: samples are accepted by them
FOREIGN_FILE = "resume: checkpoint"  # how `load_checkpoint` begins when it refuses a file
T = TypeVar("T")
WAYS = ("random", "dropout", "diagonal", "low_rank")  # samplers around one solution
# Scales above which none is looked for; for the others it is so many norms of the solution.
HIGHEST, NORMS = {"dropout": 0.95, "diagonal": 256.0}, 4.0
PROBES, HALVINGS = 3, 12  # samples at each scale tried, and steps of the search
CAPS = {"diagonal": 1.0}  # of accepted samples: the deviations are those of the trajectory itself
TOGETHER = 16  # networks in one stack


class Rows(NamedTuple):
    """Some test rows: what the networks are given, classes, and positions among the test rows."""

    x: Tensor
    y: Tensor
    index: Tensor

    def first(self, count: int | None) -> "Rows":
        """So many of them, evenly spread; all if None."""
        if count is None or count >= len(self.y):
            return self
        places = torch.linspace(0, len(self.y) - 1, count).round().long()
        return Rows(*(t[places.to(t.device)] for t in self))


class Bench:
    """A run, with the rows that samples are chosen by apart from those that figures measure.

    Args:
        run: the networks.
        settings: sizes.
        scratch: folder for what an interrupted report continues from.
    """

    def __init__(self, run: RunFolder, settings: ReportSettings, scratch: Path) -> None:
        self.run, self.settings, self.scratch = run, settings, scratch
        self.model = copy.deepcopy(run.networks[0]).eval()
        self.layout = FlatLayout(self.model)
        self.device = run.device
        self.weights = run.weights
        self.R, self.classes = len(run.networks), len(run.dataset.classes)
        self.normed = bool(batch_norms(self.model))
        data = run.dataset
        measured, decided = stratified_split(data.test_y, DECIDED, seed=0)
        every = Rows(data.test_x, data.test_y, torch.arange(len(data.test_y)))
        validation, test = (Rows(*(t[part] for t in every)) for part in (decided, measured))
        self.validation = self._placed(validation.first(settings.validation_rows))
        self.test = self._placed(test.first(settings.rows))
        calibration = data.train_x[: settings.calibration_rows]
        self.calibration = calibration.to(self.device) if self.normed else None
        train = Rows(data.train_x, data.train_y, torch.arange(len(data.train_y)))
        self.train = self._placed(train.first(settings.train_rows))
        self.batch_size = EVALUATION_ROWS.get(run.problem.model, 1000)
        self.options = {"calibration": self.calibration, "batch_size": self.batch_size}

    def _placed(self, rows: Rows) -> Rows:
        return Rows(rows.x.to(self.device), rows.y.to(self.device), rows.index)

    @cached_property
    def _identity(self) -> str:
        """Of the networks: what another run measured is not taken for theirs."""
        bits = zlib.crc32(self.weights.cpu().contiguous().view(torch.uint8).numpy())
        return f"{describe_model(self.model)} {bits:08x}"

    def kept(self, label: str, measure: Callable[..., T]) -> T:
        """`measure(**options)`, whose sweep keeps what is done and goes on from there.

        A file of something else, such as samples of another release, is measured anew.
        """
        key = f"{label} {self.settings} {self._identity}"
        file = self.scratch / f"{label.replace(' ', '-')}-{zlib.crc32(key.encode()):08x}.pt"
        given = {**self.options, "progress": False, "label": label}
        given |= {"checkpoint": file, "resume": True}
        try:
            return measure(**given)
        except ValueError as error:
            if not str(error).startswith(FOREIGN_FILE):
                raise
            file.unlink()
            return measure(**given)

    def measure(self, weights: Tensor, rows: Rows, label: str, **options) -> Sweep:
        """Scores of models [S, P] on the rows."""

        def part(start: int, stop: int) -> Tensor:
            return weights[start:stop].to(self.device)

        return self.sweep(part, len(weights), rows, label, **options)

    def sweep(
        self, part: Callable[[int, int], Tensor], count: int, rows: Rows, label: str, **options
    ) -> Sweep:
        """Scores of models on the rows; `part(start, stop)` gives their weights."""
        about = (self.model, part, count, rows.x, rows.y)
        return self.kept(label, lambda **given: sweep(*about, **(given | options)))

    def logits(self, weights: Tensor, rows: Rows, label: str) -> Tensor:
        """[S, N, C] on the CPU."""
        return self.measure(weights, rows, label, keep_logits=True).logits

    @cached_property
    def solutions(self) -> Tensor:
        """[R, N, C], logits of the trained networks on the test rows."""
        return self.logits(self.weights, self.test, "trained networks")

    @cached_property
    def accuracy(self) -> Tensor:
        """[R] float64, of the trained networks on the test rows."""
        return (self.solutions.argmax(-1) == self.test.y.cpu()).double().mean(1)

    @cached_property
    def validation_accuracy(self) -> Tensor:
        """[R] float64, of the trained networks on the validation rows."""
        found = self.measure(self.weights, self.validation, "validation of trained networks")
        return exact_accuracy(found.accuracy, len(self.validation.y))

    # Checkpoints of the trajectories.

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of the kept checkpoints; the last alone where none were kept."""
        kept = self.run.trajectories
        return (self.run.config.epochs,) if kept is None else kept.epochs

    @property
    def checkpoints(self) -> Tensor:
        """[R, T, P] on the CPU."""
        kept = self.run.trajectories
        return self.weights[:, None].cpu() if kept is None else kept.weights

    def late(self, share: float) -> list[int]:
        """Places of the checkpoints in the last `share` of training, without the untrained."""
        start = (1 - share) * self.run.config.epochs
        return [t for t, epoch in enumerate(self.epochs) if epoch >= start and epoch > 0]

    def late_weights(self, r: int) -> Tensor:
        """[T', P], the checkpoints of run r that Gaussians and averages are made of."""
        return self.checkpoints[r, self.late(self.settings.late_share)].to(self.device)

    # Samples.

    def sampler(self, way: str, r: int) -> SubspaceSampler | None:
        """The way to sample around run r, or None where too few checkpoints were kept."""
        if way == "random":
            return RandomDirections(self.weights[r], self.layout)
        if way == "dropout":
            return WeightDropout(self.weights[r])
        late = self.late_weights(r)
        if way == "diagonal":
            return DiagonalGaussian.from_checkpoints(late) if len(late) >= 2 else None
        return self.low_rank(late)

    def low_rank(self, points: Tensor) -> LowRankGaussian | None:
        """The low-rank Gaussian of checkpoints or samples, with directions of length 1."""
        rank = min(self.settings.rank, len(points) - 1)
        return LowRankGaussian.from_checkpoints(points, rank) if rank >= 1 else None

    def scale_at(self, sampler: SubspaceSampler, way: str, r: int, least: float) -> float:
        """The scale at which samples have this accuracy on the validation rows, in the mean."""
        high = HIGHEST.get(way) or NORMS * float(self.weights[r].norm())
        return scale_for_accuracy(
            self.model, sampler, self.validation.x, self.validation.y, threshold=least,
            scales=(0.0, high), samples=PROBES, steps=HALVINGS, seed=self.settings.seed,
            progress=False, **self.options,
        ).scale  # fmt: skip

    def tolerance(self) -> float:
        """How far below its solution a sample may be on the validation rows."""
        return max(self.settings.drop, 1.0 / len(self.validation.y))

    def accepted(self, sampler: SubspaceSampler, way: str, r: int, count: int) -> Accepted:
        """Samples about as accurate as run r, drawn up to the scale where that is still likely."""
        threshold = max(0.0, float(self.validation_accuracy[r]) - self.tolerance() - 1e-9)
        top = self.scale_at(sampler, way, r, threshold)
        top = min(top, CAPS.get(way, top))
        return sample_accepted(
            self.model, sampler, count, self.validation.x, self.validation.y,
            threshold=threshold, scales=(0.0, top), tries=self.settings.tries,
            seed=self.settings.seed + r, progress=False, **self.options,
        )  # fmt: skip

    # Networks that meet other images.

    def networks(self, weights: Tensor) -> "Networks":
        """Models [M, P] as a function from rows to logits [M, N, C]."""
        return Networks(self, weights)


class Networks:
    """Several networks of one architecture, their norms recalibrated once."""

    def __init__(self, bench: Bench, weights: Tensor) -> None:
        self.batch_size, self.stacks = bench.batch_size, []
        for part in weights.split(TOGETHER):
            networks = [self._network(bench, row) for row in part]
            self.stacks.append(StackedEnsemble(networks).eval())

    @staticmethod
    @torch.no_grad()
    def _network(bench: Bench, row: Tensor) -> nn.Module:
        network = copy.deepcopy(bench.model)
        views = bench.layout.views(row.to(bench.device))
        for name, parameter in network.named_parameters():
            parameter.copy_(views[name])
        if bench.normed:
            recalibrate_(network, bench.calibration, batch_size=bench.batch_size)
        return network.eval()

    def __call__(self, x: Tensor) -> Tensor:
        """[M, N, C] on the CPU."""
        parts = [predict(stack, x, batch_size=self.batch_size).cpu() for stack in self.stacks]
        return torch.cat(parts)


def pool(groups: dict[str, Tensor]) -> tuple[Tensor, dict[str, Sequence[int]]]:
    """All weights once, one group under another, and the places of every group's members."""
    places, start = {}, 0
    for name, weights in groups.items():
        places[name] = list(range(start, start + len(weights)))
        start += len(weights)
    return torch.cat(list(groups.values())), places
