import csv
import dataclasses
import io
import json
import math
from functools import partial

import pytest
import torch

from landscape_fast.data import Dataset
from landscape_fast.methods import TrainConfig
from landscape_fast.metrics.diversity import diagnose, pair_diversity
from landscape_fast.ops import ensemble_summary
from landscape_fast.studies import report
from landscape_fast.studies.compare import Problem, Result

CONFIG = TrainConfig(seed=3)


@pytest.fixture
def dataset():
    y = torch.arange(40) % 4
    return Dataset(
        torch.zeros(8, 1, 2, 2), y[:8], torch.zeros(40, 1, 2, 2), y, tuple("abcd"), "toy"
    )


def make_result(method, members, dataset):
    generator = torch.Generator().manual_seed(members)
    logits = torch.randn(members, 40, 4, generator=generator)
    logits[:, torch.arange(40), dataset.test_y] += 3
    several = members > 1
    row = {
        "method": method,
        "members": members,
        "accuracy": 0.9512345,
        "member_accuracy": 0.9487654,
        "nll": 0.1234567,
        "brier": 0.0712345,
        "ece": 0.0298765,
        "disagreement": 0.0456789 if several else None,
        "js": 0.00123456 if several else None,
        "mutual_information": 0.0034567 if several else None,
        "parameters": 1234567,
        "seconds": 12.3456,
    }
    history = [{"epoch": 1, "loss": 0.5, "accuracy": 0.8, "lr": 0.1, "seconds": 12.3456}]
    return Result(row, logits, pair_diversity(logits), [history])


@pytest.fixture
def results(dataset):
    return {name: make_result(name, m, dataset) for name, m in (("single", 1), ("deep", 3))}


@pytest.fixture
def document(results, dataset):
    return report.make_document(results, dataset, Problem(members=3), CONFIG, "cpu")


def parse_table(text):
    lines = text.splitlines()
    return lines[0], [line.split() for line in lines[2:]]


def test_table_json_and_csv_hold_the_same_rows(results, document, tmp_path):
    rows = [result.row for result in results.values()]
    json_path, csv_path = report.write_results(tmp_path / "new" / "folder", document)
    assert sorted(p.name for p in json_path.parent.iterdir()) == ["results.csv", "results.json"]
    assert json.loads(json_path.read_text(encoding="utf-8"))["rows"] == rows
    read = list(csv.DictReader(io.StringIO(csv_path.read_text(encoding="utf-8"))))
    for line, row in zip(read, rows, strict=True):
        assert list(line) == list(row)
        for key, value in row.items():
            assert line[key] == ("" if value is None else str(value))
            if isinstance(value, float):
                assert float(line[key]) == value  # every digit
    heading, cells = parse_table(report.format_table(rows))
    for (_, name, _), position in zip(report.COLUMNS, range(len(report.COLUMNS)), strict=True):
        assert name in heading, position
    for line, row in zip(cells, rows, strict=True):
        assert len(line) == len(report.COLUMNS)
        for text, (key, _, _) in zip(line, report.COLUMNS, strict=True):
            value = row[key]
            if value is None:
                assert text == "-"
            elif isinstance(value, float):
                shown = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
                assert shown == pytest.approx(value, rel=0.01)
            else:
                assert text.replace(",", "") == str(value)


