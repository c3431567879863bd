"""The two ways to make a step for M networks: all in one pass, and one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.optim import make_optimizer
from landscape_fast.nn._stacked_build import tensors
from landscape_fast.nn._stacked_loop import MemberStreams
from landscape_fast.nn.stacked import StackedEnsemble

State = dict[str, Tensor]
IGNORED = -100  # the class of rows that `F.cross_entropy` leaves out


def state_of(module: nn.Module) -> State:
    """All parameters and buffers, also those that its state dict leaves out; not copied."""
    return {name: t.detach() for name, t in tensors(module).items()}


@torch.no_grad()
def restore(module: nn.Module, state: State) -> None:
    """Sets what `state_of` returned."""
    for name, t in tensors(module).items():
        t.copy_(state[name])


class Engine:
    """M networks, with an optimiser and a stream of random numbers each.

    Args:
        networks: of one architecture.
        config: the settings.
        seeds: of the random stream of each.
        lr_factor: the learning rate of a step, as a multiple of `config.lr`.
    """

    way: str

    def __init__(
        self,
        networks: list[nn.Module],
        config: TrainConfig,
        seeds: Sequence[int],
        lr_factor: Callable[[int], float],
    ):
        self.config, self.lr_factor = config, lr_factor

    def _optimise(self, module: nn.Module):
        optimizer = make_optimizer(module, self.config)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)

    def _losses(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and share of right answers [M], from logits [M, B, C] and [M, B]."""
        y = y.expand(logits.shape[:2])
        each = F.cross_entropy(
            logits.flatten(0, 1),
            y.flatten(),
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        right = (logits.detach().argmax(-1) == y).double().mean(1)
        counted = (y != IGNORED).sum(1)
        return each.view(y.shape).sum(1) / counted, right


class Batched(Engine):
    """All members in one `StackedEnsemble`, one optimiser over [M, ...] tensors."""

    way = "batched"

    def __init__(self, networks, config, seeds, lr_factor):
        super().__init__(networks, config, seeds, lr_factor)
        self.module = StackedEnsemble(networks, how="batched").seed_members_(seeds)
        self.optimizer, self.scheduler = self._optimise(self.module)

    def step(self, x: Tensor, y: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        losses, right = self._losses(self.module(x, own=own), y)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # each member's gradient is that of its own mean
        self.optimizer.step()
        self.scheduler.step()
        return losses.detach(), right

    def logits(self, x: Tensor) -> Tensor:
        return self.module(x)

    def tensors(self) -> State:
        """The state of all members, [M, ...] each; not copied."""
        return state_of(self.module.model)

    def keep(self, places: list[int]) -> None:
        """Goes on with these members alone."""
        old, streams = self.optimizer.state_dict(), self.module.streams.state()
        scheduler, training = self.scheduler.state_dict(), self.module.training
        sizes = [p.shape for p in self.module.parameters()]
        networks = [self.module.member(i) for i in places]
        self.module = StackedEnsemble(networks, how="batched").train(training)
        seeds = [streams["seeds"][i] for i in places]
        own = {device: [s[i] for i in places] for device, s in streams["streams"].items()}
        self.module.streams.load({"seeds": seeds, "streams": own})
        self.optimizer, self.scheduler = self._optimise(self.module)
        for k, state in old["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == sizes[k]:
                    state[name] = value[places]
        self.optimizer.load_state_dict(old)
        self.scheduler.load_state_dict(scheduler)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "streams": self.module.streams.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        restore(self.module.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.module.streams.load(state["streams"])


class Looped(Engine):
    """Member by member, each a plain network with an optimiser of its own."""

    way = "loop"

    def __init__(self, networks, config, seeds, lr_factor):
        super().__init__(networks, config, seeds, lr_factor)
        self.module = nn.ModuleList(networks)
        self.streams = MemberStreams()
        self.streams.seed(seeds)
        self.optimizers, self.schedulers = zip(*map(self._optimise, networks), strict=True)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    def step(self, x: Tensor, y: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        found = []
        members = zip(self.module, self.optimizers, self.schedulers, strict=True)
        for m, (network, optimizer, scheduler) in enumerate(members):
            with self.streams.of(m, x.device):
                logits = network(x[m] if own else x)
            loss, right = self._losses(logits[None], y[m : m + 1] if own else y)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
            scheduler.step()
            found.append((loss.detach(), right))
        losses, rights = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(rights)

    def logits(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.module])

    def tensors(self) -> State:
        every = [state_of(network) for network in self.module]
        return {name: torch.stack([state[name] for state in every]) for name in every[0]}

    def keep(self, places: list[int]) -> None:
        self.module = nn.ModuleList([self.module[i] for i in places])
        self.optimizers = [self.optimizers[i] for i in places]
        self.schedulers = [self.schedulers[i] for i in places]
        state = self.streams.state()
        own = {device: [s[i] for i in places] for device, s in state["streams"].items()}
        self.streams.load({"seeds": [state["seeds"][i] for i in places], "streams": own})

    def state(self) -> dict[str, Any]:
        return {
            "model": [state_of(network) for network in self.module],
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "scheduler": [scheduler.state_dict() for scheduler in self.schedulers],
            "streams": self.streams.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        for network, stored in zip(self.module, state["model"], strict=True):
            restore(network, stored)
        for name, own in (("optimizer", self.optimizers), ("scheduler", self.schedulers)):
            for one, stored in zip(own, state[name], strict=True):
                one.load_state_dict(stored)
        self.streams.load(state["streams"])
