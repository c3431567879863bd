"""The op machinery on a small op of its own, and the silent wrong answers it must prevent.

`scale(x, w) = x * w`, with a kernel: a registered op that autograd and functorch cannot see into.
"""

import warnings

import pytest
import torch

from landscape_fast import ops, testing
from landscape_fast.ops import _checks, _dispatch, _library


def scale_reference(x, w):
    return x * w


def _scale_impl(x, w, backend):
    out = x.new_empty(x.shape)
    out.copy_(x.detach() * w.detach())
    return out


def _scale_backward_impl(dy, x, w):
    dy, x, w = dy.detach(), x.detach(), w.detach()
    return (dy * w).contiguous(), (dy * x).contiguous()


_scale = _library.define(
    "test_scale(Tensor x, Tensor w, str backend) -> Tensor",
    _scale_impl,
    lambda x, w, backend: x.new_empty(x.shape),
)
_scale_backward = _library.define(
    "test_scale_backward(Tensor dy, Tensor x, Tensor w) -> (Tensor, Tensor)",
    _scale_backward_impl,
    lambda dy, x, w: (x.new_empty(x.shape), x.new_empty(x.shape)),
)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return _scale(x, w, "triton")

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        if _dispatch.wants_graph():
            return _dispatch.reference_backward(scale_reference, (x, w), ctx.needs_input_grad, dy)
        return _scale_backward(dy.contiguous(), x, w)


def scale(x, w, *, probe=True, backend="triton"):
    x, w = _dispatch.autocast(x, w)
    if probe and _dispatch.transforming():
        return scale_reference(x, w)
    if _dispatch.wants_grad(x, w):
        return _Scale.apply(x, w)
    return _scale(x, w, backend)


@pytest.fixture
def pair():
    return torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)


# -- silent wrong answers ------------------------------------------------------------------------


def test_jvp_without_the_probe_is_silently_zero_and_with_it_right(pair):
    x, w = pair
    tangents = (torch.ones_like(x), torch.ones_like(w))
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(*p) for p in zip(pair, tangents, strict=True)]
        bad = torch.autograd.forward_ad.unpack_dual(scale(*dual, probe=False)).tangent
        good = torch.autograd.forward_ad.unpack_dual(scale(*dual)).tangent
    assert bad is None or bad.norm() == 0, "PyTorch now differentiates raw ops forward: simplify"
    torch.testing.assert_close(good, x + w)
    assert good.norm() > 1


def test_torch_func_and_compile_agree_with_the_reference(pair):
    testing.check_transforms(scale, scale_reference, pair)


def test_dropping_the_probe_is_caught(pair):
    with pytest.raises((AssertionError, RuntimeError)):
        testing.check_transforms(scale, scale_reference, pair, probe=False)


def test_hessians_carry_a_graph(pair):
    testing.check_hessian(scale, scale_reference, pair)
    assert torch.autograd.gradcheck(scale, [t.requires_grad_() for t in pair])
    assert torch.autograd.gradgradcheck(scale, [t.requires_grad_() for t in pair])


def test_an_opaque_backward_is_caught(pair, monkeypatch):
    monkeypatch.setattr(_dispatch, "wants_graph", lambda: False)
    with warnings.catch_warnings(), pytest.raises((AssertionError, RuntimeError)):
        warnings.simplefilter("ignore")
        testing.check_hessian(scale, scale_reference, pair)


def test_a_dependent_argument_is_not_counted_twice():
    w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(scale(w * w, w).sum(), w, create_graph=True)  # d(w^3) = 3 w^2
    torch.testing.assert_close(grad, 3 * w**2)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), w)[0], 6 * w.detach())


def test_no_autograd_function_defines_jvp():
    """torch.compile ignores the jvp of a Function, and is then wrong without a word."""
    stack, seen = [torch.autograd.Function], []
    while stack:
        for function in stack.pop().__subclasses__():
            stack.append(function)
            if function.__module__.startswith("landscape_fast"):
                seen.append(function)
                assert "jvp" not in vars(function), f"{function.__name__} defines jvp"
                assert "setup_context" not in vars(function), (
                    f"{function.__name__} is the slow style"
                )
    assert seen


def test_a_gradient_is_never_lost_in_a_raw_op(pair):
    x, w = (t.requires_grad_() for t in pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            not _scale(x, w, "triton").requires_grad or _scale(x, w, "triton").grad_fn is not None
        )
    scale(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.detach())


