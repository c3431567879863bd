"""State dicts of other BatchEnsemble code, into the names and layouts of this library, and back.

Both directions take and give a mapping of names to arrays, so no other package is needed: tensors
of `state_dict()`, arrays of a TensorFlow checkpoint (`/` between names, `:0` at the end), or a flat
or nested dictionary of a Flax model.

==================  ==========================================  ============================
peer                a BatchEnsemble layer                       the shared weight
==================  ==========================================  ============================
"tabm"              weight, r, s, bias                          [O, I], as here
"torch_uncertainty" linear.weight, conv.weight or               as here
                    conv_transpose.weight, r_group, s_group,
                    bias
"edward2_tf"        kernel, alpha, gamma, ensemble_bias         [I, O], [*kernel, I, O]
"edward2_jax"       kernel, fast_weight_alpha,                  [I, O], [*kernel, I, O]
                    fast_weight_gamma, bias
==================  ==========================================  ============================

The edward2 forms also know plain layers (kernel, bias), depthwise ones (depthwise_kernel
[kh, kw, I, multiplier]), batch normalisation, and in TensorFlow hyper-batch layers: inside these a
layer `dense` or `conv2d` with kernel and ensemble_bias, and a `delta_` one with a kernel; around
them alpha and gamma for the former, alpha_1 and gamma_1 for the latter, and bias. Factors of rank K
are [K, M, features] everywhere. Of a Flax model, give the collections "params" and "batch_stats"
merged into one dictionary.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape_fast.ops._checks import require

__all__ = ["PEERS", "from_peer", "to_peer"]

PEERS = ("tabm", "torch_uncertainty", "edward2_tf", "edward2_jax")
_INNER = ("linear", "conv", "conv_transpose")
_NORM_TF = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
            "moving_variance": "running_var"}  # fmt: skip
_NORM_JAX = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_FACTORS = {
    "edward2_tf": {"alpha": "r", "gamma": "s", "alpha_1": "u", "gamma_1": "v"},
    "edward2_jax": {"fast_weight_alpha": "r", "fast_weight_gamma": "s"},
}


def from_peer(state: Mapping[str, Any], peer: str) -> dict[str, Tensor]:
    """A state dict for layers of `landscape_fast.nn` from one of another package.

    Args:
        state: names to tensors or arrays; for the edward2 forms dictionaries may be nested.
        peer: "tabm", "torch_uncertainty", "edward2_tf" or "edward2_jax".

    Returns:
        Names with dots to tensors, in the order given; arrays are copied, tensors are not.

    Raises:
        ValueError: if `peer` is none of these, or two names become one.

    Example:
        >>> state = {"dense/kernel": np.zeros((4, 3)), "dense/alpha": np.ones((2, 4))}
        >>> {name: list(value.shape) for name, value in from_peer(state, "edward2_tf").items()}
        {'dense.weight': [3, 4], 'dense.r': [2, 4]}
    """
    _check_peer("from_peer", peer)
    if peer == "tabm":
        return {name: _tensor(value) for name, value in state.items()}
    layers = _grouped(_flat(state))
    found: dict[str, Tensor] = {}
    for prefix, layer in layers.items():
        if peer == "torch_uncertainty":
            named = _read_torch_uncertainty(prefix, layer, layers)
        else:
            named = _read_edward2(prefix, layer, layers, peer)
        for name, value in named.items():
            _once(found, name)
            found[name] = value
    return found


def to_peer(
    state: Mapping[str, Tensor], peer: str, transposed: Collection[str] = ()
) -> dict[str, Any]:
    """The inverse of `from_peer`: a state dict of this library under the names of another package.

    Args:
        state: names to tensors, as `state_dict()` returns them.
        peer: "tabm", "torch_uncertainty", "edward2_tf" or "edward2_jax".
        transposed: names of transposed convolutions with as many inputs as outputs, which nothing
            in `state` tells from a convolution; torch_uncertainty has another name for them.

    Returns:
        Names to tensors for the two PyTorch packages; for edward2 names with "/" to numpy arrays
        (bfloat16 as float32).

    Raises:
        ValueError: if `peer` is none of these.

    Example:
        >>> state = {"dense.weight": torch.zeros(3, 4), "dense.r": torch.ones(2, 4)}
        >>> {name: value.shape for name, value in to_peer(state, "edward2_jax").items()}
        {'dense/kernel': (4, 3), 'dense/fast_weight_alpha': (2, 4)}
    """
    _check_peer("to_peer", peer)
    if peer == "tabm":
        return dict(state)
    found: dict[str, Any] = {}
    for prefix, layer in _grouped(state).items():
        if peer == "torch_uncertainty":
            found |= _write_torch_uncertainty(prefix, layer, prefix in transposed)
        else:
            named = _write_edward2(layer, peer)
            path = prefix.replace(".", "/")
            found |= {f"{path}/{name}" if path else name: _array(v) for name, v in named.items()}
    return found


def _once(found: dict, name: str) -> None:
    rule = "a mapping with one value per name"
    require(name not in found, "from_peer", "state", rule, f"two {name}")


def _check_peer(op: str, peer: str) -> None:
    require(peer in PEERS, op, "peer", f"one of {PEERS}", repr(peer))


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and "/" become dots; the ":0" of TensorFlow goes."""
    found = {}
    for name, value in state.items():
        path = f"{prefix}{name.split(':')[0].replace('/', '.')}"
        found |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def _grouped(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{layer: {last part of the name: value}}."""
    layers: dict[str, dict[str, Any]] = {}
    for path, value in state.items():
        prefix, _, name = path.rpartition(".")
        layers.setdefault(prefix, {})[name] = value
    return layers


def _split(prefix: str) -> tuple[str, str]:
    outer, _, last = prefix.rpartition(".")
    return outer, last


def _dotted(prefix: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}" if prefix else name: value for name, value in named.items()}


# ---- torch_uncertainty


def _read_torch_uncertainty(prefix, layer, layers):
    outer, last = _split(prefix)
    if last in _INNER and "r_group" in layers.get(outer, {}):
        prefix = outer  # the plain layer inside a BatchEnsemble layer
    names = {"r_group": "r", "s_group": "s"} if "r_group" in layer else {}
    return _dotted(prefix, {names.get(name, name): _tensor(v) for name, v in layer.items()})


def _write_torch_uncertainty(prefix, layer, transposed):
    if "r" not in layer or "s" not in layer:
        return _dotted(prefix, layer)
    weight, r, s = layer["weight"], layer["r"], layer["s"]
    inner = "linear" if weight.ndim == 2 else "conv"
    # A transposed weight has the inputs in front.
    inputs_first = weight.shape[0] == r.shape[-1] != s.shape[-1]
    if inner == "conv" and (transposed or inputs_first):
        inner = "conv_transpose"
    names = {"weight": f"{inner}.weight", "r": "r_group", "s": "s_group"}
    return _dotted(prefix, {names.get(name, name): value for name, value in layer.items()})


# ---- edward2


def _read_edward2(prefix, layer, layers, peer):
    norm = _NORM_TF if peer == "edward2_tf" else _NORM_JAX
    if not _holds_kernel(layer) and {"moving_mean", "mean", "beta", "scale"} & set(layer):
        return _dotted(prefix, {norm.get(name, name): _tensor(v) for name, v in layer.items()})
    outer, last = _split(prefix)
    names = dict(_FACTORS[peer], ensemble_bias="bias")
    if last in ("dense", "conv2d") and _joined(outer, f"delta_{last}") in layers:
        prefix = outer  # what does not respond, inside a hyper-batch layer
    elif last in ("delta_dense", "delta_conv2d"):
        prefix, names = outer, {"kernel": "delta", "alpha": "u", "gamma": "v"}
    elif any(_joined(prefix, inner) in layers for inner in ("delta_dense", "delta_conv2d")):
        names["bias"] = "delta_bias"
    found = {}
    for name, value in layer.items():
        value, ours = _tensor(value), names.get(name, name)
        if name == "depthwise_kernel":
            ours, value = "weight", value.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
        elif name == "kernel":
            ours, value = names.get(name, "weight"), _read_kernel(value)
        _once(found, ours)
        found[ours] = value.contiguous()
    return _dotted(prefix, found)


def _write_edward2(layer, peer):
    tf = peer == "edward2_tf"
    if "running_mean" in layer or "weight" in layer and layer["weight"].ndim == 1:
        norm = {ours: name for name, ours in (_NORM_TF if tf else _NORM_JAX).items()}
        return {norm[name]: v for name, v in layer.items() if name in norm}
    hyper = "delta" in layer
    names = {ours: name for name, ours in _FACTORS[peer].items()}
    names["bias"] = "bias"
    if tf and (hyper or {"r", "s"} & set(layer)):
        names["bias"] = "ensemble_bias"
    inner = ""
    if hyper:
        inner = "dense" if layer["weight"].ndim == 2 else "conv2d"
        names |= {"delta": f"delta_{inner}/kernel", "delta_bias": "bias"}
        names["bias"] = f"{inner}/ensemble_bias"
    found = {}
    for name, value in layer.items():
        if name == "weight" and _depthwise(layer):
            shape = (layer["r"].shape[-1], -1, *value.shape[2:])
            found["depthwise_kernel"] = value.view(shape).permute(2, 3, 0, 1)
        elif name == "weight":
            found[f"{inner}/kernel" if hyper else "kernel"] = _written_kernel(value)
        else:
            found[names.get(name, name)] = _written_kernel(value) if name == "delta" else value
    return found


def _depthwise(layer) -> bool:
    weight = layer["weight"]
    inputs = layer["r"].shape[-1] if "r" in layer else 1
    return weight.ndim == 4 and weight.shape[1] == 1 < inputs and weight.shape[0] % inputs == 0


def _holds_kernel(layer) -> bool:
    return bool({"kernel", "depthwise_kernel", "alpha", "fast_weight_alpha"} & set(layer))


def _read_kernel(kernel: Tensor) -> Tensor:
    """[*kernel, I, O] -> [O, I, *kernel]."""
    return kernel.movedim((-1, -2), (0, 1))


def _written_kernel(weight: Tensor) -> Tensor:
    """[O, I, *kernel] -> [*kernel, I, O]."""
    return weight.movedim((0, 1), (-1, -2))


def _joined(outer: str, last: str) -> str:
    return f"{outer}.{last}" if outer else last


def _tensor(value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    value = value.float() if value.dtype == torch.bfloat16 else value
    return np.ascontiguousarray(value.numpy())
