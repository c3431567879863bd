"""What the documentation says is there, runs, and is complete."""
import ast
import doctest
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
from small_tree import ROOT

OPTIONAL = ("sklearn", "matplotlib", "tqdm", "scipy", "tabm", "rtdl_num_embeddings", "torchmetrics")
README = ROOT / "README.md"
SECTIONS = ["Args:", "Returns:", "Raises:", "Cost:", "Source:", "Example:"]
CODE = [
    path
    for folder in ("landscape_fast", "kernels", "csrc", "tools", "bench", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in ("", ".py", ".h", ".cpp", ".cu")
] + [ROOT / "setup.py", ROOT / "Makefile"]


def module_names() -> list[str]:
    """Every module of the package, kernels included, by its importable name."""
    names = []
    for path in sorted((ROOT / "landscape_fast").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(part for part in parts if part != "__init__"))
    names += [f"landscape_fast.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")]
    return sorted(name for name in names if name != "landscape_fast.__main__")


def public_ops() -> dict:
    """The functions of `landscape_fast.ops` that are not references."""
    from landscape_fast import ops

    functions = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
    return {n: f for n, f in functions.items()
            if inspect.isfunction(f) and not n.endswith("_reference")}  # fmt: skip


class Examples(doctest.DocTestRunner):
    """Runs the examples of docstrings; one that needs an absent optional package is skipped."""

    def report_unexpected_exception(self, out, test, example, exc_info):
        cause = exc_info[1].__cause__ or exc_info[1]
        if isinstance(cause, ModuleNotFoundError) and cause.name in OPTIONAL:
            pytest.skip(f"needs {cause.name}")
        super().report_unexpected_exception(out, test, example, exc_info)


def load(name: str):
    """The module, or a skip if it is of no use without an optional package that is absent."""
    if ".kernels." in name:
        pytest.importorskip("triton")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None)
        if missing in OPTIONAL:
            pytest.skip(f"needs {missing}")
        raise


@pytest.mark.parametrize("name", module_names())
def test_doctests(name, pytestconfig, tmp_path, monkeypatch):
    module = load(name)
    flags = 0
    for flag in pytestconfig.getini("doctest_optionflags"):
        flags |= doctest.OPTIONFLAGS_BY_NAME[flag]
    monkeypatch.chdir(tmp_path)
    runner = Examples(optionflags=flags)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test)
    assert runner.failures == 0, "see the captured output"


def test_ops_are_documented():
    functions = public_ops()
    assert functions
    for name, function in functions.items():
        text = inspect.getdoc(function) or ""
        found = [line.split(":")[0] + ":" for line in text.splitlines() if re.match(r"\w+:", line)]
        assert [s for s in found if s in SECTIONS] == SECTIONS, f"{name}: sections are {found}"
        example = text.split("Example:")[1]
        assert ">>>" in example, f"{name}: its example is not executed"
        for argument in inspect.signature(function).parameters:
            assert re.search(rf"\b{argument}\b[^\n]*:", text), f"{name}: {argument} is not in Args"


def test_every_op_has_a_public_reference_and_a_place_in_the_table():
    from landscape_fast import ops
    from landscape_fast.config import config_report

    listed = {row["op"] for row in config_report()["ops"]}
    for name in public_ops():
        assert callable(getattr(ops, f"{name}_reference", None)), f"{name}_reference"
        assert name in listed


def test_modules_say_what_they_are():
    for name in module_names():
        if ".kernels." in name:
            continue
        source = Path(importlib.util.find_spec(name).origin)
        assert (ast.get_docstring(ast.parse(source.read_text())) or "").strip(), name


@pytest.fixture(scope="module")
def text():
    return README.read_text()


class TestReadme:
    def test_python_blocks_run(self, text, tmp_path, monkeypatch):
        """In order and in one namespace, as a reader would paste them."""
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert blocks
        monkeypatch.chdir(tmp_path)
        namespace = {"__name__": "readme"}
        for block in blocks:
            line = text[: text.index(block)].count("\n")
            exec(compile("\n" * line + block, str(README), "exec"), namespace)

    def test_commands_exist(self, text):
        from landscape_fast.cli import build_parser

        targets = re.search(r"^TARGETS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line.removeprefix("$ ") for block in blocks
                 for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
        lines += re.findall(r"`((?:make|landscape-fast|python3?) [^`\n]+)`", text)
        assert any(line.startswith("make") for line in lines)
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and "=" in words[0]:  # settings before a command
                words = words[1:]
            if words[:1] == ["make"]:
                goals = [word for word in words[1:] if "=" not in word]
                assert set(goals) <= set(targets[1].split()), line
            elif words[:1] == ["landscape-fast"]:
                build_parser().parse_args([word for word in words[1:] if word != "..."])
            elif words and words[0].startswith("python") and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), line

    def test_links_lead_somewhere(self, text):
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in target or (ROOT / target).exists(), target

    def test_every_setting_is_in_it(self, text):
        """A reader finds every environment variable that the code reads."""
        code = "\n".join(path.read_text(errors="replace") for path in CODE)
        for name in sorted(set(re.findall(r"\bLANDSCAPE_FAST_[A-Z_]+\b", code))):
            assert name in text, f"{name} is not in README.md"


def test_show_config_lists_every_setting_of_run_time():
    from landscape_fast.config import SWITCHES

    folders = ("landscape_fast", "kernels", "csrc")
    files = [path for path in CODE if path.relative_to(ROOT).parts[0] in folders]
    code = "\n".join(path.read_text(errors="replace") for path in files)
    named = set(re.findall(r"[\"'`](LANDSCAPE_FAST_[A-Z_]+)[\"'`]", code))
    assert named <= set(SWITCHES)


def test_changelog_knows_this_version():
    from landscape_fast import __version__

    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## (\[?{re.escape(__version__)}|\[?Unreleased)", text, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{__version__}"\n' in project
