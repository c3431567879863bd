"""What a bench is made of: a case (op, shape, dtype), those who compete on it, and its targets."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# mode -> (direction, how it is timed)
MODES = {
    "eager": ("fwd", "wall"),  # host clock, launcher included
    "graph": ("fwd", "graph"),  # replay of a CUDA graph: GPU time
    "train": ("fwd+bwd", "wall"),  # through autograd
    "train-graph": ("fwd+bwd", "graph"),
}
GROUPS = ("ours", "eager", "compile", "library", "plain", "floor")


@dataclass(frozen=True)
class Bound:
    """A contestant with one set of inputs.

    `call()` computes; `leaves` are what it differentiates; `view` brings a list of its outputs and
    the gradients of its leaves into the layout of the case, for the comparison.
    """

    call: Callable[[], object]
    leaves: Sequence[Tensor] = ()
    view: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    `bind(inputs, train)` prepares a set of inputs, outside the timed region. With `same`, outputs
    and gradients (in the order of the case's inputs) are held against the float64 truth; a floor
    or a partial peer is only timed. `skipped` says why it cannot run here.
    """

    name: str
    group: str
    bind: Callable[[tuple, bool], Bound] | None = None
    modes: tuple[str, ...] = tuple(MODES)
    same: bool = True
    cudagraphs: bool = False  # replays graphs of its own, so it cannot be captured in one of ours
    skipped: str = ""
    note: str = ""


@dataclass(frozen=True)
class Target:
    """What ours must reach: `ratio` times the speed of the best of `over`, or at most `ms`.

    `over` is a group of contestants, or the name of one.
    """

    mode: str
    kind: str  # "must": the gate; "moonshot": ambitious, physically consistent
    over: str = ""
    ratio: float = 0.0
    ms: float = 0.0

    def text(self) -> str:
        """The target in words, for the printed verdict."""
        parts = [f">= {self.ratio:g}x the best {self.over}"] if self.over else []
        parts += [f"<= {self.ms:g} ms"] if self.ms else []
        return f"{self.kind}: " + ", ".join(parts)

    def judge(self, ms: float, ratios: dict[str, float], groups: dict[str, str]) -> dict:
        """The verdict on ours: `met` is None where the contestants it names were not timed."""
        found = [r for name, r in ratios.items() if self.over in (name, groups.get(name))]
        if self.over and not found:
            return {"target": self.text(), "kind": self.kind, "met": None, "value": None}
        value = min(found) if self.over else ms
        met = (not self.over or value >= self.ratio) and (not self.ms or ms <= self.ms)
        return {"target": self.text(), "kind": self.kind, "met": met, "value": round(value, 4)}


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid: bytes (each tensor once), flops, logarithms."""

    bytes: int
    flops: int = 0
    logs: int = 0


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    Args:
        make: (device, generator) -> inputs, a tuple of tensors and lists of tensors, random normal.
        truth: the outputs in float64, a tensor or a sequence; for "train" also differentiable.
        contestants: (device type, quick) -> everybody; the first is ours, the one that runs by
            default: without it, nothing is timed, and targets are its targets.
        work: direction -> Work.
        modes: which of MODES make sense; those that need a GPU are left out on the CPU.
        priority: cases run in this order, so a time limit drops the least important.
        direction: what rows say that was timed, where that is not the direction of the mode.
    """

    op: str
    shape: dict[str, object]
    dtype: torch.dtype
    make: Callable[[torch.device, torch.Generator], tuple]
    truth: Callable[..., object]
    contestants: Callable[[str, bool], list[Contestant]]
    work: dict[str, Work]
    modes: tuple[str, ...] = ("graph", "eager")
    targets: tuple[Target, ...] = field(default=())
    priority: int = 1
    direction: str = ""

    def label(self) -> str:
        """ "M=4 B=128 float32", for people."""
        shape = " ".join(f"{k}={v}" for k, v in self.shape.items())
        return f"{shape} {str(self.dtype).removeprefix('torch.')}"


def tensors(values: Iterable) -> list[Tensor]:
    """All tensors in a nest of tensors, lists and None, in order."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors(value)
    return found


def as_leaves(values: Iterable) -> tuple:
    """The same nest with every floating tensor a fresh leaf that requires a gradient."""
    fresh = []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            fresh.append(value.detach().requires_grad_())
        elif isinstance(value, (list, tuple)):
            fresh.append(list(as_leaves(value)))
        else:
            fresh.append(value)
    return tuple(fresh)


def function(name: str, group: str, fn: Callable, **options) -> Contestant:
    """A contestant that is a function of the case's inputs."""

    def bind(inputs: tuple, train: bool) -> Bound:
        given = as_leaves(inputs) if train else inputs
        leaves = [t for t in tensors(given) if t.requires_grad] if train else []
        return Bound(lambda: fn(*given), leaves)

    return Contestant(name, group, bind, **options)


def missing(name: str, group: str, why: str) -> Contestant:
    """A contestant that cannot run here, kept so that rows say why."""
    return Contestant(name, group, skipped=why)


def named(contestant: Contestant, name: str) -> Contestant:
    """The same contestant under another name."""
    return replace(contestant, name=name)
