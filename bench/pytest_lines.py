"""A pytest plugin: every test that does not pass, and the counts so far, as JSON lines.

    python -m pytest -p bench.pytest_lines --lines=FILE

Lines are written as tests end, so a run that is killed leaves what it had found.
"""

import json
import time

EVERY = 5.0  # seconds between two lines of counts


def pytest_addoption(parser):
    parser.addoption("--lines", default=None, help="append JSON lines to this file")


def pytest_configure(config):
    path = config.getoption("--lines")
    if path and not hasattr(config, "workerinput"):  # with xdist: only where reports meet
        config.pluginmanager.register(Lines(path))


class Lines:
    def __init__(self, path):
        self.path = path
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}
        self.written = time.monotonic()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome
            if outcome == "failed" and report.when != "call":
                outcome = "error"
            self.counts[outcome] += 1
            if outcome != "passed":
                self.append({
                    "test": report.nodeid, "outcome": outcome, "message": reason(report)
                })
        if time.monotonic() - self.written > EVERY:
            self.written = time.monotonic()
            self.append({"tests so far": self.counts})

    def pytest_sessionfinish(self):
        self.append({"tests": self.counts})

    def append(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def reason(report) -> str:
    """The last lines of a failure, or why a test was skipped."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    return str(report.longrepr)[-2000:]
