"""Sets up what a command needs, then runs it: python3 tools/bootstrap.py demo (or `make demo`).

Everything that is installed goes to .venv, and a second run finds it there. If the Python that runs
this already has torch >= 2.6, .venv is a layer on top of it: that torch is used, and nothing in its
environment is changed. Otherwise .venv gets its own torch, of the version in constraints.txt.

    LANDSCAPE_FAST_TORCH=auto         as above
    LANDSCAPE_FAST_TORCH=cpu          own torch, the CPU build (a fraction of the download)
    LANDSCAPE_FAST_TORCH=cuda         own torch, the CUDA build of the default package index
    LANDSCAPE_FAST_TORCH=<index url>  own torch, from there

pip's own settings hold: PIP_FIND_LINKS=<folder of wheels> serves a machine without a network.
Standard library only.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "landscape-fast.json"  # what .venv is; gets its key when all is installed
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUICK = ["--retries", "0", "--timeout", "15"]  # a machine without a network must not wait
COMMANDS = {
    "demo": ["-m", "landscape_fast", "demo"],
    "test": ["-m", "pytest"],
    "gpu": ["bench/gpu.py"],
    "bench": ["bench/run.py"],
    "lint": ["-m", "ruff", "check", "."],
    "setup": ["-m", "landscape_fast"],
}
# Beside the files, what a build or an installation depends on.
INPUT_ENV = ["LANDSCAPE_FAST_TORCH", "LANDSCAPE_FAST_CUDA", "LANDSCAPE_FAST_REQUIRE_EXT"]
INPUT_ENV += ["TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "LDFLAGS"]
ABOUT_PYTHON = """
import json, site, sys
about = {"executable": sys.executable, "version": sys.version}
about["folders"] = [path for path in sys.path if "-packages" in path]
try:
    import torch
    about["torch"], about["torch_file"] = torch.__version__, torch.__file__
except Exception as exc:
    about["torch"], about["torch_file"] = None, f"{type(exc).__name__}: {exc}"
print(json.dumps(about))
"""
VERSIONS = """
import importlib.metadata, json
versions = {}
for one in importlib.metadata.distributions():
    if one.metadata["Name"]:
        versions.setdefault(one.metadata["Name"], one.version)  # the first on sys.path is the one
print(json.dumps(versions))
"""


ABOUT_TORCH = "import torch; print(torch.__file__)"
SUMMARY = """
from landscape_fast import _extension as e
import torch
cuda = " with CUDA kernels" if e.with_cuda else ""
print(f"[landscape_fast] torch {torch.__version__},", "extension built" + cuda if e.C else e.error)
"""


class Problem(Exception):
    """Why the set-up cannot go on; the text names a remedy."""


def say(text: str) -> None:
    print(f"[landscape_fast] {text}", file=sys.stderr, flush=True)


def run(command: list, **options) -> bool:
    """Runs a command with its output shown; whether it succeeded."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, **options).returncode == 0


def answer(command: list) -> str | None:
    """The output of a command that is only asked something, or None if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


# ---- which Python, which torch


def newer_python() -> str | None:
    """Another Python on PATH that is new enough, for a machine whose python3 is old."""
    for minor in range(14, OLDEST_PYTHON[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and answer([found, "-c", "import venv"]) is not None:
            return found
    return None


def outer_python() -> str:
    """The Python that .venv builds on: the one that runs this, unless that is .venv's own."""
    if Path(sys.prefix).resolve() != VENV.resolve():
        return sys.executable
    return read_stamp().get("parent") or getattr(sys, "_base_executable", "") or sys.executable


def version_tuple(version: str) -> tuple:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def parent_of(python: str) -> dict | None:
    """What .venv is to be a layer on, or None if it is to have a torch of its own."""
    if os.environ.get("LANDSCAPE_FAST_TORCH", "") not in ("", "auto"):
        return None
    if python == sys.executable and importlib.util.find_spec("torch") is None:
        return None
    text = answer([python, "-c", ABOUT_PYTHON])
    about = json.loads(text.splitlines()[-1]) if text else None
    if about is None or about["torch"] is None:
        if about and not about["torch_file"].startswith("ModuleNotFoundError"):
            say(f"the torch of {python} does not load ({about['torch_file']}); .venv gets its own")
        return None
    if version_tuple(about["torch"]) < OLDEST_TORCH:
        say(f"torch {about['torch']} of {python} is older than 2.6; .venv gets its own")
        return None
    return about


