"""SGD with the noise of Langevin dynamics: the step of cSGLD and cSGHMC."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from landscape_fast.ops._checks import require


class LangevinSGD(Optimizer):
    r"""Gradient descent with friction and, where it is switched on, thermal noise.

    .. math::
        v \leftarrow \mu v - \alpha (\nabla L + \lambda w)
            + \sqrt{2 \alpha (1 - \mu) \tau} \, \varepsilon, \quad w \leftarrow w + v

    With :math:`\mu = 0` it is stochastic gradient Langevin dynamics, else stochastic gradient
    Hamiltonian Monte Carlo with the friction :math:`1 - \mu`; as :math:`\alpha \to 0` it samples
    :math:`\exp(-(L(w) + \lambda |w|^2 / 2) / \tau)`. The velocity holds the learning rates of its
    past, unlike the buffer of `torch.optim.SGD`, which is multiplied by the present one; where the
    rate is constant and there is no noise the two are the same.

    Args:
        params: parameters, or groups of them.
        lr: :math:`\alpha`, of at least 0.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda`.

    Raises:
        ValueError: if a setting breaks its rule.

    Source: Welling and Teh 2011; Chen et al. 2014 (arXiv:1402.4102); as in the authors' code for
        Zhang et al. 2020 (arXiv:1902.03932).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = LangevinSGD([w], lr=0.5)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.data
        tensor([0.])
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        op = "LangevinSGD"
        require(lr >= 0, op, "lr", "a number of at least 0", lr)
        require(0 <= momentum < 1, op, "momentum", "a number in [0, 1)", momentum)
        require(weight_decay >= 0, op, "weight_decay", "a number of at least 0", weight_decay)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self.temperature, self.seed = 0.0, 0

    def set_noise(self, temperature: float, seed: int) -> None:
        r"""Sets :math:`\tau` and the seed of the next step's noise; 0 switches the noise off."""
        fits = temperature >= 0
        require(fits, "LangevinSGD", "temperature", "a number of at least 0", temperature)
        self.temperature, self.seed = temperature, seed

    @torch.no_grad()
    def step(self, closure=None) -> float | None:
        """One step; parameters without a gradient stay as they are."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        generator: torch.Generator | None = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            velocities = [self._velocity(p) for p in params]
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, [p.grad for p in params], alpha=-lr)
            if decay:
                torch._foreach_add_(velocities, params, alpha=-lr * decay)
            if self.temperature:
                if generator is None:
                    generator = torch.Generator(params[0].device).manual_seed(self.seed)
                scale = (2 * lr * (1 - momentum) * self.temperature) ** 0.5
                noise = [_normal(p, generator) for p in params]
                torch._foreach_add_(velocities, noise, alpha=scale)
            torch._foreach_add_(params, velocities)
        return loss

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(p)
        return state["velocity"]


def _normal(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
