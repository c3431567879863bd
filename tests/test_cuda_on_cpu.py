"""The machine that runs CUDA kernels on the CPU finds mistakes; AddressSanitizer watches them all.

What the kernels compute is tested in tests/cuda_on_cpu/.
"""

import ctypes
import re

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.shim import ORDERS

HERE = build.HERE
MISTAKES = re.findall(r"^  ([A-Z_]+),", (HERE / "breakable.cu").read_text(), re.MULTILINE)
ERROR = {"invalid configuration": 9, "launch failure": 719}  # cudaError_t


@pytest.fixture(scope="module")
def folder(request):
    try:
        build.compiler(), build.cuda_headers()
    except build.Unavailable as exc:
        pytest.skip(f"CUDA kernels on the CPU: {exc}")
    return request.config.cache.mkdir("cuda_on_cpu")


def breakable_library(folder, *flags):
    sources = [HERE / name for name in ("breakable.cu", "collectives.cu", "switches.cpp")]
    return build.library(folder, "breakable", sources, *flags)


@pytest.fixture(scope="module")
def run(folder):
    """run(mistake, order) -> (error code, message, sums): breakable.cu on 3 rows of 200 numbers."""
    library = ctypes.CDLL(str(breakable_library(folder)))
    library.run_breakable.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int] * 4
    library.shim_failure.restype = ctypes.c_char_p
    x = torch.arange(604, dtype=torch.float32)

    def call(mistake="NONE", order=(0, 0), blocks=3, threads=96):
        out = torch.full((3,), 7.0)
        library.shim_order(*order)
        addresses = x.data_ptr(), out.data_ptr()
        code = library.run_breakable(*addresses, blocks, 200, threads, MISTAKES.index(mistake))
        return code, library.shim_failure().decode(), out

    call.truth = x[:600].view(3, 200).sum(1)
    return call


def expected(width: int) -> list[list[int]]:
    """What collectives.cu gives, by the CUDA programming guide (warp functions)."""
    rows = [[] for _ in range(9)]
    for thread in range(64):
        warp, lane = thread // 32 * 32, thread % 32
        first, at = lane // width * width, lane % width
        other = lane ^ 6
        sources = [
            first + 5 % width,
            lane - 3 if at >= 3 else lane,
            lane + 3 if at + 3 < width else lane,
            other if other // width <= lane // width else lane,
        ]
        results = [100 + warp + source for source in sources]
        results.append(sum(1 << k for k in range(32) if (warp + k) % 3 == 0))
        results += [int(warp == 32), int(warp == 0)]
        results.append(100 + warp + (lane ^ (1 if lane < 16 else 2)))
        results.append(0xAAAA if lane < 16 else 0xAAAA0000)
        for row, result in zip(rows, results, strict=True):
            row.append(result)
    return rows


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_warp_operations(folder, width, order):
    library = ctypes.CDLL(str(breakable_library(folder)))
    out = (ctypes.c_uint32 * 64 * 9)()
    library.shim_order(*order)
    assert library.run_collectives(out, width) == 0
    assert [list(row) for row in out] == expected(width)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_right_kernel_passes(run, order):
    code, message, out = run(order=order)
    assert (code, message) == (0, "") and torch.equal(out, run.truth)


def test_a_missing_barrier_shows_in_some_order(run):
    right = [torch.equal(run("NO_BARRIER", order)[2], run.truth) for order in ORDERS]
    assert not all(right)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize(
    "mistake, message",
    [
        ("BARRIER_IN_BRANCH", "threads have left the kernel while others wait"),
        ("LEFT_EARLY", "threads have left the kernel while others wait"),
        ("OTHER_BARRIER", "threads wait at different barriers"),
        ("LANE_MISSING", "a warp operation names lane 7, which has left the kernel"),
    ],
)
def test_a_divergent_barrier_is_an_error(run, mistake, message, order):
    code, said, _ = run(mistake, order)
    assert code == ERROR["launch failure"]
    assert message in said and "breakable.cu:" in said and "(block " in said
    assert run(order=order)[0] == 0  # and the next launch is not affected


@pytest.mark.parametrize("size", [{"threads": 1025}, {"threads": 0}, {"blocks": 0}], ids=str)
def test_a_launch_beyond_the_limits_is_refused(run, size):
    code, _, out = run(**size)
    assert code == ERROR["invalid configuration"] and (out == 7).all()
    assert run()[0] == 0


@pytest.fixture(scope="module")
def sanitized(folder):
    """sanitized(library, ...) -> the finished process of under_asan.py."""

    def call(library, *arguments):
        try:
            return build.sanitized(str(library), *arguments)
        except build.Unavailable as exc:
            pytest.skip(f"AddressSanitizer: {exc}")

    return call


@pytest.mark.parametrize(
    "mistake, report",
    [
        ("NONE", None),
        ("ONE_TOO_FAR", "heap-buffer-overflow"),
        ("SHARED_OVERRUN", "heap-buffer-overflow"),
        ("NOT_ALIGNED", "misaligned address"),
    ],
)
def test_a_bad_access_ends_the_process(folder, sanitized, mistake, report):
    done = sanitized(breakable_library(folder, *build.SANITIZE), str(MISTAKES.index(mistake)))
    assert (done.returncode == 0) == (report is None), done.stderr
    if report:
        assert report in done.stderr and "breakable.cu:" in done.stderr


@pytest.mark.slow
def test_kernels_stay_inside_their_buffers(folder, sanitized):
    done = sanitized(build.kernels(folder, *build.SANITIZE))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert int(done.stdout.split()[0]) > 1000, "launches"
