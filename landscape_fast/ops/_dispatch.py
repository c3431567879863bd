"""Which implementation of an op runs, and the order of an op's wrapper.

An op declares its backends once, best first. `pick` chooses among them; `explain` says why. The
public function of every op then runs, in this order:

1. types are checked; then `autocast` (or `autocast_input`), where the op multiplies activations;
   then all else is checked (`_checks`), and the backend picked;
2. under a functorch transform or forward-mode AD (`transforming`), and in most ops when the pick is
   "torch": the reference, in plain PyTorch, which every transform understands;
3. when an input needs a gradient (`wants_grad`): an ordinary `autograd.Function` around the
   registered ops or library calls, whose backward takes `reference_backward` when `wants_graph`;
4. otherwise these themselves.

Mixed dtypes, one rule for all ops of shared weights and factors: where the input is bfloat16 or
float16 (given so, or cast by autocast), a parameter may be float32. It is rounded to the dtype of
the input for the products, and its gradient is summed and returned in float32 with no 16-bit
rounding on the way. `check_tensor(..., or_float32=True)` lets such arguments in, `autocast_input`
casts the input alone, `rounded` is what a kernel multiplies with, and a reference begins with
`as_rounded`, which rounds values without rounding gradients.
"""

import contextlib
import os
import shutil
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from landscape_fast import _extension
from landscape_fast.ops._checks import LOW

try:  # private probes of torch; a test holds every supported torch to one of the two
    from torch._C import _are_functorch_transforms_active as _functorch_active
except ImportError:
    from torch._C._functorch import peek_interpreter_stack

    def _functorch_active() -> bool:
        return peek_interpreter_stack() is not None


FORCED = os.environ.get("LANDSCAPE_FAST_BACKEND", "") or "auto"  # read once, at import
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("torch", "cpp", "triton", "cuda")

_NOTHING = contextlib.nullcontext()

OPS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {}  # op -> backend -> dtypes, best first
_picked: dict[tuple, str] = {}


def declare(op: str, **backends: tuple[torch.dtype, ...]) -> None:
    """Names the backends of `op`, best first, with their dtypes. "torch" needs no naming."""
    unknown = set(backends) - set(NAMES[1:])
    if unknown:
        raise ValueError(
            f"declare: backends of {op} must be among {NAMES[1:]}; got {sorted(unknown)}"
        )
    OPS[op] = backends


def pick(op: str, backend: str, tensor: Tensor) -> str:
    """The backend that runs `op` on tensors like `tensor`: "torch", "cpp", "triton" or "cuda".

    `backend` is the caller's wish. "auto" takes LANDSCAPE_FAST_BACKEND (read at import) where the
    op has that backend for the dtype, and otherwise the first declared backend that can run here;
    on a CUDA tensor, ending at "torch" for want of a kernel that exists warns once per op.

    Raises:
        ValueError: if a forced backend is unknown, or cannot run here (the message says why).
    """
    return _pick(op, backend, tensor.device.type, tensor.dtype)


