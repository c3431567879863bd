"""What the state of members trained together has to hold, and what it must not stumble over."""

import dataclasses

import pytest
import torch
from methods.problem import CONFIG, rows
from methods.test_deep_together import (
    WAYS,
    assert_close,
    assert_same,
    double,
    problem,
    train,
)
from methods.test_resume import interrupt_after
from torch import nn

from landscape_fast.methods import TrainingInterrupted, predict, train_deep_ensemble
from landscape_fast.nn.stacked_layers import StackedDropout


class Counts(nn.Sequential):
    """What it computes depends on a buffer that its state dict leaves out."""

    def __init__(self):
        super().__init__(*double())
        self.register_buffer("calls", torch.ones(()).double(), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1
        return super().forward(x) / self.calls


@pytest.mark.parametrize("together", WAYS)
def test_buffers_outside_of_the_state_dict_are_trained_too(tmp_path, together):
    x, y = problem(double)
    options = {"members": 2, "progress": False}
    expected = train_deep_ensemble(Counts, x, y, CONFIG, **options)
    trained = train_deep_ensemble(Counts, x, y, CONFIG, together=together, **options)
    torch.testing.assert_close(predict(trained.model, x), predict(expected.model, x))
    options |= {"together": together, "directory": tmp_path}
    with pytest.raises(TrainingInterrupted):
        train_deep_ensemble(Counts, x, y, CONFIG, on_step=interrupt_after(3), **options)
    resumed = train_deep_ensemble(Counts, x, y, CONFIG, resume=True, **options)
    assert torch.equal(predict(resumed.model, x), predict(trained.model, x))


@pytest.mark.parametrize("together", WAYS)
def test_rows_without_a_class_are_left_out_as_in_turn(together):
    x, y = problem(double)
    y = torch.where(torch.arange(len(y)) % 4 == 0, -100, y)
    options = {"members": 2, "progress": False}
    config = dataclasses.replace(CONFIG, optimizer="sgd", batch_size=10, label_smoothing=0.1)
    expected = train_deep_ensemble(double, x, y, config, **options)
    trained = train_deep_ensemble(double, x, y, config, together=together, **options)
    assert_close(trained, expected)


def test_masks_for_all_members_resume_too(tmp_path, monkeypatch):
    """Those of torch's global generator, as a batched pass draws them on a GPU."""

    def forward(self, x):
        self.loop.plain.training = self.training
        return self.loop.plain(x)

    monkeypatch.setattr(StackedDropout, "forward", forward)
    expected = train(together="batched")
    with pytest.raises(TrainingInterrupted):
        train(together="batched", directory=tmp_path, on_step=interrupt_after(3))
    torch.manual_seed(1)
    assert_same(train(together="batched", directory=tmp_path, resume=True), expected)


@pytest.mark.parametrize("together", [False, *WAYS])
def test_infinities_of_a_mask_and_tensors_without_numbers_are_no_failure(together):
    class Masked(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 3), nn.Tanh())
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
            self.register_buffer("nothing", torch.zeros(0, 2))

    config = dataclasses.replace(CONFIG, epochs=1)
    trained = train_deep_ensemble(
        Masked, *rows(), config, members=2, together=together, progress=False
    )
    assert not trained.failed and len(trained.model.members) == 2