def test_an_op_that_returns_its_input_is_caught():
    alias = _library.define("test_alias(Tensor x) -> Tensor", lambda x: x, lambda x: x)
    with pytest.raises(Exception, match="alias"):
        testing.check_registered(alias, (torch.ones(2),))
    testing.check_registered(_scale, (torch.ones(2, 3), torch.ones(2, 3), "triton"))


def test_autocast_reaches_the_kernel(pair):
    x, w = (t.float() for t in pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scale(x, w).dtype == torch.bfloat16
        assert scale(*pair).dtype == torch.float64  # float64 is left alone
        assert scale(x.to("meta"), w.to("meta")).dtype == torch.float32  # meta has no autocast
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scale(x, w)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_private_probes_of_torch_exist():
    assert not _dispatch.transforming()
    seen = []
    torch.func.vmap(lambda t: (seen.append(_dispatch.transforming()), t)[1])(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(_dispatch.transforming())
    assert seen == [True, True]


# -- dispatch ------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(_dispatch, "OPS", dict(_dispatch.OPS))
    monkeypatch.setattr(_dispatch, "_picked", {})
    _dispatch.declare(
        "toy", cuda=_dispatch.KERNEL_DTYPES, triton=_dispatch.KERNEL_DTYPES, cpp=(torch.float32,)
    )
    monkeypatch.setattr(
        _dispatch, "_obstacle", lambda name, dtypes, device, dtype: blocked.get(name)
    )
    blocked = {"cuda": "no nvcc", "triton": "no compiler"}
    return blocked


def test_the_first_backend_that_can_run_is_picked(toy):
    assert _dispatch.pick("toy", "auto", torch.ones(1)) == "cpp"
    del toy["cuda"]
    assert _dispatch.explain("toy", "cuda", torch.float32)[0] == "cuda"


def test_a_fallback_on_cuda_warns_once_and_says_why(toy):
    with pytest.warns(UserWarning, match="toy runs in plain PyTorch: .*no nvcc.*no compiler"):
        assert _dispatch._pick("toy", "auto", "cuda", torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch._pick("toy", "auto", "cuda", torch.float32) == "torch"


def test_a_forced_backend_that_cannot_run_raises(toy, monkeypatch):
    with pytest.raises(
        ValueError, match="toy: backend 'cuda' .asked for. cannot run here: no nvcc"
    ):
        _dispatch.pick("toy", "cuda", torch.ones(1))
    with pytest.raises(ValueError, match="toy: backend must be one of .*; got 'fast'"):
        _dispatch.pick("toy", "fast", torch.ones(1))
    monkeypatch.setattr(_dispatch, "FORCED", "triton")
    with pytest.raises(ValueError, match="LANDSCAPE_FAST_BACKEND. cannot run here: no compiler"):
        _dispatch.pick("toy", "auto", torch.ones(1))
    assert _dispatch.pick("toy", "cpp", torch.ones(1)) == "cpp"  # the argument wins
    monkeypatch.setattr(_dispatch, "FORCED", "torch")
    assert _dispatch.pick("toy", "auto", torch.ones(1)) == "torch"
    monkeypatch.setattr(_dispatch, "FORCED", "gpu")
    with pytest.raises(ValueError, match="LANDSCAPE_FAST_BACKEND must be one of .*; got 'gpu'"):
        _dispatch.pick("toy", "auto", torch.ones(1))


def test_an_op_without_the_forced_backend_keeps_its_own_choice(toy, monkeypatch):
    monkeypatch.setitem(_dispatch.OPS, "other", {"cpp": (torch.float32,)})
    monkeypatch.setattr(_dispatch, "FORCED", "triton")
    assert _dispatch.pick("other", "auto", torch.ones(1)) == "cpp"
    assert _dispatch.pick("toy", "auto", torch.ones(1).double()) == "torch"
    assert _dispatch.pick("toy", "auto", torch.ones(1, device="meta")) == "torch"


def test_a_triton_without_descriptors_is_no_backend(monkeypatch):
    """It would fail in the first call: torch 2.6 and 2.7 bring one."""
    pytest.importorskip("triton")
    found = {"triton": object(), "triton.tools.tensor_descriptor": None}
    monkeypatch.setattr(_dispatch, "find_spec", found.get)
    obstacle = _dispatch._triton_obstacle.__wrapped__
    assert "it needs triton 3.4 or newer" in obstacle("cuda")
    found["triton.tools.tensor_descriptor"] = object()
    assert obstacle("cpu") is None


def test_float64_and_other_devices_run_in_plain_pytorch():
    for op in _dispatch.OPS:
        if op != "pairwise_disagreement":  # it takes labels
            assert _dispatch.explain(op, "cpu", torch.float64)[0] == "torch"
            assert _dispatch.explain(op, "meta", torch.float32)[0] == "torch"


def test_every_public_op_is_declared():
    assert set(_dispatch.OPS) >= {
        "batch_ensemble_linear",
        "combine",
        "ensemble_summary",
        "pairwise_disagreement",
        "pairwise_divergence",
    }
    for op in _dispatch.OPS:
        assert callable(getattr(ops, op)) and callable(getattr(ops, f"{op}_reference"))


# -- checks and agreement ------------------------------------------------------------------------


def test_messages_name_the_argument_the_rule_and_the_value():
    x = torch.zeros(2, 3)
    _checks.check_tensor("op", "x", x, "M, I", (2, None))
    cases = [
        ((x, "M, I", (5, None)), {}, r"op: x must be \[M, I\] with M = 5; got \[2, 3\]"),
        ((x, "M, B, I", (None,) * 3), {}, r"op: x must be \[M, B, I\]; got \[2, 3\]"),
        ((x.int(), "M, I", (2, 3)), {}, r"op: x must be one of float32, .*; got torch.int32"),
        (
            (x.half(), "M, I", (2, 3)),
            {"like": x, "like_name": "w"},
            r"dtype of w, float32; got float16",
        ),
        (
            (x.to("meta"), "M, I", (2, 3)),
            {"like": x, "like_name": "w"},
            r"device of w, cpu; got meta",
        ),
    ]
    for (t, letters, sizes), options, text in cases:
        with pytest.raises(ValueError, match=text):
            _checks.check_tensor("op", "x", t, letters, sizes, **options)
    with pytest.raises(TypeError, match=r"op: x must be a Tensor \[M, I\]; got list"):
        _checks.check_tensor("op", "x", [1.0], "M, I", (2, 3))


def test_agreement_notices_what_it_should():
    truth = torch.randn(50, dtype=torch.float64)
    plain = truth.float()
    testing.assert_as_exact("same", plain, plain, truth)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_as_exact("off", plain * (1 + 1e-5), plain, truth)
    with pytest.raises(AssertionError, match="NaN"):
        testing.assert_as_exact(
            "nan", plain.clone().index_fill_(0, torch.tensor([3]), float("nan")), plain, truth
        )
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_as_exact("dtype", plain.half(), plain, truth)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_as_exact("shape", plain[:, None], plain, truth)
    infinite = torch.tensor([1.0, float("inf")])
    with pytest.raises(AssertionError):
        testing.assert_as_exact("inf", torch.tensor([1.0, 5.0]), infinite, infinite.double())


@pytest.mark.parametrize(
    "t",
    [
        torch.randn(3, 4).T,
        torch.randn(3, 1).expand(3, 5),
        torch.randn(4, 6)[:, ::2],
        torch.randn(0, 3),
    ],
    ids=["transposed", "expanded", "sliced", "empty"],
)
def test_a_fence_keeps_values_and_strides_and_poisons_the_rest(t):
    out = testing.fenced(t)
    assert torch.equal(out, t) and out.stride() == t.stride()
    storage = torch.empty(0).set_(out.untyped_storage())
    distinct = t.numel() if 0 not in t.stride() else t.shape[0]
    assert int(storage.isfinite().sum()) == distinct


def test_check_op_notices_a_wrong_gradient_and_a_read_outside():
    inputs = (torch.randn(4, 5), torch.randn(4, 5))
    testing.check_op(lambda x, w, backend: scale(x, w), scale_reference, inputs)

    def wrong(x, w, backend):
        return x * w.detach() + w - w.detach()

    with pytest.raises(AssertionError, match="gradient of input 1"):
        testing.check_op(wrong, scale_reference, inputs)

    def outside(x, w, backend):
        return x.as_strided(x.shape, x.stride(), x.storage_offset() + 1) * w

    with pytest.raises(AssertionError, match="NaN"):
        testing.check_op(outside, scale_reference, inputs, gradients=False)


class _Unsaved(torch.nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("shift", torch.ones(2), persistent=False)

    def forward(self, x):
        return super().forward(x) + self.shift


def test_check_layer_accepts_a_linear_layer_and_notices_a_broken_one():
    testing.check_layer(torch.nn.Linear(3, 2), torch.randn(4, 3))

    with pytest.raises(AssertionError, match="state dict"):
        testing.check_layer(_Unsaved(3, 2), torch.randn(4, 3))
