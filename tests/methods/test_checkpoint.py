import pickle

import pytest
import torch

from landscape_fast.methods.checkpoint import describe_rows, load_checkpoint, save_checkpoint


def test_round_trip_keeps_every_bit(tmp_path):
    path = tmp_path / "deep" / "a.pt"
    state = {"x": torch.randn(3), "step": 4, "lr": 0.1, "history": [{"loss": 1 / 3}]}
    save_checkpoint(path, {"seed": 1}, state)
    loaded = load_checkpoint(path, {"seed": 1})
    assert torch.equal(loaded.pop("x"), state.pop("x")) and loaded == state
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {}, {"step": 1})

    def fails(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {}, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path, {}) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Payload:
    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize("content", ["cut", "text", "empty", "pickle"])
def test_a_damaged_or_hostile_file_is_refused(tmp_path, capsys, content):
    path = tmp_path / "a.pt"
    if content == "pickle":
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    elif content == "cut":
        save_checkpoint(path, {}, {"x": torch.zeros(1000)})
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_text("not a checkpoint" if content == "text" else "")
    with pytest.raises(
        ValueError,
        match=r"resume: checkpoint must be a complete file written by "
        r"landscape_fast; got .*a\.pt \(\w+: .+\); delete it",
    ):
        load_checkpoint(path, {})
    assert "never" not in capsys.readouterr().out


def test_a_payload_inside_a_torch_file_does_not_run(tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save({"format": 1, "identity": {}, "state": Payload()}, path)
    with pytest.raises(ValueError, match="complete file"):
        load_checkpoint(path, {})
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"), [({"format": 99}, "99"), ([1], "list"), ({"model": 1}, "None")]
)
def test_another_programs_file_is_refused(tmp_path, content, found):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"checkpoint of format 1; got {found} in"):
        load_checkpoint(path, {})


def test_the_message_names_what_differs_only(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"lr": 0.1, "seed": 0, "old": 1}, {})
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, {"lr": 0.2, "seed": 0, "new": 2})
    text = str(error.value)
    assert "lr 0.1 (now 0.2), new 'absent' (now 2), old 1 (now 'absent')" in text
    assert "seed" not in text and str(path) in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_rows_of_every_dtype_are_told_apart(dtype):
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    one, same, other = (describe_rows((x + k).to(dtype), y) for k in (0, 0, 1))
    assert one == same != other
