"""Any network as a subspace of weights: its parameters are a combination of K anchors."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from landscape_fast.nn import statistics as norm_statistics
from landscape_fast.nn._anchors import start_anchors
from landscape_fast.nn._stacked_loop import changed_by_hand
from landscape_fast.nn.flat import FlatLayout, Source
from landscape_fast.nn.stacked import StackedEnsemble
from landscape_fast.ops._checks import LOW, message, require
from landscape_fast.ops._dispatch import transforming
from landscape_fast.ops.combine import combine

_STALE = "statistics_stale"


class Subspace(nn.Module):
    r"""A network whose weights are combinations of K anchors: a line, a simplex, a curve, a plane.

    .. math:: w = \sum_k c_k A_k, \quad \text{layer-wise } w_\ell = \sum_k c_{\ell k} A_{k\ell}

    There are two ways to train it, equal to rounding. The plain one is an autograd graph: call the
    subspace on a batch in training mode (it draws a point), and give `anchors` to any optimiser.
    The fused one forms no gradient of anchors, only that of the drawn point: `draw_()`, a loss
    through `.model`, `backward()`, and a step of `landscape_fast.methods.AnchorSGD` or its kin.

    Args:
        model: any network; it is copied. Every parameter takes part: those of convolutions, linear
            layers, norms, embeddings and biases; one that needs no gradient is mixed too, and
            passes none to the anchors. Buffers do not (see `statistics`).
        anchors: K; or K networks, state dicts or vectors (see `FlatLayout.flatten`).
        coefficients: how points are drawn: `Line()`, `Simplex(K)`, `Bezier(K)`, `PolyChain(K)` of
            `landscape_fast.nn.coefficients`, or anything with their `anchors`, `draw`, `midpoint`.
        layerwise: draw separate coefficients for each module that has parameters.
        trained: for each anchor whether it is trained; None trains all.
        start: with an integer K, "independent": the first anchor is `model`, the others have new
            initial values by `reset_parameters()` of its modules; "copies": all are `model`.
        statistics: what batch norms do in evaluation mode, see `statistics_mode_`; "recalibrate"
            makes it an error to evaluate a point before `recalibrate_` was called there.
        generator: gives the seed of new initial values; None takes torch's global generator.

    Attributes:
        anchors: Parameter [T, P], the trained anchors in the order given.
        fixed: buffer [F, P] of the others, or None. T + F = K.
        order: the places, in the order given, of the T + F anchors.
        layout: `FlatLayout` of the model: where each tensor lies in P.
        point: [P], the weights at the current point.
        point_grad: [P], their gradient.
        coeffs: [1, T + F], or layer-wise [1, L, T + F], of the current point, in the order of
            `order`; at first, and until something is drawn, the midpoint.
        model: the network at the current point. Its parameters are views of `point` and their
            `.grad` views of `point_grad`, so it trains and predicts as any network does; it is not
            listed among the modules and parameters of the subspace.
        coefficients, layerwise: as given.

    A state dict holds the anchors, the current coefficients and the buffers of the model. A step
    that finds the point moved between its forward and its backward pass is an error of autograd.
    Replays of a CUDA graph are not seen on the host: call `move_to_` after them.

    Source: Wortsman et al. 2021 (arXiv:2102.10472); Garipov et al. 2018 (arXiv:1802.10026).

    Example:
        >>> from landscape_fast.nn.coefficients import Line
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> subspace = Subspace(net, 2, Line())
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> loss = nn.functional.cross_entropy(subspace(x), y)  # at a point drawn for this batch
        >>> loss.backward()
        >>> subspace.anchors.grad.shape == (2, subspace.layout.P)
        True
        >>> midpoint = subspace.network(torch.tensor([0.5, 0.5]))
        >>> torch.allclose(midpoint(x), subspace.eval()(x))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: int | Sequence[Source],
        coefficients: Any,
        *,
        layerwise: bool = False,
        trained: Sequence[bool] | None = None,
        start: str = "independent",
        statistics: str = "recalibrate",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.layout = FlatLayout(model)
        rows = start_anchors(model, self.layout, anchors, start, generator)
        K = rows.shape[0]
        rule, got = f"of K = {K} anchors", f"{coefficients} of {coefficients.anchors}"
        require(coefficients.anchors == K, "Subspace", "coefficients", rule, got)
        trained = [True] * K if trained is None else list(trained)
        require(len(trained) == K, "Subspace", "trained", f"K = {K} booleans", trained)
        self.coefficients, self.layerwise = coefficients, layerwise
        self.order = tuple(sorted(range(K), key=lambda k: not trained[k]))
        T = sum(map(bool, trained))
        rows = rows[list(self.order)]
        self.anchors = nn.Parameter(rows[:T].clone())
        self.register_buffer("fixed", rows[T:].clone() if T < K else None)
        shape = (1, len(self.layout), K) if layerwise else (1, K)
        midpoint = coefficients.midpoint()[list(self.order)].to(rows.device)
        self.register_buffer("coeffs", midpoint.to(_coeffs_dtype(rows)).expand(shape).clone())
        self._index("_order", self.order)
        self._index("_groups", self.layout.groups)
        model = copy.deepcopy(model)
        object.__setattr__(self, "model", model)  # not a submodule: its parameters are no own ones
        self._guard = norm_statistics.statistics_mode_(model, statistics)
        self._bind()

    def _index(self, name: str, places: Sequence[int]) -> None:
        index = torch.tensor(places, device=self.anchors.device)
        self.register_buffer(name, index, persistent=False)

    # The point: one vector, which the model's parameters view.

    def _bind(self) -> None:
        """Makes the rows, the point and the views of it that device, dtype and copies ask for."""
        if self.coeffs.dtype != _coeffs_dtype(self.anchors):
            self.coeffs = self.coeffs.to(_coeffs_dtype(self.anchors))
        rows, T = self.anchors.data, self.anchors.shape[0]
        if self.fixed is not None:  # in one storage, so that a point takes one launch
            rows = torch.cat([rows, self.fixed])
            self.anchors.data, self.fixed = rows[:T], rows[T:]
        self._rows = rows
        self._made_of: list = []  # `_stack`: the network M times, made when it is needed
        # `functional_call` puts another in its place, with other rows
        object.__setattr__(self, "_bound", self.anchors)
        self.point = rows.new_zeros(self.layout.P)
        self.point_grad = torch.zeros_like(self.point)
        grads = self.layout.views(self.point_grad)
        before, after = dict(self.model.named_parameters()), {}
        self._frozen = [name for name, p in before.items() if not p.requires_grad]
        for name, view in self.layout.views(self.point).items():
            wanted = before[name].requires_grad
            after[id(before[name])] = nn.Parameter(view, requires_grad=wanted)
            if wanted:
                after[id(before[name])].grad = grads[name]
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = after[id(parameter)]
        self._mix()

    @torch.no_grad()
    def _mix(self) -> None:
        sizes = self.layout.sizes if self.layerwise else None
        combine(self.coeffs, self._rows, sizes=sizes, out=self.point[None])
        self._mixed = self.anchors._version

    def draw_(self, generator: Generator | None = None) -> "Subspace":
        """Draws coefficients, from the device's global generator if None, and goes there.

        Without autograd, and without waiting for the device.
        """
        return self._move(self._drawn(1, generator))

    def move_to_(self, coeffs: Tensor) -> "Subspace":
        """Goes to the point `coeffs`, [K] or [1, K]; layer-wise also [L, K] or [1, L, K]."""
        coeffs = self._one_point("move_to_", coeffs)
        op, rule = "Subspace.move_to_", "[K] in a subspace that is not layer-wise"
        require(self.layerwise or coeffs.ndim == 2, op, "coeffs", rule, [*coeffs.shape])
        return self._move(coeffs)

    @torch.no_grad()
    def _move(self, coeffs: Tensor) -> "Subspace":
        self.coeffs.copy_(coeffs)  # an expanded [1, 1, K] where it is layer-wise
        self._mix()
        self._guard.stale = True
        return self

    def _drawn(self, points: int, generator: Generator | None = None) -> Tensor:
        """[points, K] or [points, L, K] of new draws, in internal order."""
        modules = self.layout.groups[-1] + 1 if self.layerwise else 1
        drawn = self.coefficients.draw(
            points * modules,
            device=self.coeffs.device,
            generator=generator,
            dtype=self.coeffs.dtype,
        )
        drawn = self._ordered(drawn)
        return drawn.view(points, modules, -1)[:, self._groups] if self.layerwise else drawn

    def _checked(self, op: str, coeffs: Tensor) -> Tensor:
        """[M, K] or [M, L, K] in internal order, from what the user gives."""
        K, L = len(self.order), len(self.layout)
        if not isinstance(coeffs, Tensor):
            rule = "a Tensor [M, K] or [M, L, K]"
            raise TypeError(message(f"Subspace.{op}", "coeffs", rule, type(coeffs).__name__))
        fits = coeffs.ndim in (1, 2, 3) and coeffs.shape[-1] == K
        fits = fits and (coeffs.ndim < 3 or coeffs.shape[1] == L)
        rule = f"[K], [M, K] or [M, L, K] with K = {K}, L = {L}"
        require(fits, f"Subspace.{op}", "coeffs", rule, list(coeffs.shape))
        coeffs = coeffs.to(device=self.coeffs.device, dtype=self.coeffs.dtype)
        return self._ordered(coeffs[None] if coeffs.ndim == 1 else coeffs)

    def _ordered(self, coeffs: Tensor) -> Tensor:
        """[..., K] from the order of the user to trained anchors first; often it is the same."""
        if self.order == tuple(range(len(self.order))):
            return coeffs
        return coeffs.index_select(-1, self._order)

    def _one_point(self, op: str, coeffs: Tensor) -> Tensor:
        """[1, K] or [1, L, K] in internal order, from one of these, [K] or [L, K]."""
        found, L = self._checked(op, coeffs), len(self.layout)
        if found.ndim == 2 and found.shape[0] == L > 1:
            found = found[None]
        rule = f"one point: [K] or [L, K] with L = {L}"
        require(found.shape[0] == 1, f"Subspace.{op}", "coeffs", rule, list(coeffs.shape))
        return found

    def mix(self, coeffs: Tensor) -> Tensor:
        """Weights [M, P] at the points `coeffs` [M, K] or [M, L, K], anchors in the order given.

        Differentiable in the coefficients and the trained anchors, to any order.
        """
        return self._weights(self._checked("mix", coeffs))

    def _weights(self, coeffs: Tensor) -> Tensor:
        sizes = self.layout.sizes if coeffs.ndim == 3 else None
        T, swapped = self.anchors.shape[0], self.anchors is not self._bound
        if self.fixed is None:
            return combine(coeffs, self.anchors, sizes=sizes)
        if not (swapped or (T and torch.is_grad_enabled() and self.anchors.requires_grad)):
            return combine(coeffs, self._rows, sizes=sizes)
        at_rest = combine(coeffs[..., T:], self.fixed, sizes=sizes)
        return combine(coeffs[..., :T], self.anchors, sizes=sizes) + at_rest

    # The network at one point or at many.

    def forward(self, x: Tensor, coeffs: Tensor | None = None, *, points: int | None = None):
        """The network on rows [B, ...], with gradients to the anchors and the coefficients.

        Args:
            x: [B, ...], the same rows for all points.
            coeffs: [K] for one point; [M, K] or [M, L, K] for M. None draws in training mode, and
                in evaluation mode takes the current point.
            points: draw M points in training mode; None draws one. M networks run as a
                `StackedEnsemble` where that batches them, which leaves running statistics alone
                (unless `statistics` is "shared"), and one after another elsewhere.

        Returns:
            What the network returns; for `points` or [M, ...] coefficients with M in front.

        Raises:
            RuntimeError: in evaluation mode, if batch norms have statistics of another point.
        """
        if points is not None:
            fits = coeffs is None and self.training and points >= 1
            rule = "None unless points are drawn in training mode"
            require(fits, "Subspace", "points", rule, points)
        single = points is None and (coeffs is None or coeffs.ndim == 1)
        stale = self._guard.stale
        if coeffs is not None:
            stale, coeffs = True, self._checked("forward", coeffs)
        elif self.training:
            coeffs = self._drawn(points or 1)
        else:
            stale = stale or self._anchors_moved()
            coeffs = self.coeffs
        before, self._guard.stale = self._guard.stale, stale
        try:
            weights = self._weights(coeffs)
            if single:
                return functional_call(self.model, self._views(weights[0]), (x,))
            return self._at_many(weights, x)
        finally:
            self._guard.stale = before

    def _at_many(self, weights: Tensor, x: Tensor) -> Tensor:
        """[M, P], [B, ...] -> [M, B, ...], in one pass where that is the faster way."""
        # running statistics that nobody reads may be those of a stand-in
        free = self.statistics != "shared" and all(m.training for m in self.model.modules())
        if free and not (torch.compiler.is_compiling() or transforming()):
            made_of = [len(weights), *changed_by_hand(self.model)]
            if self._made_of != made_of:
                # the guard is for evaluation, and hooks stand in the way of a loop
                plain = norm_statistics.unguard_(copy.deepcopy(self.model))
                object.__setattr__(self, "_stack", StackedEnsemble.like(plain, len(weights)))
                self._made_of = made_of
            if self._stack.train().runs(x) == "batched":
                return self._stack.run(self._views(weights), x)
        views = map(self._views, weights.unbind(0))
        return torch.stack([functional_call(self.model, view, (x,)) for view in views])

    def _views(self, weights: Tensor) -> dict[str, Tensor]:
        """The parameters in `weights`; those that are not trained pass no gradient on."""
        views = self.layout.views(weights)
        return views | {name: views[name].detach() for name in self._frozen}

    def _anchors_moved(self) -> bool:
        return not torch.compiler.is_compiling() and self.anchors._version != self._mixed

    def network(self, coeffs: Tensor | None = None) -> nn.Module:
        """A copy of the network with the weights at `coeffs`, [K] or [L, K]; None: where it is.

        It shares nothing with the subspace. Its batch norms have the statistics that the subspace
        has; where these are of another point, call `recalibrate_(network, rows)` before evaluating.
        """
        if coeffs is None:
            coeffs, stale = self.coeffs, self._guard.stale or self._anchors_moved()
        else:
            coeffs, stale = self._one_point("network", coeffs), True
        network = copy.deepcopy(self.model)
        with torch.no_grad():
            weights = self.layout.views(self._weights(coeffs)[0])
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name])
        norm_statistics.statistics_mode_(network, self.statistics).stale = stale
        return network

    # Batch norms.

    @property
    def statistics(self) -> str:
        """What batch norms do in evaluation mode; see `statistics_mode_`."""
        return self._guard.mode

    @statistics.setter
    def statistics(self, mode: str) -> None:
        norm_statistics.statistics_mode_(self.model, mode)

    def recalibrate_(self, batches_or_rows: Tensor | Iterable, **options) -> "Subspace":
        """Takes the statistics of all batch norms at the current point; see `recalibrate_`."""
        if self._anchors_moved():
            self._mix()
        norm_statistics.recalibrate_(self.model, batches_or_rows, **options)
        return self

    # What follows the module around.

    def train(self, mode: bool = True) -> "Subspace":
        """As every module's; on the way to evaluation the point takes up what anchors learned."""
        super().train(mode)
        self.model.train(mode)
        if not mode and self._anchors_moved():
            self._mix()
            self._guard.stale = True
        return self

    def _apply(self, fn, recurse: bool = True) -> "Subspace":
        moved, coeffs = self._anchors_moved(), self.coeffs
        super()._apply(fn, recurse)
        self.model._apply(fn)
        self.layout = FlatLayout(self.model)
        if self.coeffs.dtype in LOW:  # of their digits, coefficients lose none
            self.coeffs = coeffs.to(self.coeffs.device)
        self._bind()
        self._guard.stale = self._guard.stale or moved
        return self

    def __getstate__(self) -> dict:
        derived = ("_rows", "_bound", "_stack", "point", "point_grad")
        state = {name: value for name, value in self.__dict__.items() if name not in derived}
        return {**state, "_mixed": self._anchors_moved()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        moved = self._mixed
        self._bind()
        self._guard.stale = self._guard.stale or moved

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        every = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.model.state_dict(keep_vars=keep_vars).items():
            if name not in every:
                destination[f"{prefix}model.{name}"] = value
        destination[prefix + _STALE] = torch.tensor(self._guard.stale or self._anchors_moved())

    def _load_from_state_dict(
        self, state, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        inner = f"{prefix}model."
        own = {name: state[name] for name in state if not name.startswith(inner)}
        stale = own.pop(prefix + _STALE, torch.tensor(True))
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        parts = {n.removeprefix(inner): v for n, v in state.items() if n.startswith(inner)}
        assign = metadata.get("assign_to_params_buffers", False)
        lost, foreign = self.model.load_state_dict(parts, strict=False, assign=assign)
        every = dict(self.model.named_parameters(remove_duplicate=False))
        missing += [inner + name for name in lost if name not in every]
        unexpected += [inner + name for name in foreign]
        (self._bind if assign else self._mix)()
        self._guard.stale = bool(stale)

    def extra_repr(self) -> str:
        told = f"{self.coefficients}, layerwise={self.layerwise}, trained={self.anchors.shape[0]}"
        return f"{told}, order={self.order}, {self.layout}\n(model): {self.model!r}"


def _coeffs_dtype(anchors: Tensor) -> torch.dtype:
    return torch.float64 if anchors.dtype == torch.float64 else torch.float32
