"""Weights kept during training: which, where, the same however the run came to its end."""

import dataclasses

import pytest
import torch
from methods.problem import CONFIG, MEMBERS, plain, rows
from methods.test_resume import interrupt_after
from torch import nn

from landscape_fast.methods import TrainingInterrupted, load_trajectories, train_deep_ensemble
from landscape_fast.methods.checkpoint import save_checkpoint
from landscape_fast.nn import FlatLayout

FIVE = dataclasses.replace(CONFIG, epochs=5)
WAYS = (False, "batched", "loop")


def normed():
    """Norms have buffers, which the weights leave out."""
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(directory, build=plain, config=FIVE, members=MEMBERS, keep_every=2, **options):
    return train_deep_ensemble(
        build, *rows(), config, members=members, directory=directory, keep_every=keep_every,
        progress=False, **options,
    )  # fmt: skip


def kept(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*-epoch-*.pt")}


def test_the_files_are_those_of_the_epochs_asked_for(tmp_path):
    train(tmp_path, members=2)
    names = [f"member-{m:03d}-epoch-{e:04d}.pt" for m in (0, 1) for e in (0, 2, 4, 5)]
    assert sorted(kept(tmp_path)) == names


@pytest.mark.parametrize("together", WAYS)
def test_the_weights_are_those_of_a_shorter_run(tmp_path, together):
    """With a constant rate, the weights after epoch 2 of 5 are those of 2 epochs."""
    config = dataclasses.replace(FIVE, schedule="constant", warmup_epochs=0)
    trained = train(tmp_path, normed, config, together=together)
    found = load_trajectories(tmp_path, normed())
    assert found.members == (0, 1, 2) and found.epochs == (0, 2, 4, 5)
    shorter = train_deep_ensemble(
        normed, *rows(), dataclasses.replace(config, epochs=2), members=MEMBERS,
        together=together, progress=False,
    )  # fmt: skip
    layout = FlatLayout(normed())
    for t, expected in ((1, shorter), (3, trained)):
        assert torch.equal(found.weights[:, t], layout.flatten_many(list(expected.model.members)))
        for r, network in enumerate(expected.model.members):
            own = found.network(normed(), r, t).state_dict()
            state = network.state_dict()
            assert all(torch.equal(own[name], value) for name, value in state.items())


@pytest.mark.parametrize("together", WAYS)
def test_before_training_means_the_first_weights_of_each_stream(tmp_path, together):
    options = {"keep_every": 3, "members": 2, "together": together}
    train(tmp_path, config=CONFIG, **options)
    start = load_trajectories(tmp_path, plain()).weights[:, 0]
    unmoved = dataclasses.replace(CONFIG, lr=1e-30, weight_decay=0.0, epochs=1)
    still = train_deep_ensemble(plain, *rows(), unmoved, members=2, progress=False)
    assert torch.equal(start, FlatLayout(plain()).flatten_many(list(still.model.members)))
    assert not torch.equal(start[0], start[1])


@pytest.mark.parametrize("together", WAYS)
@pytest.mark.parametrize("steps", [1, 6, 12], ids=["at once", "mid-epoch", "end of an epoch"])
def test_an_interrupted_run_has_the_same_bits_in_the_same_files(tmp_path, together, steps):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, members=2, together=together)
    with pytest.raises(TrainingInterrupted):
        train(stopped, members=2, together=together, on_step=interrupt_after(steps))
    train(stopped, members=2, together=together, resume=True)
    assert kept(stopped) == kept(whole)


def test_a_killed_run_writes_again_what_its_checkpoint_does_not_know(tmp_path):
    """Killed between an epoch's weights and its checkpoint, it has a file too many, not too few."""

    def killed(step):
        if step == 9:  # of epoch 3; the checkpoint is of epoch 2
            raise RuntimeError("killed")

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, members=1)
    with pytest.raises(RuntimeError, match="killed"):
        train(stopped, members=1, on_step=killed)
    (stopped / "member-000-epoch-0004.pt").write_bytes(b"of a crash")
    train(stopped, members=1, resume=True)
    assert kept(stopped) == kept(whole)


