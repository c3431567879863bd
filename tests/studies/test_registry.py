"""`landscape-fast study` as its users see it."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from landscape_fast import cli
from landscape_fast.studies import registry


def test_every_study_has_what_the_command_needs():
    pytest.importorskip("sklearn")
    for name in registry.STUDIES:
        module = import_module(f"landscape_fast.studies.{name}")
        assert tuple(module.SIZES) == registry.SIZES[name]
        assert callable(module.run) and callable(module.describe)


@pytest.fixture
def canned(monkeypatch):
    """A study that takes no time, under a real name."""
    calls = []

    class Canned:
        @staticmethod
        def run(size, out, seed, **files):
            calls.append((size, seed, *files.values()))
            (out / "results.csv").write_text("method\n")
            return {"seed": seed, "rows": [{"method": "single", "nll": float("nan")}]}

        @staticmethod
        def describe(document):
            return f"{len(document['rows'])} row"

    monkeypatch.setattr(registry, "import_module", lambda name: calls.append(name) or Canned)
    return calls


def test_prints_the_table_and_where_the_files_are(canned, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert (
        cli.main(["study", "wenzel2020", "--size", "tiny", "--out", str(out), "--seed", "3"]) == 0
    )
    assert canned == ["landscape_fast.studies.wenzel2020", ("tiny", 3)]
    assert capsys.readouterr().out == (
        f"wenzel2020, tiny, seed 3\n\n1 row\n\nwrote {out / 'results.csv'}\n"
    )


def test_a_study_of_images_reads_them_at_full_size_alone(canned, tmp_path, capsys):
    command = ["study", "garipov2018", "--out", str(tmp_path)]
    assert cli.main([*command, "--size=full", "--root=images"]) == 0
    assert canned[1] == ("full", 0, "images")
    for more, got in (
        (
            ["--size=full"],
            "the folder of the data files; got none with garipov2018 --size full",
        ),
        (
            ["--root=here"],
            "left out where no files are read; got here with garipov2018 --size small",
        ),
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, *more])
        assert f"argument --root: must be {got}" in capsys.readouterr().err


def test_the_paper_size_has_a_choice_of_data(canned, tmp_path):
    command = ["study", "fort2019", "--size=paper", "--root=images", "--out", str(tmp_path)]
    assert cli.main([*command, "--data=cifar100"]) == 0
    assert canned[1] == ("paper", 0, "images", "cifar100")


def test_names_only_the_files_it_wrote(canned, tmp_path, capsys):
    for name in ("notes.md", "results.csv"):
        (tmp_path / name).write_text("of another run")
        os.utime(tmp_path / name, (0, 0))
    assert cli.main(["study", "wenzel2020", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'results.csv'}\n")


def test_defaults_and_json(canned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "gorishniy2024", "--json"]) == 0
    assert canned[1] == ("small", 0) and (tmp_path / "out" / "gorishniy2024").is_dir()
    assert json.loads(capsys.readouterr().out)["rows"] == [{"method": "single", "nll": None}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "fort2020"], "argument NAME: invalid choice: 'fort2020'"),
        (
            ["study", "fort2019", "--size", "full"],
            "argument --size: must be one of smoke, cpu, small, paper; got full with fort2019",
        ),
        (
            ["study", "fort2019", "--size", "cpu", "--root", "x", "--data", "cifar100"],
            "argument --data: must be left out where there is no choice; got cifar100 with",
        ),
        (["study"], "the following arguments are required: NAME"),
        (["study", "wenzel2020", "--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (
            ["study", "wenzel2020", "--seed", "-1"],
            "argument --seed: must be a non-negative integer",
        ),
    ],
)
def test_wrong_usage_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_help_does_not_import_torch_and_names_the_studies():
    code = (
        "import sys\n"
        "from landscape_fast import cli\n"
        "try:\n"
        "    cli.main(['study', '--help'])\n"
        "except SystemExit:\n"
        "    print(sorted({'torch', 'numpy', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    text = " ".join(done.stdout.split())
    for name, summary in registry.STUDIES.items():
        assert f"{name}: {summary}" in text
