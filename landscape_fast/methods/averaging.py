"""Averages over the end of a run: SWA, and the Gaussian of SWAG, of one run or several."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from landscape_fast.methods.config import TrainConfig, hold_linear
from landscape_fast.methods.cyclic import cosine_learning_rate
from landscape_fast.methods.deep import Trained
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.methods.snapshots import Plan, SnapshotRun, train_with_snapshots
from landscape_fast.methods.swag import Swag
from landscape_fast.methods.trainer import History, training_seconds
from landscape_fast.ops._checks import require, whole

KINDS = {"constant": "hold_linear", "cyclic": "cosine"}  # and the schedule that begins the run


class TrainedSwag(NamedTuple):
    """What `train_swag` returns.

    Attributes:
        model: `DeepEnsemble` of the samples, those of run 0 first; in evaluation mode.
        histories: one per run.
        swags: the Gaussian of each run, for more samples.
    """

    model: nn.Module
    histories: list[History]
    swags: list[Swag]

    @property
    def seconds(self) -> list[float]:
        """Seconds of training of each run, over all its epochs."""
        return training_seconds(self.histories)


def train_swa(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    kind: str = "constant",
    swa_lr: float = 0.05,
    collect: int | None = None,
    per_epoch: int = 1,
    cycles: int = 5,
    runs: int = 1,
    statistics: str = "recalibrate",
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Stochastic weight averaging: the mean of the networks that the end of a run passes.

    With kind="constant" the learning rate is `config.lr` for the first half of the first part of
    the run, falls linearly to `swa_lr` at nine tenths of it, and stays there; in the last `collect`
    epochs networks are averaged. With kind="cyclic" it falls to 0 on a cosine in the first part,
    where the first network is taken, and then in each of `cycles` equal cycles from `swa_lr` to 0,
    where the others are.

    Args:
        build: makes a network that maps [B, ...] to [B, C]. It may return a trained one: with
            `collect=config.epochs` the averaging begins at once.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; `epochs` is the whole budget, and `schedule` must be "hold_linear" for
            kind="constant", "cosine" for kind="cyclic".
        kind: "constant" or "cyclic".
        swa_lr: the learning rate of the last epochs; of a cycle, its highest.
        collect: the last epochs, from which networks are averaged; None for a quarter of all.
        per_epoch: with kind="constant", networks per epoch, at equal distances.
        cycles: with kind="cyclic", cycles in the last epochs; cycles + 1 networks are averaged,
            without the first where collect is all epochs.
        runs: independent runs; the model is the ensemble of their means.
        statistics: "recalibrate" takes the batch norm statistics of the mean anew on all training
            rows; "running" leaves those of the last network, which are wrong for the mean.
        device: where to train.
        directory: folder of the checkpoints swa-000.pt, ...; None keeps none.
        resume: continue from the checkpoints found there.
        progress: show progress.
        on_step: called after every step with the number of steps its run has done.

    Returns:
        `Trained`, its model a `DeepEnsemble` of one mean per run; one history per run.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Izmailov et al. 2018 (arXiv:1803.05407), averaged by `torch.optim.swa_utils`. The
        constant schedule is that of the authors' code, the cyclic one that of the code of Wortsman
        et al. 2021 (arXiv:2102.10472), with a rate for every step where theirs is for an epoch.
    """
    plan = _plan("train_swa", config, kind, swa_lr, collect, per_epoch, cycles)
    return train_with_snapshots(
        "swa",
        build,
        x,
        y,
        config,
        lambda steps, *arguments: _MeanRun(plan(steps), *arguments),
        runs=runs,
        statistics=statistics,
        device=device,
        directory=directory,
        resume=resume,
        progress=progress,
        on_step=on_step,
    )[0]


