"""The one training loop of the library, for plain networks and for networks that hold M members."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape_fast.methods.batches import Batches
from landscape_fast.methods.checkpoint import (
    describe_model,
    describe_rows,
    load_checkpoint,
    save_checkpoint,
)
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.interrupt import TrainingInterrupted, deferred_interrupt
from landscape_fast.methods.optim import make_optimizer
from landscape_fast.methods.progress import Progress
from landscape_fast.methods.seeds import isolated_rng, rng_state, set_rng_state, stream_seed
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.trajectories import EpochKeeper
from landscape_fast.nn import FoldedEnsemble, split_members
from landscape_fast.nn._stacked_build import tensors
from landscape_fast.ops._checks import require

History = list[dict[str, Any]]


def training_seconds(histories: list[History]) -> list[float]:
    """Seconds of training of each run, over all its epochs."""
    return [sum(epoch["seconds"] for epoch in history) for history in histories]


class Diverged(RuntimeError):
    """The loss of a training run stopped being finite."""


def gibbs_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy (nats) over members and rows: every member learns every row.

    Args:
        logits: [M, B, C], or [B, C] of a single network.
        targets: [B] integer classes, the same for all members, or [M, B].
        label_smoothing: fraction of the target spread over all classes.

    Returns:
        A 0-dim tensor. It is the mean loss of the members, never the loss of their mean prediction.

    Example:
        >>> logits = torch.zeros(3, 2, 4)
        >>> gibbs_cross_entropy(logits, torch.tensor([0, 1]))  # log 4
        tensor(1.3863)
    """
    if logits.ndim == 3:
        targets = targets.expand(logits.shape[:2]).flatten()
        logits = logits.flatten(0, 1)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    stream: int = 0,
    label: str = "training",
    identity: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> History:
    """Trains `model` in place; same arguments, machine and build: same bits, resumed or not.

    Args:
        model: maps rows [B, ...] to logits [B, C] or [M, B, C]; it stays on its device. With
            `config.member_batches="own"` a model of members is given [M, B, ...] (a
            `FoldedEnsemble` gets the folded rows), as the networks of `landscape_fast.models` take.
        x: [N, ...] training rows, moved to the model's device once.
        y: [N] int64 classes.
        config: the settings.
        stream: which of the seed's random streams to use (the member of a deep ensemble).
        label: what the progress display and the errors call this run.
        identity: further settings that a run resuming from the checkpoint must share.
        checkpoint: file written after every epoch and on Ctrl-C; None keeps nothing.
        resume: continue from `checkpoint` where it exists.
        progress: show a progress bar, or plain lines where there is no terminal.
        on_step: called with the number of steps done, after each.

    Returns:
        One dictionary per epoch: epoch, loss (nats), accuracy (fraction, training rows), lr (of the
        last step), seconds.

    Raises:
        TrainingInterrupted: a KeyboardInterrupt; after Ctrl-C, when the checkpoint is written.
        ValueError: if the rows do not fit together, or the checkpoint belongs to another run.
        Diverged: a RuntimeError; if the loss stops being finite.
    """
    check_rows("fit", x, y)
    device = next(model.parameters()).device
    run = Run(model, x.to(device), y.to(device), config, stream, label, checkpoint, on_step)
    run.identity |= identity or {}
    return run.execute(resume, progress)


