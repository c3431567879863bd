"""Code compiled for one CPU must not leak into what other CPUs run.

The linker keeps one copy of an inline function that several objects define. If one compiled for
AVX-512 defines one under a common name, every other CPU may get that copy, and die of it.
"""
import platform
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from small_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import extension  # noqa: E402
import toolchain  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("nm") is None,
        reason="needs nm on x86-64, where there are variants",
    ),
]
VARIANTS = ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module")
def objects():
    """{(source, isa): object} of every *_simd.cpp, from the build of this checkout or made now."""
    pytest.importorskip("pybind11")
    try:
        cuda, why = extension.find_cuda("auto")
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        steps = extension.Build(folder, cuda, why).steps()
    except toolchain.BuildProblem as exc:
        pytest.skip(f"needs a C++ compiler: {exc}")
    steps = [step for step in steps if step.source.stem.endswith("_simd")]
    for step in steps:
        if not extension.is_fresh(step):
            extension.compile_step(step)
    return {(step.source.name, step.output.stem.rpartition("-")[2]): step.output for step in steps}


def leaks(path, isa: str) -> list[str]:
    """Symbols that an object offers to others outside its own namespace."""
    text = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True)
    assert text.returncode == 0, text.stderr
    offered = re.findall(r"^\S* +([A-Zuv]) (.+)$", text.stdout, re.MULTILINE)
    return [name for kind, name in offered if f"landscape_fast::{isa}::" not in name]


def registers(path) -> set[str]:
    code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True).stdout
    return set(re.findall(r"%([xyz]mm)\d", code))


def test_every_variant_is_there(objects):
    sources = {name for name, _ in objects}
    assert sources and set(objects) == {(name, isa) for name in sources for isa in VARIANTS}


def test_nothing_leaks(objects):
    found = {f"{name} for {isa}": leaks(path, isa) for (name, isa), path in objects.items()}
    assert not {what: names for what, names in found.items() if names}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_variants_use_their_registers_and_no_wider_ones(objects):
    widest = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
    for (name, isa), path in objects.items():
        assert max(registers(path)) == widest[isa], f"{name} for {isa}"


def test_a_leak_is_seen(tmp_path):
    """std::vector is a template: its functions are offered to everybody."""
    source = tmp_path / "leak_simd.cpp"
    source.write_text(
        "#include <vector>\nnamespace landscape_fast { namespace avx512 {\n"
        "float last(int n) { std::vector<float> v(n); v.push_back(1.f); return v.back(); } } }\n"
    )
    target = tmp_path / "leak.o"
    command = [*toolchain.find_cxx(), "-O1", "-fPIC", "-c", str(source), "-o", str(target)]
    assert subprocess.run(command).returncode == 0
    assert any("std::vector" in name for name in leaks(target, "avx512"))
