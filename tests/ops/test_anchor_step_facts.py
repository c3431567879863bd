"""anchor_step: its directions are the gradients of autograd, its rules those of torch.optim."""

import pytest
import torch

from landscape_fast.ops.anchor_step import AdamRule, AnchorState, Cos2, SGDRule, anchor_step

CPP = pytest.param("cpp", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU"))
BACKENDS = [CPP, "triton"]


def doubles(T=2, F=1, M=2, sizes=(5, 3)):
    P, S = sum(sizes), T + F
    leaves = torch.randn(S, P, dtype=torch.float64, requires_grad=True)
    coeffs = torch.randn(M, len(sizes), S, dtype=torch.float64)
    return leaves, coeffs, sizes, T


def direction(leaves, T, grad, coeffs, sizes, **options):
    """What the step takes for the gradient of the trained anchors."""
    rule, anchors = SGDRule(1.0), leaves.detach()[:T].clone()
    state, fixed = AnchorState.zeros(rule, anchors), leaves.detach()[T:]
    anchor_step(grad, coeffs, anchors, rule, state, fixed=fixed, sizes=sizes, **options)
    return leaves.detach()[:T] - anchors


def points(leaves, coeffs, sizes):
    parts = zip(coeffs.unbind(1), leaves.split(sizes, 1), strict=True)
    return torch.cat([c @ a for c, a in parts], 1)


def test_gradient_of_any_loss_of_the_points_and_of_their_norm():
    leaves, coeffs, sizes, T = doubles()
    w = points(leaves, coeffs, sizes)
    loss = w.sin().sum()
    (grad,) = torch.autograd.grad(loss, w, retain_graph=True)
    (truth,) = torch.autograd.grad(loss + 0.3 / 2 * w.square().sum(), leaves)
    found = direction(leaves, T, grad, coeffs, sizes, curve_l2=0.3)
    torch.testing.assert_close(found, truth[:T], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("code", range(6))
def test_gradient_of_cos2_of_every_pair(code):
    leaves, coeffs, sizes, T = doubles()
    i, j = divmod(code, 2)
    j += j >= i
    assert i != j
    first = leaves[:, : sizes[0]]  # the selected part
    a, b = first[i], first[j]
    cosine = (a @ b) ** 2 / ((a @ a) * (b @ b))
    (truth,) = torch.autograd.grad(0.7 * cosine, leaves)
    gram = (first @ first.T).detach()
    selected, zero = torch.tensor([True, False]), torch.zeros(2, 8, dtype=torch.float64)
    penalty = Cos2(gram, torch.tensor(code), 0.7)
    options = {"penalty": penalty, "selected": selected}
    found = direction(leaves, T, zero, coeffs, sizes, **options)
    torch.testing.assert_close(found, truth[:T], rtol=1e-13, atol=1e-14)
    options["penalty"] = penalty.matrix()
    same = direction(leaves, T, zero, coeffs, sizes, **options)
    torch.testing.assert_close(same, found, rtol=0, atol=0)


def test_gradient_of_any_penalty_on_the_scalar_products():
    leaves, coeffs, sizes, T = doubles()
    weights = torch.randn(3, 3, dtype=torch.float64)
    (truth,) = torch.autograd.grad((weights * (leaves @ leaves.T)).sum(), leaves)
    zero = torch.zeros(2, 8, dtype=torch.float64)
    found = direction(leaves, T, zero, coeffs, sizes, penalty=weights + weights.T)
    torch.testing.assert_close(found, truth[:T], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_one_anchor_is_torch_optim(rule, backend, device):
    """K = 1 with coefficient 1, over steps that the state must carry."""
    settings = {"lr": 0.01, "weight_decay": 0.1}
    if rule == "nesterov":
        optimizer, ours = torch.optim.SGD, SGDRule(momentum=0.9, nesterov=True, **settings)
        settings |= {"momentum": 0.9, "nesterov": True}
    else:
        optimizer, ours = torch.optim.AdamW, AdamRule(decoupled=True, **settings)
    anchors = torch.randn(1, 300, device=device)
    plain = anchors.clone().requires_grad_()
    optimizer = optimizer([plain], **settings)
    state, one = AnchorState.zeros(ours, anchors), torch.ones(1, 1, device=device)
    for _ in range(4):
        plain.grad = torch.randn(1, 300, device=device)
        anchor_step(plain.grad, one, anchors, ours, state, backend=backend)
        optimizer.step()
    torch.testing.assert_close(anchors, plain.detach())


def test_the_state_has_its_dtype_whatever_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        anchors, rule = torch.zeros(2, 3), AdamRule(0.1)
        state = AnchorState.zeros(rule, anchors)
        anchor_step(torch.ones(1, 3), torch.ones(1, 2), anchors, rule, state)
    finally:
        torch.set_default_dtype(before)
    assert state.step == 1 and state.step.dtype == torch.float32
    torch.testing.assert_close(anchors, torch.full_like(anchors, -0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_where_they_are(backend, device):
    anchors = torch.randn(2, 70, device=device)
    grad = torch.randn(1, 70, device=device)
    grad[0, 3], anchors[1, 5] = float("nan"), float("inf")
    state = AnchorState.zeros(SGDRule(0.1, weight_decay=0.01), anchors)
    coeffs = torch.tensor([[0.5, 0.0]], device=device)
    gram = anchor_step(
        grad, coeffs, anchors, SGDRule(0.1, weight_decay=0.01), state, backend=backend
    )
    assert anchors[:, 3].isnan().all() and gram.isnan().all()
    assert anchors.isfinite().sum() == 2 * 70 - 3