def train_swag(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    samples: int = 30,
    scale: float = 0.5,
    rank: int = 20,
    block: bool = False,
    kind: str = "constant",
    swa_lr: float = 0.05,
    collect: int | None = None,
    per_epoch: int = 1,
    cycles: int = 5,
    runs: int = 1,
    statistics: str = "recalibrate",
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainedSwag:
    """SWAG: a Gaussian around the mean of SWA, and an ensemble of samples from it.

    The run is that of `train_swa`; with several runs it is multi-SWAG, a mixture of Gaussians.

    Args:
        build: makes a network that maps [B, ...] to [B, C]; see `train_swa`.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings; see `train_swa`.
        samples: networks drawn from each run's Gaussian, in the ensemble.
        scale: multiplies the covariance; see `Swag`.
        rank: the most deviations kept, or 0 for the diagonal alone.
        block: draws tensor by tensor; see `Swag.sample`.
        kind: "constant" or "cyclic", of the learning rate; see `train_swa`.
        swa_lr: the learning rate of the last epochs; of a cycle, its highest.
        collect: the last epochs, from which at least two networks are collected; None for a
            quarter of all.
        per_epoch: with kind="constant", networks per epoch.
        cycles: with kind="cyclic", cycles in the last epochs.
        runs: independent runs.
        statistics: "recalibrate" takes the batch norm statistics of every sample anew, one pass
            over the training rows for each; "running" leaves those of the last network.
        device: where to train.
        directory: folder of the checkpoints swag-000.pt, ...; None keeps none.
        resume: continue from the checkpoints found there.
        progress: show progress.
        on_step: called after every step with the number of steps its run has done.

    Returns:
        `TrainedSwag`: the ensemble of `runs * samples` networks, the histories, the Gaussians.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Maddox et al. 2019 (arXiv:1902.02476); several runs: Wilson and Izmailov 2020
        (arXiv:2002.08791).
    """
    op = "train_swag"
    require(whole(samples, 1), op, "samples", "an integer of at least 1", samples)
    require(scale >= 0, op, "scale", "a number of at least 0", scale)
    plan = _plan(op, config, kind, swa_lr, collect, per_epoch, cycles)
    options = {"scale": scale, "low_rank": rank > 0, "block": block}

    def make(steps: int, *arguments: Any) -> _GaussianRun:
        return _GaussianRun(rank, samples, options, plan(steps), *arguments)

    trained, done = train_with_snapshots(
        "swag",
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
    )
    return TrainedSwag(trained.model, trained.histories, [run.swag for run in done])


class _MeanRun(SnapshotRun):
    """A run that averages in place of keeping."""

    def __init__(self, plan: Plan, *arguments: Any) -> None:
        super().__init__(plan, *arguments)
        self.average = AveragedModel(self.model)

    def state(self) -> dict[str, Any]:
        return super().state() | {"average": self.average.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.average.load_state_dict(state["average"])

    def keep(self) -> None:
        self.average.update_parameters(self.model)

    def networks(self) -> list[nn.Module]:
        return [self.average.module.eval()]


class _GaussianRun(SnapshotRun):
    """A run that collects moments in place of keeping."""

    def __init__(self, rank: int, samples: int, options: dict[str, Any], plan, *arguments) -> None:
        super().__init__(plan, *arguments)
        self.swag, self.samples, self.options = Swag(self.model, rank), samples, options
        self.identity["rank"] = rank
        rule = "so many that at least 2 networks are collected"
        require(len(plan.keep) >= 2, "train_swag", "collect", rule, plan.settings["collect"])

    def state(self) -> dict[str, Any]:
        return super().state() | {"swag": self.swag.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.swag.load_state_dict(state["swag"])

    def keep(self) -> None:
        self.swag.collect(self.model)
        for mine, buffer in zip(self.swag.model.buffers(), self.model.buffers(), strict=True):
            mine.copy_(buffer)

    def networks(self) -> list[nn.Module]:
        seed = stream_seed(self.config.seed, self.stream, "posterior")
        return list(self.swag.ensemble(self.samples, seed, **self.options).members)


def _plan(
    op: str,
    config: TrainConfig,
    kind: str,
    swa_lr: float,
    collect: int | None,
    per_epoch: int,
    cycles: int,
) -> Callable[[int], Plan]:
    """Checks what `train_swa` and `train_swag` share; steps per epoch to the plan."""
    require(kind in KINDS, op, "kind", f"one of {tuple(KINDS)}", repr(kind))
    rule = f"{KINDS[kind]!r} with kind {kind!r}"
    require(config.schedule == KINDS[kind], op, "config.schedule", rule, repr(config.schedule))
    require(swa_lr > 0, op, "swa_lr", "a number above 0", swa_lr)
    if collect is None:
        collect = max(1, config.epochs // 4)
    rule = f"an integer from 1 to config.epochs = {config.epochs}"
    require(whole(collect, 1) and collect <= config.epochs, op, "collect", rule, collect)
    require(whole(per_epoch, 1), op, "per_epoch", "an integer of at least 1", per_epoch)
    require(whole(cycles, 1), op, "cycles", "an integer of at least 1", cycles)
    settings = {"kind": kind, "swa_lr": swa_lr, "collect": collect, "per_epoch": per_epoch}
    settings["cycles"], start = cycles, config.epochs - collect
    make = _constant if kind == "constant" else _cyclic
    return lambda steps: make(op, config, steps, start, settings)


def _constant(op: str, config: TrainConfig, steps: int, start: int, settings: dict) -> Plan:
    swa_lr, per_epoch = settings["swa_lr"], settings["per_epoch"]
    rule = f"at most {steps}, the steps of an epoch"
    require(per_epoch <= steps, op, "per_epoch", rule, per_epoch)

    def rate(step: int) -> float:
        epoch = step // steps
        if epoch >= start:
            return swa_lr
        if step < config.warmup_epochs * steps:
            return config.lr * config.lr_factor(step, steps)
        return config.lr * hold_linear(epoch / start, swa_lr / config.lr)

    ends = range(1, settings["collect"] * per_epoch + 1)
    return Plan(rate, tuple(start * steps + n * steps // per_epoch for n in ends), settings)


def _cyclic(op: str, config: TrainConfig, steps: int, start: int, settings: dict) -> Plan:
    swa_lr, cycles = settings["swa_lr"], settings["cycles"]
    total, first, warm = config.epochs * steps, start * steps, config.warmup_epochs * steps
    length, rest = divmod(total - first, cycles)
    rule = f"a divisor of the {total - first} steps of collect = {settings['collect']} epochs"
    require(rest == 0, op, "cycles", rule, cycles)

    def rate(step: int) -> float:
        if step >= first:
            return cosine_learning_rate(step - first + 1, length, swa_lr)
        if step < warm:
            return config.lr * config.lr_factor(step, steps)
        return cosine_learning_rate(int(step - warm) + 1, max(1, int(first - warm)), config.lr)

    begin = first if first else length
    return Plan(rate, tuple(range(begin, total + 1, length)), settings)
