"""compute-sanitizer over every op: bounds, races, uninitialised reads, barriers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
KERNELS = ("combine", "gram", "ensemble", "hyper_batch", "sum_parts", "pairwise", "member_batch")
KERNELS += ("subspace", "perturb", "anchor_step", "landscape_fast")


@pytest.mark.parametrize("check", CHECKS)
def test_compute_sanitizer_finds_nothing(check):
    """Every tensor is an allocation of its own, so that overruns do not hide in a pool."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = [tool, f"--tool={check}", "--error-exitcode=9", "--report-api-errors=no"]
    command += ["--target-processes=application-only"]
    for name in KERNELS:  # library kernels have findings of their own, and would take most time
        command += ["--kernel-name", f"kernel_substring={name}"]
    script = Path(__file__).with_name("sanitized.py")
    got = subprocess.run(
        [*command, sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    output = got.stdout + got.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert got.returncode == 0, output[-4000:]
    assert "sanitized: all ops ran" in output, output[-4000:]
