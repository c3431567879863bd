"""Builds the CUDA kernels for the CPU: g++ compiles csrc/cuda/*.cu against the shim in this folder.

Objects are kept by a key of all they depend on, so that only what changed is compiled again.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "tools"))
from toolchain import find_nvcc  # noqa: E402

KERNELS = sorted(CSRC.glob("cuda/*.cu"))
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-DLSF_WITH_CUDA", *WARNINGS]
SANITIZE = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all"]


class Unavailable(Exception):
    """Why the kernels cannot be built here."""


def cuda_headers() -> Path:
    """The folder of cuda_runtime.h: in a toolkit, else in Triton, which ships the headers too."""
    candidates = []
    if found := find_nvcc():  # it may be a script that lies somewhere else: ask it
        dry = [found, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        said = subprocess.run(dry, capture_output=True, text=True).stderr
        candidates += [Path(top, "include") for top in re.findall(r"^#\$ TOP=(.+)$", said, re.M)]
    if triton := importlib.util.find_spec("triton"):
        candidates.append(Path(triton.origin).parent / "backends/nvidia/include")
    for folder in candidates:
        if all((folder / name).is_file() for name in ("cuda_runtime.h", "cuda_bf16.h")):
            return folder.resolve()
    raise Unavailable("no cuda_runtime.h, neither in a CUDA toolkit nor in an installed Triton")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        raise Unavailable("no g++")
    return found


def library(folder: Path, name: str, sources: list[Path], *extra: str) -> Path:
    """lib<name>-<key>.so in `folder` from `sources`, compiled and linked with the flags `extra`."""
    includes = [f"-I{CSRC}", f"-I{HERE}", f"-isystem{cuda_headers()}"]
    command = [compiler(), *FLAGS, *extra, *includes]
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *HERE.glob("*.h")])
    shared = _key(" ".join(command), *(path.read_bytes() for path in headers))
    objects = [folder / f"{s.stem}-{_key(shared, str(s), s.read_bytes())}.o" for s in sources]
    target = folder / f"lib{name}-{_key(*map(str, objects))}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(pair):
        source, output = pair
        if not output.is_file():
            new = output.with_suffix(f".{os.getpid()}.o")
            _run([*command, "-x", "c++", "-c", str(source), "-o", str(new)])
            os.replace(new, output)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    new = target.with_suffix(f".{os.getpid()}.so")
    _run([compiler(), "-shared", *extra, *map(str, objects), "-o", str(new)])
    os.replace(new, target)
    return target


def kernels(folder: Path, *extra: str) -> Path:
    """The library of all kernels with the C entry points of entries.cpp."""
    sources = [*KERNELS, HERE / "entries.cpp", HERE / "switches.cpp"]
    return library(folder, "kernels", sources, *extra)


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    """under_asan.py with `arguments` in a process that AddressSanitizer watches."""
    asked = [compiler(), "-print-file-name=libasan.so"]
    runtime = Path(subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    if not runtime.is_absolute():
        raise Unavailable("the compiler has no libasan.so")
    env = {**os.environ, "LD_PRELOAD": str(runtime), "PYTHONMALLOC": "malloc"}
    env["ASAN_OPTIONS"] = "detect_leaks=0"
    command = [sys.executable, str(HERE / "under_asan.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
