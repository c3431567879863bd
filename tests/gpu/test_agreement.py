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
