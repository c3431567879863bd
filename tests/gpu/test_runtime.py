"""What only a GPU shows of an op: same bits, no host sync, streams, graphs, devices, memory."""

import pytest
import torch
from gpu.catalogue import ENTRIES

from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear

pytestmark = pytest.mark.gpu
DIFFERENTIABLE = [e for e in ENTRIES if e.gradients]
# its call itself makes the float32 parameters; the tests of the op hold that it keeps x alone
COPYING = ("linear float32 parameters",)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_twenty_runs_give_the_same_bits(entry):
    """Fixed-order sums, no float atomics; a difference would be a race."""
    inputs = entry.inputs(entry.low(), 8)
    first = entry.step(inputs)
    for _ in range(19):
        torch.empty(1 << 20, device="cuda").fill_(float("nan"))  # memory is never the same
        assert same_bits(entry.step(inputs), first)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_captured_graph_replays_to_the_same_bits(entry):
    """Launch-only code: capture works, and a replay reads the inputs anew."""
    inputs = entry.inputs(entry.low())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            entry.step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entry.step(inputs)
    for t in inputs:
        if t.is_floating_point():
            t.neg_()
    expected = [t.clone() for t in entry.step(inputs)]
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, expected)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_no_host_synchronisation(entry):
    """Not one .item(), nonzero or pageable copy, forward or backward."""
    inputs = entry.inputs(entry.low())
    entry.step(inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        entry.step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_the_current_stream_is_used(entry):
    """On a side stream that is busy first: a launch elsewhere would read inputs not yet there."""
    final = entry.inputs(entry.low())
    expected = entry.step(final)
    inputs = [torch.zeros_like(t) for t in final]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for t, value in zip(inputs, final, strict=True):
            t.copy_(value)
        got = entry.step(inputs)
    stream.synchronize()
    assert same_bits(got, expected)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA devices")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_a_second_device(entry):
    """Inputs decide, not the current device, which stays what it was."""
    inputs = entry.inputs(entry.low())
    expected = entry.step(inputs)
    before = torch.cuda.current_device()
    got = entry.step([t.to("cuda:1") for t in inputs])
    assert torch.cuda.current_device() == before
    assert all(g.device.index == 1 for g in got)
    assert same_bits([g.cpu() for g in got], [e.cpu() for e in expected])


@pytest.mark.parametrize(
    "entry", [e for e in DIFFERENTIABLE if e.name not in COPYING], ids=lambda e: e.name
)
def test_the_forward_keeps_nothing_but_its_inputs(entry):
    """While autograd records, memory grows by the outputs, and by what an entry says, alone."""
    leaves = [t.detach().requires_grad_() for t in entry.inputs(entry.low(), 8)]
    entry.kernel(*leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = entry.kernel(*leaves)
    torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - before
    own = (1 + entry.kept) * sum(y.numel() * y.element_size() for y in outputs)
    blocks = 512 * (2 * len(outputs) + 8)  # the allocator's granularity, and alignment of parts
    assert grown <= own + blocks, f"{grown} bytes kept where {own} are owed"


@pytest.mark.parametrize("entry", DIFFERENTIABLE, ids=lambda e: e.name)
def test_compiles_without_a_graph_break(entry):
    """torch.compile with Inductor, forward and backward."""
    inputs = entry.inputs(torch.float32)
    expected = entry.step(inputs)
    compiled = torch.compile(entry.call, fullgraph=True, dynamic=False)
    got = entry._replace(call=compiled).step(inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_and_returns_the_low_type(dtype):
    """As F.linear does, with the gradients in the types of the parameters."""
    entry = next(e for e in ENTRIES if e.name == "linear member_major")
    leaves = [t.requires_grad_() for t in entry.inputs(torch.float32)]
    with torch.autocast("cuda", dtype=dtype):
        y = batch_ensemble_linear(*leaves, backend="triton")
    assert y.dtype == dtype
    low = [t.detach().to(dtype) for t in leaves]
    assert torch.equal(y, batch_ensemble_linear(*low, backend="triton"))
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * len(leaves)
    assert all(g.isfinite().all() for g in grads)
