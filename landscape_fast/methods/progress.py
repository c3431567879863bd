"""What a training run shows while it runs: a tqdm bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows the progress of one training run on the standard error stream.

    With tqdm installed and a terminal there: a bar of steps. Otherwise a plain line at the end of
    an epoch, at most one in ten seconds, and one at the end; no control codes.

    Args:
        label: what is being trained.
        epochs: epochs of the whole run.
        steps: steps of the whole run.
        done: steps already done by the run that this one resumes.
        enabled: False shows nothing.
        stream: where to write; the standard error stream if None.
        rounds: what the display calls an epoch; of a run that trains nothing, "model".
    """

    def __init__(
        self,
        label: str,
        epochs: int,
        steps: int,
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        rounds: str = "epoch",
    ) -> None:
        self._rounds, self._unit = rounds, "step" if rounds == "epoch" else rounds
        self._label, self._epochs = label, epochs
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._bar = self._make_bar(steps, done) if enabled else None
        self._last_line = time.monotonic()

    def _make_bar(self, steps: int, done: int) -> Any:
        if not self._stream.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(
            total=steps,
            initial=done,
            desc=self._label,
            unit=self._unit,
            file=self._stream,
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def step(self, count: int = 1) -> None:
        """One optimiser step is done, or `count` of them."""
        if self._bar is not None:
            self._bar.update(count)

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch is done; `record` is its line of the history."""
        numbers = f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.4f}"
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{self._rounds} {record['epoch']}/{self._epochs}, {numbers}", refresh=False
            )
        elif self._enabled:
            now = time.monotonic()
            if record["epoch"] == self._epochs or now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                kind = "training " if self._rounds == "epoch" else ""
                place = f"{self._rounds} {record['epoch']}/{self._epochs}"
                print(f"{self._label}: {place}, {kind}{numbers}", file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar; the last state stays visible."""
        if self._bar is not None:
            self._bar.close()
