"""Members one after another: one plain module, into which the tensors of each are put in turn."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from landscape_fast.nn.dropout import ReLUDropout

DROPOUTS = _DropoutNd, ReLUDropout


class MemberStreams:
    """One stream of random numbers per member, for layers that draw from torch's global ones.

    Until `seed` is called there is none, and the global generators serve all members in turn.
    """

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self._generators: dict[str, list[Generator]] = {}  # per device

    def seed(self, seeds: Sequence[int]) -> None:
        """Starts the stream of member m at `seeds[m]`; no seeds for no streams."""
        self.seeds, self._generators = list(seeds), {}

    @contextlib.contextmanager
    def of(self, m: int, device: torch.device) -> Iterator[None]:
        """Within it the global generators of the CPU and of `device` are those of member m."""
        pairs = [(torch.default_generator, self._own("cpu")[m])]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            pairs.append((torch.cuda.default_generators[index], self._own(f"cuda:{index}")[m]))
        before = [shared.get_state() for shared, _ in pairs]
        for shared, own in pairs:
            shared.set_state(own.get_state())
        try:
            yield
        finally:
            for (shared, own), state in zip(pairs, before, strict=True):
                own.set_state(shared.get_state())
                shared.set_state(state)

    def _own(self, device: str) -> list[Generator]:
        if device not in self._generators:
            self._generators[device] = [Generator(device).manual_seed(s) for s in self.seeds]
        return self._generators[device]

    def state(self) -> dict[str, Any]:
        """Where the streams are: integers and uint8 tensors, as a checkpoint may hold."""
        streams = {d: [g.get_state() for g in own] for d, own in self._generators.items()}
        return {"seeds": list(self.seeds), "streams": streams}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; a device that is not there starts at the seeds."""
        self.seed(state["seeds"])
        for device, states in state["streams"].items():
            if device == "cpu" or torch.device(device).index < torch.cuda.device_count():
                for own, at in zip(self._own(device), states, strict=True):
                    own.set_state(at.cpu())

    def __getstate__(self) -> dict[str, Any]:  # generators are neither copied nor pickled
        return self.state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load(state)


def follow(plain: nn.Module, holder: nn.Module) -> None:
    """Sets what may have been changed on `holder`, which the caller sees in place of `plain`."""
    plain.training = holder.training
    if isinstance(plain, _BatchNorm):
        plain.momentum = holder.momentum
    elif isinstance(plain, DROPOUTS):
        plain.p = holder.p


def changed_by_hand(model: nn.Module) -> list:
    """What else a pass of `model` in training mode depends on; equal while that is the same."""
    found: list = []
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            found.append(module.p)
        elif not isinstance(module, _BatchNorm):  # whose buffers are statistics, which it writes
            found += [(id(t), t._version) for t in module._buffers.values() if t is not None]
    return found


class MemberLoop:
    """Calls one plain module once per member, with the tensors of that member in it.

    Args:
        plain: the module, with tensors on the meta device: each is replaced at every call.
        holder: a module whose submodules have the names of those of `plain`, and its parameters
            and buffers with M in front.
    """

    def __init__(self, plain: nn.Module, holder: nn.Module):
        self.plain = plain
        self.pairs = [(own, holder.get_submodule(name)) for name, own in plain.named_modules()]

    def __call__(self, calls: Sequence[tuple[tuple, dict]], streams: MemberStreams) -> list:
        """The results of `plain(*args, **kwargs)` for every (args, kwargs) of `calls`."""
        slots, views = [], {}
        for plain, holder in self.pairs:
            follow(plain, holder)
            for kind in ("_parameters", "_buffers"):
                for key, empty in getattr(plain, kind).items():
                    if empty is None:
                        continue
                    full = getattr(holder, kind)[key]
                    if id(full) not in views:  # tied tensors stay one
                        views[id(full)] = full.unbind(0)  # whose backward stacks once
                    slots.append((getattr(plain, kind), key, empty, views[id(full)]))
        device = slots[0][3][0].device if slots else _device(calls)
        seeded = streams.seeds and not torch.compiler.is_compiling()  # a graph has no generators
        outputs = []
        try:
            for m, (args, kwargs) in enumerate(calls):
                for table, key, _, own in slots:
                    table[key] = own[m]
                if seeded:
                    with streams.of(m, device):
                        outputs.append(self.plain(*args, **kwargs))
                else:
                    outputs.append(self.plain(*args, **kwargs))
                for table, key, _, own in slots:
                    if table[key] is not own[m]:  # a buffer set anew, not changed in place
                        own[m].copy_(table[key].detach())
        finally:
            for table, key, empty, _ in slots:
                table[key] = empty
        return outputs


