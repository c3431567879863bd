"""Times one op against its peers; refuses to time a wrong kernel.

    python bench/run.py combine                        # every mode that makes sense here
    python bench/run.py pairwise_divergence --device cpu --mode eager --shape M=10,N=10000,C=10
    python bench/run.py --report                       # the table and figures of bench/results

Modes: `eager` (host clock, launcher included), `graph` (CUDA graph replay: GPU time), `train` and
`train-graph` (forward and backward through autograd). Every row holds ours and all peers measured
in turns in one process, the error against float64, the floor re-measured in the same run, and what
it ran on. Rows are appended to bench/results/<hardware>.jsonl and never edited; a --quick run only
proves that everything works, and is written only where --out says.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import machine, timing  # noqa: E402
from bench.agreement import verify  # noqa: E402
from bench.case import MODES, Bound, Case, Contestant, tensors  # noqa: E402
from bench.cases import OPS, cases  # noqa: E402

AGAIN = " (again)"  # the same contestant twice: their difference is noise


def usable_modes(case: Case, device: str, wanted: str | None) -> list[str]:
    """The modes of the case that this device has, or the one asked for."""
    modes = [m for m in case.modes if device == "cuda" or not m.endswith("graph")]
    return [m for m in modes if wanted in (None, m)]


def make_sets(case: Case, device: str, count: int) -> list[tuple]:
    """`count` sets of inputs, all different."""
    generator = torch.Generator(device=device).manual_seed(0)
    return [case.make(torch.device(device), generator) for _ in range(count)]


def step(contestant: Contestant, bound: Bound, train: bool):
    """The call that is timed: forward, or forward and backward with gradients reset."""
    call = bound.call
    if train:
        incoming = [torch.randn_like(y) for y in tensors([bound.call()])]

        def call():
            outputs = tensors([bound.call()])
            return torch.autograd.grad(outputs, bound.leaves, incoming, allow_unused=True)

    if not contestant.cudagraphs:
        return call

    def marked():
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return marked


def sampler(contestant, sets, mode, device, settings) -> timing.Sampler:
    """A warmed-up, possibly captured contestant, ready to be sampled."""
    direction, how = MODES[mode]
    train = direction != "fwd"
    chosen = sets if how == "graph" else sets[:1]
    calls = [step(contestant, contestant.bind(inputs, train), train) for inputs in chosen]
    if how == "graph":
        return timing.graph_sampler(calls, settings.warmup_ms)
    return timing.wall_sampler(calls[0], device, settings.warmup_ms)


def measure(case: Case, mode: str, device: str, settings: timing.Settings, quick: bool):
    """Yields the rows of one case in one mode: one per contestant, skipped ones with the reason."""
    direction, how = MODES[mode]
    train = direction != "fwd"
    head = {
        "op": case.op,
        "direction": case.direction or direction,
        "mode": mode,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "quick": quick,
        **machine.describe(device),
    }
    everybody = case.contestants(device, quick)
    first = make_sets(case, device, 1)
    size = sum(t.numel() * t.element_size() for t in tensors(first[0]))
    sets = first + make_sets(case, device, timing.sets_for(size, device))[1:]
    context = torch.enable_grad() if train else torch.no_grad()
    with context:
        present, dropped = [], []
        for c in everybody:
            if c.skipped:
                dropped.append((c, {"skipped": c.skipped}))
            elif mode in c.modes and not (c.cudagraphs and how == "graph"):
                present.append(c)
        checked, failures = verify(case, present, sets[0], train)
        dropped += failures
        samplers = {}
        for c in present:
            if c.name not in checked:
                continue
            try:
                samplers[c.name] = sampler(c, sets, mode, device, settings)
            except Exception as exc:  # it cannot be captured, or memory runs out
                kind = "refused" if c.group == "ours" else "skipped"
                dropped.append((c, {kind: f"{type(exc).__name__}: {str(exc)[:300]}"}))
        ours = everybody[0] if everybody[0].name in samplers else None
        if ours:
            samplers[ours.name + AGAIN] = sampler(ours, sets, mode, device, settings)
        samples = timing.interleave(samplers, settings) if ours else {}
    for c, why in dropped:
        yield {**head, "backend": c.name, "group": c.group, **why}
    if not ours:
        return
    again = timing.ratios(samples[ours.name + AGAIN], samples[ours.name])
    noise = max(abs(again["min"] - 1), abs(again["max"] - 1))
    work = case.work[direction]
    floor = machine.floor(work, case.dtype, device, quick)
    clock = machine.clock_mhz() if device == "cuda" else None
    groups = {c.name: c.group for c in present}
    for c in present:
        if c.name not in samples:
            continue
        ms = timing.summary(samples[c.name])
        row = {
            **head,
            "backend": c.name,
            "group": c.group,
            "ms": {k: round(v, 6) for k, v in ms.items()},
            "rounds": settings.rounds,
            "calls": samplers[c.name].calls,
            "sets": len(sets) if how == "graph" else 1,
            "gbs": round(work.bytes / ms["p50"] / 1e6, 3),
            "tflops": round(work.flops / ms["p50"] / 1e9, 4),
            "floor_ms": round(floor["floor_ms"], 6),
            "share_of_floor": round(floor["floor_ms"] / ms["p50"], 4),
            "floor_rates": floor["rates"],
            "noise": round(noise, 4),
            "clock_mhz": clock,
            **checked[c.name],
        }
        if c.note:
            row["note"] = c.note
        if c.group == "ours":
            found = {
                p.name: timing.ratios(samples[p.name], samples[c.name])
                for p in present
                if p.group != "ours" and p.name in samples
            }
            row["ratio"] = {n: {k: round(v, 4) for k, v in r.items()} for n, r in found.items()}
            if c is ours:
                row["targets"] = [
                    t.judge(ms["p50"], {n: r["p50"] for n, r in found.items()}, groups)
                    for t in case.targets
                    if t.mode == mode
                ]
        yield row


def describe_row(row: dict) -> list[str]:
    """A row in one printed line, and a line for each of its targets."""
    if "ms" not in row:
        return [f"  {row['backend']:<34} {row.get('refused') or row.get('skipped')}"]
    error = "" if row["error"] is None else f"error {row['error']:.1e}"
    line = (
        f"  {row['backend']:<34} {row['ms']['p50']:>11.4f} ms "
        f"[{row['ms']['min']:.4f}, {row['ms']['max']:.4f}] "
        f"{100 * row['share_of_floor']:>6.1f} % of floor  {error}"
    )
    lines = [line.rstrip()]
    if row["group"] == "ours":
        lines += [f"    {r['p50']:>8.2f}x {name}" for name, r in row["ratio"].items()]
        for t in row.get("targets", ()):
            verdict = {True: "met", False: "MISSED", None: "not measured"}[t["met"]]
            lines.append(f"    target {t['target']}: {verdict} ({t['value']})")
        lines.append(f"    noise {100 * row['noise']:.1f} %")
    return lines


def run(
    op: str,
    device: str,
    mode: str | None = None,
    shape: str | None = None,
    quick: bool = False,
    out: Path | None = None,
    budget: float = float("inf"),
    settings: timing.Settings | None = None,
) -> list[dict]:
    """Runs the cases of `op`, printing and writing every row as soon as it is there."""
    settings = settings or (timing.QUICK if quick else timing.Settings())
    out = out or (None if quick else machine.results_file(device))
    end = time.monotonic() + budget
    chosen = [c for c in cases(op, device, quick) if matches(c, shape)]
    if not chosen:
        raise SystemExit(f"no case of {op} on {device} has the shape {shape}")
    rows = []
    for case in sorted(chosen, key=lambda c: c.priority):
        for m in usable_modes(case, device, mode):
            print(f"{op} {case.label()} {m}", flush=True)
            if time.monotonic() > end:
                print("  skipped: out of time", flush=True)
                continue
            started = time.monotonic()
            for row in measure(case, m, device, settings, quick):
                rows.append(row)
                print("\n".join(describe_row(row)), flush=True)
                if out:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with open(out, "a") as file:
                        file.write(json.dumps(row) + "\n")
            print(f"  ({time.monotonic() - started:.1f} s)", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
        torch._dynamo.reset()
    return rows


def matches(case: Case, shape: str | None) -> bool:
    """Whether the case has all of "M=4,B=128"."""
    wanted = dict(part.split("=") for part in shape.split(",")) if shape else {}
    return all(str(case.shape.get(k)) == v for k, v in wanted.items())


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 if one of our kernels was refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help="default: all")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--shape", help="only cases with these sizes: M=4,B=128")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--rounds", type=int, help="turns per contestant, at least 5 for a claim")
    parser.add_argument("--rep-ms", type=float, help="time per contestant and round")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="JSON lines go here instead of bench/results")
    parser.add_argument("--report", action="store_true", help="print the table of bench/results")
    options = parser.parse_args(argv)
    if options.report:
        from bench import report

        print(report.write())
        return 0
    settings = timing.QUICK if options.quick else timing.Settings()
    settings = settings._replace(
        rounds=options.rounds or settings.rounds, rep_ms=options.rep_ms or settings.rep_ms
    )
    rows = []
    for op in options.op or OPS:
        rows += run(
            op, options.device, options.mode, options.shape, options.quick, options.out,
            options.budget, settings,
        )
    return int(any(r["group"] == "ours" and "refused" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
