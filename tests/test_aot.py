"""Every shipped Triton configuration compiles for every architecture, without spills."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
ARCHS = (80, 90, 100)
pytestmark = pytest.mark.slow


def compiled(arch: int) -> list[dict]:
    """The reports of tests/aot_cases.py for an architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(ROOT / "tests/aot_cases.py"), str(arch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports() -> dict[int, list[dict]]:
    """arch -> reports."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ARCHS, pool.map(compiled, ARCHS), strict=True))


def table(reports: dict[int, list[dict]]) -> str:
    """Registers, bytes spilled, shared KB and tensor-core instructions, one line per case."""
    names = dict.fromkeys(r["name"] for found in reports.values() for r in found)
    heads = "".join(f"{f'sm_{arch}':>28}" for arch in reports)
    lines = [f"{'registers/bytes spilled/shared KB, MMA and TMA':46}{heads}"]
    for name in names:
        cells = []
        for found in reports.values():
            cell = "-"
            for r in (r for r in found if r["name"] == name):
                counts = {k: v for k, v in r["counts"].items() if k not in ("cp.async", "wide")}
                marks = [f"{k} {v}" for k, v in counts.items() if v]
                spilled = r["stack"] + r["local"]
                cell = f"{r['registers']}/{spilled}/{r['shared'] / 1024:.0f} {' '.join(marks)}"
            cells.append(f"{cell:>28}")
        lines.append((f"{name:46}" + "".join(cells)).rstrip())
    return "\n".join(lines)


def test_table(reports, capsys):
    """Printed on every run: what the kernels take on GPUs that are not here."""
    with capsys.disabled():
        print("\n" + table(reports))


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_fits_shared_memory(reports, arch):
    bad = [
        r
        for r in reports[arch]
        if r["stack"] or r["local"] or r["spills"] or r["shared"] > r["limit"]
    ]
    assert reports[arch] and not bad, bad


@pytest.mark.parametrize("arch", ARCHS)
def test_uses_the_instructions_of_its_architecture(reports, arch):
    for r in reports[arch]:
        missing = [name for name in r["must"] if r["counts"][name] == 0]
        wrong = [name for name in r["never"] if r["counts"][name]]
        assert not missing and not wrong, (r["name"], missing, wrong, r["counts"])
