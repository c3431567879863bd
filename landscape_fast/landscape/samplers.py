"""Models drawn around a solution: random directions, weight dropout, Gaussians.

A sampler draws rows of weights that (seed, index) alone determine: whoever asks for samples 3 to 7
gets the same ones as whoever asks for samples 0 to 99, on any device up to rounding. Pads of a
`FlatLayout` stay 0. What `scale` means is the sampler's own; `landscape_fast.methods.sweep` takes

    lambda start, stop: sampler.draw(stop - start, scales[start:stop], seed, first=start)

Source: Fort et al. 2019 (arXiv:1912.02757), section 4.1 (figures 4 and 6 to 10), and their code.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.geometry import pca_gaussian
from landscape_fast.ops import combine, gram, perturb
from landscape_fast.ops._checks import check_tensor, require, whole

COLUMNS = 2**18  # of checkpoints that are widened to float64 at a time


class SubspaceSampler(Protocol):
    """What `sample_accepted` draws from."""

    def draw(self, count: int, scale: float | Tensor, seed: int, first: int = 0) -> Tensor:
        """Weights [count, P] of the samples `first`, `first` + 1, ...

        Args:
            count: how many, at least 1.
            scale: how far from the solution, a number or one for each sample, [count].
            seed: an integer in [0, 2^64).
            first: number of the first sample.
        """
        ...


@dataclass(frozen=True, eq=False)
class RandomDirections:
    """The solution plus a step of length `scale` in a direction drawn from the sphere.

    Args:
        centre: [P], the solution, as `layout` orders it.
        layout: of the solution; its pads stay 0.

    Example:
        >>> layout = FlatLayout(torch.nn.Linear(3, 2))
        >>> around = RandomDirections(layout.flatten(torch.ones(8)), layout)
        >>> steps = around.draw(2, torch.tensor([1.0, 7.0]), seed=0) - around.centre
        >>> steps.norm(dim=1)
        tensor([1.0000, 7.0000])
    """

    centre: Tensor
    layout: FlatLayout

    def __post_init__(self) -> None:
        check_tensor("RandomDirections", "centre", self.centre, "P", (self.layout.P,))
        # float32 for short weights too: a direction that is rounded first has another length
        dtype = torch.promote_types(self.centre.dtype, torch.float32)
        mask = self.layout.mask.to(self.centre.device, dtype)
        object.__setattr__(self, "_mask", mask)

    def draw(self, count: int, scale: float | Tensor, seed: int, first: int = 0) -> Tensor:
        """Weights [count, P]; `scale` is the length of the step in weight space."""
        scale = _scales("RandomDirections", self.centre, count, scale)
        nothing = torch.zeros_like(self._mask)
        steps = perturb(nothing, seed, members=count, first_member=first, sigma=self._mask)
        # each by itself: the last bits of a row must not depend on how many there are
        squares = torch.cat([gram(step[None])[0] for step in steps])
        lengths = scale.double() / squares.sqrt()
        steps.mul_(lengths.to(steps.dtype)[:, None]).add_(self.centre)
        return steps.to(self.centre.dtype)


@dataclass(frozen=True, eq=False)
class WeightDropout:
    """The solution with each weight and bias set to 0 by chance, the others scaled up for it.

    These are weights, not activations, as in the authors' code: one sample is one network, which
    predicts the same every time.

    Args:
        centre: [P], the solution.

    Example:
        >>> WeightDropout(torch.ones(8)).draw(1, 0.5, seed=3)
        tensor([[0., 2., 0., 2., 2., 2., 0., 2.]])
    """

    centre: Tensor

    def __post_init__(self) -> None:
        check_tensor("WeightDropout", "centre", self.centre, "P", (None,))

    def draw(self, count: int, scale: float | Tensor, seed: int, first: int = 0) -> Tensor:
        """Weights [count, P]; `scale` is the chance in [0, 1) that a weight becomes 0."""
        scale = _scales("WeightDropout", self.centre, count, scale, most=1)
        options = {"members": count, "first_member": first}
        return perturb(self.centre, seed, scale=0.0, dropout=scale, **options)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """Every weight normal by itself, around its mean over the last checkpoints of a run.

    Args:
        mean: [P].
        sigma: [P], standard deviations (no variances), at least 0; 0 at pads.

    Example:
        >>> weights = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> around = DiagonalGaussian.from_checkpoints(weights)
        >>> around.mean, around.sigma
        (tensor([2., 5.]), tensor([1., 0.]))
    """

    mean: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        check_tensor("DiagonalGaussian", "mean", self.mean, "P", (None,))
        about = {"like": self.mean, "like_name": "mean"}
        check_tensor("DiagonalGaussian", "sigma", self.sigma, "P", tuple(self.mean.shape), **about)

    @classmethod
    def from_checkpoints(cls, weights: Tensor) -> "DiagonalGaussian":
        """Mean and population standard deviation of T checkpoints, computed in float64.

        Args:
            weights: [T, P], one checkpoint per row, T at least 1.
        """
        mean, sigma = _moments("DiagonalGaussian.from_checkpoints", weights)
        return cls(mean, sigma)

    def draw(self, count: int, scale: float | Tensor, seed: int, first: int = 0) -> Tensor:
        """Weights [count, P]; `scale` multiplies the standard deviations."""
        scale = _scales("DiagonalGaussian", self.mean, count, scale)
        options = {"members": count, "first_member": first}
        return perturb(self.mean, seed, scale=scale, sigma=self.sigma, **options)


@dataclass(frozen=True, eq=False)
class LowRankGaussian:
    """A Gaussian along the principal directions of checkpoints, around their mean.

    Args:
        mean: [P].
        directions: [k, P], what one unit of each coordinate adds.

    Example:
        >>> weights = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
        >>> around = LowRankGaussian.from_checkpoints(weights, rank=1)
        >>> around.mean, around.directions.abs()
        (tensor([2., 1.]), tensor([[1., 0.]]))
    """

    mean: Tensor
    directions: Tensor

    def __post_init__(self) -> None:
        check_tensor("LowRankGaussian", "mean", self.mean, "P", (None,))
        about = {"like": self.mean, "like_name": "mean"}
        sizes = (None, len(self.mean))
        check_tensor("LowRankGaussian", "directions", self.directions, "k, P", sizes, **about)
        anchors = torch.cat([self.mean[None], self.directions])  # one copy, for every draw
        for name, value in (
            ("_anchors", anchors),
            ("mean", anchors[0]),
            ("directions", anchors[1:]),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_checkpoints(
        cls, weights: Tensor, rank: int = 5, scale: str = "unit"
    ) -> "LowRankGaussian":
        """The Gaussian of T checkpoints, or of samples such as those of `sample_accepted`.

        Args:
            weights: [T, P], one checkpoint per row.
            rank: k, how many directions, at least 1 and below T.
            scale: "unit": directions of length 1 however far the checkpoints spread, as in the
                authors' code; "singular": as long as the standard deviation of the checkpoints
                along each (divided by T - 1). Directions in which they do not differ are 0.
        """
        op = "LowRankGaussian.from_checkpoints"
        mean, _ = _moments(op, weights)
        T = len(weights)
        rule, remedy = f"an integer from 1 to T - 1 = {T - 1}", "give more checkpoints or less rank"
        require(whole(rank, 1) and rank < T, op, "rank", rule, repr(rank), remedy)
        require(scale in ("unit", "singular"), op, "scale", "'unit' or 'singular'", repr(scale))
        # Deviations, not weights: what tells checkpoints apart is small against what they share.
        away = weights - mean
        ones = torch.eye(rank, dtype=torch.float64, device=weights.device)
        coeffs = pca_gaussian(gram(away), ones, scale=scale) - 1 / T
        return cls(mean, combine(coeffs.to(mean.dtype), away))

    def draw(self, count: int, scale: float | Tensor, seed: int, first: int = 0) -> Tensor:
        """Weights [count, P]; `scale` is the standard deviation along each direction."""
        scale = _scales("LowRankGaussian", self.mean, count, scale)
        still = scale.new_zeros(len(self.directions))
        z = perturb(still, seed, members=count, first_member=first, scale=scale)
        return combine(torch.cat([torch.ones_like(z[:, :1]), z], 1), self._anchors)


def _scales(op: str, like: Tensor, count: int, scale: float | Tensor, most: float = 0) -> Tensor:
    """[count], checked: in the dtype of `like`, or float32 where that is shorter."""
    op = f"{op}.draw"
    require(whole(count, 1), op, "count", "an integer of at least 1", repr(count))
    if not isinstance(scale, Tensor):
        scale = torch.tensor(float(scale), dtype=torch.float64)
    rule = f"a number, or [count] with count = {count}"
    require(scale.shape in ((), (count,)), op, "scale", rule, list(scale.shape))
    if scale.device.type == "cpu":  # elsewhere looking would wait for the device
        good = bool((scale >= 0).all()) and (not most or bool((scale < most).all()))
        rule = f"in [0, {most})" if most else "at least 0"
        require(good, op, "scale", rule, scale.tolist())
    dtype = torch.promote_types(like.dtype, torch.float32)
    return scale.to(like.device, dtype).expand(count).contiguous()


def _moments(op: str, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation, [P] each."""
    check_tensor(op, "weights", weights, "T, P", (None, None))
    require(len(weights) >= 1, op, "weights", "[T, P] with T at least 1", list(weights.shape))
    mean, sigma = torch.empty_like(weights[0]), torch.empty_like(weights[0])
    for start in range(0, weights.shape[1], COLUMNS):
        part = weights[:, start : start + COLUMNS].double()
        mean[start : start + COLUMNS] = part.mean(0)
        sigma[start : start + COLUMNS] = part.std(0, correction=0)
    return mean, sigma
