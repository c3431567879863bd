"""The Gaussian of SWAG: moments of the weights that a run passes, and samples from it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.methods.seeds import stream_seed
from landscape_fast.nn.ensemble import DeepEnsemble
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.statistics import recalibrate_
from landscape_fast.ops import combine, perturb
from landscape_fast.ops._checks import require, whole


class Swag(nn.Module):
    r"""Mean, variances and low-rank deviations of networks collected one by one.

    The Gaussian has the mean of all networks and, for a scale s, the covariance

    .. math:: s \left( \mathrm{diag}(\sigma^2) + \frac{1}{r - 1} D^\top D \right)

    with :math:`\sigma^2` the variances over all networks (divided by their number) and D the last r
    deviations, each from the mean of the networks up to its own. **s multiplies the covariance**,
    so standard deviations grow with its root; 0.5 is the paper's posterior.

    The moments are Welford's, in float64 and in place: variances far below the rounding of the
    squared weights are right. D is a ring of `rank` rows that is allocated once.

    Args:
        model: a network whose weights are collected; it is copied, its buffers with it.
        rank: the most deviations kept, at least 2; or 0 for the diagonal alone.

    Raises:
        ValueError: for another rank, or a model that is no `FlatLayout`.

    Cost: `collect` changes 4 vectors of P elements (without deviations 3), two of them in float64,
        by way of 3 new ones. Memory: rank + 2 networks, and two vectors in float64.

    Source: Maddox et al. 2019 (arXiv:1902.02476). In the authors' code s multiplies the standard
        deviation where samples are drawn tensor by tensor, the covariance otherwise, and r is the
        rank asked for, even before so many were collected. Variances there are differences of
        squares, which lose small ones in float32.

    Example:
        >>> swag = Swag(nn.Linear(1, 1, bias=False), rank=2)
        >>> for w in (1.0, 2.0, 6.0):
        ...     swag.collect({"weight": torch.tensor([[w]])})
        >>> swag.views(swag.mean)["weight"], swag.views(swag.variance())["weight"]
        (tensor([[3.]]), tensor([[4.6667]]))
        >>> swag.sample(4, seed=0).shape
        torch.Size([4, 8])
    """

    def __init__(self, model: nn.Module, rank: int = 20) -> None:
        super().__init__()
        rule = "an integer of at least 2, or 0 for the diagonal alone"
        require(whole(rank, 0) and rank != 1, "Swag", "rank", rule, rank)
        self.layout, self.rank, self.count = FlatLayout(model), rank, 0
        self.trained = {name: p.requires_grad for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        P, device = self.layout.P, next(model.parameters()).device
        moments = torch.zeros(2, P, dtype=torch.float64, device=device)
        self.register_buffer("moments", moments)  # mean, and sum of squared deviations
        anchors = torch.zeros(1 + rank, P, dtype=self.layout.dtype, device=device)
        self.register_buffer("anchors", anchors)  # mean, and the ring of deviations

    def _apply(self, fn, recurse: bool = True) -> "Swag":
        """`.to(device)` moves it; a dtype changes nothing, or the moments would be rounded."""

        def move(t: Tensor) -> Tensor:
            return t.to(fn(torch.empty(0, dtype=t.dtype, device=t.device)).device)

        return super()._apply(move, recurse)

    def get_extra_state(self) -> dict[str, int]:
        """For `state_dict`."""
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """For `load_state_dict`."""
        self.count = state["count"]

    @property
    def mean(self) -> Tensor:
        """[P], a view that the next network changes."""
        return self.anchors[0]

    @property
    def held(self) -> int:
        """r, how many deviations there are now."""
        return min(self.count, self.rank)

    def variance(self) -> Tensor:
        """[P] in the dtype of the network: the diagonal, divided by the number of networks."""
        return (self.moments[1] / max(self.count, 1)).to(self.layout.dtype)

    def deviations(self) -> Tensor:
        """[r, P], a view in the order of the ring, which the next network changes."""
        return self.anchors[1 : 1 + self.held]

    def views(self, w: Tensor) -> dict[str, Tensor]:
        """[..., P] as the tensors of the network; see `FlatLayout.views`."""
        return self.layout.views(w)

    @torch.no_grad()
    def collect(self, source: nn.Module | Mapping[str, Tensor] | Tensor) -> None:
        """Adds one network.

        Args:
            source: a network like `model`, its parameters by name, or its vector [P].
        """
        w = self.layout.flatten(source).to(self.moments)
        mean, m2 = self.moments
        self.count += 1
        before = w - mean
        mean.add_(before, alpha=1 / self.count)
        after = w.sub_(mean)
        m2.addcmul_(before, after)
        self.anchors[0].copy_(mean)
        if self.rank:
            self.anchors[1 + (self.count - 1) % self.rank].copy_(after)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        seed: int,
        *,
        first: int = 0,
        scale: float = 0.5,
        low_rank: bool = True,
        block: bool = False,
    ) -> Tensor:
        """Weights of `count` networks drawn from the Gaussian.

        Args:
            count: S.
            seed: of the samples; sample i depends on it and on `first + i` alone, so that
                `lambda start, stop: swag.sample(stop - start, seed, first=start)` is what
                `landscape_fast.methods.sweep` takes.
            first: number of the first sample.
            scale: s, multiplies the covariance; 0 gives the mean.
            low_rank: False leaves the second term of the covariance out.
            block: True draws the coefficients of the deviations for every parameter tensor by
                itself: tensors are then uncorrelated.

        Returns:
            [S, P], new memory. The noise of the diagonal is that of `landscape_fast.ops.perturb`,
            equal on every device; pads are 0.

        Raises:
            ValueError: if fewer than 2 networks were collected, or an argument breaks its rule.

        Cost: one `combine` of rank + 1 anchors and one `perturb`.
        """
        op = "Swag.sample"
        require(self.count >= 2, op, "networks collected", "at least 2", self.count)
        require(whole(count, 1), op, "count", "an integer of at least 1", count)
        require(whole(seed, 0), op, "seed", "a non-negative integer", seed)
        require(whole(first, 0), op, "first", "an integer of at least 0", first)
        require(scale >= 0, op, "scale", "a number of at least 0", scale)
        require(not low_rank or self.rank, op, "low_rank", "False with rank 0", low_rank)
        root = float(scale) ** 0.5
        weights = self._combined(count, seed, first, root, block) if low_rank else self.mean
        sigma = (self.moments[1] / self.count).sqrt_().to(self.layout.dtype)
        return perturb(weights, seed, members=count, first_member=first, scale=root, sigma=sigma)

    def _combined(self, count: int, seed: int, first: int, root: float, block: bool) -> Tensor:
        """[S, P]: the mean and combinations of the deviations."""
        L, r = len(self.layout) if block else 1, self.held
        draws = []
        for i in range(first, first + count):
            own = torch.Generator().manual_seed(stream_seed(seed, i, "posterior"))
            draws.append(torch.randn(L, r, generator=own))
        coeffs = torch.cat(
            [torch.ones(count, L, 1), torch.stack(draws) * (root / (r - 1) ** 0.5)], 2
        )
        coeffs = coeffs.to(self.anchors.device, self.anchors.dtype)
        anchors = self.anchors[: 1 + r]
        if block:
            return combine(coeffs, anchors, sizes=self.layout.sizes)
        return combine(coeffs[:, 0], anchors)

    def network(self, w: Tensor, rows: Tensor | None = None) -> nn.Module:
        """A network with the weights w, in evaluation mode; it shares nothing with this.

        Args:
            w: [P].
            rows: training rows [N, ...] on which the batch norm statistics are taken anew; None
                leaves those of `model`, which are wrong for other weights than its own.
        """
        network = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in self.views(w).items():
                network.get_parameter(name).copy_(value).requires_grad_(self.trained[name])
        return network if rows is None else recalibrate_(network, rows)

    def ensemble(
        self, count: int, seed: int, rows: Tensor | None = None, **options: Any
    ) -> DeepEnsemble:
        """A `DeepEnsemble` of `count` samples.

        Args:
            count: S.
            seed: of the samples.
            rows: see `network`.
            options: those of `sample`.
        """
        samples = self.sample(count, seed, **options)
        return DeepEnsemble([self.network(w, rows) for w in samples]).eval()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, count={self.count}"