def _pick(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    key = (op, backend, device, dtype, FORCED)
    name = _picked.get(key)
    if name is None:
        name, reason = explain(op, device, dtype, backend)
        _picked[key] = name
        if device == "cuda" and name == "torch" and reason.startswith("no kernel"):
            warnings.warn(f"landscape_fast.{op} runs in plain PyTorch: {reason}", stacklevel=3)
    return name


_pick._dynamo_marked_constant = (
    True  # torch.compile evaluates it while tracing: its answer is a constant
)


def explain(op: str, device: str, dtype: torch.dtype, backend: str = "auto") -> tuple[str, str]:
    """(backend, reason) for `op` on tensors of that device type and dtype; see `pick`."""
    declared = OPS[op]
    if backend not in ("auto", *NAMES):
        raise ValueError(
            f"{op}: backend must be one of {('auto', 'torch', *declared)}; got {backend!r}"
        )
    wish, origin = backend, "asked for"
    if backend == "auto" and FORCED != "auto":
        if FORCED not in NAMES:
            raise ValueError(
                f"LANDSCAPE_FAST_BACKEND must be one of {('auto', *NAMES)}; got {FORCED!r}"
            )
        forceable = device in ("cpu", "cuda") and dtype in declared.get(FORCED, ())
        if FORCED == "torch" or forceable:
            wish, origin = FORCED, "LANDSCAPE_FAST_BACKEND"
    if wish == "torch":
        return "torch", origin
    if wish != "auto":
        if wish not in declared:
            raise ValueError(
                f"{op}: backend must be one of {('auto', 'torch', *declared)}; got {wish!r}"
            )
        obstacle = _obstacle(wish, declared[wish], device, dtype)
        if obstacle:
            raise ValueError(f"{op}: backend {wish!r} ({origin}) cannot run here: {obstacle}")
        return wish, origin
    if dtype == torch.float64:
        return "torch", "float64 always runs in plain PyTorch"
    # interpreted Triton is for tests: on CPU tensors it runs only where it is asked for
    here = [n for n in declared if device in _devices(n) and (n, device) != ("triton", "cpu")]
    obstacles = {name: _obstacle(name, declared[name], device, dtype) for name in here}
    for name, obstacle in obstacles.items():
        if obstacle is None:
            return name, f"first of {', '.join(here)} that can run"
    if not here:
        return "torch", f"plain PyTorch is this op's path for {device} tensors"
    return "torch", "no kernel can run: " + "; ".join(f"{n}: {o}" for n, o in obstacles.items())


def _devices(name: str) -> tuple[str, ...]:
    if name == "triton":
        return ("cuda", "cpu") if INTERPRETED else ("cuda",)
    return {"cpp": ("cpu",), "cuda": ("cuda",)}[name]


def _obstacle(
    name: str, dtypes: tuple[torch.dtype, ...], device: str, dtype: torch.dtype
) -> str | None:
    if device not in _devices(name):
        hint = " (or TRITON_INTERPRET=1 before import)" if name == "triton" else ""
        return f"it needs {_devices(name)[0]} tensors{hint}, got {device}"
    if dtype not in dtypes:
        return f"it takes {', '.join(str(d) for d in dtypes)}, got {dtype}"
    if name == "triton":
        return _triton_obstacle(device)
    if _extension.C is None:
        return f"landscape_fast._C is not there ({_extension.error})"
    if name == "cuda" and not _extension.with_cuda:
        return "landscape_fast._C was built without CUDA"
    return None


@cache
def _triton_obstacle(device: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if find_spec("triton.tools.tensor_descriptor") is None:  # whatever a fork numbers itself
        import triton

        return f"it needs triton 3.4 or newer, which torch 2.8 brings, got {triton.__version__}"
    if device == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
        if not (
            os.environ.get("CC")
            or shutil.which("gcc")
            or shutil.which("clang")
            or shutil.which("cc")
        ):
            return "Triton needs a C compiler to build its launcher, and none is on PATH"
    return None


def transforming() -> bool:
    """Whether a functorch transform (grad, vmap, jvp, ...) or forward-mode AD is active.

    Custom kernels are wrong without a word under these (a jvp through one has a zero tangent), so
    the wrapper then takes the reference. The probe also runs, and must run, while torch.compile
    traces.
    """
    return _functorch_active() or forward_ad._current_level >= 0


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records and any of the tensors requires a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def held(x: Tensor, params, needs) -> bool:
    """Whether the gradient of a float32 parameter is wanted beside an `x` of 16 bits."""
    pairs = zip(params, needs, strict=True)
    return x.dtype in LOW and any(need and p.dtype == torch.float32 for p, need in pairs)


def free(*sizes) -> bool:
    """Whether a size is free in a graph that is exported: it may then decide nothing."""
    if not all(isinstance(n, int) for n in sizes):
        return True
    if not getattr(torch.compiler, "_is_exporting_flag", False):
        return False
    from torch.fx.experimental import symbolic_shapes

    # a strict export is traced by dynamo, to which free sizes are ints; torch 2.7 cannot ask
    known = getattr(symbolic_shapes, "has_static_value", None)
    return known is not None and not all(known(n) for n in sizes)


def _autocasting(device: str) -> bool:
    known = device in ("cpu", "cuda")  # asking for the others takes time, and raises for some
    return (known or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, all tensors but float64 ones in the autocast dtype, as for `F.linear`.

    Kernels are opaque to autocast, so a wrapper that skipped this would silently run in float32.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not _autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in KERNEL_DTYPES else t for t in tensors)


def autocast_input(x: Tensor, *params: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, `x` in the autocast dtype; float32 parameters stay, for the rule above.

    16-bit parameters take the dtype of `x`. A float64 `x`, and float64 parameters, are left alone.
    """
    device = x.device.type
    if not _autocasting(device):
        return x, *params
    if x.dtype in KERNEL_DTYPES:
        x = x.to(torch.get_autocast_dtype(device))
    return x, *[t.to(x.dtype) if t is not None and t.dtype in LOW else t for t in params]


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context in which autocast is off for that device type; free where it is off already."""
    return torch.autocast(device, enabled=False) if _autocasting(device) else _NOTHING


def rounded(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in `dtype`, as the products of a mixed op see them."""
    return tuple([t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors])


def as_rounded(x: Tensor, *params: Tensor | None) -> tuple[Tensor | None, ...]:
    """`x` and the parameters for a reference; the caller casts its result to the dtype of `x`.

    Where `x` has 16 bits and a parameter float32, all become float32, the parameters with the
    values they have in the dtype of `x`; their gradients pass unrounded. Otherwise nothing changes.
    """
    held = any(t is not None and t.dtype == torch.float32 for t in params)
    if not held or x.dtype not in LOW:
        return x, *params

    def round_values(t: Tensor) -> Tensor:  # t + (rounded - t) is exact
        return t.float() + (t.to(x.dtype).float() - t.float()).detach()

    return x.float(), *[None if t is None else round_values(t) for t in params]


def wants_graph() -> bool:
    """Inside a backward: whether a graph of the gradient is being built (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def reference_backward(reference, tensors, needs, grads) -> tuple[Tensor | None, ...]:
    """Gradients of `reference(*tensors)` that carry a graph, for a `backward` that must.

    A kernel called there would carry none, and Hessians would be wrong without an error.

    Args:
        reference: the op in plain PyTorch; returns a tensor or a sequence of tensors.
        tensors: its arguments, as saved; None and other non-tensors pass through.
        needs: which of them need a gradient (`ctx.needs_input_grad`, possibly longer than
            `tensors`; the rest is None).
        grads: the incoming gradient, or a sequence of them; None where an output got none.

    Returns:
        One gradient or None per entry of `needs`, differentiable in `tensors` and `grads`.
    """
    with torch.enable_grad():
        # Aliases, since one argument may depend on another (r computed from weight): a gradient
        # with respect to the saved tensor itself would then count the inner dependence twice.
        aliases = [t.view_as(t) if isinstance(t, Tensor) else t for t in tensors]
        outputs = reference(*aliases)
        if isinstance(outputs, Tensor):
            outputs, grads = (outputs,), (grads,)
        pairs = [
            (y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad
        ]
        wanted = [a for a, need in zip(aliases, needs, strict=False) if need]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
            if pairs and wanted
            else [None] * len(wanted)
        )
    return tuple(next(found) if need else None for need in needs)
