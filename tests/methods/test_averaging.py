"""SWA against the mean of the networks of a run by hand; SWAG's plan; resuming."""

import dataclasses
import math

import pytest
import torch
from methods.problem import plain, rows
from methods.test_cyclic import CONFIG, STEPS, by_hand, deterministic, normed
from methods.test_resume import interrupt_after, numbers

from landscape_fast.methods import TrainingInterrupted, train_swa, train_swag

HOLD = dataclasses.replace(CONFIG, schedule="hold_linear")


def mean_of(kept):
    return [torch.stack(same).double().mean(0).float() for same in zip(*kept, strict=True)]


def assert_mean(trained, expected):
    (network,) = trained.model.members
    assert not network.training
    for p, want in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), want)


def test_the_mean_of_a_constant_rate():
    """Four epochs: 1, 1, 1, then falling; two with the rate of SWA, two networks in each."""

    def rate(i):
        epoch = (i - 1) // STEPS
        if epoch >= 4:
            return 0.04
        return 0.1 * (1 - 0.6 * max(0, epoch / 4 - 0.5) / 0.4)

    keep = [4 * STEPS + 2, 4 * STEPS + 4, 4 * STEPS + 6, 4 * STEPS + 8]
    expected = mean_of(by_hand(HOLD, rate, keep))
    options = {"swa_lr": 0.04, "collect": 2, "per_epoch": 2, "progress": False}
    assert_mean(train_swa(deterministic, *rows(), HOLD, **options), expected)
    at_once = {**options, "collect": 6, "per_epoch": 1}
    expected = mean_of(by_hand(HOLD, lambda i: 0.04, range(STEPS, 6 * STEPS + 1, STEPS)))
    assert_mean(train_swa(deterministic, *rows(), HOLD, **at_once), expected)


def test_the_mean_of_cycles():
    """Two epochs down to 0, where the first is taken, and two cycles of two epochs."""

    def rate(i):
        start, length, top = (0, 8, 0.1) if i <= 8 else (8, 8, 0.2)
        return 0.5 * top * (1 + math.cos(math.pi * ((i - start - 1) % length) / length))

    expected = mean_of(by_hand(CONFIG, rate, [8, 16, 24]))
    options = {"kind": "cyclic", "swa_lr": 0.2, "collect": 4, "cycles": 2, "progress": False}
    assert_mean(train_swa(deterministic, *rows(), CONFIG, **options), expected)
    at_once = {**options, "collect": 6, "cycles": 3}
    expected = mean_of(by_hand(CONFIG, lambda i: rate(i + 8), [8, 16, 24]))
    assert_mean(train_swa(deterministic, *rows(), CONFIG, **at_once), expected)


def test_swag_collects_what_swa_averages():
    options = {"swa_lr": 0.04, "collect": 3, "per_epoch": 2, "progress": False, "runs": 2}
    means = train_swa(deterministic, *rows(), HOLD, **options)
    trained = train_swag(deterministic, *rows(), HOLD, samples=4, rank=3, **options)
    assert len(trained.model.members) == 8 and len(trained.swags) == len(trained.histories) == 2
    for swag, network in zip(trained.swags, means.model.members, strict=True):
        assert swag.count == 6 and swag.held == 3
        torch.testing.assert_close(swag.mean, swag.layout.flatten(network))
    layout = trained.swags[0].layout
    drawn = [layout.flatten(member) for member in trained.model.members]
    assert len({tuple(w.tolist()) for w in drawn}) == 8
    exact = train_swag(deterministic, *rows(), HOLD, samples=1, scale=0.0, **options)
    for swag, network in zip(trained.swags, exact.model.members, strict=True):
        torch.testing.assert_close(swag.layout.flatten(network), swag.mean, rtol=0, atol=0)


