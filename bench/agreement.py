"""Agreement before timing: every contestant against the definition in float64."""

import contextlib
import time
import warnings

import torch
from torch import Tensor

from bench.case import Bound, Case, Contestant, as_leaves, tensors
from landscape_fast.testing import assert_as_exact

ELSEWHERE = 0.05  # relative error from which a peer computes something else


def verify(case: Case, contestants: list[Contestant], inputs: tuple, train: bool):
    """Runs everybody once on `inputs`.

    Ours may be at most twice as far from the truth as the worst eager peer, output by output and
    gradient by gradient (`testing.assert_as_exact`); whoever is not is refused. A peer is refused
    when it plainly computes something else; otherwise its error is just reported.

    Returns:
        name -> {"error": largest relative L2 error over outputs and gradients, None for those that
        compute something else by design; "first_call_s": seconds, with compilation}, and
        a list of (contestant, {"refused" or "skipped": reason}).
    """
    truth = _truth(case, inputs, train)
    found, failures = {}, []
    plain: list[Tensor] = []
    for c in sorted(contestants, key=lambda c: c.group != "eager"):
        try:
            started = time.perf_counter()
            got = _results(c, c.bind(inputs, train), train)
            seconds = round(time.perf_counter() - started, 3)
        except Exception as exc:  # whatever stops a peer must not stop the bench
            kind = "refused" if c.group == "ours" else "skipped"
            failures.append((c, {kind: f"{type(exc).__name__}: {str(exc)[:300]}"}))
            continue
        if not c.same:
            found[c.name] = {"error": None, "first_call_s": seconds}
            continue
        error = _relative(got, truth)
        if c.group == "eager" and error < ELSEWHERE:
            plain = _worse(plain, got, truth)
        why = _objection(c, got, plain, truth, error)
        if why:
            failures.append((c, {"refused": why, "error": error}))
        else:
            found[c.name] = {"error": error, "first_call_s": seconds}
        del got
    return found, failures


def _truth(case: Case, inputs: tuple, train: bool) -> list[Tensor]:
    wide = tuple(_double(v) for v in inputs)
    if train:
        wide = as_leaves(wide)
    outputs = tensors([case.truth(*wide)])
    leaves = [t for t in tensors(wide) if t.requires_grad]
    return _with_gradients(outputs, leaves)


def _double(value):
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [_double(v) for v in value] if isinstance(value, (list, tuple)) else value


def _with_gradients(outputs: list[Tensor], leaves) -> list[Tensor]:
    """Outputs, then the gradients of half their sum of squares: the same loss in any layout."""
    if not leaves:
        return outputs
    incoming = [y.detach() for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)
    return incoming + [
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)
    ]


def _results(contestant: Contestant, bound: Bound, train: bool) -> list[Tensor]:
    if contestant.cudagraphs:
        torch.compiler.cudagraph_mark_step_begin()
    # peers run as users run them; a change of this switch would also compile them anew
    with _poisoned() if contestant.group == "ours" else contextlib.nullcontext():
        got = _with_gradients(tensors([bound.call()]), bound.leaves if train else ())
    return [t.detach() for t in bound.view(got)]


@contextlib.contextmanager
def _poisoned():
    """Fresh memory holds NaN, so that an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _worse(plain: list[Tensor], got: list[Tensor], truth: list[Tensor]) -> list[Tensor]:
    """Output by output, the one of the two that is further from the truth."""
    if not plain:
        return got
    pairs = zip(plain, got, truth, strict=True)
    return [p if (p - t).abs().max() >= (g - t).abs().max() else g for p, g, t in pairs]


def _relative(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative L2 error of a result; infinite where shapes differ."""
    if [g.shape for g in got] != [t.shape for t in truth]:
        return float("inf")
    errors = [0.0]
    for g, t in zip(got, truth, strict=True):
        if t.numel():
            scale = torch.linalg.vector_norm(t).clamp_min(torch.finfo(torch.float64).tiny)
            errors.append((torch.linalg.vector_norm(g.double() - t) / scale).item())
    return float(torch.tensor(errors).max())  # NaN where any is NaN


def _objection(contestant, got, plain, truth, error: float) -> str:
    if error == float("inf"):
        shapes = [[list(t.shape) for t in results] for results in (got, truth)]
        return f"results of shapes {shapes[0]}, expected {shapes[1]}"
    if contestant.group != "ours":
        return "" if error < ELSEWHERE else f"relative error {error:.1e}: another function"
    plain = plain or [t.to(g.dtype) for g, t in zip(got, truth, strict=True)]
    try:
        for i, three in enumerate(zip(got, plain, truth, strict=True)):
            assert_as_exact(f"result {i}", *three)
    except AssertionError as exc:
        return str(exc)
    return ""
