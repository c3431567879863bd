"""How much memory a training step keeps between forward and backward: predicted, and measured.

Both count the storages that autograd saves, each once and whole, without those of parameters and
buffers. A layer of this library keeps its input; composed of plain PyTorch calls it keeps two more
tensors of that size.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from landscape_fast.ops._checks import message


def activation_memory(model: nn.Module, *inputs) -> int:
    """Bytes that a forward of `model` will save for its backward, without running it.

    The forward runs on tensors without memory, so this takes milliseconds and no room, whatever the
    sizes; it decides between kernels as the real one will, in the mode `model` is in and under
    autocast if that is on. Gradients, the optimiser's state and what a backward needs for itself
    come on top.

    Args:
        model: a module; its parameters and buffers are neither counted nor changed.
        inputs: of its forward, tensors or nested lists and dicts of them. A tensor on the meta
            device (`torch.empty(shape, device="meta")`) stands for one on the device of `model`.

    Returns:
        Bytes: of activations, masks, statistics, copies of parameters in another dtype, and of the
        inputs themselves where they are kept.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if what `model` computes depends on values in a way that shapes do not tell;
            `saved_bytes` measures it then.

    Example:
        >>> import torch
        >>> from landscape_fast.nn import BatchEnsembleLinear
        >>> layer = BatchEnsembleLinear(512, 512, members=32)
        >>> x = torch.empty(32, 256, 512, device="meta")
        >>> activation_memory(layer, x) == 32 * 256 * 512 * 4  # x, and nothing else
        True
    """
    if not isinstance(model, nn.Module):
        rule = message("activation_memory", "model", "an nn.Module", type(model).__name__)
        raise TypeError(rule)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {k: mode.from_tensor(t) for k, t in _state(model)}
    device = next((t.device for t in state.values()), torch.device("cpu"))

    def stand_in(t: Tensor) -> Tensor:
        fake = mode.from_tensor(t)
        if t.is_meta and device.type != "meta":
            with mode:
                like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            fake = like.requires_grad_(t.requires_grad)
        return fake

    inputs = tree_map_only(Tensor, stand_in, inputs)

    def forward():
        with mode:
            return torch.func.functional_call(model, state, inputs)

    try:
        return _saved(forward, state.values())
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        rule = "computable from shapes alone"
        remedy = "measure one step with saved_bytes"
        text = message("activation_memory", "model", rule, type(error).__name__, remedy)
        raise ValueError(text) from error
    finally:
        torch.clear_autocast_cache()  # it may hold casts of the stand-ins


def saved_bytes(function: Callable, *inputs) -> int:
    """Bytes that `function(*inputs)` saves for its backward, measured by running it once.

    Args:
        function: a module, or any callable. What a module holds is not counted, nor is any
            nn.Parameter, or view of one, that a callable uses.
        inputs: its arguments.

    Example:
        >>> import torch
        >>> saved_bytes(torch.nn.Linear(3, 5), torch.zeros(7, 3)) == 7 * 3 * 4
        True
    """
    own = [t for _, t in _state(function)] if isinstance(function, nn.Module) else []
    return _saved(lambda: function(*inputs), own)


def _state(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _saved(forward: Callable, own: Iterable[Tensor]) -> int:
    """Bytes of the storages saved while `forward` runs, but for those of `own`."""
    excluded = {_place(t) for t in own}
    sizes = {}
    kept = []  # alive until counted, so that no address comes twice

    def pack(t: Tensor) -> Tensor:
        whole = t if t._base is None else t._base
        if not isinstance(whole, nn.Parameter) and _place(t) not in excluded:
            kept.append(t)
            sizes[_place(t)] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    del output
    return sum(sizes.values())


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata
