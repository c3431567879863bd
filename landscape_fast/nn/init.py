"""Initial values of BatchEnsemble layers: the factors r and s, the shared weight, the bias.

An initialiser is a callable `(tensor, generator=None) -> tensor` that fills `tensor` in place. The
ones here are frozen dataclasses, so that a layer which holds them prints, pickles and compares.
Given a generator, the numbers are drawn on the generator's device and then moved: one seed gives
one result on every device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

Initialiser = Callable[..., Tensor]
_DEVIATION_OF_CUT_NORMAL = 0.87962566103423978  # of the standard normal, cut at -2 and 2


@dataclass(frozen=True)
class Ones:
    """Every member starts as the shared weight itself."""

    def __call__(self, tensor: Tensor, generator: Generator | None = None) -> Tensor:
        with torch.no_grad():
            return tensor.fill_(1)


@dataclass(frozen=True)
class RandomSign:
    """+1 with probability `p`, otherwise -1 (BatchEnsemble, arXiv:2002.06715).

    Args:
        p: probability of +1, in [0, 1].
        chunks: see `Normal`.
    """

    p: float = 0.5
    chunks: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise ValueError(f"RandomSign: p must be a probability in [0, 1]; got {self.p}")
        _freeze_chunks(self)

    def __call__(self, tensor: Tensor, generator: Generator | None = None) -> Tensor:
        def draw(t):
            return t.bernoulli_(self.p, generator=generator).mul_(2).sub_(1)

        return _fill(tensor, draw, generator, self)


@dataclass(frozen=True)
class Normal:
    """Normal with `mean` and `std`; TabM's "normal" is `Normal(0, 1)`.

    Args:
        mean: of every entry.
        std: standard deviation, at least 0.
        chunks: sizes that split the features; one value is drawn per member and chunk and all its
            features share it. TabM (arXiv:2410.24210) uses it for the columns that encode one
            table feature, as `first_scaling_init_chunks`. None draws every entry by itself.
    """

    mean: float = 1.0
    std: float = 0.5
    chunks: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.std >= 0:
            raise ValueError(f"Normal: std must be at least 0; got {self.std}")
        _freeze_chunks(self)

    def __call__(self, tensor: Tensor, generator: Generator | None = None) -> Tensor:
        def draw(t):
            return t.normal_(self.mean, self.std, generator=generator)

        return _fill(tensor, draw, generator, self)


NAMED = {"ones": Ones, "random_sign": RandomSign, "normal": Normal}


def resolve(op: str, argument: str, init: str | Initialiser) -> Initialiser:
    """The initialiser of that name in `NAMED`, with its defaults, or the callable itself."""
    if callable(init) and not isinstance(init, type):
        return init
    if not isinstance(init, str) or init not in NAMED:
        rule = f"one of {', '.join(map(repr, NAMED))} or a callable (tensor, generator)"
        raise ValueError(f"{op}: {argument} must be {rule}; got {init!r}")
    return NAMED[init]()


def default_(weight: Tensor, bias: Tensor | None = None, generator: Generator | None = None):
    """What `nn.Linear` and `nn.Conv2d` do: uniform within 1 / sqrt(fan_in).

    With the same random state, `weight` and a bias [O] get the very bits of those layers. A bias
    per member [M, O] is one such draw, copied to all members (as in TabM): members then differ by
    their factors only.
    """

    def draw_weight(t):
        return nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)

    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    _fill(weight, draw_weight, generator)
    if bias is not None:
        one = bias.new_empty(bias.shape[-1])
        uniform_(one, bound, generator)
        with torch.no_grad():
            bias.copy_(one)


def uniform_(tensor: Tensor, bound: float, generator: Generator | None = None) -> Tensor:
    """Uniform from -bound to bound."""
    return _fill(tensor, lambda t: t.uniform_(-bound, bound, generator=generator), generator)


def xavier_(weight: Tensor, bias: Tensor | None = None, generator: Generator | None = None):
    """Xavier (Glorot) uniform for the weight, and for the bias as for a matrix [O, 1].

    The bias bound is therefore sqrt(6 / (1 + O)), which is what the networks of Fort et al. 2019
    (arXiv:1912.02757) use. A bias per member [M, O] is one draw copied to all members.
    """

    def draw(t):
        return nn.init.xavier_uniform_(t, generator=generator)

    _fill(weight, draw, generator)
    if bias is not None:
        one = bias.new_empty(bias.shape[-1], 1)
        _fill(one, draw, generator)
        with torch.no_grad():
            bias.copy_(one[:, 0])


def he_(weight: Tensor, bias: Tensor | None = None, generator: Generator | None = None):
    """He normal, as Keras draws it, for the weight; zeros for the bias.

    The normal distribution is cut at two of its deviations, and widened so that the deviation of
    what is left is sqrt(2 / fan_in). The start of BatchEnsemble's residual networks.
    """
    cut = math.sqrt(2 / math.prod(weight.shape[1:])) / _DEVIATION_OF_CUT_NORMAL

    def draw(t):
        return nn.init.trunc_normal_(t, 0.0, cut, -2 * cut, 2 * cut, generator=generator)

    _fill(weight, draw, generator)
    if bias is not None:
        with torch.no_grad():
            bias.zero_()


def first_only_(
    model: nn.Module,
    init: str | Initialiser = "random_sign",
    generator: Generator | None = None,
) -> nn.Module:
    """TabM's start: `init` for the r of the first ensemble layer, ones for all other factors.

    Args:
        model: holds layers with members; the first is the first in `model.modules()` that has an r.
        init: of that first r, for instance `RandomSign(chunks=...)` with one chunk per feature.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: if no layer of `model` has a factor r.
    """
    init = resolve("first_only_", "init", init)
    layers = [m for m in model.modules() if hasattr(m, "members") and hasattr(m, "reset_factors")]
    first = next((layer for layer in layers if layer.r is not None), None)
    if first is None:
        raise ValueError(
            "first_only_: model must hold an ensemble layer with a factor r; "
            f"got {len(layers)} ensemble layers, none with r"
        )
    for layer in layers:
        for factor in layer.fast_parameters():
            Ones()(factor)
        if getattr(layer, "rank", 1) > 1:
            with torch.no_grad():
                layer.s[1:].zero_()  # as at the start: the further pairs add nothing yet
    init(first.r, generator)
    return model


def _freeze_chunks(init) -> None:
    if init.chunks is None:
        return
    chunks = tuple(init.chunks)
    if not chunks or any(not isinstance(c, int) or c < 1 for c in chunks):
        raise ValueError(
            f"{type(init).__name__}: chunks must be positive sizes, one per feature; got {chunks}"
        )
    object.__setattr__(init, "chunks", chunks)


@torch.no_grad()
def _fill(tensor: Tensor, draw: Callable, generator: Generator | None, init=None) -> Tensor:
    """Runs `draw` on `tensor`, or on a stand-in of the generator's device or of one per chunk."""
    if tensor.is_meta:
        return tensor
    chunks = getattr(init, "chunks", None)
    if chunks is not None and sum(chunks) != tensor.shape[-1]:
        raise ValueError(
            f"{type(init).__name__}: chunks must sum to the {tensor.shape[-1]} features of the "
            f"factor; got {chunks}, which sum to {sum(chunks)}"
        )
    device = tensor.device if generator is None else generator.device
    if chunks is None and device.type == tensor.device.type:
        return draw(tensor)
    if chunks is None:
        return tensor.copy_(draw(torch.empty_like(tensor, device=device)))
    values = draw(torch.empty(*tensor.shape[:-1], len(chunks), dtype=tensor.dtype, device=device))
    sizes = torch.tensor(chunks, device=device)
    return tensor.copy_(values.repeat_interleave(sizes, -1))
