"""Hessian-vector products of the mean cross-entropy, and what is computed from them."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape_fast.methods.seeds import stream_seed
from landscape_fast.methods.splits import check_rows
from landscape_fast.methods.trainer import gibbs_cross_entropy
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.ops._checks import names, require, whole

_EXACT = (torch.float32, torch.float64)
_STREAMS = {"start": 1, "signs": 2}  # of random vectors; the directions of planes are stream 0


class Hessian:
    """The Hessian of the mean loss over given rows, at a point of weight space.

    Args:
        op: for messages.
        model: copied, and put in evaluation mode.
        x: rows, `y` their classes.
        batch_size: rows of one pass.

    Attributes:
        model: the copy, whose parameters view the point.
        layout: of its vectors [P].
        size: the number of trained parameters, which is the number of rows of the Hessian.
    """

    def __init__(self, op: str, model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> None:
        check_rows(op, x, y)
        rule = "an integer of at least 1"
        require(whole(batch_size, 1), op, "batch_size", rule, repr(batch_size))
        self.layout = FlatLayout(model)
        rule = f"of {names(_EXACT)} parameters"
        require(self.layout.dtype in _EXACT, op, "model", rule, names([self.layout.dtype]))
        self.model = copy.deepcopy(model).eval()
        self.device = next(model.parameters()).device
        self.x, self.y = x.to(self.device), y.to(self.device)
        self.batch_size = batch_size
        given = dict(self.model.named_parameters())
        self._frozen = [name for name, p in given.items() if not p.requires_grad]
        trained = {n: torch.full(p.shape, float(p.requires_grad)) for n, p in given.items()}
        self._places = self.layout.flatten(trained).nonzero().flatten()
        self.size = len(self._places)
        require(self.size > 0, op, "model", "one with parameters that are trained", "none")
        self.point = self.layout.flatten(model)
        for name, view in self.layout.views(self.point).items():
            given[name].data = view
        self._kept: list[tuple[Tensor, Tensor]] = []

    def move_to(self, weights: Tensor) -> None:
        """Goes to the point [P]."""
        self.point.copy_(weights)
        self._kept = []

    @torch.no_grad()
    def scores(self) -> tuple[float, float]:
        """Mean loss and accuracy at the point."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y in self._batches():
            logits = self.model(x)
            loss, right = gibbs_cross_entropy(logits, y), (logits.argmax(-1) == y).double().mean()
            sums += torch.stack([loss.double(), right]) * len(y)
        loss, right = (sums / len(self.y)).tolist()
        return loss, right

    def _batches(self):
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights [P] and the gradient [P] of each batch's share of the loss, with its graph."""
        if self._kept:
            yield from self._kept
            return
        for x, y in self._batches():
            weights = self.point.clone().requires_grad_()
            # other attention kernels have one derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                views = self.layout.views(weights)
                views |= {name: views[name].detach() for name in self._frozen}
                logits = functional_call(self.model, views, (x,))
                loss = gibbs_cross_entropy(logits, y) * (len(y) / len(self.y))
                (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
            if len(self.y) <= self.batch_size:
                self._kept = [(weights, gradient)]
            yield weights, gradient

    def _shares(self, vector: Callable[[int], Tensor], count: int):
        """(i, H v_i) of every batch's share of the loss, for `count` vectors [P]."""
        for weights, gradient in self._gradients():
            for i in range(count):
                v = vector(i)
                (share,) = torch.autograd.grad(
                    gradient, weights, v.to(gradient.dtype), retain_graph=True
                )
                yield i, v, share.double()

    def times(self, v: Tensor) -> Tensor:
        """H v, [P] float64."""
        total = torch.zeros(self.layout.P, dtype=torch.float64, device=self.device)
        for _, _, share in self._shares(lambda i: v, 1):
            total += share
        return total

    def forms(self, vector: Callable[[int], Tensor], count: int) -> Tensor:
        """v_i^T H v_i for `count` vectors, [count] float64 on the CPU."""
        found = torch.zeros(count, dtype=torch.float64, device=self.device)
        for i, v, share in self._shares(vector, count):
            found[i] += v.double() @ share
        return found.cpu()

    def random(self, kind: str, seed: int, index: int) -> Tensor:
        """[P] float64: "start" Gaussian numbers or "signs", on trained parameters, 0 elsewhere."""
        generator = torch.Generator().manual_seed(stream_seed(seed, _STREAMS[kind], "probe", index))
        if kind == "signs":
            drawn = torch.randint(2, (self.size,), generator=generator).double() * 2 - 1
        else:
            drawn = torch.randn(self.size, generator=generator, dtype=torch.float64)
        found = torch.zeros(self.layout.P, dtype=torch.float64)
        found[self._places.cpu()] = drawn
        return found.to(self.device)

    def unit(self, index: int) -> Tensor:
        """[P] float64: 1 at one trained parameter."""
        found = torch.zeros(self.layout.P, dtype=torch.float64, device=self.device)
        found[self._places[index]] = 1
        return found


class Eigenvalues(NamedTuple):
    """Extreme eigenvalues of a Hessian; NaN where it is not finite.

    Attributes:
        values: [k] float64 on the CPU, the outermost first.
        residual: [k] float64: within so far of each value there is an eigenvalue.
        vectors: [k, P], of length 1, as `FlatLayout` orders them, on the device of the model.
        products: how many Hessian-vector products it took.
    """

    values: Tensor
    residual: Tensor
    vectors: Tensor
    products: int


@torch.no_grad()
def lanczos(
    hessian: Hessian, k: int, which: str, tolerance: float, most: int, seed: int
) -> Eigenvalues:
    """See `landscape_fast.landscape.hessian_top_eigenvalues`.

    Vectors are kept in the dtype of the weights; their products and sums are in float64.
    """
    sign = 1.0 if which == "largest" else -1.0
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []  # the last is the length of what no vector of the basis explains
    w, drawn = _orthogonal(hessian.random("start", seed, 0), basis), 1
    most = min(most, hessian.size)
    while True:
        basis.append((w / w.norm()).to(hessian.layout.dtype))
        w = hessian.times(basis[-1])
        diagonal.append(float(basis[-1].double() @ w))
        w = _orthogonal(w, basis)
        rest = float(w.norm())
        if not math.isfinite(rest):
            none = torch.full((k,), math.nan, dtype=torch.float64)
            nowhere = hessian.point.new_full((k, hessian.layout.P), math.nan)
            return Eigenvalues(none, none, nowhere, len(basis))
        values, vectors = _tridiagonal(diagonal, beside)
        scale = float(values.abs().max())
        order = (sign * values).argsort(descending=True)[:k]
        residual = rest * vectors[-1, order].abs()
        m = len(basis)
        if m == most or (m >= k and bool((residual <= tolerance * scale).all())):
            break
        if rest <= 4 * torch.finfo(torch.float64).eps * scale:  # the basis spans what it can reach
            w, drawn = _orthogonal(hessian.random("start", seed, drawn), basis), drawn + 1
        beside.append(rest)
    found = torch.zeros(k, hessian.layout.P, dtype=torch.float64, device=hessian.device)
    for coefficients, v in zip(vectors[:, order].to(found.device), basis, strict=True):
        found.addr_(coefficients, v.double())
    found /= found.norm(dim=1, keepdim=True)
    return Eigenvalues(values[order], residual, found.to(hessian.layout.dtype), m)


def _orthogonal(w: Tensor, basis: list[Tensor]) -> Tensor:
    """What is left of w at right angles to the basis; a second round mends the first."""
    for _ in range(2):
        for v in basis:
            v = v.double()
            w = w - (v @ w) * v
    return w


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.linalg.eigh(T + torch.diag(off, 1) + torch.diag(off, -1))


class Trace(NamedTuple):
    """The trace of a Hessian.

    Attributes:
        value: the estimate.
        standard_error: of the estimate; 0 for the exact trace, NaN for one sample.
        samples: [V] float64, whose mean it is; for the exact trace the diagonal, whose sum it is.
    """

    value: float
    standard_error: float
    samples: Tensor


def hutchinson(hessian: Hessian, samples: int | None, seed: int) -> Trace:
    """See `landscape_fast.landscape.hessian_trace`."""
    if samples is None:
        diagonal = hessian.forms(hessian.unit, hessian.size)
        return Trace(float(diagonal.sum()), 0.0, diagonal)
    found = hessian.forms(lambda i: hessian.random("signs", seed, i), samples)
    error = float(found.std()) / math.sqrt(samples) if samples > 1 else math.nan
    return Trace(float(found.mean()), error, found)
