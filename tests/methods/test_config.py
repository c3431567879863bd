import re

import pytest
import torch

from landscape_fast.methods import TrainConfig, make_optimizer

BAD = [
    ("epochs", 0, "an integer of at least 1"),
    ("epochs", 2.0, "an integer of at least 1"),
    ("batch_size", True, "an integer of at least 1"),
    ("step_epochs", -1, "an integer of at least 1"),
    ("seed", -1, "a non-negative integer"),
    ("lr", 0.0, "a finite number above 0"),
    ("lr", float("nan"), "a finite number above 0"),
    ("step_factor", "half", "a finite number above 0"),
    ("fast_lr_mult", float("inf"), "a finite number above 0"),
    ("fast_weight_decay", -0.1, "a finite number of at least 0"),
    ("member_bias", "shared", "one of"),
    ("member_batches", "tiled", "one of"),
    ("augment", "mixup", "one of"),
    ("step_factor", (0.5, -0.1), "a finite number above 0"),
    ("step_factor", (0.5, 0.1), "a number, or one for each of 0 milestones"),
    ("milestones", (2, 2), "rising integers of at least 1"),
    ("milestones", (0, 2), "rising integers of at least 1"),
    ("milestones", 3, "rising integers of at least 1"),
    ("milestones", (3,), r"\(\) unless the schedule is 'step'"),
    ("weight_decay", -1e-4, "a finite number of at least 0"),
    ("warmup_epochs", -1, "a finite number of at least 0"),
    ("warmup_epochs", 11, "at most epochs"),
    ("momentum", 1.0, r"a number in \[0, 1\)"),
    ("label_smoothing", -0.1, r"a number in \[0, 1\)"),
    ("optimizer", "rmsprop", "one of"),
    ("schedule", "linear", "one of"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_a_setting_out_of_its_range_is_refused(name, value, rule):
    with pytest.raises(
        ValueError, match=rf"^TrainConfig: {name} must be {rule}.*; got {re.escape(repr(value))}"
    ):
        TrainConfig(epochs=10, **{name: value}) if name != "epochs" else TrainConfig(epochs=value)


def factors(**settings):
    config = TrainConfig(epochs=4, **settings)
    return [config.lr_factor(step, 5) for step in range(20)]


def test_constant_and_step_schedules():
    assert factors(schedule="constant") == [1.0] * 20
    expected = [1.0] * 10 + [0.1] * 10
    assert factors(schedule="step", step_epochs=2, step_factor=0.1) == expected


def test_milestones_say_after_how_many_epochs_the_rate_drops():
    expected = [1.0] * 5 + [0.1] * 10 + [0.1**2] * 5
    assert factors(schedule="step", milestones=(1, 3, 9), step_factor=0.1) == expected
    # as a JSON file has them
    assert TrainConfig(schedule="step", milestones=[1, 3]).milestones == (1, 3)


def test_each_milestone_may_have_a_factor_of_its_own():
    options = {"schedule": "step", "milestones": (1, 3), "step_factor": [0.1, 0.5]}
    assert factors(**options) == [1.0] * 5 + [0.1] * 10 + [0.1 * 0.5] * 5
    with pytest.raises(ValueError, match="one for each of 2 milestones; got .0.1,."):
        TrainConfig(schedule="step", milestones=(1, 3), step_factor=(0.1,))


def test_cosine_falls_from_one_to_almost_zero():
    values = factors(schedule="cosine")
    assert values[0] == 1.0 and values[10] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 0.01


def test_hold_linear_is_the_schedule_of_the_authors_of_mode_connectivity():
    """Their rule, epoch by epoch: 1 to half of the epochs, 0.01 from nine tenths of them."""
    config = TrainConfig(epochs=20, schedule="hold_linear")
    values = [config.lr_factor(3 * epoch + 2, 3) for epoch in range(20)]
    assert values[:11] == [1.0] * 11 and values[18:] == pytest.approx([0.01] * 2)
    falling = [1 - (epoch / 20 - 0.5) / 0.4 * 0.99 for epoch in range(11, 18)]
    assert values[11:18] == pytest.approx(falling)
    assert config.lr_factor(33, 3) == config.lr_factor(35, 3) > config.lr_factor(36, 3)


def test_warm_up_rises_in_equal_steps_then_the_schedule_starts_at_one():
    values = factors(schedule="cosine", warmup_epochs=1)
    assert values[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert factors(schedule="constant", warmup_epochs=0.4)[:3] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_the_optimiser_is_the_named_one_with_its_settings(name, kind):
    config = TrainConfig(optimizer=name, lr=0.3, weight_decay=0.1, momentum=0.7)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.1)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.7, True)
