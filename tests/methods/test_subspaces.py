"""Training a subspace against a loop in plain PyTorch, and what is taken from it afterwards."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from methods.problem import CONFIG, ROWS, STEPS, plain, rows
from methods.test_resume import interrupt_after, pictures
from torch import nn
from torch.func import functional_call

from landscape_fast.methods import TrainConfig, TrainingInterrupted, fit
from landscape_fast.methods.seeds import epoch_order, isolated_rng, stream_seed
from landscape_fast.methods.subspaces import (
    average_prediction,
    cos2_penalty,
    subspace_ensemble,
    train_subspace,
)
from landscape_fast.models import ResNet
from landscape_fast.nn import Bezier, Line, PolyChain, Simplex, Subspace
from landscape_fast.testing import assert_as_exact

CPU = torch.device("cpu")
SGD = replace(CONFIG, optimizer="sgd", lr=0.05)


def smooth():
    """Without dropout, whose masks would be drawn between the points."""
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def residual():
    return ResNet((1, 8, 8), 3, blocks=1, dropout=0.1)


OPTIMIZERS = {
    "sgd": lambda ps, c: torch.optim.SGD(
        ps, c.lr, momentum=c.momentum, nesterov=True, weight_decay=c.weight_decay
    ),
    "adam": lambda ps, c: torch.optim.Adam(ps, c.lr, weight_decay=c.weight_decay),
    "adamw": lambda ps, c: torch.optim.AdamW(ps, c.lr, weight_decay=c.weight_decay),
}


def by_hand(config, coefficients, beta, points, dtype):
    """The same run with one list of parameters per anchor: `functional_call` and torch.optim."""
    x, y = rows()
    anchors = []
    for k in range(coefficients.anchors):
        with isolated_rng(stream_seed(config.seed, 0, "init", k), CPU):
            network = smooth().to(dtype)
        anchors.append(dict(network.named_parameters()))
    optimizer = OPTIMIZERS[config.optimizer]([p for a in anchors for p in a.values()], config)
    step, steps = 0, -(-ROWS // config.batch_size)
    with isolated_rng(stream_seed(config.seed, 0, "noise"), CPU):
        for epoch in range(config.epochs):
            for batch in epoch_order(ROWS, config.seed, 0, epoch).split(config.batch_size):
                optimizer.param_groups[0]["lr"] = config.lr * config.lr_factor(step, steps)
                drawn = coefficients.at(torch.rand(points)).to(dtype)
                loss = 0
                for c in drawn:
                    mixed = {n: sum(w * a[n] for w, a in zip(c, anchors, strict=True))
                             for n in anchors[0]}  # fmt: skip
                    logits = functional_call(network, mixed, (x[batch].to(dtype),))
                    loss = loss + F.cross_entropy(logits, y[batch]) / points
                weights = [torch.cat([p.flatten() for p in a.values() if p.ndim > 1])
                           for a in anchors]  # fmt: skip
                loss = loss + beta * F.cosine_similarity(*weights[:2], 0) ** 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    return [{name: p.detach() for name, p in anchor.items()} for anchor in anchors]


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_plain_pytorch(optimizer, points):
    """Two anchors: the pair of the penalty is not drawn."""
    config = replace(SGD, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.01)
    for coefficients in (Line(), PolyChain(2)) if points == 1 else (Line(),):
        trained = train_subspace(
            smooth, *rows(), config, coefficients=coefficients, points=points, progress=False
        )
        subspace, layout = trained.subspace, trained.subspace.layout
        plain_, truth = (by_hand(config, coefficients, 1.0, points, dtype)
                         for dtype in (torch.float32, torch.float64))  # fmt: skip
        for k, row in enumerate(subspace.anchors.detach()):
            got = layout.views(row)
            for name in layout.names:
                assert_as_exact(f"{name} of {k}", got[name], plain_[k][name], truth[k][name])
        assert [epoch["epoch"] for epoch in trained.histories[0]] == [1, 2, 3]
        assert trained.histories[0][-1]["loss"] < trained.histories[0][0]["loss"]
        assert len(trained.seconds) == 1 and trained.seconds[0] > 0
        assert torch.equal(subspace.coeffs, torch.tensor([[0.5, 0.5]]))
        assert not subspace.training and not subspace.model.training


def test_beta_keeps_anchors_apart():
    """From equal starts nothing else would part them."""

    def cos2(beta):
        config = replace(SGD, epochs=8)
        found = train_subspace(plain, *rows(), config, beta=beta, progress=False).subspace
        return cos2_penalty(found, (0, 1)).item()

    assert cos2(3.0) < cos2(0.0) / 2


def test_the_penalty_is_the_squared_cosine_of_the_layers_weights():
    torch.manual_seed(0)
    subspace = Subspace(smooth(), 3, Simplex(3), trained=[True, False, True])
    by_name = subspace.layout.views(torch.cat([subspace.anchors.detach(), subspace.fixed]))
    weights = torch.cat([v.flatten(1) for n, v in by_name.items() if v.ndim > 2], 1)
    for pair in ((0, 1), (0, 2), (2, 1)):
        plain_, exact = (F.cosine_similarity(w[pair[0]], w[pair[1]], 0) ** 2
                         for w in (weights, weights.double()))  # fmt: skip
        assert_as_exact(f"{pair}", cos2_penalty(subspace, pair).detach(), plain_, exact)
    seen = {round(cos2_penalty(subspace).item(), 12) for _ in range(40)}
    assert len(seen) == 3
    grad = torch.autograd.grad(cos2_penalty(subspace, (0, 1)), subspace.anchors)[0]
    assert all(grad.any(1))
    slope = torch.func.grad(lambda w: F.cosine_similarity(w[0], w[1], 0) ** 2)
    plain_, exact = slope(weights), slope(weights.double())
    chosen = [torch.full((size,), len(shape) > 1) for size, shape in
              zip(subspace.layout.sizes, subspace.layout.shapes, strict=True)]  # fmt: skip
    mask = torch.cat(chosen) & (subspace.layout.mask > 0)
    assert_as_exact("gradient", grad[:, mask], plain_[:2], exact[:2])
    assert not grad[:, ~mask].any()


def test_the_first_anchor_starts_as_the_single_network_does():
    """With one anchor a subspace is a plain network, and its training that of `fit`."""
    x, y = rows()
    single = train_subspace(smooth, x, y, SGD, coefficients=Simplex(1), progress=False)
    with isolated_rng(stream_seed(SGD.seed, 0, "init"), CPU):
        network = smooth()
    wide = {name: value.double() for name, value in network.state_dict().items()}
    fit(network, x, y, SGD, progress=False)
    double = smooth().double()
    double.load_state_dict(wide)
    fit(double, x.double(), y, SGD, progress=False)
    for name, value in single.subspace.layout.views(single.subspace.anchors[0].detach()).items():
        exact = double.get_parameter(name).detach()
        assert_as_exact(name, value, network.get_parameter(name).detach(), exact)


RUNS = {
    "line": {"coefficients": Line()},
    "layerwise": {"coefficients": Simplex(3), "layerwise": True},
    "several": {"coefficients": Bezier(3), "points": 2},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_runs_are_the_same_to_the_bit(settings, optimizer, tmp_path):
    """Dropout, batch norms, penalties on drawn pairs, points drawn in the middle of an epoch."""
    config = replace(SGD, optimizer=optimizer, epochs=2)

    def train(**options):
        return train_subspace(residual, *pictures(), config, progress=False, **settings, **options)

    expected = train()
    steps = config.epochs * STEPS // CONFIG.epochs
    for stop in (1, steps - 2):
        folder = tmp_path / str(stop)
        with pytest.raises(TrainingInterrupted):
            train(directory=folder, on_step=interrupt_after(stop))
        done = train(directory=folder, resume=True)
        for name, value in expected.subspace.state_dict().items():
            assert torch.equal(done.subspace.state_dict()[name], value), name
        assert torch.equal(done.subspace.point, expected.subspace.point)
        assert done.histories[0][-1]["loss"] == expected.histories[0][-1]["loss"]
    with pytest.raises(ValueError, match="beta 1.0 \\(now 0.5\\)"):
        train(directory=folder, resume=True, beta=0.5)


def test_ensembles_inside_the_subspace():
    x, y = pictures()
    config = TrainConfig(epochs=1, batch_size=16, optimizer="sgd", lr=0.05)
    subspace = train_subspace(residual, x, y, config, progress=False).subspace
    coeffs = Line().at(torch.tensor([0.2, 0.8]))
    ensemble = subspace_ensemble(subspace, coeffs, x, batch_size=20)
    logits = ensemble(x).detach()
    for m in range(2):
        subspace.move_to_(coeffs[m]).recalibrate_(x, batch_size=20)
        alone = subspace.model(x).detach()
        assert_as_exact(f"member {m}", logits[m], alone, alone.double())
    batches = (part for part in x.tensor_split(3))  # that can be gone through once
    assert torch.equal(subspace_ensemble(subspace, coeffs, batches)(x), logits)
    with pytest.raises(RuntimeError, match="running statistics"):
        subspace_ensemble(subspace, coeffs)(x)
    batch = subspace_ensemble(subspace, coeffs, statistics="batch")(x)
    assert not torch.equal(batch, logits)
    L = len(subspace.layout)
    each = subspace_ensemble(subspace, coeffs[:, None].expand(-1, L, -1), x, batch_size=20)
    assert torch.equal(each(x), logits)
    with pytest.raises(ValueError, match=r"coeffs must be \[M, K\] or \[M, L, K\]; got \[2\]"):
        subspace_ensemble(subspace, coeffs[0])


def test_averages_of_predictions():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    wide = logits.double()
    plain_, exact = logits.softmax(-1).mean(0).log(), wide.softmax(-1).mean(0).log()
    assert_as_exact("probabilities", average_prediction(logits), plain_, exact)
    assert_as_exact("in float64", average_prediction(wide), exact, exact)
    plain_, exact = (t.mean(0).log_softmax(-1) for t in (logits, wide))
    assert_as_exact("logits", average_prediction(logits, "logits"), plain_, exact)
    sure = torch.tensor([[[400.0, -400.0]], [[-400.0, 400.0]]])  # no overflow, no log of zero
    assert average_prediction(sure).exp().tolist() == [[0.5, 0.5]]


def test_refusals():
    x, y = rows()
    with pytest.raises(ValueError, match="config.member_batches must be 'shared'; got 'own'"):
        train_subspace(plain, x, y, replace(SGD, member_batches="own"))
    with pytest.raises(ValueError, match="points must be an integer of at least 1; got 0"):
        train_subspace(plain, x, y, SGD, points=0)
    with pytest.raises(ValueError, match="beta must be at least 0; got -1"):
        train_subspace(plain, x, y, SGD, beta=-1)
    with pytest.raises(ValueError, match=r"y must be \[N\] with N = 50; got \[3\]"):
        train_subspace(plain, x, y[:3], SGD)
    with pytest.raises(ValueError, match="cos2_penalty: subspace must be one of at least 2 anc"):
        cos2_penalty(Subspace(smooth(), 1, Simplex(1)))
    with pytest.raises(ValueError, match=r"logits must be \[M, N, C\]; got \[5, 4\]"):
        average_prediction(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="average must be one of .*; got 'votes'"):
        average_prediction(torch.zeros(1, 5, 4), "votes")
