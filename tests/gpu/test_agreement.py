"""On a GPU every kernel agrees with its definition, and all ways to run an op with each other."""

import pytest
import torch
from gpu.catalogue import ENTRIES, FLOATS

from landscape_fast.testing import assert_as_exact, check_op

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scale", [1, 8], ids=["small", "large"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_every_kernel_is_as_exact_as_pytorch(entry, dtype, scale):
    """Outputs and gradients, from inputs fenced with NaN."""
    backends = entry.backends(dtype)
    if not backends:
        pytest.skip(f"no kernel takes {dtype}")
    for backend in ("auto", *backends):
        check_op(
            entry.call,
            entry.reference,
            entry.inputs(dtype, scale),
            dtype=dtype,
            backend=backend,
            gradients=entry.gradients,
        )


@pytest.mark.parametrize("scale", [1, 8], ids=["small", "large"])
@pytest.mark.parametrize("entry", [e for e in ENTRIES if "conv" in e.op], ids=lambda e: e.name)
def test_convolutions_in_tf32_are_as_exact_as_those_of_pytorch(entry, scale, monkeypatch):
    """As they run by default: torch allows tf32 to convolutions, and not to matrix products."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    test_every_kernel_is_as_exact_as_pytorch(entry, torch.float32, scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_kernels_agree_with_each_other_and_with_the_composition(entry, dtype):
    """The same numbers through Triton, CUDA and library calls: a check that needs no reference."""
    backends = ["torch", *entry.backends(dtype)]
    if len(backends) < 2:
        pytest.skip(f"no kernel takes {dtype}")
    inputs = entry.inputs(dtype, 4)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    truth = as_list(entry.reference(*wide))
    outputs = {b: as_list(entry.call(*inputs, backend=b)) for b in backends}
    for backend in backends[1:]:
        for i, three in enumerate(zip(outputs[backend], outputs["torch"], truth, strict=True)):
            assert_as_exact(f"{backend}, output {i}", *three)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_kernel_runs_by_default_on_a_gpu(entry):
    """No silent fallback: with a working build, "auto" is never plain PyTorch here."""
    from landscape_fast.ops import _dispatch

    name, reason = _dispatch.explain(entry.op, "cuda", entry.make(1)[0].dtype)
    assert name in ("triton", "cuda"), reason


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_descriptors_and_pointers_agree(dtype):
    """Rows aligned to 16 bytes are loaded through descriptors, others through pointers."""
    entry = next(e for e in ENTRIES if e.name == "linear member_major")
    inputs = [t.to("cuda", dtype) for t in linear_inputs(4, 333, 512, 384)]
    x = inputs[0]
    odd = torch.full((*x.shape[:-1], x.shape[-1] + 1), float("nan"), dtype=dtype, device="cuda")
    odd[..., :-1] = x
    truth = entry.reference(*[t.double() for t in inputs])
    plain = entry.reference(*inputs)
    for name, values in (("descriptors", x), ("pointers", odd[..., :-1])):
        got = entry.call(values, *inputs[1:], backend="triton")
        assert_as_exact(name, got, plain, truth)


@pytest.mark.parametrize(
    "sizes", [(32, 256, 512, 512), (4, 1000, 2048, 3000), (16, 1, 4096, 4104)], ids=str
)
def test_layers_of_real_sizes(sizes):
    """Many tiles, several waves of programs, splits of the weight gradient; all gradients."""
    entry = next(e for e in ENTRIES if e.name == "linear member_major")
    inputs = [t.cuda() for t in linear_inputs(*sizes)]
    for backend in ("triton", "auto"):
        check_op(entry.call, entry.reference, inputs, dtype=torch.bfloat16, backend=backend)


def linear_inputs(M, B, I, O):
    values = torch.randn(M, B, I), torch.randn(O, I) / I**0.5, torch.randn(M, O)
    r, s = 1 + 0.3 * torch.randn(M, I), 1 + 0.3 * torch.randn(M, O)
    return [*values[:2], r, s, values[2]]


@pytest.mark.parametrize("name", ["linear member_major", "js of 10 classes", "combine flat"])
def test_strided_inputs_cost_no_precision(name):
    """Transposed and sliced storage, as layouts and parameter views give it."""
    entry = next(e for e in ENTRIES if e.name == name)
    inputs = entry.inputs(torch.float32)
    first = inputs[0]
    wide = torch.randn(*first.shape[:-1], 2 * first.shape[-1], device="cuda")
    strided = wide[..., ::2].copy_(first) if first.ndim == 3 else first.T.contiguous().T
    check_op(
        entry.call,
        entry.reference,
        [strided, *inputs[1:]],
        backend=entry.backends(torch.float32)[0],
        gradients=entry.gradients,
    )


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
