"""Every CUDA kernel compiles for every architecture, without spills, to the code it should be."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_on_cpu.build import CSRC, KERNELS

from extension import NVCC_FLAGS  # isort: skip  (cuda_on_cpu.build puts tools/ on the path)
from toolchain import find_nvcc, gencode  # isort: skip

ARCHS = ("sm_80", "sm_90a", "sm_100")
SHARED = 48 * 1024  # bytes that a block gets without asking for more
pytestmark = pytest.mark.slow


class Kernel(NamedTuple):
    """What nvcc made of one kernel."""

    file: str
    name: str
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes per block that are known when it is compiled
    sass: str | None  # None without cuobjdump


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    shipped = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(shipped) if shipped and shipped.is_file() else shutil.which("cuobjdump")


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names -> `kernel<arguments>` where c++filt is there to tell."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for line in said.stdout.splitlines():
        line = re.sub(r"landscape_fast::|\(anonymous namespace\)::|\((int|bool)\)", "", line)
        short.append(re.sub(r"^void |\(.*$", "", line))
    return dict(zip(names, short, strict=True))


def compiled(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """The kernels of a file; kept in `folder` by a key of what they depend on."""
    cubin_flags = ["-Xptxas=-v", "-cubin", *gencode([arch])]
    command = [find_nvcc(), *NVCC_FLAGS, *cubin_flags, f"-I{CSRC}", str(source)]
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h")])
    digest = hashlib.sha256(" ".join(command).encode())
    for path in [source, *headers]:
        digest.update(path.read_bytes())
    cubin = folder / f"{source.stem}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.is_file():
        new = cubin.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(new, cubin)
        log.write_text(done.stdout + done.stderr)
    code = {}
    if tool := cuobjdump():
        dump = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
        code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump, re.DOTALL))
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    kernels = []
    for name, stack, *spills, registers, rest in re.findall(pattern, log.read_text(), re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = int(registers), int(stack), sum(map(int, spills)), int(shared[1]) if shared else 0
        kernels.append(Kernel(source.name, name, *numbers, code.get(name)))
    names = readable([kernel.name for kernel in kernels])
    return [kernel._replace(name=names[kernel.name]) for kernel in kernels]


@pytest.fixture(scope="module")
def kernels(request) -> dict[str, list[Kernel]]:
    """arch -> its kernels."""
    if find_nvcc() is None:
        pytest.skip("nvcc is not in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
    folder = request.config.cache.mkdir("nvcc")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [(a, [pool.submit(compiled, s, a, folder) for s in KERNELS]) for a in ARCHS]
        return {arch: [k for job in found for k in job.result()] for arch, found in jobs}


def test_table(kernels, capsys):
    """Printed on every run: what the kernels take on GPUs that are not here."""
    heads = "".join(f"{arch:>18}" for arch in ARCHS)
    lines = [f"{'registers/bytes spilled/shared bytes':64}{heads}"]
    for versions in zip(*kernels.values(), strict=True):
        cells = "".join(f"{f'{k.registers}/{k.spills}/{k.shared}':>18}" for k in versions)
        lines.append(f"{versions[0].name[:63]:64}{cells}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_every_kernel_of_every_file_is_there(kernels):
    for found in kernels.values():
        for source in KERNELS:
            text = source.read_text()
            declared = set(re.findall(r"__global__.*?\b(\w+_kernel)\(", text, re.DOTALL))
            got = {k.name.partition("<")[0] for k in found if k.file == source.name}
            assert declared <= got, source.name


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_fits(kernels, arch):
    bad = [
        k._replace(sass=None)
        for k in kernels[arch]
        if k.stack or k.spills or k.registers > 255 or k.shared > SHARED
    ]
    assert kernels[arch] and not bad


def test_every_kernel_has_launch_bounds():
    """Without them, registers times threads may exceed what a multiprocessor has."""
    for path in [*KERNELS, *CSRC.glob("cuda/*.h")]:
        text = path.read_text()
        bounded = len(re.findall(r"__global__ void __launch_bounds__\(", text))
        assert bounded == text.count("__global__"), path.name


def count(kernel: Kernel, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", kernel.sass))


@pytest.fixture(params=ARCHS)
def disassembled(kernels, request) -> list[Kernel]:
    if cuobjdump() is None:
        pytest.skip("cuobjdump is neither in Triton nor in PATH")
    return kernels[request.param]


def named(kernels: list[Kernel], pattern: str) -> list[Kernel]:
    found = [k for k in kernels if re.match(pattern, k.name)]
    assert found, pattern
    return found


def test_no_float_is_added_atomically(disassembled):
    """Sums that depend on the order of threads would differ from run to run."""
    for k in disassembled:
        assert not re.search(r"\b(ATOM|ATOMS|ATOMG|RED|REDG)\.\S*F(16|32|64)", k.sass), k.name


def test_js_takes_one_logarithm_per_pair(disassembled):
    """A tile of 16 members has 120 pairs, one of 16 with 8 others 128: one instruction for each."""
    (js,) = named(disassembled, r"pair_tiles_kernel<JsOp>")
    assert count(js, r"MUFU\.LG2") == 120 + 128


def test_kl_needs_no_special_function_per_pair(disassembled):
    (kl,) = named(disassembled, r"pair_tiles_kernel<KlOp>")
    assert count(kl, r"MUFU\.(LG2|EX2)") == 0


def test_kl_of_many_members_multiplies_on_tensor_cores(disassembled):
    """16 by 8 members and 16 classes in one instruction, three times: high and low parts."""
    tiles = {16: 1 * 2, 32: 1 * 4, 64: 2 * 4, 128: 2 * 8}
    for k in named(disassembled, r"kl_product_kernel<"):
        members = int(re.search(r"<(\d+)", k.name)[1])
        assert count(k, r"HMMA\.16816\.F32\S*") == 3 * tiles[members], k.name
        assert count(k, r"LDSM\S*") > 0, k.name


def test_summary_takes_one_exponential_per_logit(disassembled):
    for held in (16, 32):
        (summary,) = named(disassembled, rf"summary_kernel<{held}>")
        assert count(summary, r"MUFU\.EX2") == held + 1  # the target's once more


def test_combine_reads_each_anchor_once_16_bytes_at_a_time(disassembled):
    for kmax in (4, 8):
        for k in named(disassembled, rf"combine_kernel<\w+, {kmax}, \d+>"):
            assert count(k, r"LDG\.E\.128\S*") == kmax  # all before the loop over members
            assert count(k, r"STG\.E\.128") >= 1


def test_backward_reads_and_writes_16_bytes_at_a_time(disassembled):
    for kmax in (4, 8):
        for k in named(disassembled, rf"combine_backward_kernel<\w+, {kmax}, \d+>"):
            assert count(k, r"LDG\.E\.128\S*") == kmax + 32 // kmax  # anchors, dweights of a group
            assert count(k, r"STG\.E\.128") >= kmax


def test_halo_convolutions_multiply_on_tensor_cores(disassembled):
    """16-bit operands come by matrices; a step is 9 taps, or 8 rows of pixels in a loop."""
    for name in ("subspace_conv2d_kernel", "subspace_conv2d_weight_kernel"):
        for k in named(disassembled, rf"{name}<"):
            single = "<float" in k.name  # not bfloat16
            assert count(k, r"HMMA\.1688\S*" if single else r"HMMA\.16816\S*") >= 6, k.name
            assert (count(k, r"LDSM\S*") > 0) != single, k.name
            assert count(k, r"LDG\.E\.128\S*") >= 1 and count(k, "FFMA") == 0, k.name


def test_perturb_reads_and_writes_16_bytes_at_a_time(disassembled):
    for k in named(disassembled, r"perturb_kernel<"):
        assert count(k, r"LDG\.E\.128\S*") >= 1 and count(k, r"STG\.E\.128") >= 1, k.name


@pytest.mark.parametrize("name", ["row_stats_kernel", "labels_kernel", "summary_kernel"])
def test_rows_are_read_16_bytes_at_a_time(disassembled, name):
    for k in named(disassembled, name):
        assert count(k, r"LDG\.E\.128\S*") >= 8, k.name  # four of float32, two of each other dtype
