"""The report of a run: its numbers against the same computed by hand, its files, its claims."""

import csv
import json
import math
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from landscape_fast import cli, data
from landscape_fast.methods import TrainConfig, load_trajectories, predict, train_deep_ensemble
from landscape_fast.studies._landscape_bench import Bench
from landscape_fast.studies._landscape_shift import make_groups, measure_shift
from landscape_fast.studies._landscape_space import measure_radial
from landscape_fast.studies.compare import Problem
from landscape_fast.studies.landscape_report import describe, report
from landscape_fast.studies.landscape_settings import ReportSettings, settings_of
from landscape_fast.studies.run_folder import RunFolder, open_run

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
TINY = ReportSettings(
    function_rows=80, map_rows=60, train_rows=60, shift_rows=90, samples=2, tries=3, drop=0.03,
    scales=2, per_scale=2, rank=1, late_share=0.7, plane_points=4, path_points=4,
    severities=(1, 4), corruptions=("gaussian_noise", "contrast"), curvature_points=2,
)  # fmt: skip


@contextmanager
def without_figures():
    """Drawing takes most of the time of such small runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two networks that were trained for three epochs, with all epochs kept."""
    out = tmp_path_factory.mktemp("run") / "run"
    with without_figures():
        code = cli.main(["train", "--data=digits", "--members=2", "--epochs=3", "--keep-every=1",
                         "--threads=1", "--device=cpu", "--quiet", f"--out={out}"])  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="module")
def run(folder):
    return open_run(folder)


