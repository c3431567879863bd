"""Evaluation of many models of one architecture, several per pass over data that stay in place.

A sweep measures the points of a line, a curve or a plane in weight space, or the samples of a
Gaussian: all are rows of weights, computed when they are needed.
"""

import copy
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import (
    describe_model,
    describe_rows,
    load_checkpoint,
    save_checkpoint,
)
from landscape_fast.methods.interrupt import TrainingInterrupted, deferred_interrupt
from landscape_fast.methods.progress import Progress
from landscape_fast.methods.splits import check_rows
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.stacked import StackedEnsemble
from landscape_fast.nn.statistics import MODES, batch_norms, recalibrate_, statistics_mode_
from landscape_fast.ops import ensemble_summary
from landscape_fast.ops._checks import message, require, whole

SECONDS_BETWEEN_SAVES = 30.0
# Logits wait for being scored together: scores of one small network cost as much as a tenth of its
# pass, of sixteen hardly more.
SECONDS_BETWEEN_SCORES, WAITING, WAITING_BYTES = 2.0, 16, 1 << 26
# "auto" on a GPU, an estimate that no measurement has confirmed: enough members to fill the device
# with small networks, and no more weights at once than this.
MEMBERS_PER_PASS, WEIGHT_BYTES = 16, 1 << 30


class Sweep(NamedTuple):
    """Scores of S models, on the CPU, in the order of their weights.

    Attributes:
        loss: [S], mean cross-entropy, nats.
        accuracy: [S], fraction.
        brier: [S], in [0, 2].
        ece: [S], expected calibration error, fraction; 15 bins.
        logits: [S, N, C], or None where they were not kept.
        labels: [S, N], the most probable class of each row, in the smallest integers that hold
            C - 1 (uint8 for up to 256 classes); or None where they were not kept.
    """

    loss: Tensor
    accuracy: Tensor
    brier: Tensor
    ece: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None

    @property
    def nll(self) -> Tensor:
        """[S], the negative log-likelihood, which is the loss."""
        return self.loss


class SweepInterrupted(TrainingInterrupted):
    """A sweep was stopped by Ctrl-C between two passes.

    Attributes:
        checkpoint: the file with the scores so far, or None if none was asked for.
    """

    def __init__(self, done: int, count: int, checkpoint: Path | None) -> None:
        saved = f"saved {checkpoint}" if checkpoint else "nothing was saved"
        KeyboardInterrupt.__init__(self, f"sweep stopped after {done} of {count} models; {saved}")
        self.checkpoint = checkpoint
        self._arguments = (done, count, checkpoint)