def test_an_unfinished_run_has_the_epochs_that_all_its_members_have(tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, members=2, on_step=interrupt_after(5 * 4 + 9))
    found = load_trajectories(tmp_path, plain())
    assert (found.members, found.epochs) == ((0, 1), (0, 2))
    found = load_trajectories(tmp_path, plain(), members=[0])
    assert found.epochs == (0, 2, 4, 5) and found.weights.shape[:2] == (1, 4)


def test_a_member_that_fails_leaves_the_epochs_before(tmp_path):
    def build():
        build.made += 1
        return normed() if build.made == 1 else nn.Sequential(normed(), Explodes())

    class Explodes(nn.Module):
        def forward(self, x):
            return x * float("inf") if self.training else x

    build.made = 0
    with pytest.warns(UserWarning, match="member 1 failed"):
        train(tmp_path, build, members=2)
    assert sorted(kept(tmp_path))[4:] == ["member-001-epoch-0000.pt"]


def test_runs_without_kept_epochs_write_and_resume_as_before(tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, members=1, keep_every=0, on_step=interrupt_after(5))
    with pytest.raises(ValueError, match=r"got keep_every 'absent' \(now 2\)"):
        train(tmp_path, members=1, resume=True)
    train(tmp_path, members=1, keep_every=0, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["member-000.pt"]


def test_a_run_that_begins_anew_leaves_no_files_of_an_earlier_one(tmp_path):
    train(tmp_path, members=3)
    shorter = dataclasses.replace(FIVE, epochs=2)
    train(tmp_path, members=2, config=shorter, keep_every=1)
    found = load_trajectories(tmp_path, plain())
    assert (found.members, found.epochs) == ((0, 1), (0, 1, 2))


def test_a_resumed_run_misses_a_file_that_somebody_deleted(tmp_path):
    train(tmp_path, members=1)
    (tmp_path / "member-000-epoch-0002.pt").unlink()
    with pytest.raises(
        ValueError,
        match=r"resume: checkpoints must be those of a run whose kept epochs are all there; "
        r"got no .*member-000-epoch-0002\.pt; train again without resume",
    ):
        train(tmp_path, members=1, resume=True)


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"keep_every": -1}, "keep_every must be an integer of at least 0; got -1"),
        ({"keep_every": True}, "keep_every must be an integer of at least 0; got True"),
        ({"directory": None}, "directory must be a folder where keep_every is above 0; got None"),
    ],
)
def test_training_refuses(tmp_path, options, rule):
    with pytest.raises(ValueError, match=f"train_deep_ensemble: {rule}"):
        train(**{"directory": tmp_path} | options)


def test_loading_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"load_trajectories: directory must be .* without; train"):
        load_trajectories(tmp_path, plain())
    train(tmp_path, members=1)
    with pytest.raises(ValueError, match=r"members must be some of \[0\]; got \[1\]"):
        load_trajectories(tmp_path, plain(), members=[1])
    with pytest.raises(ValueError, match="a file with the tensors of Linear; got .*0000.pt with"):
        load_trajectories(tmp_path, nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"source\['0.weight'\] must be \[9, 2\]; got \[8, 2\]"):
        model = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))
        load_trajectories(tmp_path, model)
    save_checkpoint(tmp_path / "member-000-epoch-0002.pt", {"lr": 3.0}, {})
    with pytest.raises(ValueError, match=r"lr 3.0 \(now 0.02\).* in .*member-000-epoch-0002.pt"):
        load_trajectories(tmp_path, plain())
    (tmp_path / "member-000-epoch-0002.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match="must be a complete file written by landscape_fast"):
        load_trajectories(tmp_path, plain())
