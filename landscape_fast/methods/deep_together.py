"""M networks trained in one run: a step for all of them, and an end for each."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape_fast.methods.batches import Batches, StreamBatches
from landscape_fast.methods.checkpoint import describe_model, describe_rows
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep_engines import Batched, Looped, State, restore
from landscape_fast.methods.optim import make_optimizer
from landscape_fast.methods.seeds import rng_state, set_rng_state, stream_seed
from landscape_fast.methods.trainer import History, Run
from landscape_fast.nn.stacked import StackedEnsemble
from landscape_fast.ops._checks import require


class Failure(NamedTuple):
    """A member that could not be trained to the end.

    Attributes:
        epoch: the one in which it failed.
        reason: what was not finite.
        network: as it was at the end of the last epoch before, in evaluation mode; None where only
            the fact is known.
    """

    epoch: int
    reason: str
    network: nn.Module | None


class Ended(NamedTuple):
    """How the training of one member ended before the others'."""

    epoch: int  # the last one it took part in
    reason: str
    failed: bool
    state: State


class TogetherRun(Run):
    """One run for M networks, which ends for each of them on its own.

    Args:
        networks: of one architecture, [B, ...] to [B, C]; trained in place.
        x: training rows, on their device, and so `y` and `held`.
        config: the settings.
        streams: the stream of each member: its order of rows (unless `shared`) and its dropout.
        shared: all members read the batches of stream 0.
        held: rows and classes for early stopping, or None.
        patience: epochs without a lower loss on `held` after which a member ends; 0 for all epochs.
        how: "auto", "batched" or "loop"; "auto" does what `StackedEnsemble` does.
        label, checkpoint, on_step: see `Run`.
    """

    def __init__(
        self,
        networks: list[nn.Module],
        x: Tensor,
        y: Tensor,
        config: TrainConfig,
        *,
        streams: Sequence[int],
        shared: bool = False,
        held: tuple[Tensor, Tensor] | None = None,
        patience: int = 0,
        how: str = "auto",
        label: str = "training",
        checkpoint: Path | None = None,
        on_step=None,
    ) -> None:
        self.networks, self.config, self.streams, self.shared = networks, config, streams, shared
        self.held, self.patience = held, patience
        self.label, self.checkpoint, self.on_step = label, checkpoint, on_step
        self.stream, self.device = streams[0], x.device
        self.rows = x, y
        self.active = list(range(len(networks)))
        self._open_batches()
        self.steps_per_epoch = len(self.batches)
        seeds = [stream_seed(config.seed, stream, "noise") for stream in streams]
        way = _way(networks, how, self.batches, config)
        kind = Batched if way == "batched" else Looped
        self.engine = kind(networks, config, seeds, self.lr_factor)
        self.identity = {
            **dataclasses.asdict(config),
            "streams": list(streams),
            "shared": shared,
            "patience": patience,
            "held": None if held is None else describe_rows(*held),
            "way": kind.way,
            "model": describe_model(networks[0]),
            "data": describe_rows(x, y),
        }
        self.history: History = []
        self.histories: list[History] = [[] for _ in networks]
        self.ended: dict[int, Ended] = {}
        self.last = _copy(self.engine.tensors())  # where all active members were finite
        self.sound = finite_tensors(self.last)
        self.best: State = {}
        self.lowest = [math.inf] * len(networks)
        self.waited = [0] * len(networks)
        self.step, self.seconds, self.sums = 0, 0.0, self._zero_sums()

    @property
    def model(self) -> nn.Module:
        """What is switched between training and evaluation."""
        return self.engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """One whose learning rate is everyone's."""
        return self.engine.optimizer

    def _open_batches(self) -> None:
        if self.shared:
            self.batches = Batches(*self.rows, self.config, 0)
        else:
            streams = [self.streams[m] for m in self.active]
            self.batches = StreamBatches(*self.rows, self.config, streams)

    def _zero_sums(self) -> Tensor:
        return torch.zeros(3, len(self.active), dtype=torch.float64, device=self.device)

    def finished(self) -> bool:
        return not self.active

    def kept_members(self) -> list[int]:
        return [self.streams[m] for m in self.active]

    def keep_epoch(self, epoch: int) -> None:
        """Writes the weights of all members that took part in the epoch and did not fail."""
        if self.keeper is None or not self.keeper.due(epoch):
            return
        state = self.engine.tensors()
        for place, m in enumerate(self.active):
            if m not in self.ended or not self.ended[m].failed:
                own = {name: t[place] for name, t in state.items()}
                self.keeper.write(self.streams[m], epoch, own)

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        losses, right = self.engine.step(x, y, not self.shared)
        self.sums += torch.stack([losses.double(), right, torch.ones_like(right)]) * y.shape[-1]

    def _close_epoch(self, epoch: int, lr: float, losses, rights, rows) -> None:
        """Notes what each member did, and ends those that failed or no longer improve."""
        began = time.perf_counter()
        tensors = self.engine.tensors()
        finite = finite_members([tensors[name] for name in self.sound], len(self.active))
        held = self._held_losses()
        seconds = (self.seconds + time.perf_counter() - began) / len(self.active)
        records, keep = [], []
        for place, m in enumerate(self.active):
            record = {"epoch": epoch + 1, "loss": losses[place] / rows[place]}
            record |= {"accuracy": rights[place] / rows[place], "lr": lr, "seconds": seconds}
            if held is not None:
                record["held_loss"] = held[place]
            ok = math.isfinite(losses[place]) and finite[place]
            if not ok:
                sound = math.isfinite(record["loss"])
                what = "weights not finite" if sound else f"loss {record['loss']}"
                self._end(place, epoch, f"{what} in epoch {epoch + 1}", True, self.last)
                continue
            records.append(record)
            self.histories[m].append(record)
            if held is not None and not self._improves(m, place, held[place], tensors):
                reason = f"no lower loss on the held rows since epoch {epoch + 1 - self.patience}"
                self._end(place, epoch, reason, False, self.best)
                continue
            keep.append(place)
        self._note(epoch, lr, records)
        self.keep_epoch(epoch + 1)
        if len(keep) < len(self.active):
            self._keep(keep)
        self.last = {name: t[keep] for name, t in tensors.items()}
        self.sums, self.seconds = self._zero_sums(), 0.0

    def _note(self, epoch: int, lr: float, records: list[dict]) -> None:
        """What the progress display shows: means over the members."""
        n = len(records) or math.nan  # nobody is left
        means = {key: sum(r[key] for r in records) / n for key in ("loss", "accuracy")}
        self.history.append({"epoch": epoch + 1, **means, "lr": lr, "seconds": self.seconds})

    def _end(self, place: int, epoch: int, reason: str, failed: bool, tensors: State) -> None:
        state = {name: t[place].clone() for name, t in tensors.items()}
        self.ended[self.active[place]] = Ended(epoch + 1, reason, failed, state)

    def _keep(self, places: list[int]) -> None:
        self.active = [self.active[i] for i in places]
        self.best = {name: t[places] for name, t in self.best.items()}
        if places:
            self.engine.keep(places)
            if not self.shared:
                self._open_batches()

    @torch.no_grad()
    def _held_losses(self) -> list[float] | None:
        if not self.patience:
            return None
        x, y = self.held
        self.model.eval()
        sums = torch.zeros(len(self.active), dtype=torch.float64, device=self.device)
        size = max(self.config.batch_size, 256)
        for rows, classes in zip(x.split(size), y.split(size), strict=True):
            for place, logits in enumerate(self.engine.logits(rows)):
                sums[place] += F.cross_entropy(logits, classes, reduction="sum").double()
        self.model.train()
        return (sums / len(y)).tolist()

    def _improves(self, m: int, place: int, loss: float, tensors: State) -> bool:
        """Whether member m goes on; keeps its state where the loss is the lowest so far."""
        if not self.best:
            self.best = _copy(tensors)
        if loss < self.lowest[m]:
            self.lowest[m], self.waited[m] = loss, 0
            for name, t in tensors.items():
                self.best[name][place].copy_(t[place])
        else:
            self.waited[m] += 1
        return self.waited[m] < self.patience

    def state(self) -> dict[str, Any]:
        return {
            "engine": self.engine.state(),
            "rng": rng_state(self.device),  # on a GPU, of the dropout of a batched pass
            "active": self.active,
            "ended": {m: list(end) for m, end in self.ended.items()},
            "last": self.last,
            "best": self.best,
            "lowest": self.lowest,
            "waited": self.waited,
            "histories": self.histories,
            "history": self.history,
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._keep(state["active"])  # of all members, which a new run has
        if self.active:
            self.engine.load(state["engine"])
        set_rng_state(state["rng"], self.device)
        self.ended = {m: Ended(*end) for m, end in state["ended"].items()}
        for name in ("last", "best"):
            setattr(self, name, {k: t.to(self.device) for k, t in state[name].items()})
        for name in ("lowest", "waited", "histories", "history", "step", "seconds"):
            setattr(self, name, state[name])
        self.sums = state["sums"].to(self.device)

    def put_back(self) -> dict[int, Failure]:
        """Gives every network the state it ended with; returns those that failed, by stream."""
        tensors = self.engine.tensors() if self.active else {}
        states = {m: end.state for m, end in self.ended.items()}
        for place, m in enumerate(self.active):
            chosen = self.best or tensors
            states[m] = {name: t[place].clone() for name, t in chosen.items()}
        for m, network in enumerate(self.networks):
            restore(network, states[m])
            network.eval()
        return {
            self.streams[m]: Failure(end.epoch, end.reason, self.networks[m])
            for m, end in self.ended.items()
            if end.failed
        }


def _way(networks: list[nn.Module], how: str, batches: Batches, config: TrainConfig) -> str:
    """Whether to batch the members: as they say, or as `StackedEnsemble` would for such a batch."""
    groups = make_optimizer(networks[0], config).param_groups
    if len({(group["lr"], group["weight_decay"]) for group in groups}) > 1:
        rule = "True or 'loop' for networks whose fast_parameters() learn by other settings"
        require(how != "batched", "train_deep_ensemble", "together", rule, repr(how))
        return "loop"  # a stack of layers does not know which parameters those are
    if how != "auto" or len(networks) == 1:
        return "loop" if how == "auto" else how
    batches.open(0)
    x, _ = batches[0]
    with torch.enable_grad():
        stack = StackedEnsemble(networks).train()
        return stack.runs(x, own=isinstance(batches, StreamBatches))


def _copy(tensors: State) -> State:
    return {name: t.detach().clone() for name, t in tensors.items()}


def finite_tensors(tensors: State) -> list[str]:
    """Names of those that are finite and have to stay so; a mask may hold infinities."""
    return [n for n, t in tensors.items() if t.is_floating_point() and bool(t.isfinite().all())]


def finite_members(tensors: list[Tensor], members: int) -> list[bool]:
    """Whether all numbers of each member [M, ...] are finite; waits for the device once."""
    every = [t.isfinite().reshape(members, t[0].numel()).all(1) for t in tensors]
    return torch.stack(every).all(0).tolist() if every else [True] * members


def check_network(
    op: str,
    network: nn.Module,
    x: Tensor,
    argument: str = "build",
    what: str = "a function making a network",
) -> None:
    """Raises unless it maps [B, ...] to [B, C]; runs one row."""
    training = network.training
    with torch.no_grad():
        y = network.eval()(x[:1])
    network.train(training)
    rule = f"{what} that maps [B, ...] to [B, C]"
    require(y.ndim == 2, op, argument, rule, f"one that makes {list(y.shape)} of a row")
