"""Hyperparameters of hyper-batch ensembles: their distribution, and what layers make of them."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn import init
from landscape_fast.nn.functional import check_count
from landscape_fast.ops._checks import require

Range = float | Sequence[float]


class HyperEmbedding(nn.Module):
    """The responses of all layers to hyperparameters: e(lambda), a tensor for each layer.

    Hyperparameters are scaled to [0, 1], by their logarithm; then a trunk for all layers, a body
    for each, and a linear head without bias for each. Trunk and bodies are linear layers with tanh,
    and absent as published.

    Args:
        sizes: numbers that each layer wants, `layer.response_size`.
        lower: of the hyperparameters, H positive numbers.
        upper: of the same, above `lower`.
        trunk: widths of the layers for all.
        body: widths of the layers for each.
        std: standard deviation of the heads' normal initial values; 0 starts without a response.
        generator: draws the initial values; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Source: Wenzel et al. 2020 (arXiv:2006.13570).

    Example:
        >>> embedding = HyperEmbedding([6, 8], lower=[0.1, 0.1], upper=[100.0, 10.0])
        >>> [e.shape for e in embedding(torch.ones(4, 16, 2))]
        [torch.Size([4, 16, 6]), torch.Size([4, 16, 8])]
        >>> embedding.scaled(torch.tensor([10.0, 10.0]))
        tensor([0.6667, 1.0000])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        lower: Sequence[float],
        upper: Sequence[float],
        trunk: Sequence[int] = (),
        body: Sequence[int] = (),
        std: float = 1e-4,
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = "HyperEmbedding"
        for name, counts in (("sizes", sizes), ("trunk", trunk), ("body", body)):
            for count in counts:
                check_count(op, name, count)
        require(std >= 0, op, "std", "at least 0", std)
        log_lower, log_upper = _log_range(op, lower, upper)
        factory = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.std = std
        self.register_buffer("log_lower", log_lower.to(**factory))
        self.register_buffer("log_upper", log_upper.to(**factory))
        H = len(log_lower)
        self.trunk, width = _tanh_layers(H, trunk, factory)
        bodies = [_tanh_layers(width, body, factory) for _ in sizes]
        self.bodies = nn.ModuleList(layers for layers, _ in bodies)
        self.heads = nn.ModuleList(
            nn.Linear(w, n, bias=False, **factory) for (_, w), n in zip(bodies, sizes, strict=True)
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New initial values: as `nn.Linear` has them in trunk and bodies, normal in the heads."""
        for layer in [*self.trunk, *(layer for body in self.bodies for layer in body)]:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                for parameter in (layer.weight, layer.bias):
                    init.uniform_(parameter, bound, generator)
        for head in self.heads:
            init.Normal(0.0, self.std)(head.weight, generator)

    def scaled(self, lambdas: Tensor) -> Tensor:
        """Hyperparameters [..., H] in [0, 1]: 0 for `lower`, 1 for `upper`."""
        return (lambdas.log() - self.log_lower) / (self.log_upper - self.log_lower)

    def forward(self, lambdas: Tensor) -> list[Tensor]:
        """[M, B, H] (or any rows) -> for each layer [M, B, size]."""
        H = len(self.log_lower)
        fits = lambdas.shape[-1:] == (H,)
        require(fits, "HyperEmbedding", "lambdas", f"[..., H] with H = {H}", list(lambdas.shape))
        z = self.trunk(self.scaled(lambdas))
        return [head(body(z)) for body, head in zip(self.bodies, self.heads, strict=True)]


class LambdaDistribution(nn.Module):
    """For every member and hyperparameter a log-uniform distribution, whose bounds are learned.

    Parameters are `log_lower` and `log_upper`, [M, H]. At the start the middle of each interval is
    drawn around the mean of the log-uniform distribution over the whole range.

    Args:
        lower: of the allowed range, H positive numbers.
        upper: of the same, above `lower`.
        members: M.
        width: half the width of an interval at the start; the middles have a tenth of it as
            standard deviation. One number, or H.
        generator: draws the middles; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Call `clip_` after every step of an optimiser.

    Source: Wenzel et al. 2020 (arXiv:2006.13570).

    Example:
        >>> distribution = LambdaDistribution([0.1, 0.1], [100.0, 100.0], members=3)
        >>> lambdas = distribution.sample(16, torch.Generator().manual_seed(0))
        >>> lambdas.shape, bool((14 < lambdas).all() and (lambdas < 15).all())
        (torch.Size([3, 16, 2]), True)
        >>> distribution.mean().shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        lower: Sequence[float],
        upper: Sequence[float],
        members: int,
        width: Range = 0.2,
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = "LambdaDistribution"
        check_count(op, "members", members)
        minimum, maximum = _log_range(op, lower, upper)
        factory = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        H = len(minimum)
        widths = torch.as_tensor(width, dtype=torch.float64)
        fits = tuple(widths.shape) in ((), (1,), (H,))
        require(fits, op, "width", f"one number, or H with H = {H}", width)
        require(bool((widths > 0).all()), op, "width", "above 0", width)
        self.members, self.width = members, width
        self.register_buffer("log_min", minimum.to(**factory))
        self.register_buffer("log_max", maximum.to(**factory))
        self.log_lower = Parameter(torch.empty(members, H, **factory))
        self.log_upper = Parameter(torch.empty(members, H, **factory))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New intervals."""
        half = torch.as_tensor(self.width, dtype=torch.float64)
        low, high = self.log_min.double(), self.log_max.double()
        middle = (high.exp() - low.exp()) / (high - low)
        shape, device = self.log_lower.shape, "cpu" if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, device=device).to(middle.device)
        middle = middle + 0.1 * half.to(middle.device) * drawn
        half = half.to(middle.device)
        self.log_lower.copy_((middle - half).clamp_min(1e-8).log())
        self.log_upper.copy_((middle + half).clamp_min(1e-8).log())
        self.clip_()

    @torch.no_grad()
    def clip_(self) -> "LambdaDistribution":
        """Brings the bounds back into the range, and into their order."""
        gap = 5e-7 * (self.log_max - self.log_min)
        self.log_lower.copy_(self.log_lower.clamp(self.log_min, self.log_max - 2 * gap))
        self.log_upper.copy_(torch.clamp(self.log_upper, self.log_lower + gap, self.log_max))
        return self

    def sample(self, examples: int, generator: Generator | None = None) -> Tensor:
        """[M, examples, H], one draw per member and example; differentiable in the bounds."""
        check_count("LambdaDistribution.sample", "examples", examples)
        M, H = self.log_lower.shape
        like = self.log_lower
        device = like.device if generator is None else generator.device
        u = torch.rand(M, examples, H, generator=generator, device=device, dtype=like.dtype)
        low, high = self.log_lower.unsqueeze(1), self.log_upper.unsqueeze(1)
        return (low + u.to(like.device) * (high - low)).exp()

    def mean(self) -> Tensor:
        """[M, H], the means of the distributions."""
        span = self.log_upper - self.log_lower
        return self.log_lower.exp() * span.expm1() / span

    def entropy(self) -> Tensor:
        """The mean of the differential entropies, in nats; a scalar."""
        span = self.log_upper - self.log_lower
        return ((self.log_lower + self.log_upper) / 2 + span.log()).mean()

    def extra_repr(self) -> str:
        return f"members={self.members}, hyperparameters={self.log_lower.shape[1]}"


def _log_range(op: str, lower, upper) -> tuple[Tensor, Tensor]:
    """The logarithms of the bounds, [H] in float64."""
    low, high = (torch.as_tensor(t, dtype=torch.float64) for t in (lower, upper))
    require(low.ndim == 1 and len(low) > 0, op, "lower", "[H]", list(low.shape))
    require(high.shape == low.shape, op, "upper", f"[H] with H = {len(low)}", list(high.shape))
    require(bool((low > 0).all() and low.isfinite().all()), op, "lower", "above 0", list(lower))
    ordered = bool((high > low).all() and high.isfinite().all())
    require(ordered, op, "upper", "above lower", list(upper))
    return low.log(), high.log()


def _tanh_layers(width: int, widths: Sequence[int], factory: dict) -> tuple[nn.Sequential, int]:
    layers = []
    for n in widths:
        layers += [nn.Linear(width, n, **factory), nn.Tanh()]
        width = n
    return nn.Sequential(*layers), width
