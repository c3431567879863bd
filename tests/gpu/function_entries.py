"""The entries of catalogue.py for what measures predictions: divergences, labels, summaries."""

from functools import partial

import torch

from landscape_fast.ops import (
    divergence_sums,
    divergence_sums_reference,
    ensemble_summary,
    ensemble_summary_reference,
    pairwise_disagreement,
    pairwise_disagreement_reference,
    pairwise_divergence,
    pairwise_divergence_reference,
    summary_sums,
    summary_sums_reference,
)

KINDS = ("js", "kl", "disagreement")


def _logits(M, N, C):
    return lambda scale: [3 * torch.randn(M, N * scale, C * scale)]


def _near(M, N, C):
    """Logits of members that differ little."""
    return lambda scale: [torch.randn(N * scale, C) + 0.1 * torch.randn(M, N * scale, C)]


def _labels(dtype):
    return lambda scale: [torch.randint(5, (6, 1003 * scale)).to(dtype)]


def _targets(scale):
    N, C = 501 * scale, 13 * scale
    return [3 * torch.randn(4, N, C), torch.randint(C, (N,))]


def _rounded_divergences(function, logits, **options):
    """All three, in the precision that their terms have."""
    return [sums.float() for sums in function(logits, KINDS, **options).values()]


def _rounded_summary(function, logits, targets, **options):
    return function(logits, targets, **options).float()


def entries(entry):
    """`entry` is catalogue.Entry."""
    for kind in KINDS:
        for classes in (10, 131):
            yield entry(
                f"{kind} of {classes} classes",
                "pairwise_divergence",
                partial(pairwise_divergence, kind=kind),
                partial(pairwise_divergence_reference, kind=kind),
                _logits(6, 203, classes),
                gradients=kind != "disagreement",
            )
    many = {  # padded to 16, 32, 64 and 128 members; short rows and long ones
        "kl of 12 members": ("kl", _logits(12, 203, 40)),
        "kl of 20 members, long rows": ("kl", _logits(20, 53, 600)),
        "kl of 64 near members": ("kl", _near(64, 203, 100)),
        "kl of 100 members": ("kl", _logits(100, 37, 130)),
        "js of 40 members": ("js", _logits(40, 103, 130)),
    }
    for name, (kind, make) in many.items():
        functions = pairwise_divergence, pairwise_divergence_reference
        calls = [partial(function, kind=kind) for function in functions]
        yield entry(name, "pairwise_divergence", *calls, make, gradients=False)
    for dtype in (torch.int64, torch.uint8):
        yield entry(
            f"disagreement of {str(dtype).removeprefix('torch.')} labels",
            "pairwise_disagreement",
            pairwise_disagreement,
            pairwise_disagreement_reference,
            _labels(dtype),
            gradients=False,
        )
    functions = ensemble_summary, ensemble_summary_reference
    yield entry("summary", "ensemble_summary", *functions, _targets, gradients=False)
    for classes in (10, 131):
        functions = divergence_sums, divergence_sums_reference
        calls = [partial(_rounded_divergences, function) for function in functions]
        make = _logits(6, 203, classes)
        name = f"divergence sums of {classes} classes"
        yield entry(name, "divergence_sums", *calls, make, gradients=False)
    functions = summary_sums, summary_sums_reference
    calls = [partial(_rounded_summary, function) for function in functions]
    yield entry("summary sums", "summary_sums", *calls, _targets, gradients=False)
