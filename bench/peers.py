"""Contestants that several cases share: our backends, torch.compile, and other packages."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from bench.case import Bound, Contestant, as_leaves, function, missing, tensors
from landscape_fast.ops import _dispatch


def ours(
    op: str, fn: Callable, device: str, dtype: torch.dtype, composed: bool = False
) -> list[Contestant]:
    """One contestant per backend of `op`, the default first; `fn` takes the keyword backend.

    `composed` is for an op whose "torch" is a fast composition that "auto" may choose on a GPU:
    then the choice itself and the composition compete too.
    """
    backends = [_dispatch.explain(op, device, dtype)[0], *_dispatch.OPS[op]]
    if composed and device == "cuda":
        backends = ["auto", *backends, "torch"]
    here = {"cpu": ("torch", "cpp"), "cuda": ("auto", "torch", "triton", "cuda")}[device]
    found = []
    for backend in dict.fromkeys(backends):
        name = f"ours ({backend})"
        if backend not in here:
            continue
        try:
            _dispatch.explain(op, device, dtype, backend)
        except ValueError as exc:
            found.append(missing(name, "ours", str(exc)))
            continue
        found.append(function(name, "ours", partial(fn, backend=backend)))
    return found


def compiled(
    label: str, fn: Callable, device: str, quick: bool, static: Callable = lambda inputs: ()
) -> list[Contestant]:
    """`fn` under torch.compile, autotuned as far as it goes.

    On CUDA twice: with Inductor's own CUDA graphs, which cost a copy of every input that is not
    `static` (inputs -> tensors whose addresses stay, as parameters' do), and without.
    """
    name = f"compile ({label})"
    if quick:
        return [missing(name, "compile", "left out of --quick runs: compiling takes too long")]
    plain = torch.compile(
        fn, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True
    )
    found = [function(name, "compile", plain)]
    if device != "cuda":
        return found
    graphed = torch.compile(fn, mode="max-autotune", dynamic=False, fullgraph=True)

    def bind(inputs: tuple, train: bool) -> Bound:
        given = as_leaves(inputs) if train else inputs
        for t in static(given):
            torch._dynamo.mark_static_address(t, guard=False)
        leaves = [t for t in tensors(given) if t.requires_grad] if train else []
        return Bound(lambda: graphed(*given), leaves)

    return [
        *found,
        Contestant(f"compile ({label}, cudagraphs)", "compile", bind, cudagraphs=True),
    ]


def peer(package: str, file: str = ""):
    """A module of an optional package, or None; with `file`, that one file alone is loaded.

    For torch_uncertainty, whose package imports more than its layers need.
    """
    try:
        found = importlib.metadata.distribution(package)
        if not file:
            return importlib.import_module(package)
        path = found.locate_file(f"{package}/{file}")
        spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (importlib.metadata.PackageNotFoundError, ImportError):  # or what it needs in turn
        return None
    return module


def imported(module: str, attribute: str):
    """(attribute, "") of an optional package, or (None, the reason why it is not there).

    Where the package does not import, the module's file is tried alone.
    """
    try:
        return getattr(importlib.import_module(module), attribute), ""
    except Exception as exc:  # a package that breaks while importing is not our failure either
        package, _, rest = module.partition(".")
        alone = peer(package, rest.replace(".", "/") + ".py") if rest else None
        if alone is not None and hasattr(alone, attribute):
            return getattr(alone, attribute), ""
        return None, f"{module}.{attribute} cannot be imported: {type(exc).__name__}: {exc}"


def _parameters(module, train: bool, **values):
    """Copies values into the named parameters of a module; they are its leaves."""
    named = dict(module.named_parameters())
    for name, value in values.items():
        named[name].data = value.detach()
        named[name].requires_grad_(train)
    return [named[name] for name in values]


def tabm_linear(device: str, batch_major: bool) -> Contestant:
    """tabm.LinearBatchEnsemble, in its own layout [B, M, I]; no copy inside the timed region."""
    name = "tabm.LinearBatchEnsemble"
    cls, why = imported("tabm", "LinearBatchEnsemble")
    if cls is None:
        return missing(name, "library", why)

    def bind(inputs: tuple, train: bool) -> Bound:
        x, weight, r, s, bias = inputs
        own = x if batch_major else x.transpose(0, 1).contiguous()  # [B, M, I]
        own = own.detach().requires_grad_(train)
        out, into = weight.shape
        layer = cls(
            into, out, k=r.shape[0], scaling_init="ones", device=x.device, dtype=x.dtype
        )
        values = _parameters(layer, train, weight=weight, r=r, s=s, bias=bias)

        def view(results):  # y and dx from [B, M, :] to the layout of the case
            if batch_major:
                return results
            return [t.transpose(0, 1) if t.ndim == 3 else t for t in results]

        return Bound(lambda: layer(own), [own, *values], view)

    return Contestant(name, "library", bind)


def torch_uncertainty_linear(device: str, batch_major: bool) -> Contestant:
    """torch_uncertainty's BatchLinear, on the folded rows [M*B, I]."""
    name = "torch_uncertainty.BatchLinear"
    if batch_major:
        return missing(name, "library", "has no [B, M, I] layout")
    cls, why = imported("torch_uncertainty.layers.batch_ensemble", "BatchLinear")
    if cls is None:
        return missing(name, "library", why)

    def bind(inputs: tuple, train: bool) -> Bound:
        x, weight, r, s, bias = inputs
        own = x.flatten(0, 1).detach().requires_grad_(train)  # [M*B, I]
        out, into = weight.shape
        layer = cls(into, out, r.shape[0], device=x.device, dtype=x.dtype)
        values = _parameters(
            layer, train, **{"linear.weight": weight}, r_group=r, s_group=s, bias=bias
        )

        def view(results):
            y, *grads = results
            y = y.unflatten(0, x.shape[:2])
            return [y, grads[0].view_as(x), *grads[1:]] if grads else [y]

        return Bound(lambda: layer(own), [own, *values], view)

    return Contestant(name, "library", bind)


def copy_floor(count: Callable[[tuple], int]) -> Contestant:
    """A plain copy that moves as many bytes as the op must: inputs -> bytes read plus written."""

    def bind(inputs: tuple, train: bool) -> Bound:
        device = tensors(inputs)[0].device
        source = torch.randn(count(inputs) // 8, device=device)  # float32, read and written once
        target = torch.empty_like(source)
        return Bound(lambda: target.copy_(source))

    return Contestant("copy of as many bytes", "floor", bind, modes=("eager", "graph"), same=False)
