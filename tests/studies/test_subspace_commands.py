"""`landscape-fast subspace|curve|fge|swag` as their users see them."""

import csv
import json
import re

import pytest
import torch

from landscape_fast import cli
from landscape_fast.methods.sweep import _Models
from landscape_fast.studies import subspace_commands

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
COMMON = ["--device", "cpu", "--threads", "1", "--quiet"]
# verb and options, files beside results and checkpoints, networks in the table
RUNS = {
    "line": (["subspace", "--points", "5"], ["path"], 4),
    "layerwise": (["subspace", "--layerwise", "--beta", "0", "--points", "3"], ["path"], 4),
    "triangle": (["subspace", "--kind", "simplex"], ["triangle"], 5),
    "bezier": (["subspace", "--kind", "bezier", "--points", "3"], ["path"], 5),
    "curve": (["curve", "--points", "5", "--curve-epochs", "3"], ["path"], 6),
    "chain": (["curve", "--kind", "polychain", "--bends", "2", "--points", "3"], ["path"], 6),
    "fge": (["fge", "--cycles", "2"], ["collected", "cycles"], 3),
    "snapshot": (["fge", "--kind", "snapshot", "--cycles", "2"], ["collected", "cycles"], 3),
    "swag": (["swag", "--collect", "3", "--rank", "2", "--samples", "4"], ["samples"], 3),
}
EPOCHS = 4


