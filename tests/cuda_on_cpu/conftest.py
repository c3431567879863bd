import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.calls import Calls


@pytest.fixture(scope="session")
def kernels(request):
    """The CUDA kernels on the CPU, as functions of tensors."""
    try:
        folder = request.config.cache.mkdir("cuda_on_cpu")
        return Calls(build.kernels(folder))
    except build.Unavailable as exc:
        pytest.skip(f"CUDA kernels on the CPU: {exc}")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
