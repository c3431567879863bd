"""Ctrl-C between two steps instead of inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a whole step.

    Attributes:
        checkpoint: the file that holds everything up to that step, or None if none was asked for.
    """

    def __init__(self, label: str, epoch: int, step: int, checkpoint: Path | None) -> None:
        saved = f"saved {checkpoint}" if checkpoint else "nothing was saved"
        super().__init__(f"{label} stopped in epoch {epoch} after step {step}; {saved}")
        self.checkpoint = checkpoint
        self._arguments = (label, epoch, step, checkpoint)

    def __reduce__(self):  # an executor sends it from the process where training was stopped
        return type(self), self._arguments


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT sets; a second SIGINT interrupts at once.

    Where SIGINT is ignored, belongs to a handler of the application, or cannot be handled (outside
    the main thread), nothing changes and the event is never set.
    """
    event = threading.Event()
    free = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not free:
        yield event
        return

    def handle(number, frame):
        if event.is_set():
            signal.default_int_handler(number, frame)
        event.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
