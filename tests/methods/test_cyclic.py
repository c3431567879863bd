"""Cyclical runs against the loop written out by hand, and their schedules against the papers."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from methods.problem import ROWS, plain, rows
from methods.test_resume import interrupt_after, numbers
from torch import nn

from landscape_fast.methods import (
    TrainConfig,
    TrainingInterrupted,
    fge_learning_rate,
    fit,
    train_csgmcmc,
    train_fge,
    train_snapshot,
)
from landscape_fast.methods.cyclic import cosine_learning_rate
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.langevin import LangevinSGD
from landscape_fast.methods.seeds import epoch_order, stream_seed

STEPS = 4  # of an epoch: 50 rows in batches of 16
CONFIG = TrainConfig(epochs=6, batch_size=16, optimizer="sgd", lr=0.1, momentum=0.0, seed=4)


def deterministic():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def normed():
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def by_hand(config, rate, keep, network=None):
    """SGD without momentum: the parameters after the steps (from 1) in `keep`."""
    x, y = rows()
    network = network or build_member(deterministic, config, 0, "cpu")
    params, kept, i = list(network.parameters()), [], 0
    for epoch in range(config.epochs):
        for batch in epoch_order(ROWS, config.seed, 0, epoch).split(config.batch_size):
            i += 1
            loss = F.cross_entropy(network(x[batch]), y[batch])
            for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.data -= rate(i) * gradient
            if i in keep:
                kept.append([p.detach().clone() for p in params])
    return kept


def assert_networks(trained, expected):
    assert len(trained.model.members) == len(expected)
    for network, params in zip(trained.model.members, expected, strict=True):
        assert not network.training
        for p, want in zip(network.parameters(), params, strict=True):
            torch.testing.assert_close(p.detach(), want)


def test_the_rate_of_fge_is_that_of_the_authors_one_iteration_earlier():
    """Theirs counts from 0 and asks t < 1/2; the two agree to the last bit."""

    def authors(iteration, cycle, a1, a2):
        t = (iteration % cycle) / cycle
        if t < 0.5:
            return a1 * (1.0 - 2.0 * t) + a2 * 2.0 * t
        return a1 * (2.0 * t - 1.0) + a2 * (2.0 - 2.0 * t)

    for cycle in (2, 4, 46, 782):
        for i in range(1, 3 * cycle + 1):
            ours = fge_learning_rate(i, cycle, 0.05, 0.01)
            assert ours == pytest.approx(authors(i, cycle, 0.05, 0.01), rel=1e-15)
            assert 0.01 <= ours <= 0.05 or ours == pytest.approx(0.01)
        assert fge_learning_rate(cycle // 2, cycle, 0.05, 0.01) == 0.01
        assert fge_learning_rate(cycle, cycle, 0.05, 0.01) == 0.05


def test_fge_is_algorithm_1_after_the_beginning_of_an_ordinary_run():
    config = dataclasses.replace(CONFIG, schedule="hold_linear")
    c, first = 2 * STEPS, 1 * STEPS

    def rate(i):
        if i <= first:
            return 0.1
        t = ((i - first - 1) % c + 1) / c
        return (
            (1 - 2 * t) * 0.3 + 2 * t * 0.02 if t <= 0.5 else (2 - 2 * t) * 0.02 + (2 * t - 1) * 0.3
        )

    keep = [first + i for i in range(1, 5 * STEPS + 1) if i % c == c // 2]
    assert len(keep) == 3
    options = {"cycle": 2, "a1": 0.3, "a2": 0.02, "fge_epochs": 5, "progress": False}
    trained = train_fge(deterministic, *rows(), config, **options)
    assert_networks(trained, by_hand(config, rate, keep))
    history = trained.histories[0]
    assert [record["lr"] for record in history[:3]] == pytest.approx([0.1, 0.02, 0.3])


def test_fge_from_a_trained_network_with_a_cycle_of_one_epoch():
    x, y = rows()
    start = build_member(deterministic, CONFIG, 0, "cpu")
    fit(start, x, y, CONFIG, progress=False)

    def rate(i):
        return fge_learning_rate(i, STEPS, 0.2, 0.1)

    config = dataclasses.replace(CONFIG, epochs=3)
    keep = range(STEPS // 2, 3 * STEPS, STEPS)
    expected = by_hand(config, rate, keep, copy.deepcopy(start))
    options = {"cycle": 1, "a1": 0.2, "a2": 0.1, "fge_epochs": 3, "progress": False}
    before = copy.deepcopy(start.state_dict())
    trained = train_fge(lambda: copy.deepcopy(start), x, y, config, **options)
    assert_networks(trained, expected)
    torch.testing.assert_close(start.state_dict(), before, rtol=0, atol=0)


def test_snapshots_are_taken_where_the_rate_is_lowest():
    def rate(i):
        return 0.05 * (1 + math.cos(math.pi * ((i - 1) % (2 * STEPS)) / (2 * STEPS)))

    trained = train_snapshot(deterministic, *rows(), CONFIG, cycles=3, progress=False)
    assert_networks(trained, by_hand(CONFIG, rate, [2 * STEPS, 4 * STEPS, 6 * STEPS]))
    values = [cosine_learning_rate(i, 2 * STEPS, 0.1) for i in range(1, 2 * STEPS + 2)]
    assert values == pytest.approx([rate(i) for i in range(1, 2 * STEPS + 2)])


@pytest.mark.parametrize("momentum", [0.0, 0.4])
def test_cyclical_sampling_is_the_update_of_its_authors(momentum):
    """v = mu v - lr (g + decay w) + noise in the last part of a cycle; w += v."""
    x, y = rows()
    config = dataclasses.replace(CONFIG, momentum=momentum, weight_decay=0.01)
    network = build_member(deterministic, config, 0, "cpu")
    params, kept, step = list(network.parameters()), [], 0
    velocities = [torch.zeros_like(p) for p in params]
    for epoch in range(6):
        for batch in epoch_order(ROWS, config.seed, 0, epoch).split(16):
            lr = 0.05 * (1 + math.cos(math.pi * (step % 12) / 12))
            loss = F.cross_entropy(network(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, params)
            noise = torch.Generator().manual_seed(stream_seed(4, 0, "posterior", step))
            for p, v, gradient in zip(params, velocities, gradients, strict=True):
                v.mul_(momentum).sub_(lr * (gradient + 0.01 * p.detach()))
                if epoch % 3 >= 1:  # from explore = 1/3 of 3 epochs
                    scale = math.sqrt(2 * lr * (1 - momentum) * 0.5 / ROWS)
                    v.add_(torch.randn(p.shape, generator=noise), alpha=scale)
                p.data += v
            step += 1
        if epoch % 3 >= 1:
            kept.append([p.detach().clone() for p in params])
    options = {"cycles": 2, "samples": 2, "explore": 1 / 3, "temperature": 0.5, "progress": False}
    assert_networks(train_csgmcmc(deterministic, x, y, config, **options), kept)


def test_noise_is_there_in_the_sampling_stage_only(monkeypatch):
    seen, seeds = [], []

    def record(self, temperature, seed):
        seen.append(temperature)
        seeds.append(seed)

    monkeypatch.setattr(LangevinSGD, "set_noise", record)
    options = {"cycles": 2, "samples": 1, "explore": 0.5, "progress": False}
    train_csgmcmc(deterministic, *rows(), CONFIG, **options)
    default = 1 / ROWS / ROWS  # temperature 1 / N, of the mean loss of N rows
    assert seen == ([0.0] * 6 + [default] * 6) * 2
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_langevin_samples_what_it_should(momentum):
    """20,000 chains in a parabola: the variance of the exact discrete process, which is linear."""
    lr, k, tau, chains = 0.2, 1.5, 0.3, 20000
    w = nn.Parameter(torch.zeros(chains, dtype=torch.float64))
    optimizer = LangevinSGD([w], lr=lr, momentum=momentum, weight_decay=0.5)
    covariance = torch.zeros(2, 2, dtype=torch.float64)  # of (v, w)
    pull = lr * (k + 0.5)
    move = torch.tensor([[momentum, -pull], [momentum, 1 - pull]], dtype=torch.float64)
    kick = 2 * lr * (1 - momentum) * tau * torch.ones(2, 2, dtype=torch.float64)
    for step in range(60):
        w.grad = k * w.detach()
        optimizer.set_noise(tau, step)
        optimizer.step()
        covariance = move @ covariance @ move.T + kick
    # five standard errors of a variance and of a mean over the chains
    error = 5 * math.sqrt(2 / chains)
    assert float(w.detach().var() / covariance[1, 1]) == pytest.approx(1, abs=error)
    assert abs(float(w.detach().mean())) < 5 * math.sqrt(covariance[1, 1] / chains)
    if not momentum:  # the posterior, up to the known error of the step size
        assert float(covariance[1, 1]) == pytest.approx(tau / (k + 0.5) / (1 - pull / 2), rel=1e-6)


def test_without_noise_and_at_a_constant_rate_it_is_sgd_with_momentum():
    networks = [build_member(deterministic, CONFIG, 0, "cpu").double() for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    steps = [LangevinSGD(networks[0].parameters(), **options),
             torch.optim.SGD(networks[1].parameters(), **options)]  # fmt: skip
    x, y = rows()
    for _ in range(30):
        for network, optimizer in zip(networks, steps, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x.double()), y).backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].state_dict(), networks[1].state_dict())


TRAIN = {
    "fge": lambda build, **kw: train_fge(
        build, *rows(), CONFIG, fge_epochs=5, progress=False, **kw
    ),
    "snapshot": lambda build, **kw: train_snapshot(
        build, *rows(), CONFIG, cycles=3, progress=False, **kw
    ),
    "csgmcmc": lambda build, **kw: train_csgmcmc(
        build, *rows(), dataclasses.replace(CONFIG, momentum=0.5), cycles=2, samples=2,
        explore=0.3, progress=False, **kw,
    ),
}  # fmt: skip
MEMBERS = {"fge": 3, "snapshot": 3, "csgmcmc": 4}


@pytest.mark.parametrize("method", TRAIN)
@pytest.mark.parametrize("steps", [5, 17, 24 + 10])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, method, steps):
    """In the first cycle, in a later one (with networks kept), and in the second run."""
    expected = TRAIN[method](plain, runs=2)
    with pytest.raises(TrainingInterrupted):
        TRAIN[method](plain, runs=2, directory=tmp_path, on_step=interrupt_after(steps))
    torch.manual_seed(1)
    done = []
    options = {"runs": 2, "directory": tmp_path, "resume": True}
    resumed = TRAIN[method](plain, **options, on_step=done.append)
    assert len(done) == 2 * 24 - steps
    assert len(resumed.model.members) == 2 * MEMBERS[method]
    torch.testing.assert_close(
        resumed.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0
    )
    assert numbers(resumed.histories) == numbers(expected.histories)
    again = TRAIN[method](plain, **options, on_step=lambda step: pytest.fail("trained again"))
    torch.testing.assert_close(
        again.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0
    )


@pytest.mark.gpu
@pytest.mark.parametrize("method", TRAIN)
def test_on_a_gpu_too(tmp_path, method):
    """Networks kept, velocities and noise go through a checkpoint there as well."""
    expected = TRAIN[method](normed, device="cuda")
    assert next(expected.model.parameters()).is_cuda
    with pytest.raises(TrainingInterrupted):
        options = {"device": "cuda", "directory": tmp_path}
        TRAIN[method](normed, **options, on_step=interrupt_after(17))
    resumed = TRAIN[method](normed, **options, resume=True)
    torch.testing.assert_close(
        resumed.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0
    )


@pytest.mark.parametrize("method", TRAIN)
def test_the_first_run_does_not_depend_on_how_many_there_are(method):
    two, one = TRAIN[method](plain, runs=2), TRAIN[method](plain)
    count = MEMBERS[method]
    x = rows()[0]
    with torch.no_grad():
        assert torch.equal(two.model(x)[:count], one.model(x))
        assert not torch.allclose(two.model(x)[count:], one.model(x))


@pytest.mark.parametrize("method", TRAIN)
def test_every_network_has_the_batch_norm_statistics_of_its_own_weights(method):
    x = rows()[0].double()
    exact = TRAIN[method](normed).model
    kept = TRAIN[method](normed, statistics="running").model
    for network, other in zip(exact.members, kept.members, strict=True):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        hidden = copy.deepcopy(network[0]).double()(x)
        norm = network[1]
        torch.testing.assert_close(norm.running_mean.double(), hidden.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), hidden.var(0), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(other[1].running_mean.double(), hidden.mean(0), rtol=1e-4)


def test_a_network_of_members_is_refused():
    from methods.problem import batch_ensemble

    with pytest.raises(ValueError, match=r"train_fge: build must be a function making a network "):
        train_fge(batch_ensemble, *rows(), CONFIG, progress=False)


WRONG = [
    (train_fge, {"cycle": 0}, {}, "cycle must be an integer of at least 1; got 0"),
    (train_fge, {"cycle": None}, {}, "cycle must be an integer of at least 1; got None"),
    (train_fge, {"a1": 0.01, "a2": 0.02}, {}, r"a1 and a2 must be numbers with 0 < a2 <= a1; got"),
    (train_fge, {"cycle": 4, "fge_epochs": 1}, {}, r"fge_epochs must be an integer from 2, half"),
    (train_fge, {"fge_epochs": 7}, {}, r"fge_epochs must be .* to config.epochs = 6; got 7"),
    (
        train_fge,
        {"cycle": 1},
        {"batch_size": 10},
        r"cycle must be so long that its steps are even; got 1 with 5 steps per epoch; two",
    ),
    (train_fge, {"runs": 0}, {}, "runs must be an integer of at least 1; got 0"),
    (train_fge, {"statistics": "shared"}, {}, "statistics must be one of .*; got 'shared'"),
    (train_snapshot, {"cycles": 4}, {}, "cycles must be a divisor of config.epochs = 6; got 4"),
    (train_snapshot, {"cycles": 3}, {"schedule": "step"}, "config.schedule must be 'cosine' witho"),
    (train_snapshot, {"cycles": 3}, {"warmup_epochs": 1}, "config.schedule must be 'cosine' witho"),
    (train_csgmcmc, {"cycles": 2}, {"optimizer": "adam"}, "config.optimizer must be 'sgd'; got"),
    (train_csgmcmc, {"cycles": 2}, {}, "samples must be an integer from 1 to 0, the epochs of a"),
    (train_csgmcmc, {"cycles": 2, "explore": 1.0}, {}, r"explore must be a number in \[0, 1\)"),
    (
        train_csgmcmc,
        {"cycles": 2, "explore": 0.5, "samples": 1, "temperature": -1.0},
        {},
        "temperature must be None or a finite number of at least 0; got -1.0",
    ),
]


@pytest.mark.parametrize(("train", "options", "settings", "message"), WRONG)
def test_wrong_settings_are_refused(train, options, settings, message):
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(ValueError, match=f"{train.__name__}: {message}"):
        train(plain, *rows(), config, progress=False, **options)


def test_wrong_arguments_of_the_parts_are_refused():
    with pytest.raises(ValueError, match="fge_learning_rate: i must be an integer of at least 1"):
        fge_learning_rate(0, 4, 0.1, 0.01)
    with pytest.raises(ValueError, match="fge_learning_rate: cycle must be an even number of step"):
        fge_learning_rate(1, 3, 0.1, 0.01)
    with pytest.raises(ValueError, match="cosine_learning_rate: i must be an integer of at"):
        cosine_learning_rate(0, 4, 0.1)
    with pytest.raises(ValueError, match="cosine_learning_rate: cycle must be an integer of"):
        cosine_learning_rate(1, 0, 0.1)
    w = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match=r"LangevinSGD: momentum must be a number in \[0, 1\)"):
        LangevinSGD(w, lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="LangevinSGD: lr must be a number of at least 0; got -1"):
        LangevinSGD(w, lr=-1)
    with pytest.raises(ValueError, match="LangevinSGD: weight_decay must be a number of at least"):
        LangevinSGD(w, lr=0.1, weight_decay=-0.1)
    with pytest.raises(ValueError, match="LangevinSGD: temperature must be a number of at least 0"):
        LangevinSGD(w, lr=0.1).set_noise(-1.0, 0)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    TRAIN["fge"](plain, directory=tmp_path)
    with pytest.raises(ValueError, match=r"got fge_epochs 5 \(now 4\) in .*fge-000\.pt"):
        train_fge(
            plain, *rows(), CONFIG, fge_epochs=4, directory=tmp_path, resume=True, progress=False
        )
