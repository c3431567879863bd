"""bench/gpu.py: one command on a GPU machine that keeps all it finds, whatever fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, report
from bench.cases import OPS

ROOT = Path(__file__).resolve().parents[1]


def part(name, code, seconds=60.0):
    return gpu.Part(name, [sys.executable, "-c", code], seconds, False)


def alive(pid):
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_gate_survives_failing_and_hanging_parts(tmp_path):
    """Every part's outcome is kept, also what a killed one had written; nothing stops the rest."""
    out = tmp_path / "gate.jsonl"
    hang = f"""sleep 600 & echo '{{"kept":' $! '}}' >> {out}; wait"""
    chosen = [
        part("fails", "import sys; print('reason'); sys.exit(3)"),
        gpu.Part("hangs", ["sh", "-c", hang], 2.0, False),
        gpu.Part("gpu only", ["false"], 1.0),
        part("passes", "print('fine')"),
    ]
    records = gpu.run(chosen, out, 120.0, has_gpu=False)
    assert [r["status"] for r in records] == ["failed", "timeout", "skipped", "passed"]
    assert records[0]["returncode"] == 3 and "reason" in records[0]["tail"]
    assert records[1]["seconds"] < 30
    (kept,) = (row["kept"] for row in report.read(out) if "kept" in row)
    assert not alive(kept), "a process that a part started outlived it"
    assert [r for r in report.read(out) if "part" in r] == records
    text = gpu.summary(report.read(out))
    assert "failed   fails" in text and "timeout  hangs" in text and "no CUDA device" in text
    late = gpu.run([part("late", "pass")], out, 0.0, has_gpu=False)
    assert late[0]["why"] == "no time left"


@pytest.mark.slow
def test_the_gate_runs_dry_without_a_gpu(tmp_path):
    """Tests and a bench through the real command; one file comes out, with verdicts at its end."""
    out = tmp_path / "gate.jsonl"
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--quick", "--out", str(out)]
    command += ["--only", "gpu tests", "bench pairwise_disagreement"]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stdout + got.stderr
    rows = report.read(out)
    assert rows[0]["machine"]["device"] == "cpu"
    status = {r["part"]: r["status"] for r in rows if "part" in r}
    assert status == {"gpu tests": "skipped", "bench pairwise_disagreement": "passed"}
    assert any(r.get("op") == "pairwise_disagreement" and "ms" in r for r in rows)
    assert "summary" in rows[-1] and "pairwise_disagreement" in got.stdout


def test_without_a_gpu_the_gate_says_so(tmp_path, capsys, monkeypatch):
    """It neither crashes nor pretends."""
    monkeypatch.setattr(gpu, "about", lambda device: {"device": device, "error": "no driver"})
    assert gpu.main(["--out", str(tmp_path / "gate.jsonl")]) == 1
    assert "no CUDA device" in capsys.readouterr().out


def test_the_gate_stays_under_nine_minutes():
    """The limit holds for all parts together, with time to spare for the summary."""
    assert gpu.LIMIT + 15 <= 540
    named = [p.name for p in gpu.parts("cuda", False, Path("x"))]
    assert named[0] == "build" and named[2] == "gpu tests"
    assert {f"bench {op}" for op in OPS} <= set(named)


def test_the_main_parts_have_their_time():
    """Whatever the parts before take of theirs: only what comes after the main benches waits."""
    parts = gpu.parts("cuda", False, Path("x"))
    named = [p.name for p in parts]
    main = parts[: named.index(f"bench {gpu.MAIN}") + 1]
    assert {"gpu tests", "op tests", "bench batch_ensemble_linear"} <= {p.name for p in main}
    assert sum(p.seconds for p in main) <= gpu.LIMIT


def test_every_gpu_test_belongs_to_a_part():
    """A test that needs a GPU is run on one."""
    commands = [word for p in gpu.parts("cuda", False, Path("x")) for word in p.command]
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text():
            folder = f"tests/{path.relative_to(ROOT / 'tests').parts[0]}"
            assert folder in commands, path


def test_pytest_lines_keep_what_did_not_pass(tmp_path):
    """One line for a failure, a skip and an error each, and the counts at the end."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_not(): pytest.skip('why not')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('broken fixture')\n"
        "def test_error(broken): pass\n"
    )
    out = tmp_path / "lines.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.pytest_lines",
        f"--lines={out}",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    rows = report.read(out)
    outcomes = {r["test"].split("::")[1]: (r["outcome"], r["message"]) for r in rows if "test" in r}
    assert {k: v[0] for k, v in outcomes.items()} == {
        "test_bad": "failed",
        "test_not": "skipped",
        "test_error": "error",
    }
    assert "why not" in outcomes["test_not"][1] and "1 == 2" in outcomes["test_bad"][1]
    assert rows[-1] == {"tests": {"passed": 1, "failed": 1, "skipped": 1, "error": 1}}
