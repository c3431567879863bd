"""A run interrupted anywhere and resumed is the run that was never interrupted, bit for bit."""

import dataclasses
import signal
from functools import partial

import pytest
import torch
from methods.problem import CONFIG, MEMBERS, STEPS, batch_ensemble, plain, rows

from landscape_fast.methods import (
    TrainingInterrupted,
    fit,
    predict,
    train_batch_ensemble,
    train_deep_ensemble,
)
from landscape_fast.models import ResNet
from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear

PICTURES = dataclasses.replace(
    CONFIG, schedule="step", milestones=(1, 2), augment="crop_flip", member_batches="own"
)


def pictures():
    return rows()[0].repeat(1, 32).view(-1, 1, 8, 8), rows()[1]


def residual():
    """Norms keep running statistics, which a checkpoint must hold, too."""
    signs = {"members": MEMBERS, "r_init": "random_sign"}
    factories = {"conv": partial(BatchEnsembleConv2d, **signs),
                 "linear": partial(BatchEnsembleLinear, **signs)}  # fmt: skip
    return ResNet((1, 8, 8), 3, blocks=1, dropout=0.1, **factories)


TRAIN = {
    "deep": lambda **kw: train_deep_ensemble(
        plain, *rows(), CONFIG, members=MEMBERS, progress=False, **kw
    ),
    "batch": lambda **kw: train_batch_ensemble(
        batch_ensemble, *rows(), CONFIG, progress=False, **kw
    ),
    "own": lambda **kw: train_batch_ensemble(
        batch_ensemble,
        *rows(),
        dataclasses.replace(CONFIG, member_batches="own"),
        progress=False,
        **kw,
    ),
    "pictures": lambda **kw: train_batch_ensemble(
        residual, *pictures(), PICTURES, progress=False, **kw
    ),
}


def interrupt_after(steps):
    """An on_step that presses Ctrl-C once, after so many steps over all networks."""
    count = 0

    def on_step(_):
        nonlocal count
        count += 1
        if count == steps:
            signal.raise_signal(signal.SIGINT)

    return on_step


def numbers(histories):
    return [
        [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]
        for history in histories
    ]


def assert_same(trained, expected):
    for name, value in expected.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name
    x = pictures()[0] if isinstance(expected.model, ResNet) else rows()[0]
    assert torch.equal(predict(trained.model, x), predict(expected.model, x))
    assert trained.diversity == expected.diversity
    assert numbers(trained.histories) == numbers(expected.histories)


# in an epoch, at the end of one, at the very last step, and (deep) in a later member
CASES = [
    ("batch", 1),
    ("batch", 6),
    ("batch", 8),
    ("batch", STEPS),
    ("own", 6),
    ("own", 8),
    ("pictures", 6),
    ("pictures", 8),
    ("deep", 3),
    ("deep", 4),
    ("deep", STEPS),
    ("deep", STEPS + 7),
]


@pytest.mark.parametrize(("method", "steps"), CASES)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, method, steps):
    torch.manual_seed(99)
    expected = TRAIN[method]()
    with pytest.raises(TrainingInterrupted) as stop:
        TRAIN[method](directory=tmp_path, on_step=interrupt_after(steps))
    assert stop.value.checkpoint.parent == tmp_path and stop.value.checkpoint.exists()
    assert f"saved {stop.value.checkpoint}" in str(stop.value)
    torch.manual_seed(1)  # the state at the time of resuming must not matter
    done = []
    resumed = TRAIN[method](directory=tmp_path, resume=True, on_step=done.append)
    total = STEPS * (MEMBERS if method == "deep" else 1)
    assert len(done) == total - steps  # nothing is trained twice, nothing is left out
    assert_same(resumed, expected)


def test_two_interruptions(tmp_path):
    for steps in (2, 3):
        with pytest.raises(TrainingInterrupted):
            TRAIN["batch"](directory=tmp_path, resume=True, on_step=interrupt_after(steps))
    done = []
    resumed = TRAIN["batch"](directory=tmp_path, resume=True, on_step=done.append)
    assert done[0] == 6
    assert_same(resumed, TRAIN["batch"]())


def test_a_finished_run_is_loaded_and_not_trained(tmp_path):
    first = TRAIN["deep"](directory=tmp_path)
    again = TRAIN["deep"](
        directory=tmp_path, resume=True, on_step=lambda step: pytest.fail("trained again")
    )
    assert_same(again, first)
    assert again.seconds == first.seconds


