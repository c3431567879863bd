"""Where things are and what they may import: the rules that keep the library readable."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_tree import ROOT

PACKAGE = ROOT / "landscape_fast"
SOURCES = sorted(
    path
    for folder in ("landscape_fast", "kernels", "csrc", "tests", "bench", "tools")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu") and "__pycache__" not in path.parts
) + [ROOT / "setup.py"]

# Imports point from a higher level to a lower one; within a level, packages form no circle.
LEVELS = [
    {"_sources"},
    {"_extension", "kernels"},
    {"ops", "data"},
    {"config", "testing", "nn"},
    {"models", "compat"},
    {"methods", "landscape", "metrics"},
    {"studies"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
NOT_BELOW = {"kernels": {"_extension"}, "data": {"ops", "kernels"}, "nn": {"testing", "config"}}
ATTRIBUTES = {"__version__", "_in_checkout"}
LAZY = {"matplotlib", "sklearn", "scipy", "tqdm", "torchmetrics", "safetensors", "PIL", "tabm"}
NEVER = {"torchvision", "timm"}  # their wheels replace or break a CPU torch


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """landscape_fast/nn/init.py -> "nn"; kernels/combine.py -> "kernels"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(name, whether at the top level, line) of every import; "a.b" for `from a import b`."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    typing_only = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
    top |= {id(node) for block in tree.body if isinstance(block, ast.Try) for node in block.body}
    skipped = {id(node) for block in typing_only for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # only ever to a neighbour
                assert node.level == 1, f"{short(path)}:{node.lineno} imports from above"
                base = f"landscape_fast.{part_of(path)}.{base}"
            found += [(f"{base}.{a.name}", id(node) in top, node.lineno) for a in node.names]
    return found


OURS = [p for p in SOURCES if p.suffix == ".py" and p.parts[len(ROOT.parts)] in
        ("landscape_fast", "kernels")]  # fmt: skip


def test_imports_point_one_way():
    wrong = []
    for path in OURS:
        me = part_of(path)
        if path == PACKAGE / "__init__.py":
            assert {name for name, top, _ in imports(path) if top} <= {"importlib", "pathlib.Path"}
            continue
        for name, _, line in imports(path):
            parts = name.split(".")
            if parts[0] in ("tests", "bench", "kernels", "tools"):
                wrong.append(f"{short(path)}:{line} imports {name}")
            if parts[0] != "landscape_fast" or len(parts) < 2 or parts[1] in (me, *ATTRIBUTES):
                continue
            other = parts[1]
            if LEVEL[other] > LEVEL[me] or other in NOT_BELOW.get(me, ()):
                wrong.append(f"{short(path)}:{line}: {me} must not import {other}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_level():
    assert {part_of(path) for path in OURS} - {"__init__"} <= set(LEVEL)


def test_no_circle_within_a_level():
    edges = {name: set() for name in LEVEL}
    for path in OURS:
        if path != PACKAGE / "__init__.py":
            names = [name.split(".") for name, _, _ in imports(path)]
            edges[part_of(path)] |= {n[1] for n in names if n[0] == "landscape_fast" and len(n) > 1}
    for name in LEVEL:
        reached, todo = set(), [name]
        while todo:
            new = (edges.get(todo.pop(), set()) & set(LEVEL)) - reached - {name}
            reached |= new
            todo += new
        circle = {other for other in reached if name in edges[other]}
        assert not circle, f"{name} is imported by {circle}, which it imports"


def test_optional_packages_are_imported_when_used():
    wrong = []
    for path in [p for p in SOURCES if p.suffix == ".py"]:
        for name, top, line in imports(path):
            first = name.split(".")[0]
            lazy = LAZY if path in OURS else set()
            if path in OURS and part_of(path) != "kernels":
                lazy = lazy | {"triton"}
            if first in NEVER or (top and first in lazy):
                wrong.append(f"{short(path)}:{line} imports {first}")
    assert not wrong, "\n".join(wrong)


def test_import_is_light():
    code = "import sys, landscape_fast, landscape_fast.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_size():
    wrong = []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        if len(lines) > 400:
            wrong.append(f"{short(path)} has {len(lines)} lines; split it")
        long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
        wrong += [f"{short(path)}:{number} is longer than 100" for number in long]
    assert not wrong, "\n".join(wrong)


STEMS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_per_op(stem):
    """Whoever knows the name of an op knows its files."""
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").is_file()
    assert (ROOT / "bench" / "cases" / f"{stem}.py").is_file()
    kernels = [ROOT / "kernels" / f"{stem}.py", ROOT / "csrc" / "cuda" / f"{stem}.cu"]
    kernels.append(ROOT / "csrc" / "cpu" / f"{stem}.cpp")
    assert any(path.is_file() for path in kernels)


def test_no_kernel_without_an_op():
    import landscape_fast.config  # noqa: F401  (imports every op)
    from landscape_fast.ops import _dispatch

    ops = {*STEMS, *_dispatch.OPS, "runtime"}  # runtime.cu: versions and error texts
    files = [p for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")]
    files += [*(ROOT / "csrc" / "cpu").glob("*.cpp"), *(ROOT / "csrc" / "cuda").glob("*.cu")]
    assert not [short(path) for path in files if not path.stem.startswith(tuple(ops))]
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow other `kernels`


CSRC = [path for path in SOURCES if path.parts[len(ROOT.parts)] == "csrc"]


def test_csrc_is_free_of_torch():
    include = re.compile(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)[^>"]*)', re.MULTILINE)
    assert CSRC and not {short(p): include.findall(p.read_text())
                         for p in CSRC if include.search(p.read_text())}  # fmt: skip


def test_no_flag_that_changes_arithmetic():
    texts = {path: path.read_text() for path in [ROOT / "setup.py", *(ROOT / "tools").glob("*.py")]}
    texts |= {path: path.read_text() for path in CSRC}
    banned = re.compile(r"fast-?math|-Ofast|unsafe-math|use_fast_math|finite-math")
    assert not [short(path) for path, text in texts.items() if banned.search(text)]


def test_threads_come_from_torch():
    """OpenMP never chooses: a forked child of a process that used it would hang."""
    for path in CSRC:
        for pragma in re.findall(r"#pragma omp parallel[^\n]*(?:\\\n[^\n]*)*", path.read_text()):
            assert "num_threads(" in pragma, f"{short(path)}: {pragma}"


def test_ruff():
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
