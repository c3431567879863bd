"""The study runs, is the same every time, and its tables and verdicts say what its runs say."""

import csv
import json
import os
from types import SimpleNamespace

import pytest
import torch

from landscape_fast.studies import _garipov2018_runs as parts
from landscape_fast.studies import _garipov2018_tables as tables
from landscape_fast.studies import garipov2018
from landscape_fast.studies._garipov2018_runs import PATHS
from landscape_fast.studies.garipov2018 import SIZES, run

pytest.importorskip("sklearn")


def settled(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    before = torch.get_num_threads(), torch.get_rng_state()
    document = run("tiny", out, seed=2, progress=False)
    assert torch.get_num_threads() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    return out, document


def test_every_method_has_its_budgets_and_every_path_its_points(made):
    _, document = made
    each = [(r, m, b) for r in range(2) for m in ("Ind", "SSE", "FGE") for b in (1, 2)]
    assert [(r["repeat"], r["method"], r["budget"]) for r in document["runs"]] == each
    members = {(r["method"], r["budget"]): r["members"] for r in document["runs"]}
    assert [members[m, 1] for m in ("Ind", "SSE", "FGE")] == [1, 5, 1]
    assert all(members[m, 2] == 2 * members[m, 1] for m in ("Ind", "SSE", "FGE"))
    assert [(p["repeat"], p["path"]) for p in document["paths"]] == [
        (r, path) for r in range(2) for path in PATHS
    ]
    assert len(document["points"]) == 2 * 3 * 5
    for row in document["rows"]:
        own = [r["error"] for r in document["runs"]
               if (r["method"], r["budget"]) == (row["method"], row["budget"])]  # fmt: skip
        assert row["error"] == pytest.approx(sum(own) / 2)
        assert row["error_se"] == pytest.approx(abs(own[0] - own[1]) / 2)


def test_paths_are_summaries_of_their_points(made):
    _, document = made
    for path in document["paths"]:
        own = [p for p in document["points"]
               if (p["repeat"], p["path"]) == (path["repeat"], path["path"])]  # fmt: skip
        loss = [p["train_loss"] for p in own]
        assert path["train_loss_max"] == max(loss)
        assert path["train_loss_end"] == max(loss[0], loss[-1])
        over = [v - loss[0] - (loss[-1] - loss[0]) * p["t"] for v, p in zip(loss, own, strict=True)]
        assert path["barrier"] == pytest.approx(max(over), abs=1e-9)
        assert path["error_max"] == max(p["test_error"] for p in own)
        assert path["gain_1"] == own[0]["test_error"] - own[-1]["pair_error"]
        assert own[0]["pair_error"] == pytest.approx(own[0]["test_error"])
        assert path["length"] == own[-1]["length"]
    ends = {(p["repeat"], p["t"]): p["test_loss"] for p in document["points"] if p["t"] in (0, 1)}
    for p in document["points"]:  # the three paths have the same ends
        if p["t"] in (0, 1):
            assert p["test_loss"] == pytest.approx(ends[p["repeat"], p["t"]], rel=1e-6)


def verdicts(changes=None):
    """Two repeats in which everything holds but what is changed."""
    line = {"barrier": 2.0, "train_loss_max": 2.1, "error_max": 0.6, "error_end": 0.05,
            "agreement_middle": 0.2, "agreement_ends": 0.9, "gain_1": 0.01, "gain_0.5": 0.0,
            "gain_0.05": 0.0}  # fmt: skip
    bent = {**line, "barrier": 0.1, "train_loss_max": 0.2, "error_max": 0.06,
            "agreement_middle": 0.91, "gain_0.5": 0.008, "gain_0.05": 0.001}  # fmt: skip
    paths = [{"repeat": r, "path": kind, **(line if kind == "line" else bent)}
             for r in range(2) for kind in PATHS]  # fmt: skip
    errors = {"Ind": 0.06, "SSE": 0.06, "FGE": 0.05}
    runs = [{"repeat": r, "method": m, "budget": b, "error": e}
            for r in range(2) for m, e in errors.items() for b in (1, 2)]  # fmt: skip
    for (table, repeat, name), values in (changes or {}).items():
        for row in {"paths": paths, "runs": runs}[table]:
            if row["repeat"] == repeat and name in (row.get("path"), row.get("method")):
                row.update(values)
    settings = SimpleNamespace(repeats=2, barrier=0.8, gain=0.008)
    return [row["verdict"] for row in tables.judge(settings, runs, paths)]


def test_a_criterion_passes_in_all_repeats_fails_in_none_and_else_is_open():
    assert verdicts() == ["pass"] * 13

    def changed(changes):
        return {i: v for i, v in enumerate(verdicts(changes)) if v != "pass"}

    assert changed({("paths", 0, "bezier"): {"barrier": 0.4}}) == {1: "inconclusive"}
    both = {("paths", r, "bezier"): {"barrier": 0.4} for r in range(2)}
    assert changed(both) == {1: "fail"}
    flat = {("paths", r, "line"): {"barrier": 0.5} for r in range(2)}
    assert changed(flat) == {0: "fail", 1: "inconclusive", 4: "inconclusive"}
    assert changed({("paths", 1, "line"): {"barrier": 0.5}}) == {0: "inconclusive"}
    assert changed({("paths", r, "polychain"): {"error_max": 0.1} for r in range(2)}) == {5: "fail"}
    assert changed({("paths", 0, "polychain"): {"agreement_middle": 0.96}}) == {6: "inconclusive"}
    assert changed({("paths", r, "bezier"): {"train_loss_max": 0.4} for r in range(2)}) == {
        7: "fail"
    }
    small = {("paths", r, "bezier"): {"gain_1": 0.001} for r in range(2)}
    assert changed(small) == {8: "fail", 9: "inconclusive", 10: "inconclusive"}
    assert changed({("paths", r, "bezier"): {"gain_0.5": 0.004} for r in range(2)}) == {9: "fail"}
    assert changed({("paths", r, "bezier"): {"gain_0.05": 0.004} for r in range(2)}) == {10: "fail"}
    assert changed({("runs", 0, "FGE"): {"error": 0.059}}) == {11: "inconclusive"}
    assert changed({("runs", r, "SSE"): {"error": 0.04} for r in range(2)}) == {12: "fail"}


def test_files_hold_the_same_numbers(made):
    out, document = made
    files = {"criteria.csv", "paths.csv", "points.csv", "results.csv", "results.json",
             "results.md", "runs.csv"}  # fmt: skip
    assert set(os.listdir(out)) - {"paths.png", "paths.pdf", "checkpoints"} == files
    stored = json.loads((out / "results.json").read_text())
    for name in ("rows", "paths", "points", "criteria", "runs"):
        assert stored[name] == document[name]
        if name != "rows":
            with (out / f"{name}.csv").open() as file:
                assert len(list(csv.DictReader(file))) == len(document[name])
    text, shown = (out / "results.md").read_text(), garipov2018.describe(document)
    for row in document["criteria"]:
        assert f"| {row['rule']} | {row['found']} | {row['verdict']} |" in text
        assert row["rule"] in shown
    for note in document["notes"]:
        assert f"- {note}\n" in text and f"- {note}" in shown.splitlines()


def test_the_same_seed_gives_the_same_numbers(made):
    again = run("tiny", seed=2, progress=False)
    for name in ("runs", "paths", "points", "criteria"):
        assert settled(again[name]) == settled(made[1][name])


def test_an_interrupted_study_goes_on_where_it_was(made, tmp_path, monkeypatch):
    """Ctrl-C before the last method: what was trained is loaded, and the numbers are the same."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(parts, "train_fge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("tiny", tmp_path, seed=2, progress=False)
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.pt"))
    first = "checkpoints/repeat-0/"
    assert found == [first + name for name in (
        "curve-bezier-000.pt", "curve-polychain-000.pt", "ends/member-000.pt",
        "ends/member-001.pt", "ensembles/member-000.pt", "ensembles/member-001.pt",
        "ensembles/snapshot-000.pt", "ensembles/snapshot-001.pt",
    )]  # fmt: skip
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in found}
    again = run("tiny", tmp_path, seed=2, progress=False)
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in found}
    for name in ("paths", "points", "criteria", "runs"):
        assert settled(again[name]) == settled(made[1][name])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"garipov2018.run: size must be one of .*; got 'huge'"):
        run("huge")
    with pytest.raises(ValueError, match="root must be the folder of the CIFAR-10 files; got None"):
        run("full")
    assert SIZES["full"].data == "cifar10" and SIZES["small"].data == SIZES["tiny"].data == "digits"
