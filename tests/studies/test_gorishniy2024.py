"""The TabM study: splits, training, and what it writes, at its smallest size."""

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from landscape_fast.studies import gorishniy2024 as study
from landscape_fast.studies._tables import PARTS, TABLES, load_table


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """The parts are disjoint and cover the table; scaling was fitted on the training rows."""
    table = load_table(name, seed=3)
    sizes = {"breast_cancer": 569, "wine": 178, "digits": 1797, "diabetes": 442}
    counts = [len(table.y[part]) for part in PARTS]
    assert sum(counts) == sizes[name] and table.x["val"].shape == (counts[1], table.columns)
    assert abs(counts[0] / sum(counts) - 0.6) < 0.01 and abs(counts[1] - counts[2]) <= 1
    rows = torch.cat([table.x[part] for part in PARTS])
    if name in ("wine", "diabetes"):
        assert len(rows.unique(dim=0)) == len(rows)
    assert all(t.isfinite().all() for t in table.x.values())
    assert table.x["train"].mean(0).abs().max() < 0.5
    if table.classes:
        shares = [torch.bincount(table.y[part]) / len(table.y[part]) for part in PARTS]
        assert all((share - shares[0]).abs().max() < 0.03 for share in shares)
    else:
        assert abs(table.y["train"].mean()) < 1e-5 and table.scale > 50
    again, other = load_table(name, seed=3), load_table(name, seed=4)
    assert torch.equal(again.x["test"], table.x["test"])
    assert not torch.equal(other.y["test"], table.y["test"])


def test_errors():
    with pytest.raises(ValueError, match="load_table: name must be one of"):
        load_table("iris")
    with pytest.raises(ValueError, match="size must be one of"):
        study.run("huge")


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="load_table: scikit-learn must be installed, .*; pip in"):
        load_table("wine")


def test_a_run_from_end_to_end(tmp_path):
    document = study.run("tiny", tmp_path, seed=1)
    stored = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["mlp", "deep", "tabm", "tabm, picked"]
    assert [row["method"] for row in rows] == names == [r["method"] for r in document["rows"]]
    assert [int(row["members"]) for row in rows] == [1, 2, 4, 2]
    assert stored["rows"] == document["rows"] and len(stored["runs"]) == 2 * len(names)
    for row in document["rows"]:
        runs = [r["score"] for r in document["runs"] if r["method"] == row["method"]]
        assert row["score"] == pytest.approx(sum(runs) / 2)
        assert row["score_se"] == pytest.approx(abs(runs[0] - runs[1]) / 2)
    assert document["rows"][0]["better"] == 0
    text = study.describe(document)
    assert all(name in text for name in names) and "two members disagree on" in text
    again = study.run("tiny", seed=1)
    drop = {"seconds"}
    for one, two in zip(document["runs"], again["runs"], strict=True):
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in two.items() if k not in drop
        }


def test_training_learns_and_stops_early(monkeypatch):
    """With patience 0 it ends at the first epoch without progress, and keeps the best weights."""
    table = load_table("wine", seed=0)
    settings = replace(study.SIZES["tiny"], epochs=60, patience=0, batch_size=32)
    losses = []
    real = study._validation_loss
    monkeypatch.setattr(study, "_validation_loss", lambda *a: losses.append(real(*a)) or losses[-1])
    model = study._fit(lambda g: study._tabm(table, settings, "tabm", g), table, settings, seed=0)
    assert len(losses) < 60 and losses[-1] >= min(losses) == losses[-2]
    assert real(model, table) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < 0.5 * losses[0]


def test_members_may_have_their_own_batches():
    table = load_table("diabetes")
    settings = replace(study.SIZES["tiny"], share_training_batches=False)
    generator = torch.Generator().manual_seed(0)
    batches = list(study._batches(table, settings, 4, generator))
    order = torch.cat(batches)
    assert order.shape == (len(table.y["train"]), 4)
    assert all(torch.equal(column.sort()[0], torch.arange(len(order))) for column in order.T)
    assert not torch.equal(order[:, 0], order[:, 1])
    outputs = torch.randn(len(batches[0]), 4, 1)
    loss = study._loss(outputs, table.y["train"][batches[0]], table)
    expected = (outputs[..., 0] - table.y["train"][batches[0]]).square().mean()
    torch.testing.assert_close(loss, expected)
    model = study._fit(lambda g: study._tabm(table, settings, "tabm", g), table, settings, seed=0)
    assert study._predict(model, table, "test").shape == (4, len(table.y["test"]), 1)
