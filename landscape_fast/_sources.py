"""The identity of the C++ and CUDA sources, kept in every build of them.

Standard library only: setup.py runs this file by its path, before anything is installed.
"""
import hashlib
from pathlib import Path

SUFFIXES = {".h", ".cpp", ".cu"}


def source_files(csrc: Path) -> list[Path]:
    """Every C++ and CUDA file below `csrc`, in a fixed order."""
    return sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES)


def source_hash(csrc: Path) -> str:
    """16 hex digits over the names and contents of those files."""
    digest = hashlib.sha256()
    for path in source_files(csrc):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
