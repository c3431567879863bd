"""Every op as the GPU tests call it: inputs, the call, the definition, and the dtypes it takes."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import torch
from gpu import anchor_entries, function_entries, subspace_entries

from landscape_fast.ops import _dispatch
from landscape_fast.ops.batch_ensemble_conv2d import (
    batch_ensemble_conv2d,
    batch_ensemble_conv2d_reference,
)
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.ops.combine import combine, combine_reference
from landscape_fast.ops.gram import gram, gram_reference
from landscape_fast.ops.hyper_batch_conv2d import (
    hyper_batch_conv2d,
    hyper_batch_conv2d_reference,
)
from landscape_fast.ops.hyper_batch_linear import (
    hyper_batch_linear,
    hyper_batch_linear_reference,
)
from landscape_fast.ops.member_batch_norm import (
    member_batch_norm,
    member_batch_norm_reference,
)
from landscape_fast.ops.perturb import perturb, perturb_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Entry(NamedTuple):
    """One way to call an op; `make(scale)` gives CPU inputs, larger ones for a larger scale."""

    name: str
    op: str  # its name in the dispatch table
    call: Callable
    reference: Callable
    make: Callable[[int], list[torch.Tensor]]
    gradients: bool = True
    kept: float = 0  # outputs' worth of numbers that the backward must have besides the inputs
    only: tuple[str, ...] = ()  # the kernels that can do it, where not all can

    def inputs(self, dtype: torch.dtype, scale: int = 1, device="cuda") -> list[torch.Tensor]:
        """Inputs on the device; floating ones in `dtype`."""
        torch.manual_seed(1)
        made = self.make(scale)
        return [t.to(device, dtype if t.is_floating_point() else t.dtype) for t in made]

    def backends(self, dtype: torch.dtype) -> list[str]:
        """The kernels this entry has on CUDA for that dtype of its floating inputs."""
        declared = _dispatch.OPS[self.op]
        made = self.make(1)
        if not any(t.is_floating_point() for t in made):  # one run for all of FLOATS
            dtype = made[0].dtype if dtype == torch.float32 else None
        names = self.only or ("triton", "cuda")
        return [n for n in declared if n in names and dtype in declared[n]]

    def low(self) -> torch.dtype:
        """bfloat16 where a kernel takes it."""
        return torch.bfloat16 if self.backends(torch.bfloat16) else torch.float32

    def kernel(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the preferred kernel, even where "auto" expects something quicker."""
        dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
        got = self.call(*inputs, backend=self.backends(dtype)[0])
        return [got] if isinstance(got, torch.Tensor) else list(got)

    def step(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs, and gradients of all floating inputs for an incoming gradient of ones."""
        if not self.gradients:
            return self.kernel(*inputs)
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = self.kernel(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        return [y.detach() for y in outputs] + list(grads)


def _linear(rows: Callable, M=3, I=70, O=45):
    def make(scale):
        B, i, o = 37 * scale, I * scale, O * scale
        return [
            torch.randn(rows(M, B, i)),
            torch.randn(o, i) / i**0.5,
            1 + 0.3 * torch.randn(M, i),
            1 + 0.3 * torch.randn(M, o),
            torch.randn(M, o),
        ]

    return make


def _conv(shared=False, kernel=3, M=3, I=18, O=20):
    def make(scale):
        B, H = 5 * scale, 9
        rows = (B,) if shared else (M, B)
        return [
            torch.randn(*rows, H, H + 2, I).movedim(-1, -3),
            torch.randn(O, I, kernel, kernel) / (I * kernel**2) ** 0.5,
            1 + 0.3 * torch.randn(M, I),
            1 + 0.3 * torch.randn(M, O),
            torch.randn(M, O),
        ]

    return make


def _flat(scale):
    return [torch.randn(5, 3), torch.randn(3, 1237 * scale**2)]


SIZES = (700, 1, 0, 330)


def _layers(scale):
    return [torch.randn(5, len(SIZES), 3), torch.randn(3, sum(SIZES))]


def _listed(scale):
    shapes = ((7, 3, 3, 3), (7,), (1,), (129 * scale, 65 * scale), (0, 4))
    return [torch.randn(5, 3), *[torch.randn(3, *shape) for shape in shapes]]


def _whole(make):
    """Small integers, whose sums are exact in any order: nothing else would do for float64."""
    return lambda scale: [t.mul(2).round().clamp(-8, 8) for t in make(scale)[1:]]


def _of_list(function, *anchors, **options):
    return function(list(anchors), **options)


def _on_list(function, coeffs, *anchors, **options):
    return function(coeffs, list(anchors), **options)


def _call(function, *tensors, **options):
    return function(*tensors, **options)


def _far_from_zero(scale):
    """y is about 8 or -8, so that no rounding changes which elements a relu lets through."""
    *tensors, bias = _linear(lambda M, B, I: (M, B, I))(scale)
    return [*tensors, bias + 8 * bias.sign()]


def _held(function, x, *parameters, **options):
    """Parameters in float32, as under autocast."""
    held = [t.float() if t.element_size() == 2 else t for t in parameters]
    return function(x, *held, **options)


def _linear_entries():
    shapes = {
        "member_major": lambda M, B, I: (M, B, I),
        "batch_major": lambda M, B, I: (B, M, I),
        "folded": lambda M, B, I: (M * B, I),
        "shared": lambda M, B, I: (B, I),
    }
    for name, rows in shapes.items():
        options = {"layout": "member_major" if name == "shared" else name}
        yield Entry(
            f"linear {name}",
            "batch_ensemble_linear",
            partial(batch_ensemble_linear, **options),
            partial(batch_ensemble_linear_reference, **options),
            _linear(rows),
        )

    wide = "linear float32 parameters", _held, _linear(shapes["member_major"])
    relu = "linear relu", partial(_call, activation="relu"), _far_from_zero
    for name, call, make in (wide, relu):
        definition = partial(call, batch_ensemble_linear_reference)
        function = partial(call, batch_ensemble_linear)
        yield Entry(name, "batch_ensemble_linear", function, definition, make)


def _conv_entries():
    ways = {
        "3x3": ({"padding": 1}, _conv()),
        "strided": ({"stride": 2, "padding": 1, "dilation": (1, 2)}, _conv()),
        "1x1": ({"activation": "relu"}, _conv(kernel=1, I=40, O=70)),
        "stem, shared": ({"padding": "same"}, _conv(True, I=3)),
        "shared": ({"padding": 1}, _conv(True)),
    }
    for name, (options, make) in ways.items():
        yield Entry(
            f"conv {name}",
            "batch_ensemble_conv2d",
            partial(batch_ensemble_conv2d, **options),
            partial(batch_ensemble_conv2d_reference, **options),
            make,
        )


def _hyper_linear(tie, rows=None, M=3, I=70, O=45):
    """Inputs whose factors are tied or not; `rows` where x is not [M, B, I]."""

    def make(scale):
        B, i, o = 37 * scale, I * scale, O * scale
        x, e = torch.randn(*(rows(B) if rows else (M, B)), i), 0.5 * torch.randn(2, M, B, o)
        weights = torch.randn(2, o, i) / i**0.5
        near = [1 + 0.3 * torch.randn(M, n) for n in (i, o, i, o)]
        return [x, *weights, e[0], *near[: 2 if tie else 4], *torch.randn(2, M, o), e[1]]

    return make


def _hyper_conv(tie, M=3, I=9, O=20, H=11):
    def make(scale):
        B, i, o = 3 * scale, I * scale, O * scale
        e, weights = 0.5 * torch.randn(2, M, B, o), torch.randn(2, o, i, 3, 3) / (9 * i) ** 0.5
        near = [1 + 0.3 * torch.randn(M, n) for n in (i, o, i, o)]
        x = torch.randn(M, B, i, H, H)
        return [x, *weights, e[0], *near[: 2 if tie else 4], *torch.randn(2, M, o), e[1]]

    return make


def _with_tied_factors(function, x, weight, delta, e, r, s, *biases, **options):
    return function(x, weight, delta, e, r, s, None, None, *biases, **options)


def _hyper_entries():
    linear = (hyper_batch_linear, hyper_batch_linear_reference)
    conv = (hyper_batch_conv2d, hyper_batch_conv2d_reference)
    for tie in (True, False):
        kinds = (
            ("hyper linear", "hyper_batch_linear", linear, _hyper_linear(tie), {}),
            (
                "hyper linear shared",
                "hyper_batch_linear",
                linear,
                _hyper_linear(tie, lambda B: (B,)),
                {},
            ),
            (
                "hyper conv",
                "hyper_batch_conv2d",
                conv,
                _hyper_conv(tie),
                {"padding": 1, "stride": (1, 2)},
            ),
        )
        for name, op, functions, make, options in kinds:
            if tie:
                call, reference = (partial(_with_tied_factors, f, **options) for f in functions)
            else:
                call, reference = (partial(f, **options) for f in functions)
            title = f"{name}{' tied' if tie else ''}"
            yield Entry(title, op, call, reference, make, kept=1)  # the product with delta


def _perturb_entries():
    def call(function, weights, sigma, scale, **options):
        dropout = torch.tensor([0.0, 0.25, 0.5]).to(scale)
        about = {"scale": scale, "dropout": dropout, "members": 3}
        return function(weights, 3, sigma=sigma, **about, **options)

    def make(one_model):
        def tensors(scale):
            P = 1237 * scale**2
            weights = torch.randn(P) if one_model else torch.randn(3, P)
            sigma = torch.rand(3, P) if one_model else torch.rand(P)
            return [weights, sigma, torch.rand(3)]

        return tensors

    for name, one_model in (("perturb", False), ("perturb one model", True)):
        calls = partial(call, perturb), partial(call, perturb_reference)
        yield Entry(name, "perturb", *calls, make(one_model))


NORM_ROWS = {"contiguous": (19, 9, 9), "channels-last": (19, 9, 9), "no pixels": (209,)}


def _norm(order):
    def make(scale):
        M, channels, (B, *pixels) = 3, 18, NORM_ROWS[order]
        x = torch.randn(M, B * scale, channels, *pixels)
        if order == "channels-last":
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        return [x, 1 + 0.3 * torch.randn(M, channels), torch.randn(M, channels)]

    return make


def _norm_entries():
    for order, rows in NORM_ROWS.items():
        for activation in (None, "relu"):
            options = {"training": True, "activation": activation}
            both = (member_batch_norm, member_batch_norm_reference)
            calls = (partial(f, **options) for f in both)
            kept = Fraction(2, math.prod(rows))  # mean and variance of a channel
            name = f"batch norm {order} {activation}"
            yield Entry(name, "member_batch_norm", *calls, _norm(order), kept=kept)


ENTRIES = (
    *_linear_entries(),
    *_hyper_entries(),
    *_conv_entries(),
    Entry("combine flat", "combine", combine, combine_reference, _flat),
    Entry(
        "combine layers",
        "combine",
        partial(combine, sizes=SIZES),
        partial(combine_reference, sizes=SIZES),
        _layers,
    ),
    Entry(
        "combine list",
        "combine",
        partial(_on_list, combine),
        partial(_on_list, combine_reference),
        _listed,
    ),
    *_perturb_entries(),
    *subspace_entries.entries(Entry),
    Entry("gram flat", "gram", gram, gram_reference, _whole(_flat)),
    Entry(
        "gram layers",
        "gram",
        partial(gram, sizes=SIZES),
        partial(gram_reference, sizes=SIZES),
        _whole(_layers),
    ),
    Entry(
        "gram list",
        "gram",
        partial(_of_list, gram),
        partial(_of_list, gram_reference),
        _whole(_listed),
    ),
    *_norm_entries(),
    *anchor_entries.entries(Entry),
    *function_entries.entries(Entry),
)
