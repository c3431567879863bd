"""What a measurement was made on and with, and how fast that machine copies and multiplies."""

import datetime
import functools
import hashlib
import platform
import re
import statistics
import subprocess
from pathlib import Path

import torch

from bench.timing import once
from landscape_fast import _extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bench", "csrc", "kernels", "landscape_fast")
LOGS_PER_CLOCK = 16  # ex2, lg2 and rcp of one multiprocessor, sm_80 to sm_100


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvidia_smi(field: str) -> str:
    lines = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return lines.splitlines()[0].strip() if lines else ""


def cpu_name() -> str:
    """The processor's name."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def source_hash() -> str:
    """Twelve digits over the files that decide a time: tells builds apart where there is no git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def describe(device: str) -> dict:
    """The part of every row that says where and with what it was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    status = _output("git", "status", "--porcelain", "--", *SOURCES, "setup.py", "pyproject.toml")
    cuda = device == "cuda"
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name(0) if cuda else cpu_name(),
        "isa": _extension.C.cpu_isa() if _extension.C is not None else None,
        "driver": _nvidia_smi("driver_version") or None if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "HEAD") or None,
        "dirty": bool(status),
        "source": source_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def results_file(device: str) -> Path:
    """bench/results/<hardware>.jsonl."""
    slug = re.sub(r"[^a-z0-9]+", "-", describe(device)["hardware"].lower()).strip("-")
    return ROOT / "bench" / "results" / f"{slug}.jsonl"


def clock_mhz() -> int | None:
    """The clock of the GPU's multiprocessors now."""
    value = _nvidia_smi("clocks.sm")
    return int(value) if value.isdigit() else None


def _median_ms(call, device: str, repeats: int) -> float:
    call()
    return statistics.median(once(call, device) for _ in range(repeats))


@functools.cache
def copy_gbs(device: str, quick: bool) -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    size = (64 << 20) if quick else (2 << 30) if device == "cuda" else (512 << 20)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ms = _median_ms(lambda: target.copy_(source), device, 3 if quick else 10)
    return 2 * size / ms / 1e6


@functools.cache
def mm_tflops(device: str, dtype: torch.dtype, quick: bool) -> float:
    """TFLOP/s of a large square matrix product of random normal numbers."""
    n = 256 if quick else 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty(n, n, dtype=dtype, device=device)
    ms = _median_ms(lambda: torch.mm(a, b, out=out), device, 3 if quick else 10)
    return 2 * n**3 / ms / 1e9


def glogs(device: str) -> float | None:
    """1e9 logarithms per second of the GPU's special-function units, from its own numbers."""
    clock = _nvidia_smi("clocks.max.sm") if device == "cuda" else ""
    if not clock.isdigit():
        return None
    units = torch.cuda.get_device_properties(0).multi_processor_count * LOGS_PER_CLOCK
    return units * int(clock) / 1e3


def floor(work, dtype: torch.dtype, device: str, quick: bool) -> dict:
    """Milliseconds below which no implementation goes, from rates measured in this process."""
    rates = {"copy_gbs": round(copy_gbs(device, quick), 1)}
    times = [work.bytes / rates["copy_gbs"] / 1e6]
    if work.flops:
        rate = mm_tflops(device, dtype, quick)
        rates["mm_tflops"] = float(f"{rate:.3g}")  # a few digits: on a loaded CPU it is tiny
        times.append(work.flops / rate / 1e9)
    if work.logs and (rate := glogs(device)):
        rates["glogs"] = round(rate, 1)
        times.append(work.logs / rate / 1e6)
    return {"floor_ms": max(times), "rates": rates}
