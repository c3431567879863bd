"""Registration of ops with `torch.library`: one namespace, Python implementations, fakes.

Registered ops are internal: they carry no autograd formula, so a raw one inside a differentiated
graph would lose its gradient. The public function of each op wraps its registered op (see
`_dispatch`).
"""

import torch

NAMESPACE = "landscape_fast"

if "_library" not in globals():  # the definitions must outlive a reload of this module
    _library = torch.library.Library(NAMESPACE, "DEF")
    _implementations = {}

_TAGS = tuple(
    getattr(torch.Tag, tag)
    for tag in ("pt2_compliant_tag", "needs_exact_strides")  # the second is absent before torch 2.8
    if hasattr(torch.Tag, tag)
)


def define(schema: str, impl, fake):
    """Registers `landscape_fast::<schema>` for CPU and CUDA tensors and returns the bound overload.

    Args:
        schema: "name(Tensor x, ...) -> Tensor" in the syntax of `torch.library.Library.define`.
        impl: the Python function that computes it, the same one on every device.
        fake: returns outputs of the same shapes, dtypes, devices and strides without computing;
            build them with `new_empty`, as the implementation does, never `empty_like` (it copies
            permuted strides).

    Returns:
        `torch.ops.landscape_fast.<name>.default`. Reloading an op's module replaces its
        implementation.
    """
    name = schema.partition("(")[0]
    known = name in _implementations
    _implementations[name] = (impl, fake)
    if not known:
        _library.define(schema, tags=_TAGS)
        for key in ("CPU", "CUDA"):
            _library.impl(name, lambda *args: _implementations[name][0](*args), key)
        torch.library.register_fake(
            f"{NAMESPACE}::{name}", lambda *args: _implementations[name][1](*args), lib=_library
        )
    return getattr(getattr(torch.ops, NAMESPACE), name).default
