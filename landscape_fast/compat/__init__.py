"""Drop-in peers: the layers of `tabm` and `torch_uncertainty`, their checkpoints, live models.

`compat.tabm` and `compat.torch_uncertainty` have the classes of these packages; `accelerate_` makes
layers of the packages themselves, in a live model, compute with our ops; `compat.edward2` reads and
writes state dicts of other BatchEnsemble code. None of the packages needs to be installed.
"""

from landscape_fast.compat._swap import accelerate_, restore_

__all__ = ["accelerate_", "restore_"]
