"""A folder that `train` wrote, opened again: the same networks, or an error that says why not."""

import json
import shutil
import sys

import pytest
import torch

from landscape_fast import cli
from landscape_fast.methods import TrainConfig, predict
from landscape_fast.studies.compare import Problem
from landscape_fast.studies.run_folder import open_run

pytest.importorskip("sklearn")
TRAIN = ["train", "--data=digits", "--threads=1", "--device=cpu", "--quiet", "--epochs=2"]


def train(capsys, out, *arguments):
    code = cli.main([*TRAIN, f"--out={out}", *arguments])
    return code, capsys.readouterr()


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Which take most of the time of such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks of one epoch each, with the weights before and after it."""
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = [*TRAIN, "--epochs=1", "--members=2", "--keep-every=1", f"--out={out}"]
    assert cli.main(arguments) == 0
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change(path, **values):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | values))


def test_the_networks_are_those_that_were_measured(folder):
    run = open_run(folder)
    assert run.problem == Problem(members=2) and run.config.epochs == 1
    assert isinstance(run.config, TrainConfig) and run.members == (0, 1) and run.notes == ()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    logits = torch.cat([predict(network, run.dataset.test_x) for network in run.networks])
    accuracy = (logits.argmax(-1) == run.dataset.test_y).double().mean(1)
    assert float(accuracy.mean()) == pytest.approx(rows[0]["member_accuracy"], abs=1e-6)


def test_trajectories_end_at_the_networks(folder):
    run = open_run(folder)
    assert run.trajectories.epochs == (0, 1)
    assert torch.equal(run.trajectories.weights[:, -1], run.weights)


@pytest.mark.parametrize("pixels", ["standardized", "unit", "raw"])
def test_test_images_become_the_inputs_of_the_training(folder, pixels):
    run = open_run(folder)
    problem = Problem(members=2, pixels=pixels)
    other = type(run)(problem, problem.load(), run.config, run.networks, run.members)
    assert 0 <= float(other.images.min()) < float(other.images.max()) <= 1
    assert torch.equal(other.inputs(other.images), other.dataset.test_x)


def test_run_json_is_there_before_the_first_step_and_survives_a_refused_one(tmp_path, capsys):
    assert train(capsys, tmp_path, "--method=single")[0] == 0
    before = (tmp_path / "run.json").read_text()
    code, told = train(capsys, tmp_path, "--method=single", "--lr=0.1", "--resume")
    assert code == 1 and "lr 0.005 (now 0.1)" in told.err
    assert (tmp_path / "run.json").read_text() == before
    assert train(capsys, tmp_path, "--method=single", "--lr=0.1", "--overwrite")[0] == 0
    assert open_run(tmp_path).config.lr == 0.1


def test_overwriting_removes_kept_epochs(tmp_path, capsys):
    assert train(capsys, tmp_path, "--method=single", "--keep-every=1")[0] == 0
    assert len(list((tmp_path / "checkpoints").glob("*-epoch-*.pt"))) == 3
    assert train(capsys, tmp_path, "--method=single", "--overwrite")[0] == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["member-000.pt"]
    assert open_run(tmp_path).trajectories is None


def test_overwriting_keeps_all_until_there_is_something_else(tmp_path, capsys, monkeypatch):
    from landscape_fast.methods.trainer import Run

    assert train(capsys, tmp_path, "--method=single", "--keep-every=2")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Run, "_one_step", fails)
    again = ["--method=single", "--keep-every=1", "--lr=0.1", "--overwrite"]
    assert train(capsys, tmp_path, *again)[0] == 1
    after = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_batch_ensemble_has_no_epochs_to_keep(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(capsys, tmp_path, "--method=batch", "--keep-every=1")
    assert "--keep-every: must be left out with --method batch" in capsys.readouterr().err


def test_members_that_are_not_finished_are_left_out(copy):
    path = copy / "checkpoints" / "member-001.pt"
    content = torch.load(path, weights_only=True)
    content["state"]["step"] -= 1
    torch.save(content, path)
    run = open_run(copy)
    assert run.members == (0,) and len(run.trajectories.weights) == 1
    assert run.notes == ("member 2 of 2 is left out: it is trained for 22 of 23 steps",)
    path.unlink()
    (copy / "checkpoints" / "member-000.pt").unlink()
    with pytest.raises(ValueError, match="a run with a finished network; got member 1 of 2 is"):
        open_run(copy)


def test_kept_epochs_that_do_not_reach_the_end_are_no_trajectory(copy):
    last = max((copy / "checkpoints").glob("member-001-epoch-*.pt"))
    last.unlink()
    run = open_run(copy)
    assert run.members == (0, 1) and run.trajectories is None


def test_a_folder_of_an_earlier_release_has_no_run_json(copy):
    (copy / "run.json").unlink()
    assert torch.equal(open_run(copy).weights, open_run(copy).trajectories.weights[:, -1])


def damaged(copy):
    (copy / "run.json").write_text('{"problem"')


def foreign(copy):
    (copy / "run.json").write_text("[1, 2]")


def batched(copy):
    change(copy / "run.json", method="batch")


def newer(copy):
    change(copy / "run.json", problem={"data": "digits", "hue": 3})


def other_code(copy):
    change(copy / "run.json", network="MLP, 3 parameters")


def other_data(copy):
    change(copy / "run.json", training_rows="(3, 1, 8, 8)")


def other_settings(copy):
    training = json.loads((copy / "run.json").read_text())["training"]
    change(copy / "run.json", training=training | {"lr": 1.0})


@pytest.mark.parametrize(
    "harm, message",
    [
        (shutil.rmtree, "path must be a folder that 'landscape-fast train' wrote; got"),
        (lambda copy: [p.unlink() for p in copy.glob("*.json")], "with run.json; got .* without"),
        (damaged, "run.json must be complete JSON; got"),
        (foreign, "run.json must be the description of a training run, format 1; got something"),
        (batched, "must be of a method .*; got 'batch'; train with --method deep"),
        (newer, "must hold settings that this version knows; got .*hue"),
        (other_code, "network of the run must be MLP, 3 parameters; got MLP, 26"),
        (other_data, r"training_rows of the run must be \(3, 1, 8, 8\); got \(1442,"),
        (other_settings, "member-000.pt must be a member of the run; got one with another lr"),
    ],
)
def test_open_run_refuses(copy, harm, message):
    harm(copy)
    with pytest.raises(ValueError, match=f"open_run: .*{message}"):
        open_run(copy)
