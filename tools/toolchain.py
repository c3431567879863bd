"""The compilers that setup.py uses, and what they can build. Standard library only; no torch."""
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

# A binary per family the kernels are tuned for, and code that newer GPUs compile when they load it.
ARCHS = "8.0+PTX;9.0a;10.0"
OLDEST_ARCH = 80
NAMED_ARCHS = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX"}  # as torch has them


class BuildProblem(Exception):
    """Why the extension cannot be built here."""


class CudaProblem(BuildProblem):
    """Why its CUDA kernels cannot be built here; the rest still can."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: its nvcc, what to compile for, and the folder of libcudart_static.a."""

    nvcc: str
    version: str
    archs: list[str]  # "sm_80"; "compute_80" for the code that is compiled at load
    library: Path


def output_of(command: list[str], cwd: Path | None = None) -> str:
    """stdout and stderr of a command; a BuildProblem with both if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=cwd)
    except OSError as exc:
        raise BuildProblem(f"{command[0]} does not start: {exc}") from exc
    text = done.stdout + done.stderr
    if done.returncode:
        raise BuildProblem(f"{shlex.join(command)}\nexit status {done.returncode}\n{text}")
    return text


def switch(name: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment variable; the first allowed one where it is unset or empty."""
    value = os.environ.get(name, "") or allowed[0]
    if value not in allowed:
        raise SystemExit(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def jobs() -> int:
    """How many compile steps may run at a time: MAX_JOBS, or the CPUs this process may use."""
    value = os.environ.get("MAX_JOBS", "")
    if not value:
        affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not value.isdigit() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive integer; got {value!r}")
    return int(value)


def find_cxx() -> list[str]:
    """The C++ compiler, as the start of a command line."""
    if os.name != "posix":
        raise BuildProblem("the extension is built on Linux and macOS only")
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildProblem(f"CXX names {command[0]!r}, which is not there")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildProblem("no C++ compiler on PATH; install one (Debian, Ubuntu: apt install g++)")


def compiles(cxx: list[str], flags: list[str], code: str = "int f() { return 0; }") -> bool:
    """Whether `code` becomes a shared library under these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        target = str(Path(folder, "probe.so"))
        try:
            output_of([*cxx, *flags, "-shared", "-fPIC", str(source), "-o", target])
        except BuildProblem:
            return False
    return True


def has_openmp(cxx: list[str]) -> bool:
    code = "#include <omp.h>\nint f() { return omp_in_parallel(); }"
    return compiles(cxx, ["-fopenmp"], code)


def python_includes() -> list[str]:
    """The folders of Python.h and of pybind11."""
    try:
        import pybind11
    except ImportError as exc:
        raise BuildProblem("pybind11 is not installed; pip install 'pybind11>=3'") from exc
    paths = dict.fromkeys((sysconfig.get_path("include"), sysconfig.get_path("platinclude")))
    if not any(Path(path, "Python.h").is_file() for path in paths):
        raise BuildProblem(
            f"Python.h is not in {' or '.join(paths)}; install Python's headers "
            "(Debian, Ubuntu: apt install python3-dev)"
        )
    return [pybind11.get_include(), *paths]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, the first that is there."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and Path(home, "bin", "nvcc").is_file():
            return str(Path(home, "bin", "nvcc"))
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def cuda_toolkit(nvcc: str) -> Cuda:
    """What nvcc says of its toolkit: `nvcc` itself may be a script that lies somewhere else."""
    dry = output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    found = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    top = Path(found[1].strip() if found else Path(nvcc).resolve().parent.parent).resolve()
    folders = [home / sub for home in (top, *top.glob("targets/*")) for sub in ("lib64", "lib")]
    library = next((path for path in folders if (path / "libcudart_static.a").is_file()), None)
    if library is None:
        raise BuildProblem(f"libcudart_static.a is not below {top}, the toolkit of {nvcc}")
    version = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    known = re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"]))
    archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), set(map(int, known)))
    return Cuda(nvcc, version[1] if version else "unknown", archs, library)


def choose_archs(wish: str, known: set[int]) -> list[str]:
    """nvcc's names for the architectures of `wish`, in torch's syntax; the default ones without.

    Left out are those below 8.0 and those this nvcc does not know. To the default ones come the
    GPUs of this machine.
    """
    for name, value in NAMED_ARCHS.items():
        wish = wish.replace(name, value)
    default = not wish.strip()
    archs = []
    for entry in (ARCHS if default else wish).replace(";", " ").split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            rule = "TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 10.0+PTX"
            raise BuildProblem(f"{rule}; got {entry!r}")
        number = int(found[1] + found[2])
        if number in known and number >= OLDEST_ARCH:
            archs.append(f"sm_{number}{found[3]}")
            archs += [f"compute_{number}{found[3]}"] if found[4] else []
    if not archs:
        raise BuildProblem(f"nvcc knows none of the architectures {wish or ARCHS!r} from 8.0 on")
    if default:
        archs += [f"sm_{gpu}" for gpu in visible_gpus() if gpu in known and not runs_on(archs, gpu)]
    return list(dict.fromkeys(archs))


def runs_on(archs: list[str], gpu: int) -> bool:
    """Whether a binary among `archs` runs on compute capability `gpu` (90 for 9.0).

    A binary runs on the same major version from its minor one on; an "a" binary on its own only.
    """
    for arch in archs:
        found = re.fullmatch(r"sm_(\d+)([af]?)", arch)
        number = int(found[1]) if found else -1
        if number == gpu or (found and not found[2] and number // 10 == gpu // 10 and number < gpu):
            return True
    return False


def visible_gpus() -> list[int]:
    """Compute capabilities of this machine's GPUs from 8.0 on, as 80 or 90; [] without a driver."""
    try:
        text = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except BuildProblem:
        return []
    found = re.findall(r"^(\d+)\.(\d)$", text, re.MULTILINE)
    return sorted({int(a + b) for a, b in found if int(a + b) >= OLDEST_ARCH})


def gencode(archs: list[str]) -> list[str]:
    """The nvcc flags for `archs`."""
    return [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs]
