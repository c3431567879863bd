"""The batch_ensemble_linear kernels in every way they are launched, in tiles small enough for many.

The interpreter runs the code that GPUs run, at sizes where all loops, splits and edges occur.
"""

import sys

import pytest
import torch
from ops.problem import assert_held, inputs, keyword

pytest.importorskip("triton")

from landscape_fast.kernels import _reduce
from landscape_fast.kernels import batch_ensemble_linear as forward
from landscape_fast.kernels import batch_ensemble_linear_backward as backward
from landscape_fast.kernels import batch_ensemble_linear_tiles as tiles
from landscape_fast.kernels._launch import Config
from landscape_fast.ops._batch_ensemble_linear_plan import Plan
from landscape_fast.ops._batch_ensemble_linear_ways import backward_op, forward_op
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.testing import assert_as_exact, check_op, check_registered, fenced

PAGE = sys.modules[batch_ensemble_linear.__module__]
LAYOUTS = ["member_major", "batch_major", "folded", "shared", "shared batch_major"]
MODES = ["pointers", "folded rows", "descriptors", "splits", "descriptor splits", "plan G"]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not to be trusted when interpreted


def small(tma=False, folded=None, block=16):
    """A configuration with the smallest tiles."""
    blocks = {f"BLOCK_{letter}": block for letter in "BIO"} | {"GROUP": 2}
    blocks |= {} if folded is None else {"FOLDED": folded}
    return Config(blocks, num_warps=4, num_stages=2, tma=tma)


@pytest.fixture
def mode(request, monkeypatch):
    """Makes `backend="triton"` take small tiles in one of `MODES`; checks that it did."""
    name = request.param
    tma = name.startswith("descriptor")
    described = []

    def buckets(arch, stage, kind, with_descriptors):
        assert with_descriptors or not tma, "these inputs allow descriptors"
        return ((1.0, small(tma, name == "folded rows" if stage == "fwd" else None)),)

    def descriptor(*arguments, original=forward.descriptor):
        described.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(tiles, "buckets", buckets)
    for module in (forward, backward):
        monkeypatch.setattr(module, "descriptor", descriptor)
        if tma and not torch.cuda.is_available():
            monkeypatch.setattr(module, "arch", lambda tensor: 90)
    if name.endswith("splits"):
        monkeypatch.setattr(tiles, "PART_COST", 0)
    if name == "plan G":
        monkeypatch.setattr(PAGE, "FUSED", Plan("fused", "G"))
    caches = (
        tiles.forward_config,
        tiles.input_config,
        tiles.weight_config,
        tiles._shared_split,
        tiles._weight_split,
    )
    for cache in caches:
        cache.cache_clear()
    yield name
    for cache in caches:
        cache.cache_clear()
    assert bool(described) == tma


def check(layout, device, **options):
    check_op(
        batch_ensemble_linear,
        batch_ensemble_linear_reference,
        inputs(2, 19, 24, 40, layout, device),
        layout=keyword(layout),
        backend="triton",
        **options,
    )


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_agrees_with_the_definition(mode, layout, device):
    check(layout, device)


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_every_mode_in_half_precision(mode, dtype, device):
    check("member_major", device, dtype=dtype)


@pytest.mark.parametrize("mode", ["pointers", "folded rows", "descriptors"], indirect=True)
def test_relu_in_every_forward(mode, device):
    check("member_major", device, activation="relu")


