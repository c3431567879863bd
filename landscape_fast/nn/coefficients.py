"""Where a model lies among its anchors: lines, curves, simplexes, averages, Gaussians.

Every function but `filter_normalised`, which makes an anchor, gives coefficients [..., K];
`landscape_fast.ops.combine`, or `Subspace.mix`, makes weights of them. What depends on the anchors
themselves (planes, principal directions, SLERP) is computed from their Gram matrix, in
`landscape_fast.nn.geometry`. Everything is differentiable in the tensors it is given.
"""

import dataclasses
import math

import torch
from torch import Generator, Tensor

from landscape_fast.nn.flat import FlatLayout
from landscape_fast.ops._checks import message, require, whole


def line(t: Tensor) -> Tensor:
    """(1 - t, t): from the first of two anchors to the second; outside of [0, 1] beyond them.

    Args:
        t: [...] positions.

    Returns:
        [..., 2].

    Source: Wortsman et al. 2021 (arXiv:2102.10472), whose text has the anchors the other way round
        and whose code has them this way.

    Example:
        >>> line(torch.tensor([0.0, 0.25, 1.5]))
        tensor([[ 1.0000,  0.0000],
                [ 0.7500,  0.2500],
                [-0.5000,  1.5000]])
    """
    return torch.stack([1 - t, t], -1)


def init_to_optimum(t: Tensor) -> Tensor:
    """The straight path from initial weights (first anchor) to trained ones: `line`.

    With t above 1 it goes on past the optimum; with the weights of a pre-trained model first and
    those after fine-tuning second it is WiSE-FT.

    Source: Goodfellow, Vinyals and Saxe 2015 (arXiv:1412.6544); Wortsman et al. 2022
        (arXiv:2109.01903).
    """
    return line(t)


def bezier(t: Tensor, anchors: int) -> Tensor:
    """A Bezier curve from the first to the last of K control points.

    Args:
        t: [...] positions in [0, 1].
        anchors: K of at least 1; the degree is K - 1.

    Returns:
        [..., K], the Bernstein polynomials: at least 0, with sum 1.

    Source: Garipov et al. 2018 (arXiv:1802.10026).

    Example:
        >>> bezier(torch.tensor(0.5), 3)
        tensor([0.2500, 0.5000, 0.2500])
    """
    _check_count("bezier", anchors)
    n, rest = anchors - 1, 1 - t
    # numbers as arguments of kernels: a tensor of them would be a copy to the device
    between = [t.pow(k) * rest.pow(n - k) * float(math.comb(n, k)) for k in range(1, n)]
    terms = [rest.pow(n), *between, t.pow(n)][:anchors]
    return torch.stack(terms, -1)


def polychain(t: Tensor, anchors: int) -> Tensor:
    """A chain of straight segments through K anchors, each taking the same share of [0, 1].

    Args:
        t: [...] positions in [0, 1].
        anchors: K of at least 2.

    Returns:
        [..., K], at most two of them not 0.

    Source: Garipov et al. 2018 (arXiv:1802.10026). A low-loss tunnel (Fort and Jastrzebski 2019,
        arXiv:1906.04724) is one, through its nodes.

    Example:
        >>> polychain(torch.tensor([0.25, 0.5]), 3)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 1.0000, 0.0000]])
    """
    _check_count("polychain", anchors, 2)
    k = torch.arange(anchors, device=t.device)
    return (1 - (t.unsqueeze(-1) * (anchors - 1) - k).abs()).clamp(min=0)


def segment(t: Tensor, start: int, anchors: int) -> Tensor:
    """`line` between anchors `start` and `start + 1` of K: one segment of a tunnel.

    Returns:
        [..., K].
    """
    rule = f"an integer from 0 to K - 2 = {anchors - 2}"
    require(whole(start, 0) and start < anchors - 1, "segment", "start", rule, start)
    ends = line(t)
    before = ends.new_zeros((*t.shape, start))
    return torch.cat([before, ends, ends.new_zeros((*t.shape, anchors - 2 - start))], -1)


def wedge(radius: Tensor, t: Tensor, start: int, anchors: int) -> Tensor:
    """A point of the triangle that a tunnel's segment spans with the origin: radius * `segment`.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757), the wedge plot.
    """
    return radius.unsqueeze(-1) * segment(t, start, anchors)


