"""The build of the extension: what it needs, what it does without, and when it compiles again."""
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_tree import ASK, ROOT, ask, build, compiled, python, small_project

pytest.importorskip("pybind11")
pytest.importorskip("setuptools")
sys.path.insert(0, str(ROOT / "tools"))
import extension  # noqa: E402
import toolchain  # noqa: E402

CXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.slow
needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")
@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small project, built without CUDA."""
    tree = small_project(tmp_path_factory.mktemp("built") / "tree")
    done = build(tree, LANDSCAPE_FAST_CUDA=0)
    assert done.returncode == 0, done.stdout
    return tree


@pytest.fixture
def tree(built, tmp_path):
    """A copy of it; objects are good wherever the tree lies."""
    return Path(shutil.copytree(built, tmp_path / "tree"))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_cxx
class TestSteps:
    def test_nothing_is_compiled_twice(self, tree):
        assert compiled(build(tree, LANDSCAPE_FAST_CUDA=0)) == []

    def test_a_header_makes_everything_stale(self, tree):
        with open(tree / "csrc" / "api.h", "a") as header:
            header.write("// changed\n")
        simd = ["width_simd-avx2.o", "width_simd-avx512.o", "width_simd-baseline.o"]
        if platform.machine() not in ("x86_64", "AMD64"):
            simd = simd[2:]
        again = compiled(build(tree, LANDSCAPE_FAST_CUDA=0))
        assert again == sorted(["module.o", "width.o", *simd])

    def test_a_source_makes_its_object_stale_whatever_its_time(self, tree):
        source = tree / "csrc" / "cpu" / "width.cpp"
        source.write_text(source.read_text() + "// changed\n")
        os.utime(source, (0, 0))
        # module.o too: it holds the hash of the sources
        assert compiled(build(tree, LANDSCAPE_FAST_CUDA=0)) == ["module.o", "width.o"]

    def test_a_flag_makes_everything_stale(self, tree):
        done = build(tree, LANDSCAPE_FAST_CUDA=0, CXXFLAGS="-DSOMETHING")
        assert "width.o" in compiled(done) and "module.o" in compiled(done)

    def test_an_interrupted_step_is_done_again(self, tmp_path, monkeypatch):
        """Also if the sources are then again what they were: its object may be half written."""
        source = ROOT / "csrc" / "cpu" / "isa.h"
        step = extension.Step(source, tmp_path / "isa.o", ["c++"], "1.0")
        monkeypatch.setattr(extension, "output_of", lambda command, cwd: step.output.touch() or "")
        extension.compile_step(step)
        assert extension.is_fresh(step)

        def interrupted(command, cwd):
            raise KeyboardInterrupt

        monkeypatch.setattr(extension, "output_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extension.compile_step(step)
        assert not extension.is_fresh(step)

    def test_deleted_modules_do_not_come_back(self, tree):
        python("setup.py", "-q", "build_py", cwd=tree)
        folder = next(tree.glob("build/lib*/landscape_fast"))
        (folder / "old.py").write_text("")
        assert (folder / "kernels" / "_launch.py").is_file()
        python("setup.py", "-q", "build_py", cwd=tree)
        assert not (folder / "old.py").exists()

    def test_torch_is_never_imported(self, tree, tmp_path):
        fake = tmp_path / "fake" / "torch.py"
        fake.parent.mkdir()
        fake.write_text("raise SystemExit('torch was loaded')")
        shutil.rmtree(tree / "build")
        done = build(tree, LANDSCAPE_FAST_CUDA=0, PYTHONPATH=fake.parent)
        assert done.returncode == 0 and "torch was loaded" not in done.stdout

    def test_the_module_says_how_it_was_built(self, tree):
        said = ask(tree)
        assert said["error"] is None and said["with_cuda"] is False
        assert said["info"]["nvcc"] is None and said["info"]["archs"] == []
        assert said["info"]["without_cuda"] == "LANDSCAPE_FAST_CUDA=0"
        sources = extension.runpy.run_path(str(ROOT / "landscape_fast" / "_sources.py"))
        assert said["info"]["sources"] == sources["source_hash"](tree / "csrc")

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="variants exist on x86-64 only")
    def test_each_variant_is_compiled_for_its_own_isa(self, tree):
        best = ask(tree)
        widths = {"baseline": 128, "avx2": 256, "avx512": 512}
        assert best["width"] == widths[best["isa"]]
        for isa, width in widths.items():
            said = ask(tree, LANDSCAPE_FAST_ISA=isa)
            # a wish above what this CPU has gives the best it has
            assert said["width"] == min(width, best["width"])
        done = python("-c", ASK, cwd=tree, LANDSCAPE_FAST_ISA="sse9")
        assert "LANDSCAPE_FAST_ISA must be baseline, avx2 or avx512; got sse9" in done.stderr


@needs_cxx
class TestFailures:
    def test_no_compiler_is_loud_and_leaves_no_older_library(self, tree):
        done = build(tree, CXX="/nowhere/g++")
        assert done.returncode == 0
        assert "*" * 78 in done.stdout and "CXX names '/nowhere/g++'" in done.stdout
        assert not list(tree.rglob("_C.*"))
        said = ask(tree)
        assert said["file"] is None and "CXX names '/nowhere/g++'" in said["error"]
        # and the note goes away with its reason
        assert build(tree, LANDSCAPE_FAST_CUDA=0).returncode == 0
        assert ask(tree)["error"] is None
        assert not (tree / "landscape_fast" / "_build_failure.txt").exists()

    def test_no_compiler_on_path(self, tree, tmp_path):
        done = build(tree, PATH=tmp_path)
        assert "no C++ compiler on PATH; install one" in done.stdout

    def test_required_extension_is_an_error(self, tree):
        done = build(tree, CXX="/nowhere/g++", LANDSCAPE_FAST_REQUIRE_EXT=1)
        assert done.returncode != 0 and "CXX names" in done.stdout

    def test_broken_source_is_reported_with_the_compilers_words(self, tree):
        (tree / "csrc" / "cpu" / "width.cpp").write_text("#error out of order\n")
        done = build(tree, LANDSCAPE_FAST_CUDA=0)
        assert done.returncode == 0 and "out of order" in done.stdout
        assert "out of order" in ask(tree)["error"]

    def test_missing_definition_is_found_by_the_build(self, tree):
        (tree / "csrc" / "cpu" / "width.cpp").unlink()
        done = build(tree, LANDSCAPE_FAST_CUDA=0, LANDSCAPE_FAST_REQUIRE_EXT=1)
        assert done.returncode != 0 and "it does not load" in done.stdout

    def test_incomplete_sources(self, tree):
        (tree / "csrc" / "module.cpp").unlink()
        done = build(tree, LANDSCAPE_FAST_CUDA=0, LANDSCAPE_FAST_REQUIRE_EXT=1)
        assert done.returncode != 0 and "module.cpp is missing" in done.stdout

    @pytest.mark.parametrize(
        "name, value", [("MAX_JOBS", "0"), ("MAX_JOBS", "many"), ("LANDSCAPE_FAST_CUDA", "yes")]
    )
    def test_bad_settings(self, tree, name, value):
        done = build(tree, **{"LANDSCAPE_FAST_CUDA": 0, name: value})
        assert done.returncode != 0 and f"{name} must be" in done.stdout

    def test_failing_nvcc(self, tree, tmp_path):
        script(tmp_path / "cuda" / "bin" / "nvcc", "echo broken toolkit; exit 1")
        done = build(tree, CUDA_HOME=tmp_path / "cuda")
        assert done.returncode == 0
        assert "built without its CUDA kernels" in done.stdout and "broken toolkit" in done.stdout
        said = ask(tree)
        assert said["error"] is None and said["with_cuda"] is False
        for demand in ({"LANDSCAPE_FAST_CUDA": 1}, {"LANDSCAPE_FAST_REQUIRE_EXT": 1}):
            done = build(tree, CUDA_HOME=tmp_path / "cuda", **demand)
            assert done.returncode != 0 and "broken toolkit" in done.stdout


@needs_cxx
@needs_nvcc
def test_cuda_kernels_through_a_wrapper_of_nvcc(tree, tmp_path):
    """A script that calls nvcc from elsewhere: the toolkit is where nvcc says, not beside it."""
    wrapper = script(tmp_path / "cuda" / "bin" / "nvcc", f'exec {toolchain.find_nvcc()} "$@"')
    done = build(tree, CUDA_HOME=wrapper.parent.parent, TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX")
    assert "fill.o" in compiled(done), done.stdout
    said = ask(tree)
    assert said["with_cuda"] and said["info"]["archs"] == ["sm_80", "sm_90a", "compute_90a"]
    library = subprocess.run(["ldd", said["file"]], capture_output=True, text=True).stdout
    assert "libcudart" not in library and "libtorch" not in library
    # other architectures are another object; the same ones are not
    again = build(tree, CUDA_HOME=wrapper.parent.parent, TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX")
    assert compiled(again) == []
    other = build(tree, CUDA_HOME=wrapper.parent.parent, TORCH_CUDA_ARCH_LIST="8.0")
    assert compiled(other) == ["fill.o", "module.o"]
    assert "width.o" in compiled(build(tree, LANDSCAPE_FAST_CUDA=0))


class TestNvcc:
    def test_none_is_fine_unless_demanded(self, monkeypatch):
        monkeypatch.setattr(extension, "find_nvcc", lambda: None)
        assert extension.find_cuda("auto") == (
            None,
            "nvcc is not in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda",
        )
        with pytest.raises(toolchain.BuildProblem, match="LANDSCAPE_FAST_CUDA=1, but nvcc is not"):
            extension.find_cuda("1")

    def test_zero_does_not_even_look(self, monkeypatch):
        monkeypatch.setattr(extension, "find_nvcc", lambda: pytest.fail("looked for nvcc"))
        assert extension.find_cuda("0") == (None, "LANDSCAPE_FAST_CUDA=0")

    def test_no_cuda_source_is_an_incomplete_distribution(self, monkeypatch):
        monkeypatch.setattr(extension, "find_nvcc", lambda: "/somewhere/nvcc")
        monkeypatch.setattr(extension, "cuda_sources", lambda: [])
        with pytest.raises(toolchain.BuildProblem, match="the sources are incomplete"):
            extension.find_cuda("1")

    def test_cuda_home_comes_before_path(self, monkeypatch, tmp_path):
        homes = [script(tmp_path / name / "bin" / "nvcc", "exit 0") for name in "abc"]
        monkeypatch.setenv("PATH", str(homes[2].parent), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        assert toolchain.find_nvcc() == str(homes[2])
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "b"))
        assert toolchain.find_nvcc() == str(homes[1])
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
        assert toolchain.find_nvcc() == str(homes[0])


CUDA_13 = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}


@pytest.mark.parametrize(
    "wish, known, gpus, expected",
    [
        ("", CUDA_13, [], "sm_80 compute_80 sm_90a sm_100"),
        ("", {80, 86, 89, 90}, [], "sm_80 compute_80 sm_90a"),  # before CUDA 12.8
        ("", CUDA_13, [86, 90, 100, 103], "sm_80 compute_80 sm_90a sm_100"),  # all run already
        ("", CUDA_13, [120], "sm_80 compute_80 sm_90a sm_100 sm_120"),
        ("", {80, 90}, [120], "sm_80 compute_80 sm_90a"),  # portable code will have to do
        ("8.0;9.0a;10.0+PTX", CUDA_13, [120], "sm_80 sm_90a sm_100 compute_100"),
        ("7.5 8.0 8.6+PTX", CUDA_13, [], "sm_80 sm_86 compute_86"),  # 7.5 is too old
        ("Ampere;Hopper", CUDA_13, [], "sm_80 sm_86 compute_86 sm_90 compute_90"),
        ("10.0f;8.0;8.0", CUDA_13, [], "sm_100f sm_80"),
    ],
)
def test_architectures(monkeypatch, wish, known, gpus, expected):
    monkeypatch.setattr(toolchain, "visible_gpus", lambda: gpus)
    assert toolchain.choose_archs(wish, known) == expected.split()


@pytest.mark.parametrize("wish, text", [("sm_80", "got 'sm_80'"), ("7.0", "none of the arch")])
def test_bad_architectures(wish, text):
    with pytest.raises(toolchain.BuildProblem, match=text):
        toolchain.choose_archs(wish, CUDA_13)


def test_gencode():
    assert toolchain.gencode(["sm_90a", "compute_80"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
