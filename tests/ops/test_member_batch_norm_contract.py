"""member_batch_norm in autograd, under transforms and compiled, as a layer, and its errors."""

import pytest
import torch
from ops.norm_problem import BACKENDS, LAYOUTS, ORDERS, inputs, op, reference, statistics

from landscape_fast.nn import EnsembleBatchNorm1d, EnsembleBatchNorm2d
from landscape_fast.ops import _member_batch_norm_ways as ways
from landscape_fast.ops import member_batch_norm, member_batch_norm_reference
from landscape_fast.testing import check_hessian, check_registered, check_transforms


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_float64_gradients(training, device):
    tensors = inputs((2, 3, 2, 2), device=device, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors]

    def function(*tensors):
        return op(*tensors, training=training)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_hessians(training, backend, device):
    given = inputs((2, 3, 2, 2), device=device)

    def definition(*tensors):
        return reference(*tensors, training=training)

    check_hessian(op, definition, given, backend=backend, training=training)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_and_compile(backend, device):
    """Without running statistics in training: torch.func does not let a function write them."""
    given = inputs((2, 3, 2, 2), device=device)

    def call(*tensors, **options):
        return member_batch_norm(*tensors, training=True, **options)

    def definition(*tensors):
        return member_batch_norm_reference(*tensors, training=True)

    check_transforms(call, definition, given, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_moves_the_running_statistics(backend, device):
    torch._dynamo.reset()
    tensors = inputs((2, 3, 2, 2), device=device)
    tensors[0].requires_grad_()

    def train(x, weight, bias, mean, var):
        return member_batch_norm(x, weight, bias, mean, var, training=True, backend=backend).sin()

    compiled = torch.compile(train, backend="aot_eager", fullgraph=True)
    mine, want = statistics(tensors[1]), statistics(tensors[1])
    for _ in range(2):
        y, right = compiled(*tensors, *mine), train(*tensors, *want)
        torch.testing.assert_close(y, right)
        for a, b in zip(mine, want, strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(z.sum(), tensors[0])[0] for z in (y, right)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_ops(backend, device):
    x, weight, bias = inputs((2, 3, 4, 2, 2), device=device)
    mean, var = statistics(weight)
    layout = "member_major"
    check_registered(ways.stats_op, (x, mean, var, 0.1, backend))
    check_registered(ways.apply_op, (x, weight, bias, mean, var, layout, 1e-5, True, backend))
    check_registered(
        ways.backward_op,
        (x, x, weight, bias, mean, var, layout, 1e-5, True, True, True, True, backend),
    )


def test_meta_tensors_have_the_shapes_and_strides_of_results():
    for order in ORDERS:
        x, weight, bias = inputs((2, 3, 4, 3, 2), order=order)
        want = op(x, weight, bias)
        meta = [t.to("meta") for t in (x, weight, bias)]
        y = member_batch_norm(*meta, *statistics(meta[1]), training=True)
        assert y.device.type == "meta" and y.stride() == want.stride()


def test_a_layer_without_momentum_averages_over_its_batches(device):
    """momentum None of nn.BatchNorm: the op is told 1 / n."""
    layer = EnsembleBatchNorm1d(3, 2, momentum=None).to(device)
    batches = [torch.randn(2, 5, 3, device=device) for _ in range(4)]
    for x in batches:
        layer(x)
    mean = torch.stack([x.mean(1) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(1) for x in batches]).mean(0))


@pytest.mark.parametrize("layout, strict", zip(LAYOUTS, [True, False, False], strict=True))
def test_export_with_a_free_batch_size(layout, strict):
    """As of nn.BatchNorm2d: the number of rows has no bound."""
    layer, rows = EnsembleBatchNorm2d(4, 2, layout=layout).eval(), torch.export.Dim("rows")
    place, size = (0, 2 * rows) if layout == "folded" else (1 - LAYOUTS.index(layout), rows)
    x = inputs((2, 3, 4, 3, 2), layout)[0]
    program = torch.export.export(layer, (x,), dynamic_shapes=({place: size},), strict=strict)
    x = inputs((2, 7, 4, 3, 2), layout)[0]
    torch.testing.assert_close(program.module()(x), layer(x))


def test_more_numbers_than_kernels_can_count():
    kernels = pytest.importorskip("landscape_fast.kernels.member_batch_norm")
    x = torch.empty(1, 2**16, 1, 2**15, device="meta")
    message = "^member_batch_norm: x must be of at most 2147418112 numbers per channel with"
    with pytest.raises(ValueError, match=message):
        kernels.cut((x,), None)
    assert kernels.cut((x[:, 2:],), None)[0].R == 2**31 - 2**16


X, W = torch.randn(2, 5, 3), torch.randn(2, 3)
ERRORS = [
    (lambda: member_batch_norm([1.0], training=True), TypeError, r"x must be a Tensor \[M, B, F, "),
    (
        lambda: member_batch_norm(X[0], training=True),
        ValueError,
        r"x must be \[M, B, F, ...\]; got",
    ),
    (
        lambda: member_batch_norm(X.long(), training=True),
        ValueError,
        "x must be one of float32, bfloat16, float16, float64; got torch.int64",
    ),
    (
        lambda: member_batch_norm(X, W[:1], training=True),
        ValueError,
        r"weight must be \[M, F\] with M = 2, F = 3; got \[1, 3\]",
    ),
    (
        lambda: member_batch_norm(X, W.double(), training=True),
        ValueError,
        "weight must be of the dtype of x, float32; got float64",
    ),
    (
        lambda: member_batch_norm(X, None, None, W, training=True),
        ValueError,
        "running_var must be given exactly where running_mean is; got None",
    ),
    (
        lambda: member_batch_norm(X, training=False),
        ValueError,
        "running_mean must be given in evaluation; got None",
    ),
    (
        lambda: member_batch_norm(X, None, None, W.t().contiguous().t(), W, training=True),
        ValueError,
        r"running_mean must be contiguous; got strides \(1, 2\)",
    ),
    (
        lambda: member_batch_norm(X[:, :1], training=True),
        ValueError,
        r"x must be of more than one number per channel in training; got \[2, 1, 3\]",
    ),
    (
        lambda: member_batch_norm(X[0], training=True, layout="folded"),
        ValueError,
        "members must be given where no tensor .* tells M; got None; pass members=",
    ),
    (
        lambda: member_batch_norm(X[0], W, training=True, layout="folded"),
        ValueError,
        r"x must be \[M\*B, F, ...\] with M = 2; got \[5, 3\]",
    ),
    (
        lambda: member_batch_norm(X, training=True, members=3),
        ValueError,
        "members must be M = 2; got 3",
    ),
    (
        lambda: member_batch_norm(X, training=True, layout="tabm"),
        ValueError,
        r"layout must be one of \('member_major', 'batch_major', 'folded'\); got 'tabm'",
    ),
    (
        lambda: member_batch_norm(X, training=True, activation="gelu"),
        ValueError,
        "activation must be None or 'relu'; got 'gelu'",
    ),
    (
        lambda: member_batch_norm(X, training=True, momentum=1.5),
        ValueError,
        r"momentum must be a number in \[0, 1\]; got 1.5",
    ),
    (lambda: member_batch_norm(X, training=True, eps=0.0), ValueError, "eps must be a number"),
]


@pytest.mark.parametrize("call, kind, text", ERRORS)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=f"^member_batch_norm: {text}"):
        call()
