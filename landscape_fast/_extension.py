"""The compiled module `landscape_fast._C`, or the reason why it is not there.

`C` is the module or None, `error` the reason or None, `with_cuda` whether it holds CUDA kernels.
Nothing else imports `_C`.
"""
import importlib
import importlib.util
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch  # noqa: F401  (first: its OpenMP runtime must be the one in the process)

import landscape_fast
from landscape_fast._sources import source_hash

_NAME = "landscape_fast._C"
_PACKAGE = Path(__file__).resolve().parent


def _load():
    if PathFinder.find_spec(_NAME, [str(_PACKAGE)]) is None:
        return _borrow() if landscape_fast._in_checkout else (None, _why_missing())
    try:
        return importlib.import_module(_NAME), None
    except ImportError as exc:
        return None, f"{_NAME} does not load: {exc}"


def _borrow():
    """A checkout that was not built takes the module of an installed copy, if it fits."""
    installed = [str(Path(folder or ".", "landscape_fast")) for folder in sys.path]
    spec = PathFinder.find_spec(_NAME, installed) or importlib.util.find_spec(_NAME)
    if spec is None:
        return None, _why_missing()
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as exc:
        return None, f"{spec.origin} does not load: {exc}"
    if json.loads(module.build_info).get("sources") != source_hash(_PACKAGE.parent / "csrc"):
        why = f"{_why_missing()}; {spec.origin} was built from other sources"
        return None, why
    sys.modules[_NAME] = module
    return module, None


def _why_missing() -> str:
    note = _PACKAGE / "_build_failure.txt"
    if note.is_file():
        return note.read_text().strip()
    remedy = "`pip install -e .` builds" if landscape_fast._in_checkout else "reinstalling makes"
    return f"{_NAME} was not built; {remedy} it"


C, error = _load()
with_cuda = bool(C is not None and C.with_cuda)
