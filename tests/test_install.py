"""Every way of installing finds the Triton kernels and the compiled module, and the right ones."""
import os
import shutil
import sys
from pathlib import Path

import pytest
from small_tree import ROOT, ask, build, copy_project, environment, python, small_project

pytest.importorskip("pybind11")
pytest.importorskip("setuptools")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
    ),
]
OFFLINE = ("Could not find a version", "No matching distribution", "Could not fetch URL")


def pip_install(*arguments, cwd: Path, executable: str = sys.executable, **env):
    done = python("-m", "pip", "install", *arguments, cwd=cwd, executable=executable, **env)
    if "No module named pip" in done.stderr:
        pytest.skip("needs pip")
    done.stdout += done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small project, its objects compiled, its library removed."""
    tree = small_project(tmp_path_factory.mktemp("built") / "tree")
    done = build(tree, LANDSCAPE_FAST_CUDA=0)
    assert done.returncode == 0, done.stdout
    next((tree / "landscape_fast").glob("_C.*.so")).unlink()
    return tree


@pytest.fixture
def tree(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "tree"))


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """A folder on sys.path that holds a regular installation of it."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(built, folder / "source")
    done = pip_install(
        "--no-build-isolation", "--no-deps", "--target", folder / "site", ".",
        cwd=source, LANDSCAPE_FAST_CUDA=0, LANDSCAPE_FAST_REQUIRE_EXT=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    shutil.rmtree(source)
    return folder / "site"


def test_regular(site, built, tmp_path):
    said = ask(tmp_path, PYTHONPATH=site)
    assert said["error"] is None and Path(said["file"]).parent == site / "landscape_fast"
    assert Path(said["kernels"]).parent == site / "landscape_fast" / "kernels"
    installed = {p.relative_to(site).as_posix() for p in (site / "landscape_fast").rglob("*.py")}
    sources = {p.relative_to(built).as_posix() for p in (built / "landscape_fast").rglob("*.py")}
    kernels = {f"landscape_fast/kernels/{p.name}" for p in (built / "kernels").glob("*.py")}
    assert installed == sources | kernels
    done = python("-c", "import kernels", cwd=tmp_path, PYTHONPATH=site)
    assert "No module named 'kernels'" in done.stderr  # the name stays free for others


def test_regular_from_inside_a_checkout_that_was_not_built(site, tree):
    """The checkout's Python wins there; it takes the installed library, as it was built from it."""
    said = ask(tree, PYTHONPATH=site)
    assert Path(said["package"]).parent == tree / "landscape_fast"
    assert Path(said["kernels"]).parent == tree / "kernels"
    assert said["error"] is None and Path(said["file"]).parent == site / "landscape_fast"


def test_a_library_of_other_sources_is_refused(site, tree):
    with open(tree / "csrc" / "api.h", "a") as header:
        header.write("// changed\n")
    said = ask(tree, PYTHONPATH=site)
    assert said["file"] is None and "was not built" in said["error"]
    assert "built from other sources" in said["error"]


def test_checkout_alone(tree, tmp_path):
    said = ask(tree)
    assert said["file"] is None
    assert "landscape_fast._C was not built; `pip install -e .` builds it" in said["error"]
    assert Path(said["kernels"]).parent == tree / "kernels"
    assert build(tree, LANDSCAPE_FAST_CUDA=0).returncode == 0
    for cwd, env in ((tree, {}), (tmp_path, {"PYTHONPATH": tree})):
        said = ask(cwd, **env)
        assert said["error"] is None and Path(said["file"]).parent == tree / "landscape_fast"


def test_editable(tree, tmp_path):
    """In a virtual environment that sees this one's packages, imported from outside the tree."""
    done = python("-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    executable = str(tmp_path / "venv" / "bin" / "python")
    folders = [path for path in sys.path if "-packages" in path]
    lines = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
    (next((tmp_path / "venv").glob("lib/python*/site-packages")) / "zz.pth").write_text(lines)
    done = pip_install(
        "--no-build-isolation", "--no-deps", "-e", ".",
        cwd=tree, executable=executable, LANDSCAPE_FAST_CUDA=0, LANDSCAPE_FAST_REQUIRE_EXT=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    said = ask(tmp_path, executable=executable)
    assert Path(said["file"]).parent == Path(said["package"]).parent == tree / "landscape_fast"
    assert Path(said["kernels"]).parent == tree / "kernels"
    assert (tmp_path / "venv" / "bin" / "landscape-fast").is_file()


def test_build_isolation(tree, tmp_path):
    """pip's own environment for the build holds pybind11 and setuptools, and no torch."""
    done = pip_install(
        "--no-deps", "--target", "site", str(tree), cwd=tmp_path,
        LANDSCAPE_FAST_CUDA=0, LANDSCAPE_FAST_REQUIRE_EXT=1,
    )  # fmt: skip
    if done.returncode and any(text in done.stdout for text in OFFLINE):
        pytest.skip("needs a package index for the build requirements")
    assert done.returncode == 0, done.stdout
    assert ask(tmp_path, PYTHONPATH=tmp_path / "site")["error"] is None


def test_sdist_is_complete(tmp_path):
    """The real sources: everything is in the archive, and what is unpacked builds and installs."""
    tree = copy_project(tmp_path / "tree")
    code = "from setuptools.build_meta import build_sdist as b; print(b('dist'))"
    done = python("-c", code, cwd=tree)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(next((tree / "dist").glob("*.tar.gz")), tmp_path / "unpacked")
    source = next((tmp_path / "unpacked").iterdir())
    folders = ("csrc", "kernels", "tools", "landscape_fast")
    wanted = {p.relative_to(tree) for name in folders for p in (tree / name).rglob("*.*")}
    assert {path for path in wanted if not (source / path).exists()} == set()
    # Objects of this checkout serve, if they are of these very sources and headers.
    if (ROOT / "build").is_dir():
        objects = [folder for folder in (ROOT / "build").iterdir() if (folder / "lock").is_file()]
        for folder in objects:
            shutil.copytree(folder, source / "build" / folder.name)
    done = pip_install(
        "--no-build-isolation", "--no-deps", "--target", tmp_path / "site", ".",
        cwd=source, **{**same_build(), "LANDSCAPE_FAST_REQUIRE_EXT": 1},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    said = ask(tmp_path, PYTHONPATH=tmp_path / "site")
    assert said["error"] is None
    assert Path(said["file"]).parent == tmp_path / "site" / "landscape_fast"
    assert Path(said["kernels"]).parent == tmp_path / "site" / "landscape_fast" / "kernels"


def same_build() -> dict:
    """The settings of this process that a build reads, which `environment` leaves out."""
    return {name: os.environ[name] for name in set(os.environ) - set(environment())}
