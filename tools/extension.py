"""How landscape_fast._C is compiled: which steps there are, which are out of date, and the link.

A step is out of date when its source, any header, its command, the compiler or the environment the
compiler reads has changed since its object was written. Time stamps play no part.
"""
import hashlib
import json
import os
import platform
import re
import runpy
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from toolchain import (
    BuildProblem,
    Cuda,
    CudaProblem,
    compiles,
    cuda_toolkit,
    find_cxx,
    find_nvcc,
    gencode,
    has_openmp,
    jobs,
    output_of,
    python_includes,
)

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# Nothing here lets a compiler reorder sums or drop NaN: results must not depend on its mood.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
CXX_FLAGS += ["-fno-trapping-math", "-Wall"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DLSF_WITH_CUDA"]
ISA_FLAGS = {  # *_simd.cpp is compiled once for each; csrc/cpu/isa.h chooses at run time
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
LOAD = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
# What compilers read from the environment, beside their command line.
COMPILER_ENV = ["CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH"]
COMPILER_ENV += ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"]


@dataclass(frozen=True)
class Step:
    """One compiler call, run in ROOT: `command` makes `output` from `source`.

    Sources and include folders are relative, so that objects are good wherever the tree lies.
    """

    source: Path
    output: Path
    command: list[str]
    compiler: str  # its version


class Build:
    """The compile and link steps of the extension, with CUDA or (`cuda` None) without it.

    Objects, and beside each the key it was built under, are kept in `temp`.
    """

    def __init__(self, temp: Path, cuda: Cuda | None, without_cuda: str = ""):
        self.temp, self.cuda, self.without_cuda = temp, cuda, without_cuda
        self.cxx = find_cxx()
        self.cxx_version = output_of([*self.cxx, "--version"]).splitlines()[0]
        self.openmp = has_openmp(self.cxx)
        self.isas = {"baseline": []}
        if platform.machine() in ("x86_64", "AMD64") and all(
            compiles(self.cxx, flags) for flags in ISA_FLAGS.values()
        ):
            self.isas = ISA_FLAGS
        self.flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *CXX_FLAGS]
        self.flags += ["-fopenmp"] if self.openmp else ["-Wno-unknown-pragmas"]
        self.flags += ["-DLSF_X86_VARIANTS"] if len(self.isas) > 1 else []
        self.flags += ["-DLSF_WITH_CUDA"] if cuda else []

    def info(self) -> dict:
        """What the module says of its build, as JSON, in `_C.build_info`."""
        project = (ROOT / "pyproject.toml").read_text()
        sources = runpy.run_path(str(ROOT / "landscape_fast" / "_sources.py"))
        return {
            "version": re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1],
            "sources": sources["source_hash"](CSRC),
            "cxx": self.cxx_version.encode("ascii", "replace").decode(),
            "flags": " ".join(self.flags),
            "openmp": self.openmp,
            "isa": list(self.isas),
            "nvcc": self.cuda.version if self.cuda else None,
            "archs": self.cuda.archs if self.cuda else [],
            "without_cuda": self.without_cuda.encode("ascii", "replace").decode(),
        }

    def steps(self) -> list[Step]:
        """Every compile step; those of nvcc, the longest, first."""
        if not (CSRC / "module.cpp").is_file():
            raise BuildProblem(f"{CSRC / 'module.cpp'} is missing: the sources are incomplete")
        cxx = [*self.cxx, *self.flags, "-iquotecsrc", *(f"-isystem{p}" for p in python_includes())]
        # json.dumps twice: the text, then the text as a C string literal.
        about = f"-DLSF_BUILD_INFO={json.dumps(json.dumps(self.info()))}"
        steps = []
        for source in cuda_sources() if self.cuda else []:
            nvcc = [self.cuda.nvcc, *NVCC_FLAGS, *gencode(self.cuda.archs)]
            nvcc.append("-Xcompiler=-iquotecsrc")
            steps.append(self._step(source, nvcc, self.cuda.version))
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            variants = self.isas.items() if source.stem.endswith("_simd") else [("", [])]
            for isa, flags in variants:
                command = [*cxx, *flags, *([f"-DLSF_ISA={isa}"] if isa else [])]
                steps.append(self._step(source, command, self.cxx_version, isa))
        steps.append(self._step(CSRC / "module.cpp", [*cxx, about], self.cxx_version))
        return steps

    def _step(self, source: Path, command: list[str], compiler: str, variant: str = "") -> Step:
        name = f"{source.stem}-{variant}.o" if variant else f"{source.stem}.o"
        output = self.temp / source.parent.name / name
        return Step(source.relative_to(ROOT), output, command, compiler)

    def run(self, target: Path) -> int:
        """Brings every object up to date, links `target`, and returns how many were compiled."""
        import fcntl  # POSIX only, as find_cxx is

        steps = self.steps()
        self.temp.mkdir(parents=True, exist_ok=True)
        with open(self.temp / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree take turns
            stale = [step for step in steps if not is_fresh(step)]
            with ThreadPoolExecutor(jobs()) as pool:
                list(pool.map(compile_step, stale))
            self.link([step.output for step in steps], target)
        return len(stale)

    def link(self, objects: list[Path], target: Path) -> None:
        kind = ["-shared"]
        if sys.platform == "darwin":
            kind = ["-bundle", "-undefined", "dynamic_lookup"]
        libraries = shlex.split(os.environ.get("LDFLAGS", ""))
        libraries += ["-fopenmp"] if self.openmp else []
        if self.cuda:
            libraries += [f"-L{self.cuda.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = target.with_name(f"{target.name}.new")
        output_of([*self.cxx, *kind, *map(str, objects), *libraries, "-o", str(linked)])
        try:  # every symbol must be there now, not at the first import
            output_of([sys.executable, "-c", LOAD, str(linked)])
        except BuildProblem as exc:
            linked.unlink()
            raise (CudaProblem if self.cuda else BuildProblem)(f"it does not load: {exc}") from exc
        os.replace(linked, target)  # a process may have the old one mapped: never write into it


def cuda_sources() -> list[Path]:
    return sorted(CSRC.glob("cuda/*.cu"))


def find_cuda(mode: str) -> tuple[Cuda | None, str]:
    """The toolkit to use under LANDSCAPE_FAST_CUDA=`mode`; without one, None and the reason."""
    if mode == "0":
        return None, "LANDSCAPE_FAST_CUDA=0"
    nvcc = find_nvcc()
    if nvcc and cuda_sources():
        try:
            return cuda_toolkit(nvcc), ""
        except BuildProblem as exc:
            raise CudaProblem(str(exc)) from exc
    reason = "nvcc is not in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    if nvcc:
        reason = f"{CSRC / 'cuda'} holds no .cu file: the sources are incomplete"
    if mode == "1":
        raise CudaProblem(f"LANDSCAPE_FAST_CUDA=1, but {reason}")
    return None, reason


def key_of(step: Step) -> str:
    """Changes whenever the object may have to change."""
    headers = sorted(CSRC.rglob("*.h"))
    files = [
        (path.relative_to(ROOT).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (ROOT / step.source, *headers)
    ]
    env = [os.environ.get(name) for name in COMPILER_ENV]
    # Under build isolation pybind11 has another folder every time: its version stands for it.
    command = [part for part in step.command if not part.startswith("-isystem")]
    parts = [command, step.compiler, pybind11_version(), sys.version, files, env]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def pybind11_version() -> str:
    import pybind11

    return pybind11.__version__


def is_fresh(step: Step) -> bool:
    key = step.output.with_suffix(".key")
    return step.output.is_file() and key.is_file() and key.read_text() == key_of(step)


def compile_step(step: Step) -> None:
    step.output.parent.mkdir(parents=True, exist_ok=True)
    key = step.output.with_suffix(".key")
    key.unlink(missing_ok=True)
    wanted = key_of(step)
    print(f"landscape_fast: {step.output.name} from {step.source}\n", end="", flush=True)
    try:
        text = output_of([*step.command, "-c", str(step.source), "-o", str(step.output)], cwd=ROOT)
    except BuildProblem as exc:
        if step.source.suffix == ".cu":
            raise CudaProblem(str(exc)) from exc
        raise
    if text.strip():
        print(text, flush=True)
    key.write_text(wanted)  # last: an interrupted step must not be taken for a finished one
