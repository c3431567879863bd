"""The study runs, is the same every time, and its table says what its runs say."""

import csv
import json
import math
import os

import pytest
import torch

from landscape_fast.studies import _folds, wenzel2020
from landscape_fast.studies.wenzel2020 import SIZES, SPACE, make_folds, run

pytest.importorskip("sklearn")
METHODS = ["single", "single, tuned", "deep", "deep, tuned", "batch", "hyper-batch",
           "hyper-batch, 1 draws", "hyper-deep", "hyper-deep, no restarts"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    before = torch.get_num_threads(), torch.get_rng_state()
    document = run("tiny", out, seed=2)
    assert torch.get_num_threads() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    return out, document


def test_folds_are_dealt_class_by_class_and_cover_all_rows():
    settings, seen, labels = SIZES["small"], [], []
    for fold in range(10):
        data = make_folds(settings, 0, fold)
        assert len(data.train_y) + len(data.test_y) == 1797
        counts = torch.bincount(data.test_y)
        assert counts.max() - counts.min() <= 3 and abs(len(data.test_y) - 1797 / 10) < 1
        assert abs(float(data.train_x.mean())) < 1e-5 and abs(float(data.train_x.std()) - 1) < 1e-3
        both = torch.cat([data.train_y, data.test_y])
        assert torch.equal(both.bincount(), torch.bincount(both)) and len(both) == 1797
        seen.append(data.test_x)
        labels.append(data.test_y)
    assert torch.cat(labels).bincount().tolist() == both.bincount().tolist()
    assert not torch.equal(make_folds(settings, 1, 0).test_y, labels[0]) or not torch.equal(
        make_folds(settings, 1, 0).test_x, seen[0]
    )


def test_every_method_has_a_run_per_fold_and_a_row(made):
    _, document = made
    assert [row["method"] for row in document["rows"]] == METHODS
    assert [(r["fold"], r["method"]) for r in document["runs"]] == [
        (fold, method) for fold in range(2) for method in METHODS
    ]
    for r in document["runs"]:
        weights = [int(word) for word in r["weights"].split()]
        assert len(weights) == r["members"] and min(weights) >= 1
        assert 0 < r["nll"] < 4 and 0 < r["brier"] < 2 and 0 <= r["ece"] <= 1
    members = {r["method"]: r["members"] for r in document["runs"]}
    assert (members["single"], members["deep"], members["deep, tuned"]) == (1, 2, 2)
    assert members["hyper-batch, 1 draws"] == 2 * members["hyper-batch"] == 4


def test_rows_are_means_and_standard_errors_of_the_runs(made):
    _, document = made
    for row in document["rows"]:
        a, b = (r for r in document["runs"] if r["method"] == row["method"])
        for key in ("accuracy", "nll", "brier", "ece"):
            assert row[key] == pytest.approx((a[key] + b[key]) / 2)
            assert row[f"{key}_se"] == pytest.approx(abs(a[key] - b[key]) / 2)
        deep = [r["nll"] for r in document["runs"] if r["method"] == "deep"]
        assert row["nll_to_deep"] == pytest.approx(row["nll"] - sum(deep) / 2)
    assert _folds.mean_se([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert _folds.mean_se([1.0]) == (1.0, None) and _folds.mean_se([1.0, None]) == (None, None)


def test_the_search_is_in_the_table_of_trials(made):
    _, document = made
    for fold in range(2):
        own = [t for t in document["trials"] if t["fold"] == fold]
        search = [t for t in own if t["restart"] == 0]
        assert len(search) == 3 and all(t[name] is None for name in SPACE for t in search[:1])
        assert all(t[name] is not None for name in SPACE for t in search[1:])
        of = {r["method"]: r for r in document["runs"] if r["fold"] == fold}
        kept = [t for t in own if t["weight"]]
        assert len(kept) == of["hyper-deep"]["members"]
        weights = sorted(map(int, of["hyper-deep"]["weights"].split()))
        assert sorted(t["weight"] for t in kept) == weights


def test_files_hold_the_same_numbers(made):
    out, document = made
    files = ["results.csv", "results.json", "results.md", "runs.csv", "trials.csv"]
    assert sorted(os.listdir(out)) == files
    stored = json.loads((out / "results.json").read_text())
    assert [row["nll"] for row in stored["rows"]] == [row["nll"] for row in document["rows"]]
    with (out / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [float(r["nll"]) for r in runs] == [r["nll"] for r in document["runs"]]
    text = (out / "results.md").read_text().splitlines()
    table = [line.strip("| ").split(" | ") for line in text if line.startswith("|")]
    assert [line[0] for line in table[2:]] == METHODS
    shown = wenzel2020.describe(document)
    for line, row in zip(table[2:], document["rows"], strict=True):
        cell = f"{row['nll']:.4f} ± {row['nll_se']:.4f}"
        assert line[3] == cell and cell in shown
    for note in document["notes"]:
        assert f"- {note}" in text and f"- {note}" in shown.splitlines()


def test_verdicts_need_more_than_two_runs_that_agree():
    """Of two methods on three folds: a gap of 5 standard errors is clear, one of 3 is not."""

    def runs(gaps):
        return [
            {"fold": fold, "method": name, "nll": 1 + (gap if name == "a" else 0), "accuracy": 0.5}
            for fold, gap in enumerate(gaps)
            for name in ("a", "b")
        ]

    clear = _folds.make_notes(runs([-0.4, -0.5, -0.6]), [("a", "b")])[-1]
    assert clear == (
        "a against b: NLL -0.5000 ± 0.0577 (better), accuracy +0.00% ± 0.00% (no clear difference)"
    )
    assert "(worse)" in _folds.make_notes(runs([0.4, 0.5, 0.6]), [("a", "b")])[-1]
    unclear = _folds.make_notes(runs([-0.3, -0.5, -1.0]), [("a", "b")])[-1]
    assert "NLL -0.6000 ± 0.2082 (no clear difference)" in unclear


def test_the_same_seed_gives_the_same_numbers(made):
    def settled(runs):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in runs]

    again = run("tiny", seed=2)
    assert settled(again["runs"]) == settled(made[1]["runs"])
    assert settled(again["trials"]) == settled(made[1]["trials"])


def test_ctrl_c_says_that_nothing_was_saved(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(wenzel2020, "train_batch_ensemble", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped in fold 1 of 2; nothing was saved"):
        run("tiny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_are_counted_where_affinity_is_unknown(monkeypatch):
    """As on macOS; one process per CPU, none of which is started before the first method."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(wenzel2020, "_one_fold", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped in fold 1 of 10"):
        run("small")


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"wenzel2020.run: size must be one of .*; got 'huge'"):
        run("huge")
