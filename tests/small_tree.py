"""Copies of this project to build and install: with its own csrc/, or a small one."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEEP_OUT = shutil.ignore_patterns("__pycache__", "*.so", "_build_failure.txt", "*.egg-info")
BUILD_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md")

# One kernel in three SIMD variants, one in CUDA; the entry points that show_config asks for.
CSRC = {
    "api.h": """
#pragma once
namespace landscape_fast {
int width();
const char* cpu_isa();
#ifdef LSF_WITH_CUDA
int fill(float*, int, void*);
int cuda_runtime_version();
#endif
}  // namespace landscape_fast
""",
    "cpu/width.h": """
#pragma once
namespace landscape_fast {
namespace baseline { int width(); }
namespace avx2 { int width(); }
namespace avx512 { int width(); }
}  // namespace landscape_fast
""",
    "cpu/width_simd.cpp": """
#include "cpu/width.h"
namespace landscape_fast {
namespace LSF_ISA {
int width() {
#if defined(__AVX512VL__)
  return 512;
#elif defined(__AVX2__)
  return 256;
#else
  return 128;
#endif
}
}  // namespace LSF_ISA
}  // namespace landscape_fast
""",
    "cpu/width.cpp": """
#include "cpu/width.h"

#include "api.h"
#include "cpu/isa.h"
namespace landscape_fast {
const char* cpu_isa() { return isa_name(isa()); }
int width() {
#ifdef LSF_X86_VARIANTS
  if (isa() == Isa::avx512) return avx512::width();
  if (isa() == Isa::avx2) return avx2::width();
#endif
  return baseline::width();
}
}  // namespace landscape_fast
""",
    "cuda/fill.cu": """
#include <cuda_runtime.h>

#include "api.h"
namespace landscape_fast {
__global__ void fill_kernel(float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 1.0f;
}
int fill(float* out, int n, void* stream) {
  fill_kernel<<<(n + 255) / 256, 256, 0, (cudaStream_t)stream>>>(out, n);
  return (int)cudaGetLastError();
}
int cuda_runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}
}  // namespace landscape_fast
""",
    "module.cpp": """
#include <pybind11/pybind11.h>

#include "api.h"
PYBIND11_MODULE(_C, m) {
  m.attr("build_info") = LSF_BUILD_INFO;
  m.def("width", &landscape_fast::width);
  m.def("cpu_isa", &landscape_fast::cpu_isa);
#ifdef LSF_WITH_CUDA
  m.attr("with_cuda") = true;
  m.def("cuda_runtime_version", &landscape_fast::cuda_runtime_version);
  m.def("cuda_driver_version", [] { return 0; });
#else
  m.attr("with_cuda") = false;
#endif
}
""",
}

ASK = """
import json
import landscape_fast.kernels._launch as launch
from landscape_fast import _extension as e
c = e.C
print(json.dumps({
    "package": e.__file__, "kernels": launch.__file__,
    "error": e.error, "with_cuda": e.with_cuda, "file": c and c.__file__,
    "info": c and json.loads(c.build_info), "isa": c and c.cpu_isa(),
    "width": c.width() if hasattr(c, "width") else None,
}))
"""


def copy_project(to: Path) -> Path:
    """Everything a source distribution is made from, csrc/ included; no build products."""
    to.mkdir(parents=True, exist_ok=True)
    for name in (*BUILD_FILES, "Makefile", "constraints.txt"):
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, to / name)
    for name in ("tools", "kernels", "csrc", "landscape_fast"):
        shutil.copytree(ROOT / name, to / name, ignore=KEEP_OUT)
    return to


def small_project(to: Path) -> Path:
    """The project with a csrc/ of a few lines."""
    copy_project(to)
    shutil.rmtree(to / "csrc")
    for name, text in CSRC.items():
        path = to / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))
    shutil.copy2(ROOT / "csrc" / "cpu" / "isa.h", to / "csrc" / "cpu" / "isa.h")
    return to


def environment(**changes) -> dict:
    """This process's environment with those values, without the switches of a build.

    A developer's own settings must not reach the tests.
    """
    names = ("LANDSCAPE_FAST_", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "LDFLAGS", "CUDA_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    env.pop("PYTHONPATH", None)
    env.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    return {**env, **{name: str(value) for name, value in changes.items()}}


def python(*arguments, cwd: Path, executable: str = sys.executable, **env):
    """Runs Python there and returns the finished process, output as text."""
    return subprocess.run(
        [executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
    )


def ask(cwd: Path, **options) -> dict:
    """What the package that is found there says of itself and its extension."""
    done = python("-c", ASK, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build(tree: Path, **env):
    """`setup.py build_ext --inplace` there: the finished process, stderr appended to stdout."""
    done = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, **env)
    done.stdout += done.stderr
    return done


def compiled(done) -> list[str]:
    """The objects that a build made anew, by name."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("landscape_fast: ")]
    return sorted(line.split()[1] for line in lines if ".o from " in line)
