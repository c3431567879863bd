"""Finding and reading files of known size, with errors that name the file and the remedy."""

import gzip
import zlib
from pathlib import Path

# Deflate cannot do better than 1032:1, so a gzip file that claims more is not what it says.
_MOST_PACKED = 1032


def wrong(op: str, path: Path, rule: str, got: str, remedy: str) -> ValueError:
    """The error for a file whose content is not as it must be."""
    return ValueError(f"{op}: {path} must {rule}; got {got}; {remedy}")


def find_folder(
    op: str, root: str | Path, below: tuple[str, ...], first: tuple[str, ...], remedy: str
) -> Path:
    """The first of `root` and its sub-folders `below` that holds a file named in `first`.

    Raises:
        FileNotFoundError: if `root` is no folder, or none of them holds one.
    """
    root = Path(root)
    if not root.is_dir():
        got = "a file" if root.exists() else "no such folder"
        raise FileNotFoundError(f"{op}: root must be a folder; got {str(root)!r}, {got}; {remedy}")
    for folder in (root, *(root / name for name in below)):
        if any((folder / name).is_file() for name in first):
            return folder
    places = " or ".join(str(folder) for folder in (root, *(root / name for name in below)))
    there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"{op}: {first[0]} must be in {places}; got {there}; {remedy}")


def find_file(op: str, root: str | Path, folder: Path, names: tuple[str, ...], remedy: str) -> Path:
    """The first of `names` that is a file in `folder` and, links followed, inside `root`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a link to somewhere outside `root`.
    """
    for name in names:
        path = folder / name
        if path.is_file():
            real = path.resolve()
            if not real.is_relative_to(Path(root).resolve()):
                remedy = "pass the folder that really holds the file"
                raise wrong(op, path, f"be inside {root}", f"a link to {real}", remedy)
            return path
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    wanted = " or ".join(names)
    raise FileNotFoundError(f"{op}: {wanted} must be in {folder}; got {there}; {remedy}")


def read(op: str, path: Path, most: int, remedy: str) -> bytes:
    """The content of a file, unpacked if its name ends in .gz: all of it, or `most` + 1 bytes.

    Raises:
        ValueError: if it is not a gzip file or a damaged one.
    """
    packed = path.suffix == ".gz"
    most = min(most, path.stat().st_size * (_MOST_PACKED if packed else 1))
    if not packed:
        with path.open("rb") as file:
            return file.read(most + 1)
    try:
        with gzip.open(path) as file:
            return file.read(most + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise wrong(op, path, "be a whole gzip file", f"{error}", remedy) from error