def test_the_table_is_aligned(results):
    lines = report.format_table([result.row for result in results.values()]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace("  ", "").strip("-") == ""
    assert max(map(len, lines)) <= 120


def test_the_document_says_what_was_run(document, dataset, results):
    assert document["data"] == {
        "name": "toy",
        "classes": ["a", "b", "c", "d"],
        "train_rows": 8,
        "test_rows": 40,
    }
    assert document["training"] == dataclasses.asdict(CONFIG)
    assert document["problem"]["members"] == 3
    assert document["versions"]["torch"] == torch.__version__
    assert list(document["pairs"]) == ["deep"]  # a single network has no pairs
    found = document["diversity"]["deep"]
    assert found == diagnose(results["deep"].logits, dataset.test_y).numbers()
    assert found["rows"] == 40 and "lines" not in found
    assert document["pairs"]["deep"]["js"] == results["deep"].pairs.js.tolist()
    assert "toy: 8 training and 40 test rows; mlp, adam lr 0.001" in report.headline(document)
    assert "seed 3, cpu" in report.headline(document)


def test_notes_give_the_error_bar_and_the_diversity(document):
    first, second, *rest = document["notes"]
    expected = math.sqrt(0.9512345 * (1 - 0.9512345) / 40)
    assert first == (f"40 test rows: the standard error of an accuracy of 95.12% is {expected:.2%}")
    assert second.startswith("single: the first member of deep")
    assert rest and all(line.startswith("deep: ") for line in rest)


def test_nearly_identical_members_are_reported(dataset):
    batch = make_result("batch", 1, dataset)
    logits = batch.logits.repeat(3, 1, 1)
    result = Result({**batch.row, "members": 3}, logits, pair_diversity(logits), [])
    notes = report.make_notes({"batch": result}, dataset, CONFIG)
    assert notes[1] == "batch: a step takes 128 training rows and computes 384"
    own = dataclasses.replace(CONFIG, member_batches="own")
    assert report.make_notes({"batch": result}, dataset, own)[1] == (
        "batch: a step takes 128 training rows for each member and computes 384"
    )
    assert any("batch: WARNING: the members are nearly identical" in line for line in notes)


def test_json_is_strict():
    text = report.to_json({"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf}, "d": "é"})
    assert json.loads(text) == {"a": [None, [1.5, None]], "b": {"c": None}, "d": "é"}


def test_a_failing_write_keeps_the_old_results(tmp_path, document, monkeypatch):
    report.write_results(tmp_path, document)
    before = (tmp_path / "results.json").read_text()

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report.write_results(tmp_path, {**document, "rows": []} | {"rows": document["rows"][:1]})
    assert (tmp_path / "results.json").read_text() == before


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_figures_are_written_and_not_blank(results, dataset, tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.write_figures(tmp_path, results, dataset)
    names = ["heat_maps", "reliability", "accuracy_diversity"]
    assert [p.name for p in paths] == [f"{n}.{kind}" for n in names for kind in ("png", "pdf")]
    for path in paths[::2]:
        image = pixels(path)
        assert min(image.shape[:2]) > 400
        assert (image.reshape(-1, 3).min(axis=1) < 0.9).mean() > 0.01, path  # ink


def test_figures_get_the_data_of_the_results(results, dataset, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from landscape_fast.landscape import plots

    seen = {}

    def spy(name, original, argument, *rest):
        seen[name] = (argument, rest)
        return original(argument, *rest)

    for name in ("heat_maps", "reliability_diagram", "accuracy_diversity"):
        monkeypatch.setattr(plots, name, partial(spy, name, getattr(plots, name)))
    monkeypatch.setattr(report, "save_figures", lambda *_: [])  # written by the test above
    report.write_figures(tmp_path, results, dataset)
    deep = results["deep"]
    assert seen["heat_maps"][0]["deep"]["js"] is deep.pairs.js
    assert "toy" in seen["heat_maps"][1][0]
    curve = seen["reliability_diagram"][0]["deep"]
    summary = ensemble_summary(deep.logits, dataset.test_y)
    assert float(curve.ece) == pytest.approx(float(summary.ece), abs=1e-6)
    point = seen["accuracy_diversity"][0]["deep"]
    labels = deep.logits.argmax(-1)
    assert point.disagreement.tolist() == [
        float((labels[m] != labels[0]).double().mean()) for m in (1, 2)
    ]
    assert seen["accuracy_diversity"][1][0] == 4


def test_a_single_network_has_one_figure(results, dataset, tmp_path):
    pytest.importorskip("matplotlib")
    single = {"single": results["single"]}
    written = [p.name for p in report.write_figures(tmp_path, single, dataset)]
    assert written == ["reliability.png", "reliability.pdf"]


def drawn(rows=None):
    from landscape_fast.landscape import _figure

    figure = _figure.new_figure(3, 2)
    figure.subplots().plot([0, 1], [2, 3])
    return figure if rows is None else _figure.with_rows(figure, rows)


def test_a_figure_has_its_vector_file_and_its_data_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    own = [{"x": 0, "y": 0.1 + 0.2}, {"x": 1, "y": None}]
    figures = {"bare": drawn(), "own": drawn(own), "given": drawn(own)}
    paths = report.save_figures(tmp_path / "new", figures, {"given": [{"z": 7}]})
    assert [p.name for p in paths] == [
        "bare.png", "bare.pdf", "own.png", "own.pdf", "own.csv", "given.png", "given.pdf",
        "given.csv",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    assert (tmp_path / "new" / "own.csv").read_text() == f"x,y\n0,{0.1 + 0.2!r}\n1,\n"
    assert (tmp_path / "new" / "given.csv").read_text() == "z\n7\n"
    pdf = (tmp_path / "new" / "own.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"Type3" not in pdf


def test_figures_drawn_again_have_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    first = report.save_figures(tmp_path / "a", {"f": drawn()})
    second = report.save_figures(tmp_path / "b", {"f": drawn()})
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
