"""Curvature against the dense Hessian of small networks, written out in plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from landscape_fast.landscape import curvature_along, hessian_top_eigenvalues, hessian_trace
from landscape_fast.landscape._hessian import Hessian
from landscape_fast.nn import (
    BatchEnsembleConv2d,
    BatchEnsembleLinear,
    FlatLayout,
    recalibrate_,
    statistics_mode_,
)

N, M = 31, 2
CLASSES = torch.arange(N) % 3
EXACT = {"tolerance": 1e-9}
SIGNS = {"members": M, "r_init": "normal", "s_init": "normal", "bias": True}


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: on a busy machine waiting threads would take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def plain_logits(p, x):
    hidden = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
    return (hidden @ p["2.weight"].T + p["2.bias"])[None]


def members():
    return nn.Sequential(
        BatchEnsembleLinear(4, 4, **SIGNS), nn.Tanh(), BatchEnsembleLinear(4, 3, **SIGNS)
    )


def members_logits(p, x):
    found = []
    for m in range(M):
        y = x
        for layer in (0, 2):
            w, r, s, b = (p[f"{layer}.{name}"] for name in ("weight", "r", "s", "bias"))
            y = (y * r[m]) @ w.T * s[m] + (b[m] if b.ndim == 2 else b)
            y = torch.tanh(y) if layer == 0 else y
        found.append(y)
    return torch.stack(found)


def convolutions():
    return nn.Sequential(
        nn.Unflatten(-1, (1, 2, 2)),
        BatchEnsembleConv2d(1, 2, 2, padding=1, **SIGNS),
        nn.Tanh(),
        nn.Flatten(-3),
        nn.Dropout(0.5),  # which takes no part
        BatchEnsembleLinear(18, 3, **SIGNS),
    )


def convolutions_logits(p, x):
    x, found = x.view(-1, 1, 2, 2), []
    for m in range(M):
        w, r, s, b = (p[f"1.{name}"] for name in ("weight", "r", "s", "bias"))
        y = F.conv2d(x * r[m].view(1, -1, 1, 1), w, padding=1) * s[m].view(1, -1, 1, 1)
        y = torch.tanh(y + (b[m] if b.ndim == 2 else b).view(1, -1, 1, 1)).flatten(1)
        w, r, s, b = (p[f"5.{name}"] for name in ("weight", "r", "s", "bias"))
        found.append((y * r[m]) @ w.T * s[m] + (b[m] if b.ndim == 2 else b))
    return torch.stack(found)


CASES = {
    "plain": (plain, plain_logits),
    "members": (members, members_logits),
    "convolutions": (convolutions, convolutions_logits),
}


def rows():
    return torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def dense(network, logits_of, x):
    """[D, D] over the trained parameters, in the order of the layout, and their places in P."""
    layout = FlatLayout(network)
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    places = layout.flatten(
        {n: torch.full(p.shape, float(n not in frozen)) for n, p in network.named_parameters()}
    )

    def loss(weights):
        logits = logits_of(layout.views(weights), x)
        each = [F.cross_entropy(member, CLASSES) for member in logits]
        return torch.stack(each).mean()

    full = torch.autograd.functional.hessian(loss, layout.flatten(network))
    keep = places.bool()
    return full[keep][:, keep], keep


@pytest.mark.parametrize("batch_size", [N, 7])
@pytest.mark.parametrize("name", list(CASES))
def test_both_ends_of_the_spectrum_and_the_trace(name, batch_size):
    torch.manual_seed(0)
    build, logits_of = CASES[name]
    network, x = build().double(), rows()
    before = copy.deepcopy(network.state_dict())
    H, keep = dense(network, logits_of, x)
    truth, options = torch.linalg.eigvalsh(H), {"batch_size": batch_size}
    top = hessian_top_eigenvalues(network, x, CLASSES, k=4, **EXACT, **options)
    torch.testing.assert_close(top.values, truth.flip(0)[:4])
    low = hessian_top_eigenvalues(network, x, CLASSES, k=3, which="smallest", **EXACT, **options)
    torch.testing.assert_close(low.values, truth[:3])
    assert float(low.values[0]) < 0  # where magnitudes alone would mislead
    for found in (top, low):
        vectors = found.vectors[:, keep]
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)).double())
        left = vectors @ H - found.values[:, None] * vectors
        assert float(left.norm(dim=1).max()) < 1e-8 and not bool(found.vectors[:, ~keep].any())
    exact = hessian_trace(network, x, CLASSES, samples=None, **options)
    torch.testing.assert_close(exact.samples, H.diagonal())
    assert exact.value == pytest.approx(float(H.trace())) and exact.standard_error == 0
    assert network.training
    torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)
    assert all(p.grad is None for p in network.parameters())


def test_the_residual_bounds_the_error():
    """Stopped early, each value is within its residual of an eigenvalue."""
    network, x = plain().double(), rows()
    truth = torch.linalg.eigvalsh(dense(network, plain_logits, x)[0])
    for most in (3, 5, 8):
        found = hessian_top_eigenvalues(network, x, CLASSES, k=2, tolerance=0, most=most)
        error = (found.values[:, None] - truth).abs().min(1).values
        assert found.products == most and bool((error <= found.residual).all())
    close = hessian_top_eigenvalues(network, x, CLASSES, k=2, tolerance=1e-2)
    assert close.products < 40
    assert bool((close.residual <= 1e-2 * close.values.abs().max()).all())


def test_all_eigenvalues_of_a_hessian_that_is_not_of_full_rank():
    """Logits that shift together change nothing: sequences of products end before the space."""
    network, x = nn.Linear(4, 3).double(), rows()[:2]
    H = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(x @ w[:, :4].T + w[:, 4], CLASSES[:2]),
        torch.cat([network.weight, network.bias[:, None]], 1).detach(),
    ).reshape(15, 15)
    truth = torch.linalg.eigvalsh(H).flip(0)
    assert int((truth > 1e-12).sum()) < 15
    found = hessian_top_eigenvalues(network, x, CLASSES[:2], k=15, **EXACT)
    torch.testing.assert_close(found.values, truth, rtol=1e-9, atol=1e-12)
    vectors = found.vectors @ found.vectors.T
    torch.testing.assert_close(vectors, torch.eye(15).double())


def test_where_the_loss_is_flat_all_is_zero():
    """Probabilities that have become 0 and 1 leave no number to start from again."""
    network, y = nn.Linear(4, 3), torch.zeros(N, dtype=torch.int64)
    with torch.no_grad():
        network.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    found = hessian_top_eigenvalues(network, rows().float(), y, k=3)
    assert found.values.tolist() == found.residual.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3))
    assert hessian_trace(network, rows().float(), y)[:2] == (0.0, 0.0)


def test_where_the_loss_is_not_finite_nothing_is_known():
    """One network of a path that has diverged does not cost the others."""
    network, weights = path_of(lambda: plain().double(), 3)
    for bad in (float("nan"), 1e308):

        def given(start, stop, bad=bad):
            return weights(start, stop) if start != 1 else torch.full_like(weights(1, 2), bad)

        options = {"k": 2, "samples": 2, "progress": False}
        found = curvature_along(network, given, 3, rows(), CLASSES, **options)
        for each in (found.eigenvalues, found.residual, found.trace[:, None]):
            assert each.isnan().any(1).tolist() == [False, True, False]
            assert each[1].isnan().all()


def test_signs_give_the_trace_without_bias_and_its_standard_error():
    r"""Of signs, :math:`\operatorname{Var} v^T H v = 2 \sum_{i \ne j} H_{ij}^2`."""
    network, x = plain().double(), rows()
    H = dense(network, plain_logits, x)[0]
    V = 2000
    found = hessian_trace(network, x, CLASSES, samples=V)
    off = H - torch.diag(H.diagonal())
    error = float((2 * off.square().sum() / V).sqrt())
    assert found.standard_error == pytest.approx(error, rel=0.1)  # of 2000 samples: 2 %, times 5
    assert abs(found.value - float(H.trace())) < 4 * error
    assert found.value == pytest.approx(float(found.samples.mean()))
    few = hessian_trace(network, x, CLASSES, samples=5)
    torch.testing.assert_close(few.samples, found.samples[:5])
    other = hessian_trace(network, x, CLASSES, samples=5, seed=1)
    assert not torch.equal(few.samples, other.samples)
    one = hessian_trace(network, x, CLASSES, samples=1)
    assert one.standard_error != one.standard_error  # of one sample nobody knows it


def test_float32_is_as_exact_as_its_products():
    network, x = members(), rows()
    truth = torch.linalg.eigvalsh(dense(copy.deepcopy(network).double(), members_logits, x)[0])
    found = hessian_top_eigenvalues(network, x.float(), CLASSES, k=3, tolerance=1e-5)
    torch.testing.assert_close(found.values, truth.flip(0)[:3], rtol=1e-4, atol=0)
    again = hessian_top_eigenvalues(network, x.float(), CLASSES, k=3, tolerance=1e-5)
    assert torch.equal(found.values, again.values) and found.vectors.dtype == torch.float32


def test_parameters_that_are_not_trained_are_held_fixed():
    network, x = plain().double(), rows()
    network[0].bias.requires_grad_(False)
    network[2].weight.requires_grad_(False)
    H, keep = dense(network, plain_logits, x)
    found = hessian_top_eigenvalues(network, x, CLASSES, k=3, **EXACT)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(H).flip(0)[:3])
    assert not bool(found.vectors[:, ~keep].any())
    exact = hessian_trace(network, x, CLASSES, samples=None)
    torch.testing.assert_close(exact.samples, H.diagonal())


def normed():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    return recalibrate_(network.double(), rows() + 1)


def normed_logits(statistics):
    """Batch norm written out, with given statistics or those of the batch."""

    def logits(p, x):
        y = x @ p["0.weight"].T + p["0.bias"]
        mean, var = statistics or (y.mean(0), y.var(0, correction=0))
        y = (y - mean) / (var + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
        return (torch.tanh(y) @ p["3.weight"].T + p["3.bias"])[None]

    return logits


def test_batch_norms_have_constant_statistics_or_those_of_the_batch():
    network, x = normed(), rows()
    norm = network[1]
    constant = normed_logits((norm.running_mean, norm.running_var))
    truth = torch.linalg.eigvalsh(dense(network, constant, x)[0]).flip(0)
    found = hessian_top_eigenvalues(network, x, CLASSES, k=2, **EXACT)
    torch.testing.assert_close(found.values, truth[:2])
    batch = torch.linalg.eigvalsh(dense(network, normed_logits(None), x)[0]).flip(0)
    statistics_mode_(network, "batch")
    found = hessian_top_eigenvalues(network, x, CLASSES, k=2, **EXACT)
    torch.testing.assert_close(found.values, batch[:2])
    assert abs(float(truth[0] - batch[0])) > 0.01 * float(truth[0])


def path_of(build, count):
    network = build()
    layout = FlatLayout(network)
    ends = layout.flatten_many([network, build()])
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    return network, lambda start, stop: torch.lerp(ends[:1], ends[1:], t[start:stop])


def test_along_a_path_it_is_that_of_every_model():
    network, weights = path_of(lambda: members().double(), 3)
    x = rows()
    options = {"k": 2, **EXACT, "batch_size": 9}
    found = curvature_along(network, weights, 3, x, CLASSES, samples=4, progress=False, **options)
    layout = FlatLayout(network)
    for s in range(3):
        at = copy.deepcopy(network)
        for name, value in layout.views(weights(s, s + 1)[0]).items():
            at.get_parameter(name).data = value.clone()
        top = hessian_top_eigenvalues(at, x, CLASSES, **options)
        trace = hessian_trace(at, x, CLASSES, samples=4, batch_size=9)
        torch.testing.assert_close(found.eigenvalues[s], top.values)
        assert float(found.trace[s]) == pytest.approx(trace.value)
        assert float(found.trace_se[s]) == pytest.approx(trace.standard_error)
        logits = at.eval()(x)
        each = [F.cross_entropy(member, CLASSES) for member in logits]
        torch.testing.assert_close(found.loss[s], torch.stack(each).mean().detach())
        right = (logits.argmax(-1) == CLASSES).double().mean()
        torch.testing.assert_close(found.accuracy[s], right)
    none = curvature_along(network, weights, 3, x, CLASSES, progress=False)
    assert none.eigenvalues.shape == (3, 1) and bool(none.trace.isnan().all())


def test_statistics_along_a_path_are_those_of_every_model():
    network, weights = path_of(normed, 3)
    x, calibration = rows(), rows() - 2
    options = {"k": 1, **EXACT, "progress": False}
    given = {"statistics": "recalibrate", "calibration": calibration}
    found = curvature_along(network, weights, 3, x, CLASSES, **given, **options)
    layout, at = FlatLayout(network), copy.deepcopy(network)
    for name, value in layout.views(weights(1, 2)[0]).items():
        at.get_parameter(name).data = value.clone()
    old = hessian_top_eigenvalues(at, x, CLASSES, **EXACT).values
    shared = curvature_along(network, weights, 3, x, CLASSES, statistics="shared", **options)
    torch.testing.assert_close(shared.eigenvalues[1], old)
    recalibrate_(at, calibration)
    new = hessian_top_eigenvalues(at, x, CLASSES, **EXACT).values
    torch.testing.assert_close(found.eigenvalues[1], new)
    assert abs(float(old - new)) > 1e-3 * float(new)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.unflatten(-1, (2, 2))
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


def test_through_attention():
    network, x = Attending().double().eval(), rows()
    H, keep = dense(network, lambda p, x: functional_call(slow(network), p, (x,))[None], x)
    found = hessian_top_eigenvalues(network, x, CLASSES, k=2, **EXACT)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(H).flip(0)[:2])


def slow(network):
    """The same network with attention written out: it returns its weights."""
    other = copy.deepcopy(network)
    inner = other.attention.forward
    other.attention.forward = lambda *x, need_weights: inner(*x, need_weights=True)
    return other


def test_one_graph_serves_all_products_with_one_batch():
    network, x, calls = plain().double(), rows(), []
    network.register_forward_hook(lambda *given: calls.append(None))
    hessian_top_eigenvalues(network, x, CLASSES, k=2)
    assert len(calls) == 1
    hessian_trace(network, x, CLASSES, samples=5, batch_size=16)
    assert len(calls) == 1 + 2


def test_shows_progress(capsys):
    network, weights = path_of(lambda: plain().double(), 2)
    curvature_along(network, weights, 2, rows(), CLASSES, label="line")
    assert "line: model 2/2, loss " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be an integer from 1 to 43, .*; got 0"),
        ({"k": 4, "most": 3}, "k must be an integer from 1 to 3, .*; got 4"),
        ({"which": "top"}, r"which must be one of \('largest', 'smallest'\); got 'top'"),
        ({"tolerance": -1}, r"tolerance must be a number in \[0, 1\); got -1"),
        ({"most": 0}, "most must be an integer of at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"y": CLASSES.float()}, "y must be int64"),
        (
            {"model": plain().bfloat16()},
            "model must be of float32, float64 parameters; got bfloat16",
        ),
        ({"model": plain().requires_grad_(False)}, "model must be one with parameters that are tr"),
    ],
)
def test_refuses(change, match):
    given = {"model": plain(), "x": rows().float(), "y": CLASSES} | change
    with pytest.raises(ValueError, match=f"hessian_top_eigenvalues: {match}"):
        hessian_top_eigenvalues(**given)


def test_other_refusals():
    network, weights = path_of(plain, 3)
    x = rows().float()
    with pytest.raises(ValueError, match="hessian_trace: samples must be None or an integer"):
        hessian_trace(network, x, CLASSES, samples=0)
    with pytest.raises(ValueError, match=r"curvature_along: weights\(0, 1\) must be \[1, P\]"):
        curvature_along(network, lambda a, b: torch.zeros(1, 3), 3, x, CLASSES, progress=False)
    with pytest.raises(ValueError, match="curvature_along: samples must be an integer"):
        curvature_along(network, weights, 3, x, CLASSES, samples=None)
    with pytest.raises(ValueError, match="curvature_along: calibration must be rows"):
        curvature_along(normed(), weights, 3, rows(), CLASSES)
    with pytest.raises(ValueError, match="curvature_along: count must be an integer of at least 1"):
        curvature_along(network, weights, 0, x, CLASSES)
    assert Hessian("test", network, x, CLASSES, 5).size == 43
