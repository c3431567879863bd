"""Builds landscape_fast._C from csrc/ (the metadata is in pyproject.toml, the steps in tools/).

torch is never imported: the extension takes raw pointers, so one build serves every torch. A C++17
compiler and pybind11 are enough; where nvcc is found it is called directly, and the CUDA runtime is
linked statically. Without a compiler the package still installs, says so, and keeps the reason in
landscape_fast/_build_failure.txt, which `landscape-fast show-config` prints.

    LANDSCAPE_FAST_CUDA=auto|0|1     CUDA kernels where nvcc is found | never | or fail
    LANDSCAPE_FAST_REQUIRE_EXT=1     whatever does not build is an error
    TORCH_CUDA_ARCH_LIST             "8.0;9.0a;10.0+PTX", in torch's syntax
    CUDA_HOME, CUDA_PATH             where nvcc is, before PATH and /usr/local/cuda
    CXX, CXXFLAGS, LDFLAGS           the C++ compiler and extra flags for it
    MAX_JOBS                         compile steps at a time
"""
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from extension import CSRC, Build, find_cuda  # noqa: E402
from toolchain import BuildProblem, CudaProblem, switch  # noqa: E402

FAILURE = "_build_failure.txt"


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:
            # build/ outlives a build and is installed whole: deleted modules would come back.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    """Replaces the steps of setuptools by those of tools/extension.py."""

    def run(self):
        self.problem, self.built = "", False
        super().run()
        if self.inplace:  # the steps ran in build/, and setuptools copied what there was
            if not self.built:
                Path(self.get_ext_fullpath(self.extensions[0].name)).unlink(missing_ok=True)
            self._leave_problem(ROOT / "landscape_fast")

    def build_extension(self, ext):
        require = switch("LANDSCAPE_FAST_REQUIRE_EXT", ("0", "1")) == "1"
        mode = switch("LANDSCAPE_FAST_CUDA", ("auto", "0", "1"))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # if the build fails, no older one must stand in for it
        try:
            self._build(target, mode, may_lack_cuda=mode == "auto" and not require)
            self.built = True
        except BuildProblem as exc:
            self.problem = f"landscape_fast: the C++ extension was not built: {exc}"
            if require or mode == "1":
                raise SystemExit(self.problem) from exc
        self._leave_problem(target.parent)
        if self.problem:
            bar = "*" * 78
            print(f"\n{bar}\n{self.problem}\n{bar}\n", file=sys.stderr, flush=True)

    def _build(self, target, mode, may_lack_cuda):
        # Not self.build_temp, which an editable installation throws away.
        temp = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        try:
            build = Build(temp, *find_cuda(mode))
            compiled = build.run(target)
        except CudaProblem as exc:
            if not may_lack_cuda:
                raise
            self.problem = f"landscape_fast: built without its CUDA kernels: {exc}"
            build = Build(temp, None, "nvcc failed")
            compiled = build.run(target)
        about = build.info()
        cuda = f"CUDA {about['nvcc']} for {' '.join(about['archs'])}" if build.cuda else "no CUDA"
        print(f"landscape_fast: built {target.name}: {compiled} steps, {about['cxx']}, {cuda}")

    def _leave_problem(self, folder):
        """Keeps the reason of a failed build where the installed package finds it."""
        note = folder / FAILURE
        note.unlink(missing_ok=True)
        if self.problem:
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(self.problem + "\n")


if __name__ == "__main__":
    sources = sorted(CSRC.rglob("*.cpp"))
    setup(
        packages=[*find_packages(str(ROOT), include=["landscape_fast*"]), "landscape_fast.kernels"],
        ext_modules=[
            Extension(
                "landscape_fast._C",
                [str(path.relative_to(ROOT)) for path in sources],
                optional=True,  # setuptools must not look for a library that was not built
            )
        ],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