@pytest.fixture(scope="module")
def bench(run, tmp_path_factory):
    return Bench(run, TINY, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """(document, folder) of a report with everything."""
    out = tmp_path_factory.mktemp("report")
    return report(run, TINY, out, progress=False), out


def all_claims(document):
    return {row["claim"]: row for part in document["claims"].values() for row in part}


def found(document, words):
    """The numbers of the claim that begins with these words."""
    (row,) = [row for claim, row in all_claims(document).items() if claim.startswith(words)]
    return [float(text.rstrip("%")) for text in row["found"].split()], row["verdict"]


def test_rows_to_decide_by_and_rows_to_measure_on_are_apart(bench, run):
    decided, measured = bench.validation, bench.test
    every = torch.cat([decided.index, measured.index]).sort().values
    assert torch.equal(every, torch.arange(len(run.dataset.test_y)))
    assert len(decided.y.unique()) == len(measured.y.unique()) == 10
    assert torch.equal(measured.x, run.dataset.test_x[measured.index])
    assert torch.equal(measured.y, run.dataset.test_y[measured.index])


def test_likeness_is_that_of_weights_and_labels(done, bench, run):
    weights = torch.stack([nn.utils.parameters_to_vector(n.parameters()) for n in run.networks])
    weights = weights.detach()
    cosine = torch.nn.functional.cosine_similarity(*weights.double(), dim=0).abs()
    numbers, verdict = found(done[0], "independent runs end in weights")
    assert numbers == [pytest.approx(float(cosine), abs=1e-4)] and verdict == "pass"
    numbers, _ = found(done[0], "late checkpoints of a run point")
    late = run.trajectories.weights[:, 2:].double()  # epochs 2 and 3 of 3
    ends = torch.nn.functional.cosine_similarity(late, late[:, -1:], dim=-1).min(1).values
    assert numbers == [pytest.approx(float(end), abs=1e-4) for end in ends]


def test_ensembles_are_means_of_probabilities(done, bench, run):
    p = torch.cat([predict(n, bench.test.x) for n in run.networks]).softmax(-1)
    right = (p.mean(0).argmax(-1) == bench.test.y).double().mean()
    target = nn.functional.one_hot(bench.test.y, 10)
    brier = (p.mean(0) - target).square().sum(-1).double().mean()
    rows = {(row["variant"], row["size"]): row for row in done[0]["tables"]["ensembles"]}
    assert rows["original", 2]["accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert rows["original", 2]["brier"] == pytest.approx(float(brier), abs=1e-6)
    alone = (p.argmax(-1) == bench.test.y).double().mean()
    assert rows["original", 1]["accuracy"] == pytest.approx(float(alone), abs=1e-6)
    variants = {"original", "weight_average", "random", "dropout", "diagonal", "low_rank",
                "random_low_rank"}  # fmt: skip
    assert {variant for variant, _ in rows} == variants


def test_samples_are_accepted_on_rows_that_they_are_not_measured_on(bench):
    base = bench.validation_accuracy[0]
    samples = bench.accepted(bench.sampler("random", 0), "random", 0, 3)
    assert len(samples.scale) == 3 and float(samples.scale.min()) > 0
    again = bench.measure(samples.weights, bench.validation, "again")
    assert bool((again.accuracy.double() >= base - bench.tolerance() - 1e-6).all())
    other = bench.measure(samples.weights, bench.test, "measured")
    assert not torch.equal(other.accuracy, again.accuracy)


def test_accuracies_are_ratios_of_counts(done, bench, run):
    """In float32 0.6 is above 0.6: a sample that loses all that it may would be refused."""
    labels = torch.cat([predict(n, bench.validation.x) for n in run.networks]).argmax(-1)
    exact = (labels == bench.validation.y).double().mean(1)
    assert torch.equal(bench.validation_accuracy, exact)
    counts = [row["accuracy"] * len(bench.train.y) for row in done[0]["tables"]["starts"]]
    assert all(abs(count - round(count)) < 1e-12 for count in counts)


def test_samples_need_checkpoints_for_gaussians_alone(bench):
    before = replace(bench.run, trajectories=None)
    without = Bench(before, TINY, bench.scratch)
    assert without.sampler("diagonal", 0) is without.sampler("low_rank", 0) is None
    assert without.sampler("random", 0) is not None
    late = bench.late_weights(1)
    assert torch.equal(late, bench.run.trajectories.weights[1, 1:])
    gaussian = bench.sampler("diagonal", 1)
    torch.testing.assert_close(gaussian.mean, late.mean(0))
    torch.testing.assert_close(gaussian.sigma, late.std(0, correction=0))


def test_shift_has_equal_members_and_single_networks(done, bench, run):
    rows = {(row["method"], row["severity"]): row for row in done[0]["tables"]["corruption"]}
    assert {level for _, level in rows} == {0, 1, 4}
    some = bench.test.first(TINY.shift_rows)
    p = torch.cat([predict(n, some.x) for n in run.networks]).softmax(-1)
    alone = (p.argmax(-1) == some.y).double().mean()
    assert rows["original", 0]["accuracy"] == pytest.approx(float(alone), abs=1e-6)
    assert all(rows["original", level]["js"] == pytest.approx(0, abs=1e-12) for level in (0, 1, 4))
    ensemble = (p.mean(0).argmax(-1) == some.y).double().mean()
    assert rows["independent", 0]["accuracy"] == pytest.approx(float(ensemble), abs=1e-6)
    h = lambda q: -(q * q.clamp(min=1e-30).log()).sum(-1)  # noqa: E731
    js = (h(p.mean(0)) - h(p).mean(0)).double().mean()
    assert rows["independent", 0]["js"] == pytest.approx(float(js), abs=1e-6)
    noisy = data.corrupt(run.images[some.index], "contrast", 4, index=some.index)
    p = torch.cat([predict(n, run.inputs(noisy)) for n in run.networks]).softmax(-1)
    ensemble = (p.mean(0).argmax(-1) == some.y).double().mean()
    each = {(row["method"], row["corruption"], row["severity"]): row
            for row in done[0]["tables"]["each_corruption"]}  # fmt: skip
    accuracy = each["independent", "contrast", 4]["accuracy"]
    assert accuracy == pytest.approx(float(ensemble), abs=1e-6)


def test_the_arrays_of_a_folder_are_read(bench, run, tmp_path):
    pytest.importorskip("numpy")
    data.save_c(tmp_path, run.images, run.dataset.test_y, ["contrast"])
    settings = replace(TINY, corruptions=(), severities=(4,))
    own = Bench(run, settings, bench.scratch)
    groups = make_groups(own, {})
    read = measure_shift(own, groups, tmp_path)
    assert read.corruptions == ("contrast",)
    some = own.test.first(TINY.shift_rows)
    made = data.corrupt(run.images, "contrast", 4, levels=True)[some.index]
    p = torch.cat([predict(n, run.inputs(made)) for n in run.networks]).softmax(-1)
    right = (p.mean(0).argmax(-1) == some.y).double().mean()
    assert float(read.curves.curves["independent"].accuracy[-1]) == pytest.approx(float(right))
    data.save_c(tmp_path / "other", run.images.flip(0), run.dataset.test_y.flip(0), ["contrast"])
    with pytest.raises(ValueError, match="landscape: corrupted must be arrays of the test images"):
        report(run, settings, tmp_path / "out", corrupted=tmp_path / "other", progress=False)
    assert not (tmp_path / "out").exists()


def test_lines_start_and_end_at_checkpoints(done, bench, run):
    rows = [row for row in done[0]["tables"]["starts"] if row["run"] == 1]
    assert [row["t"] for row in rows] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for row, weights in ((rows[0], run.trajectories.weights[1, 0]), (rows[-1], run.weights[1])):
        loss = bench.measure(weights[None], bench.train, "an end").loss
        assert row["loss"] == pytest.approx(float(loss[0]), abs=1e-6)
    assert {row["line"] for row in done[0]["tables"]["curvature"]} == {
        "start to optimum", "optimum to optimum",
    }  # fmt: skip


def test_the_plane_holds_both_solutions(done, bench):
    with (done[1] / "figures" / "plane.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == TINY.plane_points**2
    numbers, verdict = found(done[0], "agreement of the solutions is")
    assert numbers == [0.0] and verdict == "pass"


def test_the_arc_goes_from_one_solution_to_the_other(bench, run):
    found = measure_radial(bench, {})
    rows, first, second = bench.test.first(TINY.map_rows), *run.weights.double()
    cosine = float(first @ second / (first.norm() * second.norm()))
    assert found.end == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-6)
    half = (first / first.norm() + second / second.norm()) / (2 + 2 * cosine) ** 0.5
    half = half * (first.norm() + second.norm()) / 2  # halfway, at the mean of the norms
    scores = bench.measure(half.float()[None], rows, "halfway", keep_labels=True)
    labels = bench.logits(run.weights, rows, "both").argmax(-1)
    agreement = (scores.labels[0] == labels).double().mean(1)
    middle = len(found.angle) // 2
    assert float(found.arc.accuracy[middle]) == pytest.approx(float(scores.accuracy[0]), abs=1e-6)
    assert torch.equal(found.arc.agreement[:, middle], agreement)
    assert found.arc.agreement.shape == (2, len(found.angle))


def test_everything_is_written_and_the_page_needs_nothing_else(done):
    document, out = done
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    top = {"index.html", "results.json", "results.csv", "results.md", "claims.csv"}
    assert top <= files and not (out / ".unfinished").exists()
    names = {"similarity", "functions", "samples", "diversity", "sizes", "corruption", "elsewhere",
             "plane", "starts", "curvature_1", "curvature_2"}  # fmt: skip
    assert set(document["figures"]) == names
    for name in names:
        assert {f"figures/{name}.{end}" for end in ("png", "pdf", "csv")} <= files
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(document))
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r'(src|href)="(https?:)?//', page)
    linked = set(re.findall(r'href="(figures/[^"]+)"', page))
    assert linked and linked <= files
    rows = [row for part in document["claims"].values() for row in part]
    assert [row["number"] for row in rows] == list(range(1, 25))
    with (out / "claims.csv").open() as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == [r["verdict"] for r in rows]
    text, markdown = describe(document), (out / "results.md").read_text()
    for row in rows:
        assert row["claim"] in text and row["claim"] in markdown
        assert row["verdict"] in ("pass", "fail", "inconclusive")