@torch.no_grad()
def sweep(
    model: nn.Module,
    weights: Callable[[int, int], Tensor],
    count: int,
    x: Tensor,
    y: Tensor,
    *,
    statistics: str = "recalibrate",
    calibration: Tensor | None = None,
    batch_size: int = 1000,
    per_pass: int | str = "auto",
    keep_logits: bool = False,
    keep_labels: bool = False,
    label: str = "sweep",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Sweep:
    """Scores `count` models of one architecture on the same rows, as if one after another.

    Args:
        model: any network from rows [B, ...] to logits [B, C]; it is copied. It gives what the
            weights do not: buffers, settings, the device.
        weights: `weights(start, stop)` returns the weights of these models, [stop - start, P], as
            `FlatLayout(model)` orders them; the same ones whenever it is asked for them. For
            instance `lambda start, stop: subspace.mix(coeffs[start:stop])`.
        count: S, how many models there are.
        x: [N, ...] rows, moved to the device of the model once.
        y: [N] int64 classes.
        statistics: of batch norms: "recalibrate": taken anew for every model from the rows of
            `calibration`, for the models of one pass together; "shared": those of `model` for all;
            "batch": those of each batch of x, so that `batch_size` matters; "none": for networks
            without any. See `landscape_fast.nn.statistics_mode_`.
        calibration: [N', ...] rows without augmentation, needed where there are batch norms to
            recalibrate.
        batch_size: the most rows of one model in one pass.
        per_pass: M, how many models go through the network together. "auto": one on a CPU, where
            more are not faster, several on a GPU, unless the network cannot be batched.
        keep_logits: also return the logits, S * N * C numbers on the CPU.
        keep_labels: also return the labels, for agreement and disagreement of the models; S * N
            bytes for up to 256 classes.
        label: what the progress display calls it.
        checkpoint: file for what is done so far, written every half minute, at the end and on
            Ctrl-C; None keeps nothing.
        resume: continue from `checkpoint` where it exists.
        progress: show a progress bar, or plain lines where there is no terminal.

    Returns:
        Sweep. The scores of a model are those of `ensemble_summary`, and depend on `per_pass` by
        rounding alone.

    Raises:
        SweepInterrupted: a KeyboardInterrupt; after Ctrl-C, when the checkpoint is written.
        TypeError: if `weights` gives no tensor.
        ValueError: if arguments do not fit together, if with `per_pass` above 1 the network cannot
            be batched, or if the checkpoint belongs to another sweep.

    Cost: one forward pass over x, and one over `calibration`, per model; memory for M * N * C
        logits and M * P weights, and for up to 64 MiB of logits that wait for being scored.

    Source: the sampled curves and planes of Garipov et al. 2018 (arXiv:1802.10026) and Fort et al.
        2019 (arXiv:1912.02757).

    Example:
        >>> from landscape_fast.nn import FlatLayout
        >>> ends = FlatLayout(nn.Linear(4, 3)).flatten_many([nn.Linear(4, 3), nn.Linear(4, 3)])
        >>> t = torch.linspace(0, 1, 61)[:, None]
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> segment = lambda start, stop: torch.lerp(ends[:1], ends[1:], t[start:stop])
        >>> sweep(nn.Linear(4, 3), segment, 61, rows, classes, progress=False).loss.shape
        torch.Size([61])
    """
    op = "sweep"
    check_rows(op, x, y)
    require(whole(count, 1), op, "count", "an integer of at least 1", repr(count))
    require(whole(batch_size, 1), op, "batch_size", "an integer of at least 1", repr(batch_size))
    auto = per_pass == "auto"
    rule = "'auto' or an integer of at least 1"
    require(auto or whole(per_pass, 1), op, "per_pass", rule, repr(per_pass))
    models = _Models(model, x, calibration, statistics, batch_size)
    y = y.to(models.device)
    # the ends alone would be those of every curve between them
    some = [models.given(weights, s, s + 1) for s in dict.fromkeys((0, count // 2, count - 1))]
    M = models.choose(count, some[0]) if auto else min(per_pass, count)
    identity = {
        "model": describe_model(model),
        "data": describe_rows(models.x, y),
        "calibration": "none" if models.rows is None else describe_rows(models.rows, y[:0]),
        "weights": f"{count}, checksum {_checksum(*some):08x}",
        "buffers": f"checksum {_checksum(*model.buffers()):08x}",
        "statistics": statistics,
        "batch_size": batch_size,
        "keep_logits": keep_logits,
    }
    if keep_labels:
        identity["keep_labels"] = True
    record = _Record(y, keep_logits, keep_labels)
    if resume and checkpoint is not None and Path(checkpoint).exists():
        record.load(load_checkpoint(Path(checkpoint), identity))
    bar = Progress(label, count, count, done=record.done, enabled=progress, rounds="model")
    saved = time.monotonic()
    try:
        with deferred_interrupt() as interrupted:
            while record.done < count:
                stop = min(count, record.done + M)
                bar.step(stop - record.done)
                record.add(models.logits(models.given(weights, record.done, stop)))
                end = record.done == count or interrupted.is_set()
                save = end or time.monotonic() - saved > SECONDS_BETWEEN_SAVES
                if checkpoint is not None and save:
                    save_checkpoint(Path(checkpoint), identity, record.state())
                    saved = time.monotonic()
                if interrupted.is_set():  # also in the last pass: the caller has more to do
                    raise SweepInterrupted(record.done, count, checkpoint)
                if end or record.due():
                    bar.epoch(record.line())
    finally:
        bar.close()
    found = record.state()
    kept = [(found[name] or [None])[0] for name in ("logits", "labels")]
    return Sweep(*found["scores"][0], *kept)


class _Record:
    """What a sweep has found so far: logits that wait for being scored, scores, what to keep."""

    def __init__(self, y: Tensor, keep_logits: bool, keep_labels: bool) -> None:
        self.y, self.done = y, 0
        self.keep_logits, self.keep_labels = keep_logits, keep_labels
        self.waiting: list[Tensor] = []
        self.scores: list[Tensor] = []  # [4, models] each: loss, accuracy, Brier, ECE
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.scored = time.monotonic()

    def add(self, logits: Tensor) -> None:
        """Takes [M, N, C] of the next models."""
        self.waiting.append(logits)
        self.done += logits.shape[0]

    def due(self) -> bool:
        """Whether scores should not wait any longer."""
        waiting = sum(part.shape[0] for part in self.waiting)
        full = waiting >= WAITING or sum(part.nbytes for part in self.waiting) >= WAITING_BYTES
        return full or time.monotonic() - self.scored >= SECONDS_BETWEEN_SCORES

    def score(self) -> None:
        """Scores what waits."""
        if self.waiting:
            logits = torch.cat(self.waiting)
            accuracy, nll, brier, ece = ensemble_summary(logits, self.y)[:4]  # of the members
            self.scores.append(torch.stack([nll, accuracy, brier, ece]).cpu())
            self.logits += [logits.cpu()] if self.keep_logits else []
            self.labels += [_labels(logits).cpu()] if self.keep_labels else []
        self.waiting, self.scored = [], time.monotonic()

    def line(self) -> dict[str, Any]:
        """Of the latest model, for the display."""
        self.score()
        loss, accuracy = self.scores[-1][:2, -1].tolist()
        return {"epoch": self.done, "loss": loss, "accuracy": accuracy}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, and the result: all in one."""
        self.score()
        self.scores = [torch.cat(self.scores, 1)] if self.scores else []
        self.logits = [torch.cat(self.logits)] if self.logits else []
        self.labels = [torch.cat(self.labels)] if self.labels else []
        kept = {"logits": self.logits, "labels": self.labels}
        return {"scores": self.scores, "done": self.done, **kept}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.scores, self.logits, self.done = state["scores"], state["logits"], state["done"]
        self.labels = state.get("labels", [])  # none in a file of an earlier release


class _Models:
    """One plain network and one that holds several; both take weights and give logits."""

    def __init__(self, model, x, calibration, statistics, batch_size):
        self.layout, self.batch_size = FlatLayout(model), batch_size
        self.device = next(model.parameters()).device
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self.rows = set_norms("sweep", self.network, x, calibration, statistics)
        self.x = x.to(self.device)
        self.point = torch.zeros(self.layout.P, dtype=self.layout.dtype, device=self.device)
        views = self.layout.views(self.point)
        for name, parameter in self.network.named_parameters():
            parameter.data = views[name]
        self.stacks: dict[int, StackedEnsemble] = {}

    def given(self, weights: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        """The weights of some models, [stop - start, P] on their device."""
        return given_weights("sweep", weights, start, stop, self.layout, self.device)

    def choose(self, count: int, weights: Tensor) -> int:
        """How many models to run together."""
        return 1 if self.device.type == "cpu" else self.together(count, weights)

    def together(self, count: int, weights: Tensor) -> int:
        """How many can; `weights` [1, P] are those of one of them."""
        most = min(count, MEMBERS_PER_PASS, max(1, WEIGHT_BYTES // weights.nbytes))
        if most == 1:
            return 1
        try:
            stack = self._stack(2, weights.expand(2, -1))
            stack.runs(self.x[: self.batch_size])
        except ValueError:  # the network cannot be batched
            return 1
        return 1 if stack.looped else most

    def logits(self, weights: Tensor) -> Tensor:
        """Weights [M, P] to logits [M, N, C]."""
        M = weights.shape[0]
        if M == 1:
            self.point.copy_(weights[0])  # all parameters are views of it
        network = self.network if M == 1 else self._stack(M, weights)
        logits = self._run(network)
        rule, found = "a network from [B, ...] to logits [B, C]", logits.shape[int(M > 1) :]
        require(len(found) == 2, "sweep", "model", rule, f"results {list(found)}")
        return logits[None] if M == 1 else logits

    def _stack(self, members: int, weights: Tensor) -> StackedEnsemble:
        """One network of so many members, with these weights."""
        if members not in self.stacks:  # of a full pass, of the last one, of two to try
            self.stacks[members] = StackedEnsemble.like(self.network, members, how="batched").eval()
        stack, views = self.stacks[members], self.layout.views(weights)
        for name, parameter in stack.model.named_parameters():
            parameter.copy_(views[name])
        return stack

    def _run(self, network: nn.Module) -> Tensor:
        if self.rows is not None:
            recalibrate_(network, self.rows, batch_size=self.batch_size)
        parts = [network(rows) for rows in self.x.split(self.batch_size)]
        return torch.cat(parts, -2 if parts[0].ndim > 1 else 0)


def set_norms(
    op: str, network: nn.Module, x: Tensor, calibration: Tensor | None, statistics: str
) -> Tensor | None:
    """Sets which statistics batch norms use; the rows to take them from, on the device, or None."""
    modes, normed = (*MODES, "none"), bool(batch_norms(network))
    require(statistics in modes, op, "statistics", f"one of {modes}", repr(statistics))
    bare = statistics != "none" or not normed
    require(bare, op, "statistics", f"one of {MODES} for a network with batch norms", "'none'")
    if not normed:
        return None
    statistics_mode_(network, statistics)
    if statistics != "recalibrate":
        return None
    rule, got = "rows [N, ...] for statistics='recalibrate'", type(calibration).__name__
    require(isinstance(calibration, Tensor), op, "calibration", rule, got)
    same = calibration.shape[1:] == x.shape[1:] and len(calibration) > 0
    rule = f"[N, {', '.join(map(str, x.shape[1:]))}], as x"
    require(same, op, "calibration", rule, list(calibration.shape))
    return calibration.to(next(network.parameters()).device)


def given_weights(
    op: str,
    weights: Callable[[int, int], Tensor],
    start: int,
    stop: int,
    layout: FlatLayout,
    device: torch.device,
) -> Tensor:
    """What `weights(start, stop)` returns, [stop - start, P] on the device, or an error."""
    argument, rule = f"weights({start}, {stop})", f"[{stop - start}, P] with P = {layout.P}"
    rows: Any = weights(start, stop)
    if not isinstance(rows, Tensor):
        raise TypeError(message(op, argument, f"a Tensor {rule}", type(rows).__name__))
    require(rows.shape == (stop - start, layout.P), op, argument, rule, list(rows.shape))
    return rows.to(device, layout.dtype)


def exact_accuracy(accuracy: Tensor, rows: int) -> Tensor:
    """Accuracies in float64: 7 of 10 rows must not miss a threshold of 0.7 by rounding."""
    return (accuracy.double() * rows).round() / rows


def _labels(logits: Tensor) -> Tensor:
    """The most probable classes, [M, N], of logits [M, N, C], in few bytes."""
    few = next(
        (d for d in (torch.uint8, torch.int16) if logits.shape[-1] - 1 <= torch.iinfo(d).max),
        torch.int32,
    )
    return logits.argmax(-1).to(few)


def _checksum(*values: Tensor) -> int:
    """Of what the tensors hold, and of no more than some thousand numbers of each."""
    check = 0
    for t in values:
        flat = t.detach().flatten()
        sample = flat[:: max(1, len(flat) // 4096)].cpu().double().numpy()
        check = zlib.crc32(sample.tobytes(), check)
    return check
