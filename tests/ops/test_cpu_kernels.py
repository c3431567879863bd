"""What every CPU kernel promises: same bits on any threads, every instruction set right."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from landscape_fast import _extension
from landscape_fast.ops.ensemble_summary import ensemble_summary, ensemble_summary_reference
from landscape_fast.ops.pairwise_divergence import (
    pairwise_disagreement,
    pairwise_divergence,
    pairwise_divergence_reference,
)
from landscape_fast.testing import check_op

VARIANTS = ["baseline", "avx2", "avx512"]


def divergence(kind):
    return lambda logits: [pairwise_divergence(logits, kind, backend="cpp")]


def summary(logits):
    targets = torch.arange(logits.shape[1]) % logits.shape[2]
    return list(ensemble_summary(logits, targets, backend="cpp"))


KERNELS = {
    "js": divergence("js"),
    "kl": divergence("kl"),
    "disagreement": divergence("disagreement"),
    "labels": lambda logits: [pairwise_disagreement(logits.argmax(-1), backend="cpp")],
    "summary": summary,
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def logits_of(C):
    # More work than one thread keeps to itself, a block that does not fill up, two members close.
    logits = 2 * torch.randn(5, 150_000 // C + 17, C)
    logits[4] = logits[3] + 0.01 * logits[4]
    return logits


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("C", [10, 100])
def test_same_bits_for_any_number_of_threads(C, kernel, threads):
    logits = logits_of(C)
    threads(1)
    truth = KERNELS[kernel](logits)
    for count in (2, 7, 200):
        threads(count)
        for _ in range(3):
            assert all(map(torch.equal, KERNELS[kernel](logits), truth)), f"{count} threads"


@pytest.mark.parametrize("kernel", KERNELS)
def test_may_be_called_from_several_threads_at_once(kernel):
    logits = logits_of(10)
    truth = KERNELS[kernel](logits)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: KERNELS[kernel](logits), range(8)):
            assert all(map(torch.equal, got, truth))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("C", [10, 63, 64, 129])
def test_every_instruction_set_agrees_with_the_definition(C, isa, monkeypatch):
    monkeypatch.delenv("LANDSCAPE_FAST_ISA", raising=False)
    best = _extension.C.cpu_isa()
    if VARIANTS.index(isa) > VARIANTS.index(best):
        pytest.skip(f"this CPU, or this build, has no {isa}")
    monkeypatch.setenv("LANDSCAPE_FAST_ISA", isa)
    assert _extension.C.cpu_isa() == isa
    logits, targets = 2 * torch.randn(4, 45, C), torch.randint(0, C, (45,))
    for kind in ("js", "kl", "disagreement"):
        op, reference = pairwise_divergence, pairwise_divergence_reference
        check_op(op, reference, [logits], kind=kind, backend="cpp", gradients=False)
    inputs = [logits, targets]
    check_op(ensemble_summary, ensemble_summary_reference, inputs, backend="cpp", gradients=False)
    close = logits[:1] + 1e-3 * logits
    truth = pairwise_divergence_reference(close.double())
    torch.testing.assert_close(  # as for nearly equal members in test_pairwise_divergence
        pairwise_divergence(close).double(), truth, rtol=1e-5, atol=0
    )
    labels = logits.argmax(-1)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        got = pairwise_disagreement(labels.to(dtype), backend="cpp")
        assert torch.equal(got, pairwise_divergence(logits, "disagreement", backend="torch"))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("LANDSCAPE_FAST_ISA", "sse9")
    with pytest.raises(ValueError, match="LANDSCAPE_FAST_ISA must be .*; got sse9"):
        pairwise_divergence(torch.zeros(2, 3, 4), backend="cpp")


def test_offsets_beyond_32_bits(tmp_path):
    far = 2**31 + 8
    big = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 200)  # pages on demand
    logits = big.as_strided((2, 7, 5), (far, 5, 1))
    logits.copy_(torch.randn(2, 7, 5))
    near = logits.contiguous()
    for kernel in KERNELS.values():
        assert all(map(torch.equal, kernel(logits), kernel(near)))


FORK = """
import os, signal, torch
from landscape_fast.ops.pairwise_divergence import pairwise_divergence, pairwise_disagreement
torch.set_num_threads(2)
logits = torch.randn(4, 20000, 10)
labels = logits.argmax(-1)
truth = pairwise_divergence(logits, backend="cpp"), pairwise_disagreement(labels, backend="cpp")
child = os.fork()
if child == 0:
    signal.alarm(20)  # a hang ends the child with a signal
    torch.set_num_threads(1)  # as the workers of a DataLoader do
    got = pairwise_divergence(logits, backend="cpp"), pairwise_disagreement(labels, backend="cpp")
    os._exit(0 if all(map(torch.equal, got, truth)) else 3)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="needs fork")
def test_a_forked_worker_with_one_thread_does_not_hang():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)