class Run:
    """State of one call of `fit`: what a checkpoint holds, and what makes it."""

    keeper: EpochKeeper | None = None

    def __init__(self, model, x, y, config, stream, label, checkpoint, on_step) -> None:
        self.model, self.config = model, config
        self.stream, self.label, self.checkpoint, self.on_step = stream, label, checkpoint, on_step
        self.device = x.device
        self.members = count_members(model, x) if config.member_batches == "own" else 0
        self.batches = Batches(x, y, config, stream, self.members)
        self.steps_per_epoch = len(self.batches)
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)
        self.identity = {
            **dataclasses.asdict(config),
            "stream": stream,
            "model": describe_model(model),
            "data": describe_rows(x, y),
        }
        self.history: History = []
        self.step = 0  # of the whole run
        self.sums = self._zero_sums()
        self.seconds = 0.0  # of the current epoch

    def _zero_sums(self) -> Tensor:
        # loss * rows, right answers per member, rows; on the device, so no step waits for it
        return torch.zeros(3, dtype=torch.float64, device=self.device)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the run; called once, when the model and the settings are known."""
        return make_optimizer(self.model, self.config)

    def lr_factor(self, step: int) -> float:
        """The learning rate of step `step` (counted from 0) as a multiple of `config.lr`."""
        return self.config.lr_factor(step, self.steps_per_epoch)

    def execute(self, resume: bool, progress: bool) -> History:
        """Trains to the end; from the checkpoint, where there is one and `resume` says so."""
        # cuDNN would otherwise pick among algorithms by timing, some of which use atomics
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(
            enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32
        )
        noise = stream_seed(self.config.seed, self.stream, "noise")
        with exact, isolated_rng(noise, self.device):
            if resume and self.checkpoint is not None and self.checkpoint.exists():
                self.load(load_checkpoint(self.checkpoint, self.identity))
            self.open_keeper()
            self.train(progress)
        self.model.eval()
        return self.history

    def save(self) -> None:
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.identity, self.state())

    def state(self) -> dict[str, Any]:
        """All that a run which goes on from here needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng_state(self.device),
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        set_rng_state(state["rng"], self.device)
        self.step, self.sums = state["step"], state["sums"].to(self.device)
        self.seconds, self.history = state["seconds"], state["history"]

    def keep_epochs(self, keeper: EpochKeeper) -> None:
        """Makes the run write the weights of its networks after the epochs that are due."""
        self.keeper = keeper
        self.identity["keep_every"] = keeper.every

    def open_keeper(self) -> None:
        """Keeps the weights before training, or finds those of a run that this one resumes."""
        if self.keeper is None:
            return
        if self.step == 0:
            self.keep_epoch(0)
        for member in self.kept_members():
            self.keeper.check(member, self.step // self.steps_per_epoch)

    def kept_members(self) -> list[int]:
        """Numbers of the networks that still train."""
        return [self.stream]

    def keep_epoch(self, epoch: int) -> None:
        """Writes the weights after this many epochs, if they are due."""
        if self.keeper is not None:
            self.keeper.write(self.stream, epoch, tensors(self.model))

    def finished(self) -> bool:
        """Whether the run ends before its last epoch; asked before each."""
        return False

    def train(self, show_progress: bool) -> None:
        first = self.step // self.steps_per_epoch
        if first >= self.config.epochs:
            return
        progress = Progress(
            self.label,
            self.config.epochs,
            self.config.epochs * self.steps_per_epoch,
            done=self.step,
            enabled=show_progress,
        )
        self.model.train()
        try:
            with deferred_interrupt() as interrupted:
                for epoch in range(first, self.config.epochs):
                    if self.finished():
                        break
                    self._epoch(epoch, interrupted, progress)
                    self.save()
                    if interrupted.is_set():
                        raise TrainingInterrupted(self.label, epoch + 1, self.step, self.checkpoint)
                    progress.epoch(self.history[-1])
        finally:
            progress.close()

    def _epoch(self, epoch: int, interrupted: Any, progress: Progress) -> None:
        began = time.perf_counter() - self.seconds
        self.batches.open(epoch)
        for index in range(self.step - epoch * self.steps_per_epoch, self.steps_per_epoch):
            lr = self.optimizer.param_groups[0]["lr"]
            self._one_step(*self.batches[index])
            self.step += 1
            progress.step()
            if self.on_step is not None:
                self.on_step(self.step)
            if interrupted.is_set() and index + 1 < self.steps_per_epoch:
                self.seconds = time.perf_counter() - began
                self.save()
                raise TrainingInterrupted(self.label, epoch + 1, self.step, self.checkpoint)
        totals = self.sums.tolist()  # waits for the device
        self.seconds = time.perf_counter() - began
        self._close_epoch(epoch, lr, *totals)

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        self._descend(self._logits(x), y)

    def _descend(self, logits: Tensor, y: Tensor, penalty: Tensor | float = 0.0) -> None:
        """One step of the optimiser on the cross-entropy and a penalty that is not counted."""
        loss = gibbs_cross_entropy(logits, y, self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            right = (logits.argmax(-1) == y).double().mean()
            # an infinite penalty must end the run as an infinite loss does
            loss = loss.double() + 0 * penalty
            self.sums += torch.stack([loss, right, torch.ones_like(right)]) * y.shape[-1]

    def _logits(self, x: Tensor) -> Tensor:
        if self.members and isinstance(self.model, FoldedEnsemble):  # it would share the batch
            return split_members(self.model.model(x.flatten(0, 1)), self.members)
        return self.model(x)

    def _close_epoch(self, epoch: int, lr: float, loss: float, right: float, rows: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(
                f"fit: the loss must be finite; got {loss} in epoch {epoch + 1} of "
                f"{self.label}; lower the learning rate (now {self.config.lr})"
            )
        self.history.append(
            {
                "epoch": epoch + 1,
                "loss": loss / rows,
                "accuracy": right / rows,
                "lr": lr,
                "seconds": self.seconds,
            }
        )
        self.sums, self.seconds = self._zero_sums(), 0.0
        self.keep_epoch(epoch + 1)


@torch.no_grad()
def count_members(model: nn.Module, x: Tensor) -> int:
    """M of a model that maps [B, ...] to [M, B, C]; 0 of one that maps to [B, C]. Runs one row."""
    was_training = model.training
    try:
        y = model.eval()(x[:1])
    finally:
        model.train(was_training)
    return y.shape[0] if y.ndim == 3 else 0


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, *, batch_size: int = 1000) -> Tensor:
    """Logits of all members on all rows, in evaluation mode, without gradients.

    Args:
        model: maps [B, ...] to [B, C] or [M, B, C]; its training mode is left as it was.
        x: [N, ...] rows, on any device; a batch at a time goes to the model's device.
        batch_size: rows per forward pass.

    Returns:
        [M, N, C] on the model's device; M = 1 for a single network.
    """
    require(x.shape[0] >= 1, "predict", "x", "[N, ...] with at least one row", list(x.shape))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        parts = [model(rows.to(device)) for rows in x.split(batch_size)]
    finally:
        model.train(was_training)
    parts = [part if part.ndim == 3 else part[None] for part in parts]
    return torch.cat(parts, dim=1)
