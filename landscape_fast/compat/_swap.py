"""Changes the class of live layers to a subclass that computes with the ops of this library.

The subclass is made for each class that is met, and has only another `forward`. All that an object
carries (parameters, buffers, hooks, mode, attributes) stays where it is, `isinstance` against the
class it had goes on being true, and pickle, deepcopy and torch.save write that class down.
"""

from collections.abc import Callable

from torch import nn

from landscape_fast.ops._checks import message, require

Forward = Callable[..., object]

_made: dict[type[nn.Module], type[nn.Module]] = {}


class Swapped:
    """Marks the subclasses; `_peer` is the class that the object had."""

    _peer: type[nn.Module]

    def __reduce_ex__(self, protocol):
        # The subclass has no name that pickle could import: it is made again from the peer's.
        return (_blank, (self._peer,), *super().__reduce_ex__(protocol)[2:])


def _blank(peer: type[nn.Module]) -> nn.Module:
    kind = subclass_of(peer)
    return kind.__new__(kind)


def methods_for(kind: type[nn.Module]) -> dict[str, Forward]:
    """The forward that replaces the one of `kind`, and what comes with it; {} for other classes.

    A class is known by the name of its module and its own, so the packages need not be imported
    here. A subclass counts as long as it has the forward of a known class.
    """
    from landscape_fast.compat import _tabm_forwards, _torch_uncertainty_forwards

    known = _tabm_forwards.METHODS | _torch_uncertainty_forwards.METHODS
    for base in kind.__mro__:
        found = known.get((base.__module__, base.__qualname__))
        if found is not None:
            return found if kind.forward is base.forward else {}
    return {}


def subclass_of(peer: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `peer` with our forward; the same one for every call."""
    if peer not in _made:
        about = {name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")}
        body = {**about, **methods_for(peer), "_peer": peer}
        _made[peer] = type(peer.__name__, (Swapped, peer), body)
    return _made[peer]


def accelerate_(model: nn.Module) -> nn.Module:
    """Layers of `tabm` and `torch_uncertainty` inside `model` compute with our ops from now on.

    Nothing is copied or replaced: modules, parameters, their names, the state dict, hooks, train
    mode, `isinstance` and attributes stay as they are, so optimisers and checkpoints go on working.
    Outputs and gradients are equal up to rounding, dropout draws the same masks, and less is kept
    for the backward. Under autocast the outputs are of the low type, where `tabm` returns float32.
    A layer whose `forward` is not that of its package, or whose parts have hooks that would see
    values in between, computes as before. Saved whole by pickle or torch.save, the model needs
    this package to load.

    Args:
        model: a network with such layers, or one itself.

    Returns:
        `model`, changed in place; calling it again changes nothing.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if nothing inside it is a layer of the two packages.

    Example:
        >>> import tabm
        >>> model = accelerate_(tabm.TabM.make(n_num_features=4, d_out=1))
        >>> isinstance(model.output, tabm.LinearEnsemble)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("accelerate_", "model", "an nn.Module", type(model).__name__))
    found = 0
    for module in model.modules():
        if isinstance(module, Swapped):
            found += 1
        elif "forward" not in vars(module) and methods_for(type(module)):
            module.__class__ = subclass_of(type(module))
            found += 1
    rule = "a network with layers of tabm or torch_uncertainty"
    remedy = "the layers of this library need no change"
    require(found > 0, "accelerate_", "model", rule, type(model).__name__, remedy)
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Undoes `accelerate_`: every layer has the class it had; `model` is returned."""
    rule = "an nn.Module"
    require(isinstance(model, nn.Module), "restore_", "model", rule, type(model).__name__)
    for module in model.modules():
        if isinstance(module, Swapped):
            module.__class__ = module._peer
    return model
