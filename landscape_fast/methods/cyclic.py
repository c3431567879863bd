"""Ensembles from one run with a cyclical learning rate: FGE, Snapshot Ensembles, cSG-MCMC."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import Trained
from landscape_fast.methods.langevin import LangevinSGD
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.methods.snapshots import Plan, SnapshotRun, train_with_snapshots
from landscape_fast.ops._checks import require, whole


def fge_learning_rate(i: int, cycle: int, a1: float, a2: float) -> float:
    r"""The learning rate of Fast Geometric Ensembling in iteration i.

    .. math::
        t = (((i - 1) \bmod c) + 1) / c, \quad
        \alpha = (1 - 2t) a_1 + 2t a_2 \; (t \le 1/2), \quad (2 - 2t) a_2 + (2t - 1) a_1

    It falls to :math:`a_2` in the middle of a cycle, at :math:`i \bmod c = c / 2`, where a network
    is kept, and is :math:`a_1` at its end.

    Args:
        i: number of the iteration, from 1.
        cycle: c, iterations of a cycle, even.
        a1: the highest rate; `a2` the lowest.

    Raises:
        ValueError: if i or the cycle breaks its rule.

    Source: Garipov et al. 2018 (arXiv:1802.10026), section 4 and Algorithm 1. In the authors' code
        t is `(i - 1) mod c / c`, so that it gives in iteration i + 1 what this gives in i, and
        keeps networks in the same iterations.

    Example:
        >>> [round(fge_learning_rate(i, 4, 0.05, 0.01), 3) for i in range(1, 7)]
        [0.03, 0.01, 0.03, 0.05, 0.03, 0.01]
    """
    op = "fge_learning_rate"
    require(whole(i, 1), op, "i", "an integer of at least 1", i)
    require(whole(cycle, 2) and cycle % 2 == 0, op, "cycle", "an even number of steps", cycle)
    t = ((i - 1) % cycle + 1) / cycle
    if t <= 0.5:
        return (1 - 2 * t) * a1 + 2 * t * a2
    return (2 - 2 * t) * a2 + (2 * t - 1) * a1


def cosine_learning_rate(i: int, cycle: int, a: float) -> float:
    r"""The learning rate of Snapshot Ensembles and of cSG-MCMC in iteration i.

    .. math:: \alpha = \frac{a}{2} \left(1 + \cos \frac{\pi ((i - 1) \bmod c)}{c}\right)

    Args:
        i: number of the iteration, from 1.
        cycle: c, iterations of a cycle.
        a: the rate at which a cycle begins.

    Raises:
        ValueError: if i or the cycle breaks its rule.

    Source: Huang et al. 2017 (arXiv:1704.00109), Zhang et al. 2020 (arXiv:1902.03932).

    Example:
        >>> [round(cosine_learning_rate(i, 4, 0.2), 3) for i in range(1, 6)]
        [0.2, 0.171, 0.1, 0.029, 0.2]
    """
    op = "cosine_learning_rate"
    require(whole(i, 1), op, "i", "an integer of at least 1", i)
    require(whole(cycle, 1), op, "cycle", "an integer of at least 1", cycle)
    return 0.5 * a * (1 + math.cos(math.pi * ((i - 1) % cycle) / cycle))


def train_fge(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    cycle: int = 2,
    a1: float = 0.05,
    a2: float = 0.01,
    fge_epochs: int | None = None,
    runs: int = 1,
    statistics: str = "recalibrate",
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Fast Geometric Ensembling: train, then walk in short cycles and keep a network in each.

    The first epochs are the beginning of an ordinary run of `config.epochs` epochs; in the last
    `fge_epochs` the learning rate is `fge_learning_rate`, and the network is kept in the middle of
    every cycle, where the rate is lowest. The state of the optimiser goes on from one to the other.

    Args:
        build: makes a network that maps [B, ...] to [B, C]. It may return a trained one: with
            `fge_epochs=config.epochs` the cycles begin at once.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; `epochs` is the whole budget and `schedule` that of the first epochs.
            The authors use `optimizer="sgd"` and `schedule="hold_linear"`, without Nesterov's
            correction.
        cycle: epochs of one cycle; with its steps even in number, as 2 or 4 epochs always are.
        a1: the highest learning rate of a cycle, `a2` the lowest. The defaults are the authors' for
            residual networks; for VGG they have 0.01 for both.
        fge_epochs: epochs with cycles, at least half a cycle; None for a fifth of all, as the
            authors, or half a cycle where that is more.
        runs: independent runs, whose networks make one ensemble.
        statistics: "recalibrate" takes the batch norm statistics of every kept network anew on all
            training rows, "running" leaves those of the run, as the authors do.
        device: where to train.
        directory: folder of the checkpoints fge-000.pt, ...; None keeps none.
        resume: continue from the checkpoints found there.
        progress: show progress.
        on_step: called after every step with the number of steps its run has done.

    Returns:
        `Trained`, its model a `DeepEnsemble` of the networks kept, run by run in the order of
        keeping; one history per run.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Garipov et al. 2018 (arXiv:1802.10026), Algorithm 1.
    """
    op = "train_fge"
    require(whole(cycle, 1), op, "cycle", "an integer of at least 1", cycle)
    half = (cycle + 1) // 2
    require(0 < a2 <= a1, op, "a1 and a2", "numbers with 0 < a2 <= a1", f"{a1} and {a2}")
    if fge_epochs is None:
        fge_epochs = min(max(half, config.epochs // 5), config.epochs)
    fits = whole(fge_epochs, half) and fge_epochs <= config.epochs
    rule = f"an integer from {half}, half a cycle, to config.epochs = {config.epochs}"
    require(fits, op, "fge_epochs", rule, fge_epochs)
    settings = {"cycle": cycle, "a1": a1, "a2": a2, "fge_epochs": fge_epochs}
    return train_with_snapshots(
        "fge",
        build,
        x,
        y,
        config,
        lambda steps, *arguments: SnapshotRun(_fge_plan(config, steps, settings), *arguments),
        runs=runs,
        statistics=statistics,
        device=device,
        directory=directory,
        resume=resume,
        progress=progress,
        on_step=on_step,
    )[0]


def _fge_plan(config: TrainConfig, steps: int, settings: dict[str, Any]) -> Plan:
    c, total = settings["cycle"] * steps, config.epochs * steps
    got = f"{settings['cycle']} with {steps} steps per epoch"
    remedy = "two epochs always have"
    require(c % 2 == 0, "train_fge", "cycle", "so long that its steps are even", got, remedy)
    first = total - settings["fge_epochs"] * steps

    def rate(step: int) -> float:
        if step < first:
            return config.lr * config.lr_factor(step, steps)
        return fge_learning_rate(step - first + 1, c, settings["a1"], settings["a2"])

    return Plan(rate, tuple(range(first + c // 2, total + 1, c)), settings)


def train_snapshot(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    cycles: int = 5,
    runs: int = 1,
    statistics: str = "recalibrate",
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Snapshot Ensembles: the learning rate falls to 0 and restarts; a network is kept each time.

    Args:
        build: makes a network that maps [B, ...] to [B, C].
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; `lr` begins every cycle, and `schedule` must be "cosine", without
            warm-up.
        cycles: M, of equal length: they divide `config.epochs`.
        runs: independent runs, whose networks make one ensemble.
        statistics: see `train_fge`.
        device: where to train.
        directory: folder of the checkpoints snapshot-000.pt, ...; None keeps none.
        resume: continue from the checkpoints found there.
        progress: show progress.
        on_step: called after every step with the number of steps its run has done.

    Returns:
        `Trained`, its model a `DeepEnsemble` of the M networks of each run, oldest first; one
        history per run.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Huang et al. 2017 (arXiv:1704.00109).
    """
    length = _cycle_epochs("train_snapshot", config, cycles)

    def make(steps: int, *arguments: Any) -> SnapshotRun:
        rate = partial(_cosine_rate, length * steps, config.lr)
        keep = tuple(length * steps * (n + 1) for n in range(cycles))
        return SnapshotRun(Plan(rate, keep, {"cycles": cycles}), *arguments)

    return train_with_snapshots(
        "snapshot",
        build,
        x,
        y,
        config,
        make,
        runs=runs,
        statistics=statistics,
        device=device,
        directory=directory,
        resume=resume,
        progress=progress,
        on_step=on_step,
    )[0]


def train_csgmcmc(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    cycles: int = 4,
    samples: int = 3,
    explore: float = 0.9,
    temperature: float | None = None,
    runs: int = 1,
    statistics: str = "recalibrate",
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    r"""Cyclical stochastic gradient MCMC: each cycle explores, then samples with Langevin noise.

    A step is that of `LangevinSGD`. In the first part `explore` of a cycle it has no noise; then
    its noise is that of the posterior :math:`\exp(-N L(w) / T)`, L being the mean loss of the N
    training rows and half of `weight_decay` times the squared norm. Without momentum that is cSGLD,
    with momentum :math:`\mu` cSGHMC with the friction :math:`1 - \mu`.

    Args:
        build: makes a network that maps [B, ...] to [B, C].
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; `optimizer` must be "sgd" and `schedule` "cosine", without warm-up.
            `lr` begins every cycle; the authors have 0.5 with a weight decay of 5e-4, and for
            cSGHMC the momentum 0.1.
        cycles: M, of equal length: they divide `config.epochs`.
        samples: networks kept per cycle, one after each of its last epochs.
        explore: part of a cycle without noise, in [0, 1); the epochs that end in a sample begin
            after it.
        temperature: T; 1 is the posterior, None for 1 / N, which the authors' code has.
        runs: independent runs, whose networks make one ensemble.
        statistics: see `train_fge`.
        device: where to train. The noise is drawn there: other devices draw other numbers.
        directory: folder of the checkpoints csgmcmc-000.pt, ...; None keeps none.
        resume: continue from the checkpoints found there.
        progress: show progress.
        on_step: called after every step with the number of steps its run has done.

    Returns:
        `Trained`, its model a `DeepEnsemble` of the `cycles * samples` networks of each run, oldest
        first; one history per run.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Zhang et al. 2020 (arXiv:1902.03932). The authors' code fixes 4 cycles, and as its count
        of steps per epoch is no integer, its cycles drift by 12 steps; these do not.
    """
    op = "train_csgmcmc"
    length = _cycle_epochs(op, config, cycles)
    require(config.optimizer == "sgd", op, "config.optimizer", "'sgd'", repr(config.optimizer))
    require(0 <= explore < 1, op, "explore", "a number in [0, 1)", explore)
    most = length - math.ceil(round(explore * length, 6))
    rule = f"an integer from 1 to {most}, the epochs of a cycle after explore = {explore}"
    require(whole(samples, 1) and samples <= most, op, "samples", rule, samples)
    fits = temperature is None or 0 <= temperature < math.inf
    require(fits, op, "temperature", "None or a finite number of at least 0", temperature)
    T = 1 / x.shape[0] if temperature is None else float(temperature)
    settings = {"cycles": cycles, "samples": samples, "explore": explore, "temperature": T}

    def make(steps: int, *arguments: Any) -> SnapshotRun:
        rate = partial(_cosine_rate, length * steps, config.lr)
        ends = (length * (n + 1) - k for n in range(cycles) for k in reversed(range(samples)))
        plan = Plan(rate, tuple(end * steps for end in ends), settings)
        return _LangevinRun(length * steps, plan, *arguments)

    return train_with_snapshots(
        "csgmcmc",
        build,
        x,
        y,
        config,
        make,
        runs=runs,
        statistics=statistics,
        device=device,
        directory=directory,
        resume=resume,
        progress=progress,
        on_step=on_step,
    )[0]


class _LangevinRun(SnapshotRun):
    """A run whose optimiser adds noise in the last part of every cycle."""

    def __init__(self, cycle: int, plan: Plan, *arguments: Any) -> None:
        super().__init__(plan, *arguments)
        self.cycle, self.exploring = cycle, round(plan.settings["explore"] * cycle)
        self.noise = plan.settings["temperature"] / self.batches.x.shape[0]

    def make_optimizer(self) -> torch.optim.Optimizer:
        options = {"momentum": self.config.momentum, "weight_decay": self.config.weight_decay}
        return LangevinSGD(self.model.parameters(), lr=self.config.lr, **options)

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        sampling = self.step % self.cycle >= self.exploring
        # a generator of its own for every step: a resumed run needs no state
        seed = stream_seed(self.config.seed, self.stream, "posterior", self.step)
        self.optimizer.set_noise(self.noise if sampling else 0.0, seed)
        super()._one_step(x, y)


def _cycle_epochs(op: str, config: TrainConfig, cycles: int) -> int:
    fits = whole(cycles, 1) and config.epochs % cycles == 0
    rule = f"a divisor of config.epochs = {config.epochs}"
    require(fits, op, "cycles", rule, cycles)
    ok = config.schedule == "cosine" and config.warmup_epochs == 0
    got = f"{config.schedule!r} with {config.warmup_epochs} epochs of warm-up"
    require(ok, op, "config.schedule", "'cosine' without warm-up", got)
    return config.epochs // cycles


def _cosine_rate(cycle: int, a: float, step: int) -> float:
    return cosine_learning_rate(step + 1, cycle, a)
