"""Hyperparameter distributions against their closed forms and samples; embeddings."""

import math

import pytest
import torch

from landscape_fast.nn import HyperEmbedding, LambdaDistribution

LOWER, UPPER = [0.1, 0.01], [100.0, 10.0]


def distribution(**options):
    generator = torch.Generator().manual_seed(0)
    options = {"members": 3, "generator": generator, **options}
    return LambdaDistribution(LOWER, UPPER, **options)


def wide():
    """Bounds far apart, in float64."""
    made = distribution(dtype=torch.float64)
    with torch.no_grad():
        made.log_lower.copy_(torch.tensor([[0.2, 0.02], [1.0, 0.1], [5.0, 0.01]]).log())
        made.log_upper.copy_(torch.tensor([[20.0, 2.0], [1.5, 10.0], [100.0, 0.02]]).log())
    return made


def test_samples_have_the_distribution():
    made = wide()
    samples = made.sample(20000, torch.Generator().manual_seed(1)).detach()
    assert samples.shape == (3, 20000, 2)
    low, high = made.log_lower.exp().unsqueeze(1), made.log_upper.exp().unsqueeze(1)
    assert (samples >= low).all() and (samples <= high).all()
    # means of 20000 draws: within five standard errors of the truth
    error = (samples.mean(1) - made.mean()).abs()
    assert (error < 5 * samples.std(1) / math.sqrt(20000)).all()
    # a log-uniform variable has the logarithm of a uniform one
    position = (samples.log() - low.log()) / (high.log() - low.log())
    quantiles = position.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 1)
    expected = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)[:, None, None]
    # the largest standard error of these quantiles is sqrt(0.25 / 20000) = 0.0035
    assert (quantiles - expected).abs().max() < 5 * 0.0035


def test_mean_and_entropy_are_integrals():
    """Of lambda and of -log p over the density p = 1 / (lambda (log u - log l))."""
    made = wide()
    low, high = made.log_lower, made.log_upper
    t = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000  # midpoint rule in log lambda
    logs = low[..., None] + t * (high - low)[..., None]
    torch.testing.assert_close(made.mean(), logs.exp().mean(-1), rtol=1e-8, atol=0)
    surprise = logs + (high - low).log()[..., None]
    torch.testing.assert_close(made.entropy(), surprise.mean(-1).mean())


def test_gradient_of_a_sample_is_that_of_its_quantile():
    made = wide()
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(3, 5, 2, generator=generator, dtype=torch.float64)
    samples = made.sample(5, torch.Generator().manual_seed(2))
    low, high = torch.autograd.grad(samples.sum(), [made.log_lower, made.log_upper])
    torch.testing.assert_close(low, (samples * (1 - draws)).sum(1))
    torch.testing.assert_close(high, (samples * draws).sum(1))


def test_mean_of_a_narrow_interval_is_exact():
    """The quotient of two differences would lose all digits."""
    made = distribution(members=1)
    with torch.no_grad():
        made.log_upper.copy_(made.log_lower + 1e-6)
    torch.testing.assert_close(made.mean(), made.log_lower.exp(), rtol=2e-6, atol=0)


def test_starts_around_the_mean_of_the_range():
    made = distribution(members=2000, dtype=torch.float64)
    low, high = made.log_lower.exp(), made.log_upper.exp()
    torch.testing.assert_close(high - low, torch.full_like(low, 0.4))
    middle = (high + low) / 2
    expected = [(u - l) / math.log(u / l) for l, u in zip(LOWER, UPPER, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert abs(expected[0].item() - 14.462) < 5e-4  # the published value for (0.1, 100)
    standard_error = 0.02 / math.sqrt(2000)
    assert ((middle.mean(0) - expected).abs() < 5 * standard_error).all()
    assert ((middle.std(0) / 0.02 - 1).abs() < 5 / math.sqrt(2 * 2000)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_restores_range_and_order(dtype):
    made = distribution(dtype=dtype)
    with torch.no_grad():
        made.log_lower.copy_(torch.tensor([[-99.0, 99.0], [2.0, 0.0], [1.0, -1.0]]))
        made.log_upper.copy_(torch.tensor([[99.0, -99.0], [1.0, 0.0], [2.0, 1.0]]))
    made.clip_()
    assert (made.log_lower >= made.log_min).all() and (made.log_upper <= made.log_max).all()
    assert (made.log_upper > made.log_lower).all()
    assert made.log_lower[2].tolist() == [1.0, -1.0] and made.log_upper[2].tolist() == [2.0, 1.0]
    assert made.entropy().isfinite() and made.mean().isfinite().all()
    before = [p.clone() for p in made.parameters()]
    made.clip_()
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


def test_seeds_decide_everything():
    a, b, c = (distribution(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.log_lower, b.log_lower) and not torch.equal(a.log_lower, c.log_lower)
    draws = [a.sample(4, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def embedding(**options):
    generator = torch.Generator().manual_seed(0)
    return HyperEmbedding([6, 8], LOWER, UPPER, generator=generator, **options)


def test_embedding_is_linear_in_scaled_logarithms():
    made = embedding(std=1.0)
    lambdas = torch.tensor([[0.1, 0.01], [100.0, 10.0], [10**0.5, 10**-0.5]])
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    torch.testing.assert_close(made.scaled(lambdas), z)
    first, second = made(lambdas)
    torch.testing.assert_close(first, z @ made.heads[0].weight.T)
    assert second.shape == (3, 8) and not first[0].any()


def test_embedding_with_trunk_and_bodies():
    made = embedding(trunk=(5,), body=(4, 3), std=1.0)
    z = torch.tanh(made.trunk[0](made.scaled(torch.ones(7, 2))))
    for body, head, found in zip(made.bodies, made.heads, made(torch.ones(7, 2)), strict=True):
        expected = head(torch.tanh(body[2](torch.tanh(body[0](z)))))
        torch.testing.assert_close(found, expected)
    assert not torch.equal(made.bodies[0][0].weight, made.bodies[1][0].weight)


def test_heads_start_small():
    weights = torch.cat([h.weight.flatten() for h in HyperEmbedding([4000], LOWER, UPPER).heads])
    # the standard deviation of 8000 normal numbers is known to 1 / sqrt(16000) of itself
    assert abs(weights.std() / 1e-4 - 1) < 5 / math.sqrt(16000)
    assert not any(h.bias is not None for h in embedding().heads)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LambdaDistribution([0.0], [1.0], 2), r"lower must be above 0; got \[0.0\]"),
        (lambda: LambdaDistribution([1.0], [1.0], 2), r"upper must be above lower; got \[1.0\]"),
        (lambda: LambdaDistribution([1.0], [2.0, 3.0], 2), r"upper must be \[H\] with H = 1"),
        (lambda: LambdaDistribution([1.0], [2.0], 0), "members must be an integer of at least 1"),
        (lambda: distribution(width=[0.1] * 3), r"width must be one number, or H with H = 2; got"),
        (lambda: distribution(width=0.0), "width must be above 0; got 0.0"),
        (lambda: distribution().sample(0), "examples must be an integer of at least 1; got 0"),
        (lambda: embedding(trunk=(0,)), "trunk must be an integer of at least 1; got 0"),
        (lambda: embedding(std=-1.0), "std must be at least 0; got -1.0"),
        (
            lambda: embedding()(torch.ones(4, 3)),
            r"HyperEmbedding: lambdas must be \[..., H\] with H = 2; got \[4, 3\]",
        ),
    ],
    ids=range(10),
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
