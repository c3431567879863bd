import pytest
import torch
from methods.problem import CONFIG, MEMBERS, batch_ensemble, plain, rows
from torch import nn

from landscape_fast.landscape import diagnose
from landscape_fast.methods import (
    DeepEnsemble,
    predict,
    train_batch_ensemble,
    train_deep_ensemble,
)
from landscape_fast.nn import BatchEnsembleLinear


def test_a_deep_ensemble_stacks_its_members():
    members = [plain().eval() for _ in range(MEMBERS)]
    x, _ = rows()
    logits = DeepEnsemble(members)(x)
    for m, member in enumerate(members):
        assert torch.equal(logits[m], member(x))


def test_members_are_independent_and_histories_one_each():
    x, y = rows()
    trained = train_deep_ensemble(plain, x, y, CONFIG, members=MEMBERS, progress=False)
    logits = predict(trained.model, x)
    assert logits.shape == (MEMBERS, len(x), 3)
    assert len(trained.histories) == len(trained.seconds) == MEMBERS
    assert all(len(history) == CONFIG.epochs for history in trained.histories)
    for i in range(MEMBERS):
        for j in range(i):
            assert not torch.allclose(logits[i], logits[j], atol=0.01)
    assert not any(module.training for module in trained.model.modules())


def test_batch_members_share_the_weight_and_learn_their_own_factors():
    x, y = rows()
    trained = train_batch_ensemble(batch_ensemble, x, y, CONFIG, progress=False)
    layer = trained.model[0]
    assert layer.weight.shape == (8, 2)
    fresh = batch_ensemble()[0]
    # factors start as signs; training must have moved every member's
    assert (layer.r.abs() != 1).any(dim=1).all() and (fresh.r.abs() == 1).all()
    assert len(trained.histories) == 1
    assert predict(trained.model, x).shape == (MEMBERS, len(x), 3)


@pytest.mark.parametrize("members", [0, -1, 2.0, True])
def test_a_deep_ensemble_needs_members(members):
    with pytest.raises(
        ValueError,
        match=f"train_deep_ensemble: members must be an integer of at least 1; got {members}",
    ):
        train_deep_ensemble(plain, *rows(), CONFIG, members=members, progress=False)
    with pytest.raises(ValueError, match="DeepEnsemble: members must be at least one network"):
        DeepEnsemble([])


def test_a_plain_network_is_no_batch_ensemble():
    with pytest.raises(
        ValueError,
        match=r"train_batch_ensemble: build must be .*; got one without a member dimension; "
        r"give its layers members=",
    ):
        train_batch_ensemble(lambda: nn.Linear(2, 3), *rows(), CONFIG, progress=False)


@pytest.mark.parametrize("tested", [True, False])
def test_every_batch_ensemble_comes_with_its_diversity(tested, capsys):
    """Measured on the rows given, else on training rows, and printed, unless told not to."""
    x, y = rows()
    test = (x[:20] + 0.1, y[:20]) if tested else None
    trained = train_batch_ensemble(batch_ensemble, x, y, CONFIG, progress=False, test=test)
    where = test if tested else (x, y)
    assert trained.diversity == diagnose(predict(trained.model, where[0]), where[1])
    lines = capsys.readouterr().err.splitlines()
    kind = "20 test" if tested else "50 training"
    assert lines == [
        f"BatchEnsemble of 3, on {kind} rows:",
        *(f"- {text}" for text in trained.diversity.lines),
    ]
    quiet = train_batch_ensemble(batch_ensemble, x, y, CONFIG, progress=False, report=False)
    assert quiet.diversity is None and capsys.readouterr().err == ""


def test_members_that_start_equal_are_reported_as_identical(capsys):
    def build():
        return nn.Sequential(BatchEnsembleLinear(2, 8, 3), nn.ReLU(), BatchEnsembleLinear(8, 3, 3))

    trained = train_batch_ensemble(build, *rows(), CONFIG, progress=False)
    assert trained.diversity.nearly_identical and trained.diversity.js == 0
    assert "WARNING: the members are nearly identical" in capsys.readouterr().err


def test_one_member_has_nothing_to_report(capsys):
    trained = train_batch_ensemble(
        lambda: BatchEnsembleLinear(2, 3, members=1), *rows(), CONFIG, progress=False
    )
    assert trained.diversity is None and capsys.readouterr().err == ""