def offset(d: Tensor) -> Tensor:
    """(1, d): the first anchor plus `d` [..., K - 1] times the others.

    With trainable d it is training in a plane through given weights: the gradient of d_k is the
    scalar product of anchor k with the gradient of the weights.

    Source: Li et al. 2018 (arXiv:1804.08838).
    """
    return torch.cat([torch.ones_like(d[..., :1]), d], -1)


def random_direction(t: Tensor, norm: float | Tensor) -> Tensor:
    """`t` along the second anchor scaled to length 1, from the first: (1, t / norm).

    Args:
        t: [...] distances.
        norm: of the second anchor, for instance sqrt(gram[1, 1]).

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757).
    """
    return torch.stack([torch.ones_like(t), t / norm], -1)


def mean(count: int, **like) -> Tensor:
    """[K], each 1 / K: the average of K models; SWA of its snapshots, a uniform soup."""
    _check_count("mean", count, argument="count")
    return torch.full((count,), 1 / count, **like)


def ema(count: int, decay: float, **like) -> Tensor:
    """[K]: the exponential moving average of K models, started at the first.

    As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)` has it.

    Example:
        >>> ema(3, 0.5)
        tensor([0.2500, 0.2500, 0.5000])
    """
    _check_count("ema", count, argument="count")
    require(0 <= decay < 1, "ema", "decay", "in [0, 1)", decay)
    weights = [decay ** (count - 1)]
    weights += [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    return torch.tensor(weights, **like)


def swag_low_rank(z: Tensor, count: int, *, around: str = "final") -> Tensor:
    """Samples of SWAG's low-rank part, from its n snapshots in the order they were taken.

    mean + D z / sqrt(2 (r - 1)), where D holds the deviations of the last r snapshots.

    Args:
        z: [..., r] standard normal, 2 <= r <= n.
        count: n snapshots.
        around: what a deviation is taken from: "final", the mean of all n snapshots, or "running",
            the mean of those up to and with its own, as the authors' code.

    Returns:
        [..., n], with sum 1.

    Source: Maddox et al. 2019 (arXiv:1902.02476). The other half of the variance is diagonal.
    """
    op, r = "swag_low_rank", z.shape[-1]
    require(2 <= r <= count, op, "z", f"[..., r] with 2 <= r <= {count}", list(z.shape))
    require(around in ("final", "running"), op, "around", "'final' or 'running'", repr(around))
    eye = torch.eye(count, dtype=z.dtype, device=z.device)
    means = torch.full_like(eye, 1 / count)
    if around == "running":
        rows = torch.arange(1, count + 1, device=z.device, dtype=z.dtype).unsqueeze(1)
        means = torch.ones_like(eye).tril() / rows
    deviations = (eye - means)[count - r :]  # [r, n]
    return 1 / count + z @ deviations / math.sqrt(2 * (r - 1))


def simplex_uniform(
    draws: int,
    anchors: int,
    *,
    device: torch.device | str | None = None,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[draws, K], uniform on the simplex of K corners: normalised exponential variables."""
    _check_count("simplex_uniform", anchors)
    e = torch.empty(draws, anchors, device=device, dtype=dtype).exponential_(generator=generator)
    return e / e.sum(-1, keepdim=True)


def dirichlet(
    draws: int,
    anchors: int,
    concentration: float,
    *,
    device: torch.device | str | None = None,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[draws, K] from the symmetric Dirichlet distribution; `simplex_uniform` is concentration 1.

    Below 1 draws lie near the corners and edges, above 1 near the midpoint.
    """
    _check_count("dirichlet", anchors)
    _check_concentration("dirichlet", concentration)
    shape = torch.full((draws, anchors), concentration + 1.0, device=device, dtype=torch.float64)
    # In logarithms, since a gamma variable of small shape underflows: g(a) = g(a + 1) * U^(1 / a).
    log_u = -torch.empty_like(shape).exponential_(generator=generator)
    log_g = torch._standard_gamma(shape, generator=generator).log() + log_u / concentration
    return log_g.softmax(-1).to(dtype)


def filter_normalised(direction: Tensor, weights: Tensor, layout: FlatLayout) -> Tensor:
    """A direction whose every filter is as long as the same filter of the weights.

    A filter is what makes one output: a slice along the first dimension of a tensor with two or
    more. Tensors of one dimension (biases, norms) get zeros, as in the authors' code.

    Args:
        direction: [..., P], for instance standard normal.
        weights: [P].
        layout: of both.

    Returns:
        [..., P], an anchor to go with (1, t).

    Source: Li et al. 2018 (arXiv:1712.09913).
    """
    parts = []
    of_weights, of_direction = layout.views(weights), layout.views(direction)
    for name, size in zip(layout.names, layout.sizes, strict=True):
        w, d = of_weights[name], of_direction[name]
        if w.ndim > 1 and w.numel():
            inner = tuple(range(1 - w.ndim, 0))
            lengths = torch.linalg.vector_norm(d, dim=inner, keepdim=True)
            wanted = torch.linalg.vector_norm(w, dim=inner, keepdim=True)
            d = d * (wanted / torch.where(lengths > 0, lengths, 1))
        else:
            d = torch.zeros_like(d)
        flat = d.reshape(*direction.shape[:-1], w.numel())
        parts.append(torch.nn.functional.pad(flat, (0, size - w.numel())))
    return torch.cat(parts, -1)


class _Curve:
    """Draws of a curve: t uniform in [0, 1]."""

    def draw(self, count, *, device=None, generator=None, dtype=torch.float32) -> Tensor:
        """[count, K], independent draws."""
        return self.at(torch.rand(count, device=device, generator=generator, dtype=dtype))

    def midpoint(self) -> Tensor:
        """[K], the point at t = 1/2."""
        return self.at(torch.tensor(0.5))


@dataclasses.dataclass(frozen=True)
class Line(_Curve):
    """Coefficients of a line: draws t uniform in [0, 1].

    Example:
        >>> Line().midpoint()
        tensor([0.5000, 0.5000])
    """

    anchors: int = dataclasses.field(default=2, init=False)

    def at(self, t: Tensor) -> Tensor:
        """[..., 2] at positions t [...]; see `line`."""
        return line(t)


@dataclasses.dataclass(frozen=True)
class Bezier(_Curve):
    """Coefficients of a Bezier curve with K control points: draws t uniform in [0, 1]."""

    anchors: int = 3

    def __post_init__(self) -> None:
        _check_count("Bezier", self.anchors, 2)

    def at(self, t: Tensor) -> Tensor:
        """[..., K] at positions t [...]; see `bezier`."""
        return bezier(t, self.anchors)


@dataclasses.dataclass(frozen=True)
class PolyChain(_Curve):
    """Coefficients of a chain of segments through K anchors: draws t uniform in [0, 1]."""

    anchors: int = 3

    def __post_init__(self) -> None:
        _check_count("PolyChain", self.anchors, 2)

    def at(self, t: Tensor) -> Tensor:
        """[..., K] at positions t [...]; see `polychain`."""
        return polychain(t, self.anchors)


@dataclasses.dataclass(frozen=True)
class Simplex:
    """Coefficients of a simplex with K corners: Dirichlet draws, uniform by default.

    Example:
        >>> Simplex(3).at(torch.tensor([0.25, 0.25]))
        tensor([0.5000, 0.2500, 0.2500])
    """

    anchors: int
    concentration: float = 1.0

    def __post_init__(self) -> None:
        _check_count("Simplex", self.anchors)
        _check_concentration("Simplex", self.concentration)

    def draw(self, count, *, device=None, generator=None, dtype=torch.float32) -> Tensor:
        """[count, K], independent draws."""
        options = {"device": device, "generator": generator, "dtype": dtype}
        if self.concentration == 1:
            return simplex_uniform(count, self.anchors, **options)
        return dirichlet(count, self.anchors, self.concentration, **options)

    def at(self, t: Tensor) -> Tensor:
        """[..., K] from the coordinates [..., K - 1] of all corners but the first."""
        K = self.anchors
        fits = t.ndim >= 1 and t.shape[-1] == K - 1
        require(fits, "Simplex.at", "t", f"[..., K - 1] with K = {K}", list(t.shape))
        return torch.cat([1 - t.sum(-1, keepdim=True), t], -1)

    def midpoint(self) -> Tensor:
        """[K], each 1 / K."""
        return mean(self.anchors)


def _check_count(op: str, count: int, least: int = 1, argument: str = "anchors") -> None:
    if not whole(count, least):  # torch.compile cannot trace the repr of a dynamic size
        rule = f"an integer of at least {least}"
        raise ValueError(message(op, argument, rule, repr(count)))


def _check_concentration(op: str, concentration: float) -> None:
    fits = 0 < concentration < math.inf
    require(fits, op, "concentration", "a finite number above 0", concentration)
