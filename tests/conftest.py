"""Kernels run interpreted where there is no GPU: a switch to set before any kernel is imported."""

import os
import signal

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background this way; here, tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:  # keywords also hold folder names
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """All green must not be misread: say how many GPU checks did not run."""
    skipped = [
        r
        for r in terminalreporter.stats.get("skipped", [])
        if "needs a CUDA device" in str(r.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(f"GPU checks skipped for want of a CUDA device: {len(skipped)}")


@pytest.fixture
def device():
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """The same numbers every run; torch.empty holds NaN, so output left unwritten shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _float32_as_such():
    """Not as tf32, which torch lets convolutions on a GPU use."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Every instruction set of the CPU kernels in turn; a wish for more than there is runs less."""
    from landscape_fast import _extension

    monkeypatch.setenv("LANDSCAPE_FAST_ISA", request.param)
    if _extension.C.cpu_isa() != request.param:
        pytest.skip(f"this CPU, or this build, has no {request.param}")
