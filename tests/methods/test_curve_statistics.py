"""Statistics along curves against one network at a time, and summaries against closed forms."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from methods.problem import rows
from methods.test_curves import two
from methods.test_cyclic import deterministic, normed
from torch import nn

from landscape_fast.methods.curves import (
    Along,
    CurveStatistics,
    curve_statistics,
    new_curve,
    pair_ensemble,
    straight_line,
)
from landscape_fast.testing import assert_as_exact


def bent(build, bends=1):
    """A curve whose bends are off the chord, without training."""
    curve = new_curve(*two(build), kind="bezier", bends=bends)
    generator = torch.Generator().manual_seed(0)
    mask = curve.layout.mask
    with torch.no_grad():
        curve.anchors += 0.3 * mask * torch.randn(curve.anchors.shape, generator=generator)
    return curve


def at(curve, t, dtype):
    """The network at t, by itself: control points mixed in float64."""
    K = curve.coefficients.anchors
    cs = [math.comb(K - 1, k) * t**k * (1 - t) ** (K - 1 - k) for k in range(K)]
    rows_ = [curve.fixed[0], *curve.anchors.detach(), curve.fixed[1]]
    w = sum(c * row.double() for c, row in zip(cs, rows_, strict=True))
    network = copy.deepcopy(curve.network()).to(dtype)
    with torch.no_grad():
        for name, value in curve.layout.views(w.to(dtype)).items():
            network.get_parameter(name).copy_(value)
    return network.train(), w


@pytest.mark.parametrize("build", [deterministic, normed])
def test_every_point_is_the_network_there(build):
    x, y = rows()
    curve = bent(build, bends=2)
    found = curve_statistics(
        curve, x, y, points=7, l2=0.1, calibration=x, keep_logits=True, progress=False
    )
    plain, truth, last, length = [], [], None, [0.0]
    for t in torch.linspace(0, 1, 7, dtype=torch.float64).tolist():
        for dtype, into in ((torch.float32, plain), (torch.float64, truth)):
            network, w = at(curve, t, dtype)
            with torch.no_grad():  # in training mode a norm has the statistics of these very rows
                hidden = network[0](x.to(dtype))
                if build is normed:
                    norm = network[1]
                    mean, var = hidden.mean(0), hidden.var(0)
                    hidden = F.batch_norm(hidden, mean, var, norm.weight, norm.bias, eps=norm.eps)
                    logits = network[3](network[2](hidden))
                else:
                    logits = network[2](network[1](hidden))
            into.append(logits)
        if last is not None:
            length.append(length[-1] + float((w - last).norm()))
        last = w
    plain, truth = torch.stack(plain), torch.stack(truth)
    assert_as_exact("logits", found.logits, plain, truth)
    loss = [torch.stack([F.cross_entropy(z, y) for z in each]) for each in (plain, truth)]
    assert_as_exact("loss", found.loss.float(), *loss)
    right = (truth.argmax(-1) == y).double().mean(1)
    torch.testing.assert_close(found.error, 1 - right)
    torch.testing.assert_close(found.length, torch.tensor(length, dtype=torch.float64))
    assert found.norm[-1] == pytest.approx(float(last.norm()))
    torch.testing.assert_close(found.penalized, found.loss + 0.05 * found.norm.square())
    assert found.t.tolist() == torch.linspace(0, 1, 7, dtype=torch.float64).tolist()


def test_a_straight_line_has_the_length_of_the_difference():
    start, end = two()
    x, y = rows()
    found = curve_statistics(straight_line(start, end), x, y, points=5, progress=False)
    ends = [nn.utils.parameters_to_vector(n.parameters()).detach().double() for n in (start, end)]
    distance = float((ends[1] - ends[0]).norm())
    torch.testing.assert_close(found.length, torch.linspace(0, distance, 5, dtype=torch.float64))
    assert found.logits is None
    for index, network in ((0, start), (-1, end)):
        loss = float(F.cross_entropy(network(x), y).detach())
        assert float(found.loss[index]) == pytest.approx(loss, rel=1e-6)


def test_the_summary_of_the_authors():
    """Trapezoids over arc length, as they sum them; a barrier over the chord of the values."""
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    length = torch.tensor([0.0, 2.0, 3.0, 10.0])
    values = torch.tensor([1.0, 5.0, 2.0, 3.0])
    steps = [(1 + 5) / 2 * 2, (5 + 2) / 2 * 1, (2 + 3) / 2 * 7]
    expected = (1.0, 3.0, 1.0, 5.0, 11 / 4, sum(steps) / 10, 5 - 1.5)
    assert Along.of(values, t, length) == pytest.approx(expected)
    found = CurveStatistics(t, length, length, values, values + 1, values / 10, None)
    assert found.along() == pytest.approx(expected)
    assert found.along("penalized").maximum == 6 and found.along("error").minimum == pytest.approx(
        0.1
    )
    still = Along.of(values, t, torch.zeros(4))  # a curve of no length
    assert still.integral == pytest.approx(11 / 4)
    with pytest.raises(ValueError, match=r"CurveStatistics.along: quantity must be one of .*'nll'"):
        found.along("nll")


def test_pairs_are_means_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 40, 4, generator=generator)
    y = torch.randint(4, (40,), generator=generator)
    found = pair_ensemble(logits, y)
    for s in range(5):
        p = (logits[0].double().softmax(-1) + logits[s].double().softmax(-1)) / 2
        assert float(found.error[s]) == float((p.argmax(-1) != y).double().mean())
        assert float(found.loss[s]) == pytest.approx(float(F.nll_loss(p.log(), y)))
    alone = float((logits[0].argmax(-1) != y).double().mean())
    assert float(found.error[0]) == alone


def test_wrong_arguments_are_refused():
    start, end = two()
    line = straight_line(start, end)
    with pytest.raises(ValueError, match="points must be an integer of at least 2; got 1"):
        curve_statistics(line, *rows(), points=1)
    with pytest.raises(ValueError, match=r"logits must be \[S, N, C\]; got \[2, 3\]"):
        pair_ensemble(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pair_ensemble: y must be \[N\] with N = 3; got \[2\]"):
        pair_ensemble(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
