"""What it means for an op or a layer to be right; used by our tests and open to yours.

`check_op` compares an op with its reference, outputs and gradients, against float64.
`check_hessian` does it for Hessian-vector products, `check_transforms` for torch.func, forward-mode
AD and torch.compile, and `check_layer` runs the contract of an `nn.Module`. All raise
AssertionError with a message that names what differs. Tolerances are not chosen: a result may be
twice as far from the float64 truth as plain PyTorch in the same dtype is.
"""

import copy
import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "assert_as_exact",
    "check_hessian",
    "check_layer",
    "check_op",
    "check_registered",
    "check_transforms",
    "fenced",
]


def fenced(t: Tensor, pad: int = 64) -> Tensor:
    """A copy of `t` with its strides, inside a buffer of NaN (the largest integer for integers).

    A kernel that reads outside the tensor, or in the gaps between its strides, is poisoned and
    shows.
    """
    if t.is_floating_point():
        poison = float("nan")
    else:
        poison = True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
    return _restrided(t, t.dtype, pad, poison)


def assert_as_exact(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """`got` may be at most twice as far from the float64 `truth` as `plain`, PyTorch in the same
    dtype.

    Two roundings of the largest true value are allowed on top: plain PyTorch can be exact by luck.
    NaN and infinities must stand where they stand in `truth`.
    """
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    assert got.shape == plain.shape, (
        f"{name}: shape {list(got.shape)}, expected {list(plain.shape)}"
    )
    if not got.numel():
        return
    got64, plain64 = got.detach().double(), plain.detach().double()
    finite = truth.isfinite() & plain64.isfinite()
    same = torch.where(finite, 0.0, plain64)  # where plain PyTorch overflows or is NaN, so must we
    assert torch.equal(got64.isnan(), same.isnan()), (
        f"{name}: NaN at {_where(got64.isnan() != same.isnan())}"
    )
    infinite = same.isinf()
    assert torch.equal(got64[infinite], same[infinite]), (
        f"{name}: infinities differ at {_where(infinite)}"
    )
    if not finite.any():
        return
    scale = truth[finite].abs().max()
    budget = 2 * (plain64 - truth)[finite].abs().max() + 2 * torch.finfo(got.dtype).eps * scale
    error = torch.where(finite, (got64 - truth).abs(), 0.0)
    assert error.max() <= budget, (
        f"{name}: error {error.max():.2e} > {budget:.2e} at {_where(error == error.max())}"
    )


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist() if mask.any() else []


def check_op(
    op: Callable,
    reference: Callable,
    inputs: Sequence[Tensor | None],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    gradients: bool = True,
    fence: bool = True,
    **options,
) -> None:
    """Every output of `op`, and every gradient of it, against `reference` in float64.

    Args:
        op: called as `op(*inputs, backend=backend, **options)`; returns a tensor or a sequence of
        tensors.
        reference: called as `reference(*inputs, **options)`.
        inputs: tensors on the device to test; floating ones are rounded to `dtype` first (so that
            all three runs see the same numbers) and keep their strides; None and integer tensors
            stay.
        gradients: also compare the gradients of all floating inputs, for a random incoming
        gradient.
        fence: run `op` on `fenced` inputs.

    Raises:
        AssertionError: naming the output or gradient that is further off than `assert_as_exact`
        allows.
    """
    low = [_cast(t, dtype) for t in inputs]
    floats = [i for i, t in enumerate(low) if t is not None and t.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    incoming: list[Tensor] = []

    def run(function, arguments):
        arguments = list(arguments)
        if gradients:
            for i in floats:
                arguments[i] = arguments[i].detach().requires_grad_()
        outputs = _sequence(function(*arguments))
        if not gradients:
            return outputs
        if not incoming:
            incoming.extend(torch.randn(y.shape, generator=generator).to(y.device) for y in outputs)
        grads = [g.to(dtype).to(y.dtype) for g, y in zip(incoming, outputs, strict=True)]
        wanted = [arguments[i] for i in floats]
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        return outputs + [
            torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)
        ]

    truth = run(lambda *a: reference(*a, **options), [_cast(t, torch.float64) for t in low])
    plain = run(lambda *a: reference(*a, **options), low)
    placed = [fenced(t) if fence and t is not None else t for t in low]
    got = run(lambda *a: op(*a, backend=backend, **options), placed)
    names = [f"output {i}" for i in range(len(truth) - (len(floats) if gradients else 0))]
    names += [f"gradient of input {i}" for i in floats] if gradients else []
    for name, *three in zip(names, got, plain, truth, strict=True):
        assert_as_exact(f"{name} ({dtype}, {backend})", *three)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`t` in `dtype` with the strides it had."""
    if t is None or not t.is_floating_point():
        return t
    return _restrided(t, dtype, 0, 0)


def _restrided(t: Tensor, dtype: torch.dtype, pad: int, fill) -> Tensor:
    """A copy of `t` in `dtype` with the same strides, in a buffer that holds `fill` elsewhere."""
    spans = zip(t.shape, t.stride(), strict=True)
    extent = 1 + sum((n - 1) * s for n, s in spans) if t.numel() else 0
    buffer = torch.full((extent + 2 * pad,), fill, dtype=dtype, device=t.device)
    out = buffer.as_strided(t.shape, t.stride(), pad)
    # an expanded dimension is one element in memory: write it once
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())
    out[once] = t.detach()[once].to(dtype)
    return out


def _sequence(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check_hessian(
    op: Callable,
    reference: Callable,
    inputs: Sequence[Tensor | None],
    *,
    dtype: torch.dtype = torch.float32,
    **options,
) -> None:
    """Hessian-vector products of `sum(op(...) ** 3)` against the reference in float64.

    `gradgradcheck` passes over a gradient that has no graph; this does not. The inputs also depend
    on one another (each is shifted by the mean of the first), as where factors are computed from a
    weight.
    """
    low = [_cast(t, dtype) for t in inputs]
    floats = [i for i, t in enumerate(low) if t is not None and t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    directions = {
        i: torch.randn(low[i].shape, generator=generator).to(low[i].device) for i in floats
    }

    def hvp(function, arguments):
        leaves = {i: arguments[i].detach().requires_grad_() for i in floats}
        mixed = list(arguments)
        for i in floats:
            mixed[i] = leaves[i] if i == floats[0] else leaves[i] + 0.1 * leaves[floats[0]].mean()
        value = sum(y.pow(3).sum() for y in _sequence(function(*mixed)))
        grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        product = sum(
            (g * directions[i].to(g.dtype)).sum() for i, g in zip(leaves, grads, strict=True)
        )
        return torch.autograd.grad(product, list(leaves.values()))

    truth = hvp(lambda *a: reference(*a), [_cast(t, torch.float64) for t in low])
    plain = hvp(lambda *a: reference(*a), low)
    got = hvp(lambda *a: op(*a, **options), low)
    for i, *three in zip(floats, got, plain, truth, strict=True):
        assert_as_exact(f"Hessian-vector product, input {i}", *three)


def check_transforms(
    op: Callable, reference: Callable, inputs: Sequence[Tensor], **options
) -> None:
    """torch.func.grad, jvp, vmap, forward-mode AD and torch.compile against the same on the
    reference.

    Args:
        inputs: floating tensors, at least one; the first one is vmapped over and differentiated.
        options: keywords for `op` (for instance `backend=`), not for the reference.
    """
    torch._dynamo.reset()  # so that calls do not add up to its limit of recompilations
    inputs = tuple(t.detach() for t in inputs)
    tangents = tuple(torch.randn(t.shape, dtype=t.dtype, device=t.device) for t in inputs)

    def ours(*a):
        return op(*a, **options)

    def total(function):
        return lambda *a: sum(y.sin().sum() for y in _sequence(function(*a)))

    def dual(function, *a):
        with torch.autograd.forward_ad.dual_level():
            pairs = [
                torch.autograd.forward_ad.make_dual(t, v) for t, v in zip(a, tangents, strict=True)
            ]
            return [
                torch.autograd.forward_ad.unpack_dual(y).tangent
                for y in _sequence(function(*pairs))
            ]

    every = tuple(range(len(inputs)))
    stacked = torch.stack([inputs[0], 2 * inputs[0]])
    axes = (0, *[None] * (len(inputs) - 1))
    ways = {
        "torch.func.grad": lambda f: torch.func.grad(total(f), argnums=every)(*inputs),
        "torch.func.jvp": lambda f: torch.func.jvp(
            lambda *a: tuple(_sequence(f(*a))), inputs, tangents
        )[1],
        "torch.func.vmap": lambda f: torch.func.vmap(f, in_dims=axes)(stacked, *inputs[1:]),
        "forward-mode AD": lambda f: dual(f, *inputs),
        "compiled torch.func.grad": lambda f: torch.compile(
            torch.func.grad(total(f), argnums=every), backend="aot_eager"
        )(*inputs),
        "torch.compile": lambda f: _gradients(
            torch.compile(f, backend="aot_eager", fullgraph=True), inputs
        ),
    }
    for name, way in ways.items():
        for i, (a, b) in enumerate(
            zip(_sequence(way(ours)), _sequence(way(reference)), strict=True)
        ):
            assert a is not None and b is not None, f"{name}: result {i} is missing"
            torch.testing.assert_close(
                a, b, msg=lambda m, name=name, i=i: f"{name}, result {i}: {m}"
            )


def _gradients(function: Callable, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = _sequence(function(*leaves))
    return outputs + list(torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves))


def check_registered(overload, arguments: Sequence) -> None:
    """`torch.library.opcheck` of a registered op: schema, aliasing, fake, dynamic shapes, AOT."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, tuple(arguments), test_utils=tests)


def check_layer(
    layer: nn.Module, x: Tensor, *, autocast_dtype: torch.dtype = torch.bfloat16
) -> None:
    """The contract of a layer of this library, which any `nn.Module` may be held to.

    Output and gradients finite and the same bits twice; state dict, deepcopy and pickle keep the
    function; a non-contiguous input, an empty batch, the meta device, float64, autocast,
    `torch.func.functional_call` with grad and `torch.compile(fullgraph=True)` all work and agree.

    Args:
        layer: deterministic in the mode it is in (call `.eval()` for dropout).
        x: one valid floating input whose dimension `layer` treats as the batch can be emptied: the
            first dimension that changes the output's size, found by trying.
    """
    name = type(layer).__name__
    parameters = dict(layer.named_parameters())
    y = layer(x)
    assert y.isfinite().all(), f"{name}: output is not finite"
    assert torch.equal(y, layer(x)), f"{name}: two calls give different bits"
    wanted = {k: p for k, p in parameters.items() if p.requires_grad}
    grads = torch.autograd.grad(y.square().mean(), list(wanted.values()))
    for key, grad in zip(wanted, grads, strict=True):
        assert grad.isfinite().all() and grad.abs().max() > 0, (
            f"{name}: gradient of {key} is zero or not finite"
        )

    for way, other in (
        ("deepcopy", copy.deepcopy(layer)),
        ("pickle", _pickled(layer)),
        ("state dict", _loaded(layer)),
    ):
        assert torch.equal(y, other(x)), f"{name}: {way} changes the output"
    strided = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)[..., 0].copy_(x)
    torch.testing.assert_close(
        layer(strided), y, msg=lambda m: f"{name}, non-contiguous input: {m}"
    )

    meta = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert meta.shape == y.shape and meta.dtype == y.dtype, (
        f"{name}: meta device gives {meta.shape}, {meta.dtype}"
    )
    double = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(
        y, double.to(y.dtype), msg=lambda m: f"{name}, {x.dtype} against float64: {m}"
    )
    with torch.autocast(x.device.type, dtype=autocast_dtype):
        low = layer(x)
    assert low.dtype == autocast_dtype, f"{name}: autocast to {autocast_dtype} gives {low.dtype}"
    plain = copy.deepcopy(layer).to(autocast_dtype)(x.to(autocast_dtype))
    assert_as_exact(f"{name} under autocast", low, plain, double)

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().mean()

    functional = torch.func.grad(loss)(wanted)
    for key, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(
            functional[key], grad, msg=lambda m, key=key: f"{name}, func.grad of {key}: {m}"
        )
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, y, msg=lambda m: f"{name} compiled: {m}")
    assert any(_runs_empty(layer, x, d) for d in range(x.ndim - 1)), (
        f"{name}: no dimension can be empty"
    )


def _pickled(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # our own bytes


def _loaded(layer: nn.Module) -> nn.Module:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.zero_()
    other.load_state_dict(layer.state_dict())
    return other


def _runs_empty(layer: nn.Module, x: Tensor, dim: int) -> bool:
    try:
        y = layer(x.narrow(dim, 0, 0))
    except (ValueError, RuntimeError):
        return False
    return y.numel() == 0
