"""The set-up behind make: which Python and torch it takes, and what it does when that fails."""
import importlib.util
import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest
from small_tree import ROOT, python, small_project

TORCH = {"torch": "2.11.0+cu130", "torch_file": "/elsewhere/torch/__init__.py"}


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The module, at work on an empty project."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "landscape-fast.json")
    for name in module.INPUT_ENV:
        monkeypatch.delenv(name, raising=False)
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for folder in ("csrc", "tools", ".venv", "landscape_fast"):
        (tmp_path / folder).mkdir()
    return module


def fake_python(path: Path, about: dict | None) -> str:
    """An executable that answers every question with `about`, or fails."""
    answer = json.dumps({"executable": str(path), "folders": [], **(about or {})})
    path.write_text(f"#!/bin/sh\necho '{answer}'\n" if about else "#!/bin/sh\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


class TestWhichTorch:
    def test_the_torch_that_is_there(self, bootstrap, tmp_path):
        found = bootstrap.parent_of(fake_python(tmp_path / "python", TORCH))
        assert found["torch"] == "2.11.0+cu130"

    @pytest.mark.parametrize("version", ["2.6.0", "2.10.0a0+git1", "3.0"])
    def test_new_enough(self, bootstrap, tmp_path, version):
        assert bootstrap.parent_of(fake_python(tmp_path / "python", {**TORCH, "torch": version}))

    @pytest.mark.parametrize("version", ["2.5.1", "1.13.1+cu117"])
    def test_too_old(self, bootstrap, tmp_path, capfd, version):
        about = {**TORCH, "torch": version}
        assert bootstrap.parent_of(fake_python(tmp_path / "python", about)) is None
        assert f"torch {version}" in capfd.readouterr().err

    def test_broken(self, bootstrap, tmp_path, capfd):
        about = {"torch": None, "torch_file": "OSError: libcudart.so.12"}
        assert bootstrap.parent_of(fake_python(tmp_path / "python", about)) is None
        assert "does not load (OSError: libcudart.so.12)" in capfd.readouterr().err

    def test_none(self, bootstrap, tmp_path, capfd):
        about = {"torch": None, "torch_file": "ModuleNotFoundError: No module named 'torch'"}
        assert bootstrap.parent_of(fake_python(tmp_path / "python", about)) is None
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("wish", ["cpu", "cuda", "https://host/simple"])
    def test_a_wish_for_another_torch_is_heard(self, bootstrap, tmp_path, monkeypatch, wish):
        monkeypatch.setenv("LANDSCAPE_FAST_TORCH", wish)
        assert bootstrap.parent_of(fake_python(tmp_path / "python", TORCH)) is None

    def test_options_of_pip(self, bootstrap, monkeypatch):
        assert bootstrap.torch_options() == []
        monkeypatch.setenv("LANDSCAPE_FAST_TORCH", "cpu")
        assert bootstrap.torch_options() == ["--extra-index-url", bootstrap.CPU_INDEX]
        monkeypatch.setenv("LANDSCAPE_FAST_TORCH", "https://host/simple")
        assert bootstrap.torch_options() == ["--extra-index-url", "https://host/simple"]
        monkeypatch.setenv("LANDSCAPE_FAST_TORCH", "cuda")
        (pin,) = bootstrap.torch_options()
        assert re.fullmatch(r"torch===\d+\.\d+\.\d+", pin)
        assert pin.replace("===", "==") in (ROOT / "constraints.txt").read_text().splitlines()
        monkeypatch.setenv("LANDSCAPE_FAST_TORCH", "gpu")
        with pytest.raises(bootstrap.Problem, match="must be auto, cpu, cuda or an index url"):
            bootstrap.torch_options()


class TestWhichPython:
    def test_an_activated_venv_of_ours_is_not_its_own_parent(self, bootstrap, monkeypatch):
        assert bootstrap.outer_python() == sys.executable
        monkeypatch.setattr(sys, "prefix", str(bootstrap.VENV))
        bootstrap.STAMP.write_text(json.dumps({"parent": "/conda/bin/python"}))
        assert bootstrap.outer_python() == "/conda/bin/python"
        bootstrap.STAMP.write_text(json.dumps({"parent": None}))
        assert bootstrap.outer_python() not in (None, "/conda/bin/python")

    def test_an_old_one_looks_for_a_newer_one(self, bootstrap, monkeypatch, tmp_path):
        started = []
        monkeypatch.setattr(bootstrap, "OLDEST_PYTHON", (99, 0))
        monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
        monkeypatch.setattr(bootstrap, "newer_python", lambda: "/usr/bin/python3.99")
        monkeypatch.setattr(bootstrap, "parent_of", lambda python: sys.exit(7))
        with pytest.raises(SystemExit):
            bootstrap.main(["test", "-x"])
        assert started[0][0] == "/usr/bin/python3.99" and started[0][2:] == ["test", "-x"]
        monkeypatch.setattr(bootstrap, "newer_python", lambda: None)
        assert bootstrap.main(["test"]) == 1

    def test_newer_python_can_make_environments(self, bootstrap, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert bootstrap.newer_python() is None
        fake_python(tmp_path / "python3.12", None)
        assert bootstrap.newer_python() is None
        script = tmp_path / "python3.11"
        script.write_text("#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
        assert bootstrap.newer_python() == str(script)


class TestStamp:
    @pytest.fixture
    def calls(self, bootstrap, monkeypatch, tmp_path):
        """Records what set_up does; `calls.fail` makes the next installations fail."""

        class Calls(list):
            fail = 0

        calls = Calls()

        def install(name):
            def record(*_):
                calls.append(name)
                if calls.fail:
                    calls.fail -= 1
                    raise bootstrap.Problem("no network")

            return record

        monkeypatch.setattr(bootstrap, "make_venv", lambda *_: calls.append("venv"))
        monkeypatch.setattr(bootstrap, "install_own", install("own"))
        monkeypatch.setattr(bootstrap, "install_layer", install("layer"))
        monkeypatch.setattr(bootstrap, "install_alone", lambda _: None)
        monkeypatch.setattr(bootstrap, "find_pip", lambda _: ["pip"])
        monkeypatch.setattr(bootstrap, "run", lambda *_, **__: True)
        monkeypatch.setattr(bootstrap, "answer", lambda _: "True")
        (tmp_path / "landscape_fast" / "_C.cpython.so").write_text("")
        return calls

    def test_the_second_run_does_nothing(self, bootstrap, calls):
        bootstrap.set_up("python3", None)
        assert calls == ["venv", "own"]
        bootstrap.set_up("python3", None)
        assert calls == ["venv", "own"]

    def test_inputs_of_the_build_make_it_run_again(self, bootstrap, calls, tmp_path, monkeypatch):
        bootstrap.set_up("python3", None)
        (tmp_path / "csrc" / "api.h").write_text("int f();")
        bootstrap.set_up("python3", None)
        monkeypatch.setenv("LANDSCAPE_FAST_CUDA", "0")
        bootstrap.set_up("python3", None)
        (tmp_path / "landscape_fast" / "_C.cpython.so").unlink()
        bootstrap.set_up("python3", None)
        assert calls == ["venv", *["own"] * 4]

    def test_another_parent_means_another_venv(self, bootstrap, calls):
        bootstrap.set_up("python3", None)
        bootstrap.set_up("python3", {"executable": "/conda/bin/python", **TORCH})
        assert calls == ["venv", "own", "venv", "layer"]
        bootstrap.set_up("python3", {"executable": "/conda/bin/python", **TORCH, "torch": "2.12.0"})
        assert calls[4:] == ["layer"]

    def test_an_unfinished_one_is_continued_and_a_broken_one_made_anew(self, bootstrap, calls):
        calls.fail = 1
        with pytest.raises(bootstrap.Problem, match="no network"):
            bootstrap.set_up("python3", None)
        assert "key" not in bootstrap.read_stamp()
        bootstrap.set_up("python3", None)
        assert calls == ["venv", "own", "own"] and "key" in bootstrap.read_stamp()
        bootstrap.STAMP.write_text(json.dumps({**bootstrap.read_stamp(), "key": "other"}))
        calls.fail = 1
        bootstrap.set_up("python3", None)
        assert calls[3:] == ["own", "venv", "own"]


class TestInstall:
    def test_requirements_are_those_of_pyproject(self, bootstrap):
        tomllib = pytest.importorskip("tomllib")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        assert list(bootstrap.requirements().values()) == extras["test"]
        # `make` installs the test extra only: it must hold what the demo needs
        for name in ("plot", "progress", "metrics"):
            assert set(extras[name]) <= set(extras["test"])

        own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["landscape_fast"]
        assert list(bootstrap.requirements("alone").values()) == own["alone"]

    def test_peers_come_without_their_requirements(self, bootstrap, monkeypatch, capfd):
        """And where they cannot come, the set-up goes on."""
        commands, there = [], {"torch": "2.13.0"}
        monkeypatch.setattr(bootstrap, "answer", lambda _: json.dumps(there))
        monkeypatch.setattr(bootstrap, "run", lambda c, **_: commands.append(c))
        bootstrap.install_alone(["pip"])
        (command,) = commands
        assert command[:4] == ["pip", "install", "-q", "--no-deps"]
        assert command[-1].startswith("torch-uncertainty")
        assert "are skipped" in capfd.readouterr().err
        there["torch_uncertainty"] = "0.13.0"
        bootstrap.install_alone(["pip"])
        assert len(commands) == 1

    def test_pip_from_wherever_it_is(self, bootstrap, monkeypatch):
        def answers(*working):
            monkeypatch.setattr(
                bootstrap,
                "answer",
                lambda command: "ok" if any(w in map(str, command) for w in working) else None,
            )

        answers("pip")
        assert bootstrap.find_pip("python3") == [bootstrap.venv_python(), "-m", "pip"]
        answers("ensurepip")
        assert bootstrap.find_pip("python3") == [bootstrap.venv_python(), "-m", "pip"]
        answers("--python")
        assert bootstrap.find_pip("python3")[:4] == ["python3", "-m", "pip", "--python"]
        answers()
        assert bootstrap.find_pip("python3") is None

    def test_an_own_torch_is_the_constrained_one(self, bootstrap, monkeypatch):
        commands = []
        add = commands.append
        monkeypatch.setattr(bootstrap, "run", lambda c, **_: add(c) or len(commands) < 4)
        monkeypatch.setattr(bootstrap, "answer", lambda _: None)
        bootstrap.install_own(["pip"])
        for command in commands:
            assert command[:4] == ["pip", "install", "-q", "-c"] and command[4] == "constraints.txt"
        assert commands[0][5:] == ["setuptools>=77", "pybind11>=3"]  # what the build then needs
        assert commands[1][5:] == ["--no-build-isolation", "-e", ".[test]"]
        with pytest.raises(bootstrap.Problem, match="without a network, PIP_FIND_LINKS="):
            bootstrap.install_own(["pip"])

    def test_a_layer_keeps_the_versions_below_it(self, bootstrap, monkeypatch):
        below = {"torch": "2.11.0+cu130", "NumPy": "2.2.0", "odd": "unknown", "PyBind11": "3.0"}
        commands = []
        answers = iter([json.dumps(below), TORCH["torch_file"]])
        monkeypatch.setattr(bootstrap, "answer", lambda _: next(answers))

        def run(command, **_):
            commands.append([str(part) for part in command])
            return "--no-deps" in command  # there is no network

        monkeypatch.setattr(bootstrap, "run", run)
        bootstrap.install_layer(["pip"], TORCH)
        tests, package = commands
        assert "pytest>=8" in tests and "pybind11>=3" not in tests
        names = {re.match(r"[\w.-]*", part)[0] for part in tests}
        assert "torch" not in names and "torchmetrics" in names
        pins = Path(tests[tests.index("-c") + 1]).read_text().splitlines()
        assert pins == ["torch==2.11.0+cu130", "NumPy==2.2.0", "PyBind11==3.0"]
        assert package[-4:] == ["--no-build-isolation", "--no-deps", "-e", "."]

    def test_a_layer_that_shows_another_torch_is_refused(self, bootstrap, monkeypatch):
        answers = iter(["{}", "/another/torch/__init__.py"])
        monkeypatch.setattr(bootstrap, "answer", lambda _: next(answers))
        monkeypatch.setattr(bootstrap, "run", lambda *_, **__: True)
        with pytest.raises(bootstrap.Problem, match="does not find the torch of /bin/python"):
            bootstrap.install_layer(["pip"], {**TORCH, "executable": "/bin/python"})


class TestCommand:
    @pytest.fixture
    def started(self, bootstrap, monkeypatch):
        started = []
        monkeypatch.setenv("PYTHONPATH", "/mine")
        monkeypatch.setattr(bootstrap, "run", lambda command, **_: started.append(command) or True)
        monkeypatch.setattr(os, "chdir", lambda _: None)
        monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
        return started

    def test_runs_in_the_venv_with_the_arguments(self, bootstrap, started, monkeypatch):
        monkeypatch.setattr(bootstrap, "parent_of", lambda _: None)
        monkeypatch.setattr(bootstrap, "set_up", lambda *_: "/venv/python")
        bootstrap.main(["test", "-k", "combine"])
        assert started == [["/venv/python", "-m", "pytest", "-k", "combine"]]
        assert os.environ["PYTHONPATH"] == f"{bootstrap.ROOT}{os.pathsep}/mine"

    def test_goes_on_from_the_checkout_when_the_layer_fails(self, bootstrap, started, monkeypatch):
        def fail(*_):
            raise bootstrap.Problem("read-only file system")

        monkeypatch.setattr(bootstrap, "parent_of", lambda _: TORCH)
        monkeypatch.setattr(bootstrap, "set_up", fail)
        bootstrap.main(["test"])
        assert started[0][1:] == ["setup.py", "-q", "build_ext", "--inplace"]
        assert started[1] == [sys.executable, "-m", "pytest"]

    def test_stops_when_there_is_no_torch_at_all(self, bootstrap, started, monkeypatch, capfd):
        def fail(*_):
            raise bootstrap.Problem("no network")

        monkeypatch.setattr(bootstrap, "parent_of", lambda _: None)
        monkeypatch.setattr(bootstrap, "set_up", fail)
        assert bootstrap.main(["test"]) == 1 and started == []
        assert "no network" in capfd.readouterr().err

    def test_unknown_command(self, bootstrap, capfd):
        assert bootstrap.main(["dance"]) == bootstrap.main([]) == 2
        assert "Commands: demo, test, gpu, bench, lint, setup" in capfd.readouterr().err

    def test_targets_of_make(self, bootstrap):
        targets = re.search(r"^TARGETS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert targets[1].split() == list(bootstrap.COMMANDS)

    def test_caches_move_when_home_is_read_only(self, bootstrap, monkeypatch, tmp_path):
        monkeypatch.setattr(os, "access", lambda *_: False)
        names = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "PIP_CACHE_DIR")
        for name in names:
            monkeypatch.setenv(name, "restored afterwards")
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CACHE_DIR", "/mine")
        bootstrap.cache_environment()
        assert os.environ["PIP_CACHE_DIR"] == "/mine"
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent == tmp_path / "build" / "cache"


@pytest.mark.slow
def test_a_layer_on_this_environment(tmp_path):
    """The real thing: .venv on top of the torch that runs these tests, which stays as it is."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    tree = small_project(tmp_path / "tree")
    (tree / "landscape_fast" / "cli.py").write_text(
        "import torch\nfrom landscape_fast import _extension\n"
        "def main(argv): print(torch.__file__, _extension.C.width())\n"
    )
    settings = {"LANDSCAPE_FAST_CUDA": 0, "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path}
    first = python("tools/bootstrap.py", "setup", cwd=tree, **settings)
    if "neither ensurepip nor pip" in first.stderr:
        pytest.skip("needs pip")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "making .venv" in first.stderr and "extension built" in first.stdout
    import torch

    assert first.stdout.splitlines()[-1].split()[0] == torch.__file__
    second = python("tools/bootstrap.py", "setup", cwd=tree, **settings)
    assert second.returncode == 0 and second.stderr == ""
    assert second.stdout.splitlines() == first.stdout.splitlines()[-1:]