def run(capsys, *arguments):
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read(folder, name):
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs a command once for all tests: name -> (standard output, folder)."""
    cache = {}

    def get(name, capsys):
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            command = [*RUNS[name][0], "--epochs", EPOCHS, "--out", folder, *COMMON]
            code, out, err = run(capsys, *command)
            assert code == 0 and err == "", err
            cache[name] = out, folder
        return cache[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_a_table_is_printed_and_everything_is_written(name, finished, capsys):
    out, folder = finished(name, capsys)
    _, files, networks = RUNS[name]
    document = json.loads((folder / "results.json").read_text())
    assert len(document["rows"]) == networks == len(read(folder, "results"))
    lines = out.splitlines()
    assert lines[0].startswith("digits: 1,442 training and 355 test rows; mlp, adam")
    for line, row in zip(lines[4:], document["rows"], strict=False):
        cells = re.split(r"\s{2,}", line)
        assert cells[0] == row["name"] and cells[2] == f"{row['accuracy']:.2%}"
        assert 0.5 < row["accuracy"] <= 1
    for note in document["notes"]:
        assert f"- {note}" in lines
    assert lines[-1].startswith("wrote ")
    names = {path.name for path in folder.iterdir()}
    assert {f"{file}.csv" for file in files if file != "cycles"} <= names
    images = [path for path in folder.iterdir() if path.suffix == ".png"]
    assert len(images) == 1 and images[0].read_bytes().startswith(b"\x89PNG")
    assert list((folder / "checkpoints").glob("*.pt"))


def test_a_line_is_measured_from_anchor_to_anchor(finished, capsys):
    _, folder = finished("line", capsys)
    rows, path = read(folder, "results"), read(folder, "path")
    assert [float(row["t"]) for row in path] == [0, 0.25, 0.5, 0.75, 1]
    at = {row["name"]: row for row in rows}
    for place, name in ((0, "anchor 1"), (2, "midpoint"), (4, "anchor 2")):
        assert float(path[place]["nll"]) == pytest.approx(float(at[name]["nll"]), rel=1e-6)
    ends = float(path[0]["pair_nll"])
    assert ends == float(path[4]["pair_nll"])  # the same pair
    assert ends == pytest.approx(float(at["ensemble of the anchors"]["nll"]), rel=1e-6)
    assert path[2]["pair_nll"] == path[2]["nll"]  # of the midpoint with itself


def test_the_ensemble_of_a_bezier_curve_is_that_of_its_ends(finished, capsys):
    """The control point between them is no network of the curve."""
    _, folder = finished("bezier", capsys)
    rows, path = read(folder, "results"), read(folder, "path")
    assert rows[-1]["name"] == "ensemble of the ends" and rows[-1]["members"] == "2"
    assert float(rows[-1]["nll"]) == pytest.approx(float(path[0]["pair_nll"]), rel=1e-6)


def test_a_triangle_has_its_corners_and_a_rim(finished, capsys):
    _, folder = finished("triangle", capsys)
    points = {
        tuple(round(6 * float(row[f"c{k}"])) for k in (1, 2, 3)): float(row["nll"])
        for row in read(folder, "triangle")
    }
    assert len(points) == 28 + 24 and all(sum(point) == 6 for point in points)
    rows = {row["name"]: float(row["nll"]) for row in read(folder, "results")}
    for point, name in (((6, 0, 0), "anchor 1"), ((0, 0, 6), "anchor 3"), ((2, 2, 2), "midpoint")):
        assert points[point] == pytest.approx(rows[name], rel=1e-6)


@pytest.mark.parametrize("name", ["curve", "chain"])
def test_a_curve_and_the_straight_line_have_the_same_ends(name, finished, capsys):
    _, folder = finished(name, capsys)
    document = json.loads((folder / "results.json").read_text())
    path = read(folder, "path")
    kind = document["settings"]["kind"]
    curve, line = ([row for row in path if row["path"] == p] for p in (kind, "straight line"))
    for end in (0, -1):
        assert float(curve[end]["nll"]) == pytest.approx(float(line[end]["nll"]), rel=1e-6)
    middle = len(curve) // 2
    assert curve[middle]["nll"] != line[middle]["nll"]
    worst = max(float(row["nll"]) for row in line)
    base = max(float(line[end]["nll"]) for end in (0, -1))
    assert document["numbers"]["barriers"]["straight line"] == pytest.approx(worst - base)


def test_cycles_are_collected_where_the_rate_is_lowest(finished, capsys):
    _, folder = finished("fge", capsys)
    collected = read(folder, "collected")
    assert [float(row["epoch"]) for row in collected] == [2, 4]
    assert collected[0]["distance"] == "" and float(collected[1]["distance"]) > 0
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows[-1]["name"] == "ensemble" and rows[-1]["members"] == 2
    assert float(collected[-1]["ensemble_accuracy"]) == rows[-1]["accuracy"]


def test_a_finished_run_resumes_to_the_same_numbers(finished, capsys):
    for name in ("line", "curve", "snapshot", "swag"):
        out, folder = finished(name, capsys)
        command = [*RUNS[name][0], "--epochs", EPOCHS, "--out", folder, *COMMON]
        code, again, _ = run(capsys, *command, "--resume")
        assert code == 0 and again == out
        code, _, err = run(capsys, *command)
        assert code == 2 and "add --resume or --overwrite" in err


def test_networks_that_were_measured_are_not_measured_again(finished, capsys, monkeypatch):
    for name in ("triangle", "curve"):
        out, folder = finished(name, capsys)
        command = [*RUNS[name][0], "--epochs", EPOCHS, "--out", folder, *COMMON, "--resume"]
        with monkeypatch.context() as patched:
            patched.setattr(_Models, "logits", lambda *_: pytest.fail("measured again"))
            assert run(capsys, *command)[:2] == (0, out)
    code, _, err = run(capsys, *command, "--points", "3")  # others have a file of their own
    assert code == 0, err


def test_other_data_and_networks_with_batch_norms(tmp_path, capsys):
    """Statistics are taken anew at every point, and the output says on what."""
    command = ["subspace", "--model=resnet20", "--epochs=1", "--train-rows=64", "--points=2"]
    code, out, err = run(capsys, *command, f"--out={tmp_path}", *COMMON)
    assert code == 0, err
    assert "batch norms took their statistics anew at every point, on 64 training rows" in out
    assert all(torch.tensor(float(row["nll"])).isfinite() for row in read(tmp_path, "path"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["subspace", "--anchors=3"], "argument --anchors: must be 2 with --kind line; got 3"),
        (["subspace", "--kind=bezier", "--anchors=1"], "--anchors: must be at least 2; got 1"),
        (["subspace", "--beta=-1"], "argument --beta: must be a number of at least 0; got '-1'"),
        (["curve", "--points=1"], "argument --points: must be at least 2, the ends; got 1"),
        (["curve", "--kind=circle"], "argument --kind: invalid choice: 'circle'"),
        (["curve", "--optimizer=adamw"], "--optimizer: must be sgd or adam for a curve; got adamw"),
        (["fge", "--kind=snapshot", "--lr-low=1"], "--lr-low: must be left out with --kind snaps"),
        (["fge", "--cycles=9", "--epochs=4"], "must be at least 17, the epochs of 9 cycles; got 4"),
        (["swag", "--data=cifar10"], "argument --root: must be the folder of the cifar10 files"),
    ],
)
def test_wrong_usage_is_one_line(command, message, tmp_path, capsys):
    code, out, err = run(capsys, *command, f"--out={tmp_path}", *COMMON)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_overwrite_keeps_the_checkpoints_until_there_are_others(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "old.pt").write_text("precious")
    for command, code in ((["curve", "--optimizer=adamw"], 2), (["swag", "--epochs=3"], 1)):
        command += ["--overwrite", f"--out={tmp_path}", *COMMON]
        assert run(capsys, *command)[0] == code
        assert [path.read_text() for path in folder.iterdir()] == ["precious"]
    command = [*RUNS["swag"][0], "--epochs=4", "--overwrite", f"--out={tmp_path}", *COMMON]
    assert run(capsys, *command)[0] == 0
    assert [path.name for path in folder.iterdir()] == ["swag-000.pt"]


def test_snapshots_have_their_schedule_where_the_data_have_another(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(subspace_commands, "_run", lambda args, *of: seen.append(args) or 0)
    command = ["fge", "--data=cifar10", f"--root={tmp_path}"]
    for more in (["--kind=snapshot"], ["--kind=snapshot", "--schedule=constant"], []):
        assert cli.main([*command, *more]) == 0
    assert [args.schedule for args in seen] == ["cosine", "constant", None]


def test_errors_of_methods_name_the_argument(tmp_path, capsys):
    command = ["fge", "--kind=snapshot", "--cycles=3", "--epochs=4", f"--out={tmp_path}", *COMMON]
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "train_snapshot: cycles must be a divisor of config.epochs = 4; got 3" in err