# ---- .venv


def venv_python() -> Path:
    return VENV / "bin" / "python"


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def input_key(parent: dict | None) -> str:
    """Changes with every file and setting that the set-up depends on."""
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "constraints.txt")]
    files += sorted((ROOT / "tools").glob("*.py"))
    files += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    parts = [parent, sys.version, [os.environ.get(name) for name in INPUT_ENV]]
    parts += [(str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def extension_settled() -> bool:
    """Whether the checkout holds a built extension, or the note why there is none."""
    package = ROOT / "landscape_fast"
    return any(package.glob("_C.*.so")) or (package / "_build_failure.txt").is_file()


def make_venv(python: str, parent: dict | None) -> None:
    say(f"making .venv with {python}")
    if not run([python, "-m", "venv", "--without-pip", "--clear", VENV]):
        raise Problem(
            f"{python} cannot make a virtual environment in {VENV}; "
            "Debian, Ubuntu: apt install python3-venv; or make the folder writable"
        )
    if parent:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = (answer([venv_python(), "-c", code]) or "").strip()
        lines = [f"import site; site.addsitedir({folder!r})" for folder in parent["folders"]]
        Path(packages, "parent_environment.pth").write_text("\n".join(lines) + "\n")


def find_pip(python: str) -> list | None:
    """A command line of pip that installs into .venv, or None."""
    own = [venv_python(), "-m", "pip"]
    from_outside = [python, "-m", "pip", "--python", venv_python()]
    if answer([*own, "--version"]) is not None:
        return own
    if answer([venv_python(), "-m", "ensurepip"]) is not None:
        return own
    return from_outside if answer([*from_outside, "--version"]) is not None else None


def requirements(extra: str = "test") -> dict:
    """The requirements of an extra (`test` contains the others that `make` uses), by name.

    The list `alone` has packages whose own requirements must not come along.
    """
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(rf"^{extra} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    found = re.findall(r'"([^"]+)"', block)
    return {re.match(r"[\w.-]+", requirement)[0]: requirement for requirement in found}


def torch_options() -> list:
    wish = os.environ.get("LANDSCAPE_FAST_TORCH", "") or "auto"
    if wish == "auto":
        return []
    if wish == "cuda":  # === compares the local label too: the build without one is the CUDA build
        pin = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
        return [f"torch==={pin}"]
    if wish != "cpu" and "://" not in wish:
        raise Problem(f"LANDSCAPE_FAST_TORCH must be auto, cpu, cuda or an index url; got {wish!r}")
    return ["--extra-index-url", CPU_INDEX if wish == "cpu" else wish]


def install_own(pip: list) -> None:
    """torch, the requirements and the package into a .venv of its own."""
    if not has_torch(venv_python()):
        say("installing torch and the test requirements into .venv; this takes a minute or more")
        if sys.platform == "linux" and not Path("/proc/driver/nvidia").exists():
            say("no NVIDIA driver here: LANDSCAPE_FAST_TORCH=cpu would ask for the small CPU torch")
    constrained = [*pip, "install", "-q", "-c", "constraints.txt"]
    tools = [requirements()[name] for name in ("setuptools", "pybind11")]
    package = ["--no-build-isolation", "-e", ".[test]", *torch_options()]
    if not (run([*constrained, *tools]) and run([*constrained, *package])):
        raise Problem(
            "pip could not install (see above); without a network, PIP_FIND_LINKS=<folder of "
            "wheels> must hold torch and the test requirements"
        )


def install_layer(pip: list, parent: dict) -> None:
    """The package, and what its tests lack, into a layer; the versions below it stay."""
    versions = json.loads(answer([venv_python(), "-c", VERSIONS]) or "{}")
    there = {normal(name) for name in versions}
    missing = [need for name, need in requirements().items() if normal(name) not in there]
    if missing:
        say(f"adding to .venv: {', '.join(missing)}")
        pins = VENV / "parent-constraints.txt"
        pins.write_text(
            "".join(
                f"{name}=={version}\n"
                for name, version in versions.items()
                if re.fullmatch(r"\d[\w.+!]*", version or "")
            )
        )
        if not run([*pip, "install", "-q", *QUICK, "-c", pins, *missing]):
            say("they could not be installed; the tests that need them are skipped")
    if not run([*pip, "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]):
        raise Problem("pip could not install landscape_fast into .venv (see above)")
    if (answer([venv_python(), "-c", ABOUT_TORCH]) or "").strip() != parent["torch_file"]:
        raise Problem(f"python in .venv does not find the torch of {parent['executable']}")


def install_alone(pip: list) -> None:
    """Packages that the tests compare with, without their requirements; none of them is needed."""
    versions = json.loads(answer([venv_python(), "-c", VERSIONS]) or "{}")
    there = {normal(name) for name in versions}
    missing = [need for name, need in requirements("alone").items() if normal(name) not in there]
    if missing and not run([*pip, "install", "-q", "--no-deps", *QUICK, *missing]):
        say(f"{', '.join(missing)}: not installed; the tests that compare with it are skipped")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def set_up(python: str, parent: dict | None) -> Path:
    """Brings .venv up to date and returns its Python."""
    key, stamp = input_key(parent), read_stamp()
    if stamp.get("key") == key and has_torch(venv_python()) and extension_settled():
        return venv_python()
    kind = {"parent": parent["executable"] if parent else None, "python": sys.version}
    started = {name: stamp.get(name) for name in kind} == kind and answer(
        [venv_python(), "-c", ""]
    ) is not None
    if started:
        try:
            return install(python, parent, kind, key)
        except Problem as exc:
            say(f"{exc}; once more, from an empty .venv")
    make_venv(python, parent)
    return install(python, parent, kind, key)


def install(python: str, parent: dict | None, kind: dict, key: str) -> Path:
    STAMP.write_text(json.dumps(kind))  # an unfinished .venv, to go on with
    pip = find_pip(python)
    if pip is None:
        raise Problem(f"{python} has neither ensurepip nor pip; Debian: apt install python3-venv")
    if parent:
        install_layer(pip, parent)
    else:
        install_own(pip)
    install_alone(pip)
    if not run([venv_python(), "-c", SUMMARY]):
        raise Problem("the installed package does not import (see above)")
    STAMP.write_text(json.dumps({**kind, "key": key}))
    return venv_python()


def has_torch(python: Path) -> bool:
    code = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    return (answer([python, "-c", code]) or "").strip() == "True"


# ---- the command


def cache_environment() -> None:
    """Caches go to build/cache where the home folder cannot be written."""
    if not os.access(Path.home(), os.W_OK):
        for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "PIP_CACHE_DIR"):
            folder = ROOT / "build" / "cache" / name.lower()
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(name, str(folder))


def main(arguments: list) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__ + f"\nCommands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if sys.version_info < OLDEST_PYTHON:
        newer = newer_python()
        if newer is None:
            say(f"Python 3.10 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
            return 1
        os.execv(newer, [newer, __file__, *arguments])
    cache_environment()
    python = outer_python()
    parent = parent_of(python)
    try:
        python = str(set_up(python, parent))
    except Problem as exc:
        say(str(exc))
        if parent is None:
            return 1
        python = str(venv_python()) if has_torch(venv_python()) else python
        say(f"going on from the checkout, with {python} as it is")
        run([python, "setup.py", "-q", "build_ext", "--inplace"])
    # This checkout, whatever other copy an environment below .venv may hold.
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    command = [python, *COMMANDS[arguments[0]], *arguments[1:]]
    os.chdir(ROOT)
    os.execv(python, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
