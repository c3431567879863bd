"""Fast ensembles and loss-landscape methods for PyTorch.

===========  ======================================================================================
`ops`        what is computed: one page per op, with its definition in plain PyTorch
`nn`         layers whose weights hold several models, and conversion of existing networks to them
`models`     networks built from a layer factory
`methods`    how ensembles are trained
`metrics`    what they predict, in numbers: diversity, calibration, out-of-distribution detection
`landscape`  what they look like: similarity, samples, planes, paths, figures
`data`       real data sets in their official file formats
`studies`    the experiments of the papers, as presets
`testing`    `check_op`, `check_layer`: the contract of this library, for your ops and layers too
`kernels`    Triton kernels, reached through `ops`
===========  ======================================================================================

`show_config()` says which backend runs each op on this machine, and why.

Importing the package is cheap: submodules, and with them torch, load on first use.
"""
import importlib
from pathlib import Path

__version__ = "0.1.0"

_LAZY = frozenset("config data landscape methods metrics models nn ops studies testing".split())

# Triton kernels live in the top-level folder kernels/, installed as landscape_fast/kernels.
# A checkout has no such sub-folder: there, the checkout itself is a second place to look.
_package = Path(__file__).resolve().parent
_checkout = _package.parent
_in_checkout = (
    not (_package / "kernels").is_dir()
    and (_checkout / "kernels").is_dir()
    and (_checkout / "pyproject.toml").is_file()
)
if _in_checkout:
    __path__.append(str(_checkout))


def show_config(as_json: bool = False) -> None:
    """Prints versions, devices, the compiled extension, and the backend of every op, and why."""
    from landscape_fast.config import show_config as show

    show(as_json)


def __getattr__(name):
    if name in _LAZY:
        return importlib.import_module(f"landscape_fast.{name}")
    raise AttributeError(f"module 'landscape_fast' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_LAZY})
