"""The study runs, goes on where it was, and its tables and verdicts say what its runs say."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch

from landscape_fast.studies import wortsman2021
from landscape_fast.studies._criteria import criterion
from landscape_fast.studies._wortsman_runs import triangle_grid
from landscape_fast.studies.wortsman2021 import SIZES, describe, judge, load, run

pytest.importorskip("sklearn")
LINES = ["line", "line without beta", "layer-wise line", "Bezier curve"]
SIMPLEX = "simplex of 3, midpoint"
SMOOTH = "layer-wise simplex of 3, label smoothing, midpoint"
NOISY = "layer-wise line, noisy labels, midpoint"
NETWORKS = [
    *("standard", "two standard", "halfway between two standard"),
    *(f"{line}, {at}" for line in LINES for at in ("midpoint", "0.2 and 0.8")),
    *(SIMPLEX, "SWA, constant rate", "SWA, cyclic rate", "label smoothing", "dropout", SMOOTH),
    *("standard, noisy labels", NOISY),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    before = torch.get_rng_state()
    document = run("tiny", out, seed=2, device="cpu", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    return out, document


def test_every_network_has_a_run_and_a_row(made):
    _, document = made
    assert [row["network"] for row in document["rows"]] == NETWORKS
    assert [(r["seed"], r["network"]) for r in document["runs"]] == [(2, n) for n in NETWORKS]
    for row, r in zip(document["rows"], document["runs"], strict=True):
        pair = row["network"] == "two standard" or " and " in row["network"]
        assert row["members"] == (2 if pair else 1)
        assert 0.05 < row["accuracy"] <= 1 and 0 < row["nll"] < 10 and 0 <= row["ece"] <= 1
        assert row["accuracy"] == r["accuracy"] and row["accuracy_se"] is None
    better = {row["network"]: row["accuracy"] for row in document["rows"]}
    assert better["standard"] > 0.4 > better["halfway between two standard"]


def test_paths_and_the_triangle_are_measured_everywhere(made):
    _, document = made
    settings = SIZES["tiny"]
    for line in LINES:
        rows = [row for row in document["paths"] if row["path"] == line]
        assert [row["t"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
        pairs = [row["pair_accuracy"] for row in rows]
        assert pairs == pairs[::-1]  # t with 1 - t
        middle = rows[settings.positions // 2]
        assert middle["accuracy"] == middle["pair_accuracy"]  # with itself
        row = next(r for r in document["rows"] if r["network"] == f"{line}, midpoint")
        assert row["accuracy"] == middle["accuracy"]
    places = [row["place"] for row in document["triangle"]]
    assert places == ["inside"] * 6 + ["outside"] * 6
    for row in document["triangle"]:
        c = [row["c1"], row["c2"], row["c3"]]
        assert sum(c) == pytest.approx(1)
        assert (min(c) < -1e-6) == (row["place"] == "outside")
    (facts,) = document["facts"]
    assert 0 <= facts["line: cos2"] < 0.1 and facts["line: ends disagree"] > 0
    assert facts["noisy: best epoch"] >= facts["noisy: last epoch"]
    row = next(r for r in document["rows"] if r["network"] == "standard, noisy labels")
    assert row["accuracy"] == facts["noisy: last epoch"]


def test_files_say_what_the_document_says(made):
    out, document = made
    stored = json.loads((out / "results.json").read_text())
    assert stored["rows"] == document["rows"] and stored["criteria"] == document["criteria"]
    for name, key in (("results", "rows"), ("runs", "runs"), ("triangle", "triangle")):
        with (out / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["accuracy"]) for row in rows] == pytest.approx(
            [row["accuracy"] for row in document[key]]
        )
    text = describe(document)
    assert all(name in text for name in NETWORKS)
    assert text.count("\n") > len(NETWORKS) + len(document["criteria"])


def test_figures_are_drawn(made):
    pytest.importorskip("matplotlib")
    out, document = made
    for name in ("paths", "triangle"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    paths = wortsman2021.figures(document)["paths"]()
    labels = {text.get_text() for text in paths.legends[0].get_texts()} if paths.legends else set()
    labels |= {t for axis in paths.axes for t in axis.get_legend_handles_labels()[1]}
    assert set(LINES) <= labels


def test_a_second_run_goes_on_from_the_checkpoints_to_the_same_result(made):
    out, document = made
    kept = sorted(path.relative_to(out) for path in out.glob("checkpoints/**/*.pt"))
    times = [(out / path).stat().st_mtime_ns for path in kept]
    again = run("tiny", out, seed=2, device="cpu", progress=False)
    assert [(out / path).stat().st_mtime_ns for path in kept] == times  # nothing was trained again
    drop = {"seconds"}
    for key in ("runs", "paths", "triangle", "facts"):
        for one, two in zip(document[key], again[key], strict=True):
            left = {k: v for k, v in one.items() if k not in drop}
            assert left == {k: v for k, v in two.items() if k not in drop}


def lab(accuracy, facts, path=(0.88, 0.9, 0.88), inside=0.9, outside=0.5, ece=0.1):
    """What one seed found, where only what is named matters."""
    rows = [{"network": n, "accuracy": 0.9, "ece": 0.1} for n in NETWORKS]
    for row in rows:
        row["accuracy"] = accuracy.get(row["network"], row["accuracy"])
        row["ece"] = 0.1 if row["network"] == "standard" else ece
    common = {"standard": 0.9, "noisy: best epoch": 0.8, "noisy: last epoch": 0.7}
    common |= {"line: cos2": 0.001, "line without beta: cos2": 0.2}
    paths = [{"path": name, "accuracy": a} for name in LINES for a in path]
    triangle = [{"place": "inside", "accuracy": inside}, {"place": "outside", "accuracy": outside}]
    return SimpleNamespace(rows=rows, facts=common | facts, paths=paths, triangle=triangle)


GOOD = {"halfway between two standard": 0.2}


def verdicts(*labs):
    return {row["rule"]: row["verdict"] for row in judge(labs)}


def test_criteria_pass_where_the_article_is_right():
    found = verdicts(lab(GOOD, {}), lab(GOOD, {}))
    assert len(found) == 12 + 3 + 2 + 5 + 1
    assert set(found.values()) == {"pass"}


WORSE = {
    "above its ends": {"path": (0.9, 0.9, 0.9)},
    "no point more than 3 points below": {"path": (0.86, 0.9, 0.9)},
    "halfway between": {"accuracy": {"halfway between two standard": 0.31}},
    "squared cosine of its ends": {"facts": {"line: cos2": 0.011}},
    "larger without beta": {"facts": {"line without beta: cos2": 0.0009}},
    "inside better than outside": {"outside": 0.88},
    f"{SIMPLEX}: within 1 point": {"accuracy": GOOD | {SIMPLEX: 0.885}},
    "ECE at most": {"ece": 0.11},
    "below a single network": {"facts": {"standard": 0.91}},
    "at least as good as the midpoint": {"accuracy": GOOD | {f"{n}, 0.2 and 0.8": 0.89
                                                             for n in LINES}},
    "noisy labels": {"accuracy": GOOD | {NOISY: 0.702}},
}  # fmt: skip


@pytest.mark.parametrize("rule", WORSE)
def test_criteria_fail_where_it_is_wrong_and_are_open_where_seeds_disagree(rule):
    bad = lab(**{"accuracy": GOOD, "facts": {}, **WORSE[rule]})
    for labs, expected in (((bad, bad), "fail"), ((lab(GOOD, {}), bad), "inconclusive")):
        found = {name: verdict for name, verdict in verdicts(*labs).items() if rule in name}
        assert found and set(found.values()) == {expected}, found


def test_noise_tells_nothing_without_over_fitting():
    found = verdicts(lab(GOOD, {"noisy: last epoch": 0.795}))
    assert [v for rule, v in found.items() if "noisy labels" in rule] == ["inconclusive"]
    row = criterion("", "", "{:.1f}", [None, None], lambda v: True)
    assert (row["verdict"], row["found"], row["repeats"]) == ("inconclusive", "-", 0)


def test_the_grid_covers_the_triangle():
    inside, edges = triangle_grid(4)
    assert len(inside) == 15 and len(edges) == 12 and len(inside.unique(dim=0)) == 15
    assert inside.min() == 0 and torch.equal(inside.sum(1), torch.ones(15))
    assert math.isclose(float(inside.mean(0)[0]), 1 / 3, rel_tol=1e-6)
    assert (edges.min(1).values == 0).all()


def test_rows():
    small = load(SIZES["small"], None)
    assert (len(small.train_y), len(small.test_y)) == (600, 1797 - 600)
    tiny = load(SIZES["tiny"], None)
    assert (len(tiny.train_y), len(tiny.test_y)) == (100, 200)
    assert abs(float(small.train_x.mean())) < 1e-5
    every = torch.cat([small.train_y, small.test_y])
    assert every.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_refusals():
    with pytest.raises(ValueError, match="size must be one of .*; got 'huge'"):
        run("huge")
    with pytest.raises(ValueError, match="root must be a folder; got None; give the folder of the"):
        run("full")
