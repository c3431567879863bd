"""The entries of catalogue.py for the optimiser step of all anchors of a subspace."""

from functools import partial

import torch

from landscape_fast.ops.anchor_step import (
    AdamRule,
    AnchorState,
    Cos2,
    SGDRule,
    anchor_step,
    anchor_step_reference,
)

SIZES = (700, 1, 0, 330)


def _anchors(scale):
    """grad, coeffs, three anchors of which one is fixed, states; parts as `SIZES`."""
    P = sum(SIZES)
    grad, anchors, first, second = (torch.randn(n, P) for n in (2, 3, 2, 2))
    return [grad, torch.randn(2, len(SIZES), 3), anchors, first, second.square()]


def _anchor_step(function, rule, grad, coeffs, anchors, *states, **options):
    """What it writes, of copies."""
    trained, fixed = anchors[:2].clone(), anchors[2:]
    states = [t.clone() for t in states[: rule.states]]
    device = anchors.device
    state = AnchorState(torch.ones((), device=device), *states)
    gram = 10 * torch.eye(3, device=device, dtype=torch.float64) + 3
    pair = torch.ones((), device=device, dtype=torch.int64)
    options |= {"fixed": fixed, "sizes": SIZES, "penalty": Cos2(gram, pair, 5.0), "curve_l2": 0.1}
    function(grad, coeffs, trained, rule, state, **options)
    return [trained, *states]


def entries(entry):
    """One for each kind of rule; `entry` is catalogue.Entry."""
    rules = {
        "sgd": SGDRule(0.1, 0.9, weight_decay=0.01, nesterov=True),
        "adamw": AdamRule(0.1, weight_decay=0.1, decoupled=True),
    }
    for name, rule in rules.items():
        call, definition = (
            partial(_anchor_step, f, rule) for f in (anchor_step, anchor_step_reference)
        )
        title = f"anchor step, {name}"
        yield entry(title, "anchor_step", call, definition, _anchors, gradients=False)
