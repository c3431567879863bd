"""Checkpoint files: written whole or not at all, read without running code, refused if foreign."""

import os
import pickle
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1
_RULE = "resume: checkpoint must be"


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes `state` under the `identity` of its run; the file appears complete or not at all.

    Args:
        path: the file; its folder is made. An older file of that name is replaced at the end.
        identity: settings (strings and numbers) that a run resuming from the file must share.
        state: tensors, numbers, strings, and lists and dictionaries of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, "identity": identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, if it belongs to a run of the same identity.

    Its tensors are on the CPU: Adam counts its steps there, and would wait for the GPU otherwise.

    Raises:
        ValueError: if the file is no checkpoint, is damaged, or belongs to another run.
    """
    stored, state = read_checkpoint(path)
    require_identity(path, stored, identity)
    return state


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Identity and state that `save_checkpoint` wrote, its tensors on the CPU.

    Raises:
        ValueError: if the file is no checkpoint or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no content"
        raise ValueError(
            f"{_RULE} a complete file written by landscape_fast; got {path} "
            f"({type(error).__name__}: {reason[:120]}); delete it"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{_RULE} a landscape_fast checkpoint of format {FORMAT}; "
            f"got {found} in {path}; delete it or use another folder"
        )
    return content["identity"], content["state"]


def require_identity(path: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless the file is of a run of this identity."""
    different = [
        f"{name} {stored.get(name, 'absent')!r} (now {identity.get(name, 'absent')!r})"
        for name in sorted(stored.keys() | identity.keys())
        if stored.get(name) != identity.get(name)
    ]
    if different:
        raise ValueError(
            f"{_RULE} of this configuration; got {', '.join(different)} in {path}; "
            "repeat the settings it was made with, or use another folder"
        )


def describe_model(model: nn.Module) -> str:
    """Class, number of parameters and a checksum of names, shapes and layer settings."""
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    count = sum(parameter.numel() for parameter in model.parameters())
    check = zlib.crc32(f"{model!r} {shapes}".encode())
    return f"{type(model).__name__}, {count} parameters, structure {check:08x}"


def describe_rows(x: Tensor, y: Tensor) -> str:
    """Shape of the training rows and a checksum of all targets and of up to 256 rows."""
    sample = x[:: max(1, x.shape[0] // 256)].contiguous().cpu()
    if sample.dtype == torch.bfloat16:  # which numpy does not have
        sample = sample.view(torch.int16)
    check = zlib.crc32(sample.numpy().tobytes(), zlib.crc32(y.contiguous().cpu().numpy().tobytes()))
    return f"{tuple(x.shape)} {x.dtype}, checksum {check:08x}"