def test_one_network_without_epochs_says_what_it_cannot_tell(run, tmp_path):
    alone = RunFolder(run.problem, run.dataset, run.config, run.networks[:1], (0,))
    with without_figures():
        document = report(alone, replace(TINY, curvature_points=0), tmp_path, progress=False)
    rows = all_claims(document)
    told = [claim for claim, row in rows.items() if row["verdict"] != "inconclusive"]
    assert all(row["reason"] for claim, row in rows.items() if claim not in told)
    assert "independent runs end in weights that are orthogonal" not in told
    assert "weights move away from the origin during training" not in told
    assert "samples lie on a one-parameter family" in told
    assert "starts" not in document["tables"] and document["figures"] == {}
    assert any("no epochs were kept" in note for note in document["notes"])
    assert any("no figures: " in note for note in document["notes"])
    assert "<img" not in (tmp_path / "index.html").read_text()


def test_an_interrupted_report_goes_on(run, done, tmp_path, monkeypatch):
    from landscape_fast.studies import _landscape_space as space

    original, out = space.measure_radial, tmp_path / "out"
    small = replace(TINY, curvature_points=0)

    def stop(*_):
        raise KeyboardInterrupt("sweep stopped")

    monkeypatch.setattr(space, "measure_radial", stop)
    with pytest.raises(KeyboardInterrupt):
        report(run, small, out, progress=False)
    kept = list((out / ".unfinished").iterdir())
    assert len(kept) > 5
    kept[0].write_bytes(b"half a file")  # is measured anew
    monkeypatch.setattr(space, "measure_radial", original)
    with without_figures():
        document = report(run, small, out, progress=False)
    same = ("ensembles", "samples", "diversity", "corruption", "elsewhere", "starts")
    assert all(document["tables"][name] == done[0]["tables"][name] for name in same)
    assert not (out / ".unfinished").exists()


