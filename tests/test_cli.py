"""The command line as its users see it: output, files, exit codes, Ctrl-C."""

import csv
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from landscape_fast import __version__, cli

pytest.importorskip("sklearn")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")  # all but the line feed
PROGRAM = [sys.executable, "-m", "landscape_fast"]
TRAIN = ["train", "--data", "digits", "--device", "cpu", "--threads", "1", "--epochs", "2"]


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command, in this process."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments, **options):
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background may hand down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def rows_without_seconds(path):
    rows = json.loads((path / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_demo_prints_a_table_and_writes_it_with_three_figures(tmp_path, capsys):
    before = torch.get_num_threads()
    code, out, err = run(capsys, "demo", "--out", tmp_path / "o", "--epochs", 3, "--device", "cpu")
    assert code == 0 and torch.get_num_threads() == before
    names = ("accuracy_diversity", "heat_maps", "reliability")
    files = [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    files += ["results.csv", "results.json"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == files
    lines = out.splitlines()
    assert lines[0].startswith("digits: 1,442 training and 355 test rows; mlp, adam")
    table = {line.split()[0]: line.split() for line in lines[4:7]}
    assert list(table) == ["single", "deep", "batch"]
    with (tmp_path / "o" / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    document = json.loads((tmp_path / "o" / "results.json").read_text())
    for row in document["rows"]:
        shown = table[row["method"]]
        assert shown[2] == f"{row['accuracy']:.2%}" and shown[4] == f"{row['nll']:.4f}"
        assert float(rows[row["method"]]["accuracy"]) == row["accuracy"]
        assert row["accuracy"] > 0.9
    for note in document["notes"]:
        assert f"- {note}" in lines
    assert "member 4/4: epoch 3/3" in err and "BatchEnsemble of 4: epoch 3/3" in err
    assert lines[-1].startswith("wrote ") and str(tmp_path / "o" / "results.json") in lines[-1]
    assert not CONTROL.search(out) and not CONTROL.search(err)


def test_json_prints_the_document_and_nothing_else(tmp_path, capsys):
    arguments = [*TRAIN, "--method", "batch", "--members", 2, "--out", tmp_path, "--json"]
    code, out, err = run(capsys, *arguments, "--quiet")
    assert code == 0 and err == ""
    assert json.loads(out) == json.loads((tmp_path / "results.json").read_text())
    assert json.loads(out)["rows"][0]["members"] == 2


def test_the_same_seed_gives_the_same_results(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(capsys, *TRAIN, "--method", "all", "--members", 2, "--out", tmp_path / name,
            "--seed", seed, "--epochs", 1, "--quiet")  # fmt: skip
    first, same, other = (rows_without_seconds(tmp_path / name) for name in "abc")
    assert first == same
    for row, another in zip(first, other, strict=True):
        assert row["nll"] != another["nll"]


def test_every_option_reaches_the_training(tmp_path, capsys):
    settings = {
        "epochs": 1, "batch_size": 300, "optimizer": "sgd", "lr": 0.01, "weight_decay": 0.25,
        "schedule": "constant", "label_smoothing": 0.125, "fast_lr_mult": 4.0, "seed": 9,
        "fast_weight_decay": 0.5, "member_bias": "fast", "member_batches": "own",
        "augment": "crop_flip",
    }  # fmt: skip
    options = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    code, out, _ = run(capsys, "train", "--method=batch", "--model=small_cnn", "--members=2",
                       "--pixels=unit", "--fast-init=normal", "--train-rows=400", "--json",
                       f"--out={tmp_path}", "--device=cpu", *options)  # fmt: skip
    document = json.loads(out)
    assert code == 0 and document["training"].items() >= settings.items()
    problem = {"model": "small_cnn", "members": 2, "pixels": "unit", "fast_init": "normal"}
    problem["train_rows"] = 400
    assert document["problem"].items() >= problem.items()


def test_a_recipe_trains_a_residual_network(tmp_path, capsys):
    """Its rate follows the batch, its milestones the epochs; what is given wins."""
    code, out, err = run(capsys, "train", "--method=batch", "--model=resnet20", "--members=2",
                         "--recipe=batch_ensemble", "--epochs=1", "--batch-size=64",
                         "--train-rows=128", "--norm=member", "--augment=none", "--device=cpu",
                         f"--out={tmp_path}", "--quiet")  # fmt: skip
    document = json.loads((tmp_path / "results.json").read_text())
    assert code == 0 and err == ""
    expected = {"optimizer": "sgd", "lr": 0.05, "batch_size": 64, "milestones": [1],
                "weight_decay": 6e-4, "fast_lr_mult": 0.5, "augment": "none"}  # fmt: skip
    assert document["training"].items() >= expected.items()
    assert document["problem"]["fast_init"] == "normal" and document["problem"]["norm"] == "member"
    assert document["data"]["train_rows"] == 128
    assert "- batch: a step takes 64 training rows and computes 128" in out.splitlines()
    found = document["diversity"]["batch"]
    assert f"- batch: two members disagree on {found['disagreement']:.2%} of the rows" in out
    assert found["members"] == 2 and 0 < found["js"] < found["kl"]


def test_a_single_network_is_one_member(tmp_path, capsys):
    code, out, _ = run(capsys, *TRAIN, "--method", "single", "--out", tmp_path, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and (row["method"], row["members"], row["js"]) == ("single", 1, None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["member-000.pt"]


USAGE = [
    (["demo", "--epochs", "0"], "argument --epochs: must be an integer of at least 1; got '0'"),
    (["demo", "--seed", "-1"], "argument --seed: must be a non-negative integer; got '-1'"),
    (["train", "--lr", "nan"], "argument --lr: must be a number above 0; got 'nan'"),
    (["train", "--lr", "fast"], "argument --lr: must be a number above 0; got 'fast'"),
    (["train", "--weight-decay", "-1"], "argument --weight-decay: must be a number of at least 0"),
    (["train", "--label-smoothing", "1"], r"argument --label-smoothing: must be a number in [0, 1"),
    (["train", "--data", "stl10"], "argument --data: invalid choice: 'stl10'"),
    (["train", "--data", "cifar10"], "argument --root: must be the folder of the cifar10 files"),
    (
        ["train", "--method", "single", "--members", "3"],
        "--members: must be 1 with --method single",
    ),
    (["train", "--resume", "--overwrite"], "--overwrite: must not be given with --resume"),
    (["train", "--epoch", "1"], "unrecognized arguments: --epoch 1"),
    (["paint"], "argument COMMAND: invalid choice: 'paint'"),
    ([], "the following arguments are required: COMMAND"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=lambda v: " ".join(v)[:40])
def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err and err.startswith("landscape-fast") and "--help" in err
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_without_a_gpu_is_wrong_usage(tmp_path, capsys):
    code, _, err = run(capsys, *TRAIN[:1], "--device", "cuda", "--out", tmp_path)
    assert code == 2 and "--device: must be auto or cpu where torch sees no GPU; got cuda" in err


def test_missing_data_is_the_loaders_message_and_exit_code_1(tmp_path, capsys):
    code, out, err = run(capsys, "train", "--data", "cifar10", "--root", tmp_path / "nowhere",
                         "--out", tmp_path / "o")  # fmt: skip
    assert (code, out) == (1, "")
    assert err.startswith("landscape-fast train: error: cifar10: root must be a folder; got ")
    assert "Traceback" not in err and "cifar-10-binary.tar.gz" in err


def test_an_output_that_cannot_be_made_fails_before_the_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, *TRAIN, "--out", tmp_path / "file")
    assert code == 1 and "epoch" not in err and "Traceback" not in err


def test_overwrite_keeps_the_checkpoints_until_the_data_is_there(tmp_path, capsys):
    old = tmp_path / "checkpoints" / "member-000.pt"
    old.parent.mkdir()
    old.write_text("precious")
    code, _, err = run(capsys, "train", "--data=mnist", "--root", tmp_path / "no", "--out",
                       tmp_path, "--overwrite")  # fmt: skip
    assert code == 1 and "mnist: root must be a folder" in err
    assert old.read_text() == "precious"


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDSCAPE_FAST_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "--data=mnist", f"--root={tmp_path / 'no'}", f"--out={tmp_path}"])


def test_without_matplotlib_the_table_is_still_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, *TRAIN, "--method", "single", "--out", tmp_path, "--quiet")
    assert code == 0 and "results.csv" in out and ".png" not in out
    assert "no figures: reliability_diagram: matplotlib must be installed" in err


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path, capsys):
    arguments = [*TRAIN, "--method", "single", "--out", tmp_path, "--quiet"]
    assert run(capsys, *arguments)[0] == 0
    old = (tmp_path / "checkpoints" / "member-000.pt").read_bytes()
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "with 1 checkpoints; add --resume or --overwrite" in err
    assert (tmp_path / "checkpoints" / "member-000.pt").read_bytes() == old
    other = run(capsys, *arguments, "--lr", "0.1", "--resume")
    assert other[0] == 1
    assert "resume: checkpoint must be of this configuration; got lr 0.005 (now 0.1) in" in other[2]
    assert run(capsys, *arguments, "--lr", "0.1", "--overwrite")[0] == 0
    code, out, err = run(capsys, *arguments, "--lr", "0.1", "--resume")
    assert code == 0 and "accuracy" in out  # nothing to train, measured again


def test_resuming_from_nothing_says_so(tmp_path, capsys):
    code, _, err = run(capsys, *TRAIN, "--method=single", "--out", tmp_path, "--resume", "--quiet")
    assert code == 0 and f"no checkpoints in {tmp_path / 'checkpoints'}; starting from" in err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["deep", "batch"])
def test_ctrl_c_saves_and_resume_gives_the_uninterrupted_result(tmp_path, capsys, method):
    """The signal comes at an unknown step of a real process; the result must not depend on it."""
    train = ["train", "--method", method, "--members", "2", "--threads", "1", "--device", "cpu",
             "--epochs", "30"]  # fmt: skip
    out = tmp_path / "interrupted"
    child = process(*train, "--out", out, "--overwrite")
    checkpoints = out / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr and not CONTROL.search(stderr)
    found = re.search(r"stopped in epoch \d+ after step \d+; saved (\S+)\n", stderr)
    assert found and found[1].startswith(str(checkpoints))
    assert f"continue with: landscape-fast train --method {method}" in stderr
    assert stderr.rstrip().endswith("--resume") and "--overwrite" not in stderr
    assert not list(checkpoints.glob(".*")) and not (out / "results.json").exists()

    command = stderr.rstrip().splitlines()[-1].split("landscape-fast ")[1].split()
    assert run(capsys, *command, "--quiet")[0] == 0
    assert run(capsys, *train, "--out", tmp_path / "whole", "--quiet")[0] == 0
    assert rows_without_seconds(out) == rows_without_seconds(tmp_path / "whole")


def test_ctrl_c_outside_training_is_quiet(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.study, "demo", interrupted)
    assert run(capsys, "demo") == (130, "", "landscape-fast: stopped\n")


def test_help_and_usage_errors_do_not_import_torch():
    """They come at once; importing torch takes more than a second."""
    code = (
        "import sys\n"
        "from landscape_fast import cli\n"
        "for words in (['--help'], ['train', '--help'], ['demo', '--help'], ['--version'], [],\n"
        "              ['train', '--epochs', 'x'], ['train', '--data', 'mnist']):\n"
        "    try:\n"
        "        cli.main(words)\n"
        "    except SystemExit as stop:\n"
        "        print(words, stop.code)\n"
        "print('modules', sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("modules []")
    for line in ("['--help'] 0", "['train', '--help'] 0", "['train', '--epochs', 'x'] 2"):
        assert line in done.stdout


def test_version_and_help_name_everything(capsys):
    assert run(capsys, "--version")[1] == f"landscape-fast {__version__}\n"
    _, text, _ = run(capsys, "--help")
    assert all(command in text for command in ("demo", "train", "show-config"))
    _, text, _ = run(capsys, "train", "--help")
    for action in cli.build_parser()._subparsers._group_actions[0].choices["train"]._actions:
        assert action.option_strings[-1] in text


def test_show_config_prints_text_or_json(capsys):
    code, text, _ = run(capsys, "show-config")
    assert code == 0 and torch.__version__ in text
    code, text, _ = run(capsys, "show-config", "--json")
    assert code == 0 and isinstance(json.loads(text), dict)
