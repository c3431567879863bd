"""M networks of one architecture as one module that runs them in one pass."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn import statistics
from landscape_fast.nn._stacked_build import assemble, stack
from landscape_fast.nn._stacked_loop import (
    Holder,
    LoopedModule,
    MemberLoop,
    MemberStreams,
    follow,
    gather,
    spread,
)
from landscape_fast.nn.functional import check_count, split_members
from landscape_fast.nn.stacked_layers import StackedConv, StackedDropout
from landscape_fast.ops._checks import message, require, whole
from landscape_fast.ops._dispatch import transforming

HOWS = ("auto", "batched", "loop")
# On a CPU a loop over the members is as fast or faster for more rows than this per member: ratios
# of batched over separate networks, two threads of an EPYC, torch 2.13, MLPs of two layers of 128
# to 512 units, 4 to 32 members: training 0.13-0.7 at 32 rows, 0.3-0.9 at 128, 0.6-1.2 at 512;
# without gradients 0.2-0.8, 0.4-0.95, 0.9-1.5.
MOST_ROWS, MOST_ROWS_NO_GRAD = 512, 256
PROBE_ROWS = 4  # per member; a batch norm in training needs more than one


class StackedEnsemble(nn.Module):
    """M networks of one architecture, any `nn.Module`, that share nothing, in one pass.

    `stack.model` has the parameters and buffers of the networks under their names, [M, ...] each:
    one optimiser, one state dict, one call for all members. Tied tensors stay tied.

    Batched, the rows of all members go through the network as one folded batch [M*B, ...]: layers
    with tensors of their own are replaced by layers of M members (linear layers, convolutions,
    norms, embeddings, PReLU), dropout draws for every member from its own stream
    (`seed_members_`), and the smallest module around a parameter that no rule knows runs member by
    member. What has no tensors stays as it is; it must treat the rows of the batch (the first
    dimension) alike and apart from one another. Whether it does is tried out at the first call in
    each mode, on few rows and two members, against the loop.

    In a loop every member runs by itself, in one plain network whose tensors are exchanged.

    Args:
        networks: of the same class, settings, shapes, dtype and device; copied, not changed.
            Parametrised modules and those with hooks are run member by member.
        how: "batched"; "loop"; "auto": the loop for one member, on a CPU for networks of
            convolutions, for those with parts that run member by member anyway and for many rows
            (`MOST_ROWS`), and for networks that cannot be batched (with a warning); batched for all
            others.

    Raises:
        TypeError: if one of the networks is no module.
        ValueError: if the networks differ in more than their values, or a parameter is not
            initialised yet; on a call, for input that does not fit, or where "batched" finds that
            the network cannot be.

    Under `torch.compile` and while a CUDA graph is captured nothing is tried out: call the ensemble
    once before. Dropout that is compiled is that of the compiler, without streams.

    Example:
        >>> stack = StackedEnsemble([nn.Linear(8, 3) for _ in range(4)])
        >>> stack(torch.zeros(5, 8)).shape, stack.model.weight.shape
        (torch.Size([4, 5, 3]), torch.Size([4, 3, 8]))
        >>> stack.member(2)
        Linear(in_features=8, out_features=3, bias=True)
    """

    def __init__(self, networks: Sequence[nn.Module], *, how: str = "auto"):
        super().__init__()
        networks = list(networks)
        op = "StackedEnsemble"
        require(len(networks) >= 1, op, "networks", "at least one network", 0)
        require(how in HOWS, op, "how", f"one of {HOWS}", repr(how))
        self.members, self.how = len(networks), how
        self.streams = MemberStreams()
        plain, table = stack(networks)
        statistics.unguard_(plain)
        self.model = assemble(plain, self.members, table, self.streams)
        statistics.guard_like_(self.model, networks)
        self._loop = MemberLoop(plain, self.model)
        convolves = any(isinstance(m, StackedConv) for m in self.model.modules())
        self._slow_on_cpu = convolves or bool(self.looped)
        self._tried: dict[tuple[bool, bool], str] = {}  # mode, own -> why not batched, or ""

    @classmethod
    def like(cls, model: nn.Module, members: int, *, how: str = "auto") -> "StackedEnsemble":
        """`members` copies of `model`."""
        check_count("StackedEnsemble.like", "members", members)
        return cls([model] * members, how=how)

    def forward(self, x: Any, *, own: bool = False) -> Any:
        """x [B, ...] that all members read, or with `own` [M, B, ...] -> [M, B, ...].

        A network that takes a tuple, list or dictionary of tensors is given one, as its one
        argument; and one that returns such, or tensors of other shapes [...], does so here, with M
        in front of every tensor.
        """
        M = self.members
        if own:
            rule = f"[M, B, ...] with M = {M}, for own=True"
            for t in _leaves(x):
                ok = t.ndim > 0 and t.shape[0] == M
                require(ok, "StackedEnsemble", "x", rule, list(t.shape))
        if self.runs(x, own=own) == "batched":
            return self._batched(x, own)
        return self._one_by_one(x, own)

    def run(self, weights: Mapping[str, Tensor], x: Any, *, own: bool = False) -> Any:
        """`forward` with other parameters: by their names in the network, [M, ...] each.

        Names that are left out keep the parameters of the ensemble; buffers are its own. Gradients
        flow to `weights`.
        """
        shapes = {name: p.shape for name, p in self.model.named_parameters(remove_duplicate=False)}
        for name, value in weights.items():
            ok = name in shapes and value.shape == shapes[name]
            rule = f"of shape {list(shapes[name])}" if name in shapes else "a parameter's name"
            require(ok, "StackedEnsemble.run", f"weights[{name!r}]", rule, list(value.shape))
        named = {f"model.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(self, named, (x,), {"own": own})

    def runs(self, x: Any, *, own: bool = False) -> str:
        """ "batched" or "loop": what a call with this x does in the present mode and device."""
        hooked = self._hooked()
        alone = self.how == "loop" or (self.how == "auto" and self.members == 1)
        if hooked is None and (alone or (self.how == "auto" and self._loop_is_faster(x, own))):
            return "loop"
        leaves = _leaves(x)
        device = leaves[0].device.type if leaves else "cpu"
        blind = torch.compiler.is_compiling() or transforming() or device == "meta"
        blind = blind or (device == "cuda" and torch.cuda.is_current_stream_capturing())
        mode = self.training, own
        if mode not in self._tried and not blind:
            self._tried[mode] = why = self._try(x, own)
            remedy = 'use how="loop"'
            rule = "one whose rows can be batched"
            if why and self.how == "batched":
                require(False, "StackedEnsemble", "networks", rule, why, remedy)
            if why:
                text = message("StackedEnsemble", "networks", rule, why, "they run in a loop")
                warnings.warn(text, stacklevel=4)
        way = "loop" if self._tried.get(mode) else "batched"
        ok = hooked is None or (way == "batched" and self.how != "loop")
        rule = "without forward hooks, or run batched"
        require(ok, "StackedEnsemble", f"module {hooked!r}", rule, "a loop", "hook the networks")
        return way

    def _hooked(self) -> str | None:
        """Name of a module with forward hooks, such as `recalibrate_` needs: a loop passes by."""
        for name, module in self.model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                inside = isinstance(module, Holder) and not isinstance(module, LoopedModule)
                rule = "without forward hooks inside of what runs member by member"
                require(not inside, "StackedEnsemble", f"module {name!r}", rule, "hooks")
                return name
        return None

    def _loop_is_faster(self, x: Any, own: bool) -> bool:
        """Measured; see the constants."""
        leaves = _leaves(x)
        if not leaves or leaves[0].device.type != "cpu":
            return False
        rows = next((t.shape[int(own)] for t in leaves if t.ndim > own), 0)
        most = MOST_ROWS if torch.is_grad_enabled() else MOST_ROWS_NO_GRAD
        return self._slow_on_cpu or rows > most

    def _batched(self, x: Any, own: bool) -> Any:
        M = self.members
        rows = _map(x, lambda t: t.flatten(0, 1) if own else torch.cat([t] * M))
        return _map(self.model(rows), lambda t: split_members(t, M))

    def _one_by_one(self, x: Any, own: bool) -> Any:
        parts = spread(x, lambda t: list(t) if own else [t] * self.members, self.members)
        return gather(self._loop([((part,), {}) for part in parts], self.streams), torch.stack)

    @torch.no_grad()
    def _try(self, x: Any, own: bool) -> str:
        """Why the network cannot be batched, found by trying; "" if it can.

        In float64, where only a difference in what is computed is as large as half the digits;
        with weights that differ between the two members; without layers of dropout, and with one
        stream per member for other random numbers.
        """
        first, last = 0, self.members - 1

        def few(t: Tensor) -> Tensor:
            t = t[[first, last]] if own else t
            return t.narrow(int(own), 0, min(PROBE_ROWS, t.shape[own])) if t.ndim > own else t

        rows = _map(x, few)
        generator = torch.Generator().manual_seed(0)
        pair = StackedEnsemble([self.member(first), self.member(last)], how="batched")
        for p in pair.parameters():
            if p.is_floating_point():
                noise = torch.rand(p.shape, generator=generator).to(p)
                p.copy_(p * (1 + noise / 4))
        _match_modes(pair.model, self.model)
        pair.seed_members_([0, 1])
        statistics.statistics_mode_(pair.model, "shared")
        for module in pair.modules():
            if isinstance(module, StackedDropout):
                module.eval()
        devices = {t.device for t in _leaves(x) if t.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):  # for random numbers that no layer draws
            return self._compare(pair, rows, own)

    @staticmethod
    def _compare(pair: "StackedEnsemble", rows: Any, own: bool) -> str:
        """`_try` of two members."""
        for wide in (True, False):
            if wide:
                two = copy.deepcopy(pair).double()
                given = _map(rows, lambda t: t.double() if t.is_floating_point() else t)
            else:
                two, given = pair, rows
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of ops that have no kernel for float64
                try:
                    truth = copy.deepcopy(two)._one_by_one(given, own)
                except Exception:
                    if wide:  # a network that only runs in its own dtype
                        continue
                    raise
                try:
                    found = two._batched(given, own)
                except Exception as error:
                    reason = str(error).strip().splitlines() or [""]
                    return f"{type(error).__name__} ({reason[0][:120]})"
            return _difference(found, truth)
        return ""

    @property
    def looped(self) -> list[str]:
        """Names of the modules that run member by member where the rest is batched."""
        found = self.model.named_modules()
        return [
            name
            for name, module in found
            if isinstance(module, LoopedModule) and not isinstance(module, StackedDropout)
        ]

    def seed_members_(self, seeds: Sequence[int]) -> "StackedEnsemble":
        """Gives member m a random stream of its own, from `seeds[m]`; no seeds: none has one.

        On a CPU the dropout masks of member m are then those of a run of that network alone after
        `torch.manual_seed(seeds[m])`; batched, behind a module whose result does not lie in memory
        row by row (attention), the same numbers fall on other elements. Without streams they come
        from torch's global generator. The state of the streams, for checkpoints:
        `stack.streams.state()` and `.load(state)`.
        """
        seeds = list(seeds)
        ok = len(seeds) in (0, self.members) and all(whole(seed, 0) for seed in seeds)
        rule = f"M = {self.members} integers of at least 0, or none"
        require(ok, "StackedEnsemble.seed_members_", "seeds", rule, seeds)
        self.streams.seed(seeds)
        return self

    @torch.no_grad()
    def member(self, i: int) -> nn.Module:
        """Member i as a plain network with its own copies of all tensors."""
        ok = whole(i, 0) and i < self.members
        rule = f"an integer from 0 to {self.members - 1}"
        require(ok, "StackedEnsemble.member", "i", rule, repr(i))
        memo: dict[int, Any] = {}
        for plain, holder in self._loop.pairs:
            follow(plain, holder)
            for kind in ("_parameters", "_buffers"):
                for key, empty in getattr(plain, kind).items():
                    if empty is not None and id(empty) not in memo:
                        full = getattr(holder, kind)[key]
                        own = full.detach()[i].clone()
                        learned = kind == "_parameters"
                        memo[id(empty)] = Parameter(own, full.requires_grad) if learned else own
        network = copy.deepcopy(self._loop.plain, memo)
        statistics.guard_like_(network, [self.model])
        return network

    def networks(self) -> list[nn.Module]:
        """All members as plain networks."""
        return [self.member(i) for i in range(self.members)]

    def extra_repr(self) -> str:
        return f"members={self.members}, how={self.how!r}"


def _match_modes(to: nn.Module, like: nn.Module) -> None:
    for name, module in like.named_modules():
        to.get_submodule(name).training = module.training


def _map(nest: Any, function) -> Any:
    return spread(nest, lambda t: [function(t)], 1)[0]


def _leaves(nest: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(nest, lambda t: found.append(t) or t)
    return found


def _difference(found: Any, truth: Any) -> str:
    """How the results differ by more than rounding, in words; "" if they do not."""
    got, want = _leaves(found), _leaves(truth)
    if len(got) != len(want):
        return "results of another structure"
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"a result {list(a.shape)} in place of {list(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return "other results than one by one"
            continue
        largest = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
        slack = math.sqrt(torch.finfo(b.dtype).eps) * largest
        if not torch.allclose(a, b, rtol=0, atol=slack, equal_nan=True):
            return "other results than one by one"
    return ""
