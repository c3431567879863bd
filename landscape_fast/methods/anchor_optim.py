"""Optimisers of subspaces: from the gradient at a point of it to a step of all its anchors."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops._checks import message, require
from landscape_fast.ops.anchor_step import AdamRule, AnchorState, Cos2, SGDRule, anchor_step
from landscape_fast.ops.gram import gram


class AnchorOptimizer(torch.optim.Optimizer):
    """What `AnchorSGD`, `AnchorAdam` and `AnchorAdamW` share.

    A step takes the gradient that `subspace.model` has collected at the current point, moves every
    trained anchor by its share, and empties the gradient. It is what autograd and the optimiser of
    torch.optim do with `subspace.anchors`, to rounding, without a gradient for each anchor.

    The parameters of the model may keep their `.grad` in `subspace.point_grad`, where backward
    passes add up; or hold None, as `zero_grad()` leaves them, and backward passes then hand over
    tensors of their own, which the step copies there at once. A GPU has fewer launches the second
    way.
    """

    _names: tuple[str, ...]  # of the vectors that are kept, in torch.optim

    def __init__(
        self,
        subspace: Subspace,
        defaults: dict,
        cos2: float,
        curve_l2: float,
        generator: Generator | None,
    ) -> None:
        op = type(self).__name__
        if not isinstance(subspace, Subspace):
            got = type(subspace).__name__
            raise TypeError(message(op, "subspace", "a landscape_fast.nn.Subspace", got))
        S, T = len(subspace.order), subspace.anchors.shape[0]
        require(T >= 1, op, "subspace", "one with a trained anchor", f"{T} of {S} trained")
        require(cos2 >= 0, op, "cos2", "at least 0", cos2)
        require(curve_l2 >= 0, op, "curve_l2", "at least 0", curve_l2)
        require(not cos2 or S >= 2, op, "cos2", "0 where there is no pair of anchors", cos2)
        self.subspace, self.generator = subspace, generator
        self._gram: Tensor | None = None
        self._gram_version = -1
        self._pair: Tensor | None = None
        self._selected: Tensor | None = None
        self._homes: list[tuple[nn.Parameter, Tensor, int]] = []
        self._homes_in: Tensor | None = None
        # the count of steps lives on the device of the anchors, which torch calls capturable
        own = {"cos2": cos2, "curve_l2": curve_l2, "capturable": True}
        super().__init__([subspace.anchors], defaults | own)
        self._rule(self.param_groups[0])  # refuses what it must now, not at the first step

    def add_param_group(self, param_group: dict) -> None:
        """Takes the anchors and nothing else."""
        require(not self.param_groups, type(self).__name__, "parameters", "the anchors", "others")
        super().add_param_group(param_group)

    def _rule(self, group: dict) -> SGDRule | AdamRule:
        raise NotImplementedError

    @property
    def gram(self) -> Tensor:
        """[T + F, T + F] float64: the scalar products of the anchors as they are now.

        Over the parameter tensors of more than one dimension, the weights of layers, in the order
        of `subspace.order`. With `cos2` every step makes it on the way.
        """
        anchors, fixed = self.subspace.anchors, self.subspace.fixed
        if self._gram is None or self._gram_version != anchors._version:
            rows = anchors.detach() if fixed is None else torch.cat([anchors.detach(), fixed])
            each = gram(rows, sizes=self.subspace.layout.sizes)
            self._gram = torch.where(self._chosen()[:, None, None], each, 0.0).sum(0)
            self._gram_version = anchors._version
        return self._gram

    def _chosen(self) -> Tensor:
        """[L] bool: the parts that the cosines are about, on the device of the anchors."""
        device = self.subspace.anchors.device
        if self._selected is None or self._selected.device != device:
            chosen = self.subspace.layout.select(lambda name, shape: len(shape) > 1)
            self._selected = chosen.to(device)
        return self._selected

    def _drawn_pair(self) -> Tensor:
        S, device = len(self.subspace.order), self.subspace.anchors.device
        if S > 2:
            return torch.randint(S * (S - 1), (), device=device, generator=self.generator)
        if self._pair is None or self._pair.device != device:
            self._pair = torch.zeros((), dtype=torch.int64, device=device)
        return self._pair

    def _parameters(self) -> list[tuple[nn.Parameter, Tensor, int]]:
        """Of the model: parameter, where its gradient is at home, and the address of that."""
        space = self.subspace
        if self._homes_in is not space.point_grad:  # it was moved to a device, or copied
            views = space.layout.views(space.point_grad).values()
            pairs = zip(space.model.parameters(), views, strict=True)
            self._homes = [(p, view, view.data_ptr()) for p, view in pairs]
            self._homes_in = space.point_grad
        return self._homes

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradient of the model, and of the anchors if they have one."""
        super().zero_grad(set_to_none)
        if not set_to_none:
            self.subspace.point_grad.zero_()
        for p, _, address in self._parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None and p.grad.data_ptr() != address:
                p.grad.zero_()

    def _gather(self) -> bool:
        """Brings gradients from elsewhere into `point_grad`; whether some were there already."""
        to, grads, inside = [], [], False
        for p, view, address in self._parameters():
            grad = p.grad
            if grad is None:
                view.zero_()
            elif grad.data_ptr() == address:
                inside = True
            else:
                to.append(view)
                grads.append(grad)
                p.grad = None
        if to:
            torch._foreach_copy_(to, grads)
        return inside

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Moves all trained anchors; the point stays where it is until the next `draw_()`.

        Args:
            closure: computes the loss and its gradient anew, as for every torch optimiser.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: if the anchors themselves have a gradient, which belongs to torch.optim.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        subspace, group = self.subspace, self.param_groups[0]
        (anchors,) = group["params"]
        if anchors.grad is not None:
            rule = "None: gradients belong to the parameters of subspace.model"
            remedy = "use draw_() and subspace.model, or torch.optim with subspace(x)"
            op, got = type(self).__name__, f"one of {list(anchors.grad.shape)}"
            raise RuntimeError(message(op, "subspace.anchors.grad", rule, got, remedy))
        inside = self._gather()
        rule, cos2 = self._rule(group), group["cos2"]
        layered = subspace.coeffs.ndim == 3 or cos2
        found = anchor_step(
            subspace.point_grad[None],
            subspace.coeffs,
            anchors,
            rule,
            self._state(rule, anchors),
            fixed=subspace.fixed,
            sizes=subspace.layout.sizes if layered else None,
            selected=self._chosen() if cos2 else None,
            penalty=Cos2(self.gram, self._drawn_pair(), cos2) if cos2 else None,
            curve_l2=group["curve_l2"],
            gram="total" if cos2 else None,
        )
        self._gram, self._gram_version = found, anchors._version
        if inside:
            subspace.point_grad.zero_()
        return loss

    def _state(self, rule, anchors: Tensor) -> AnchorState:
        state = self.state[anchors]
        if not state:
            made = AnchorState.zeros(rule, anchors)
            state.update(zip(("step", *self._names[: rule.states]), made, strict=False))
        if rule.states and self._names[0] not in state:  # a scheduler has turned momentum on
            state[self._names[0]] = torch.zeros_like(anchors)
        kept = [state[name] for name in self._names[: rule.states]]
        return AnchorState(state["step"], *kept)

    def state_dict(self) -> dict:
        """That of torch.optim, and with `cos2` the Gram matrix, whose sums a step orders its way.

        One made anew differs by rounding, and a run that goes on would have other bits.
        """
        found = super().state_dict()
        if self._gram is not None and self._gram_version == self.subspace.anchors._version:
            found["gram"] = self._gram
        return found

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what `state_dict` returned; load the subspace before."""
        super().load_state_dict(state_dict)
        self._gram = None
        for group in self.param_groups:  # torch moves the state alone
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(self.subspace.anchors.device)
        if "gram" in state_dict:
            kept, made = state_dict["gram"].to(self.gram), self.gram
            near = 1e-9 * float(made.max())
            if kept.shape == made.shape and torch.allclose(kept, made, 1e-9, near):
                self._gram = kept.clone()  # else it is of other anchors


class AnchorSGD(AnchorOptimizer):
    r"""`torch.optim.SGD` for the anchors of a subspace, in one pass over them.

    Args:
        subspace: its trained anchors learn.
        lr: learning rate, a number or a 0-dim float32 tensor on the device of the anchors (which a
            CUDA graph then reads anew at every replay).
        momentum: of every anchor.
        dampening: of the gradient that enters the momentum; not of the first.
        weight_decay: of every anchor, on all of its elements.
        nesterov: look ahead.
        cos2: beta of the penalty beta * cos^2 of one random pair of anchors per step, over the
            parameter tensors with more than one dimension (weights of layers, not norms or biases).
        curve_l2: lambda of the penalty lambda / 2 * ||w||^2 of the current point.
        generator: draws the pairs, on the device of the anchors; None takes the global one there.
            With two anchors nothing is drawn.

    Raises:
        TypeError: if `subspace` is no Subspace.
        ValueError: if a number is out of range, or `subspace` has no trained anchor.

    Source: Wortsman et al. 2021 (arXiv:2102.10472) for cos2, Garipov et al. 2018
        (arXiv:1802.10026) for curve_l2.

    Example:
        >>> from torch import nn
        >>> from landscape_fast.nn.coefficients import Line
        >>> subspace = Subspace(nn.Linear(4, 3), 2, Line())
        >>> optimizer = AnchorSGD(subspace, lr=0.1, momentum=0.9, cos2=1.0)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     network = subspace.draw_().model
        ...     nn.functional.cross_entropy(network(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.gram.shape
        torch.Size([2, 2])
    """

    _names = ("momentum_buffer",)

    def __init__(
        self,
        subspace: Subspace,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        cos2: float = 0.0,
        curve_l2: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(subspace, defaults, cos2, curve_l2, generator)

    def _rule(self, group: dict) -> SGDRule:
        return SGDRule(
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
        )


class AnchorAdam(AnchorOptimizer):
    """`torch.optim.Adam` for the anchors of a subspace, in one pass over them.

    Args:
        subspace: its trained anchors learn.
        lr: learning rate, as for `AnchorSGD`.
        betas: of the averages of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: added to the gradient, times the anchor.
        cos2: as for `AnchorSGD`.
        curve_l2: as for `AnchorSGD`.
        generator: as for `AnchorSGD`.

    Raises:
        TypeError: if `subspace` is no Subspace.
        ValueError: if a number is out of range, or `subspace` has no trained anchor.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), as in torch.optim.

    Example:
        >>> from torch import nn
        >>> from landscape_fast.nn.coefficients import Simplex
        >>> subspace = Subspace(nn.Linear(4, 3), 3, Simplex(3))
        >>> optimizer = AnchorAdam(subspace, lr=1e-3)
        >>> subspace.draw_().model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _names = ("exp_avg", "exp_avg_sq")
    _decoupled = False

    def __init__(
        self,
        subspace: Subspace,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        cos2: float = 0.0,
        curve_l2: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(subspace, defaults, cos2, curve_l2, generator)

    def _rule(self, group: dict) -> AdamRule:
        numbers = tuple(group["betas"]), group["eps"], group["weight_decay"]
        return AdamRule(group["lr"], *numbers, decoupled=self._decoupled)


class AnchorAdamW(AnchorAdam):
    """`torch.optim.AdamW` for the anchors of a subspace: the decay of weights is decoupled.

    Args:
        subspace: its trained anchors learn.
        lr: learning rate, as for `AnchorSGD`.
        betas: of the averages of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: anchors shrink by lr * weight_decay of themselves at every step.
        cos2: as for `AnchorSGD`; a penalty, so it enters the gradient.
        curve_l2: as for `AnchorSGD`; a penalty, so it enters the gradient.
        generator: as for `AnchorSGD`.

    Raises:
        TypeError: if `subspace` is no Subspace.
        ValueError: if a number is out of range, or `subspace` has no trained anchor.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), as in torch.optim.

    Example:
        >>> from torch import nn
        >>> from landscape_fast.nn.coefficients import Bezier
        >>> subspace = Subspace(nn.Linear(4, 3), 3, Bezier(3), trained=(False, True, False))
        >>> optimizer = AnchorAdamW(subspace, lr=1e-3, weight_decay=1e-2)
        >>> subspace.draw_().model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _decoupled = True

    def __init__(
        self,
        subspace: Subspace,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        cos2: float = 0.0,
        curve_l2: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            subspace,
            lr,
            betas,
            eps,
            weight_decay,
            cos2=cos2,
            curve_l2=curve_l2,
            generator=generator,
        )