def _device(calls: Sequence[tuple[tuple, dict]]) -> torch.device:
    found = [t for args, kwargs in calls for t in (*args, *kwargs.values())]
    return next((t.device for t in found if isinstance(t, Tensor)), torch.device("cpu"))


def adopt(module: nn.Module, plain: nn.Module, table: dict[int, Tensor]) -> None:
    """Gives `module` the options of `plain`, and for its tensors those that `table` has by id."""
    module.training = plain.training
    for name, value in vars(plain).items():
        if not name.startswith("_") and name not in ("training", "forward"):
            setattr(module, name, value)
    for key, empty in plain._parameters.items():
        module._parameters[key] = None if empty is None else table[id(empty)]
    for key, empty in plain._buffers.items():
        persistent = key not in plain._non_persistent_buffers_set
        full = None if empty is None else table[id(empty)]
        module.__dict__.pop(key, None)
        module._buffers.pop(key, None)
        module.register_buffer(key, full, persistent)


class Holder(nn.Module):
    """The tensors of one module of which only a loop knows what it computes; it is never called."""

    def __init__(self, plain: nn.Module, table: dict[int, Tensor], made: dict[int, nn.Module]):
        nn.Module.__init__(self)
        made[id(plain)] = self
        adopt(self, plain, table)
        for name, child in plain._modules.items():
            known = None if child is None else made.get(id(child))
            if child is not None and known is None:
                cls = _HeldNorm if isinstance(child, _BatchNorm) else Holder
                known = cls(child, table, made)
            self._modules[name] = known


class _HeldNorm(Holder, _BatchNorm):
    """A batch norm to those who look for one."""


class LoopedModule(Holder):
    """M plain modules of any kind on folded rows [M*B, ...], one after another.

    Arguments whose first dimension is that of the first tensor are split among the members; all
    others go to every member. Results are joined along the first dimension.

    Args:
        plain: the module, on the meta device.
        members: M.
        table: the tensors [M, ...] by the id of those of `plain`.
        made: what stands for other modules, by id; what is built here is added.
        streams: the random numbers of the members.
    """

    def __init__(
        self,
        plain: nn.Module,
        members: int,
        table: dict[int, Tensor],
        made: dict[int, nn.Module],
        streams: MemberStreams,
    ):
        super().__init__(plain, table, made)
        self.members, self.streams = members, streams
        self.loop = MemberLoop(plain, self)
        if isinstance(plain, nn.MultiheadAttention):
            self._qkv_same_embed_dim = False  # or a layer around it would read the weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module, on the rows of all members."""
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim]
        rows = given[0].shape[0] if given else 0

        def split(t: Tensor) -> list[Tensor]:
            if not t.ndim or t.shape[0] != rows:
                return [t] * self.members
            return list(t.unflatten(0, (self.members, -1)).unbind(0))

        parts = spread((args, kwargs), split, self.members)
        return gather(self.loop(parts, self.streams), torch.cat)

    def extra_repr(self) -> str:
        return f"{self.members} x {type(self.loop.plain).__name__}, one after another"


class LoopedNorm(LoopedModule, _BatchNorm):
    """A batch norm to those who look for one, with the statistics of all members."""


def spread(nest: Any, split: Callable[[Tensor], Sequence[Tensor]], members: int) -> list:
    """One nest per member; `split` gives the tensor that each of them gets in place of one."""
    if isinstance(nest, Tensor):
        return list(split(nest))
    if isinstance(nest, dict):
        parts = {key: spread(value, split, members) for key, value in nest.items()}
        return [type(nest)({key: part[m] for key, part in parts.items()}) for m in range(members)]
    if isinstance(nest, list | tuple):
        parts = [spread(value, split, members) for value in nest]
        return [_like(nest, [part[m] for part in parts]) for m in range(members)]
    return [nest] * members


def gather(nests: Sequence, join: Callable[[list[Tensor]], Tensor]) -> Any:
    """One nest out of those of the members; `join` makes one tensor of theirs."""
    first = nests[0]
    if isinstance(first, Tensor):
        return join(list(nests))
    if isinstance(first, dict):
        return type(first)({key: gather([nest[key] for nest in nests], join) for key in first})
    if isinstance(first, list | tuple):
        return _like(first, [gather(values, join) for values in zip(*nests, strict=True)])
    return first


def _like(nest: list | tuple, values: list) -> list | tuple:
    named = hasattr(nest, "_fields")  # a NamedTuple takes its values one by one
    return type(nest)(*values) if named else type(nest)(values)