def test_networks_with_norms_get_statistics_of_their_own(tmp_path):
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(),
                             nn.Linear(16, 10))  # fmt: skip

    problem, config = Problem(members=2), TrainConfig(epochs=3, batch_size=64, lr=0.01)
    dataset = problem.load()
    trained = train_deep_ensemble(
        build, dataset.train_x, dataset.train_y, config, members=2, keep_every=1,
        directory=tmp_path, progress=False,
    )  # fmt: skip
    kept = load_trajectories(tmp_path, build())
    run = RunFolder(problem, dataset, config, tuple(trained.model.members), (0, 1), kept)
    bench = Bench(run, replace(TINY, calibration_rows=500), tmp_path / "scratch")
    network = build()
    kept.network(network, 1, 3)  # with the statistics of training
    network.train()(dataset.train_x[:500])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
            module.momentum = None  # a cumulative average: of these rows alone
    with torch.no_grad():
        network(dataset.train_x[:500])
        expected = network.eval()(bench.test.x)
    got = bench.solutions[1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # the same sums, reordered
    stacked = bench.networks(bench.weights)(bench.test.x)[1]
    torch.testing.assert_close(stacked, expected, rtol=1e-4, atol=1e-4)


def test_settings_are_those_of_a_size_with_changes():
    assert settings_of("smoke", samples=7, rows=None).samples == 7
    assert settings_of("paper").rows is None and settings_of("small", rows=5).rows == 5
    with pytest.raises(ValueError, match="settings_of: size must be one of .*; got 'huge'"):
        settings_of("huge")


def command(capsys, *arguments):
    try:
        code = cli.main(["landscape", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_the_command_writes_beside_the_run(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with without_figures():
        code, told = command(
            capsys, copy, "--size=smoke", "--rows=60", "--samples=2", "--plane-points=3",
            "--threads=1", "--corruptions=contrast,pixelate", "--device=cpu",
        )  # fmt: skip
    assert code == 0 and "landscape: samples around every solution" in told.err
    assert "independent runs end in weights that are orthogonal" in told.out
    assert told.out.rstrip().splitlines()[-1].startswith(f"wrote {copy / 'landscape'}/index.html")
    document = json.loads((copy / "landscape" / "results.json").read_text())
    assert document["settings"]["rows"] == document["settings"]["shift_rows"] == 60
    assert document["settings"]["corruptions"] == ["contrast", "pixelate"]


def test_ctrl_c_says_that_the_same_command_goes_on(folder, tmp_path, capsys, monkeypatch):
    from landscape_fast.studies import landscape_report

    def stop(*_, **__):
        raise KeyboardInterrupt("sweep stopped")

    monkeypatch.setattr(landscape_report, "report", stop)
    code, told = command(capsys, folder, f"--out={tmp_path}")
    assert code == 130 and told.out == ""
    assert f"kept in {tmp_path}, and the same command goes on" in told.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "path must be a folder that 'landscape-fast train' wrote; got nowhere"),
        (["--plane-points=1", "."], "--plane-points: must be at least 2; got 1"),
        (["--ood", "fog=here", "."], "--ood: must be NAME=DIR with NAME one of svhn, mnist"),
        (["--ood", "svhn=nowhere", "."], "--ood: must be a folder that exists; got nowhere"),
        (["--corrupted=nowhere", "."], "--corrupted: must be a folder that exists; got nowhere"),
        (
            ["--out=.", "."],
            "--out: must be another folder than that of the run, whose results.json",
        ),
        (["--corruptions=rust", "."], "--corruptions: must be 'all', or names out of .*got rust"),
    ],
)
def test_the_command_refuses(capsys, arguments, message):
    code, told = command(capsys, *arguments)
    assert code in (1, 2) and re.search(message, told.err) and told.out == ""
