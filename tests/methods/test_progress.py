import io
import re
import sys

import pytest

from landscape_fast.methods import progress as module
from landscape_fast.methods.progress import Progress

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")  # all but the line feed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, epochs=3, **options):
    progress = Progress("member 1/2", epochs, 2 * epochs, stream=stream, **options)
    for epoch in range(1, epochs + 1):
        progress.step()
        progress.step()
        progress.epoch({"epoch": epoch, "loss": 0.5, "accuracy": 0.75})
    progress.close()
    return stream.getvalue()


def test_without_a_terminal_plain_lines_and_no_control_codes(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    text = run(io.StringIO())
    assert not CONTROL.search(text)
    assert text.splitlines() == [
        f"member 1/2: epoch {epoch}/3, training loss 0.5000, accuracy 0.7500" for epoch in (1, 2, 3)
    ]


def test_lines_are_rare_but_the_last_epoch_always_has_one():
    assert run(io.StringIO(), epochs=50).count("\n") == 1


def test_a_terminal_gets_a_bar():
    pytest.importorskip("tqdm")
    text = run(Terminal())
    assert "\r" in text and "member 1/2" in text and "6/6" in text


def test_a_resumed_bar_starts_where_the_run_was():
    pytest.importorskip("tqdm")
    stream = Terminal()
    Progress("a", 4, 8, done=5, stream=stream).close()
    assert "5/8" in stream.getvalue()


def test_a_terminal_without_tqdm_gets_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    text = run(Terminal())
    assert text == "member 1/2: epoch 3/3, training loss 0.5000, accuracy 0.7500\n"


def test_quiet_shows_nothing():
    assert run(io.StringIO(), enabled=False) == run(Terminal(), enabled=False) == ""