def test_a_larger_ensemble_contains_the_smaller_one(tmp_path):
    small = TRAIN["deep"](directory=tmp_path)
    done = []
    large = train_deep_ensemble(
        plain,
        *rows(),
        CONFIG,
        members=MEMBERS + 1,
        progress=False,
        directory=tmp_path,
        resume=True,
        on_step=done.append,
    )
    assert len(done) == STEPS
    x = rows()[0]
    assert torch.equal(predict(large.model, x)[:MEMBERS], predict(small.model, x))
    alone = train_deep_ensemble(plain, *rows(), CONFIG, members=1, progress=False)
    assert torch.equal(predict(alone.model, x), predict(small.model, x)[:1])


def test_without_resume_old_checkpoints_are_replaced(tmp_path):
    with pytest.raises(TrainingInterrupted):
        TRAIN["batch"](directory=tmp_path, on_step=interrupt_after(3))
    done = []
    assert_same(TRAIN["batch"](directory=tmp_path, on_step=done.append), TRAIN["batch"]())
    assert done[0] == 1


def test_an_interruption_without_a_checkpoint_says_so():
    with pytest.raises(
        TrainingInterrupted, match="member 2/3 stopped in epoch 1 after step 2; nothing was saved"
    ):
        TRAIN["deep"](on_step=interrupt_after(STEPS + 2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal must interrupt")

    with pytest.raises(KeyboardInterrupt) as stop:
        TRAIN["batch"](directory=tmp_path, on_step=twice)
    assert not isinstance(stop.value, TrainingInterrupted)
    assert not list(tmp_path.iterdir())


def test_a_handler_of_the_application_is_kept():
    seen = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        TRAIN["batch"](on_step=interrupt_after(2))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.SIGINT]


OTHER = [
    ("lr", 0.01, r"lr 0\.02 \(now 0\.01\)"),
    ("epochs", 4, r"epochs 3 \(now 4\)"),
    ("seed", 6, r"seed 5 \(now 6\)"),
    ("optimizer", "sgd", r"optimizer 'adam' \(now 'sgd'\)"),
    ("member_batches", "own", r"member_batches 'shared' \(now 'own'\)"),
]


@pytest.mark.parametrize(("name", "value", "difference"), OTHER)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, name, value, difference):
    TRAIN["batch"](directory=tmp_path)
    config = dataclasses.replace(CONFIG, **{name: value})
    with pytest.raises(
        ValueError,
        match=rf"resume: checkpoint must be of this configuration; "
        rf"got {difference} in .*batch\.pt; ",
    ):
        train_batch_ensemble(
            batch_ensemble, *rows(), config, directory=tmp_path, resume=True, progress=False
        )


def test_a_checkpoint_of_another_model_data_stream_or_method_is_refused(tmp_path):
    x, y = rows()
    path = tmp_path / "run.pt"
    options = {"checkpoint": path, "resume": True, "progress": False}
    fit(plain(), x, y, CONFIG, **options)
    with pytest.raises(ValueError, match=r"got data '\(50, 2\).*' \(now '\(50, 2\).*'\) in"):
        fit(plain(), x + 1, y, CONFIG, **options)
    with pytest.raises(ValueError, match=r"got data '\(50, 2\).*' \(now '\(50, 2\).*'\) in"):
        fit(plain(), x, y.flip(0), CONFIG, **options)
    wide = torch.nn.Sequential(torch.nn.Linear(2, 9), torch.nn.Linear(9, 3))
    with pytest.raises(ValueError, match=r"got model 'Sequential, 51 parameters.*' \(now 'Sequent"):
        fit(wide, x, y, CONFIG, **options)
    less_dropout = plain()
    less_dropout[2].p = 0.1
    with pytest.raises(ValueError, match="got model"):
        fit(less_dropout, x, y, CONFIG, **options)
    with pytest.raises(ValueError, match=r"got stream 0 \(now 1\)"):
        fit(plain(), x, y, CONFIG, stream=1, **options)
    with pytest.raises(ValueError, match=r"got method 'absent' \(now 'deep'\)"):
        fit(plain(), x, y, CONFIG, identity={"method": "deep"}, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["deep", "batch", "pictures"])
def test_on_a_gpu_too(tmp_path, method):
    """Kernels are deterministic, and the dropout state of the GPU is part of the checkpoint."""
    before = torch.cuda.get_rng_state()
    expected = TRAIN[method](device="cuda")
    with pytest.raises(TrainingInterrupted):
        TRAIN[method](device="cuda", directory=tmp_path, on_step=interrupt_after(6))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(1)
    assert_same(TRAIN[method](device="cuda", directory=tmp_path, resume=True), expected)
