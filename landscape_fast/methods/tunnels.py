"""Low-loss tunnels between two trained networks: points of the straight line, each trained."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import describe_rows
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.curves import check_alike
from landscape_fast.methods.deep_together import TogetherRun, check_network
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.trainer import Diverged, History, training_seconds
from landscape_fast.nn.coefficients import PolyChain, line
from landscape_fast.nn.statistics import unguard_
from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops import combine
from landscape_fast.ops._checks import require, whole

CONSTRAINTS = (None, "hyperplane")
WAYS = ("auto", "batched", "loop")


class Tunnel(NamedTuple):
    """What `find_tunnel` returns.

    Attributes:
        weights: [T, P] of its nodes, the first network first and the second last, on their device.
            The tunnel is the polyline through them.
        t: [T] float64, where on the straight line each began, from 0 to 1.
        histories: one for each node between the two networks.
    """

    weights: Tensor
    t: Tensor
    histories: list[History]

    @property
    def seconds(self) -> list[float]:
        """Seconds of training of each node."""
        return training_seconds(self.histories)

    def curve(self, model: nn.Module) -> Subspace:
        """The tunnel as a subspace of networks like `model`, for `curve_statistics`.

        At its coefficients `at(t)` every segment takes the same share of t.
        """
        T = len(self.weights)
        return Subspace(model, list(self.weights), PolyChain(T), trained=[False] * T)


def find_tunnel(
    start: nn.Module,
    end: nn.Module,
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    nodes: int = 9,
    constrain: str | None = None,
    together: str = "auto",
    stream: int = 0,
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Tunnel:
    r"""Connects two trained networks by a polyline of low loss.

    The nodes begin at equal distances on the straight line between the networks, where the loss is
    high, and each goes down the training loss by itself:

    .. math:: w_i = (1 - s_i) w_1 + s_i w_2, \quad s_i = i / (n + 1)

    Args:
        start: trained network; it is not changed.
        end: trained network of the same architecture and on the same device.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: how every node is trained; a few epochs at a rate of the end of the networks' own
            training do.
        nodes: n, between the two networks.
        constrain: None lets a node go anywhere, and nodes may end close to each other. "hyperplane"
            keeps each at its share of the way: the component of its weights along w_2 - w_1 stays
            :math:`s_i`, as gradients and weights are projected in every step. Weight decay and
            momentum act within the hyperplane. Parameters that are not trained count for nothing.
        together: how the nodes are trained: "batched" in one pass for all, "loop" one after another
            in each step, "auto" whichever is faster.
        stream: which of the seed's random streams to use; every node has an order of rows of its
            own.
        directory: folder of the checkpoint tunnel-<stream>.pt; None keeps none.
        resume: continue from the checkpoint found there.
        progress: show progress.
        on_step: called with the number of steps done, after each.

    Returns:
        `Tunnel` of T = n + 2 points. Weights only: batch norms have no statistics of any of them;
        `landscape_fast.landscape.along_path` takes these anew at every point it evaluates.

    Raises:
        TrainingInterrupted, ValueError: see `landscape_fast.methods.fit`.
        Diverged: if the loss of a node stops being finite.

    Source: Fort and Jastrzebski 2019 (arXiv:1906.04724); Fort, Hu and Lakshminarayanan 2019
        (arXiv:1912.02757), figure S2. Neither says how many steps a node takes.

    Example:
        >>> from landscape_fast.landscape import along_path
        >>> nets = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> rows, classes = torch.randn(20, 4), torch.arange(20) % 3
        >>> config = TrainConfig(epochs=2, batch_size=10, optimizer="sgd", lr=0.1)
        >>> tunnel = find_tunnel(*nets, rows, classes, config, nodes=3, progress=False)
        >>> found = along_path(nets[0], tunnel.weights, rows, classes, progress=False)
        >>> tunnel.weights.shape[0], found.loss.shape
        (5, torch.Size([17]))
    """
    op = "find_tunnel"
    check_rows(op, x, y)
    require(whole(nodes, 1), op, "nodes", "an integer of at least 1", nodes)
    require(whole(stream, 0), op, "stream", "an integer of at least 0", stream)
    rule = f"one of {CONSTRAINTS}"
    require(constrain in CONSTRAINTS, op, "constrain", rule, repr(constrain))
    require(together in WAYS, op, "together", f"one of {WAYS}", repr(together))
    shared = config.member_batches == "shared"
    require(shared, op, "config.member_batches", "'shared'", repr(config.member_batches))
    layout = check_alike(op, start, end)
    ends = layout.flatten_many([start, end])
    x, y = x.to(ends.device), y.to(ends.device)
    plain = unguard_(copy.deepcopy(start))  # a guard is for evaluation
    check_network(op, plain, x, "start", "a network")
    t = torch.linspace(0, 1, nodes + 2, dtype=torch.float64)
    chord = line(t[1:-1]).to(ends.device, torch.promote_types(ends.dtype, torch.float32))
    networks = []
    for weights in combine(chord, ends):
        networks.append(copy.deepcopy(plain))
        with torch.no_grad():
            for name, value in layout.views(weights).items():
                networks[-1].get_parameter(name).copy_(value)
    wall = None if constrain is None else _Hyperplanes(start, layout.views(ends), t[1:-1])
    path = None if directory is None else Path(directory) / f"tunnel-{stream:03d}.pt"
    run = _TunnelRun(
        wall,
        networks,
        x,
        y,
        config,
        streams=[stream * nodes + i for i in range(nodes)],
        how=together,
        label=f"tunnel of {nodes} nodes",
        checkpoint=path,
        on_step=on_step,
    )
    described = describe_rows(ends.double(), torch.empty(0))
    run.identity |= {"method": "tunnel", "constrain": str(constrain), "ends": described}
    run.execute(resume, progress)
    for number, failure in run.put_back().items():
        node = number - stream * nodes + 1
        raise Diverged(
            f"find_tunnel: the loss must stay finite; got {failure.reason} for node {node} of "
            f"{nodes}; lower the learning rate (now {config.lr})"
        )
    weights = torch.cat([ends[:1], layout.flatten_many(networks), ends[1:]])
    return Tunnel(weights, t, run.histories)


class _Hyperplanes:
    """Where nodes may go: their weights have a fixed component along the line between the ends.

    Args:
        model: says which parameters are trained.
        ends: name to [2, ...].
        s: [nodes], the share of the way of each.
    """

    def __init__(self, model: nn.Module, ends: dict[str, Tensor], s: Tensor) -> None:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        apart = {name: ends[name][1].double() - ends[name][0].double() for name in trained}
        norm = sum(each.square().sum() for each in apart.values()) ** 0.5
        differ = bool(norm > 0)
        require(differ, "find_tunnel", "end", "another point than start for a hyperplane", "start")
        self.normal = {name: each / norm for name, each in apart.items()}  # length 1
        first = self.along({name: ends[name][:1] for name in trained})
        self.level = first + s.to(norm.device) * norm  # [nodes]

    def along(self, tensors: dict[str, Tensor | None]) -> Tensor:
        """Components [M] along the normal of tensors [M, ...]; float64."""
        parts = [
            each.double().flatten(1) @ self.normal[name].flatten()
            for name, each in tensors.items()
            if each is not None
        ]
        return torch.stack(parts).sum(0)

    def shift_(self, tensors: dict[str, Tensor | None], by: Tensor) -> None:
        """Adds `by` [M] times the normal."""
        for name, each in tensors.items():
            if each is not None:
                step = by.view(-1, *[1] * (each.ndim - 1)) * self.normal[name]
                each += step.to(each.dtype)


class _TunnelRun(TogetherRun):
    """Nodes trained together, each within its hyperplane where there are any."""

    def __init__(self, wall: _Hyperplanes | None, *arguments: Any, **options: Any) -> None:
        self.wall, self.hooks = wall, []
        super().__init__(*arguments, **options)
        self._confine()

    def _keep(self, places: list[int]) -> None:
        super()._keep(places)
        if places:
            self._confine()  # the optimiser may be a new one

    def _confine(self) -> None:
        """Projects what the optimisers are given and what they make of it."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if self.wall is None:
            return
        levels = self.wall.level[self.active]
        for optimizer, module, at in self._parts(levels):
            named = {n: p for n, p in module.named_parameters() if n in self.wall.normal}
            self.hooks += [
                optimizer.register_step_pre_hook(self._gradients(named)),
                optimizer.register_step_post_hook(self._weights(named, at)),
            ]

    def _parts(self, levels: Tensor):
        """Optimisers, the module of each, and the levels [M] of its nodes."""
        if self.engine.way == "batched":
            return [(self.engine.optimizer, self.engine.module.model, levels)]
        return zip(self.engine.optimizers, self.engine.module, levels.split(1), strict=True)

    def _gradients(self, named: dict[str, nn.Parameter]) -> Callable:
        def project(optimizer, args, kwargs) -> None:
            rows = self._rows({n: p.grad for n, p in named.items()})
            self.wall.shift_(rows, -self.wall.along(rows))

        return project

    def _weights(self, named: dict[str, nn.Parameter], levels: Tensor) -> Callable:
        def project(optimizer, args, kwargs) -> None:
            with torch.no_grad():
                rows = self._rows({n: p.detach() for n, p in named.items()})
                self.wall.shift_(rows, levels - self.wall.along(rows))

        return project

    def _rows(self, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Views [M, ...]: in a loop every network has tensors of its own."""
        if self.engine.way == "batched":
            return tensors
        return {n: None if each is None else each[None] for n, each in tensors.items()}
