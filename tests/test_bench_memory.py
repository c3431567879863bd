"""The memory report: its numbers are those of the goals, and prediction meets measurement."""

import pytest

from bench import gpu, memory, peers, report


@pytest.fixture(scope="module")
def rows():
    return memory.rows("cpu", M=8, B=64, D=48, C=8, H=9)


def test_ours_keeps_least(rows):
    """A third of tabm in float32, half of torch-uncertainty, in every case and dtype."""
    assert {r.case.split()[0].rstrip(",") for r in rows} == {"linear", "first", "conv", "TabM"}
    for r in rows:
        least = {"ours": 1.0, "tabm": 3.0, "torch-uncertainty": 2.0}[r.library]
        assert r.ratio >= least, r
        assert r.predicted == pytest.approx(r.measured, rel=0.05), r


def test_report(monkeypatch, capsys, rows, tmp_path):
    """A printed line for each, and one of JSON, which other readers of the file pass over."""
    monkeypatch.setattr(memory, "rows", lambda device: rows)
    out = tmp_path / "rows.jsonl"
    memory.main(["--device", "cpu", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows)
    assert all(len(line) == len(lines[0]) for line in lines)
    written = report.read(out)
    assert written == [{"device": "cpu", **row._asdict()} for row in rows]
    assert report.lines(written) == [] and gpu.summary(written) == gpu.summary([])


def test_absent_packages_are_left_out():
    assert peers.peer("no_such_package") is None
    assert peers.peer("no_such_package", "layers.py") is None
    assert peers.peer("numpy", "version.py").__name__ == "numpy_version"