@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.parametrize("layout", ["member_major", "batch_major", "shared"])
def test_every_mode_with_parameters_in_float32(mode, layout, device):
    """Beside a 16-bit x: they are rounded in the kernels, and their gradients are not."""
    x, *held = inputs(2, 19, 24, 40, layout, device)
    leaves = [t.requires_grad_() for t in (x.half(), *held)]
    options = {"layout": "batch_major" if layout == "batch_major" else "member_major"}
    y = batch_ensemble_linear(*leaves, **options, backend="triton")
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().half().double().requires_grad_() for t in leaves]
    y_true = batch_ensemble_linear_reference(*exact, **options)
    truth = torch.autograd.grad(y_true, exact, dy.double())
    low = [t.detach().half().requires_grad_() for t in leaves]
    y_plain = batch_ensemble_linear_reference(*low, **options)
    assert_as_exact("y", y, y_plain, y_true)
    assert_as_exact("dx", found[0], torch.autograd.grad(y_plain, low, dy)[0], truth[0])
    for a, b in zip(found[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32
        assert_held(a, b)


@pytest.mark.parametrize("mode", ["pointers", "folded rows", "plan G"], indirect=True)
def test_every_factor_may_be_missing(mode, device):
    x, weight, r, s, bias = inputs(2, 17, 5, 18, "member_major", device)
    for r_, s_, b in ((None, s, bias), (r, None, bias[0]), (r, s, None), (None, None, None)):
        check_op(
            batch_ensemble_linear,
            batch_ensemble_linear_reference,
            [x, weight, r_, s_, b],
            backend="triton",
        )


@pytest.mark.parametrize("mode", ["splits", "plan G"], indirect=True)
def test_same_bits_every_time(mode, device):
    arguments = [t.requires_grad_() for t in inputs(2, 19, 24, 18, "member_major", device)]
    dy = torch.randn(2, 19, 18, device=device)

    def run():
        y = batch_ensemble_linear(*arguments, backend="triton")
        return [y, *torch.autograd.grad(y, arguments, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def backward_inputs(M, B, I, O, device, shared=False):
    x, weight, r, s, _ = inputs(M, B, I, O, "shared" if shared else "member_major", device)
    outputs = [t.new_empty(t.shape) for t in (x, weight, r, s)] + [x.new_empty(M, O)]
    return (torch.randn(M, B, O, device=device), x, weight, r, s), outputs


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_in_64_bit_offsets(shared, device):
    arguments, outputs = backward_inputs(2, 17, 5, 18, device, shared)
    _, x, weight, r, s = arguments
    found = []
    for long in (False, True):
        y = x.new_empty(2, 17, 18)
        for folded in (False, True):
            z = x.new_empty(2, 17, 18)
            config = small(folded=folded)
            forward.batch_ensemble_linear_fwd(
                x, weight, r, s, None, z, False, config=config, long=long
            )
            y = torch.cat([y, z])
        backward.batch_ensemble_linear_bwd(
            *arguments, *outputs, False, x_config=small(), weight_config=small(), long=long
        )
        found.append([y[2:], *(t.clone() for t in outputs)])
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.parametrize("split", [(2, 16, 6), (3, 48, 1), (1, 32, 6), (3, 16, 3)], ids=str)
def test_any_split_gives_the_same_sums(split, device):
    arguments, outputs = backward_inputs(3, 35, 24, 18, device)
    arguments = [fenced(t) for t in arguments]
    dy, x, weight, r, s = (t.double() for t in arguments)
    backward.batch_ensemble_linear_bwd(
        *arguments, None, *outputs[1:], False, weight_config=small(), split=tiles.Split(*split)
    )
    G = torch.einsum("mbo,mbi->moi", dy, x)
    expected = (
        torch.einsum("mo,moi,mi->oi", s, G, r),
        torch.einsum("oi,mo,moi->mi", weight, s, G),
        torch.einsum("oi,moi,mi->mo", weight, G, r),
        dy.sum(1),
    )
    for a, b in zip(outputs[1:], expected, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-4, rtol=1e-5)


def test_launches_only_what_is_wanted(monkeypatch, device):
    """No dx kernel without dx: then dr comes from the weight gradient's; db alone needs neither."""
    launched = []
    for name in ("_input_gradient", "_weight_gradient"):
        original = getattr(backward, name)

        def spy(*arguments, name=name, original=original):
            launched.append(name)
            return original(*arguments)

        monkeypatch.setattr(backward, name, spy)
    arguments, (dx, dweight, dr, ds, db) = backward_inputs(2, 5, 4, 3, device)
    wanted = {
        ("_input_gradient",): (dx, None, dr, None, db),
        ("_weight_gradient",): (None, None, dr, None, db),
        ("_input_gradient", "_weight_gradient"): (dx, dweight, dr, ds, db),
        (): (None, None, None, None, db),
    }
    for names, outputs in wanted.items():
        launched.clear()
        for t in filter(lambda t: t is not None, outputs):
            t.fill_(float("nan"))
        backward.batch_ensemble_linear_bwd(*arguments, *outputs, False)
        assert tuple(launched) == names
        assert all(t is None or t.isfinite().all() for t in outputs)
        torch.testing.assert_close(db, arguments[0].sum(1))


@pytest.mark.parametrize("plan", ["H", "G", "composed"])
@pytest.mark.parametrize("without_s", [False, True])
def test_keeps_no_product(plan, without_s, monkeypatch, device):
    """The kernels keep x of the activations; the composition keeps z too, where ds needs it."""
    monkeypatch.setattr(PAGE, "FUSED", Plan("fused" if plan != "composed" else "composed", plan))
    arguments = [t.requires_grad_() for t in inputs(2, 5, 4, 3, "member_major", device)]
    if without_s:
        arguments[3] = arguments[3].detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_ensemble_linear(*arguments, backend="triton")
    places = {t.data_ptr() for t in saved}
    assert {t.data_ptr() for t in arguments[:4]} <= places
    more = [t.shape for t in saved if t.data_ptr() not in {a.data_ptr() for a in arguments}]
    assert more == ([(2, 5, 3)] if plan == "composed" and not without_s else [])


@pytest.mark.parametrize("shared, batch_major", [(False, False), (False, True), (True, True)])
def test_registered_ops(shared, batch_major, device):
    M, B = 2, 5
    layout = "shared" if shared else "batch_major" if batch_major else "member_major"
    x, weight, r, s, bias = inputs(M, B, 4, 3, layout, device)
    dy = torch.randn((B, M, 3) if batch_major else (M, B, 3), device=device)
    check_registered(forward_op, (x, weight, r, s, bias, M, batch_major, False))
    strided = weight.T.contiguous().T
    check_registered(forward_op, (x, strided, None, s, None, M, batch_major, True))
    needs = [False, True, True, False, True]
    full, half = torch.float32, torch.float16
    everything = (dy, x, weight, r, s, [True] * 5, False, full, batch_major, True)
    check_registered(backward_op, everything)
    check_registered(backward_op, (dy, x, weight, r, s, needs, True, full, batch_major, False))
    dy, x, s = dy.half(), x.half(), s.half()  # weight, r and bias held in float32
    check_registered(forward_op, (x, weight, r, s, bias, M, batch_major, False))
    check_registered(backward_op, (dy, x, weight, r, s, needs, True, half, batch_major, False))


def test_precision_follows_the_switch(monkeypatch, device):
    """float32 factors go to the tensor cores as tf32 only where torch allows that for matmul."""
    used = []
    original = forward.precision
    monkeypatch.setattr(forward, "precision", lambda kind: used.append(kind) or original(kind))
    arguments = inputs(2, 5, 4, 3, "member_major", device)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            batch_ensemble_linear(*arguments, backend="triton")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    batch_ensemble_linear(*[t.half() for t in arguments], backend="triton")
    assert used == ["tf32", "ieee", "half"]
    assert [original(kind) for kind in used] == ["tf32", "ieee", "ieee"]


def test_64_bit_offsets_where_a_tensor_spans_them():
    def at(*shape, strides=None):
        t = torch.empty(1, device="meta")
        return t.expand(shape) if strides is None else t.as_strided(shape, strides)

    assert not forward.spans_long(torch.empty(2**31, device="meta"), None)
    assert forward.spans_long(None, torch.empty(2**31 + 1, device="meta"))
    assert forward.spans_long(at(2, 3, strides=(2**31 - 1, 1)))
    assert not forward.spans_long(at(2**20, 2**20))  # expanded: one element in memory


def test_descriptors_need_aligned_rows():
    t = torch.zeros(4, 6, 32)
    assert forward.describable(t) and forward.describable(t.transpose(0, 1))
    assert forward.describable(t[..., :5])  # aligned rows of five
    assert forward.describable(t[:1, :1, :3])
    assert not forward.describable(t[..., 1:])  # starts 4 bytes into a row
    assert not forward.describable(t.transpose(1, 2))
    assert not forward.describable(t[:1].expand(4, 6, 32))
    assert not forward.describable(torch.zeros(4, 6, 5))
    assert not forward.describable(torch.zeros(4, 6, 4).half())
    described = forward.descriptor(t[:1, :1, :3], 16, 16)
    assert described.shape == [1, 1, 3] and described.strides == [4, 4, 1]
    assert forward.descriptor(t[0], 16, 16).shape == [1, 6, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_parts(dtype, device):
    """Five sums of different lengths in one launch, and none at all."""
    shapes = [(1, 3), (2, 5000), (65, 4, 33), (130, 1), (7, 64)]
    parts = [torch.randn(shape, device=device) for shape in shapes]
    outs = [p.new_empty(p.shape[1:], dtype=dtype) for p in parts]
    _reduce.sum_parts(list(zip(parts, outs, strict=True)))
    for part, out in zip(parts, outs, strict=True):
        torch.testing.assert_close(out, part.double().sum(0).to(dtype), atol=1e-5, rtol=1e-3)
    _reduce.sum_parts([])