TRAIN = {
    "swa": lambda build, **kw: train_swa(build, *rows(), HOLD, progress=False, collect=3, **kw),
    "swag": lambda build, **kw: train_swag(
        build, *rows(), HOLD, progress=False, collect=3, samples=2, rank=2, **kw
    ),
}


@pytest.mark.parametrize("method", TRAIN)
@pytest.mark.parametrize("steps", [5, 18, 24 + 22])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, method, steps):
    expected = TRAIN[method](plain, runs=2)
    with pytest.raises(TrainingInterrupted):
        TRAIN[method](plain, runs=2, directory=tmp_path, on_step=interrupt_after(steps))
    torch.manual_seed(1)
    options = {"runs": 2, "directory": tmp_path, "resume": True}
    resumed = TRAIN[method](plain, **options)
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed.model.state_dict(), expected.model.state_dict(), **exact)
    assert numbers(resumed.histories) == numbers(expected.histories)
    again = TRAIN[method](plain, **options, on_step=lambda step: pytest.fail("trained again"))
    torch.testing.assert_close(again.model.state_dict(), expected.model.state_dict(), **exact)
    assert again.seconds == resumed.seconds


@pytest.mark.gpu
@pytest.mark.parametrize("method", TRAIN)
def test_on_a_gpu_too(tmp_path, method):
    expected = TRAIN[method](normed, device="cuda")
    assert next(expected.model.parameters()).is_cuda
    options = {"device": "cuda", "directory": tmp_path}
    with pytest.raises(TrainingInterrupted):
        TRAIN[method](normed, **options, on_step=interrupt_after(18))
    resumed = TRAIN[method](normed, **options, resume=True)
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed.model.state_dict(), expected.model.state_dict(), **exact)


@pytest.mark.parametrize("method", TRAIN)
def test_the_batch_norm_statistics_are_those_of_the_new_weights(method):
    x = rows()[0].double()
    exact = TRAIN[method](normed).model
    kept = TRAIN[method](normed, statistics="running").model
    for network, other in zip(exact.members, kept.members, strict=True):
        hidden = torch.nn.functional.linear(
            x, network[0].weight.double(), network[0].bias.double()
        ).detach()
        norm = network[1]
        torch.testing.assert_close(norm.running_mean.double(), hidden.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), hidden.var(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(other[1].running_mean, kept.members[0][1].running_mean)
        assert not torch.allclose(other[1].running_mean, norm.running_mean)


WRONG = [
    (train_swa, {"kind": "linear"}, "kind must be one of .*; got 'linear'"),
    (train_swa, {"kind": "cyclic"}, "config.schedule must be 'cosine' with kind 'cyclic'; got 'ho"),
    (train_swa, {"swa_lr": 0.0}, "swa_lr must be a number above 0; got 0.0"),
    (train_swa, {"collect": 7}, "collect must be an integer from 1 to config.epochs = 6; got 7"),
    (train_swa, {"per_epoch": 5}, "per_epoch must be at most 4, the steps of an epoch; got 5"),
    (train_swa, {"per_epoch": 0}, "per_epoch must be an integer of at least 1; got 0"),
    (train_swa, {"cycles": 0}, "cycles must be an integer of at least 1; got 0"),
    (train_swag, {"samples": 0}, "samples must be an integer of at least 1; got 0"),
    (train_swag, {"scale": -1.0}, "scale must be a number of at least 0; got -1.0"),
    (train_swag, {"collect": 1}, "collect must be so many that at least 2 networks are collected"),
]


@pytest.mark.parametrize(("train", "options", "message"), WRONG)
def test_wrong_settings_are_refused(train, options, message):
    with pytest.raises(ValueError, match=f"{train.__name__}: {message}"):
        train(plain, *rows(), HOLD, progress=False, **options)


def test_cycles_divide_the_steps():
    with pytest.raises(ValueError, match="train_swa: cycles must be a divisor of the 8 steps of"):
        train_swa(plain, *rows(), CONFIG, kind="cyclic", collect=2, cycles=3, progress=False)
