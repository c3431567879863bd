"""Everything a GPU can tell, in under nine minutes: `make gpu`, or `python bench/gpu.py`.

Builds the extension in place with what is there (no network, no installation), runs the GPU tests,
then every bench with its peers, most important part first. A part that fails or runs out of its
time does not stop the next one, and what it had found is kept: one JSON-lines file holds the
machine, every part's outcome, every test that failed and every row of the benches. The last lines
printed say what passed, what was skipped, and which targets were met.

What comes after the benches of the main ops (TabM's step, training, memory, all other benches,
three more sanitizers, large tensors) runs in the time that is left, or not at all.
`--only PART ...` runs parts by name in a time of their own: `--only "bench tabm_step" memory`.

The file is out/landscape_fast_gpu.jsonl, or landscape_fast_gpu.jsonl in $OUT where that is set.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench.report import read  # noqa: E402

LIMIT = 525.0  # seconds, for all parts together
MAIN = "combine"  # up to its bench every part has its time, even if all take all of theirs
TAIL = 8000  # characters of a failed part's output that are kept
WORKERS = 6  # test processes on one GPU: most of their time is the CPU's, compiling kernels
GRACE = 15.0  # between a bench's own budget, which ends between cases, and the kill


class Part(NamedTuple):
    """One subprocess: at most `seconds` of the time, whatever it does."""

    name: str
    command: list[str]
    seconds: float
    needs_gpu: bool = True


def parts(device: str, quick: bool, out: Path) -> list[Part]:
    """All parts, in the order of what we want to know first."""
    python = sys.executable
    listed = ["-p", "bench.pytest_lines", f"--lines={out}"]
    spread = ["-n", str(WORKERS)] if find_spec("xdist") and device == "cuda" else []
    test = [python, "-m", "pytest", "-q", "-x" if quick else "-q", "--tb=short", *listed]
    marked = ["-m", "gpu and not slow"]

    def bench(op: str, seconds: float) -> Part:
        command = [python, "bench/run.py", op, "--device", device, "--out", str(out)]
        command += ["--quick"] if quick else ["--rep-ms", "60"]
        return Part(f"bench {op}", [*command, "--budget", str(seconds)], seconds + GRACE, False)

    loads = "from landscape_fast import _extension as e; assert e.with_cuda, e.error or 'no CUDA'"
    return [
        Part("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 110, False),
        Part("the extension has CUDA kernels", [python, "-c", loads], 15),
        Part("gpu tests", [*test, *spread, "tests/gpu", *marked], 100),
        Part("op tests", [*test, *spread, "tests/ops", "tests/nn"], 65),
        Part("memcheck", [*test, "tests/gpu/test_sanitizer.py", "-k", "memcheck"], 45),
        bench("batch_ensemble_linear", 50),
        bench("batch_ensemble_conv2d", 35),
        bench("pairwise_divergence", 25),
        bench(MAIN, 20),
        bench("tabm_step", 45),
        Part("training tests", [*test, "tests/methods", "tests/metrics", *marked], 40),
        Part("memory", [python, "bench/memory.py", "--device", device, f"--out={out}"], 20),
        bench("deep_together", 25),
        bench("hyper_batch_linear", 20),
        bench("ensemble_summary", 20),
        bench("hyper_batch_conv2d", 15),
        bench("pairwise_disagreement", 12),
        bench("member_batch_norm", 12),
        bench("subspace_conv2d", 25),
        bench("subspace_linear", 15),
        bench("subspace_step", 30),
        bench("sweep", 30),
        bench("landscape_analysis", 30),
        bench("anchor_step", 12),
        bench("gram", 12),
        bench("perturb", 12),
        Part("sanitizers", [*test, "tests/gpu/test_sanitizer.py", "-k", "not memcheck"], 120),
        Part("large tensors", [*test, "tests/gpu/test_limits.py", "-m", "slow"], 60),
    ]


def run_part(part: Part, seconds: float, log) -> dict:
    """Runs it in a process group of its own, which is killed at its time limit."""
    started = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )
    try:
        process.wait(seconds)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "timeout"
    try:  # also whatever it left running
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    code = process.wait()
    taken = round(time.monotonic() - started, 1)
    return {"status": status, "returncode": code, "seconds": taken}


def run(chosen: list[Part], out: Path, limit: float, has_gpu: bool) -> list[dict]:
    """Runs the parts in order within `limit` seconds; appends a record of each to `out`."""
    end = time.monotonic() + limit
    records = []
    for part in chosen:
        left = end - time.monotonic()
        record = {"part": part.name, "command": " ".join(part.command)}
        if part.needs_gpu and not has_gpu:
            record |= {"status": "skipped", "why": "no CUDA device"}
        elif left < 5:
            record |= {"status": "skipped", "why": "no time left"}
        else:
            print(f"== {part.name} (at most {min(part.seconds, left):.0f} s)", flush=True)
            with tempfile.TemporaryFile() as log:
                record |= run_part(part, min(part.seconds, left), log)
                log.seek(0)
                text = log.read().decode(errors="replace")
            record["tail"] = text[-TAIL if record["status"] != "passed" else -1000 :]
            print(text[-2000:] if record["status"] != "passed" else text[-400:], flush=True)
        print(f"   {part.name}: {record['status']}", flush=True)
        append(out, record)
        records.append(record)
    return records


def append(out: Path, record: dict) -> None:
    """One line more in the file that comes out."""
    with open(out, "a") as file:
        file.write(json.dumps(record) + "\n")


def about(device: str) -> dict:
    """The machine, read in a process of its own: this one must live even if CUDA does not."""
    code = (
        "import json; from bench import machine; "
        f"print(json.dumps(machine.describe({device!r})))"
    )
    try:
        text = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        return json.loads(text.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, json.JSONDecodeError, IndexError) as exc:
        return {"device": device, "error": f"{type(exc).__name__}: {exc}"}


def summary(rows: list[dict]) -> str:
    """What passed, what was skipped and why, and which targets were met."""
    lines = ["", "parts"]
    for row in rows:
        if "part" in row:
            why = row.get("why", f"{row.get('seconds')} s")
            lines.append(f"  {row['status']:<8} {row['part']} ({why})")
    tests = [row for row in rows if "test" in row]
    for row in rows:
        if "tests" in row:
            lines.append("tests: " + ", ".join(f"{v} {k}" for k, v in row["tests"].items()))
    for row in tests:
        if row["outcome"] != "skipped":
            lines.append(f"  {row['outcome']}: {row['test']}: {row['message'][-200:]}")
    lines.append("benches")
    reasons = {}
    for row in rows:
        if "backend" in row and "ms" not in row:
            verdict = "REFUSED" if "refused" in row else "skipped"
            why = row.get("refused") or row.get("skipped")
            reasons.setdefault((verdict, row["op"], row["backend"], why[:160]), []).append(row)
    for (verdict, op, backend, why), group in reasons.items():
        lines.append(f"  {verdict} {op}, {backend}, {len(group)} times: {why}")
    lines.append("targets")
    for row in rows:
        for target in row.get("targets", ()):
            verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
            shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
            lines.append(
                f"  {verdict:<12} {row['op']} {shape} {row['dtype']} {row['mode']}: "
                f"{target['target']}: {target['value']} (ours {row['ms']['p50']:.4f} ms)"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="names of parts")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="the file that comes out")
    options = parser.parse_args(argv)
    folder = Path(os.environ.get("OUT") or ROOT / "out")
    out = (options.out or folder / "landscape_fast_gpu.jsonl").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    machine = about(options.device)
    append(out, {"machine": machine})
    print(json.dumps(machine, indent=2), flush=True)
    has_gpu = options.device == "cuda" and "error" not in machine
    if options.device == "cuda" and not has_gpu:
        print("no CUDA device here: nothing to measure; --device cpu --quick shows that all runs")
        return 1
    chosen = [
        p for p in parts(options.device, options.quick, out)
        if not options.only or p.name in options.only
    ]
    records = run(chosen, out, options.limit, has_gpu)
    text = summary(read(out))
    append(out, {"summary": text})
    print(text)
    print(f"\nall of it: {out}")
    return int(any(r["status"] in ("failed", "timeout") for r in records))


if __name__ == "__main__":
    sys.exit(main())
