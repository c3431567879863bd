"""Runs that keep networks on the way: one learning rate and one list of steps for every method.

Fast geometric ensembling, snapshot ensembles, cyclical sampling and weight averaging differ in two
things only: the learning rate of a step, and after which steps the network of the moment is kept
(or averaged). Both are a `Plan`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import Trained, build_member
from landscape_fast.methods.deep_together import check_network
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.trainer import Run
from landscape_fast.nn.ensemble import DeepEnsemble
from landscape_fast.nn.statistics import recalibrate_
from landscape_fast.ops._checks import require, whole

STATISTICS = ("recalibrate", "running")


@dataclass(frozen=True)
class Plan:
    """What makes a run a method.

    Attributes:
        rate: the learning rate of a step, counted from 0; also asked for the step after the last.
        keep: numbers of finished steps after which the network is kept; counted from 1.
        settings: strings and numbers that a run resuming from a checkpoint must share.
    """

    rate: Callable[[int], float]
    keep: tuple[int, ...]
    settings: dict[str, Any]


class SnapshotRun(Run):
    """A run of `fit` under a plan: the networks kept are part of its checkpoint."""

    def __init__(self, plan: Plan, *arguments: Any) -> None:
        self.plan = plan
        super().__init__(*arguments)
        self.identity |= plan.settings
        self.kept: list[dict[str, Tensor]] = []  # state dicts

    def lr_factor(self, step: int) -> float:
        return self.plan.rate(step) / self.config.lr

    def state(self) -> dict[str, Any]:
        return super().state() | {"kept": self.kept}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.kept = [{k: v.to(self.device) for k, v in kept.items()} for kept in state["kept"]]

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        super()._one_step(x, y)
        if self.step + 1 in self.plan.keep:
            self.keep()

    def keep(self) -> None:
        """Keeps the network of the moment."""
        self.kept.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})

    def networks(self) -> list[nn.Module]:
        """The networks kept, oldest first, in evaluation mode; they share nothing."""
        return [self.network(state) for state in self.kept]

    def network(self, state: dict[str, Tensor]) -> nn.Module:
        """The network of the run with another state."""
        network = copy.deepcopy(self.model)
        network.load_state_dict(state)
        return network.eval()


def train_with_snapshots(
    method: str,
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    make: Callable[..., SnapshotRun],
    *,
    runs: int,
    statistics: str,
    device: str | torch.device,
    directory: Path | None,
    resume: bool,
    progress: bool,
    on_step: Callable[[int], None] | None,
) -> tuple[Trained, list[SnapshotRun]]:
    """Independent runs one after the other, and all that they kept as one ensemble.

    Args:
        method: name of the public function, for errors and files.
        make: called with the number of steps per epoch and then what `Run` takes.

    Returns:
        The ensemble of the networks of run 0, of run 1, ..., and the finished runs.
    """
    op = f"train_{method}"
    check_rows(op, x, y)
    require(whole(runs, 1), op, "runs", "an integer of at least 1", runs)
    require(statistics in STATISTICS, op, "statistics", f"one of {STATISTICS}", repr(statistics))
    steps = -(-x.shape[0] // config.batch_size)
    networks, histories, done = [], [], []
    for r in range(runs):
        network = build_member(build, config, r, device)
        where = next(network.parameters()).device
        rows, targets = x.to(where), y.to(where)
        check_network(op, network, rows)
        label = method if runs == 1 else f"{method} {r + 1}/{runs}"
        path = None if directory is None else Path(directory) / f"{method}-{r:03d}.pt"
        run = make(steps, network, rows, targets, config, r, label, path, on_step)
        run.identity["method"] = method
        histories.append(run.execute(resume, progress))
        found = run.networks()
        if statistics == "recalibrate":
            for each in found:
                recalibrate_(each, rows)
        networks += found
        done.append(run)
    return Trained(DeepEnsemble(networks).eval(), histories), done
